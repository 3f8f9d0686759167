"""The scripts as processes that start in a blink, and a look at what they leave on the disk.

A server process has imported the scripts and not torch; for each command it forks a child. So a refusal costs
milliseconds, and it shows whether the fault was found before torch was imported.
"""

import functools
import hashlib
import importlib
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "train_lora", "morph", "invert", "mix_lora", "generate", "style_transfer", "edit", "drag", "animate",
)  # fmt: skip
HEAVY = {"torch", "diffusers", "transformers", "datasets"}


class Result(NamedTuple):
    """What a command left behind it: exit code, output, which of HEAVY was imported at its end.

    `seconds` are of its processor, `grown` the bytes its memory grew by; `blinks` are its seconds in units of
    the plainest refusal, measured by the same server on the same machine under the same load.
    """

    code: int
    out: str
    err: str
    imported: Sequence[str] = ()
    seconds: float = 0.0
    grown: int = 0
    blinks: float = 0.0

    @property
    def torch(self) -> bool:
        return "torch" in self.imported


class Server:
    """Runs a script's `main` on arguments, or the file of a program that is named with its suffix.

    Each is a process of its own. With `preload` they need not import transformers, which takes a second.
    """

    def __init__(self, preload: bool = True):
        command = [sys.executable, str(Path(__file__)), *["transformers"] * preload]
        self._server = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdin and self._server.stdout
        self._to, self._from = self._server.stdin, self._server.stdout

    def __call__(self, script: str, arguments: Sequence[str], cwd: Path = ROOT, **env: str) -> Result:
        result = self._run(script, arguments, cwd, env)
        return result._replace(blinks=result.seconds / self.blink)

    @functools.cached_property
    def blink(self) -> float:
        """Seconds of processor that it takes to refuse a key, in the script where that takes longest."""
        return max(self._run(script, ["no_such_key=1"], ROOT, {}).seconds for script in SCRIPTS)

    def _run(self, script: str, arguments: Sequence[str], cwd: Path, env: dict[str, str]) -> Result:
        self._to.write(json.dumps([script, list(arguments), str(cwd), env]) + "\n")
        self._to.flush()
        return Result(*json.loads(self._from.readline()))

    def close(self) -> None:
        self._to.close()
        self._server.wait()


def serve() -> None:
    """The server: one JSON list a line in, one Result a line out."""
    sys.path.insert(0, str(ROOT))
    scripts = {name: importlib.import_module(name) for name in SCRIPTS}
    if "transformers" in sys.argv:
        import transformers

        assert transformers.CLIPTokenizer
    assert "torch" not in sys.modules
    for line in sys.stdin:
        script, arguments, cwd, env = json.loads(line)
        out, err, facts = (tempfile.TemporaryFile("w+") for _ in range(3))
        pid = os.fork()
        if pid == 0:
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            os.environ.update(env)
            os.chdir(cwd)
            if script in scripts:
                code = _child(functools.partial(scripts[script].main, arguments), facts)
            else:
                sys.argv = [script, *arguments]
                code = _child(functools.partial(runpy.run_path, script, run_name="__main__"), facts)
            os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        texts = [(file.seek(0), file.read())[1] for file in (out, err, facts)]
        code, (imported, grown) = os.waitstatus_to_exitcode(status), json.loads(texts[2] or "[[], 0]")
        print(json.dumps([code, *texts[:2], imported, usage.ru_utime + usage.ru_stime, grown]), flush=True)


def _child(main: Callable[[], int], facts: TextIO) -> int:
    from lorakit.ground.process import run_guarded

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        code = run_guarded(main)
    except SystemExit as error:
        code = int(error.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    facts.write(json.dumps([sorted(HEAVY & set(sys.modules)), grown]))
    facts.flush()
    return code


def assert_refused(result: Result, code: int, *words: str) -> None:
    """One readable message and no traceback; `words` are the file, line or key, and the remedy."""
    assert result.code == code, result.err or result.out
    assert "Traceback" not in result.err, result.err
    assert result.err.count("error: ") == 1, result.err
    message = result.err[result.err.index("error: ") :]
    for word in words:
        assert word in message, message


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with its content; locks, which come and go, are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in (".lock", ".lock.json"):
            continue
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = sha(path)
    return found


def litter(folder: Path) -> list[Path]:
    """Temporary files of ours, of both kinds of names."""
    from lorakit.ground.publish import OWN_NAME

    names = ((path, path.name) for path in folder.rglob(".*"))
    return [path for path, name in names if OWN_NAME.fullmatch(name) or name.endswith(".tmp")]


if __name__ == "__main__":
    serve()
