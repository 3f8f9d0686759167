"""The page for looking at a morph: one HTML file with everything in it. Imports no torch."""

import html
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from lorakit.pictures.page import as_json, data_uri, finite, page, shown

_SPEEDS = (2, 4, 8, 12, 24)  # frames a second to choose from


def morph_page(
    title: str,
    frames: Sequence[bytes],
    report: Mapping[str, Any],
    *,
    other: Sequence[bytes] = (),
    label: str = "with LoRA",
    other_label: str = "without LoRA",
    inputs: Sequence[bytes] = (),
) -> str:
    """A self-contained page: slider and playback, speed and sharpness curves, metrics, settings.

    Args:
        frames: encoded PNG, WebP or JPEG.
        report: as in report.json: `frames` (alpha, segment, sharpness of each), `distances` between
            neighbours, `metrics`, `definitions`, `images`, `settings`, `unet_evaluations`, `seconds`. What
            is missing is not shown. `other` may hold the same of the second morph.
        other: the same morph made another way, frame by frame.
        inputs: the pictures themselves, in the order of `images`; else the frames nearest to them stand in.
    """
    assert frames, "a page without frames"
    assert len(other) in (0, len(frames)), f"{len(frames)} frames beside {len(other)}"
    second = report.get("other") or {}
    definitions = report.get("definitions") or {}
    rows = _rows(report, len(frames))
    texts = {
        "label": html.escape(label),
        "other_label": html.escape(other_label),
        "stage_class": "two" if len(report.get("images") or ()) == 2 else "",
        "inputs": _inputs(report.get("images") or (), rows, frames, inputs),
        "metrics": _metrics(
            report.get("metrics") or {}, second.get("metrics"), definitions, label, other_label
        ),
        "distance_definition": html.escape(str(definitions.get("distance", ""))),
        "sharpness_definition": html.escape(str(definitions.get("sharpness", ""))),
        "settings": as_json(report.get("settings") or {}),
    }
    data = _data(report, rows, frames, other) | {"label": label, "other_label": other_label}
    return page(Path(__file__).with_suffix(""), title, _summary(report, len(frames)), texts, data)


def _data(
    report: Mapping[str, Any], rows: list[dict[str, Any]], frames: Sequence[bytes], other: Sequence[bytes]
) -> dict[str, Any]:
    """What the script of the page reads."""
    settings, second = report.get("settings") or {}, report.get("other") or {}
    fps = finite(settings.get("fps")) or 8
    return {
        "frames": [data_uri(frame) for frame in frames],
        "other": [data_uri(frame) for frame in other],
        "rows": rows,
        "other_rows": _rows(second, len(frames)),
        "segments": 1 + max((row["segment"] or 0) for row in rows),
        "distances": _distances(report, len(frames)),
        "other_distances": _distances(second, len(frames)),
        "speeds": sorted({*_SPEEDS, fps}),
        "speed": fps,
        "loop": settings.get("loop") is True,
    }


def _rows(report: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """alpha, segment and sharpness of each frame; None where the report has none."""
    given = [row for row in report.get("frames") or () if isinstance(row, Mapping)]
    given = (given + [{}] * count)[:count]
    return [{key: finite(row.get(key)) for key in ("alpha", "segment", "sharpness")} for row in given]


def _distances(report: Mapping[str, Any], count: int) -> list[float | None]:
    return [finite(value) for value in (report.get("distances") or ())][: count - 1]


def _summary(report: Mapping[str, Any], count: int) -> str:
    parts = [f"{count} frame{'s' * (count > 1)}"]
    if (evaluations := finite(report.get("unet_evaluations"))) is not None:
        parts.append(f"{evaluations:,} U-Net evaluations")
    if (seconds := finite(report.get("seconds"))) is not None:
        parts.append(f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min")
    return " · ".join(parts)


def _inputs(
    images: Sequence[Mapping[str, Any]],
    rows: list[dict[str, Any]],
    frames: Sequence[bytes],
    inputs: Sequence[bytes],
) -> str:
    """A card for each picture, which jumps to the frame that is nearest to it."""
    if any(row["alpha"] is None for row in rows):
        places = [float(i) for i in range(len(rows))]
        places = [place * max(1, len(images) - 1) / max(1, len(rows) - 1) for place in places]
    else:
        places = [(row["segment"] or 0) + row["alpha"] for row in rows]
    cards = []
    for k, (image, picture) in enumerate(zip_longest(images, inputs[: len(images)])):
        frame = min(range(len(rows)), key=lambda i: abs(places[i] - k))
        path, prompt, lora = (html.escape(str(image.get(key) or "")) for key in ("path", "prompt", "lora"))
        name = html.escape(PurePath(str(image.get("path") or f"picture {k + 1}")).name)
        adapter = f"LoRA {html.escape(PurePath(str(image.get('lora'))).stem)}" if lora else "no LoRA"
        cards.append(
            f'<figure><button type="button" data-frame="{frame}" title="{path}" '
            f'aria-label="{name}: go to frame {frame}">'
            f'<img src="{data_uri(picture or frames[frame])}" alt=""></button>'
            f"<figcaption><b>{name}</b>"
            + (f"<br>“{prompt}”" if prompt else "")
            + f'<br><span class="soft" title="{lora}">{adapter}</span></figcaption></figure>'
        )
    return "".join(cards)


def _metrics(
    metrics: Mapping[str, Any],
    other: Mapping[str, Any] | None,
    definitions: Mapping[str, Any],
    label: str,
    other_label: str,
) -> str:
    """The table of metrics, each with its definition; with a second column if there is a second morph."""
    if not metrics:
        return ""
    columns = [(label, metrics)] + ([(other_label, other)] if other else [])
    head = "".join(f'<th scope="col">{html.escape(name if other else "")}</th>' for name, _ in columns)
    body = ""
    for key in metrics:
        definition = html.escape(str(definitions.get(key, "")))
        body += f'<tr><th scope="row">{html.escape(key.replace("_", " "))}<small>{definition}</small></th>'
        body += "".join(f"<td>{html.escape(shown(values.get(key)))}</td>" for _, values in columns) + "</tr>"
    return (
        "<section><h2>Metrics</h2><table><thead><tr><th></th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></section>"
    )
