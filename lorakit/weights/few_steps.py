"""LoRAs for sampling in few steps, known by their metadata or by published names. No torch here."""

import json
import re
from typing import Any, NamedTuple

from lorakit.ground.errors import UserError
from lorakit.weights.adapter_config import lora_path
from lorakit.weights.lora_metadata import HINTS_KEY, trained_objectives
from lorakit.weights.tensors import read_header

_KINDS = r"(?<![a-z])(lcm|hyper[-_ ]?sd|turbo|lightning|dmd2?|tcd|pcm)(?![a-z])"
_KEYS = ("ss_output_name", "ss_base_model_version", "modelspec.title")
_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")
# Turbo and lightning are things to paint, too; beside these they are no such thing.
_OF_A_BASE = re.compile(r"(?<![a-z])sd(xl)?(?![a-z])")
_ANY_NAME = {"pytorch_lora_weights", "diffusion_pytorch_model", "adapter_model", "model"}
"""Names of files that say nothing: that of the folder counts."""
_USUAL: dict[str, Any] = {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
_WITH_GUIDANCE: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 5.0}
"""Of those whose name has CFG in it."""


class FewSteps(NamedTuple):
    """A LoRA for few steps, as `word` in `text` says; `sure` unless the word means other things too.

    `is_told`: not by a name, but by the sampler that train_lora.py wrote into the file.
    """

    word: str
    text: str
    sure: bool
    is_told: bool = False

    def hints(self) -> dict[str, Any]:
        """Sampler, steps and guidance that it is published with.

        The sampler is LCM's, the one here that starts at the last timestep, as all of these are made for.
        """
        text = self.text.lower()
        with_guidance = re.search(r"(?<![a-z])cfg(?![a-z])", text)
        hints = _USUAL | (_WITH_GUIDANCE if with_guidance else {})
        steps = _STEPS.search(text)
        return hints | ({"num_inference_steps": int(steps[1])} if steps else {})


def few_steps(path: str) -> FewSteps | None:
    """Whether the name or the metadata of a LoRA's file says that it is for few steps.

    Raises:
        UserError: it is no whole safetensors file.
        OutputError: it cannot be read.
    """
    place = lora_path(path)
    _, metadata = read_header(place)
    if _sampler(metadata.get(HINTS_KEY, "")) == "lcm":
        return FewSteps("lcm", f"{HINTS_KEY} {metadata[HINTS_KEY]}", sure=True, is_told=True)
    if "denoise" in trained_objectives(metadata):
        return None  # train_lora.py fitted it to pictures, be they of turbo boats
    told = [place.stem, *(metadata[key] for key in _KEYS if key in metadata and len(metadata[key]) < 200)]
    if place.stem in _ANY_NAME:
        told.append(place.absolute().parent.name)
    for text in told:
        if found := re.search(_KINDS, text, re.IGNORECASE):
            is_plain = found[0].lower() not in ("turbo", "lightning")
            around = _STEPS.search(text.lower()) or _OF_A_BASE.search(text.lower())
            return FewSteps(found[0], text, is_plain or around is not None)
    return None


def _sampler(hints: str) -> str | None:
    try:
        return json.loads(hints)["scheduler"]
    except (LookupError, ValueError, TypeError, RecursionError):
        return None


def refuse_few_steps(path: str, remedy: str = "fit a LoRA to the picture instead (train_lora.py)") -> None:
    """A LoRA that changed what sampling means has no DDIM path from a picture to its noise.

    Raises:
        UserError: it is one, or as few_steps.
    """
    if found := few_steps(path):
        raise UserError(
            f"{path}: looks like a LoRA for sampling in few steps ({found.word!r} in {found.text!r}), under "
            f"which a picture cannot be inverted; {remedy}"
        )
