"""Which captions a picture has: several, one or none, and what is no caption. No torch here."""

import re
from pathlib import PurePosixPath
from typing import Literal

from lorakit.pictures.captions import SKIP_OR_EMPTY, Fault, Item, listing, short
from lorakit.pictures.names import is_unicode

CaptionLines = Literal["join", "choice"] | None
MissingCaptions = Literal["error", "skip", "empty", "folder"]


def with_captions(
    items: list[Item],
    lines: CaptionLines,
    missing_captions: MissingCaptions,
    prefix: str,
    faults: list[Fault],
    warnings: list[str],
) -> list[Item]:
    """The items with lists of captions, one at least, after the rule for missing ones.

    Args:
        lines, missing_captions: see folder.read_folder.
        prefix: stands before a name in messages.
    """
    kept, missing, several = [], [], []
    for item in items:
        captions = _captions_of(item, lines)
        if lines is None and isinstance(item.caption, str) and len(item.caption.strip().splitlines()) > 1:
            several.append(item.line)
        fault = _caption_fault(item, lines)
        if not (fault or captions):
            if missing_captions == "folder":
                captions = [name] if (name := class_of(item.name)) else []
            if captions or missing_captions in ("skip", "empty"):
                missing.append(item.name)
            else:
                fault = _no_caption(item, missing_captions)
        if fault:
            problem, remedy = fault
            faults.append(Fault(prefix + (item.line or item.name), f"'{item.name}' {problem}", remedy))
        # With a fault too, so that the picture is checked in the same go.
        if fault or captions or missing_captions == "empty":
            kept.append(item._replace(caption=captions or [""]))
    if missing:
        fates = {"skip": "left out", "folder": "trained with the name of their folder"}
        fate = fates.get(missing_captions, "trained with an empty one")
        warnings.append(f"{len(missing)} picture(s) without a caption are {fate}: {listing(missing)}")
    if several:
        warnings.append(
            f"captions of several lines are trained as one each: {listing(dict.fromkeys(several))}; for one "
            'line at a time set caption_lines to "choice", to keep it so "join"'
        )
    return kept


def _captions_of(item: Item, lines: CaptionLines) -> list[str]:
    """The captions that an item has, none of them empty, each once; what is no text is left out."""
    found = item.caption if isinstance(item.caption, list) and lines == "choice" else [item.caption]
    texts = [text for text in found if isinstance(text, str)]
    if lines == "choice":
        texts = [line for text in texts for line in text.splitlines()]
    tidy = (" ".join(text.split()) if item.in_file else text.strip() for text in texts)
    return list(dict.fromkeys(text for text in tidy if text))


def class_of(name: str) -> str:
    """The name of the folder that a picture lies in, without the number of `20_cat`; "" if there is none."""
    return re.sub(r"^\d+_", "", PurePosixPath(name).parent.name).strip()


def _no_caption(item: Item, missing_captions: MissingCaptions) -> tuple[str, str]:
    if missing_captions == "folder":
        return (
            "has no caption and lies in no folder that has a name",
            "move it into one, or write its caption",
        )
    state = "no caption" if item.caption is None else "an empty caption"
    return f"has {state}", f"write the missing captions or {SKIP_OR_EMPTY}"


def _caption_fault(item: Item, lines: CaptionLines) -> tuple[str, str] | None:
    """(problem, remedy) of a caption that is not text."""
    if isinstance(item.caption, list) and lines == "choice":
        faults = (_caption_fault(item._replace(caption=caption), None) for caption in item.caption)
        return next((fault for fault in faults if fault), None)
    if item.caption is None or isinstance(item.caption, str):
        if item.caption and ("\0" in item.caption or not is_unicode(item.caption)):
            return "has a caption with NUL or half a character", "retype the caption"
        return None
    kind = {list: "a list", dict: "an object", bool: "true or false"}.get(type(item.caption), "a number")
    remedy = "write captions as text in quotes"
    if isinstance(item.caption, list):
        remedy += ', or set caption_lines to "choice" for one of a list at each showing'
    return f"has {kind} for a caption: {short(repr(item.caption))}", remedy
