"""Shards: what was written is read, and what is damaged, cut short or another version's is not."""

import os
import random
import signal
import tracemalloc

import pytest
from test_publish import exit_code_of_child

from lorakit.ground import shards as module
from lorakit.ground.errors import OutputError
from lorakit.ground.shards import Shards

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def name(number: int) -> bytes:
    return number.to_bytes(20, "big")


def content(number: int) -> bytes:
    return bytes([number % 251]) * (20 + number)


def written(folder, numbers, sealed=True) -> Shards:
    shards = Shards(folder)
    for number in numbers:
        shards.write(name(number), content(number))
    if sealed:
        shards.seal()
    return shards


def there(folder, most=200) -> set[int]:
    """The numbers of the entries that can be read, each as it was written."""
    shards = Shards(folder)
    found = {number: shards.read(name(number)) for number in range(1, most)}
    assert all(data in (None, content(number)) for number, data in found.items())
    return {number for number, data in found.items() if data is not None}


@pytest.mark.parametrize("sealed", [True, False])
def test_what_was_written_is_read_by_all_and_nothing_else_is(tmp_path, sealed):
    shards = written(tmp_path, range(1, 9), sealed)
    shards.write(name(300), b"")
    assert there(tmp_path) == set(range(1, 9)) and Shards(tmp_path).read(name(300)) == b""
    assert shards.read(name(9)) is None and name(9) not in shards.names
    assert len(list(tmp_path.iterdir())) == 1 + sealed  # a sealed one is never written to again


def test_a_folder_that_is_not_there_has_no_entries_and_is_made_by_the_first(tmp_path):
    shards = Shards(tmp_path / "none")
    shards.seal()
    assert not shards.names and not (tmp_path / "none").exists()
    shards.write(name(1), content(1))
    assert there(tmp_path / "none") == {1}


@pytest.mark.parametrize("sealed", [True, False])
def test_no_flipped_byte_is_read(tmp_path, sealed):
    """Of a sealed shard it costs the entry that it lies in; of one cut short what comes after, at most."""
    written(tmp_path, range(1, 6), sealed)
    [path] = tmp_path.iterdir()
    whole, lost = path.read_bytes(), set()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        lost.add(5 - len(there(tmp_path, 8)))
    assert lost == ({0, 1} if sealed else {1, 2, 3, 4, 5})


@pytest.mark.parametrize("sealed", [True, False])
def test_a_shard_cut_short_holds_what_lies_before_the_cut(tmp_path, sealed):
    written(tmp_path, range(1, 4), sealed)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    counts = []
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        left = there(tmp_path, 6)
        assert left == set(range(1, len(left) + 1))
        counts.append(len(left))
    assert counts == sorted(counts) and set(counts) == {0, 1, 2} | ({3} if sealed else set())


def test_what_is_no_shard_of_this_version_holds_nothing(tmp_path):
    written(tmp_path, range(1, 4))
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    for other in (b"", b"x" * 500, bytes(500), whole.replace(b"LKS1", b"LKS0")):
        path.write_bytes(other)
        assert there(tmp_path) == set()
    path.write_bytes(whole)
    assert there(tmp_path) == {1, 2, 3}


def test_a_damaged_entry_that_is_made_again_is_read_from_then_on(tmp_path):
    written(tmp_path, [1, 2])
    [path] = tmp_path.iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    shards = Shards(tmp_path)
    assert shards.read(name(1)) is None and name(1) not in shards.names
    shards.write(name(1), content(1))
    assert shards.read(name(1)) == content(1)
    shards.seal()
    assert there(tmp_path) == {1, 2} and bytes(damaged) == path.read_bytes()


def test_writers_at_once_have_shards_of_their_own_and_see_each_other_when_they_look(tmp_path):
    one, two = Shards(tmp_path), Shards(tmp_path)
    for number in range(1, 7):
        (one, two)[number % 2].write(name(number), content(number))
    assert one.read(name(1)) is None and two.read(name(1)) == content(1)
    one.refresh()
    assert one.read(name(1)) == content(1)  # though its shard is being written still
    one.seal()
    two.seal()
    assert there(tmp_path) == set(range(1, 7)) and len(list(tmp_path.iterdir())) == 2


def test_a_shard_that_has_grown_enough_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 500)
    written(tmp_path, range(1, 40))
    assert there(tmp_path) == set(range(1, 40))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 3 and max(sizes) < 1500


def test_what_a_reader_has_opened_it_reads_after_the_folder_was_cleared(tmp_path):
    shards = written(tmp_path, [1, 2])
    assert shards.read(name(1)) == content(1)
    for path in tmp_path.iterdir():
        path.unlink()
    assert shards.read(name(2)) == content(2)


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch):
    class Full(module.FileIO):
        room = 150

        def write(self, data, /):
            if not (part := bytes(data[: Full.room])):
                raise OSError(28, os.strerror(28))
            Full.room -= len(part)
            return super().write(part)

    monkeypatch.setattr(module, "FileIO", Full)
    shards = written(tmp_path, [1, 2], sealed=False)
    size = next(tmp_path.iterdir()).stat().st_size
    with pytest.raises(OutputError, match="No space left on device.*free some space"):
        shards.write(name(3), content(3))
    assert next(tmp_path.iterdir()).stat().st_size == size
    Full.room = 1000
    shards.write(name(4), content(4))
    shards.seal()
    assert there(tmp_path) == {1, 2, 4}


def test_a_kill_in_any_write_costs_what_was_being_written(tmp_path):
    """A hundred writers, each killed in the middle of a write, into one folder."""
    for kill in range(100):

        def work(kill=kill):
            class Killed(module.FileIO):
                written = 0

                def write(self, data, /):
                    if Killed.written + len(data) > 31 * kill:
                        super().write(data[: max(0, 31 * kill - Killed.written)])
                        os.kill(os.getpid(), signal.SIGKILL)
                    Killed.written += len(data)
                    return super().write(data)

            module.FileIO = Killed
            written(tmp_path / str(kill % 10), range(1, 200))

        assert exit_code_of_child(work) == -signal.SIGKILL
    for folder in tmp_path.iterdir():
        left = there(folder)
        assert left == set(range(1, len(left) + 1)) and len(list(folder.iterdir())) == 10
    counts = sorted(len(there(folder)) for folder in tmp_path.iterdir())
    assert counts[0] >= 30 and counts[-1] <= 45  # the farthest kill of each folder tells


@pytest.mark.parametrize("seed", range(20))
def test_reads_are_those_of_a_table_whatever_was_written_when(tmp_path, monkeypatch, seed):
    """Among them names that end in zeros, entries written twice, and files beyond those that stay open."""
    for limit, value in {"_RECENT": 3, "_OPEN": 2, "SHARD_BYTES": 300}.items():
        monkeypatch.setattr(module, limit, value)
    rng, table, shards = random.Random(seed), {}, Shards(tmp_path)
    names = [bytes([1, each]) + bytes(18) for each in range(8)] + [bytes([1]) + bytes(18) + b"x"]
    for _ in range(120):
        match rng.choice(["write", "write", "write", "refresh", "seal", "another"]):
            case "write":
                some = rng.choice(names)
                table[some] = rng.randbytes(rng.randrange(60))
                shards.write(some, table[some])
            case "refresh":
                shards.refresh()
            case "seal":
                shards.seal()
            case "another":
                shards.seal()
                shards = Shards(tmp_path)
        assert shards.names == table.keys() and bytes(20) not in shards
        some = rng.choice(names)
        assert shards.read(some) == table.get(some) and (some in shards) == (some in table)
    assert len(list(tmp_path.iterdir())) > 3


def test_an_entry_costs_few_bytes_of_memory(tmp_path):
    count = 20_000
    written(tmp_path, range(count))
    tracemalloc.start()
    shards = Shards(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    table = {each: (shards.folder, 1 << 40, 1 << 20) for each in shards.names}
    dearer = tracemalloc.get_traced_memory()[0] - held
    tracemalloc.stop()
    assert held / count < 50 < dearer / len(table)
