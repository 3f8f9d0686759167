"""benchmarks/bench.py: what is measured now beside what was committed; nothing is run."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks import bench  # noqa: E402
from benchmarks.bench_figures import BENCH, MORPH, STYLE, TRAIN  # noqa: E402


def said(seconds):
    """What the three benchmarks print, all of it `seconds` or made of them."""
    train = {"ms": 1e3 * seconds, "images_per_second": 1 / seconds, "peak_mb": 900, "ratio_to_bare": 1.0}
    morph = {"seconds": seconds, "evaluations": 10, "ms_per_evaluation": seconds, "attention_bytes": 0}
    morph["ratio_to_lorakit"] = {"seconds": 1.0}
    return [
        {way: train for way in TRAIN},
        {"ways": {way: morph for way in MORPH}},
        {"ways": {way: {"seconds": seconds, "peak_mb": 900} for way in STYLE}},
    ]


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_each_figure_is_told_over_the_committed_one(factor, tmp_path, monkeypatch, capsys):
    kept = {"values": BENCH.values(*said(0.5)), "date": "a day", "machine": "a machine"}
    (tmp_path / "bench.json").write_text(json.dumps(kept))
    answers, asked = iter(said(0.5 * factor)), []
    monkeypatch.setattr(bench, "KEPT", tmp_path)
    monkeypatch.setattr(bench, "base_name", lambda: "base")
    monkeypatch.setattr(
        bench, "output_of", lambda command, *_, **__: asked.append(command.words) or next(answers)
    )
    bench.main()
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])["to_committed"]
    assert ratios["morph shipped seconds"] == ratios["style live seconds"] == factor
    assert ratios["train ours images_per_second"] == 1 / factor and ratios["train ours peak_mb"] == 1
    assert ratios["morph shipped attention_bytes"] is None  # nothing to divide by
    assert [words[0] for words in asked] == [command.words[0] for command in BENCH.commands]
    assert all(words[-2:] == ("--rounds", "1") for words in asked)
