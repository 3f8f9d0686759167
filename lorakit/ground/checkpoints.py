"""Checkpoints: folders of safetensors and JSON, published whole; a manifest vouches for their files."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.ground.errors import UserError
from lorakit.ground.publish import explained, make_folder, own_name, remove, sync, write_synced

FORMAT, VERSION = "lorakit-checkpoint", 1
MANIFEST = "manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{8,})")


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
                discard(folder, step)


def discard(path: Path, step: int = 0) -> None:
    """Removes a checkpoint, which is gone from its name before the first of its files is."""
    doomed = path.parent / own_name("del", step)
    with explained(path):
        os.rename(path, doomed)
    remove(doomed)
