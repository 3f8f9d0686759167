"""Config files in JSON and `key=value` settings, checked in full before a script imports torch.

A script declares `class Train(Config)`, one documented field per key, and parses its command line by it
(command.py). One ConfigError lists every fault of the file and of the settings:

    cfg/mountain.json:12:5: learning_rat: unknown key; did you mean learning_rate?

A relative path in a config stays as written: it starts at the working directory, not at the config's folder.
"""

import contextlib
import difflib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from lorakit.ground.config_text import (
    MAX_DEPTH,
    ConfigError,
    ConfigText,
    Key,
    assign,
    dotted,
    is_text,
    present,
    read_config_text,
    schema_at,
    schema_options,
    schema_words,
    show,
    value_at,
    without_references,
)

MAX_FAULTS = 20  # a message longer than a screen hides its first lines

# Our key, and what other trainers and habits call it.
_OTHER_NAMES = {
    "adam_epsilon": "adam_eps eps",
    "adam_weight_decay": "weight_decay",
    "checkpointing_steps": "checkpoint_every_n_steps save_every_n_steps save_steps",
    "ckpt_name": "output_name",
    "data_dir": "dataset image_dir instance_data_dir train_data_dir",
    "dataloader_num_workers": "max_data_loader_n_workers num_workers workers",
    "enable_xformers_memory_efficient_attention": "xformers",
    "gradient_accumulation_steps": "accumulate_grad_batches grad_accum gradient_accumulation",
    "learning_rate": "lr unet_lr",
    "log_dir": "logging_dir",
    "lora_alpha": "alpha network_alpha",
    "lr_scheduler_name": "lr_scheduler scheduler",
    "max_grad_norm": "clip_grad_norm grad_clip",
    "max_train_steps": "max_steps num_train_steps steps",
    "mixed_precision": "dtype precision",
    "n_epochs": "epochs max_train_epochs num_epochs num_train_epochs",
    "pretrained_model_name_or_path": "base_model model model_id model_path",
    "rank": "dim lora_rank network_dim",
    "resolution": "image_size size",
    "resume_from_checkpoint": "resume",
    "train_batch_size": "batch_size",
}


class Config(BaseModel):
    """Base of a script's config, and of a group of keys inside one.

    A field is `rank: int = Field(default=4, ge=1, description="what, unit")`; a choice is a Literal, a list a
    tuple. A rule over two fields is a `model_validator(mode="after")` whose ValueError names both.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    headings: ClassVar[dict[str, str]] = {}
    """Key -> the heading that --help prints above it; keys appear in the order of declaration."""

    aliases: ClassVar[dict[str, str]] = {
        name: key for key, names in _OTHER_NAMES.items() for name in names.split()
    }
    """Another name -> the key to suggest for it, if the class has that key."""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A checked config, and for each key its origin: "default", "<file>:<line>" or "command line"."""

    config: C
    origins: dict[str, str]


def load_config(cls: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> Loaded[C]:
    """Read a config file, apply settings, validate.

    Args:
        path: None starts from the defaults alone.
        overrides: `key=value`, `group.key=value`, `key.0=value`; of two for one key the last counts. A value
            is JSON if it reads as such, else a string; a key of strings also takes 123 as one.
    Raises:
        ConfigError: lists all faults; of a file that is not JSON only the first.
    """
    text = ConfigText("command line", "{}") if path is None else read_config_text(path)
    check = _Check(cls, text)
    text.data.pop("$schema", None)
    for key, (first, second) in text.duplicates.items():
        check.faults[key] = second, f"given twice, first in line {text.line(first)}; remove one"
    for override in overrides:
        check.override(override)
    config = check.validated()
    if config is None or check.faults:
        raise ConfigError(check.report())
    return Loaded(config, {name: check.origin(tuple(name.split("."))) for name in leaves(cls)})


def checked(cls: type[C], data: dict[str, Any], place: str) -> C:
    """A config of data that stands at `place`, such as "prompts.txt: line 3".

    Raises:
        ConfigError: lists all faults.
    """
    text = ConfigText(place, "{}")
    text.data.update(data)
    check = _Check(cls, text)
    config = check.validated()
    if config is None:
        raise ConfigError(check.report())
    return config


def schema(cls: type[Config]) -> dict[str, Any]:
    """JSON schema (draft 2020-12, without references) by which an editor completes and checks the keys."""
    raw = cls.model_json_schema()
    tree = without_references(raw, raw.get("$defs", {}))
    own = {"type": "string", "description": "path of this schema, for editors"}
    tree["properties"] = {"$schema": own, **tree.get("properties", {})}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


_FILE, _SETTING = -1, sys.maxsize  # stand for an offset, in the order of the report


@dataclass
class _Check(Generic[C]):
    """Faults so far, by key: the offset in the text, or _FILE or _SETTING, and the message."""

    cls: type[C]
    text: ConfigText
    settings: dict[Key, str] = field(default_factory=dict)
    faults: dict[Key, tuple[int, str]] = field(default_factory=dict)

    def override(self, setting: str) -> None:
        """Put `key=value` into the data."""
        name, equals, raw = setting.partition("=")
        parts = name.strip().split(".")
        if not equals or "" in parts or len(parts) > MAX_DEPTH:
            self.faults[(setting,)] = _SETTING, "is not of the form key=value"
            return
        value, twice = raw, None
        with contextlib.suppress(ConfigError):
            text = ConfigText("", raw)
            value, twice = text.data, next(iter(text.duplicates), None)
        info = self.cls.model_fields.get(parts[0])
        if len(parts) > 1 and info and parts[0] not in self.text.data and not info.is_required():
            self.text.data[parts[0]] = default_of(info)
        key: Key = tuple(int(part) if re.fullmatch("[0-9]{1,6}", part) else part for part in parts)
        key, fault = assign(self.text.data, key, value)
        self.settings[key] = raw
        if twice or fault:
            self.faults[key] = _SETTING, fault or f"its value gives {dotted(twice or ())} twice"

    def validated(self) -> C | None:
        """The config, or None and the faults that pydantic finds."""
        try:
            return self.cls.model_validate_json(json.dumps(self.text.data))
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
        located = [(self._key(item), item) for item in errors]
        strings = {key for key, item in located if item["type"] == "string_type" and key in self.settings}
        numbers = [key for key in strings if isinstance(value_at(self.text.data, key), int | float)]
        for key in numbers:  # ckpt_name=123 means the string
            assign(self.text.data, key, self.settings[key])
        if numbers:
            return self.validated()
        tree = schema(self.cls)
        outer = {key[:n] for key, _ in located for n in range(1, len(key))}
        fitting = [(key, item) for key, item in located if key not in outer]  # of a union, the closest member
        for key, item in fitting[: 10 * MAX_FAULTS]:
            self._add(tree, key, item)
        return None

    def _key(self, item: Any) -> Key:
        key = present(self.text.data, item["loc"])
        return (*key, item["loc"][-1]) if item["type"] == "missing" else key

    def _add(self, tree: dict[str, Any], key: Key, item: Any) -> None:
        """Say one error of pydantic in the words of the schema, where the value or the key stands."""
        kind, stands = item["type"], key
        if kind == "missing":
            message = f"missing; it must be {schema_words(schema_at(tree, key))}"
        elif kind == "extra_forbidden":
            message = f"unknown key; {_suggestion(self.cls, tree, key)}"
        elif kind == "json_invalid":
            key = stands = next(
                (name,) for name, value in self.text.data.items() if not is_text([name, value])
            )
            message = "holds half of a character (a lone surrogate, or bytes that are not UTF-8)"
        elif kind in ("value_error", "assertion_error"):
            message = str(item["ctx"]["error"])
            named = (word for word in re.findall(r"\w+", message) if not key and word in self.text.data)
            stands = next(((word,) for word in named), key)
        else:
            message = f"must be {schema_words(schema_at(tree, key))}, not {self._written(key)}"
        position = self._position(stands)
        if kind == "extra_forbidden" and position != _SETTING:
            position = self.text.keys[key]
        self.faults.setdefault(key, (position, message))

    def _written(self, key: Key) -> str:
        """A value as the user wrote it: 1e400 reads as infinity."""
        value = value_at(self.text.data, key)
        if not isinstance(value, float) or math.isfinite(value) or self._position(key) == _FILE:
            return show(value)
        raw = self.settings.get(key) or self.text.token(self.text.values.get(key, 0))
        return raw if len(raw) <= 40 else f"a number of {len(raw)} characters"

    def report(self) -> str:
        """The faults in the order of the text, then those of the command line."""
        ordered = sorted(self.faults.items(), key=lambda fault: fault[1][0])
        places = {_FILE: self.text.name, _SETTING: "command line"}
        lines = []
        for key, (position, message) in ordered[:MAX_FAULTS]:
            place = places.get(position) or self.text.place(position)
            lines.append(": ".join([place, dotted(key), message] if key else [place, message]))
        return "\n".join(lines + ["and more"] * (len(ordered) > MAX_FAULTS))

    def origin(self, key: Key) -> str:
        if self._is_set(key):
            return "command line"
        position = self.text.keys.get(key)
        return "default" if position is None else f"{self.text.name}:{self.text.line(position)}"

    def _is_set(self, key: Key) -> bool:
        """Whether a setting gives this key, a part of it or, but for the root, what holds it."""
        return key != () and any(given[: len(key)] == key[: len(given)] for given in self.settings)

    def _position(self, key: Key) -> int:
        if self._is_set(key):
            return _SETTING
        around = [key[:n] for n in range(len(key), 0, -1)]
        return next((self.text.values[part] for part in around if part in self.text.values), _FILE)


def _suggestion(cls: type[Config], tree: dict[str, Any], key: Key) -> str:
    """Which key an unknown one stands for."""
    known = list(leaves(cls))
    for leaf in known:
        group, _, last = leaf.rpartition(".")
        if last == key[-1]:
            return f"it belongs under {group}" if group else "it belongs at the top level"
    name = str(key[-1])[:80].lower().replace("-", "_")
    alias = cls.aliases.get(name)
    around = schema_options(schema_at(tree, key[:-1]))
    siblings = [near for option in around for near in option.get("properties", {}) if near != "$schema"]
    near = [alias] if alias in siblings else difflib.get_close_matches(name, siblings, 1)
    near = near or ([alias] if alias in known else difflib.get_close_matches(dotted(key).lower(), known, 1))
    return f"did you mean {near[0]}?" if near else "--help lists all keys"


def leaves(cls: type[Config], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key -> field, with the keys of a group in its place."""
    found: dict[str, FieldInfo] = {}
    for name, info in cls.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            found |= leaves(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = info
    return found


def default_of(info: FieldInfo) -> Any:
    """The default of a field, as JSON types."""
    return to_jsonable_python(info.get_default(call_default_factory=True, validated_data={}))
