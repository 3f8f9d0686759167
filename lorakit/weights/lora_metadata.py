"""The metadata of LoRA files: what other tools and our own read there, as text; no tensors, no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

from lorakit.ground.errors import UserError

Component = Literal["unet", "text_encoder"]

ADAPTER_KEY = "lora_adapter_metadata"
HINTS_KEY = "lorakit.sampling"
"""The key of a LoRA's metadata that holds the sampler it was trained for, as JSON."""
STATES_KEY = "lorakit.prompt_embeds"
"""The key that holds the sha256 of the text states under which a LoRA was fitted, where there were any."""


# ---- training ----

# Where a run writes and how it was restarted leave the weights as they are, so the file must not show them.
_RUN_KEYS = {
    "allow_data_change",
    "cache_dir",
    "embedding_dirs",
    "log_dir",
    "output_dir",
    "overwrite",
    "prompt_syntax",
    "resume_from_checkpoint",
    "sample_prompts",
}
_SS_FROM_CONFIG = {
    "ss_learning_rate": "learning_rate",
    "ss_lr_scheduler": "lr_scheduler_name",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_noise_offset": "noise_offset",
    "ss_optimizer": "optimizer",
    "ss_seed": "seed",
}


def training_metadata(
    *,
    name: str,
    rank: int,
    alpha: float,
    config: Mapping[str, Any],
    base_name: str,
    cross_attention_dim: int,
    prediction_type: str,
    mixed_precision: str,
    resolution: int,
    steps: int,
    epochs: int,
    num_images: int,
    sampler: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What A1111, ComfyUI and kohya's tools show of a file, ModelSpec 1.0.1, and our `lorakit.config`.

    No times, absolute paths or captions: a LoRA file is a pure function of config, data and versions, and
    names no person. An absolute path in the config keeps its last part only.

    Args:
        config: resolved, as JSON types; a run's folders and `resume_from_checkpoint` are left out.
        cross_attention_dim: of the U-Net; 1024 marks SD 2.x.
        prediction_type: of the scheduler: "epsilon", "v_prediction" or "sample".
        mixed_precision: what was used, not "auto": "no", "fp16" or "bf16".
        resolution: pixels.
        sampler: what the LoRA is to be sampled with, if not as its base is.
    """
    is_v2, is_v = cross_attention_dim == 1024, prediction_type == "v_prediction"
    family = ("v2-768-v" if is_v else "v2-512") if is_v2 else "v1"
    kept = {key: _without_folders(value) for key, value in config.items() if key not in _RUN_KEYS}
    from_config = {ss: str(kept[key]) for ss, key in _SS_FROM_CONFIG.items() if kept.get(key) is not None}
    if sampler:
        from_config[HINTS_KEY] = json.dumps(sampler)
    return from_config | {
        "ss_clip_skip": str(kept.get("clip_skip") or 1),
        "ss_mixed_precision": mixed_precision,
        "ss_output_name": name,
        "ss_v2": str(is_v2),
        "ss_base_model_version": ("sd_v2" if is_v2 else "sd_v1") + ("_v" if is_v else ""),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": "{}",
        "ss_sd_model_name": _without_folders(base_name),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_steps": str(steps),
        "ss_max_train_steps": str(steps),
        "ss_epoch": str(epochs),
        "ss_num_train_images": str(num_images),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{family}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if is_v else prediction_type,
        "lorakit.config": json.dumps(kept, sort_keys=True, ensure_ascii=False),
    }


def trained_objectives(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The objectives that our own training wrote into a file; none where another tool made it."""
    try:
        objective = json.loads(metadata["lorakit.config"])["objective"]
    except (LookupError, ValueError, TypeError, RecursionError):
        return ()
    return tuple(map(str, objective if isinstance(objective, list) else [objective]))


def training_config_text(path: str, metadata: Mapping[str, str]) -> str:
    """The config of the training that made a file, as the text of a config file.

    Raises:
        UserError: the file holds none, or one that cannot be read.
    """
    if "lorakit.config" not in metadata:
        raise UserError(
            f"{path}: holds no training config; only files that train_lora.py wrote do, mixes do not"
        )
    try:
        return json.dumps(json.loads(metadata["lorakit.config"]), indent=2, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise UserError(f"{path}: its training config is no JSON ({error})") from error


# ---- files made of files ----

_OF_THE_BASE = (
    "ss_v2",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_clip_skip",
    "modelspec.architecture",
    "modelspec.prediction_type",
)


def mixed_metadata(
    *,
    name: str,
    formula: str,
    sources: Sequence[Mapping[str, str]],
    rank: int,
    alpha: float,
    is_v2: bool | None,
) -> dict[str, str]:
    """The metadata of a LoRA file made of others: what it was made of, and what they say alike of their base.

    No training config: none made these weights. No dates, and no folders in names. The sampler
    that one of them is for is that of the sum, unless they ask for several.

    Args:
        formula: files by name, with their weights.
        sources: the metadata of those files.
    """
    alike = {
        key: sources[0][key]
        for key in _OF_THE_BASE
        if sources and all(key in source and source[key] == sources[0][key] for source in sources)
    }
    hints = {source[HINTS_KEY] for source in sources if HINTS_KEY in source}
    return (
        base_metadata(is_v2)
        | alike
        | ({HINTS_KEY: hints.pop()} if len(hints) == 1 else {})
        | {
            "ss_output_name": name,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(alpha),
            "ss_network_args": "{}",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.implementation": "diffusers",
            "modelspec.title": name,
            "modelspec.merged_from": formula,
        }
    )


def converted_metadata(metadata: Mapping[str, str], *, is_v2: bool | None) -> dict[str, str]:
    """The metadata of a file in another layout: all but what described the tensors of the old one."""
    stale = re.compile(
        rf"format|{ADAPTER_KEY}|(unet|text_encoder)(:\d+:rank)?|sshs_.*|modelspec\.hash_sha256"
    )
    kept = {key: value for key, value in metadata.items() if not stale.fullmatch(key)}
    return base_metadata(is_v2) | kept


def base_metadata(is_v2: bool | None) -> dict[str, str]:
    """By which A1111 and kohya's tools tell the base, in files that say nothing of it themselves.

    None: it is not known, and nothing is said.
    """
    if is_v2 is None:
        return {}
    return {
        "ss_v2": str(is_v2),
        "ss_base_model_version": "sd_v2" if is_v2 else "sd_v1",
        "modelspec.architecture": f"stable-diffusion-{'v2-512' if is_v2 else 'v1'}/lora",
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    windows = PureWindowsPath(value)
    is_private = PurePosixPath(value).is_absolute() or windows.is_absolute() or value.startswith("~")
    return windows.name if is_private else value
