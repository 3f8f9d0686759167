"""The texts in docs/help are what --help prints, whoever asks, from where and on how wide a terminal."""

import contextlib
import difflib
import importlib
import io
import re
from pathlib import Path

import pytest
from pydantic import Field, create_model

import train_lora

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "docs/help"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LISTS = {name: words.split() for name, words in re.findall(r"^(\w+) := (.+)", MAKEFILE, re.M)}
COMMANDS = {name: (name, []) for name in LISTS["SCRIPTS"]} | {
    f"mix_lora_{verb}": ("mix_lora", [verb]) for verb in LISTS["VERBS"]
}
"""Name of a text -> script, and what stands before --help."""


@pytest.fixture(autouse=True)
def as_make_writes_it(monkeypatch, tmp_path):
    """The width of the Makefile, in the folder of a stranger."""
    for word in LISTS["HELP"][:-1]:
        monkeypatch.setenv(*word.split("="))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def printed(name: str) -> str:
    script, words = COMMANDS[name]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        importlib.import_module(script).main([*words, "--help"])
    return out.getvalue()


def differences(name: str, folder: Path = HELP) -> str:
    """What the committed text and the printed one do not share; empty where they are the same."""
    committed = (folder / f"{name}.txt").read_text(encoding="utf-8")
    return "\n".join(
        difflib.unified_diff(committed.splitlines(), printed(name).splitlines(), n=0, lineterm="")
    )


def test_every_script_and_verb_has_a_text_and_the_makefile_writes_it():
    assert {path.name for path in HELP.iterdir()} == {f"{name}.txt" for name in COMMANDS}
    assert sorted(f"{name}.py" for name in LISTS["SCRIPTS"]) == sorted(
        path.name for path in ROOT.glob("*.py") if "def main(argv" in path.read_text(encoding="utf-8")
    )
    assert re.findall(r"^  (\w+) ", printed("mix_lora"), re.M) == LISTS["VERBS"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_committed_help_is_current(name):
    assert printed(name).startswith("usage: ")
    assert not (lines := differences(name)), f"docs/help/{name}.txt is old; run: make help-texts\n{lines}"


CHANGES = {
    "a new key": ({"novelty": (int, Field(7, description="what it is"))}, "novelty = 7"),
    "a default": (
        {"rank": (int, Field(9, ge=1, le=1024, description="rank r of the update B A"))},
        "rank = 9",
    ),
    "a range": (
        {"rank": (int, Field(8, ge=2, le=1024, description="rank r of the update B A"))},
        "an integer >= 2",
    ),
    "a help line": ({"rank": (int, Field(8, ge=1, le=1024, description="its size"))}, "its size"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_keys_is_seen(change, monkeypatch):
    fields, seen = CHANGES[change]
    parse = train_lora.parse_command

    def changed(cls, argv, **options):
        return parse(create_model(cls.__name__, __base__=cls, **fields), argv, **options)

    assert not differences("train_lora")
    monkeypatch.setattr(train_lora, "parse_command", changed)
    assert seen in differences("train_lora")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_text_is_seen(name, tmp_path):
    *lines, last = (HELP / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / f"{name}.txt").write_text("\n".join([*lines, last.swapcase()]), encoding="utf-8")
    assert last in differences(name, tmp_path)
