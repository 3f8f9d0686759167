"""What every objective must stand: kills, several processes, and the shape of Stable Diffusion."""

import hashlib
import os
import subprocess
from pathlib import Path

import narrow
import pytest
from runs import killed_and_resumed
from safetensors.torch import load_file
from small import ROOT, settings_of, torchrun

import generate
import train_lora

PRIOR = {"prompts": ["a red house", "a lake"]}
WORDS = {"textual_inversion": {"words": {"<peak>": "mountains"}, "vectors": 2}, "trigger_word": "<peak>"}
OBJECTIVES = {
    "lcm": {"objective": "lcm", "lcm": {"guidance_scale": [2.0, 4.0]}, "validation_images": 2},
    "smooth": {"objective": ["denoise", "smooth"], "smooth": {"weight": 30.0, "every": 1}},
    "prior": {"objective": ["denoise", "prior"], "prior": PRIOR},
    "words": {"objective": "textual_inversion", **WORDS},
    "motion": {
        "objective": "motion",
        "motion": {"camera": [{"zoom": 1.3}, {"pan": -0.3}], "frames": 4, "takes": 2, "carried": 0.5},
        "target_modules": "temporal",
        "save_format": "diffusers",
    },
    "all but lcm": {
        "objective": ["denoise", "smooth", "prior", "textual_inversion"],
        "prior": PRIOR,
        "train_text_encoder": True,
        "loraplus_lr_ratio": 4.0,
        **WORDS,
    },
}
PICTURES = {name: options for name, options in OBJECTIVES.items() if name != "motion"}
each = pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def with_adapter(adapters, monkeypatch):
    """Those of motion name the motion adapter of the tiny base."""
    monkeypatch.setitem(OBJECTIVES["motion"]["motion"], "motion_adapter", adapters["folder"])


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def far(one: Path, other: Path) -> float:
    """The largest difference of two files' tensors, each of what it holds at most."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max().clamp(min=1e-12)) for key in a)


def files(folder: Path) -> list[Path]:
    """What a run leaves: its LoRA, its words."""
    found = sorted([*folder.glob("run.safetensors"), *folder.glob("run_words/*.safetensors")])
    assert found
    return found


@each
def test_kill_9_at_ten_random_moments_and_resume_equals_a_straight_run(settings, tmp_path, options):
    options = options | {"checkpointing_steps": 3, "validation_steps": 40}
    endless = settings(max_train_steps=100_000, resume_from_checkpoint="latest", **options)
    options["max_train_steps"] = killed_and_resumed(endless, tmp_path / "ckpt/run", times=10) + 5
    assert train_lora.main(settings(resume_from_checkpoint="latest", **options)) == 0
    assert train_lora.main(settings(output_dir=str(tmp_path / "straight"), **options)) == 0
    survived, straight = files(tmp_path / "ckpt"), files(tmp_path / "straight")
    assert list(map(sha, survived)) == list(map(sha, straight))
    assert not list((tmp_path / "ckpt/run").glob(".tmp-*"))


@each
def test_two_processes_with_batch_1_equal_one_with_batch_2(settings, tmp_path, options):
    # An epsilon with which AdamW does not blow up the rounding of gradients that are nearly 0.
    options = options | {"max_train_steps": 3, "validation_steps": 0, "adam_epsilon": 1e-2}
    assert train_lora.main(settings(train_batch_size=1, total_batch_size=2, **options)) == 0
    arguments = settings(train_batch_size=1, output_dir=str(tmp_path / "two"), **options)
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = torchrun("train_lora.py", arguments)
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pairs = zip(files(tmp_path / "two"), files(tmp_path / "ckpt"), strict=True)
    assert max(far(two, one) for two, one in pairs) < 1e-5


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def narrow_base(request, tmp_path_factory) -> Path:
    """Of 1.5's and of 2.1's shape, which predict epsilon and v."""
    return narrow.write_base(tmp_path_factory.mktemp(request.param), "modern", request.param)


@pytest.mark.parametrize("options", PICTURES.values(), ids=PICTURES)
def test_each_trains_and_samples_on_the_shape_of_stable_diffusion(settings, tmp_path, narrow_base, options):
    base = {"pretrained_model_name_or_path": str(narrow_base), "resolution": 64}
    samples = {
        "sample_steps": 2,
        "sample_prompts": ["a lake"],
        "sample_seeds": [0],
        "sample_inference_steps": 2,
    }
    run = options | base | samples | {"max_train_steps": 2, "validation_steps": 0, "target_modules": "all"}
    assert train_lora.main(settings(**run)) == 0
    assert (tmp_path / "ckpt/run/samples/00000002-00.png").exists()
    made = {path.parent.name: path for path in files(tmp_path / "ckpt")}
    keys = {"pretrained_model_name_or_path": str(narrow_base), "prompt": ["a lake", "a <peak>"]}
    keys |= {"prompt_syntax": "a1111", "num_inference_steps": 2, "images_per_prompt": 1}
    keys |= {"output_dir": str(tmp_path / "out"), "name": "made"}
    if "run_words" in made:
        keys["embedding_dirs"] = [str(made["run_words"].parent)]
    if "ckpt" in made:
        keys["loras"] = [{"path": str(made["ckpt"])}]
    assert generate.main(settings_of(**keys)) == 0
    assert len(list((tmp_path / "out/made").glob("0*.png"))) == 2
