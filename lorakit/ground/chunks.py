"""Work on many rows in slices that fit into memory."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Chunks:
    """Runs work on slices of at most `size` rows; where memory runs out, `size` is halved for good."""

    def __init__(self, size: int):
        self.size = size

    def parts(self, count: int, work: Callable[[slice], T]) -> list[T]:
        """`work(slice)` for slices that cover `count` rows, from the first again when memory ran out."""
        while True:
            try:
                return [work(slice(i, min(i + self.size, count))) for i in range(0, count, self.size)]
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = max(1, min(self.size, count) // 2)
            torch.cuda.empty_cache()  # out here, for the exception holds what was in memory

    def map(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        """`work(slice)` -> (rows of the slice, …), for all of `count` rows."""
        return torch.cat(self.parts(count, work))
