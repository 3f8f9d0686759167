"""Edit one picture by its prompt: at sunset, in snow, by night; what the words have in common stays.

    python edit.py                                               # a mountain at sunset, at night and in snow
    python edit.py image=PICTURE.jpg prompt="a lake at noon" target_prompt="a lake at night"
    python edit.py image=PICTURE.jpg prompt="…" target_prompt="…" mask=MASK.png grid.start=[0,0.2,0.4]
    python edit.py --from out/sunset/0000.png target_prompt="…"  # that result again, but for …

The picture is inverted (Song et al. 2021), and sampled under the new prompt along its own path, each step put
right by what the picture's own step misses it by (after Ju et al. 2024): with the same prompt that is the
picture itself. `lorakit/editing/` has the methods. Reads a base, a picture, LoRA files, a mask. Writes to
<output_dir>/<name>/: numbered PNGs that carry their config, sheet.png, index.html,
report.json.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.editing.config import EditConfig
from lorakit.editing.edit_plan import EditPlan, count_results, describe_edit, make_edit_plan
from lorakit.editing.fitting import fit_missing
from lorakit.editing.imagic_fitting import fit_imagic
from lorakit.editing.imagic_plan import parts_of
from lorakit.ground.command import print_notes
from lorakit.ground.process import run_guarded
from lorakit.pictures.images import psnr
from lorakit.sampling.gallery import Gallery, Picture, fill_folder
from lorakit.sampling.recipe import parse_sampling

if TYPE_CHECKING:
    from PIL.Image import Image

DEFINITIONS = {
    "edge_f1": "harmonic mean of precision and recall of the result's edges against the input's, to a pixel",
    "psnr": "dB against what the autoencoder makes of the picture; null: equal to it",
    "seconds": "for one result of its batch, without the inversion",
}


def edit(cfg: EditConfig, plan: EditPlan, folder: Path) -> list[Path]:
    """Make the results; returns the paths of the sheets."""
    from tqdm import tqdm

    from lorakit.editing.desk import Desk
    from lorakit.pictures.edges import edge_f1
    from lorakit.sampling.page import write_page
    from lorakit.sampling.samplers import open_planned

    started = time.perf_counter()
    base, plan = open_planned(cfg, plan, make_edit_plan)
    desk = Desk(base, cfg, plan, Path(cfg.cache_dir or Path(cfg.output_dir) / "cache"))
    print_notes([*desk.fit_warnings(), *desk.stack.new_notes()])

    before = edges_of(desk.round_trip)
    targets = list(dict.fromkeys(target for _, cell in cfg.numbered_cells() for target in cell.targets()))
    labels = targets if len(cfg.targets()) == len(targets) else ["result"]
    leads = [("picture", desk.picture), ("as the autoencoder returns it", desk.round_trip)]
    gallery = Gallery(folder, cfg, labels, [leads] * len(labels))
    with tqdm(total=count_results(cfg), unit="picture") as bar:
        parts = [(at, part) for at, cell in cfg.numbered_cells() for part in parts_of(cell, plan.fits)]
        for at, cell in parts:
            cell, _ = cell.resolved()
            for result in desk.results(cell):
                subject = labels.index(result.target) if result.target in labels else 0
                facts: dict[str, Any] = {"seconds": round(result.seconds, 4)}
                facts["edge_f1"] = round(edge_f1(before, edges_of(result.image)), 4)
                likeness = psnr(desk.round_trip, result.image)
                facts["psnr"] = round(likeness, 2) if math.isfinite(likeness) else None
                single = cell.single(result.target, result.seed)
                gallery.add(Picture(result.image, subject, result.seed, at, single, result.target, facts))
                bar.update()
    seconds, evaluations = round(time.perf_counter() - started, 2), desk.denoiser.evaluations
    report: dict[str, Any] = {"seconds": seconds, "device": str(base.device), "evaluations": evaluations}
    report |= {"inversion_seconds": round(desk.inversion_seconds, 4), "definitions": DEFINITIONS}
    sheets = gallery.finish(report)
    write_page(gallery, report)
    return sheets


def edges_of(picture: "Image") -> Any:
    """(H, W) bool, by thresholds of the picture's own."""
    from lorakit.pictures.edges import as_floats, auto_thresholds, canny

    values = as_floats(picture)
    return canny(values, 1.0, *auto_thresholds(values))


def main(argv: Sequence[str]) -> int:
    command = parse_sampling(
        EditConfig,
        argv,
        prog="edit.py",
        description="Edit one picture by its prompt; what the words have in common stays.",
        default_config="cfg/edit/mountain.json",
    )
    cfg = command.config
    plan = make_edit_plan(cfg)
    width, height = plan.shape

    def make(folder: Path) -> list[Path]:
        script = Path(__file__).with_name("train_lora.py")
        if plan.fits:
            fit_imagic(cfg, plan, folder, script)
        else:
            fit_missing(cfg, plan.missing, plan.shape, folder, script)
        return edit(cfg, plan, folder)

    return fill_folder(
        command,
        make,
        what=f"{count_results(cfg)} of {cfg.image} at {width}x{height} with {plan.base.name}",
        notes=plan.notes,
        forecast=lambda: describe_edit(cfg, plan),
        files=f"{count_results(cfg)} pictures, report.json",
    )


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
