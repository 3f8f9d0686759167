"""The parts that train_lora.py puts together: precision, optimizer, learning rate, data, checkpoints."""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load as load_tensors
from tqdm import tqdm

from lorakit import lora
from lorakit.base import weights_hash
from lorakit.data import (
    Augmentation,
    Latents,
    TrainingData,
    cache_text_states,
    encode_views,
    missing_views,
    sample_order,
)
from lorakit.errors import OutputError
from lorakit.folder import Table
from lorakit.lora_check import verify_file, verify_in_diffusers
from lorakit.lora_file import LoraPair, component_of, lora_bytes, read_lora
from lorakit.lora_metadata import Component, training_metadata
from lorakit.models import Base
from lorakit.optimizer_state import pack_optimizer, unpack_optimizer
from lorakit.plan import Plan, Views, result_paths, training_views, validation_views
from lorakit.publish import publish_file
from lorakit.resume import STATE_VERSION, read_state
from lorakit.runs import checkpoints, publish_checkpoint
from lorakit.tensors import serialize
from lorakit.watch import SampleSheet

log = logging.getLogger(__name__)
Modules = dict[str, LoraPair]


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
    vae_hash, text_hash = (weights_hash(base.info.files[part]) for part in ("vae", "text_encoder"))
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
        share = prompts[accelerator.process_index :: accelerator.num_processes]
        cache_text_states(share, base, plan.cache_dir, text_hash)
        accelerator.wait_for_everyone()
        size = len(prompts) * base.info.max_tokens * base.info.cross_attention_dim * 4
        where = base.device if size <= on_device else torch.device("cpu")
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
    """Row numbers (steps, total_batch); see lorakit.data.sample_order."""
    return sample_order(cfg.seed, plan.shapes, plan.total_batch, plan.steps)


# ---- checkpoints ----


def live_modules(unet, text_encoder) -> dict[str, LoraPair]:
    """A copy of the LoRA as it stands, by kohya name."""
    modules = lora.extract(unet, "unet")
    return modules if text_encoder is None else modules | lora.extract(text_encoder, "text_encoder")


def save_checkpoint(
    run: Path, state: dict[str, Any], unet, text_encoder, optimizer, scaler, best: Modules | None
) -> Path:
    """Publish `checkpoint-<step>`: LoRA, optimizer and counters as safetensors and JSON.

    Randomness has no state to save (lorakit.randomness).
    """
    libraries = ("torch", "diffusers", "peft", "accelerate", "transformers")
    tensors, packed = pack_optimizer(optimizer.state_dict())
    state = state | {
        "version": STATE_VERSION,
        "optimizer": packed,
        "scaler": None if scaler is None else scaler.state_dict(),
        "libraries": {name: version(name) for name in libraries},
    }
    files = {
        "lora.safetensors": lora_bytes(live_modules(unet, text_encoder), layout="diffusers", metadata={}),
        "optimizer.safetensors": serialize(tensors, {}),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    if best is not None:
        files["best.safetensors"] = lora_bytes(best, layout="diffusers", metadata={})
    return publish_checkpoint(run, state["step"], files)


def load_checkpoint(
    folder: Path, unet, text_encoder, optimizer, scaler
) -> tuple[dict[str, Any], Modules | None]:
    """Put a verified checkpoint back; return its counters and the best LoRA so far."""
    state = read_state(folder)
    insert_modules(read_lora(folder / "lora.safetensors").modules, unet, text_encoder)
    tensors = load_tensors((folder / "optimizer.safetensors").read_bytes())
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(unpack_optimizer(tensors, state["optimizer"]))
    for group, decay in zip(optimizer.param_groups, decays, strict=True):  # a changed config counts
        group["weight_decay"] = decay
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    best = folder / "best.safetensors"
    return state, read_lora(best).modules if best.exists() else None


def insert_modules(modules: Modules, unet, text_encoder) -> None:
    """Put a LoRA into the live layers, exactly."""
    models: dict[Component, Any] = {"unet": unet, "text_encoder": text_encoder}
    for part, model in models.items():
        own = {name: pair for name, pair in modules.items() if component_of(name) == part}
        if model is not None:
            lora.insert(model, part, own)


# ---- LoRA files ----


def write_lora(
    path: Path,
    layout: Any,
    cfg: Any,
    plan: Plan,
    modules: Modules,
    step: int,
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """Publish one LoRA file once it was read back and compared; `check` may look at it as well before.

    Its bytes follow from config, data and versions alone.
    """
    base, pictures = plan.base, len(plan.table.rows)
    metadata = training_metadata(
        name=cfg.ckpt_name,
        rank=cfg.rank,
        alpha=cfg.lora_alpha or cfg.rank,
        config=cfg.model_dump(mode="json"),
        base_name=base.name,
        cross_attention_dim=base.cross_attention_dim,
        prediction_type=cfg.prediction_type or base.prediction_type,
        resolution=plan.resolution,
        steps=step,
        epochs=step * plan.total_batch // pictures,
        num_images=pictures,
    )
    dtype = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[cfg.save_dtype]
    content = lora_bytes(modules, layout=layout, dtype=dtype, metadata=metadata)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        verify_file(temporary, modules, dtype)
        check(temporary)

    publish_file(path, write)


def publish_lora(cfg: Any, plan: Plan, base: Base, modules: Modules, step: int) -> list[Path]:
    """Write the LoRA file (two for save_format "both"), each loaded by diffusers beside the live one first.

    Raises:
        OutputError: what diffusers makes of the file is not what was trained; an earlier file stays.
    """
    text_encoder = base.text_encoder if cfg.train_text_encoder else None
    insert_modules(modules, base.unet, text_encoder)
    exact = cfg.save_dtype == "float32" and base.dtype == torch.float32

    def check(path: Path) -> None:
        difference = verify_in_diffusers(path, base.unet, text_encoder)
        if difference > (1e-4 if exact else 0.1):
            raise OutputError(
                f"diffusers reads something else from the LoRA (output differs by {difference:.3g})"
            )

    paths = result_paths(cfg)
    for path, layout in paths.items():
        write_lora(path, layout, cfg, plan, modules, step, check)
    return list(paths)


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
