"""Train the miniature's U-Net and text encoder together, from noise (Ho et al. 2020; Rombach et al. 2022).

    python miniature/train_text_to_image.py miniature/cfg/text_to_image.json
    python miniature/train_text_to_image.py miniature/cfg/text_to_image.json resume_from_checkpoint=latest

Reads an autoencoder; renders and encodes what it lacks into <output_dir>. Writes the run folder
<output_dir>/<ckpt_name>/ with checkpoints, metrics and sample sheets, and at its end <run folder>/base, a
whole diffusers folder. Loss: min-SNR-5 weighted error of eps (Hang et al. 2023), captions dropped at times
for classifier-free guidance (Ho & Salimans 2022).
"""

import sys
from pathlib import Path

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorakit.ground.process import run_guarded
from miniature.settings import RunConfig, run_script


class TextToImageConfig(RunConfig):
    """The keys of a text-to-image training."""

    headings = RunConfig.headings | {
        "vae": "Model",
        "pictures": "Pictures",
        "snr_gamma": "Loss",
        "sample_guidance_scale": "Samples",
    }

    vae: str = Field("out/miniature/autoencoder/vae", min_length=1, description="folder of the autoencoder")
    block_out_channels: tuple[int, int, int] = Field((64, 128, 256), description="channels of the U-Net")
    layers_per_block: int = Field(1, ge=1, description="residual blocks per level on the way down")
    text_width: int = Field(128, ge=8, multiple_of=4, description="width of the text encoder")
    text_layers: int = Field(3, ge=1, description="layers of the text encoder")
    vocabulary: int = Field(320, ge=128, description="tokens at most")
    max_tokens: int = Field(32, ge=8, description="positions of the text encoder")

    pictures: int = Field(15000, ge=1, description="renders to train on, the three base styles by turns")
    picture_size: int = Field(128, ge=32, multiple_of=32, description="pixels of their side")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without a caption")
    details_share: float = Field(
        0.5, ge=0, le=1, description="share of captions that name sun, clouds, trees and house too"
    )

    snr_gamma: float = Field(5.0, gt=0, description="of the min-SNR weights")
    sample_guidance_scale: float = Field(3.0, ge=1, description="classifier-free guidance of samples")
    sample_inference_steps: int = Field(25, ge=1, le=1000, description="DDIM steps of samples")


def train(cfg: TextToImageConfig, hint: str) -> Path:
    """The run; returns the folder of the trained base.

    Raises:
        StoppedError: a signal came; a checkpoint was published.
    """
    import torch

    from lorakit.training.denoise import min_snr_weight
    from miniature import diffusion
    from miniature import run as runs
    from miniature.batches import Samples
    from miniature.export import save_base
    from miniature.judging import draw_samples, prompts_to_watch
    from miniature.pictures import base_table
    from miniature.text import make_text_encoder, train_tokenizer

    device = runs.set_up(cfg)
    vae = diffusion.load_vae(cfg.vae, device)
    tokenizer = train_tokenizer(cfg.vocabulary, cfg.max_tokens)
    text_encoder = make_text_encoder(tokenizer, cfg.text_width, cfg.text_layers, cfg.seed).to(device)
    channels, side = vae.config.latent_channels, cfg.picture_size // 8
    unet = diffusion.make_unet(
        cfg.block_out_channels, cfg.layers_per_block, channels, side, cfg.text_width, cfg.seed
    ).to(device)
    models = {"unet": unet, "text_encoder": text_encoder}
    with runs.Training(cfg, models, hint).opened() as training:
        table, cache = base_table(cfg.seed, cfg.pictures, cfg.picture_size), Path(cfg.output_dir)
        latents = diffusion.cached_latents(vae, table, cache, cfg.render_workers, device)
        samples = Samples(latents, diffusion.caption_ids(tokenizer, table), tokenizer, cfg)
        for step in training.steps():
            x_0, ids, timesteps, eps = samples.batch(step, cfg.batch_size, device)
            x_t = samples.schedule.add_noise(x_0, eps, timesteps)  # (B, C, h, w)
            with runs.autocast(cfg, device):
                embeds = text_encoder(ids)[0]  # (B, L, D)
                prediction = unet(x_t, timesteps.to(device), encoder_hidden_states=embeds).sample
            weight = min_snr_weight(samples.schedule.snr(timesteps), cfg.snr_gamma, "epsilon").to(x_t)
            loss = (((prediction.float() - eps) ** 2).mean(dim=(1, 2, 3)) * weight).mean()
            training.take(loss)
            if training.is_validation:
                with training.average.applied():
                    options = {
                        "steps": cfg.sample_inference_steps,
                        "guidance_scale": cfg.sample_guidance_scale,
                    }
                    draw_samples(
                        training.run / "samples" / f"{training.done:08d}.png",
                        (vae, unet, text_encoder, tokenizer),
                        prompts_to_watch(),
                        **options,
                    )
        with training.average.applied():
            save_base(training.run / "base", vae, unet, text_encoder, tokenizer, torch.float16)
    return training.run / "base"


def main(argv: list[str]) -> int:
    purpose = "Train the miniature's U-Net and text encoder from noise."
    return run_script(TextToImageConfig, train, argv, "train_text_to_image", purpose)


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
