"""What learning a subject costs the rest of the base: plain, with prior, with pictures of its class.

    python benchmarks/subjects.py                                     # every way at seed 0, on the miniature
    python benchmarks/subjects.py --ways plain prior --seeds 0 1 2

Trains one photograph by train_lora.py and cfg/subject.json. `subject` is the mean PSNR of 8 samples of its
caption to the photograph (DDIM 25, guidance 1.5); `others` that of 24 samples of other captions to those of
the base with the same noise (DDIM 10, guidance 3), `obeyed` the share of them in which a classifier finds all
that the caption says, `sharpness` the deviation of their Laplacian. Prints a table and, last, one JSON line.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trainings import train_once  # noqa: E402

# Way -> settings on top of cfg/subject.json, and the weight of the LoRA.
SHORT = ["lr_scheduler_name=constant", "n_epochs=200"]
ALONE = ["objective=denoise", "prior=null"]
CLASS = "a photo of mountains"
WAYS: dict[str, tuple[list[str], float]] = {
    "base": ([], 0.0),
    "plain": ([*ALONE, *SHORT], 1.0),
    "plain at half weight": ([*ALONE, *SHORT], 0.5),
    "plain, 40 steps": ([*ALONE, *SHORT, "max_train_steps=40"], 1.0),
    "plain as long": (ALONE, 1.0),
    "prior": ([], 1.0),
    "prior at 1, 200 steps": (["prior.weight=1", *SHORT], 1.0),
    "prior at 1, 300 steps": (["prior.weight=1", SHORT[0], "n_epochs=300"], 1.0),
    "prior, every sample": (["prior.every=1"], 1.0),
    "prior, two vague prompts": (['prior={"prompts": ["a photo", "a photo of mountains"]}'], 1.0),
    "class images": ([f'prior={{"class_prompt": "{CLASS}", "class_images": 50}}', *SHORT], 1.0),
}
OTHERS = 24
CAPTION = "a photo of rocky mountains at noon with a forest"


def trained(folder: Path, way: str, seed: int) -> tuple[Path | None, float]:
    """The LoRA of a way, from `folder` where it is done, and its seconds per step."""
    settings, weight = WAYS[way]
    if not weight:
        return None, 0.0
    name = f"{'-'.join(settings)}-{seed}"
    name = "".join(sign if sign.isalnum() else "_" for sign in name)[:150]
    path = train_once("cfg/subject.json", folder, name, seed, settings)
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = sorted(rate for line in lines if (rate := json.loads(line).get("images_per_second")))
    return path, 1 / rates[len(rates) // 2]


def measure(folder: Path, way: str, seed: int, common: dict[str, Any]) -> dict[str, float]:
    import torch

    from lorakit.diffusion.lora import load_lora
    from lorakit.diffusion.models import Base
    from lorakit.weights.base import inspect_base
    from miniature.autoencoder import psnr
    from miniature.gates import parts_of, photographs
    from miniature.judging import sample_pictures

    path, seconds = trained(folder, way, seed)
    base = Base(inspect_base("ckpt/miniature"))
    if path is not None:
        load_lora(path, base.unet, adapter_name="subject", weight=WAYS[way][1])
    subject = sample_pictures(parts_of(base), [CAPTION] * 8, range(8), steps=25, guidance_scale=1.5)
    others = sample_pictures(parts_of(base), common["captions"], range(OTHERS), steps=10, guidance_scale=3.0)
    common.setdefault("base", others)
    photograph = photographs(128)[0][:1].expand_as(subject)
    answers = [answer.argmax(1) for answer in common["judge"](others).values()]
    right = torch.stack(answers, 1) == common["labels"]  # (B, heads)
    grey = others.mean(1, keepdim=True)
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return {
        "subject": float(psnr(subject, photograph).mean()),
        "others": float(psnr(others, common["base"]).mean()),
        "obeyed": float(right.all(1).float().mean()),
        "sharpness": float(torch.nn.functional.conv2d(grey, laplace).std()),
        "seconds_per_step": seconds,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "out/subjects", help="where LoRAs are kept")
    options = parser.parse_args(argv)
    from lorakit.diffusion.models import set_up_backend
    from miniature.classifier import trained_classifier
    from miniature.gates import judged_renders

    set_up_backend("cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    _, labels, captions = judged_renders(OTHERS, 128, 0, combinations=True)
    judge = trained_classifier(options.folder, 2400, 900, 128, None)
    common = {"captions": captions, "labels": labels, "judge": judge}
    found = []
    print("| way | seed | subject, dB | others to base, dB | obeyed | sharpness | ms per step |")
    print("|---|---|---|---|---|---|---|")
    for way, seed in [
        ("base", 0),
        *((way, seed) for way in options.ways if way != "base" for seed in options.seeds),
    ]:
        row = measure(options.folder, way, seed, common)
        found.append({"way": way, "seed": seed} | row)
        print(
            f"| {way} | {seed} | {row['subject']:.1f} | {row['others']:.1f} | {row['obeyed']:.2f} | "
            f"{row['sharpness']:.4f} | {1000 * row['seconds_per_step']:.0f} |",
            flush=True,
        )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
