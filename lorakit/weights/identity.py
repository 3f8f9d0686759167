"""What a base and a LoRA are, so that what was made with one is never taken for another's.

A part is its weights and what its config says of the model; a tokenizer is its files. Where a base lies and
which library wrote it change nothing. Of a single file every part has all of its weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from lorakit.weights.adapter_config import CONFIG, lora_path
from lorakit.weights.base import COMPONENTS, BaseInfo, weights_hash
from lorakit.weights.part_files import read_json

Record = dict[str, dict[str, Any]]
# What configs say of the files beside them and not of the model; so does every key that begins with "_".
_OF_THE_FILES = {
    "architectures",
    "dtype",
    "name_or_path",
    "special_tokens_map_file",
    "torch_dtype",
    "transformers_version",
}
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")


def base_record(info: BaseInfo, *parts: str) -> Record:
    """Part -> sha256 of its files (None without any) and its config, of these parts or all.

    Args:
        info: of a base whose files are here (`known`).

    Raises:
        BaseError: a tokenizer's config is no JSON object.
    """
    assert info.known, info.name
    return {part: _part_record(info, part) for part in parts or COMPONENTS}


def base_identity(info: BaseInfo, *parts: str) -> str:
    """The sha256 of base_record: for the name of what these parts, or all, have made."""
    return hashlib.sha256(json.dumps(base_record(info, *parts), sort_keys=True).encode()).hexdigest()


def changes(old: Record, new: Record) -> list[str]:
    """What differs between two records of the same parts, a line each; an absent key counts as null."""
    lines = []
    for part in new:
        (files, config), (files_now, config_now) = (
            (each[part]["files"], each[part]["config"]) for each in (old, new)
        )
        if files != files_now:
            lines.append(f"base, {part}: other files (sha256 {str(files)[:12]} -> {str(files_now)[:12]})")
        for key in sorted(config.keys() | config_now.keys()):
            if config.get(key) != config_now.get(key):
                lines.append(f"base, {part}: {key}: {config.get(key)!r} -> {config_now.get(key)!r}")
    return lines


def _part_record(info: BaseInfo, part: str) -> dict[str, Any]:
    if part == "tokenizer":
        return _tokenizer_record(info)
    path = info.files.get(part)  # a scheduler has none
    return {"files": weights_hash(path) if path else None, "config": _canonical(info.configs[part])}


def _tokenizer_record(info: BaseInfo) -> dict[str, Any]:
    """CLIP's own, which a single file is read with, has no files."""
    folder = info.tokenizer
    if folder is None:
        return {"files": None, "config": {"pad_token": info.pad_token}}
    paths = [path for name in _TOKENIZER if (path := folder / name).is_file()]
    digests = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in paths]
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    files = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return {"files": files, "config": _canonical(config)}


def _canonical(config: dict[str, Any]) -> dict[str, Any]:
    """As JSON types, in which a tuple equals a list."""
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _OF_THE_FILES}
    return json.loads(json.dumps(kept, default=str))


def lora_sha256(path: str) -> str:
    """The hash of a LoRA's tensors, and of PEFT's config beside them, which tells their strength."""
    file = lora_path(path)
    config = file.with_name(CONFIG)
    return file_sha256(file) + (file_sha256(config) if config.is_file() else "")


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
