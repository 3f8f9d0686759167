"""From a checked table of pictures to training batches: latents and text states are made once and cached.

Each picture is encoded once. What is kept is the mean and log-variance of the VAE's posterior, so that every
step still draws a new latent from it. Cache entries are named by content (image bytes, transform, the VAE's
weights and config), carry a checksum and are made again when they are bad. While a text encoder is not
trained, its states are cached the same way, and it need not be loaded at all in a later run.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lorakit.diffusion.models import Base, posterior_sample
from lorakit.ground import randomness
from lorakit.ground.errors import UserError
from lorakit.ground.publish import publish_file
from lorakit.pictures.folder import Table
from lorakit.pictures.images import load_image
from lorakit.pictures.masks import MaskKind, mask_entry, mask_weights
from lorakit.pictures.views import Shape, View, entry_name
from lorakit.training.batch import Batch, SampleKey
from lorakit.weights.tensors import serialize

# ---- caches ----


def read_entry(path: Path) -> Tensor | None:
    """The tensor of a cache entry, or None if it is missing, damaged, not finite or of another version."""
    try:
        content = path.read_bytes()
        tensor = load(content)["tensor"]
        length = int.from_bytes(content[:8], "little")
        digest = json.loads(content[8 : 8 + length])["__metadata__"]["sha256"]
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RecursionError):
        return None
    if not torch.isfinite(tensor).all():
        return None
    return tensor if digest == hashlib.sha256(content[8 + length :]).hexdigest() else None


def write_entry(path: Path, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    publish_file(path, serialize({"tensor": tensor}, {"sha256": digest}))


def missing_views(views: Sequence[Any], cache_dir: Path, vae_hash: str) -> list[Any]:
    """The views, or clips, that have no valid cache entry."""
    return [view for view in views if read_entry(view.entry(cache_dir, vae_hash)) is None]


def encode_views(
    views: Sequence[View],
    base: Base,
    cache_dir: Path,
    vae_hash: str,
    *,
    image_options: dict,
    threads: int = 0,
) -> Iterator[View]:
    """Encode views into the cache, and yield each once its entry is there. `threads` decode ahead of the VAE.

    Raises:
        UserError: the VAE makes NaN or infinity of a picture.
    """

    def pixels(view: View) -> Tensor:
        image = load_image(view.row.source, name=view.row.name, **image_options)
        return torch.from_numpy(view.pixels(image))[None]

    with ThreadPoolExecutor(max(1, threads)) as pool:
        window = max(1, threads) * 2  # decoded pictures held at a time
        for start in range(0, len(views), window):
            group = views[start : start + window]
            for view, image in zip(group, (pool.map if threads else map)(pixels, group), strict=True):
                moments = base.encode(image)[0]
                if not torch.isfinite(moments).all():
                    raise UserError(f"{view.row.name}: the VAE makes NaN or infinity of it; leave it out")
                write_entry(view.entry(cache_dir, vae_hash), moments)
                yield view


def cache_masks(
    views: Sequence[View], kind: MaskKind, factor: int, cache_dir: Path, image_options: dict
) -> list[Path]:
    """The cache entries of the weights (1, h, w) of views, made where they are missing."""
    paths = [mask_entry(view, kind, factor, cache_dir) for view in views]
    for view, path in zip(views, paths, strict=True):
        if read_entry(path) is None:
            write_entry(path, torch.from_numpy(mask_weights(view, kind, factor, **image_options)))
    return paths


class Latents:
    """Cached posterior moments or weights by index: on the device if they fit, else in memory, else on disk.

    Args:
        paths: cache entries, all valid.
        budget: bytes that may lie on the device, and bytes that may lie in memory.
    """

    def __init__(self, paths: Sequence[Path], device: torch.device, budget: tuple[int, int]):
        self.paths, self.device = paths, device
        size = sum(path.stat().st_size for path in paths)
        self.where = str(device) if size <= budget[0] else "memory" if size <= budget[1] else "disk"
        self.held = None
        if self.where != "disk":
            target = device if self.where == str(device) else "cpu"
            self.held = [self._read(path).to(target) for path in paths]

    @staticmethod
    def _read(path: Path) -> Tensor:
        moments = read_entry(path)
        if moments is None:
            raise OSError(
                f"{path}: this cache entry was good a moment ago and is not now; start again to re-make it"
            )
        return moments

    def __getitem__(self, index: int) -> Tensor:
        """Moments (2C, h, w), of a clip (F, 2C, h, w), or weights (1, h, w), on the device."""
        moments = self._read(self.paths[index]) if self.held is None else self.held[index]
        return moments.to(self.device)


@torch.no_grad()
def cache_text_states(
    prompts: Sequence[str], base: Base, cache_dir: Path, text_hash: str, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Hidden states (L, D) of each distinct prompt, float32, on `device` (the base's, if None).

    Entries are named by token ids, so that another tokenizer never meets them.
    """
    states = {}
    for prompt in dict.fromkeys(prompts):
        ids = base.tokenize([prompt])
        path = cache_dir / "text" / entry_name(ids[0].tolist(), text_hash, str(base.dtype), base.clip_skip)
        state = read_entry(path)
        if state is None:
            state = base.text_encoder(ids)[0][0].float()
            write_entry(path, state)
        states[prompt] = state.to(device or base.device)
    return states


# ---- batches ----


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew each time a picture is seen.

    `noise_offset` is Guttenberg's (2023): a constant per channel added to the noise; `caption_dropout` the
    share of samples shown without their caption, for guidance; `unmasked_weight` the weight of the loss where
    a mask is black.
    """

    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    unmasked_weight: float = 0.0


class TrainingData:
    """Batches by position: sample number `position` of a run is the same for any batch size or process count.

    Args:
        table: the checked rows.
        shapes: (width, height) in pixels at which each row is trained.
        latents: of all views, row after row.
        views: how many views each row has; one of them is drawn each time the row is shown.
        text_states: prompt -> (L, D), "" among them; None while the text encoder is trained.
        token_ids: prompt -> (L,), "" among them; None unless the text encoder is trained.
        masks: weights (1, h, w) of all views; None without masks.
        class_data: pictures that show the class of a subject (DreamBooth); None without them.
        carried: view, position and its own noise (F, C, h, w) -> the noise of a clip; None: its own.
    """

    def __init__(
        self,
        table: Table,
        shapes: Sequence[Shape],
        latents: Latents,
        views: Sequence[int],
        base: Base,
        *,
        text_states: dict[str, Tensor] | None,
        token_ids: dict[str, Tensor] | None,
        augmentation: Augmentation,
        num_timesteps: int,
        seed: int,
        masks: Latents | None = None,
        class_data: "TrainingData | None" = None,
        carried: Callable[[int, int, Tensor], Tensor] | None = None,
    ):
        self.masks, self.class_data, self.carried = masks, class_data, carried
        self.table, self.shapes, self.latents, self.views = table, shapes, latents, views
        self.first_view = np.cumsum([0, *views])
        self.text_states, self.token_ids = text_states, token_ids
        self.augmentation, self.num_timesteps, self.seed = augmentation, num_timesteps, seed
        self.device = base.device
        self.scaling_factor = base.scaling_factor

    def batch(self, rows: Sequence[int] | np.ndarray, positions: Sequence[int]) -> Batch:
        """The micro-batch that shows `rows` (all of one bucket) as samples number `positions` of the run."""
        samples = list(zip(rows, positions, strict=True))
        latents, noise = zip(*(self._latent(row, position) for row, position in samples), strict=True)
        prompts = [self._prompt(row, position) for row, position in samples]
        timesteps = [self._timestep(position) for position in positions]
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack(noise).to(self.device, non_blocking=True),
            timesteps=torch.tensor(timesteps),
            prompt_embeds=self._stack(self.text_states, prompts),
            input_ids=self._stack(self.token_ids, prompts),
            keys=tuple((self.seed, position) for position in positions),
            weights=self._weights([self._view(row, position) for row, position in samples]),
        )

    def batch_of(self, keys: Sequence[SampleKey]) -> Batch:
        """A micro-batch for the samples of another table, each with a row that its key draws."""
        positions = [int(number) for *_, number in keys]
        count = len(self.table.rows)
        rows = [randomness.integer(count, self.seed, "row", position) for position in positions]
        return self.batch(rows, positions)

    def _view(self, row: int, position: int) -> int:
        """The index among all views of the one that a sample shows."""
        return int(self.first_view[row]) + randomness.integer(self.views[row], self.seed, "view", position)

    def _weights(self, views: Sequence[int]) -> Tensor | None:
        """(B, 1, h, w)"""
        if self.masks is None:
            return None
        lowest = self.augmentation.unmasked_weight
        return lowest + (1 - lowest) * torch.stack([self.masks[view] for view in views])

    def _latent(self, row: int, position: int) -> tuple[Tensor, Tensor]:
        """Scaled latents (C, h, w), or (F, C, h, w), on the device and their noise on the CPU."""
        seed, view = self.seed, self._view(row, position)
        moments = self.latents[view]
        shape = (*moments.shape[:-3], moments.shape[-3] // 2, *moments.shape[-2:])
        posterior_noise = randomness.normal(shape, seed, "posterior", position)
        posterior_noise = posterior_noise.to(self.device, non_blocking=True)
        noise = randomness.normal(shape, seed, "noise", position)
        if self.carried is not None:
            noise = self.carried(view, position, noise)
        if self.augmentation.noise_offset:
            offset = randomness.normal((shape[0], 1, 1), seed, "noise offset", position)
            noise = noise + self.augmentation.noise_offset * offset
        return posterior_sample(moments, posterior_noise, self.scaling_factor), noise

    def _prompt(self, row: int, position: int) -> str:
        draw = randomness.uniform(self.seed, "caption dropout", position)
        if draw < self.augmentation.caption_dropout:
            return ""
        captions = self.table.rows[row].captions
        return captions[randomness.integer(len(captions), self.seed, "caption", position)]

    def _timestep(self, position: int) -> int:
        return randomness.integer(self.num_timesteps, self.seed, "timestep", position)

    def describe(self, rows: Sequence[int] | np.ndarray, positions: Sequence[int]) -> str:
        """The samples in words, for the message of a run that diverged."""
        return "; ".join(
            f"{self.table.rows[row].name} at timestep {self._timestep(position)}"
            for row, position in zip(rows, positions, strict=True)
        )

    def fixed_batch(self, row: int, count: int) -> Batch:
        """One picture at `count` evenly spaced timesteps, with noise that never changes, for validation."""
        picture = self.table.rows[row]
        mean = self.latents[self.first_view[row]].chunk(2, dim=-3)[0] * self.scaling_factor
        shape = tuple(mean.shape)
        noise = [randomness.normal(shape, 0, "validation", picture.sha256, k) for k in range(count)]
        prompts = [picture.caption] * count
        return Batch(
            latents=mean.expand(count, *shape),
            noise=torch.stack(noise).to(self.device),
            timesteps=((torch.arange(count) + 0.5) * self.num_timesteps / count).long(),
            prompt_embeds=self._stack(self.text_states, prompts),
            input_ids=self._stack(self.token_ids, prompts),
            keys=tuple((0, "validation", picture.sha256, k) for k in range(count)),
            weights=self._weights([int(self.first_view[row])] * count),
        )

    def embed(self, prompts: Sequence[str], text_encoder: Callable | None) -> Tensor:
        """Text states (n, L, D) of prompts that were named when the caches were filled."""
        ids = self._stack(self.token_ids, prompts)
        if text_encoder is not None:
            return text_encoder(ids)[0]
        states = self._stack(self.text_states, prompts)
        assert states is not None
        return states

    def _stack(self, table: dict[str, Tensor] | None, prompts: Sequence[str]) -> Tensor | None:
        return None if table is None else torch.stack([table[prompt] for prompt in prompts]).to(self.device)
