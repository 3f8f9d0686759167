"""Pictures of the class that a subject is one of (DreamBooth): given, or made by the base once and cached.

torch is imported where pictures are made.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.ground.errors import UserError
from lorakit.ground.publish import publish_file
from lorakit.pictures.folder import Table, read_folder
from lorakit.pictures.images import save_png
from lorakit.weights.base import BaseInfo
from lorakit.weights.identity import base_record, changes
from lorakit.weights.part_files import read_json

if TYPE_CHECKING:
    from lorakit.diffusion.models import Base

RECORD = "class.json"  # beside pictures that were made: what they were made with
ROWS = 4  # pictures made in one batch


def shows_class(cfg: Any) -> bool:
    """Whether pictures say what must stay, and not prompts."""
    return cfg.prior is not None and bool(cfg.prior.class_data_dir or cfg.prior.class_prompt)


def given_pictures(cfg: Any, base: BaseInfo, **options: Any) -> Table | None:
    """The checked pictures of prior.class_data_dir; None without it.

    Args:
        options: of folder.read_folder.

    Raises:
        DataError: as read_folder.
        UserError: they were made by another base.
    """
    if cfg.prior is None or cfg.prior.class_data_dir is None:
        return None
    folder = Path(cfg.prior.class_data_dir)
    if base.known and (folder / RECORD).is_file():
        made = read_json(folder / RECORD).get("base", {})
        lines = changes(made, base_record(base)) if made.keys() == base_record(base).keys() else ["base"]
        if lines:
            raise UserError(
                f"prior.class_data_dir: {folder} holds pictures that another base made ({lines[0]}); set "
                "prior.class_prompt without class_data_dir, and this base makes its own"
            )
    return _read(folder, cfg.prior.class_prompt, **options)


def _read(folder: Path, caption: str | None, **options: Any) -> Table:
    """The pictures of a folder, all with one caption where it is given."""
    if caption is None:
        return read_folder(folder, **options)
    options = {**options, "missing_captions": "empty"}
    table = read_folder(folder, **options)
    rows = tuple(replace(row, caption=caption, others=()) for row in table.rows)
    return Table(rows, (), "prior.class_prompt")


def class_record(cfg: Any, resolution: int, table: Table | None) -> Any:
    """What decides which pictures show the class, but for the base; None where none do."""
    if table is not None:
        return table.fingerprint
    if not shows_class(cfg):
        return None
    return {
        "prompt": cfg.prior.class_prompt,
        "resolution": resolution,
        "steps": cfg.sample_inference_steps,
        "guidance_scale": cfg.sample_guidance_scale,
        "prediction_type": cfg.prediction_type,
        "clip_skip": cfg.clip_skip,
    }


def make_pictures(
    cfg: Any,
    base: "Base",
    resolution: int,
    cache_dir: Path,
    merged: Any,
    accelerator: Any,
    between: Callable[[], None],
) -> Table:
    """Pictures of prior.class_prompt from the base as it stands, those of them that are not cached yet.

    Picture i has the noise of seed i. Every process makes its share; `between` is called after each batch.

    Args:
        merged: JSON of what is merged into the base.
    """
    from tqdm import tqdm

    record = {**class_record(cfg, resolution, None), "base": base_record(base.info), "merged": merged}
    text = json.dumps(record, indent=1, sort_keys=True)
    folder = cache_dir / "class" / hashlib.sha256(text.encode()).hexdigest()[:40]
    folder.mkdir(parents=True, exist_ok=True)
    publish_file(folder / RECORD, text.encode())
    paths = [folder / f"{number:05d}.png" for number in range(cfg.prior.class_images)]
    shares = [(accelerator.num_processes, accelerator.process_index), (1, 0)]  # a folder need not be shared
    for every, place in shares:
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        own = [number for number in missing if number % every == place]
        quiet = not own or not accelerator.is_main_process
        with tqdm(total=len(own), desc="making class pictures", disable=quiet) as bar:
            for start in range(0, len(own), ROWS):
                _make(cfg, base, resolution, {seed: paths[seed] for seed in own[start : start + ROWS]})
                bar.update(len(own[start : start + ROWS]))
                between()
        accelerator.wait_for_everyone()
    table = _read(folder, cfg.prior.class_prompt)
    return replace(table, rows=table.rows[: cfg.prior.class_images])


def _make(cfg: Any, base: "Base", resolution: int, paths: dict[int, Path]) -> None:
    """Pictures by seed, made in one batch."""
    from lorakit.diffusion.models import evaluating
    from lorakit.sampling.samplers import encode_prompts, sample_images

    with evaluating(base.unet):
        embeds = encode_prompts(base, [cfg.prior.class_prompt, ""])
        images = sample_images(
            base,
            embeds[:1],
            embeds[1:],
            seeds=list(paths),
            shape=(resolution, resolution),
            steps=cfg.sample_inference_steps,
            guidance_scale=cfg.sample_guidance_scale,
        )
    for path, image in zip(paths.values(), images, strict=True):
        save_png(image, path)
