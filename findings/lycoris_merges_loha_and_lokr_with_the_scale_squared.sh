#!/usr/bin/env bash
# LyCORIS (lycoris-lora 4.1.3): a LoHa or LoKr with alpha below its rank is weaker once it is merged.
#
# One would expect `merge_to` to put into a layer the change that the module's forward pass makes. For LoCon it does. For LoHa
# and low-rank LoKr the scale alpha / rank, which the forward pass applies once, is applied twice: at rank 4 and alpha 1 the
# merged layer has a quarter of the trained change. With alpha = rank nothing shows. So a model that LyCORIS merged is no
# yardstick for a reader of such files, and a merged checkpoint differs from the adapter that was tried out.
#
# Seen with torch 2.15.0 on a CPU: ratio of the merged change to that of the forward pass
#   LoConModule  alpha 4: 1.0000   alpha 1: 1.0000
#   LohaModule   alpha 4: 1.0000   alpha 1: 0.2500
#   LokrModule   alpha 4: 1.0000   alpha 1: 0.2500
# Exits with 1 if a ratio is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 lycoris-lora==4.1.3
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

EXPECTED = {LoConModule: (1.0, 1.0), LohaModule: (1.0, 0.25), LokrModule: (1.0, 0.25)}
RANK, SIDE = 4, 256
torch.manual_seed(0)
same = True
for kind, expected in EXPECTED.items():
    found = []
    for alpha in (RANK, 1):
        layer, inputs = torch.nn.Linear(SIDE, SIDE, bias=False), torch.randn(8, SIDE)
        plain = layer(inputs).detach()
        module = kind("module", layer, multiplier=1.0, lora_dim=RANK, alpha=alpha)
        for parameter in module.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
        module.apply_to()
        forward = (layer(inputs) - plain).detach()
        module.restore()
        module.merge_to(1.0)
        merged = (layer(inputs) - plain).detach()
        found.append(float((merged * forward).sum() / (forward * forward).sum()))
    print(f"{kind.__name__:12s} alpha {RANK}: {found[0]:.4f}   alpha 1: {found[1]:.4f}")
    same &= all(abs(one - other) < 1e-3 for one, other in zip(found, expected))
raise SystemExit(not same)
PYTHON
