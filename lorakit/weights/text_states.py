"""Files of text states (L, D) that stand for a prompt, as edit.py fits them to a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.ground.errors import UserError
from lorakit.weights.base import BaseInfo
from lorakit.weights.tensors import file_payload_sha256, read_header, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

STATES = "prompt_embeds"
"""The name of the tensor."""


def check_states(path: str, base: BaseInfo) -> None:
    """Whether a file holds text states for this base, by its header.

    Raises:
        UserError: no such file or tensor, or of another width than the base's text states have.
    """
    shapes, _ = read_header(Path(path))
    if STATES not in shapes:
        raise UserError(f"prompt_embeds: {path} holds no tensor {STATES}; edit.py writes such files")
    shape = shapes[STATES]
    if base.known and (len(shape) != 2 or shape != (base.max_tokens, base.cross_attention_dim)):
        wanted = (base.max_tokens, base.cross_attention_dim)
        raise UserError(f"prompt_embeds: {path} holds text states {shape}, this base has {wanted}")


def read_states(path: str) -> Tensor:
    """(L, D), float32 on the CPU. Raises what `read_tensors` raises."""
    return read_tensors(Path(path))[0][STATES].float()


def states_digest(path: str | None) -> str | None:
    """sha256 of what a file holds, of none without one."""
    return file_payload_sha256(Path(path)) if path else None
