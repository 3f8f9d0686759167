"""The stages of imagic that are fitted: embeddings here, their LoRAs by train_lora.py. No torch here."""

import json
from collections.abc import Sequence
from pathlib import Path

from lorakit.editing.config import EditConfig
from lorakit.editing.edit_plan import EditPlan
from lorakit.editing.imagic_plan import RECORD, ImagicFit, fit_record
from lorakit.ground.errors import StoppedError
from lorakit.ground.process import StopFlag
from lorakit.sampling.fitting import OF_THE_BASE, Fit, fit_lora

SAVE_EVERY = 20
"""Steps of an embedding between writes of its file; Ctrl-C writes it too."""


def fit_imagic(cfg: EditConfig, plan: EditPlan, folder: Path, script: Path) -> None:
    """Fit what is missing, going on where an earlier run was stopped.

    Args:
        folder: of the run; `script`: train_lora.py.

    Raises:
        UserError: a training failed.
        StoppedError: a signal came; the same command goes on.
    """
    with StopFlag() as stop:
        if left := [fit for fit in plan.fits if fit.done < fit.steps]:
            _fit_embeddings(cfg, plan, left, stop)
        settings = {key: getattr(cfg, key) for key in OF_THE_BASE}
        for fit in plan.fits:
            if fit.lora in plan.missing:
                own = settings | {"prompt_embeds": str(fit.embedding)}
                data = folder / "fit" / Path(fit.lora).stem
                one = Fit(fit.lora, cfg.image, fit.target, plan.shape, cfg.imagic_config, data, own)
                fit_lora(one, stop, script)


def _fit_embeddings(cfg: EditConfig, plan: EditPlan, fits: Sequence[ImagicFit], stop: StopFlag) -> None:
    """The base is open for this stage alone: the next has one of its own."""
    from tqdm import tqdm

    from lorakit.diffusion.frozen import keep_less
    from lorakit.diffusion.models import open_base
    from lorakit.diffusion.paths import encode_picture
    from lorakit.editing.imagic import Embedding, fit_states
    from lorakit.ground.chunks import Chunks
    from lorakit.pictures.images import read_picture
    from lorakit.sampling.encoding import PromptEncoder

    settings = {"prediction_type": cfg.prediction_type, "clip_skip": cfg.clip_skip}
    base = open_base(plan.base, cfg.mixed_precision, **settings)
    if base.info.is_large:
        keep_less(base.unet)
    latents = encode_picture(base, read_picture(cfg.image, plan.shape))
    encoder = PromptEncoder(base, cfg.prompt_syntax, cfg.embedding_dirs)
    chunks = Chunks(cfg.batch_size)
    for fit in fits:
        print(f"fitting     {fit.embedding} to {cfg.image}", flush=True)
        record = json.dumps(fit_record(cfg, base.info, plan.shape, fit.target), sort_keys=True)
        if fit.done:
            embedding = Embedding.read(fit.embedding, base.device)
        else:
            embedding = Embedding.at_start(encoder.encode([fit.target], "")[0][0].float())
        losses = fit_states(
            base.unet,
            base.noise_schedule(),
            latents,
            embedding,
            steps=fit.steps,
            learning_rate=cfg.embed_learning_rate,
            seed=cfg.embed_seed,
            chunks=chunks,
        )
        with tqdm(losses, initial=fit.done, total=fit.steps, desc="embedding") as bar:
            for loss in bar:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                if embedding.step % SAVE_EVERY == 0 or embedding.step == fit.steps or stop.poll():
                    embedding.write(fit.embedding, {RECORD: record})
                if signum := stop.poll():
                    raise StoppedError(
                        f"at step {embedding.step} of {fit.embedding}; the same command goes on", signum
                    )
