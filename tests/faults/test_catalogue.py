"""The catalogue of faults is whole: every row stands in it once, and every test that it names exists."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from catalogue import FAMILIES, ROWS
from harness import ROOT

LAST = {"L": 16, "D": 17, "I": 11, "F": 10, "C": 7, "B": 10, "P": 6, "K": 6}
"""Rows of each family, numbered from 1."""


def functions_of(name: str) -> set[str]:
    """Of a file by its name, with its folder or without; a name of test files no other room has."""
    paths = list((ROOT / "tests").rglob(name))
    assert len(paths) == 1 or name == "conftest.py", name
    body = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def missing(names: set[str]) -> set[str]:
    """Those that name no test."""
    files = {name.split("::")[0] for name in names}
    known = {f"{path}::{test}" for path in files for test in functions_of(path)}
    return {name for name in names if name not in known or not name.split("::")[1].startswith("test_")}


def test_every_row_stands_in_it_once():
    assert set(LAST) == set(FAMILIES)
    assert [row.id for row in ROWS] == [f"{f}{n}" for f, last in LAST.items() for n in range(1, last + 1)]


def test_every_row_has_tests_that_exist():
    assert all(row.tests and row.fault and row.code for row in ROWS)
    assert missing({name for row in ROWS for name in row.tests}) == set()
    real = ROWS[0].tests[0]
    assert missing({real, f"{real}_not", "conftest.py::settings"}) == {f"{real}_not", "conftest.py::settings"}


def cases(session: pytest.Session) -> Counter[str]:
    """Cases of each file of this folder, as pytest collects them; anew where this run is of fewer."""
    folder = Path(__file__).parent
    found = Counter(item.path.name for item in session.items if item.path.parent == folder)
    if (
        set(found) == {path.name for path in folder.glob("test_*.py")}
        and not session.config.option.keyword
        and "slow" not in session.config.option.markexpr
    ):
        return found
    words = ["--collect-only", "-q", "--no-header", "-p", "no:cacheprovider", "tests/faults"]
    command = [sys.executable, "-m", "pytest", *words]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return Counter(line.split("::")[0].rpartition("/")[2] for line in out.splitlines() if "::test_" in line)


@pytest.mark.slow  # where this run is of fewer
def test_the_count(capsys, request):
    """Printed, and the same as in docs/RELIABILITY.md."""
    counted = cases(request.session)
    total = counted.total()
    rows = Counter(row.id[0] for row in ROWS)
    named = {name for row in ROWS for name in row.tests}
    partly = [row.id for row in ROWS if row.without]
    with capsys.disabled():
        print(f"\nfaults: {len(ROWS)} rows, {len(named)} tests named, {total} cases in tests/faults")
        print(", ".join(f"{FAMILIES[family]} {count}" for family, count in rows.items()))
        print(f"of {len(partly)} rows a part does not apply: {', '.join(partly)}")
    assert total > 300 and counted["test_catalogue.py"] >= 4
    page = (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8")
    for family, words in FAMILIES.items():
        [line] = re.findall(rf"^\| {family}\d*[^|]*\| {words} \| (\d+) \|", page, re.M)
        assert int(line) == rows[family], words
    for row in ROWS:
        assert not row.without or f"**{row.id}**" in page, f"{row.id}: its part that does not apply"


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_refusal_has_a_test_of_a_whole_command(row):
    """Where the code is not 0 alone, one of the tests at least runs a script and looks at its exit code."""
    if row.code.startswith(("0", "none")):
        return
    whole = ("faults/", "test_user_errors", "test_train", "test_morph.py", "test_mix_lora")
    assert any(name.startswith(whole) for name in row.tests), row.tests
