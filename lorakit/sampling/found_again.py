"""The files that a picture was made with, of which it keeps names and hashes, found again. No torch here."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lorakit.ground.errors import UserError
from lorakit.sampling.config import SamplingConfig
from lorakit.sampling.model_files import fingerprint

INPUTS = ("image", "mask")
"""Keys of pictures that a picture was made from."""
PATHS = ("pretrained_model_name_or_path", "base_config", "controlnet", "lora", "motion_adapter", *INPUTS)
"""Keys that may hold the path of a file, besides those of `loras`; `auto` and hub ids stand there too."""
FOLDERS = ("model_dirs", "embedding_dirs")

C = TypeVar("C", bound=SamplingConfig)


def found_again(cfg: C, picture: str, files: Any) -> tuple[C, list[str]]:
    """A picture's config with the paths at which its files are here, and what is not as it was.

    They are looked for where the report beside the picture has them, LoRAs, bases and ControlNets then in
    model_dirs, an input where the picture lies.

    Args:
        files: path in the config -> sha256, as the picture keeps them; else it is of an earlier version.

    Raises:
        UserError: a file is nowhere.
    """
    if not isinstance(files, dict):
        return cfg, []
    known, notes = _reported(Path(picture).parent), []
    cfg = cfg.model_copy(
        update={key: tuple(_folder(each, known) for each in getattr(cfg, key)) for key in FOLDERS}
    )

    def found(key: str, path: str) -> str:
        if path not in files:
            return path
        folders = [str(Path(picture).parent)] if key in INPUTS else list(cfg.model_dirs)
        here = _candidates(path, folders, known)
        if not here:
            where = f"neither at {path} nor in {', '.join(folders) or 'model_dirs'}"
            raise UserError(f"{picture}: {key}: {Path(path).name} is {where}; set {key}=PATH")
        right = next((each for each in here if fingerprint(each) == files[path]), None)
        notes.extend([] if right else [f"{here[0]} is not as it was when {picture} was made"])
        return right or here[0]

    changes: dict[str, Any] = {
        key: found(key, path) for key in PATHS if isinstance(path := getattr(cfg, key, None), str)
    }
    changes["loras"] = tuple(
        lora.model_copy(update={"path": found(f"loras.{number}.path", lora.path)})
        for number, lora in enumerate(cfg.loras)
    )
    cfg = cfg.model_copy(update=changes)
    for lora in cfg.prompt_loras():
        hashes = [sha256 for path, sha256 in files.items() if Path(path).name == Path(lora.path).name]
        if hashes and fingerprint(lora.path) not in hashes:
            notes.append(f"{lora.path} is not as it was when {picture} was made")
    return cfg, notes


def _candidates(path: str, folders: Iterable[str], known: Iterable[str]) -> list[str]:
    """What may be the file or folder `path`: itself, what is known by its name, what has it in `folders`."""
    name = Path(path).name
    found = [each for each in (path, *known) if Path(each).name == name and Path(each).exists()]
    for folder in folders:
        for root, inner, names in os.walk(folder):
            found += [os.path.join(root, each) for each in (*inner, *names) if each == name]
    return list(dict.fromkeys(found))


def _folder(path: str, known: Sequence[str]) -> str:
    here = [each for each in (path, *known) if Path(each).name == Path(path).name and Path(each).is_dir()]
    return (here or [path])[0]


def _reported(folder: Path) -> list[str]:
    """All texts in the config of the report there, paths among them, and what lies where its inputs do."""
    try:
        config = json.loads((folder / "report.json").read_text(encoding="utf-8"))["config"]
        image = config.get("image")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    inputs = Path(image) if isinstance(image, str) else folder
    inputs = inputs if inputs.is_dir() else inputs.parent
    beside = [str(each) for each in inputs.iterdir()] if inputs.is_dir() else []
    return [*_texts(config), *beside]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
