"""How far a run is and which of its LoRAs was best, as a checkpoint keeps it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.weights.lora_file import LoraPair

if TYPE_CHECKING:
    from torch import Tensor

Modules = dict[str, LoraPair]


@dataclass(frozen=True)
class Trained:
    """A LoRA by kohya name, and what new words stand for, (n, D) each; one of the two may be empty."""

    modules: Modules
    words: dict[str, Tensor]


@dataclass
class Progress:
    """`smoothed` is the running mean of the loss, `stale` counts validations since the best one.

    `best` is what was trained at `best_step`; a checkpoint keeps it in files of its own.
    """

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    smoothed: float | None = None
    best: Trained | None = None

    def counters(self) -> dict[str, Any]:
        """All but what was trained."""
        counters = asdict(self)
        del counters["best"]
        return counters

    def take(self, saved: dict[str, Any], best: Trained | None, *, comparable: bool) -> None:
        """Put a checkpoint's counters back; without those of the best where its losses do not compare."""
        for key in self.counters():
            setattr(self, key, saved[key])
        self.best = best
        if not comparable:
            self.best, self.best_loss, self.best_step, self.stale = None, None, None, 0

    def judge(self, loss: float) -> bool:
        """Count a validation; whether its loss is the best so far."""
        self.stale += 1
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best_loss, self.best_step, self.stale = loss, self.step, 0
        return True

    def exhausted(self, patience: int | None) -> bool:
        """Whether the validation loss has not improved for `patience` validations."""
        return patience is not None and self.stale >= patience
