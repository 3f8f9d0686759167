"""What the three trainings share: a run folder, checkpoints that resume exactly, rate, average and step.

A checkpoint holds the weights, their running average and the optimizer as safetensors, and a JSON file.
Randomness has no state (lorakit.ground.randomness), so a resumed run takes the steps that an unbroken one
would.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lorakit.diffusion.models import quiet_libraries, set_up_backend
from lorakit.ground.checkpoints import find_resume, prune_checkpoints, publish_checkpoint
from lorakit.ground.errors import DivergedError, StoppedError, UserError
from lorakit.ground.process import StopFlag
from lorakit.ground.publish import publish_file
from lorakit.ground.runs import MetricsFile, claim_run, lock_run
from lorakit.weights.optimizer_state import pack_optimizer, unpack_optimizer
from lorakit.weights.tensors import read_tensors, serialize
from miniature.muon import Muon
from miniature.settings import FREE, RunConfig


def set_up(cfg: RunConfig) -> torch.device:
    """The device, ready for a training."""
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    quiet_libraries()
    set_up_backend(name)
    return torch.device(name)


class _CpuKernels(TorchFunctionMode):
    """Around two slow kernels of torch on CPUs (2.15), found by profile.

    Attention's backward takes three to six times as long in bfloat16 as in float32, and group norm in
    channels last five to ten times as long as in the default layout.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value, *rest = args
            with torch.autocast("cpu", enabled=False):
                return func(query.float(), key.float(), value.float(), *rest, **(kwargs or {}))
        if func is nn.functional.group_norm and args[0].ndim == 4:
            x, *rest = args
            normed = func(x.contiguous(), *rest, **(kwargs or {}))
            return normed.contiguous(memory_format=torch.channels_last)
        return func(*args, **(kwargs or {}))


def in_bfloat16(cfg: RunConfig, device: torch.device) -> bool:
    """Whether forward passes are in bfloat16; for "auto", whether the device has units for it.

    A CPU without them computes bfloat16 in software, in 2.6 times the time of float32.
    """
    if cfg.mixed_precision != "auto":
        return cfg.mixed_precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


@contextlib.contextmanager
def autocast(cfg: RunConfig, device: torch.device) -> Iterator[None]:
    """The precision of a forward pass."""
    half = in_bfloat16(cfg, device)
    kernels = _CpuKernels() if half and device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=half), kernels:
        yield


def _check_config(cfg: RunConfig, resume: Path) -> None:
    old = json.loads((resume / "state.json").read_text(encoding="utf-8"))["config"]
    new = cfg.model_dump(mode="json")
    kept = [key for key in new if key in old and key not in FREE]
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in kept if old[key] != new[key]]
    if changed:
        raise UserError(f"{resume} was trained otherwise:\n  " + "\n  ".join(changed) + "\nset these back")


def learning_rate(cfg: RunConfig, step: int) -> float:
    """Of step 0, 1, …: linear warm-up, then half a cosine down to a hundredth."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(cfg.max_train_steps - cfg.warmup_steps, 1)
    return cfg.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Average:
    """Running average of the weights of several modules, float32, by "module.parameter".

    Those after step t weigh t ** power, so that its centre of mass lies 1 / (power + 2) of the run behind,
    however long the run (power function EMA; Karras et al. 2024, section 3.1).
    """

    def __init__(self, modules: Mapping[str, nn.Module], power: float):
        self.modules, self.power = modules, power
        self.weights = {name: value.detach().clone() for name, value in self._live()}

    def _live(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (f"{part}.{name}", p)
            for part, module in self.modules.items()
            for name, p in module.named_parameters()
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step 0, 1, …; the first forgets the random start."""
        decay = (1 - 1 / (step + 1)) ** (self.power + 1)
        live = self._live()
        torch._foreach_lerp_(
            [self.weights[name] for name, _ in live], [p.detach() for _, p in live], 1 - decay
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The modules hold the average inside, in eval mode, and their own weights again outside."""
        own = {name: p.detach().clone() for name, p in self._live()}
        self._load(self.weights)
        for module in self.modules.values():
            module.eval()
        try:
            yield
        finally:
            self._load(own)
            for module in self.modules.values():
                module.train()

    @torch.no_grad()
    def _load(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, p in self._live():
            p.copy_(weights[name])


def save(run: Path, step: int, cfg: RunConfig, average: Average, optimizer: torch.optim.Optimizer) -> Path:
    """Publish the state after `step` steps, and drop all but the newest two checkpoints."""
    tensors, packed = pack_optimizer(optimizer.state_dict())
    own = {name: p.detach().cpu().contiguous() for name, p in average._live()}
    mean = {name: p.cpu().contiguous() for name, p in average.weights.items()}
    state = {"step": step, "config": cfg.model_dump(mode="json"), "optimizer": packed}
    folder = publish_checkpoint(
        run,
        step,
        {
            "weights.safetensors": serialize(own, {}),
            "average.safetensors": serialize(mean, {}),
            "optimizer.safetensors": serialize(tensors, {}),
            "state.json": json.dumps(state, indent=1).encode(),
        },
    )
    prune_checkpoints(run, 2)
    return folder


@torch.no_grad()
def restore(folder: Path, average: Average, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint back; returns the number of steps that it has taken."""
    own, _ = read_tensors(folder / "weights.safetensors")
    mean, _ = read_tensors(folder / "average.safetensors")
    for name, p in average._live():
        p.copy_(own[name])
        average.weights[name].copy_(mean[name])
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    tensors, _ = read_tensors(folder / "optimizer.safetensors")
    optimizer.load_state_dict(unpack_optimizer(tensors, state["optimizer"]))
    return cast(int, state["step"])


def make_optimizer(cfg: RunConfig, modules: Mapping[str, nn.Module]) -> Muon:
    named = [(name, p) for module in modules.values() for name, p in module.named_parameters()]
    trained = [(name, p) for name, p in named if p.requires_grad]
    dtype = torch.bfloat16 if in_bfloat16(cfg, trained[0][1].device) else torch.float32
    return Muon(trained, cfg.learning_rate, cfg.matrix_scale, cfg.weight_decay, dtype)


def take_step(cfg: RunConfig, optimizer: torch.optim.Optimizer, loss: torch.Tensor, step: int) -> float:
    """Backward, clip, update at the rate of `step`; returns the gradient's norm.

    Raises:
        DivergedError: the loss or the gradient is not finite.
    """
    rate = learning_rate(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    if not torch.isfinite(norm):
        raise DivergedError(f"step {step}: the gradient is not finite; lower learning_rate")
    optimizer.step()
    return float(norm)


class Training:
    """The steps of a run: taken, logged, saved, and ended in order by a signal.

    A pass of `for step in training.steps()` calls `take` once; the checkpoint comes at the end of the pass,
    when all has been done that `is_validation` asks for.
    """

    def __init__(self, cfg: RunConfig, models: Mapping[str, nn.Module], hint: str):
        self.cfg, self.hint = cfg, hint
        self.optimizer, self.average = make_optimizer(cfg, models), Average(models, cfg.ema_power)
        self.run = Path(cfg.output_dir) / cfg.ckpt_name
        self.metrics = MetricsFile(self.run / "metrics.jsonl")
        self.done, self._total, self._stack = 0, 0.0, contextlib.ExitStack()

    @contextlib.contextmanager
    def opened(self) -> Iterator["Training"]:
        """Own the run folder, and be where its newest checkpoint is if the config resumes."""
        cfg = self.cfg
        with lock_run(self.run), self._stack:
            claim_run(self.run, resume=cfg.resume_from_checkpoint, overwrite=cfg.overwrite)
            resume, notes = find_resume(self.run, cfg.resume_from_checkpoint)
            if resume is not None:
                _check_config(cfg, resume)
                notes.append(f"resuming from {resume}")
            written = json.dumps(cfg.model_dump(mode="json"), indent=2) + "\n"
            publish_file(self.run / "config.json", written.encode())
            for note in notes:
                print(f"note        {note}", flush=True)
            if resume is not None:
                self.done = restore(resume, self.average, self.optimizer)
            self.metrics.truncate_after(self.done)
            yield self

    def steps(self) -> Iterator[int]:
        """0, 1, … without those that are done. Before the first, a signal ends the process: nothing is lost.

        Raises:
            StoppedError: a signal came; a checkpoint was published.
        """
        cfg, self._started, self._first = self.cfg, time.monotonic(), self.done
        stop = self._stack.enter_context(StopFlag())
        while self.done < cfg.max_train_steps:
            yield self.done
            last = self.done == cfg.max_train_steps
            if self.done % cfg.checkpointing_steps == 0 or last or stop.poll():
                save(self.run, self.done, cfg, self.average, self.optimizer)
            if stop.signum and not last:
                at = f"at step {self.done} of {cfg.max_train_steps}"
                raise StoppedError(f"{at}; continue with: {self.hint}", stop.signum)

    def take(self, loss: torch.Tensor, **figures: float) -> None:
        """One update, and a line of the log where one is due, with `figures` besides.

        Raises:
            DivergedError: the loss or the gradient is not finite.
        """
        cfg, norm = self.cfg, take_step(self.cfg, self.optimizer, loss, self.done)
        self.average.update(self.done)
        self.done, self._total = self.done + 1, self._total + float(loss.detach())
        if self.done % cfg.logging_steps == 0:
            rate = (self.done - self._first) * cfg.batch_size / (time.monotonic() - self._started)
            since = min(cfg.logging_steps, self.done - self._first)  # the last line, or the resume
            mean, self._total = self._total / since, 0.0
            record = {"step": self.done, "loss": mean, **figures, "grad_norm": norm}
            self.metrics.append(record | {"pictures_per_second": rate})
            print(f"step {self.done:7d}  loss {mean:.4f}  {rate:.1f} pictures/s", flush=True)

    @property
    def is_validation(self) -> bool:
        """Whether the step that was just taken is one after which to look at the average."""
        return self.done % self.cfg.validation_steps == 0 or self.done == self.cfg.max_train_steps
