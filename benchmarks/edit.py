"""Does edit.py make the edit, and leave the rest? Scenes whose true picture after the edit is known.

    python benchmarks/edit.py                             # five kinds of edit, three minutes on two cores
    python benchmarks/edit.py --scenes 3 --classifier     # of each kind; once ten minutes for the judge
    python benchmarks/edit.py --starts 0 0.6 --sdedit 0.3                       # fewer rows
    python benchmarks/edit.py --starts 0 --sdedit 0.3 --imagic 3                # two minutes for each imagic

Scenes that nothing was trained on are drawn as photographs; their captions are edited (noon to sunset, rocky
to snowy, …), and the renderer draws what is right: the same ridges under another sun. Each result is
compared with what the autoencoder makes of that truth: its effect is the share of the true change that was
made; with --classifier also what a classifier of renders says of the wanted attribute. What the true edit
leaves is looked at as a whole, and from two cells of the latents off what changes. Controls: the picture's
own prompt, nothing kept by reach, later starts, SDEdit at three strengths; imagic without its first stage,
and without its second. Prints a table, writes out/edit_scenes/scenes.png, and prints one JSON line last. What
an earlier run made with the same settings is taken from out/edit_scenes; remove that to begin anew.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402

import edit  # noqa: E402
from lorakit.diffusion.models import Base, set_up_backend  # noqa: E402
from lorakit.diffusion.paths import decode_picture, encode_picture  # noqa: E402
from lorakit.ground.publish import publish_file  # noqa: E402
from lorakit.pictures.edges import edge_f1  # noqa: E402
from lorakit.pictures.images import load_image, save_png, to_array  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402
from miniature.classifier import HEADS, Classifier, trained_classifier  # noqa: E402
from miniature.landscapes import Scene, held_out, render  # noqa: E402

OUT = Path("out/edit_scenes")
STYLE = "a photo"
SCENE_SEED = 7_100_000  # far from the tables of all trainings
EDITS: dict[str, tuple[str, Any, Any]] = {
    "noon to sunset": ("time", "noon", "sunset"),
    "noon to night": ("time", "noon", "night"),
    "rocky to snowy": ("mountain", "rocky", "snowy"),
    "red desert to green": ("mountain", "red desert", "green"),
    "lake to forest": ("foreground", "a lake", "a forest"),
}
SAME = "own prompt"
RIM = 16  # pixels: two cells of the latents
IMAGIC = ("noon to sunset", "rocky to snowy", "lake to forest", "noon to night", "red desert to green")
ETAS = [0, 0.6, 0.8, 1, 1.2]
Row: TypeAlias = dict[str, float | None]


@dataclass(frozen=True)
class Case:
    """A scene and what it becomes: renders, and what the autoencoder makes of them."""

    name: str
    attribute: str
    wanted: str
    path: Path
    prompts: tuple[str, str]
    before: Image.Image
    after: Image.Image
    truth: Image.Image
    trip: Image.Image

    @property
    def stays(self) -> np.ndarray:
        """(H, W): where the true edit changes nothing."""
        return np.abs(levels(self.before) - levels(self.after)).max(2) <= 1

    @property
    def is_far(self) -> np.ndarray:
        """(H, W): where it changes nothing within RIM pixels."""
        changes = Image.fromarray(np.where(self.stays, 0, 255).astype(np.uint8))
        return np.asarray(changes.filter(ImageFilter.MaxFilter(2 * RIM + 1))) == 0


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float64)


def db(a: Image.Image, b: Image.Image, where: np.ndarray | None = None) -> float | None:
    """PSNR, of the pixels in `where`; None for too few of them, 99 for equal ones."""
    error = (levels(a) - levels(b)) ** 2
    if where is not None:
        if where.mean() < 0.05:
            return None
        error = error[where]
    return float(10 * np.log10(255**2 / error.mean())) if error.any() else 99.0


def draw_cases(base: Base, count: int) -> list[Case]:
    """`count` scenes for each kind of edit, neither of them held out; their pictures go to files."""
    cases, seed = [], SCENE_SEED
    (OUT / "inputs").mkdir(parents=True, exist_ok=True)
    plain = {"disc": False, "clouds": False, "trees": False, "house": False}
    for name, (attribute, old, new) in EDITS.items():
        found = 0
        while found < count:
            seed += 1
            scene = Scene.sample(seed, **plain, **{attribute: old})
            if attribute != "time":
                scene = replace(scene, time="noon")
            other = replace(scene, **{attribute: new})
            if held_out(STYLE, scene) or held_out(STYLE, other):
                continue
            before, after = (render(each, STYLE, 128) for each in (scene, other))
            path = OUT / "inputs" / f"{name.replace(' ', '_')}_{found}.png"
            save_png(before, path)
            trip, truth = (decode_picture(base, encode_picture(base, each)[0]) for each in (before, after))
            prompts = scene.caption(STYLE), other.caption(STYLE)
            cases.append(Case(name, attribute, new, path, prompts, before, after, truth, trip))
            found += 1
    return cases


def run(case: Case, base: str, tag: str, **keys: Any) -> tuple[dict[str, Image.Image], float]:
    """Cell -> the result of edit.py, and seconds for one of them at most, without the inversion."""
    name = f"{case.path.stem}_{tag}"
    settings = {"image": str(case.path), "prompt": case.prompts[0], "target_prompt": case.prompts[1]}
    settings |= {"guidance_scale": None, "num_inference_steps": None}
    settings |= {"pretrained_model_name_or_path": base, "output_dir": str(OUT), "name": name, "lora": None}
    words = [f"{key}={json.dumps(value)}" for key, value in (settings | keys | {"overwrite": True}).items()]
    told, begun = OUT / f"{name}.json", time.perf_counter()
    if not told.exists() or json.loads(told.read_text(encoding="utf-8"))["settings"] != words:
        if edit.main(["cfg/edit/mountain.json", *words]):
            raise SystemExit(1)
        spent = {"settings": words, "seconds": time.perf_counter() - begun}
        publish_file(told, json.dumps(spent).encode())
    entries = json.loads((OUT / name / "report.json").read_text(encoding="utf-8"))["pictures"]
    found = {" ".join(entry["cell"]): load_image(OUT / name / entry["file"]) for entry in entries}
    return found, max(entry["seconds"] for entry in entries)


@torch.no_grad()
def attribute(model: Classifier | None, case: Case, image: Image.Image) -> float | None:
    """What of the wanted attribute is there, 0 to 1; None without a classifier."""
    if model is None:
        return None
    logits = model(torch.from_numpy(to_array(image))[None])[case.attribute]
    known: tuple[str, ...] = HEADS[case.attribute]
    return float(logits.softmax(1)[0, known.index(case.wanted)])


def effect(case: Case, image: Image.Image) -> float:
    """The share of the true change that was made: <result - input, truth - input> / |truth - input|^2."""
    made, wanted = levels(image) - levels(case.trip), levels(case.truth) - levels(case.trip)
    return float((made * wanted).sum() / (wanted * wanted).sum())


def row_of(case: Case, image: Image.Image, model: Classifier | None) -> Row:
    return {
        "effect": effect(case, image),
        "attribute": attribute(model, case, image),
        "edge_f1": edge_f1(edit.edges_of(case.trip), edit.edges_of(image)),
        "truth": db(image, case.truth),
        "stay": db(image, case.trip, case.stays),
        "far": db(image, case.trip, case.is_far),
        "input": db(image, case.trip),
    }


def run_imagic(case: Case, base: str) -> tuple[dict[str, Image.Image], float]:
    """Way -> the result, by eta and without a stage; and the seconds of all but the controls."""
    own = str(OUT / f"{case.path.stem}_imagic.safetensors")
    keys: dict[str, Any] = {"method": "imagic", "train_if_missing": True, "lora": own}
    found, _ = run(case, base, "imagic", **keys, grid={"eta": ETAS})
    results = {f"imagic, {cell}": image for cell, image in found.items()}
    seconds = json.loads((OUT / f"{case.path.stem}_imagic.json").read_text(encoding="utf-8"))["seconds"]
    found, _ = run(case, base, "no_lora", **keys, lora_weight=0, grid={"eta": [0, 1]})
    results |= {f"no second stage, {cell}": image for cell, image in found.items()}
    other = {"lora": str(OUT / f"{case.path.stem}_target.safetensors")}
    still = {"embed_steps": 1, "embed_learning_rate": 1e-12}
    found, _ = run(case, base, "no_embedding", **(keys | other | still))
    return results | {"no first stage": found[""]}, seconds


def average(rows: list[Row]) -> Row:
    values = {key: [each for row in rows if (each := row[key]) is not None] for key in rows[0]}
    return {key: round(mean(found), 3) if found else None for key, found in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=1, help="of each kind")
    parser.add_argument("--starts", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6])
    parser.add_argument("--sdedit", type=float, nargs="+", default=[0.5, 0.3, 0.1])
    parser.add_argument("--imagic", type=int, default=0, help="kinds of edit, the first scene of each")
    parser.add_argument("--classifier", action="store_true")
    parser.add_argument("--base", default="ckpt/miniature")
    options = parser.parse_args()
    set_up_backend("cpu")
    cases = draw_cases(Base(inspect_base(options.base)), options.scenes)
    judge = trained_classifier(Path("out/miniature"), 2400, 900, 128, None) if options.classifier else None
    shown, seconds, fits, rows = [], [], [], dict[str, list[Row]]()
    for case in cases:
        results = {"the input": case.trip, "the truth": case.truth}
        swapped, spent = run(case, options.base, "swap", grid={"start": options.starts})
        drawn, _ = run(case, options.base, "sdedit", method="sdedit", grid={"start": options.sdedit})
        own, _ = run(case, options.base, "own", target_prompt=case.prompts[0])
        free, _ = run(case, options.base, "free", keep_below=0)
        seconds.append(spent)
        results |= {f"swap, {cell}": image for cell, image in swapped.items()}
        results |= {"nothing kept": free[""]}
        results |= {f"sdedit, {cell}": image for cell, image in drawn.items()} | {SAME: own[""]}
        shown.append([case.before, *results.values()])
        if case.name in IMAGIC[: options.imagic] and case.path.stem.endswith("_0"):
            more, spent = run_imagic(case, options.base)
            fits.append(spent)
            results |= more
        for way, image in results.items():
            rows.setdefault(way, []).append(row_of(case, image, judge))
    table = {way: average(found) for way, found in rows.items()}
    if fits:
        print(f"\nimagic: {mean(fits):.0f} seconds for an edit at {len(ETAS)} etas, its fits among them")
    print(f"\n{'':22}" + "".join(f"{name:>11}" for name in table[SAME]))
    for way, means in table.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in means.values())
        print(f"{way:22}" + "".join(f"{cell:>11}" for cell in cells))
    ways = list(rows)[: len(shown[0]) - 1]  # without imagic's, which not every case has
    for key in ("effect", "attribute"):
        for way in ways if judge or key == "effect" else ():
            of_kind = {name: [] for name in EDITS}
            for case, row in zip(cases, rows[way], strict=True):
                of_kind[case.name].append(row[key])
            told = "  ".join(f"{name} {min(values):.2f}" for name, values in of_kind.items())
            print(f"least {key} of {way:16} {told}")
    equal = all((levels(case.trip) == levels(row[-1])).all() for case, row in zip(cases, shown, strict=True))
    print(f"own prompt equal to the round trip: {equal}; seconds for a result {mean(seconds):.1f}")
    labels = ["picture", *ways]
    captions = [case.name for case in cases]
    save_png(contact_sheet(shown, row_labels=captions, column_labels=labels), OUT / "scenes.png")
    print(f"wrote {OUT / 'scenes.png'}")
    report = {"scenes": len(cases), "equal": equal, "seconds": mean(seconds), "imagic": fits, "rows": table}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
