"""Self-attention in which frames look at the two pictures they lie between.

The pictures ride in the same denoising step as the frames: their keys and values are recorded, then used by
every frame of that step, and forgotten. So the memory is that of one step, however many steps there are.

q, k, v: (B, heads, tokens, channels of a head).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

AttentionMode = Literal["kv", "outer", "fused_outer"]
Block = Literal["down", "mid", "up"]
Pair = tuple[Tensor, Tensor]  # keys, values


@dataclass(frozen=True)
class Between:
    """The recorded rows, `left` and `right`, that each row of a batch lies between, and where (`alpha`)."""

    left: Tensor
    right: Tensor
    alpha: Tensor


def _kv(q: Tensor, own: Callable[[], Pair], a: Pair, b: Pair, alpha: Tensor) -> Tensor:
    """K = (1 - alpha) K_a + alpha K_b, V alike (DiffMorpher, Zhang et al. 2024, eq. 7)."""
    k, v = (torch.lerp(x, y, alpha) for x, y in zip(a, b, strict=True))
    return attend(q, k, v)


def _outer(q: Tensor, own: Callable[[], Pair], a: Pair, b: Pair, alpha: Tensor) -> Tensor:
    """(1 - alpha) Attn(q, K_a, V_a) + alpha Attn(q, K_b, V_b) (AID, He et al. 2024, outer interpolation)."""
    return torch.lerp(attend(q, *a), attend(q, *b), alpha)


def _fused_outer(q: Tensor, own: Callable[[], Pair], a: Pair, b: Pair, alpha: Tensor) -> Tensor:
    """As outer, with the frame's own keys and values beside those of each picture (AID, fused)."""
    k, v = own()
    left, right = ((torch.cat([k, x], dim=2), torch.cat([v, y], dim=2)) for x, y in (a, b))
    return torch.lerp(attend(q, *left), attend(q, *right), alpha)


MODES: dict[str, Callable[..., Tensor]] = {"kv": _kv, "outer": _outer, "fused_outer": _fused_outer}
assert set(MODES) == set(get_args(AttentionMode))


class SharedAttention:
    """The self-attention of a U-Net's blocks with a switch: plain, recording, or between recorded rows.

    Args:
        unet: UNet2DConditionModel; its other attention is left alone. `close` puts back what was there.
        blocks: which parts of the U-Net take part.
    """

    def __init__(self, unet: Any, mode: AttentionMode, blocks: Sequence[Block] = ("up",)):
        self.unet, self.blend = unet, MODES[mode]
        self.recording, self.halves, self.adding, self.between = False, 1, False, None
        self.before = unet.attn_processors
        starts = tuple(f"{block}_block" for block in blocks)
        self.own = {
            name: _Processor(self) for name in self.before if name.startswith(starts) and ".attn1." in name
        }
        unet.set_attn_processor(self.before | self.own)

    @contextmanager
    def record(self, halves: int = 1, more: bool = False) -> Iterator[None]:
        """The rows of the forward pass inside are those that frames look at, until the next record; inside
        `use` as well, those of each half that come before the frames.

        Args:
            halves: 2 for a batch of a negative and a positive half.
            more: add these rows to those recorded before, half by half.
        """
        self.recording, self.halves, self.adding = True, halves, more
        try:
            yield
        finally:
            self.recording = False

    @contextmanager
    def use(self, between: Between) -> Iterator[None]:
        """The rows of the forward pass inside look at recorded rows; in `record` the last of each half."""
        self.between = between
        try:
            yield
        finally:
            self.between = None

    def recorded_rows(self) -> int:
        """How many rows frames may look at, of all halves."""
        return max((p.recorded[0].shape[:2].numel() for p in self.own.values() if p.recorded), default=0)

    def stored_bytes(self) -> int:
        """What the recorded keys and values take."""
        pairs = [processor.recorded for processor in self.own.values() if processor.recorded]
        return sum(x.numel() * x.element_size() for pair in pairs for x in pair)

    def close(self) -> None:
        self.unet.set_attn_processor(self.before)


class _Processor:
    """What diffusers' AttnProcessor2_0 computes for a transformer block's self-attention, with the switch."""

    def __init__(self, shared: SharedAttention):
        self.shared = shared
        self.recorded: Pair | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None and hidden_states.ndim == 3

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # (B, heads, tokens, channels)

        def own() -> Pair:
            return heads(attn.to_k(hidden_states)), heads(attn.to_v(hidden_states))

        q, shared = heads(attn.to_q(hidden_states)), self.shared
        if shared.between is None:
            pair = own()
            if shared.recording:
                self._record(*pair)
            out = attend(q, *pair)
        elif not shared.recording:
            out = self._look(q, own, shared.between)
        else:  # pictures first, then frames, in each half; LoRAs of all rows want all rows at once
            k, v = own()
            pictures = (len(q) - len(shared.between.alpha)) // shared.halves
            halves = [x.unflatten(0, (shared.halves, -1)).tensor_split([pictures], 1) for x in (q, k, v)]
            (q_a, q_b), (k_a, k_b), (v_a, v_b) = ([part.flatten(0, 1) for part in both] for both in halves)
            self._record(k_a, v_a)
            parts = attend(q_a, k_a, v_a), self._look(q_b, lambda: (k_b, v_b), shared.between)
            out = torch.cat([x.unflatten(0, (shared.halves, -1)) for x in parts], dim=1).flatten(0, 1)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)  # (B, tokens, C)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor

    def _look(self, q: Tensor, own: Callable[[], Pair], between: Between) -> Tensor:
        assert self.recorded is not None, "no rows were recorded in this step"
        keys, values = (x.flatten(0, 1) for x in self.recorded)
        a, b = ((keys[at], values[at]) for at in (between.left, between.right))
        return self.shared.blend(q, own, a, b, between.alpha.to(q).view(-1, 1, 1, 1))

    def _record(self, keys: Tensor, values: Tensor) -> None:
        new = tuple(x.unflatten(0, (self.shared.halves, -1)) for x in (keys, values))
        if self.shared.adding and self.recorded is not None:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self.recorded, new, strict=True))
        self.recorded = new[0], new[1]  # (halves, rows, heads, tokens, channels of a head)
