"""What every way of benchmarks/morph.py starts from, and what it ends with."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from benchmarks.sd15_shape import build_sd15
from lorakit.diffusion import lora
from lorakit.diffusion.models import Base, compute_dtype, resolve_precision, set_up_backend
from lorakit.film import endpoints
from lorakit.film.config import MorphConfig
from lorakit.film.morph_plan import MorphPlan, make_morph_plan
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import lora_bytes


@dataclass
class Setup:
    """A base with both LoRAs, and what is asked for; `rows` and `passes` count at the U-Net."""

    cfg: MorphConfig
    plan: MorphPlan
    base: Any
    adapters: dict[str, str]
    precision: str
    rows: int = 0
    passes: int = 0

    def count(self, unet: Any, inputs: tuple) -> None:
        self.rows += len(inputs[0])
        self.passes += 1


@dataclass
class Film:
    """Decoded frames, where they lie, and the attention that was held: bytes in all and of a number.

    `share` of the steps is that for which it was held at once; None: for a single step.
    """

    frames: list[Image.Image]
    positions: list[float]
    attention_bytes: int = 0
    number_bytes: int = 4
    share: float | None = None

    def bytes_at(self, steps: int, long: int, number_bytes: int) -> int:
        """What `attention_bytes` of a run of `steps` are at `long` steps, in another precision."""
        held, longer = (sum(i < self.share * n for i in range(n)) if self.share else 1 for n in (steps, long))
        return self.attention_bytes * longer // held * number_bytes // self.number_bytes


def set_up(args: argparse.Namespace, folder: str) -> Setup:
    triples = zip(args.images, args.prompts, args.loras, strict=True)
    settings = {
        "pretrained_model_name_or_path": str(args.base),
        "images": tuple(
            {"path": str(path), "prompt": text, "lora": str(file)} for path, text, file in triples
        ),
        "frames": args.frames,
        "num_inference_steps": args.steps,
        "probe_steps": min(args.steps, MorphConfig.model_fields["probe_steps"].default),
        "mixed_precision": args.precision,
        "output_dir": folder,
    }
    cfg = MorphConfig.model_validate(settings)
    device = PartialState().device
    assert device is not None
    set_up_backend(device.type)
    precision = resolve_precision(args.precision, device.type)
    base = Base(inspect_base(str(args.base)), device, compute_dtype(precision))
    adapters = endpoints.load_adapters(base, [str(path) for path in args.loras])
    setup = Setup(cfg, make_morph_plan(cfg), base, adapters, precision)
    _ = base.vae, base.text_encoder, base.tokenizer  # which load when they are touched
    base.unet.register_forward_pre_hook(setup.count)
    return setup


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """What is not there, made in a folder: a base of SD 1.5's shape, two LoRAs like cfg/morph/fit.json's."""
    folder = Path(args.folder)
    made = {"base": str(args.base), "loras": [str(path) for path in args.loras or ()]}
    if args.shape == "sd15":
        made["base"] = str(folder / "sd15")
        build_sd15(folder / "sd15")
    if not args.loras:
        unet, generator = Base(inspect_base(made["base"])).unet, torch.Generator().manual_seed(0)
        for name in ("random_a", "random_b"):
            for parameter in lora.add_lora(unet, rank=16, alpha=16, adapter_name=name):
                parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
            path = folder / f"{name}.safetensors"
            path.write_bytes(lora_bytes(lora.extract(unet, "unet", name), layout="kohya", metadata={}))
            made["loras"].append(str(path))
    return made
