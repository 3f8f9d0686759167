"""What can be said of a base model from its files, without loading it and without torch.

A base is a diffusers folder, a single `.safetensors` file, or a hub id. Everything that depends on the size
of the model (VAE factor, latent size, token length) is read from its configs here, never assumed.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

from lorakit.weights import hub
from lorakit.weights.base_checks import check_fit, config_value, refuse_other_models
from lorakit.weights.part_files import (
    WEIGHTS,
    BaseError,
    Places,
    folder_places,
    read_json,
    read_shapes,
    shards,
    weights_file,
)
from lorakit.weights.published import completed, family_configs
from lorakit.weights.single_file import Configs, file_places, published_configs, what_else
from lorakit.weights.tensors import Shapes

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CONFIG_FILES = {
    part: f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"
    for part in ("unet", "vae", "text_encoder", "scheduler")
}
LARGE = 500_000_000  # parameters
PIECE = 16 << 20  # bytes that are hashed at a time
_INSTEAD = "name a local folder or file instead; the embedded base is ckpt/miniature"
_READ_HERE = "name a whole folder of Stable Diffusion 1.x or 2.x"


@dataclass(frozen=True)
class BaseInfo:
    """A base model as its files describe it.

    `vae_factor` is pixels per latent, `size_multiple` the pixels that width and height must divide by so that
    every level of the U-Net halves evenly, `resolution` the side in pixels that the base was trained at. The
    values of Stable Diffusion 1.5 stand in where the files are not on this machine yet (`known` is False).
    `configs` are complete: what a file leaves out is what its class fills in. `files` has the weights of each
    part; `tokenizer` is its folder, None for CLIP's own with `pad_token`. `notes` are what users should know.
    """

    name: str
    kind: Literal["folder", "file", "hub"]
    root: Path | None = None
    known: bool = False
    vae_factor: int = 8
    size_multiple: int = 64
    resolution: int = 512
    latent_channels: int = 4
    max_tokens: int = 77
    cross_attention_dim: int = 768
    prediction_type: str = "epsilon"
    configs: Configs = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    tokenizer: Path | None = None
    pad_token: str = "<|endoftext|>"
    notes: tuple[str, ...] = ()

    @property
    def is_large(self) -> bool:
        """Whether memory counts more than the small costs of saving it: Stable Diffusion as published."""
        return sum(self.parameters.values()) > LARGE

    def places(self, part: str) -> Places:
        """Where each tensor of a part lies, by its name in today's diffusers and transformers.

        Raises:
            BaseError: a file is missing or not whole.
        """
        path = self.files[part]
        if self.kind == "file":
            return file_places(path, part, read_shapes(path), self.configs)
        return folder_places(path, part)

    def shapes(self, part: str) -> Shapes:
        """The shape of each tensor of a part, by its name of today."""
        return {name: place.shape for name, place in self.places(part).items()}


def inspect_base(name: str, base_config: str | None = None, prediction_type: str | None = None) -> BaseInfo:
    """Describe the base `name`.

    Args:
        base_config: a diffusers folder whose configs and tokenizer a single file is read with; None: those
            that were published with its family.
        prediction_type: what the U-Net predicts; None: as the base says.

    Raises:
        BaseError: no such folder or file, a part missing, pickled weights only, weights that are cut short or
            a git-LFS pointer, another kind of model or file, or a hub id that no longer exists.
        OutputError: weights that cannot be read.
    """
    path = Path(name)
    if path.is_file():
        info = _inspect_file(name, path, base_config, prediction_type)
    elif base_config is not None:
        raise BaseError(f"base_config: {name} has configs of its own; leave base_config out")
    elif path.is_dir():
        info = _inspect_folder(name, path)
    elif not hub.is_id(name):
        raise BaseError(f"{name}: no such folder or file (paths are relative to {Path.cwd()})")
    else:
        info = _inspect_hub(name)
    return replace(info, prediction_type=prediction_type) if prediction_type and info.known else info


def fetch_base(info: BaseInfo, prediction_type: str | None = None) -> BaseInfo:
    """A hub base once its files are here; what cannot be used is refused before its weights are fetched.

    Raises:
        BaseError: it cannot be fetched, or is none of Stable Diffusion 1.x and 2.x.
    """
    names = hub.list_files(info.name, _INSTEAD)
    files = hub.used_files(info.name, names)
    _read_configs(info.name, hub.download(info.name, hub.small_files(names), _INSTEAD))
    root = hub.download(info.name, files, _INSTEAD)
    found = _inspect_folder(info.name, root, "hub")
    return replace(found, prediction_type=prediction_type) if prediction_type else found


def _inspect_hub(name: str) -> BaseInfo:
    root = hub.cached(name)
    lost = hub.missing_files(root) if root else []
    if root and not lost:
        return _inspect_folder(name, root, "hub")
    hub.refuse_gone(name, lost)
    lack = f"the cache lacks {', '.join(lost)}" if root else hub.NOT_HERE
    return BaseInfo(name, "hub", notes=(f"{name}: {lack}: fetched from the hub when work starts",))


def _inspect_file(name: str, path: Path, base_config: str | None, prediction_type: str | None) -> BaseInfo:
    if path.suffix != ".safetensors":
        raise BaseError(f"{name}: a single-file base must be .safetensors; pickled checkpoints are not read")
    shapes = read_shapes(path)
    if other := what_else(shapes):
        raise BaseError(f"{name}: {other}")
    tokenizer, notes, where = None, [], dict.fromkeys(CONFIG_FILES, path)
    if base_config is None:
        configs, notes = published_configs(path, shapes, prediction_type)
    else:
        folder = Path(base_config)
        if not folder.is_dir():
            raise BaseError(f"base_config {base_config}: no such folder; name a diffusers folder")
        configs = _read_configs(base_config, folder) | {"tokenizer": family_configs("sd1")["tokenizer"]}
        tokenizer = folder / "tokenizer"
        where = {part: folder / file for part, file in CONFIG_FILES.items()}
    pad_token = configs.pop("tokenizer")["pad_token"]
    configs = {part: completed(part, config) for part, config in configs.items()}
    files = dict.fromkeys(WEIGHTS, path)
    info = describe_base(name, "file", None, configs, files, where)
    return replace(info, tokenizer=tokenizer, pad_token=pad_token, notes=tuple(notes))


def _inspect_folder(name: str, root: Path, kind: Literal["folder", "hub"] = "folder") -> BaseInfo:
    missing = [part for part in COMPONENTS if not (root / part).is_dir()]
    if missing:
        lost = f"not a diffusers folder; without {', '.join(missing)}/"
        raise BaseError(f"{name}: {_looks_like(root) or lost}")
    tokenizer = {path.name for path in (root / "tokenizer").iterdir()}
    if "tokenizer.json" not in tokenizer and not {"vocab.json", "merges.txt"} <= tokenizer:
        raise BaseError(f"{root / 'tokenizer'}: neither tokenizer.json nor vocab.json with merges.txt")
    configs = _read_configs(name, root)
    files = {part: weights_file(root, part) for part in WEIGHTS}
    where = {part: root / file for part, file in CONFIG_FILES.items()}
    info = describe_base(name, kind, root, configs, files, where)
    half = [part for part, path in files.items() if ".fp16." in path.name]
    notes = [f"{name}: of {', '.join(half)} only half-precision weights (fp16) are here"] if half else []
    return replace(info, tokenizer=root / "tokenizer", notes=tuple(notes))


def _looks_like(root: Path) -> str | None:
    """What a folder is that is no base, with the remedy."""
    if (root / "metrics.jsonl").exists():
        return "a LoRA run folder; name the base that it was trained on"
    if (root / "adapter_config.json").exists():
        return "a folder of PEFT's, with a LoRA; give it as a LoRA beside the base that it is made for"
    for file in ("model_index.json", "config.json"):
        kind = read_json(root / file).get("_class_name") if (root / file).exists() else None
        if isinstance(kind, str) and not re.match("StableDiffusion(?!XL|3)", kind):
            other = "give it as controlnet in style_transfer.py" if kind == "ControlNetModel" else _READ_HERE
            return f"holds {'an' if kind[:1] in 'AEIOU' else 'a'} {kind} alone; {other}"
    files = sorted(path.name for path in root.glob("*.safetensors"))
    return f"not a diffusers folder; if its {files[0]} is the base, name that file" if files else None


def _read_configs(name: str, root: Path) -> Configs:
    """The completed configs of a folder's parts.

    Raises:
        BaseError: one is missing, or is of another kind of model.
    """
    where = {part: root / file for part, file in CONFIG_FILES.items()}
    configs = {part: completed(part, read_json(file)) for part, file in where.items()}
    refuse_other_models(name, where, configs)
    return configs


def describe_base(
    name: str,
    kind: Literal["folder", "file", "hub"],
    root: Path | None,
    configs: Configs,
    files: dict[str, Path],
    where: Mapping[str, Path],
) -> BaseInfo:
    """The sizes that follow from the completed configs of a base's parts, and the counts from its weights.

    Args:
        where: the file of each config, for messages.

    Raises:
        BaseError: configs of another kind of model, or that do not fit the weights.
    """
    value = partial(config_value, where, configs)
    factor = 2 ** (len(value("vae", "block_out_channels", list)) - 1)
    levels = 2 ** (len(value("unet", "block_out_channels", list)) - 1)
    value("vae", "scaling_factor", float)
    if kind == "file":  # by which its tensors are named
        value("unet", "layers_per_block", int)
        value("text_encoder", "num_hidden_layers", int)
    configs["unet"]["sample_size"] = configs["unet"]["sample_size"] or 64  # as diffusers' pipelines take it
    info = BaseInfo(
        name=name,
        kind=kind,
        root=root,
        known=True,
        vae_factor=factor,
        size_multiple=factor * levels,
        resolution=value("unet", "sample_size", int) * factor,
        latent_channels=value("unet", "in_channels", int),
        max_tokens=value("text_encoder", "max_position_embeddings", int),
        cross_attention_dim=value("unet", "cross_attention_dim", int),
        prediction_type=value("scheduler", "prediction_type", str),
        configs=configs,
        files=files,
    )
    shapes = {part: info.shapes(part) for part in files}
    check_fit(shapes, configs, where)
    counts = {part: sum(map(math.prod, own.values())) for part, own in shapes.items()}
    return replace(info, parameters=counts)


def weights_hash(path: Path) -> str:
    """sha256 over the content of a weights file (of every shard, for an index)."""
    paths = [path] if path.suffix == ".safetensors" else [path, *shards(path)]
    digest = hashlib.sha256()
    for each in paths:
        status = each.stat()
        digest.update(_file_hash(each, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> bytes:
    """Of the hashes of its pieces, on all cores, once per process and state of the file: seconds for 4 GB."""

    def piece(start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PIECE)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(piece, range(0, size, PIECE)))).digest()
