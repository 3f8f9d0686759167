"""Pages to look at: one template and its parts, files that load nothing from elsewhere. No torch here.

The kind of a page is three files beside the module that makes it and named as that is: NAME.html its body,
NAME.css, and NAME.js, which has the parts of page.js here: reel, chart, divider and command.
"""

import base64
import html
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

_OWN = Path(__file__).with_suffix("")
_MAGIC = {b"\x89PNG": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg"}
_MARKER = re.compile(r"\{\{(\w+)\}\}")
BESIDE = " 'self' file:"
"""Sources of a page that shows pictures of its own folder; `self` is a server that shows the folder."""


def page(
    kind: Path, title: str, summary: str, texts: Mapping[str, str], data: object, *, sources: str = ""
) -> str:
    """A page of the kind `kind`, the path of its files without a suffix.

    Args:
        title, summary: text.
        texts: HTML for the markers of NAME.html, such as {{metrics}}; what a user wrote is escaped in it.
        data: what the script reads as `data`, JSON.
        sources: of pictures besides those that the page holds: BESIDE, or none.
    """
    parts = {
        name: "\n".join(each.with_suffix(f".{name}").read_text(encoding="utf-8") for each in (_OWN, kind))
        for name in ("css", "js")
    }
    body = kind.with_suffix(".html").read_text(encoding="utf-8")
    whole = {"body": body, "style": parts["css"], "script": parts["js"], "sources": sources}
    skeleton = _filled(_OWN.with_suffix(".html").read_text(encoding="utf-8"), whole)
    own = {"title": html.escape(title), "summary": html.escape(summary), "data": script_json(data)}
    # In one pass, so that nothing in a user's text is taken for a marker.
    return _filled(skeleton, own | dict(texts))


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _MARKER.sub(lambda match: values.get(match[1], match[0]), text)


def script_json(data: object) -> str:
    """JSON in which nothing can end the script element or begin a comment in it."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def data_uri(picture: bytes) -> str:
    """An encoded PNG, WebP or JPEG as an address."""
    kind = next((kind for magic, kind in _MAGIC.items() if picture.startswith(magic)), None)
    assert kind, f"neither PNG, WebP nor JPEG: {picture[:8]!r}"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def webp(image: Image.Image, side: int | None = None) -> bytes:
    """A picture as a page holds it, its longer side at most `side` pixels."""
    if side and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=92)
    return buffer.getvalue()


def finite(value: Any) -> float | None:
    """The finite number, else None: JSON has neither NaN nor infinity."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


# ---- parts in HTML; page.js has those that move ----


def as_json(values: Any) -> str:
    """What stands in a <pre>: a config as JSON."""
    return html.escape(json.dumps(values, indent=2, ensure_ascii=False))


def facts(rows: Mapping[str, Any]) -> str:
    """A table of names and values."""
    lines = (
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(shown(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f'<table class="facts"><tbody>{"".join(lines)}</tbody></table>'


def command(text: str) -> str:
    """A command with a button that copies it."""
    return (
        f'<div class="command"><pre tabindex="0">{html.escape(text)}</pre>'
        '<button type="button">Copy</button></div>'
    )


def setting(key: str, value: Any) -> str:
    """`key=value` as a script reads it: JSON, or a text as it stands where it is not taken for JSON."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            text = value
    return f"{key}={text}"


def shell(words: Sequence[str]) -> str:
    """A command line to paste; a setting is quoted behind its key."""

    def quoted(word: str) -> str:
        key, equals, value = word.partition("=")
        is_setting = equals and key.replace(".", "_").isidentifier()
        return f"{key}={shlex.quote(value)}" if is_setting else shlex.quote(word)

    return " ".join(map(quoted, words))


def shown(value: Any) -> str:
    """A value as a reader wants it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "∞" if value > 0 else "not a number"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
