"""Files of models: LoRAs by the names in prompts, and what a picture may keep of a path. No torch here."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from threading import Thread

from lorakit.ground.errors import UserError
from lorakit.weights.base import weights_hash
from lorakit.weights.part_files import weights_file
from lorakit.weights.single_file import what_else
from lorakit.weights.tensors import file_payload_sha256, read_header

_ALIAS = "ss_output_name"
"""kohya's key for the name under which a LoRA was made, by which A1111 finds a renamed file."""


def find_lora(name: str, folders: Sequence[str]) -> str:
    """The file of the LoRA `name`: the least deep in the first folder that has one; else by its alias.

    Raises:
        UserError: there is none, or two equally deep.
    """
    for folder in folders:
        found = [path for path in _below(folder) if path.stem == name]
        if not found and "/" in name:
            found = [path for path in _below(folder) if str(path).endswith(f"/{name}.safetensors")]
        if found:
            return _least_deep(found, name)
    found = [path for folder in folders for path in _below(folder) if _alias(path) == name]
    if found:
        return _least_deep(found, name)
    where = ", ".join(folders) or "any folder"
    raise UserError(f"prompt: <lora:{name}:…>: no such file in {where}; name its folder in model_dirs")


def _below(folder: str) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in sorted(names) if name.endswith(".safetensors"))


def _least_deep(paths: Sequence[Path], name: str) -> str:
    depth = min(len(path.parts) for path in paths)
    first, *others = sorted(path for path in paths if len(path.parts) == depth)
    if others:
        both = f"{first} and {others[0]}"
        raise UserError(f"prompt: <lora:{name}:…>: is {both}; rename one, or name it in loras")
    return str(first)


def _alias(path: Path) -> str | None:
    try:
        return read_header(path)[1].get(_ALIAS)
    except UserError:  # what is no whole file has no alias
        return None


# ---- what a picture keeps of paths ----


def portable(path: str) -> str:
    """A path as a picture may keep it: below the working directory as it is, from elsewhere its last part."""
    pure = Path(path)
    return pure.name if pure.is_absolute() or ".." in pure.parts else path


_ahead: dict[str, Thread] = {}


def fingerprint_ahead(path: str) -> None:
    """Begins `fingerprint` beside what follows: the hash of a base takes seconds."""
    _ahead[path] = Thread(target=_fingerprint, args=(path,), daemon=True)
    _ahead[path].start()


def fingerprint(path: str) -> str | None:
    """Hex sha256 by which a file is known again whatever its name; None where there is none here.

    Of a LoRA the tensors count, as in `sshs_model_hash`; of a base its U-Net, or the file that it is; of
    another folder its weights.
    """
    if begun := _ahead.pop(path, None):
        begun.join()
    return _fingerprint(path)


def _fingerprint(path: str) -> str | None:
    place = Path(path)
    try:
        if (place / "unet").is_dir():
            return weights_hash(weights_file(place, "unet"))
        if place.is_dir():
            own = sorted(place.glob("*.safetensors"))
            return weights_hash(own[0]) if own else None
        status = place.stat()
        return _file_hash(path, status.st_size, status.st_mtime_ns)
    except (OSError, UserError):
        return None


@cache
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    """Once per process and state of the file."""
    if path.endswith(".safetensors"):
        is_base = what_else(read_header(Path(path))[0]) is None
        return (weights_hash if is_base else file_payload_sha256)(Path(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
