"""The parts that train_lora.py puts together: precision, optimizer, learning rate, data, small decisions."""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from lorakit.diffusion.models import Base
from lorakit.ground.runs import checkpoints
from lorakit.pictures.folder import Table
from lorakit.training.data import (
    Augmentation,
    Latents,
    TrainingData,
    cache_text_states,
    encode_views,
    missing_views,
    sample_order,
)
from lorakit.training.plan import Plan, Views, training_views, validation_views
from lorakit.training.watch import SampleSheet
from lorakit.weights.identity import base_identity

log = logging.getLogger(__name__)


# ---- processes, precision, optimizer ----


def resolve_precision(mixed_precision: str) -> str:
    """For "auto" fp16 or bf16 if the launcher says so, else bf16 (or fp16) on a CUDA GPU, else float32."""
    if mixed_precision != "auto":
        return mixed_precision
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if told != "no" or not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return told
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def make_optimizer(cfg: Any, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer over parameter groups that carry their own learning rate.

    plan.missing_packages has checked before that its optional package is there.
    """
    common = {
        "betas": (cfg.adam_beta1, cfg.adam_beta2),
        "weight_decay": cfg.adam_weight_decay,
        "eps": cfg.adam_epsilon,
    }
    if cfg.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # optional

        return AdamW8bit(groups, **common)
    if cfg.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, safeguard_warmup=cfg.lr_warmup_steps > 0, **common)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, fused=fused, **common)


def learning_rate_schedule(cfg: Any, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step, a pure function of the step, so with no state to save.

    The formulas are diffusers'; unlike accelerate's own wrapper, it runs no faster on several processes.
    """
    from diffusers.optimization import get_scheduler

    scheduler = get_scheduler(
        cfg.lr_scheduler_name,
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=cfg.learning_rate or 1.0),
        step_rules=cfg.lr_step_rules,
        num_warmup_steps=cfg.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
    return scheduler.lr_lambdas[0]


def adapter_options(cfg: Any, part: str) -> dict[str, Any]:
    """Arguments of lora.add_lora. The text encoder takes the U-Net's preset, or its attention for a list."""
    targets = cfg.target_modules
    if part == "text_encoder" and not isinstance(targets, str):
        targets = "attention"
    return {
        "targets": targets if isinstance(targets, str) else list(targets),
        "rank": cfg.rank,
        "alpha": cfg.lora_alpha or cfg.rank,
        "dropout": cfg.lora_dropout,
        "use_dora": cfg.use_dora,
        "use_rslora": cfg.use_rslora,
        "init": cfg.init_lora_weights,
        "seed": cfg.seed,
    }


# ---- data ----


def prepare(
    cfg: Any,
    plan: Plan,
    base: Base,
    accelerator,
    text_encoder,
    run: Path,
    between: Callable[[], None] = lambda: None,
) -> tuple[TrainingData, TrainingData, SampleSheet]:
    """Fill the caches and return training data, validation data, and the sheet of samples.

    Every process encodes its share of the pictures. `between` is called after each.
    """
    prompts = cfg.sample_prompts or tuple(dict.fromkeys(row.caption for row in plan.table.rows))[:2]
    common = (cfg, plan, base, accelerator, between)
    data = _cached(*common, plan.table, plan.shapes, training_views(cfg, plan), prompts)
    validation = data
    if plan.validation is not None:
        views = validation_views(plan)
        validation = _cached(*common, plan.validation, plan.validation_shapes, views, ())

    def embed() -> tuple[torch.Tensor, torch.Tensor]:
        if text_encoder is not None:
            states = text_encoder(base.tokenize([*prompts, ""]))[0]
        else:
            assert data.text_states is not None
            states = torch.stack([data.text_states[p] for p in (*prompts, "")]).to(base.device)
        return states[:-1], states[-1:]

    sheet = SampleSheet(
        run / "samples",
        base,
        text_encoder,
        prompts,
        embed,
        seeds=cfg.sample_seeds,
        shape=plan.shapes[0] if len(set(plan.shapes)) == 1 else (plan.resolution, plan.resolution),
        steps=cfg.sample_inference_steps,
        guidance_scale=cfg.sample_guidance_scale,
    )
    base.park(keep_text_encoder=text_encoder is not None)
    return data, validation, sheet


def _cached(
    cfg, plan, base, accelerator, between, table: Table, shapes, rows: Views, prompts
) -> TrainingData:
    vae_hash, text_hash = (base_identity(base.info, part) for part in ("vae", "text_encoder"))
    views = [view for row in rows for view in row]
    share = views[accelerator.process_index :: accelerator.num_processes]
    missing = missing_views(share, plan.cache_dir, vae_hash)
    options = {"image_options": {"max_pixels": cfg.max_image_pixels}, "threads": cfg.dataloader_num_workers}
    quiet = not missing or not accelerator.is_main_process
    encoding = encode_views(missing, base, plan.cache_dir, vae_hash, **options)
    for _ in tqdm(encoding, total=len(missing), desc="caching latents", disable=quiet):
        between()
    prompts = list(dict.fromkeys(["", *prompts, *(row.caption for row in table.rows)]))
    on_device, in_memory = _budget(base.device)
    states, ids = None, None
    if cfg.train_text_encoder:
        ids = dict(zip(prompts, base.tokenize(prompts), strict=True))
    else:
        size = len(prompts) * base.info.max_tokens * base.info.cross_attention_dim * 4
        where = base.device if size <= on_device else torch.device("cpu")
        if accelerator.num_processes > 1:  # each encodes its share, then all read all
            own = prompts[accelerator.process_index :: accelerator.num_processes]
            cache_text_states(own, base, plan.cache_dir, text_hash, where)
            accelerator.wait_for_everyone()
        states = cache_text_states(prompts, base, plan.cache_dir, text_hash, where)
    accelerator.wait_for_everyone()
    entries = [view.entry(plan.cache_dir, vae_hash) for view in views]
    return TrainingData(
        table,
        shapes,
        Latents(entries, base.device, (on_device, in_memory)),
        [len(row) for row in rows],
        base,
        text_states=states,
        token_ids=ids,
        augmentation=Augmentation(cfg.noise_offset, cfg.caption_dropout),
        num_timesteps=base.scheduler.config.num_train_timesteps,
        seed=cfg.seed,
    )


def _budget(device: torch.device) -> tuple[int, int]:
    """Bytes of a cache that may lie on the device and in memory: a share of what is free."""
    memory = 4 << 30
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory
    return on_device // 4, memory // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def order_of(cfg: Any, plan: Plan):
    """Row numbers (steps, total_batch); see lorakit.training.data.sample_order."""
    return sample_order(cfg.seed, plan.shapes, plan.total_batch, plan.steps)


# ---- small decisions of the loop ----


@dataclass(frozen=True)
class Due:
    """The steps, counted from 1, after which something happens; the last step has all three."""

    checkpoint: frozenset[int]
    validation: frozenset[int]
    sample: frozenset[int]

    @property
    def any(self) -> frozenset[int]:
        return self.checkpoint | self.validation | self.sample


def due_steps(cfg: Any, steps: int) -> Due:
    def every(interval: int | None, times: int) -> frozenset[int]:
        if interval == 0:
            return frozenset()
        interval = interval or max(1, steps // times)
        return frozenset({*range(interval, steps + 1, interval), steps})

    return Due(every(cfg.checkpointing_steps, 1), every(cfg.validation_steps, 10), every(cfg.sample_steps, 4))


def gradient_sync(accelerator, student, text_student, last: bool) -> contextlib.AbstractContextManager:
    """Gradients are exchanged between processes in the last micro-batch of a step only."""
    stack = contextlib.ExitStack()
    for model in (student, text_student):
        if model is not None and not last:
            stack.enter_context(accelerator.no_sync(model))
    return stack


def any_process(accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process, so that all stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def exhausted(cfg: Any, state: dict[str, Any]) -> bool:
    """Whether the validation loss has not improved for `early_stop_patience` validations."""
    return cfg.early_stop_patience is not None and state["stale"] >= cfg.early_stop_patience


def trackers(cfg: Any) -> list[Any]:
    """The names in `report_to`; Any, since a list of str does not fit what accelerate takes."""
    return [cfg.report_to] if isinstance(cfg.report_to, str) else list(cfg.report_to or ())


def end_tracking(accelerator) -> None:
    """Close the trackers; one that cannot be closed must not turn a finished run into a failed one."""
    try:
        accelerator.end_training()
    except Exception as error:  # each tracker raises its own kind
        log.warning("a tracker could not be closed: %s", error)


def start_trackers(cfg: Any, accelerator) -> None:
    """Start TensorBoard or what `report_to` names; one that cannot start is a warning."""
    config = {
        key: value if isinstance(value, (int, float, str)) else str(value)
        for key, value in cfg.model_dump().items()
    }
    try:
        accelerator.init_trackers(cfg.ckpt_name, config=config)
    except Exception as error:  # a read-only folder, no network, no login: each tracker raises its own kind
        log.warning("report_to %s cannot start, training goes on without: %s", cfg.report_to, error)
        accelerator.trackers = []
        return
    missing = set(trackers(cfg)) - {tracker.name for tracker in accelerator.trackers}
    if missing and accelerator.is_main_process:
        log.warning("report_to: pip install %s; training goes on without", " ".join(sorted(missing)))


def diverged(cfg: Any, plan: Plan, run: Path, data: TrainingData, order, step: int, lr_factor) -> str:
    """What is known of the step whose loss or gradient was not finite."""
    positions = range((step - 1) * plan.total_batch, step * plan.total_batch)
    samples = data.describe(order[step - 1], positions)
    rate = cfg.learning_rate * lr_factor(step - 1)
    kept = checkpoints(run)
    return (
        f"step {step}: the loss or its gradient is not finite, at learning rate {rate:.3g}. "
        f"Its samples: {samples}. Nothing of it was saved; "
        + (f"the last checkpoint is {kept[-1][1]}. " if kept else "there is no checkpoint yet. ")
        + "Lower learning_rate, or look at these pictures"
        + ("; or take bf16 instead of fp16" if cfg.mixed_precision == "fp16" else "")
    )
