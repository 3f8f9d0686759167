"""Models and optimizer of a run: precision, the LoRA in the base, the learning rate."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
    parse_flag_from_env,
)

from lorakit.diffusion import lora
from lorakit.diffusion.frozen import keep_less, leave_casts_to_autocast
from lorakit.diffusion.models import Base, enable_xformers, set_up_backend
from lorakit.ground.checkpoints import MANIFEST
from lorakit.ground.errors import UserError
from lorakit.training.batch import Batch, SampleKey
from lorakit.training.data import TrainingData
from lorakit.training.lcm_config import TEACHER, teacher_loras
from lorakit.training.objectives import Models, as_function
from lorakit.training.plan import Plan
from lorakit.training.words_config import encodes_text, trains_lora
from lorakit.weights.identity import file_sha256


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


def with_rates(model: Any, params: Sequence[torch.nn.Parameter], rate: float, ratio: float) -> list[dict]:
    """Parameter groups of a LoRA: A at `rate`, B `ratio` times as fast (LoRA+, Hayou et al. 2024).

    DoRA's magnitudes go with B, as in PEFT.
    """
    if ratio == 1:
        return [{"params": list(params), "lr": rate}]
    downs = {id(parameter) for name, parameter in model.named_parameters() if ".lora_A." in name}
    first, second = ([p for p in params if (id(p) in downs) == down] for down in (True, False))
    return [{"params": first, "lr": rate}, {"params": second, "lr": rate * ratio}]


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


def start_processes(cfg: Any, plan: Plan, trackers: list[Any], resume: Path | None = None) -> Accelerator:
    """accelerate's handle on device, precision and the other processes.

    Args:
        resume: the checkpoint that the run goes on from.

    Raises:
        UserError: other processes than the launcher named, of another run, or fp16 on a CPU.
    """
    precision = resolve_precision(cfg.mixed_precision)
    # Buffers are constants. Were they sent around before each pass, processes of which one has no sample with
    # a term of its own, and so a pass less, would wait for each other for ever.
    alone = DistributedDataParallelKwargs(broadcast_buffers=False)
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while one caches longer than the others
    options: dict[str, Any] = {"log_with": trackers or None, "project_dir": cfg.log_dir}
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[alone, patient], **options)
    if accelerator.num_processes != plan.world_size:
        raise UserError(
            f"the launcher names {plan.world_size} processes, {accelerator.num_processes} arrived"
        )
    if accelerator.num_processes > 1:
        _check_same_run(plan, resume)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError('mixed_precision "fp16" needs a GPU: take "no" or "bf16" on a CPU')
    set_up_backend(accelerator.device.type, allow_tf32=cfg.allow_tf32, deterministic=cfg.deterministic)
    return accelerator


def _check_same_run(plan: Plan, resume: Path | None) -> None:
    """Refuse processes that would train different runs, as other machines may have other files.

    Raises:
        UserError: says on which processes what is not as on the first.
    """
    own = {
        "other pictures or captions": plan.table.fingerprint,
        "another plan": [plan.steps, plan.total_batch, plan.resolution],
        "another checkpoint to go on from": resume and [resume.name, file_sha256(resume / MANIFEST)],
    }
    first, *others = gather_object([own])
    lines = [
        f"process {number}: {what}"
        for number, other in enumerate(others, 1)
        for what in own
        if other[what] != first[what]
    ]
    if lines:
        raise UserError(
            f"the processes are not of one run, compared with process 0:\n  {', '.join(lines)}\n"
            "give all machines the same config and pictures, and to go on the same output_dir or a copy of it"
        )


class Learner:
    """The base with the LoRA in it, wrapped as the run needs it, and its optimizer.

    unet, text_encoder       the live models; text_encoder is None unless it is trained, or words are
    student, text_student    the same, wrapped for several processes, mixed precision and torch.compile
    teacher_adapters         the LoRAs of the teacher, which take no part but there
    params                   what is trained, one list: optimized, clipped and counted
    """

    def __init__(self, cfg: Any, base: Base, accelerator: Accelerator, steps: int):
        self.base, self.accelerator = base, accelerator
        self.unet, self.text_encoder = base.unet, base.text_encoder if encodes_text(cfg) else None
        for number, entry in enumerate(teacher_loras(cfg)):
            lora.load_lora(entry.path, self.unet, adapter_name=f"{TEACHER}{number}", weight=entry.weight)
        self.teacher_adapters = lora.active_adapters(self.unet)
        groups: list[dict[str, Any]] = []
        if trains_lora(cfg):
            params = lora.add_lora(self.unet, **adapter_options(cfg, "unet"))
            groups += with_rates(self.unet, params, cfg.learning_rate, cfg.loraplus_lr_ratio)
        if cfg.train_text_encoder:
            text_params = lora.add_lora(self.text_encoder, **adapter_options(cfg, "text_encoder"))
            text_rate = cfg.text_encoder_learning_rate or cfg.learning_rate
            groups += with_rates(self.text_encoder, text_params, text_rate, cfg.loraplus_lr_ratio)
        self.words = base.words
        if self.words is not None:  # decay would move a word that no caption of a step has
            vectors, rate = self.words.rows.vectors.requires_grad_(True), cfg.textual_inversion.learning_rate
            groups.append({"params": [vectors], "lr": rate, "weight_decay": 0.0})
        if self.text_encoder is not None:
            self.text_encoder.train()
        self.params = [p for group in groups for p in group["params"]]
        if accelerator.mixed_precision != "no":
            leave_casts_to_autocast(self.unet, self.text_encoder)
        self.without_xformers = None  # why, where it was asked for
        if cfg.enable_xformers_memory_efficient_attention:
            self.without_xformers = enable_xformers(self.unet)
        if base.info.is_large and not cfg.torch_compile:  # which keeps what is cheapest by itself
            keep_less(self.unet)
        if cfg.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        optimizer = make_optimizer(cfg, groups)
        self.rates = [group["lr"] for group in groups]
        self.lr_factor = learning_rate_schedule(cfg, steps)
        wrapped: Any = torch.compile(self.unet) if cfg.torch_compile else self.unet
        # Without a LoRA nothing in it is averaged over processes, and DistributedDataParallel refuses it.
        self.student = accelerator.prepare_model(wrapped, evaluation_mode=not trains_lora(cfg))
        self.optimizer = accelerator.prepare(optimizer)
        self.text_student = None
        if self.text_encoder is not None:
            self.text_student = accelerator.prepare(self.text_encoder)

    def set_rates(self, step: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.lr_factor(step)

    def models(self, data: TrainingData) -> Models:
        """What an objective may evaluate; the teacher has its own LoRAs or none."""

        def teacher(x_t: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
            own = lora.only_adapters(self.unet, self.teacher_adapters)
            with torch.no_grad(), self.accelerator.autocast(), own:
                return as_function(self.unet)(x_t, timesteps, prompt_embeds)

        def frozen_embed(prompts: Sequence[str]) -> torch.Tensor:
            with torch.no_grad(), self.accelerator.autocast(), lora.lora_disabled(self.text_encoder):
                return data.embed(prompts, self.text_encoder)

        def class_batch(keys: Sequence[SampleKey]) -> tuple[Batch, torch.Tensor]:
            assert data.class_data is not None
            batch = data.class_data.batch_of(keys)
            return batch, batch.text_states(self.text_student)

        return Models(
            student=as_function(self.student),
            teacher=teacher,
            embed=lambda prompts: data.embed(prompts, self.text_student),
            schedule=self.base.noise_schedule(),
            frozen_embed=frozen_embed,
            class_batch=class_batch if data.class_data else None,
        )
