"""Faults of the caches of a training, K1 to K6: kills, full disks, damage, company, age."""

import errno
import os
import signal

import pytest
from harness import assert_refused, sha
from test_run import code_of, signalled, started

from lorakit.ground import shards
from lorakit.training import preparation

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def straight(trained, tmp_path) -> str:
    """The hash of the LoRA of a run with an empty cache of its own."""
    return sha(trained(output_dir=str(tmp_path / "straight"), cache_dir=str(tmp_path / "alone")))


@pytest.mark.parametrize("call", [1, 3, 6])
def test_k1_a_run_killed_while_it_caches_goes_on_where_it_was(straight, settings, tmp_path, call):
    """In the first entry, among the latents, among the text states."""
    log = tmp_path / "log.txt"
    plant = signalled("lorakit.training.caches", "write_entry", signal.SIGKILL, call=call)
    assert code_of(started("train_lora", settings(), log, plant), log) == -signal.SIGKILL
    kept = [len(shards.Shards(tmp_path / "cache" / kind).names) for kind in ("latents", "text")]
    assert kept == [min(call - 1, 4), max(call - 5, 0)]
    assert code_of(started("train_lora", settings(overwrite=True), log), log) == 0
    assert sha(tmp_path / "ckpt/run.safetensors") == straight


def test_k2_a_disk_that_fills_up_keeps_what_was_cached(straight, here, settings, tmp_path, monkeypatch):
    class Full(shards.FileIO):
        room = 5000

        def write(self, data, /):
            if not (part := bytes(data[: Full.room])):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            Full.room -= len(part)
            return super().write(part)

    monkeypatch.setattr(shards, "FileIO", Full)
    result = here("train_lora", settings())
    assert_refused(result, 4, str(tmp_path / "cache/latents"), "No space left", "free some space")
    kept = shards.Shards(tmp_path / "cache/latents")
    assert 0 < len(kept.names) < 4 and all(kept.read(name) for name in list(kept.names))
    monkeypatch.undo()
    assert here("train_lora", settings(overwrite=True)).code == 0
    assert sha(tmp_path / "ckpt/run.safetensors") == straight


def flip(folder, at: int) -> None:
    for path in folder.glob("*/*.shard"):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("at", [30, 300, -60, -1])
def test_k3_a_flipped_byte_costs_what_it_lies_in(straight, here, settings, tmp_path, at):
    """In the head of an entry, its content, the index, the place of the index."""
    assert here("train_lora", settings()).code == 0
    flip(tmp_path / "cache", at)
    assert here("train_lora", settings(overwrite=True)).code == 0
    assert sha(tmp_path / "ckpt/run.safetensors") == straight
    counts = [len(list((tmp_path / "cache" / kind).iterdir())) for kind in ("latents", "text")]
    assert counts == ([2, 2] if at > 0 else [1, 1])


def test_k3_a_byte_that_is_flipped_under_a_run_ends_it_and_the_next_makes_it_anew(
    straight, here, settings, tmp_path, monkeypatch
):
    real = preparation.TrainingData

    def damaged(*args, **options):
        flip(tmp_path / "cache", 300)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "TrainingData", damaged)
        patch.setattr("lorakit.training.caches.HELD_BYTES", 0)
        assert_refused(
            here("train_lora", settings()), 4, str(tmp_path / "cache"), "start again to re-make it"
        )
    assert here("train_lora", settings(overwrite=True)).code == 0
    assert sha(tmp_path / "ckpt/run.safetensors") == straight


def test_k4_two_runs_fill_one_cache_at_once(straight, settings, tmp_path):
    log, names = tmp_path / "log.txt", ("one", "two")
    pids = [started("train_lora", settings(output_dir=str(tmp_path / name)), log) for name in names]
    assert [code_of(pid, log) for pid in pids] == [0, 0], log.read_text()
    assert [sha(tmp_path / name / "run.safetensors") for name in names] == [straight] * 2
    cached = shards.Shards(tmp_path / "cache/latents")
    assert len(cached.names) == 4 and all(cached.read(name) for name in list(cached.names))


def test_k5_a_cache_of_an_older_version_is_made_anew_and_said(straight, here, settings, tmp_path):
    words = "files of an earlier version"
    assert words not in here("train_lora", [*settings(), "--check"]).out
    for kind in ("latents", "text"):
        (tmp_path / "cache" / kind).mkdir(parents=True)
        (tmp_path / "cache" / kind / f"{'0' * 40}.safetensors").write_bytes(b"older")
        (tmp_path / "cache" / kind / "00000001-000000000000.shard").write_bytes(b"LKS0" + bytes(500))
    assert words in here("train_lora", [*settings(), "--check"]).out
    result = here("train_lora", settings())
    assert result.code == 0 and words in result.out + result.err
    assert sha(tmp_path / "ckpt/run.safetensors") == straight
