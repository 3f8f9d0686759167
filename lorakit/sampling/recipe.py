"""PNGs that tell how they were made, and the command line that takes one of them again. No torch here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from lorakit.ground.command import Command, parse_command, print_notes
from lorakit.ground.errors import UserError
from lorakit.pictures.painted import EMBEDDED
from lorakit.sampling.config import A1111_SAMPLERS, SamplingConfig
from lorakit.sampling.found_again import FOLDERS, PATHS, found_again
from lorakit.sampling.model_files import fingerprint, portable
from lorakit.sampling.prompt_syntax import escaped

CONFIG_CHUNK = "lorakit.config"
"""The PNG text chunk, and the key of a LoRA's metadata, that hold a config as JSON."""
FILES_CHUNK = "lorakit.files"
"""The PNG text chunk that holds the sha256 of each file that the config names, by its path there, as JSON."""
WHERE = ("output_dir", "name", "overwrite")
"""Keys that say where pictures go, and so nothing about how they are made."""

C = TypeVar("C", bound=SamplingConfig)


def parse_sampling(
    cls: type[C],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default_config: str | None,
    flags: Mapping[str, str] = {},
    epilog: str = "",
) -> Command[C]:
    """`parse_command` for a script that samples, with `--from PICTURE.png` in place of a config.

    Raises:
        UserError: as `repeated` and `found_again`.
        ConfigError, SystemExit: as parse_command.
    """
    argv, picture = repeated(cls, argv)
    command = parse_command(
        cls,
        argv,
        prog=prog,
        description=description,
        flags=flags,
        default_config=None if picture else default_config,
        epilog="`--from PICTURE.png` takes the settings of a picture that this script made; settings after "
        f"it change them.{epilog}",
    )
    if picture is None:
        return command
    config, notes = found_again(command.config, picture, _read_chunk(picture, FILES_CHUNK))
    print_notes(notes)
    return replace(command, config=config)


def repeated(cls: type[SamplingConfig], argv: Sequence[str]) -> tuple[list[str], str | None]:
    """`--from PICTURE.png` replaced by the settings that made it, and the picture, if there was one.

    Settings on the command line come after them, and so count. The picture does not say where to write: the
    name of the new folder is made of the picture's folder and its number.

    Raises:
        UserError: the picture holds no config, or that of another script, or --from names none.
    """
    rest, settings, path = list(argv), [], None
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
    return [*settings, *rest], path


def read_config(path: str) -> dict[str, Any]:
    """The config that a PNG was made with.

    Raises:
        UserError: no picture, or none of ours.
    """
    config = _read_chunk(path, CONFIG_CHUNK)
    if not isinstance(config, dict):
        raise UserError(f"{path}: does not tell how it was made; only PNGs of this toolkit do, unedited")
    return config


def _read_chunk(path: str, name: str) -> Any:
    """What a text chunk of a PNG holds as JSON; None without it. Raises UserError: no whole PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = getattr(image, "text", {}).get(name)
        return None if text is None else json.loads(text)
    except Exception as error:  # a decoder raises anything on broken bytes
        reason = getattr(error, "strerror", None) or "not a whole PNG"
        raise UserError(f"{path}: {reason}; --from takes a PNG that this toolkit has made") from error


def png_text(cfg: SamplingConfig, prompt: str, seed: int, size: tuple[int, int]) -> dict[str, str]:
    """Text chunks of a picture: our config, hashes of what it names, and the line that A1111 reads.

    Args:
        cfg: makes this picture and no other.
        size: width and height.
    """
    config, files = _kept(cfg)
    return {
        CONFIG_CHUNK: json.dumps(config, ensure_ascii=False),
        FILES_CHUNK: json.dumps(files, ensure_ascii=False),
        "parameters": _a1111_text(cfg, prompt, seed, size),
    }


def _kept(cfg: SamplingConfig) -> tuple[dict[str, Any], dict[str, str | None]]:
    """A config without absolute paths, and path there -> sha256 of the files that it and its prompt name."""
    config, files = cfg.model_dump(mode="json", exclude=set(WHERE)), {}

    def keep(path: str) -> str:
        if path.startswith(EMBEDDED):
            return path
        if not Path(path).exists():
            return portable(path)
        sha256, kept = fingerprint(path), portable(path)
        parts = 1
        while files.get(kept, sha256) != sha256:  # another file of this name: with the folder that it lies in
            kept, parts = "/".join(Path(path).absolute().parts[-parts - 1 :]), parts + 1
        files[kept] = sha256
        return kept

    config |= {key: keep(config[key]) for key in PATHS if isinstance(config.get(key), str)}
    config |= {key: [portable(folder) for folder in config[key]] for key in FOLDERS}
    config["loras"] = [lora | {"path": keep(lora["path"])} for lora in config["loras"]]
    for lora in cfg.prompt_loras():
        keep(lora.path)
    return config, files


def _a1111_text(cfg: SamplingConfig, prompt: str, seed: int, size: tuple[int, int]) -> str:
    prompt, negative = (
        text if cfg.prompt_syntax == "a1111" else escaped(text) for text in (prompt, cfg.negative_prompt)
    )
    loras = "".join(f" <lora:{Path(lora.path).stem}:{lora.weight:g}>" for lora in cfg.loras)
    name, steps, guidance_scale = cfg.sampler()
    facts = {
        "Steps": steps,
        "Sampler": A1111_SAMPLERS[name],
        "CFG scale": f"{guidance_scale:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": Path(cfg.pretrained_model_name_or_path).name.removesuffix(".safetensors"),
        "Denoising strength": getattr(cfg, "strength", None),
        "Clip skip": cfg.clip_skip,
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in facts.items() if value is not None)
    return f"{prompt}{loras}" + (f"\nNegative prompt: {negative}" if negative else "") + f"\n{line}"


def _quoted(value: Any) -> str:
    """As A1111 quotes what would be read as more than one value."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:"\n') else text
