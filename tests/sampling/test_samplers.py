"""What sampling scripts share: seeds, weights of LoRAs, samplers by name, hints in LoRA files."""

import copy
import itertools
import json
import shutil
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from lorakit.diffusion.models import Base
from lorakit.ground.config import ConfigError, load_config
from lorakit.ground.errors import UserError
from lorakit.sampling.config import (
    FALLBACK,
    HINTED,
    HINTS_KEY,
    LCM_STEPS,
    LoraEntry,
    SchedulerName,
    read_hints,
)
from lorakit.sampling.generate_plan import GenerateConfig
from lorakit.sampling.samplers import (
    SCHEDULERS,
    LoraStack,
    batch_options,
    block_factor,
    encode_prompts,
    make_scheduler,
    sample_images,
)
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import LoraPair, lora_bytes, unflatten
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.tensors import serialize
from lorakit.weights.tokens import unread_notes

NAMES = get_args(SchedulerName)
ONE_LEVEL = 1  # of 255: what the order of sums in a batch may change


@pytest.fixture(scope="module")
def loaded(tiny_base):
    base = Base(inspect_base(str(tiny_base)))
    assert base.unet and base.vae and base.text_encoder and base.tokenizer and base.scheduler
    return base


@pytest.fixture
def fresh(loaded):
    """Factory of the tiny base with models of its own, free of LoRAs."""

    def make():
        base = copy.copy(loaded)
        vars(base).update(unet=copy.deepcopy(loaded.unet), text_encoder=copy.deepcopy(loaded.text_encoder))
        return base

    return make


@pytest.fixture
def base(fresh):
    return fresh()


def write(path, modules, **metadata):
    path.write_bytes(lora_bytes(modules, layout="kohya", metadata=metadata))
    return str(path)


@pytest.fixture(scope="module")
def files(loaded, tiny_unet, random_lora, tmp_path_factory):
    """Paths by name: a and b adapt the U-Net, text the text encoder, both is both, other fits no base."""
    folder = tmp_path_factory.mktemp("loras")
    a, b = (random_lora(loaded.unet, seed).modules for seed in (100, 101))
    text = random_lora(loaded.text_encoder, 102, "text_encoder").modules
    other = random_lora(tiny_unet(cross_attention_dim=24), 103).modules
    made = {"a": a, "b": b, "text": text, "both": a | text, "other": other}
    return {name: write(folder / f"{name}.safetensors", modules) for name, modules in made.items()}


def entries(*loras):
    return [LoraEntry.model_validate_json(json.dumps({"path": path, **keys})) for path, keys in loras]


def stack_of(base):
    """The one stack of a base."""
    return vars(base).setdefault("stack", LoraStack(base))


def draw(base, *loras, seeds=(0,), scheduler="ddim", steps=3, guidance_scale=3.0, shape=(16, 16)):
    """(B, H, W, 3) levels of pictures under LoRAs, each (path, keys)."""
    stack_of(base).use(entries(*loras))
    embeds = encode_prompts(base, ["a photo of mountains", ""])
    images = sample_images(
        base,
        embeds[:1],
        embeds[1:],
        seeds=seeds,
        shape=shape,
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=make_scheduler(base, scheduler),
    )
    return np.stack([np.asarray(image, np.int16) for image in images])


def distance(one, other):
    """Largest difference in levels."""
    return int(np.abs(one - other).max())


# ---- seeds ----


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "lcm"])
def test_a_picture_follows_from_its_seed_whatever_else_is_in_the_batch(base, scheduler):
    together = draw(base, seeds=(3, 4, 5), scheduler=scheduler)
    assert distance(together[::-1], draw(base, seeds=(5, 4, 3), scheduler=scheduler)) <= ONE_LEVEL
    for number, seed in enumerate((3, 4, 5)):
        alone = draw(base, seeds=(seed,), scheduler=scheduler)
        assert distance(alone[0], together[number]) <= ONE_LEVEL
        assert (alone == draw(base, seeds=(seed,), scheduler=scheduler)).all()
    for one, other in itertools.combinations(together, 2):
        assert distance(one, other) > 20


def test_what_a_sampler_draws_on_the_way_follows_from_the_seed_too(base):
    embeds = torch.zeros(1, 3, 16)
    draws = [
        [
            torch.randn(4, generator=each).tolist()
            for each in batch_options(base, embeds, embeds, seeds)["generator"]
        ]
        for seeds in ([3, 4], [4, 3])
    ]
    assert draws[0] == draws[1][::-1] and draws[0][0] != draws[0][1]


# ---- weights ----


def test_weight_0_is_no_lora_bit_for_bit(base, files):
    without = draw(base)
    assert (draw(base, (files["both"], {"weight": 0})) == without).all()
    assert (draw(base, (files["both"], {"weight": 0}), (files["b"], {"weight": 0})) == without).all()
    assert distance(draw(base, (files["both"], {})), without) > 10
    assert (draw(base) == without).all()  # and after one was at work


def test_weights_of_one_file_add_up_and_order_does_not_matter(base, files, tmp_path):
    a, b = files["a"], files["b"]
    whole = draw(base, (a, {}))
    assert distance(draw(base, (a, {"weight": 0.5}), (a, {"weight": 0.5})), whole) <= ONE_LEVEL
    again = shutil.copy(a, tmp_path / "again.safetensors")
    assert distance(draw(base, (a, {"weight": 0.25}), (str(again), {"weight": 0.75})), whole) <= ONE_LEVEL
    both = draw(base, (a, {"weight": 0.7}), (b, {"weight": -0.4}))
    assert distance(draw(base, (b, {"weight": -0.4}), (a, {"weight": 0.7})), both) <= ONE_LEVEL
    assert distance(draw(base, (a, {"weight": -0.4}), (b, {"weight": 0.7})), both) > 10
    assert distance(draw(base, (a, {"weight": 0.5})), whole) > 5


def test_a_negative_weight_takes_away(base, files, tmp_path):
    a = files["a"]
    without, away = draw(base), draw(base, (a, {"weight": -1}))
    assert distance(away, without) > 10 and distance(away, draw(base, (a, {}))) > 10
    again = shutil.copy(a, tmp_path / "again.safetensors")
    assert distance(draw(base, (a, {}), (str(again), {"weight": -1})), without) <= ONE_LEVEL
    assert (draw(base, (a, {}), (a, {"weight": -1})) == without).all()


@torch.no_grad()
def predict(unet):
    rng = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 16, generator=rng)
    return unet(latents, 300, states).sample


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"weight": -0.5},
        {"weight": 2.0, "blocks": {"down_blocks": 0.5, "down_blocks.0.attentions": -1.0, "mid_block": 0.0}},
    ],
)
def test_a_live_lora_equals_its_delta_in_the_weights(base, loaded, files, keys):
    stack_of(base).use(entries((files["a"], keys)))
    merged = copy.deepcopy(loaded.unet)
    layers = dict(merged.named_modules())
    for name, pair in read_lora(files["a"]).modules.items():
        dotted = unflatten(name)[1]
        factors = {"down_blocks.0.attentions.": -1.0, "down_blocks.": 0.5, "mid_block.": 0.0}
        factor = next((f for start, f in factors.items() if dotted.startswith(start)), 1.0)
        factor = keys.get("weight", 1.0) * (factor if "blocks" in keys else 1.0)
        weight = layers[dotted].weight
        weight.data += factor * pair.delta().view_as(weight)
    wanted = predict(merged)
    torch.testing.assert_close(predict(base.unet), wanted, rtol=1e-4, atol=1e-4)
    assert (predict(loaded.unet) - wanted).abs().max() > 1e-2


# ---- blocks ----

PARTS = ("down_blocks", "mid_block", "up_blocks", "text_encoder")


def test_a_part_at_0_takes_no_part(base, files):
    without, whole = draw(base), draw(base, (files["both"], {}))
    assert (draw(base, (files["both"], {"blocks": dict.fromkeys(PARTS, 0.0)})) == without).all()
    for part in PARTS:
        less = draw(base, (files["both"], {"blocks": {part: 0.0}}))
        assert distance(less, whole) > ONE_LEVEL and distance(less, without) > ONE_LEVEL, part
    only_unet = draw(base, (files["both"], {"blocks": {"text_encoder": 0.0}}))
    assert distance(only_unet, draw(base, (files["a"], {}))) <= ONE_LEVEL


def test_a_dora_at_0_is_off_in_a_block_and_as_a_whole(base, fresh, random_lora, tmp_path):
    """Its magnitudes are off the base's rows, so that a scale of 0 would leave them."""
    made = random_lora(base.unet, 104, use_dora=True, targets="attention")
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: replace(
            pair, magnitude=pair.magnitude * (1 + 0.1 * torch.rand(len(pair.up), generator=generator))
        )
        for name, pair in made.modules.items()
    }
    parts = {"dora": modules, "middle": {n: p for n, p in modules.items() if "_mid_block_" in n}}
    for name, own in parts.items():
        content = lora_bytes(own, layout="diffusers", metadata={})
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    path, middle = (str(tmp_path / f"{name}.safetensors") for name in parts)
    without, whole = draw(base), draw(base, (path, {}))
    off = {"down_blocks": 0.0, "mid_block": 0.0, "up_blocks": 0.0}
    assert (draw(base, (path, {"blocks": off})) == without).all()
    assert (draw(base, (path, {"weight": 0})) == without).all()
    only = draw(base, (path, {"blocks": {"down_blocks": 0.0, "up_blocks": 0.0}}))
    assert distance(only, draw(fresh(), (middle, {}))) <= ONE_LEVEL
    assert distance(only, without) > ONE_LEVEL and distance(only, whole) > ONE_LEVEL
    assert (draw(base, (path, {})) == whole).all()  # and on again


def test_the_longest_beginning_counts_and_ends_at_a_dot(base, files):
    blocks = {"up_blocks": 0.5, "up_blocks.1": 2.0, "up_blocks.1.attentions.0": 3.0}
    for order in itertools.permutations(blocks.items()):
        assert block_factor("up_blocks.1.attentions.0.proj_in", dict(order)) == 3.0
        assert block_factor("up_blocks.1.resnets.0.conv1", dict(order)) == 2.0
        assert block_factor("up_blocks.10.resnets.0.conv1", dict(order)) == 0.5
        assert block_factor("mid_block.attentions.0.proj_in", dict(order)) == 1.0
    assert block_factor("conv_in", {"conv_in": 0.0}) == 0.0 and block_factor("conv_in", {"conv": 0.0}) == 1.0
    inner = {"down_blocks": 0.0, "down_blocks.0": 1.0, "down_blocks.1": 1.0}
    assert (draw(base, (files["a"], {"blocks": inner})) == draw(base, (files["a"], {}))).all()
    assert distance(draw(base, (files["a"], {"blocks": {"down_blocks": 0.0}})), draw(base)) > ONE_LEVEL


def test_a_block_that_the_file_does_not_have_is_refused_with_those_it_has(base, files):
    with pytest.raises(UserError) as caught:
        draw(base, (files["a"], {"blocks": {"down_block": 0.5}}))
    message = str(caught.value)
    assert files["a"] in message and "has nothing in down_block;" in message
    assert "down_blocks.0, down_blocks.1, mid_block.attentions" in message and "up_blocks.1" in message
    with pytest.raises(UserError, match="nothing in text_encoder"):
        draw(base, (files["a"], {"blocks": {"text_encoder": 0.5}}))
    with pytest.raises(UserError, match="named twice, with blocks"):
        draw(base, (files["a"], {}), (files["a"], {"blocks": {"mid_block": 0.5}}))


# ---- rank ----


def test_a_cut_to_the_full_rank_changes_nothing_and_to_less_it_does_and_is_said(base, files, tmp_path):
    stack = stack_of(base)
    whole = draw(base, (files["a"], {}))
    assert stack.new_notes() == []
    assert (draw(base, (files["a"], {"rank": 4})) == whole).all() and not stack.new_notes()
    less = draw(base, (files["a"], {"rank": 1}))
    (note,) = stack.new_notes()
    assert note.startswith(f"{files['a']}: cut to rank 1, ") and "of its energy kept" in note
    assert distance(less, whole) > ONE_LEVEL and distance(less, draw(base)) > ONE_LEVEL
    padded = {  # of rank 8, though its delta has rank 4: the cut loses nothing
        name: LoraPair(
            torch.cat([pair.down, torch.zeros_like(pair.down)]),
            torch.cat([pair.up, torch.zeros_like(pair.up)], dim=1),
            2 * pair.alpha,
        )
        for name, pair in read_lora(files["a"]).modules.items()
    }
    path = write(tmp_path / "padded.safetensors", padded)
    assert distance(draw(base, (path, {"rank": 4})), whole) <= ONE_LEVEL
    assert "100.00% of its energy" in stack.new_notes()[0]


# ---- files ----


def test_the_text_encoder_s_part_counts(base, files):
    without = draw(base)
    assert distance(draw(base, (files["text"], {})), without) > ONE_LEVEL
    both = draw(base, (files["both"], {}))
    assert distance(draw(base, (files["a"], {}), (files["text"], {})), both) <= ONE_LEVEL
    assert distance(draw(base, (files["a"], {})), both) > ONE_LEVEL


def test_a_file_for_another_base_or_none_is_refused_by_its_path(base, files, tmp_path):
    (tmp_path / "text.safetensors").write_text("not a LoRA")
    cases = [
        (files["other"], "does not fit"),
        (str(tmp_path / "text.safetensors"), "is not a safetensors file"),
        (str(tmp_path / "missing.safetensors"), "there is no such file"),
    ]
    without = draw(base)
    for path, message in cases:
        with pytest.raises(UserError) as caught:
            draw(base, (path, {}))
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert (draw(base) == without).all()


def test_dora_with_a_rank_is_refused_by_its_path_and_without_one_counts(base, random_lora, tmp_path):
    path = tmp_path / "dora.safetensors"
    modules = random_lora(base.unet, 7, targets="attention", use_dora=True).modules
    path.write_bytes(lora_bytes(modules, layout="diffusers", metadata={}))
    without = draw(base)
    assert distance(draw(base, (str(path), {})), without) > ONE_LEVEL
    assert (draw(base, (str(path), {"weight": 0})) == without).all()
    with pytest.raises(UserError, match=r"dora\.safetensors is DoRA.* leave its rank null"):
        draw(base, (str(path), {"rank": 1}))


def test_what_one_cell_sets_does_not_leak_into_the_next(fresh, files):
    cells = [
        [],
        [(files["a"], {})],
        [(files["both"], {"weight": 0.5, "blocks": {"text_encoder": 2.0, "up_blocks": 0.0}})],
        [(files["b"], {"weight": -1}), (files["a"], {"weight": 0.3})],
        [(files["b"], {"weight": -1, "rank": 1})],
        [(files["both"], {"weight": 0})],
    ]
    base = fresh()
    forth = [draw(base, *cell) for cell in cells]
    back = [draw(base, *cell) for cell in reversed(cells)][::-1]
    for number, (one, other) in enumerate(zip(forth, back, strict=True)):
        assert (one == other).all(), number
        assert distance(draw(fresh(), *cells[number]), one) <= ONE_LEVEL, number
    assert (forth[0] == forth[5]).all()
    for one, other in itertools.combinations(forth[:5], 2):
        assert distance(one, other) > ONE_LEVEL


# ---- samplers ----


def test_the_table_of_samplers_has_the_names_of_the_config():
    assert tuple(SCHEDULERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_makes_pictures_in_any_number_of_steps(base, name):
    one = draw(base, scheduler=name, steps=1)
    few = draw(base, scheduler=name, steps=4)
    assert one.shape == few.shape == (1, 16, 16, 3)
    assert distance(one, few) > ONE_LEVEL and few.std() > 10
    assert (few == draw(base, scheduler=name, steps=4)).all()
    assert distance(few, draw(base, scheduler=name, steps=4, seeds=(1,))) > 20


def test_samplers_differ_in_few_steps_and_agree_in_many(base):
    names = [name for name in NAMES if name not in ("euler_a", "lcm")]  # those draw noise on the way
    few = {name: draw(base, scheduler=name, steps=3, guidance_scale=1.0) for name in names}
    many = {name: draw(base, scheduler=name, steps=24, guidance_scale=1.0) for name in names}
    for name in names[1:]:
        apart = np.abs(few[name] - few["ddim"]).mean(), np.abs(many[name] - many["ddim"]).mean()
        assert apart[1] < min(1, apart[0] / 2), (name, apart)
        assert apart[0] > 1 or name == "euler", (name, apart)  # which is DDIM in other words


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_number_of_steps_stays_on_the_schedule(base, name):
    for number in (0, -1):  # the first step and the last
        scheduler = make_scheduler(base, name)
        scheduler.set_timesteps(LCM_STEPS if name == "lcm" else 999)
        t, sample = scheduler.timesteps[number], torch.ones(1, 4, 8, 8)
        if number and name == "pndm":
            scheduler.ets, scheduler.counter = [sample] * 3, 999
        assert scheduler.scale_model_input(sample, t).isfinite().all()
        assert scheduler.step(sample, t, sample).prev_sample.isfinite().all()


def test_samplers_keep_what_the_base_predicts(tiny_base):
    base = Base(inspect_base(str(tiny_base)), prediction_type="v_prediction")
    for name in NAMES:
        config = make_scheduler(base, name).config
        assert config.prediction_type == "v_prediction", name
        assert (config.beta_start, config.beta_schedule) == (0.00085, "scaled_linear"), name


# ---- sizes and prompts ----


def test_a_portrait_is_a_portrait(base):
    assert draw(base, shape=(16, 24)).shape == (1, 24, 16, 3)
    assert draw(base, shape=(24, 16)).shape == (1, 16, 24, 3)


def test_a_prompt_that_is_too_long_is_said_with_what_is_lost(base):
    fits = "a photo of mountains"
    assert unread_notes(base.info, [fits, ""]) == []
    (note,) = unread_notes(base.info, [fits, fits + " and a lake" * 20 + " at the very end"])
    assert note.startswith("a prompt is over 32 tokens: “") and "at the very end” is not read" in note
    lost = note.split("“")[1].split("”")[0]
    one, other = (encode_prompts(base, [text]) for text in ("a lake " * 60, "a lake " * 60 + lost))
    assert torch.equal(one, other) and not torch.equal(one, encode_prompts(base, [fits]))


# ---- hints in a LoRA's metadata ----

HINTS = {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.5}


@pytest.fixture
def hinted(files, tmp_path):
    """Factory of a copy of LoRA a whose metadata asks for a sampler."""

    def make(hints, name="hinted"):
        text = hints if isinstance(hints, str) else json.dumps(hints)
        return write(tmp_path / f"{name}.safetensors", read_lora(files["a"]).modules, **{HINTS_KEY: text})

    return make


def configured(*settings):
    return load_config(GenerateConfig, None, settings).config


def test_a_folder_of_peft_is_a_lora_like_any_other_at_the_strength_of_its_config(base, files, tmp_path):
    tensors = {}
    for name, pair in read_lora(files["a"]).modules.items():
        stem = f"base_model.model.{unflatten(name)[1]}"
        tensors |= {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up}
    (tmp_path / "adapter_model.safetensors").write_bytes(serialize(tensors, {}))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    cfg, notes = configured(f"loras.0.path={tmp_path}").resolved()
    assert cfg.loras[0].path == str(tmp_path) and notes == []
    stack = stack_of(base)
    assert distance(draw(base, (str(tmp_path), {})), draw(base, (files["a"], {}))) <= ONE_LEVEL
    assert stack.new_notes() == []
    config.unlink()
    bare = shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    assert distance(draw(base, (str(bare), {})), draw(base, (files["a"], {}))) > ONE_LEVEL
    (note,) = stack.new_notes()
    assert note.startswith(str(bare)) and "strength is unknown" in note


def test_hints_are_obeyed_where_the_config_leaves_a_key_open_and_said(hinted):
    path = hinted(HINTS)
    cfg, notes = configured(f"loras.0.path={path}").resolved()
    assert cfg.sampler() == ("lcm", 4, 1.5)
    assert notes == [f"{key} {HINTS[key]}, as {path} asks for" for key in HINTED]
    cfg, notes = configured(f"loras.0.path={path}", "num_inference_steps=9").resolved()
    assert cfg.sampler() == ("lcm", 9, 1.5)
    assert f"num_inference_steps 9, although {path} asks for 4" in notes and len(notes) == 3
    cfg, notes = configured(f"loras.0.path={path}", "num_inference_steps=4", "scheduler=lcm").resolved()
    assert notes == [f"guidance_scale 1.5, as {path} asks for"]


def test_without_hints_or_at_weight_0_the_fallback_counts(hinted, files):
    for settings in (
        [],
        [f"loras.0.path={files['a']}"],
        [f"loras.0.path={hinted(HINTS)}", "loras.0.weight=0"],
        [f"loras.0.path={hinted('{}')}"],
        [f"loras.0.path={hinted(dict.fromkeys(HINTED))}"],
    ):
        cfg, notes = configured(*settings).resolved()
        assert cfg.sampler() == tuple(FALLBACK.values()) and notes == []


def test_of_two_loras_the_first_decides_and_the_other_s_wish_is_said(hinted):
    first, second = hinted(HINTS), hinted({"num_inference_steps": 8, "guidance_scale": 1.5}, "second")
    cfg, notes = configured(f"loras.0.path={first}", f"loras.1.path={second}").resolved()
    assert cfg.sampler() == ("lcm", 4, 1.5)
    assert notes[3:] == [f"num_inference_steps 4, although {second} asks for 8"]


@pytest.mark.parametrize(
    "hints",
    [
        "no JSON",
        "[1]",
        "7",
        {"scheduler": "dpm"},
        {"num_inference_steps": 0},
        {"guidance_scale": "high"},
        {"steps": 4},
    ],
)
def test_hints_that_are_not_usable_are_refused_by_the_file_s_name(hinted, hints):
    path = hinted(hints)
    with pytest.raises(UserError) as caught:
        configured(f"loras.0.path={path}").resolved()
    assert str(caught.value).startswith(f"{path}: its {HINTS_KEY}")
    assert read_hints(hinted(HINTS)) == HINTS


def test_lcm_takes_no_more_steps_than_it_was_distilled_for(hinted):
    assert configured("scheduler=lcm", "num_inference_steps=50").resolved()[0].sampler()[1] == 50
    for settings in (
        ["scheduler=lcm", "num_inference_steps=51"],
        [f"loras.0.path={hinted({'scheduler': 'lcm'})}", "num_inference_steps=51"],
    ):
        with pytest.raises(UserError, match="num_inference_steps 51: lcm takes 50 at most"):
            configured(*settings).resolved()
    assert configured("scheduler=ddim", "num_inference_steps=51").resolved()[0].sampler()[1] == 51


# ---- grids ----


def test_cells_run_row_by_row_and_keep_what_no_axis_changes(files):
    cfg = configured(
        f"loras.0.path={files['a']}",
        "loras.0.weight=0.2",
        f"loras.1.path={files['b']}",
        'grid={"weight": [0, 0.5, 1], "rank": [1, null]}',
        "seed=7",
    )
    cells = dict(cfg.numbered_cells())
    assert list(cells) == [(i, j) for i in range(2) for j in range(3)]
    for (i, j), cell in cells.items():
        assert [lora.weight for lora in cell.loras] == [(0, 0.5, 1)[j]] * 2
        assert [lora.rank for lora in cell.loras] == [(1, None)[i]] * 2
        assert cell.seed == 7 and cell.grid == {}
    assert cfg.axis_labels() == (["weight 0", "weight 0.5", "weight 1"], ["rank 1", "rank null"])
    plain = configured("seed=7")
    assert plain.numbered_cells() == [((0, 0), plain)] and plain.axis_labels() == ([], [])


def test_the_lora_axis_changes_the_first_file_and_labels_tell_checkpoints_apart(files):
    paths = [f"ckpt/run/checkpoint-0000{n}/lora.safetensors" for n in (100, 200)] + ["ckpt/run.safetensors"]
    cfg = configured(
        f"loras.0.path={files['a']}", f"loras.1.path={files['b']}", f"grid.lora={json.dumps(paths)}"
    )
    assert [[lora.path for lora in cell.loras] for _, cell in cfg.numbered_cells()] == [
        [path, files["b"]] for path in paths
    ]
    labels, _ = cfg.axis_labels()
    assert len(set(labels)) == 3 and labels[2] == "lora run"
    assert ["100" in labels[0], "200" in labels[1]] == [True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['grid={"wieght": [1]}'], "grid: wieght is no axis; choose weight, lora, rank, guidance_scale"),
        (['grid={"seed": [1, 2]}'], "grid: seed is no axis"),
        (['grid={"guidance_scale": [3, 0.5]}'], "grid: guidance_scale cannot be 0.5: "),
        (['grid={"scheduler": ["ddim", "ddmi"]}'], 'grid: scheduler cannot be "ddmi": '),
        (['grid={"num_inference_steps": ["many"]}'], 'grid: num_inference_steps cannot be "many": '),
        (['grid={"weight": [0, 1]}'], "grid, loras: the axis weight needs a LoRA in loras"),
        (['grid={"lora": ["x.safetensors"]}'], "grid, loras: the axis lora needs a LoRA in loras"),
        (["loras.0.path=x", 'grid={"rank": [0]}'], "grid: rank cannot be 0: "),
        (["loras.0.path=x", 'grid={"lora": [""]}'], 'grid: lora cannot be "": '),
        (["loras.0.path=x", 'grid={"weight": [1, null]}'], "grid: weight cannot be null: "),
        (['grid={"prompt": ["a", ["b", "c"]]}'], 'grid: prompt cannot be ["b", "c"]: '),
        (['grid={"prompt": ["a"]}', "prompt_file=x.txt"], "grid, prompt_file: "),
        (["grid.weight=[]", "loras.0.path=x"], "grid.weight: must be"),
        (
            ["loras.0.path=x", 'grid={"weight": [1], "rank": [1], "prompt": ["a"]}'],
            "grid: a sheet has two axes at most",
        ),
    ],
)
def test_an_impossible_grid_is_refused_and_the_axis_is_named(settings, message):
    with pytest.raises(ConfigError) as caught:
        configured(*settings)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
