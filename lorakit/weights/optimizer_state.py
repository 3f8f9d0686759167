"""An optimizer's state as tensors and JSON, never a pickle; knows no optimizer, so it serves any."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.ground.errors import UserError

if TYPE_CHECKING:
    import torch


def pack_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Splits an optimizer's state_dict into tensors, copied to the CPU, and a JSON object for all the rest.

    State tensors are named "{param}.{name}". What JSON lacks is marked: "$tensor", "$tuple", "$items" (a
    mapping whose keys are not strings) and "$float" (not finite).
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            # A copy of its own: 8-bit optimizers share one quantisation map, which safetensors refuses.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"$tensor": name}
        if isinstance(value, Mapping):
            packed = [[key, pack(item, f"{name}.{key}" if name else str(key))] for key, item in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return dict(packed) if plain else {"$items": packed}
        if isinstance(value, list | tuple):
            items = [pack(item, f"{name}.{i}") for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": str(value)}
        assert value is None or isinstance(value, bool | int | float | str), (name, type(value))
        return value

    return tensors, {key: pack(value, "" if key == "state" else key) for key, value in state_dict.items()}


def unpack_optimizer(tensors: Mapping[str, "torch.Tensor"], packed: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict that pack_optimizer split.

    Raises:
        UserError: a tensor is missing.
    """

    def unpack(value: Any) -> Any:
        if isinstance(value, list):
            return [unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$tensor" in value:
            if value["$tensor"] not in tensors:
                raise UserError(f"the optimizer's tensor {value['$tensor']!r} is missing")
            return tensors[value["$tensor"]]
        if "$items" in value:
            return {key: unpack(item) for key, item in value["$items"]}
        if "$tuple" in value:
            return tuple(unpack(item) for item in value["$tuple"])
        if "$float" in value:
            return float(value["$float"])
        return {key: unpack(item) for key, item in value.items()}

    return {key: unpack(value) for key, value in packed.items()}
