"""Files that are seen whole or not at all, as they are written aside, synced and renamed into place.

What a killed process left aside in a folder that nobody owns is cleared by the next one that writes there.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from lorakit.ground.errors import OutputError

# See own_name: kind, step, process, its mark.
OWN_NAME = re.compile(r"\.(tmp|del|old)-([0-9]{8,})-([0-9]+)-([0-9a-f]{12})[0-9a-f]{20}(\..*)?", re.DOTALL)
LITTER_AGE = 7 * 24 * 3600
"""Seconds without a change after which what a process out of sight was writing is taken for litter."""

REMEDIES = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "your quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the limit on file sizes is reached; raise it (ulimit -f) or write elsewhere",
    errno.EROFS: "the file system is mounted read-only; write elsewhere",
    errno.EACCES: "change the permissions or use another folder",
    errno.EPERM: "change the permissions or use another folder",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ENOTDIR: "a part of this path is a file or a broken link; rename that or use another folder",
    errno.EISDIR: "a folder has the name of the file; rename one of them",
    errno.EIO: "the disk or the network share reports a fault; check it or write elsewhere",
    errno.ESTALE: "the network share has gone; mount it again or write elsewhere",
    errno.ETIMEDOUT: "the network share does not answer; mount it again or write elsewhere",
}


def output_error(error: OSError, path: Path | str, needed: int = 0) -> OutputError:
    """A fault among REMEDIES, put for the user of `path`, where `needed` bytes were to be written."""
    room = f" (needs {needed:,} bytes, {_free_bytes(Path(path)):,} free)" if needed else ""
    return OutputError(f"{path}: {os.strerror(error.errno or 0)}{room}: {REMEDIES[error.errno or 0]}")


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())


@contextlib.contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns a fault among REMEDIES into its output_error; any other passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise output_error(error, path, needed) from error


def own_name(kind: str, step: int = 0, suffix: str = "") -> str:
    """A name nobody else has, by which what a kill left behind is known as ours: kind is tmp, del or old."""
    return f".{kind}-{step:08d}-{os.getpid()}-{_mark()}{uuid.uuid4().hex[:20]}{suffix}"


@functools.cache
def _mark() -> str:
    """Twelve hex digits that processes share if each can tell by its number whether another one lives."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")  # containers count their processes by themselves
    except OSError:
        return uuid.uuid4().hex[:12]  # not Linux
    return hashlib.sha256(f"{boot} {namespace} {os.uname().nodename}".encode()).hexdigest()[:12]


def _is_litter(path: Path) -> bool:
    """Whether this is a file or folder of ours whose writer is dead; one out of sight is after LITTER_AGE."""
    name = OWN_NAME.fullmatch(path.name)
    if not name or name[1] == "old":  # what is being replaced, and may be all that there is
        return False
    try:
        if name[4] != _mark():
            return time.time() - path.lstat().st_mtime > LITTER_AGE
        if int(name[3]) != os.getpid():
            os.kill(int(name[3]), 0)  # sends nothing: is there such a process?
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is gone by now, another user's writer lives, or no such number
        pass
    return False


@functools.cache
def clear_litter(folder: Path) -> None:
    """Removes what dead writers left in a folder. A process looks once, for a cache has many files."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _is_litter(path):
                remove(path)


def make_folder(folder: Path) -> None:
    """mkdir -p; a file in its place is NotADirectoryError, whichever part of the path it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder)) from error
    except FileNotFoundError as error:  # a file system without folders of ours, such as /proc
        raise PermissionError(errno.EPERM, "not permitted", str(folder)) from error


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file through to the disk; the folder's entry for it still needs a sync."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    if os.name == "nt":  # neither a folder nor a file opened for reading can be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network shares that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder as far as it can: what stays is litter, never an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def publish_file(path: Path | str, data: bytes | Callable[[Path], None]) -> None:
    """Writes a file so that its name always shows the old content or the new, with the umask's permissions.

    Args:
        data: the content, or a function that writes it to the path it is given (same suffix, same folder).

    Raises:
        OutputError: the disk is full, read-only, …; the old file is untouched.
    """
    path = Path(path)
    temp = path.parent / own_name("tmp", suffix=path.suffix)
    with explained(path, len(data) if isinstance(data, bytes) else 0):
        make_folder(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        if path.exists() and not path.is_file():  # a rename would replace the device or pipe itself
            raise OutputError(f"{path} is not a regular file: choose another name")
        clear_litter(path.parent.absolute())
        try:
            if isinstance(data, bytes):
                write_synced(temp, data)
            else:
                temp.touch(exist_ok=False)
                mode = stat.S_IMODE(temp.stat().st_mode)  # what the umask leaves; safetensors would say 0600
                data(temp)
                temp.chmod(mode)
                sync(temp)
            os.replace(temp, path)
        except BaseException:
            remove(temp)
            raise
        sync(path.parent)


def check_writable(folder: Path | str, needed_bytes: int = 0) -> None:
    """Makes the folder, clears it of litter and proves, before slow work, that a file can be published there.

    Raises:
        OutputError: it cannot, or less than needed_bytes is free.
    """
    folder = Path(folder)
    probe, moved = (folder / own_name("tmp") for _ in range(2))
    try:
        with explained(folder):
            make_folder(folder)
            clear_litter(folder.absolute())
            try:
                write_synced(probe, b"probe")
                os.rename(probe, moved)
                sync(folder)
            finally:
                remove(probe)
                remove(moved)
            if shutil.disk_usage(folder).free < needed_bytes:
                raise output_error(OSError(errno.ENOSPC, ""), folder, needed_bytes)
    except ValueError as error:  # a NUL byte or half a surrogate pair
        raise OutputError(f"{str(folder)!r}: not a possible path ({error}): rename it") from error
