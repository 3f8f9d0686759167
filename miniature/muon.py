"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal; AdamW for all other parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.99)  # of AdamW
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, as published


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """(N, rows, columns) with singular values near 1 and the same singular vectors, by Newton-Schulz."""
    x = (matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon moves it: weights of convolutions and projections, without embeddings and pixels."""
    return p.ndim >= 2 and "embed" not in name and min(p.shape[:2]) > 3


class Muon(torch.optim.Optimizer):
    """Matrices move by lr * matrix_scale * sqrt(max(1, rows / columns)) times the orthogonal factor.

    A convolution's weight (out, in, h, w) counts as a matrix of `out` rows. Weight decay is decoupled.

    Args:
        named: parameters with their names.
        matrix_scale: learning rate of the matrices over that of AdamW.
        dtype: of the iteration; bfloat16 is enough.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        matrix_scale: float,
        weight_decay: float,
        dtype: torch.dtype,
    ):
        self.dtype = dtype
        named = list(named)
        matrices = [p for name, p in named if is_matrix(name, p)]
        rest = [(name, p) for name, p in named if not is_matrix(name, p)]
        decayed = [p for name, p in rest if p.ndim >= 2 and "embed" not in name]
        plain = [p for name, p in rest if p.ndim < 2 or "embed" in name]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "matrix_scale": matrix_scale},
            {"params": decayed, "matrix_scale": None},
            {"params": plain, "matrix_scale": None, "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            move = self._adam if group["matrix_scale"] is None else self._muon
            move([p for p in group["params"] if p.grad is not None], group)

    def _muon(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in parameters:
            by_shape.setdefault(p.shape, []).append(p)
        lr = group["lr"] * group["matrix_scale"]
        for shape, alike in by_shape.items():
            updates = []
            for p in alike:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                assert p.grad is not None
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                ahead = p.grad.lerp(momentum, MOMENTUM)  # Nesterov's
                updates.append(ahead.movedim(1, -1).reshape(shape[0], -1))
            orthogonal = orthogonalize(torch.stack(updates), self.dtype)
            factor = lr * max(1.0, shape[0] / orthogonal.shape[2]) ** 0.5
            for p, update in zip(alike, orthogonal, strict=True):
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(update.view(p.movedim(1, -1).shape).movedim(-1, 1), alpha=factor)

    def _adam(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        for p in parameters:
            state = self.state[p]
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - BETAS[0])
            state["square"].mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
            unbiased = [1 - beta ** state["step"] for beta in BETAS]
            scale = (state["square"] / unbiased[1]).sqrt_().add_(1e-8)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(state["mean"], scale, value=-group["lr"] / unbiased[0])
