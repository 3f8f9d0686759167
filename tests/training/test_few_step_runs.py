"""Runs of the objective lcm, and what becomes of their files: sampled as they ask, not inverted, mixed."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from small import ROOT, torchrun

import generate
import invert
import mix_lora
import style_transfer
import train_lora
from lorakit.film.config import MorphConfig
from lorakit.film.morph_plan import make_morph_plan
from lorakit.ground.config import load_config
from lorakit.ground.errors import StoppedError, UserError
from lorakit.training.config import TrainConfig
from lorakit.training.plan import make_plan
from lorakit.weights.lora_file import lora_bytes
from lorakit.weights.lora_metadata import HINTS_KEY
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.tensors import read_header

HINT = {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
LCM = {"objective": "lcm", "lcm": {"guidance_scale": [2.0, 4.0]}, "validation_images": 2}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def far(one: Path, other: Path) -> float:
    a, b = load_file(one), load_file(other)
    return max(float((a[key] - b[key]).abs().max() / b[key].abs().max().clamp(min=1e-12)) for key in a)


def validations(path: Path) -> list[float]:
    lines = (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    return [record["validation_loss"] for line in lines if "validation_loss" in (record := json.loads(line))]


@pytest.fixture
def few_step(fitted, tmp_path) -> Path:
    """A file as a run of lcm writes it, under a name that says nothing."""
    path = tmp_path / "quick.safetensors"
    metadata = {HINTS_KEY: json.dumps(HINT), "lorakit.config": json.dumps({"objective": "lcm"})}
    path.write_bytes(lora_bytes(read_lora(fitted[0]).modules, layout="kohya", metadata=metadata))
    return path


# ---- runs ----


def test_a_run_resumes_exactly_and_its_file_says_how_to_sample_it(trained, settings, tmp_path):
    straight = trained(**LCM)
    metadata = read_header(straight)[1]
    assert json.loads(metadata[HINTS_KEY]) == HINT
    cfg = load_config(
        TrainConfig, "cfg/mountain.json", settings(output_dir=str(tmp_path / "b"), **LCM)
    ).config
    plan, run = make_plan(cfg), Path(cfg.output_dir) / cfg.ckpt_name
    with pytest.raises(StoppedError):
        train_lora.train(cfg, plan, run, stop_after=3)
    (path,) = train_lora.train(cfg, plan, run, run / "checkpoint-00000003")
    assert sha(path) == sha(straight) and validations(path) == validations(straight)
    assert len(validations(path)) == 2
    plain = trained(output_dir=str(tmp_path / "plain"))
    assert HINTS_KEY not in read_header(plain)[1] and sha(plain) != sha(straight)


def test_the_best_one_is_nearer_to_the_teacher(trained, tmp_path):
    """On a base of random weights a small rate comes nearer and a huge one goes away: the judge sees both."""
    options = LCM | {"max_train_steps": 12, "validation_steps": 3, "lr_scheduler_name": "cosine"}
    calm = trained(learning_rate=3e-3, **options)
    wild = trained(learning_rate=3.0, max_grad_norm=None, output_dir=str(tmp_path / "wild"), **options)
    assert validations(calm)[-1] < validations(wild)[-1]
    best = trained(
        learning_rate=3.0,
        max_grad_norm=None,
        final_weights="best",
        output_dir=str(tmp_path / "best"),
        **options,
    )
    first = int(np.argmin(validations(wild))) * 3 + 3
    assert read_header(best)[1]["ss_steps"] == str(first)


def test_a_base_that_predicts_v_is_taught_as_well(trained, tmp_path):
    path = trained(prediction_type="v_prediction", **LCM)
    assert read_header(path)[1]["modelspec.prediction_type"] == "v" and len(validations(path)) == 2
    plain = trained(output_dir=str(tmp_path / "plain"), **LCM)
    assert validations(path) != validations(plain) and all(np.isfinite(validations(path)))


def test_how_a_step_is_split_makes_no_difference(trained, tmp_path):
    keys = LCM | {"adam_epsilon": 1e-5}  # which makes no step of a gradient that is all rounding
    whole = trained(train_batch_size=4, **keys)
    parts = trained(train_batch_size=1, total_batch_size=4, output_dir=str(tmp_path / "parts"), **keys)
    assert far(parts, whole) < 1e-4


@pytest.mark.slow(20)
def test_two_processes_with_batch_1_equal_one_with_batch_2(trained, settings, tmp_path):
    single = trained(train_batch_size=1, total_batch_size=2, max_train_steps=3, **LCM)
    arguments = settings(train_batch_size=1, max_train_steps=3, output_dir=str(tmp_path / "two"), **LCM)
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        torchrun("train_lora.py", arguments), cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert far(tmp_path / "two" / "run.safetensors", single) < 1e-5


def test_samples_show_the_base_at_both_samplers(trained):
    options = {"sample_steps": 6, "sample_inference_steps": 5, "sample_seeds": [0], "sample_prompts": ["a"]}
    folder = trained(**LCM | options).with_suffix("") / "samples"
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == ["00000000-00.png", "00000006-00.png", "few-step-00.png", "sheet.png"]
    usual, own, student = (
        np.asarray(Image.open(folder / name), np.int16) for name in (*names[:1], names[2], names[1])
    )
    assert np.abs(usual - own).max() > 1 and np.abs(student - own).max() > 1
    told = json.loads((folder / "settings.json").read_text())
    assert told["steps"] == 5 and told["sampler"] == HINT


def test_the_loras_of_the_teacher_are_learnt_and_not_in_the_base(trained, fitted, tmp_path):
    def first_sample(path):
        return np.asarray(Image.open(path.with_suffix("") / "samples/00000000-00.png"), np.int16)

    sampled = {"sample_steps": 6, "sample_inference_steps": 3, "sample_seeds": [0], "sample_prompts": ["a"]}
    plain = trained(**LCM, **sampled)
    settings = LCM["lcm"] | {"teacher_loras": [{"path": str(fitted[1]), "weight": 0.5}]}
    styled = trained(output_dir=str(tmp_path / "styled"), **LCM | {"lcm": settings} | sampled)
    assert np.abs(first_sample(styled) - first_sample(plain)).max() > 1  # the teacher, that with its style
    assert load_file(styled).keys() == load_file(plain).keys() and far(styled, plain) > 1e-3
    assert validations(styled) != validations(plain)
    none = LCM["lcm"] | {"teacher_loras": [{"path": str(fitted[1]), "weight": 0.0}]}
    assert far(trained(output_dir=str(tmp_path / "none"), **LCM | {"lcm": none}), plain) < 1e-4


def test_other_teachers_are_another_run(trained, settings, fitted, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(fitted[1].read_bytes())
    options = LCM | {"lcm": {"teacher_loras": [{"path": str(teacher)}]}}
    trained(**options)
    teacher.write_bytes(fitted[2].read_bytes())
    with pytest.raises(UserError, match="teacher_loras: other files"):
        trained(resume_from_checkpoint=True, max_train_steps=8, **{k: v for k, v in options.items()})
    with pytest.raises(UserError, match="objective: lcm -> denoise"):
        trained(resume_from_checkpoint=True, max_train_steps=8)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": ["lcm", "denoise"]}, 'objective: "lcm" draws its own noisy latents'),
        (
            {"snr_gamma": 5.0},
            'objective, snr_gamma: snr_gamma weights the loss of denoise, and does not go with "lcm"',
        ),
        ({"noise_offset": 0.1}, "objective, noise_offset"),
        ({"train_text_encoder": True}, "objective, train_text_encoder"),
        ({"masked_loss": "alpha"}, "masked_loss, objective"),
        ({"objective": "denoise"}, 'lcm, objective: settings of "lcm", which objective does not name'),
        ({"lcm": {"guidance_scale": 0.5}}, "guidance_scale: 1 or more"),
        ({"lcm": {"guidance_scale": [5.0, 3.0]}}, "the lower of two numbers first"),
        ({"lcm": {"solver_steps": 30}}, "solver_steps"),
        ({"lcm": {"num_inference_steps": 51}}, "num_inference_steps"),
    ],
)
def test_settings_that_do_not_agree_are_refused_and_named(settings, changes, told):
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, None, settings(**LCM | changes))
    assert told in str(caught.value)


def test_a_teacher_that_cannot_teach_is_refused(settings, random_lora, tiny_text_encoder, tmp_path):
    def argv(path):
        return settings(**LCM | {"lcm": {"teacher_loras": [{"path": str(path)}]}})

    with pytest.raises(UserError, match="nowhere"):
        train_lora.main(argv(tmp_path / "nowhere.safetensors"))
    path = tmp_path / "text.safetensors"
    modules = random_lora(tiny_text_encoder(0), 3, "text_encoder", targets="attention").modules
    path.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    with pytest.raises(UserError, match="lcm.teacher_loras: .* changes the text encoder too"):
        train_lora.main(argv(path))


# ---- the file in other scripts ----


def note(path: Path) -> str:
    return f"note        scheduler lcm, as {path} asks for\n"


def test_generate_and_style_transfer_obey_the_file_and_say_so(
    few_step, fitted, tiny_base, pictures, tmp_path, capsys
):
    common = [
        f"pretrained_model_name_or_path={tiny_base}",
        f"output_dir={tmp_path / 'out'}",
        'prompt="a lake"',
    ]
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    for script, more in ((generate, []), (style_transfer, [f"image={pictures / '0.png'}", "strength=0.5"])):
        for path, obeys in ((few_step, True), (fitted[0], False)):
            loras = json.dumps([{"path": str(path)}])
            assert script.main([str(empty), *common, *more, f"loras={loras}", "overwrite=true"]) == 0
            out = capsys.readouterr().out
            assert (note(path) in out) == obeys


def test_morph_and_invert_refuse_it(few_step, fitted, tiny_base, pictures):
    def films(path):
        images = json.dumps(
            [{"path": str(pictures / f"{k}.png"), "prompt": "a", "lora": str(path)} for k in (0, 1)]
        )
        words = [f"pretrained_model_name_or_path={tiny_base}", f"images={images}"]
        return make_morph_plan(load_config(MorphConfig, None, words).config)

    def inverts(path):
        return invert.main(
            ["--check", f"image={pictures / '0.png'}", "prompt=a", f"lora={path}"]
            + [f"pretrained_model_name_or_path={tiny_base}"]
        )

    for refusing in (films, inverts):
        with pytest.raises(UserError, match="quick.safetensors: .*few steps"):
            refusing(few_step)
        refusing(fitted[0])


@pytest.mark.parametrize(
    ("sources", "kept"),
    [
        (["style", "quick=-0.5"], False),
        (["quick", "style"], True),
        (["style", "quick"], True),
        (["quick", "quick2"], True),
        (["style"], False),
        (["quick", "eight"], False),
    ],
)
def test_a_mix_keeps_the_sampler_that_one_of_its_sources_is_for(few_step, fitted, tmp_path, sources, kept):
    eight = {HINTS_KEY: json.dumps(HINT | {"num_inference_steps": 8})}
    for name, metadata in (("style", {}), ("eight", eight), ("quick2", {HINTS_KEY: json.dumps(HINT)})):
        content = lora_bytes(read_lora(fitted[1]).modules, layout="kohya", metadata=metadata)
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    out = tmp_path / "out.safetensors"
    words = []
    for source in sources:
        name, _, weight = source.partition("=")
        words.append(f"{tmp_path / name}.safetensors={weight or 0.8}")
    assert mix_lora.main(["mix", *words, f"out={out}"]) == 0
    found = read_header(out)[1].get(HINTS_KEY)
    assert (json.loads(found) if found else None) == (HINT if kept else None)
