"""Processes on several machines, each with folders of its own, train the run that one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import sha
from small import free_port, torchrun
from test_train import ROOT, config_of, metrics, relative_difference

from lorakit.ground.errors import UserError
from lorakit.ground.shards import Shards
from lorakit.training import setup
from lorakit.training.plan import make_plan

ON_CPU = os.environ | {"ACCELERATE_USE_CPU": "true"}


def on_two_machines(settings, tmp_path, **changes) -> list[subprocess.CompletedProcess]:
    """A launcher on each, with its own output_dir and cache_dir, which stand for disks of their own."""
    port, started = str(free_port()), []
    for rank in range(2):
        own = tmp_path / f"machine{rank}"
        folders = {key: str(own / key) for key in ("output_dir", "cache_dir", "log_dir")}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port]
        command = [*launcher, "train_lora.py", *settings(**folders | changes)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=ON_CPU, **pipes))
    told = [each.communicate(timeout=600) for each in started]
    return [
        subprocess.CompletedProcess(each.args, each.returncode, *texts)
        for each, texts in zip(started, told, strict=True)
    ]


@pytest.mark.slow
def test_two_machines_with_a_cache_each_train_what_one_process_does(trained, settings, tmp_path):
    single = trained(train_batch_size=2, random_flip=True)
    options = {"train_batch_size": 1, "random_flip": True}
    for done in on_two_machines(settings, tmp_path, **options):
        assert done.returncode == 0, done.stderr
    lora = tmp_path / "machine0/output_dir/run.safetensors"
    assert relative_difference(lora, single) < 1e-5
    assert list(metrics(lora, "loss")) == list(metrics(single, "loss"))
    assert not list((tmp_path / "machine1").rglob("*.safetensors"))  # the first process alone writes
    shared = torchrun("train_lora.py", settings(output_dir=str(tmp_path / "shared"), **options))
    subprocess.run(shared, cwd=ROOT, env=ON_CPU, capture_output=True, check=True)
    assert sha(tmp_path / "shared/run.safetensors") == sha(lora)
    for kind in ("latents", "text"):
        whole, *own = (
            entries(tmp_path / each / kind) for each in ("cache", "machine0/cache_dir", "machine1/cache_dir")
        )
        assert len(whole) == {"latents": 8, "text": 5}[kind]
        assert own == [whole, whole]  # all that it needs, in the same bytes


def entries(folder: Path) -> dict[bytes, bytes | None]:
    cache = Shards(folder)
    return {name: cache.read(name) for name in cache.names}


def pretend(monkeypatch, **other) -> None:
    """Another process that is as this one but for what is told."""
    monkeypatch.setattr(setup, "gather_object", lambda own: [*own, {**own[0], **other}])


def test_processes_of_one_run_pass(settings, monkeypatch):
    pretend(monkeypatch)
    setup._check_same_run(make_plan(config_of(settings())), None)


@pytest.mark.parametrize(
    "other",
    [
        {"other pictures or captions": "0123"},
        {"another plan": [6, 2, 16]},
        {"another checkpoint to go on from": ["checkpoint-00000002", "0123"]},
    ],
)
def test_a_process_of_another_run_is_refused(settings, monkeypatch, other):
    pretend(monkeypatch, **other)
    with pytest.raises(UserError, match=f"(?s)process 1: {next(iter(other))}.*output_dir") as error:
        setup._check_same_run(make_plan(config_of(settings())), None)
    assert "process 0:" in str(error.value) and str(error.value).count("other") <= 1


def test_a_checkpoint_is_known_by_its_content(trained, settings, monkeypatch):
    run = trained().with_suffix("")
    first, second = (run / f"checkpoint-0000000{step}" for step in (4, 6))
    plan = make_plan(config_of(settings()))
    told: list = []
    monkeypatch.setattr(setup, "gather_object", lambda own: told.extend(own) or told)
    setup._check_same_run(plan, first)
    setup._check_same_run(plan, first)
    with pytest.raises(UserError, match="process 2: another checkpoint"):
        setup._check_same_run(plan, second)
