"""Features on the way through a U-Net: those of the block, and no more of the pass than they need."""

import pytest
import torch

from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.features import watch
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.ground.errors import UserError

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000).double())


@pytest.fixture
def pass_of(tiny_unet):
    """(U-Net, a pass of it that returns noise, the outputs of its last layer so far)."""
    unet = tiny_unet()
    rng = torch.Generator().manual_seed(0)
    embeds, x = torch.randn(1, 5, 16, generator=rng), torch.randn(1, 4, 8, 8, generator=rng)
    denoiser, ends = Denoiser(unet, SCHEDULE), []
    unet.conv_out.register_forward_hook(lambda *_: ends.append(1))
    return unet, lambda x=x: denoiser(x, 300, Rows(embeds, embeds, torch.zeros(1, 0))), ends


@pytest.mark.parametrize("block", [0, 1, -1, -2])
def test_it_is_what_the_block_puts_out_and_a_pass_that_stops_goes_no_further(pass_of, block):
    unet, run, ends = pass_of
    wanted = []
    hook = unet.up_blocks[block].register_forward_hook(lambda *all: wanted.append(all[2]))
    plain = run()
    hook.remove()
    with watch(unet, block) as seen:
        noise = run()
    assert torch.equal(noise, plain) and torch.equal(seen[0], wanted[0]) and len(ends) == 2
    with watch(unet, block, stop=True) as seen:
        run()
        raise AssertionError("the pass went on")
    assert len(seen) == 1 and torch.equal(seen[0], wanted[0]) and len(ends) == 2
    assert torch.equal(run(), plain) and len(ends) == 3  # no hook is left


def test_gradients_flow_to_what_goes_in_and_nowhere_else(pass_of):
    unet, run, _ = pass_of
    unet.requires_grad_(False)
    x = torch.zeros(1, 4, 8, 8, requires_grad=True)
    with watch(unet, -1, stop=True) as seen:
        run(x)
    (gradient,) = torch.autograd.grad(seen[0].square().sum(), x)
    assert gradient.abs().max() > 0 and all(p.grad is None for p in unet.parameters())


def test_another_fault_passes_and_leaves_no_hook(pass_of):
    unet, run, _ = pass_of
    with pytest.raises(ZeroDivisionError), watch(unet, -1, stop=True):
        raise ZeroDivisionError
    assert not unet.up_blocks[-1]._forward_hooks


@pytest.mark.parametrize("block", [2, -3])
def test_a_block_that_is_not_there_is_refused(pass_of, block):
    unet, _, _ = pass_of
    with pytest.raises(UserError, match="this U-Net has 2 up blocks, -2 to 1"), watch(unet, block):
        raise AssertionError
