"""The run folder: checkpoints published whole, and one owner at a time.

<output_dir>/<ckpt_name>/
    config.json  metrics.jsonl  samples/
    checkpoint-00000500/    safetensors and JSON files; manifest.json, written last, vouches for them
    .lock  .lock.json       the lock and its holder's name
    .tmp-… .del-… .old-…    work in progress; the next holder of the lock clears what a kill left of it

Whatever else lies in the folder is not ours and stays.
"""

import contextlib
import hashlib
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

from lorakit.ground.errors import UserError
from lorakit.ground.publish import (
    OWN_NAME,
    explained,
    make_folder,
    own_name,
    publish_file,
    remove,
    sync,
    write_synced,
)

FORMAT, VERSION = "lorakit-checkpoint", 1
MANIFEST = "manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{8,})")
SAMPLE_NAME = re.compile(r".*[0-9]{8}.*\.(png|jpg|webp|gif)", re.DOTALL)  # the step, in eight digits


class CheckpointError(UserError):
    """A checkpoint is missing or is not what its manifest says."""


def publish_checkpoint(run: Path, step: int, files: Mapping[str, bytes]) -> Path:
    """Publishes <run>/checkpoint-<step>, whole or not at all; one that has this step already is replaced.

    Args:
        files: plain file names and their contents.

    Raises:
        OutputError: the disk is full, read-only, …; all earlier checkpoints are untouched.
    """
    assert all(name and Path(name).name == name != MANIFEST for name in files), list(files)
    final = run / f"checkpoint-{step:08d}"
    staging, old = run / own_name("tmp", step), run / own_name("old", step)
    entries = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": entries}
    with explained(final, sum(map(len, files.values()))):
        make_folder(run)
        try:
            staging.mkdir()
            for name, data in files.items():
                write_synced(staging / name, data)
            write_synced(staging / MANIFEST, json.dumps(manifest, indent=1).encode())
            sync(staging)
            if os.path.lexists(final):
                os.rename(final, old)
            os.rename(staging, final)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(final):
                os.rename(old, final)
            remove(staging)
            raise
        sync(run)
        remove(old)
    return final


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so it was never finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: {MANIFEST} is not of the format {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: has checkpoint version {manifest.get('version')!r} and this program reads version"
            f" {VERSION}: resume with the program that wrote it"
        )
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict):
        raise CheckpointError(f"{folder}: {MANIFEST} lacks a step or a table of files")
    return manifest


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads every byte of a checkpoint against its manifest, which is returned.

    Raises:
        CheckpointError: a file is missing, changed or not listed, or the version is unknown; says which.
    """
    manifest = _read_manifest(folder)
    number = CHECKPOINT_NAME.fullmatch(folder.name)
    if number and int(number[1]) != manifest["step"]:
        raise CheckpointError(f"{folder}: its manifest belongs to step {manifest['step']}")
    extra = {path.name for path in folder.iterdir()} - {MANIFEST, *manifest["files"]}
    if extra:
        raise CheckpointError(f"{folder}: holds files that its manifest does not list: {sorted(extra)}")
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise CheckpointError(f"{folder}: {MANIFEST} has a bad entry {name!r}")
        try:
            if not path.is_file():
                raise CheckpointError(f"{folder}: {name} is missing")
            if path.stat().st_size != entry.get("size"):
                size = path.stat().st_size
                raise CheckpointError(f"{folder}: {name} has {size} bytes, not {entry.get('size')}")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.get("sha256"):
                    raise CheckpointError(f"{folder}: {name} has changed since it was written (sha256)")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: {name!r} cannot be read: {error}") from error
    return manifest


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The run's checkpoint folders by ascending step, not verified; other names are ignored."""
    found = []
    for path in run.iterdir() if run.is_dir() else ():
        number = CHECKPOINT_NAME.fullmatch(path.name)
        if number and path.name == f"checkpoint-{int(number[1]):08d}" and path.is_dir():
            found.append((int(number[1]), path))
    return sorted(found)


def latest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None when the run has none), and why newer ones were skipped.

    Raises:
        CheckpointError: there are checkpoints and none verifies.
    """
    reasons = []
    for _, folder in reversed(checkpoints(run)):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return folder, reasons
    if reasons:
        listed = "".join(f"\n  {reason}" for reason in reasons)
        raise CheckpointError(
            f"{run}: no checkpoint can be used:{listed}\nrestore one, or start over with overwrite=true"
        )
    return None, []


def find_resume(run: Path, resume: bool | str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` asks for, verified, and why newer ones were skipped.

    Args:
        resume: False; True or "latest" (None is returned when the run has no checkpoint yet); or the path
            of a checkpoint folder, used as it is.

    Raises:
        CheckpointError: the path names no usable checkpoint, or none of the run's can be used.
    """
    if resume is False:
        return None, []
    if resume is True or resume == "latest":
        return latest_checkpoint(run)
    folder = Path(resume)
    known = "".join(f"\n  {path}" for _, path in checkpoints(run)) or " none"
    if folder.is_dir():
        if checkpoints(folder):
            newest = checkpoints(folder)[-1][1]
            raise CheckpointError(
                f"{folder} is a run folder: resume from one of its checkpoints, such as {newest}"
            )
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; the checkpoints of this run:{known}") from None
        return folder, []
    what = "is a file (a LoRA?), not a checkpoint folder" if folder.exists() else "does not exist"
    raise CheckpointError(f"resume_from_checkpoint: {folder} {what}; the checkpoints of this run:{known}")


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


def prune_checkpoints(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints that verify; damaged ones neither count nor go.

    Call it after publishing, so that a failed save never costs an older checkpoint.
    """
    assert keep >= 1, keep
    verified = 0
    for step, folder in reversed(checkpoints(run)):
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(folder)
            verified += 1
            if verified > keep:
                _discard(folder, step)


def _discard(path: Path, step: int = 0) -> None:
    doomed = path.parent / own_name("del", step)
    with explained(path):
        os.rename(path, doomed)
    remove(doomed)


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
        _discard(folder, step)
    samples = run / "samples"
    for path in list(samples.iterdir()) if samples.is_dir() else ():
        if SAMPLE_NAME.fullmatch(path.name) and path.is_file():
            path.unlink()
    for path in written:  # the metrics last: until then an interrupted overwrite still shows as a run
        path.unlink()
    (run / "config.json").unlink(missing_ok=True)


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
