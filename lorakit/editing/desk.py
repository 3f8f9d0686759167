"""A picture on the desk: its latents, its paths under every prompt and LoRA that edits ask for, and edits."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.fit import NOTICED, fit_losses
from lorakit.diffusion.models import Base
from lorakit.diffusion.paths import Inverting, decode_picture, encode_picture, invert_cached, path_name
from lorakit.editing.config import DRAWS, EditConfig, PictureConfig
from lorakit.editing.edit_plan import EditPlan
from lorakit.editing.imagic import Embedding
from lorakit.editing.imagic_plan import embedding_of
from lorakit.editing.swapping import (
    Source,
    blended,
    composed,
    last,
    latent_mask,
    redraw,
    rows_of,
    share_of,
    swap,
    with_reach,
)
from lorakit.ground.chunks import Chunks
from lorakit.pictures.images import read_picture
from lorakit.sampling.config import LoraEntry
from lorakit.sampling.encoding import PromptEncoder
from lorakit.sampling.prompts import lora_files
from lorakit.sampling.samplers import LoraStack, picture_noise
from lorakit.weights.identity import lora_sha256


@dataclass(frozen=True)
class Result:
    """A picture that an edit gave; `seconds` are its share of those of its batch."""

    target: str
    seed: int
    image: Image.Image
    seconds: float


@dataclass
class Desk:
    """Everything that the edits of one picture share.

    Args:
        cfg: of the run; `plan` was made of it.
        cache: folder of inverted paths.

    `inversion_seconds` were spent on them.
    """

    base: Base
    cfg: PictureConfig
    plan: EditPlan
    cache: Path
    sources: dict[Path, Source] = field(default_factory=dict)
    inversion_seconds: float = 0.0

    def __post_init__(self) -> None:
        cfg, base = self.cfg, self.base
        self.picture = read_picture(cfg.image, self.plan.shape)
        self.latents = encode_picture(base, self.picture)
        self.round_trip = decode_picture(base, self.latents[0])
        self.stack, self.chunks = LoraStack(base), Chunks(cfg.batch_size)
        loras = lora_files(cell for _, cell in cfg.numbered_cells())
        self.encoder = PromptEncoder(base, cfg.prompt_syntax, cfg.embedding_dirs, loras)
        self.denoiser = Denoiser(base.unet, base.noise_schedule())
        factor, mask = base.info.vae_factor, self.plan.mask
        self.where = None if mask is None else latent_mask(mask, factor, base.device)

    def results(self, cell: EditConfig) -> Iterator[Result]:
        """What a resolved cell of the grid, or of `parts_of` it, asks for: one for each target and seed."""
        loras = (*cell.all_loras(), *cell.prompt_loras())
        self.stack.use(loras)
        asked = [(target, seed) for target in cell.targets() for seed in cell.seeds()]
        texts = list(dict.fromkeys([cell.prompt, *cell.targets()]))  # equal texts have equal bits
        embeds, negative = self.encoder.encode(texts, cell.negative_prompt)
        states = dict(zip(texts, embeds.float().split(1), strict=True))
        if cell.method == "imagic":
            assert cell.lora is not None and cell.eta is not None
            fitted = Embedding.read(embedding_of(cell.lora), self.base.device)
            states[cell.targets()[0]] = fitted.between(cell.eta)
        row = Rows.plain(states[cell.prompt], negative.float())
        source = self._source(cell, row, loras)

        def work(part: slice) -> list[Result]:
            begun, rows = time.perf_counter(), asked[part]
            wanted = rows_of(source.row, torch.cat([states[target] for target, _ in rows]))
            latents, reach = self._edited(cell, source, wanted, [seed for _, seed in rows])
            images = [self._finished(image) for image in self.base.decode_pictures(latents)]
            if reach is not None:
                images = [self._near(*each, cell.keep_below) for each in zip(images, reach, strict=True)]
            seconds = (time.perf_counter() - begun) / len(rows)
            pairs = zip(rows, images, strict=True)
            return [Result(target, seed, image, seconds) for (target, seed), image in pairs]

        for part in self.chunks.parts(len(asked), work):
            yield from part

    def fit_warnings(self) -> list[str]:
        """A line if the picture's LoRA does not fit the picture better than none does."""
        cfg = self.cfg
        at_work = any(cell.lora_weight for _, cell in cfg.numbered_cells())
        if cfg.lora is None or self.plan.fits or not at_work:
            return []
        losses = []
        for loras in ([], [LoraEntry(path=cfg.lora, weight=1.0, blocks={}, rank=None)]):
            self.stack.use(loras)
            embeds, negative = self.encoder.encode([cfg.prompt], "")
            losses += fit_losses(self.denoiser, Rows.plain(embeds.float(), negative.float()), self.latents)
        without, own = losses
        if own * NOTICED < without:
            return []
        return [
            f"lora: {cfg.lora} fits {cfg.image} no better than none does (loss {own:.4f} against "
            f"{without:.4f}): is it another picture's?"
        ]

    @torch.no_grad()
    def _edited(
        self, cell: EditConfig, source: Source, rows: Rows, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Latents, and where they were led away from the picture, if anything is to be kept by that."""
        options: dict[str, Any] = {
            "guidance_scale": cell.sampler()[2],
            "start": cell.first_node(),
            "where": self.where,
        }
        if cell.method == "swap":
            steps = swap(self.denoiser, source, rows, **options)
            return with_reach(steps, source.path) if cell.keep_below else (last(steps), None)
        noise = picture_noise(self.base, seeds, self.plan.shape).float()
        return last(redraw(self.denoiser, source, rows, noise, **options)), None

    def _near(self, image: Image.Image, reach: Tensor, below: float) -> Image.Image:
        return blended(image, self.round_trip, share_of(reach, below, self.base.info.vae_factor))

    def _finished(self, image: Image.Image) -> Image.Image:
        mask = self.plan.mask
        return image if mask is None else composed(image, self.round_trip, mask, self.base.info.vae_factor)

    def _source(self, cell: PictureConfig, row: Rows, loras: Sequence[LoraEntry]) -> Source:
        """The picture inverted without guidance, which edits have of their own; kept by content."""
        steps = cell.sampler()[1]
        grid = self.denoiser.schedule.grid(steps, cell.solver)
        if isinstance(cell, EditConfig) and cell.method in DRAWS:
            return Source(self.latents[None], row, grid)
        how = Inverting(steps, cell.solver, prediction_type=cell.prediction_type, clip_skip=cell.clip_skip)
        name = path_name(how, self.cache, self.base, self.plan.shape, cell.image, row, _record(loras))
        if name not in self.sources:
            begun = time.perf_counter()
            path = invert_cached(self.denoiser, row, [self.latents], [name], how)
            self.inversion_seconds += time.perf_counter() - begun
            self.sources[name] = Source(path, row, grid)
        return self.sources[name]


def _record(loras: Sequence[LoraEntry]) -> str:
    """What LoRAs do to a path, wherever their files lie."""
    entries = [
        lora.model_dump(mode="json") | {"path": lora_sha256(lora.path)} for lora in loras if lora.weight
    ]
    return json.dumps(entries, sort_keys=True)
