"""A motion adapter as its files describe it: diffusers' folder, or one file under AnimateDiff's own names.

Its temporal attention stands beside a base's layers, and looks along the frames of a film. No torch here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.weights.base import BaseInfo
from lorakit.weights.original_names import motion_name
from lorakit.weights.part_files import BaseError, Place, Places, candidates, read_json, read_shapes
from lorakit.weights.tensors import Shapes

_FILES = candidates("unet")[:2]
_WITHOUT = (
    "miniature/train_motion.py makes one for the embedded base; animate.py makes films without one: "
    "motion_adapter=null"
)
_CONVERTED = (
    "AnimateDiff's .ckpt files are pickled and not read; the same adapters are published as safetensors in "
    "diffusers' layout, such as guoyww/animatediff-motion-adapter-v1-5-2"
)
_POSITIONS = r"\.pos_(encoder|embed)\.pe$"  # a table that both compute
HEADS = 8
"""Of all that are published; no file of theirs tells it."""


@dataclass(frozen=True)
class MotionInfo:
    """Its config, as diffusers' MotionAdapter takes it, and where its tensors lie, by diffusers' names."""

    name: str
    config: Mapping[str, Any]
    places: Places

    @property
    def positions(self) -> int:
        """The most frames that it can look along at once."""
        return self.config["motion_max_seq_length"]

    @property
    def shapes(self) -> Shapes:
        return {name: place.shape for name, place in self.places.items()}


def inspect_motion_adapter(name: str, base: BaseInfo) -> MotionInfo:
    """Describe the motion adapter `name`; whether it fits the base shows once that is here.

    Raises:
        BaseError: it is none, is not whole, is pickled, or is made for another base.
    """
    path = Path(name)
    if path.is_dir():
        info = _of_folder(name, path)
    elif path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise _unusable(name, _CONVERTED)
    elif path.is_file():
        info = _of_file(name, path, read_shapes(path))
    else:
        raise _unusable(name, f"no such folder or file; paths are relative to {Path.cwd()}")
    if base.known:
        _check_fit(info, base)
    return info


def with_betas(base: BaseInfo, schedule: str | None) -> BaseInfo:
    """The base with the noise schedule of this name; None, or one that is not here yet: as it is."""
    if schedule is None or not base.known:
        return base
    scheduler = base.configs["scheduler"] | {"beta_schedule": schedule, "trained_betas": None}
    return replace(base, configs=base.configs | {"scheduler": scheduler})


def _unusable(name: str, why: str) -> BaseError:
    return BaseError(f"{name}: cannot be loaded as a motion adapter ({why}). {_WITHOUT}")


def _of_folder(name: str, root: Path) -> MotionInfo:
    found = next((root / file for file in _FILES if (root / file).exists()), None)
    if found is None:
        pickled = [file.name for file in sorted(root.iterdir()) if file.suffix in (".ckpt", ".bin")]
        raise _unusable(name, _CONVERTED if pickled else f"without {_FILES[0]}")
    config = read_json(root / "config.json")
    if (kind := config.get("_class_name", "MotionAdapter")) != "MotionAdapter":
        raise _unusable(name, f"it is a {kind}")
    info = _of_file(name, found, read_shapes(found))
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    return MotionInfo(name, {**info.config, **own}, info.places)


def _of_file(name: str, path: Path, shapes: Shapes) -> MotionInfo:
    """With the config that its shapes tell."""
    places = {}
    for key, shape in shapes.items():
        plain = motion_name(key.removeprefix("module."))
        if "motion_modules" in plain and not re.search(_POSITIONS, plain):
            places[plain] = Place(path, key, shape)
    if any("lora" in key for key in places):
        raise _unusable(name, "it is a LoRA of one: name it in loras, beside the adapter that it is made for")
    if not any(key.endswith(".attn1.to_q.weight") for key in places):
        raise _unusable(name, "it holds no motion modules")
    if foreign := [key for key in shapes if re.match(r"(module\.)?conv_in\.|.*\.img_", key)]:
        raise _unusable(name, f"it is of another kind, with {foreign[0]}")
    positions = [shape[1] for key, shape in shapes.items() if re.search(_POSITIONS, key)]
    norms = {
        key: place.shape[0] for key, place in places.items() if re.search(r"modules\.\d+\.norm\.weight$", key)
    }
    down = [key for key in norms if key.startswith("down_blocks.")]
    channels = {int(key.split(".")[1]): norms[key] for key in down}
    transformers = _count(places, r"down_blocks\.0\.motion_modules\.0\.transformer_blocks\.(\d+)\.")
    config = {
        "block_out_channels": [channels[i] for i in sorted(channels)],
        "motion_layers_per_block": _count(down, r"down_blocks\.0\.motion_modules\.(\d+)\."),
        "motion_transformer_layers_per_block": transformers,
        "motion_num_attention_heads": HEADS,
        "motion_max_seq_length": min(positions, default=32),
        "use_motion_mid_block": any(key.startswith("mid_block.") for key in norms),
    }
    return MotionInfo(name, config, places)


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=0)


def _check_fit(info: MotionInfo, base: BaseInfo) -> None:
    """Raises BaseError: it is made for another base."""
    unet = base.configs["unet"]
    for own, key in (
        ("block_out_channels", "block_out_channels"),
        ("motion_layers_per_block", "layers_per_block"),
    ):
        theirs, ours = info.config[own], unet[key]
        if _plain(theirs) != _plain(ours):
            raise BaseError(
                f"{info.name}: is made for another base: {key} is {theirs}, here {ours}. {_WITHOUT}"
            )


def _plain(value: Any) -> Any:
    """One number for all levels, where they agree; else a list."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0] if len(set(values)) == 1 else values
