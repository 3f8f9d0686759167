#!/usr/bin/env bash
# torch 2.15.0: a convolution whose weight is not trained keeps its input for the backward pass all the same.
#
# A frozen linear layer keeps nothing of its input, since only the gradient of its weight needs it. Of a frozen convolution one would
# expect the same. But autograd keeps what its one backward formula names, input and weight, whichever gradients are asked for.
# In the U-Net of a LoRA training, where nearly all convolutions are frozen, that is an eighth of what a step keeps at SD 1.5's shape.
#
# Seen on a CPU: frozen Linear False, frozen Conv2d 3x3 True, frozen Conv2d 1x1 True.
# Exits with 1 if one of them is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

X = torch.randn(1, 64, 32, 32, requires_grad=True)


def kept(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the input is among what autograd keeps for the backward pass."""
    addresses = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: addresses.append(t.data_ptr()) or t, lambda t: t):
        layer.requires_grad_(False)(x)
    return x.data_ptr() in addresses


found = {
    "Linear": kept(nn.Linear(32, 8), X),
    "Conv2d 3x3": kept(nn.Conv2d(64, 8, 3, padding=1), X),
    "Conv2d 1x1": kept(nn.Conv2d(64, 8, 1), X),
}
for name, keeps in found.items():
    print(f"frozen {name:10s} keeps its input: {keeps}")
raise SystemExit(found != {"Linear": False, "Conv2d 3x3": True, "Conv2d 1x1": True})
PYTHON
