"""What a run of a sampling script will need, in words for --check. No torch here."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lorakit.sampling.config import SamplingConfig
from lorakit.weights.base import BaseInfo
from lorakit.weights.base_settings import base_line
from lorakit.weights.lora_fit import fit_of
from lorakit.weights.tensors import Shapes
from lorakit.weights.tokens import read_tokenizer

LIBRARIES = 500_000_000  # bytes of torch, diffusers and peft on a CPU, and about those of CUDA
UNET_TENSORS = 6.0  # of the size of a level's output that are held at once, the skips among them
VAE_TENSORS = 4.0  # of the widest channels at full size
# Tensors of channels x pixels that one block keeps for backward, by autograd's report (docs/LOG.md).
RESNET_TENSORS, TRANSFORMER_TENSORS = 10.0, 25.0
TWICE, SCORES = 1.4, 3.0  # of a row that is differentiated twice: more of the same, and matrices of scores
LEAN_RESNET_TENSORS, LEAN_TRANSFORMER_TENSORS = 6.0, 20.0  # of a large base, whose frozen layers keep less


def describe_sampling(
    configs: Sequence[Any], info: BaseInfo, shapes: Sequence[tuple[int, int]], count: int, extra: int = 0
) -> list[str]:
    """Lines on base, LoRAs, tokens, memory and work.

    Args:
        configs: of the subjects of every cell, one prompt each.
        shapes: width and height of the pictures.
        count: pictures of each config.
        extra: parameters of models beside the base, such as a ControlNet.

    Raises:
        UserError: a LoRA that does not fit.
    """
    lines = model_lines(info, [lora.path for cfg in configs for lora in (*cfg.loras, *cfg.prompt_loras())])
    resolved = [cfg.resolved()[0] for cfg in configs]
    lines += _token_lines(resolved, info)
    lines += memory_lines(resolved, info, shapes, extra)
    evaluations = sum(count * _evaluations(cfg) for cfg in resolved)
    pictures = count * len(resolved)
    lines.append(
        f"work        {evaluations:,} rows through the U-Net, {evaluations / pictures:,.0f} a picture"
    )
    return [*lines, f"time        {time_words(configs[0], pictures)}"]


def model_lines(info: BaseInfo, loras: Iterable[str], more: Shapes | None = None) -> list[str]:
    """The base, and each LoRA file once. Raises UserError for a LoRA that does not fit.

    Args:
        more: as of `fit_of`.
    """
    lines = [f"base        {info.name} ({info.kind}), {base_line(info)}"]
    return lines + [f"LoRA        {path}: {fit_of(path, info, more)}" for path in dict.fromkeys(loras)]


def time_words(cfg: SamplingConfig, pictures: int) -> str:
    """By the run whose place this one takes; a machine's speed stands in no file."""
    folder = Path(cfg.output_dir) / cfg.name
    try:
        entries = json.loads((folder / "report.json").read_text(encoding="utf-8"))["pictures"]
        each = mean(float(entry["seconds"]) for entry in entries)
    except (OSError, ValueError, LookupError, TypeError):
        return f"not known before a run in {folder} has told it"
    return f"about {each * pictures:,.0f} s, at {each:.2g} s a picture as in {folder}, and the loading"


def _evaluations(cfg: Any) -> int:
    _, steps, guidance = cfg.sampler()
    run = int(steps * getattr(cfg, "strength", 1.0))
    rows = 1 + getattr(cfg, "is_anchored", False)  # the picture beside it
    return rows * run * (1 + (guidance > 1))


def _token_lines(configs: Sequence[SamplingConfig], info: BaseInfo) -> Iterator[str]:
    if info.known and configs[0].prompt_syntax == "plain":
        backend, limit = read_tokenizer(info)
        prompts = [str(getattr(cfg, "prompt", "")) for cfg in configs]
        longest = max(len(backend.encode(prompt).ids) for prompt in prompts)
        yield f"tokens      {longest} in the longest prompt; {int(min(limit, info.max_tokens))} are read"


def memory_lines(
    configs: Sequence[Any], info: BaseInfo, shapes: Sequence[tuple[int, int]], extra: int = 0
) -> Iterator[str]:
    """Of resolved configs; nothing where the base is not known."""
    unet, vae = (info.configs.get(part) for part in ("unet", "vae"))
    if not info.known or not unet or not vae:
        return
    pixels = max(map(math.prod, shapes))
    rows = max(cfg.batch_size * (1 + (cfg.sampler()[2] > 1)) for cfg in configs)
    levels = enumerate(unet["block_out_channels"])
    latents = pixels // info.vae_factor**2
    inside = sum(width * latents / 4**level * UNET_TENSORS for level, width in levels) * rows
    decoder = vae["block_out_channels"][min(1, len(vae["block_out_channels"]) - 1)] * pixels * VAE_TENSORS
    for half in halves_of(configs[0].mixed_precision):
        size = 2 if half else 4
        others = sum(count for part, count in info.parameters.items() if part != "vae") + extra
        parts = {
            "models": others * size + info.parameters.get("vae", 0) * 4,
            "activations": max(inside * size, decoder * 4),
            "libraries": LIBRARIES,
        }
        shown = ", ".join(f"{name} {each / 1e6:,.0f} MB" for name, each in parts.items())
        total = f"about {sum(parts.values()) / 1e6:,.0f} MB in {'half precision' if half else 'float32'}"
        yield f"memory      {total} ({shown})"


def halves_of(mixed_precision: str) -> tuple[bool, ...]:
    """Whether it means half precision; both where the machine decides."""
    return {"no": (False,), "auto": (False, True)}.get(mixed_precision, (True,))


def backward_bytes(
    info: BaseInfo,
    shape: tuple[int, int],
    rows: int,
    half: bool = False,
    *,
    twice: int = 0,
    block: int | None = None,
) -> int | None:
    """Bytes that the U-Net keeps of one pass for backward: an estimate; None where its config is not here.

    Counted per level of the U-Net as (resnets, transformers) x channels x latent pixels, with the number of
    tensors of that size that a resnet and a transformer block keep, by autograd's report (docs/LOG.md). Rows
    that are differentiated twice keep the scores of self-attention too, heads x latent pixels squared.

    Args:
        shape: (width, height) in pixels.
        twice: of the rows, those that are differentiated twice.
        block: up block at which the pass ends; None: it is whole.
    """
    unet = info.configs.get("unet")
    if not unet:
        return None
    pixels = math.prod(shape) // info.vae_factor**2
    channels, layers = unet["block_out_channels"], unet["layers_per_block"]
    levels = zip(channels, unet["down_block_types"], reversed(unet["up_block_types"]), strict=True)
    lowest = 0 if block is None else len(channels) - 1 - block % len(channels)  # level that is reached again
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
    heads = [heads] * len(channels) if isinstance(heads, int) else heads
    elements = scores = 0.0
    of_resnet, of_transformer = RESNET_TENSORS, TRANSFORMER_TENSORS
    if info.is_large:
        of_resnet, of_transformer = LEAN_RESNET_TENSORS, LEAN_TRANSFORMER_TENSORS
    for level, (count, down, up) in enumerate(levels):
        here = count * pixels / 4**level
        last = level == len(channels) - 1  # the middle block counts with it
        back = (layers + 1) * (level >= lowest)
        resnets = layers + back + 2 * last
        transformers = ("Cross" in down) * layers + ("Cross" in up) * back + last
        elements += here * (of_resnet * resnets + of_transformer * transformers)
        scores += transformers * heads[level] * (pixels / 4**level) ** 2
    total = elements * rows + twice * (TWICE * elements + SCORES * scores)
    return int(total * (2 if half else 4))
