"""Clips that the motion module learns from: a camera over one large painting of a scene.

Clip i of a table follows from (table seed, i): the scene and style of the picture table, a move, and where in
the painting it lies. A watercolor's bare margin is drawn after the crop, for it belongs to the sheet.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from lorakit.ground.publish import publish_file
from lorakit.ground.randomness import derive_seed
from lorakit.motion.camera import Pose, path
from lorakit.weights.tensors import read_tensors, serialize
from miniature.autoencoder import to_tensor
from miniature.fields import fractal_noise, grid, step
from miniature.landscapes import PAINTERS, lay_out
from miniature.pictures import Table
from miniature.washes import PAPER

PART = 32  # clips per file: what a kill can cost
OVERSIZE = 3  # a painting's side over that of a frame
EDGE = 0.04  # of a painting that no camera sees: margin and vignette
MOVES: dict[str, tuple[str, tuple[float, float]]] = {
    "static": ("pan", (0.0, 0.0)),
    "pan right": ("pan", (0.15, 0.45)),
    "pan left": ("pan", (-0.45, -0.15)),
    "tilt up": ("tilt", (0.1, 0.3)),
    "tilt down": ("tilt", (-0.3, -0.1)),
    "zoom in": ("zoom", (1.15, 1.6)),
    "zoom out": ("zoom", (0.62, 0.87)),
    "roll clockwise": ("roll", (8.0, 25.0)),
    "roll back": ("roll", (-25.0, -8.0)),
}
"""Name -> key of the camera and the range of its size over a clip; by turns, a quarter with a pan besides."""


@dataclass(frozen=True)
class Clips:
    """`count` clips of `frames` frames over the paintings of a table."""

    table: Table
    frames: int

    def camera(self, index: int) -> tuple[str, list[Pose], tuple[float, float, float]]:
        """The move's name, the pose of each frame, and of the crop at its start the centre and the side, in
        shares of the painting.
        """
        turn = index // len(self.table.styles)  # each style meets each move
        name = list(MOVES)[turn % len(MOVES)]
        for attempt in range(2000):
            rng = np.random.default_rng(derive_seed(self.table.seed, "clip", index, attempt))
            key, (low, high) = MOVES[name]
            keys = {"pan": [0.0, 0.0], "tilt": [0.0], "zoom": [1.0], "roll": [0.0]}
            keys[key] = [1.0 if key == "zoom" else 0.0, rng.uniform(low, high)]
            if turn // len(MOVES) % 4 == 3 and key != "pan":
                keys["pan"] = [0.0, rng.uniform(-0.3, 0.3)]
            side = rng.uniform(0.5, 0.85)
            x, y = rng.uniform(side / 2, 1 - side / 2, 2)
            size = self.table.size
            poses = path(self.frames, (size, size), keys, "linear", False)
            if all(_inside(pose, (x, y, side), size) for pose in poses):
                return name, poses, (x, y, side)
        raise AssertionError(f"no place for {name}")

    def render(self, index: int) -> np.ndarray:
        """(F, size, size, 3) uint8."""
        scene, style = self.table.row(index)
        size, (_, poses, place) = self.table.size, self.camera(index)
        painting = torch.from_numpy(PAINTERS[style](lay_out(scene, OVERSIZE * size)))[None].float()
        grids = torch.stack([_look(pose, place, size) for pose in poses])  # (F, 2 size, 2 size, 2)
        seen = grid_sample(painting.expand(len(poses), -1, -1, -1), grids, "bilinear", align_corners=False)
        frames = avg_pool2d(seen, 2).clamp(0, 1).numpy()
        if style == "a watercolor":
            frames = _margin(frames, scene.seed)
        return np.rint(255 * frames.transpose(0, 2, 3, 1)).astype(np.uint8)

    def folder(self, cache: Path, vae_digest: str) -> Path:
        """Where its latents lie; another renderer, camera or autoencoder makes it another folder."""
        cameras = list(map(self.camera, range(len(MOVES) * len(self.table.styles))))
        what = f"{self.table.folder(cache).name} {self.frames} {cameras} {vae_digest}"
        return cache / f"clips-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def _inside(pose: Pose, place: tuple[float, float, float], size: int) -> bool:
    """Whether the camera sees the painting's inner part alone."""
    cos, sin = abs(math.cos(pose.angle)), abs(math.sin(pose.angle))
    half = 0.5 * (cos + sin) / pose.scale  # of the upright square around what it sees
    for centre, way in ((place[0], pose.x), (place[1], pose.y)):
        at = centre + way / size * place[2]
        if not EDGE <= at - half * place[2] <= at + half * place[2] <= 1 - EDGE:
            return False
    return True


def _look(pose: Pose, place: tuple[float, float, float], size: int) -> Tensor:
    """Where in the painting, from -1 to 1, each of the (2 size, 2 size) points of a frame lies."""
    along = (torch.arange(2 * size) + 0.5) / (2 * size) - 0.5
    y, x = along[:, None], along[None]
    cos, sin = math.cos(pose.angle) / pose.scale, math.sin(pose.angle) / pose.scale
    u = place[0] + place[2] * (pose.x / size + cos * x - sin * y)
    v = place[1] + place[2] * (pose.y / size + sin * x + cos * y)
    return torch.stack([2 * u - 1, 2 * v - 1], -1)


def _margin(frames: np.ndarray, seed: int) -> np.ndarray:
    """Watercolors (F, 3, size, size) on a sheet whose margin is bare, the same in every frame."""
    size = frames.shape[-1]
    y, x = grid(size)
    rng = np.random.default_rng(derive_seed(seed, "margin"))
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    painted = step(0.018, 0.034, edge + 0.008 * fractal_noise(rng, (size, size), (9, 9), 3))
    paper = np.array(PAPER, np.float32)[:, None, None]
    return paper * np.clip(frames / paper, 0.02, None) ** painted


@torch.no_grad()
def cached_clips(vae: Any, clips: Clips, cache: Path, device: torch.device) -> list[Tensor]:
    """Latents (n, F, C, h, w) float16, scaled, of PART clips each; what is not there yet is made first."""
    digest = hashlib.sha256()
    for name, value in vae.state_dict().items():
        digest.update(f"{name}".encode() + value.cpu().float().numpy().tobytes())
    folder, parts = clips.folder(cache, digest.hexdigest()), []
    for start in range(0, clips.table.count, PART):
        count = min(PART, clips.table.count - start)
        file = folder / f"{start:05d}-{count}.safetensors"
        if not file.exists():
            latents = [_encoded(vae, clips.render(i), device) for i in range(start, start + count)]
            publish_file(file, serialize({"latents": torch.stack(latents)}, {}))
        parts.append(read_tensors(file)[0]["latents"])
    return parts


def _encoded(vae: Any, frames: Sequence[np.ndarray] | np.ndarray, device: torch.device) -> Tensor:
    means = vae.encode(to_tensor(list(frames)).to(device)).latent_dist.mode()
    return (means * vae.config.scaling_factor).half().cpu()
