"""Checkpoints survive kills, faults and damage; a run folder has one owner and is never lost by mistake."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.ground import checkpoints as saving
from lorakit.ground import publish
from lorakit.ground.checkpoints import (
    CheckpointError,
    checkpoints,
    find_resume,
    latest_checkpoint,
    prune_checkpoints,
    publish_checkpoint,
    verify_checkpoint,
)
from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.publish import own_name
from lorakit.ground.runs import MetricsFile, claim_run, clean_litter, lock_run

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def files_of(step):
    return {"lora.safetensors": b"%d" % step * 2000, "state.json": b'{"step": %d}' % step}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(run):
    return [step for step, _ in checkpoints(run)]


@pytest.fixture
def run(tmp_path):
    """A run folder with the checkpoints 100, 200 and 300."""
    for step in (100, 200, 300):
        publish_checkpoint(tmp_path / "run", step, files_of(step))
    return tmp_path / "run"


def fork(work, *args):
    child = os.fork()
    if child == 0:
        try:
            os._exit(work(*args) or 0)
        finally:
            os._exit(99)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Publishing


def test_a_published_checkpoint_holds_its_files_and_a_manifest_that_vouches_for_them(tmp_path):
    folder = publish_checkpoint(tmp_path / "new" / "run", 500, files_of(500))
    assert folder == tmp_path / "new" / "run" / "checkpoint-00000500"
    assert names(folder) == ["lora.safetensors", "manifest.json", "state.json"]
    assert {name: (folder / name).read_bytes() for name in files_of(500)} == files_of(500)
    assert verify_checkpoint(folder)["step"] == 500
    assert names(folder.parent) == [folder.name]


def test_a_checkpoint_of_the_same_step_is_replaced(run):
    publish_checkpoint(run, 300, {"other": b"new"})
    assert names(run / "checkpoint-00000300") == ["manifest.json", "other"]
    assert verify_checkpoint(run / "checkpoint-00000300")["step"] == 300 and len(names(run)) == 3


@pytest.mark.parametrize("name", ["../x", "a/b", "", "manifest.json"])
def test_only_plain_file_names_are_taken(tmp_path, name):
    with pytest.raises(AssertionError):
        publish_checkpoint(tmp_path, 1, {name: b""})


NEW = {"lora.safetensors": b"new", "state.json": b"{}"}


def save_and_die_at_line(number, run, step):
    """Publishes and prunes, but dies by SIGKILL at the number-th line it runs of the modules under test."""
    left = number

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in (saving.__file__, publish.__file__):
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    publish_checkpoint(run, step, NEW)
    prune_checkpoints(run, keep=2)


@pytest.mark.parametrize("step", [300, 400])
def test_a_kill_at_any_third_line_of_a_save_costs_nothing(run, tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill leaves the page cache alone
    code, newest_files, littered, number, copy = -signal.SIGKILL, set(), 0, -2, tmp_path / "copy"
    while code == -signal.SIGKILL:
        number += 3
        shutil.copytree(run, copy)
        code = exit_code(fork(save_and_die_at_line, number, copy, step))
        littered += any(name.startswith(".") for name in names(copy))
        with lock_run(copy):
            newest, skipped = latest_checkpoint(copy)
            assert not skipped and all(verify_checkpoint(path) for _, path in checkpoints(copy))
            newest_files.add((newest / "lora.safetensors").read_bytes())
            assert set(names(copy)) == {".lock", ".lock.json", *(path.name for _, path in checkpoints(copy))}
            assert len(checkpoints(copy)) >= 2
        shutil.rmtree(copy)
    assert code == 0 and steps(run) == [100, 200, 300]
    assert newest_files == {files_of(300)["lora.safetensors"], b"new"}  # kills did hit before and after
    assert littered > 10 and number > 100  # and in the middle


def save_on_and_on(run, first, writer):
    for step in range(first + 1, first + 100_000):
        publish_checkpoint(run, step, {"lora.safetensors": b"%d" % step * 50_000})
        prune_checkpoints(run, keep=2)
        os.write(writer, b".")


def test_a_run_that_always_saves_is_killed_25_times_and_its_newest_checkpoint_is_always_good(tmp_path):
    rng, run = random.Random(0), tmp_path / "run"
    for _ in range(25):
        first = (steps(run) or [0])[-1]
        reader, writer = os.pipe()
        child = fork(save_on_and_on, run, first, writer)
        os.read(reader, 1)
        time.sleep(rng.uniform(0, 0.02))  # the moment of the kill: any will do
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        os.close(reader)
        os.close(writer)
        clean_litter(run)
        newest, skipped = latest_checkpoint(run)
        assert newest is not None and not skipped and steps(run)[-1] > first
        assert len(names(run)) == len(checkpoints(run)) <= 3


def fail_call(patch, number):
    """Makes the number-th mkdir, fsync or rename fail as on a full disk; returns the list of calls made."""
    calls = []

    def counting(name, real):
        def call(*args):
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, "full")
            return real(*args)

        return call

    for name in ("mkdir", "fsync", "rename"):
        patch.setattr(os, name, counting(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("number", range(2, 10))  # the first makes the run folder, which is there already
def test_a_fault_at_any_call_of_a_save_costs_nothing(run, monkeypatch, number):
    before = names(run)
    with monkeypatch.context() as patch:
        fail_call(patch, number)
        with pytest.raises(OutputError, match="checkpoint-00000300: No space.*needs 2,002 bytes, .+ free"):
            publish_checkpoint(run, 300, {"lora.safetensors": bytes(2000), "state.json": b"{}"})
    assert all(verify_checkpoint(path) for _, path in checkpoints(run)) and steps(run) == [100, 200, 300]
    if number < 9:  # the last call syncs the run folder; the replaced checkpoint is kept until that is done
        assert names(run) == before
        assert (run / "checkpoint-00000300" / "lora.safetensors").stat().st_size == 6000
    clean_litter(run)
    assert names(run) == before


def test_a_save_is_nine_calls_that_can_fail_and_the_rename_comes_after_the_syncs(run, monkeypatch):
    calls = fail_call(monkeypatch, 0)
    publish_checkpoint(run, 300, NEW)
    assert calls == ["mkdir"] * 2 + ["fsync"] * 4 + ["rename"] * 2 + ["fsync"]


def test_the_file_size_limit_stops_a_save_and_costs_nothing(run):
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
        try:
            publish_checkpoint(run, 400, {"small": b"1", "large": bytes(50_000)})
        except OutputError as error:
            return 7 if "needs 50,001 bytes" in str(error) else 8

    before = names(run)
    assert exit_code(fork(child)) == 7
    assert names(run) == before and latest_checkpoint(run) == (run / "checkpoint-00000300", [])


# Verification


def edit_manifest(**changes):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))

    return damage


def flip_a_byte(folder):
    data = bytearray((folder / "lora.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "lora.safetensors").write_bytes(data)


def make_pipe(folder):
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


DAMAGES = {
    "lora truncated": (lambda f: os.truncate(f / "lora.safetensors", 5), r"lora\.safetensors has 5 bytes"),
    "lora empty": (lambda f: os.truncate(f / "lora.safetensors", 0), r"lora\.safetensors has 0 bytes, not 6"),
    "state truncated": (lambda f: os.truncate(f / "state.json", 5), r"state\.json has 5 bytes"),
    "state grown": (lambda f: (f / "state.json").write_bytes(b" " * 99), r"state\.json has 99 bytes"),
    "state missing": (lambda f: (f / "state.json").unlink(), r"state\.json is missing"),
    "state a pipe": (make_pipe, r"state\.json is missing"),
    "byte flipped": (flip_a_byte, r"lora\.safetensors has changed .*sha256"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest empty": (lambda f: os.truncate(f / "manifest.json", 0), r"manifest\.json cannot be read"),
    "manifest torn": (lambda f: os.truncate(f / "manifest.json", 40), r"manifest\.json cannot be read"),
    "manifest deep": (lambda f: (f / "manifest.json").write_text("[" * 99_999), r"cannot be read"),
    "other version": (edit_manifest(version=2), r"version 2 and this program reads version 1"),
    "other format": (edit_manifest(format="diffusers"), r"format 'lorakit-checkpoint'"),
    "other step": (edit_manifest(step=200), r"belongs to step 200"),
    "no files": (edit_manifest(files=None), r"lacks a step or a table"),
    "extra file": (lambda f: (f / "notes.txt").write_text("mine"), r"does not list: \['notes\.txt'\]"),
    "path in manifest": (edit_manifest(files=dict.fromkeys(["../x", *files_of(0)])), r"bad entry"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_with_its_reason(run, name):
    damage, reason = DAMAGES[name]
    damage(run / "checkpoint-00000300")
    with pytest.raises(CheckpointError, match=reason):
        verify_checkpoint(run / "checkpoint-00000300")
    folder, skipped = latest_checkpoint(run)
    assert folder == run / "checkpoint-00000200"
    assert len(skipped) == 1 and "checkpoint-00000300" in skipped[0]
    assert steps(run) == [100, 200, 300]


def test_only_damaged_checkpoints_are_an_error_that_lists_them_all(run):
    for _, folder in checkpoints(run):
        os.truncate(folder / "lora.safetensors", 0)
    with pytest.raises(CheckpointError) as caught:
        latest_checkpoint(run)
    assert all(f"checkpoint-00000{step}: lora" in str(caught.value) for step in (100, 200, 300))


def test_other_names_are_no_checkpoints(run):
    for name in ("checkpoint-final", "checkpoint-400", "checkpoint-000000400", ".tmp-00000400-1", "samples"):
        (run / name).mkdir()
    (run / "checkpoint-00000400").write_text("a file")
    assert steps(run) == [100, 200, 300]
    assert checkpoints(run / "nowhere") == [] and latest_checkpoint(run / "nowhere") == (None, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(["format", "version", "step", "files"]), JSON), whole=JSON)
def test_no_manifest_can_raise_anything_but_its_error(tmp_path_factory, changes, whole):
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint-00000100"
    folder.mkdir()
    valid = {"format": saving.FORMAT, "version": saving.VERSION, "step": 100, "files": {}}
    for manifest in (whole, valid | changes):
        (folder / "manifest.json").write_text(json.dumps(manifest))
        try:
            assert verify_checkpoint(folder)["files"] == {}
        except CheckpointError as error:
            assert str(folder) in str(error)


# Resuming


def test_resume_finds_what_was_asked_for(run, tmp_path):
    assert find_resume(run, False) == (None, [])
    assert find_resume(run, True) == find_resume(run, "latest") == (run / "checkpoint-00000300", [])
    assert find_resume(tmp_path / "new", "latest") == (None, [])
    shutil.copytree(run / "checkpoint-00000100", tmp_path / "my best")
    assert find_resume(run, str(tmp_path / "my best")) == (tmp_path / "my best", [])


def test_a_path_that_is_no_checkpoint_is_an_error_that_says_what_it_is(run, tmp_path):
    lora = tmp_path / "mountain.safetensors"
    lora.write_bytes(b"")
    os.truncate(run / "checkpoint-00000200" / "state.json", 1)
    for path, reason in [
        (lora, r"is a file \(a LoRA\?\), not a checkpoint folder"),
        (run / "checkpoint-00000900", "does not exist(.|\n)*checkpoint-00000300"),
        (run / "checkpoint-00000200", r"state\.json has 1 bytes"),
        (run, r"is a run folder.*checkpoint-00000300"),
        (tmp_path, r"manifest\.json is missing"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            find_resume(run, str(path))


def test_pruning_keeps_the_newest_that_verify_and_leaves_damaged_ones(run):
    publish_checkpoint(run, 400, files_of(400))
    os.truncate(run / "checkpoint-00000300" / "state.json", 1)
    prune_checkpoints(run, keep=5)
    assert steps(run) == [100, 200, 300, 400]
    prune_checkpoints(run, keep=2)
    assert steps(run) == [200, 300, 400]
    prune_checkpoints(run, keep=1)
    assert steps(run) == [300, 400] and len(names(run)) == 2


# One owner


def test_litter_is_cleared_and_nothing_else(run):
    (run / "samples").mkdir()
    strangers = [".tmp-mine", ".del-00000001", ".git", "notes.txt", "samples/.tmp-x", "samples/00000100.png"]
    for name in strangers:
        (run / name).write_text("keep")
    for name in (own_name("tmp"), own_name("del", 100), own_name("old", 300)):
        (run / name).mkdir()
        (run / name / "part").write_text("")
    (run / own_name("tmp", suffix=".json")).write_text("")
    (run / "samples" / own_name("tmp", suffix=".png")).write_text("")
    (run / own_name("tmp")).symlink_to(run / "checkpoint-00000100")
    expected = [*strangers, "samples", *(f"checkpoint-00000{step}" for step in (100, 200, 300))]
    clean_litter(run)
    left = names(run) + [f"samples/{name}" for name in names(run / "samples")]
    assert sorted(left) == sorted(expected)
    assert all(verify_checkpoint(path) for _, path in checkpoints(run))


def test_a_checkpoint_that_was_being_replaced_comes_back(run):
    os.rename(run / "checkpoint-00000300", run / own_name("old", 300))
    with lock_run(run):
        assert latest_checkpoint(run) == (run / "checkpoint-00000300", [])


def hold_lock(run):
    """A child that owns the run until it is killed, with a worker of its own that outlives it."""
    reader, writer = os.pipe()
    stay, end = os.pipe()

    def child():
        os.close(end)
        with lock_run(run):
            fork(lambda: len(os.read(stay, 1)))
            os.write(writer, b".")
            os.read(stay, 1)

    pid = fork(child)
    os.read(reader, 1)
    for descriptor in (reader, writer, stay):
        os.close(descriptor)
    return pid, end


def test_a_second_run_is_refused_by_name_and_a_killed_owner_never_blocks(run):
    owner, end = hold_lock(run)
    before = names(run)
    with pytest.raises(UserError, match=rf"process {owner} on .+, started 20.+another name") as caught:
        with lock_run(run):
            pass
    assert caught.value.exit_code == 2 and names(run) == before
    os.kill(owner, signal.SIGKILL)
    assert exit_code(owner) == -signal.SIGKILL
    with lock_run(run):  # while the owner's worker is still alive
        assert json.loads((run / ".lock.json").read_bytes())["pid"] == os.getpid()
    os.close(end)


def test_the_lock_is_released_at_the_end_and_after_an_error(tmp_path):
    run = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError), lock_run(run):
        raise ZeroDivisionError
    with lock_run(run), pytest.raises(UserError, match="in use"), lock_run(run):
        pass
    assert names(run) == [".lock"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', "torn {"])
def test_an_unreadable_name_of_the_owner_does_not_matter(run, text):
    with lock_run(run):
        (run / ".lock.json").write_text(text)
        with pytest.raises(UserError, match="in use by another process"), lock_run(run):
            pass


def test_a_run_folder_that_cannot_be_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run", "x" * 300):
        with pytest.raises(OutputError), lock_run(tmp_path / name):
            pass


# Claiming


@pytest.mark.parametrize("held", ["metrics.jsonl", "best.safetensors", "checkpoint-00000001/manifest.json"])
def test_a_folder_with_a_run_is_refused_unless_resumed_or_overwritten(tmp_path, held):
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("{}")
    with pytest.raises(UserError) as caught:
        claim_run(tmp_path, resume=False, overwrite=False)
    for word in (held.split("/")[0], "resume_from_checkpoint=latest", "overwrite=true", "ckpt_name"):
        assert word in str(caught.value)
    claim_run(tmp_path, resume="latest", overwrite=False)
    assert (tmp_path / held).exists()
    claim_run(tmp_path, resume=False, overwrite=True)
    assert names(tmp_path) == []


def test_a_new_or_empty_folder_and_strangers_files_are_no_run(tmp_path):
    claim_run(tmp_path / "new", resume=False, overwrite=False)
    (tmp_path / "notes.txt").write_text("mine")
    with lock_run(tmp_path):
        claim_run(tmp_path, resume=False, overwrite=False)


def test_overwriting_removes_what_we_wrote_and_nothing_else(run, tmp_path):
    (run / "samples").mkdir()
    keep = ["notes.txt", "checkpoint-final", ".git", "samples/reference.png", "samples/00000100.txt"]
    for name in [
        *keep,
        "metrics.jsonl",
        "config.json",
        "samples/00000100-0.png",
        "samples/step_00000200.webp",
    ]:
        (run / name).write_text("x")
    (tmp_path / "other").write_text("x")
    os.truncate(run / "checkpoint-00000200" / "manifest.json", 0)
    claim_run(run, resume=False, overwrite=True)
    left = names(run) + [f"samples/{name}" for name in names(run / "samples")]
    assert sorted(left) == sorted([*keep, "samples"]) and names(tmp_path) == ["other", "run"]


def test_resume_and_overwrite_exclude_each_other(run):
    with pytest.raises(UserError, match="resume_from_checkpoint and overwrite"):
        claim_run(run, resume=True, overwrite=True)
    assert steps(run) == [100, 200, 300]


# Metrics


def test_metrics_are_lines_of_json_and_can_be_read_at_once(tmp_path):
    metrics = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    metrics.append({"step": 1, "loss": 0.1 + 0.2, "event": "schön"})
    metrics.append({"step": 2, "loss": float("nan"), "lr": float("inf")})
    lines = [json.loads(line) for line in metrics.path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"step": 1, "loss": 0.1 + 0.2, "event": "schön"}
    assert lines[1] == {"step": 2, "loss": None, "lr": None}


def test_a_resumed_run_continues_its_metrics_without_repeats_or_torn_lines(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.truncate_after(5)
    assert not metrics.path.exists()
    metrics.append({"event": "start"})
    for step in range(1, 9):
        metrics.append({"step": step})
    with metrics.path.open("ab") as file:
        file.write(b'{"step": 5')
    metrics.truncate_after(5)
    metrics.append({"step": 6})
    lines = metrics.path.read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 1, 2, 3, 4, 5, 6]
    inode = metrics.path.stat().st_ino
    metrics.truncate_after(6)
    assert metrics.path.stat().st_ino == inode  # nothing to drop, nothing rewritten


def test_a_whole_record_without_its_line_end_is_torn_too(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(b'{"step": 1}\n{"step": 2}')
    metrics.truncate_after(9)
    assert metrics.path.read_bytes() == b'{"step": 1}\n'


def test_metrics_on_a_full_disk_are_an_output_error(tmp_path):
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            for step in range(50):
                MetricsFile(tmp_path / "metrics.jsonl").append({"step": step})
        except OutputError:
            return 7

    assert exit_code(fork(child)) == 7
    MetricsFile(tmp_path / "metrics.jsonl").truncate_after(3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_no_torch_at_import():
    modules = "lorakit.ground.runs, lorakit.ground.process, lorakit.weights.optimizer_state"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
