"""Train a LoRA from one JSON file (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    python train_lora.py cfg/mountain.json
    python train_lora.py cfg/sd15/mountain.json rank=16 ckpt_name=mountain_r16
    accelerate launch train_lora.py cfg/sd15/style.json             # several GPUs, the same run

Reads a base model, and pictures with captions. Writes <output_dir>/<ckpt_name>.safetensors, which diffusers,
ComfyUI and A1111 load, and the run folder <output_dir>/<ckpt_name>/: metrics, samples, exact checkpoints.
"""

import contextlib
import json
import math
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.ground.config import Config, parse_command
from lorakit.ground.errors import DivergedError, StoppedError, UserError
from lorakit.ground.process import StopFlag, launched_processes, run_guarded
from lorakit.ground.publish import check_writable, publish_file
from lorakit.ground.runs import (
    claim_run,
    find_resume,
    lock_run,
    prune_checkpoints,
    set_aside_after,
    verify_checkpoint,
)
from lorakit.training.forecast import checkpoint_bytes, describe_plan, lost_tokens
from lorakit.training.plan import Plan, make_plan, missing_packages, result_paths
from lorakit.training.resume import check_base, check_resume, run_record, validation_record
from lorakit.weights.base_settings import ClipSkip, PredictionType

Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


# fmt: off
class TrainConfig(Config):
    """The keys of a training config. The flat names of the first block of each group are the tutorial's."""

    headings: ClassVar[dict[str, str]] = {
        "pretrained_model_name_or_path": "Base model and precision",
        "data_dir": "Pictures and captions",
        "rank": "Adapter",
        "objective": "Objective",
        "learning_rate": "Optimization",
        "output_dir": "Run, checkpoints and output",
        "validation_steps": "Watching",
    }

    pretrained_model_name_or_path: str = Field("ckpt/miniature", min_length=1, description="base model: diffusers folder, hub id or single .safetensors file")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field("auto", description="compute dtype of the frozen base; auto: fp16 or bf16 if the launcher says so, else bf16 (or fp16) on a CUDA GPU and float32 elsewhere. LoRA weights are float32 always")
    prediction_type: PredictionType = None
    clip_skip: ClipSkip = None
    enable_xformers_memory_efficient_attention: bool = Field(False, description="xformers attention where it runs, else torch SDPA and one line that says so")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, about a third slower")
    allow_tf32: bool = Field(True, description="TF32 matrix products on NVIDIA GPUs")
    torch_compile: bool = Field(False, description="compile the U-Net: a slow start, then faster steps on a GPU")
    deterministic: bool = Field(False, description="bit-exact resume on a GPU too, by slower kernels (a CPU run is bit-exact always)")

    data_dir: str | None = Field(None, description="folder of pictures, with metadata.jsonl (file_name, text) or a .txt beside each picture")
    dataset_name: str | None = Field(None, description="instead of data_dir: a hub dataset, or a folder that datasets.load_dataset reads; its pictures are held in memory")
    dataset_config_name: str | None = Field(None, description="configuration of that dataset")
    dataset_split: str = Field("train", description="split of that dataset, datasets' slicing allowed")
    image_column: str = Field("image", description="its column of pictures")
    caption_column: str | None = Field(None, description='column or key of captions; null: "text", or in a folder the only other key with text')
    resolution: int | None = Field(None, ge=8, description="pixels: side of the square, or square root of a bucket's area; null: the base's own")
    aspect_ratio_buckets: bool | None = Field(None, description="train each picture near its own aspect; false: square crops; null: on for two pictures or more")
    crop: Literal["center", "random"] = Field("center", description="what of a picture is kept where it sticks out of its shape: the middle, or one of random_crops")
    random_crops: int = Field(8, ge=2, description="crops of a picture that are cached for crop random, its middle among them")
    random_flip: bool = Field(False, description="show half of the samples mirrored")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of samples shown without caption, for guidance")
    missing_captions: Literal["error", "skip", "empty"] = Field("error", description="a picture without caption: stop, leave it out, or train it with an empty one")
    broken_images: Literal["error", "skip"] = Field("error", description="a picture that cannot be decoded: stop, or leave it out")
    allow_symlinks: bool = Field(False, description="follow links that lead out of data_dir")
    max_image_pixels: int = Field(64_000_000, gt=0, description="pixels: larger pictures are refused before they are decoded")
    max_aspect: float = Field(4.0, ge=1, description="longer side over shorter side beyond which a picture is refused")
    cache_dir: str | None = Field(None, description="cached latents and text states; null: <output_dir>/cache")
    dataloader_num_workers: int = Field(0, ge=0, le=64, description="threads that decode pictures while latents are cached; steps need none")

    rank: int = Field(8, ge=1, le=1024, description="rank r of the update B A")
    lora_alpha: float | None = Field(None, gt=0, description="the update is scaled by lora_alpha / rank; null: rank, so by 1")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A")
    target_modules: Literal["attention", "attention+ff", "all"] | tuple[str, ...] = Field("attention", description="preset, or names of the U-Net's modules: attention projections; with feed-forward and projections; with convolutions")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (Liu et al. 2024); needs save_format diffusers")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(rank) (Kalajdzievski 2023)")
    init_lora_weights: Literal["gaussian", "kaiming", "orthogonal"] = Field("gaussian", description="start of A (B starts at 0; orthogonal: both random with B A = 0, linear layers only)")
    train_text_encoder: bool = Field(False, description="a LoRA in the text encoder too; its states are then not cached")
    text_encoder_learning_rate: float | None = Field(None, gt=0, description="null: learning_rate")

    objective: Literal["denoise"] = Field("denoise", description="what the LoRA learns")
    noise_offset: float = Field(0.0, ge=0, description="constant per channel added to the noise, for very dark or bright pictures; biases exact reconstruction")
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting (Hang et al. 2023), 5 in the paper; null: off")

    learning_rate: float = Field(1e-4, ge=0, description="of the U-Net's LoRA")
    n_epochs: int | None = Field(None, ge=1, description="how often each picture is seen, whatever the number of processes")
    max_train_steps: int | None = Field(None, ge=1, description="optimizer steps at most; with n_epochs, whichever ends first")
    train_batch_size: int = Field(1, ge=1, description="samples per process and micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches per step")
    total_batch_size: int | None = Field(None, ge=1, description="samples per step over all processes; sets gradient_accumulation_steps; null: batch x accumulation x processes")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = Field("adamw", description="adamw8bit needs bitsandbytes, prodigy needs prodigyopt (and learning_rate 1)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the gradient's square")
    adam_weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient's norm; null: off")
    lr_scheduler_name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"] = Field("constant", description="course of the learning rate")
    lr_warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises from 0 (every schedule but piecewise_constant)")
    lr_num_cycles: int = Field(1, ge=1, description="restarts of cosine_with_restarts")
    lr_power: float = Field(1.0, gt=0, description="exponent of polynomial")
    lr_step_rules: str | None = Field(None, pattern=r"^([0-9]*\.?[0-9]+(e-?[0-9]+)?:[0-9]+,)*[0-9]*\.?[0-9]+(e-?[0-9]+)?$", description='piecewise_constant: "1:100,0.1:200,0.01" multiplies by 1 up to step 100, by 0.1 up to 200, then by 0.01')

    output_dir: str = Field("ckpt", description="where the LoRA file and the run folder go")
    ckpt_name: str = Field("lora", pattern=r"^[^/\\\x00]+$", description="name of both")
    save_format: Literal["kohya", "diffusers", "both"] = Field("kohya", description="kohya is read by diffusers, ComfyUI and A1111; both adds <ckpt_name>_diffusers.safetensors")
    save_dtype: Literal["float32", "fp16", "bf16"] = Field("float32", description="dtype in the file; float32 is exact, fp16 half as large")
    final_weights: Literal["last", "best"] = Field("last", description="what the LoRA file holds at the end: the last step, or the one of lowest validation loss")
    checkpointing_steps: int = Field(500, ge=1, description="steps between resumable checkpoints; there is one at the end too")
    checkpoints_total_limit: int = Field(3, ge=1, description="checkpoints kept")
    resume_from_checkpoint: bool | str = Field(False, description='true or "latest", or the path of a checkpoint folder')
    overwrite: bool = Field(False, description="replace an earlier run of the same name")
    allow_data_change: bool = Field(False, description="resume although pictures or captions changed")
    seed: int = Field(0, ge=0, lt=2**63, description="every random number of the run follows from it")

    validation_steps: int | None = Field(None, ge=0, description="steps between validation losses; null: ten over the run, 0: none")
    validation_data_dir: str | None = Field(None, description="pictures for it that are not trained on; null: the training pictures")
    validation_timesteps: int = Field(8, ge=1, description="fixed timesteps per picture")
    validation_images: int = Field(16, ge=1, description="pictures used at most")
    early_stop_patience: int | None = Field(None, ge=1, description="stop after so many validations without improvement; null: never")
    sample_steps: int | None = Field(None, ge=0, description="steps between sample sheets; null: four over the run, 0: none")
    sample_prompts: tuple[str, ...] | None = Field(None, description="null: the first two captions")
    sample_seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="one picture per prompt and seed")
    sample_inference_steps: int = Field(25, ge=1, le=1000, description="DDIM steps of a sample")
    sample_guidance_scale: float = Field(7.5, ge=1, description="classifier-free guidance of a sample")
    logging_steps: int = Field(10, ge=1, description="steps between looks at the loss; every step is written to metrics.jsonl")
    report_to: Tracker | tuple[Tracker, ...] | None = Field("tensorboard", description="where else the metrics go; null: to metrics.jsonl alone, which is written always")
    log_dir: str = Field("log", description="where trackers write")

    @model_validator(mode="after")
    def _agree(self):
        if (self.data_dir is None) == (self.dataset_name is None):
            raise ValueError("data_dir, dataset_name: set exactly one of the two")
        if self.n_epochs is None and self.max_train_steps is None:
            raise ValueError("n_epochs, max_train_steps: set at least one of the two")
        if self.use_dora and self.save_format != "diffusers":
            raise ValueError('use_dora, save_format: DoRA has no kohya layout that all readers agree on; set save_format to "diffusers"')
        if self.init_lora_weights == "orthogonal" and (self.rank % 2 or self.target_modules == "all"):
            raise ValueError("init_lora_weights, rank, target_modules: orthogonal needs an even rank and linear layers only")
        if (self.lr_step_rules is None) == (self.lr_scheduler_name == "piecewise_constant"):
            raise ValueError("lr_step_rules, lr_scheduler_name: piecewise_constant needs lr_step_rules, and only it takes them")
        if self.lr_warmup_steps and self.lr_scheduler_name in ("constant", "piecewise_constant"):
            raise ValueError(f'lr_warmup_steps, lr_scheduler_name: "{self.lr_scheduler_name}" has no warm-up; take "constant_with_warmup"')
        if self.lr_scheduler_name == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError("lr_scheduler_name, learning_rate: polynomial ends at 1e-7, so learning_rate must be larger")
        if self.optimizer == "prodigy" and self.text_encoder_learning_rate not in (None, self.learning_rate):
            raise ValueError("optimizer, text_encoder_learning_rate: prodigy finds one rate for all; leave text_encoder_learning_rate out")
        if self.text_encoder_learning_rate and not self.train_text_encoder:
            raise ValueError("text_encoder_learning_rate, train_text_encoder: the rate is of use only with train_text_encoder")
        if self.total_batch_size and self.gradient_accumulation_steps > 1:
            raise ValueError("total_batch_size, gradient_accumulation_steps: set one of the two, the other follows")
        if self.validation_steps == 0 and (self.early_stop_patience or self.final_weights == "best"):
            raise ValueError("validation_steps, early_stop_patience, final_weights: without validation nothing is best")
        if self.resume_from_checkpoint and self.overwrite:
            raise ValueError("resume_from_checkpoint, overwrite: continue the run or replace it, not both")
        return self


# What may change when a run is resumed. The rest is fixed: it would make another run of it.
APPLIED = {"learning_rate", "text_encoder_learning_rate", "lr_scheduler_name", "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_step_rules", "n_epochs", "max_train_steps", "adam_weight_decay", "max_grad_norm"}
FREE = {
    "train_batch_size", "gradient_accumulation_steps", "total_batch_size", "mixed_precision", "enable_xformers_memory_efficient_attention",
    "gradient_checkpointing", "allow_tf32", "torch_compile", "deterministic", "data_dir", "missing_captions", "broken_images", "allow_symlinks",
    "max_image_pixels", "max_aspect", "cache_dir", "dataloader_num_workers", "dataset_name", "dataset_config_name", "dataset_split",
    "image_column", "caption_column", "output_dir", "ckpt_name", "save_format", "save_dtype", "final_weights", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "overwrite", "allow_data_change", "validation_steps", "validation_data_dir",
    "validation_timesteps", "validation_images", "early_stop_patience", "sample_steps", "sample_prompts", "sample_seeds", "sample_inference_steps",
    "sample_guidance_scale", "logging_steps", "report_to", "log_dir",
}
# fmt: on
FIXED = set(TrainConfig.model_fields) - APPLIED - FREE


def train(
    cfg: TrainConfig,
    plan: Plan,
    run: Path,
    resume: Path | None = None,
    stop_after: int | None = None,
    hint: str = "resume_from_checkpoint=latest",
) -> list[Path]:
    """Train, from the first step or from the checkpoint `resume`, and return the LoRA files written.

    Args:
        run: the run folder, owned by the caller.
        stop_after: stop as by SIGTERM once this many steps are done.
        hint: the command that resumes, shown when a signal stops the run.

    Raises:
        StoppedError: a signal came; a checkpoint was published.
        DivergedError: a loss or gradient is not finite; nothing that holds such weights is written.
    """
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from lorakit.diffusion import lora
    from lorakit.diffusion.models import Base, compute_dtype, enable_xformers, set_up_backend
    from lorakit.ground import randomness
    from lorakit.training import parts, saving
    from lorakit.training.objectives import OBJECTIVES
    from lorakit.training.watch import Metrics, validation_loss

    # -- processes, precision, and the frozen base with the LoRA in it
    precision = parts.resolve_precision(cfg.mixed_precision)
    trackers = parts.trackers(cfg)
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_dir=cfg.log_dir)
    if accelerator.num_processes != plan.world_size:
        raise UserError(
            f"the launcher names {plan.world_size} processes, {accelerator.num_processes} arrived"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError('mixed_precision "fp16" needs a GPU: take "no" or "bf16" on a CPU')
    set_up_backend(accelerator.device.type, allow_tf32=cfg.allow_tf32, deterministic=cfg.deterministic)
    main = accelerator.is_main_process
    say = tqdm.write if main else str
    base = Base(plan.base, accelerator.device, compute_dtype(precision), cfg.prediction_type, cfg.clip_skip)
    schedule = base.noise_schedule()
    if not plan.base.known:  # a hub id that was not on this machine, or a single file
        plan = replace(make_plan(cfg, plan.world_size, base.info), steps=plan.steps)
        if resume is not None:
            check_base(resume, base.info)
    unet, text_encoder = base.unet, base.text_encoder if cfg.train_text_encoder else None
    unet_params = lora.add_lora(unet, **parts.adapter_options(cfg, "unet"))
    groups = [{"params": unet_params, "lr": cfg.learning_rate}]
    if text_encoder is not None:
        text_params = lora.add_lora(text_encoder, **parts.adapter_options(cfg, "text_encoder"))
        groups.append({"params": text_params, "lr": cfg.text_encoder_learning_rate or cfg.learning_rate})
        text_encoder.train()
    params = [p for group in groups for p in group["params"]]  # one list: optimized, clipped and counted
    if cfg.enable_xformers_memory_efficient_attention and (reason := enable_xformers(unet)):
        say(f"attention   torch SDPA is used: {reason}")
    if cfg.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    say(
        f"training    {sum(p.numel() for p in params):,} parameters, {plan.steps} steps of {plan.total_batch}, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"{str(base.dtype).removeprefix('torch.')}"
    )

    optimizer = parts.make_optimizer(cfg, groups)
    base_rates = [group["lr"] for group in groups]
    lr_factor = parts.learning_rate_schedule(cfg, plan.steps)
    student, optimizer = accelerator.prepare(torch.compile(unet) if cfg.torch_compile else unet, optimizer)
    text_student = accelerator.prepare(text_encoder) if text_encoder is not None else None

    with StopFlag() as stop, contextlib.ExitStack() as closing:

        def stop_early():
            if signum := stop.poll():
                raise StoppedError(f"before the first step; what is cached stays. To go on: {hint}", signum)

        # -- data: latents and text states, from the caches
        data, validation, sheet = parts.prepare(
            cfg, plan, base, accelerator, text_encoder, run, between=stop_early
        )
        order = parts.order_of(cfg, plan)

        # -- counters, new or from a checkpoint
        state: dict[str, Any] = {
            "step": 0,
            "best_loss": None,
            "best_step": None,
            "stale": 0,
            "smoothed": None,
        }
        best = None
        if resume is not None:
            saved, best = saving.load_checkpoint(resume, unet, text_encoder, optimizer, accelerator.scaler)
            state |= {key: saved[key] for key in state}
            if saved["validation"] != validation_record(cfg, plan):
                best = None
                state |= {"best_loss": None, "best_step": None, "stale": 0}
        first_step = state["step"]
        pace = 0.1 if sys.stderr.isatty() else 60.0  # seconds between looks at the bar; a log file wants few
        extent = {"total": plan.steps, "initial": first_step}
        bar = tqdm(**extent, desc=cfg.ckpt_name, disable=not main, mininterval=pace)
        closing.callback(bar.close)
        metrics = Metrics(accelerator, run / "metrics.jsonl", bar, plan.total_batch, state["smoothed"])
        if main:
            metrics.file.truncate_after(first_step)
        parts.start_trackers(cfg, accelerator)
        closing.callback(parts.end_tracking, accelerator)
        record = run_record(cfg, plan) if main else {}
        due = parts.due_steps(cfg, plan.steps)
        per_pass = accelerator.num_processes * cfg.train_batch_size
        mine = accelerator.process_index * cfg.train_batch_size

        # -- the loop: one turn is one optimizer step
        for step in range(first_step, plan.steps):
            if parts.exhausted(cfg, state):
                stale = state["stale"]
                say(f"step {step:6d} no better validation loss for {stale} validations: stopped early")
                break
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * lr_factor(step)
            step_loss = torch.zeros((), device=accelerator.device)
            for micro in range(plan.accumulation):
                start = micro * per_pass + mine  # this process's share of the step's samples
                slots = slice(start, start + cfg.train_batch_size)
                positions = range(step * plan.total_batch, (step + 1) * plan.total_batch)[slots]
                batch = data.batch(order[step, slots], positions)
                if cfg.lora_dropout:
                    torch.manual_seed(randomness.derive_seed(cfg.seed, "lora dropout", positions[0]))
                last = micro == plan.accumulation - 1
                with parts.gradient_sync(accelerator, student, text_student, last):
                    embeds = batch.text_states(text_student)
                    loss = OBJECTIVES[cfg.objective](student, batch, schedule, embeds, cfg.snr_gamma).mean()
                    accelerator.backward(loss / plan.accumulation)
                step_loss += loss.detach() / plan.accumulation
            grad_norm = accelerator.clip_grad_norm_(params, cfg.max_grad_norm or math.inf)
            assert grad_norm is not None  # only DeepSpeed, which is not supported, gives none
            optimizer.step()
            optimizer.zero_grad()
            state["step"] = done = step + 1
            metrics.add(done, step_loss, grad_norm, optimizer.param_groups[0]["lr"])

            stopping = parts.any_process(accelerator, bool(stop.poll()) or done == stop_after)
            if done % cfg.logging_steps == 0 or done in due.any or stopping:
                if (broken := metrics.flush()) is not None:
                    raise DivergedError(parts.diverged(cfg, plan, run, data, order, broken, lr_factor))
                state["smoothed"] = metrics.smoothed
            if done in due.validation:
                loss = validation_loss(validation, unet, text_encoder, schedule, cfg, accelerator)
                metrics.write({"step": done, "validation_loss": loss})
                state["stale"] += 1
                if math.isfinite(loss) and (state["best_loss"] is None or loss < state["best_loss"]):
                    state |= {"best_loss": loss, "best_step": done, "stale": 0}
                    best = saving.live_modules(unet, text_encoder)
                    if main:
                        layout = next(iter(result_paths(cfg).values()))
                        saving.write_lora(run / "best.safetensors", layout, cfg, plan, best, done)
                best_loss = state["best_loss"]
                say(
                    f"step {done:6d} loss {metrics.smoothed:.4f}, validation {loss:.4f}, best {best_loss:.4f}"
                )
            if done in due.sample and main:
                sheet.draw(done)
            if main and (done in due.checkpoint or stopping or parts.exhausted(cfg, state)):
                scaler = accelerator.scaler
                saving.save_checkpoint(run, state | record, unet, text_encoder, optimizer, scaler, best)
                prune_checkpoints(run, cfg.checkpoints_total_limit)
            if stopping:
                accelerator.wait_for_everyone()
                bar.close()
                signum = stop.signum or signal.SIGTERM
                raise StoppedError(f"at step {done} of {plan.steps}. To go on: {hint}", signum)
            if done in due.any:
                metrics.pause()

        # -- the LoRA file, read back and compared
        paths: list[Path] = []
        if main:
            if cfg.final_weights == "best" and best is not None:
                modules, made_at = best, state["best_step"]
            else:
                modules, made_at = saving.live_modules(unet, text_encoder), state["step"]
            paths = saving.publish_lora(cfg, plan, base, modules, made_at)
        accelerator.wait_for_everyone()
    return paths


def verify_resume(cfg: TrainConfig, plan: Plan, steps: int = 3) -> str:
    """Train 2 x `steps` steps at once, and again with a stop in the middle, and compare the files by byte.

    Raises:
        DivergedError: the two differ: on this machine, with this config, a resumed run is another run.
    """
    plan = replace(plan, steps=2 * steps)
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": None, "sample_steps": 0, "validation_steps": steps, "overwrite": False}
        for name, stop_after in (("straight", None), ("resumed", steps)):
            part = cfg.model_copy(update=quiet | {"output_dir": f"{folder}/{name}"})
            run = Path(part.output_dir) / part.ckpt_name
            resume = None
            if stop_after:
                resume = run / f"checkpoint-{stop_after:08d}"
                try:
                    train(part, plan, run, stop_after=stop_after)
                except StoppedError:
                    if not resume.exists():  # a signal of the user's came first
                        raise
            train(part, plan, run, resume)
            files = verify_checkpoint(run / f"checkpoint-{2 * steps:08d}")["files"]
            tensors = [name for name in files if name.endswith(".safetensors")]
            digests.append({name: files[name]["sha256"] for name in tensors})
    straight, resumed = digests
    if straight != resumed:
        differing = [name for name in straight if straight[name] != resumed[name]]
        raise DivergedError(
            f"resume is not exact here: after {2 * steps} steps, stopped at {steps} and not, {differing} differ; "
            "on a GPU set deterministic to true"
        )
    return (
        f"resume is exact: {2 * steps} steps in one go and with a stop at {steps} give "
        f"LoRA {straight['lora.safetensors'][:16]}…"
    )


def main(argv: list[str]) -> int:
    command = parse_command(
        TrainConfig,
        argv,
        prog="train_lora.py",
        description="Train a LoRA for Stable Diffusion from one JSON file.",
        flags={"verify-resume": "prove on this machine that a stopped and resumed run equals a straight one"},
        default_config="cfg/mountain.json",
    )
    cfg = command.config
    rank, world_size = launched_processes()
    plan = make_plan(cfg, world_size)
    if "check" in command.flags:
        print(describe_plan(cfg, plan))
        return 0
    missing_packages(cfg)
    if "verify-resume" in command.flags:
        if world_size > 1:
            raise UserError("--verify-resume runs in one process: start it without the launcher")
        print(verify_resume(cfg, plan))
        return 0
    run = Path(cfg.output_dir) / cfg.ckpt_name
    check_writable(run.parent, 3 * checkpoint_bytes(cfg, plan.base))
    with lock_run(run) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            results = [*result_paths(cfg)]
            claim_run(run, resume=cfg.resume_from_checkpoint, overwrite=cfg.overwrite, results=results)
        resume, skipped = find_resume(run, cfg.resume_from_checkpoint)
        notes = [*plan.notes, *skipped, *(lost_tokens(cfg, plan) if rank == 0 else ())]
        if resume is not None:
            notes.append(f"resuming from {resume}")
            notes += check_resume(cfg, plan, resume, fixed=FIXED, applied=APPLIED)
            explicit = cfg.resume_from_checkpoint not in (True, "latest")
            if rank == 0 and explicit and resume.resolve().parent == run.resolve():
                notes += set_aside_after(run, int(resume.name.removeprefix("checkpoint-")))
        if rank == 0:
            text = json.dumps(cfg.model_dump(mode="json"), indent=2) + "\n"
            publish_file(run / "config.json", text.encode())
            print("\n".join(f"note        {note}" for note in notes), end="\n" if notes else "")
        again = [a for a in argv if not a.startswith(("resume_from_checkpoint=", "overwrite="))]
        launcher = ["python"] if world_size == 1 else ["torchrun", "--nproc_per_node", str(world_size)]
        hint = shlex.join([*launcher, "train_lora.py", *again, "resume_from_checkpoint=latest"])
        paths = train(cfg, plan, run, resume, hint=hint)
    if rank == 0:
        for path in paths:
            print(f"wrote       {path} ({path.stat().st_size / 1e6:.2f} MB); run folder {run}")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
