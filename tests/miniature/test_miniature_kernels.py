"""The ways around slow kernels in the miniature's trainings compute what the kernels do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from miniature import run as runs
from miniature.settings import RunConfig

CPU = torch.device("cpu")


def attention_and_norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norm = nn.GroupNorm(4, 16)
    half = x.bfloat16()
    tokens = half.flatten(2).transpose(1, 2).unflatten(2, (2, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens), norm(half)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_attention_is_float32_and_norm_keeps_its_layout_in_half_precision_alone(precision):
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        plain = attention_and_norm(x)
    ours, grads = [], []
    for context in (
        runs.autocast(RunConfig.model_validate({"mixed_precision": precision}), CPU),
        torch.autocast("cpu", torch.bfloat16),
    ):
        leaf = x.clone().requires_grad_()
        with context:
            found = attention_and_norm(leaf)
        torch.stack([part.float().square().sum() for part in found]).sum().backward()
        ours.append(found)
        grads.append(leaf.grad)
    attended, normed = ours[0]
    assert attended.dtype == (torch.float32 if precision == "bf16" else torch.bfloat16)
    assert plain[0].dtype == torch.bfloat16  # what autocast does by itself
    if precision == "bf16":
        assert normed.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(attended, plain[0].float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(normed.float(), plain[1].float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grads[0], grads[1], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("has", ["amx_bf16", "avx512_bf16", None])
def test_auto_is_bfloat16_where_the_cpu_has_units_for_it_and_what_is_said_holds(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | ({has: True} if has else {}))
    found = {}
    for precision in ("auto", "bf16", "no"):
        cfg = RunConfig.model_validate({"mixed_precision": precision})
        with runs.autocast(cfg, CPU):
            found[precision] = nn.Linear(4, 4)(torch.ones(1, 4)).dtype
        optimizer = runs.make_optimizer(cfg, {"part": nn.Linear(4, 4)})
        assert optimizer.dtype == found[precision]
    auto = torch.bfloat16 if has else torch.float32
    assert found == {"auto": auto, "bf16": torch.bfloat16, "no": torch.float32}
