"""A base model's parts, loaded when first touched, with the project's policy for dtype, device and attention.

Images are (B, 3, H, W) in [-1, 1]; latents (B, C, h, w) are scaled by the VAE's `scaling_factor`;
prompt_embeds (B, L, D) are the text encoder's hidden states at the layer that `clip_skip` names.
"""

import logging
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.diffusion.text import end_at
from lorakit.pictures.images import from_array
from lorakit.weights.base import WEIGHTS, BaseError, BaseInfo, describe_base, inspect_base

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
        info: what weights.base.inspect_base found. A hub id is downloaded here, a single file is read here.
        device: where the parts live once loaded.
        dtype: compute dtype of the frozen U-Net and text encoder.
        prediction_type: what the U-Net predicts; None: as the base's scheduler says.
        clip_skip: which layer of the text encoder is read, counted from its end; None: 1, the last.

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
    ):
        quiet_libraries()
        self.clip_skip = clip_skip or 1
        self.device, self.dtype, self.prediction_type = torch.device(device), dtype, prediction_type
        self.whole = None  # of a single file: the pipeline that it holds
        if info.kind == "file":
            self.whole = _read_file(info.name)
            info = _describe_whole(info.name, self.whole)
        elif not info.known:
            info = _download(info, dtype)
        self.info = info

    @cached_property
    def unet(self):
        from diffusers import UNet2DConditionModel

        unet = self._load(UNet2DConditionModel, "unet", self.dtype)
        return unet.to(self.device, memory_format=torch.channels_last)

    @cached_property
    def vae(self):
        from diffusers import AutoencoderKL

        vae = self._load(AutoencoderKL, "vae", torch.float32)
        return vae.to(self.device, memory_format=torch.channels_last)

    @cached_property
    def text_encoder(self):
        from transformers import CLIPTextModel

        text_encoder = self._load(CLIPTextModel, "text_encoder", self.dtype).to(self.device)
        end_at(text_encoder, self.clip_skip)
        return text_encoder

    @cached_property
    def tokenizer(self):
        from transformers import CLIPTokenizer

        return self._load(CLIPTokenizer, "tokenizer")

    @cached_property
    def scheduler(self) -> Any:
        """The base's noise schedule as a DDIM sampler."""
        from diffusers import DDIMScheduler

        changes: dict[str, Any] = dict(DDIM)
        if self.prediction_type:
            changes["prediction_type"] = self.prediction_type
        return DDIMScheduler.from_config(self._load(DDIMScheduler, "scheduler").config, **changes)

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_scheduler(self.scheduler)

    def _load(self, cls, part: str, dtype: torch.dtype | None = None) -> Any:
        """One part; a model comes frozen and in eval mode.

        Any, since the libraries annotate `to`, `encode` and `config` in ways that correct calls do not fit.
        """
        if self.whole is not None:
            model = getattr(self.whole, part)
        else:
            options: dict = {"subfolder": part}
            if dtype is not None:
                options |= {"dtype": dtype, "use_safetensors": True}
                options["variant"] = "fp16" if ".fp16." in self.info.files[part].name else None
            try:
                model = cls.from_pretrained(str(self.info.root), **options)
            except (OSError, ValueError) as error:
                raise BaseError(f"{self.info.root}/{part}: cannot be loaded: {error}") from None
        return model if dtype is None else model.to(dtype).requires_grad_(False).eval()

    @property
    def scaling_factor(self) -> float:
        return self.info.configs["vae"]["scaling_factor"]

    # The two ends of a latent diffusion model

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Moments of the VAE's posterior, (B, 2C, h, w): mean and log-variance, unscaled, float32."""
        vae = self.vae.to(self.device)
        image = image.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        return vae.encode(image).latent_dist.parameters

    def mean_latents(self, image: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w), float32: the mean of the posterior, not a draw from it."""
        return self.encode(image).chunk(2, dim=1)[0] * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) from scaled latents, float32."""
        vae = self.vae.to(self.device)
        latents = latents.to(self.device, torch.float32) / self.scaling_factor
        return vae.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)[0]

    def decode_pictures(self, latents: Tensor) -> list[Image.Image]:
        """One at a time: it is the VAE that needs the most memory for a large picture."""
        return [from_array(self.decode(latent[None])[0].cpu().numpy()) for latent in latents]

    def park(self, keep_text_encoder: bool = False) -> None:
        """Free the device of what training steps do not need; the VAE waits on the CPU until it is used."""
        if "vae" in vars(self):
            self.vae.to("cpu")
        if not keep_text_encoder and "text_encoder" in vars(self):
            vars(self).pop("text_encoder").to("cpu")

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids (B, L) on the device, padded and cut to the tokenizer's own length."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=min(self.tokenizer.model_max_length, self.info.max_tokens),
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device)


def posterior_sample(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Scaled latents drawn from the VAE's posterior (Kingma & Welling 2014, sec. 2.4), shape of `noise`."""
    mean, logvar = moments.chunk(2, dim=-3)
    return (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise) * scaling_factor


def _download(info: BaseInfo, dtype: torch.dtype) -> BaseInfo:
    """Fetch the parts of a hub base that are used; the half-precision weights where the dtype wants them."""
    from huggingface_hub import HfApi, snapshot_download

    full = {part: f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items()}
    half = {part: name.replace(".safetensors", ".fp16.safetensors") for part, name in full.items()}
    try:
        names = set(HfApi().list_repo_files(info.name))
        chosen = full if dtype == torch.float32 or half["unet"] not in names else half | {"vae": full["vae"]}
        weights = [name if name in names else half[part] for part, name in chosen.items()]
        root = snapshot_download(info.name, allow_patterns=["*/*.json", "*/*.txt", *weights])
    except Exception as error:  # offline, gated, no such repository: the hub's message says which
        raise BaseError(
            f"{info.name}: cannot be fetched from the hub ({str(error).splitlines()[0]}). Without a network, "
            "name a local folder or file instead; the embedded base is ckpt/miniature"
        ) from None
    return replace(inspect_base(root), name=info.name, kind="hub")


def _read_file(name: str) -> Any:
    """The pipeline of a single-file checkpoint, in float32 on the CPU."""
    from diffusers import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_single_file(name, dtype=torch.float32, safety_checker=None)
    except Exception as error:  # diffusers raises a dozen kinds here, among them network errors
        raise BaseError(
            f"{name}: cannot be read as a Stable Diffusion 1.x/2.x checkpoint ({error}). Its configs come "
            "from the hub on first use; without a network, convert it to a diffusers folder first"
        ) from None


def _describe_whole(name: str, pipe: Any) -> BaseInfo:
    configs = {part: dict(getattr(pipe, part).config) for part in ("unet", "vae", "scheduler")}
    configs["text_encoder"] = pipe.text_encoder.config.to_dict()
    counts = {part: getattr(pipe, part).num_parameters() for part in ("unet", "vae", "text_encoder")}
    return describe_base(name, "file", Path(name), configs, dict.fromkeys(counts, Path(name)), counts)


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
