"""What is looked at of a film: animations, a sheet, what moved in numbers, and the page that shows it."""

import functools
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image

from lorakit.diffusion.metrics import EncoderDistance, sharpness
from lorakit.film.page import morph_page
from lorakit.ground.publish import publish_file
from lorakit.motion.animate_plan import AnimatePlan
from lorakit.motion.camera import Move, Pose, between
from lorakit.motion.estimate import moves
from lorakit.pictures.animation import save_animation, timeline, upscale
from lorakit.pictures.images import save_png, to_array
from lorakit.pictures.page import webp
from lorakit.pictures.sheet import film_strip

DEFINITIONS = {
    "distance": "feature distance between neighbouring frames in the encoder of the base's VAE",
    "sharpness": "mean absolute Laplacian of the frame, in grey levels",
    "asked": "what the camera was to do from the first frame to the last",
    "measured": "what it did: the shift, growth and turn that fit each frame to the next, put together",
    "fit_psnr": "dB between neighbours after the move that fits best: how well one move explains them",
    "still_psnr": "the same without any move: where fit_psnr is hardly above it, nothing moved as a whole",
    "coherence": "mean feature distance between neighbours; lower is calmer, and a faster camera higher",
}


def as_camera(move: Move, shape: tuple[int, int]) -> dict[str, float]:
    """How the camera moved, where the picture moved so: in the units of a config."""
    scale, angle = math.exp(move.log_scale), -move.angle
    way = -complex(move.dx, move.dy) * complex(math.cos(angle), math.sin(angle)) / scale
    found = {
        "pan": way.real / shape[0],
        "tilt": -way.imag / shape[1],
        "zoom": scale,
        "roll": math.degrees(angle),
    }
    return {name: round(value, 4) for name, value in found.items()}


def measure(
    frames: Sequence[Image.Image], poses: Sequence[Pose], distance: EncoderDistance
) -> dict[str, Any]:
    """`metrics` and `distances` of the report, and the move of each frame to the next."""
    features = distance.features(torch.stack([torch.from_numpy(to_array(frame)) for frame in frames]))
    steps = distance.between([f[:-1] for f in features], [f[1:] for f in features]).tolist()
    found, fitted, still = moves(frames)
    shape = frames[0].size
    metrics = {
        "asked": as_camera(between(poses[0], poses[-1]), shape),
        "measured": as_camera(functools.reduce(Move.then, found), shape),
        "fit_psnr": round(mean(fitted), 2),
        "still_psnr": round(mean(still), 2),
        "coherence": round(mean(steps), 4),
    }
    rows = [
        {
            "asked": as_camera(between(*pair), shape),
            "measured": as_camera(move, shape),
            "fit_psnr": round(fit, 2),
        }
        for pair, move, fit in zip(pairwise(poses), found, fitted, strict=True)
    ]
    return {"metrics": metrics, "distances": [round(step, 5) for step in steps], "moves": rows}


def write_outputs(
    plan: AnimatePlan,
    folder: Path,
    frames: Sequence[Image.Image],
    distance: EncoderDistance,
    told: dict[str, Any],
) -> dict[str, Any]:
    """Animations, sheet, report.json and index.html; returns the report.

    Args:
        told: what the report says besides.
    """
    cfg = plan.cfg
    times = timeline(len(frames), fps=cfg.fps, hold_ms=cfg.hold_ms, pingpong=cfg.pingpong)
    large = upscale(frames, cfg.min_side)
    for suffix in cfg.formats:
        save_animation([large[i] for i, _ in times], folder / f"film.{suffix}", [ms for _, ms in times])
    save_png(film_strip(frames, [str(i) for i in range(len(frames))]), folder / "sheet.png")
    rows = [
        {"index": i, "file": f"frames/{i:04d}.png", "sharpness": round(sharpness(frame), 3)}
        for i, frame in enumerate(frames)
    ]
    report = measure(frames, plan.poses, distance) | {
        "frames": rows,
        "definitions": DEFINITIONS,
        "settings": cfg.model_dump(mode="json"),
        **told,
    }
    publish_file(folder / "report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    page = morph_page(f"Film: {cfg.name}", [webp(frame) for frame in frames], report, label="film")
    publish_file(folder / "index.html", page.encode())
    return report


def summary(report: dict[str, Any]) -> list[str]:
    """The report in aligned lines, for the terminal."""
    metrics = report["metrics"]
    lines = []
    for name in ("asked", "measured"):
        camera = metrics[name]
        lines.append(
            f"{name:11s} pan {camera['pan']:+.2f}, tilt {camera['tilt']:+.2f}, zoom {camera['zoom']:.2f}, "
            f"roll {camera['roll']:+.1f}"
        )
    lines.append(
        f"coherence   {metrics['coherence']:.3f}; neighbours {metrics['still_psnr']:.1f} dB, "
        f"after the move that fits {metrics['fit_psnr']:.1f} dB"
    )
    return lines
