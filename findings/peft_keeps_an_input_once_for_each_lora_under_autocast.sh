#!/usr/bin/env bash
# PEFT 0.21.2 with torch 2.15.0 under bfloat16 autocast: LoRAs on query, key and value keep three copies of the one input they share.
#
# Without adapters the three layers share their input, and without autocast so do three LoRAs. But PEFT makes float32 of the input in
# each layer, since its factors are float32, and autocast makes bfloat16 of that again: each LoRA keeps a copy of its own for the
# backward pass. With PEFT's cast turned off (`cast_input_dtype_enabled`) one is kept and every gradient is the same to the bit.
#
# Seen on a CPU: 3 inputs kept, 1 without the cast, gradients equal.
# Exits with 1 if one of the three is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        return self.to_q(x) + self.to_k(x) + self.to_v(x)


def run(casting: bool):
    """Distinct tensors of the input's size that are kept, and the gradients."""
    torch.manual_seed(0)
    model = Attention().to(torch.bfloat16)
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = 0.1 * torch.randn_like(parameter.data.float())
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = casting
    x, kept = torch.randn(128, 64).to(torch.bfloat16), {}

    def keep(tensor):
        if tensor.numel() == x.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    return len(kept), [p.grad for p in trained]


(with_casts, a), (without, b) = run(True), run(False)
same = all(torch.equal(one, other) for one, other in zip(a, b))
print(f"inputs kept for three LoRAs on one input: {with_casts}; without PEFT's cast: {without}; gradients equal: {same}")
raise SystemExit((with_casts, without, same) != (3, 1, True))
PYTHON
