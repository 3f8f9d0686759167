"""What a learnt word is worth beside a LoRA: one photograph, learnt as a word, as a LoRA, and as both.

    python benchmarks/words.py                                    # seed 0
    python benchmarks/words.py --seeds 0 1 2 --folder out/words   # what is trained is kept there

Trains by cfg/word.json, alone or beside a LoRA of rank 8, all equally long. `subject` is the mean PSNR of 8
samples to the photograph (DDIM 25, guidance 1.5) under the caption that was trained, `short` under "a photo
of" the word alone; `others` that of samples of three other prompts, without the word, to those of the base
with the same noise: a word alone moves nothing there. Prints a table, writes words.png, and prints one JSON
line last.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from PIL import Image  # noqa: E402

from benchmarks.trainings import train_once  # noqa: E402
from lorakit.diffusion.lora import load_lora  # noqa: E402
from lorakit.diffusion.models import Base, set_up_backend  # noqa: E402
from lorakit.pictures.images import psnr, read_picture, save_png  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from lorakit.sampling.encoding import PromptEncoder  # noqa: E402
from lorakit.sampling.samplers import make_scheduler, sample_images  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402

PHOTOGRAPH = "dataset/mountain/mountain.jpg"
LORA = ["rank=8", "target_modules=all", "learning_rate=5e-4"]
WORD, START = "<peak>", "mountains"
CAPTION = "a photo of rocky mountains at noon with a forest"
# Way -> settings on top of cfg/word.json, and whether captions have the word.
WAYS: dict[str, tuple[list[str], bool]] = {
    "word": ([], True),
    "LoRA": (["objective=denoise", "textual_inversion=null", "trigger_word=null", *LORA], False),
    "word and LoRA": (['objective=["denoise","textual_inversion"]', *LORA], True),
}
OTHERS = (
    "a photo of rocky mountains at noon with a forest",
    "a photo of snowy mountains at dawn with a lake",
    "a watercolor of green mountains at sunset with sand dunes",
)


def trained(folder: Path, way: str, seed: int) -> tuple[Path, Path]:
    """The LoRA's file and the folder of words, of which one may be missing; from `folder` where they are."""
    name = f"{way.replace(' ', '_')}_{seed}"
    settings = [*WAYS[way][0], "sample_prompts=null"]
    return train_once("cfg/word.json", folder, name, seed, settings), folder / f"{name}_words"


def draw(base: Base, encoder: PromptEncoder, prompts: Sequence[str]) -> list[Image.Image]:
    """A picture of each prompt; picture i has the noise of seed i."""
    prompt_embeds, negative_embeds = encoder.encode(prompts, "")
    return sample_images(
        base,
        prompt_embeds,
        negative_embeds,
        seeds=range(len(prompts)),
        shape=(128, 128),
        steps=25,
        guidance_scale=1.5,
        scheduler=make_scheduler(base, "ddim"),
    )


def samples(lora: Path | None, words: Path | None, named: bool) -> dict[str, list[Image.Image]]:
    """Eight of the subject by its caption, eight by a short one, and those of other prompts."""
    base = Base(inspect_base("ckpt/miniature"))
    if lora is not None and lora.exists():
        load_lora(lora, base.unet, adapter_name="subject")
    encoder = PromptEncoder(base, "a1111", [str(words)] if words is not None and words.exists() else [])
    prompts = {
        "subject": [f"{WORD}, {CAPTION}" if named else CAPTION] * 8,
        "short": [f"a photo of {WORD if named else START}"] * 8,
        "others": OTHERS,
    }
    return {name: draw(base, encoder, texts) for name, texts in prompts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "out/words", help="where files are kept")
    options = parser.parse_args()
    set_up_backend("cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    photograph = read_picture(PHOTOGRAPH, (128, 128))
    base = samples(None, None, False)
    found: list[dict[str, Any]] = []
    strips = []

    def add(way: str, seed: int | None, made: dict[str, list[Image.Image]]) -> None:
        row = {name: mean(psnr(photograph, each) for each in made[name]) for name in ("subject", "short")}
        pairs = zip(made["others"], base["others"], strict=True)
        row["others"] = mean(min(psnr(one, other), 99.0) for one, other in pairs)
        found.append({"way": way, "seed": seed} | row)
        strips.append((f"{way}, {seed}", [photograph, *made["subject"][:3], *made["short"][:3]]))
        print(
            f"{way:14}{seed!s:5}" + "".join(f"  {name} {db:5.1f} dB" for name, db in row.items()), flush=True
        )

    add("base", None, base)
    for way, (_, named) in WAYS.items():
        for seed in options.seeds:
            add(way, seed, samples(*trained(options.folder, way, seed), named))
    sheet = contact_sheet([row for _, row in strips], row_labels=[label for label, _ in strips], cell=96)
    save_png(sheet, options.folder / "words.png")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
