"""Does drag.py bring things where they belong, and leave the rest? Scenes whose true answer is drawn.

    python benchmarks/drag.py                             # all ways, ten minutes on two cores
    python benchmarks/drag.py --ways default "own noise"  # some of them
    python benchmarks/drag.py --scenes 3                  # the discs alone

Seven drags, drag_scenes.py has them. Each result is compared with what the autoencoder makes of the truth:
how far from the target stands what is most like the true target, how near are target, vacated place and all
of the mask to the truth, and the outside to the picture, before it is put back. Prints a table, writes
out/drag_scenes/scenes.png, and prints one JSON line last. What is there of an earlier run is taken from
out/drag_scenes/results; remove that to begin anew.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from drag_scenes import Case, draw_cases  # noqa: E402
from PIL import Image  # noqa: E402

from lorakit.diffusion.denoiser import Rows  # noqa: E402
from lorakit.diffusion.inversion import sample  # noqa: E402
from lorakit.diffusion.models import Base, set_up_backend  # noqa: E402
from lorakit.diffusion.paths import decode_picture, encode_picture  # noqa: E402
from lorakit.diffusion.schedule import Grid  # noqa: E402
from lorakit.editing.drag_config import DragConfig  # noqa: E402
from lorakit.editing.drag_desk import DragDesk  # noqa: E402
from lorakit.editing.drag_plan import make_drag_plan  # noqa: E402
from lorakit.editing.fitting import fit_missing  # noqa: E402
from lorakit.editing.swapping import last  # noqa: E402
from lorakit.ground.config import load_config  # noqa: E402
from lorakit.ground.publish import publish_file  # noqa: E402
from lorakit.ground.randomness import normal  # noqa: E402
from lorakit.pictures.images import load_image, save_png  # noqa: E402
from lorakit.pictures.matching import find_again  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from lorakit.pictures.warping import disc  # noqa: E402
from lorakit.sampling.config import LoraEntry  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402

OUT = Path("out/drag_scenes")
PULLED: dict[str, Any] = {"method": "drag"}
FITTED = PULLED | {"lora": "fitted"}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "own noise": {"noise": "own"},
    "start 0.6": {"start": 0.6},
    "start 0.6, own noise": {"start": 0.6, "noise": "own"},
    "drag": PULLED,
    "drag, start 0.1": PULLED | {"start": 0.1},
    "drag, start 0.7": PULLED | {"start": 0.7},
    "drag, no mask": PULLED | {"mask_weight": 0.0},
    "drag, no reference attention": PULLED | {"reference_attention": False},
    "drag, LoRA": FITTED,
    "drag, LoRA, start 0.1": FITTED | {"start": 0.1},
    "drag, LoRA, start 0.7": FITTED | {"start": 0.7},
    "drag, LoRA, no mask": FITTED | {"mask_weight": 0.0},
}
"""What differs from the default config; `fitted` stands for the LoRA of the scene."""
KINDS = ("disc", "house", "peak")
CONTROLS = ("no drag", "pixels only", "fresh noise")
Row = dict[str, float]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float64)


def db(a: Image.Image, b: Image.Image, where: np.ndarray) -> float:
    """PSNR of the pixels in `where`; 99 for equal ones."""
    error = (levels(a) - levels(b))[where] ** 2
    return float(10 * np.log10(255**2 / error.mean())) if error.any() else 99.0


class Scene:
    """A case on the desk."""

    def __init__(self, base: Base, case: Case):
        folder = OUT / "inputs"
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / case.name.replace(" ", "_")
        save_png(case.before, f"{stem}.png")
        save_png(Image.fromarray((255 * case.mask).astype(np.uint8)), f"{stem}_mask.png")
        self.case, self.lora = case, f"{OUT}/loras/{stem.name}.safetensors"
        keys = {"image": f"{stem}.png", "mask": f"{stem}_mask.png", "prompt": case.prompt}
        keys |= {"points": [case.way], "kind": case.kind, "output_dir": str(OUT)}
        keys |= {"pretrained_model_name_or_path": str(base.info.name)}
        self.cfg = load_config(DragConfig, None, [f"{k}={json.dumps(v)}" for k, v in keys.items()]).config
        self.plan = make_drag_plan(self.cfg, base.info)
        self.desk = DragDesk(base, self.cfg, self.plan, OUT / "cache")
        self.truth = decode_picture(base, encode_picture(base, case.truth)[0])

    def config(self, changes: dict[str, Any]) -> DragConfig:
        changes = changes | ({"lora": self.lora} if changes.get("lora") else {})
        return self.cfg.model_copy(update=changes).resolved()[0]

    def source(self, cfg: DragConfig):
        loras: list[LoraEntry] = list(cfg.all_loras())
        if cfg.lora:
            script = ROOT / "train_lora.py"
            missing = [] if Path(cfg.lora).exists() else [cfg.lora]
            fit_missing(cfg, missing, self.plan.shape, OUT / Path(cfg.lora).stem, script)
        self.desk.stack.use(loras)
        embeds, negative = self.desk.encoder.encode([cfg.prompt], "")
        return self.desk._source(cfg, Rows.plain(embeds.float(), negative.float()), loras)

    def made(self, way: str) -> tuple[Image.Image, float, str]:
        """The result before its outside is put back; seconds without the inversion; why it stopped."""
        desk, cfg = self.desk, self.config(WAYS.get(way, {}))
        if way == "no drag":
            return desk.round_trip, 0.0, ""
        pixels = desk.moved_pixels(cfg)
        if way == "pixels only":
            moved = desk.base.mean_latents(torch.from_numpy(pixels.transpose(2, 0, 1))[None])
            return decode_picture(desk.base, moved[0]), 0.0, ""
        source = self.source(cfg)
        begun = time.process_time()
        if way == "fresh noise":  # SDEdit: not the picture's own way
            moved = desk.base.mean_latents(torch.from_numpy(pixels.transpose(2, 0, 1))[None])
            start, grid = cfg.first_node(), source.grid
            a, noise = grid.alpha_bar[start], normal(tuple(moved.shape), 0, "drag").to(moved)
            rest = Grid(grid.timesteps[start:], grid.alpha_bar[start:])
            with torch.no_grad():
                steps = sample(
                    a**0.5 * moved + (1 - a) ** 0.5 * noise,
                    rest,
                    lambda x, t: desk.denoiser(x, t, source.row),
                )
                return decode_picture(desk.base, last(steps)[0]), time.process_time() - begun, ""
        latents, _, stopped = desk.started(cfg, source)
        image = desk.healed(cfg, source, latents, None)
        return image, time.process_time() - begun, stopped


def row_of(scene: Scene, image: Image.Image, seconds: float) -> Row:
    case, truth = scene.case, scene.truth
    start, end = case.way
    shape = case.mask.shape
    made, wanted = (levels(each).astype(np.float32) for each in (image, truth))
    place, _ = find_again(made, wanted, end, round(case.radius), case.mask)
    at = [disc(shape, point, case.radius) > 0 for point in (end, start)]
    return {
        "left": math.dist(place, end),
        "target": db(image, truth, at[0]),
        "vacated": db(image, truth, at[1] & ~at[0]),
        "mask": db(image, truth, case.mask),
        "outside": db(image, scene.desk.round_trip, ~case.mask),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", default=[*CONTROLS, *WAYS])
    parser.add_argument("--base", default="ckpt/miniature")
    parser.add_argument("--scenes", type=int, default=7, help="the first of seven")
    options = parser.parse_args()
    set_up_backend("cpu")
    info = inspect_base(options.base)
    rows: dict[str, list[Row]] = {}
    cases, shown = draw_cases()[: options.scenes], []
    for case in cases:
        scene, images = Scene(Base(info), case), []  # a base has one stack of LoRAs
        for way in options.ways:
            image, row, stopped = kept_or_made(scene, way)
            rows.setdefault(way, []).append(row)
            images.append(image)
            told = "  ".join(f"{name} {value:.1f}" for name, value in rows[way][-1].items())
            print(f"{case.name:16}{way:30}{told}  {stopped}", flush=True)
        shown.append([case.before, scene.truth, *images])
    table = {way: averages(cases, found) for way, found in rows.items()}
    print(f"\n{'':30}" + "".join(f"{name:>9}" for name in next(iter(table.values()))))
    for way, means in table.items():
        print(f"{way:30}" + "".join(f"{value:9.1f}" for value in means.values()))
    names, heads = [case.name for case in cases], ["picture", "truth", *rows]
    save_png(contact_sheet(shown, row_labels=names, column_labels=heads), OUT / "scenes.png")
    print(f"wrote {OUT / 'scenes.png'}")
    print(json.dumps({"scenes": names, "rows": table}))


def kept_or_made(scene: Scene, way: str) -> tuple[Image.Image, Row, str]:
    """The result, its row and why it stopped, of an earlier run if there was one."""
    stem = OUT / "results" / f"{scene.case.name}, {way}".replace(" ", "_")
    picture, told = Path(f"{stem}.png"), Path(f"{stem}.json")
    if not told.exists():
        stem.parent.mkdir(exist_ok=True)
        image, seconds, stopped = scene.made(way)
        save_png(image, picture)
        publish_file(told, json.dumps([row_of(scene, image, seconds), stopped]).encode())
    return load_image(picture), *json.loads(told.read_text())


def averages(cases: list[Case], rows: list[Row]) -> Row:
    """Means over the scenes, and of what is left by kind of thing; `worst` is the most that is left."""
    by_kind = {
        what: [r["left"] for c, r in zip(cases, rows, strict=True) if c.what == what] for what in KINDS
    }
    means = {f"{what}s": mean(left) for what, left in by_kind.items() if left}
    return (
        means
        | {key: mean(row[key] for row in rows) for key in rows[0]}
        | {"worst": max(r["left"] for r in rows)}
    )


if __name__ == "__main__":
    main()
