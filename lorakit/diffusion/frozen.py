"""Frozen layers and LoRAs that keep less for the backward pass, to the same bits.

autograd keeps a convolution's input for the gradient of its weight, which nobody asks for here, and both
factors of a gated unit beside what they are made of: a quarter of what a step of SD 1.5 keeps. A function of
one's own costs some microseconds more, which small models feel (a seventh of a step of the miniature).
"""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function


class _Convolve(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        return nn.functional.conv2d(x, weight, bias, *geometry)  # stride, padding, dilation, groups

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, *ctx.geometry = inputs
        ctx.save_for_backward(weight, x.new_empty(1).expand(x.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        weight, shape_of_x = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        geometry = stride, padding, dilation, False, (0, 0), groups
        back = torch.ops.aten.convolution_backward(
            grad, shape_of_x, weight, None, *geometry, (True, False, False)
        )
        return back[0], None, None, None, None, None, None


class FrozenConv2d(nn.Conv2d):
    """nn.Conv2d whose weight and bias are not trained; the input is taken in the weight's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _Convolve.apply(input.to(self.weight.dtype), self.weight, self.bias, *geometry)


class _Gate(Function):
    @staticmethod
    def forward(both: Tensor) -> Tensor:
        hidden, gate = both.chunk(2, dim=-1)
        return hidden * nn.functional.gelu(gate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        hidden, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        of_gate = torch.ops.aten.gelu_backward(grad * hidden, gate)
        return torch.cat([grad * nn.functional.gelu(gate), of_gate], dim=-1)


class LeanGEGLU(GEGLU):
    """diffusers' GEGLU (Shazeer 2020, arXiv:2002.05202), whose gelu is computed again on the way back."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Gate.apply(self.proj(hidden_states))


def keep_less(model: nn.Module) -> None:
    """Frozen convolutions and gated units of `model` become those of this module, in place."""
    lean = {nn.Conv2d: FrozenConv2d, GEGLU: LeanGEGLU}
    for layer in model.modules():
        frozen = not any(p.requires_grad for p in layer.parameters(recurse=False))
        if type(layer) in lean and frozen and getattr(layer, "padding_mode", "zeros") == "zeros":
            layer.__class__ = lean[type(layer)]


def leave_casts_to_autocast(*models: Any) -> None:
    """LoRAs take their input as it is: PEFT makes float32 of it, and autocast half precision again.

    The values are the same. What is kept for the backward pass is a tenth less, since query, key and value
    then share their input. A DoRA keeps the cast: it takes norms in the dtype of its input.
    """
    for model in models:
        for layer in model.modules() if model is not None else ():
            if isinstance(layer, LoraLayer) and not any(layer.use_dora.values()):
                layer.cast_input_dtype_enabled = False
