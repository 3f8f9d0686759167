"""Which programs apply a LoRA file as it was trained, by what was measured: docs/FILES.md. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.weights.lora_file import Layout, component_of, is_motion, is_vector
from lorakit.weights.lora_reader import read_lora

if TYPE_CHECKING:
    from lorakit.weights.lora_file import LoraPair

Modules = Mapping[str, "LoraPair"]

TRAITS: dict[str, Callable[[Modules, Layout], bool]] = {
    "the diffusers layout": lambda modules, layout: layout == "diffusers",
    "DoRA": lambda modules, _: any(pair.magnitude is not None for pair in modules.values()),
    "biases and norms": lambda modules, _: any(map(is_vector, modules)),
    "alpha that is not the rank": lambda modules, layout: (
        layout == "kohya" and any(pair.alpha != pair.rank for pair in modules.values())
    ),
    "several alphas": lambda modules, layout: layout == "kohya" and _has_several_alphas(modules),
    "3x3 convolutions": lambda modules, _: any(
        pair.down.ndim == 4 and pair.down.shape[2] > 1 for pair in modules.values()
    ),
    "time embeddings or shortcuts": lambda modules, _: any(
        name.endswith(("time_emb_proj", "conv_shortcut")) for name in modules
    ),
    "no layer that reads text": lambda modules, _: (
        not any(component_of(name) == "text_encoder" or "_attn2_to_" in name for name in modules)
    ),
}
"""What tells files apart, for the programs below."""
PROGRAMS: dict[str, tuple[str, ...]] = {
    "diffusers 0.42.1": ("biases and norms", "several alphas"),
    "ComfyUI 0.3.64": ("the diffusers layout", "DoRA"),
    "InvokeAI 6.14.2": ("the diffusers layout", "DoRA", "biases and norms", "no layer that reads text"),
    "OpenVINO GenAI 2026.4.1": (
        "the diffusers layout",
        "DoRA",
        "biases and norms",
        "alpha that is not the rank",
        "3x3 convolutions",
        "time embeddings or shortcuts",
    ),
}
"""Program and version -> the traits with which it applies something else, or nothing."""
OF_MOTION: dict[Layout, str] = {
    "kohya": "animate.py alone; for others set format=diffusers or format=animatediff",
    "diffusers": "animate.py, diffusers 0.42.1 (AnimateDiffPipeline); for ComfyUI set format=animatediff",
    "animatediff": "animate.py, ComfyUI's AnimateDiff-Evolved by its rules for names; not diffusers",
}
"""Who reads a LoRA for motion."""
_REMEDIES = {"alpha that is not the rank": "fold_alpha=true", "the diffusers layout": "format=kohya"}


def readers(modules: Modules, layout: Layout) -> dict[str, list[str]]:
    """Program -> what of the file it does not apply as it is meant; nothing: it reads the file rightly."""
    own = [trait for trait, holds in TRAITS.items() if holds(modules, layout)]
    return {program: [trait for trait in own if trait in bad] for program, bad in PROGRAMS.items()}


def read_by(modules: Modules, layout: Layout) -> str:
    """The programs that read a file rightly, and why the others do not, in a line."""
    if all(map(is_motion, modules)):
        return OF_MOTION[layout]
    found = readers(modules, layout)
    right = [program for program, faults in found.items() if not faults]
    wrong = [f"{program} ({', '.join(map(_words, faults))})" for program, faults in found.items() if faults]
    return ", ".join(right or ["none that was tried"]) + (f"; not {', '.join(wrong)}" if wrong else "")


def _words(trait: str) -> str:
    return f"{trait}: {_REMEDIES[trait]}" if trait in _REMEDIES else trait


def _has_several_alphas(modules: Modules) -> bool:
    alphas = {(component_of(name), pair.alpha) for name, pair in modules.items() if not is_vector(name)}
    return len(alphas) > len({component for component, _ in alphas})


def file_read_by(path: Path) -> str:
    """`read_by` of a LoRA file as this toolkit writes it. Raises as `read_lora`."""
    layout: Layout = "diffusers" if (file := read_lora(path)).layout == "diffusers" else "kohya"
    return read_by(file.modules, layout)
