"""A picture that a film starts from: what each frame sees of it, and what leads back to it.

Its inverted noise is the scene's. While frames agree, each expects the picture, seen through its camera,
where that reaches; afterwards each is put right by what the picture's own step misses its path by, moved
along (after PnP inversion, Ju et al. 2024). Frames with the camera at rest are on that path, and so the
picture.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, max_pool2d

from lorakit.diffusion.schedule import Grid
from lorakit.motion.agreement import seen_at
from lorakit.motion.camera import Pose, between
from lorakit.pictures.images import image_size, read_picture, to_array

REST = Pose()


class Shown:
    """What is known of a film's frames.

    Args:
        path: (n + 1, C, h, w), the picture's latents at the nodes of `grid`, from noise on.
        views: (F, C, h, w), the latents of what each frame sees of the picture.
        inside: (F, 1, h, w), 1 where it sees the picture.
        same: the frames that are the picture.
        factor: pixels of a latent one.
    """

    def __init__(
        self,
        path: Tensor,
        grid: Grid,
        poses: Sequence[Pose],
        views: Tensor,
        inside: Tensor,
        same: Sequence[int],
        factor: int,
    ):
        self.path, self.views, self.inside, self.same = path, views, inside, list(same)
        size = path.shape[-2], path.shape[-1]
        places = [seen_at(size, between(pose, REST), factor) for pose in poses]
        self.places = torch.stack(places).to(path)
        self.expected = [_expected(path[i : i + 2], grid.alpha_bar[i : i + 2]) for i in range(len(grid))]

    def __call__(self, i: int, x_0: Tensor, agreeing: bool) -> Tensor:
        """What the frames expect of the clean latents at step i, (F, C, h, w), with what is known of them."""
        if agreeing:
            return torch.where(self.inside > 0, self.views, x_0)
        missed = (self.expected[i] - x_0[self.same[0]]).expand(len(x_0), -1, -1, -1)
        missed = grid_sample(missed, self.places, "bicubic", "border", align_corners=True)
        missed[self.same] = self.expected[i] - x_0[self.same[0]]  # to the bit
        return x_0 + self.inside * missed

    def put_back(self, i: int, latents: Tensor) -> None:
        """Frames that are the picture lie on its path at node i."""
        latents[self.same] = self.path[i]


def _expected(ends: Tensor, levels: Sequence[float]) -> Tensor:
    """The clean latents that a DDIM step from one node of a path to the next stands for, (C, h, w)."""
    signal, sigma = [math.sqrt(a) for a in levels], [math.sqrt(1 - a) for a in levels]
    eps = (ends[1] / signal[1] - ends[0] / signal[0]) / (sigma[1] / signal[1] - sigma[0] / signal[0])
    return (ends[0] - sigma[0] * eps) / signal[0]


def seen_of(image: str, shape: tuple[int, int], poses: Sequence[Pose]) -> tuple[Tensor, Tensor]:
    """A picture as cameras see it, (F, 3, H, W) in [-1, 1], and (F, 1, H, W) where that is the picture.

    Things that grow show what a larger picture than the film knows of them.

    Args:
        shape: width and height of the film.
    """
    width, height = shape
    own = image_size(image)
    finer = min(max(math.ceil(pose.scale) for pose in poses), max(1, min(own[0] // width, own[1] // height)))
    picture = torch.from_numpy(to_array(read_picture(image, (finer * width, finer * height))))[None]
    still = torch.from_numpy(to_array(read_picture(image, shape)))
    views, inside = [], []
    for pose in poses:
        if pose == REST:
            views.append(still)
            inside.append(torch.ones(1, height, width))
            continue
        parts = math.ceil(finer / pose.scale)  # of a pixel's side, so that none of the picture's is skipped
        size = height * parts, width * parts
        places = seen_at(size, between(pose, REST), 1 / parts)[None]
        places = places * torch.tensor([(side - 1) / side for side in size[::-1]])  # ends of the picture
        seen = grid_sample(picture, places, "bicubic", "border", align_corners=False)
        views.append(avg_pool2d(seen, parts)[0])
        within = (places.abs() <= 1 + 1e-6).all(-1).float()
        inside.append(-max_pool2d(-within, parts))
    return torch.stack(views).clamp(-1, 1), torch.stack(inside)
