"""The data of a run, ready for the loop: filled caches, training and validation data, the sample sheet."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lorakit.diffusion.models import Base
from lorakit.diffusion.words import start_vectors
from lorakit.ground.randomness import derive_seed
from lorakit.ground.shards import Shards
from lorakit.motion.filming import inflate
from lorakit.pictures.folder import Table
from lorakit.pictures.masks import mask_entry
from lorakit.pictures.views import views_of
from lorakit.sampling.encoding import PromptEncoder
from lorakit.sampling.samplers import sample_images
from lorakit.training.caches import (
    Cache,
    NumberedNames,
    TextNames,
    cache_masks,
    encode_prompts,
    encode_views,
    missing_views,
)
from lorakit.training.class_pictures import make_pictures, shows_class
from lorakit.training.data import Augmentation, TrainingData
from lorakit.training.motion import Carried, encode_clips, sample_strips
from lorakit.training.objective_config import prompts_of, sampler_of
from lorakit.training.plan import Plan, Views, training_views, validation_views
from lorakit.training.resume import base_loras_record
from lorakit.training.watch import Embed, Embeds, SampleSheet
from lorakit.training.words_config import encodes_text
from lorakit.weights.identity import base_identity
from lorakit.weights.text_states import read_states


def prepare(
    cfg: Any,
    plan: Plan,
    base: Base,
    accelerator,
    run: Path,
    between: Callable[[], None] = lambda: None,
) -> tuple[TrainingData, TrainingData, SampleSheet]:
    """Fill the caches and return training data, validation data, and the sheet of samples.

    Every process encodes its share of the pictures. `between` is called after each. The U-Net is not touched
    but to make pictures of a class and to take a motion adapter in, and what steps do not need is dropped.
    """
    if cfg.textual_inversion is not None:
        settings = cfg.textual_inversion
        base.learn_words(start_vectors(base.tokenizer, base.text_encoder, settings.words, settings.vectors))
    text_encoder = base.text_encoder if encodes_text(cfg) else None
    prompts = cfg.sample_prompts or plan.table.first_captions(2)
    common = (cfg, plan, base, accelerator, between)
    views = training_views(cfg, plan)
    beside = class_data(*common) if shows_class(cfg) else None
    data = _cached(*common, plan.table, plan.shapes, views, (*prompts, *prompts_of(cfg)), beside)
    validation = data
    if plan.validation is not None:
        views = validation_views(cfg, plan)
        validation = _cached(*common, plan.validation, plan.validation_shapes, views, prompts_of(cfg))

    embed = _embedding(cfg, base, data, prompts, text_encoder)
    draw: Any = sample_images
    if plan.adapter is not None:
        base.info = plan.base  # of a base from the hub too, with the schedule of the config
        inflate(base, plan.adapter)
        draw = partial(sample_strips, frames=cfg.motion.frames)
    sheet = SampleSheet(
        run / "samples",
        base,
        text_encoder,
        prompts,
        embed,
        cfg.prompt_syntax,
        sampler_of(cfg),
        draw,
        seeds=cfg.sample_seeds,
        shape=plan.shapes[0] if len(set(plan.shapes)) == 1 else (plan.resolution, plan.resolution),
        steps=cfg.sample_inference_steps,
        guidance_scale=cfg.sample_guidance_scale,
    )
    base.drop("vae", *([] if encodes_text(cfg) else ["text_encoder"]))
    return data, validation, sheet


def _embedding(cfg: Any, base: Base, data: TrainingData, prompts: Sequence[str], text_encoder) -> Embed:
    """What embeds the prompts of samples: with marks once, unless the text encoder is trained."""

    def embed_plain() -> list[Embeds]:
        states = data.embed((*prompts, ""), text_encoder)
        return [(row[None], states[-1:]) for row in states[:-1]]

    if cfg.prompt_syntax == "plain" or not cfg.sample_prompts:
        return embed_plain
    encoder = PromptEncoder(base, cfg.prompt_syntax, cfg.embedding_dirs)

    def embed() -> list[Embeds]:
        return [encoder.encode([prompt], "") for prompt in prompts]

    made = embed() if text_encoder is None else None
    return embed if made is None else lambda: made


def class_data(cfg, plan: Plan, base: Base, accelerator, between: Callable[[], None]) -> TrainingData:
    """Pictures of a class, in squares, with draws of their own; made by the base where they are not given."""
    table = plan.class_table
    if table is None:
        merged = base_loras_record(cfg)
        options = (plan.resolution, plan.cache_dir, merged, accelerator, between)
        table = make_pictures(cfg, base, *options)
    own = {
        "seed": derive_seed(cfg.seed, "class pictures"),
        "masked_loss": None,
        "caption_dropout": 0.0,
        "prompt_embeds": None,
    }
    shapes = [(plan.resolution, plan.resolution)] * len(table.rows)
    views = [views_of(row, shape) for row, shape in zip(table.rows, shapes, strict=True)]
    return _cached(cfg.model_copy(update=own), plan, base, accelerator, between, table, shapes, views, ())


def _cached(
    cfg, plan, base, accelerator, between, table: Table, shapes, rows: Views, prompts, beside=None
) -> TrainingData:
    vae_hash = base_identity(base.info, "vae")
    text_hash = base_identity(base.info, "text_encoder", "tokenizer")
    if cfg.base_loras:
        text_hash += json.dumps(base_loras_record(cfg))
    views = [view for row in rows for view in row]
    prompts = ["", *prompts, *(caption for row in table.rows for caption in row.captions)]
    prompts = list(dict.fromkeys(prompts))
    names = None if encodes_text(cfg) else TextNames(base, text_hash, cfg.cache_dtype)
    kinds = tuple(Shards(plan.cache_dir / kind) for kind in ("latents", "masks", "text"))
    for share, verify in _shares(accelerator):
        _fill(cfg, base, accelerator, between, views[share], prompts[share], kinds, vae_hash, names, verify)
    latents, masks, texts = kinds
    states, ids = None, None
    if names is None:
        ids = dict(zip(prompts, base.tokenize(prompts), strict=True))
    else:
        states = Cache(texts, names, base.device)
        if cfg.prompt_embeds:
            captions = {caption for row in table.rows for caption in row.captions if caption}
            states.held |= dict.fromkeys(captions, read_states(cfg.prompt_embeds).to(base.device))
    masking = cfg.masked_loss, base.info.vae_factor
    return TrainingData(
        table,
        shapes,
        Cache(latents, NumberedNames(view.entry(vae_hash, cfg.cache_dtype) for view in views), base.device),
        [len(row) for row in rows],
        base,
        text_states=states,
        token_ids=ids,
        augmentation=Augmentation(
            cfg.noise_offset, cfg.caption_dropout, cfg.unmasked_weight, cfg.timestep_bias
        ),
        num_timesteps=base.scheduler.config.num_train_timesteps,
        seed=cfg.seed,
        masks=Cache(masks, NumberedNames(mask_entry(view, *masking) for view in views), base.device)
        if cfg.masked_loss
        else None,
        class_data=beside,
        carried=Carried(views, cfg, base.info.vae_factor) if cfg.motion and cfg.motion.carried else None,
    )


def _shares(accelerator) -> list[tuple[slice, bool]]:
    """What a process encodes, one after the other, and whether entries that are there are verified.

    Its share; where there are other machines, whose caches it may not see, its share on this one; and what it
    lacks still.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
    shares = [(slice(rank, None, processes), True)]
    if here < processes:
        shares.append((slice(accelerator.local_process_index, None, here), True))
    return [*shares, (slice(None), False)] if processes > 1 else shares


def _fill(cfg, base, accelerator, between, views, prompts, kinds, vae_hash, names, verify) -> None:
    """Encode what the caches lack, and wait for the other processes."""
    latents, masks, texts = kinds
    dtype, image_options = cfg.cache_dtype, {"max_pixels": cfg.max_image_pixels}
    missing = missing_views(views, latents, vae_hash, dtype, verify)
    encode = encode_clips if cfg.motion else encode_views
    options = {"image_options": image_options, "threads": cfg.dataloader_num_workers, "dtype": dtype}
    quiet = not missing or not accelerator.is_local_main_process
    encoding = encode(missing, base, latents, vae_hash, **options)
    for _ in tqdm(encoding, total=len(missing), desc="caching latents", disable=quiet):
        between()
    if cfg.masked_loss:
        cache_masks(views, cfg.masked_loss, base.info.vae_factor, masks, image_options, verify)
    if names is not None:
        encode_prompts(prompts, names, base, texts, dtype, verify)
    for shards in kinds:
        shards.seal()
    accelerator.wait_for_everyone()
    for shards in kinds:
        shards.refresh()  # what the others encoded
