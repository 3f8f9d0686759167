"""Train a LoRA from one JSON file (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    python train_lora.py cfg/mountain.json
    python train_lora.py cfg/sd15/mountain.json rank=16 ckpt_name=mountain_r16
    accelerate launch train_lora.py cfg/sd15/style.json             # several GPUs, the same run

Reads a base model, and pictures with captions. Writes <output_dir>/<ckpt_name>.safetensors, which diffusers,
ComfyUI and A1111 load, and the folder <output_dir>/<ckpt_name>/: metrics, samples, checkpoints, index.html.
"""

import contextlib
import json
import math
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

from lorakit.ground.checkpoints import prune_checkpoints
from lorakit.ground.command import parse_command
from lorakit.ground.errors import DivergedError, StoppedError, UserError
from lorakit.ground.process import StopFlag, launched_processes, run_guarded
from lorakit.ground.publish import check_writable, publish_file
from lorakit.ground.runs import claim_run, lock_run
from lorakit.training.config import TrainConfig
from lorakit.training.forecast import checkpoint_bytes, describe_plan, lost_tokens
from lorakit.training.lcm_config import teacher_loras
from lorakit.training.plan import Plan, make_plan, missing_packages, result_paths
from lorakit.training.progress import Progress
from lorakit.training.resume import check_base, find_start, run_record, validation_record
from lorakit.training.verify import verify_resume
from lorakit.training.words_config import word_paths
from lorakit.weights.programs import file_read_by


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
    from tqdm import tqdm

    from lorakit.diffusion.models import Base, compute_dtype
    from lorakit.ground import randomness
    from lorakit.training import decisions, saving
    from lorakit.training.objectives import make_objective
    from lorakit.training.order import SampleOrder, split_step
    from lorakit.training.page import write_page
    from lorakit.training.preparation import prepare
    from lorakit.training.setup import Learner, start_processes
    from lorakit.training.start import base_loras, put_start
    from lorakit.training.watch import Metrics, validation_loss

    # -- processes, and the frozen base
    accelerator = start_processes(cfg, plan, decisions.trackers(cfg), resume)
    main = accelerator.is_main_process
    say = tqdm.write if main else str
    dtype = compute_dtype(accelerator.mixed_precision)
    settings = {"prediction_type": cfg.prediction_type, "clip_skip": cfg.clip_skip, "merged": base_loras(cfg)}
    base = Base(plan.base, accelerator.device, dtype, **settings)
    if not plan.base.known:  # a hub id that was not on this machine
        plan = replace(make_plan(cfg, plan.world_size, base.info), steps=plan.steps, samples=plan.samples)
        if resume is not None:
            check_base(resume, plan.base)

    with StopFlag() as stop, contextlib.ExitStack() as closing:

        def stop_early():
            if signum := stop.poll():
                raise StoppedError(f"before the first step; what is cached stays. To go on: {hint}", signum)

        # -- data: latents and text states, from the caches
        data, validation, sheet = prepare(cfg, plan, base, accelerator, run, stop_early)
        order = SampleOrder(cfg.seed, **plan.order)

        # -- the LoRA in the base, and its optimizer
        learner = Learner(cfg, base, accelerator, plan.steps)
        unet, text_encoder, models = learner.unet, learner.text_encoder, learner.models(data)
        objective = make_objective(cfg)
        if learner.without_xformers:
            say(f"attention   torch SDPA is used: {learner.without_xformers}")
        say(
            f"training    {sum(p.numel() for p in learner.params):,} parameters, {plan.steps} steps of "
            f"{plan.total_batch}, {accelerator.num_processes} process(es) on {accelerator.device.type}, "
            f"{str(base.dtype).removeprefix('torch.')}"
        )

        # -- counters, new or from a checkpoint
        progress = Progress()
        if resume is not None:
            saved, best = saving.load_checkpoint(resume, learner)
            progress.take(saved, best, comparable=saved["validation"] == validation_record(cfg, plan))
            objective.load_state_dict(saved.get("objective", {}))
        elif cfg.init_lora:
            put_start(cfg.init_lora, learner)
        pace = 0.1 if sys.stderr.isatty() else 60.0  # seconds between looks at the bar; a log file wants few
        bar = tqdm(
            desc=cfg.ckpt_name, total=plan.steps, initial=progress.step, mininterval=pace, disable=not main
        )
        closing.callback(bar.close)
        metrics = Metrics(accelerator, run / "metrics.jsonl", bar, plan.total_batch, progress.smoothed)
        if main:
            metrics.file.truncate_after(progress.step)
        decisions.start_trackers(cfg, accelerator)
        closing.callback(decisions.end_tracking, accelerator)
        record = run_record(cfg, plan) if main else {}
        due = decisions.due_steps(cfg, plan.steps)

        # -- the loop: one turn is one optimizer step
        for step in range(progress.step, plan.steps):
            if progress.exhausted(cfg.early_stop_patience):
                stale = progress.stale
                say(f"step {step:6d} no better validation loss for {stale} validations: stopped early")
                break
            learner.set_rates(step)
            step_loss, parts = torch.zeros((), device=accelerator.device), {}
            shares = split_step(order[step], plan.shapes, cfg.train_batch_size, *decisions.place(accelerator))
            for share in shares:
                positions = share.positions(step, plan.total_batch)
                batch = data.batch(share.rows, positions)
                if cfg.lora_dropout:
                    torch.manual_seed(randomness.derive_seed(cfg.seed, "lora dropout", positions[0]))
                last = share is shares[-1]
                with decisions.gradient_sync(accelerator, learner, last), objective.attention():
                    embeds = batch.text_states(learner.text_student)
                    loss, told = objective.loss(models, batch, embeds)
                    accelerator.backward(loss / share.divisor)
                step_loss += loss.detach() / share.divisor
                for name, part in told.items():
                    parts[name] = parts.get(name, 0) + part / share.divisor
            grad_norm = accelerator.clip_grad_norm_(learner.params, cfg.max_grad_norm or math.inf)
            assert grad_norm is not None  # only DeepSpeed, which is not supported, gives none
            learner.optimizer.step()
            learner.optimizer.zero_grad()
            if objective.has_state:
                objective.finish_step(decisions.mean_over_processes(accelerator, parts))
            progress.step = done = step + 1
            rate = learner.optimizer.param_groups[0]["lr"]
            metrics.add(done, step_loss, grad_norm, rate, parts)

            stopping = decisions.any_process(accelerator, bool(stop.poll()) or done == stop_after)
            if done % cfg.logging_steps == 0 or done in due.any or stopping:
                if (broken := metrics.flush()) is not None:
                    rate = cfg.learning_rate * learner.lr_factor(broken.step - 1)
                    raise DivergedError(decisions.diverged(cfg, plan, run, data, order, broken, rate))
                progress.smoothed = metrics.smoothed
            if done in due.validation:
                loss = validation_loss(validation, objective, models, unet, text_encoder, cfg, accelerator)
                metrics.write({"step": done, "validation_loss": loss})
                if progress.judge(loss):
                    progress.best = saving.live(learner)
                    if main:
                        saving.write_best(run, cfg, plan, progress)
                best_loss = math.nan if progress.best_loss is None else progress.best_loss
                say(
                    f"step {done:6d} loss {metrics.smoothed:.4f}, validation {loss:.4f}, best {best_loss:.4f}"
                )
            if done in due.sample and main:
                sheet.draw(done)
            exhausted = progress.exhausted(cfg.early_stop_patience)
            if main and (done in due.checkpoint or stopping or exhausted):
                saving.save_checkpoint(run, progress, record, learner, objective.state_dict())
                prune_checkpoints(run, cfg.checkpoints_total_limit)
            if stopping:
                accelerator.wait_for_everyone()
                bar.close()
                if main:
                    write_page(cfg, plan, run, hint)
                signum = stop.signum or signal.SIGTERM
                raise StoppedError(f"at step {done} of {plan.steps}. To go on: {hint}", signum)
            if done in due.any:
                metrics.pause()

        # -- the LoRA file, read back and compared
        paths: list[Path] = []
        if main:
            paths = saving.publish_result(cfg, plan, learner, progress)
            write_page(cfg, plan, run)
        accelerator.wait_for_everyone()
    return paths


def main(argv: list[str]) -> int:
    command = parse_command(
        TrainConfig,
        argv,
        prog="train_lora.py",
        description="Train a LoRA for Stable Diffusion from one JSON file.",
        flags={"verify-resume": "prove on this machine that a stopped and resumed run equals a straight one"},
        default_config="cfg/mountain.json",
    )
    cfg, told = command.config, []
    if cfg.init_lora or cfg.base_loras or teacher_loras(cfg):
        from lorakit.training.start import settled

        cfg, told = settled(cfg)
    rank, world_size = launched_processes()
    plan = make_plan(cfg, world_size)
    plan = replace(plan, notes=(*plan.notes, *told))
    if "check" in command.flags:
        print(describe_plan(cfg, plan))
        return 0
    missing_packages(cfg)
    if "verify-resume" in command.flags:
        if world_size > 1:
            raise UserError("--verify-resume runs in one process: start it without the launcher")
        print(verify_resume(train, cfg, plan))
        return 0
    run = Path(cfg.output_dir) / cfg.ckpt_name
    check_writable(run.parent, 3 * checkpoint_bytes(cfg, plan.base))
    with lock_run(run) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            results = [*result_paths(cfg), *word_paths(cfg).values()]
            claim_run(run, resume=cfg.resume_from_checkpoint, overwrite=cfg.overwrite, results=results)
        resume, told = find_start(cfg, plan, run, owner=rank == 0)
        if rank == 0:
            text = json.dumps(cfg.model_dump(mode="json"), indent=2) + "\n"
            publish_file(run / "config.json", text.encode())
            for note in (*plan.notes, *lost_tokens(cfg, plan), *told):
                print(f"note        {note}")
        again = [a for a in argv if not a.startswith(("resume_from_checkpoint=", "overwrite="))]
        launcher = ["python"] if world_size == 1 else ["torchrun", "--nproc_per_node", str(world_size)]
        hint = shlex.join([*launcher, "train_lora.py", *again, "resume_from_checkpoint=latest"])
        paths = train(cfg, plan, run, resume, hint=hint)
    if rank == 0:
        for path in paths:
            print(f"wrote       {path} ({path.stat().st_size / 1e6:.2f} MB); look at {run}/index.html")
            if path in result_paths(cfg):
                print(f"read by     {file_read_by(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
