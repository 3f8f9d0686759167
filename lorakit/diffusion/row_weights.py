"""Each row of a batch under its own mixture of LoRAs, in one forward pass of the U-Net.

The update of a layer is then sum_i w_i,row (alpha_i / r_i) B_i A_i x: the weighted sum of deltas of
`Mixing` in docs/MIXING.md, with another w for every row. All adapters of a layer are put side by side along
the rank, so that one product with all A and one with all B serve them, with the weights in between.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

from lorakit.diffusion.lora import active_adapters


def lora_layers(model: Any, adapters: Sequence[str]) -> list[tuple[LoraLayer, str]]:
    """Every (layer, adapter) of these adapters."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return [(layer, name) for layer in layers for name in adapters if name in layer.scaling]


class RowMixtures:
    """The LoRAs of a model, ready for batches whose rows weigh them differently.

    Args:
        model: with `adapters` loaded; they are taken as they are now, also if they change later.

    `single` tells that an adapter is more than a scaled sum, as DoRA is (it renormalizes the weight), so that
    rows cannot share a pass: then `use` takes one row at a time.
    """

    def __init__(self, model: Any, adapters: Sequence[str]):
        self.model, self.adapters = model, list(adapters)
        found = lora_layers(model, adapters)
        self.single = any(layer.lora_variant for layer, _ in found)
        layers: list[Any] = [] if self.single else list(dict.fromkeys(layer for layer, _ in found))
        self.banks = [(layer, _Bank(layer, self.adapters)) for layer in layers]

    @contextmanager
    def use(self, weights: Tensor) -> Iterator[None]:
        """Inside, row b of every batch runs with weights[a, b] times adapter a; afterwards all is as it was.

        Args:
            weights: (A, B) for A adapters, on top of the weight each was loaded with. B must be the batch
                size; B = 1 holds for every row.
        """
        assert weights.shape[:1] == (len(self.adapters),), (weights.shape, self.adapters)
        if self.single:
            assert weights.shape[1] == 1, "these LoRAs take one row at a time"
            with _scaled(self.model, dict(zip(self.adapters, weights[:, 0].tolist(), strict=True))):
                yield
            return
        per_rank: dict[Any, Tensor] = {}  # nearly all layers have the same ranks
        try:
            for layer, bank in self.banks:
                if bank.pattern not in per_rank:
                    per_rank[bank.pattern] = bank.per_rank(weights)
                layer.forward = partial(bank.forward, layer, per_rank[bank.pattern])
            yield
        finally:
            for layer, _ in self.banks:
                vars(layer).pop("forward", None)


class _Bank:
    """A layer's adapters along the rank: `down` (R, in[, k, k]) and `up` (out, R), with their scales."""

    def __init__(self, layer: Any, adapters: Sequence[str]):
        others = [name for name in layer.active_adapters if name in layer.scaling and name not in adapters]
        names = [name for name in (*adapters, *others) if name in layer.scaling]
        base = layer.get_base_layer()
        downs = [layer.lora_A[name].weight.detach() for name in names]
        ups = [layer.lora_B[name].weight.detach().flatten(1) * layer.scaling[name] for name in names]
        self.down = torch.cat(downs).to(base.weight.dtype)
        self.up = torch.cat(ups, dim=1).to(base.weight.dtype)
        ranks = [len(down) for down in downs]
        # Which adapter each rank belongs to; those that are active and not weighed count fully.
        index = {name: number for number, name in enumerate(adapters)}
        self.pattern = tuple((index.get(name, -1), rank) for name, rank in zip(names, ranks, strict=True))
        self.convolution = base.weight.ndim == 4
        if self.convolution:
            self.down = self.down.contiguous(memory_format=torch.channels_last)

    def per_rank(self, weights: Tensor) -> Tensor:
        """(B, R), of each rank in each row."""
        table = torch.cat([weights, weights.new_ones(1, weights.shape[1])])
        rows = [number for number, rank in self.pattern for _ in range(rank)]
        return table[rows].T.to(self.down)

    def forward(self, layer: Any, weights: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for the layer's own; PEFT's loop over adapters takes half as long again."""
        base = layer.get_base_layer()
        out = base(x, *args, **kwargs)
        if layer.disable_adapters:
            return out
        if not self.convolution:
            inner = F.linear(x, self.down) * weights.view(-1, *[1] * (x.ndim - 2), weights.shape[1])
            return out + F.linear(inner, self.up)
        inner = F.conv2d(x, self.down, None, base.stride, base.padding, base.dilation)
        inner = (inner * weights[:, :, None, None]).permute(0, 2, 3, 1)  # (B, h, w, R)
        return out + F.linear(inner, self.up).permute(0, 3, 1, 2)


@contextmanager
def _scaled(model: Any, weights: dict[str, float]) -> Iterator[None]:
    """One mixture for every row, by PEFT's own scales, which every kind of adapter heeds.

    An adapter of weight 0 takes no part: at scale 0 DoRA would still set its magnitudes.
    """
    before = [(layer, name, layer.scaling[name]) for layer, name in lora_layers(model, list(weights))]
    active = {layer: list(layer.active_adapters) for layer, *_ in before}
    try:
        for layer, name, scale in before:
            layer.scaling[name] = scale * weights[name]
        for layer, names in active.items():
            layer._active_adapter = [name for name in names if layer.scaling.get(name) != 0]
        yield
    finally:
        for layer, name, scale in before:
            layer.scaling[name] = scale
        for layer, names in active.items():
            layer._active_adapter = names


@contextmanager
def all_active(models: Sequence[Any], adapters: Sequence[str]) -> Iterator[None]:
    """Inside, all of these adapters take part in those models that have any, so that rows may weigh them."""
    models = [model for model in models if adapters and getattr(model, "peft_config", None)]
    before = [(model, active_adapters(model)) for model in models]
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]  # PEFT turns them on
    try:
        for model in models:
            model.set_adapter([name for name in adapters if name in model.peft_config])
        yield
    finally:
        for model, names in before:
            model.set_adapter(names)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def row_weights(model: Any, adapters: Sequence[str], weights: Tensor):
    """RowMixtures.use for once."""
    return RowMixtures(model, adapters).use(weights)


def weight_table(adapters: Sequence[str], used: Sequence[dict[str, float]]) -> Tensor:
    """(A, B) weights from what each row uses: {adapter: weight}."""
    values = [row.get(name, 0.0) for name in adapters for row in used]
    return torch.tensor(values).view(len(adapters), len(used))
