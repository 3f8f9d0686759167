"""How far prompts go through the text encoder: clip skip."""

from typing import Any

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import kohya_name


def end_at(text_encoder: Any, clip_skip: int) -> None:
    """Drop the last clip_skip - 1 layers, so that the final layer norm follows what is the last one then.

    Every output is then that of A1111 and kohya's scripts, norm(hidden_states[-clip_skip]), while a LoRA is
    trained in the encoder too; diffusers' pipelines count one less, and their own argument looks for a
    `text_model` that transformers has no more.

    Args:
        text_encoder: CLIPTextModel as it was loaded; 1 leaves it whole.

    Raises:
        UserError: it has fewer layers.
    """
    layers = _layers(text_encoder)
    if clip_skip > len(layers):
        raise UserError(f"clip_skip {clip_skip}: the text encoder has {len(layers)} layers; lower it")
    del layers[len(layers) - clip_skip + 1 :]


def dropped(text_encoder: Any) -> tuple[str, ...]:
    """What the names of LoRA modules begin with that lie in layers which `end_at` has dropped."""
    numbers = range(len(_layers(text_encoder)), text_encoder.config.num_hidden_layers)
    return tuple(kohya_name("text_encoder", f"encoder.layers.{number}.") for number in numbers)


def _layers(text_encoder: Any) -> Any:
    return getattr(text_encoder, "text_model", text_encoder).encoder.layers
