"""The pictures that the miniature learns from: a table of scenes, rendered once into files of their own.

Row i of a table is a pure function of (table seed, i): a scene, one of the table's styles, and no combination
that is held out. Pictures for judging use seeds that no table can reach (`judging_scene`).
"""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from lorakit.ground.publish import publish_file
from lorakit.ground.randomness import derive_seed
from miniature.landscapes import STYLES, Scene, held_out, render

PART = 256  # pictures per file: what a kill can cost


@dataclass(frozen=True)
class Table:
    """`count` pictures of `size` pixels, in `styles` by turns; `everything` adds what is held out."""

    seed: int
    count: int
    styles: tuple[str, ...]
    size: int = 128
    everything: bool = False

    def row(self, index: int) -> tuple[Scene, str]:
        """The scene and the style of one picture."""
        style = self.styles[index % len(self.styles)]
        for attempt in range(100):
            scene = Scene.sample(derive_seed(self.seed, "picture", index, attempt))
            if self.everything or not held_out(style, scene):
                return scene, style
        raise AssertionError("one scene in twelve is held out; a hundred in a row are not")

    def render_part(self, part: int) -> np.ndarray:
        """Pictures part * PART onwards, (n, size, size, 3) uint8."""
        indices = range(part * PART, min((part + 1) * PART, self.count))
        return np.stack([np.asarray(render(*self.row(index), self.size)) for index in indices])

    @property
    def parts(self) -> int:
        return -(-self.count // PART)

    def folder(self, cache_dir: Path) -> Path:
        """Where its files lie; a renderer that draws otherwise makes it another folder."""
        what = json.dumps(
            [self.seed, self.styles, self.size, _renderer_hash()] + ["everything"] * self.everything
        )
        return cache_dir / f"pictures-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


@cache
def _renderer_hash() -> str:
    """Of a few small renders, so that what changes no picture costs no rendering."""
    digest = hashlib.sha256()
    for style, seed in product(STYLES, range(4)):
        digest.update(render(Scene.sample(seed), style, 32).tobytes())
    return digest.hexdigest()


def judging_scene(index: int, style: str, combination: bool = False) -> Scene:
    """Scene `index` for judging, never in a table; whether its combination of attributes is held out."""
    for attempt in range(10_000):
        scene = Scene.sample(derive_seed(0, "judging", style, index, attempt))
        if held_out(style, scene) == combination:
            return scene
    raise AssertionError("one scene in twelve is held out")


def _render_file(table: Table, part: int, path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, table.render_part(part), allow_pickle=False)
    publish_file(path, buffer.getvalue())


def rendered(table: Table, cache_dir: Path, workers: int | None = None) -> list[np.ndarray]:
    """The table's pictures as memory-mapped files of PART each; what is not there yet is rendered first.

    Args:
        workers: processes that render; None: one per core.
    """
    folder = table.folder(cache_dir)
    names = [folder / f"{part:05d}-{min(PART, table.count - part * PART)}.npy" for part in range(table.parts)]
    missing = [(part, path) for part, path in enumerate(names) if not path.exists()]
    if workers != 1 and len(missing) > 1:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(_render_file, *zip(*((table, *entry) for entry in missing), strict=True)))
    else:
        for part, path in missing:
            _render_file(table, part, path)
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in names]


def picture(parts: Sequence[np.ndarray], index: int) -> np.ndarray:
    """One picture of `rendered`, (size, size, 3) uint8."""
    return parts[index // PART][index % PART]


def base_table(seed: int, count: int, size: int = 128, styles: Sequence[str] = STYLES[:3]) -> Table:
    """What text-to-image and ControlNet train on."""
    return Table(seed, count, tuple(styles), size)
