"""The page of a folder of pictures: its sheets, each picture with its settings and command. No torch here.

The pictures are those of the folder, which is moved as a whole; inputs, which lie elsewhere, are in the page.
"""

from pathlib import Path
from typing import Any

from lorakit.ground.publish import publish_file
from lorakit.pictures.page import BESIDE, data_uri, page, shell, shown, webp
from lorakit.sampling.gallery import Gallery, Picture

NAMES = {
    "negative_prompt": "negative",
    "scheduler": "sampler",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "strength": "strength",
    "controlnet_conditioning_scale": "control scale",
    "clip_skip": "clip skip",
}
"""Key of a config -> its name among the facts of a picture."""


def write_page(gallery: Gallery, report: dict[str, Any]) -> None:
    """Write index.html beside the pictures; `report` is that of the gallery."""
    publish_file(gallery.folder / "index.html", gallery_page(gallery, report).encode())


def gallery_page(gallery: Gallery, report: dict[str, Any]) -> str:
    """A page for the gallery's own folder."""
    cfg, pictures = gallery.cfg, gallery.pictures
    configs = [each.cfg.model_dump(mode="json") for each in pictures]
    common = {key: value for key, value in configs[0].items() if all(each[key] == value for each in configs)}
    tables = gallery.tables()
    data = {
        "pictures": [
            {
                "file": gallery.file(number),
                "path": shell([str(gallery.folder / gallery.file(number))]),
                "subject": each.subject,
                "prompt": each.prompt,
                "facts": _facts(gallery, each),
                "size": each.image.size,
                "ways": each.ways,
                "config": {key: value for key, value in config.items() if key not in common},
            }
            for number, (each, config) in enumerate(zip(pictures, configs, strict=True))
        ],
        "tables": [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in tables],
        "leads": [
            [{"label": label, "uri": data_uri(webp(image))} for label, image in lead]
            for lead in gallery.leads
        ],
        "definitions": {key.replace("_", " "): text for key, text in report.get("definitions", {}).items()},
        "common": common,
        "again": f"python {cfg.script} --from ",
    }
    base = Path(cfg.pretrained_model_name_or_path).name
    summary = f"{len(pictures)} picture{'s' * (len(pictures) > 1)} · {base} · {report['seconds']:.0f} s"
    lead = gallery.leads[0][0][0] if gallery.leads else ""
    return page(Path(__file__).with_suffix(""), cfg.name, summary, {"before": lead}, data, sources=BESIDE)


def _facts(gallery: Gallery, picture: Picture) -> dict[str, str]:
    """What a reader wants to know of a picture first, by name."""
    config = picture.cfg.model_dump(mode="json")
    rows: dict[str, Any] = {}
    if gallery.leads:
        rows["input"] = gallery.subjects[picture.subject]
    rows["prompt"] = picture.prompt
    rows["LoRA"] = [f"{Path(lora.path).stem} × {lora.weight:g}" for lora in picture.cfg.loras]
    rows |= {name: config.get(key) for key, name in NAMES.items()}
    rows |= {"seed": picture.seed, "size": "{}x{}".format(*picture.image.size)}
    told = {key: value for key, value in picture.facts.items() if key != "line"}  # is in its config
    rows |= {key.replace("_", " "): value for key, value in told.items()}
    return {name: shown(value) for name, value in rows.items() if value not in (None, "", [])}
