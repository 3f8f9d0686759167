"""The metadata of a LoRA file is the same for every run of a config and gives nothing private away."""

import json

import pytest

from lorakit.weights.adapter_config import AdapterAlphas, adapter_metadata
from lorakit.weights.lora_metadata import converted_metadata, training_metadata

CONFIG = {
    "learning_rate": 1e-4,
    "lr_scheduler_name": "constant",
    "seed": 7,
    "mixed_precision": "auto",
    "noise_offset": None,
    "data_dir": "/home/ada/pictures/mountain",
    "output_dir": "ckpt",
    "log_dir": "logs",
    "resume_from_checkpoint": None,
    "nested": {"folder": "C:\\Users\\ada\\x", "list": ["~/secret/y", "kept/relative", 3]},
}
FACTS = dict(
    name="mountain",
    rank=4,
    alpha=2.0,
    base_name="/home/ada/models/base",
    cross_attention_dim=768,
    prediction_type="epsilon",
    mixed_precision="bf16",
    resolution=512,
    steps=100,
    epochs=10,
    num_images=10,
)


def metadata(**changes):
    return training_metadata(**(FACTS | {"config": CONFIG} | changes))


def test_all_values_are_text_and_the_keys_that_other_tools_need_are_there():
    found = metadata()
    assert all(isinstance(value, str) for value in found.values())
    expected = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_output_name": "mountain",
        "ss_learning_rate": "0.0001",
        "ss_lr_scheduler": "constant",
        "ss_seed": "7",
        "ss_mixed_precision": "bf16",  # what "auto" came to
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "mountain",
    }
    assert expected.items() <= found.items()
    assert "ss_network_args" in found and "ss_noise_offset" not in found


@pytest.mark.parametrize(
    ("width", "prediction", "v2", "version", "architecture"),
    [
        (768, "epsilon", "False", "sd_v1", "stable-diffusion-v1/lora"),
        (32, "epsilon", "False", "sd_v1", "stable-diffusion-v1/lora"),
        (1024, "epsilon", "True", "sd_v2", "stable-diffusion-v2-512/lora"),
        (1024, "v_prediction", "True", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_the_base_family_follows_the_width_of_its_text(width, prediction, v2, version, architecture):
    found = metadata(cross_attention_dim=width, prediction_type=prediction)
    assert (found["ss_v2"], found["ss_base_model_version"]) == (v2, version)
    assert found["modelspec.architecture"] == architecture


def test_absolute_paths_keep_their_last_part_only():
    found = metadata()
    assert "ada" not in json.dumps(found) and "secret" not in json.dumps(found)
    config = json.loads(found["lorakit.config"])
    assert config["data_dir"] == "mountain" and found["ss_sd_model_name"] == "base"
    assert config["nested"] == {"folder": "x", "list": ["y", "kept/relative", 3]}


def test_where_a_run_writes_and_how_it_was_resumed_do_not_show():
    elsewhere = CONFIG | {"output_dir": "other", "log_dir": "/tmp/x", "resume_from_checkpoint": "latest"}
    assert metadata() == metadata(config=elsewhere)
    assert metadata() != metadata(config=CONFIG | {"seed": 8})


def test_alphas_come_back_from_the_adapter_metadata_they_were_written_to():
    facts = {
        ("unet", "mid_block.attentions.0.proj_in"): (4, 8.0),
        ("unet", "mid_block.attentions.0.proj_out"): (4, 8.0),
        ("unet", "conv_in"): (2, 0.1),
        ("text_encoder", "text_model.encoder.layers.1.mlp.fc1"): (4, 3.0),
        ("text_encoder", "text_model.encoder.layers.11.mlp.fc1"): (8, 1.0),
    }
    written = adapter_metadata(facts, {"text_encoder"})
    alphas = AdapterAlphas(written)
    assert {key: alphas.alpha(*key, rank) for key, (rank, _) in facts.items()} == {
        key: alpha for key, (_, alpha) in facts.items()
    }
    fields = json.loads(written["lora_adapter_metadata"])
    assert fields["unet.rank_pattern"] == {"conv_in": 2} and fields["text_encoder.use_dora"] is True
    known = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora"}
    assert {key.split(".")[1] for key in fields} <= known


def alphas_of(fields):
    return AdapterAlphas({"lora_adapter_metadata": json.dumps(fields)})


def test_rslora_of_other_tools_is_folded_into_alpha_and_unknown_fields_are_ignored():
    alphas = alphas_of({"unet.lora_alpha": 8, "unet.use_rslora": True, "unet.invented_in_2031": [1]})
    assert alphas.alpha("unet", "conv_in", 16) == 32.0


def test_a_pattern_names_the_end_of_a_path_at_a_dot():
    alphas = alphas_of({"text_encoder.lora_alpha": 8, "text_encoder.alpha_pattern": {"q_proj": 2, "proj": 5}})
    assert alphas.alpha("text_encoder", "a.q_proj", 4) == 2
    assert alphas.alpha("text_encoder", "a.k_proj", 4) == 8


def test_without_metadata_alpha_is_the_rank():
    assert AdapterAlphas({}).alpha("unet", "conv_in", 6) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"unet.lora_alpha": "much"},
        {"unet.lora_alpha": None},
        {"unet.lora_alpha": float("nan")},
        {"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q|(": 2}},
        {"unet.lora_alpha": 1, "unet.alpha_pattern": [1]},
    ],
)
def test_adapter_metadata_that_leaves_the_strength_open_is_refused(fields):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        alphas_of(fields)


@pytest.mark.parametrize(("is_v2", "version"), [(None, None), (False, "sd_v1"), (True, "sd_v2")])
def test_a_converted_file_says_of_its_base_what_is_known(is_v2, version):
    found = converted_metadata({"ss_tag": "x"}, is_v2=is_v2)
    assert found.get("ss_base_model_version") == version and found["ss_tag"] == "x"
    assert ("modelspec.architecture" in found) == (version is not None)
    kept = {"ss_base_model_version": "sd_v2_v"}
    assert converted_metadata(kept, is_v2=is_v2)["ss_base_model_version"] == "sd_v2_v"
