"""Latents, text states and masks, made once and read from shards as steps need them.

Each picture is encoded once. What is kept is the mean and log-variance of the VAE's posterior, so that every
step still draws a new latent from it. Entries are named by content (image bytes, transform, the VAE's weights
and config), carry a checksum and are made again when they are bad. While a text encoder is not trained, its
states are cached the same way, and it need not be loaded at all in a later run.

What is encoded together has one size for each shape, filled up with zeros, since kernels round by the size of
a batch: an entry depends neither on what was encoded beside it nor on the number of processes.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load
from torch import Tensor

from lorakit.diffusion.models import Base
from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.shards import Shards
from lorakit.pictures.images import load_image
from lorakit.pictures.masks import MaskKind, mask_entry, mask_weights
from lorakit.pictures.views import Shape, View, entry_key
from lorakit.training.forecast import HELD_BYTES
from lorakit.weights.tensors import serialize

CAPTIONS = 8  # encoded together
ROWS = 16  # pictures encoded together, at most
PIXELS = {"cuda": 1 << 20}  # of them
Item = TypeVar("Item")
Result = TypeVar("Result")


class Names(Protocol):
    """Of cache entries, by key."""

    def __getitem__(self, key: Any, /) -> bytes: ...


class NumberedNames:
    """Names by number, 20 bytes of memory each."""

    def __init__(self, names: Iterable[bytes]):
        self.names = b"".join(names)

    def __getitem__(self, number: int) -> bytes:
        return self.names[20 * number : 20 * number + 20]


class TextNames:
    """Names of the text states of prompts.

    Args:
        text_hash: of the text encoder and the tokenizer.
    """

    def __init__(self, base: Base, text_hash: str, dtype: str = "float32"):
        self.settings = (text_hash, str(base.dtype), base.clip_skip, dtype)

    def __getitem__(self, prompt: str) -> bytes:
        return entry_key(prompt, *self.settings)


class Cache:
    """Tensors by key, float32 on `device`: the first that are read stay there up to `budget` bytes.

    Args:
        names: of the entries, all good.
    """

    def __init__(
        self,
        shards: Shards,
        names: Names,
        device: torch.device,
        budget: int = HELD_BYTES,
    ):
        self.shards, self.names, self.device, self.budget = shards, names, device, budget
        self.held: dict[Any, Tensor] = {}

    def __getitem__(self, key: Any) -> Tensor:
        if key in self.held:
            return self.held[key]
        data = self.shards.read(self.names[key])
        if data is None:
            raise OutputError(
                f"{self.shards.folder}: a cache entry was good a moment ago and is not now; start again to "
                "re-make it"
            )
        tensor = load(data)["tensor"].to(self.device, torch.float32)
        if tensor.nbytes <= self.budget:
            self.held[key], self.budget = tensor, self.budget - tensor.nbytes
        return tensor


def write_entry(shards: Shards, name: bytes, tensor: Tensor, dtype: str = "float32") -> None:
    shards.write(name, serialize({"tensor": tensor.to(getattr(torch, dtype))}, {}))


def keep_moments(shards: Shards, view: Any, moments: Tensor, vae_hash: str, dtype: str) -> None:
    """Cache what the VAE makes of a view, or of a clip.

    Raises:
        UserError: NaN or infinity.
    """
    if not torch.isfinite(moments).all():
        raise UserError(f"{view.row.name}: the VAE makes NaN or infinity of it; leave it out")
    write_entry(shards, view.entry(vae_hash, dtype), moments, dtype)


def missing_views(
    views: Sequence[Any], shards: Shards, vae_hash: str, dtype: str = "float32", verify: bool = True
) -> list[Any]:
    """The views, or clips, that have no valid cache entry, or where it is not verified none at all."""
    return [view for view in views if _lacks(shards, view.entry(vae_hash, dtype), verify)]


def _lacks(shards: Shards, name: bytes, verify: bool) -> bool:
    return shards.read(name) is None if verify else name not in shards


def rows_together(shape: Shape, device: torch.device) -> int:
    """How many pictures of a shape are encoded in one batch."""
    width, height = shape
    return min(ROWS, max(1, PIXELS.get(device.type, 1 << 16) // (width * height)))


def encode_views(
    views: Sequence[View],
    base: Base,
    shards: Shards,
    vae_hash: str,
    *,
    image_options: dict,
    threads: int = 1,
    dtype: str = "float32",
) -> Iterator[View]:
    """Encode views into the cache, shape by shape, and yield each once its entry is there.

    `threads` decode ahead of the VAE.

    Raises:
        UserError: the VAE makes NaN or infinity of a picture.
    """

    def pixels(group: Sequence[View]) -> Tensor:
        images = torch.zeros(rows_together(group[0].shape, base.device), 3, *group[0].shape[::-1])
        for place, view in zip(images, group, strict=False):
            image = load_image(view.row.source, name=view.row.name, **image_options)
            place.copy_(torch.from_numpy(view.pixels(image)))
        return images

    groups = list(_together(views, base.device))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        decoded = _ahead(pool, pixels, groups, max(1, threads))
        for group, images in zip(groups, decoded, strict=True):
            for view, moments in zip(group, base.encode(images).cpu(), strict=False):
                keep_moments(shards, view, moments, vae_hash, dtype)
                yield view


def _together(views: Sequence[View], device: torch.device) -> Iterator[Sequence[View]]:
    """Views that are encoded in one batch."""
    shapes = defaultdict(list)
    for view in views:
        shapes[view.shape].append(view)
    for shape, group in shapes.items():
        yield from _batches(group, rows_together(shape, device))


def _batches(items: Sequence[Item], count: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + count] for start in range(0, len(items), count))


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[Result]:
    """function(item) of each in order, `count` of them begun before they are asked for."""
    begun = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) > count:
            yield begun.popleft().result()
    yield from (future.result() for future in begun)


def cache_masks(
    views: Sequence[View],
    kind: MaskKind,
    factor: int,
    shards: Shards,
    image_options: dict,
    verify: bool = True,
) -> None:
    """Make the weights (1, h, w) of views where they are missing."""
    for view in views:
        name = mask_entry(view, kind, factor)
        if _lacks(shards, name, verify):
            write_entry(shards, name, torch.from_numpy(mask_weights(view, kind, factor, **image_options)))


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    names: TextNames,
    base: Base,
    shards: Shards,
    dtype: str = "float32",
    verify: bool = True,
) -> None:
    """Encode into the cache what is missing: hidden states (L, D)."""
    missing = {names[prompt]: prompt for prompt in prompts if _lacks(shards, names[prompt], verify)}
    for some in _batches(list(missing.items()), CAPTIONS):
        prompts = [prompt for _, prompt in some]
        states = base.text_encoder(base.tokenize(prompts + [""] * (CAPTIONS - len(some))))[0]
        for (name, _), state in zip(some, states.float().cpu(), strict=False):
            write_entry(shards, name, state, dtype)
