"""A base of Stable Diffusion 1.5's shape without its weights, at full width or a part of it."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SD15_UNET: dict[str, Any] = dict(
    sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
)
SD15_VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=4,
    sample_size=512,
)
SD15_TEXT: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    vocab_size=49408,
    bos_token_id=197,
    eos_token_id=198,
    pad_token_id=198,
)


def build_sd15(folder: Path, divisor: int = 1, side: int = 512, device: str = "cpu") -> None:
    """A base of Stable Diffusion 1.5's shape: random weights in half precision, the miniature's tokenizer.

    Args:
        divisor: what its widths are divided by; the U-Net's and the VAE's stay multiples of 32.
        side: pixels, its resolution.
        device: where weights are drawn; a GPU takes seconds of what a CPU takes.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def narrowed(channels: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(32, round(count / divisor / 32) * 32) for count in channels)

    unet: dict[str, Any] = SD15_UNET | {"sample_size": side // 8, "cross_attention_dim": text_width(divisor)}
    unet["block_out_channels"] = narrowed(unet["block_out_channels"])
    vae: dict[str, Any] = SD15_VAE | {
        "sample_size": side,
        "block_out_channels": narrowed(SD15_VAE["block_out_channels"]),
    }
    text: dict[str, Any] = SD15_TEXT | {
        "hidden_size": text_width(divisor),
        "intermediate_size": 4 * text_width(divisor),
    }
    tokenizer = CLIPTokenizer.from_pretrained(
        ROOT / "ckpt/miniature", subfolder="tokenizer", model_max_length=77
    )
    torch.manual_seed(0)
    with torch.device(device):
        models = {
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
            "unet": UNet2DConditionModel(**unet),
        }
    parts: dict[str, Any] = models | {
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.to(torch.float16).save_pretrained(folder)


def text_width(divisor: int) -> int:
    """Of SD 1.5's text divided by `divisor`, for twelve heads."""
    return max(12, round(SD15_TEXT["hidden_size"] / divisor / 12) * 12)
