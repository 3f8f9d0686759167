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
from lorakit.sampling.config import LoraEntry, SamplingConfig
from lorakit.sampling.encoding import PromptEncoder
from lorakit.sampling.gallery import Gallery, Picture
from lorakit.sampling.prompts import lora_files, prompt_notes
from lorakit.sampling.samplers import LoraStack, make_scheduler


@dataclass(frozen=True)
class Batch:
    """What one pass makes: a picture for each subject and seed.

    Args:
        cells: the config of each picture, resolved.
        prompt_embeds: (B, C * L, D); `negative_embeds`: (1, C * L, D).
    """

    cells: Sequence[Any]
    subjects: Sequence[int]
    seeds: Sequence[int]
    prompt_embeds: Tensor
    negative_embeds: Tensor
    scheduler: Any

    @property
    def cfg(self) -> Any:
        """What is equal in all `cells`: all but their texts and seeds."""
        return self.cells[0]


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
    asked: Callable[[Any], Sequence[SamplingConfig]],
    render: Callable[[Batch], list[Image.Image]],
    alone: Callable[[Any, int, int], SamplingConfig],
    facts: Callable[[Any, int, Image.Image], dict[str, Any]] = lambda *_: {},
    shape: Callable[[int], Any] = lambda _: None,
) -> None:
    """Make and save `count` pictures of each subject in each cell of the grid.

    Args:
        asked: cell -> the config of each subject, with one prompt.
        alone: (config of a subject, its number, seed) -> the config that makes this picture and no other.
        facts: (config of a subject, its number, picture) -> what the report says of it.
        shape: subject -> what the pictures of one batch must share.
    """
    stack, chunks = LoraStack(base), Chunks(cfg.batch_size)
    cells = [(at, asked(cell)) for at, cell in cfg.numbered_cells()]
    loras = lora_files(each for _, subjects in cells for each in subjects)
    encoder = PromptEncoder(base, cfg.prompt_syntax, cfg.embedding_dirs, loras)
    said: set[str] = set()
    with tqdm(total=sum(len(subjects) for _, subjects in cells) * count, unit="picture") as bar:

        def say(notes: Sequence[str]) -> None:
            for note in notes:
                if note not in said:
                    bar.write(f"note        {note}")
                    said.add(note)

        for at, subjects in cells:
            say(prompt_notes(subjects, base.info, base.tokenizer))
            jobs = [Job.of(each, encoder) for each in subjects]
            rows = [(number, job.cfg.seed + i) for number, job in enumerate(jobs) for i in range(count)]
            alike = [(shape(number), job.alike()) for number, job in enumerate(jobs)]
            for batch in batches(rows, cfg.batch_size, alike.__getitem__):
                stack.use(jobs[batch[0][0]].loras)
                say(stack.new_notes())
                begun = time.perf_counter()
                images = _pictures(base, encoder, jobs, batch, chunks, render)
                seconds = round((time.perf_counter() - begun) / len(batch), 4)
                for (subject, seed), image in zip(batch, images, strict=True):
                    own = jobs[subject].cfg
                    told = {"seconds": seconds} | facts(own, subject, image)
                    single = alone(own, subject, seed)
                    gallery.add(Picture(image, subject, seed, at, single, jobs[subject].prompt, told))
                bar.update(len(batch))


@dataclass(frozen=True)
class Job:
    """A subject in a cell: its config, resolved, all LoRAs that take part, and the chunks of its prompt."""

    cfg: Any
    loras: tuple[LoraEntry, ...]
    chunks: int

    @property
    def prompt(self) -> str:
        return self.cfg.prompt

    @classmethod
    def of(cls, cfg: Any, encoder: PromptEncoder) -> "Job":
        loras = (*cfg.loras, *cfg.prompt_loras())
        return cls(cfg.resolved()[0], loras, encoder.count(cfg.prompt, cfg.negative_prompt))

    def alike(self) -> "Job":
        """What must be equal in one batch: all but the texts of the picture and the seed."""
        texts = dict.fromkeys(self.cfg.own_texts(), "")
        return Job(self.cfg.model_copy(update=texts | {"seed": 0}), self.loras, self.chunks)


def _pictures(
    base: Base,
    encoder: PromptEncoder,
    jobs: Sequence[Job],
    rows: Sequence[Row],
    chunks: Chunks,
    render: Callable[[Batch], list[Image.Image]],
) -> list[Image.Image]:
    """The pictures of these rows in one pass, or in several where memory runs out."""

    def part_of(part: slice) -> list[Image.Image]:
        subjects, seeds = zip(*rows[part], strict=True)
        cells = [jobs[subject].cfg for subject in subjects]
        prompts = [jobs[subject].prompt for subject in subjects]
        embeds = encoder.encode(prompts, cells[0].negative_prompt)
        return render(Batch(cells, subjects, seeds, *embeds, make_scheduler(base, cells[0].sampler()[0])))

    return [image for part in chunks.parts(len(rows), part_of) for image in part]
