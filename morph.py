"""Morph pictures into one another, after DiffMorpher (Zhang et al. 2024, https://arxiv.org/abs/2312.07409).

    python morph.py                                              # two mountains, on the embedded base
    python morph.py cfg/morph/mountain.json frames=32 guidance_scale=2
    python morph.py cfg/sd15/morph.json                          # the same on Stable Diffusion 1.5, on a GPU
    accelerate launch morph.py cfg/sd15/morph.json               # several GPUs share the frames

Reads a base, pictures, and for each of them a prompt and a LoRA that was fitted to it. Writes to
<output_dir>/<name>/: frames/*.png, morph.gif and other animations, sheet.png, report.json, index.html.
A command that was interrupted goes on when it is given again, to the same bytes.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.film.config import MorphConfig
from lorakit.film.fitting import fit_missing
from lorakit.film.morph_folder import WITHOUT, Version, claim, finished_version
from lorakit.film.morph_plan import MorphPlan, count_evaluations, describe_morph, fingerprint, make_morph_plan
from lorakit.ground.command import parse_command, print_notes
from lorakit.ground.errors import StoppedError, UserError
from lorakit.ground.process import StopFlag, launched_processes, run_guarded
from lorakit.ground.publish import check_writable, remove
from lorakit.ground.runs import lock_run

if TYPE_CHECKING:  # help, checks and faults of the command line come without torch
    from accelerate import PartialState
    from torch import Tensor

    from lorakit.diffusion.metrics import FeatureDistance
    from lorakit.diffusion.models import Base


@dataclass(frozen=True)
class Scene:
    """What the films of a morph share.

    `adapters` path of a LoRA -> its name; `latents` (1, C, h, w) of each picture; `step` is called with the
    U-Net evaluations of each step, and may raise to stop.
    """

    base: "Base"
    precision: str
    adapters: dict[str, str]
    latents: "list[Tensor]"
    distance: "FeatureDistance"
    team: "PartialState"
    step: Callable[[int], None]


def morph(cfg: MorphConfig, plan: MorphPlan, folder: Path, stop: StopFlag, hint: str) -> None:
    """Make the film, with its LoRAs and, for compare, without.

    Raises:
        StoppedError: a signal came; what is done stays, and the same command goes on from there.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    from lorakit.diffusion.metrics import make_distance
    from lorakit.diffusion.models import Base, compute_dtype, resolve_precision, set_up_backend
    from lorakit.diffusion.paths import decode_picture, encode_picture
    from lorakit.film import endpoints
    from lorakit.film.morph_report import write_outputs
    from lorakit.pictures.images import read_picture

    # -- base, LoRAs, pictures
    team = PartialState()
    device = team.device
    assert device is not None
    set_up_backend(device.type)
    precision = resolve_precision(cfg.mixed_precision, device.type)
    base = Base(plan.base, device, compute_dtype(precision), cfg.prediction_type, cfg.clip_skip)
    if not plan.base.known:  # a hub id that was not on this machine
        told, plan = plan.notes, make_morph_plan(cfg, base.info)
        if team.is_main_process:
            claim(cfg, folder, fingerprint(cfg, plan, cfg.mixed_precision))
            print_notes(note for note in plan.notes if note not in told)
    team.wait_for_everyone()  # until the folder is claimed
    notes: list[str] = []
    adapters = endpoints.load_adapters(base, plan.loras, notes)
    print_notes(notes if team.is_main_process else ())
    pictures = [read_picture(picture.path, plan.shape) for picture in cfg.images]
    latents = [encode_picture(base, picture) for picture in pictures]
    distance = make_distance(cfg.distance, base)
    total = sum(count_evaluations(cfg, plan).values()) * (1 + cfg.compare)
    bar = tqdm(total=total, desc=cfg.name, unit="eval", disable=not team.is_main_process)

    def step(evaluations: int) -> None:
        bar.update(evaluations)
        if signum := stop.poll():
            raise StoppedError(f"finished frames and paths are kept. To go on: {hint}", signum)

    # -- the film with its LoRAs, then the same without
    scene = Scene(base, precision, adapters, latents, distance, team, step)
    versions = []
    with contextlib.closing(bar):
        for loras in (True, False)[: 1 + cfg.compare]:
            here = folder if loras else folder / WITHOUT
            if (version := finished_version(here)) is not None:
                bar.update(version.evaluations)
            else:
                version = make_film(cfg, plan, scene, here, loras)
                if team.is_main_process:
                    version.save(here)
            if team.is_main_process:
                remove(here / "state")
            versions.append(version)

    # -- what is looked at
    if team.is_main_process:
        round_trips = [decode_picture(base, each[0]) for each in latents]
        write_outputs(cfg, plan, folder, versions, pictures, round_trips, distance)
    team.wait_for_everyone()


def make_film(cfg: MorphConfig, plan: MorphPlan, scene: Scene, folder: Path, loras: bool) -> Version:
    """One film: its pictures inverted, the frames between them paced, denoised, and decoded into `folder`."""
    from tqdm import tqdm

    from lorakit.diffusion.attention import SharedAttention
    from lorakit.diffusion.denoiser import Denoiser
    from lorakit.film import endpoints, morphing, shooting
    from lorakit.ground.chunks import Chunks

    started = time.perf_counter()
    base, adapters, latents, team = scene.base, scene.adapters, scene.latents, scene.team
    schedule, names = base.noise_schedule(), list(adapters.values())

    # -- from each picture back to its noise, under its own prompt and LoRA
    rows = endpoints.conditions(cfg, base, adapters, loras)
    alone = Denoiser(base.unet, schedule, names)
    fit, warnings = {}, []
    if plan.loras and loras:
        fit, warnings = endpoints.check_fit(cfg, alone, rows, latents, adapters)
        scene.step(alone.evaluations)
    for warning in warnings if team.is_main_process else ():
        tqdm.write(f"warning     {warning}")
    cache = Path(cfg.cache_dir or Path(cfg.output_dir) / "cache")
    files = endpoints.path_names(cfg, plan, base.info, cache, scene.precision, loras)
    with team.main_process_first():  # the others find the paths in the cache
        ends = endpoints.prepare_ends(cfg, base, alone, rows, latents, files, lambda: scene.step(1))

    # -- the frames, which look at the pictures in every step
    sharing = contextlib.nullcontext()
    if cfg.attention != "off":
        sharing = contextlib.closing(SharedAttention(base.unet, cfg.attention, cfg.attention_blocks))
    with sharing as shared:
        studio = shooting.Studio(
            base=base,
            denoiser=Denoiser(base.unet, schedule, names, shared),
            ends=ends,
            settings=morphing.Settings.of(cfg),
            control=endpoints.control_embeds(cfg, base, adapters),
            chunks=Chunks(cfg.batch_size),
            distance=scene.distance,
            folder=folder / "state",
            key=fingerprint(cfg, plan, scene.precision, loras),
            team=team,
            step=scene.step,
        )
        positions, frames = shooting.shoot(cfg, plan, studio)
        shooting.develop(studio, frames, folder / "frames")
    return Version(
        positions=positions,
        noise_mean=ends.trajectory[0].mean((1, 2, 3)).tolist(),
        noise_std=ends.trajectory[0].std((1, 2, 3)).tolist(),
        residual_ratio=studio.residual_ratio.tolist(),
        evaluations=alone.evaluations + studio.denoiser.evaluations,
        seconds=time.perf_counter() - started,
        attention_bytes=shared.stored_bytes() if shared else 0,
        fit=fit,
        warnings=warnings,
    )


def main(argv: list[str]) -> int:
    command = parse_command(
        MorphConfig,
        argv,
        prog="morph.py",
        description="Morph pictures into one another with Stable Diffusion and a LoRA for each picture.",
        default_config="cfg/morph/mountain.json",
    )
    cfg = command.config
    rank, world_size = launched_processes()
    plan = make_morph_plan(cfg)
    if "check" in command.flags:
        print(describe_morph(cfg, plan))
        return 0
    folder = Path(cfg.output_dir) / cfg.name
    frame_bytes = plan.total * plan.shape[0] * plan.shape[1] * 3 * (1 + cfg.compare)
    check_writable(folder.parent, 2 * frame_bytes)
    launcher = ["python"] if world_size == 1 else ["torchrun", "--nproc_per_node", str(world_size)]
    hint = shlex.join([*launcher, "morph.py", *(word for word in argv if not word.startswith("overwrite="))])
    with lock_run(folder) if rank == 0 else contextlib.nullcontext(), StopFlag() as stop:
        if rank == 0:
            print_notes(plan.notes)
        if plan.missing:
            if world_size > 1:
                raise UserError("train_if_missing trains in one process: run once without the launcher")
            fit_missing(cfg, plan, folder, stop, Path(__file__).with_name("train_lora.py"))
            plan = replace(plan, missing=())
        if rank == 0 and plan.base.known:
            claim(cfg, folder, fingerprint(cfg, plan, cfg.mixed_precision))
        morph(cfg, plan, folder, stop, hint)
    if rank == 0:
        print(
            f"wrote       {folder}: {plan.total} frames, sheet.png, report.json; look at {folder}/index.html"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
