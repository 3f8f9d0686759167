"""LoRAs for few steps are known by their names, and words that mean other things too are not enough."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorakit.weights.few_steps import few_steps


@pytest.fixture
def found(tmp_path):
    """Factory: what is seen in a file of this name and metadata."""

    def look(name, **metadata):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(1)}, path, metadata)
        return few_steps(str(path))

    return look


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [
        ("LCM_LoRA_Weights_SD15", 4, 1.0),
        ("lcm-lora-sdv1-5/pytorch_lora_weights", 4, 1.0),
        ("Hyper-SD15-8steps-lora", 8, 1.0),
        ("Hyper-SD15-1step-lora", 1, 1.0),
        ("Hyper-SD15-12steps-CFG-lora", 12, 5.0),
        ("sd15_lightning_4step_lora", 4, 1.0),
        ("sd-turbo-lora", 4, 1.0),
        ("TCD-SD15-LoRA", 4, 1.0),
        ("pcm_sd15_smallcfg_2step_converted", 2, 1.0),
        ("dmd2_4step", 4, 1.0),
    ],
)
def test_published_names_ask_for_a_sampler(found, name, steps, guidance):
    sign = found(name)
    assert sign is not None and sign.sure
    assert sign.hints() == {"scheduler": "lcm", "num_inference_steps": steps, "guidance_scale": guidance}


@pytest.mark.parametrize("name", ["turbo_boat", "lightning over a lake", "Turbo"])
def test_words_of_the_language_are_not_sure(found, name):
    assert found(name).sure is False and found(name + "_8steps").sure is True


@pytest.mark.parametrize("name", ["mountain", "hyperreal", "ink_sd15", "palcm", "200steps", "lora-steps4"])
def test_other_names_say_nothing(found, name):
    assert found(name) is None


def test_metadata_counts_and_what_was_fitted_to_pictures_is_none(found):
    assert found("x", ss_output_name="my LCM lora").hints()["num_inference_steps"] == 4
    assert found("x") is None
    own = {"lorakit.config": json.dumps({"objective": "denoise"})}
    assert found("lcm_boat", **own) is None and found("lcm_boat") is not None
