"""Trainings under text states from a file: captions cease to count, the states do, a resume keeps them."""

from pathlib import Path

import pytest
import torch

from lorakit.ground.config import ConfigError
from lorakit.ground.errors import UserError
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_metadata import STATES_KEY
from lorakit.weights.tensors import read_header, read_tensors, serialize
from lorakit.weights.text_states import STATES, states_digest


@pytest.fixture
def states(tiny_base, tmp_path):
    """Factory of files of text states for the tiny base."""
    info = inspect_base(str(tiny_base))

    def make(name, seed=0, shape=(info.max_tokens, info.cross_attention_dim), key=STATES) -> str:
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(
            serialize({key: torch.randn(shape, generator=torch.Generator().manual_seed(seed))}, {})
        )
        return str(path)

    return make


def same(one: Path, other: Path) -> bool:
    a, b = read_tensors(one)[0], read_tensors(other)[0]
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_captions_do_not_count_and_the_states_do(trained, states, pictures):
    data = {"max_train_steps": 2, "validation_steps": 0, "seed": 1}
    one, other = states("one"), states("other", seed=1)
    loras = [
        trained(**data, ckpt_name="a", prompt_embeds=one),
        trained(**data, ckpt_name="b", prompt_embeds=one, trigger_word="xyz"),
        trained(**data, ckpt_name="c", prompt_embeds=other),
        trained(**data, ckpt_name="d"),
    ]
    assert same(loras[0], loras[1]) and not same(loras[0], loras[2]) and not same(loras[0], loras[3])
    told = [read_header(lora)[1].get(STATES_KEY) for lora in loras]
    assert told == [states_digest(one), states_digest(one), states_digest(other), None]


def test_a_resume_under_other_states_is_refused(trained, states):
    keys = {"max_train_steps": 2, "validation_steps": 0, "checkpointing_steps": 1}
    trained(**keys, prompt_embeds=states("own"))
    states("own", seed=3)
    with pytest.raises(UserError, match="prompt_embeds: other text states"):
        trained(**keys, prompt_embeds=states("own", seed=3), resume_from_checkpoint="latest")


def test_what_are_no_states_of_this_base_is_refused(trained, states, tmp_path):
    for path, message in {
        states("flat", shape=(5,)): "holds text states .5,., this base has",
        states("wide", shape=(77, 2)): "this base has",
        states("named", key="other"): "holds no tensor prompt_embeds",
        str(tmp_path / "none.safetensors"): "there is no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            trained(prompt_embeds=path)
    with pytest.raises(ConfigError, match="leave nothing of the text encoder to train"):
        trained(prompt_embeds=states("own"), train_text_encoder=True)
    assert not list((tmp_path / "ckpt").glob("*.safetensors"))
