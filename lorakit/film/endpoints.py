"""The pictures of a morph as its ends: LoRAs loaded, prompts encoded, each picture inverted once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion import inversion
from lorakit.diffusion.denoiser import Denoiser, Rows, join_rows
from lorakit.diffusion.lora import load_lora
from lorakit.diffusion.models import Base
from lorakit.diffusion.row_weights import row_weights, weight_table
from lorakit.film.config import MorphConfig
from lorakit.film.morph_plan import FIT_TIMESTEPS, MorphPlan, file_sha256, lora_sha256
from lorakit.film.morphing import Ends
from lorakit.ground import randomness
from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.publish import explained, publish_file
from lorakit.pictures.images import to_array
from lorakit.pictures.views import entry_name
from lorakit.weights.base import BaseInfo
from lorakit.weights.identity import base_identity
from lorakit.weights.tensors import read_tensors, serialize

CACHE_VERSION = 2


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


def encode_picture(base: Base, picture: Image.Image) -> Tensor:
    """Scaled latents (1, C, h, w): the mean of the VAE's posterior, float32 on the base's device."""
    return base.mean_latents(torch.from_numpy(to_array(picture))[None])


def decode_picture(base: Base, latents: Tensor) -> Image.Image:
    """The picture of one latent (C, h, w)."""
    return base.decode_pictures(latents[None])[0]


@torch.no_grad()
def encode_text(base: Base, text: str, adapters: Sequence[str], weights: Tensor) -> Tensor:
    """Prompt embeddings (1, L, D), float32, of the text encoder under `weights` (1, A) of the adapters."""
    with row_weights(base.text_encoder, adapters, weights.T):
        return base.text_encoder(base.tokenize([text]))[0].float()


def conditions(cfg: MorphConfig, base: Base, adapters: dict[str, str], loras: bool = True) -> Rows:
    """What each picture lies under: its own prompt and its own LoRA, in both of the base's networks."""
    names, rows = list(adapters.values()), []
    for picture in cfg.images:
        used = {adapters[picture.lora]: picture.lora_weight} if picture.lora and loras else {}
        weights = weight_table(names, [used]).T.to(base.device)
        prompt = encode_text(base, picture.prompt, names, weights)
        negative = encode_text(base, cfg.negative_prompt, names, weights)
        rows.append(Rows(prompt, negative, weights))
    return join_rows(rows)


def control_embeds(cfg: MorphConfig, base: Base, adapters: dict[str, str]) -> Tensor | None:
    """The anchor prompt's embeddings (L, D), without any LoRA."""
    if cfg.anchor_prompt is None:
        return None
    none = torch.zeros(1, len(adapters), device=base.device)
    return encode_text(base, cfg.anchor_prompt, list(adapters.values()), none)[0]


def prepare_ends(
    cfg: MorphConfig,
    base: Base,
    denoiser: Denoiser,
    rows: Rows,
    latents: Sequence[Tensor],
    names: Sequence[Path],
    between: Callable[[], None],
) -> Ends:
    """Invert each picture under its own conditions, alone, or take its path from the cache.

    A picture's path depends on nothing else in the morph, not even on what shares its batch: so it can be
    taken from the cache to the bit.

    Args:
        latents: of each picture; `names` its cache entry.
        between: called before each U-Net evaluation; may raise, to stop.
    """  # fmt: skip
    grid = denoiser.schedule.grid(cfg.num_inference_steps)
    iterations = cfg.fixed_point_iterations if cfg.inversion_method == "fixed_point" else 0
    paths = []
    for i, (start, name) in enumerate(zip(latents, names, strict=True)):
        path = _read_path(name, (len(grid) + 1, *start.shape))
        if path is None:

            def predict(x: Tensor, timestep: int, row=rows[i : i + 1]) -> Tensor:
                between()
                return denoiser(x, timestep, row, cfg.inversion_guidance_scale)

            with torch.no_grad():
                found = [start, *inversion.invert(start, grid, predict, iterations)]
            path = torch.stack(found[::-1])
            publish_file(name, serialize({"trajectory": path.cpu()}, {"version": str(CACHE_VERSION)}))
        paths.append(path.to(base.device))
    return Ends(torch.cat(paths, dim=1), rows)


def path_names(
    cfg: MorphConfig, plan: MorphPlan, info: BaseInfo, folder: Path, dtype: str, loras: bool
) -> list[Path]:
    """The cache entry of each picture's path: a hash of everything that it depends on."""
    guided = cfg.inversion_guidance_scale != 1
    shared = [CACHE_VERSION, base_identity(info), plan.shape, cfg.num_inference_steps]
    shared += [cfg.inversion_method, dtype]
    shared += [cfg.fixed_point_iterations if cfg.inversion_method == "fixed_point" else None]
    shared += [cfg.inversion_guidance_scale, cfg.negative_prompt if guided else None]
    shared += [cfg.prediction_type, cfg.clip_skip]
    names = []
    for picture in cfg.images:
        lora = (lora_sha256(picture.lora), picture.lora_weight) if picture.lora and loras else None
        names.append(folder / "paths" / entry_name(*shared, file_sha256(picture.path), picture.prompt, lora))
    return names


def _read_path(name: Path, shape: tuple[int, ...]) -> Tensor | None:
    if not name.exists():
        return None
    try:
        with explained(name):
            tensors, _ = read_tensors(name)
    except OutputError:
        raise
    except UserError:  # a cache entry that is damaged is made anew
        return None
    path = tensors.get("trajectory")
    return path if path is not None and tuple(path.shape) == shape else None


@torch.no_grad()
def check_fit(
    cfg: MorphConfig, denoiser: Denoiser, rows: Rows, latents: Sequence[Tensor], adapters: dict[str, str]
) -> tuple[dict[str, list[float]], list[str]]:
    """How well each LoRA fits each picture, by the training loss at a few fixed timesteps, and warnings.

    Returns:
        {"none" or the LoRA's path: its loss on each picture}, and a line for each LoRA that fits its picture
        worse than no LoRA or than another picture's LoRA does.
    """
    schedule, names = denoiser.schedule, list(adapters.values())
    timesteps = [int(share * schedule.num_timesteps) for share in FIT_TIMESTEPS]
    table = weight_table(names, [{}, *({name: 1.0} for name in names)]).T.to(latents[0].device)
    losses: list[list[float]] = []
    for i, start in enumerate(latents):
        total = torch.zeros(len(table), device=start.device)
        for timestep in timesteps:
            noise = randomness.normal(tuple(start.shape), 0, "fit", timestep).to(start)
            noisy = schedule.add_noise(start, noise, torch.tensor([timestep]))
            tried = replace(rows[[i] * len(table)], weights=table)
            predicted = denoiser(noisy.expand(len(table), -1, -1, -1), timestep, tried)
            total += (predicted - noise).square().flatten(1).mean(1)
        losses.append((total / len(timesteps)).tolist())
    warnings = []
    for i, picture in enumerate(cfg.images):
        if not picture.lora:
            continue
        own = 1 + list(adapters).index(picture.lora)
        best = min(range(len(table)), key=lambda k: losses[i][k])
        if losses[i][own] > losses[i][0] or losses[i][own] > 1.02 * losses[i][best]:
            other = "no LoRA" if best == 0 else list(adapters)[best - 1]
            warnings.append(
                f"images.{i}: {other} fits {picture.path} better than {picture.lora} does "
                f"(loss {losses[i][best]:.4f} against {losses[i][own]:.4f}): are the LoRAs mixed up?"
            )
    columns = zip(("none", *adapters), zip(*losses, strict=True), strict=True)
    return {name: list(column) for name, column in columns}, warnings
