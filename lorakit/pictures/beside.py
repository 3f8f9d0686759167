"""The caption that lies beside a picture, and what of it says the style and not the scene. No torch here."""

import json
import re
from pathlib import Path

from lorakit.ground.errors import UserError
from lorakit.pictures.captions import METADATA

_KINDS = (
    "artwork|cartoon|collage|comic|drawing|engraving|etching|illustration|image|mosaic|painting|photo|photograph"
    "|picture|pixel art|poster|print|render|rendering|sketch|snapshot|stained glass(?: window)?|watercolou?r"
    "|woodcut"
)
_WORD = r"(?:black and white|(?!(?:an?|and|at|in|of|on|the|with)\b)[\w-]+)\s+"
_STYLE = rf"(?:(?:an?|the)\s+)?(?:{_WORD}){{0,3}}?(?:{_KINDS})"
_OF = re.compile(rf"{_STYLE}\s+(?:of|showing)\s+", re.IGNORECASE)
_TAG = re.compile(_STYLE, re.IGNORECASE)


def caption_beside(path: str | Path) -> tuple[str, str]:
    """The caption of a picture and the name of the file that has it; both empty where there is none.

    It stands in metadata.jsonl of the picture's folder, or in a .txt or .caption of its name.

    Raises:
        UserError: a line of metadata.jsonl is no JSON object, or a file is no UTF-8 text.
    """
    path = Path(path)
    listed = path.parent / METADATA
    if listed.is_file():
        for number, line in enumerate(_text(listed).split("\n"), 1):
            if line.strip() and (caption := _of_line(line, path.name, f"{listed}:{number}")):
                return caption, METADATA
    for suffix in (".txt", ".caption"):
        own = path.with_suffix(suffix)
        if own.is_file() and (caption := " ".join(_text(own).split())):
            return caption, own.name
    return "", ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def _of_line(line: str, name: str, where: str) -> str:
    """The caption of a line of metadata.jsonl if it is that of the picture `name`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); write one object on each line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object; write one on each line")
    texts = [text for key, text in record.items() if key != "file_name" and isinstance(text, str)]
    caption = record.get("text", texts[0] if len(texts) == 1 else None)
    return caption.strip() if record.get("file_name") == name and isinstance(caption, str) else ""


def without_style(caption: str) -> str:
    """What a picture shows: “a photo of a lake” -> “a lake”; tags that name a style alone go too."""
    caption = _OF.sub("", caption.strip(), count=1) if _OF.match(caption.strip()) else caption.strip()
    tags = [tag.strip() for tag in caption.split(",")]
    return ", ".join(tag for tag in tags if tag and not _TAG.fullmatch(tag))
