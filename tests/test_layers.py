"""Imports point down: a module of lorakit imports only modules of lower layers, scripts import no scripts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"errors"},
    {
        "config_text",
        "tensors",
        "publish",
        "images",
        "captions",
        "lora_metadata",
        "optimizer_state",
        "randomness",
        "schedule",
        "pacing",
        "interpolate",
        "attention",
        "row_weights",
        "chunks",
        "edges",
    },
    {
        "config",
        "base",
        "folder",
        "lora_file",
        "runs",
        "process",
        "objectives",
        "sheet",
        "animation",
        "page",
        "denoiser",
        "inversion",
    },
    {"views", "lora", "models", "mixing", "morphing", "sampling_config"},
    {"plan", "data", "metrics", "lora_check", "lora_import", "lora_report", "merging", "gallery"},
    {"resume", "sampling", "forecast", "morph_plan"},
    {"watch", "saving", "endpoints", "restyling", "sampling_run"},
    {"training", "film"},
    {"morph_report"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.stem for path in (ROOT / "lorakit").glob("*.py") if path.stem != "__init__")
# A library module where users import it from; its main program is the script invert.py.
LIBRARY = {"inversion_pipeline"}
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.stem not in LIBRARY)
NO_TORCH = [
    "train_lora",
    "mix_lora",
    "demo",
    "morph",
    "invert",
    "generate",
    "style_transfer",
    "lorakit.sampling_config",
    "lorakit.gallery",
    "lorakit.edges",
    "lorakit.plan",
    "lorakit.morph_plan",
    "lorakit.resume",
    "lorakit.folder",
    "lorakit.process",
    "lorakit.runs",
]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names] if node.module == "lorakit" else []
            found |= {f"lorakit.{name}" for name in names} or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_a_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    used = {
        name.split(".")[1]
        for name in imports_of(ROOT / "lorakit" / f"{module}.py")
        if name.startswith("lorakit.")
    }
    upward = {name for name in used if RANK[name] >= RANK[module]}
    assert not upward, f"{module} (layer {RANK[module]}) imports {upward}"


def test_scripts_import_no_scripts_and_nothing_imports_a_script():
    assert len(SCRIPTS) >= 2
    names = {path.stem for path in SCRIPTS}
    for path in [*ROOT.glob("*.py"), *(ROOT / "lorakit").glob("*.py")]:
        assert not imports_of(path) & names, path
    for path in (ROOT / "lorakit").glob("*.py"):
        assert not imports_of(path) & LIBRARY, path


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_answers_at_once_imports_no_torch(module):
    heavy = {"torch", "diffusers", "transformers", "datasets"}
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
