"""A StableDiffusionPipeline that also runs backwards: from a picture to the noise that leads to it.

    from inversion_pipeline import InversionPipeline
    pipe = InversionPipeline.from_pretrained("ckpt/miniature")
    noise = pipe.inverse("dataset/mountain/mountain.jpg", "a photo of rocky mountains", 50)
    again = pipe("a photo of rocky mountains", 128, 128, 50, guidance_scale=1, latents=noise).images[0]

DDIM inversion (Song et al. 2021, sec. 4.3) and its exact relatives; the methods stand in
lorakit/diffusion/inversion.py.
`python invert.py PICTURE` prints how well each of them reconstructs.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lorakit.diffusion import inversion
from lorakit.diffusion.denoiser import Denoiser, Rows, join_rows
from lorakit.diffusion.inversion_plan import Method
from lorakit.diffusion.lora import active_adapters
from lorakit.diffusion.models import DDIM
from lorakit.diffusion.row_weights import all_active, row_weights, weight_table
from lorakit.diffusion.schedule import Grid, NoiseSchedule
from lorakit.ground.errors import UserError
from lorakit.pictures.images import crop, from_array, load_image, resize_to_cover, to_array
from lorakit.pictures.views import assign_shapes

Picture = str | Path | Image.Image | Tensor
Weights = Mapping[str, float]


@dataclass(frozen=True)
class Inversion:
    """One picture's way from noise (node 0) to its latents (node n).

    `trajectory` (n + 1, 1, C, h, w); `negative_embeds`, of method null_text, has one (1, L, D) for each step;
    `evaluations` of the U-Net, for one row, were spent on it.
    """

    trajectory: Tensor
    grid: Grid
    rows: Rows
    adapters: tuple[str, ...]
    guidance_scale: float
    method: Method
    evaluations: int
    negative_embeds: tuple[Tensor, ...] = ()

    @property
    def noise(self) -> Tensor:
        """(1, C, h, w); for obelm half of the code, the other half being trajectory[1]."""
        return self.trajectory[0]


class InversionPipeline(StableDiffusionPipeline):
    """Samples with DDIM on the grid that it inverts on, whatever sampler the base ships (PNDM in SD 1.5).

    LoRAs are those of `load_lora_weights`. The VAE works in float32; latents are float32, for obelm float64.
    """

    def __init__(
        self,
        vae,
        text_encoder: Any,
        tokenizer,
        unet,
        scheduler: Any,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker: bool = False,
    ):
        ddim: Any = DDIMScheduler.from_config(scheduler.config, **DDIM)
        rest: Any = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        text_encoder = text_encoder.to(unet.dtype)  # left alone, it comes in the dtype of its file
        super().__init__(vae, text_encoder, tokenizer, unet, ddim, *rest)

    def prepare_latents(
        self, batch_size, num_channels_latents, height, width, dtype, device, generator, latents=None
    ):
        """As its parent, but takes noise of any dtype, such as that of `inverse`."""
        latents = latents if latents is None else latents.to(dtype)
        shape = batch_size, num_channels_latents, height, width
        return super().prepare_latents(*shape, dtype, device, generator, latents)

    def inverse(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        n_steps: int = 50,
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Tensor | list[Tensor]:
        """The noise latents (B, C, h, w) of one picture or several; a list of (1, C, h, w) if sizes differ.

        Args: as `invert`.
        """
        noises = [found.noise for found in self.invert(image, prompt, n_steps, guidance_scale, **options)]
        same = len({noise.shape for noise in noises}) == 1
        return torch.cat(noises) if same else noises

    @torch.no_grad()
    def invert(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        n_steps: int = 50,
        guidance_scale: float = 1.0,
        *,
        negative_prompt: str = "",
        method: Method = "ddim",
        iterations: int | None = None,
        adapter_weights: Weights | Sequence[Weights | None] | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> list[Inversion]:
        """Each picture's whole way from noise to latents, as its `method` finds it.

        Args:
            image: a path, a PIL picture, or a tensor (3, H, W) in [-1, 1]; or several of them, also as one
                tensor (B, 3, H, W).
            prompt: one for all, or one each.
            n_steps: of DDIM, or of ab2.
            method: see lorakit/diffusion/inversion.py.
            iterations: of fixed_point at most (default 3); of null_text's updates at most (default 10).
            adapter_weights: {adapter: weight} for all, or one mapping each; a picture is inverted under these
                LoRAs and no others, their weight on top of the one that set_adapters gave them. None: as set.
            width, height: pixels; None: near the picture's own aspect at the base's area, as in training.

        Raises:
            UserError: a picture that cannot be read, sizes, counts or adapters that do not fit.
        """
        _check(method, guidance_scale)
        pictures, prompts, weights = _one_each(image, prompt, adapter_weights)
        latents = [self.encode_image(picture, width, height) for picture in pictures]
        adapters = self._adapters(weights)
        rows = [self._encode(p, negative_prompt, adapters, w) for p, w in zip(prompts, weights, strict=True)]
        grid = self._schedule().grid(n_steps, "ab2" if method == "ab2" else "ddim")
        found: dict[int, Inversion] = {}
        for shape in dict.fromkeys(x.shape for x in latents):  # pictures of one size share a batch
            members = [i for i, x in enumerate(latents) if x.shape == shape]
            batch = torch.cat([latents[i] for i in members])
            under = join_rows([rows[i] for i in members])
            group = self._invert(batch, under, adapters, grid, guidance_scale, method, iterations)
            found |= dict(zip(members, group, strict=True))
        return [found[i] for i in range(len(pictures))]

    def _invert(self, latents, rows, adapters, grid, guidance, method, iterations) -> list[Inversion]:
        scale = 1.0 if method == "null_text" else guidance
        if method == "obelm":
            latents = latents.double()
        with self._active(adapters):
            denoiser = Denoiser(self.unet, self._schedule(), adapters)

            def predict(x: Tensor, t: int) -> Tensor:
                return denoiser(x, t, rows, scale)

            if method == "obelm":
                steps = inversion.invert_obelm(latents, grid, predict)
            else:
                count = (3 if iterations is None else iterations) if method == "fixed_point" else 0
                steps = inversion.invert(latents, grid, predict, count)
            trajectory = torch.stack([latents, *self._bar(steps, len(grid))]).flip(0)
            results = []
            for i in range(len(latents)):
                at, spent = slice(i, i + 1), denoiser.evaluations // len(latents)
                one = Inversion(trajectory[:, at], grid, rows[at], adapters, guidance, method, spent)
                if method == "null_text":
                    one = self._null_text(one, 10 if iterations is None else iterations)
                results.append(one)
        return results

    def _null_text(self, found: Inversion, iterations: int) -> Inversion:
        denoiser = Denoiser(self.unet, self._schedule(), found.adapters)
        rows = found.rows
        steps = inversion.null_text(
            found.trajectory,
            found.grid,
            predict=lambda x, t, embeds: denoiser(x, t, replace(rows, prompt_embeds=embeds)),
            conditional=lambda x, t: denoiser(x, t, rows),
            negative_embeds=rows.negative_embeds.float(),
            guidance_scale=found.guidance_scale,
            iterations=iterations,
        )
        embeds = tuple(embeds for embeds, _ in self._bar(steps, len(found.grid)))
        return replace(found, negative_embeds=embeds, evaluations=found.evaluations + denoiser.evaluations)

    @torch.no_grad()
    def reconstruct(
        self, found: Inversion, prompt: str | None = None, guidance_scale: float | None = None
    ) -> Tensor:
        """The latents (1, C, h, w) that sampling leads to, by the inversion's own method.

        Args:
            prompt: edit the picture with this prompt instead of its own; for method anchored the picture's
                own residuals keep what both prompts have in common (Ju et al. 2024).
            guidance_scale: None: as inverted.

        Raises:
            UserError: obelm, whose code holds for one prompt and guidance, with others.
        """
        guidance = found.guidance_scale if guidance_scale is None else guidance_scale
        changed = prompt is not None or guidance != found.guidance_scale
        if changed and found.method == "obelm":
            raise UserError("obelm reconstructs under the prompt and guidance it inverted with; try anchored")
        rows, grid, path, negatives = found.rows, found.grid, found.trajectory, found.negative_embeds
        if prompt is not None:
            weights = dict(zip(found.adapters, rows.weights[0].tolist(), strict=True))
            edited = self._encode(prompt, "", found.adapters, weights)
            rows = replace(rows, prompt_embeds=edited.prompt_embeds)
        with self._active(found.adapters):
            denoiser = Denoiser(self.unet, self._schedule(), found.adapters)

            def source(x: Tensor, t: int) -> Tensor:
                return denoiser(x, t, found.rows, found.guidance_scale)

            def predict(x: Tensor, t: int) -> Tensor:
                own = {"negative_embeds": negatives[grid.timesteps.index(t)]} if negatives else {}
                return denoiser(x, t, replace(rows, **own), guidance)

            if found.method == "anchored":
                steps = inversion.sample_anchored(path, grid, source, predict)
            elif found.method == "obelm":
                steps = inversion.sample_obelm((path[0], path[1]), grid, predict)
            else:
                steps = inversion.sample(path[0], grid, predict)
            latents = path[-1]  # of obelm with one step, whose code holds the picture
            for latents in self._bar(steps, len(grid)):  # noqa: B007
                pass
        return latents.float()

    @torch.no_grad()
    def encode_image(self, image: Picture, width: int | None = None, height: int | None = None) -> Tensor:
        """Scaled latents (1, C, h, w), float32, the mean of the VAE's posterior.

        Raises:
            UserError: a picture that cannot be read, or a size that the VAE's factor does not divide.
        """
        if isinstance(image, Tensor):
            pixels = image if image.ndim == 4 else image[None]
            if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
                raise UserError(
                    f"a tensor of shape {tuple(image.shape)}: give pictures as (3, H, W) in [-1, 1]"
                )
            size = self._checked(pixels.shape[-1], pixels.shape[-2])
            if (width or size[0], height or size[1]) != size:
                raise UserError(f"a tensor keeps the size it has, {size[0]}x{size[1]}: resize it first")
        else:
            picture = image.convert("RGB") if isinstance(image, Image.Image) else load_image(image)
            size = self._size(picture, width, height)
            pixels = torch.from_numpy(to_array(crop(resize_to_cover(picture, *size), *size)))[None]
        with self._vae_in_float32() as vae:
            pixels = pixels.to(self._execution_device, torch.float32)
            return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents_to_pictures(self, latents: Tensor) -> list[Image.Image]:
        """Pictures from scaled latents (B, C, h, w)."""
        with self._vae_in_float32() as vae:
            scaled = latents.to(self._execution_device, torch.float32) / vae.config.scaling_factor
            pixels = [vae.decode(x[None], return_dict=False)[0][0].cpu().numpy() for x in scaled]
        return [from_array(np.asarray(each)) for each in pixels]

    def _size(self, picture: Image.Image, width: int | None, height: int | None) -> tuple[int, int]:
        if (width is None) != (height is None):
            raise UserError("width, height: give both or neither")
        if width is not None and height is not None:
            return self._checked(width, height)
        levels = 2 ** (len(self.unet.config.block_out_channels) - 1)
        resolution = self.unet.config.sample_size * self.vae_scale_factor
        return assign_shapes([picture.size], resolution, self.vae_scale_factor * levels, True)[0]

    def _checked(self, width: int, height: int) -> tuple[int, int]:
        factor = self.vae_scale_factor
        if min(width, height) < 1 or width % factor or height % factor:
            raise UserError(f"{width}x{height}: both must divide by the VAE's factor, {factor}")
        return width, height

    @contextmanager
    def _vae_in_float32(self):
        vae: Any = self.vae
        dtype = vae.dtype
        try:
            yield vae.to(torch.float32)
        finally:
            vae.to(dtype)

    def _bar(self, steps: Iterable, total: int) -> Iterable:
        return tqdm(steps, total=total, **getattr(self, "_progress_bar_config", {}))

    def _schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_scheduler(self.scheduler)

    def _adapters(self, weights: Sequence[Weights | None]) -> tuple[str, ...]:
        """The adapters that weights name; none, where all pictures take what is active."""
        if all(each is None for each in weights):
            return ()
        models: list[Any] = [self.unet, self.text_encoder]
        loaded = list(dict.fromkeys(name for model in models for name in getattr(model, "peft_config", ())))
        if unknown := sorted({name for each in weights for name in each or ()} - set(loaded)):
            raise UserError(f"adapter_weights: no adapter {unknown[0]!r}; loaded are {loaded or 'none'}")
        return tuple(loaded)

    def _active(self, adapters: Sequence[str]):
        return all_active((self.unet, self.text_encoder), adapters)

    def _encode(self, prompt: str, negative: str, adapters: Sequence[str], weights: Weights | None) -> Rows:
        """The conditions of one picture; its text encoder runs under its own LoRAs too."""
        if weights is None:
            active = (*active_adapters(self.unet), *active_adapters(self.text_encoder))
            weights = dict.fromkeys(active, 1.0)
        table = weight_table(adapters, [dict(weights)])
        with self._active(adapters), row_weights(self.text_encoder, adapters, table):
            states: Any = self.encode_prompt(prompt, self._execution_device, 1, True, negative)
        embeds, negatives = states
        return Rows(embeds.float(), negatives.float(), table.T.to(embeds.device))


def _one_each(image: Any, prompt: Any, weights: Any) -> tuple[list[Any], list[str], list[Weights | None]]:
    """Pictures, prompts and adapter weights, as many of each; what is given once is for all pictures."""
    single = isinstance(image, Picture) and not (isinstance(image, Tensor) and image.ndim == 4)
    pictures: list[Any] = [image] if single else list(image)  # type: ignore[arg-type]
    prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
    if weights is None or isinstance(weights, Mapping):
        weights = [weights] * len(pictures)
    weights = list(weights)
    if not len(pictures) == len(prompts) == len(weights):
        raise UserError(
            f"{len(pictures)} pictures, {len(prompts)} prompts and {len(weights)} adapter weights: give "
            "one of each per picture"
        )
    return pictures, prompts, weights


def _check(method: str, guidance_scale: float) -> None:
    if method not in get_args(Method):
        raise UserError(f"method {method!r}: choose one of {', '.join(get_args(Method))}")
    if method == "null_text" and guidance_scale == 1:
        raise UserError(
            "null_text optimizes the negative prompt, which guidance_scale 1 does not use; raise it"
        )
