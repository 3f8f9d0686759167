"""Pictures and their paths from noise: each is inverted once, alone, and its path is kept by content."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion import inversion
from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.models import Base
from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.publish import explained, publish_file
from lorakit.pictures.images import to_array
from lorakit.pictures.views import entry_name
from lorakit.weights.base import BaseInfo
from lorakit.weights.identity import base_identity, file_sha256
from lorakit.weights.tensors import read_tensors, serialize

CACHE_VERSION = 2


@dataclass(frozen=True)
class Inverting:
    """How the pictures of one run are inverted."""

    steps: int
    method: Literal["ddim", "fixed_point", "ab2"] = "ddim"
    iterations: int = 3
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    prediction_type: str | None = None
    clip_skip: int | None = None

    def entry(self, folder: Path, info: BaseInfo, shape: tuple[int, int], dtype: str, *own: Any) -> Path:
        """The cache entry of a path: a hash of everything that it depends on.

        Args:
            shape: width and height in pixels.
            own: what is the picture's own: its content, prompt, LoRA.
        """
        guided, fixed_point = self.guidance_scale != 1, self.method == "fixed_point"
        shared = [CACHE_VERSION, base_identity(info), shape, self.steps, self.method, dtype]
        shared += [self.iterations if fixed_point else None]
        shared += [self.guidance_scale, self.negative_prompt if guided else None]
        shared += [self.prediction_type, self.clip_skip]
        return folder / "paths" / entry_name(*shared, *own)


def path_name(
    how: Inverting,
    folder: Path,
    base: Base,
    shape: tuple[int, int],
    picture: str,
    row: Rows,
    loras: str = "[]",
) -> Path:
    """The cache entry of a file's path under the text states of `row`.

    Args:
        shape: width and height in pixels.
        loras: what LoRAs do to it, as a text.
    """
    states = row.prompt_embeds.detach().cpu().contiguous().numpy().tobytes()
    own = file_sha256(picture), hashlib.sha256(states).hexdigest(), loras
    return how.entry(folder, base.info, shape, str(base.dtype), *own)


def encode_picture(base: Base, picture: Image.Image) -> Tensor:
    """Scaled latents (1, C, h, w): the mean of the VAE's posterior, float32 on the base's device."""
    return base.mean_latents(torch.from_numpy(to_array(picture))[None])


def decode_picture(base: Base, latents: Tensor) -> Image.Image:
    """The picture of one latent (C, h, w)."""
    return base.decode_pictures(latents[None])[0]


def invert_cached(
    denoiser: Denoiser,
    rows: Rows,
    latents: Sequence[Tensor],
    names: Sequence[Path],
    how: Inverting,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Paths (n + 1, B, C, h, w) of B pictures, each inverted under its own row, or taken from the cache.

    A path depends on nothing else, not even on what shares its batch: so it can be taken from the cache to
    the bit.

    Args:
        latents: (1, C, h, w) of each picture; `names` its cache entry.
        between: called before each U-Net evaluation; may raise, to stop.
    """
    grid = denoiser.schedule.grid(how.steps, "ab2" if how.method == "ab2" else "ddim")
    iterations = how.iterations if how.method == "fixed_point" else 0
    paths = []
    for i, (start, name) in enumerate(zip(latents, names, strict=True)):
        path = _read(name, (len(grid) + 1, *start.shape))
        if path is None:

            def predict(x: Tensor, timestep: int, row=rows[i : i + 1]) -> Tensor:
                between()
                return denoiser(x, timestep, row, how.guidance_scale)

            with torch.no_grad():
                found = [start, *inversion.invert(start, grid, predict, iterations)]
            path = torch.stack(found[::-1])
            publish_file(name, serialize({"trajectory": path.cpu()}, {"version": str(CACHE_VERSION)}))
        paths.append(path.to(start.device))
    return torch.cat(paths, dim=1)


def _read(name: Path, shape: tuple[int, ...]) -> Tensor | None:
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
