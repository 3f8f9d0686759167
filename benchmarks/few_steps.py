"""What few steps cost in pictures: an LCM-LoRA beside the base at the best samplers of as many evaluations.

    python train_lora.py cfg/lcm.json
    python benchmarks/few_steps.py                                           # about ten minutes on two cores
    python train_lora.py cfg/style.json
    python benchmarks/few_steps.py --style ckpt/ink.safetensors
    python benchmarks/few_steps.py --lora ckpt/ink_lcm.safetensors --styled ckpt/ink.safetensors
    python benchmarks/few_steps.py --lora ckpt/lcm_0.safetensors ckpt/lcm_1.safetensors   # beside each other

Every prompt and seed is the same in all rows. Sharpness and texture distance are told of the base at 25 steps
(with `--style` or `--styled` of the style LoRA there), texture in units of its distance between two sets of
renders. The classifier is blind to blur, and shows that few steps make the right thing. Prints a table,
writes out/few_steps/sheet.png, and prints one JSON line last.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from lorakit.diffusion.metrics import EncoderDistance  # noqa: E402
from lorakit.diffusion.models import Base, set_up_backend  # noqa: E402
from lorakit.pictures.images import from_array, save_png, to_array  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from lorakit.sampling.config import LoraEntry  # noqa: E402
from lorakit.sampling.samplers import LoraStack, encode_prompts, make_scheduler, sample_images  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402
from miniature.classifier import obeyed, trained_classifier  # noqa: E402
from miniature.gates import judged_renders  # noqa: E402
from miniature.judging import sharpness, texture, texture_distance  # noqa: E402
from miniature.pictures import judging_scene  # noqa: E402

FIRST = 4_000_000  # of the scenes that are judged, far from all others
STYLE = "an ink drawing"
GOALS = {4: (0.90, 0.45, 0.97), 2: (0.85, 0.45, 0.95)}
"""Evaluations of the U-Net -> sharpness at least, texture distance at most, obedience at least."""


@dataclass(frozen=True)
class Way:
    """One row: LoRAs by name, a sampler, and what it costs."""

    loras: tuple[str, ...]
    scheduler: str
    steps: int
    guidance: float

    @property
    def evaluations(self) -> int:
        return self.steps * (2 if self.guidance > 1 else 1)

    def __str__(self) -> str:
        who = " + ".join(self.loras) or "base"
        return f"{who}, {self.scheduler} {self.steps}, guidance {self.guidance:g}"


def ways(style: bool, styled: bool, names: Sequence[str]) -> list[Way]:
    """The reference first; then the LoRAs that were named, and their controls."""
    reference = ("style",) if style or styled else ()
    students = [("style", name) if style else (name,) for name in names]
    found = [Way(reference, "ddim", 25, 3.0)]
    for steps in (2, 4):
        found += [Way(student, "lcm", steps, 1.0) for student in students]
        found += [
            Way(reference, "lcm", steps, 1.0),
            Way(reference, "dpm++", max(1, steps // 2), 3.0),
            Way(reference, "trailing", steps, 1.0),
            Way(students[0], "trailing", steps, 1.0),
        ]
    if style:
        found.append(Way((names[0],), "lcm", 4, 1.0))
    return [*found, Way(students[0], "lcm", 1, 1.0), Way(students[0], "lcm", 8, 1.0)]


def scheduler_of(base: Base, name: str) -> Any:
    """As in configs; "trailing" is DDIM that starts at the last timestep, its best in few steps."""
    if name != "trailing":
        return make_scheduler(base, name)
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")


def draw(base: Base, way: Way, captions: Sequence[str]) -> Tensor:
    """(B, 3, H, W) in [-1, 1]; picture i has the noise of seed i."""
    side, pictures = base.info.resolution, []
    for start in range(0, len(captions), 16):
        seeds = range(start, min(start + 16, len(captions)))
        embeds = encode_prompts(base, [*captions[start : seeds.stop], ""])
        pictures += sample_images(
            base,
            embeds[:-1],
            embeds[-1:],
            seeds=seeds,
            shape=(side, side),
            steps=way.steps,
            guidance_scale=way.guidance,
            scheduler=scheduler_of(base, way.scheduler),
        )
    return torch.stack([torch.from_numpy(to_array(picture)) for picture in pictures])


def card(rows: Sequence[tuple[Way, list[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Five prompts at 25 steps, and at 4 evaluations by the first LoRA and by the best that the base can."""
    four = [(way, pictures) for way, pictures in rows if way.evaluations == 4 and way.scheduler != "trailing"]
    student, *others = four
    shown = [
        (f"{rows[0][0].evaluations} evaluations: DDIM, 25 steps, guidance 3", rows[0][1]),
        ("4: the LCM-LoRA", student[1]),
        *((f"4: without it, {way.scheduler}", made) for way, made in others if way.loras == rows[0][0].loras),
    ]
    return contact_sheet(
        [pictures[:5] for _, pictures in shown],
        row_labels=[label for label, _ in shown],
        column_labels=list(captions[:5]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", nargs="+", default=["ckpt/lcm.safetensors"])
    parser.add_argument("--style", help="a style LoRA that is mixed with it, at weight 0.8")
    parser.add_argument("--styled", help="the style LoRA that its teacher had")
    parser.add_argument("--base", default="ckpt/miniature")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--classifier", type=int, nargs=2, default=(2400, 900), metavar=("PICTURES", "STEPS"))
    parser.add_argument("--out", default="out/few_steps")
    args = parser.parse_args()
    set_up_backend("cpu")
    base, out = Base(inspect_base(args.base)), Path(args.out)
    side, distance = base.info.resolution, EncoderDistance(base)
    renders, labels, captions = judged_renders(args.pictures, side, FIRST)
    others = judged_renders(args.pictures, side, FIRST + 1_000_000)[0]
    unit = texture_distance(texture(distance, renders), texture(distance, others))
    in_style, judge = args.style or args.styled, None
    if not in_style:  # the judge knows the styles of the base
        count, steps = args.classifier
        judge = trained_classifier(Path("out/miniature"), count, steps, side, None)
    else:
        captions = [judging_scene(FIRST + i, STYLE).caption(STYLE) for i in range(args.pictures)]
    files = {Path(path).stem: (path, 1.0) for path in args.lora}
    names = list(files)
    files["style"] = in_style, 0.8 if args.style else 1.0
    stack, rows, sheets, reference = LoraStack(base), [], [], None
    print(f"{'':44}evaluations  sharpness  texture  obeyed")
    made = ways(bool(args.style), bool(args.styled), names)
    for way in made:
        weights = {"style": 1.0} if way.loras == ("style",) else {}
        used = [(files[name][0], weights.get(name, files[name][1])) for name in way.loras]
        stack.use([LoraEntry(path=path, weight=weight, blocks={}, rank=None) for path, weight in used])
        pictures = draw(base, way, captions)
        sharp, moments = sharpness(pictures), texture(distance, pictures)
        reference = reference or (sharp, moments)
        row = {"sharpness": sharp / reference[0], "texture": texture_distance(moments, reference[1]) / unit}
        right = None if judge is None else obeyed(judge, pictures, labels)
        goal = GOALS.get(way.evaluations)
        rows.append({"way": asdict(way), "evaluations": way.evaluations, **row, "obeyed": right})
        print(
            f"{way!s:44}{way.evaluations:11d}{row['sharpness']:11.2f}{row['texture']:9.2f}"
            + ("" if right is None else f"{right:8.2f}")
            + ("" if goal is None or right is None else f"  {met(row, right, goal)}")
        )
        sheets.append((str(way), [from_array(picture.numpy()) for picture in pictures[:6]]))
    sheet = contact_sheet(
        [pictures for _, pictures in sheets],
        row_labels=[label for label, _ in sheets],
        column_labels=list(captions[:6]),
    )
    out.mkdir(parents=True, exist_ok=True)
    save_png(sheet, out / "sheet.png")
    card([(way, pictures) for way, (_, pictures) in zip(made, sheets, strict=True)], captions).save(
        out / "card.webp", "WEBP", quality=90, method=6
    )
    print(f"wrote       {out / 'sheet.png'}")
    print(json.dumps({"lora": args.lora, "style": in_style, "rows": rows}))


def met(row: dict[str, float], right: float, goal: tuple[float, float, float]) -> str:
    """Whether a row reaches its goal."""
    sharp, far, least = goal
    return "reached" if row["sharpness"] >= sharp and row["texture"] <= far and right >= least else "missed"


if __name__ == "__main__":
    main()
