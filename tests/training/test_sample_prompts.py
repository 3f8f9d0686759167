"""Prompts of sample sheets with A1111's marks, whose reading leaves the training alone."""

import numpy as np
import pytest
from PIL import Image

import train_lora
from lorakit.ground.errors import UserError

SAMPLES = dict(max_train_steps=2, sample_steps=2, sample_inference_steps=2, sample_seeds=[0])
LONG = "a photo of mountains, " * 12


def samples(path, step=2):
    found = sorted((path.with_suffix("") / "samples").glob(f"{step:08d}-*.png"))
    return [np.asarray(Image.open(each).convert("RGB"), np.int16) for each in found]


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_marks_of_sample_prompts_count(trained, tmp_path, train_text_encoder):
    prompts = ["a lake", "a (lake:4)", LONG, LONG + "a lake at night"]
    options = SAMPLES | {"sample_prompts": prompts, "train_text_encoder": train_text_encoder}
    path = trained(prompt_syntax="a1111", **options)
    marked, lora = samples(path), path.read_bytes()
    again = trained(prompt_syntax="plain", overwrite=True, **options)
    plain = samples(again)
    assert len(marked) == len(plain) == 4
    assert np.abs(marked[0] - plain[0]).max() <= 1 < np.abs(marked[1] - plain[1]).max()
    assert not (marked[2] == marked[3]).all() and (plain[2] == plain[3]).all()
    assert lora == again.read_bytes()


def test_captions_that_stand_for_prompts_are_read_as_they_stand(trained, pictures, tmp_path):
    path = trained(prompt_syntax="a1111", **SAMPLES)
    marked = samples(path)
    plain = samples(trained(overwrite=True, **SAMPLES))
    assert all((one == other).all() for one, other in zip(marked, plain, strict=True))


def test_check_says_marks_that_are_not_read_and_refuses_what_cannot_be(settings, capsys):
    argv = [*settings(sample_prompts=["a (lake:1.5)", LONG]), "--check"]
    assert train_lora.main(argv) == 0
    out = capsys.readouterr().out
    assert "(lake:1.5); set prompt_syntax=a1111" in out and "is over 32 tokens" in out
    assert train_lora.main([*argv, "prompt_syntax=a1111"]) == 0
    out = capsys.readouterr().out
    assert "prompt_syntax=a1111" not in out and "is over 32 tokens" not in out
    for prompt, words in (("<lora:x:1>", "sample_prompts: <lora:x:1>: no LoRA"), ("[a|b]", "between steps")):
        with pytest.raises(UserError, match=words):
            train_lora.main([*settings(sample_prompts=[prompt], prompt_syntax="a1111"), "--check"])
