"""Values that are legal and cannot be meant, each in a line with what may be meant. No torch here."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lorakit.training.objective_config import kinds_of
from lorakit.training.order import count_showings

FAST = 0.05  # a learning rate that no LoRA bears with AdamW
STRONG = 8.0  # alpha / rank; kohya's scripts use 0.5 to 1, DiffMorpher 1
OFFSET = 0.3  # noise_offset; 0.05 to 0.1 are customary
_SIDES = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)


def doubts(cfg: Any, plan: Any) -> Iterator[str]:
    """A line for each value, or pair of values, that has no effect or an effect that nobody wants.

    Args:
        plan: of this config, see plan.Plan.
    """
    yield from _of_rates(cfg, plan)
    yield from _of_showings(cfg, plan)
    yield from _of_pictures(cfg, plan)
    yield from _of_watching(cfg, plan)


def _of_rates(cfg: Any, plan: Any) -> Iterator[str]:
    steps, rate = plan.steps, cfg.learning_rate
    if cfg.lr_warmup_steps >= steps:
        yield (
            f"lr_warmup_steps {cfg.lr_warmup_steps}: the run has {steps} steps, so that the rate never "
            "reaches learning_rate"
        )
    if cfg.lr_step_rules:
        ends = [int(rule.split(":")[1]) for rule in cfg.lr_step_rules.split(",") if ":" in rule]
        if late := [end for end in ends if end >= steps]:
            yield f"lr_step_rules: step {late[0]} is not reached, the run has {steps} steps"
    if rate == 0:
        yield "learning_rate 0: the LoRA stays as it starts"
    elif cfg.optimizer == "prodigy" and rate < 0.1:
        yield f"learning_rate {rate:g}: prodigy multiplies the rate that it finds by it; 1 is meant to be set"
    elif cfg.optimizer != "prodigy" and rate >= FAST:
        yield f"learning_rate {rate:g}: with {cfg.optimizer} LoRAs are trained at 1e-5 to 1e-2; more diverges"
    if cfg.lr_scheduler_name.startswith("constant") and any(kind.anneals for kind in kinds_of(cfg)):
        yield f"lr_scheduler_name {cfg.lr_scheduler_name}: few steps want a rate that ends at 0"
    if cfg.lr_num_cycles > 1 and cfg.lr_scheduler_name != "cosine_with_restarts":
        yield "lr_num_cycles: only cosine_with_restarts restarts"
    if cfg.lr_power != 1 and cfg.lr_scheduler_name != "polynomial":
        yield "lr_power: only polynomial has an exponent"
    yield from (f"base_loras: {each.path} has weight 0" for each in cfg.base_loras if not each.weight)
    paths = Counter([*(each.path for each in cfg.base_loras), *([cfg.init_lora] if cfg.init_lora else [])])
    twice = [path for path, count in paths.items() if count > 1]
    yield from (
        f"base_loras, init_lora: {path} is named more than once: its changes add up" for path in twice
    )
    scale = (cfg.lora_alpha or cfg.rank) / (cfg.rank**0.5 if cfg.use_rslora else cfg.rank)
    if scale > STRONG:
        yield f"lora_alpha, rank: the update is scaled by {scale:.3g}, where 0.5 to 2 are usual"


def _of_showings(cfg: Any, plan: Any) -> Iterator[str]:
    counts = count_showings(cfg.seed, **plan.order)
    if never := int((counts == 0).sum()):
        yield f"{never} of {len(counts)} pictures are never shown: the run ends before; raise max_train_steps"
    if cfg.n_epochs and plan.samples is None:
        yield f"max_train_steps {cfg.max_train_steps} ends the run before n_epochs {cfg.n_epochs}"
    if plan.total_batch > len(counts) > 1:
        yield f"a step of {plan.total_batch} samples shows some of the {len(counts)} pictures several times"


def _of_pictures(cfg: Any, plan: Any) -> Iterator[str]:
    rows, base = plan.table.rows, plan.base
    if cfg.caption_dropout > 0.5:
        yield f"caption_dropout {cfg.caption_dropout:g}: most samples are shown without their caption"
    if escaped := sum("\\(" in row.caption for row in rows):
        yield f"{escaped} caption(s) hold \\(, a bracket in prompts of A1111: here it is read as it stands"
    if cfg.random_flip and (sided := sum(any(map(_SIDES.search, row.captions)) for row in rows)):
        yield f"random_flip: {sided} caption(s) speak of left or right, which a mirrored picture has swapped"
    if cfg.crop == "random":
        fit = (r.width * h == r.height * w for r, (w, h) in zip(rows, plan.shapes, strict=True))
        if all(fit):
            yield 'crop "random" has no effect: no picture sticks out of its shape'
    without = [row for row in rows if not (row.mask or row.transparent)]
    if cfg.masked_loss and without:
        means = "transparent part" if cfg.masked_loss == "alpha" else "mask beside them"
        yield f"masked_loss: {len(without)} of {len(rows)} pictures have no {means} and are trained whole"
    if cfg.noise_offset > OFFSET:
        yield f"noise_offset {cfg.noise_offset:g}: 0.05 to 0.1 are usual; so much takes the colours away"
    if base.known and not base.resolution / 2 <= plan.resolution <= base.resolution * 2:
        yield f"resolution {plan.resolution}: this base is made for {base.resolution} pixels"


def _of_watching(cfg: Any, plan: Any) -> Iterator[str]:
    steps = plan.steps
    for key in ("validation_steps", "sample_steps"):
        if (every := getattr(cfg, key)) and every > steps:
            yield f"{key} {every}: only the last of the {steps} steps has any"
    every = cfg.validation_steps or max(1, steps // 10)
    if cfg.early_stop_patience and cfg.early_stop_patience * every >= steps:
        yield (
            f"early_stop_patience {cfg.early_stop_patience}: with a validation every {every} of {steps} "
            "steps it never stops the run"
        )
    prompts = cfg.sample_prompts or ()
    if cfg.sample_prompts == ():
        yield "sample_prompts is empty: the first two captions are sampled; sample_steps 0 samples nothing"
    if cfg.trigger_word and (without := [p for p in prompts if cfg.trigger_word not in p]):
        yield f"{len(without)} of sample_prompts lack the trigger word, such as “{without[0]}”"
