"""cloneofsimo's files number their modules: names follow from the order in which his injection found them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import LoraFile, LoraPair, kohya_name
from lorakit.weights.lora_metadata import Component

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CLIP_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")  # the order in which transformers makes them
_UNET_CLASSES = frozenset({"CrossAttention", "Attention", "GEGLU"})
# Blocks in the order in which diffusers registers them, which puts the middle last, with their attentions and
# resnets: the same in Stable Diffusion 1.x and 2.x. Those without attention have resnets only.
_BLOCKS = (
    *((f"down_blocks.{i}", 2, 2) for i in range(3)),
    ("down_blocks.3", 0, 2),
    ("up_blocks.0", 0, 3),
    *((f"up_blocks.{i}", 3, 3) for i in range(1, 4)),
    ("mid_block", 1, 2),
)


def named(path: Path, file: LoraFile) -> dict[str, LoraPair]:
    """`lora_unet_#7` -> its name. Where two orders are possible, that of the shapes.

    Raises:
        UserError: gaps, or a count or shapes that fit no Stable Diffusion 1.x or 2.x.
    """
    found: dict[str, LoraPair] = {}
    prefixes: dict[Component, str] = {"unet": "lora_unet_#", "text_encoder": "lora_te_#"}
    for component, prefix in prefixes.items():
        numbered = {
            int(name.removeprefix(prefix)): pair
            for name, pair in file.modules.items()
            if name.startswith(prefix)
        }
        if not numbered:
            continue
        if sorted(numbered) != list(range(len(numbered))):
            raise UserError(
                f"{path}: its numbered modules of the {component} have gaps; the file is incomplete"
            )
        pairs = [numbered[index] for index in range(len(numbered))]
        for names in _orders(component, len(pairs), file.metadata):
            fitted = dict(zip(names, pairs, strict=True)) if len(names) == len(pairs) else {}
            if fitted and _plausible(fitted):
                found |= {kohya_name(component, name): pair for name, pair in fitted.items()}
                break
        else:
            raise UserError(
                f"{path}: has {len(pairs)} numbered modules in the {component}, whose count or shapes fit no "
                "Stable Diffusion 1.x or 2.x, so they cannot be named"
            )
    return found


def _orders(component: Component, count: int, metadata: Mapping[str, str]) -> Iterator[list[str]]:
    """The module names that an injection may have met, in its order: those of the classes it replaced."""
    if component == "text_encoder":
        yield [f"encoder.layers.{i}.self_attn.{end}" for i in range(count // 4) for end in _CLIP_ATTENTION]
        return
    try:
        classes = frozenset(json.loads(metadata["unet"]))
    except (KeyError, ValueError, TypeError):
        classes = _UNET_CLASSES
    attention, resnets = bool(classes & {"CrossAttention", "Attention"}), "ResnetBlock2D" in classes
    first = [f"attn1.{end}" for end in _ATTENTION] * attention
    second = [f"attn2.{end}" for end in _ATTENTION] * attention
    middle = ["ff.net.0.proj"] * ("GEGLU" in classes)
    # Old versions of diffusers registered attn1, ff, attn2; new ones attn1, attn2, ff.
    for inside in ([*first, *middle, *second], [*first, *second, *middle]):
        names = []
        for block, attentions, residuals in _BLOCKS:
            names += [
                f"{block}.attentions.{i}.transformer_blocks.0.{end}"
                for i in range(attentions)
                for end in inside
            ]
            if resnets:
                names += _resnets(block, residuals)
        yield names


def _resnets(block: str, count: int) -> list[str]:
    names = []
    for index in range(count):
        # The shortcut exists where the number of channels changes.
        widens = block.startswith("up_blocks") or (index == 0 and block in ("down_blocks.1", "down_blocks.2"))
        ends = ["conv1", "time_emb_proj", "conv2"] + ["conv_shortcut"] * widens
        names += [f"{block}.resnets.{index}.{end}" for end in ends]
    return names


def _plausible(named: Mapping[str, LoraPair]) -> bool:
    """Whether the shapes agree with the names: one width per transformer, and one width of text in all."""
    widths: dict[str, set[int]] = {}
    for name, pair in named.items():
        block, _, end = (
            name.rpartition(".transformer_blocks.0.") if "attn" in name or "ff" in name else ("", "", name)
        )
        out, into = pair.up.shape[0], pair.down[0].numel()
        if end.startswith("ff."):
            widths.setdefault(block, set()).update({out // 8, into})
        elif block:
            is_text = end in ("attn2.to_k", "attn2.to_v")
            widths.setdefault(block, set()).add(out)
            widths.setdefault("text" if is_text else block, set()).add(into)
        elif (pair.down.ndim == 4) != ("conv" in end):
            return False
    return all(len(each) == 1 for each in widths.values())
