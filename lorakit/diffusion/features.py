"""What a U-Net's up blocks put out, taken on the way; a pass that is asked for no more ends there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lorakit.ground.errors import UserError


class _Enough(Exception):
    pass


@contextmanager
def watch(unet: Any, block: int, stop: bool = False) -> Iterator[list[Tensor]]:
    """The outputs (B, C, h, w) of an up block, in the order of the passes inside.

        with watch(unet, -2, stop=True) as seen:
            denoiser(latents, timestep, rows)
        (features,) = seen

    Args:
        block: of `up_blocks`; counted from the end it is the same level in U-Nets of any depth.
        stop: a pass ends at the block and takes the body of the context with it.

    Raises:
        UserError: there is no such block.
    """
    seen: list[Tensor] = []

    def see(_: Any, __: Any, output: Tensor) -> None:
        seen.append(output)
        if stop:
            raise _Enough

    hook = unet.up_blocks[checked_block(block, len(unet.up_blocks))].register_forward_hook(see)
    try:
        yield seen
    except _Enough:
        pass
    finally:
        hook.remove()


def checked_block(block: int, count: int) -> int:
    """The block, if there is one of that number.

    Raises:
        UserError: none.
    """
    if not -count <= block < count:
        raise UserError(f"feature_block {block}: this U-Net has {count} up blocks, {-count} to {count - 1}")
    return block
