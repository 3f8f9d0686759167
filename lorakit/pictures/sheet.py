"""Contact sheets: pictures laid out as a table with labels and captions. Imports no torch."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont, ImageOps

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Vertical alignment (0 top, 1 bottom), pixels of space below, tiles.
_TableRow: TypeAlias = tuple[float, int, Sequence[Image.Image | None]]


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    cell: int | None = None,
    title: str = "",
) -> Image.Image:
    """Lay pictures out as a table on white, with labels at the left and on top and a caption under each.

    Args:
        rows: may differ in length; None leaves a pale empty cell.
        captions: as `rows`; missing ones are blank. Long texts are wrapped, then shortened with an ellipsis.
        cell: pixels of the longer side that every picture is scaled to (default: the longest of them,
            kept within 128 to 384).
    """
    pictures = [image for row in rows for image in row if image is not None]
    assert any(len(row) for row in rows), "a contact sheet of nothing"
    cell = cell or min(384, max([128, *(max(image.size) for image in pictures)]))
    gap = min(22, max(11, cell // 16))
    font, title_font = ImageFont.load_default(gap), ImageFont.load_default(round(gap * 1.5))
    grid = [[image and ImageOps.contain(image.convert("RGB"), (cell, cell)) for image in row] for row in rows]
    # A column of narrow portraits still leaves room for its text.
    widths = [max([cell // 2, *(image.width for image in column if image)]) for column in zip_longest(*grid)]
    labels = [_text_tile(label, font, cell, centred=False) for label in row_labels[: len(grid)]]
    widths = [max((tile.width for tile in labels if tile), default=0), *widths]  # column 0: the row labels

    head = [_text_tile(text, font, width) for text, width in zip(("", *column_labels), widths, strict=False)]
    table: list[_TableRow] = [(1.0, gap // 3, head)]
    for row, label, texts in zip_longest(grid, labels, captions[: len(grid)]):
        under = zip(("", *(texts or ())), widths, strict=False)
        under = [_text_tile(text, font, width, "#606060") for text, width in under]
        table.append((0.5, gap // 3 if any(under) else gap, [label, *_tiles(row, widths[1:], cell)]))
        table.append((0.0, gap, under))

    table = [row for row in table if any(row[2])]
    table_width = sum(widths) + gap * (len(widths) - 2 + bool(widths[0]))
    heading = _text_tile(title, title_font, table_width, centred=False)
    sheet = _pasted(table, widths, gap, top=gap + (heading.height + gap // 2 if heading else 0))
    if heading:
        sheet.paste(heading, (gap, gap))
    return sheet


def _tiles(row: Sequence[Image.Image | None], widths: Sequence[int], cell: int) -> list[Image.Image]:
    """The pictures of a row, with pale cells of its height where there is none."""
    height = max((image.height for image in row if image), default=cell // 2)
    blanks = [Image.new("RGB", (width, height), "#f4f4f4") for width in widths]
    return [image or blank for image, blank in zip(row, blanks, strict=False)]


def film_strip(
    frames: Sequence[Image.Image], captions: Sequence[str] = (), columns: int = 8, **options: Any
) -> Image.Image:
    """The frames in reading order, `columns` to a row; options as of `contact_sheet`."""
    starts = range(0, len(frames), columns)
    rows = [frames[i : i + columns] for i in starts]
    return contact_sheet(rows, captions=[captions[i : i + columns] for i in starts], **options)


def _pasted(table: Sequence[_TableRow], widths: Sequence[int], gap: int, top: int) -> Image.Image:
    """The table on white from `top` downwards, each tile centred in the width of its column."""
    heights = [max(tile.height for tile in tiles if tile) for _, _, tiles in table]
    left = gap if widths[0] else 0  # an empty column 0 brings its own gap
    size = left + sum(widths) + gap * len(widths), top + sum(heights) + sum(row[1] for row in table)
    sheet = Image.new("RGB", size, "white")
    for (align, space, tiles), height in zip(table, heights, strict=True):
        x = left
        for tile, width in zip(tiles, widths, strict=False):
            if tile:
                down = round(align * (height - tile.height))
                sheet.paste(tile, (x + (width - tile.width) // 2, top + down))
            x += width + gap
        top += height + space
    return sheet


def _text_tile(
    text: str, font: Font, width: int, colour: str = "#202020", centred: bool = True
) -> Image.Image | None:
    """The text wrapped to `width`, in a picture as wide as its longest line; None for a blank text."""
    lines = _wrap(text, font, width)
    if not lines:
        return None
    lengths = [font.getlength(line) for line in lines]
    line_height = math.ceil(font.getbbox("Agjy")[3] * 1.2)
    tile = Image.new("RGB", (math.ceil(max(lengths)), line_height * len(lines)), "white")
    for i, (line, length) in enumerate(zip(lines, lengths, strict=True)):
        x = (tile.width - length) / 2 if centred else 0
        ImageDraw.Draw(tile).text((x, i * line_height), line, fill=colour, font=font)
    return tile


def _wrap(text: str, font: Font, width: int, max_lines: int = 3) -> list[str]:
    """Lines no wider than `width` pixels; what exceeds `max_lines` is replaced by an ellipsis."""
    text = " ".join(text.split())
    lines, line = [], ""
    # 400 characters are more than three lines show; it bounds the work on a word without end.
    for word in text[:400].split():
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > width:
            cut = max(1, bisect_right(range(1, len(word)), width, key=lambda k: font.getlength(word[:k])))
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines += [line] if line else []
    if len(lines) > max_lines or len(text) > 400:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines
