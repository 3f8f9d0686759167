"""A base model's parts, loaded when first touched, with the project's policy for dtype, device and attention.

Images are (B, 3, H, W) in [-1, 1]; latents (B, C, h, w) are scaled by the VAE's `scaling_factor`;
prompt_embeds (B, L, D) are the text encoder's hidden states at the layer that `clip_skip` names.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor

from lorakit.diffusion.merged import Merged, merge_into
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.diffusion.text import end_at
from lorakit.diffusion.words import Words, add_words
from lorakit.pictures.images import from_array
from lorakit.weights.base import BaseInfo, fetch_base
from lorakit.weights.part_files import BaseError, Places, read_places
from lorakit.weights.published import load_tokenizer

# The sampler of all that must be repeatable and invertible, whatever the base ships (PNDM in SD 1.5).
DDIM: dict[str, Any] = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class Base:
    """The parts of one base model: `unet` and `text_encoder` in `dtype`, `vae` always in float32.

    Args:
        info: what weights.base.inspect_base found; a hub base that is not here is fetched.
        device: where the parts live once loaded.
        dtype: compute dtype of the frozen U-Net and text encoder.
        prediction_type: what the U-Net predicts; None: as `info` says.
        clip_skip: which layer of the text encoder is read, counted from its end; None: 1, the last.
        merged: LoRAs that become part of U-Net and text encoder whenever they are loaded.

    Raises:
        BaseError: the hub cannot be reached, or the files are not a Stable Diffusion 1.x/2.x.
    """

    def __init__(
        self,
        info: BaseInfo,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prediction_type: str | None = None,
        clip_skip: int | None = None,
        merged: Sequence[Merged] = (),
    ):
        quiet_libraries()
        self.device, self.dtype = torch.device(device), dtype
        self.info = info if info.known else fetch_base(info, prediction_type)
        if self.info.is_large and self.device.type == "cpu":
            _free_large_blocks()
        self.prediction_type = prediction_type or self.info.prediction_type
        self.clip_skip = clip_skip or 1
        self.merged = merged
        self.words: Words | None = None

    def learn_words(self, vectors: Mapping[str, Tensor]) -> None:
        """Words that tokenizer and text encoder know from here on, by what stands for them, (n, D) each."""
        self.words = add_words(self.tokenizer, self.text_encoder, vectors)

    @cached_property
    def unet(self):
        from diffusers import UNet2DConditionModel

        unet = self._load("unet", UNet2DConditionModel.from_config, self.dtype)
        merge_into(unet, "unet", self.merged)
        return unet

    @cached_property
    def vae(self):
        from diffusers import AutoencoderKL

        return self._load("vae", AutoencoderKL.from_config, torch.float32)

    @cached_property
    def text_encoder(self):
        from transformers import CLIPTextConfig, CLIPTextModel

        def make(config: dict[str, Any]) -> Any:
            return CLIPTextModel(CLIPTextConfig.from_dict(config))

        text_encoder = self._load("text_encoder", make, self.dtype)
        merge_into(text_encoder, "text_encoder", self.merged)
        end_at(text_encoder, self.clip_skip)
        return text_encoder

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.info.tokenizer, self.info.pad_token)

    @cached_property
    def scheduler(self) -> Any:
        """The base's noise schedule as a DDIM sampler."""
        from diffusers import DDIMScheduler

        changes: dict[str, Any] = DDIM | {"prediction_type": self.prediction_type}
        return DDIMScheduler.from_config(self.info.configs["scheduler"], **changes)

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_scheduler(self.scheduler)

    def _load(self, part: str, make: Callable[[dict[str, Any]], Any], dtype: torch.dtype) -> Any:
        label = f"{self.info.files[part]}: its {part}"
        config, places = self.info.configs[part], self.info.places(part)
        return load_model(label, make, config, places, dtype).to(self.device)

    @property
    def scaling_factor(self) -> float:
        return self.info.configs["vae"]["scaling_factor"]

    # The two ends of a latent diffusion model

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Moments of the VAE's posterior, (B, 2C, h, w): mean and log-variance, unscaled, float32."""
        image = image.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        return self.vae.encode(image).latent_dist.parameters

    def mean_latents(self, image: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w), float32: the mean of the posterior, not a draw from it."""
        return self.encode(image).chunk(2, dim=1)[0] * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) from scaled latents, float32."""
        latents = latents.to(self.device, torch.float32) / self.scaling_factor
        return self.vae.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)[0]

    def decode_pictures(self, latents: Tensor) -> list[Image.Image]:
        """One at a time: it is the VAE that needs the most memory for a large picture."""
        return [from_array(self.decode(latent[None])[0].cpu().numpy()) for latent in latents]

    def drop(self, *parts: str) -> None:
        """Free the memory of parts that are not needed for now; the next touch reads them again."""
        for part in parts:
            vars(self).pop(part, None)
        _return_memory()

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids (B, L) on the device, padded and cut to the tokenizer's own length."""
        if self.words is not None:
            prompts = [self.words.spell(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=min(self.tokenizer.model_max_length, self.info.max_tokens),
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device)


def load_model(
    label: str, make: Callable[[Any], Any], config: Mapping[str, Any], places: Places, dtype: torch.dtype
) -> Any:
    """A model as `make` builds it from its config, frozen, in eval mode; weights in `dtype`, channels last.

    Any, since the libraries annotate `to`, `encode` and `config` in ways that correct calls do not fit.

    Args:
        label: what it is, for messages.

    Raises:
        BaseError: weights are missing, or do not fit the config.
    """
    try:
        with init_empty_weights():
            model = make(config)
        # Copied out of the mapped file: what lies there unaligned is multiplied in another order.
        # At once in the layout in which they stay: a second copy would leave holes in the heap.
        tensors = {name: _copied(tensor, dtype) for name, tensor in read_places(places)}
        missing, _ = model.load_state_dict(tensors, strict=False, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise BaseError(f"{label} cannot be loaded: {error}") from None
    if missing:
        lost = f"{len(missing)} weights, such as {missing[0]}"
        raise BaseError(f"{label} lacks {lost}; fetch it again")
    return model.requires_grad_(False).eval()


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(dtype, copy=True, memory_format=layout)


def _free_large_blocks() -> None:
    """From now on blocks of 256 KB go back to the system as soon as they are freed (glibc).

    By itself it puts off up to 32 MB each into a heap that only grows: 0.26 GB more in a step of SD 1.5.
    """
    mmap_threshold, trim_threshold, size = -3, -1, 256 << 10  # <malloc.h>
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, size)
        library.mallopt(trim_threshold, size)


def _return_memory() -> None:
    """What was freed goes back to the system where the C library would keep it (glibc); 0.5 GB of SD 1.5."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def posterior_sample(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Scaled latents drawn from the VAE's posterior (Kingma & Welling 2014, sec. 2.4), shape of `noise`."""
    mean, logvar = moments.chunk(2, dim=-3)
    return (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise) * scaling_factor


def open_base(info: BaseInfo, mixed_precision: str = "auto", **settings: Any) -> Base:
    """The base on the best device here; `auto` is fp16 on a CUDA GPU and float32 elsewhere.

    Args:
        settings: prediction_type and clip_skip of Base.
    """
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    set_up_backend(device)
    return Base(info, device, compute_dtype(resolve_precision(mixed_precision, device)), **settings)


def resolve_precision(mixed_precision: str, device_type: str) -> str:
    """What `auto` stands for, outside of training: fp16 on a CUDA GPU, else no."""
    if mixed_precision != "auto":
        return mixed_precision
    return "fp16" if device_type == "cuda" else "no"


def compute_dtype(mixed_precision: str) -> torch.dtype:
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def set_up_backend(device_type: str, *, allow_tf32: bool = True, deterministic: bool = False) -> None:
    """Process-wide settings, to be made before the first kernel runs.

    Denormals are flushed: a flat picture region makes them, and they slow convolution backward fivefold on
    CPUs. Threads started later inherit that mode, so it comes first.
    """
    torch.set_flush_denormal(True)
    if device_type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)


def enable_xformers(unet) -> str | None:
    """Use xformers' attention where a probe kernel really runs; otherwise return why SDPA is used instead."""
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        return "xformers is not installed (requirements-xformers.txt)"
    if unet.device.type != "cuda":
        return f"xformers has no kernels for {unet.device.type}"
    try:
        probe = torch.zeros(1, 16, 2, 32, device=unet.device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # built for another torch it raises NotImplementedError, RuntimeError, …
        return f"xformers cannot run here ({str(error).splitlines()[0]})"
    return None


def quiet_libraries() -> None:
    """Loading bars and advice of the libraries say nothing that a user of this toolkit can act on."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)


@contextmanager
def evaluating(*models):
    """Eval mode and no gradients inside; outside, every module is in the mode that it was in before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
