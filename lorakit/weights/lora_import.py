"""LoRA files of every form, made into LoRA with named modules: `lora_reader.read_lora` reads LoRA alone.

LoHa and LoKr, and differences of whole weights, have exact low-rank factors, of a rank too high to keep,
which are truncated to a share of their energy.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import LoraFile, LoraPair, is_vector
from lorakit.weights.lora_numbered import named
from lorakit.weights.lora_reader import Parts, is_product, lora_of, pairs, read_parts
from lorakit.weights.lora_report import rank_span
from lorakit.weights.lycoris import doubtful, expanded, told_ranks
from lorakit.weights.mixing import Factors, Mixed, factorise, factors, measured, packed, truncate

KEPT_ENERGY = 0.999  # of a file that is to be small: a relative error of 3 % at most
_FAITHFUL = 1 - 1e-9  # of a LoRA that is put to use: 3e-5

_FORMS = {"loha": "LoHa", "lokr": "LoKr", "whole": "whole weights"}


def read_any(
    path: Path | str, rank: int | None = None, energy: float | None = None
) -> tuple[LoraFile, list[str]]:
    """A LoRA file of any form, modules by kohya name, and notes on what was done to it.

    Args:
        rank, energy: for LoHa, LoKr and whole weights, see `mixing.truncate`; the tensors then have the
            dtype of the file. Without both they are float32 and as good as exact.
    Raises:
        UserError, OutputError: as `read_lora`; numbered modules that fit no Stable Diffusion 1.x or 2.x.
    """
    parts = read_parts(path)
    made, notes = _made(parts, rank, energy)
    file = lora_of(parts, made)
    notes = [*parts.notes, *notes]
    if file.layout == "cloneofsimo":
        file = dataclasses.replace(file, modules=named(parts.path, file))
        notes.append("its numbered modules were named by order")
    return file, notes


def _made(parts: Parts, rank: int | None, energy: float | None) -> tuple[dict[str, LoraPair], list[str]]:
    """LoRA of those modules that are of another form, and what was kept of them."""
    ranks = told_ranks(parts)
    whole: dict[str, Factors] = {}
    sides: dict[str, Sequence[int]] = {}
    for name, part in parts.modules.items():
        if is_product(part):
            try:
                whole[name], sides[name] = expanded(parts, name, ranks)
            except (KeyError, RuntimeError, ValueError, IndexError) as error:
                raise UserError(
                    f"{parts.path}: {name} is not LoHa or LoKr as LyCORIS writes it ({error})"
                ) from error
        elif "diff" in part and energy != 1 and not is_vector(name):
            pair = pairs(parts, name, part)[name]
            whole[name], sides[name] = factors(pair), pair.down.shape[1:]
    if not whole:
        return {}, []
    is_exact = rank is None and energy is None
    own = [t.dtype for name in whole for slot, t in parts.modules[name].items() if slot != "alpha"]
    dtype = torch.float32 if is_exact else functools.reduce(torch.promote_types, own)
    energy = _FAITHFUL if is_exact else energy
    short = {name: _cut(delta, rank, energy) for name, delta in whole.items()}
    alpha = float(max(down.shape[0] for _, down in short.values()))
    made = {name: packed(short[name], sides[name], alpha, dtype) for name in short}
    kept = Mixed(made, {name: measured(made[name], whole[name]) for name in made})
    return made, [_note(parts, kept), *_doubts(parts, ranks)]


def _cut(delta: Factors, rank: int | None, energy: float | None) -> Factors:
    up, down = delta
    is_full = len(down) >= min(len(up), down.shape[1])
    return factorise(up @ down, rank, energy) if is_full else truncate(delta, rank, energy)


def _note(parts: Parts, kept: Mixed) -> str:
    ranks = [pair.rank for pair in kept.modules.values()]
    return (
        f"{len(ranks)} modules of {_FORMS[parts.layout]} were expanded to LoRA of rank "
        f"{rank_span(ranks)}: kept energy {1 - kept.error() ** 2:.4%}, "
        f"least {1 - kept.error(kept.worst()) ** 2:.4%} in {kept.worst()}"
    )


def _doubts(parts: Parts, ranks: set[int]) -> list[str]:
    return [
        f"nothing in it tells whether LyCORIS's rs_lora was on: if it was, it was trained {root:g} times as "
        f"strong, and weight {root:g} is right"
        for root in doubtful(parts, ranks)
    ]
