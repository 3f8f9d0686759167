"""Measure a base of the miniature against its gates, and print a table; a JSON line comes last.

    python miniature/evaluate.py base=ckpt/miniature
    python miniature/evaluate.py base=out/miniature/base gates=[1,2]

Renders what it judges with, trains the classifier that judges (kept in <output_dir>), and two LoRAs. Nothing
that it measures on was trained on: other seeds, combinations that are held out, and the mountain pair.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorakit.ground.command import parse_command
from lorakit.ground.config import Config
from lorakit.ground.process import run_guarded
from miniature.scene import BASE_STYLES, STYLES


class EvaluateConfig(Config):
    """The keys of an evaluation."""

    headings: ClassVar[dict[str, str]] = {"base": "What is measured", "samples": "How"}

    base: str = Field("ckpt/miniature", min_length=1, description="folder of the base")
    controlnet: str | None = Field(None, description="its ControlNet; null: <base>/controlnet, if there")
    output_dir: str = Field("out/miniature", description="where renders and the classifier are kept")
    gates: tuple[int, ...] = Field((1, 2, 4, 5, 6), description="which to measure; 3 comes with 2")

    samples: int = Field(240, ge=6, description="samples of known combinations, and as many renders")
    held_out_samples: int = Field(96, ge=3, description="samples of held-out combinations")
    control_samples: int = Field(32, ge=1, description="samples with a ControlNet")
    inversions: int = Field(8, ge=1, description="renders that are inverted")
    guidance_scale: float = Field(3.0, ge=1, description="classifier-free guidance of samples")
    steps: int = Field(25, ge=1, le=1000, description="DDIM steps of samples")
    classifier_pictures: int = Field(6000, ge=12, description="renders that the classifier trains on")
    classifier_steps: int = Field(1500, ge=10, description="steps of 32 that it trains for")
    render_workers: int | None = Field(
        None, ge=1, le=256, description="processes that render pictures; null: one per core"
    )


Row = tuple[str, str, float, float, bool]  # gate, what, figure, limit, whether the limit is the least allowed


def measure(cfg: EvaluateConfig) -> dict[str, Any]:
    """All figures that the config asks for, by gate."""
    import torch

    from lorakit.diffusion.models import Base, set_up_backend
    from lorakit.weights.base import inspect_base
    from miniature import gates
    from miniature.classifier import trained_classifier

    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_up_backend(device)
    base = Base(inspect_base(cfg.base), device)
    size, figures = base.info.resolution, {}
    if {4, 6} & set(cfg.gates):  # first: the peak memory of a child begins at what its parent has taken
        with tempfile.TemporaryDirectory() as scratch:
            figures["lora"] = gates.lora_figures(cfg.base, size, Path(scratch))
    if 1 in cfg.gates:
        figures["autoencoder"] = gates.autoencoder_figures(base, size, 8)
    if {2, 3, 5} & set(cfg.gates):
        judge = trained_classifier(
            Path(cfg.output_dir), cfg.classifier_pictures, cfg.classifier_steps, size, cfg.render_workers
        )
        if {2, 3} & set(cfg.gates):
            counts = cfg.samples, cfg.held_out_samples
            figures["text"] = gates.text_figures(base, judge, counts, size, cfg.guidance_scale, cfg.steps)
        folder = Path(cfg.controlnet or Path(cfg.base) / "controlnet")
        if 5 in cfg.gates and folder.is_dir():
            from diffusers import ControlNetModel

            controlnet: Any = ControlNetModel.from_pretrained(str(folder), dtype=torch.float32)
            controlnet = controlnet.to(device, memory_format=torch.channels_last).eval()
            options = cfg.control_samples, cfg.guidance_scale, cfg.steps
            figures["control"] = gates.control_figures(base, controlnet, judge, *options)
    if 4 in cfg.gates:
        figures["inversion"] = gates.inversion_figures(base, size, cfg.inversions)
    if 6 in cfg.gates:
        figures["speed"] = gates.speed_figures(base)
    return figures


def verdicts(figures: dict[str, Any]) -> list[Row]:
    """The gates as rows of a table."""
    rows: list[Row] = []
    if kinds := figures.get("autoencoder"):
        renders = mean(kinds[style] for style in BASE_STYLES)
        rows.append(("1", "autoencoder, renders, dB", renders, 31, True))
        for kind in ("photographs", "photograph crops"):
            rows.append(("1", f"autoencoder, {kind}, dB", kinds[kind], 26, True))
    if text := figures.get("text"):
        for key, what, limit in (
            ("classifier", "classifier on renders", 0.98),
            ("known", "samples", 0.95),
            ("held_out", "held-out combinations", 0.85),
        ):
            rows += [("2", f"{what}, {name}", value, limit, True) for name, value in text[key].items()]
        for name, value in text["without_prompt"].items():
            rows.append(("2", f"without the prompt, {name}", value, text["chance"][name] + 0.15, False))
        ratio = text["frechet"] / text["frechet_renders"]
        rows.append(("3", "Frechet distance over that of renders", ratio, 3, False))
    if inversion := figures.get("inversion"):
        rows.append(("4", "inversion of renders, dB", inversion["renders"], 38, True))
        for number, value in enumerate(inversion["photographs"], 1):
            rows.append(("4", f"inversion of photograph {number}, dB", value, 38, True))
    if control := figures.get("control"):
        high, low = control["f1_at_1"], control["f1_at_0"]
        rows.append(("5", "edge F1 at scale 1", high, 0.6, True))
        rows.append(("5", "edge F1, scale 1 less scale 0", high - low, 0.3, True))
        rows.append(("5", "edge F1 of photographs at scale 1", control["f1_photographs_at_1"], 0.55, True))
        for name, value in control["prompts_at_1"].items():
            rows.append(("5", f"prompts at scale 1, {name}", value, 0.9, True))
    if speed := figures.get("speed"):
        rows.append(("6", "a picture in 50 steps, s", speed["picture_s"], 3, False))
    if lora := figures.get("lora"):
        rows.append(("6", "a LoRA step, ms", max(lora["step_ms"]), 100, False))
        rows.append(("6", "peak memory of a LoRA training, MB", lora["peak_mb"], 1500, False))
    return sorted(rows)


def softness(text: dict[str, Any]) -> list[str]:
    """What says whether samples are soft, which the classifier does not see: beside it the same, blurred."""
    if "texture" not in text:
        return []
    rows = {
        "sharpness over that of renders": (text["sharpness"], text["sharpness_blurred"]),
        "texture distance over that of renders": (text["texture"], text["texture_blurred"]),
        "what the classifier finds": (mean(text["known"].values()), mean(text["known_blurred"].values())),
    }
    return [f"3  {what:42}{own:9.3f}; blurred {blurred:.3f}" for what, (own, blurred) in rows.items()]


def main(argv: list[str]) -> int:
    command = parse_command(
        EvaluateConfig,
        argv,
        prog="evaluate.py",
        description="Measure a base of the miniature against its gates.",
    )
    if "check" in command.flags:
        return 0
    figures, passed = measure(command.config), True
    for gate, what, value, limit, least in verdicts(figures):
        good, sign = (value >= limit, ">=") if least else (value <= limit, "<=")
        passed = passed and good
        print(f"{gate}  {what:42}{value:9.3f}  {sign} {limit:<6.3g}  {'passed' if good else 'FAILED'}")
    for line in softness(figures.get("text", {})):
        print(line)
    for style in STYLES if "autoencoder" in figures else ():
        print(f"1  autoencoder, {style}, dB".ljust(45) + f"{figures['autoencoder'][style]:9.3f}")
    for number, value in enumerate(figures.get("lora", {}).get("inversion", []), 1):
        print(f"4  after 200 LoRA steps, photograph {number}, dB  {value:9.3f}")
    print(json.dumps({"base": command.config.base, "passed": passed, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
