"""A folder of captioned pictures -> a checked table, with every fault found before anything trains.

Imports no torch.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from lorakit.pictures.caption_rules import CaptionLines, MissingCaptions, with_captions
from lorakit.pictures.captions import DataError, Fault, FolderReader, Item, Stored, listing
from lorakit.pictures.images import IMAGE_SUFFIXES, MAX_PIXELS, ImageError, load_image
from lorakit.pictures.inspection import Look, inspect_pictures
from lorakit.pictures.names import is_tar
from lorakit.pictures.tars import TarReader


@dataclass(frozen=True, slots=True)
class Row:
    """One picture with its caption; sizes in pixels after EXIF orientation."""

    file: str | None
    name: str  # relative to the root, with forward slashes
    caption: str
    width: int
    height: int
    sha256: str  # of the file
    line: str  # where the caption came from, such as metadata.jsonl:3 or a.txt
    data: bytes | Stored | None = field(default=None, repr=False)
    others: tuple[str, ...] = ()  # further captions; each showing has one of all
    repeats: int = 1  # showings in an epoch
    transparent: float = 0.0  # share of its pixels with an alpha below one half
    mask: Path | None = None
    mask_sha256: str = ""
    frames: int = 1  # of a clip

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.others)

    @property
    def path(self) -> Path | None:
        return None if self.file is None else Path(self.file)

    @property
    def source(self) -> str | bytes:
        """What `load_image` takes."""
        source = self.data if self.file is None else self.file
        source = source() if callable(source) else source
        assert source is not None, f"{self.name} has neither a path nor data"
        return source


@dataclass(frozen=True)
class Table:
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    caption_source: str

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the pictures, captions and repeats in row order; names, dates and sizes do not enter."""
        digest = hashlib.sha256(b"[")
        for number, row in enumerate(self.rows):
            parts = [row.sha256, *row.captions, *([row.repeats] if row.repeats != 1 else [])]
            parts += [["mask", row.mask_sha256]] if row.mask else []
            digest.update(f"{', ' if number else ''}{json.dumps(parts)}".encode())
        digest.update(b"]")
        return digest.hexdigest()

    def first_captions(self, count: int) -> tuple[str, ...]:
        """Captions that differ."""
        found: dict[str, None] = {}
        for row in self.rows:
            found[row.caption] = None
            if len(found) == count:
                break
        return tuple(found)


@dataclass(frozen=True)
class _Policy:
    caption_lines: CaptionLines
    missing_captions: MissingCaptions
    broken_images: str
    max_image_pixels: int
    min_side: int
    max_aspect: float
    alpha_background: tuple[int, int, int]
    decode_limit: int
    remember_in: Path | None


def read_folder(
    root: str | Path,
    *,
    caption_column: str | None = None,
    caption_extension: str = ".txt",
    caption_lines: CaptionLines = "join",
    missing_captions: MissingCaptions = "error",
    broken_images: Literal["error", "skip"] = "error",
    allow_symlinks: bool = False,
    masks: bool = False,
    max_image_pixels: int = MAX_PIXELS,
    min_side: int = 16,
    max_aspect: float = 4.0,
    alpha_background: tuple[int, int, int] = (255, 255, 255),
    decode_limit: int = 2000,
    remember_in: Path | None = None,
) -> Table:
    """Read and check a folder with sub-folders, or tar files, see tars; hidden files are passed over.

    Rows keep the order of metadata.jsonl or of a tar file, or are sorted by name where captions lie in .txt
    files.

    Args:
        caption_column: key of the caption in metadata.jsonl (None: "text", or the only other key with text),
            or in the .json files of tar files (None: captions are their .txt files).
        caption_lines: "choice" reads lines, or a list in metadata.jsonl, as several captions; "join" makes
            one of lines, None too and warns; a list is then refused.
        missing_captions: "folder" takes the name of the folder that the picture lies in.
        allow_symlinks: also take what a symbolic link brings in from outside the folder.
        masks: a picture's mask lies beside it as NAME-masklabel.png.
        max_aspect: longest side over shortest.
        alpha_background: what transparent pictures are laid on.
        decode_limit: beyond so many pictures, only the headers of the others are read.
        remember_in: folder of shards that keep what was seen of many pictures, see inspection.Remembered.

    Raises:
        DataError: lists every fault with its file and line.
    """
    root = Path(root)
    shown = max_image_pixels, min_side, max_aspect, alpha_background
    policy = _Policy(caption_lines, missing_captions, broken_images, *shown, decode_limit, remember_in)
    if root.is_file() and is_tar(root.name):
        return _of_tars(root.parent, [root.name], policy, [], [], caption_extension, caption_column)
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "no such folder"
        raise DataError([Fault(str(root), problem, "give the folder that holds the pictures")])
    reader = FolderReader(root, IMAGE_SUFFIXES, allow_symlinks, caption_extension)
    if names := reader.tar_files():
        found = reader.faults, reader.warnings
        return _of_tars(root, names, policy, *found, caption_extension, caption_column)
    items, source = reader.items(caption_column, missing_captions)
    if masks:
        items = reader.with_masks(items)
    elif reader.masks:
        listed = listing(reader.masks.values())
        reader.warnings.append(f'masks are not used ({listed}): set masked_loss to "beside"')
    return _table(items, policy, reader.faults, reader.warnings, f"{root}/", source)


def _of_tars(
    root: Path,
    names: list[str],
    policy: _Policy,
    faults: list[Fault],
    warnings: list[str],
    extension: str,
    column: str | None,
) -> Table:
    reader = TarReader(root, names, IMAGE_SUFFIXES, extension, column, faults, warnings)
    items, source = reader.items(policy.missing_captions)
    return _table(items, policy, faults, warnings, f"{root}/", source)


def read_rows(
    records: Iterable[tuple[str, bytes | Path | Stored, object]],
    *,
    caption_lines: CaptionLines = "join",
    missing_captions: MissingCaptions = "error",
    broken_images: Literal["error", "skip"] = "error",
    max_image_pixels: int = MAX_PIXELS,
    min_side: int = 16,
    max_aspect: float = 4.0,
    alpha_background: tuple[int, int, int] = (255, 255, 255),
    decode_limit: int = 2000,
    remember_in: Path | None = None,
) -> Table:
    """The checks of `read_folder` for (name, picture, caption) from elsewhere, such as a `datasets` table.

    Raises:
        DataError: lists every fault with the name of its row.
    """
    shown = max_image_pixels, min_side, max_aspect, alpha_background
    policy = _Policy(caption_lines, missing_captions, broken_images, *shown, decode_limit, remember_in)
    items = [
        Item(name, str(source) if isinstance(source, Path) else source, caption, name)
        for name, source, caption in records
    ]
    return _table(items, policy, [], [], "", "the data set")


def _table(
    items: list[Item],
    policy: _Policy,
    faults: list[Fault],
    warnings: list[str],
    prefix: str,
    caption_source: str,
) -> Table:
    """The checks that all sources share; `prefix` stands before a name in messages."""
    named = _named_once(items, prefix, faults)
    items = with_captions(named, policy.caption_lines, policy.missing_captions, prefix, faults, warnings)
    rows = _inspected(items, policy, prefix, faults, warnings)
    if not rows and not faults:
        where = prefix.rstrip("/") or "the data set"
        faults = [Fault(where, "no rows are left", "add pictures with captions")]
    if faults:
        raise DataError(faults)
    return Table(tuple(rows), (*warnings, *_duplicates(rows)), caption_source)


def _named_once(items: list[Item], prefix: str, faults: list[Fault]) -> list[Item]:
    if len({item.name for item in items}) == len(items):
        return items
    first: dict[str, Item] = {}
    for item in items:
        earlier = first.setdefault(item.name, item)
        if earlier is not item:
            problem = f"'{item.name}' is already named in {earlier.line}"
            faults.append(Fault(prefix + item.line, problem, "keep one line for each picture"))
    return list(first.values())


def _inspected(
    items: list[Item], policy: _Policy, prefix: str, faults: list[Fault], warnings: list[str]
) -> list[Row]:
    """The rows of all pictures that are good, or may be as far as their headers tell."""
    limit = policy.decode_limit
    look = Look(prefix, policy.max_image_pixels, policy.alpha_background)
    rows, broken, transparent = [], [], []
    found = inspect_pictures(items, look, limit, policy.remember_in)
    for item, seen in zip(items, found, strict=True):
        label = prefix + item.name
        if isinstance(seen, ImageError):
            problem = str(seen).removeprefix(f"{label}: ")
            broken.append(Fault(label, problem, 'replace broken pictures or set broken_images to "skip"'))
            continue
        faults += _size_faults(label, seen.width, seen.height, policy)
        transparent += [item.name] if seen.transparent > 0.5 else []
        file, data = (item.source, None) if isinstance(item.source, str) else (None, item.source)
        first, *others = item.caption
        line, size = item.line or item.name, (seen.width, seen.height)
        row = Row(file, item.name, first, *size, seen.sha256, line, data, tuple(others), 1, seen.transparent)
        rows.append(_with_mask(row, item.mask, prefix, faults))
    if policy.broken_images == "error":
        faults += broken
    elif broken:
        reasons = listing(f"{fault.where} ({fault.problem})" for fault in broken)
        warnings.append(f"{len(broken)} broken picture(s) are left out: {reasons}")
    if transparent:
        colour = f"laid on the colour {policy.alpha_background}"
        warnings.append(
            f"{len(transparent)} picture(s), mostly transparent, are {colour}: {listing(transparent)}"
        )
    if len(items) > limit:
        warnings.append(
            f"only the headers are checked of the {len(items) - limit} pictures after the first {limit}"
        )
    return rows


def _with_mask(row: Row, mask: Path | None, prefix: str, faults: list[Fault]) -> Row:
    """The row with its mask, which must be a picture of its aspect that is not black."""
    if mask is None:
        return row
    label = f"{prefix}{row.name}"
    try:
        image = load_image(mask)
    except (ImageError, OSError) as error:
        faults.append(Fault(label, f"its mask cannot be read: {error}", "replace the mask or delete it"))
        return row
    width, height = image.size
    if abs(width * row.height / (height * row.width) - 1) > 0.02:
        problem = f"is {row.width}x{row.height}, its mask {width}x{height}"
        faults.append(Fault(label, problem, "make the mask from the picture as it is"))
    elif not image.convert("L").getextrema()[1]:
        faults.append(
            Fault(label, "its mask is black, so that nothing is trained", "white is what is trained")
        )
    return replace(row, mask=mask, mask_sha256=hashlib.sha256(mask.read_bytes()).hexdigest())


def _size_faults(label: str, width: int, height: int, policy: _Policy) -> list[Fault]:
    longer, shorter = max(width, height), min(width, height)
    if shorter < policy.min_side:
        problem = f"{width}x{height} has a side below {policy.min_side} pixels"
        return [Fault(label, problem, "use larger pictures")]
    if longer > policy.max_aspect * shorter:
        ratio = f"the sides are {longer / shorter:.2f} to 1, max_aspect is {policy.max_aspect:g}"
        return [Fault(label, f"{width}x{height}: {ratio}", "crop them or raise max_aspect")]
    return []


def _duplicates(rows: list[Row]) -> list[str]:
    """Warnings on files with the same bytes."""
    times, groups = Counter(row.sha256 for row in rows), defaultdict(list)
    for row in rows:
        if times[row.sha256] > 1:
            groups[row.sha256].append(row)
    found = {"the same caption": [], "different captions": []}
    for group in groups.values():
        kind = "the same caption" if len({row.captions for row in group}) == 1 else "different captions"
        found[kind].append(" = ".join(row.name for row in group))
    return [f"identical pictures with {kind}: {listing(same)}" for kind, same in found.items() if same]
