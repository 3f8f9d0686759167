"""Bytes by name, thousands of them in one file: the caches of a training.

A shard is written by one process, entry behind entry, and by no other one ever after. An entry is its name,
the length and the CRC-32 of its bytes, a CRC-32 of these, and the bytes. The last entry of a shard is its
index; what a kill left has none and is read from entry to entry, as far as they are whole.

Files are read, not mapped: a mapped file that is cut short kills its reader, and its pages count as memory.
"""

import os
import struct
import uuid
from collections.abc import Iterator, KeysView
from io import FileIO
from pathlib import Path
from zlib import crc32

from lorakit.ground.publish import explained, make_folder, sync

SHARD_BYTES = 1 << 30
"""Where a writer begins another shard."""

_MAGIC = b"LKS1"
_HEADER = struct.Struct("<4s20sII")  # magic, name, length and CRC-32 of the bytes; before its own CRC-32
_CRC = struct.Struct("<I")
_PLACE = struct.Struct("<20sQI")  # of an entry: name, where it begins, length of its bytes
_INDEX = bytes(20)  # the name of the index, whose place is the end of the file
_BEFORE = _HEADER.size + _CRC.size  # bytes of an entry before its own

Place = tuple[Path, int, int]


class Shards:
    """The entries of all shards in a folder, by names of 20 bytes; of equal ones that of the newest shard."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._places: dict[bytes, Place] = {}
        self._files: dict[Path, FileIO] = {}
        self._own: FileIO | None = None
        self._written: list[bytes] = []  # _PLACE of the entries in the shard that is being written
        self.refresh()

    @property
    def names(self) -> KeysView[bytes]:
        """Of all entries, the damaged ones that nobody has read yet among them."""
        return self._places.keys()

    def refresh(self) -> None:
        """See what other processes have written."""
        for path in sorted(self.folder.glob("*.shard")):
            try:
                with FileIO(path) as file:
                    self._places |= {name: (path, start, size) for name, start, size in _places(file)}
            except OSError:  # what cannot be read is made anew
                continue

    def read(self, name: bytes) -> bytes | None:
        """The bytes of an entry; None if there is none, or it is damaged, which is forgotten then."""
        if name not in self._places:
            return None
        path, start, size = self._places[name]
        try:
            if path not in self._files:
                self._files[path] = FileIO(path)
            data = _entry(self._files[path], name, start, size)
        except OSError:
            data = None
        if data is None:
            del self._places[name]
        return data

    def write(self, name: bytes, data: bytes) -> None:
        """Append an entry, which a kill of this process leaves whole from here on.

        Raises:
            OutputError: the disk is full, read-only, …; what was written before stays.
        """
        if self._own is not None and self._own.tell() + len(data) > SHARD_BYTES:
            self.seal()
        with explained(self.folder, len(data)):
            if self._own is None:
                self._own, self._written = self._new_shard(), []
            place = self._own.tell(), len(data)
            _append(self._own, _packed(name, data))
        self._written.append(_PLACE.pack(name, *place))
        self._places[name] = Path(str(self._own.name)), *place

    def seal(self) -> None:
        """End the shard that is being written, if any, with its index, and wait until it is on the disk.

        Raises:
            OutputError: the disk is full, …; the entries stay.
        """
        if self._own is None:
            return
        with explained(self.folder), self._own as file:
            self._own, index = None, b"".join(self._written)
            _append(file, _packed(_INDEX, index) + _PLACE.pack(_INDEX, file.tell(), len(index)))
            os.fsync(file.fileno())
            sync(self.folder)

    def _new_shard(self) -> FileIO:
        make_folder(self.folder)
        numbers = [int(path.name[:8]) for path in self.folder.glob("[0-9]" * 8 + "-*.shard")]
        return FileIO(self.folder / f"{max(numbers, default=0) + 1:08d}-{uuid.uuid4().hex[:12]}.shard", "x")


def _packed(name: bytes, data: bytes) -> bytes:
    header = _HEADER.pack(_MAGIC, name, len(data), crc32(data))
    return header + _CRC.pack(crc32(header)) + data


def _append(file: FileIO, content: bytes) -> None:
    """Write to the end of a file, or leave it as it was."""
    start, rest = file.tell(), memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:
        file.seek(start)
        file.truncate()
        raise


def _entry(file: FileIO, name: bytes, start: int, size: int) -> bytes | None:
    """The bytes of the entry that is said to begin at `start`; None if it does not, or is damaged."""
    file.seek(start)
    entry = file.read(_BEFORE + size)
    data = entry[_BEFORE:]
    return data if entry == _packed(name, data) and len(data) == size else None


def _places(file: FileIO) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and length of each entry: as the index has them, else from entry to entry."""
    end = file.seek(0, os.SEEK_END)
    if end > _PLACE.size:
        file.seek(end - _PLACE.size)
        name, start, size = _PLACE.unpack(file.read(_PLACE.size))
        if name == _INDEX and start < end and (index := _entry(file, name, start, size)) is not None:
            yield from _PLACE.iter_unpack(index)
            return
    start = 0
    while start + _BEFORE <= end:
        file.seek(start)
        header = file.read(_BEFORE)
        magic, name, size, _ = _HEADER.unpack(header[: _HEADER.size])
        whole = crc32(header[: _HEADER.size]) == _CRC.unpack(header[_HEADER.size :])[0]
        if magic != _MAGIC or not whole or start + _BEFORE + size > end:
            return
        if name != _INDEX:
            yield name, start, size
        start += _BEFORE + size
