"""A film longer than a motion module is wide, in windows that overlap. No torch here."""

WINDOW = 16
"""Frames that the published adapters were trained on, whatever positions they have."""


def windows(frames: int, size: int, overlap: int, loop: bool) -> list[list[tuple[int, float]]]:
    """The frames of each window with their weights, which are greatest in its middle.

    Every frame is in one window at least. In a loop the last windows go on with the first frames.
    """
    if frames <= size:
        return [[(i, 1.0) for i in range(frames)]]
    stride = size - overlap
    starts = list(range(0, frames if loop else frames - size, stride))
    if not loop:
        starts.append(frames - size)
    weights = [min(i + 1, size - i, overlap) / overlap for i in range(size)]
    return [[((start + i) % frames, weights[i]) for i in range(size)] for start in starts]
