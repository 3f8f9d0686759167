"""Imports point down from package to package and go round in none; scripts import no scripts."""

import ast
import functools
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a package may import besides itself.
MAY_IMPORT = {
    "ground": set(),
    "weights": {"ground"},
    "pictures": {"ground"},
    "diffusion": {"ground", "weights", "pictures"},
    "sampling": {"ground", "weights", "pictures", "diffusion"},
    "training": {"ground", "weights", "pictures", "diffusion", "sampling", "film", "motion"},
    "editing": {"ground", "weights", "pictures", "diffusion", "sampling"},
    "film": {"ground", "weights", "pictures", "diffusion", "sampling"},
    "motion": {"ground", "weights", "pictures", "diffusion", "sampling", "film"},
}
# A library module where users import it from; its main program is the script invert.py.
LIBRARY = {"inversion_pipeline"}
NO_TORCH = [
    "train_lora",
    "mix_lora",
    "demo",
    "morph",
    "invert",
    "generate",
    "style_transfer",
    "edit",
    "drag",
    "animate",
    "lorakit.ground.process",
    "lorakit.ground.runs",
    "lorakit.pictures.edges",
    "lorakit.pictures.folder",
    "lorakit.sampling.config",
    "lorakit.pictures.beside",
    "lorakit.pictures.matching",
    "lorakit.pictures.overlay",
    "lorakit.pictures.painted",
    "lorakit.pictures.page",
    "lorakit.sampling.forecast",
    "lorakit.sampling.fitting",
    "lorakit.sampling.gallery",
    "lorakit.sampling.page",
    "lorakit.training.page",
    "lorakit.film.demo_page",
    "lorakit.weights.lora_fit",
    "lorakit.weights.vocabulary",
    "lorakit.training.plan",
    "lorakit.training.resume",
    "lorakit.diffusion.inversion_plan",
    "lorakit.weights.tokens",
    "lorakit.editing.edit_plan",
    "lorakit.editing.imagic_fitting",
    "lorakit.editing.drag_plan",
    "lorakit.editing.drag_report",
    "lorakit.editing.point_page",
    "lorakit.film.fitting",
    "lorakit.film.morph_folder",
    "lorakit.film.morph_plan",
    "lorakit.motion.animate_plan",
    "lorakit.motion.windows",
]


def imports_of(path: Path) -> frozenset[str]:
    """Every module that a file imports, at its top or in a function; of a package also the modules named."""
    return imports_in(path.read_text(encoding="utf-8"))


@functools.cache
def imports_in(source: str) -> frozenset[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = {f"{module}.{alias.name}" for alias in node.names} if module.count(".") < 2 else set()
            found |= names if module.startswith("lorakit") and names else {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def violations(root: Path) -> list[str]:
    """What in the tree at `root` breaks the order of its layers, one line each."""
    found = []
    scripts = {path.stem for path in root.glob("*.py")} - LIBRARY
    house = root / "lorakit"
    loose = {path.stem for path in house.glob("*.py")} - {"__init__"}
    found += [f"lorakit/{name}.py stands outside the packages" for name in sorted(loose)]
    packages = {path.name for path in house.iterdir() if path.is_dir() and path.name != "__pycache__"}
    found += [f"{name} is no known package, or is missing" for name in sorted(packages ^ set(MAY_IMPORT))]
    for path in sorted([*root.glob("*.py"), *house.rglob("*.py")]):
        inside = path.is_relative_to(house)
        for name in sorted(imports_of(path)):
            if name in scripts or (inside and name in LIBRARY):
                found.append(f"{path.name} imports the script {name}")
            if name.startswith(".") or (name.startswith("lorakit.") and name.count(".") < 2):
                found.append(f"{path.name} imports {name}, not a module by its whole name")
    for package in sorted(packages & set(MAY_IMPORT)):
        init = ast.parse((house / package / "__init__.py").read_text(encoding="utf-8"))
        if ast.get_docstring(init) is None or len(init.body) > 1:
            found.append(f"{package}/__init__.py holds more or less than a docstring")
        inner = {}
        for path in sorted((house / package).glob("*.py")):
            used = [name.split(".")[1:3] for name in imports_of(path) if name.startswith("lorakit.")]
            inner[path.stem] = {name for where, *names in used if where == package for name in names}
            for where in sorted({where for where, *_ in used} - {package} - MAY_IMPORT[package]):
                found.append(f"{package}/{path.stem} imports from {where}")
        try:
            list(TopologicalSorter(inner).static_order())
        except CycleError as error:
            found.append(f"{package} goes round: {' -> '.join(error.args[1])}")
    return found


def test_the_house_keeps_its_layers():
    assert violations(ROOT) == []
    assert len(list(ROOT.glob("*.py"))) >= 8 and len(list((ROOT / "lorakit").rglob("*.py"))) >= 60


PLANTED = {
    "up": (
        "lorakit/ground/errors.py",
        "from lorakit.film.pacing import place",
        "ground/errors imports from film",
    ),
    "up, in a function": (
        "lorakit/diffusion/schedule.py",
        "def f():\n    from lorakit.training import plan",
        "diffusion/schedule imports from training",
    ),
    "sideways": (
        "lorakit/pictures/views.py",
        "import lorakit.weights.tensors",
        "pictures/views imports from weights",
    ),
    "round": (
        "lorakit/ground/errors.py",
        "from lorakit.ground.publish import remove",
        "ground goes round: ",
    ),
    "a script from a script": ("morph.py", "import train_lora", "morph.py imports the script train_lora"),
    "a script from the house": ("lorakit/film/page.py", "import morph", "page.py imports the script morph"),
    "the library from the house": (
        "lorakit/film/page.py",
        "from inversion_pipeline import InversionPipeline",
        "page.py imports the script inversion_pipeline",
    ),
    "code in a package": (
        "lorakit/film/__init__.py",
        "import math",
        "film/__init__.py holds more or less than a docstring",
    ),
    "a drawer": ("lorakit/misc.py", '"""Things."""', "lorakit/misc.py stands outside the packages"),
    "a new package": (
        "lorakit/attic/__init__.py",
        '"""Things."""',
        "attic is no known package, or is missing",
    ),
    "a whole package": (
        "lorakit/film/page.py",
        "from lorakit import ground",
        "page.py imports lorakit.ground, not a module by its whole name",
    ),
    "a relative name": (
        "lorakit/film/page.py",
        "from .pacing import place",
        "page.py imports .pacing, not a",
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_each_kind_of_violation_is_seen(kind, tmp_path):
    place, line, told = PLANTED[kind]
    shutil.copytree(ROOT / "lorakit", tmp_path / "lorakit", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert violations(tmp_path) == []
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        (path.read_text(encoding="utf-8") if path.exists() else "") + f"\n{line}\n", encoding="utf-8"
    )
    found = violations(tmp_path)
    assert [row for row in found if row.startswith(told)], found


IMPORTS = """
import importlib, os, sys
import numpy, PIL.Image, pydantic  # once for all, of no matter here
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        found = {"torch", "diffusers", "transformers", "datasets"} & set(sys.modules)
        print(module, *sorted(found), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, list[str]]:
    """What is heavy among all that a module imports, in a process of its own; `control` is seen to."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "control.py").write_text("import sys; sys.modules['torch'] = sys")
    program = [sys.executable, "-c", IMPORTS, *NO_TORCH, "control"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    out = subprocess.run(program, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {module: found for module, *found in map(str.split, out.splitlines())}


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_answers_at_once_imports_no_torch(imported, module):
    assert imported[module] == [] and imported["control"] == ["torch"]
