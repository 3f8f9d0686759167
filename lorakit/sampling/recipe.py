"""PNGs that tell how they were made, and the command line that takes one of them again. No torch here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from lorakit.ground.command import Command, parse_command
from lorakit.ground.errors import UserError
from lorakit.sampling.config import SamplingConfig

CONFIG_CHUNK = "lorakit.config"
"""The PNG text chunk, and the key of a LoRA's metadata, that hold a config as JSON."""
WHERE = ("output_dir", "name", "overwrite")
"""Keys that say where pictures go, and so nothing about how they are made."""

C = TypeVar("C", bound=SamplingConfig)


def parse_sampling(
    cls: type[C], argv: Sequence[str], *, prog: str, description: str, default_config: str
) -> Command[C]:
    """`parse_command` for a script that samples, with `--from PICTURE.png` in place of a config.

    Raises:
        UserError: as `repeated`.
        ConfigError, SystemExit: as parse_command.
    """
    argv, again = repeated(cls, argv)
    return parse_command(
        cls,
        argv,
        prog=prog,
        description=description,
        default_config=None if again else default_config,
        epilog="`--from PICTURE.png` takes the settings of a picture that this script made; settings after "
        "it change them.",
    )


def repeated(cls: type[SamplingConfig], argv: Sequence[str]) -> tuple[list[str], bool]:
    """`--from PICTURE.png` replaced by the settings that made it; whether there was one.

    Settings on the command line come after them, and so count. The picture does not say where to write: the
    name of the new folder is made of the picture's folder and its number.

    Raises:
        UserError: the picture holds no config, or that of another script, or --from names none.
    """
    rest, settings = list(argv), []
    while named := [i for i, text in enumerate(rest) if text.split("=")[0] == "--from"]:
        word = rest.pop(found := named[0])
        if "=" in word:
            path = word.partition("=")[2]
        elif found < len(rest):
            path = rest.pop(found)
        else:
            raise UserError("--from: name a PNG that this script has made")
        name = "_".join(part for part in (Path(path).parent.name, Path(path).stem) if part)
        config = {key: value for key, value in read_config(path).items() if key not in WHERE} | {"name": name}
        if foreign := sorted(config.keys() - cls.model_fields.keys()):
            raise UserError(
                f"{path}: was made by another script, for it has {', '.join(foreign)}; use that one"
            )
        settings += [f"{key}={json.dumps(value)}" for key, value in config.items()]
    return [*settings, *rest], bool(settings)


def read_config(path: str) -> dict[str, Any]:
    """The config that a PNG was made with.

    Raises:
        UserError: no picture, or none of ours.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = getattr(image, "text", {}).get(CONFIG_CHUNK)
        config = None if text is None else json.loads(text)
    except Exception as error:  # a decoder raises anything on broken bytes
        reason = getattr(error, "strerror", None) or "not a whole PNG"
        raise UserError(f"{path}: {reason}; --from takes a PNG that this toolkit has made") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: does not tell how it was made; only PNGs of this toolkit do, unedited")
    return config


def png_text(cfg: SamplingConfig, prompt: str, seed: int, size: tuple[int, int]) -> dict[str, str]:
    """Text chunks of a picture: our config, and the line that A1111 and its kin read.

    Args:
        cfg: makes this picture and no other.
        size: width and height.
    """
    negative = f"\nNegative prompt: {cfg.negative_prompt}" if cfg.negative_prompt else ""
    loras = "".join(f" <lora:{Path(lora.path).stem}:{lora.weight:g}>" for lora in cfg.loras)
    line = (
        f"Steps: {cfg.num_inference_steps}, Sampler: {cfg.scheduler}, CFG scale: {cfg.guidance_scale:g}, "
        f"Seed: {seed}, Size: {size[0]}x{size[1]}, Model: {Path(cfg.pretrained_model_name_or_path).name}"
        + (f", Clip skip: {cfg.clip_skip}" if cfg.clip_skip else "")
    )
    return {
        CONFIG_CHUNK: json.dumps(cfg.model_dump(mode="json", exclude=set(WHERE)), ensure_ascii=False),
        "parameters": f"{prompt}{loras}{negative}\n{line}",
    }
