"""Bytes by name, thousands of them in one file: the caches of a training.

A shard is written by one process, entry behind entry, and by no other one ever after. An entry is its name,
the length and the CRC-32 of its bytes, a CRC-32 of these, and the bytes. The last entry of a shard is its
index; what a kill left has none and is read from entry to entry, as far as they are whole.

Files are read, not mapped: a mapped file that is cut short kills its reader, and its pages count as memory.
"""

import os
import struct
import uuid
from io import FileIO
from pathlib import Path
from zlib import crc32

import numpy as np

from lorakit.ground.publish import explained, make_folder, sync

SHARD_BYTES = 1 << 30
"""Where a writer begins another shard."""

_MAGIC = b"LKS1"
_HEADER = struct.Struct("<4s20sII")  # magic, name, length and CRC-32 of the bytes; before its own CRC-32
_CRC = struct.Struct("<I")
_PLACE = struct.Struct("<20sQI")  # of an entry: name, where it begins, length of its bytes
_PLACES = np.dtype([("name", "S20"), ("start", "<u8"), ("size", "<u4")])  # the same, in arrays
_SHARD_PLACES = np.dtype([("shard", np.uint32), ("start", np.uint64), ("size", np.uint32)])
_INDEX = bytes(20)  # the name of the index, whose place is the end of the file
_BEFORE = _HEADER.size + _CRC.size  # bytes of an entry before its own
_OPEN = 256  # files at most, of the thousand or so that a process may open
_RECENT = 1 << 16  # entries that are kept in a table of their own, which takes ten times as much for each

Place = tuple[Path, int, int]


class Shards:
    """The entries of all shards in a folder, by names of 20 bytes; of equal ones that of the newest shard.

    Of each it holds 36 bytes in memory.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._paths: list[Path] = []
        self._names, self._places = np.empty(0, "S20"), np.empty(0, _SHARD_PLACES)  # by name
        self._recent: dict[bytes, Place | None] = {}  # None: forgotten
        self._files: dict[Path, FileIO] = {}
        self._own: FileIO | None = None
        self._own_path = folder  # of the shard that is being written
        self._written = bytearray()  # _PLACE of the entries in the shard that is being written
        self.refresh()

    @property
    def names(self) -> set[bytes]:
        """Of all entries, the damaged ones that nobody has read yet among them."""
        data = self._names.tobytes()
        known = {data[start : start + 20] for start in range(0, len(data), 20)} | self._recent.keys()
        return {name for name in known if name in self}

    def __contains__(self, name: bytes) -> bool:
        return self._find(name) is not None

    def _find(self, name: bytes) -> Place | None:
        if name in self._recent:
            return self._recent[name]
        at = int(self._names.searchsorted(np.frombuffer(name, "S20"))[0])
        if self._names[at : at + 1].tobytes() != name:
            return None
        shard, start, size = self._places[at].tolist()
        return self._paths[shard], start, size

    def refresh(self) -> None:
        """See what other processes have written."""
        self._paths, self._recent = sorted(self.folder.glob("*.shard")), {}
        self._names, self._places = self._names[:0], self._places[:0]
        found = []
        for number, path in enumerate(self._paths):
            try:
                with FileIO(path) as file:
                    found.append((number, _places(file)))
            except OSError:  # what cannot be read is made anew
                continue
        self._merge(found)

    def _merge(self, found: list[tuple[int, np.ndarray]]) -> None:
        """Take in entries, by the number of their shard."""
        counts = [len(places) for _, places in found]
        places = np.empty(sum(counts), _SHARD_PLACES)
        places["shard"] = np.repeat(np.array([number for number, _ in found], int), np.array(counts, int))
        for field in ("start", "size"):
            places[field] = np.concatenate([np.empty(0, np.uint64), *(each[field] for _, each in found)])
        names = np.concatenate([self._names, *(each["name"] for _, each in found)])
        order = np.argsort(names, kind="stable")
        names = names[order]
        last = np.append(names[1:] != names[:-1], True)[: len(names)]  # of equal ones
        self._names, self._places = names[last], np.append(self._places, places)[order[last]]

    def _settle(self) -> None:
        """Move what was written recently to the others."""
        found: dict[Path, bytearray] = {}
        for name, place in self._recent.items():
            if place is not None:
                found.setdefault(place[0], bytearray()).extend(_PLACE.pack(name, *place[1:]))
        self._paths += [path for path in found if path not in self._paths]
        self._merge([(self._paths.index(path), np.frombuffer(own, _PLACES)) for path, own in found.items()])
        self._recent = {name: None for name, place in self._recent.items() if place is None}

    def read(self, name: bytes) -> bytes | None:
        """The bytes of an entry; None if there is none, or it is damaged, which is forgotten then."""
        place = self._find(name)
        if place is None:
            return None
        path, start, size = place
        try:
            if path not in self._files:
                if len(self._files) == _OPEN:
                    self._close()
                self._files[path] = FileIO(path)
            data = _entry(self._files[path], name, start, size)
        except OSError:
            data = None
        if data is None:
            self._recent[name] = None
        return data

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def write(self, name: bytes, data: bytes) -> None:
        """Append an entry, which a kill of this process leaves whole from here on.

        Raises:
            OutputError: the disk is full, read-only, …; what was written before stays.
        """
        if self._own is not None and self._own.tell() + len(data) > SHARD_BYTES:
            self.seal()
        with explained(self.folder, len(data)):
            if self._own is None:
                self._own, self._written = self._new_shard(), bytearray()
            place = self._own.tell(), len(data)
            _append(self._own, _packed(name, data))
        self._written += _PLACE.pack(name, *place)
        self._recent[name] = self._own_path, *place
        if len(self._recent) > max(_RECENT, len(self._names) // 4):
            self._settle()

    def seal(self) -> None:
        """End the shard that is being written, if any, with its index, and wait until it is on the disk.

        Raises:
            OutputError: the disk is full, …; the entries stay.
        """
        if self._own is None:
            return
        with explained(self.folder), self._own as file:
            self._own, index = None, bytes(self._written)
            _append(file, _packed(_INDEX, index) + _PLACE.pack(_INDEX, file.tell(), len(index)))
            os.fsync(file.fileno())
            sync(self.folder)

    def _new_shard(self) -> FileIO:
        make_folder(self.folder)
        numbers = [int(path.name[:8]) for path in self.folder.glob("[0-9]" * 8 + "-*.shard")]
        number = max(numbers, default=0) + 1
        self._own_path = self.folder / f"{number:08d}-{uuid.uuid4().hex[:12]}.shard"
        return FileIO(self._own_path, "x")


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


def _places(file: FileIO) -> np.ndarray:
    """Name, begin and length of each entry: as the index has them, else from entry to entry."""
    end = file.seek(0, os.SEEK_END)
    if end > _PLACE.size:
        file.seek(end - _PLACE.size)
        name, start, size = _PLACE.unpack(file.read(_PLACE.size))
        if name == _INDEX and start < end and (index := _entry(file, name, start, size)) is not None:
            return np.frombuffer(index, _PLACES)
    start, found = 0, bytearray()
    while start + _BEFORE <= end:
        file.seek(start)
        header = file.read(_BEFORE)
        magic, name, size, _ = _HEADER.unpack(header[: _HEADER.size])
        whole = crc32(header[: _HEADER.size]) == _CRC.unpack(header[_HEADER.size :])[0]
        if magic != _MAGIC or not whole or start + _BEFORE + size > end:
            break
        if name != _INDEX:
            found += _PLACE.pack(name, start, size)
        start += _BEFORE + size
    return np.frombuffer(found, _PLACES)
