"""Files appear whole or not at all, and faults of the disk name the path and the remedy."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import stat
import time

import pytest

from lorakit.ground.errors import OutputError
from lorakit.ground.publish import LITTER_AGE, OWN_NAME, check_writable, clear_litter, own_name, publish_file

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def exit_code_of_child(work):
    """Runs work in a forked child, for limits and user ids that cannot be taken back."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_call(monkeypatch, number, code=errno.ENOSPC):
    """Makes the number-th fsync, rename or replace fail; returns the list of calls made."""
    calls = []

    def counting(name, real):
        def call(*args):
            calls.append(name)
            if len(calls) == number:
                raise OSError(code, os.strerror(code))
            return real(*args)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return calls


def test_publishes_bytes_and_what_a_function_writes(tmp_path):
    publish_file(tmp_path / "a" / "b" / "one.bin", b"one")
    publish_file(tmp_path / "two.png", lambda path: path.with_suffix(".png").write_bytes(b"two"))
    assert (tmp_path / "a" / "b" / "one.bin").read_bytes() == b"one"
    assert (tmp_path / "two.png").read_bytes() == b"two"
    assert names(tmp_path) == ["a", "two.png"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask_even_if_the_writer_sets_its_own(tmp_path, umask):
    def private(path):
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    old = os.umask(umask)
    try:
        publish_file(tmp_path / "bytes", b"")
        publish_file(tmp_path / "written", private)
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("bytes", "written")]
    assert modes == [0o666 & ~umask] * 2


@pytest.mark.parametrize("by_function", [False, True])
def test_a_fault_before_the_rename_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, by_function):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    for number in (1, 2, 3, 4):
        with monkeypatch.context() as patch:
            calls = fail_call(patch, number)
            with pytest.raises(OutputError, match=r"file\.bin: No space left") as caught:
                publish_file(path, (lambda p: p.write_bytes(b"new")) if by_function else b"new")
        assert names(tmp_path) == ["file.bin"]
        if not by_function:
            assert "needs 3 bytes" in str(caught.value) and " free" in str(caught.value)
        if "replace" in calls[:-1]:  # the fault came after the rename, when the folder was synced
            break
        assert path.read_bytes() == b"old"
    assert calls[-2:] == ["replace", "fsync"] and path.read_bytes() == b"new"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError, FileNotFoundError])
def test_other_exceptions_pass_through_and_leave_no_litter(tmp_path, fault):
    def broken(path):
        path.write_bytes(b"half")
        raise fault

    with pytest.raises(fault):
        publish_file(tmp_path / "file", broken)
    assert names(tmp_path) == []


def test_the_file_size_limit_is_named_and_costs_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
        try:
            publish_file(path, bytes(5000))
        except OutputError as error:
            return 7 if "needs 5,000 bytes" in str(error) and "ulimit" in str(error) else 8

    assert exit_code_of_child(child) == 7
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_devices_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OutputError, match=name):
            publish_file(tmp_path / name, b"data")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and names(tmp_path) == ["folder", "pipe"]


def test_own_names_are_told_from_those_of_others():
    assert OWN_NAME.fullmatch(own_name("tmp", 500)) and OWN_NAME.fullmatch(own_name("del", suffix=".png"))
    assert own_name("tmp") != own_name("tmp")
    for name in (".tmp-notes", ".del-00000001-1", ".tmp", "tmp-00000000-1-" + "0" * 32, ".git"):
        assert not OWN_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["plain", "with space", "schön-山", "new\nline", "deep/er/folder"])
def test_check_writable_passes_and_leaves_only_the_folder(tmp_path, name):
    check_writable(tmp_path / name, needed_bytes=1)
    assert names(tmp_path / name) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("file/below/it", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("nul\0byte", "not a possible path"),
        ("half\ud800", "not a possible path"),
    ],
)
def test_check_writable_names_what_is_wrong_with_the_path(tmp_path, name, reason):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputError, match=reason):
        check_writable(tmp_path / name)
    assert names(tmp_path) == ["file"]


def test_check_writable_wants_the_free_space_it_is_told(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=rf"needs {2 * free:,} bytes, [0-9,]+ free"):
        check_writable(tmp_path, needed_bytes=2 * free)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EDQUOT, errno.EIO])
def test_check_writable_explains_faults_of_the_file_system(tmp_path, monkeypatch, code):
    fail_call(monkeypatch, 1, code)
    with pytest.raises(OutputError, match=os.strerror(code)):
        check_writable(tmp_path)
    assert names(tmp_path) == []


def test_check_writable_finds_a_folder_of_someone_else(tmp_path):
    tmp_path.chmod(0o555)

    def child():
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            check_writable(tmp_path)
        except OutputError as error:
            return 7 if "Permission denied" in str(error) and "permissions" in str(error) else 8

    try:
        assert exit_code_of_child(child) == 7
    finally:
        tmp_path.chmod(0o755)


# What dead writers left


@contextlib.contextmanager
def writing(folder):
    """A child that is half-way through publishing: its number, and the pipe by which it is told to go on."""
    heard, say = os.pipe()
    wait, go_on = os.pipe()

    def half_way(temp):
        temp.write_bytes(b"half")
        os.write(say, b".")
        os.read(wait, 1)

    child = os.fork()
    if child == 0:
        try:
            publish_file(folder / "file.bin", half_way)
        finally:
            os._exit(0)
    assert os.read(heard, 1) == b"."
    try:
        yield child, go_on
    finally:
        for end in (heard, say, wait, go_on):
            os.close(end)


def killed(child):
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("claim", [check_writable, lambda folder: publish_file(folder / "other.bin", b"")])
def test_what_a_killed_writer_left_goes_when_the_next_one_comes(tmp_path, claim):
    with writing(tmp_path) as (child, _):
        assert killed(child)
    (left,) = names(tmp_path)
    assert OWN_NAME.fullmatch(left) and (tmp_path / left).read_bytes() == b"half"
    claim(tmp_path)
    assert left not in names(tmp_path) and not [name for name in names(tmp_path) if OWN_NAME.fullmatch(name)]


def test_a_writer_that_lives_is_not_disturbed(tmp_path):
    with writing(tmp_path) as (child, go_on):
        check_writable(tmp_path)
        publish_file(tmp_path / "other.bin", b"")
        (temp,) = set(names(tmp_path)) - {"other.bin"}
        os.utime(tmp_path / temp, (0, 0))  # however long it takes
        clear_litter.cache_clear()
        clear_litter(tmp_path)
        os.write(go_on, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert names(tmp_path) == ["file.bin", "other.bin"] and (tmp_path / "file.bin").read_bytes() == b"half"


def test_names_of_users_and_what_is_being_replaced_stay(tmp_path):
    dead = exit_code_of_child(lambda: publish_file(tmp_path / "pid", str(os.getpid()).encode()))
    pid = int((tmp_path / "pid").read_text())
    assert dead == 0
    ours = own_name("tmp").replace(f"-{os.getpid()}-", f"-{pid}-")
    strangers = [".tmp-notes", f".tmp-{pid}", ours[:-1], f"x{ours}", ours.replace(".tmp", ".old")]
    strangers += [own_name("tmp")]  # this process is not dead
    for name in (*strangers, ours):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (0, 0))
    check_writable(tmp_path)
    assert names(tmp_path) == sorted([*strangers, "pid"])


def test_what_another_machine_is_writing_stays_until_it_is_old(tmp_path):
    here = OWN_NAME.fullmatch(own_name("tmp"))[4]
    fresh, old, folder = (own_name("tmp").replace(f"-{here}", "-" + "0" * 12) for _ in range(3))
    assert all(OWN_NAME.fullmatch(name) for name in (fresh, old, folder)) and here != "0" * 12
    (tmp_path / folder).mkdir()
    for name in (fresh, old, f"{folder}/part"):
        (tmp_path / name).write_text("")
    for name, age in ((fresh, 0.9), (old, 1.1), (folder, 1.1)):
        then = time.time() - age * LITTER_AGE
        os.utime(tmp_path / name, (then, then))
    check_writable(tmp_path)
    assert names(tmp_path) == [fresh]
