"""The configs, defaults and tokenizer that ship: equal to what the libraries make of a repository."""

import json
import random
from pathlib import Path

import narrow
import pytest
from class_defaults import MODELS, SCHEDULERS, class_defaults

from lorakit.weights.part_files import BaseError
from lorakit.weights.published import completed, family_configs, load_tokenizer

TABLE = Path(__file__).resolve().parents[2] / "lorakit/weights/published/class_defaults.json"
END = "<|endoftext|>"


def test_the_table_of_defaults_is_that_of_the_classes():
    """Where it fails, the libraries have changed: `python tests/weights/class_defaults.py > TABLE`."""
    table = json.loads(TABLE.read_text())
    assert table == class_defaults()
    assert {*MODELS, "CLIPTextModel", *SCHEDULERS} == set(table)


def test_what_a_config_leaves_out_is_filled_in_and_what_it_says_stays():
    assert completed("vae", {"latent_channels": 8})["scaling_factor"] == 0.18215
    assert completed("vae", {"scaling_factor": 0.5})["scaling_factor"] == 0.5
    assert completed("text_encoder", {})["num_hidden_layers"] == 12
    assert completed("scheduler", {"_class_name": "PNDMScheduler"})["beta_schedule"] == "linear"
    assert completed("scheduler", {"_class_name": "LCMScheduler"})["beta_schedule"] == "scaled_linear"
    assert completed("scheduler", {"_class_name": "Unheard"})["beta_end"] == 0.02


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_completed_config_is_the_one_that_diffusers_builds(part):
    import diffusers

    cls = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    config = narrow.short(part, json.loads(narrow.parts()[part].to_json_string()))
    theirs = cls.from_config(config).config
    ours = completed(part, config)
    shared = ours.keys() & theirs.keys() - {"_use_default_values"}
    assert len(shared) >= 18 and "scaling_factor" not in config
    assert {key: json.dumps(ours[key]) for key in shared} == {key: json.dumps(theirs[key]) for key in shared}


# Of Stable Diffusion 1.5 and 2.1, as everybody counts them.
PARAMETERS = {"sd1": (859_520_964, 83_653_863, 123_060_480), "sd2": (865_910_724, 83_653_863, 340_387_840)}


@pytest.mark.parametrize("family", PARAMETERS)
def test_published_configs_build_models_of_the_published_size(family):
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = family_configs(family)
    with torch.device("meta"):
        models = (
            UNet2DConditionModel.from_config(configs["unet"]),
            AutoencoderKL.from_config(configs["vae"]),
            CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
        )
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == PARAMETERS[family]


def test_the_tokenizer_that_ships_knows_clips_tokens():
    tokenizer = load_tokenizer(None, END)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(("family", "pad"), [("sd1", END), ("sd2", "!")])
def test_the_tokenizer_that_ships_equals_that_of_a_repository(family, pad, tmp_path):
    narrow.write_tokenizer(tmp_path, family)
    ours, theirs = load_tokenizer(None, pad), load_tokenizer(tmp_path, END)
    other = load_tokenizer(None, END if pad == "!" else "!")
    rng = random.Random(0)
    words = ["wow", "! ", "é", "日本", " a photo", " of,", "'s", "123", "🙂", END, "\n", "ÜNÏ", "¼", "\u0085"]
    texts = ["".join(rng.choices(words, k=rng.randrange(40))) for _ in range(200)]
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert ours(texts, **options).input_ids == theirs(texts, **options).input_ids
    assert other(texts, **options).input_ids != theirs(texts, **options).input_ids


def test_a_folder_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BaseError) as caught:
        load_tokenizer(tmp_path, END)
    assert str(tmp_path) in str(caught.value)
