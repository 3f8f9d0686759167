"""Numbers in the pages are those that their commands gave, on the base that ships."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import figures  # noqa: E402
from benchmarks.figure_parts import Command, Part, table  # noqa: E402

KEPT = sorted(figures.KEPT.glob("*.json"))


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_shows_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    assert figures.filled(text, figures.kept_values()) == text


def test_a_changed_digit_is_seen_in_every_region():
    values, seen = figures.kept_values(), 0
    for page in figures.PAGES:
        text = page.read_text(encoding="utf-8")
        for region in figures.REGION.finditer(text):
            at = next(i for i in range(*region.span(3)) if text[i].isdigit())
            wrong = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
            assert figures.filled(wrong, values) == text
            seen += 1
    assert seen >= 5


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_figures_are_of_the_base_that_ships_and_of_today_s_commands(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["base"] == figures.base_name(), "make figures makes them anew"
    part = figures.PARTS[path.stem]
    assert [command.removeprefix("python ") for command in record["commands"]] == [
        figures.shlex.join(command.words) for command in part.commands
    ]
    assert record["date"] and record["version"] and "cores" in record["machine"]


def test_every_region_and_every_part_is_shown():
    shown = {
        region.groups()[:2]
        for page in figures.PAGES
        for region in figures.REGION.finditer(page.read_text(encoding="utf-8"))
    }
    assert shown == {(name, what) for name, part in figures.PARTS.items() for what in part.shown}


def test_an_unknown_region_is_an_error():
    with pytest.raises(KeyError):
        figures.filled("<!-- figure nothing.here -->1<!-- end -->", {})


def test_a_part_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Two commands of which the second fails once: the first is not run again, but for another base."""
    counter, page = tmp_path / "runs", tmp_path / "PAGE.md"
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys, json\n"
        f"path = pathlib.Path({str(counter)!r})\n"
        "runs = path.read_text() + sys.argv[1] if path.exists() else sys.argv[1]\n"
        "path.write_text(runs)\n"
        "sys.exit(1) if runs == 'ab' else print(json.dumps({'n': len(runs)}))\n"
    )
    commands = tuple(Command((str(script), letter)) for letter in "ab")
    part = Part(commands, lambda a, b: [a["n"], b["n"]], {"sum": lambda values: str(sum(values))})
    monkeypatch.setattr(figures, "PARTS", {"part": part})
    monkeypatch.setattr(figures, "OUT", tmp_path / "out")
    monkeypatch.setattr(figures, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(figures, "PAGES", (page,))
    page.write_text("It is <!-- figure part.sum -->0<!-- end -->.")
    with pytest.raises(figures.subprocess.CalledProcessError):
        figures.make("part", "a base", again=False)
    assert not (tmp_path / "kept").exists()
    figures.make("part", "a base", again=False)
    assert counter.read_text() == "abb" and figures.kept_values() == {"part": [1, 3]}
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.fill()
    assert page.read_text() == "It is <!-- figure part.sum -->4<!-- end -->."
    monkeypatch.setattr(figures, "ROOT", ROOT)
    figures.make("part", "another base", again=False)
    assert counter.read_text() == "abbab"


def test_a_table_is_markdown():
    assert table(("", "b"), [("x", "2")]) == "| | b |\n|---|---|\n| x | 2 |"
