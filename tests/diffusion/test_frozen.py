"""Frozen layers that keep less give the same bits, forwards and backwards."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU

from lorakit.diffusion.frozen import FrozenConv2d, LeanGEGLU, keep_less
from lorakit.diffusion.lora import add_lora


@pytest.fixture(scope="module")
def unet(tiny_unet):
    model = tiny_unet()
    return lambda: copy.deepcopy(model)


def step(model, targets: str, half: bool, lean: bool) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of one step of a LoRA; bytes that were kept for them."""
    parameters = add_lora(model, rank=2, alpha=2, targets=targets)
    random = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    if lean:
        keep_less(model)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its address
        return tensor

    x = torch.randn(1, 4, 16, 16, generator=random).requires_grad_()
    states = torch.randn(1, 5, 16, generator=random)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = model.train()(x, 300, states).sample
    y.float().square().mean().backward()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    size = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    return [y.detach(), x.grad, *(parameter.grad for parameter in parameters)], size


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("targets, most", [("attention", 0.8), ("all", 0.95)])
def test_less_is_kept_and_no_bit_changes(unet, targets, most, half):
    """With "all" convolutions have LoRAs, which need their inputs."""
    dtype = torch.bfloat16 if half else torch.float32
    (plain, more), (lean, less) = (step(unet().to(dtype), targets, half, way) for way in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))
    assert less < most * more


def test_what_is_trained_stays_as_it_is(unet):
    model = unet().requires_grad_(False)
    model.conv_in.requires_grad_(True)
    keep_less(model)
    kinds = {type(layer) for layer in model.modules()}
    assert type(model.conv_in) is torch.nn.Conv2d and {FrozenConv2d, LeanGEGLU} <= kinds
    assert GEGLU not in kinds


@pytest.mark.parametrize("stride, padding, groups", [(1, 1, 1), (2, 0, 1), (2, 1, 2)])
def test_a_gradient_of_a_gradient_is_right(stride, padding, groups):
    plain = torch.nn.Conv2d(4, 6, 3, stride, padding, groups=groups).double().requires_grad_(False)
    lean = copy.deepcopy(plain)
    keep_less(torch.nn.ModuleList([lean]))
    assert isinstance(lean, FrozenConv2d)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(lean(x), plain(x), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lean, x) and torch.autograd.gradgradcheck(lean, x)
    gate = GEGLU(4, 3).double().requires_grad_(False)
    lean_gate = copy.deepcopy(gate)
    keep_less(torch.nn.ModuleList([lean_gate]))
    row = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(lean_gate(row), gate(row), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lean_gate, row) and torch.autograd.gradgradcheck(lean_gate, row)
