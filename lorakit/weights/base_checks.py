"""Whether configs are those of a text-to-image Stable Diffusion 1.x or 2.x, and fit the weights. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.weights.part_files import BaseError
from lorakit.weights.tensors import Shapes

Configs = Mapping[str, dict[str, Any]]

_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_FAMILY = "Stable Diffusion 1.x and 2.x have"
_ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_TOKENS = "embeddings.token_embedding.weight"
# A size in a part's config, and the tensor that has it: config, key, part, tensor, axis.
_FITS = (
    ("unet", "block_out_channels", "unet", "conv_in.weight", 0),
    ("unet", "cross_attention_dim", "unet", _ATTENTION, 1),
    ("vae", "block_out_channels", "vae", "encoder.conv_in.weight", 0),
    ("text_encoder", "hidden_size", "text_encoder", _TOKENS, 1),
    ("unet", "cross_attention_dim", "text_encoder", _TOKENS, 1),
    ("text_encoder", "max_position_embeddings", "text_encoder", "embeddings.position_embedding.weight", 0),
)


def config_value(where: Mapping[str, Path], configs: Configs, part: str, key: str, kind: type) -> Any:
    """A value of a part's config, which must be of the kind that Stable Diffusion 1.x and 2.x have there.

    Raises:
        BaseError: it is of another kind.
    """
    value = configs[part].get(key)
    kinds = (list, tuple) if kind is list else kind
    if isinstance(value, bool) or not isinstance(value, kinds) or value == []:
        asked = "is it the base of a Stable Diffusion 1.x or 2.x?"
        raise BaseError(f"{where[part]}: {key} is {value!r}; {asked}")
    return value


def other_task(channels: int, latent_channels: int) -> str | None:
    """What a U-Net is for that reads more than latents, with the remedy; None if it reads latents alone."""
    if channels == latent_channels:
        return None
    tasks = {
        2 * latent_channels + 1: "an inpainting model",
        latent_channels + 1: "a depth model",
        2 * latent_channels: "a model for instructions (InstructPix2Pix)",
        latent_channels + 3: "an upscaler",
    }
    return (
        f"is {tasks.get(channels, 'a model of another kind')}: its U-Net reads {channels} channels, where "
        f"latents have {latent_channels}; take a text-to-image base, such as the one that it was made from"
    )


def refuse_other_models(name: str, where: Mapping[str, Path], configs: Configs) -> None:
    """Raises BaseError: the configs are those of another kind of model."""
    for part, expected in _CLASSES.items():
        own = configs[part].get("_class_name", expected)
        if own != expected:
            raise BaseError(f"{where[part]}: is the config of a {own}; {_FAMILY} a {expected}")
    if configs["unet"]["addition_embed_type"] is not None:
        raise BaseError(f"{name}: is an SDXL base; take one of Stable Diffusion 1.x or 2.x")
    kind = configs["text_encoder"].get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise BaseError(f"{where['text_encoder']}: is of the kind {kind!r}; {_FAMILY} clip_text_model")
    channels = config_value(where, configs, "unet", "in_channels", int)
    if task := other_task(channels, config_value(where, configs, "vae", "latent_channels", int)):
        raise BaseError(f"{name}: {task}")


def check_fit(shapes: Mapping[str, Shapes], configs: Configs, where: Mapping[str, Path]) -> None:
    """Compares the sizes that configs name with those of the weights.

    Raises:
        BaseError: a tensor is missing or of another size; names the config.
    """
    for config, key, part, name, axis in _FITS:
        size = configs[config][key]
        size = size[0] if isinstance(size, (list, tuple)) else size
        if (shape := shapes[part].get(name)) is None:
            raise BaseError(f"{where[part]}: its weights have no {name}; is the base's download complete?")
        if shape[axis] != size:
            raise BaseError(
                f"{where[config]}: {key} is {size}, but {shape[axis]} in the weights of {part} ({name}): "
                "they do not belong together"
            )
