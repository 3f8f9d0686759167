"""Which layers of a model a LoRA adapts: a preset, or ends of module paths."""

import difflib
from collections.abc import Sequence

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import TARGET_PRESETS, ends_in
from lorakit.weights.lora_foreign import some
from lorakit.weights.lora_metadata import Component


def resolve_targets(component: Component, names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """Full names of the layers to adapt, in the model's order.

    Args:
        names: of all linear layers and convolutions of the model.
        targets: a preset of TARGET_PRESETS, or ends of module paths.

    Raises:
        UserError: no such preset or module.
    """
    presets = TARGET_PRESETS[component]
    if isinstance(targets, str) and targets not in presets:
        raise UserError(f"targets {targets!r}: no such preset; choose {', '.join(presets)}, or list modules")
    ends = presets[targets] if isinstance(targets, str) else targets
    chosen = {end: {name for name in names if ends_in(name, end)} for end in ends}
    lost = [end for end in ends if not chosen[end]]
    # A preset may name a kind of layer that a base lacks, such as conv_shortcut; a list may not.
    if not isinstance(targets, str) and lost or len(lost) == len(ends):
        near = ", ".join(dict.fromkeys(close for end in lost for close in _close_ends(end, names)))
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(
            f"targets: no linear layer or convolution of the {component} ends in {some(lost, 3)}{hint}"
        )
    wanted = set().union(*chosen.values())
    return [name for name in names if name in wanted]


def _close_ends(end: str, names: Sequence[str]) -> list[str]:
    depth = end.count(".") + 1
    return difflib.get_close_matches(end, sorted({".".join(name.split(".")[-depth:]) for name in names}))
