"""Going on from LoRAs: one whose change a run starts with, others that are merged into the frozen base."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.diffusion import lora
from lorakit.diffusion.merged import Merged
from lorakit.diffusion.text import dropped
from lorakit.ground.errors import UserError
from lorakit.training.config import TrainConfig
from lorakit.training.lcm_config import teacher_loras
from lorakit.training.motion_config import adapter_of
from lorakit.training.setup import Learner
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.base_settings import text_layers
from lorakit.weights.lora_file import (
    TARGET_PRESETS,
    LoraPair,
    component_of,
    ends_in,
    refuse_vectors,
    unflatten,
)
from lorakit.weights.lora_import import read_any
from lorakit.weights.lora_metadata import Component
from lorakit.weights.merging import check_places
from lorakit.weights.tensors import Shapes

Modules = Mapping[str, LoraPair]


def settled(cfg: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The config with rank, alpha and targets of its init_lora where it sets none, and what is to be said.

    Raises:
        UserError: a file cannot be read, does not fit the base, or does not fit what the config sets.
    """
    base = inspect_base(cfg.pretrained_model_name_or_path, cfg.base_config, cfg.prediction_type)
    notes = []
    for entry in cfg.base_loras:
        file, own = read_any(Path(entry.path))
        _check(file.modules, base, entry.path)
        if any(pair.magnitude is not None for pair in file.modules.values()):
            raise UserError(f"base_loras: {entry.path} is DoRA, which is not merged: name plain LoRAs")
        notes += [f"{entry.path}: {note}" for note in own]
        if not any(pair.scale for pair in file.modules.values()):
            notes.append(f"base_loras: {entry.path} has alpha 0, so that it changes nothing")
    for entry in teacher_loras(cfg):
        file, own = read_any(Path(entry.path))
        _check(file.modules, base, entry.path)
        if any(component_of(name) == "text_encoder" for name in file.modules):
            raise UserError(
                f"lcm.teacher_loras: {entry.path} changes the text encoder too, which teacher and student "
                "share: name LoRAs of the U-Net alone, or merge it by base_loras"
            )
        notes += [f"{entry.path}: {note}" for note in own]
    if cfg.init_lora is None:
        return cfg, notes
    file, own = read_any(Path(cfg.init_lora))
    adapter = adapter_of(cfg, base)
    _check(file.modules, base, cfg.init_lora, adapter.shapes if adapter else None)
    changes = _settings(cfg, file.modules, base)
    said = ", ".join(f"{key} {_shown(value)}" for key, value in changes.items())
    notes += [f"{cfg.init_lora}: {note}" for note in own]
    layers = text_layers(base, cfg.clip_skip) if base.known else math.inf
    numbers = [re.search(r"^lora_te_.*_layers_(\d+)_", name) for name in file.modules]
    if gone := sum(number is not None and int(number[1]) >= layers for number in numbers):
        notes.append(
            f"{cfg.init_lora}: {gone} modules lie in layers that clip_skip {cfg.clip_skip} drops, so are lost"
        )
    notes.append(f"going on from {cfg.init_lora}" + (f", with its {said}" if said else ""))
    return cfg.model_copy(update=changes), notes


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"of {len(value)} modules"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _check(modules: Modules, base: BaseInfo, label: str, more: Shapes | None = None) -> None:
    """Raises UserError unless a LoRA can be an adapter of the base, as far as its headers are here."""
    refuse_vectors(modules, label)
    if base.known:
        check_places(base, modules, label, more)


def _settings(cfg: TrainConfig, modules: Modules, base: BaseInfo) -> dict[str, Any]:
    """What the file decides, as keys of the config."""
    path, found, given = cfg.init_lora, {}, cfg.model_fields_set
    if cfg.use_dora != any(pair.magnitude is not None for pair in modules.values()):
        has, asked = ("has no magnitudes", "false") if cfg.use_dora else ("is DoRA", "true")
        raise UserError(f"init_lora, use_dora: {path} {has}; set use_dora to {asked}")
    rank = max(pair.rank for pair in modules.values())
    if "rank" not in given:
        found["rank"] = rank
    elif cfg.rank < rank:
        raise UserError(
            f"init_lora, rank: {path} has rank {rank}, which {cfg.rank} cannot hold: set rank={rank}, or "
            "lower its own by `mix_lora.py resize`"
        )
    rank = found.get("rank", cfg.rank)
    if cfg.lora_alpha is None:
        scales = Counter(abs(pair.scale) for pair in modules.values() if pair.scale)  # a sign goes to `up`
        if not scales:
            raise UserError(f"init_lora: {path} has alpha 0, so that it changes nothing: set lora_alpha")
        scale = scales.most_common(1)[0][0]
        found["lora_alpha"] = scale * (math.sqrt(rank) if cfg.use_rslora else rank)
    parts = {component_of(name) for name in modules}
    if "text_encoder" in parts and not cfg.train_text_encoder:
        if "train_text_encoder" in given:
            raise UserError(
                f"init_lora, train_text_encoder: {path} changes the text encoder too, which would be lost: "
                "set train_text_encoder to true"
            )
        found["train_text_encoder"] = True
    if "target_modules" not in given:
        found["target_modules"] = _targets(cfg, modules, base)
    if lost := _untrained(cfg.model_copy(update=found).target_modules, modules):
        raise UserError(
            f"init_lora, target_modules: {path} changes {len(lost)} modules that are not among "
            f"target_modules, such as {lost[0]}: take a larger preset"
        )
    return found


def _dotted(modules: Modules, part: Component) -> list[str]:
    return [dotted for component, dotted in map(unflatten, modules) if component == part]


def _targets(cfg: TrainConfig, modules: Modules, base: BaseInfo) -> str | tuple[str, ...]:
    """The preset that adapts the U-Net's modules of a file and no others, or their names.

    Where the text encoder needs more than goes with that: the smallest preset that has all, else the default.
    """
    exact = _exact_targets(set(_dotted(modules, "unet")), base)
    presets = [exact, *TARGET_PRESETS["unet"]] if exact else TARGET_PRESETS["unet"]
    return next((each for each in presets if not _untrained(each, modules)), exact or cfg.target_modules)


def _exact_targets(own: set[str], base: BaseInfo) -> str | tuple[str, ...]:
    if base.known:
        layers = {key.removesuffix(".weight") for key, s in base.shapes("unet").items() if len(s) in (2, 4)}
        for preset, ends in TARGET_PRESETS["unet"].items():
            if own == {name for name in layers if _ends_in(name, ends)}:
                return preset
    return tuple(sorted(own))


def _ends_in(name: str, ends: Sequence[str]) -> bool:
    return any(ends_in(name, end) for end in ends)


def _untrained(chosen: str | tuple[str, ...], modules: Modules) -> list[str]:
    """The modules of a file that these targets do not adapt, so that they would be lost."""
    preset = chosen if isinstance(chosen, str) else "attention"
    ends: dict[Component, Sequence[str]] = {
        "unet": TARGET_PRESETS["unet"][chosen] if isinstance(chosen, str) else chosen,
        "text_encoder": TARGET_PRESETS["text_encoder"][preset],
    }
    return [name for part, own in ends.items() for name in _dotted(modules, part) if not _ends_in(name, own)]


# ---- in live models ----


def put_start(path: str, learner: Learner) -> None:
    """Put the change of a file into the fresh adapter; what the adapter has beyond it changes nothing yet.

    A module of lower rank gets the fresh adapter's further directions, whose other half is 0; one of another
    scale is multiplied to that of the run. What clip skip dropped is left out.
    """
    modules = read_any(Path(path))[0].modules
    models: dict[Component, Any] = {"unet": learner.unet, "text_encoder": learner.text_encoder}
    for part, model in models.items():
        if model is None:
            continue
        gone = dropped(lora.unwrap(model)) if part == "text_encoder" else ()
        live = lora.extract(model, part)
        for name, pair in modules.items():
            if component_of(name) == part and not name.startswith(gone):
                live[name] = _widened(pair, live[name])
        lora.insert(model, part, live)


def _widened(pair: LoraPair, live: LoraPair) -> LoraPair:
    """A pair in the rank, shapes and scale of a live one."""
    down, up = live.down.clone(), torch.zeros_like(live.up)
    down[: pair.rank] = pair.down.reshape(-1, *down.shape[1:])
    factor = pair.scale / live.scale
    own = pair.up.float() * (1.0 if math.isclose(factor, 1.0, rel_tol=1e-6) else factor)
    up[:, : pair.rank] = own.reshape(up.shape[0], pair.rank, *up.shape[2:])
    magnitude = live.magnitude
    if magnitude is not None and pair.magnitude is not None:
        magnitude = pair.magnitude.reshape(magnitude.shape)
    return LoraPair(down, up, live.alpha, magnitude)


def base_loras(cfg: TrainConfig) -> tuple[Merged, ...]:
    """The LoRAs of a config's base_loras, for models.Base."""
    return tuple(
        (entry.path, read_any(Path(entry.path))[0].modules, entry.weight) for entry in cfg.base_loras
    )
