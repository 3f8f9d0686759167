"""What is in files of pictures: hash, size, and what is wrong with each. No torch here.

Of many pictures it is remembered, so that the next start need not read them all again.
"""

import contextlib
import hashlib
import os
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.ground.errors import OutputError
from lorakit.ground.shards import Shards
from lorakit.pictures.captions import Item
from lorakit.pictures.images import ImageError, image_size, load_image

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


def file_marks(path: str) -> tuple[object, ...] | None:
    """What is another one when a file is: path, number, size and both times; None where one cannot tell.

    So it is with a file that was changed a moment ago, since its next change may have the same times.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    times = found.st_mtime_ns, found.st_ctime_ns
    if max(times) > time.time_ns() - _SETTLED:
        return None
    return found.st_ino, found.st_size, *times, os.path.join(os.getcwd(), path)


class Remembered:
    """What was seen of pictures whose marks are still the same; of none without a folder.

    Sources that are neither paths nor bytes may tell theirs by a method `marks`.
    """

    def __init__(self, folder: Path | None):
        self.shards, self.writable = Shards(folder) if folder else None, True

    def name(self, source: Any, whole: bool) -> bytes | None:
        """Of what is seen of a picture, decoded whole or not; None for what is not remembered."""
        if self.shards is None:
            return None
        own = getattr(source, "marks", lambda: None)
        marks = file_marks(source) if isinstance(source, str) else own()
        if marks is None:
            return None
        text = "/".join(map(str, (_VERSION, whole, *marks)))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:20]

    def recall(self, name: bytes | None) -> Seen | None:
        data = self.shards.read(name) if self.shards and name else None
        if data is None or len(data) != _SEEN.size:
            return None
        sha256, *others = _SEEN.unpack(data)
        return Seen(sha256.hex(), *others)

    def keep(self, name: bytes | None, seen: Seen | ImageError) -> None:
        if self.shards is None or name is None or isinstance(seen, ImageError) or not self.writable:
            return
        try:
            self.shards.write(name, _SEEN.pack(bytes.fromhex(seen.sha256), *seen[1:]))
        except (OutputError, OSError):  # a full or read-only disk: it is looked at again next time
            self.writable = False

    def close(self) -> None:
        with contextlib.suppress(OutputError, OSError):
            if self.shards:
                self.shards.seal()


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
