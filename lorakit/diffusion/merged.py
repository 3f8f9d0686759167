"""LoRAs merged into the weights of a model as it is loaded, so that it is frozen with them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import LoraPair, component_of, kohya_name
from lorakit.weights.lora_metadata import Component

Merged = tuple[str, Mapping[str, LoraPair], float]
"""A label for messages, modules by kohya name, and a weight."""


@torch.no_grad()
def merge_into(model: Any, component: Component, loras: Iterable[Merged]) -> None:
    """W becomes W + weight * (alpha / rank) * B A, added in float32 and rounded to the dtype of W.

    Raises:
        UserError: a module without a layer of its size, or DoRA.
    """
    layers: dict[str, Any] = {
        kohya_name(component, name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }
    for label, modules, weight in loras:
        for name, pair in modules.items():
            if component_of(name) != component:
                continue
            if name not in layers or pair.delta().numel() != layers[name].weight.numel():
                raise UserError(f"{label}: {name} has no layer of its size in this {component}")
            own = layers[name].weight
            change = weight * pair.delta().reshape(own.shape).to(own.device)
            own.copy_((own.float() + change).to(own.dtype))
