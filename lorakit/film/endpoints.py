"""The pictures of a morph as its ends: LoRAs loaded, prompts encoded, each picture inverted once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.diffusion.denoiser import Denoiser, Rows, join_rows
from lorakit.diffusion.fit import NOTICED, fit_losses
from lorakit.diffusion.lora import load_lora
from lorakit.diffusion.models import Base
from lorakit.diffusion.paths import Inverting, invert_cached
from lorakit.diffusion.row_weights import row_weights, weight_table
from lorakit.film.config import MorphConfig
from lorakit.film.morph_plan import MorphPlan, words_of
from lorakit.film.morphing import Ends
from lorakit.sampling.encoding import PromptEncoder
from lorakit.weights.base import BaseInfo
from lorakit.weights.identity import file_sha256, lora_sha256


def load_adapters(base: Base, loras: Sequence[str], notes: list[str] | None = None) -> dict[str, str]:
    """Load each LoRA file once; returns path -> name of its adapter.

    Args:
        notes: gets what a user should know of the files.

    Raises:
        UserError: a file that is no LoRA, or does not fit this base.
    """
    names = {path: f"lora_{number}" for number, path in enumerate(loras)}
    for path, name in names.items():
        load_lora(path, base.unet, base.text_encoder, adapter_name=name, notes=notes)
    return names


class Texts:
    """Prompts of a morph as the text encoder reads them, all in as many chunks as the longest.

    Args:
        adapters: LoRA file -> its adapter.
    """

    def __init__(self, cfg: MorphConfig, base: Base, adapters: dict[str, str]):
        self.base, self.names, self.beside = base, list(adapters.values()), cfg.texts()
        self.encoder = PromptEncoder(base, cfg.prompt_syntax, cfg.embedding_dirs, cfg.loras())

    def encode(self, text: str, weights: Tensor) -> Tensor:
        """(1, C * L, D), float32, under `weights` (1, A) of the adapters."""
        with row_weights(self.base.text_encoder, self.names, weights.T):
            return self.encoder.encode_alone(text, self.beside).float()


def conditions(cfg: MorphConfig, base: Base, adapters: dict[str, str], loras: bool = True) -> Rows:
    """What each picture lies under: its own prompt and its own LoRA, in both of the base's networks."""
    texts, rows = Texts(cfg, base, adapters), []
    for picture in cfg.images:
        used = {adapters[picture.lora]: picture.lora_weight} if picture.lora and loras else {}
        weights = weight_table(texts.names, [used]).T.to(base.device)
        prompt = texts.encode(picture.prompt, weights)
        negative = texts.encode(cfg.negative_prompt, weights)
        rows.append(Rows(prompt, negative, weights))
    return join_rows(rows)


def control_embeds(cfg: MorphConfig, base: Base, adapters: dict[str, str]) -> Tensor | None:
    """The anchor prompt's embeddings (C * L, D), without any LoRA."""
    if cfg.anchor_prompt is None:
        return None
    none = torch.zeros(1, len(adapters), device=base.device)
    return Texts(cfg, base, adapters).encode(cfg.anchor_prompt, none)[0]


def prepare_ends(
    cfg: MorphConfig,
    base: Base,
    denoiser: Denoiser,
    rows: Rows,
    latents: Sequence[Tensor],
    names: Sequence[Path],
    between: Callable[[], None],
) -> Ends:
    """Each picture inverted under its own conditions, as `invert_cached` does it."""
    paths = invert_cached(denoiser, rows, latents, names, _inverting(cfg), between)
    return Ends(paths.to(base.device), rows)


def path_names(
    cfg: MorphConfig, plan: MorphPlan, info: BaseInfo, folder: Path, dtype: str, loras: bool
) -> list[Path]:
    """The cache entry of each picture's path."""
    names, how = [], _inverting(cfg)
    marks = [] if cfg.prompt_syntax == "plain" else [cfg.prompt_syntax, words_of(cfg)]
    for picture in cfg.images:
        lora = (lora_sha256(picture.lora), picture.lora_weight) if picture.lora and loras else None
        own = file_sha256(picture.path), picture.prompt, lora
        names.append(how.entry(folder, info, plan.shape, dtype, *own, *marks))
    return names


def _inverting(cfg: MorphConfig) -> Inverting:
    return Inverting(
        cfg.num_inference_steps,
        cfg.inversion_method,
        cfg.fixed_point_iterations,
        cfg.inversion_guidance_scale,
        cfg.negative_prompt,
        cfg.prediction_type,
        cfg.clip_skip,
    )


@torch.no_grad()
def check_fit(
    cfg: MorphConfig, denoiser: Denoiser, rows: Rows, latents: Sequence[Tensor], adapters: dict[str, str]
) -> tuple[dict[str, list[float]], list[str]]:
    """How well each LoRA fits each picture, by the training loss at a few fixed timesteps, and warnings.

    Returns:
        {"none" or the LoRA's path: its loss on each picture}, and a line for each LoRA that fits its picture
        worse than no LoRA or than another picture's LoRA does.
    """
    names = list(adapters.values())
    table = weight_table(names, [{}, *({name: 1.0} for name in names)]).T.to(latents[0].device)
    losses = [
        fit_losses(denoiser, replace(rows[[i] * len(table)], weights=table), start)
        for i, start in enumerate(latents)
    ]
    warnings = []
    for i, picture in enumerate(cfg.images):
        if not picture.lora:
            continue
        own = 1 + list(adapters).index(picture.lora)
        best = min(range(len(table)), key=lambda k: losses[i][k])
        if losses[i][own] > losses[i][0] or losses[i][own] > NOTICED * losses[i][best]:
            other = "no LoRA" if best == 0 else list(adapters)[best - 1]
            warnings.append(
                f"images.{i}: {other} fits {picture.path} better than {picture.lora} does "
                f"(loss {losses[i][best]:.4f} against {losses[i][own]:.4f}): are the LoRAs mixed up?"
            )
    columns = zip(("none", *adapters), zip(*losses, strict=True), strict=True)
    return {name: list(column) for name, column in columns}, warnings
