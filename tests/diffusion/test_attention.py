"""Self-attention that looks at recorded rows: what it gives where the answer is known, and what it keeps."""

from typing import get_args

import pytest
import torch

from lorakit.diffusion.attention import MODES, AttentionMode, Between, SharedAttention

EVERY = ("down", "mid", "up")


def batch(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 8, 8, generator=rng), torch.randn(count, 5, 16, generator=rng)


@torch.no_grad()
def run(unet, latents, states, timestep=300):
    return unet(latents, timestep, states).sample


def between(left, right, alpha):
    return Between(torch.tensor(left), torch.tensor(right), torch.tensor(alpha, dtype=torch.float64))


def recorded(unet, latents, states, mode="kv", blocks=EVERY, **options):
    shared = SharedAttention(unet, mode, blocks)
    with shared.record(**options):
        run(unet, latents, states)
    return shared


# ---- known answers ----


def test_without_its_switch_it_is_the_library_s_attention(tiny_unet):
    latents, states = batch(3)
    unet = tiny_unet()
    plain = run(unet, latents, states)
    shared = SharedAttention(unet, "kv", EVERY)
    assert len(shared.own) == 4
    torch.testing.assert_close(run(unet, latents, states), plain, rtol=0, atol=1e-6)
    with shared.record():
        torch.testing.assert_close(run(unet, latents, states), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", get_args(AttentionMode))
def test_a_row_that_is_a_picture_itself_comes_out_as_the_picture(tiny_unet, mode):
    latents, states = batch(3)
    unet = tiny_unet()
    plain = run(unet, latents, states)
    shared = recorded(unet, latents, states, mode)
    left, right = [2, 0, 1, 0], [0, 2, 0, 1]
    same = [2, 2, 1, 0]  # the row at the end that alpha names
    with shared.use(between(left, right, [0.0, 1.0, 0.0, 0.0])):
        found = run(unet, latents[same], states[same])
    torch.testing.assert_close(found, plain[same], rtol=1e-5, atol=1e-5)
    with shared.use(between(left, right, [1.0, 0.0, 1.0, 1.0])):  # the other end
        far = run(unet, latents[same], states[same])
    assert ((far - plain[same]).flatten(1).abs().amax(1) > 1e-4).all()


def test_equal_ends_make_alpha_irrelevant(tiny_unet):
    latents, states = batch(2)
    unet = tiny_unet()
    for mode in MODES:
        shared = recorded(unet, latents, states, mode)
        outputs = []
        for alpha in (0.0, 0.3, 1.0):
            with shared.use(between([1, 1], [1, 1], [alpha, alpha])):
                outputs.append(run(unet, latents, states))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-5, atol=1e-6)
        with shared.use(between([0, 1], [1, 0], [0.3, 0.3])):
            assert (run(unet, latents, states) - outputs[0]).abs().max() > 1e-4
        shared.close()


def test_the_modes_differ_and_follow_their_formulas():
    rng = torch.Generator().manual_seed(0)
    q, k, v, ka, va, kb, vb = torch.randn(7, 2, 3, 9, 4, generator=rng, dtype=torch.float64)
    alpha = torch.tensor([0.25, 0.6], dtype=torch.float64).view(-1, 1, 1, 1)

    def attention(k, v):
        return torch.softmax(q @ k.transpose(-1, -2) / 4**0.5, dim=-1) @ v

    wanted = {
        "kv": attention((1 - alpha) * ka + alpha * kb, (1 - alpha) * va + alpha * vb),
        "outer": (1 - alpha) * attention(ka, va) + alpha * attention(kb, vb),
        "fused_outer": (1 - alpha) * attention(torch.cat([k, ka], 2), torch.cat([v, va], 2))
        + alpha * attention(torch.cat([k, kb], 2), torch.cat([v, vb], 2)),
    }
    found = {mode: blend(q, lambda: (k, v), (ka, va), (kb, vb), alpha) for mode, blend in MODES.items()}
    for mode in wanted:
        torch.testing.assert_close(found[mode], wanted[mode], rtol=1e-10, atol=1e-12)
        for other in set(wanted) - {mode}:
            assert (found[mode] - wanted[other]).abs().max() > 1e-2


def test_rows_do_not_depend_on_their_neighbours(tiny_unet):
    latents, states = batch(4)
    unet = tiny_unet()
    shared = recorded(unet, latents[:2], states[:2], "outer")
    lies = between([0, 1, 0], [1, 0, 0], [0.2, 0.7, 0.5])
    with shared.use(lies):
        together = run(unet, latents[1:], states[1:])
    for i in range(3):
        at = slice(i, i + 1)
        with shared.use(Between(lies.left[at], lies.right[at], lies.alpha[at])):
            alone = run(unet, latents[1:][at], states[1:][at])
        torch.testing.assert_close(together[at], alone, rtol=1e-4, atol=1e-5)


# ---- blocks, memory, closing ----


@pytest.mark.parametrize("blocks", [("up",), ("down",), ("mid",), ("mid", "up")])
def test_only_the_blocks_that_are_named_take_part(tiny_unet, blocks):
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    shared = SharedAttention(unet, "kv", blocks)
    changed = {name for name, processor in unet.attn_processors.items() if processor is not before[name]}
    prefixes = tuple(f"{block}_block" for block in blocks)
    assert changed == {name for name in before if name.startswith(prefixes) and ".attn1." in name} and changed
    latents, states = batch(2)
    with shared.record():
        run(unet, latents, states)
    few = shared.stored_bytes()
    shared.close()
    assert 0 < few < recorded(unet, latents, states).stored_bytes()


def test_close_puts_back_what_was_there(tiny_unet):
    unet = tiny_unet()
    before = dict(unet.attn_processors)
    shared = SharedAttention(unet, "kv", EVERY)
    assert unet.attn_processors != before
    shared.close()
    assert unet.attn_processors == before


def test_memory_does_not_grow_with_steps_and_is_that_of_the_rows(tiny_unet):
    unet = tiny_unet()
    shared = SharedAttention(unet, "kv", ("up",))
    sizes = []
    for step in range(5):
        latents, states = batch(2, step)
        with shared.record():
            run(unet, latents, states, timestep=900 - 100 * step)
        sizes.append(shared.stored_bytes())
    # keys and values of two layers of 64 tokens with 8 channels, for two rows of four bytes
    assert set(sizes) == {2 * 2 * 64 * 8 * 2 * 4}
    with shared.record(more=True):
        run(unet, latents, states)
    assert shared.stored_bytes() == 2 * sizes[0] and shared.recorded_rows() == 4  # what storing would do


def test_looking_at_rows_before_any_were_recorded_is_a_fault_of_ours(tiny_unet):
    unet = tiny_unet()
    shared = SharedAttention(unet, "kv")
    with pytest.raises(AssertionError, match="no rows were recorded"), shared.use(between([0], [0], [0.5])):
        run(unet, *batch(1))
    run(unet, *batch(1))  # plain again


# ---- recording in parts, and in halves ----


def test_rows_recorded_in_chunks_are_those_recorded_at_once(tiny_unet):
    unet = tiny_unet()
    latents, states = batch(3)
    shared = recorded(unet, latents, states)
    at_once = {name: processor.recorded for name, processor in shared.own.items()}
    for i, at in enumerate((slice(0, 2), slice(2, 3))):
        with shared.record(more=i > 0):
            run(unet, latents[at], states[at])
    for name, processor in shared.own.items():
        torch.testing.assert_close(processor.recorded, at_once[name], rtol=1e-4, atol=1e-5)
        swapped = tuple(x.flip(1) for x in at_once[name])
        assert (processor.recorded[0] - swapped[0]).abs().max() > 1e-3
    assert shared.recorded_rows() == 3


def test_halves_are_recorded_in_chunks_each_beside_its_own(tiny_unet):
    unet = tiny_unet()
    latents, states = batch(3)
    negative = batch(3, seed=1)[1]

    def both(at):
        return torch.cat([latents[at]] * 2), torch.cat([negative[at], states[at]])

    shared = recorded(unet, *both(slice(None)), halves=2)
    at_once = {name: processor.recorded for name, processor in shared.own.items()}
    assert shared.recorded_rows() == 6
    for i, at in enumerate((slice(0, 1), slice(1, 3))):
        with shared.record(halves=2, more=i > 0):
            run(unet, *both(at))
    for name, processor in shared.own.items():
        torch.testing.assert_close(processor.recorded, at_once[name], rtol=1e-4, atol=1e-5)
    assert shared.recorded_rows() == 6
    # One half after the other, as if halves were 1, is another order.
    for i, at in enumerate((slice(0, 1), slice(1, 3))):
        with shared.record(more=i > 0):
            run(unet, *both(at))
    mixed = next(iter(shared.own.values())).recorded[0].flatten(0, 1)
    assert (mixed - next(iter(at_once.values()))[0].flatten(0, 1)).abs().max() > 1e-3
