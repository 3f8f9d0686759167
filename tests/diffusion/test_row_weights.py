"""Every row of a batch under its own mixture of LoRAs: against single rows and against merged weights."""

import copy
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer

from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.lora import load_lora
from lorakit.diffusion.row_weights import RowMixtures, lora_layers, row_weights, weight_table
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.weights.lora_file import LoraFile, LoraPair, kohya_name

USED = [{"a": 1.0}, {"b": 1.0}, {"a": 0.3, "b": 0.7}, {}, {"a": -0.5, "b": 2.0, "c": 1.0}]


def batch(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 8, 8, generator=rng), torch.randn(count, 5, 16, generator=rng)


@torch.no_grad()
def run(unet, latents, states, adapters=(), weights=None):
    weights = torch.zeros(0, len(latents)) if weights is None else weights
    with row_weights(unet, adapters, weights):
        return unet(latents, 300, states).sample


def settings_of(unet):
    """What a mixture may change for as long as it lasts: the layers' scales and the way they run."""
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    return [(dict(layer.scaling), vars(layer).get("forward")) for layer in layers]


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("alpha", [4.0, 1.5])
def test_a_batch_equals_one_row_at_a_time(adapted_unet, targets, alpha):
    unet, _ = adapted_unet(3, targets=targets, alpha=alpha)
    kinds = {type(layer.get_base_layer()) for layer, _ in lora_layers(unet, "a")}
    assert torch.nn.Linear in kinds and (torch.nn.Conv2d in kinds or targets == "attention")
    latents, states = batch(len(USED))
    weights = weight_table("abc", USED)
    together = run(unet, latents, states, "abc", weights)
    for i in range(len(USED)):
        at = slice(i, i + 1)
        unet.set_adapter(["a", "b", "c"])
        for layer, name in lora_layers(unet, "abc"):  # PEFT's own weights, one row at a time
            layer.set_scale(name, USED[i].get(name, 0.0))
        alone = run(unet, latents[at], states[at])
        torch.testing.assert_close(together[at], alone, rtol=1e-4, atol=1e-4)
        for layer, name in lora_layers(unet, "abc"):
            layer.set_scale(name, 1.0)
    shuffled = run(unet, latents, states, "abc", weights.flip(1))
    assert (shuffled - together).abs().max() > 1e-2  # the weights are what tells rows apart


def test_one_column_holds_for_every_row_and_zero_weights_give_the_base(adapted_unet, tiny_unet):
    unet, _ = adapted_unet()
    latents, states = batch(3)
    one = run(unet, latents, states, "ab", torch.tensor([[0.3], [0.7]]))
    each = run(unet, latents, states, "ab", torch.tensor([[0.3] * 3, [0.7] * 3]))
    torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)
    base = run(tiny_unet(), latents, states)
    torch.testing.assert_close(
        run(unet, latents, states, "ab", torch.zeros(2, 3)), base, rtol=1e-5, atol=1e-6
    )
    assert (one - base).abs().max() > 1e-2


def test_weights_come_on_top_of_those_that_a_lora_was_loaded_with(tiny_unet, random_lora):
    file = random_lora(tiny_unet(), 7)
    half, whole = tiny_unet(), tiny_unet()
    load_lora(file, half, adapter_name="a", weight=0.5)
    load_lora(file, whole, adapter_name="a")
    latents, states = batch(2)
    torch.testing.assert_close(
        run(half, latents, states, "a", torch.tensor([[0.6, 2.0]])),
        run(whole, latents, states, "a", torch.tensor([[0.3, 1.0]])),
        rtol=1e-4,
        atol=1e-5,
    )


# ---- deltas, not factors ----


def with_deltas(unet, *weighted):
    layers = {kohya_name("unet", name): module for name, module in unet.named_modules()}
    for modules, weight in weighted:
        for name, one in modules.items():
            layers[name].weight.data += weight * one.delta().view_as(layers[name].weight)
    return unet


def mixed_factors(first, second, alpha):
    """What DiffMorpher's code does: B_a A_a with each factor interpolated."""
    return {
        name: LoraPair(
            torch.lerp(one.down, second[name].down, alpha),
            torch.lerp(one.up, second[name].up, alpha),
            one.alpha,
        )
        for name, one in first.items()
    }


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_deltas_are_mixed_and_not_factors(adapted_unet, tiny_unet, alpha):
    unet, (first, second) = adapted_unet()
    latents, states = batch(2)
    weights = torch.tensor([[1 - alpha] * 2, [alpha] * 2])
    found = run(unet, latents, states, "ab", weights)
    merged = with_deltas(tiny_unet(), (first.modules, 1 - alpha), (second.modules, alpha))
    base, wanted = run(tiny_unet(), latents, states), run(merged, latents, states)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if 0 < alpha < 1:
        factors = with_deltas(tiny_unet(), (mixed_factors(first.modules, second.modules, alpha), 1.0))
        far = (run(factors, latents, states) - wanted).norm() / (wanted - base).norm()
        assert far > 0.2


# ---- what is left behind ----


def test_everything_is_restored_also_after_a_fault(adapted_unet):
    unet, _ = adapted_unet(2)
    before = settings_of(unet)
    with pytest.raises(ZeroDivisionError), row_weights(unet, "ab", torch.rand(2, 3)):
        assert settings_of(unet) != before
        _ = 1 / 0
    assert settings_of(unet) == before
    run(unet, *batch(3), "ab", torch.rand(2, 3))
    run(unet, *batch(3), "ab", torch.rand(2, 1))
    assert settings_of(unet) == before


def test_a_table_of_weights_has_a_row_for_each_adapter():
    table = weight_table(["a", "b"], [{"a": 1.0}, {"b": 0.5, "a": 0.25}, {}])
    assert table.tolist() == [[1.0, 0.25, 0.0], [0.0, 0.5, 0.0]]
    assert weight_table([], [{}, {}]).shape == (0, 2)


def test_an_active_adapter_that_is_not_weighed_counts_fully(adapted_unet):
    unet, _ = adapted_unet(3)
    latents, states = batch(2)
    with_c = run(unet, latents, states, "ab", torch.tensor([[0.3, 1.0], [0.7, 0.0]]))
    named = run(unet, latents, states, "abc", torch.tensor([[0.3, 1.0], [0.7, 0.0], [1.0, 1.0]]))
    without = run(unet, latents, states, "abc", torch.tensor([[0.3, 1.0], [0.7, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(with_c, named, rtol=1e-5, atol=1e-5)
    assert (without - named).abs().max() > 1e-2


# ---- DoRA ----


def test_dora_is_run_row_by_row_and_equals_the_loop(adapted_unet):
    unet, _ = adapted_unet(2, use_dora=True)
    assert RowMixtures(unet, "ab").single and not RowMixtures(adapted_unet(2)[0], "ab").single
    latents, states = batch(3)
    weights = weight_table("ab", [{"a": 1.0}, {"b": 1.0}, {"a": 0.4, "b": 0.6}])
    denoiser = Denoiser(unet, NoiseSchedule(torch.linspace(0.99, 0.01, 1000).double()), "ab")
    with torch.no_grad():
        found = denoiser(latents, 300, Rows(states, torch.zeros_like(states), weights.T))
    assert denoiser.evaluations == 3
    for i in range(3):
        at = slice(i, i + 1)
        alone = run(unet, latents[at], states[at], "ab", weights[:, at])
        torch.testing.assert_close(found[at], alone, rtol=1e-5, atol=1e-5)
    assert (found[0] - run(unet, latents[:1], states[:1], "ab", weights[:, 1:2])[0]).abs().max() > 1e-3


def stretched(file, seed):
    """A LoRA with magnitudes 5 % off, which a scale of 0 does not take away."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: replace(
            pair, magnitude=pair.magnitude * (1 + 0.05 * torch.randn(len(pair.up), generator=generator))
        )
        for name, pair in file.modules.items()
        if pair.down.ndim == 2
    }
    return LoraFile(modules, {}, "diffusers")


def test_dora_at_weight_zero_is_off_whatever_else_is_loaded(tiny_unet, random_lora):
    files = [
        stretched(random_lora(tiny_unet(), seed, use_dora=True, targets="attention"), seed) for seed in (1, 2)
    ]
    latents, states = batch(1)
    base = run(tiny_unet(), latents, states)
    alone = []
    for file in files:
        unet = tiny_unet()
        load_lora(file, unet, adapter_name="a")
        alone.append(run(unet, latents, states))
    unet = tiny_unet()
    for name, file in zip("ab", files, strict=True):
        load_lora(file, unet, adapter_name=name)
    before = settings_of(unet)
    assert torch.equal(run(unet, latents, states, "ab", weight_table("ab", [{}])), base)
    for name, wanted in zip("ab", alone, strict=True):
        found = run(unet, latents, states, "ab", weight_table("ab", [{name: 1.0}]))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - base).abs().max() > 1e-2
    assert settings_of(unet) == before
    layers = [layer for layer, _ in lora_layers(unet, "ab")]
    assert all(layer.active_adapters == ["a", "b"] for layer in layers)
    for layer, name in lora_layers(unet, "ab"):
        layer.set_scale(name, 0.0)  # the control: scales of 0 are not off
    assert (run(unet, latents, states) - base).abs().max() > 1e-2


def test_dora_loaded_at_weight_zero_is_off(tiny_unet, random_lora):
    file = stretched(random_lora(tiny_unet(), 1, use_dora=True, targets="attention"), 1)
    latents, states = batch(1)
    unet, base = tiny_unet(), run(tiny_unet(), latents, states)
    load_lora(file, unet, adapter_name="a", weight=0.0)
    assert torch.equal(run(unet, latents, states), base)
    load_lora(random_lora(tiny_unet(), 2), unet, adapter_name="b")  # and stays so beside another
    other = tiny_unet()
    load_lora(random_lora(tiny_unet(), 2), other, adapter_name="b")
    torch.testing.assert_close(run(unet, latents, states), run(other, latents, states), rtol=1e-5, atol=1e-5)


def test_one_dora_among_plain_loras_is_enough_to_need_single_rows(tiny_unet, random_lora):
    unet = tiny_unet()
    load_lora(random_lora(tiny_unet(), 1), unet, adapter_name="a")
    assert not RowMixtures(unet, "a").single
    load_lora(random_lora(tiny_unet(), 2, use_dora=True), unet, adapter_name="b")
    assert RowMixtures(unet, "ab").single


def test_a_lora_of_few_layers_mixes_with_one_of_all(tiny_unet, random_lora):
    files = random_lora(tiny_unet(), 1), random_lora(tiny_unet(), 2, targets=["conv_in", "to_q"])
    unet = tiny_unet()
    for name, file in zip("ab", files, strict=True):
        load_lora(LoraFile(copy.copy(file.modules), {}, "diffusers"), unet, adapter_name=name)
    latents, states = batch(2)
    found = run(unet, latents, states, "ab", weight_table("ab", [{"a": 0.2, "b": 0.8}, {"b": 1.0}]))
    for i, (wa, wb) in enumerate([(0.2, 0.8), (0.0, 1.0)]):
        merged = with_deltas(tiny_unet(), (files[0].modules, wa), (files[1].modules, wb))
        wanted = run(merged, latents[i : i + 1], states[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-4, atol=1e-5)
