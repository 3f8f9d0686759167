"""A whole run of an objective that is not ours: it has state, a teacher, a prompt of its own and draws."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_lora
from lorakit.ground.config import load_config
from lorakit.ground.errors import DivergedError, StoppedError
from lorakit.training.config import TrainConfig
from lorakit.training.objective_config import KINDS, Kind
from lorakit.training.objectives import Term
from lorakit.training.plan import make_plan

PROMPT = "a prompt that no caption has"


class Drift(Term):
    """The distance to the teacher under another prompt, less its running mean."""

    def __init__(self, cfg):
        self.mean, self.steps = 0.0, 0

    def loss(self, models, at):
        embeds = models.embed([PROMPT]).expand(len(at.batch.keys), -1, -1)
        x_t = at.x_t + 0.1 * at.batch.normal("drift")
        with torch.no_grad():
            assert not (models.teacher(x_t, at.timesteps, embeds)).requires_grad
        distance = (at.prediction - models.teacher(x_t, at.timesteps, embeds)).abs().mean(dim=(1, 2, 3))
        return distance * (1 - self.mean), {"distance": distance}

    def validation(self, models, at):
        return None

    def finish_step(self, means):
        self.mean, self.steps = 0.5 * self.mean + 0.5 * means["distance"], self.steps + 1

    def state_dict(self):
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state):
        self.mean, self.steps = state["mean"], state["steps"]


@pytest.fixture
def drifting(settings, monkeypatch, tmp_path):
    """Trains with ["denoise", "drift"], and stops after `stop` steps and goes on where it is given."""
    monkeypatch.setitem(KINDS, "drift", Kind("planted.Drift", teacher=True, prompts=lambda cfg: (PROMPT,)))
    monkeypatch.setitem(sys.modules, "lorakit.training.planted", SimpleNamespace(Drift=Drift))

    def run(name: str, stop: int | None = None, **changes) -> Path:
        arguments = settings(output_dir=str(tmp_path / name), **changes)
        cfg = load_config(TrainConfig, None, arguments).config
        cfg = cfg.model_copy(update={"objective": ("denoise", "drift")})
        plan, folder = make_plan(cfg), Path(cfg.output_dir) / cfg.ckpt_name
        resume = None
        if stop:
            with pytest.raises(StoppedError):
                train_lora.train(cfg, plan, folder, stop_after=stop)
            resume = folder / f"checkpoint-{stop:08d}"
        [path] = train_lora.train(cfg, plan, folder, resume)
        return path

    return run


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_of(path: Path) -> list[dict]:
    lines = (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def test_a_stateful_objective_resumes_exactly_and_its_parts_are_logged(drifting):
    straight = drifting("straight")
    assert sha(drifting("resumed", stop=3)) == sha(straight)
    for record in steps_of(straight):
        assert {"loss/denoise", "loss/drift", "loss/drift.distance"} <= record.keys()
        assert record["loss"] == pytest.approx(record["loss/denoise"] + record["loss/drift"], rel=1e-5)


def test_a_state_that_is_left_out_makes_another_run(drifting, monkeypatch):
    straight = drifting("straight")
    monkeypatch.setattr(Drift, "load_state_dict", lambda self, state: None)
    assert sha(drifting("forgetful", stop=3)) != sha(straight)


def test_state_does_not_depend_on_how_a_step_is_split(drifting):
    whole = load_file(drifting("whole", train_batch_size=4))
    parts = load_file(drifting("parts", train_batch_size=1, total_batch_size=4))
    difference = max(float((whole[key] - parts[key]).abs().max() / whole[key].abs().max()) for key in whole)
    assert difference < 1e-4


def test_a_part_that_diverges_is_named(drifting, monkeypatch):
    real = Drift.loss

    def broken(*args):
        loss, parts = real(*args)
        return loss * float("nan"), parts

    monkeypatch.setattr(Drift, "loss", broken)
    with pytest.raises(DivergedError, match="step 1: the loss of drift is not finite"):
        drifting("broken")
