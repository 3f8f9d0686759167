"""The parts of a run: precision, dates of events, what a checkpoint holds, what steps do not do."""

import pytest
import torch
from safetensors.torch import load_file

import train_lora
from lorakit.diffusion import models
from lorakit.diffusion.frozen import keep_less
from lorakit.diffusion.models import Base
from lorakit.ground.config import load_config
from lorakit.pictures.views import View
from lorakit.training import setup
from lorakit.training.config import TrainConfig
from lorakit.training.decisions import due_steps
from lorakit.training.setup import resolve_precision
from lorakit.weights import base


def config_of(**changes) -> TrainConfig:
    settings = {"data_dir": "x", "n_epochs": 1} | changes
    return TrainConfig(**settings)


@pytest.mark.parametrize(
    ("asked", "launcher", "expected"),
    [
        ("auto", None, "no"),
        ("auto", "bf16", "bf16"),
        ("no", "fp16", "no"),
        ("bf16", "no", "bf16"),
        ("bf16", None, "bf16"),
    ],
)
def test_the_config_decides_on_precision_and_auto_leaves_it_to_the_launcher(
    monkeypatch, asked, launcher, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert resolve_precision(asked) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_half_precision_on_a_gpu_under_a_launcher_too(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # what accelerate launch sets for a GPU
    assert resolve_precision("auto") == expected
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_precision("auto") == "no"


def test_eleven_overflows_in_a_row_end_an_fp16_run_and_one_does_not(tmp_path):
    """The scaler skips steps whose gradients overflow; a run that only skips has diverged."""
    from types import SimpleNamespace

    from lorakit.training.watch import Broken, Metrics

    bar = SimpleNamespace(update=lambda n: None, set_postfix_str=lambda text: None)
    fake = SimpleNamespace(reduce=lambda t, how: t, scaler=object(), is_main_process=True, trackers=[])
    metrics = Metrics(fake, tmp_path / "metrics.jsonl", bar, 1)
    one, infinite = torch.ones(()), torch.full((), torch.inf)
    for step in range(1, 30):
        metrics.add(step, one, infinite if step in (1, 2, 3, 12) or step > 15 else one, 1e-3)
    assert metrics.flush() == Broken(26)
    fake.scaler = None
    metrics = Metrics(fake, tmp_path / "other.jsonl", bar, 1)
    metrics.add(1, one, infinite, 1e-3)
    assert metrics.flush() == Broken(1)


def test_what_the_config_says_is_predicted_is_also_sampled(tiny_base):
    from lorakit.weights.base import inspect_base

    base = Base(inspect_base(str(tiny_base)), prediction_type="v_prediction")
    assert base.noise_schedule().prediction_type == base.scheduler.config.prediction_type == "v_prediction"
    assert Base(inspect_base(str(tiny_base))).scheduler.config.prediction_type == "epsilon"


def test_other_prompts_do_not_stand_under_old_pictures(trained):
    samples = trained(sample_steps=6, sample_seeds=[1]).with_suffix("") / "samples"
    before = (samples / "00000000-00.png").read_bytes()
    trained(sample_steps=6, sample_seeds=[2], resume_from_checkpoint=True, max_train_steps=7)
    assert (samples / "00000000-00.png").read_bytes() != before
    assert not (samples / "00000006-00.png").exists()


def test_the_last_step_is_always_saved_validated_and_sampled():
    due = due_steps(config_of(checkpointing_steps=500, validation_steps=40, sample_steps=None), 90)
    assert due.checkpoint == {90} and due.validation == {40, 80, 90} and due.sample == {22, 44, 66, 88, 90}
    assert due.any == {22, 40, 44, 66, 80, 88, 90}
    none = due_steps(config_of(validation_steps=0, sample_steps=0), 10)
    assert not none.validation and not none.sample and none.checkpoint == {10}


def test_a_checkpoint_holds_the_lora_and_its_optimizer_and_nothing_of_the_base(trained):
    checkpoint = trained(max_train_steps=2).with_suffix("") / "checkpoint-00000002"
    lora, state = (load_file(checkpoint / f"{name}.safetensors") for name in ("lora", "optimizer"))
    trained_numbers = sum(tensor.numel() for tensor in lora.values())
    moments = sum(tensor.numel() for name, tensor in state.items() if "exp_avg" in name)
    assert all("lora_" in name for name in lora) and moments == 2 * trained_numbers
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}


def test_two_names_in_one_output_folder_do_not_meet(trained):
    a, b = trained(ckpt_name="a", max_train_steps=2), trained(ckpt_name="b", max_train_steps=2, seed=1)
    assert a.read_bytes() != b.read_bytes()
    for path in (a, b):
        checkpoint = path.with_suffix("") / "checkpoint-00000002"
        assert (checkpoint / "lora.safetensors").exists()
    before = a.read_bytes()
    trained(ckpt_name="b", max_train_steps=3, seed=1, resume_from_checkpoint=True)
    assert a.read_bytes() == before


def test_each_picture_is_encoded_once_and_not_at_all_in_a_later_run(trained, settings, monkeypatch):
    calls = []
    real = View.pixels
    monkeypatch.setattr(View, "pixels", lambda self, image: calls.append(1) or real(self, image))
    trained(max_train_steps=12)
    assert len(calls) == 4
    loaded = []
    real_load = Base._load
    monkeypatch.setattr(
        Base,
        "_load",
        lambda self, cls, part, dtype=None: loaded.append(part) or real_load(self, cls, part, dtype),
    )
    trained(max_train_steps=2, ckpt_name="later")
    assert len(calls) == 4
    assert "vae" not in loaded and "text_encoder" not in loaded


def test_random_crops_are_encoded_once_too(trained, monkeypatch):
    calls = []
    real = View.pixels
    monkeypatch.setattr(View, "pixels", lambda self, image: calls.append(1) or real(self, image))
    trained(max_train_steps=40, crop="random", random_crops=3, random_flip=True)
    assert len(calls) == 2 * (1 + 3 + 3 + 1)  # two of the four pictures are square


def test_defaults_do_not_bias_brightness_and_ask_for_no_package():
    cfg = config_of()
    assert cfg.noise_offset == 0.0
    assert not cfg.enable_xformers_memory_efficient_attention and cfg.optimizer == "adamw"


def test_precision_fp16_without_a_gpu_is_said(settings, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from lorakit.ground.errors import UserError

    with pytest.raises(UserError, match='take "no" or "bf16"'):
        train_lora.main(settings(mixed_precision="fp16"))


def test_the_sample_sheet_shows_the_base_first(trained):
    samples = trained(sample_steps=3, sample_seeds=[4]).with_suffix("") / "samples"
    names = sorted(path.name for path in samples.glob("0*.png"))
    assert names == [f"{step:08d}-{n:02d}.png" for step in (0, 3, 6) for n in (0, 1)]
    assert (samples / "00000000-00.png").read_bytes() != (samples / "00000006-00.png").read_bytes()


def test_samples_without_lora_are_those_of_the_base(trained, tiny_base):
    """A LoRA that was not trained (rate 0) samples the same picture as no LoRA at all."""
    samples = trained(sample_steps=6, sample_seeds=[4], learning_rate=0.0).with_suffix("") / "samples"
    assert (samples / "00000000-00.png").read_bytes() == (samples / "00000006-00.png").read_bytes()


def test_the_tutorials_values_load(tmp_path):
    loaded = load_config(TrainConfig, "cfg/sd15/mountain.json").config
    assert loaded.enable_xformers_memory_efficient_attention and loaded.n_epochs == 200


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_large_base_is_trained_to_the_same_bytes(trained, monkeypatch, precision):
    """It keeps less for the backward pass; the tiny base passes as a large one."""
    options = {"mixed_precision": precision, "target_modules": "attention+ff", "max_train_steps": 3}
    small = load_file(trained(ckpt_name="small", **options))
    lean = []
    monkeypatch.setattr(base, "LARGE", 0)
    monkeypatch.setattr(models, "_free_large_blocks", lambda: None)  # it would last for the whole process
    monkeypatch.setattr(setup, "keep_less", lambda model: lean.append(1) or keep_less(model))
    large = load_file(trained(ckpt_name="large", **options))
    assert lean and all(torch.equal(large[name], tensor) for name, tensor in small.items())
