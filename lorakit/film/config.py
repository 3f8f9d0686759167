"""The keys of a morph's config. No torch here."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.diffusion.inversion_plan import Solver
from lorakit.ground.config import Config
from lorakit.sampling.config import PromptSyntax
from lorakit.weights.base_settings import BaseConfig, ClipSkip, PredictionType


# fmt: off
class Picture(Config):
    """One picture of the film."""

    path: str = Field(min_length=1, description="the picture")
    prompt: str = Field("", description="what it shows, in the words that its LoRA was trained with")
    lora: str | None = Field(None, description="a LoRA fitted to this picture; null: none")
    lora_weight: float = Field(1.0, description="factor on that LoRA's update")


class MorphConfig(Config):
    """The keys of a morph's config."""

    headings: ClassVar[dict[str, str]] = {
        "pretrained_model_name_or_path": "Base model and precision",
        "images": "Pictures",
        "num_inference_steps": "Inversion and sampling",
        "attention": "Between the pictures",
        "reschedule": "Speed",
        "output_dir": "Output",
    }

    pretrained_model_name_or_path: str = Field("ckpt/miniature", min_length=1, description="base model: diffusers folder, hub id or single .safetensors file")
    base_config: BaseConfig = None
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field("auto", description="dtype of U-Net and text encoder; auto: fp16 on a CUDA GPU, float32 elsewhere. The VAE and all latents are float32")
    prediction_type: PredictionType = None
    clip_skip: ClipSkip = None

    images: tuple[Picture, ...] = Field(min_length=2, description="the pictures in the order of the film")
    loop: bool = Field(False, description="from the last picture back to the first")
    frames: int = Field(16, ge=2, le=10_000, description="frames from one picture to the next, both included")
    width: int | None = Field(None, ge=16, description="pixels; null: the base's own resolution, as in training of one picture")
    height: int | None = Field(None, ge=16, description="pixels; null: the base's own resolution")
    prompt_syntax: PromptSyntax = "plain"
    embedding_dirs: tuple[str, ...] = Field((), description="folders of words learnt by textual inversion, which stand in prompts; needs prompt_syntax a1111")
    negative_prompt: str = Field("", description="of no effect at guidance 1")
    anchor_prompt: str | None = Field(None, description="what the middle shows: prompts bend towards it and leave the ends alone; null: straight from prompt to prompt")
    train_if_missing: bool = Field(False, description="fit the LoRAs that do not exist yet, by train_lora.py with fit_config")
    fit_config: str = Field("cfg/morph/fit.json", description="training config for it")

    solver: Solver = Field("ddim", description="of sampling; ab2: two-step Adams-Bashforth, whose 20 steps are nearly 50 of ddim")
    num_inference_steps: int = Field(50, ge=2, le=999, description="steps, of inversion and sampling alike")
    guidance_scale: float = Field(1.0, ge=1, description="classifier-free guidance of sampling; above 1 doubles the work")
    inversion_method: Literal["ddim", "ab2", "fixed_point"] = Field("ddim", description="ab2 of second order, at no more evaluations; fixed_point finds noise from which sampling comes back by itself, at several times the evaluations")
    fixed_point_iterations: int = Field(3, ge=1, le=20, description="of fixed_point, at most, in each step")
    inversion_guidance_scale: float = Field(1.0, ge=1, description="guidance of the inversion; DiffMorpher has 1")
    anchor: bool = Field(True, description="keep the pictures on their inverted paths, so that the film ends on them exactly")
    residual_power: float = Field(2.0, ge=1, le=8, description="p of (1 - alpha)^p, by which a picture's correction fades with the distance from it")

    attention: Literal["kv", "outer", "fused_outer", "off"] = Field("kv", description="how frames look at the pictures: mixed keys and values; mixed outputs; mixed outputs with own keys and values beside; not at all")
    attention_share: float = Field(0.6, ge=0, le=1, description="lambda: share of the steps, from the noisy end, in which they do")
    attention_blocks: tuple[Literal["down", "mid", "up"], ...] = Field(("up",), min_length=1, description="parts of the U-Net in which they do")
    adain: bool = Field(True, description="noise of the frames with interpolated mean and deviation")

    reschedule: Literal["probe", "full", "select", "off"] = Field("probe", description="even speed: by a coarse look first; by that and a full pass; by rendering twice as many frames and choosing; or alphas as they come")
    probe_points: int = Field(9, ge=3, le=65, description="positions that the probe looks at between two pictures, both included")
    probe_steps: int = Field(13, ge=2, description="its DDIM steps, at most")
    easing: Literal["linear", "cosine", "sine"] = Field("linear", description="speed between two pictures: even; slow near them; slow in the middle")
    distance: Literal["vae", "lpips"] = Field("vae", description="what measures change: features of the VAE's encoder, or LPIPS (pip install lpips, and its weights)")

    batch_size: int = Field(8, ge=1, description="frames in one pass of the U-Net; halved by itself where memory runs out")
    output_dir: str = Field("out/morph", description="where the folder of the morph goes")
    name: str = Field("morph", pattern=r"^[^/\\\x00]+$", description="name of that folder")
    cache_dir: str | None = Field(None, description="inverted paths by content; null: <output_dir>/cache")
    formats: tuple[Literal["gif", "webp", "apng", "mp4"], ...] = Field(("gif", "webp"), description="animations besides the PNG frames; mp4 needs imageio-ffmpeg or av")
    fps: float = Field(8.0, gt=0, le=60, description="frames a second")
    hold_ms: int = Field(600, ge=0, le=60_000, description="milliseconds that the first and last frame stay longer")
    pingpong: bool = Field(False, description="play back to the first picture, so that the animation has no jump")
    min_side: int = Field(256, ge=1, le=4096, description="pixels: smaller frames are enlarged in animations (never in frames/)")
    compare: bool = Field(False, description="make the same morph without LoRA, and show both side by side")
    overwrite: bool = Field(False, description="replace another morph in the same folder")

    @model_validator(mode="after")
    def _agree(self):
        if self.name in (".", "..", "cache"):
            raise ValueError(f'name "{self.name}": names a folder that is in use; choose another')
        if self.compare and not any(picture.lora for picture in self.images):
            raise ValueError("compare, images: no picture has a LoRA, so there is nothing to compare")
        if self.embedding_dirs and self.prompt_syntax == "plain":
            raise ValueError('embedding_dirs, prompt_syntax: learnt words are read with prompt_syntax "a1111"')
        if self.inversion_method == "fixed_point" and self.solver != "ddim":
            raise ValueError('inversion_method, solver: fixed_point seeks the noise from which ddim comes back; set solver=ddim')
        return self
# fmt: on

    def texts(self) -> list[str]:
        """Every prompt."""
        return [*(picture.prompt for picture in self.images), self.negative_prompt, self.anchor_prompt or ""]

    def loras(self) -> list[str]:
        """Their files, each once."""
        return list(dict.fromkeys(picture.lora for picture in self.images if picture.lora))
