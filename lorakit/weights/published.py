"""What comes with Stable Diffusion 1.x and 2.x: configs, defaults for what they lack, the tokenizer."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from lorakit.weights.part_files import BaseError

_FOLDER = Path(__file__).with_name("published")
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "controlnet": "ControlNetModel",
}
FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}


def completed(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """A part's config with what it leaves out, as diffusers and transformers fill it in.

    The defaults are those of their classes (published/class_defaults.json); of a scheduler, those that decide
    its noise schedule.
    """
    name = str(config.get("_class_name")) if part == "scheduler" else _CLASSES[part]
    defaults = _read("class_defaults")
    return {**defaults.get(name, defaults["DDIMScheduler"]), **config}


def family_configs(family: str) -> dict[str, dict[str, Any]]:
    """The configs of "sd1" or "sd2" by part, the tokenizer's among them; "sd2" is 2.1 for 768 pixels."""
    return {part: dict(config) for part, config in _read(family).items()}


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def load_tokenizer(folder: Path | None, pad_token: str) -> Any:
    """A base's tokenizer, or CLIP's with `pad_token` where its base has no folder of one; without torch.

    Any, since the library annotates its calls in ways that correct ones do not fit.

    Raises:
        BaseError: the folder's files cannot be read.
    """
    from transformers import CLIPTokenizer

    if folder is None:
        return CLIPTokenizer(**_vocabulary(), pad_token=pad_token, model_max_length=77)
    try:
        return CLIPTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseError(f"{folder}: cannot be loaded: {error}") from None


@cache
def _vocabulary() -> dict[str, Any]:
    """Ids of CLIP's tokens, and its merges (Radford et al. 2021), which the ids follow from.

    Bytes that are no printable character of Latin-1 stand as characters from U+0100 on; a token that ends a
    word ends in `</w>`.
    """
    lines = gzip.decompress((_FOLDER / "clip_merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *(chr(256 + number) for number in range(256 - len(printable)))]
    tokens = letters + [f"{letter}</w>" for letter in letters] + [line.replace(" ", "") for line in lines]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(line.split(" ")) for line in lines]
    return {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}
