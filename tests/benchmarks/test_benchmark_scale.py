"""benchmarks/scale.py with few rows: every stage is told, all steps are walked, and nothing stays behind."""

import sys

from benchmarks import scale


def test_every_stage_is_told_and_steps_leave_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "STEPS", 20)
    walked = []
    real = scale.SampleOrder.__getitem__
    monkeypatch.setattr(
        scale.SampleOrder, "__getitem__", lambda order, step: walked.append(step) or real(order, step)
    )
    told = scale.measure(1000, tmp_path)
    assert walked == list(range(500)) and told["steps"] == 500
    assert len(told["walk"]["step_ms"]) == len(told["walk"]["mb"]) == scale.WINDOWS
    assert told["walk"]["mb_grown_over_steps"] < 1
    assert told["files"] == 2 and told["stages"]["rows"]["bytes_a_row"] >= 0
    assert list(told["stages"]) == [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]


def test_memory_that_grows_is_seen():
    before = scale.memory()
    held = bytearray(50_000_000)
    assert 45e6 < scale.memory() - before < 55e6 and sys.getsizeof(held) > 50_000_000
