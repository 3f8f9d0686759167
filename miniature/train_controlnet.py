"""Train the miniature's ControlNet for Canny edges on its frozen base (Zhang, Rao and Agrawala 2023).

    python miniature/train_controlnet.py miniature/cfg/controlnet.json
    python miniature/train_controlnet.py miniature/cfg/controlnet.json resume_from_checkpoint=latest

Reads a base; renders and encodes what it lacks into <output_dir>, the pictures that text-to-image trained on.
Writes the run folder <output_dir>/<ckpt_name>/, and at its end <run folder>/controlnet. The blur and the
thresholds of the edges are drawn anew for each sample, so that hints of any detail are obeyed. A share of the
samples are crops of photographs in changed colours: the base never saw such a picture, but its hint is to be
followed all the same.
"""

import sys
from pathlib import Path

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorakit.ground.process import run_guarded
from miniature.settings import RunConfig, run_script


class ControlNetConfig(RunConfig):
    """The keys of a ControlNet's training."""

    headings = RunConfig.headings | {"base": "Model", "pictures": "Pictures", "snr_gamma": "Loss"}

    base: str = Field(
        "out/miniature/text_to_image/base",
        min_length=1,
        description="folder of the base, which stays as it is",
    )
    hint_channels: tuple[int, int, int, int] = Field(
        (16, 32, 64, 96), description="channels of the hint at 1, 1/2, 1/4 and 1/8 of its size"
    )

    pictures: int = Field(15000, ge=1, description="renders to train on, the three base styles by turns")
    picture_size: int = Field(128, ge=32, multiple_of=32, description="pixels of their side")
    photograph_share: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="share of samples that are crops of photographs, without caption",
    )
    caption_dropout: float = Field(
        0.2, ge=0, le=1, description="share of samples without a caption, so that the hint alone says much"
    )
    details_share: float = Field(
        0.5, ge=0, le=1, description="share of captions that name sun, clouds, trees and house too"
    )

    snr_gamma: float = Field(5.0, gt=0, description="of the min-SNR weights")


def train(cfg: ControlNetConfig, hint: str) -> Path:
    """The run; returns the folder of the trained ControlNet.

    Raises:
        StoppedError: a signal came; a checkpoint was published.
    """
    import torch

    from lorakit.diffusion.models import Base
    from lorakit.training.denoise import min_snr_weight
    from lorakit.weights.base import inspect_base
    from miniature import diffusion
    from miniature import run as runs
    from miniature.batches import Hints, Photographs, Samples
    from miniature.control import make_controlnet
    from miniature.export import save_part
    from miniature.pictures import base_table, rendered

    device = runs.set_up(cfg)
    base = Base(inspect_base(cfg.base), device)
    controlnet = make_controlnet(base.unet, cfg.hint_channels, cfg.seed).to(device)
    models = {"controlnet": controlnet}
    with runs.Training(cfg, models, hint).opened() as training:
        table, cache = base_table(cfg.seed, cfg.pictures, cfg.picture_size), Path(cfg.output_dir)
        latents = diffusion.cached_latents(base.vae, table, cache, cfg.render_workers, device)
        samples = Samples(latents, diffusion.caption_ids(base.tokenizer, table), base.tokenizer, cfg)
        hints = Hints(rendered(table, cache, cfg.render_workers), cfg.seed)
        photographs = Photographs(cfg.picture_size, cfg.photograph_share, cfg.seed)
        for step in training.steps():
            x_0, ids, timesteps, eps = samples.batch(step, cfg.batch_size, device)
            edges = hints.batch(step, *samples.rows(step, cfg.batch_size))  # (B, 3, H, W)
            crops, crop_edges = photographs.batch(step, cfg.batch_size)
            some = slice(len(crops))
            x_0[some], ids[some], edges[some] = base.mean_latents(crops), samples.empty.to(device), crop_edges
            edges = edges.to(device)
            x_t = samples.schedule.add_noise(x_0, eps, timesteps)  # (B, C, h, w)
            t = timesteps.to(device)
            with runs.autocast(cfg, device):
                with torch.no_grad():
                    embeds = base.text_encoder(ids)[0]  # (B, L, D)
                down, mid = controlnet(
                    x_t, t, encoder_hidden_states=embeds, controlnet_cond=edges, return_dict=False
                )
                prediction = base.unet(
                    x_t,
                    t,
                    encoder_hidden_states=embeds,
                    down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                ).sample
            weight = min_snr_weight(samples.schedule.snr(timesteps), cfg.snr_gamma, "epsilon").to(x_t)
            loss = (((prediction.float() - eps) ** 2).mean(dim=(1, 2, 3)) * weight).mean()
            training.take(loss)
        with training.average.applied():
            save_part(training.run / "controlnet", controlnet, torch.float16)
    return training.run / "controlnet"


def main(argv: list[str]) -> int:
    purpose = "Train the miniature's ControlNet for Canny edges."
    return run_script(ControlNetConfig, train, argv, "train_controlnet", purpose)


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
