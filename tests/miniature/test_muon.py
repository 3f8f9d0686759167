"""The optimizer of the miniature's trainings against torch's own, and what makes it more than those."""

import copy

import pytest
import torch
from torch import nn

from miniature.muon import Muon, is_matrix, orthogonalize


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.Flatten(), nn.Linear(256, 24))


def steps(net: nn.Module, optimizers, count: int = 4) -> nn.Module:
    rng = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(64, 8, 6, 6, generator=rng)  # fewer leave directions that only rounding fills
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return net


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalize(matrices)
    values = torch.linalg.svdvals(made)
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.linalg.svdvals(matrices).max() > 3  # they were not near one before
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    mixed = u.mT @ made @ vt.mT  # diagonal where the singular vectors are the same
    off = mixed - torch.diag_embed(mixed.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 2e-4


def test_linear_layers_move_as_under_torchs_muon_and_the_rest_as_under_adamw():
    net = model()
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    steps(ours, [Muon(ours.named_parameters(), 1e-3, 20.0, 0.01, torch.bfloat16)])
    linear, conv = theirs[3].weight, theirs[0].weight
    rest = [p for p in theirs.parameters() if p is not linear and p is not conv]
    torch_muon = torch.optim.Muon([linear], lr=0.02, weight_decay=0.01, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    as_matrix = MatrixMuon(conv, lr=0.02)
    steps(theirs, [torch_muon, adamw, as_matrix])
    for name, p in ours.named_parameters():
        moved = torch.linalg.vector_norm(p - net.get_parameter(name))
        apart = torch.linalg.vector_norm(p - theirs.get_parameter(name))
        assert apart < 0.05 * moved, (name, apart / moved)  # torch normalises in bfloat16, we before it


class MatrixMuon:
    """torch's Muon on a convolution's weight seen as a matrix of `out` rows."""

    def __init__(self, weight: nn.Parameter, lr: float):
        self.weight = weight
        self.matrix = nn.Parameter(weight.detach().movedim(1, -1).flatten(1).clone())
        self.inner = torch.optim.Muon([self.matrix], lr=lr, weight_decay=0.01, adjust_lr_fn="original")

    def zero_grad(self) -> None:
        self.weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        assert self.weight.grad is not None
        self.matrix.grad = self.weight.grad.movedim(1, -1).flatten(1)
        self.inner.step()
        shape = self.weight.movedim(1, -1).shape
        self.weight.copy_(self.matrix.view(shape).movedim(-1, 1))


def test_embeddings_pixels_and_vectors_are_no_matrices():
    assert is_matrix("down.weight", torch.zeros(16, 8, 3, 3)) and is_matrix("q.weight", torch.zeros(8, 8))
    assert not is_matrix("conv_in.weight", torch.zeros(16, 3, 3, 3))
    assert not is_matrix("token_embedding.weight", torch.zeros(50, 8))
    assert not is_matrix("norm.weight", torch.zeros(8))


def test_memory_layout_changes_nothing():
    plain, last = model(), model().to(memory_format=torch.channels_last)
    for net in (plain, last):
        steps(net, [Muon(net.named_parameters(), 1e-3, 20.0, 0.01, torch.float32)])
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_restored_state_goes_on_as_if_nothing_had_been():
    straight, stopped = model(), model()
    make = lambda net: Muon(net.named_parameters(), 1e-3, 20.0, 0.01, torch.float32)  # noqa: E731
    first = make(stopped)
    rng = [torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def run(net, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    run(straight, make(straight), rng)
    run(stopped, first, rng[:2])
    second = make(stopped)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(stopped, second, rng[2:])
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(a, b)
    forgetful = model()
    run(forgetful, make(forgetful), rng[:2])
    run(forgetful, make(forgetful), rng[2:])  # a fresh optimizer: another result
    assert not torch.equal(forgetful[3].weight, straight[3].weight)
