"""What is looked at of a morph: animations, sheets, the report in numbers, and the page that shows them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lorakit.diffusion.metrics import (
    DEFINITIONS,
    FeatureDistance,
    cross_fade,
    middle_third,
    path_metrics,
    pixel_std,
    relative_sharpness,
    ssim,
)
from lorakit.film.config import MorphConfig
from lorakit.film.morph_folder import WITHOUT, Version, open_frame
from lorakit.film.morph_plan import MorphPlan
from lorakit.film.page import morph_page
from lorakit.ground.publish import publish_file
from lorakit.pictures.animation import save_animation, timeline, upscale
from lorakit.pictures.images import psnr, save_png, to_array
from lorakit.pictures.page import webp
from lorakit.pictures.sheet import contact_sheet, film_strip

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Measured:
    """A film in numbers: steps between neighbours, relative sharpness of each frame, metrics by name."""

    steps: list[float]
    sharpness: list[float]
    metrics: dict[str, float | None]


def measure(
    frames: Sequence[Image.Image],
    positions: Sequence[float],
    pictures: Sequence[Image.Image],
    distance: FeatureDistance,
) -> Measured:
    """Measure a film.

    Args:
        pictures: what sharpness is compared with, at positions 0, 1, …; in a loop the first one again at the
            end, as among the frames.
    """
    features = distance.features(torch.stack([torch.from_numpy(to_array(frame)) for frame in frames]))
    steps = distance.between([f[:-1] for f in features], [f[1:] for f in features]).tolist()
    cut = [positions.index(float(k)) for k in range(len(pictures))]
    ends = [f[cut] for f in features]
    direct = float(distance.between([f[:-1] for f in ends], [f[1:] for f in ends]).sum())
    sharpness = relative_sharpness(frames, positions, pictures)
    middles = [middle_third(sharpness[a : b + 1]) for a, b in pairwise(cut)]
    more = {"middle_sharpness": float(np.mean(middles)), "pixel_std": pixel_std(frames)}
    return Measured(steps, sharpness, path_metrics(steps, direct, positions) | more)


def write_outputs(
    cfg: MorphConfig,
    plan: MorphPlan,
    folder: Path,
    versions: Sequence[Version],
    pictures: Sequence[Image.Image],
    round_trips: Sequence[Image.Image],
    distance: FeatureDistance,
) -> None:
    """Animations, sheets, report.json and index.html of a film, and of the one without LoRA beside it."""
    folders = (folder, folder / WITHOUT)
    films = [[*map(open_frame, each.frames(where))] for each, where in zip(versions, folders, strict=False)]
    around = [[*film, film[0]] if cfg.loop else film for film in films]
    targets = [*round_trips, round_trips[0]] if cfg.loop else list(round_trips)
    stops = [[*each.positions, float(plan.segments)] if cfg.loop else each.positions for each in versions]
    found = [measure(*pair, targets, distance) for pair in zip(around, stops, strict=True)]
    faded, at = _faded(cfg, plan, targets)
    floor = measure(faded, at, targets, distance)

    save_animations(cfg, folder, "morph", films[0])
    save_png(_film_sheet(cfg, films[0], versions[0].positions), folder / "sheet.png")
    if len(films) == 2:
        save_animations(cfg, folder, "compare", [_beside(*pair) for pair in zip(*films, strict=True)])
        rows = [_spread(film) for film in (*films, faded[: len(films[0])])]
        labels = ["with LoRA", "without LoRA", "cross-fade"]
        save_png(contact_sheet(rows, row_labels=labels), folder / "compare.png")
    report = make_report(cfg, versions, films, found, floor, pictures, round_trips)
    publish_file(folder / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    encoded = [[webp(frame) for frame in film] for film in films]
    page = morph_page(
        f"Morph: {cfg.name}",
        encoded[0],
        report,
        other=encoded[1] if len(encoded) == 2 else (),
        inputs=[webp(picture) for picture in pictures],
        label="with LoRA" if plan.loras else "morph",
    )
    publish_file(folder / "index.html", page.encode())
    print("\n".join(summary(report)))


def make_report(
    cfg: MorphConfig,
    versions: Sequence[Version],
    films: Sequence[Sequence[Image.Image]],
    found: Sequence[Measured],
    floor: Measured,
    pictures: Sequence[Image.Image],
    round_trips: Sequence[Image.Image],
) -> dict[str, Any]:
    """What report.json holds; `other` is the film without LoRA, `cross_fade` the floor of every morph."""
    parts = [
        {
            "frames": _frames(cfg, version_.positions, measured.sharpness, where),
            "distances": measured.steps,
            "metrics": measured.metrics,
            "images": _ends(cfg, version_, film, pictures, round_trips),
            "fit": version_.fit,
            "warnings": version_.warnings,
            "unet_evaluations": version_.evaluations,
            "seconds": round(version_.seconds, 2),
            "attention_bytes": version_.attention_bytes,
        }
        for version_, film, measured, where in zip(versions, films, found, ("", f"{WITHOUT}/"), strict=False)
    ]
    report = parts[0] | {
        "cross_fade": floor.metrics,
        "definitions": DEFINITIONS,
        "settings": cfg.model_dump(mode="json"),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return report | ({"other": parts[1]} if len(parts) == 2 else {})


def _frames(
    cfg: MorphConfig, positions: Sequence[float], sharpness: Sequence[float], where: str
) -> list[dict[str, Any]]:
    last = len(cfg.images) - (1 if cfg.loop else 2)  # segment
    return [
        {
            "index": index,
            "segment": (segment := min(math.floor(position), last)),
            "alpha": position - segment,
            "sharpness": value,
            "file": f"{where}frames/{index:04d}.png",
        }
        # In a loop the first comes again.
        for index, (position, value) in enumerate(zip(positions, sharpness, strict=False))
    ]


def _ends(
    cfg: MorphConfig,
    version_: Version,
    film: Sequence[Image.Image],
    pictures: Sequence[Image.Image],
    round_trips: Sequence[Image.Image],
) -> list[dict[str, Any]]:
    """Each picture: how near its frame comes to it (null: equal), and what its inversion is like."""
    rows = []
    for k, (picture, round_trip) in enumerate(zip(pictures, round_trips, strict=True)):
        frame = film[version_.positions.index(float(k))]
        rows.append(
            cfg.images[k].model_dump(mode="json")
            | {
                "endpoint_psnr": _finite(psnr(frame, picture)),
                "endpoint_ssim": ssim(frame, picture),
                "vae_psnr": _finite(psnr(round_trip, picture)),
                "endpoint_psnr_to_vae": _finite(psnr(frame, round_trip)),
                "noise_mean": version_.noise_mean[k],
                "noise_std": version_.noise_std[k],
                "residual_ratio": version_.residual_ratio[k],
            }
        )
    return rows


def summary(report: dict[str, Any]) -> list[str]:
    """The report in aligned lines, for the terminal."""
    lines = []
    for image in report["images"]:
        likeness = f"its frame {_dB(image['endpoint_psnr'])}, the VAE alone {_dB(image['vae_psnr'])}"
        noise = f"noise std {image['noise_std']:.2f}, residual {image['residual_ratio']:.3f}"
        lines.append(f"picture     {image['path']}: {likeness}; {noise}")
    names = ("directness", "max_over_mean", "max_over_min", "smoothness", "middle_sharpness")
    lines.append("metrics     " + " " * 14 + "".join(f"{name:>18s}" for name in names))
    rows = {"morph": report["metrics"], "cross-fade": report["cross_fade"]}
    if "other" in report:
        rows["without LoRA"] = report["other"]["metrics"]
    for label, metrics in rows.items():
        shown = (
            f"{value:18.2f}" if (value := metrics[name]) is not None else f"{'-':>18s}" for name in names
        )
        lines.append(f"            {label:14s}" + "".join(shown))
    seconds, count = report["seconds"], report["unet_evaluations"]
    lines.append(f"work        {count:,} U-Net evaluations in {seconds:.1f} s")
    return lines


def _dB(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f} dB"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _faded(
    cfg: MorphConfig, plan: MorphPlan, targets: Sequence[Image.Image]
) -> tuple[list[Image.Image], list[float]]:
    """The cross-fade of the same length, and where its frames lie."""
    count = cfg.frames - 1
    frames, at = [], []
    for k in range(plan.segments):
        alphas = [i / count for i in range(count)]
        frames += cross_fade(targets[k], targets[k + 1], alphas)
        at += [k + alpha for alpha in alphas]
    return [*frames, targets[-1]], [*at, float(plan.segments)]


def save_animations(cfg: MorphConfig, folder: Path, name: str, film: Sequence[Image.Image]) -> None:
    times = timeline(len(film), fps=cfg.fps, hold_ms=0 if cfg.loop else cfg.hold_ms, pingpong=cfg.pingpong)
    large = upscale(film, cfg.min_side)
    for suffix in cfg.formats:
        save_animation([large[i] for i, _ in times], folder / f"{name}.{suffix}", [ms for _, ms in times])


def _film_sheet(cfg: MorphConfig, film: Sequence[Image.Image], positions: Sequence[float]) -> Image.Image:
    """Every frame with its alpha, or its position in a film of more than two pictures."""
    name = "at" if len(cfg.images) > 2 or cfg.loop else "alpha"
    return film_strip(film, [f"{name} {position:.3f}" for position in positions], SHEET_COLUMNS)


def _spread(film: Sequence[Image.Image], count: int = SHEET_COLUMNS) -> list[Image.Image]:
    """At most `count` frames, evenly over the film, both ends among them."""
    last = len(film) - 1
    count = min(count, len(film))
    return [film[round(i * last / max(count - 1, 1))] for i in range(count)]


def _beside(a: Image.Image, b: Image.Image, gap: int = 4) -> Image.Image:
    both = Image.new("RGB", (a.width + b.width + gap, a.height), "white")
    both.paste(a, (0, 0))
    both.paste(b, (a.width + gap, 0))
    return both
