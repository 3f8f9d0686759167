"""Whether a checkpoint belongs to the run that a config describes. No torch here."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.ground.checkpoints import find_resume
from lorakit.ground.errors import UserError
from lorakit.ground.runs import set_aside_after
from lorakit.training.class_pictures import class_record
from lorakit.training.config import APPLIED, FIXED
from lorakit.training.lcm_config import teacher_loras
from lorakit.training.motion_config import motion_record
from lorakit.training.objective_config import prompts_of
from lorakit.training.plan import Plan
from lorakit.weights.base import BaseInfo
from lorakit.weights.identity import base_record, changes
from lorakit.weights.text_states import states_digest

STATE_VERSION = 1


def read_state(folder: Path) -> dict[str, Any]:
    """The counters and the config of a checkpoint.

    Raises:
        UserError: it was written by another version of this toolkit.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"{folder}: its state has version {state.get('version')}, this toolkit reads version "
            f"{STATE_VERSION}; resume it with the version that wrote it"
        )
    return state


def run_record(cfg: Any, plan: Plan) -> dict[str, Any]:
    """What a checkpoint keeps of config, base and data, to compare with when it is resumed."""
    return {
        "config": cfg.model_dump(mode="json"),
        "base": base_record(plan.base),
        "dataset": plan.table.fingerprint,
        "base_loras": base_loras_record(cfg),
        "prompts": list(prompts_of(cfg)),
        "prompt_embeds": states_digest(cfg.prompt_embeds),
        "class_pictures": class_record(cfg, plan.resolution, plan.class_table),
        "teacher_loras": lora_digests(teacher_loras(cfg)),
        "motion": motion_record(cfg, plan.adapter),
        "resolution": plan.resolution,
        "total_batch": plan.total_batch,
        "validation": validation_record(cfg, plan),
    }


def base_loras_record(cfg: Any) -> list[Any]:
    """[sha256, weight] of each file that is merged into the base, wherever it lies."""
    return lora_digests(cfg.base_loras)


def lora_digests(entries: Sequence[Any]) -> list[Any]:
    """[sha256, weight] of each of some LoRAs."""
    return [[_digest(Path(entry.path)), entry.weight] for entry in entries]


def _digest(path: Path) -> str:
    """sha256 of a file, or of those in a folder."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def validation_record(cfg: Any, plan: Plan) -> list[Any]:
    """What the validation loss depends on besides the LoRA: losses of another record do not compare."""
    table = plan.validation or plan.table
    return [table.fingerprint, cfg.validation_timesteps, cfg.validation_images]


def find_start(cfg: Any, plan: Plan, run: Path, *, owner: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and what is to be said of it.

    Args:
        owner: may set aside later checkpoints, where the run goes back to an earlier one.

    Raises:
        UserError: there is no such checkpoint, or it belongs to another run.
    """
    resume, notes = find_resume(run, cfg.resume_from_checkpoint)
    if resume is not None:
        notes = [*notes, f"resuming from {resume}", *check_resume(cfg, plan, resume)]
        explicit = cfg.resume_from_checkpoint not in (True, "latest")
        if owner and explicit and resume.resolve().parent == run.resolve():
            notes += set_aside_after(run, int(resume.name.removeprefix("checkpoint-")))
    return resume, notes


def check_base(folder: Path, base: BaseInfo) -> None:
    """Refuse a checkpoint of another base, wherever this one lies; one from before that was kept passes.

    Raises:
        UserError: names the part and what differs.
    """
    state = read_state(folder)
    if lines := changes(state["base"], base_record(base)) if "base" in state else []:
        raise _trained_otherwise(folder, lines)


def _trained_otherwise(folder: Path, lines: Sequence[str]) -> UserError:
    listed = "".join(f"\n  {line}" for line in lines)
    return UserError(f"{folder} was trained otherwise:{listed}\nset these back, or start a new ckpt_name")


def check_resume(cfg: Any, plan: Plan, folder: Path) -> list[str]:
    """Refuse a checkpoint of another run; return what changed and is applied, one line each.

    Raises:
        UserError: a key changed that would make another run of it, or the base, the pictures or captions did,
            or the checkpoint is past the last step.
    """
    state = read_state(folder)
    old, new = state["config"], cfg.model_dump(mode="json")
    changed = {key for key in new if key in old and old[key] != new[key]}
    lines = [f"{key}: {old[key]} -> {new[key]}" for key in sorted(changed & FIXED - {"motion"})]
    if state["total_batch"] != plan.total_batch:
        lines.append(f"samples per step: {state['total_batch']} -> {plan.total_batch} (set total_batch_size)")
    if state.get("base_loras", []) != base_loras_record(cfg):
        lines.append("base_loras: other files or weights")
    if state.get("prompts", []) != list(prompts_of(cfg)):
        lines.append("prompts of the objectives: others")
    if state.get("prompt_embeds") != states_digest(cfg.prompt_embeds):
        lines.append("prompt_embeds: other text states")
    if state.get("class_pictures") != class_record(cfg, plan.resolution, plan.class_table):
        lines.append("pictures of the class: others")
    if state.get("teacher_loras", []) != lora_digests(teacher_loras(cfg)):
        lines.append("lcm.teacher_loras: other files or weights")
    if plan.base.known and state.get("motion") != motion_record(cfg, plan.adapter):
        lines.append("motion: other settings, or another adapter")
    if plan.base.known and state["resolution"] != plan.resolution:
        lines.append(f"resolution: {state['resolution']} -> {plan.resolution}")
    if lines:
        raise _trained_otherwise(folder, lines)
    if plan.base.known:
        check_base(folder, plan.base)
    if state["dataset"] != plan.table.fingerprint and not cfg.allow_data_change:
        raise UserError(
            f"{folder}: pictures or captions changed since; put them back, start a new ckpt_name, or set "
            "allow_data_change to true"
        )
    if state["step"] > plan.steps:
        raise UserError(
            f"{folder} is at step {state['step']}, past the {plan.steps} steps that n_epochs or "
            "max_train_steps ask for; raise them, or resume from an earlier checkpoint"
        )
    notes = [f"{key}: {old[key]} -> {new[key]}, from here on" for key in sorted(changed & APPLIED)]
    if state["step"] == plan.steps:
        notes.append(f"nothing to do: step {plan.steps} of {plan.steps} is done")
    return notes
