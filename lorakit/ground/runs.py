"""The run folder: one owner at a time, an earlier run refused or replaced, metrics line by line.

<output_dir>/<ckpt_name>/
    config.json  metrics.jsonl  samples/
    checkpoint-00000500/    safetensors and JSON files; manifest.json, written last, vouches for them
    .lock  .lock.json       the lock and its holder's name
    .tmp-… .del-… .old-…    work in progress; the next holder of the lock clears what a kill left of it

Whatever else lies in the folder is not ours and stays.
"""

import contextlib
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from lorakit.ground.checkpoints import checkpoints, discard
from lorakit.ground.errors import UserError
from lorakit.ground.publish import OWN_NAME, explained, make_folder, publish_file, remove

SAMPLE_NAME = re.compile(r".*[0-9]{8}.*\.(png|jpg|webp|gif)", re.DOTALL)  # the step, in eight digits


def set_aside_after(run: Path, step: int) -> list[str]:
    """Renames the checkpoints behind `step` and drops samples behind it, when a run goes back to that step.

    Else `latest` would later take one of the branch that was left. Returns a line for each.
    """
    lines = []
    for later, folder in checkpoints(run):
        if later > step:
            aside = folder.with_name(f"left-{folder.name}-{uuid.uuid4().hex[:6]}")
            folder.rename(aside)
            lines.append(f"{folder.name} is of the branch that is left: it is now {aside.name}")
    for path in (run / "samples").glob("[0-9]*.png"):
        if path.name[:8].isdigit() and int(path.name[:8]) > step:
            path.unlink()
    return lines


def clean_litter(run: Path) -> None:
    """Removes what a killed process left half done; only while holding the run's lock.

    A checkpoint that was being replaced is put back if its successor had not arrived.
    """
    for folder in (run, run / "samples"):
        for path in list(folder.iterdir()) if folder.is_dir() else ():
            name = OWN_NAME.fullmatch(path.name)
            if not name:
                continue
            final = run / f"checkpoint-{int(name[2]):08d}"
            if name[1] == "old" and not os.path.lexists(final):
                os.rename(path, final)
            else:
                remove(path)


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Owns the run folder, made if missing, until the block ends; the kernel frees it when the process dies.

    Raises:
        UserError: another process owns it; says which.
        OutputError: the folder cannot be made or written.
    """
    lock, holder = filelock.FileLock(run / ".lock", blocking=False), run / ".lock.json"
    with explained(run):
        make_folder(run)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{run} is in use by {_describe(holder)}: wait for it, stop it, or choose another name"
            ) from None
    try:
        with explained(run):
            clean_litter(run)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        entry = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        publish_file(holder, json.dumps(entry).encode())
        yield
    finally:
        remove(holder)
        lock.release()


def _describe(holder: Path) -> str:
    try:
        return "process {pid} on {host}, started {started}".format(**json.loads(holder.read_bytes()))
    # It has the lock and has not written its name yet, or the file is damaged.
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "another process"


def claim_run(run: Path, *, resume: bool | str, overwrite: bool, results: Sequence[Path] = ()) -> None:
    """Refuses a folder that holds an earlier run, unless that run is resumed or overwritten.

    Overwriting removes the earlier run's checkpoints, metrics, config, best LoRA and samples (pictures with
    an eight-digit step in the name) and nothing else. Call it while holding the lock.

    Args:
        results: files that the run will write; an existing one is refused likewise.

    Raises:
        UserError: an earlier run is there and neither was asked for, or both were.
    """
    if resume and overwrite:
        raise UserError("resume_from_checkpoint and overwrite=true exclude each other: drop one of them")
    written = [path for path in (run / "best.safetensors", run / "metrics.jsonl") if path.is_file()]
    saved = checkpoints(run)
    held = [path.name for _, path in saved] + [path.name for path in written]
    if resume:
        return
    if not overwrite and not held and (taken := [str(path) for path in results if path.exists()]):
        raise UserError(
            f"{taken[0]} exists and is of no run in {run}: replace it with overwrite=true, or choose another"
            " ckpt_name"
        )
    if held and not overwrite:
        raise UserError(
            f"{run} already holds a run ({', '.join(held[:3])}{', …' * (len(held) > 3)}): continue it with"
            " resume_from_checkpoint=latest, replace it with overwrite=true, or choose another ckpt_name"
        )
    for step, folder in saved:
        discard(folder, step)
    samples = run / "samples"
    for path in list(samples.iterdir()) if samples.is_dir() else ():
        if SAMPLE_NAME.fullmatch(path.name) and path.is_file():
            path.unlink()
    for path in written:  # the metrics last: until then an interrupted overwrite still shows as a run
        path.unlink()
    for name in ("config.json", "index.html"):
        (run / name).unlink(missing_ok=True)


class MetricsFile:
    """One JSON object per line, each flushed as it is appended; floats that are not finite become null."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = json.dumps(finite, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with explained(self.path, len(line)):
            make_folder(self.path.parent)
            with self.path.open("ab") as file:
                file.write(line)

    def truncate_after(self, step: int) -> None:
        """Drops records with "step" > step, which a resumed run writes anew, and lines that are torn."""
        if not self.path.exists():
            return
        with explained(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                record = json.loads(line)
                if line.endswith(b"\n") and isinstance(record, dict) and record.get("step", 0) <= step:
                    kept.append(line)
        if kept != lines:
            publish_file(self.path, b"".join(kept))
