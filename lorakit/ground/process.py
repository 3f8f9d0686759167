"""A script as a process: signals stop it where it chooses, and its exit code can be relied on."""

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from lorakit.ground.errors import OutputError, StoppedError, UserError
from lorakit.ground.publish import REMEDIES, output_error


class StopFlag:
    """While active, SIGINT and SIGTERM only set `signum`, so that work ends where it can be resumed.

    A second SIGINT raises KeyboardInterrupt at once. A process forked inside the block ignores both signals.
    Outside the main thread no handler can be installed: then only a dead launcher sets `signum`.
    """

    signum: int | None = None

    def __enter__(self) -> "StopFlag":
        self._pid, self._parent, self._old = os.getpid(), os.getppid(), {}
        self._launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        self._interrupted_at: float | None = None
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _handle(self, signum: int, frame: object) -> None:
        if os.getpid() != self._pid:
            return
        self.signum = self.signum or signum
        if signum != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif not self._launched or now - self._interrupted_at > 1.0:
            raise KeyboardInterrupt
        # else: torchrun passes on the Ctrl-C that the terminal has sent to the whole group already

    def poll(self) -> int | None:
        """The signal to stop for, if any. A launcher that died counts as SIGTERM: it passes none on."""
        if self.signum is None and self._launched and os.getppid() != self._parent:
            self.signum = signal.SIGTERM
        return self.signum


def run_guarded(main: Callable[[], int | None]) -> int:
    """Runs a script's main and returns its exit code (see errors.py); what went wrong goes to stderr.

    Only a bug of ours shows a traceback. When the reader of stdout has gone (`… | head`), 141 without a word.
    """
    text, code = "", 1
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        text, code = f"{'stopped' if isinstance(error, StoppedError) else 'error'}: {error}", error.exit_code
    except KeyboardInterrupt:
        text, code = "stopped: interrupted", 128 + signal.SIGINT
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _drop_broken_stdout():
            return 128 + 13  # SIGPIPE, which Windows does not define
        if error.errno in REMEDIES:
            text, code = f"error: {output_error(error, error.filename or 'output')}", OutputError.exit_code
        else:
            text, code = traceback.format_exc().rstrip(), 1
    except Exception:
        text, code = traceback.format_exc().rstrip(), 1
    _drop_broken_stdout()
    if text:
        print(text, file=sys.stderr)
    return code


def _drop_broken_stdout() -> bool:
    """Whether stdout can no longer be written; then the interpreter's own flush at exit is kept quiet."""
    broken = False
    if hasattr(select, "poll"):  # a large write that failed leaves nothing for the flush below to fail on
        poll = select.poll()
        poll.register(1, 0)
        broken = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    try:
        sys.stdout.flush()
    except OSError:
        broken = True
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return broken


def launched_processes(environment: dict[str, str] | None = None) -> tuple[int, int]:
    """(rank, processes) as the launcher says.

    Raises:
        UserError: `accelerate launch --cpu --num_processes N` was asked for several and started one.
    """
    env = os.environ if environment is None else environment
    if "MASTER_ADDR" in env and "ACCELERATE_USE_CPU" in env and "WORLD_SIZE" not in env:
        raise UserError(
            "accelerate launch was asked for several CPU processes and started one; start them with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node N {Path(sys.argv[0]).name} …"
        )
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
