"""Signals set a flag, and every way to fail has its exit code and its message."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorakit.ground import process
from lorakit.ground.errors import DivergedError, OutputError, StoppedError, UserError
from lorakit.ground.process import StopFlag, run_guarded

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_sets_the_flag_and_the_old_handlers_come_back(signum):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with StopFlag() as stop:
        assert stop.poll() is None
        os.kill(os.getpid(), signum)
        assert stop.poll() == stop.signum == signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_second_interrupt_leaves_at_once_and_sigterm_never_does():
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGTERM


def test_a_launcher_that_repeats_the_interrupt_does_not_cut_the_save_short(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.01
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        now[0] += 5.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("LOCAL_RANK", signal.SIGTERM), ("ACCELERATE_MIXED_PRECISION", signal.SIGTERM), ("OTHER", None)],
)
def test_a_dead_launcher_counts_as_sigterm(monkeypatch, variable, expected):
    monkeypatch.setenv(variable, "0")
    with StopFlag() as stop:
        assert stop.poll() is None
        monkeypatch.setattr(os, "getppid", lambda: 1_000_000)
        assert stop.poll() == expected


def test_a_forked_worker_ignores_both_signals():
    with StopFlag() as stop:
        child = os.fork()
        if child == 0:
            try:
                for signum in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
                    os.kill(os.getpid(), signum)
                os._exit(0 if stop.signum is None else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_outside_the_main_thread_the_handlers_stay():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with StopFlag() as stop:
            seen.extend([signal.getsignal(signal.SIGINT), stop.poll()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, None]


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("bad.json:3: no such key"), 2, "error: bad.json:3: no such key\n"),
        (DivergedError("the loss is nan"), 3, "error: the loss is nan\n"),
        (OutputError("disk full"), 4, "error: disk full\n"),
        (StoppedError("resume with …", signal.SIGTERM), 143, "stopped: resume with …\n"),
        (StoppedError("resume with …", signal.SIGINT), 130, "stopped: resume with …\n"),
        (KeyboardInterrupt(), 130, "stopped: interrupted\n"),
    ],
)
def test_what_a_user_can_act_on_is_one_message_and_a_code(capsys, error, code, text):
    assert run_guarded(raiser(error)) == code
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_faults_of_the_disk_end_with_4_and_a_remedy(capsys, code):
    assert run_guarded(raiser(OSError(code, os.strerror(code), "out/a.png"))) == 4
    message = capsys.readouterr().err
    assert message.startswith(f"error: out/a.png: {os.strerror(code)}: ") and "Traceback" not in message


@pytest.mark.parametrize(
    "error", [ValueError("ours"), FileNotFoundError(2, "gone", "x"), BrokenPipeError(32, "a worker's")]
)
def test_a_bug_of_ours_shows_its_traceback(capsys, error):
    assert run_guarded(raiser(error)) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message and type(error).__name__ in message


def test_the_code_of_main_is_returned_and_exits_pass():
    assert run_guarded(lambda: None) == 0
    assert run_guarded(lambda: 5) == 5
    with pytest.raises(SystemExit):
        run_guarded(raiser(SystemExit(2)))


PRINT = """
import sys
from lorakit.ground.process import run_guarded
sys.exit(run_guarded(lambda: print("x" * int(sys.argv[1]))))
"""
SIZES = pytest.mark.parametrize("size", [10, 1_000_000])  # fails when flushed, fails when printed


def run_printing(size, stdout):
    command = [sys.executable, "-c", PRINT, str(size)]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # as in a pipe by default
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=buffered, stdout=stdout, stderr=subprocess.PIPE)


@SIZES
def test_a_reader_that_left_is_no_error(size):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_printing(size, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@SIZES
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_ends_with_4(size):
    with open("/dev/full", "wb") as full:
        done = run_printing(size, full)
    assert done.returncode == 4 and done.stderr.startswith(b"error: output: No space left")
    assert done.stderr.count(b"\n") == 1
