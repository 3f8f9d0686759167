"""Values that are legal and cannot be meant: each is said, and what is meant often is not."""

import pytest

from lorakit.ground.config import load_config
from lorakit.training.config import TrainConfig
from lorakit.training.doubts import doubts
from lorakit.training.plan import make_plan


def said(settings, **changes) -> list[str]:
    arguments = settings(**({"learning_rate": 1e-3} | changes))
    cfg = load_config(TrainConfig, "cfg/mountain.json", arguments).config
    return list(doubts(cfg, make_plan(cfg)))


CASES = {
    "warm-up": ({"lr_scheduler_name": "constant_with_warmup", "lr_warmup_steps": 6}, "never reaches"),
    "warm-up of a cosine": ({"lr_scheduler_name": "cosine", "lr_warmup_steps": 500}, "the run has 6 steps"),
    "rules": (
        {"lr_scheduler_name": "piecewise_constant", "lr_step_rules": "1:100,0.1"},
        "100 is not reached",
    ),
    "rate 0": ({"learning_rate": 0.0}, "stays as it starts"),
    "rate 1": ({"learning_rate": 1.0}, "1e-5 to 1e-2"),
    "prodigy": ({"optimizer": "prodigy", "learning_rate": 1e-4}, "1 is meant"),
    "cycles": ({"lr_num_cycles": 3}, "only cosine_with_restarts"),
    "power": ({"lr_power": 2.0}, "only polynomial"),
    "alpha": ({"lora_alpha": 64.0}, "scaled by 16"),
    "rslora": ({"rank": 128, "use_rslora": True}, "scaled by 11.3"),
    "base": ({"base_loras": [{"path": "a.safetensors", "weight": 0}]}, "has weight 0"),
    "base twice": (
        {"base_loras": [{"path": "a"}, {"path": "a", "weight": 0.5}]},
        "a is named more than once",
    ),
    "start and base": ({"base_loras": [{"path": "a"}], "init_lora": "a"}, "a is named more than once"),
    "never shown": ({"max_train_steps": 3}, "1 of 4 pictures are never shown"),
    "epochs": ({"n_epochs": 9}, "max_train_steps 6 ends the run before n_epochs 9"),
    "batch": ({"train_batch_size": 6}, "a step of 6 samples"),
    "dropout": ({"caption_dropout": 1.0}, "without their caption"),
    "crop": ({"crop": "random", "random_crops": 4, "max_aspect": 9.0}, None),
    "offset": ({"noise_offset": 1.0}, "0.05 to 0.1"),
    "resolution": ({"resolution": 64}, "made for 16 pixels"),
    "small": ({"resolution": 8}, None),
    "validation": ({"validation_steps": 7}, "only the last of the 6 steps"),
    "samples": ({"sample_steps": 50}, "sample_steps 50"),
    "patience": ({"early_stop_patience": 9}, "never stops"),
    "few steps": ({"objective": "lcm"}, "want a rate that ends at 0"),
    "few steps by cosine": ({"objective": "lcm", "lr_scheduler_name": "cosine"}, None),
    "no prompts": ({"sample_prompts": []}, "sample_prompts is empty"),
    "trigger": ({"trigger_word": "zwx", "sample_prompts": ["a lake"]}, "lack the trigger word"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said(settings, name):
    changes, words = CASES[name]
    found = said(settings, **changes)
    assert (words is None) == (not found) and all(words in each for each in found[:1])
    assert len(found) <= 1


def test_a_plain_run_raises_no_doubt(settings):
    assert said(settings) == []
    assert said(settings, lr_scheduler_name="cosine", lr_warmup_steps=3, lora_alpha=8.0, n_epochs=1) == []


def test_words_of_captions_that_cannot_be_meant_are_said(settings, pictures, tmp_path):
    import shutil

    folder = shutil.copytree(pictures, tmp_path / "sides")
    metadata = folder / "metadata.jsonl"
    plain = metadata.read_text()
    metadata.write_text(plain.replace("mountains 0", r"mountains \\(alps\\)"))
    assert r"1 caption(s) hold \(" in said(settings, data_dir=str(folder))[0]
    metadata.write_text(plain.replace("mountains 0", "a hill on the Left"))
    assert said(settings, data_dir=str(folder)) == []
    (found,) = said(settings, data_dir=str(folder), random_flip=True)
    assert "1 caption(s) speak of left or right" in found


@pytest.mark.parametrize(
    "path", ["cfg/mountain.json", "cfg/style.json", "cfg/mountain_up.json", "cfg/lcm.json"]
)
def test_what_ships_raises_no_doubt(path):
    cfg = load_config(TrainConfig, path, []).config
    assert list(doubts(cfg, make_plan(cfg))) == []


def test_the_plan_says_it(settings):
    cfg = load_config(TrainConfig, "cfg/mountain.json", settings(caption_dropout=0.9)).config
    assert any(note.startswith("caption_dropout 0.9") for note in make_plan(cfg).notes)
