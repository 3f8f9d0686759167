"""clip_skip and prediction_type: every script knows them, and what it makes is made with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import ONE_LEVEL, command_line, distance
from PIL import Image
from safetensors.torch import load_file

import generate
import invert
import morph
import style_transfer
import train_lora
from lorakit.diffusion.models import Base
from lorakit.ground.errors import UserError
from lorakit.ground.shards import Shards
from lorakit.sampling.samplers import sample_images
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_reader import read_lora


@pytest.fixture
def commands(settings, morph_settings, tiny_base, pictures, tmp_path):
    """script -> factory of its command line on the tiny base, with a LoRA or without."""
    picture = str(pictures / "0.png")
    few = dict(num_inference_steps=4, prompt="a photo of mountains", guidance_scale=2.0)

    def sampling(**changes):
        lora = changes.pop("lora", None)
        loras = {"loras": [{"path": lora}]} if lora else {}
        return command_line(tmp_path, tiny_base, few | loras | changes)

    def film(**changes):
        lora = changes.pop("lora", None)
        images = [{"path": picture, "lora": lora}, {"path": str(pictures / "1.png")}]
        return morph_settings(**({"images": images, "frames": 3} | changes))

    def inversion(**changes):
        changes = {"methods": ["ddim"], "guidance_scales": [3.0], "num_inference_steps": 4} | changes
        keys = {"image": picture, "pretrained_model_name_or_path": str(tiny_base), "prompt": few["prompt"]}
        keys |= {"output_dir": str(tmp_path / "inverted")} | changes
        return [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]

    return {
        train_lora: lambda **changes: settings(**{k: v for k, v in changes.items() if k != "lora"}),
        generate: sampling,
        style_transfer: lambda **changes: sampling(image=picture, controlnet=None, **changes),
        morph: film,
        invert: inversion,
    }


SCRIPTS = [train_lora, generate, style_transfer, morph, invert]
USING_LORAS = SCRIPTS[1:]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), float)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_more_layers_than_there_are_is_refused_by_the_header(commands, script, monkeypatch):
    monkeypatch.setattr("lorakit.diffusion.models.Base", None)  # nothing is loaded
    assert script.main([*commands[script](clip_skip=2), "--check"]) == 0
    with pytest.raises(UserError, match="clip_skip 3: the text encoder of .* has 2 layers"):
        script.main([*commands[script](clip_skip=3), "--check"])


@pytest.mark.parametrize("script", USING_LORAS, ids=lambda script: script.__name__)
def test_a_lora_that_was_trained_with_another_is_said(commands, trained, script, capsys):
    lora = trained(clip_skip=2, max_train_steps=1, validation_steps=0)
    capsys.readouterr()
    for clip_skip, said in ((2, False), (None, True), (1, True)):
        assert script.main([*commands[script](lora=str(lora), clip_skip=clip_skip), "--check"]) == 0
        note = f"clip_skip 1, although {lora} asks for 2"
        assert (note in capsys.readouterr().out) == said


PICTURES = {
    generate: "out/run/0000.png",
    style_transfer: "out/run/0000.png",
    morph: "out/film/frames/0001.png",
    invert: "inverted/0/ddim_guidance_3.png",
}


@pytest.mark.parametrize("key", ["clip_skip", "prediction_type"])
@pytest.mark.parametrize("script", PICTURES, ids=lambda script: script.__name__)
def test_pictures_depend_on_it_and_null_is_its_usual_value(commands, script, key, tmp_path):
    usual, other = {"clip_skip": (1, 2), "prediction_type": ("epsilon", "v_prediction")}[key]
    made = []
    for value in (None, usual, other):
        overwrite = {} if script is invert else {"overwrite": True}
        assert script.main(commands[script](**{key: value}, **overwrite)) == 0
        made.append(pixels(tmp_path / PICTURES[script]))
    assert (made[0] == made[1]).all() and distance(made[0], made[2]) > ONE_LEVEL


def test_a_picture_is_drawn_from_the_states_of_that_layer(commands, tiny_base, tmp_path):
    assert generate.main(commands[generate](clip_skip=2)) == 0
    path = tmp_path / PICTURES[generate]
    base = Base(inspect_base(str(tiny_base)))
    with torch.no_grad():
        ids = base.tokenize(["a photo of mountains", ""])
        states = base.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        embeds = base.text_encoder.final_layer_norm(states)
    options = {"seeds": [0], "shape": (16, 16), "steps": 4, "guidance_scale": 2.0}
    [drawn] = sample_images(base, embeds[:1], embeds[1:], **options)
    assert distance(np.asarray(drawn, float), pixels(path)) <= ONE_LEVEL
    assert "Clip skip: 2" in Image.open(path).text["parameters"]


def test_a_lora_is_trained_on_the_states_of_that_layer(trained, tmp_path):
    """Its file says which; the caches of the two do not meet."""
    files = {}
    for clip_skip in (None, 1, 2):
        folder = str(tmp_path / str(clip_skip))
        files[clip_skip] = trained(clip_skip=clip_skip, output_dir=folder)
        assert read_lora(files[clip_skip]).metadata["ss_clip_skip"] == str(clip_skip or 1)
    cold = trained(clip_skip=2, output_dir=str(tmp_path / "cold"), cache_dir=str(tmp_path / "empty"))
    plain, one, two, alone = (load_file(path) for path in (*files.values(), cold))
    assert all(torch.equal(plain[key], one[key]) and torch.equal(two[key], alone[key]) for key in plain)
    assert any(not torch.equal(plain[key], two[key]) for key in plain)
    assert len(Shards(tmp_path / "cache/text").names) == 2 * len(Shards(tmp_path / "empty/text").names) > 0


def test_a_text_encoder_is_trained_as_far_as_it_is_read(trained, tiny_base, capsys):
    """Layers behind it have no LoRA; diffusers loads the file into the whole encoder."""
    path = trained(clip_skip=2, train_text_encoder=True)
    modules = read_lora(path).modules
    text = {name: pair for name, pair in modules.items() if name.startswith("lora_te")}
    assert len(text) == 4 and all("_layers_0_" in name for name in text)
    assert all(float(pair.up.abs().max()) > 0 for pair in text.values())
    whole = read_lora(trained(train_text_encoder=True, ckpt_name="whole")).modules  # the control
    assert len([name for name in whole if name.startswith("lora_te")]) == 8
    assert trained(clip_skip=2, train_text_encoder=True, max_train_steps=8, resume_from_checkpoint=True)


def test_a_morph_passes_its_settings_on_to_the_training_of_its_loras(morph_settings, tmp_path, monkeypatch):
    stub, said = tmp_path / "stub", tmp_path / "said"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {said}\nexit 3\n')
    stub.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stub))
    missing = {"train_if_missing": True, "fit_config": "cfg/morph/fit.json"}
    arguments = morph_settings(**missing, prediction_type="v_prediction", clip_skip=2, frames=3)
    arguments = [word.replace("fit_0", "no") for word in arguments]
    with pytest.raises(UserError, match=r"training failed \(exit code 3\)"):
        morph.main(arguments)
    assert {'prediction_type="v_prediction"', "clip_skip=2"} <= set(said.read_text().splitlines())
