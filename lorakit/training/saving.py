"""A run on disk: checkpoints that resume exactly, and LoRA files that are checked before they count."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from lorakit.diffusion import lora
from lorakit.ground.checkpoints import publish_checkpoint
from lorakit.ground.errors import DivergedError, OutputError
from lorakit.ground.publish import publish_file
from lorakit.training.lora_check import verify_file, verify_in_diffusers
from lorakit.training.objective_config import sampler_of
from lorakit.training.plan import Plan, result_paths
from lorakit.training.progress import Modules, Progress, Trained
from lorakit.training.resume import STATE_VERSION, read_state
from lorakit.training.setup import Learner, resolve_precision
from lorakit.training.words_config import stem_of, word_paths
from lorakit.weights.lora_file import component_of, folded, lora_bytes
from lorakit.weights.lora_metadata import STATES_KEY, Component, training_metadata
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.optimizer_state import pack_optimizer, unpack_optimizer
from lorakit.weights.tensors import serialize
from lorakit.weights.text_states import states_digest

DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by save_dtype
_BEST = ("best", "best_words")  # files of a checkpoint

# ---- checkpoints ----


def live_modules(unet, text_encoder) -> Modules:
    """A copy of the LoRA as it stands, by kohya name."""
    modules = lora.extract(unet, "unet")
    return modules if text_encoder is None else modules | lora.extract(text_encoder, "text_encoder")


def live(learner: Learner) -> Trained:
    """A copy of LoRA and words as they stand."""
    words = {} if learner.words is None else learner.words.vectors()
    return Trained(live_modules(learner.unet, learner.text_encoder), words)


def save_checkpoint(
    run: Path, progress: Progress, record: dict[str, Any], learner: Learner, objective_state: dict[str, Any]
) -> Path:
    """Publish `checkpoint-<step>`: LoRA, words, optimizer and counters as safetensors and JSON.

    Randomness has no state to save (lorakit.ground.randomness).

    Args:
        record: what resume.check_resume compares with.
        objective_state: of the objectives that have one, by name.
    """
    libraries = ("torch", "diffusers", "peft", "accelerate", "transformers")
    tensors, packed = pack_optimizer(learner.optimizer.state_dict())
    scaler = learner.accelerator.scaler
    state = progress.counters() | record
    if objective_state:
        state["objective"] = objective_state
    state |= {
        "version": STATE_VERSION,
        "optimizer": packed,
        "scaler": None if scaler is None else scaler.state_dict(),
        "libraries": {name: version(name) for name in libraries},
    }
    files = {
        **_files_of(live(learner), "lora", "words"),
        "optimizer.safetensors": serialize(tensors, {}),
        "state.json": json.dumps(state, indent=1).encode(),
    }
    if progress.best is not None:
        files |= _files_of(progress.best, *_BEST)
    return publish_checkpoint(run, progress.step, files)


def _files_of(trained: Trained, lora_name: str, words_name: str) -> dict[str, bytes]:
    files = {}
    if trained.modules:
        files[f"{lora_name}.safetensors"] = lora_bytes(trained.modules, layout="diffusers", metadata={})
    if trained.words:
        files[f"{words_name}.safetensors"] = serialize(trained.words, {})
    return files


def _trained_in(folder: Path, lora_name: str, words_name: str) -> Trained:
    own, words = folder / f"{lora_name}.safetensors", folder / f"{words_name}.safetensors"
    modules = read_lora(own).modules if own.exists() else {}
    return Trained(modules, load_tensors(words.read_bytes()) if words.exists() else {})


def load_checkpoint(folder: Path, learner: Learner) -> tuple[dict[str, Any], Trained | None]:
    """Put a verified checkpoint back; return its counters, and LoRA and words of the best step so far."""
    state = read_state(folder)
    put_back(_trained_in(folder, "lora", "words"), learner)
    tensors = load_tensors((folder / "optimizer.safetensors").read_bytes())
    decays = [group["weight_decay"] for group in learner.optimizer.param_groups]
    learner.optimizer.load_state_dict(unpack_optimizer(tensors, state["optimizer"]))
    for group, decay in zip(learner.optimizer.param_groups, decays, strict=True):  # a changed config counts
        group["weight_decay"] = decay
    if learner.accelerator.scaler is not None and state["scaler"]:
        learner.accelerator.scaler.load_state_dict(state["scaler"])
    best = _trained_in(folder, *_BEST)
    return state, best if best.modules or best.words else None


def put_back(trained: Trained, learner: Learner) -> None:
    """Put a LoRA and words into the live models, exactly."""
    insert_modules(trained.modules, learner.unet, learner.text_encoder)
    if learner.words is not None:
        learner.words.put(trained.words)


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
    trained: Trained,
    step: int,
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """Publish one LoRA file once it was read back and compared; `check` may look at it as well before.

    Its bytes follow from config, data and versions alone.
    """
    base, pictures = plan.base, sum(plan.repeats)  # as kohya counts them
    metadata = training_metadata(
        name=cfg.ckpt_name,
        rank=cfg.rank,
        alpha=cfg.lora_alpha or cfg.rank,
        config=cfg.model_dump(mode="json"),
        base_name=base.name,
        cross_attention_dim=base.cross_attention_dim,
        prediction_type=cfg.prediction_type or base.prediction_type,
        mixed_precision=resolve_precision(cfg.mixed_precision),
        resolution=plan.resolution,
        steps=step,
        epochs=step * plan.total_batch // pictures,
        num_images=pictures,
        sampler=sampler_of(cfg),
    )
    if cfg.prompt_embeds:
        metadata[STATES_KEY] = str(states_digest(cfg.prompt_embeds))
    if cfg.trigger_word:
        metadata["modelspec.trigger_phrase"] = cfg.trigger_word
    dtype = DTYPES[cfg.save_dtype]
    modules, words = trained.modules, {}
    if cfg.textual_inversion is not None and cfg.textual_inversion.bundle:
        words = {stem_of(word): rows for word, rows in trained.words.items()}
    if layout == "diffusers":  # its alpha stands in the metadata, which other programs do not read
        modules = folded(modules)
    options: dict[str, Any] = {"layout": layout, "dtype": dtype, "metadata": metadata}

    def write(temporary: Path) -> None:
        temporary.write_bytes(lora_bytes(modules, **options))
        verify_file(temporary, modules, dtype)
        check(temporary)
        if words:  # diffusers does not read such a file
            temporary.unlink()
            temporary.write_bytes(lora_bytes(modules, words=words, **options))
            verify_file(temporary, modules, dtype)

    publish_file(path, write)


def write_best(run: Path, cfg: Any, plan: Plan, progress: Progress) -> None:
    """The best LoRA so far as a file of the run folder, in the layout of the result; none of words alone."""
    assert progress.best is not None
    if not progress.best.modules:
        return
    layout = next(iter(result_paths(cfg).values()))
    write_lora(run / "best.safetensors", layout, cfg, plan, progress.best, progress.step)


def publish_result(cfg: Any, plan: Plan, learner: Learner, progress: Progress) -> list[Path]:
    """Write LoRA and words of the last step, or the best ones where `final_weights` asks for it.

    Raises:
        OutputError: what diffusers makes of the file is not what was trained; an earlier file stays.
    """
    if cfg.final_weights == "best" and progress.best is not None:
        assert progress.best_step is not None
        trained, step = progress.best, progress.best_step
    else:
        trained, step = live(learner), progress.step
    return publish_lora(cfg, plan, learner, trained, step) + write_words(cfg, trained.words)


def write_words(cfg: Any, words: Mapping[str, Tensor]) -> list[Path]:
    """Write each word to a file of its own, as diffusers, A1111 and ComfyUI read it.

    Raises:
        DivergedError: a vector is not finite.
        OutputError: what was written reads otherwise.
    """
    written = []
    for word, path in word_paths(cfg).items():
        rows = words[word].to(DTYPES[cfg.save_dtype])
        if not rows.isfinite().all():
            raise DivergedError(f"{word} holds NaN or infinity as {rows.dtype}: nothing was written")
        start = cfg.textual_inversion.words[word]
        content = serialize({word: rows}, {"format": "pt", "lorakit.word": word, "lorakit.start": start})
        publish_file(path, partial(_write_word, content, word, rows))
        written.append(path)
    return written


def _write_word(content: bytes, word: str, rows: Tensor, temporary: Path) -> None:
    temporary.write_bytes(content)
    if not torch.equal(load_tensors(temporary.read_bytes())[word], rows):
        raise OutputError(f"{temporary}: {word} is not what was trained; the disk may be faulty")


def publish_lora(cfg: Any, plan: Plan, learner: Learner, trained: Trained, step: int) -> list[Path]:
    """Write the LoRA file (two for save_format "both"), each loaded by diffusers beside the live one."""
    put_back(trained, learner)
    exact = cfg.save_dtype == "float32" and learner.base.dtype == torch.float32

    def check(path: Path) -> None:
        difference = verify_in_diffusers(path, learner.unet, learner.text_encoder)
        if difference > (1e-4 if exact else 0.1):
            raise OutputError(
                f"diffusers reads something else from the LoRA (output differs by {difference:.3g})"
            )

    paths = result_paths(cfg)
    for path, layout in paths.items():
        write_lora(path, layout, cfg, plan, trained, step, check)
    return list(paths)
