"""LoHa and LoKr as exact low-rank factors (LyCORIS, Yeh et al. 2023, https://arxiv.org/abs/2309.14859).

What counts is the change that LyCORIS's and PEFT's forward passes make: LyCORIS's merge squares the scale.
"""

import json
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lorakit.weights.lora_file import unflatten
from lorakit.weights.lora_keys import is_3x3
from lorakit.weights.lora_reader import Part, Parts, alpha_of, is_product
from lorakit.weights.mixing import Factors

_SLOTS = {
    "alpha",
    *(f"hada_{each}" for each in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{each}" for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
}


def expanded(parts: Parts, name: str, ranks: Collection[int]) -> tuple[Factors, tuple[int, ...]]:
    """The exact factors of a module of LoHa or LoKr, and the shape of its weight without the first side.

    Args:
        ranks: that the file's other modules tell, see `whole_scale`.

    Raises:
        KeyError, RuntimeError, ValueError, IndexError: it is not as LyCORIS or PEFT write it.
    """
    part = {slot: tensor.float() for slot, tensor in parts.modules[name].items()}
    if strange := part.keys() - _SLOTS:
        raise ValueError(f"it also holds {', '.join(sorted(strange))}")
    if "hada_w1_a" in part:
        up, down, kernel = _loha(part)
        scale = _scale(parts, name, part, part["hada_w1_b"].shape[0])
    else:
        up, down, kernel = _lokr(part)
        own = own_rank(part)
        scale = _scale(parts, name, part, own) if own else whole_scale(parts, name, part, ranks)
    factors = scale * up, down
    if kernel:
        return factors, (down.shape[1] // (kernel[0] * kernel[1]), *kernel)
    if is_3x3(name):
        return factors, (down.shape[1] // 9, 3, 3)
    return factors, (down.shape[1],)


def _scale(parts: Parts, name: str, part: Part, rank: int) -> float:
    return alpha_of(parts, name, part, rank) / rank


# ---- LoKr of whole matrices ----


def own_rank(part: Mapping[str, Tensor]) -> int | None:
    """The rank that a module's tensors tell; None for LoKr of two whole matrices."""
    return next((part[key].shape[0] for key in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in part), None)


def told_ranks(parts: Parts) -> set[int]:
    """The ranks (lora_dim) that a file was trained with, by its low-rank modules or by kohya's metadata."""
    ranks = {own_rank(part) for part in parts.modules.values() if is_product(part)}
    dim = parts.metadata.get("ss_network_dim", "")
    return {rank for rank in ranks if rank} or ({int(dim)} if dim.isdecimal() and int(dim) else set())


def whole_scale(parts: Parts, name: str, part: Mapping[str, Tensor], ranks: Collection[int]) -> float:
    """PEFT's is alpha / r of its config. LyCORIS's is 1 whatever alpha says, but sqrt(r) with rs_lora.

    rs_lora leaves alpha = r sqrt(r) in the file, where alpha = r is usual: with r known it shows, and so it
    does where alpha is no whole number.
    """
    place = unflatten(name)
    if "alpha" not in part:
        rank = parts.alphas.rank(*place)
        return parts.alphas.alpha(*place, rank) / rank if rank else 1.0
    alpha = float(part["alpha"])
    if not 1 < alpha < math.inf:
        return 1.0
    rank = round(alpha ** (2 / 3))
    is_rooted = math.isclose(alpha, rank**1.5, rel_tol=2e-3) and rank > 1
    said = rs_lora_said(parts.metadata)
    if said is None:
        said = not alpha.is_integer() or (rank in ranks and alpha not in ranks)
    return math.sqrt(rank) if is_rooted and said else 1.0


def rs_lora_said(metadata: Mapping[str, str]) -> bool | None:
    """Whether kohya's metadata say that LyCORIS's rs_lora was on; None where they say nothing."""
    try:
        args = json.loads(metadata["ss_network_args"])
        return str(args.get("rs_lora", False)).lower() in ("true", "1")
    except (KeyError, ValueError, AttributeError):
        return None


def doubtful(parts: Parts, ranks: Collection[int]) -> list[float]:
    """By how much LoKr of whole matrices would be stronger with rs_lora, where nothing tells of it."""
    if ranks or rs_lora_said(parts.metadata) is not None:
        return []
    alphas = {
        float(part["alpha"])
        for part in parts.modules.values()
        if is_product(part) and own_rank(part) is None and "alpha" in part and part["alpha"].isfinite()
    }
    roots = {alpha: round(alpha ** (1 / 3)) for alpha in alphas if alpha > 1}
    return sorted({float(root) for alpha, root in roots.items() if root**3 == alpha})


# ---- formulas ----


def _loha(part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(B_1 A_1) o (B_2 A_2), entry by entry: rank r^2, from the products of all pairs.

    ((B_1 A_1) o (B_2 A_2))[x, y] = sum_ij B_1[x, i] B_2[x, j] * A_1[i, y] A_2[j, y].
    """
    b1, a1, kernel = _half(part, "hada_w1", "hada_t1")  # (out, r), (r, in * k * k)
    b2, a2, _ = _half(part, "hada_w2", "hada_t2")
    up = (b1[:, :, None] * b2[:, None, :]).flatten(1)  # (out, r * r)
    down = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)  # (r * r, in * k * k)
    return up, down, kernel


def _lokr(part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """W_1 (x) W_2, Kronecker: (B_1 A_1) (x) (B_2 A_2) = (B_1 (x) B_2)(A_1 (x) A_2)."""
    halves = [_half(part, f"lokr_w{index}", f"lokr_t{index}") for index in (1, 2)]
    (b1, a1, _), (b2, a2, kernel) = halves
    return torch.kron(b1, b2), torch.kron(a1, a2), kernel


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
