"""Files appear whole or not at all, and faults of the disk name the path and the remedy."""

import errno
import os
import resource
import shutil
import stat

import pytest

from lorakit.ground.errors import OutputError
from lorakit.ground.publish import OWN_NAME, check_writable, own_name, publish_file

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
