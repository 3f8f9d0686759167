"""Train the miniature's autoencoder from nothing (Kingma & Welling 2014; Rombach et al. 2022, sec. 3.1).

    python miniature/train_autoencoder.py miniature/cfg/autoencoder.json
    python miniature/train_autoencoder.py miniature/cfg/autoencoder.json resume_from_checkpoint=latest

Renders what it lacks into <output_dir>/pictures-*; reads miniature/photos. Writes the run folder
<output_dir>/<ckpt_name>/ with checkpoints and metrics, and at its end <run folder>/vae, a diffusers folder.
"""

import sys
from pathlib import Path

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorakit.ground.process import run_guarded
from lorakit.ground.randomness import generator
from miniature.settings import RunConfig, run_script

ROOT = Path(__file__).resolve().parents[1]


class AutoencoderConfig(RunConfig):
    """The keys of an autoencoder's training."""

    headings = RunConfig.headings | {
        "block_out_channels": "Model",
        "pictures": "Pictures",
        "kl_weight": "Loss",
    }

    block_out_channels: tuple[int, int, int, int] = Field(
        (16, 32, 96, 128), description="channels at 1, 1/2, 1/4 and 1/8 of the size"
    )
    latent_channels: int = Field(8, ge=1, description="channels of the latents; 4 in SD 1.5")
    layers_per_block: int = Field(
        1, ge=1, description="residual blocks per level of the encoder; the decoder has one more"
    )
    norm_num_groups: int = Field(8, ge=1, description="groups of the group norms")

    pictures: int = Field(
        6000, ge=1, description="renders to cut crops from, a quarter of them in held-out styles"
    )
    picture_size: int = Field(128, ge=32, multiple_of=32, description="pixels of their side")
    crop: int = Field(64, ge=16, multiple_of=8, description="pixels of a crop's side")
    photograph_share: float = Field(0.25, ge=0, le=1, description="share of crops that are of photographs")
    leaves_share: float = Field(0.125, ge=0, le=1, description="share of crops that are of dead leaves")

    kl_weight: float = Field(
        1e-4, ge=0, description="of the posterior's divergence from N(0, 1), mean over latent elements"
    )
    gradient_weight: float = Field(0.5, ge=0, description="of the error of differences between pixels")
    squared_weight: float = Field(7.5, ge=0, description="of the squared error, which PSNR is made of")


def train(cfg: AutoencoderConfig, hint: str) -> Path:
    """The run; returns the folder of the trained autoencoder.

    Raises:
        StoppedError: a signal came; a checkpoint was published.
    """
    import torch

    from miniature import autoencoder as ae
    from miniature import run as runs
    from miniature.export import save_part
    from miniature.landscapes import BASE_STYLES, HELD_OUT_STYLES
    from miniature.pictures import Table

    device = runs.set_up(cfg)
    vae = ae.make_autoencoder(
        cfg.block_out_channels,
        cfg.latent_channels,
        cfg.layers_per_block,
        cfg.norm_num_groups,
        cfg.picture_size,
        cfg.seed,
    ).to(device)
    with runs.Training(cfg, {"vae": vae}, hint).opened() as training:
        table = Table(cfg.seed, cfg.pictures, BASE_STYLES * 3 + HELD_OUT_STYLES, cfg.picture_size)
        shares = (cfg.photograph_share, cfg.leaves_share)
        crops = ae.Crops(table, Path(cfg.output_dir), cfg.render_workers, cfg.crop, cfg.seed, shares)
        judged = ae.held_out_pictures(cfg.picture_size, 8, ROOT)
        for step in training.steps():
            image = crops.batch(step, cfg.batch_size).to(device)  # (B, 3, crop, crop)
            source = generator(cfg.seed, "posterior", step)
            with runs.autocast(cfg, device):
                mean, logvar = vae.encode(image).latent_dist.parameters.float().chunk(2, dim=1)
                logvar = logvar.clamp(-30, 20)
                noise = torch.randn(mean.shape, generator=source).to(device)
                rebuilt = vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample
            kl = ae.kl_divergence(mean, logvar)
            loss = ae.reconstruction_loss(image, rebuilt, cfg.gradient_weight, cfg.squared_weight)
            loss = loss + cfg.kl_weight * kl
            training.take(loss, kl=float(kl.detach()))
            if training.is_validation:
                with training.average.applied():
                    figures = ae.judge(vae, judged)
                training.metrics.append({"step": training.done, "psnr": figures})
                told = "  ".join(f"{kind} {value:.1f}" for kind, value in figures.items())
                print(f"step {training.done:7d}  {told}", flush=True)
        with training.average.applied():
            images = torch.cat([judged[style] for style in BASE_STYLES])
            vae.register_to_config(scaling_factor=ae.latent_scale(vae, images))
            save_part(training.run / "vae", vae, torch.float16)  # what every later stage encodes with
    return training.run / "vae"


def main(argv: list[str]) -> int:
    purpose = "Train the miniature's autoencoder from nothing."
    return run_script(AutoencoderConfig, train, argv, "train_autoencoder", purpose)


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
