"""Faults in the life of a run, L1 to L16: signals in every phase, ranks that die, full disks, damage.

Processes are forked from this one, which has imported everything, so that a start takes a blink. Kills at
random points are in tests/test_train.py, test_morph.py and test_runs.py, in the hundreds in tests/soak.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
from harness import ROOT, assert_refused, litter, sha, snapshot
from small import free_port, full_disk, settings_of, torchrun

from lorakit.ground.checkpoints import checkpoints, verify_checkpoint
from lorakit.ground.config import load_config
from lorakit.ground.errors import UserError
from lorakit.ground.runs import lock_run
from lorakit.training.config import APPLIED, FIXED, FREE, BaseLora, TrainConfig
from lorakit.training.lcm_config import LcmSettings
from lorakit.training.motion_config import MotionSettings
from lorakit.training.plan import make_plan
from lorakit.training.prior_config import PriorSettings
from lorakit.training.resume import check_resume
from lorakit.training.smooth_config import SmoothSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def started(
    script: str,
    arguments: list[str],
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    env: dict[str, str] | None = None,
) -> int:
    """A process of its own that runs the script; returns its id. `prepare` plants a fault in it."""

    def work() -> int:
        import importlib

        from accelerate.state import AcceleratorState

        from lorakit.film import shooting
        from lorakit.ground.process import run_guarded

        AcceleratorState._reset_state(True)
        os.environ.update(env or {})
        shooting.SAVE_SECONDS = 0.0
        with log.open("a", buffering=1) as sys.stdout, log.open("a", buffering=1) as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            prepare()
            return run_guarded(lambda: importlib.import_module(script).main(arguments))

    return soak.fork(work)


def code_of(pid: int, log: Path) -> int:
    """The exit code of a process; one that hangs is killed when the test's own time is up."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        print(log.read_text()[-1000:])
        os.kill(pid, signal.SIGKILL)
        raise


def signalled(module: str, name: str, *signums: int, call: int = 1) -> Callable[[], None]:
    """Plants signals at the n-th call of a function: they arrive when it begins."""

    def prepare() -> None:
        import importlib

        place, count = importlib.import_module(module), 0
        *way, last = name.split(".")
        for part in way:
            place = getattr(place, part)
        real = getattr(place, last)

        def hit(*args, **options):
            nonlocal count
            count += 1
            if count == call:
                for signum in signums:
                    os.kill(os.getpid(), signum)
            return real(*args, **options)

        setattr(place, last, hit)

    return prepare


# ---- L5: signals ----

TRAINING = {
    "while latents are cached": (("lorakit.training.caches", "write_entry"), "before the first step", 0),
    "in the first step": (("lorakit.training.watch", "Metrics.add"), "at step 1 of 6", 1),
    "in the validation": (("lorakit.training.watch", "validation_loss"), "at step 4 of 6", 4),
    "in a save": (("lorakit.training.saving", "publish_checkpoint"), "at step 3 of 6", 3),
}


@pytest.fixture
def straight(trained, tmp_path) -> str:
    """The hash of the LoRA of a run that nothing befell."""
    return sha(trained(output_dir=str(tmp_path / "straight"), cache_dir=str(tmp_path / "straight/cache")))


@pytest.mark.parametrize("phase", TRAINING)
def test_l5_sigterm_in_a_training_leaves_one_checkpoint_at_its_step(straight, settings, tmp_path, phase):
    place, words, step = TRAINING[phase]
    log, run = tmp_path / "log.txt", tmp_path / "ckpt/run"
    pid = started("train_lora", settings(), log, signalled(*place, signal.SIGTERM))
    assert code_of(pid, log) == 143
    said = log.read_text()
    message = said[said.index("stopped: ") :]
    assert words in message and "resume_from_checkpoint=latest" in message and "Traceback" not in said
    assert [at for at, folder in checkpoints(run) if verify_checkpoint(folder)][-1:] == [step][: step > 0]
    assert not (tmp_path / "ckpt/run.safetensors").exists() and not litter(tmp_path / "ckpt")
    again = started("train_lora", settings(resume_from_checkpoint="latest"), log)
    assert code_of(again, log) == 0 and sha(tmp_path / "ckpt/run.safetensors") == straight


def test_l5_sigterm_while_the_lora_is_published_comes_too_late_to_stop_anything(straight, settings, tmp_path):
    log = tmp_path / "log.txt"
    pid = started(
        "train_lora", settings(), log, signalled("lorakit.training.saving", "publish_lora", signal.SIGTERM)
    )
    assert code_of(pid, log) == 0 and sha(tmp_path / "ckpt/run.safetensors") == straight


@pytest.mark.parametrize(("phase", "call"), [("in the first step", 3), ("in a save", 2)])
def test_l5_a_second_interrupt_leaves_at_once_and_costs_no_checkpoint(
    straight, settings, tmp_path, phase, call
):
    log, run = tmp_path / "log.txt", tmp_path / "ckpt/run"
    plant = signalled(*TRAINING[phase][0], signal.SIGINT, signal.SIGINT, call=call)
    assert code_of(started("train_lora", settings(), log, plant), log) == 130
    assert "stopped: interrupted" in log.read_text() and "Traceback" not in log.read_text()
    assert [at for at, folder in checkpoints(run) if verify_checkpoint(folder)] == [2]
    assert not litter(tmp_path / "ckpt")
    again = settings(resume_from_checkpoint="latest")
    assert code_of(started("train_lora", again, log), log) == 0
    assert sha(tmp_path / "ckpt/run.safetensors") == straight


FILM = {
    "in an inversion": ("lorakit.diffusion.denoiser", "Denoiser.__call__"),
    "between frames": ("lorakit.film.shooting", "save_png"),
}


@pytest.mark.parametrize("phase", FILM)
def test_l5_sigterm_in_a_morph_keeps_what_is_done(morphed, morph_settings, tmp_path, phase):
    options = {"loras": (False,) * 3, "reschedule": "off", "frames": 4}
    whole, _ = morphed(**options, name="straight", cache_dir=str(tmp_path / "other"))
    log, arguments = tmp_path / "log.txt", morph_settings(**options)
    assert code_of(started("morph", arguments, log, signalled(*FILM[phase], signal.SIGTERM)), log) == 143
    assert "are kept. To go on: python morph.py" in log.read_text() and "Traceback" not in log.read_text()
    frames = tmp_path / "out/film/frames"
    kept = snapshot(frames) if frames.exists() else {}
    assert len(kept) == (phase == "between frames")
    assert code_of(started("morph", arguments, log), log) == 0
    assert snapshot(frames) == snapshot(whole / "frames") and kept.items() <= snapshot(frames).items()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_l5_a_signal_to_the_morph_alone_ends_the_training_that_it_started(
    morph_settings, pictures, tmp_path, signum, code
):
    """As `kill -INT` sends it; a Ctrl-C reaches both by itself."""
    stub, begun, log = tmp_path / "stub", tmp_path / "begun", tmp_path / "log.txt"
    stub.write_text(f"#!/bin/sh\ntrap 'exit 143' TERM\necho $$ > '{begun}'\nwhile :; do sleep 0.05; done\n")
    stub.chmod(0o755)
    (tmp_path / "fit.json").write_text('{"n_epochs": 1, "data_dir": "x"}')
    images = [{"path": str(pictures / f"{k}.png"), "lora": None} for k in range(2)]
    images[1]["lora"] = str(tmp_path / "loras/fitted.safetensors")
    arguments = morph_settings(images=images, train_if_missing=True, fit_config=str(tmp_path / "fit.json"))
    pid = started("morph", arguments, log, lambda: setattr(sys, "executable", str(stub)))
    while not (begun.exists() and begun.read_text()):
        assert soak.ended(pid) is None, log.read_text()
        time.sleep(0.01)
    os.kill(pid, signum)
    assert code_of(pid, log) == code, log.read_text()
    assert "the same command goes on" in log.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


def test_l5_a_training_that_a_signal_ended_before_its_handlers_stood_is_stopped_not_failed(
    morph_settings, pictures, tmp_path
):
    stub, begun, log = tmp_path / "stub", tmp_path / "begun", tmp_path / "log.txt"
    stub.write_text(f"#!/bin/sh\ntouch '{begun}'\nexec sleep 9999\n")  # no handlers at all
    stub.chmod(0o755)
    (tmp_path / "fit.json").write_text('{"n_epochs": 1, "data_dir": "x"}')
    images = [{"path": str(pictures / f"{k}.png"), "lora": None} for k in range(2)]
    images[0]["lora"] = str(tmp_path / "loras/fitted.safetensors")
    arguments = morph_settings(images=images, train_if_missing=True, fit_config=str(tmp_path / "fit.json"))
    pid = started("morph", arguments, log, lambda: setattr(sys, "executable", str(stub)))
    while not begun.exists():
        assert soak.ended(pid) is None, log.read_text()
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid, log) == 143 and "training failed" not in log.read_text()


# ---- L3: processes that train together ----


def ranks(settings: Callable[..., list[str]], log: Path, port: int, **changes: object) -> list[int]:
    """Two processes that share a training, as a launcher starts them."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"ACCELERATE_USE_CPU": "true"}
    return [
        started("train_lora", settings(**changes), log, env=env | {"RANK": f"{k}", "LOCAL_RANK": f"{k}"})
        for k in range(2)
    ]


def test_l3_a_rank_that_dies_ends_the_others_and_both_resume_to_the_same_bytes(trained, settings, tmp_path):
    trained(max_train_steps=1, output_dir=str(tmp_path / "warm"))  # fills the cache, and imports everything
    options = {"max_train_steps": 60, "checkpointing_steps": 5, "validation_steps": 0, "logging_steps": 1}
    log, run = tmp_path / "log.txt", tmp_path / "ckpt/run"
    whole = ranks(settings, log, free_port(), **options, output_dir=str(tmp_path / "whole"))
    assert [code_of(pid, log) for pid in whole] == [0, 0], log.read_text()
    first, second = ranks(settings, log, free_port(), **options)
    while len(checkpoints(run)) < 2:
        assert soak.ended(first) is None, log.read_text()
        time.sleep(0.005)
    os.kill(second, signal.SIGKILL)
    assert code_of(second, log) == -signal.SIGKILL
    assert code_of(first, log) not in (0, -signal.SIGKILL)
    newest, folder = checkpoints(run)[-1]
    assert newest < 60 and verify_checkpoint(folder)
    resumed = ranks(settings, log, free_port(), **options, resume_from_checkpoint="latest")
    assert [code_of(pid, log) for pid in resumed] == [0, 0], log.read_text()
    assert sha(tmp_path / "ckpt/run.safetensors") == sha(tmp_path / "whole/run.safetensors")


def test_l3_a_signal_to_one_rank_stops_both_at_the_same_step(settings, tmp_path):
    options = {
        "max_train_steps": 4000,
        "checkpointing_steps": 9000,
        "validation_steps": 0,
        "logging_steps": 1,
    }
    log, metrics = tmp_path / "log.txt", tmp_path / "ckpt/run/metrics.jsonl"
    pids = ranks(settings, log, free_port(), **options)
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 3:
        assert soak.ended(pids[0]) is None, log.read_text()
        time.sleep(0.005)
    os.kill(pids[1], signal.SIGTERM)
    assert [code_of(pid, log) for pid in pids] == [143, 143], log.read_text()
    [(step, folder)] = checkpoints(tmp_path / "ckpt/run")
    assert 3 <= step < 4000 and verify_checkpoint(folder)


def test_l5_sigterm_to_torchrun_stops_both_ranks_and_leaves_no_orphan(settings, tmp_path):
    options = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "validation_steps": 0}
    launch = torchrun("train_lora.py", settings(**options))
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    log, metrics = tmp_path / "log.txt", tmp_path / "ckpt/run/metrics.jsonl"
    with log.open("w") as out:
        launcher = subprocess.Popen(launch, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 2:
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.05)
        launcher.terminate()
        assert launcher.wait() != 0
        with pytest.raises(ProcessLookupError):
            os.killpg(launcher.pid, 0)  # nobody of its session is left
    finally:
        try:
            os.killpg(launcher.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert "stopped: at step" in log.read_text() and "torchrun --nproc_per_node 2" in log.read_text()
    [(step, folder)] = checkpoints(tmp_path / "ckpt/run")
    assert 0 < step < 100_000 and verify_checkpoint(folder)


# ---- L1: what a kill or a power cut leaves ----


def test_l1_the_soak_sees_what_is_not_whole(trained, morphed, tmp_path):
    """Its two looks at a folder after a kill, each with a control."""
    run = trained(validation_steps=2).with_suffix("")
    assert soak.unusable_checkpoints(run) == []
    state = checkpoints(run)[-1][1] / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    assert len(soak.unusable_checkpoints(run)) == 1
    folder, _ = morphed(loras=(False,) * 3, reschedule="off", frames=2)
    assert soak.unusable_files(folder) == []
    frame = folder / "frames/0001.png"
    frame.write_bytes(frame.read_bytes()[:-30])
    (folder / "report.json").write_text("{")
    assert len(soak.unusable_files(folder)) == 2


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {
    "a file cut short": lambda folder: os.truncate(folder / "lora.safetensors", 9),
    "a file of zeros, as a power cut leaves": lambda folder: zeroed(folder / "lora.safetensors"),
    "an empty file": lambda folder: os.truncate(folder / "state.json", 0),
    "an empty manifest": lambda folder: os.truncate(folder / "manifest.json", 0),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a file too many": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a manifest of another version": lambda folder: manifest(folder, version=2),
    "a manifest of another step": lambda folder: manifest(folder, step=7),
}


def manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("case", DAMAGE)
def test_l9_a_damaged_newest_checkpoint_is_passed_over_and_stays_where_it_is(command, train, a_run, case):
    """The refusal names the checkpoint that was chosen, before torch is imported."""
    run = a_run(train(max_train_steps=9))
    (run / "checkpoint-final").mkdir()
    resume = train(max_train_steps=3, resume_from_checkpoint="latest")
    assert_refused(command("train_lora", resume), 2, "checkpoint-00000006 is at step 6, past the 3 steps")
    DAMAGE[case](run / "checkpoint-00000006")
    before = snapshot(run)
    result = command("train_lora", resume)
    assert_refused(result, 2, "checkpoint-00000004 is at step 4, past the 3 steps", "raise them")
    assert snapshot(run) == before and not result.torch
    asked = train(max_train_steps=3, resume_from_checkpoint=str(run / "checkpoint-00000006"))
    result = command("train_lora", asked)  # named outright, it is refused with what is wrong
    assert_refused(result, 2, str(run / "checkpoint-00000006"), "the checkpoints of this run", "-00000004")


# ---- L10: versions ----

GOLDEN = {
    "manifest.json": """{
 "format": "lorakit-checkpoint",
 "version": 1,
 "step": 4,
 "files": {
  "state.json": {
   "size": 41,
   "sha256": "GOLDEN"
  }
 }
}""",
    "state.json": '{"version": 1, "step": 4, "config": {}}\n\n',
}
"""A checkpoint as version 1 writes it: a later format reads it still, or counts up and refuses it."""


def test_l10_a_checkpoint_of_version_1_is_read(tmp_path):
    import hashlib

    from lorakit.training.resume import read_state

    folder = tmp_path / "checkpoint-00000004"
    folder.mkdir()
    digest = hashlib.sha256(GOLDEN["state.json"].encode()).hexdigest()
    for name, text in GOLDEN.items():
        (folder / name).write_text(text.replace("GOLDEN", digest))
    assert verify_checkpoint(folder)["step"] == 4 and read_state(folder)["step"] == 4


def test_l10_another_version_is_refused_with_both_numbers(command, train, a_run):
    run = a_run(train(max_train_steps=9), version=99)
    resume = train(max_train_steps=9, resume_from_checkpoint="latest")
    result = command("train_lora", resume)
    assert_refused(result, 2, "version 99", "reads version 1", "resume it with the version that wrote it")
    for _, folder in checkpoints(run):
        manifest(folder, version=2)
    before = snapshot(run)
    result = command("train_lora", resume)
    assert_refused(result, 2, "checkpoint version 2", "reads version 1", "overwrite=true")
    assert not result.torch and snapshot(run) == before


# ---- L6 and L8: whose run it is ----


@pytest.mark.parametrize("script", ["train_lora", "morph"])
def test_l6_a_folder_in_use_is_refused_at_once(command, train, film, tmp_path, script):
    make, folder = {"train_lora": (train, "run"), "morph": (film, "film")}[script]
    with lock_run(tmp_path / "out" / folder):
        before = snapshot(tmp_path)
        ways = [{}, {"overwrite": True}]
        ways += [{"resume_from_checkpoint": "latest"}] if script == "train_lora" else []
        for changes in ways:
            result = command(script, make(**changes))
            assert_refused(
                result, 2, str(tmp_path / "out" / folder), f"process {os.getpid()}", "another name"
            )
            assert not result.torch and result.blinks < 20 and snapshot(tmp_path) == before
    with lock_run(tmp_path / "out" / folder):  # and it is free again
        pass


def changed(key: str, value: object) -> object:
    """Another value that the key takes; of the keys that need one of their own, what stands in OTHERS."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "other"


# Files that may lie elsewhere and must hold the same.
CONTENTS = {
    "base_loras": "other files or weights",
    "prompt_embeds": "other text states",
    "motion": "other settings, or another adapter",
}
OTHERS = {
    "objective": "smooth",
    "lcm": LcmSettings.model_validate({"solver_steps": 100}),
    "prior": PriorSettings.model_validate({"prompts": ("x",)}),
    "smooth": SmoothSettings.model_validate({"weight": 2.0}),
    "motion": MotionSettings.model_validate({"motion_adapter": "x", "camera": {"zoom": 1.3}}),
    "base_loras": (BaseLora(path=str(ROOT / "pyproject.toml")),),  # any file has a hash
    "prompt_embeds": str(ROOT / "ckpt/miniature/text_encoder/model.safetensors"),  # any tensors have one
    "mixed_precision": "bf16",
    "prediction_type": "v_prediction",
    "clip_skip": 2,
    "crop": "random",
    "missing_captions": "empty",
    "broken_images": "skip",
    "target_modules": "all",
    "init_lora_weights": "kaiming",
    "optimizer": "prodigy",
    "save_format": "diffusers",
    "save_dtype": "fp16",
    "final_weights": "best",
    "lr_scheduler_name": "cosine",
    "resume_from_checkpoint": True,
    "report_to": ("wandb",),
    "sample_prompts": ("x",),
    "sample_seeds": (5,),
    "early_stop_patience": 3,
    "lora_alpha": 2.0,
    "snr_gamma": 5.0,
    "text_encoder_learning_rate": 1e-3,
    "total_batch_size": 1,
    "validation_steps": 5,
}


@pytest.mark.parametrize("key", sorted(TrainConfig.model_fields))
def test_l8_every_key_that_changed_is_refused_or_applied_and_said_or_free(train, a_run, key):
    arguments = train(max_train_steps=9, target_modules="attention", rank=4)
    folder = checkpoints(a_run(arguments))[-1][1]
    cfg = load_config(TrainConfig, ROOT / "cfg/mountain.json", arguments).config
    plan = make_plan(cfg)
    assert check_resume(cfg, plan, folder) == []
    assert (key in FIXED) + (key in APPLIED) + (key in FREE) == 1
    other = cfg.model_copy(update={key: changed(key, getattr(cfg, key))})
    before, after = (one.model_dump(mode="json")[key] for one in (cfg, other))
    assert before != after
    if key in FIXED or key in CONTENTS:
        shown = CONTENTS.get(key, ".* -> ")
        with pytest.raises(UserError, match=f"(?s){key}: {shown}.*set these back, or start a new ckpt_name"):
            check_resume(other, plan, folder)
    else:
        said = [f"{key}: {before} -> {after}, from here on"] if key in APPLIED else []
        assert check_resume(other, plan, folder) == said


# ---- L4 and L11: disks ----


def test_l4_a_disk_that_fills_at_any_write_of_a_mix_keeps_the_earlier_lora(
    here, fitted, monkeypatch, tmp_path
):
    out = tmp_path / "mixed.safetensors"
    arguments = ["mix", *map(str, fitted), *settings_of(out=str(out), overwrite=True)]
    codes = []
    while not codes or codes[-1]:
        out.write_bytes(b"earlier")
        with monkeypatch.context() as planted:
            full_disk(planted, len(codes) + 1)
            result = here("mix_lora", arguments)
        codes.append(result.code)
        if result.code:
            assert_refused(result, 4, str(out), "No space left", "free some space")
            assert not litter(tmp_path)
            assert out.read_bytes() == b"earlier" or len(codes) == 2  # the name was there, its sync failed
    assert codes == [4, 4, 0] and out.stat().st_size > 1000


def test_l4_a_disk_that_fills_at_any_write_of_an_inversion(here, tiny_base, pictures, monkeypatch, tmp_path):
    out = tmp_path / "out"
    options = dict(image=str(pictures / "0.png"), pretrained_model_name_or_path=str(tiny_base))
    options |= dict(num_inference_steps=2, methods=["ddim"], guidance_scales=[1.0], output_dir=str(out))
    codes: list[int] = []
    while not codes or codes[-1]:
        with monkeypatch.context() as planted:
            full_disk(planted, len(codes) + 1)
            result = here("invert", settings_of(**options))
        codes.append(result.code)
        if result.code:
            assert_refused(result, 4, str(out), "No space left", "space")
        assert not litter(tmp_path) and soak.unusable_files(out) == []
    assert len(codes) > 5 and set(codes[:-1]) == {4}


PLACES = {
    "a file as parent": (str(ROOT / "Makefile/x"), ["Makefile", "folder"]),
    "no file system for files": ("/proc/nowhere/x", ["/proc/nowhere", "use another folder"]),
    "a name too long": (f"/tmp/{'a' * 300}", ["too long", "shorten"]),
    "NUL": ("a\0b", [r"'a\x00b", "not a possible path"]),
}


@pytest.mark.parametrize("script", ["train_lora", "morph", "invert", "generate", "style_transfer"])
@pytest.mark.parametrize("case", PLACES)
def test_l11_a_place_that_cannot_be_written_is_found_before_a_model_is_loaded(
    command, train, film, inversion, sampling, restyling, case, script
):
    makers = {"train_lora": train, "morph": film, "invert": inversion}
    make = (makers | {"generate": sampling, "style_transfer": restyling})[script]
    place, words = PLACES[case]
    result = command(script, make(output_dir=place))
    assert_refused(result, 4, *words)
    assert not result.torch and result.blinks < 20


@pytest.mark.parametrize("case", list(PLACES)[:3])
def test_l11_a_place_that_cannot_be_written_by_a_mix(here, fitted, case):
    place, words = PLACES[case]
    result = here("mix_lora", ["mix", *map(str, fitted), *settings_of(out=f"{place}.safetensors")])
    assert_refused(result, 4, words[0])


# ---- L13 and L16: what fails beside the loop ----


def test_l16_a_picture_that_breaks_in_a_decoding_thread_is_named(here, settings, monkeypatch, tmp_path):
    from lorakit.pictures.images import ImageError
    from lorakit.training import caches

    real = caches.load_image

    def broken(source, *, name, **options):
        if name == "2.png":
            raise ImageError(f"{name}: truncated or broken PNG; replace it")
        return real(source, name=name, **options)

    monkeypatch.setattr(caches, "load_image", broken)
    result = here("train_lora", settings(dataloader_num_workers=2))
    assert_refused(result, 2, "2.png", "replace it")
    assert not (tmp_path / "ckpt/run.safetensors").exists() and not litter(tmp_path)
    monkeypatch.undo()
    assert here("train_lora", settings(dataloader_num_workers=2)).code == 0


def test_l16_a_thread_that_fails_otherwise_ends_the_run_with_its_traceback(here, settings, monkeypatch):
    from lorakit.training import caches

    def exhausted(*args, **options):
        raise MemoryError("planted")

    monkeypatch.setattr(caches, "load_image", exhausted)
    result = here("train_lora", settings(dataloader_num_workers=2))
    assert result.code == 1 and "MemoryError: planted" in result.err


def test_l15_the_lengths_that_make_no_run(command, train, a_run):
    assert_refused(command("train_lora", train(max_train_steps=0)), 2, "max_train_steps", ">= 1", "not 0")
    assert_refused(command("train_lora", train(n_epochs=0)), 2, "n_epochs", ">= 1", "not 0")
    run = a_run(train(max_train_steps=9))
    before = snapshot(run)
    result = command("train_lora", train(max_train_steps=5, resume_from_checkpoint="latest"))
    assert_refused(result, 2, "checkpoint-00000006 is at step 6, past the 5 steps", "raise them")
    assert snapshot(run) == before and not result.torch
