"""What is longer than one can take in: scripts of 250 lines, modules of 350, functions of 60."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "inversion_pipeline.py"  # at the root since programs import it, and no script
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != LIBRARY)
MODULES = sorted(
    path for room in ("lorakit", "benchmarks", "miniature") for path in (ROOT / room).rglob("*.py")
)
# Read from top to bottom, each is the method that its script is named for.
LOOPS = {"train_lora.py": "train", "morph.py": "morph", "style_transfer.py": "restyle_all"}


def long_functions(source: str, most: int = 60) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {node.name for node in nodes if (node.end_lineno or 0) - node.lineno + 1 > most}


@pytest.mark.parametrize(
    ("path", "most"),
    [(path, 250) for path in SCRIPTS] + [(path, 350) for path in [ROOT / LIBRARY, *MODULES]],
    ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else "",
)
def test_a_file_can_be_read_in_one_go(path, most):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= most
    assert long_functions(source) <= {LOOPS.get(path.name)}


def test_there_is_something_to_measure_and_it_is_measured():
    assert len(SCRIPTS) >= 7 and len(MODULES) >= 90
    body = "".join(f"    x = {i}\n" for i in range(60))
    assert long_functions(f"def f():\n{body}") == {"f"}
    assert long_functions(f"def f():\n{body[:-10]}") == set()
