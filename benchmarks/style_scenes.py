"""Does a style LoRA make the style? Scenes whose true picture in that style is known.

    python train_lora.py cfg/style.json
    python benchmarks/style_scenes.py                     # about ten minutes on two cores
    python benchmarks/style_scenes.py --starts            # fresh noise against own noise, on photographs too

Forty scenes that nothing was trained on, drawn as photographs, are restyled by style_transfer.py and compared
with the same scenes drawn in the style: by the weight of the LoRA, the control scale and the strength, and
with a LoRA of the same scenes and captions in styles at random; and, with each scene's own words for its
prompt, by the strength. --starts compares fresh noise with each picture's own, with all of the anchor, half
of it and none, at three strengths, and without a style; the two photographs, whose truth is not known, by
their edges alone. --lora FILE measures another LoRA. Prints a table, writes out/style_scenes/scenes.png, with
--starts photos.png too, and prints one JSON line last.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import style_transfer  # noqa: E402
from lorakit.diffusion.metrics import EncoderDistance  # noqa: E402
from lorakit.diffusion.models import Base, set_up_backend  # noqa: E402
from lorakit.ground.randomness import integer  # noqa: E402
from lorakit.pictures.images import load_image, read_picture, save_png, to_array  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from lorakit.sampling.style_plan import find_pictures  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402
from miniature.draw_style import style_scene  # noqa: E402
from miniature.landscapes import STYLES, Scene, render  # noqa: E402

OUT = Path("out/style_scenes")
STYLE, LORA = "an ink drawing", "ckpt/ink.safetensors"
SCENE_SEED = 7_000_000  # far from the tables of all trainings
WEIGHTS, SCALES, STRENGTHS = [0, 0.5, 1], [0, 0.5, 1], [0.5, 0.7, 0.8]
CAPTIONED = [0.5, 0.7, 0.9]  # strengths, with the words of each scene
PHOTOS = "dataset/mountain*/*.jpg"
TOLD = (f"prompt={STYLE} of {{caption}}", "source_prompt=a photo of {caption}")
STARTS = {
    "fresh noise": ("start_from=noise", "guidance_scale=3"),
    "own noise": ("start_from=inversion", "guidance_scale=3", "anchor=0"),
    "own, half anchored": ("start_from=inversion", "guidance_scale=2", "anchor=0.5"),
    "own, anchored": ("start_from=inversion", "guidance_scale=1", "anchor=1"),
}


def draw(count: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Inputs and true results; the inputs are also written as the files that are restyled."""
    folder = OUT / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        path.unlink()
    scenes = [Scene.sample(SCENE_SEED + i) for i in range(count)]
    inputs = [render(scene, "a photo", 128) for scene in scenes]
    for number, image in enumerate(inputs):
        save_png(image, folder / f"{number:03d}.png")
    lines = [
        json.dumps({"file_name": f"{number:03d}.png", "text": scene.caption("a photo")})
        for number, scene in enumerate(scenes)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return inputs, [render(scene, STYLE, 128) for scene in scenes]


def train_shuffled() -> str:
    """A LoRA as cfg/style.json trains it, of the same scenes and captions in styles at random."""
    name, data = "shuffled", OUT / "shuffled_data"
    if not (OUT / f"{name}.safetensors").exists():
        data.mkdir(parents=True, exist_ok=True)
        lines = (ROOT / "dataset/ink/metadata.jsonl").read_text(encoding="utf-8")
        for number in range(len(lines.splitlines())):
            style = STYLES[integer(len(STYLES), 0, "shuffled", number)]
            save_png(render(style_scene(number), style, 128), data / f"{number:03d}.png")
        (data / "metadata.jsonl").write_text(lines, encoding="utf-8")
        options = [f"data_dir={data}", f"output_dir={OUT}", f"ckpt_name={name}", "overwrite=true"]
        options += ["validation_data_dir=null", "validation_steps=0", "early_stop_patience=null"]
        options += ["final_weights=last", "sample_steps=0", "report_to=null"]
        subprocess.run([sys.executable, "train_lora.py", "cfg/style.json", *options], cwd=ROOT, check=True)
    return str(OUT / f"{name}.safetensors")


def restyle(
    name: str, lora: str, *settings: str, **grid: list[Any]
) -> dict[Any, tuple[list[Image.Image], list[float]]]:
    """Value of the grid -> the results and their edge F1."""
    words = [f"image={OUT / 'inputs'}", f"name={name}", f"output_dir={OUT}", f"loras.0.path={lora}"]
    words += ["start_from=noise", f"prompt={STYLE} of mountains", *settings, "overwrite=true"]
    words += [f"grid.{axis}={json.dumps(values)}" for axis, values in grid.items()]
    if style_transfer.main(["cfg/style_transfer/ink.json", *words]):
        raise SystemExit(1)
    ((axis, values),) = grid.items()
    entries = json.loads((OUT / name / "report.json").read_text())["pictures"]
    found = {}
    for value in values:
        own = [entry for entry in entries if entry["cell"] == [f"{axis} {value}"]]
        pictures = [load_image(OUT / name / entry["file"]) for entry in own]
        found[value] = pictures, [entry["edge_f1"] for entry in own]
    return found


Rows: TypeAlias = list[tuple[str, list[float], float]]


def compare_starts(lora: str, judge: "Judge", inputs: list[Image.Image]) -> tuple[Rows, dict[str, float]]:
    """Rows of the table, and the photographs' edge F1; writes the sheets."""
    rows: Rows = []
    photos: dict[str, float] = {}
    columns: dict[str, list[Image.Image]] = {}
    shown: dict[str, list[Image.Image]] = {}
    for number, (name, settings) in enumerate(STARTS.items()):
        found = restyle(f"start_{number}", lora, *TOLD, *settings, strength=CAPTIONED)
        seen = restyle(f"photos_{number}", lora, *TOLD, *settings, f"image={PHOTOS}", strength=CAPTIONED)
        for strength in CAPTIONED:
            label = f"{name}, {strength:g}"
            rows.append((label, judge.distances(found[strength][0]), mean(found[strength][1])))
            columns[label], shown[label] = found[strength][0], seen[strength][0]
            photos[label] = mean(seen[strength][1])
    plain = ("loras.0.weight=0", "prompt=a photo of {caption}", TOLD[1], "strength=0.9")
    for number, name in enumerate(("fresh noise", "own, anchored")):
        ((found, f1),) = restyle(f"plain_{number}", lora, *plain, *STARTS[name], colour=["style"]).values()
        rows.append((f"{name}, no style", judge.distances(found), mean(f1)))
    with_truth = columns | {"the true drawing": judge.drawn}
    for file, first, table in (("scenes", inputs[:6], with_truth), ("photos", photographs(), shown)):
        lines = [[image, *(column[i] for column in table.values())] for i, image in enumerate(first)]
        save_png(contact_sheet(lines, column_labels=["input", *table]), OUT / f"{file}.png")
    return rows, photos


def photographs() -> list[Image.Image]:
    return [read_picture(path, (128, 128)) for path in find_pictures(PHOTOS)]


class Judge:
    """Distance to the true results, in the features of the base's VAE."""

    def __init__(self, base: str, truths: list[Image.Image]):
        set_up_backend("cpu")
        self.distance = EncoderDistance(Base(inspect_base(base)))
        self.drawn, self.truths = truths, self.features(truths)

    def features(self, images: list[Image.Image]) -> list[torch.Tensor]:
        return self.distance.features(torch.from_numpy(np.stack([to_array(image) for image in images])))

    def distances(self, images: list[Image.Image]) -> list[float]:
        return self.distance.between(self.features(images), self.truths).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--base", default="ckpt/miniature")
    parser.add_argument("--lora", default=LORA)
    parser.add_argument(
        "--captions-only", action="store_true", help="the scenes' own words by strength alone"
    )
    parser.add_argument("--starts", action="store_true", help="fresh noise against each picture's own alone")
    options = parser.parse_args()
    inputs, truths = draw(options.scenes)
    judge = Judge(options.base, truths)
    base = torch.tensor(judge.distances(inputs))
    rows: Rows = [("the input itself", base.tolist(), 1.0)]
    more: dict[str, Any] = {}
    if options.starts:
        found, photos = compare_starts(options.lora, judge, inputs)
        rows, more = rows + found, {"photographs_edge_f1": photos}
    else:
        rows += compare_settings(options.lora, judge, inputs, whole=not options.captions_only)
    print(f"\n{'':26}{'distance to the truth':>22}{'closer than the input':>23}{'edge F1':>9}")
    report = {}
    for name, distances, f1 in rows:
        closer = mean(float(d < b) for d, b in zip(distances, base.tolist(), strict=True))
        print(f"{name:26}{mean(distances):22.3f}{closer:23.0%}{f1:9.2f}")
        report[name] = {"distance": mean(distances), "closer_than_input": closer, "edge_f1": f1}
    for name, f1 in more.get("photographs_edge_f1", {}).items():
        print(f"{'photographs, ' + name:71}{f1:9.2f}")
    print(f"wrote {OUT / 'scenes.png'}")
    print(json.dumps({"scenes": options.scenes, "style": STYLE, "rows": report} | more))


def compare_settings(lora: str, judge: Judge, inputs: list[Image.Image], whole: bool) -> Rows:
    """Rows by weight, scale and strength, of a LoRA of shuffled styles, and of own words; writes the sheet.

    Args:
        whole: False leaves own words alone.
    """
    rows: Rows = []
    columns, labels = [inputs], ["input"]
    captioned = restyle("captioned", lora, TOLD[0], strength=CAPTIONED)
    if whole:
        by_weight = restyle("weights", lora, weight=WEIGHTS)
        by_scale = restyle("scales", lora, controlnet_conditioning_scale=SCALES)
        by_strength = restyle("strengths", lora, strength=STRENGTHS)
        shuffled = restyle("shuffled_lora", train_shuffled(), weight=[1])
        rows += [(f"LoRA at weight {w:g}", judge.distances(p), mean(f1)) for w, (p, f1) in by_weight.items()]
        rows += [(f"control scale {s:g}", judge.distances(p), mean(f1)) for s, (p, f1) in by_scale.items()]
        rows += [(f"strength {s:g}", judge.distances(p), mean(f1)) for s, (p, f1) in by_strength.items()]
        rows += [("LoRA of shuffled styles", judge.distances(p), mean(f1)) for p, f1 in shuffled.values()]
        columns += [*(p for p, _ in by_weight.values()), *(p for p, _ in shuffled.values())]
        labels += [*(f"weight {w:g}" for w in WEIGHTS), "shuffled styles"]
    rows += [(f"own words, {s:g}", judge.distances(p), mean(f1)) for s, (p, f1) in captioned.items()]
    columns += [*(p for p, _ in captioned.values()), judge.drawn]
    labels += [*(f"own words, {s:g}" for s in CAPTIONED), "the true drawing"]
    shown = range(min(6, len(inputs)))
    sheet = contact_sheet([[column[i] for column in columns] for i in shown], column_labels=labels)
    save_png(sheet, OUT / "scenes.png")
    return rows


if __name__ == "__main__":
    main()
