"""Which programs read a file: the line that is printed says what the table in docs/FILES.md says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit.weights.lora_file import LoraPair, folded, lora_bytes
from lorakit.weights.programs import PROGRAMS, TRAITS, file_read_by, read_by, readers

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def pair(alpha=2.0, *kernel):
    ones = [1] * len(kernel)
    return LoraPair(torch.ones(4, 8, *kernel), torch.ones(8, 4, *ones), alpha)


ATTENTION = {f"{BLOCK}_attn1_to_q": pair(), f"{BLOCK}_attn2_to_k": pair()}
ALL = ATTENTION | {
    "lora_unet_mid_block_resnets_0_conv1": pair(2.0, 3, 3),
    "lora_unet_mid_block_resnets_0_time_emb_proj": pair(),
    "lora_unet_up_blocks_0_resnets_0_conv_shortcut": pair(2.0, 1, 1),
    TEXT: pair(),
}
FILES = {
    "kohya, alpha = rank": {name: replace(each, alpha=4.0) for name, each in ATTENTION.items()},
    "kohya, alpha ≠ rank": ATTENTION,
    "kohya, text encoder and feed-forward, alpha ≠ rank": ATTENTION | {TEXT: pair()},
    "kohya, all layers, alpha ≠ rank": ALL,
    "kohya, all layers, fp16": ALL,
    "kohya, `fold_alpha=true`": folded(ATTENTION | {TEXT: pair()}),
    "kohya, `fold_alpha=true`, all layers": folded(ALL),
    "kohya, attention without cross attention, no text encoder": {f"{BLOCK}_attn1_to_q": pair()},
    "kohya, alphas that differ within a model": ATTENTION | {f"{BLOCK}_attn1_to_k": pair(3.0)},
    "kohya, biases and norms too": ATTENTION | {f"{BLOCK}_norm1": pair(), TEXT: pair()},
    "diffusers, alpha ≠ rank": ATTENTION,
    "diffusers, DoRA": {
        name: replace(each, magnitude=torch.ones(8)) for name, each in ATTENTION.items()
    },
}  # fmt: skip


def table():
    """Row -> program -> cell of docs/FILES.md."""
    text = (ROOT / "docs/FILES.md").read_text(encoding="utf-8").split("## Which programs read the result")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    head, _, *body = [row for row in rows if len(row) == len(rows[0])]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body[: len(FILES)]}


def test_the_table_has_the_programs_and_the_files_that_are_compared_here():
    assert list(table()) == list(FILES)
    assert all(list(row) == list(PROGRAMS) for row in table().values())


@pytest.mark.parametrize("name", FILES)
def test_the_line_agrees_with_the_table(name):
    layout = name.split(",")[0]
    found = readers(FILES[name], layout)
    assert {program: not faults for program, faults in found.items()} == {
        program: re.match(r"\d", cell) is not None for program, cell in table()[name].items()
    }
    right, _, wrong = read_by(FILES[name], layout).partition("; not ")
    for program, faults in found.items():
        assert program in (wrong if faults else right)
        assert all(fault in wrong for fault in faults)


def test_every_trait_tells_some_program():
    assert {trait for bad in PROGRAMS.values() for trait in bad} == set(TRAITS)
    some, biases = {**ATTENTION}, {**ATTENTION, f"{BLOCK}_norm1": pair()}
    for program, faults in readers(biases, "kohya").items():
        assert ("biases and norms" in faults) == ("ComfyUI" not in program)
        assert "biases and norms" not in readers(some, "kohya")[program]


@pytest.mark.parametrize(("size", "alpha"), [(1e-6, 0.25), (2e4, 64.0), (1e-6, -0.25)])
def test_a_fold_without_room_in_half_precision_moves_a_power_of_two_to_the_other_factor(size, alpha):
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 24), (16, 4)))
    small, plain = LoraPair(down.half(), (size * up).half(), alpha), LoraPair(down.half(), up.half(), 1.0)
    wanted = alpha / 4 * (small.up.double() @ small.down.double())
    lost = (small.up.float() * small.scale).half().double() @ small.down.double()
    out = folded({"a": small})["a"]
    assert out.alpha == 4 and out.up.dtype == out.down.dtype == torch.float16
    assert (out.up.double() @ out.down.double() - wanted).norm() < 1e-3 * wanted.norm()
    assert not (lost - wanted).norm() < 0.05 * wanted.norm()
    moved = float(torch.log2(small.down.float().norm() / out.down.float().norm()))
    assert moved == pytest.approx(round(moved), abs=1e-3) and round(moved) != 0
    assert torch.equal(folded({"a": plain})["a"].down, plain.down)  # with room it stays as it was


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_file_is_read_as_what_was_written(tmp_path, layout):
    path = tmp_path / "a.safetensors"
    modules = folded(ALL) if layout == "diffusers" else ALL
    path.write_bytes(lora_bytes(modules, layout=layout, metadata={}))
    assert file_read_by(path) == read_by(modules, layout)
    assert ("fold_alpha=true" in file_read_by(path)) == (layout == "kohya")
