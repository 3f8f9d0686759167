"""Safetensors files: the same content gives the same bytes, and a broken file is named for what it is.

torch is imported inside the functions, so that a module which only needs the names can answer without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.ground.errors import OutputError, UserError

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# The format's name -> torch's, in the order in which the library lays tensors out, so that each is aligned.
_WRITTEN = dict(
    zip(
        "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 I8 U8 BOOL".split(),
        "uint64 int64 float64 float32 uint32 int32 bfloat16 float16 uint16 int16 int8 uint8 bool".split(),
        strict=True,
    )
)
DTYPE_NAMES = _WRITTEN | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
"""torch's names of what is read."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, a pure function of the tensors and the metadata; see `chunks`."""
    return b"".join(chunks(tensors, metadata))


def chunks(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview[int]]:
    """The content of a safetensors file in pieces, the header first and then tensor by tensor, uncopied.

    The library writes `__metadata__` in the order of a hash map, which differs between processes; here it is
    sorted, and the header padded to 8 bytes. The tensors keep the library's order: by dtype, then by name.
    """
    dtypes = _dtypes()
    rank = {dtype: number for number, dtype in enumerate(dtypes)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensor_bytes(tensors[name])


def tensor_bytes(tensor: torch.Tensor) -> memoryview[int]:
    """A tensor's values in row-major order, as they lie in memory where they already do."""
    import torch

    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _dtypes() -> dict[torch.dtype, str]:
    """The format's names of what is written."""
    import torch

    return {getattr(torch, name): code for code, name in _WRITTEN.items()}


def payload_sha256(data: bytes | Iterable[bytes | memoryview[int]]) -> str:
    """Hex sha256 of the tensor bytes, all that follows the header, of a safetensors file or its `chunks`."""
    if isinstance(data, bytes):
        return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    digest = hashlib.sha256()
    for number, piece in enumerate(data):
        if number:
            digest.update(piece)
    return digest.hexdigest()


def file_payload_sha256(path: Path) -> str:
    """`payload_sha256` of a file on the disk, in the memory of a few megabytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


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


def header_dtypes(path: Path) -> dict[str, str]:
    """The dtype of every tensor, as DTYPE_NAMES has it. Raises what `read_header` raises."""
    read_header(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: DTYPE_NAMES.get(entry["dtype"], entry["dtype"]) for name, entry in header.items()}


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
    if is_pickle or path.suffix.lower() in PICKLE_SUFFIXES:
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
