"""Keys that say how a base is read, the same in every script, and what LoRA files say of them. No torch."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field

from lorakit.ground.errors import UserError
from lorakit.weights.adapter_config import lora_path
from lorakit.weights.base import BaseInfo
from lorakit.weights.tensors import read_header

_PREDICTION_TYPE = "what the U-Net predicts; null: as the base says"
_BASE_CONFIG = (
    "diffusers folder with whose configs and tokenizer a single file is read, its weights are not; null: as "
    "Stable Diffusion 1.x or 2.x has them"
)
_CLIP_SKIP = (
    "layer of the text encoder that is read, counted from its end as in A1111 and kohya's scripts: 1 or null "
    "is the last, 2 the last but one; the final layer norm follows. diffusers counts from 0: its 1 is 2 here"
)
PredictionType = Annotated[
    Literal["epsilon", "v_prediction", "sample"] | None, Field(description=_PREDICTION_TYPE)
]
BaseConfig = Annotated[str | None, Field(min_length=1, description=_BASE_CONFIG)]
ClipSkip = Annotated[Annotated[int, Field(ge=1)] | None, Field(description=_CLIP_SKIP)]
CLIP_SKIP_KEY = "ss_clip_skip"
"""kohya's key in the metadata of a LoRA; "None" stands for the last layer."""
_CLIP_LAYERS = 12  # of a CLIPTextConfig that does not say


def text_layers(info: BaseInfo, clip_skip: int | None) -> int:
    """How many of the text encoder's layers are read, by the header of a base that is here.

    Raises:
        UserError: there are fewer than clip_skip.
    """
    count = info.configs["text_encoder"].get("num_hidden_layers", _CLIP_LAYERS)
    if clip_skip is not None and clip_skip > count:
        raise UserError(
            f"clip_skip {clip_skip}: the text encoder of {info.name} has {count} layers; lower it"
        )
    return count + 1 - (clip_skip or 1)


def check_clip_skip(info: BaseInfo, clip_skip: int | None) -> None:
    """Raises UserError: more than the text encoder has, as far as that can be known before it is loaded."""
    if info.known:
        text_layers(info, clip_skip)


def clip_skip_notes(clip_skip: int | None, loras: Iterable[str]) -> list[str]:
    """A line for each LoRA file that was trained with another clip_skip, as its metadata tells.

    Raises:
        UserError: a file cannot be read.
    """
    own = clip_skip or 1
    asked = {path: asked_clip_skip(read_header(lora_path(path))[1]) for path in loras}
    others = {path: skip for path, skip in asked.items() if skip not in (None, own)}
    return [f"clip_skip {own}, although {path} asks for {skip}" for path, skip in others.items()]


def asked_clip_skip(metadata: Mapping[str, str]) -> int | None:
    """The clip_skip that a LoRA was trained with; None where its file does not say."""
    text = metadata.get(CLIP_SKIP_KEY, "")
    return 1 if text == "None" else int(text) if text.isdecimal() else None


def base_line(info: BaseInfo) -> str:
    """What --check says of a base besides its name."""
    if not info.known:
        return "its parts are read when work starts"
    millions = sum(info.parameters.values()) / 1e6
    return (
        f"{millions:,.1f} M parameters, {info.resolution} px, VAE factor {info.vae_factor}, "
        f"{info.max_tokens} tokens, {info.prediction_type}"
    )
