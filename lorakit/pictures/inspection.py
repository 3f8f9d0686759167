"""What is in files of pictures: hash, size, and what is wrong with each. No torch here.

Of many pictures it is remembered, so that the next start need not read them all again.
"""

import hashlib
import os
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lorakit.ground.errors import OutputError
from lorakit.ground.shards import Shards
from lorakit.pictures.captions import Item
from lorakit.pictures.images import ImageError, image_size, load_image
from lorakit.pictures.tars import Member

MANY = 1000
"""Pictures from which on it is remembered what was seen of them."""

_TOGETHER = 64  # pictures that one thread looks at in a row
_IN_MEMORY = 1 << 26  # bytes of a file that is read at once
_SETTLED = 2 * 10**9  # nanoseconds after which a change of a file changes its times
_VERSION = 1
_SEEN = struct.Struct("<32sIId")


class Look(NamedTuple):
    """How pictures are looked at; `prefix` stands before a name in messages."""

    prefix: str
    max_pixels: int
    background: tuple[int, int, int]


class Seen(NamedTuple):
    sha256: str  # of the file
    width: int
    height: int
    transparent: float  # share of pixels


class Remembered:
    """What was seen of files whose path, number, size and times are still the same; of none without a folder.

    A file that was changed a moment ago is not remembered, since its next change may have the same times.
    """

    def __init__(self, folder: Path | None):
        self.shards = Shards(folder) if folder else None
        self.here, self.now = os.getcwd(), time.time_ns()

    def name(self, source: object, whole: bool) -> bytes | None:
        """Of what is seen of a picture, decoded whole or not; None for what is not remembered."""
        if isinstance(source, Member):
            path, place = source.archive, (source.start, source.size)
        else:
            path, place = source, ()
        if self.shards is None or not isinstance(path, str):
            return None
        try:
            found = os.stat(path)
        except OSError:
            return None
        times = found.st_mtime_ns, found.st_ctime_ns
        if max(times) > self.now - _SETTLED:
            return None
        parts = _VERSION, whole, found.st_ino, found.st_size, *times, *place, os.path.join(self.here, path)
        return hashlib.sha256("/".join(map(str, parts)).encode("utf-8", "surrogateescape")).digest()[:20]

    def recall(self, name: bytes | None) -> Seen | None:
        data = self.shards.read(name) if self.shards and name else None
        if data is None or len(data) != _SEEN.size:
            return None
        sha256, *others = _SEEN.unpack(data)
        return Seen(sha256.hex(), *others)

    def keep(self, name: bytes | None, seen: Seen | ImageError) -> None:
        if self.shards is None or name is None or isinstance(seen, ImageError):
            return
        try:
            self.shards.write(name, _SEEN.pack(bytes.fromhex(seen.sha256), *seen[1:]))
        except OutputError:  # a full or read-only disk: it is looked at again next time
            self.shards = None

    def close(self) -> None:
        try:
            if self.shards:
                self.shards.seal()
        except OutputError:
            pass


def inspect_pictures(
    items: Sequence[Item], look: Look, decoded: int, folder: Path | None
) -> Iterator[Seen | ImageError]:
    """What is seen of each picture, or what is wrong with it.

    Args:
        decoded: so many are decoded whole, the first ones; of the others the header is read.
        folder: of shards in which it is remembered what was seen of many; None: nowhere.
    """
    remembered = Remembered(folder if len(items) >= MANY else None)
    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:  # decoders and hashes release the GIL
        begun = deque()
        for start in range(0, len(items), _TOGETHER):
            some = [(item, start + n < decoded) for n, item in enumerate(items[start : start + _TOGETHER])]
            names = [remembered.name(item.source, whole) for item, whole in some]
            known = [remembered.recall(name) for name in names]
            known = [seen if seen and seen.width * seen.height <= look.max_pixels else None for seen in known]
            unknown = [each for each, seen in zip(some, known, strict=True) if seen is None]
            begun.append((names, known, pool.submit(_inspect, unknown, look) if unknown else None))
            if len(begun) > 2 * threads:
                yield from _finished(remembered, *begun.popleft())
        for each in begun:
            yield from _finished(remembered, *each)
    remembered.close()


def _finished(remembered: Remembered, names, known, looked_at) -> Iterator[Seen | ImageError]:
    new = iter(looked_at.result() if looked_at else ())
    for name, seen in zip(names, known, strict=True):
        if seen is None:
            remembered.keep(name, seen := next(new))
        yield seen


def _inspect(some: Sequence[tuple[Item, bool]], look: Look) -> list[Seen | ImageError]:
    return [_inspected(item, look, whole) for item, whole in some]


def _inspected(item: Item, look: Look, whole: bool) -> Seen | ImageError:
    options = {"name": look.prefix + item.name, "max_pixels": look.max_pixels}
    try:
        source = item.source() if callable(item.source) else item.source
        if isinstance(source, str):
            with open(source, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > _IN_MEMORY:
                    digest = hashlib.file_digest(file, "sha256")
                else:
                    digest = hashlib.sha256(source := file.read())
        else:
            digest = hashlib.sha256(source)
        if not whole:
            return Seen(digest.hexdigest(), *image_size(source, **options), 0.0)
        image = load_image(source, background=look.background, **options)
        return Seen(digest.hexdigest(), *image.size, float(image.info.get("transparent_share", 0)))
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(f"{options['name']}: {error.strerror}")
