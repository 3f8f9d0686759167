"""What a table becomes for a training: repeats by folder, tags in other orders, a trigger word. No torch.

All of it is a function of the table; what is drawn at a showing is which of a row's captions it has.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from lorakit.ground.errors import UserError
from lorakit.ground.randomness import derive_seed
from lorakit.pictures.captions import listing
from lorakit.pictures.folder import Row, Table

PLACE = "[trigger]"
"""Where a caption wants the trigger word; one without gets it at its beginning."""

# ---- repeats ----


def with_repeats(table: Table, repeats: str | Mapping[str, int] | None) -> Table:
    """The table with how often an epoch shows each row.

    Args:
        repeats: "kohya" takes the number before `_` of the nearest folder that has one; a mapping names
            folders, "." for all, of which the innermost counts; None shows each once, and warns of folders
            named so.

    Raises:
        UserError: a folder that holds no picture, or no row is left.
    """
    if repeats is None:
        named = {part for row in table.rows for part in _parents(row.name) if (_number(part) or 1) != 1}
        if not named:
            return table
        said = (
            f"folders with a number ({listing(sorted(named))}) are shown as often as others; for so many "
            'showings an epoch set repeats to "kohya"'
        )
        return replace(table, warnings=(*table.warnings, said))
    said = []
    if isinstance(repeats, str):
        numbers = [_nearest_number(row.name) for row in table.rows]
        counts = [1 if number is None else number for number in numbers]
        if not any(number is not None for number in numbers):
            said.append('repeats "kohya" has no effect: no folder is named NUMBER_NAME')
    else:
        counts = _counts(table, repeats)
    rows = tuple(replace(row, repeats=n) for row, n in zip(table.rows, counts, strict=True) if n)
    if not rows:
        raise UserError("repeats: every folder has 0, so that no picture is shown")
    lost = [row.name for row, n in zip(table.rows, counts, strict=True) if not n]
    if lost:
        said.append(f"{len(lost)} picture(s) are left out by a folder's 0: {listing(lost)}")
    return replace(table, rows=rows, warnings=(*table.warnings, *said))


def _parents(name: str) -> list[str]:
    """The names of the folders that a picture lies in, the nearest first."""
    return [part for part in reversed(name.split("/")[:-1]) if part]


def _number(folder: str) -> int | None:
    """Kohya's reading of a folder's name: the pictures of `20_zwx ridge` are shown 20 times an epoch."""
    match = re.match(r"(\d{1,6})_", folder)
    return int(match[1]) if match else None


def _nearest_number(name: str) -> int | None:
    return next((n for part in _parents(name) if (n := _number(part)) is not None), None)


def _counts(table: Table, repeats: Mapping[str, int]) -> list[int]:
    def folder_of(row: Row) -> str | None:
        inside = [str(folder) for folder in PurePosixPath(row.name).parents]
        return next((folder for folder in inside if folder in given), None)

    given = {str(PurePosixPath(folder)): count for folder, count in repeats.items()}
    found = [folder_of(row) for row in table.rows]
    if lost := given.keys() - {str(f) for row in table.rows for f in PurePosixPath(row.name).parents}:
        there = sorted({str(PurePosixPath(row.name).parent) for row in table.rows})
        raise UserError(
            f"repeats: no picture lies in {listing(sorted(lost))}; the folders are {listing(there)}"
        )
    return [1 if folder is None else given[folder] for folder in found]


# ---- captions ----


def with_wording(table: Table, *, shuffle: bool, keep_tokens: int, orders: int, trigger: str | None) -> Table:
    """The table with `orders` orders of the tags of each caption, and with the trigger word in all of them.

    Args:
        keep_tokens: tags at the beginning that stay where they are.
    """
    if not shuffle and not trigger:
        return table
    rows, tagged = [], False
    for row in table.rows:
        captions = row.captions
        if shuffle:
            captions = [each for caption in captions for each in tag_orders(caption, keep_tokens, orders)]
            tagged |= len(captions) > len(row.captions)
        captions = [triggered(caption, trigger) for caption in captions] if trigger else captions
        first, *others = dict.fromkeys(captions)
        rows.append(replace(row, caption=first, others=tuple(others)))
    said = () if tagged or not shuffle else ("caption_shuffle has no effect: no caption has tags to move",)
    return replace(table, rows=tuple(rows), warnings=(*table.warnings, *said))


def tag_orders(caption: str, keep_tokens: int, orders: int) -> list[str]:
    """A caption as it stands, and with its tags in other orders, `orders` in all at most."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept, moved = tags[:keep_tokens], tags[keep_tokens:]
    if len(moved) < 2:
        return [caption]

    def order(k: int) -> tuple[str, ...]:
        return tuple(sorted(moved, key=lambda tag: derive_seed(0, "caption order", caption, k, tag)))

    draws = map(order, range(8 * orders))  # enough for nearly all of few tags' orders
    found = list(dict.fromkeys([tuple(moved), *draws]))[1:orders]
    return [caption, *(", ".join([*kept, *tags]) for tags in found)]


def triggered(caption: str, trigger: str) -> str:
    """The caption with the trigger word in its place, or at the beginning unless it holds it already."""
    if PLACE in caption:
        return caption.replace(PLACE, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
