"""The walk over a grid that generate.py and style_transfer.py share: LoRAs, prompts, batches, files."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lorakit.diffusion.models import Base
from lorakit.ground.chunks import Chunks
from lorakit.sampling.config import SamplingConfig
from lorakit.sampling.gallery import Gallery, Picture
from lorakit.sampling.samplers import LoraStack, encode_prompts, make_scheduler, unread_notes


@dataclass(frozen=True)
class Batch:
    """What one pass makes: a picture for each subject and seed.

    Args:
        cfg: of the cell, resolved.
        prompt_embeds: (B, L, D); `negative_embeds`: (1, L, D).
    """

    cfg: Any
    subjects: Sequence[int]
    seeds: Sequence[int]
    prompt_embeds: Tensor
    negative_embeds: Tensor
    scheduler: Any


Row: TypeAlias = tuple[int, int]
"""The subject and the seed of a picture."""


def batches(rows: Sequence[Row], size: int, shape: Callable[[int], Any]) -> Iterator[list[Row]]:
    """The rows in order, at most `size` at a time, all of one shape."""
    for _, alike in groupby(rows, key=lambda row: shape(row[0])):
        group = list(alike)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def fill(
    gallery: Gallery,
    base: Base,
    cfg: SamplingConfig,
    count: int,
    *,
    prompts: Callable[[Any], Sequence[str]],
    render: Callable[[Batch], list[Image.Image]],
    alone: Callable[[Any, int, int], SamplingConfig],
    facts: Callable[[Any, int, Image.Image], dict[str, Any]] = lambda *_: {},
    shape: Callable[[int], Any] = lambda _: None,
) -> None:
    """Make and save `count` pictures of each subject in each cell of the grid.

    Args:
        prompts: cell -> a prompt for each subject.
        alone: (cell, subject, seed) -> the config that makes this picture and no other.
        facts: (cell, subject, picture) -> what the report says of it.
        shape: subject -> what the pictures of one batch must share.
    """
    stack, chunks = LoraStack(base), Chunks(cfg.batch_size)
    rows = [(subject, cfg.seed + i) for subject in range(len(gallery.subjects)) for i in range(count)]
    cells = cfg.numbered_cells()
    said: set[str] = set()
    with tqdm(total=len(cells) * len(rows), unit="picture") as bar:
        for at, cell in cells:
            cell, _ = cell.resolved()
            stack.use(cell.loras)
            texts = prompts(cell)
            for note in stack.new_notes() + unread_notes(base, [*texts, cell.negative_prompt]):
                if note not in said:
                    bar.write(f"note        {note}")
                    said.add(note)
            for batch in batches(rows, cfg.batch_size, shape):
                begun = time.perf_counter()
                images = _pictures(base, cell, texts, batch, chunks, render)
                seconds = round((time.perf_counter() - begun) / len(batch), 4)
                for (subject, seed), image in zip(batch, images, strict=True):
                    own = {"seconds": seconds} | facts(cell, subject, image)
                    single = alone(cell, subject, seed)
                    gallery.add(Picture(image, subject, seed, at, single, texts[subject], own))
                bar.update(len(batch))


def _pictures(
    base: Base,
    cell: Any,
    texts: Sequence[str],
    rows: Sequence[Row],
    chunks: Chunks,
    render: Callable[[Batch], list[Image.Image]],
) -> list[Image.Image]:
    """The pictures of these rows in one pass, or in several where memory runs out."""

    def part_of(part: slice) -> list[Image.Image]:
        subjects, seeds = zip(*rows[part], strict=True)
        own = [str(texts[subject]) for subject in subjects]
        embeds = encode_prompts(base, [*own, cell.negative_prompt])  # (B + 1, L, D)
        scheduler = make_scheduler(base, cell.sampler()[0])
        return render(Batch(cell, subjects, seeds, embeds[:-1], embeds[-1:], scheduler))

    return [image for part in chunks.parts(len(rows), part_of) for image in part]
