"""train_lora.py on a tiny base: what it writes, that options do what they say, that runs equal each other."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from runs import killed_and_resumed
from safetensors.torch import load_file
from small import torchrun

import train_lora
from lorakit.diffusion import lora
from lorakit.diffusion.models import Base
from lorakit.ground.config import load_config
from lorakit.ground.errors import DivergedError, StoppedError, UserError
from lorakit.training.config import APPLIED, FIXED, FREE, TrainConfig
from lorakit.training.plan import make_plan
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_reader import read_lora

ROOT = Path(__file__).resolve().parents[2]


def config_of(arguments: list[str]) -> TrainConfig:
    return load_config(TrainConfig, "cfg/mountain.json", arguments).config


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(path: Path, key: str) -> dict[int, float]:
    lines = (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: pair.delta() for name, pair in read_lora(path).modules.items()}


def relative_difference(a: Path, b: Path) -> float:
    a, b = (torch.cat([d.flatten() for d in deltas(path).values()]) for path in (a, b))
    return float((a - b).norm() / b.norm())


# ---- what a run writes ----


@pytest.mark.quick
def test_a_run_writes_a_lora_that_diffusers_loads_and_a_run_folder(trained, tiny_base):
    from diffusers import StableDiffusionPipeline

    path = trained()
    run = path.with_suffix("")
    assert {"config.json", "metrics.jsonl", "best.safetensors", "checkpoint-00000006"} <= {
        p.name for p in run.iterdir()
    }
    assert not list(path.parent.rglob(".tmp-*"))
    assert list(metrics(path, "loss")) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(path, "validation_loss")) == [3, 6]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_lora_weights(str(path))
    ours = Base(inspect_base(str(tiny_base)))
    latents, embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 32, 16)
    before = ours.unet(latents, 500, embeds).sample
    lora.load_lora(path, ours.unet, adapter_name="x")
    after = ours.unet(latents, 500, embeds).sample
    torch.testing.assert_close(pipe.unet(latents, 500, embeds).sample, after, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-3  # it learned something


def test_the_resolved_config_of_a_run_trains_the_same_again(trained, tmp_path):
    first = trained()
    config = first.with_suffix("") / "config.json"
    again = tmp_path / "again"
    assert train_lora.main([str(config), f"output_dir={again}"]) == 0
    assert sha(first) == sha(again / "run.safetensors")


def test_the_file_names_its_config_and_neither_folders_nor_captions(trained, tmp_path):
    metadata = read_lora(trained()).metadata
    config = json.loads(metadata["lorakit.config"])
    assert (
        config["rank"] == 4 and metadata["ss_network_dim"] == "4" and metadata["ss_num_train_images"] == "4"
    )
    text = json.dumps(metadata)
    assert str(tmp_path) not in text and "mountains 0" not in text


@pytest.mark.parametrize(
    ("save_format", "names"),
    [("kohya", ["run"]), ("diffusers", ["run"]), ("both", ["run", "run_diffusers"])],
)
def test_save_formats(trained, save_format, names):
    path = trained(save_format=save_format)
    assert sorted(p.stem for p in path.parent.glob("*.safetensors")) == names
    layouts = [read_lora(path.with_name(f"{name}.safetensors")).layout for name in names]
    assert (
        layouts
        == {"kohya": ["kohya"], "diffusers": ["diffusers"], "both": ["kohya", "diffusers"]}[save_format]
    )


@pytest.mark.parametrize(("save_dtype", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_save_dtype(trained, save_dtype, dtype):
    pair = next(iter(read_lora(trained(save_dtype=save_dtype)).modules.values()))
    assert pair.down.dtype == dtype


# ---- equal runs ----


def run_with_stop(cfg: TrainConfig, stop: int) -> Path:
    plan, run = make_plan(cfg), Path(cfg.output_dir) / cfg.ckpt_name
    with pytest.raises(StoppedError):
        train_lora.train(cfg, plan, run, stop_after=stop)
    [path] = train_lora.train(cfg, plan, run, run / f"checkpoint-{stop:08d}")
    return path


VARIANTS = {
    "plain": {},
    "everything": dict(
        gradient_accumulation_steps=2,
        train_batch_size=3,
        random_flip=True,
        crop="random",
        caption_dropout=0.3,
        noise_offset=0.1,
        timestep_bias=2.0,
        lora_dropout=0.2,
        snr_gamma=5.0,
        train_text_encoder=True,
        lr_scheduler_name="cosine",
        lr_warmup_steps=2,
        target_modules="all",
        use_rslora=True,
        final_weights="best",
    ),
    "dora": dict(use_dora=True, save_format="diffusers", aspect_ratio_buckets=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_at_any_step_and_resumed_equals_a_straight_run(trained, settings, tmp_path, name):
    straight = trained(**VARIANTS[name])
    for stop in range(1, 6):
        changes = VARIANTS[name] | {"output_dir": str(tmp_path / f"stop{stop}")}
        cfg = config_of(settings(**changes))
        resumed = run_with_stop(cfg, stop)
        assert sha(resumed) == sha(straight), f"stopped at {stop}"
        for key in ("loss", "loss_smoothed", "grad_norm", "lr", "validation_loss"):
            assert metrics(resumed, key) == metrics(straight, key)


def test_another_seed_is_another_run(trained, tmp_path):
    assert sha(trained()) != sha(trained(seed=1, output_dir=str(tmp_path / "other")))


def test_another_bias_of_timesteps_is_another_run(trained, tmp_path):
    paths = [trained(timestep_bias=bias, output_dir=str(tmp_path / f"{bias}")) for bias in (0.0, 2.0)]
    assert sha(paths[0]) != sha(paths[1])


def test_samples_validation_logging_and_saving_do_not_touch_the_training(trained, tmp_path):
    plain = trained()
    watched = trained(
        output_dir=str(tmp_path / "watched"),
        sample_steps=2,
        validation_steps=1,
        logging_steps=1,
        checkpointing_steps=1,
    )
    samples = list((watched.with_suffix("") / "samples").glob("*.png"))
    assert len(samples) == 4 * 4 + 1  # 2 prompts x 2 seeds at 4 steps, and the sheet
    assert deltas(plain).keys() == deltas(watched).keys()
    assert relative_difference(plain, watched) == 0


def test_accumulation_equals_a_larger_batch(trained, tmp_path):
    batch = trained(train_batch_size=4)
    parts = trained(train_batch_size=1, total_batch_size=4, output_dir=str(tmp_path / "parts"))
    assert relative_difference(parts, batch) < 1e-5


def test_gradient_checkpointing_changes_memory_and_not_the_result(trained, tmp_path):
    plain = trained()
    checkpointed = trained(gradient_checkpointing=True, output_dir=str(tmp_path / "checkpointed"))
    assert relative_difference(checkpointed, plain) < 1e-5


def test_b_learns_so_many_times_as_fast_as_a(trained, tmp_path):
    """One step of AdamW moves a number by its rate; B starts at 0, so that A stays where it was in it."""
    common = {"max_train_steps": 1, "adam_weight_decay": 0.0, "learning_rate": 1e-3, "adam_epsilon": 1e-12}
    plain, plus = (
        load_file(trained(loraplus_lr_ratio=ratio, output_dir=str(tmp_path / str(ratio)), **common))
        for ratio in (1.0, 8.0)
    )
    ups = [key for key in plain if key.endswith("lora_up.weight")]
    assert ups and all(abs(float((plus[key] / plain[key]).median()) - 8) < 0.01 for key in ups)
    assert all(torch.equal(plus[key], plain[key]) for key in plain if key.endswith("lora_down.weight"))


def test_two_processes_equal_one_with_twice_the_batch(trained, settings, tmp_path):
    single = trained(train_batch_size=2, lora_dropout=0.0)
    arguments = settings(train_batch_size=1, output_dir=str(tmp_path / "two"))
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = torchrun("train_lora.py", arguments)
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout
    assert relative_difference(tmp_path / "two" / "run.safetensors", single) < 1e-5
    assert list(metrics(tmp_path / "two" / "run.safetensors", "loss")) == list(metrics(single, "loss"))


def test_epochs_count_pictures_whatever_the_process_count(settings):
    cfg = config_of(settings(n_epochs=10, max_train_steps=None))
    assert [make_plan(cfg, n).steps for n in (1, 2, 4)] == [40, 20, 10]
    cfg = config_of(settings(n_epochs=10, max_train_steps=None, total_batch_size=4))
    assert [(make_plan(cfg, n).steps, make_plan(cfg, n).accumulation) for n in (1, 2, 4)] == [
        (10, 4),
        (10, 2),
        (10, 1),
    ]


# ---- options ----


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "orthogonal"])
def test_every_init_starts_at_the_base(trained, init):
    path = trained(init_lora_weights=init, learning_rate=0.0)
    assert max(delta.abs().max() for delta in deltas(path).values()) < 1e-6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("constant", {}),
        ("constant_with_warmup", {"lr_warmup_steps": 3}),
        ("linear", {"lr_warmup_steps": 2}),
        ("cosine", {}),
        ("cosine_with_restarts", {"lr_num_cycles": 2}),
        ("polynomial", {"lr_power": 2.0}),
        ("piecewise_constant", {"lr_step_rules": "1:2,0.5:4,0.1"}),
    ],
)
def test_every_learning_rate_schedule_is_that_of_diffusers(trained, name, options):
    from diffusers.optimization import get_scheduler

    path = trained(lr_scheduler_name=name, validation_steps=0, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1e-2)
    theirs = get_scheduler(
        name,
        optimizer,
        step_rules=options.get("lr_step_rules"),
        num_warmup_steps=options.get("lr_warmup_steps", 0),
        num_training_steps=6,
        num_cycles=options.get("lr_num_cycles", 1),
        power=options.get("lr_power", 1.0),
    )
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert list(metrics(path, "lr").values()) == pytest.approx(expected)


def test_every_schedule_that_the_config_offers_is_tested():
    offered = TrainConfig.model_json_schema()["properties"]["lr_scheduler_name"]["enum"]
    mark = next(
        m
        for m in test_every_learning_rate_schedule_is_that_of_diffusers.pytestmark
        if m.name == "parametrize"
    )
    assert sorted(offered) == sorted(name for name, _ in mark.args[1])


def test_gradients_are_really_clipped(settings, monkeypatch):
    """The norm that is logged is that before clipping; what the optimizer sees is at most max_grad_norm."""
    from accelerate.optimizer import AcceleratedOptimizer

    seen = []
    step = AcceleratedOptimizer.step

    def spy(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads)))
        return step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", spy)
    assert train_lora.main(settings(max_grad_norm=1e-3)) == 0
    assert len(seen) == 6 and max(seen) < 1.001e-3
    cfg = config_of(settings())
    logged = metrics(Path(cfg.output_dir) / "run.safetensors", "grad_norm")
    assert min(logged.values()) > 1e-2
    seen.clear()
    assert train_lora.main(settings(max_grad_norm=None, overwrite=True)) == 0
    assert seen == pytest.approx(
        list(metrics(Path(cfg.output_dir) / "run.safetensors", "grad_norm").values()), rel=1e-4
    )


def test_lora_weights_stay_float32_in_every_precision(trained):
    path = trained(mixed_precision="bf16")
    assert {
        pair.down.dtype
        for pair in read_lora(path.with_suffix("") / "checkpoint-00000006/lora.safetensors").modules.values()
    } == {torch.float32}


def test_the_text_encoder_is_trained_at_its_own_rate(trained, tmp_path):
    both = read_lora(trained(train_text_encoder=True, text_encoder_learning_rate=1e-12))
    text = [pair for name, pair in both.modules.items() if name.startswith("lora_te_")]
    assert text and max(pair.up.abs().max() for pair in text) < 1e-9
    moved = read_lora(trained(train_text_encoder=True, output_dir=str(tmp_path / "moved")))
    assert (
        max(pair.up.abs().max() for name, pair in moved.modules.items() if name.startswith("lora_te_")) > 1e-3
    )


def test_a_list_of_targets_is_taken(trained):
    names = read_lora(trained(target_modules=["to_q", "conv_in"])).modules
    assert all(name.endswith(("to_q", "conv_in")) for name in names) and len(names) > 2


def test_prodigy_trains_and_resumes_exactly(trained, settings, tmp_path):
    pytest.importorskip("prodigyopt")
    options = dict(optimizer="prodigy", learning_rate=1.0)
    straight = trained(**options)
    cfg = config_of(settings(output_dir=str(tmp_path / "stopped"), **options))
    assert sha(run_with_stop(cfg, 3)) == sha(straight)


def test_an_optimizer_whose_package_is_missing_is_said_before_training(settings, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        train_lora.main(settings(optimizer="adamw8bit"))


def test_xformers_that_cannot_run_is_one_line(settings, capsys):
    assert train_lora.main(settings(enable_xformers_memory_efficient_attention=True)) == 0
    assert "attention   torch SDPA is used: xformers" in capsys.readouterr().out


def test_a_hugging_face_dataset_trains_like_the_folder(trained, settings, pictures, tmp_path):
    import datasets

    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    table = datasets.Dataset.from_dict(
        {
            "picture": [str(pictures / line["file_name"]) for line in lines],
            "says": [line["text"] for line in lines],
        }
    ).cast_column("picture", datasets.Image())
    table.save_to_disk(str(tmp_path / "saved"))
    folder = trained()
    hub = trained(
        data_dir=None,
        dataset_name=str(tmp_path / "saved"),
        image_column="picture",
        caption_column="says",
        output_dir=str(tmp_path / "hub"),
    )
    assert relative_difference(hub, folder) == 0
    with pytest.raises(UserError, match="its columns are picture, says"):
        train_lora.main(settings(data_dir=None, dataset_name=str(tmp_path / "saved"), overwrite=True))


def test_tar_files_train_like_the_folder_and_are_resumed_to_the_same_bytes(
    trained, settings, pictures, tmp_path
):
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "data").mkdir()
    for number, some in enumerate((lines[:3], lines[3:])):
        with tarfile.open(tmp_path / f"data/{number}.tar", "w") as archive:
            for line in some:
                archive.add(pictures / line["file_name"], line["file_name"])
                info = tarfile.TarInfo(Path(line["file_name"]).with_suffix(".txt").name)
                info.size = len(line["text"].encode())
                archive.addfile(info, io.BytesIO(line["text"].encode()))
    tars = {"data_dir": str(tmp_path / "data")}
    straight = trained(**tars)
    assert relative_difference(straight, trained(output_dir=str(tmp_path / "folder"))) == 0
    stopped = config_of(settings(**tars, output_dir=str(tmp_path / "stopped")))
    assert sha(run_with_stop(stopped, 3)) == sha(straight)


# ---- best, early stop ----


def test_the_best_weights_are_kept_and_published(trained, tmp_path):
    """From step 3 on the learning rate ruins the LoRA, so that a validation before is the best."""
    rates = dict(learning_rate=1e-2, lr_scheduler_name="piecewise_constant", lr_step_rules="1:3,500")
    options = dict(validation_steps=1, max_train_steps=6, **rates)
    best = trained(final_weights="best", **options)
    losses = metrics(best, "validation_loss")
    step = min(losses, key=losses.__getitem__)
    assert step < 6
    shorter = trained(output_dir=str(tmp_path / "short"), **(options | {"max_train_steps": step}))
    assert relative_difference(best, shorter) == 0
    last = trained(output_dir=str(tmp_path / "last"), **options)
    assert relative_difference(best, last) > 0.1


def test_early_stop_stops_and_stays_stopped(trained, capsys):
    options = dict(learning_rate=0.5, validation_steps=1, max_train_steps=30, early_stop_patience=2)
    path = trained(**options)
    steps = max(metrics(path, "loss"))
    assert steps < 30 and "stopped early" in capsys.readouterr().out
    assert (path.with_suffix("") / f"checkpoint-{steps:08d}").exists()
    before = sha(path)
    assert sha(trained(resume_from_checkpoint=True, **options)) == before
    assert max(metrics(path, "loss")) == steps


def test_validation_uses_its_own_pictures(trained, tmp_path, pictures):
    import shutil

    other = Path(shutil.copytree(pictures, tmp_path / "other"))
    (other / "0.png").unlink()
    lines = (other / "metadata.jsonl").read_text().splitlines()[1:]
    (other / "metadata.jsonl").write_text("\n".join(lines))
    plain = trained()
    apart = trained(validation_data_dir=str(other), output_dir=str(tmp_path / "apart"))
    assert metrics(plain, "validation_loss") != metrics(apart, "validation_loss")
    assert relative_difference(plain, apart) == 0


# ---- faults while it runs ----


def test_a_run_that_diverges_keeps_the_last_checkpoint_and_names_the_step(settings, tmp_path, monkeypatch):
    from lorakit.training.denoise import Denoise

    real, calls = Denoise.loss, []

    def poisoned(*args):
        calls.append(1)
        loss, parts = real(*args)
        return loss * (math.nan if len(calls) > 5 else 1.0), parts

    monkeypatch.setattr(Denoise, "loss", poisoned)
    with pytest.raises(
        DivergedError, match=r"step 6: .*\.png at timestep \d+.*last checkpoint is .*checkpoint-00000004"
    ) as caught:
        train_lora.main(settings(validation_steps=0, max_train_steps=8, checkpointing_steps=4))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "ckpt" / "run.safetensors").exists()
    assert [p.name for p in (tmp_path / "ckpt/run").glob("checkpoint-*")] == ["checkpoint-00000004"]


def test_a_failure_in_sampling_does_not_end_the_run(trained, tmp_path, monkeypatch, caplog):
    plain = trained()
    monkeypatch.setattr("lorakit.training.preparation.sample_images", lambda *a, **k: 1 / 0)
    path = trained(sample_steps=2, output_dir=str(tmp_path / "failing"))
    assert relative_difference(plain, path) == 0
    assert "samples at step 2 failed, training goes on" in caplog.text


def test_a_tracker_that_fails_does_not_end_the_run(trained, tmp_path, monkeypatch, caplog):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "init_trackers", lambda *a, **k: 1 / 0)
    assert trained(report_to="tensorboard").exists()
    assert "cannot start, training goes on" in caplog.text


def test_tensorboard_gets_the_losses(trained, tmp_path):
    trained(report_to="tensorboard")
    assert list((tmp_path / "log").rglob("events.out.tfevents.*"))


# ---- resume and run folders ----


def test_a_second_run_of_the_same_name_is_refused(trained, settings):
    trained()
    with pytest.raises(UserError, match=r"resume_from_checkpoint=latest.*overwrite=true.*ckpt_name"):
        train_lora.main(settings())


def test_a_finished_run_has_nothing_to_do(trained, capsys):
    path = trained()
    before = sha(path)
    path.unlink()
    assert sha(trained(resume_from_checkpoint="latest")) == before
    assert "nothing to do: step 6 of 6" in capsys.readouterr().out


def test_more_epochs_continue_a_finished_run(trained, tmp_path):
    straight = trained(max_train_steps=8, output_dir=str(tmp_path / "straight"))
    trained()
    assert relative_difference(trained(max_train_steps=8, resume_from_checkpoint=True), straight) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "rank: 4 -> 8"),
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"train_batch_size": 2}, "samples per step: 1 -> 2"),
        ({"max_train_steps": 3}, "is at step 6, past the 3 steps"),
    ],
)
def test_a_change_that_makes_another_run_is_refused_at_resume(trained, settings, change, message):
    trained()
    with pytest.raises(UserError, match=message):
        train_lora.main(settings(resume_from_checkpoint=True, **change))


def test_a_new_learning_rate_is_applied_at_resume_and_said(trained, capsys):
    trained()
    path = trained(resume_from_checkpoint=True, learning_rate=1e-3, max_train_steps=8)
    assert metrics(path, "lr")[6] == 1e-2 and metrics(path, "lr")[7] == 1e-3
    assert "learning_rate: 0.01 -> 0.001, from here on" in capsys.readouterr().out


def test_a_new_weight_decay_reaches_the_optimizer_at_resume(settings, monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer

    seen, step = [], AcceleratedOptimizer.step

    def spy(self, closure=None):
        seen.append({group["weight_decay"] for group in self.param_groups})
        return step(self, closure)

    assert train_lora.main(settings()) == 0
    monkeypatch.setattr(AcceleratedOptimizer, "step", spy)
    assert (
        train_lora.main(settings(resume_from_checkpoint=True, adam_weight_decay=0.5, max_train_steps=7)) == 0
    )
    assert seen == [{0.5}]


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(trained, tmp_path, capsys):
    straight = trained(learning_rate=1e-3, output_dir=str(tmp_path / "other"), max_train_steps=2)
    assert straight.exists()
    run = trained(sample_steps=2).with_suffix("")
    trained(resume_from_checkpoint=str(run / "checkpoint-00000002"), learning_rate=1e-3, max_train_steps=3)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-00000002",
        "checkpoint-00000003",
    ]
    assert len(list(run.glob("left-checkpoint-*"))) == 2
    assert not list((run / "samples").glob("00000006-*.png"))
    assert "checkpoint-00000006 is of the branch that is left" in capsys.readouterr().out


def test_best_starts_anew_when_the_validation_changes(trained, tmp_path):
    run = trained(validation_steps=1).with_suffix("")
    state = json.loads((run / "checkpoint-00000006/state.json").read_text())
    assert state["best_step"] is not None
    trained(resume_from_checkpoint=True, max_train_steps=8, validation_steps=8, validation_timesteps=5)
    state = json.loads((run / "checkpoint-00000008/state.json").read_text())
    assert state["best_step"] == 8


def test_a_lora_that_fails_its_check_does_not_replace_the_earlier_file(
    trained, settings, tmp_path, monkeypatch
):
    from lorakit.ground.errors import OutputError
    from lorakit.training import saving

    before = sha(trained())
    monkeypatch.setattr(saving, "verify_in_diffusers", lambda *a: 1.0)
    with pytest.raises(OutputError, match="diffusers reads something else"):
        train_lora.main(settings(overwrite=True, seed=1))
    assert sha(tmp_path / "ckpt/run.safetensors") == before
    assert not list((tmp_path / "ckpt").glob(".tmp-*"))


def test_changed_captions_are_refused_at_resume(trained, settings, pictures, tmp_path):
    import shutil

    trained()
    changed = Path(shutil.copytree(pictures, tmp_path / "changed"))
    metadata = changed / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("mountains 0", "hills 0"))
    options = dict(resume_from_checkpoint=True, max_train_steps=8, data_dir=str(changed))
    with pytest.raises(UserError, match="pictures or captions changed"):
        train_lora.main(settings(**options))
    assert train_lora.main(settings(allow_data_change=True, **options)) == 0


def test_every_key_is_classified_for_resume():
    keys = set(TrainConfig.model_fields)
    assert APPLIED <= keys and FREE <= keys
    assert not APPLIED & FREE
    assert {"rank", "seed", "lora_alpha", "target_modules", "objective", "resolution"} <= FIXED


def test_verify_resume_says_that_resume_is_exact(settings, capsys):
    assert train_lora.main([*settings(max_train_steps=100), "--verify-resume"]) == 0
    assert "resume is exact" in capsys.readouterr().out


def test_verify_resume_is_for_one_process(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without the launcher"):
        train_lora.main([*settings(), "--verify-resume"])


def test_processes_that_did_not_arrive_are_missed(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")  # as a batch system may leave it, without a rendezvous
    with pytest.raises(UserError, match="names 3 processes, 1 arrived"):
        train_lora.main(settings())


def test_verify_resume_finds_what_is_not_exact(settings, monkeypatch):
    """A negative control: noise that depends on how often it was asked for is found out."""
    from lorakit.training import data

    calls = []

    def drifting(shape, *name):
        calls.append(1)
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(calls)))

    monkeypatch.setattr(data.randomness, "normal", drifting)
    with pytest.raises(DivergedError, match="resume is not exact"):
        train_lora.main([*settings(), "--verify-resume"])


# ---- real processes ----


def start(arguments: list[str], **options) -> subprocess.Popen:
    command = [sys.executable, "train_lora.py", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_the_printed_command_resumes(
    trained, settings, tmp_path, signum, code
):
    long = dict(max_train_steps=100_000, checkpointing_steps=100_000, validation_steps=0)
    process = start(settings(**long))
    log = tmp_path / "ckpt/run/metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 4, process)
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "stopped: at step" in err and "resume_from_checkpoint=latest" in err and "Traceback" not in err
    [checkpoint] = (tmp_path / "ckpt/run").glob("checkpoint-*")
    done = int(checkpoint.name[-8:])
    assert 4 < done < 100_000
    short = long | {"max_train_steps": done + 5}
    resumed = trained(**short, resume_from_checkpoint="latest")
    assert sha(resumed) == sha(trained(output_dir=str(tmp_path / "straight"), **short))


def test_a_launcher_that_dies_takes_the_training_with_it(settings, tmp_path):
    """accelerate launch passes no SIGTERM on; the training notices that its parent has gone."""
    arguments = settings(max_train_steps=100_000, checkpointing_steps=100_000, validation_steps=0)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train_lora.py", *arguments]
    with open(tmp_path / "out.txt", "w") as out:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    run = tmp_path / "ckpt/run"
    wait_for(lambda: (run / "metrics.jsonl").exists(), launcher)
    launcher.terminate()
    launcher.wait()
    while "stopped: at step" not in (tmp_path / "out.txt").read_text():
        time.sleep(0.05)
    assert list(run.glob("checkpoint-*")) and not (run / ".lock.json").exists()


def test_kill_9_at_twenty_random_moments_and_resume_equals_a_straight_run(trained, settings, tmp_path):
    options = dict(checkpointing_steps=3, validation_steps=40)
    arguments = settings(**options, max_train_steps=100_000, resume_from_checkpoint="latest")
    run = tmp_path / "ckpt/run"
    options["max_train_steps"] = killed_and_resumed(arguments, run, times=20) + 5
    survived = trained(**options, resume_from_checkpoint="latest")
    assert sha(survived) == sha(trained(output_dir=str(tmp_path / "straight"), **options))
    assert not list(run.glob(".tmp-*"))


def test_two_runs_on_one_folder(trained, settings, tmp_path):
    long = dict(max_train_steps=150, validation_steps=0)
    first = start(settings(**long))
    wait_for(lambda: (tmp_path / "ckpt/run/.lock.json").exists(), first)
    second = start(settings(**long))
    _, err = second.communicate()
    assert second.returncode == 2 and f"process {first.pid}" in err
    out, err = first.communicate()
    assert first.returncode == 0, err
    assert sha(tmp_path / "ckpt/run.safetensors") == sha(trained(output_dir=str(tmp_path / "alone"), **long))


# ---- the command line ----


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--schema"], 0),
        (["--print-config"], 0),
        (["--check"], 0),
        (["--check", "rnak=4"], 2),
        (["rank=x"], 2),
    ],
)
def test_what_needs_no_model_answers_without_torch(program, argv, code):
    result = program("train_lora.py", argv)
    assert result.code == code and not result.torch
