"""The parts of benchmarks/figures.py: what is run, what is kept of it, and what pages show."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
Values = Any


@dataclass(frozen=True)
class Command:
    """A script and its arguments. `report` is the JSON file that it leaves, "" the last line that it prints,
    None nothing."""

    words: tuple[str, ...]
    report: str | None = ""


@dataclass(frozen=True)
class Part:
    """Figures of one subject.

    `values` makes what is kept of what the commands said, in their order; `shown` has Markdown of it by
    name, `pictures` the bytes of files in docs.
    """

    commands: tuple[Command, ...]
    values: Callable[..., Values] = lambda *_: {}
    shown: Mapping[str, Callable[[Values], str]] = field(default_factory=dict)
    pictures: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def strip(*files: str, side: int = 128, gap: int = 4) -> bytes:
    """Pictures beside each other on white, WebP."""
    tiles = [Image.open(ROOT / name).convert("RGB").resize((side, side)) for name in files]
    sheet = Image.new("RGB", (len(tiles) * (side + gap) - gap, side), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number * (side + gap), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=90, method=6)
    return buffer.getvalue()


def file(name: str) -> bytes:
    return (ROOT / name).read_bytes()


def semicolons(*numbers: float) -> str:
    return "; ".join(f"{number:.2f}" for number in numbers)


# ---- invert.py ----


def invert_values(plain: Values, fitted: Values) -> Values:
    kept = ("method", "guidance_scale", "psnr_to_vae", "inversion_evaluations", "sampling_evaluations")
    rows = [{key: row[key] for key in (*kept, "noise_std")} for row in plain["rows"]]
    return {"methods": rows, "after_lora": fitted["rows"][0]["psnr_to_vae"]}


def invert_methods(values: Values) -> str:
    header = (
        *("method", "guidance", "PSNR to the VAE's round trip"),
        *("U-Net evaluations, there + back", "noise, standard deviation"),
    )
    return table(
        header,
        [
            (
                row["method"],
                f"{row['guidance_scale']:g}",
                "equal" if row["psnr_to_vae"] is None else f"{row['psnr_to_vae']:.1f} dB",
                f"{row['inversion_evaluations']} + {row['sampling_evaluations']}",
                f"{row['noise_std']:.2f}",
            )
            for row in values["methods"]
        ],
    )


INVERT = Part(
    commands=(
        Command(("invert.py",), "out/invert/mountain/report.json"),
        Command(
            (
                *("invert.py", "lora=ckpt/mountain.safetensors", 'methods=["ddim"]', "guidance_scales=[1]"),
                "output_dir=out/figures/fitted",
            ),
            "out/figures/fitted/mountain/report.json",
        ),
    ),
    values=invert_values,
    shown={"methods": invert_methods, "after_lora": lambda values: f"{values['after_lora']:.1f}"},
)


# ---- morph.py ----

MORPH_METRICS = ("max_over_mean", "max_over_min", "directness", "middle_sharpness")


def morph_values(*reports: Values) -> Values:
    """Of the shipped morph compared, of its LoRAs at other weights, and of gentler LoRAs at two."""
    metrics = [{key: report["metrics"][key] for key in MORPH_METRICS} for report in reports]
    first = reports[0]
    return {
        "ends_to_photographs": [image["endpoint_psnr"] for image in first["images"]],
        "ends_are_round_trips": all(image["endpoint_psnr_to_vae"] is None for image in first["images"]),
        "morph": metrics[0],
        "without": {key: first["other"]["metrics"][key] for key in MORPH_METRICS},
        "cross_fade": {key: first["cross_fade"][key] for key in MORPH_METRICS},
        "weights": metrics[1:4],
        "gentle": metrics[4:],
    }


def morph_ways(values: Values) -> str:
    def row(label: str, *films: Values) -> list[str]:
        return [label, *(semicolons(*(film[key] for film in films)) for key in MORPH_METRICS)]

    header = ("", "largest step / mean", "largest / smallest", "directness", "sharpness of the middle")
    return table(
        header,
        [
            row("morph", values["morph"]),
            row("without LoRA", values["without"]),
            row("the LoRAs at weight 0.1; 0.5; 1", *values["weights"]),
            row("LoRAs of `cfg/morph/fit.json`, weight 0.5; 1", *values["gentle"]),
            row("cross-fade of the two, the floor", values["cross_fade"]),
        ],
    )


def morph_command(name: str, *settings: str) -> Command:
    return Command(("morph.py", *settings, f"name={name}"), f"out/morph/{name}/report.json")


def both(weight: str) -> tuple[str, str]:
    return f"images.0.lora_weight={weight}", f"images.1.lora_weight={weight}"


GENTLE = (
    *("fit_config=cfg/morph/fit.json", "images.0.lora=ckpt/ridge.safetensors"),
    "images.1.lora=ckpt/peak.safetensors",
)
MORPH = Part(
    commands=(
        morph_command("compared", "compare=true"),
        *(morph_command(f"weight_{weight}", *both(weight)) for weight in ("0.1", "0.5", "1")),
        *(morph_command(f"gentle_{weight}", *GENTLE, *both(weight)) for weight in ("0.5", "1")),
    ),
    values=morph_values,
    shown={
        "ways": morph_ways,
        "ends": lambda values: " and ".join(f"{ratio:.2f}" for ratio in values["ends_to_photographs"]),
    },
)


# In the order in which they are run: later ones use what earlier ones left.
PARTS = {
    "demo": Part(
        commands=(Command(("demo.py",), "out/morph/mountain/report.json"),),
        values=lambda report: {"evaluations": report["unet_evaluations"]},  # no path is cached yet
        shown={"evaluations": lambda values: f"{values['evaluations']:,}"},
        pictures={
            "demo.png": lambda: file("out/demo/sheet.png"),
            "morph.webp": lambda: file("out/morph/mountain/morph.webp"),
        },
    ),
    "invert": INVERT,
    "morph": MORPH,
}
