"""Mathematics of low-rank weight changes: sums, truncation, norms, and merging rules; tensors only, no files.

A change of a weight, flattened to a matrix, is delta = up @ down. The mix of several LoRAs is

    delta = sum_i w_i * (alpha_i / r_i) * B_i @ A_i,

with B `up` and A `down`. Legend: `Factors` are (up, down), float32, with every scale folded into up;
up (out, r), down (r, in * k * k).
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lorakit.ground.errors import UserError
from lorakit.ground.randomness import generator
from lorakit.weights.lora_file import LoraPair, base_of, reads_text
from lorakit.weights.tensors import tensor_bytes

Factors = tuple[Tensor, Tensor]
Method = Literal["exact", "svd", "ties", "dare", "linear"]
Source = tuple[str, Mapping[str, LoraPair], float]
"""A label for messages, modules by kohya name, and a weight."""

# ---- factors ----


def factors(pair: LoraPair, weight: float = 1.0) -> Factors:
    """weight * delta of a module; for DoRA, whose change depends on the base weight, a UserError."""
    if pair.magnitude is not None:
        raise UserError(
            "DoRA has no weight change of its own, it depends on the base weight: such files cannot be "
            "mixed, scaled, resized or merged; inspect and convert read them"
        )
    return pair.up.float().flatten(1) * (weight * pair.scale), pair.down.float().flatten(1)


def concatenated(terms: Sequence[Factors]) -> Factors:
    """The exact sum, of rank sum_i r_i: [B_1 B_2 ...] @ [A_1; A_2; ...]."""
    return torch.cat([up for up, _ in terms], 1), torch.cat([down for _, down in terms])


def inner(a: Factors, b: Factors, dtype: torch.dtype = torch.float32) -> float:
    """<delta_a, delta_b> (Frobenius) as sum((B_a^T B_b) * (A_a A_b^T)), so that no delta is built."""
    (up_a, down_a), (up_b, down_b) = a, b
    products = (up_a.to(dtype).T @ up_b.to(dtype)) * (down_a.to(dtype) @ down_b.to(dtype).T)
    return float(products.sum(dtype=torch.float64))


def squared_distance(a: Factors, b: Factors) -> float:
    """||delta_a - delta_b||^2 (Frobenius); its root is right to 1e-8 of the norms."""
    if a[1].shape == b[1].shape and torch.equal(a[1], b[1]):
        difference = a[0] - b[0], a[1]
        return inner(difference, difference)
    difference = concatenated([a, (-b[0], b[1])])
    coarse = inner(difference, difference)
    if coarse > 1e-4 * inner(b, b):
        return coarse
    return max(inner(difference, difference, torch.float64), 0.0)  # float32 would cancel


def truncate(delta: Factors, rank: int | None = None, energy: float | None = None) -> Factors:
    """The closest delta of lower rank (Eckart and Young 1936), from an SVD of R x R numbers.

    With QR decompositions up = Q_u R_u and down^T = Q_d R_d, delta = Q_u (R_u R_d^T) Q_d^T. The middle is
    R x R; its SVD U S V^T gives that of delta, (Q_u U) S (Q_d V)^T. Each factor takes the root of S.

    Args:
        rank: at most this.
        energy: the fewest singular values whose squares sum to this share of all.

    Raises:
        UserError: the numbers are so large that the update overflows float32.
    """
    up, down = delta
    q_u, r_u = torch.linalg.qr(up)  # (out, m), (m, R)
    q_d, r_d = torch.linalg.qr(down.T)  # (in, n), (n, R)
    middle = r_u.double() @ r_d.double().T
    if not (middle.abs() <= torch.finfo(torch.float32).max).all():  # also false where it is not a number
        raise UserError("a LoRA's numbers are so large that its update overflows: the file is damaged")
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    kept = _count(s.square(), rank, energy)
    root = s[:kept].sqrt()
    return q_u @ (u[:, :kept] * root).float(), (root[:, None] * vh[:kept]).float() @ q_d.T


def factorise(delta: Tensor, rank: int | None = None, energy: float | None = None) -> Factors:
    """As `truncate`, for a matrix (out, in).

    By the eigenvectors of the smaller of delta delta^T and delta^T delta in float64: with U the leading ones,
    U (U^T delta) is the best approximation of its rank.
    """
    if delta.shape[0] > delta.shape[1]:
        up, down = factorise(delta.T, rank, energy)
        return down.T.contiguous(), up.T.contiguous()
    gram = torch.zeros(delta.shape[0], delta.shape[0], dtype=torch.float64)
    for block in delta.split(4096, 1):  # a float64 copy of the whole would be twice it
        gram.addmm_(block.double(), block.double().T)
    values, vectors = torch.linalg.eigh(gram)
    squares = values.flip(0).clamp(min=0)
    kept = _count(squares, rank, energy)
    basis = vectors.flip(1)[:, :kept].float()
    root = squares[:kept].float().pow(0.25)  # the root of a singular value
    down = (basis.T @ delta) / root.clamp(min=1e-30)[:, None]
    return basis * root, torch.where(root[:, None] > 0, down, 0.0)


def _count(squares: Tensor, rank: int | None, energy: float | None) -> int:
    """How many of the squared singular values, in falling order, to keep; one at least."""
    count = len(squares)
    if energy is not None and energy < 1:
        share = squares.cumsum(0) / squares.sum().clamp(min=1e-300)
        count = int((share < energy).sum()) + 1 if squares.any() else 1
    return max(1, min(count, rank or count, len(squares)))


# ---- rules on whole deltas ----


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES merging (Yadav et al. 2023, https://arxiv.org/abs/2306.01708, Algorithm 1) of weighted deltas.

    Trim each to its `density` largest entries by magnitude, elect per entry the sign of the sum, and average
    the entries that have it. A mean, not a sum: equal inputs return themselves. Deviations from the paper:
    weights go into the deltas before the election, and trimming is per module, not over all modules at once.
    """
    trimmed = [_largest(delta, density) for delta in deltas]
    sign = sum(trimmed[1:], trimmed[0]).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta in trimmed:
        agrees = (delta.sign() == sign) & (delta != 0)
        total += delta * agrees
        count += agrees
    return total / count.clamp(min=1)


def _largest(delta: Tensor, density: float) -> Tensor:
    dropped = delta.numel() - max(1, math.ceil(density * delta.numel()))
    if dropped == 0:
        return delta
    threshold = delta.abs().flatten().kthvalue(dropped).values
    return torch.where(delta.abs() > threshold, delta, 0.0)


def dare(delta: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2024, https://arxiv.org/abs/2311.03099, eq. 1-3): entries go at random.

    Each entry stays with probability `density` and is then divided by it.
    """
    return delta * (torch.rand(delta.shape, generator=rng) < density) / density


def linear(terms: Sequence[tuple[LoraPair, float]]) -> Factors:
    """Adds factors instead of deltas: B = sum sgn(w) sqrt|w s| B_i, A = sum sqrt|w s| A_i; s = alpha / r.

    Beside the sum that is asked for, B A holds the cross terms B_i A_j: a comparison, not a mix to use.
    """
    ups, downs = [], []
    for pair, weight in terms:
        up, down = factors(pair, weight)
        root = math.sqrt(abs(weight * pair.scale))
        ups.append(up / root if root else up)
        downs.append(down * root)
    return torch.stack(ups).sum(0), torch.stack(downs).sum(0)


# ---- files ----


@dataclass(frozen=True)
class Mixed:
    """A new LoRA, and by module (||delta - wanted||^2, ||wanted||^2); wanted is the exact weighted sum."""

    modules: dict[str, LoraPair]
    squares: dict[str, tuple[float, float]]

    def error(self, name: str | None = None) -> float:
        """||delta - wanted|| / ||wanted|| (Frobenius), of a module or over all; 0 where both are zero."""
        chosen = [self.squares[name]] if name else list(self.squares.values())
        lost, wanted = (sum(pair[index] for pair in chosen) for index in (0, 1))
        return math.sqrt(lost / wanted) if wanted else float(lost > 0)

    def worst(self) -> str:
        """The module of the largest relative error."""
        return max(self.squares, key=self.error)


def check_same_base(sources: Sequence[Source]) -> None:
    """Raises UserError where two LoRAs are made for models of different shape."""
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for label, modules, _ in sources:
        for name, pair in modules.items():
            sides: dict[str, tuple[int, ...]] = {name: (pair.up.shape[0], pair.down[0].numel())}
            if reads_text(name):  # all read one text, whichever layers a file has
                sides["text"] = (pair.down.shape[1],)
            for key, side in sides.items():
                first, expected = seen.setdefault(key, (label, side))
                if expected != side:
                    raise UserError(_other_base(sources, first, label, name))


def _other_base(sources: Sequence[Source], first: str, second: str, module: str) -> str:
    bases = {label: base_of(modules) or "another base" for label, modules, _ in sources}
    return (
        f"{first} ({bases[first]}) and {second} ({bases[second]}) are made for different base models: "
        f"{module} has other sizes. Use LoRAs of one base"
    )


def mix(
    sources: Sequence[Source],
    method: Method,
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Mixed:
    """The weighted sum of LoRAs, delta = sum_i w_i * (alpha_i / r_i) * B_i @ A_i; some may lack a module.

    Args:
        method: "exact" concatenates; "svd" truncates the exact sum; "ties" and "dare" work on dense deltas
            and are truncated after; "linear" adds factors.
        rank: of the result for "svd", "ties" and "dare"; without rank and energy the largest of the sources.
        energy: instead of rank, or as well, see `truncate`.
        density: share of entries that "ties" and "dare" keep.
        seed: of "dare", whose masks follow from it and the file's content, not from the order of files.
        dtype: None keeps that of the sources, the wider one where they differ.
    Raises:
        UserError: different bases, DoRA, or "linear" with unequal ranks.
    """
    check_same_base(sources)
    if rank is None and energy is None:
        rank = max(pair.rank for _, modules, _ in sources for pair in modules.values())
    terms = _by_module(sources)
    dtype = dtype or widest([pair for own in terms.values() for pair, _ in own])
    together = max(sum(pair.rank for pair, _ in own) for own in terms.values())
    alpha = float(together if method == "exact" or rank is None else min(rank, together))
    modules: dict[str, LoraPair] = {}
    for name, own in terms.items():
        if method == "linear":
            delta = _linear(name, own)
        elif method in ("ties", "dare"):
            delta = factorise(_sparse(method, own, density, seed, name), rank, energy)
        else:
            delta = _weighted_sum(own) if method == "exact" else truncate(_weighted_sum(own), rank, energy)
        modules[name] = packed(delta, own[0][0].down.shape[1:], alpha, dtype)
    return Mixed(modules, {name: measured(modules[name], _weighted_sum(terms[name])) for name in terms})


def _by_module(sources: Sequence[Source]) -> dict[str, list[tuple[LoraPair, float]]]:
    """For each module, by name, what the sources have of it with their weights."""
    names = sorted({name for _, modules, _ in sources for name in modules})
    return {
        name: [(modules[name], weight) for _, modules, weight in sources if name in modules] for name in names
    }


def _weighted_sum(terms: Sequence[tuple[LoraPair, float]]) -> Factors:
    return concatenated([factors(pair, weight) for pair, weight in terms])


def _sparse(
    method: str, terms: Sequence[tuple[LoraPair, float]], density: float, seed: int, name: str
) -> Tensor:
    """The dense result of "ties" or "dare" for one module, (out, in)."""
    deltas = [up @ down for up, down in (factors(pair, weight) for pair, weight in terms)]
    if method == "ties":
        return ties(deltas, density)
    digests = [hashlib.sha256(tensor_bytes(pair.up)).hexdigest() for pair, _ in terms]
    kept = [
        dare(delta, density, generator(seed, "dare", name, digest))
        for delta, digest in zip(deltas, digests, strict=True)
    ]
    return torch.stack(kept).sum(0)


def _linear(name: str, terms: Sequence[tuple[LoraPair, float]]) -> Factors:
    ranks = sorted({pair.rank for pair, _ in terms})
    if len(ranks) > 1:
        raise UserError(f"method linear needs equal ranks, but {name} has {ranks}; use exact or svd")
    return linear(terms)


def measured(pair: LoraPair, wanted: Factors) -> tuple[float, float]:
    """(||delta - wanted||^2, ||wanted||^2) of a module as it will be in the file, rounding included."""
    return squared_distance(factors(pair), wanted), inner(wanted, wanted)


def packed(delta: Factors, shape: Sequence[int], alpha: float, dtype: torch.dtype) -> LoraPair:
    """A module with this delta and this alpha; where alpha is not the rank, up takes the difference.

    A file needs one alpha: diffusers 0.42 misreads kohya files where it differs between attention modules.

    Args:
        shape: of the weight without its first side: (in,) or (in, k, k).
    """
    up, down = delta
    rank = down.shape[0]
    up = up if rank == alpha else up * (rank / alpha)
    ones = [1] * (len(shape) - 1)
    return LoraPair(down.reshape(rank, *shape).to(dtype), up.reshape(len(up), rank, *ones).to(dtype), alpha)


def widest(pairs: Sequence[LoraPair]) -> torch.dtype:
    """The dtype that holds the values of all tensors."""
    return functools.reduce(
        torch.promote_types, {tensor.dtype for pair in pairs for tensor in pair.tensors().values()}
    )


def scaled(modules: Mapping[str, LoraPair], weight: float) -> dict[str, LoraPair]:
    """weight * delta, by `up`; ranks, alphas and dtypes stay."""
    result = {}
    for name, pair in modules.items():
        factors(pair)  # refuses DoRA
        result[name] = replace(pair, up=(pair.up.float() * weight).to(pair.up.dtype))
    return result
