"""Clip skip against its definition, against diffusers', and with LoRAs in the text encoder."""

import copy

import pytest
import torch

from lorakit.diffusion.lora import add_lora, extract, load_lora
from lorakit.diffusion.models import Base
from lorakit.diffusion.text import dropped, end_at
from lorakit.ground.errors import UserError
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import LoraFile

LAYERS = 4
IDS = torch.arange(20).reshape(2, 10)


@pytest.fixture
def whole(tiny_text_encoder):
    return tiny_text_encoder(num_hidden_layers=LAYERS)


def ending(text_encoder, clip_skip):
    text_encoder = copy.deepcopy(text_encoder)
    end_at(text_encoder, clip_skip)
    return text_encoder


@torch.no_grad()
def expected(text_encoder, clip_skip) -> torch.Tensor:
    """As A1111 and kohya's scripts write it: a layer's output, counted from the end, and the final norm."""
    states = text_encoder(IDS, output_hidden_states=True).hidden_states
    return text_encoder.final_layer_norm(states[-clip_skip])


@pytest.mark.parametrize("clip_skip", range(1, LAYERS + 1))
def test_the_layer_is_the_one_of_a1111(whole, clip_skip):
    with torch.no_grad():
        found = ending(whole, clip_skip)(IDS)[0]
    torch.testing.assert_close(found, expected(whole, clip_skip), rtol=0, atol=0)
    others = [expected(whole, other) for other in range(1, LAYERS + 1) if other != clip_skip]
    assert min(float((found - other).abs().max()) for other in others) > 1e-3


@pytest.mark.parametrize("clip_skip", range(2, LAYERS + 1))
def test_diffusers_counts_one_less(tiny_base, whole, clip_skip):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    text_encoder = copy.deepcopy(whole)
    text_encoder.embeddings = pipe.text_encoder.embeddings  # of the tokenizer's vocabulary and length
    pipe.text_encoder = text_encoder
    vars(text_encoder)["text_model"] = text_encoder  # where diffusers 0.42 looks for the final norm
    theirs, _ = pipe.encode_prompt("a lake", "cpu", 1, False, clip_skip=clip_skip - 1)
    del vars(text_encoder)["text_model"]
    end_at(text_encoder, clip_skip)
    ours, _ = pipe.encode_prompt("a lake", "cpu", 1, False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_more_than_there_is_is_refused(whole):
    with pytest.raises(UserError, match=f"clip_skip 5: the text encoder has {LAYERS} layers"):
        end_at(whole, LAYERS + 1)


def test_a_base_reads_its_prompts_so(tiny_base):
    info = inspect_base(str(tiny_base))
    plain, one, skipping = (Base(info, clip_skip=clip_skip) for clip_skip in (None, 1, 2))
    ids = plain.tokenize(["a lake"])
    states = plain.text_encoder(ids, output_hidden_states=True).hidden_states
    assert torch.equal(one.text_encoder(ids)[0], plain.text_encoder(ids)[0])
    wanted = plain.text_encoder.final_layer_norm(states[-2])
    assert torch.equal(skipping.text_encoder(ids)[0], wanted)


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_a_lora_of_all_layers_loads_and_counts_where_layers_are_read(whole, random_lora, clip_skip):
    file = random_lora(whole, 1, "text_encoder")
    adapted, short = copy.deepcopy(whole), ending(whole, clip_skip)
    modules = load_lora(file, None, adapted, adapter_name="a")
    assert load_lora(file, None, short, adapter_name="a") == modules * (LAYERS + 1 - clip_skip) // LAYERS
    with torch.no_grad():
        found = short(IDS)[0]
    torch.testing.assert_close(found, expected(adapted, clip_skip), rtol=0, atol=1e-6)
    assert (found - expected(whole, clip_skip)).abs().max() > 1e-3


def test_a_lora_in_dropped_layers_alone_changes_nothing(whole, random_lora):
    short = ending(whole, 2)
    file = random_lora(whole, 1, "text_encoder")
    last = {name: pair for name, pair in file.modules.items() if name.startswith(dropped(short))}
    assert last
    before = short(IDS)[0]
    assert load_lora(LoraFile(last, {}, file.layout), None, short, adapter_name="a") == 0
    assert torch.equal(short(IDS)[0], before)
    adapted = copy.deepcopy(whole)  # the control: without clip skip it has its place and an effect
    assert load_lora(LoraFile(last, {}, file.layout), None, adapted, adapter_name="a") == len(last)
    assert (adapted(IDS)[0] - whole(IDS)[0]).abs().max() > 1e-3


def test_layers_that_the_encoder_never_had_are_refused_still(whole, tiny_text_encoder, random_lora):
    larger = random_lora(tiny_text_encoder(num_hidden_layers=LAYERS + 1), 1, "text_encoder")
    assert dropped(whole) == ()
    with pytest.raises(UserError, match="modules have no place in this text_encoder, such as .*layers_4_"):
        load_lora(larger, None, ending(whole, 2), adapter_name="a")


def test_every_parameter_that_is_trained_gets_a_gradient(whole):
    """Else DistributedDataParallel would wait for it, and its weights would only decay."""
    short = ending(whole, 3)
    parameters = add_lora(short, rank=2, alpha=2.0, targets="all")
    short(IDS)[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    names = extract(short, "text_encoder")
    assert len(names) == (LAYERS - 2) * 6 and not any(name.startswith(dropped(short)) for name in names)
