"""A ControlNet as its files describe it: a folder, a single file under A1111's or diffusers' names, a hub id.

No torch here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.weights import hub
from lorakit.weights.base import BaseInfo
from lorakit.weights.original_names import controlnet_name
from lorakit.weights.part_files import (
    BaseError,
    Place,
    Places,
    candidates,
    folder_places,
    read_json,
    read_shapes,
)
from lorakit.weights.published import completed
from lorakit.weights.single_file import what_else
from lorakit.weights.tensors import Shapes

# Weights have the same names in a ControlNet's folder as in that of a U-Net.
_FILES = candidates("unet")
_INSTEAD = "name a local folder or file. Without a ControlNet, set controlnet=null"
_ORIGINAL = "control_model."
_HINTS = "controlnet_cond_embedding."
_ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@dataclass(frozen=True)
class ControlNetInfo:
    """Its config, and where its tensors lie; both are empty while it is not here (`known` is False)."""

    name: str
    config: Mapping[str, Any]
    places: Places

    @property
    def known(self) -> bool:
        return bool(self.places)


def inspect_controlnet(name: str, base: BaseInfo) -> ControlNetInfo:
    """Describe the ControlNet `name`, for a base that is here.

    Raises:
        BaseError: it is none, is not whole, or is made for another base.
    """
    path = Path(name)
    if path.is_dir():
        info = _inspect_folder(name, path)
    elif path.is_file():
        info = _inspect_file(name, path, base)
    elif not hub.is_id(name):
        raise _unusable(name, f"no such folder or file; paths are relative to {Path.cwd()}")
    else:
        root = hub.cached(name, ["config.json"])
        is_here = root is not None and any((root / file).exists() for file in _FILES)
        info = _inspect_folder(name, root) if root and is_here else ControlNetInfo(name, {}, {})
    if info.known:
        _check_fit(info, base)
    return info


def fetch_controlnet(name: str, base: BaseInfo) -> ControlNetInfo:
    """A ControlNet of the hub once its files are here. Raises what inspect_controlnet raises."""
    names = hub.list_files(name, _INSTEAD)
    weights = hub.weights_of(name, names, "unet")
    info = _inspect_folder(name, hub.download(name, ["config.json", *weights], _INSTEAD))
    _check_fit(info, base)
    return info


def _unusable(name: str, why: str) -> BaseError:
    return BaseError(f"{name}: cannot be loaded as a ControlNet ({why}). Without one, set controlnet=null")


def _inspect_folder(name: str, root: Path) -> ControlNetInfo:
    try:
        config = completed("controlnet", read_json(root / "config.json"))
        if (kind := config.get("_class_name", "ControlNetModel")) != "ControlNetModel":
            raise BaseError(f"it is a {kind}")
        found = next((root / file for file in _FILES if (root / file).exists()), None)
        if found is None:
            pickled = [file.name for file in sorted(root.glob("*.bin"))]
            raise BaseError(f"only pickled weights, {pickled[0]}" if pickled else f"without {_FILES[0]}")
        return ControlNetInfo(name, config, folder_places(found, "unet"))
    except BaseError as error:
        raise _unusable(name, str(error)) from None


def _inspect_file(name: str, path: Path, base: BaseInfo) -> ControlNetInfo:
    """One with the config of the base that it is for, but for what reads its hints, as its shapes tell."""
    try:
        shapes = read_shapes(path)
    except BaseError as error:
        raise _unusable(name, str(error)) from None
    other = what_else(shapes)
    if other is None or not other.startswith("is a ControlNet"):
        raise _unusable(name, (other or "is a whole base").split(";")[0])
    places = _file_places(path, shapes, base.configs["unet"]["layers_per_block"])
    hints = {name: place.shape for name, place in places.items() if name.startswith(_HINTS)}
    numbers = [int(found[1]) for key in hints if (found := re.fullmatch(r".*blocks\.(\d+)\.weight", key))]
    if "conv_in.weight" not in places or not numbers or _ATTENTION not in places:
        raise _unusable(name, "a ControlNet of another kind, or not whole")
    channels = [hints[f"{_HINTS}conv_in.weight"][0]]
    channels += [hints[f"{_HINTS}blocks.{number}.weight"][0] for number in sorted(numbers) if number % 2]
    own = {
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": channels,
        "in_channels": places["conv_in.weight"].shape[1],
        "cross_attention_dim": places[_ATTENTION].shape[1],
    }
    return ControlNetInfo(name, {**base.configs["unet"], **own}, places)


def _file_places(path: Path, shapes: Shapes, layers: int) -> Places:
    """The places of a file's tensors, whose names are those of diffusers, or of the original code."""
    if any(key.startswith(_HINTS) for key in shapes):
        return {key: Place(path, key, shape) for key, shape in shapes.items()}
    prefix = _ORIGINAL if any(key.startswith(_ORIGINAL) for key in shapes) else ""
    own = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    hints = (re.match(r"input_hint_block\.(\d+)\.", key) for key in own)
    last = max((int(found[1]) for found in hints if found), default=0)
    named = {controlnet_name(key, layers, last): key for key in own}
    return {name: Place(path, own[key], shapes[own[key]]) for name, key in named.items() if name}


def _check_fit(info: ControlNetInfo, base: BaseInfo) -> None:
    """Raises BaseError: it is made for another base."""
    unet = base.configs["unet"]
    for key in ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block"):
        theirs, ours = info.config[key], unet[key]
        if _plain(theirs) != _plain(ours):
            raise BaseError(f"{info.name}: is made for another base: {key} is {theirs}, here {ours}")
    levels = len(info.config["conditioning_embedding_out_channels"]) - 1
    if 2**levels != base.vae_factor:
        raise BaseError(f"{info.name}: does not reduce hints by {base.vae_factor}, as the base's VAE does")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
