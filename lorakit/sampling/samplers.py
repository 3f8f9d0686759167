"""Pictures from prompts and from pictures: samplers by name, LoRAs whose weights change between pictures.

prompt_embeds are (B, L, D). The noise of a picture follows from its seed alone, whatever else is in the batch
and whatever the device.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lorakit.diffusion.lora import adapter_layers, load_lora, train_only
from lorakit.diffusion.models import Base, open_base
from lorakit.ground import randomness
from lorakit.ground.command import print_notes
from lorakit.ground.errors import UserError
from lorakit.sampling.config import LCM_STEPS, check_blocks, weights_of
from lorakit.weights.lora_file import LoraFile, component_of
from lorakit.weights.lora_import import read_any
from lorakit.weights.lora_keys import layer_name
from lorakit.weights.mixing import mix

# Name in configs -> diffusers' class and what differs from the base's own noise schedule.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {"original_inference_steps": LCM_STEPS}),
}


def make_scheduler(base: Base, name: str) -> Any:
    """A sampler on the base's noise schedule and prediction type."""
    import diffusers

    kind, changes = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(base.scheduler.config, **changes)


P = TypeVar("P")


def open_planned(cfg: Any, plan: P, make_plan: Callable[[Any, Any], P]) -> tuple[Base, P]:
    """The base of a plan; and the plan, made anew where the base was a hub id that was not on this machine.

    What is then known beside the notes that were told is printed.

    Args:
        plan: with `base` and `notes`, as `make_plan(cfg, base.info)` makes it.
    """
    known: Any = plan
    settings = {"prediction_type": cfg.prediction_type, "clip_skip": cfg.clip_skip}
    base = open_base(known.base, cfg.mixed_precision, **settings)
    if known.base.known:
        return base, plan
    again: Any = make_plan(cfg, base.info)
    print_notes(note for note in again.notes if note not in known.notes)
    return base, again


# ---- text ----


@torch.no_grad()
def encode_prompts(base: Base, prompts: Sequence[str]) -> Tensor:
    """(B, L, D) of the text encoder as it stands, its LoRAs included."""
    return base.text_encoder(base.tokenize(list(prompts)))[0]


# ---- LoRAs ----


class LoraStack:
    """The LoRAs of configs in a base: each file is loaded once, weights are set as often as one likes.

    A base has one stack at most, and no adapters from elsewhere.
    """

    def __init__(self, base: Base):
        self.base = base
        self.names: dict[tuple[str, int | None], str] = {}
        self.notes: list[str] = []

    def use(self, loras: Sequence[Any]) -> None:
        """Exactly these take part from now on; one of weight 0 does not, so that it is as none.

        Args:
            loras: LoraEntry: path, weight, blocks, rank.

        Raises:
            UserError: a file is no LoRA, does not fit this base, or a name in blocks has no part in it.
        """
        weights = {self._loaded(*file): entry for file, entry in weights_of(loras).items()}
        for lora in loras:
            check_blocks(lora, self._layers(self.names[lora.path, lora.rank]))
        active = {name: entry for name, entry in weights.items() if entry[0]}
        for component, model in self._models():
            set_weights(component, model, active)

    def new_notes(self) -> list[str]:
        """What a user should know of the files loaded since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def _loaded(self, path: str, rank: int | None) -> str:
        if (path, rank) not in self.names:
            file, notes = read_any(path)
            self.notes += [f"{path}: {note}" for note in notes]
            if rank is not None and rank < max(pair.rank for pair in file.modules.values()):
                file, note = cut(path, file, rank)
                self.notes.append(note)
            name = f"lora_{len(self.names)}"
            needs_text = any(component_of(module) == "text_encoder" for module in file.modules)
            text_encoder = self.base.text_encoder if needs_text else None
            load_lora(file, self.base.unet, text_encoder, adapter_name=name, label=path)
            self.names[path, rank] = name
        return self.names[path, rank]

    def _models(self) -> list[tuple[str, Any]]:
        """Those that LoRAs were loaded into."""
        models = [("unet", self.base.unet), ("text_encoder", self.base.text_encoder)]
        return [(component, model) for component, model in models if hasattr(model, "peft_config")]

    def _layers(self, name: str) -> list[str]:
        """Names of the layers that a LoRA adapts, as `blocks` has them."""
        return [
            layer_name(component, dotted)
            for component, model in self._models()
            for dotted in adapter_layers(model, name)
        ]


def cut(path: str, file: LoraFile, rank: int) -> tuple[LoraFile, str]:
    """A LoRA of at most this rank by SVD, and what a user should know of it.

    Raises:
        UserError: it is DoRA.
    """
    if any(pair.magnitude is not None for pair in file.modules.values()):
        raise UserError(f"loras: {path} is DoRA, which cannot be cut to a rank; leave its rank null")
    mixed = mix([(path, file.modules, 1.0)], "svd", rank=rank)
    note = f"{path}: cut to rank {rank}, {1 - mixed.error() ** 2:.2%} of its energy kept"
    return LoraFile(mixed.modules, file.metadata, file.layout), note


def set_weights(component: str, model: Any, weights: Mapping[str, tuple[float, Mapping[str, float]]]) -> None:
    """Make exactly these adapters active, with a weight each and further factors by the module's name.

    At 0 an adapter takes no part: at scale 0 DoRA would still set its magnitudes.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    active: dict[Any, list[str]] = {}
    for name in model.peft_config:
        for dotted, layer in adapter_layers(model, name).items():
            active.setdefault(layer, [])
            if name in weights:
                weight, blocks = weights[name]
                if scale := weight * block_factor(layer_name(component, dotted), blocks):
                    layer.set_scale(name, scale)
                    active[layer].append(name)
    for layer, names in active.items():
        layer.set_adapter([name for name in weights if name in names])
    train_only(model, trained)


def block_factor(dotted: str, blocks: Mapping[str, float]) -> float:
    """The factor of the longest name in `blocks` that a module's name begins with; 1 without one."""
    fitting = [block for block in blocks if f"{dotted}.".startswith(f"{block}.")]
    return blocks[max(fitting, key=len)] if fitting else 1.0


# ---- pictures ----


def make_pipeline(kind: Any, base: Base, scheduler: Any, **parts: Any) -> Any:
    """A pipeline class of diffusers that works on embeddings and latents, with the parts of `base`."""
    parts |= {"vae": base.vae, "unet": base.unet, "scheduler": scheduler}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture_noise(base: Base, seeds: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """(B, C, h, w) for pictures of `shape` (width, height), on the base's device."""
    factor = base.info.vae_factor
    latent_shape = (base.info.latent_channels, shape[1] // factor, shape[0] // factor)
    noise = [randomness.normal(latent_shape, seed, "sample") for seed in seeds]
    return torch.stack(noise).to(base.device, base.dtype)


def batch_options(
    base: Base, prompt_embeds: Tensor, negative_embeds: Tensor, seeds: Sequence[int]
) -> dict[str, Any]:
    rows = len(seeds)
    return {
        "prompt_embeds": prompt_embeds.expand(rows, -1, -1).to(base.dtype),
        "negative_prompt_embeds": negative_embeds.expand(rows, -1, -1).to(base.dtype),
        # What samplers draw on the way: euler_a and lcm do.
        "generator": [randomness.generator(seed, "sampler") for seed in seeds],
        "output_type": "latent",
    }


@torch.no_grad()
def sample_images(
    base: Base,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    *,
    seeds: Sequence[int],
    shape: tuple[int, int],
    steps: int,
    guidance_scale: float,
    scheduler: Any = None,
) -> list[Image.Image]:
    """One picture of `shape` (width, height) per seed.

    Args:
        prompt_embeds: a row for each seed, or one for all; `negative_embeds` likewise.
        scheduler: of `make_scheduler`; None: DDIM.
    """
    from diffusers import StableDiffusionPipeline

    pipe = make_pipeline(StableDiffusionPipeline, base, scheduler or base.scheduler)
    latents = pipe(
        **batch_options(base, prompt_embeds, negative_embeds, seeds),
        latents=picture_noise(base, seeds, shape),
        width=shape[0],
        height=shape[1],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
    ).images
    return base.decode_pictures(latents)
