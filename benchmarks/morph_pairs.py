"""Does a LoRA make a morph better? Ten pairs of pictures, each morphed with its LoRAs and without.

    python benchmarks/morph_pairs.py                    # all pairs, both guidance scales
    python benchmarks/morph_pairs.py --pairs 0 1 2      # some of them; what is done is kept in out/pairs
    python benchmarks/morph_pairs.py --alone --folder out/smooth_pairs fit_config=cfg/morph/fit_smooth.json

Two photographs of mountains, one of a sunset, and landscapes drawn by miniature/landscapes.py in three
styles, from seeds that nothing was trained on; cfg/morph/fit.json fits a LoRA to each. Prints a table per
guidance scale, writes pairs.png into the folder, and prints one JSON line last.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import morph  # noqa: E402
from lorakit.pictures.images import load_image, save_png  # noqa: E402
from lorakit.pictures.sheet import contact_sheet  # noqa: E402
from miniature.landscapes import Scene, render  # noqa: E402

OUT = Path("out/pairs")
PHOTOS = {
    "ridge": ("dataset/mountain/mountain.jpg", "rocky mountains at noon with a forest"),
    "peak": ("dataset/mountain_up/mountain_up.jpg", "a single rocky mountain at noon with a meadow"),
    "sunset": ("miniature/photos/sunset.jpg", "distant ranges of rocky mountains at sunset with a meadow"),
}
# fmt: off
RENDERS = {
    "lake": ("a photo", Scene(seed=990_001, time="sunset", mountain="snowy", foreground="a lake")),
    "dunes": ("a photo", Scene(seed=990_002, mountain="red desert", foreground="sand dunes")),
    "night": ("a watercolor", Scene(seed=990_003, time="night", mountain="snowy", foreground="a forest")),
    "dawn": ("a flat poster", Scene(seed=990_004, time="dawn", mountain="green", foreground="a meadow")),
    "noon": ("a watercolor", Scene(seed=990_005, mountain="green", foreground="a lake", layers="single")),
}
PAIRS = (
    ("ridge", "peak"), ("ridge", "sunset"), ("peak", "sunset"), ("lake", "dunes"), ("dunes", "night"),
    ("dawn", "noon"), ("lake", "dawn"), ("peak", "dunes"), ("ridge", "noon"), ("sunset", "lake"),
)
# fmt: on
METRICS = ("max_over_mean", "step_cv", "smoothness", "directness", "middle_sharpness")


def pictures(out: Path) -> dict[str, tuple[str, str]]:
    """Name -> (file, prompt); the drawn ones are drawn."""
    found = {name: (path, f"a photo of {shown}") for name, (path, shown) in PHOTOS.items()}
    for name, (style, scene) in RENDERS.items():
        path = out / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(scene, style, 128).save(path)
        found[name] = str(path), scene.caption(style)
    return found


def run(pair: tuple[str, str], guidance: float, args: argparse.Namespace) -> Path:
    """Morph one pair with and without LoRA; returns its folder. What is there already is not made again."""
    out, weight = args.folder, args.lora_weight
    known, name = pictures(out), f"{pair[0]}-{pair[1]}-g{guidance:g}-w{weight:g}"
    folder = out / name
    if not (folder / "index.html").exists():
        images = [
            {
                "path": known[each][0],
                "prompt": known[each][1],
                "lora": str(out / "loras" / f"{each}.safetensors"),
                "lora_weight": weight,
            }
            for each in pair
        ]
        settings = {
            "images": images,
            "output_dir": str(out),
            "name": name,
            "guidance_scale": guidance,
            "num_inference_steps": args.steps,
            "compare": not args.alone,
            "formats": ["webp"],
            "train_if_missing": True,
            "overwrite": True,
        }
        (out / "configs").mkdir(parents=True, exist_ok=True)
        config = out / "configs" / f"{name}.json"
        config.write_text(json.dumps(settings))
        assert morph.main([str(config), *args.settings]) == 0
    return folder


def table(rows: list[tuple[str, list[dict]]], labels: list[str], guidance: float) -> dict:
    """Print the films, labels of them, by pair and metric, and the mean; returns the means."""
    print(f"\nguidance {guidance:g}: {' / '.join(labels)}")
    print(f"{'pair':18s}" + "".join(f"{name:>24s}" for name in METRICS))
    for name, films in rows:
        cells = (" / ".join(f"{film[metric]:5.2f}" for film in films) for metric in METRICS)
        print(f"{name:18s}" + "".join(f"{cell:>24s}" for cell in cells))
    means = {
        metric: {label: mean(films[k][metric] for _, films in rows) for k, label in enumerate(labels)}
        for metric in METRICS
    }
    cells = (" / ".join(f"{value:5.2f}" for value in means[metric].values()) for metric in METRICS)
    print(f"{'mean':18s}" + "".join(f"{cell:>24s}" for cell in cells))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="*", default=list(range(len(PAIRS))))
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 2.0])
    parser.add_argument("--lora-weight", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--alone", action="store_true", help="with LoRAs only")
    parser.add_argument("--folder", type=Path, default=OUT, help="where LoRAs and films are kept")
    parser.add_argument("settings", nargs="*", help="key=value for morph.py")
    args = parser.parse_intermixed_args()
    result: dict = {
        "lora_weight": args.lora_weight,
        "steps": args.steps,
        "settings": args.settings,
        "pairs": [PAIRS[k] for k in args.pairs],
    }
    strips, names = [], []
    versions = [("", "with")] if args.alone else [("", "with"), ("without_lora", "without")]
    for guidance in args.guidance:
        rows = []
        for k in args.pairs:
            folder = run(PAIRS[k], guidance, args)
            report = json.loads((folder / "report.json").read_text())
            others = [] if args.alone else [report["other"]["metrics"]]
            rows.append(("-".join(PAIRS[k]), [report["metrics"], *others, report["cross_fade"]]))
            for sub, label in versions:
                frames = sorted((folder / sub / "frames").glob("*.png"))
                strips.append([load_image(frames[round(i * (len(frames) - 1) / 8)]) for i in range(9)])
                names.append(f"{'-'.join(PAIRS[k])}, guidance {guidance:g}, {label} LoRA")
        means = table(rows, [*(label for _, label in versions), "cross_fade"], guidance)
        result[f"guidance_{guidance:g}"] = {"mean": means, "rows": [[name, *films] for name, films in rows]}
    save_png(contact_sheet(strips, row_labels=names, cell=96), args.folder / "pairs.png")
    print(f"\nsheet {args.folder / 'pairs.png'}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
