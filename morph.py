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
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.film.morph_plan import MorphPlan, count_evaluations, describe_morph, fingerprint, make_morph_plan
from lorakit.ground.config import Config, parse_command
from lorakit.ground.errors import StoppedError, UserError
from lorakit.ground.process import StopFlag, launched_processes, run_guarded
from lorakit.ground.publish import check_writable, publish_file, remove
from lorakit.ground.runs import lock_run
from lorakit.pictures.animation import FORMATS
from lorakit.weights.base_settings import ClipSkip, PredictionType


# fmt: off
class Picture(Config):
    """One picture of the film."""

    path: str = Field(min_length=1, description="the picture")
    prompt: str = Field("", description="what it shows, in the words that its LoRA was trained with")
    lora: str | None = Field(None, description="a LoRA fitted to this picture; null: none")
    lora_weight: float = Field(1.0, description="factor on that LoRA's update")


class MorphConfig(Config):
    """The keys of a morph's config."""

    headings: ClassVar[dict[str, str]] = {
        "pretrained_model_name_or_path": "Base model and precision",
        "images": "Pictures",
        "num_inference_steps": "Inversion and sampling",
        "attention": "Between the pictures",
        "reschedule": "Speed",
        "output_dir": "Output",
    }

    pretrained_model_name_or_path: str = Field("ckpt/miniature", min_length=1, description="base model: diffusers folder, hub id or single .safetensors file")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field("auto", description="dtype of U-Net and text encoder; auto: fp16 on a CUDA GPU, float32 elsewhere. The VAE and all latents are float32")
    prediction_type: PredictionType = None
    clip_skip: ClipSkip = None

    images: tuple[Picture, ...] = Field(min_length=2, description="the pictures in the order of the film")
    loop: bool = Field(False, description="from the last picture back to the first")
    frames: int = Field(16, ge=2, le=10_000, description="frames from one picture to the next, both included")
    width: int | None = Field(None, ge=16, description="pixels; null: the base's own resolution, as in training of one picture")
    height: int | None = Field(None, ge=16, description="pixels; null: the base's own resolution")
    negative_prompt: str = Field("", description="of no effect at guidance 1")
    anchor_prompt: str | None = Field(None, description="what the middle shows: prompts bend towards it and leave the ends alone; null: straight from prompt to prompt")
    train_if_missing: bool = Field(False, description="fit the LoRAs that do not exist yet, by train_lora.py with fit_config")
    fit_config: str = Field("cfg/morph/fit.json", description="training config for it")

    num_inference_steps: int = Field(50, ge=2, le=999, description="DDIM steps, of inversion and sampling alike")
    guidance_scale: float = Field(1.0, ge=1, description="classifier-free guidance of sampling; above 1 doubles the work")
    inversion_method: Literal["ddim", "fixed_point"] = Field("ddim", description="fixed_point finds noise from which sampling comes back by itself, at several times the evaluations")
    fixed_point_iterations: int = Field(3, ge=1, le=20, description="of fixed_point, at most, in each step")
    inversion_guidance_scale: float = Field(1.0, ge=1, description="guidance of the inversion; DiffMorpher has 1")
    anchor: bool = Field(True, description="keep the pictures on their inverted paths, so that the film ends on them exactly")
    residual_power: float = Field(2.0, ge=1, le=8, description="p of (1 - alpha)^p, by which a picture's correction fades with the distance from it")

    attention: Literal["kv", "outer", "fused_outer", "off"] = Field("kv", description="how frames look at the pictures: mixed keys and values; mixed outputs; mixed outputs with own keys and values beside; not at all")
    attention_share: float = Field(0.6, ge=0, le=1, description="lambda: share of the steps, from the noisy end, in which they do")
    attention_blocks: tuple[Literal["down", "mid", "up"], ...] = Field(("up",), min_length=1, description="parts of the U-Net in which they do")
    adain: bool = Field(True, description="noise of the frames with interpolated mean and deviation")

    reschedule: Literal["probe", "full", "select", "off"] = Field("probe", description="even speed: by a coarse look first; by that and a full pass; by rendering twice as many frames and choosing; or alphas as they come")
    probe_points: int = Field(9, ge=3, le=65, description="positions that the probe looks at between two pictures, both included")
    probe_steps: int = Field(13, ge=2, description="its DDIM steps, at most")
    easing: Literal["linear", "cosine", "sine"] = Field("linear", description="speed between two pictures: even; slow near them; slow in the middle")
    distance: Literal["vae", "lpips"] = Field("vae", description="what measures change: features of the VAE's encoder, or LPIPS (pip install lpips, and its weights)")

    batch_size: int = Field(8, ge=1, description="frames in one pass of the U-Net; halved by itself where memory runs out")
    output_dir: str = Field("out/morph", description="where the folder of the morph goes")
    name: str = Field("morph", pattern=r"^[^/\\\x00]+$", description="name of that folder")
    cache_dir: str | None = Field(None, description="inverted paths by content; null: <output_dir>/cache")
    formats: tuple[Literal["gif", "webp", "apng", "mp4"], ...] = Field(("gif", "webp"), description="animations besides the PNG frames; mp4 needs imageio-ffmpeg or av")
    fps: float = Field(8.0, gt=0, le=60, description="frames a second")
    hold_ms: int = Field(600, ge=0, le=60_000, description="milliseconds that the first and last frame stay longer")
    pingpong: bool = Field(False, description="play back to the first picture, so that the animation has no jump")
    min_side: int = Field(256, ge=1, le=4096, description="pixels: smaller frames are enlarged in animations (never in frames/)")
    compare: bool = Field(False, description="make the same morph without LoRA, and show both side by side")
    overwrite: bool = Field(False, description="replace another morph in the same folder")

    @model_validator(mode="after")
    def _agree(self):
        if self.name in (".", "..", "cache"):
            raise ValueError(f'name "{self.name}": names a folder that is in use; choose another')
        if self.compare and not any(picture.lora for picture in self.images):
            raise ValueError("compare, images: no picture has a LoRA, so there is nothing to compare")
        return self
# fmt: on


def fit_missing(cfg: MorphConfig, plan: MorphPlan, folder: Path, stop: StopFlag) -> None:
    """Train a LoRA on each picture that has none yet, by train_lora.py, with the picture as the film shows it.

    Raises:
        UserError: a training failed; its own message stands above.
    """
    from lorakit.ground.publish import make_folder
    from lorakit.pictures.images import read_picture, save_png

    for path in plan.missing:
        picture = next(picture for picture in cfg.images if picture.lora == path)
        data = folder / "fit" / Path(path).stem
        make_folder(data)
        save_png(read_picture(picture.path, plan.shape), data / "picture.png")
        line = {"file_name": "picture.png", "text": picture.prompt}
        publish_file(data / "metadata.jsonl", json.dumps(line).encode())
        square = plan.shape[0] == plan.shape[1]
        settings = {
            "pretrained_model_name_or_path": cfg.pretrained_model_name_or_path,
            "prediction_type": cfg.prediction_type,
            "clip_skip": cfg.clip_skip,
            "data_dir": str(data),
            "output_dir": str(Path(path).parent),
            "ckpt_name": Path(path).stem,
            "resolution": round((plan.shape[0] * plan.shape[1]) ** 0.5),
            "aspect_ratio_buckets": not square,
            "missing_captions": "empty",
            "resume_from_checkpoint": "latest",
        }
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        print(f"fitting     {path} to {picture.path}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name("train_lora.py")), cfg.fit_config, *words]
        training = subprocess.Popen(command, env=_single_process())
        while training.poll() is None:
            time.sleep(0.1)
            if stop.poll():  # SIGTERM also after a Ctrl-C, which may have reached this process alone
                training.terminate()
        code = training.returncode
        if stop.signum or code in (130, 143):  # before its handlers stand, a signal ends it in other ways
            signum = stop.signum or code - 128
            raise StoppedError(f"while {path} was trained; the same command goes on", signum)
        if code or not Path(path).exists():
            raise UserError(f"{path}: its training failed (exit code {code}); the lines above say why")


def _single_process() -> dict[str, str]:
    """The environment without a launcher's variables, for a command that runs by itself."""
    launched = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    return {key: value for key, value in os.environ.items() if key not in (*launched, "LOCAL_RANK")}


def morph(cfg: MorphConfig, plan: MorphPlan, folder: Path, stop: StopFlag, hint: str) -> None:
    """Make the film, with its LoRAs and, for compare, without.

    Raises:
        StoppedError: a signal came; what is done stays, and the same command goes on from there.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    from lorakit.diffusion.attention import SharedAttention
    from lorakit.diffusion.denoiser import Denoiser
    from lorakit.diffusion.metrics import make_distance
    from lorakit.diffusion.models import Base, compute_dtype, resolve_precision, set_up_backend
    from lorakit.film import endpoints, morph_report, morphing, shooting
    from lorakit.ground.chunks import Chunks
    from lorakit.pictures.images import read_picture

    # -- base, LoRAs, pictures
    team = PartialState()
    device = team.device
    assert device is not None
    set_up_backend(device.type)
    precision = resolve_precision(cfg.mixed_precision, device.type)
    base = Base(plan.base, device, compute_dtype(precision), cfg.prediction_type, cfg.clip_skip)
    if not plan.base.known:  # a hub id that was not on this machine, or a single file
        plan = make_morph_plan(cfg, base.info)
        if team.is_main_process:
            claim(cfg, folder, fingerprint(cfg, plan, cfg.mixed_precision))
    team.wait_for_everyone()  # until the folder is claimed
    adapters = endpoints.load_adapters(base, plan.loras)
    schedule, names = base.noise_schedule(), list(adapters.values())
    pictures = [read_picture(picture.path, plan.shape) for picture in cfg.images]
    latents = [endpoints.encode_picture(base, picture) for picture in pictures]
    round_trips = [endpoints.decode_picture(base, each[0]) for each in latents]
    control = endpoints.control_embeds(cfg, base, adapters)
    distance = make_distance(cfg.distance, base)
    settings = morphing.Settings(
        cfg.guidance_scale, cfg.attention_share, cfg.adain, cfg.anchor, cfg.residual_power
    )
    cache = Path(cfg.cache_dir or Path(cfg.output_dir) / "cache")
    total = sum(count_evaluations(cfg, plan).values()) * (1 + cfg.compare)
    bar = tqdm(total=total, desc=cfg.name, unit="eval", disable=not team.is_main_process)

    def stop_early() -> None:
        if signum := stop.poll():
            raise StoppedError(f"finished frames and paths are kept. To go on: {hint}", signum)

    def step(evaluations: int) -> None:
        bar.update(evaluations)
        stop_early()

    # -- the film with its LoRAs, then the same without
    versions = []
    with contextlib.closing(bar):
        for loras in (True, False)[: 1 + cfg.compare]:
            started = time.perf_counter()
            here = folder if loras else folder / morph_report.WITHOUT
            if (finished := morph_report.finished_version(here)) is not None:
                versions.append(finished)
                remove(here / "state")  # of a kill just after the film was finished
                bar.update(finished.evaluations)
                continue
            rows = endpoints.conditions(cfg, base, adapters, loras)
            plain = Denoiser(base.unet, schedule, names)
            files = endpoints.path_names(cfg, plan, base.info, cache, precision, loras)
            fit, warnings = {}, []
            if plan.loras and loras:
                fit, warnings = endpoints.check_fit(cfg, plain, rows, latents, adapters)
                bar.update(plain.evaluations)
            for warning in warnings if team.is_main_process else ():
                tqdm.write(f"warning     {warning}")
            with team.main_process_first():  # the others find the paths in the cache
                ends = endpoints.prepare_ends(cfg, base, plain, rows, latents, files, lambda: step(1))
            shared = None
            if cfg.attention != "off":
                shared = SharedAttention(base.unet, cfg.attention, cfg.attention_blocks)
            studio = shooting.Studio(
                base=base,
                denoiser=Denoiser(base.unet, schedule, names, shared),
                ends=ends,
                settings=settings,
                control=control,
                chunks=Chunks(cfg.batch_size),
                distance=distance,
                folder=here / "state",
                key=fingerprint(cfg, plan, precision, loras),
                team=team,
                step=step,
            )
            try:
                positions, frames = shooting.shoot(cfg, plan, studio)
                shooting.develop(studio, frames, here / "frames")
            finally:
                if shared is not None:
                    shared.close()
            version = morph_report.Version(
                positions=positions,
                noise_mean=ends.trajectory[0].mean((1, 2, 3)).tolist(),
                noise_std=ends.trajectory[0].std((1, 2, 3)).tolist(),
                residual_ratio=studio.residual_ratio.tolist(),
                evaluations=plain.evaluations + studio.denoiser.evaluations,
                seconds=time.perf_counter() - started,
                attention_bytes=shared.stored_bytes() if shared else 0,
                fit=fit,
                warnings=warnings,
            )
            if team.is_main_process:
                version.save(here)
                remove(here / "state")
            versions.append(version)

    # -- what is looked at
    if team.is_main_process:
        morph_report.write_outputs(cfg, plan, folder, versions, pictures, round_trips, distance)
    team.wait_for_everyone()


OWN_FILES = (
    *("frames", "state", "film.json", "without_lora", "report.json", "index.html", "sheet.png"),
    *("compare.png", *(f"{name}.{kind}" for name in ("morph", "compare") for kind in FORMATS)),
)


def claim(cfg: MorphConfig, folder: Path, key: str) -> None:
    """Go on with the morph in `folder` if it is the same, or refuse; overwrite=true clears the way.

    Raises:
        UserError: another morph is in the folder, or the run of another script.
    """
    record = folder / "morph.json"
    if not record.exists() and (folder / "config.json").exists():
        raise UserError(f"{folder} holds what is no morph (a config.json): choose another name")
    try:
        held = json.loads(record.read_text(encoding="utf-8")).get("fingerprint")
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        held = None
    if held != key:
        if (record.exists() or (folder / "frames").exists()) and not cfg.overwrite:
            raise UserError(
                f"{folder} holds another morph (other pictures, LoRAs or settings): replace it with "
                "overwrite=true, or choose another name"
            )
        for name in OWN_FILES:
            remove(folder / name)
    for path in folder.rglob(".*.tmp"):  # of a picture that a killed process was writing
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            remove(path)
    publish_file(record, json.dumps({"fingerprint": key}).encode())
    publish_file(folder / "config.json", (json.dumps(cfg.model_dump(mode="json"), indent=2) + "\n").encode())


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
            print("\n".join(f"note        {note}" for note in plan.notes), end="\n" if plan.notes else "")
        if plan.missing:
            if world_size > 1:
                raise UserError("train_if_missing trains in one process: run once without the launcher")
            fit_missing(cfg, plan, folder, stop)
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
