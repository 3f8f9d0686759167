"""Drag things in a picture from one place to another; the rest stays.

    python drag.py                                     # a peak of the mountain, drawn up and to the left
    python drag.py --page PICTURE                      # a page to point with, which saves drag.json
    python drag.py PATH/drag.json                      # what was pointed at
    python drag.py PATH/drag.json method=drag          # by DragDiffusion
    python drag.py image=PICTURE.jpg prompt="…" points='[[[30, 40], [60, 40]]]' mask=MASK.png

The pixels are moved and their place is filled from around; then the model makes the picture whole from a late
step of its own inverted path, each step put right by what the picture's own step misses it by, so that a drag
of no length is the picture itself. `method=drag` is DragDiffusion (Shi et al. 2024,
https://arxiv.org/abs/2306.14435) on the same path. `lorakit/editing/` has both. Reads a base, a picture, LoRA
files, a mask. Writes to <output_dir>/<name>/: numbered PNGs that carry their config, an overlay with the ways
of each, track.json, sheet.png, index.html, report.json.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit.editing.drag_config import DragConfig
from lorakit.editing.drag_plan import DragPlan, count_drags, describe_drag, make_drag_plan
from lorakit.editing.drag_report import Drag, disagreements, lines_of, track_of
from lorakit.editing.fitting import fit_missing
from lorakit.editing.point_page import write_point_page
from lorakit.ground.command import print_notes, with_picture
from lorakit.ground.process import run_guarded
from lorakit.ground.publish import publish_file
from lorakit.pictures.images import IMAGE_SUFFIXES, psnr, save_png
from lorakit.pictures.overlay import draw_ways
from lorakit.sampling.gallery import Gallery, Picture, fill_folder
from lorakit.sampling.recipe import parse_sampling

DEFINITIONS = {
    "stopped": "why the drag ended",
    "left": "pixels from the target to where the picture shows what was about the handle, mean of the ways",
    "psnr": "dB against what the autoencoder makes of the picture; null: equal to it",
    "seconds": "without the inversion",
}


def drag(cfg: DragConfig, plan: DragPlan, folder: Path) -> list[Path]:
    """Make the results; returns the paths of the sheets."""
    from lorakit.editing.drag_desk import DragDesk
    from lorakit.sampling.page import write_page
    from lorakit.sampling.samplers import open_planned

    started = time.perf_counter()
    base, plan = open_planned(cfg, plan, make_drag_plan)
    desk = DragDesk(base, cfg, plan, Path(cfg.cache_dir or Path(cfg.output_dir) / "cache"))
    print_notes([*desk.fit_warnings(), *desk.stack.new_notes()])

    leads = [("picture", desk.picture), ("as the autoencoder returns it", desk.round_trip)]
    gallery, tracks = Gallery(folder, cfg, ["drag"], [leads]), []
    for number, (at, cell) in enumerate(cfg.numbered_cells()):
        cell, _ = cell.resolved()
        result = desk.drag(cell)
        track, facts = track_of(plan, result), facts_of(desk.round_trip, result)
        left = facts["left"] = round(sum(way["left"] for way in track["ways"]) / len(track["ways"]), 1)
        print(f"drag        {result.stopped}; {left} pixels from the target")
        print_notes(disagreements(plan, result))
        lines = lines_of(plan, result)
        gallery.add(Picture(result.image, 0, cell.seed, at, cell, cell.prompt, facts, lines))
        save_png(draw_ways(result.image, plan.ways, result.track), folder / f"overlay_{number:04d}.png")
        tracks.append({"file": gallery.file(number)} | track)
    publish_file(folder / "track.json", (json.dumps(tracks, indent=2) + "\n").encode())
    seconds, evaluations = round(time.perf_counter() - started, 2), desk.denoiser.evaluations
    report: dict[str, Any] = {"seconds": seconds, "device": str(base.device), "evaluations": evaluations}
    report |= {"inversion_seconds": round(desk.inversion_seconds, 4), "definitions": DEFINITIONS}
    sheets = gallery.finish(report)
    write_page(gallery, report)
    return sheets


def facts_of(round_trip: Image.Image, result: Drag) -> dict[str, Any]:
    """What report.json says of a result."""
    likeness = psnr(round_trip, result.image)
    return {
        "stopped": result.stopped,
        "psnr": round(likeness, 2) if math.isfinite(likeness) else None,
        "seconds": round(result.seconds, 4),
    }


def main(argv: Sequence[str]) -> int:
    pointing = "--page" in argv
    command = parse_sampling(
        DragConfig,
        with_picture(argv, IMAGE_SUFFIXES) if pointing else argv,
        prog="drag.py",
        description="Drag things in a picture from one place to another; the rest stays.",
        # Its points are the mountain's; they do not go with another picture.
        default_config=None if pointing else "cfg/drag/mountain.json",
        flags={"page": "`--page PICTURE`: write a page to point with, then stop"},
    )
    cfg = command.config
    if pointing:
        print(f"page        {write_point_page(cfg)}: open it in a browser")
        return 0
    plan = make_drag_plan(cfg)
    width, height = plan.shape

    def make(folder: Path) -> list[Path]:
        fit_missing(cfg, plan.missing, plan.shape, folder, Path(__file__).with_name("train_lora.py"))
        return drag(cfg, plan, folder)

    return fill_folder(
        command,
        make,
        what=f"{count_drags(cfg)} of {cfg.image} at {width}x{height} with {plan.base.name}",
        notes=plan.notes,
        forecast=lambda: describe_drag(cfg, plan),
        files=f"{count_drags(cfg)} pictures with overlays, track.json, report.json",
    )


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
