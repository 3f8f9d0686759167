"""LoRA files that `lora_file.read_lora` cannot read alone, made into LoRA with named modules.

LoHa and LoKr (LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859) are weight changes of another form.
Both have exact low-rank factors, of a rank too high to keep, which are truncated to a share of their energy.
cloneofsimo's files number their modules: the names follow from the order in which his injection found them.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import LoraFile, LoraPair, kohya_name
from lorakit.weights.lora_metadata import Component
from lorakit.weights.lora_reader import lora_from_tensors, read_lora
from lorakit.weights.mixing import Factors, Mixed, measured, packed, truncate
from lorakit.weights.tensors import read_header, read_tensors

KEPT_ENERGY = 0.999  # of LoHa and LoKr, where nothing else is asked for: a relative error of 3 % at most


def read_any(
    path: Path | str, rank: int | None = None, energy: float | None = None
) -> tuple[LoraFile, list[str]]:
    """A LoRA file of any form, modules by kohya name, and notes on what was done to it.

    Args:
        rank, energy: for LoHa and LoKr, see `mixing.truncate`; without both KEPT_ENERGY.
    Raises:
        UserError, OutputError: as `read_lora`; numbered modules that fit no Stable Diffusion 1.x or 2.x.
    """
    path = Path(path)
    shapes, _ = read_header(path)
    if any(re.search(r"\.(hada|lokr)_", key) for key in shapes):
        energy = KEPT_ENERGY if rank is None and energy is None else energy
        return _read_lycoris(path, rank, energy)
    file = read_lora(path)
    if file.layout == "cloneofsimo":
        return dataclasses.replace(file, modules=_named(path, file)), [
            "its numbered modules were named by order"
        ]
    return file, []


# ---- LoHa and LoKr ----


def _read_lycoris(path: Path, rank: int | None, energy: float | None) -> tuple[LoraFile, list[str]]:
    tensors, metadata = read_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.partition(".")
        name = re.sub(r"^lycoris_(?!text_model_)", "lora_unet_", name)
        parts.setdefault(re.sub(r"^lycoris_", "lora_te_", name), {})[slot] = tensor
    others = {f"{name}.{slot}": tensor for name, part in parts.items() for slot, tensor in part.items()}
    whole: dict[str, Factors] = {}
    sides: dict[str, tuple[int, ...]] = {}
    for name, part in parts.items():
        if not any(slot.startswith(("hada_", "lokr_")) for slot in part):
            continue
        for slot in part:
            del others[f"{name}.{slot}"]
        try:
            whole[name], sides[name] = _expanded(name, {slot: t.float() for slot, t in part.items()})
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{path}: {name} is not LoHa or LoKr as LyCORIS writes it ({error})") from error
    dtype = next(tensor.dtype for key, tensor in tensors.items() if "hada_" in key or "lokr_" in key)
    short = {name: truncate(delta, rank, energy) for name, delta in whole.items()}
    alpha = float(max(down.shape[0] for _, down in short.values()))
    pairs = {name: packed(short[name], sides[name], alpha, dtype) for name in short}
    kept = Mixed(pairs, {name: measured(pairs[name], whole[name]) for name in pairs})
    for name, pair in pairs.items():
        others |= {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": pair.up}
        others[f"{name}.alpha"] = torch.tensor(pair.alpha)
    file = lora_from_tensors(path, others, metadata)
    kind = "loha" if any(".hada_" in key for key in tensors) else "lokr"
    ranks = [pair.rank for pair in pairs.values()]
    note = (
        f"{len(pairs)} modules of {'LoHa' if kind == 'loha' else 'LoKr'} were expanded to LoRA of rank "
        f"{min(ranks)} to {max(ranks)}: kept energy {1 - kept.error() ** 2:.4%}, "
        f"least {1 - kept.error(kept.worst()) ** 2:.4%} in {kept.worst()}"
    )
    return dataclasses.replace(file, layout=kind), [note]


def _expanded(name: str, part: Mapping[str, Tensor]) -> tuple[Factors, tuple[int, ...]]:
    """The exact factors of a module, and the shape of its weight without the first side."""
    known = {
        "alpha",
        *(slot for slot in part if re.fullmatch(r"hada_[wt][12](_[ab])?|lokr_([wt][12])(_[ab])?", slot)),
    }
    if strange := part.keys() - known:
        raise ValueError(f"it also holds {', '.join(sorted(strange))}")
    up, down, kernel = _loha(part) if "hada_w1_a" in part else _lokr(part)
    size = 9 if _is_3x3(name) else 1
    if kernel:
        return (up, down), (down.shape[1] // (kernel[0] * kernel[1]), *kernel)
    if size == 9:
        return (up, down), (down.shape[1] // 9, 3, 3)
    return (up, down), (down.shape[1],)


def _is_3x3(name: str) -> bool:
    ends = (
        "_conv1",
        "_conv2",
        "_downsamplers_0_conv",
        "_upsamplers_0_conv",
        "_unet_conv_in",
        "_unet_conv_out",
    )
    return name.endswith(ends)


def _loha(part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """delta = alpha / r * (B_1 A_1) o (B_2 A_2), entry by entry: rank r^2, from the products of all pairs.

    ((B_1 A_1) o (B_2 A_2))[x, y] = sum_ij B_1[x, i] B_2[x, j] * A_1[i, y] A_2[j, y].
    """
    b1, a1, kernel = _half(part, "hada_w1", "hada_t1")  # (out, r), (r, in * k * k)
    b2, a2, _ = _half(part, "hada_w2", "hada_t2")
    rank = part["hada_w1_b"].shape[0]
    scale = float(part["alpha"]) / rank if "alpha" in part else 1.0
    up = (b1[:, :, None] * b2[:, None, :]).flatten(1)  # (out, r * r)
    down = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)  # (r * r, in * k * k)
    return scale * up, down, kernel


def _lokr(part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """delta = alpha / r * W_1 (x) W_2, Kronecker: (B_1 A_1) (x) (B_2 A_2) = (B_1 (x) B_2)(A_1 (x) A_2).

    Where both factors are whole matrices LyCORIS sets the scale to 1 whatever alpha says.
    """
    halves = [_half(part, f"lokr_w{index}", f"lokr_t{index}") for index in (1, 2)]
    ranks = [part[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in part]
    scale = float(part["alpha"]) / ranks[-1] if ranks and "alpha" in part else 1.0
    (b1, a1, _), (b2, a2, kernel) = halves
    return scale * torch.kron(b1, b2), torch.kron(a1, a2), kernel


def _half(part: Mapping[str, Tensor], name: str, core: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """up, down and the kernel's sides, () if not told, of one factor: whole, low-rank, or Tucker's form.

    Tucker's: W[p, q, k, l] = sum_ij T[i, j, k, l] a[i, p] b[j, q].
    """
    if name in part:
        weight = part[name]
        matrix, kernel = weight.flatten(1), tuple(weight.shape[2:])
        eye = torch.eye(min(matrix.shape))
        return (matrix, eye, kernel) if matrix.shape[0] > matrix.shape[1] else (eye, matrix, kernel)
    a, b = part[f"{name}_a"], part[f"{name}_b"]
    if core not in part:
        return a, b.flatten(1), tuple(b.shape[2:])
    tucker = torch.einsum("ijkl,jq->iqkl", part[core], b)
    return a.T.contiguous(), tucker.contiguous().flatten(1), tuple(tucker.shape[2:])


# ---- cloneofsimo ----

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


def _named(path: Path, file: LoraFile) -> dict[str, LoraPair]:
    """`lora_unet_#7` -> its name. Where two orders are possible, that of the shapes."""
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
            named = dict(zip(names, pairs, strict=True)) if len(names) == len(pairs) else {}
            if named and _plausible(named):
                found |= {kohya_name(component, name): pair for name, pair in named.items()}
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
