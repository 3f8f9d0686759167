"""The frames of a film: where they lie, rendered in resumable passes, decoded into files.

A film passes picture k at position k. What a pass has done is kept in a state file, so that an interrupted
pass goes on where it was and gives the same bytes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from lorakit.diffusion.metrics import FeatureDistance
from lorakit.diffusion.models import Base
from lorakit.diffusion.paths import decode_picture
from lorakit.film import morphing
from lorakit.film.config import MorphConfig
from lorakit.film.morph_folder import frame_paths
from lorakit.film.morph_plan import MorphPlan, probe_rounds, probe_stride
from lorakit.film.pacing import ease, even_positions, next_probe, select_even, share_frames
from lorakit.ground.chunks import Chunks
from lorakit.ground.errors import UserError
from lorakit.ground.publish import make_folder, publish_file
from lorakit.pictures.images import save_png
from lorakit.weights.tensors import read_tensors, serialize

SAVE_SECONDS = 10.0  # between states of a pass; what a kill can lose


@dataclass
class Studio:
    """All that a pass needs.

    `key` names what the frames are a function of; `step` is called with the U-Net evaluations of each step,
    and may raise to stop; `team` are the processes that share the frames; `residual_ratio` (E,) is that of
    the last whole pass, see morphing.State.
    """

    base: Base
    denoiser: Any
    ends: morphing.Ends
    settings: morphing.Settings
    control: Tensor | None
    chunks: Chunks
    distance: FeatureDistance
    folder: Path
    key: str
    team: PartialState = field(default_factory=PartialState)
    step: Callable[[int], None] = lambda evaluations: None
    residual_ratio: Tensor = field(default_factory=lambda: torch.zeros(0))

    @torch.no_grad()
    def render(self, positions: Sequence[float], stride: int = 1) -> Tensor:
        """The latents (F, C, h, w) of frames at `positions`, on the CPU, at every process.

        Args:
            stride: pass every so many-th node of the grid only, as a probe does.
        """
        full = self.denoiser.schedule.grid(len(self.ends.trajectory) - 1, self.settings.solver)
        grid = full.coarse(stride)
        ends = morphing.Ends(self.ends.trajectory[full.nodes(stride)], self.ends.rows)
        lies, inside = morphing.positions_to_rows(positions, len(ends.rows), self.base.device)
        mine = slice(self.team.process_index, None, self.team.num_processes)
        lies = morphing.Between(lies.left[mine], lies.right[mine], lies.alpha[mine])
        rows = morphing.frame_rows(ends, lies, self.control)
        state_file = self._state_file(positions, stride)
        state = self._load(state_file) or morphing.start(ends, lies, self.settings)
        saved, before = time.monotonic(), self.denoiser.evaluations
        steps = morphing.denoise(self.denoiser, ends, lies, rows, grid, self.settings, self.chunks, state)
        for state in steps:
            try:
                self.step(self.denoiser.evaluations - before)
            except UserError:  # a signal: nothing of this pass is lost
                self._save(state_file, state)
                raise
            before = self.denoiser.evaluations
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(state_file, state)
                saved = time.monotonic()
        if stride == 1:
            self.residual_ratio = state.residual_ratio.cpu()
        if state.step and time.monotonic() - saved > 1:
            self._save(state_file, state)
        parts = gather_object([(inside[mine], state.frames.cpu())])
        return _in_order(positions, inside, parts, state.ends.cpu())

    def look(self, latents: Tensor) -> list[Tensor]:
        """What the distance sees of each frame."""
        features = [self.distance.features(self.base.decode(x[None])) for x in latents]
        return [torch.cat(level) for level in zip(*features, strict=True)]

    def steps(self, features: list[Tensor]) -> list[float]:
        """The distances between neighbours."""
        return self.distance.between([f[:-1] for f in features], [f[1:] for f in features]).tolist()

    def _state_file(self, positions: Sequence[float], stride: int) -> Path:
        what = json.dumps(
            [self.key, list(positions), stride, self.team.process_index, self.team.num_processes]
        )
        return self.folder / f"pass-{hashlib.sha256(what.encode()).hexdigest()[:24]}.safetensors"

    def _save(self, path: Path, state: morphing.State) -> None:
        told = {"step": str(state.step), "chunk": str(self.chunks.size)}
        tensors = {"frames": state.frames, "ends": state.ends, "residual_ratio": state.residual_ratio}
        if state.noise is not None:
            tensors["noise"] = state.noise
        publish_file(path, serialize(tensors, told))

    def _load(self, path: Path) -> morphing.State | None:
        if not path.exists():
            return None
        try:
            tensors, told = read_tensors(path)
            moved = {name: tensor.to(self.base.device) for name, tensor in tensors.items()}
            state = morphing.State(int(told["step"]), **moved)
            self.chunks.size = int(told["chunk"])
        except (UserError, KeyError, TypeError, ValueError):  # damaged: the pass starts anew
            return None
        return state


def _of_first(value: Any) -> Any:
    """What the first process has, at all of them: so that none goes another way by a rounding error."""
    return broadcast_object_list([value])[0]


def _in_order(positions: Sequence[float], inside: list[int], parts: list, ends: Tensor) -> Tensor:
    frames: dict[int, Tensor] = {}
    for indices, latents in parts:
        frames |= dict(zip(indices, latents, strict=True))
    for index, position in enumerate(positions):
        if index not in frames:
            frames[index] = ends[math.floor(position) % len(ends)]
    return torch.stack([frames[index] for index in range(len(positions))])


# ---- pacing ----


def shoot(cfg: MorphConfig, plan: MorphPlan, studio: Studio) -> tuple[list[float], Tensor]:
    """The positions of the film's frames, as cfg.reschedule paces them, and the frames' latents."""
    if cfg.reschedule == "select":
        return _select(cfg, plan, studio)
    if cfg.reschedule == "off":
        alphas = ease([i / (cfg.frames - 1) for i in range(cfg.frames - 1)], cfg.easing).tolist()
        positions = [k + alpha for k in range(plan.segments) for alpha in alphas]
    else:
        known, steps = probe(cfg, plan, studio)
        positions = _of_first(_even(cfg, plan, known, steps))
    if cfg.reschedule == "full":
        seen = [*positions, float(plan.segments)]
        steps = studio.steps(studio.look(studio.render(seen)))
        positions = _of_first(_even(cfg, plan, seen, steps))
    positions = positions if cfg.loop else [*positions, float(plan.segments)]
    return positions, studio.render(positions)


def probe(cfg: MorphConfig, plan: MorphPlan, studio: Studio) -> tuple[list[float], list[float]]:
    """Positions that were looked at, in few steps, and the distances between them."""
    stride = probe_stride(cfg)
    first, *later = probe_rounds(cfg)
    known = [k + i / (first + 1) for k in range(plan.segments) for i in range(first + 1)] + [
        float(plan.segments)
    ]
    features = studio.look(studio.render(known, stride))
    for inner in later:
        new = _of_first(next_probe(known, studio.steps(features), inner * plan.segments))
        if not new:
            break
        seen = studio.look(studio.render(new, stride))
        order = sorted(range(len(known) + len(new)), key=[*known, *new].__getitem__)
        features = [torch.cat(pair)[order] for pair in zip(features, seen, strict=True)]
        known = sorted([*known, *new])
    return known, studio.steps(features)


def _even(cfg: MorphConfig, plan: MorphPlan, known: list[float], steps: list[float]) -> list[float]:
    """Even speed over the whole film, which still passes every picture; without the last position."""
    cut = [known.index(float(k)) for k in range(plan.segments + 1)]
    parts = [slice(a, b) for a, b in zip(cut[:-1], cut[1:], strict=True)]
    counts = share_frames([sum(steps[part]) for part in parts], plan.segments * (cfg.frames - 1))
    return [
        position
        for part, count in zip(parts, counts, strict=True)
        for position in even_positions(known[part.start : part.stop + 1], steps[part], count + 1, cfg.easing)[
            :-1
        ]
    ]


def _select(cfg: MorphConfig, plan: MorphPlan, studio: Studio) -> tuple[list[float], Tensor]:
    """Render twice as many frames as are wanted, and choose in each segment those that follow evenly."""
    dense = 2 * (cfg.frames - 1)
    positions = [k + i / dense for k in range(plan.segments) for i in range(dense)] + [float(plan.segments)]
    latents = studio.render(positions)
    features = studio.look(latents)
    chosen: list[int] = []
    for k in range(plan.segments):
        part = slice(k * dense, (k + 1) * dense + 1)
        matrix = studio.distance.matrix([f[part] for f in features]).numpy()
        picks = select_even(matrix, cfg.frames)
        chosen += [k * dense + i for i in picks[:-1]]
    if not cfg.loop:
        chosen.append(len(positions) - 1)
    chosen = _of_first(chosen)
    return [positions[i] for i in chosen], latents[chosen]


# ---- files ----


def develop(studio: Studio, latents: Tensor, folder: Path) -> None:
    """Decode frames into folder/0000.png …; those that are there already are kept as they are."""
    make_folder(folder)
    paths = frame_paths(folder, len(latents))
    for index in range(studio.team.process_index, len(paths), studio.team.num_processes):
        if not paths[index].exists():
            save_png(decode_picture(studio.base, latents[index]), paths[index])
        studio.step(0)
    studio.team.wait_for_everyone()
