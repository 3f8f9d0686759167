"""The one page on which the demo ends: its film, what each LoRA does, what was made. Imports no torch."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit.pictures.page import command, data_uri, facts, page, webp


@dataclass(frozen=True)
class Row:
    """A photograph and what the base draws of its caption: the photograph first, one with its LoRA last."""

    title: str
    caption: str
    pictures: Sequence[Image.Image]
    labels: Sequence[str]


def demo_page(
    rows: Sequence[Row],
    frames: Sequence[bytes],
    *,
    made: Mapping[str, str],
    times: Mapping[str, float],
    commands: Mapping[str, str],
) -> str:
    """A page with everything in it but the pages that it links to, which lie beside it.

    Args:
        frames: encoded PNG, WebP or JPEG.
        made: file -> what it is; one without a folder lies beside the page, and is linked.
        times: seconds by what they were for.
        commands: by what they are for.
    """
    texts = {
        "count": str(len(frames)),
        "made": f'<ul class="made">{"".join(_entry(*each) for each in made.items())}</ul>',
        "times": facts({name: f"{seconds:.0f} s" for name, seconds in times.items()}),
        "commands": "".join(f"<p>{html.escape(name)}</p>{command(text)}" for name, text in commands.items()),
    }
    data: dict[str, Any] = {
        "frames": [data_uri(frame) for frame in frames],
        "rows": [
            {
                "title": row.title,
                "caption": row.caption,
                "pictures": [data_uri(webp(image)) for image in row.pictures],
                "labels": list(row.labels),
            }
            for row in rows
        ],
    }
    summary = "two photographs, a LoRA for each, a film from one to the other"
    return page(Path(__file__).with_suffix(""), "The demo", summary, texts, data)


def _entry(name: str, what: str) -> str:
    label = html.escape(name)
    is_beside = "/" not in name
    shown = f'<a href="{label}">{label}</a>' if is_beside else f"<b>{label}</b>"
    return f'<li>{shown}<br><span class="soft">{html.escape(what)}</span></li>'
