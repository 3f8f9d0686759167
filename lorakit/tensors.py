"""Safetensors files: the same content gives the same bytes, and a broken file is named for what it is.

torch is imported inside the functions, so that a module which only needs the names can answer without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import OutputError, UserError

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, a pure function of the tensors and the metadata.

    The library writes `__metadata__` in the order of a hash map, which differs between processes; here the
    header is written again with sorted metadata, padded to 8 bytes. The tensors keep the library's order.
    """
    import safetensors.torch

    ready = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    data = safetensors.torch.save(ready)
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    if metadata:
        header = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}, **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def payload_sha256(data: bytes) -> str:
    """Hex sha256 of a safetensors file's tensor bytes: all that follows the header."""
    return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """The shape of every tensor and the metadata; no tensor is read.

    Raises:
        UserError: it is not a whole safetensors file; the message says what it is instead.
        OutputError: it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the .safetensors file in it")
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            _refuse_other_formats(path, start)
            size = int.from_bytes(start[:8], "little")
            if size > _MAX_HEADER_BYTES or start[8:9] != b"{":
                raise UserError(f"{path}: is not a safetensors file: it does not begin with a header")
            file.seek(8)
            text = file.read(size)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) < size:
        raise UserError(f"{path}: is truncated inside its header ({total} bytes); fetch it again")
    shapes, metadata, end = _parse_header(path, text)
    if total < 8 + size + end:
        share = 100 * total // (8 + size + end)
        raise UserError(
            f"{path}: is truncated: it holds {share} % of the bytes that its header names; fetch it again"
        )
    return shapes, metadata


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors, on the CPU in the file's dtype, and the metadata. Raises what `read_header` raises."""
    import safetensors
    import safetensors.torch

    _, metadata = read_header(path)
    try:
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is a damaged safetensors file ({error}); fetch it again") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error}") from error


def _refuse_other_formats(path: Path, start: bytes) -> None:
    # 0x80 begins a pickle, and also a safetensors file whose header length ends in that byte: byte 8 tells.
    is_pickle = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:9] != b"{")
    if is_pickle or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise UserError(
            f"{path}: is a pickle, which can run code when it is opened; only .safetensors files are read. "
            "Look for a .safetensors version of it"
        )
    if not start:
        raise UserError(f"{path}: is empty (0 bytes); fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a git-LFS pointer, not the file itself; run `git lfs pull`")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path}: is an HTML page, as a failed download leaves; download the file itself")
    if len(start) < 9:
        raise UserError(f"{path}: is truncated: {len(start)} bytes are too few for a safetensors file")


def _parse_header(path: Path, text: bytes) -> tuple[Shapes, dict[str, str], int]:
    """Shapes, metadata and the number of tensor bytes that the header names."""
    shapes, end = {}, 0
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        for name, entry in header.items():
            shapes[name] = tuple(int(side) for side in entry["shape"])
            end = max(end, int(entry["data_offsets"][1]))
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: has a bad safetensors header ({error}); fetch it again") from error
    return shapes, metadata, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name twice")
    return result
