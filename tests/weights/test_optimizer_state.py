"""An optimizer continues bit-exactly from tensors and JSON."""

import json
import math

import pytest
import torch
from safetensors.torch import load, save

from lorakit.ground.errors import UserError
from lorakit.weights.optimizer_state import pack_optimizer, unpack_optimizer

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.97), fused=False, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1 / 3}, {"params": p[1:]}]),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=1e-3),
}


def through_disk(state_dict):
    tensors, packed = pack_optimizer(state_dict)
    return unpack_optimizer(load(save(tensors)), json.loads(json.dumps(packed, allow_nan=False)))


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (4, 7)]


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_exactly(name):
    straight = parameters()
    optimizer = OPTIMIZERS[name](straight)
    train(straight, optimizer, range(3))
    resumed, forgetful = parameters(), parameters()
    for copies in (resumed, forgetful):
        for copy, param in zip(copies, straight, strict=True):
            copy.data.copy_(param.data)
    again = OPTIMIZERS[name](resumed)
    again.load_state_dict(through_disk(optimizer.state_dict()))
    train(straight, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    train(forgetful, OPTIMIZERS[name](forgetful), range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not torch.equal(straight[0], forgetful[0])
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in again.param_groups]


def test_tensors_are_named_by_parameter_and_copied():
    params = parameters()
    optimizer = OPTIMIZERS["adamw"](params)
    train(params, optimizer, range(1))
    tensors, _ = pack_optimizer(optimizer.state_dict())
    assert sorted(tensors) == [f"{i}.{name}" for i in (0, 1) for name in ("exp_avg", "exp_avg_sq", "step")]
    before = tensors["0.exp_avg"].clone()
    train(params, optimizer, range(1, 2))
    assert torch.equal(tensors["0.exp_avg"], before)
    assert not torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)


def test_states_of_other_optimizers_come_back_as_they_were():
    shared = torch.arange(256) / 255  # the quantisation map that 8-bit AdamW shares between parameters
    state = {
        "state": {
            0: {"step": 3, "state1": torch.arange(9, dtype=torch.uint8), "qmap1": shared},
            1: {"step": 3, "quant": {"qmap1": shared, 5: (True, None)}, "half": torch.ones(2).bfloat16()},
        },
        "param_groups": [
            {"lr": 0.1, "betas": (0.9, 0.999), "limits": [0.1 + 0.2, 1e-320], "d": torch.tensor(1e-6)},
            {"d0": 1e-6, "growth_rate": math.inf, "$odd": -0.0, "fused": None, "params": [0, 1]},
        ],
        "extra": {"name": "prodigy", "nothing": math.nan},
    }
    back = through_disk(state)
    # types, order and every digit; the tensors are short enough to be shown whole
    assert repr(back) == repr(state)
    assert back["state"][1]["half"].dtype == torch.bfloat16
    assert torch.equal(back["state"][1]["quant"]["qmap1"], shared)


def test_a_missing_tensor_is_named():
    tensors, packed = pack_optimizer({"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": []})
    del tensors["0.exp_avg"]
    with pytest.raises(UserError, match=r"0\.exp_avg"):
        unpack_optimizer(tensors, packed)
