"""The checked pictures of a config: of a folder, of a Hugging Face dataset, or clips. No torch here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.ground.errors import UserError
from lorakit.pictures.folder import Table, read_folder, read_rows
from lorakit.pictures.inspection import file_marks
from lorakit.pictures.wording import with_repeats, with_wording
from lorakit.training.motion_config import read_films


def cache_dir(cfg: Any) -> Path:
    """The folder of a config's caches."""
    return Path(cfg.cache_dir or Path(cfg.output_dir) / "cache")


def folder_options(cfg: Any) -> dict[str, Any]:
    """What `read_folder` is given of a config."""
    keys = (
        "caption_column",
        "caption_extension",
        "caption_lines",
        "missing_captions",
        "broken_images",
        "allow_symlinks",
        "max_image_pixels",
        "max_aspect",
    )
    more = {"masks": cfg.masked_loss == "beside", "remember_in": cache_dir(cfg) / "seen"}
    return {key: getattr(cfg, key) for key in keys} | more


def read_table(cfg: Any) -> Table:
    """The checked rows of `data_dir`, of `dataset_name` or of motion.clips_dir."""
    folder = cfg.data_dir or (cfg.motion and cfg.motion.clips_dir)
    if folder is not None:
        return _worded(cfg, with_repeats(_read_rows(cfg, folder), cfg.repeats))
    options = folder_options(cfg)
    for key in ("caption_column", "caption_extension", "allow_symlinks", "masks"):
        del options[key]
    return _worded(cfg, read_rows(_dataset_records(cfg), **options))


def read_validation(cfg: Any) -> Table | None:
    """Those of `validation_data_dir`, if there is one."""
    return _worded(cfg, _read_rows(cfg, cfg.validation_data_dir)) if cfg.validation_data_dir else None


def _read_rows(cfg: Any, folder: str) -> Table:
    """The pictures of a folder, or its clips where it is clips that are trained on."""
    if cfg.motion and cfg.motion.clips_dir:
        return read_films(cfg, folder, **folder_options(cfg))
    return read_folder(Path(folder), **folder_options(cfg))


def _worded(cfg: Any, table: Table) -> Table:
    return with_wording(
        table,
        shuffle=cfg.caption_shuffle,
        keep_tokens=cfg.keep_tokens,
        orders=cfg.caption_orders,
        trigger=cfg.trigger_word,
    )


def _load_dataset(cfg: Any) -> Any:
    """One split of a Hugging Face dataset, from a folder that save_to_disk wrote or through its builder."""
    import datasets

    datasets.disable_progress_bars()
    saved = [Path(cfg.dataset_name) / name for name in ("dataset_info.json", "dataset_dict.json")]
    if not any(path.exists() for path in saved):
        return datasets.load_dataset(cfg.dataset_name, cfg.dataset_config_name, split=cfg.dataset_split)
    dataset = datasets.load_from_disk(cfg.dataset_name)
    return dataset[cfg.dataset_split] if isinstance(dataset, datasets.DatasetDict) else dataset


class _Picture(NamedTuple):
    """A picture of a data set, fetched when it is called; `files` are the marks of all that it lies in."""

    pictures: Any
    column: str
    number: int
    files: str | None

    def __call__(self) -> bytes:
        image: dict[str, Any] = self.pictures[self.number][self.column] or {"bytes": b""}
        return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]

    def marks(self) -> tuple[object, ...] | None:
        return None if self.files is None else (self.files, self.column, self.number)


def _dataset_records(cfg: Any) -> Iterator[tuple[str, _Picture, Any]]:
    """(name, picture, caption) of each row of a Hugging Face dataset, whose pictures stay on the disk."""
    import datasets

    where = f"dataset_name {cfg.dataset_name}"
    try:
        dataset = _load_dataset(cfg)
    except Exception as error:  # each builder raises its own kinds
        raise UserError(f"{where}: cannot be loaded: {str(error).splitlines()[0]}") from None
    caption = cfg.caption_column or "text"
    missing = [name for name in (cfg.image_column, caption) if name not in dataset.column_names]
    if missing:
        raise UserError(
            f"{where}: no column {' or '.join(missing)} (image_column, caption_column); its columns are "
            f"{', '.join(dataset.column_names)}"
        )
    try:
        pictures = dataset.select_columns([cfg.image_column])
        pictures = pictures.cast_column(cfg.image_column, datasets.Image(decode=False))
    except Exception as error:  # arrow and datasets raise their own kinds
        raise UserError(f"{where}: image_column {cfg.image_column} holds no pictures ({error})") from None

    files = _marks(pictures, cfg.image_column)
    for number, record in enumerate(dataset.select_columns([caption])):
        yield f"row {number}", _Picture(pictures, cfg.image_column, number, files), record[caption]


def _marks(pictures: Any, column: str) -> str | None:
    """Of the files that hold the pictures of a data set; None where some lie in files of their own."""
    alone = sum(chunk.field("bytes").null_count for chunk in pictures.data.column(column).chunks)
    marks = [file_marks(file["filename"]) for file in pictures.cache_files]
    if alone or not marks or None in marks:
        return None
    return f"{pictures._fingerprint} {marks}"
