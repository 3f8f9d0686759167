"""The folder of a morph: whose it is, which files are its own, which of its films are finished. No torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.ground.publish import publish_file, remove
from lorakit.pictures.animation import FORMATS

FILM = "film.json"
WITHOUT = "without_lora"  # the folder of the film without LoRAs, in that of the morph
OWN_FILES = (
    *("frames", "state", FILM, WITHOUT, "report.json", "index.html", "sheet.png", "compare.png"),
    *(f"{name}.{kind}" for name in ("morph", "compare") for kind in FORMATS),
)


def claim(cfg: Config, folder: Path, key: str, kind: str = "morph", own: Sequence[str] = OWN_FILES) -> None:
    """Go on with the morph in `folder` if it is the same, or refuse; overwrite=true clears the way.

    Args:
        cfg: has `overwrite`.
        kind: what is in the folder; its record has that name.
        own: the files that make way for another of its kind.

    Raises:
        UserError: another morph is in the folder, or the run of another script.
    """
    record = folder / f"{kind}.json"
    if not record.exists() and (folder / "config.json").exists():
        raise UserError(f"{folder} holds what is no {kind} (a config.json): choose another name")
    try:
        held = json.loads(record.read_text(encoding="utf-8")).get("fingerprint")
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        held = None
    if held != key:
        if (record.exists() or (folder / "frames").exists()) and not getattr(cfg, "overwrite", False):
            raise UserError(
                f"{folder} holds another {kind} (other pictures, LoRAs or settings): replace it with "
                "overwrite=true, or choose another name"
            )
        for name in own:
            remove(folder / name)
    for path in folder.rglob(".*.tmp"):  # of a picture that a killed process was writing
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            remove(path)
    publish_file(record, json.dumps({"fingerprint": key}).encode())
    publish_file(folder / "config.json", (json.dumps(cfg.model_dump(mode="json"), indent=2) + "\n").encode())


# ---- films ----


@dataclass(frozen=True)
class Version:
    """One film of a morph, with its LoRAs or without: where its frames lie, and what making it took.

    Of each picture: mean and deviation of its inverted latents, and how far sampling steps miss its path
    (morphing.State). `fit` and `warnings` are those of endpoints.check_fit.
    """

    positions: list[float]
    noise_mean: list[float]
    noise_std: list[float]
    residual_ratio: list[float]
    evaluations: int
    seconds: float
    attention_bytes: int
    fit: dict[str, list[float]]
    warnings: list[str]

    def frames(self, folder: Path) -> list[Path]:
        return frame_paths(folder / "frames", len(self.positions))

    def save(self, folder: Path) -> None:
        """Vouch for the frames in `folder`: they are all there."""
        publish_file(folder / FILM, json.dumps(asdict(self), allow_nan=False).encode())


def finished_version(folder: Path) -> Version | None:
    """The film in `folder`, if all of its frames are there."""
    try:
        found = Version(**json.loads((folder / FILM).read_bytes()))
        return found if all(path.exists() for path in found.frames(folder)) else None
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None


def frame_paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"{index:04d}.png" for index in range(count)]


def open_frame(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
