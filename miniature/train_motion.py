"""Train a motion module for the miniature on its frozen base (AnimateDiff, Guo et al. 2024).

    python miniature/train_motion.py miniature/cfg/motion.json
    python miniature/train_motion.py miniature/cfg/motion.json resume_from_checkpoint=latest

Reads a base; renders and encodes clips into <output_dir>. Writes the run folder <output_dir>/<ckpt_name>/,
and at every validation and at its end <run folder>/motion, a MotionAdapter for animate.py. The noise of a
share of the clips lies in their scene and is seen through their own camera, that of the rest is independent.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorakit.ground.process import run_guarded
from miniature.settings import RunConfig, run_script


class MotionConfig(RunConfig):
    """The keys of a motion module's training."""

    headings = RunConfig.headings | {"base": "Model", "pictures": "Clips", "most_weight": "Loss"}

    base: str = Field("ckpt/miniature", min_length=1, description="folder of the base, which stays as it is")
    heads: int = Field(4, ge=1, description="of the temporal attention")
    positions: int = Field(16, ge=2, description="the most frames that it can look along")

    pictures: int = Field(1500, ge=1, description="clips, of as many scenes, the three base styles by turns")
    picture_size: int = Field(128, ge=32, multiple_of=32, description="pixels of a frame's side")
    frames: int = Field(8, ge=2, description="frames of a clip")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without a caption")
    carried: float = Field(
        0.5, ge=0, le=1, description="share of samples whose noise lies in the scene, by half of it or more"
    )

    most_weight: float = Field(5.0, ge=1, description="of (SNR + 1) / SNR, which weights the loss")


def motion_settings(unet: Any, cfg: MotionConfig) -> dict[str, Any]:
    """The config of the MotionAdapter that fits a U-Net."""
    return {
        "block_out_channels": list(unet.config.block_out_channels),
        "motion_layers_per_block": unet.config.layers_per_block,
        "motion_num_attention_heads": cfg.heads,
        "motion_norm_num_groups": unet.config.norm_num_groups,
        "motion_max_seq_length": cfg.positions,
        "use_motion_mid_block": False,
    }


def make_motion_unet(unet: Any, settings: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """The U-Net with a module that has no effect yet, and the module: its parameters alone are trained."""
    import torch
    from diffusers import MotionAdapter, UNetMotionModel
    from torch import nn

    from lorakit.ground.randomness import derive_seed

    torch.manual_seed(derive_seed(seed, "motion/weights"))
    adapter: Any = MotionAdapter(**settings)
    model: Any = UNetMotionModel.from_unet2d(unet, adapter)
    model.to(memory_format=torch.channels_last).requires_grad_(False)
    module, names = nn.Module(), ("down_blocks", "up_blocks")
    for name in names:
        blocks = nn.ModuleList()
        for block in getattr(model, name):
            holder = nn.Module()
            holder.motion_modules = block.motion_modules
            blocks.append(holder)
        setattr(module, name, blocks)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(True)
        if "proj_out" in name:
            nn.init.zeros_(parameter)
    return model, module


def train(cfg: MotionConfig, hint: str) -> Path:
    """The run; returns the folder of the trained adapter.

    Raises:
        StoppedError: a signal came; a checkpoint was published.
    """
    import torch
    from diffusers import MotionAdapter

    from lorakit.diffusion.models import Base
    from lorakit.weights.base import inspect_base
    from miniature import run as runs
    from miniature.batches import ClipSamples
    from miniature.clips import Clips, cached_clips
    from miniature.export import save_part
    from miniature.pictures import base_table

    device = runs.set_up(cfg)
    base = Base(inspect_base(cfg.base), device)
    settings = motion_settings(base.unet, cfg)
    unet, module = make_motion_unet(base.unet, settings, cfg.seed)
    base.drop("unet")
    with runs.Training(cfg, {"motion": module}, hint).opened() as training:
        clips = Clips(base_table(cfg.seed, cfg.pictures, cfg.picture_size), cfg.frames)
        latents = cached_clips(base.vae, clips, Path(cfg.output_dir), device)
        samples = ClipSamples(latents, clips, base.tokenizer, cfg)
        for step in training.steps():
            x_0, ids, timesteps, eps = samples.batch(step, cfg.batch_size, device)  # (B, F, C, h, w)
            x_t = samples.schedule.add_noise(x_0, eps, timesteps).transpose(1, 2)  # (B, C, F, h, w)
            with runs.autocast(cfg, device):
                with torch.no_grad():
                    embeds = base.text_encoder(ids)[0].repeat_interleave(cfg.frames, 0)  # (B F, L, D)
                prediction = unet(x_t, timesteps.to(device), embeds, return_dict=False)[0].transpose(1, 2)
            snr = samples.schedule.snr(timesteps)
            weight = ((snr + 1) / snr).clamp(max=cfg.most_weight).to(x_t)
            loss = (((prediction.float() - eps) ** 2).mean(dim=(1, 2, 3, 4)) * weight).mean()
            training.take(loss)
            if training.is_validation:
                with training.average.applied():
                    adapter: Any = MotionAdapter(**settings)
                    adapter.load_state_dict(module.state_dict())
                    save_part(training.run / "motion", adapter, torch.float16)
    return training.run / "motion"


def main(argv: list[str]) -> int:
    purpose = "Train a motion module for the miniature."
    return run_script(MotionConfig, train, argv, "train_motion", purpose)


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
