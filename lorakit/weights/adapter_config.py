"""Strength that stands outside the tensors: configs of PEFT's adapters, read and written; no torch.

A config lies beside the tensors (`adapter_config.json`, what `save_pretrained` writes) or in the metadata of
a file (`lora_adapter_metadata`, what diffusers writes).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorakit.ground.errors import UserError
from lorakit.weights.lora_metadata import ADAPTER_KEY, Component

CONFIG = "adapter_config.json"
_TENSORS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_READ = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# What PEFT adds to LoRA's formula or trains beside it, and starts that change the base that it is trained on.
_OTHER_FORMULA = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_path(path: Path | str) -> Path:
    """The file of a LoRA: `path` itself, or the one in a folder of `save_pretrained`.

    Raises:
        UserError: a folder without one; the message says which of its folders or files have it.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in _TENSORS:
        if (path / name).is_file():
            return path / name
    inside = sorted(p.parent.name for name in _TENSORS for p in path.glob(f"*/{name}"))
    if inside:
        raise UserError(f"{path}: is a folder with the adapters {', '.join(inside)}; name one of these")
    if (path / "adapter_model.bin").is_file():
        raise UserError(
            f"{path}: holds a pickle (adapter_model.bin), which can run code when it is opened; save it with "
            "safe_serialization=True"
        )
    raise UserError(f"{path}: is a folder; name the .safetensors file in it")


def config_beside(path: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """PEFT's config of a file; None where none lies beside it, or the one there is not this file's.

    Args:
        keys: of the file's tensors. Under a name that is not PEFT's own they must be PEFT's.

    Raises:
        UserError: it cannot be read.
    """
    beside = path.parent / CONFIG
    is_pefts = path.name == _TENSORS[0] or all(key.startswith("base_model.model.") for key in keys)
    if not is_pefts or not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{beside}: cannot be read ({error}), so the strength of {path} is unknown"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{beside}: is no JSON object, so the strength of {path} is unknown")
    return config


# ---- written ----


def adapter_metadata(
    facts: Mapping[tuple[Component, str], tuple[int, float]], with_dora: Collection[Component]
) -> dict[str, str]:
    """The fields of PEFT's LoraConfig that a reader needs and no more: an unknown field makes it fail.

    Args:
        facts: (component, dotted module name) -> (rank, alpha).
        with_dora: the components whose modules carry DoRA magnitudes.
    """
    result: dict[str, Any] = {}
    for component in sorted({component for component, _ in facts}):
        # Targets match by suffix, so that without `text_model.` they fit both forms of CLIPTextModel.
        own = {
            dotted.removeprefix("text_model."): (rank, int(alpha) if float(alpha).is_integer() else alpha)
            for (model, dotted), (rank, alpha) in facts.items()
            if model == component
        }
        fields: dict[str, Any] = {"target_modules": sorted(own), "use_dora": component in with_dora}
        for index, (key, pattern) in enumerate((("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))):
            usual = Counter(pair[index] for pair in own.values()).most_common(1)[0][0]
            fields[key] = usual
            fields[pattern] = {name: pair[index] for name, pair in own.items() if pair[index] != usual}
        result |= {
            f"{component}.{key}": value for key, value in fields.items() if value or key == "lora_alpha"
        }
    return {ADAPTER_KEY: json.dumps(result, sort_keys=True)}


# ---- read ----


class AdapterAlphas:
    """Alpha by module, as PEFT's config tells; fields that do not bear on the change are ignored.

    Args:
        metadata: of the file.
        beside: the config that lies beside it, which stands for every component.
        label: of the file, for messages.

    Raises:
        ValueError, TypeError, AttributeError: it does not read as a config.
        UserError: it tells of a change that is no LoRA, LoHa or LoKr, or depends on another base.
    """

    def __init__(
        self, metadata: Mapping[str, str], beside: Mapping[str, Any] | None = None, label: str = "the LoRA"
    ):
        self._label = label
        fields = {**json.loads(metadata.get(ADAPTER_KEY, "{}"))}
        self._configs: dict[Component, _Config] = {}
        components: tuple[Component, ...] = ("unet", "text_encoder")
        if beside is not None:
            config = _Config(beside, label)
            self._configs = dict.fromkeys(components, config)
        places: tuple[tuple[Component, str], ...] = (
            ("unet", ""),
            ("unet", "unet."),
            ("text_encoder", "text_encoder."),
        )
        for component, prefix in places:
            if f"{prefix}lora_alpha" in fields:
                own = {key.removeprefix(prefix): fields[key] for key in fields if key.startswith(prefix)}
                self._configs[component] = _Config(own, label)

    def known(self, component: Component) -> bool:
        return component in self._configs

    def alpha(self, component: Component, dotted: str, rank: int) -> float:
        """PEFT's rule; without a config alpha is the rank.

        rsLoRA scales by alpha / sqrt(rank): its alpha is turned into that of the common alpha / rank.

        Raises:
            UserError: the config says another rank than the tensors have, so that it is not theirs.
        """
        config = self._configs.get(component)
        if config is None:
            return float(rank)
        told = config.rank(dotted)
        if told not in (None, rank):
            raise UserError(
                f"{self._label}: {dotted} has rank {rank}, but its config says {told}: that is another "
                "adapter's, and the strength is unknown"
            )
        alpha = config.alpha(dotted)
        return alpha * math.sqrt(rank) if config.rslora else alpha

    def rank(self, component: Component, dotted: str) -> int | None:
        """What the config says, for modules whose tensors do not: LoKr of whole matrices."""
        config = self._configs.get(component)
        return config and config.rank(dotted)


class _Config:
    def __init__(self, fields: Mapping[str, Any], label: str):
        kind = str(fields.get("peft_type", "LORA"))
        if kind not in _READ:
            raise UserError(
                f"{label}: is PEFT's {kind}, not a LoRA; merge it with PEFT (merge_and_unload) and take the "
                "difference of the two bases with `mix_lora.py extract`"
            )
        strange = [key for key in _OTHER_FORMULA if fields.get(key)]
        strange += ["bias"] if fields.get("bias", "none") not in ("none", None) else []
        if strange:
            raise UserError(f"{label}: is more than a LoRA ({', '.join(strange)}); merge it with PEFT")
        init = fields.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(_OTHER_BASE):
            raise UserError(
                f"{label}: was trained against a base that PEFT had changed (init_lora_weights {init}); save "
                "it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        if _READ[kind] not in fields:
            raise ValueError(f"it has no {_READ[kind]}")
        self._alpha = _finite(fields[_READ[kind]])
        self._alphas = _patterns(fields.get("alpha_pattern"))
        self._rank = int(fields["r"]) if "r" in fields else None
        self._ranks = _patterns(fields.get("rank_pattern"))
        self.rslora = bool(fields.get("use_rslora"))

    def alpha(self, dotted: str) -> float:
        return _first(self._alphas, dotted, self._alpha)

    def rank(self, dotted: str) -> int | None:
        rank = _first(self._ranks, dotted, self._rank)
        return None if rank is None else int(rank)


def _patterns(given: Mapping[str, Any] | None) -> dict[re.Pattern[str], float]:
    """PEFT's rule (0.21): a pattern is a regular expression for the end of a module's path, at a dot."""
    try:
        return {
            re.compile(rf"(.*\.)?({pattern})"): _finite(value) for pattern, value in (given or {}).items()
        }
    except re.error as error:
        raise ValueError(f"a pattern that is no regular expression: {error}") from error


def _first(patterns: Mapping[re.Pattern[str], float], dotted: str, default: Any) -> Any:
    spellings = (dotted, dotted.removeprefix("text_model."))
    fits = (value for pattern, value in patterns.items() if any(map(pattern.fullmatch, spellings)))
    return next(fits, default)


def _finite(number: Any) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is no alpha")
    return float(number)
