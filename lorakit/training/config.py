"""The keys of a training config, and which of them may change when a run is resumed. No torch here."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.ground.config import Config
from lorakit.pictures.caption_rules import CaptionLines, MissingCaptions
from lorakit.pictures.masks import MaskKind
from lorakit.sampling.config import PromptSyntax
from lorakit.training.lcm_config import LcmSettings
from lorakit.training.motion_config import MotionSettings, check_motion_settings
from lorakit.training.objective_config import ObjectiveName, check_objectives, names_of
from lorakit.training.prior_config import PriorSettings
from lorakit.training.smooth_config import SmoothSettings
from lorakit.training.words_config import WordSettings, check_word_settings
from lorakit.weights.base_settings import BaseConfig, ClipSkip, PredictionType

Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


# fmt: off
class BaseLora(Config):
    """A LoRA that becomes part of the base."""

    path: str = Field(min_length=1, description="a LoRA file of any layout")
    weight: float = Field(1.0, description="factor on its update")


class TrainConfig(Config):
    """The keys of a training config. The flat names of the first block of each group are the tutorial's."""

    headings: ClassVar[dict[str, str]] = {
        "pretrained_model_name_or_path": "Base model and precision",
        "data_dir": "Pictures and captions",
        "init_lora": "Adapter",
        "objective": "Objective",
        "learning_rate": "Optimization",
        "output_dir": "Run, checkpoints and output",
        "validation_steps": "Watching",
    }

    pretrained_model_name_or_path: str = Field("ckpt/miniature", min_length=1, description="base model: diffusers folder, hub id or single .safetensors file")
    base_config: BaseConfig = None
    base_loras: tuple[BaseLora, ...] = Field((), description="LoRAs that are merged into the frozen base for this run; what is trained goes on top of them, and is to be used with them")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field("auto", description="compute dtype of the frozen base; auto: fp16 or bf16 if the launcher says so, else bf16 (or fp16) on a CUDA GPU and float32 elsewhere. LoRA weights are float32 always")
    prediction_type: PredictionType = None
    clip_skip: ClipSkip = None
    enable_xformers_memory_efficient_attention: bool = Field(False, description="xformers attention where it runs, else torch SDPA and one line that says so")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, about a third slower")
    allow_tf32: bool = Field(True, description="TF32 matrix products on NVIDIA GPUs")
    torch_compile: bool = Field(False, description="compile the U-Net: a slow start, then faster steps on a GPU")
    deterministic: bool = Field(False, description="bit-exact resume on a GPU too, by slower kernels (a CPU run is bit-exact always)")

    data_dir: str | None = Field(None, description="folder of pictures, with metadata.jsonl (file_name, text) or a .txt beside each picture, see caption_extension; or of WebDataset's tar files, or one of them")
    dataset_name: str | None = Field(None, description="instead of data_dir: a hub dataset, or a folder that datasets.load_dataset reads; its pictures stay on the disk until they are encoded")
    dataset_config_name: str | None = Field(None, description="configuration of that dataset")
    dataset_split: str = Field("train", description="split of that dataset, datasets' slicing allowed")
    image_column: str = Field("image", description="its column of pictures")
    caption_column: str | None = Field(None, description='column or key of captions; null: "text", or in a folder the only other key with text; in tar files of their .json, null: captions are .txt')
    resolution: int | None = Field(None, ge=8, description="pixels: side of the square, or square root of a bucket's area; null: the base's own")
    aspect_ratio_buckets: bool | None = Field(None, description="train each picture near its own aspect; false: square crops; null: on, but for a single picture that is square")
    crop: Literal["center", "random"] = Field("center", description="what of a picture is kept where it sticks out of its shape: the middle, or one of random_crops")
    random_crops: int = Field(8, ge=2, description="crops of a picture that are cached for crop random, its middle among them")
    random_flip: bool = Field(False, description="show half of the samples mirrored")
    repeats: Literal["kohya"] | dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] | None = Field(None, description='showings of a picture in an epoch: folder of data_dir -> number, or "kohya" for the numbers of folders such as 20_cat; null: 1')
    caption_extension: str = Field(".txt", pattern=r"^\.[A-Za-z0-9]+$", description='of the caption files beside the pictures; other programs write ".caption"')
    caption_lines: CaptionLines = Field(None, description='several lines, or a list in metadata.jsonl: "choice" shows one of them at a time, "join" makes one caption of lines and refuses a list; null: join, and say so')
    trigger_word: str | None = Field(None, min_length=1, pattern=r"\S", description='put at the beginning of each caption that does not hold it, or in place of its "[trigger]"')
    caption_shuffle: bool = Field(False, description="show the tags of a caption, which commas part, in one of caption_orders orders")
    keep_tokens: int = Field(0, ge=0, description="tags at the beginning that caption_shuffle leaves where they are")
    caption_orders: int = Field(16, ge=2, le=1000, description="orders of a caption that are cached for caption_shuffle, its own among them")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of samples shown without caption, for guidance")
    missing_captions: MissingCaptions = Field("error", description="a picture without caption: stop, leave it out, train it with an empty one, or with the name of its folder without a number")
    prompt_embeds: str | None = Field(None, min_length=1, description="file of text states that stand for every caption, but for an empty one, as edit.py fits them to a picture; null: captions are encoded")
    broken_images: Literal["error", "skip"] = Field("error", description="a picture that cannot be decoded: stop, or leave it out")
    allow_symlinks: bool = Field(False, description="follow links that lead out of data_dir")
    max_image_pixels: int = Field(64_000_000, gt=0, description="pixels: larger pictures are refused before they are decoded")
    max_aspect: float = Field(4.0, ge=1, description="longer side over shorter side beyond which a picture is refused")
    masked_loss: MaskKind | None = Field(None, description='weight the loss by a mask, white is trained: "beside": NAME-masklabel.png beside NAME.png, "alpha": what is opaque; null: all alike')
    unmasked_weight: float = Field(0.0, ge=0, lt=1, description="of the loss where a mask is black; a little keeps the surroundings from drifting")
    cache_dir: str | None = Field(None, description="cached latents and text states; null: <output_dir>/cache")
    cache_dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of cached latents and text states; float16 halves the disk")
    dataloader_num_workers: int = Field(0, ge=0, le=64, description="threads that decode pictures ahead while latents are cached, one at least; steps need none")

    init_lora: str | None = Field(None, min_length=1, description="LoRA file of any layout whose change the run starts with; rank, lora_alpha, target_modules and train_text_encoder are its own where they are not set")
    rank: int = Field(8, ge=1, le=1024, description="rank r of the update B A")
    lora_alpha: float | None = Field(None, gt=0, description="the update is scaled by lora_alpha / rank; null: rank, so by 1")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A")
    target_modules: Literal["attention", "attention+ff", "all", "temporal"] | tuple[str, ...] = Field("attention", description="preset, or names of the U-Net's modules, in which * stands for anything: attention projections; with feed-forward and projections; with convolutions; temporal: the projections of a motion adapter's attention, for the objective motion")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (Liu et al. 2024); needs save_format diffusers")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(rank) (Kalajdzievski 2023)")
    init_lora_weights: Literal["gaussian", "kaiming", "orthogonal"] = Field("gaussian", description="start of A (B starts at 0; orthogonal: both random with B A = 0, linear layers only)")
    train_text_encoder: bool = Field(False, description="a LoRA in the text encoder too; its states are then not cached")
    text_encoder_learning_rate: float | None = Field(None, gt=0, description="null: learning_rate")
    loraplus_lr_ratio: float = Field(1.0, gt=0, description="B learns so many times as fast as A: LoRA+ (Hayou et al. 2024), whose authors take 16 with a lower learning_rate")

    objective: ObjectiveName | tuple[ObjectiveName, ...] = Field("denoise", description="what the LoRA learns; a list: several at once, in one pass")
    prior: PriorSettings | None = Field(None, description="of the objective prior, which keeps the rest as it is while a subject is learnt: weight, every; prompts, or prompt_file and subject; or class_data_dir, class_prompt, class_images")
    smooth: SmoothSettings | None = Field(None, description="of the objective smooth, by which pictures move evenly with their noise, for morphs and inversion: weight, decay")
    textual_inversion: WordSettings | None = Field(None, description="of the objective textual_inversion, which learns new words, alone or with a LoRA: words, vectors, learning_rate, bundle")
    lcm: LcmSettings | None = Field(None, description="of the objective lcm, sampling in few steps: guidance_scale, solver_steps, huber, num_inference_steps, teacher_loras")
    motion: MotionSettings | None = Field(None, description="of the objective motion, a LoRA on a motion adapter's attention, for films: motion_adapter, camera or clips_dir, frames, frame_stride, takes, enlarge, carried, most_weight, beta_schedule")
    timestep_bias: float = Field(0.0, gt=-1, le=8, description="the density of timesteps goes by this power of them: 0 draws all alike, 2 dwells on the noisy ones, where the layout of a picture is decided, below 0 on those of its texture")
    noise_offset: float = Field(0.0, ge=0, description="constant per channel added to the noise, for very dark or bright pictures; biases exact reconstruction")
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting (Hang et al. 2023), 5 in the paper; null: off")

    learning_rate: float = Field(1e-4, ge=0, description="of the U-Net's LoRA")
    n_epochs: int | None = Field(None, ge=1, description="how often each picture is seen, whatever the number of processes")
    max_train_steps: int | None = Field(None, ge=1, description="optimizer steps at most; with n_epochs, whichever ends first")
    train_batch_size: int = Field(1, ge=1, description="samples per process and micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches per step")
    total_batch_size: int | None = Field(None, ge=1, description="samples per step over all processes; sets gradient_accumulation_steps; null: batch x accumulation x processes")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = Field("adamw", description="adamw8bit needs bitsandbytes, prodigy needs prodigyopt (and learning_rate 1)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the gradient's square")
    adam_weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient's norm; null: off")
    lr_scheduler_name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"] = Field("constant", description="course of the learning rate")
    lr_warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises from 0 (every schedule but piecewise_constant)")
    lr_num_cycles: int = Field(1, ge=1, description="restarts of cosine_with_restarts")
    lr_power: float = Field(1.0, gt=0, description="exponent of polynomial")
    lr_step_rules: str | None = Field(None, pattern=r"^([0-9]*\.?[0-9]+(e-?[0-9]+)?:[0-9]+,)*[0-9]*\.?[0-9]+(e-?[0-9]+)?$", description='piecewise_constant: "1:100,0.1:200,0.01" multiplies by 1 up to step 100, by 0.1 up to 200, then by 0.01')

    output_dir: str = Field("ckpt", description="where the LoRA file and the run folder go")
    ckpt_name: str = Field("lora", pattern=r"^[^/\\\x00]+$", description="name of both")
    save_format: Literal["kohya", "diffusers", "both"] = Field("kohya", description="kohya is read by diffusers, ComfyUI and A1111, diffusers is for DoRA and motion; both adds <ckpt_name>_diffusers.safetensors")
    save_dtype: Literal["float32", "fp16", "bf16"] = Field("float32", description="dtype in the file; float32 is exact, fp16 half as large")
    final_weights: Literal["last", "best"] = Field("last", description="what the LoRA file holds at the end: the last step, or the one of lowest validation loss")
    checkpointing_steps: int = Field(500, ge=1, description="steps between resumable checkpoints; there is one at the end too")
    checkpoints_total_limit: int = Field(3, ge=1, description="checkpoints kept")
    resume_from_checkpoint: bool | str = Field(False, description='true or "latest", or the path of a checkpoint folder')
    overwrite: bool = Field(False, description="replace an earlier run of the same name")
    allow_data_change: bool = Field(False, description="resume although pictures or captions changed")
    seed: int = Field(0, ge=0, lt=2**63, description="every random number of the run follows from it")

    validation_steps: int | None = Field(None, ge=0, description="steps between validation losses; null: ten over the run, 0: none")
    validation_data_dir: str | None = Field(None, description="pictures for it that are not trained on; null: the training pictures")
    validation_timesteps: int = Field(8, ge=1, description="fixed timesteps per picture")
    validation_images: int = Field(16, ge=1, description="pictures used at most")
    early_stop_patience: int | None = Field(None, ge=1, description="stop after so many validations without improvement; null: never")
    sample_steps: int | None = Field(None, ge=0, description="steps between sample sheets; null: four over the run, 0: none")
    sample_prompts: tuple[str, ...] | None = Field(None, description="null: the first two captions")
    prompt_syntax: PromptSyntax = Field("plain", description="how sample_prompts are read, captions are read as they stand; a1111: (word:1.2), [word], BREAK and learnt words count, and long prompts are read in chunks")
    embedding_dirs: tuple[str, ...] = Field((), description="folders of words learnt by textual inversion, for sample_prompts with prompt_syntax a1111")
    sample_seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="one picture per prompt and seed")
    sample_inference_steps: int = Field(25, ge=1, le=1000, description="DDIM steps of a sample")
    sample_guidance_scale: float = Field(7.5, ge=1, description="classifier-free guidance of a sample")
    logging_steps: int = Field(10, ge=1, description="steps between looks at the loss; every step is written to metrics.jsonl")
    report_to: Tracker | tuple[Tracker, ...] | None = Field("tensorboard", description="where else the metrics go; null: to metrics.jsonl alone, which is written always")
    log_dir: str = Field("log", description="where trackers write")

    @model_validator(mode="after")
    def _agree(self):
        has_clips = self.motion is not None and self.motion.clips_dir is not None
        if not has_clips and (self.data_dir is None) == (self.dataset_name is None):
            raise ValueError("data_dir, dataset_name: set exactly one of the two")
        if self.n_epochs is None and self.max_train_steps is None:
            raise ValueError("n_epochs, max_train_steps: set at least one of the two")
        if self.use_dora and self.save_format != "diffusers":
            raise ValueError('use_dora, save_format: DoRA has no kohya layout that all readers agree on; set save_format to "diffusers"')
        if self.init_lora_weights == "orthogonal" and (self.rank % 2 or self.target_modules == "all"):
            raise ValueError("init_lora_weights, rank, target_modules: orthogonal needs an even rank and linear layers only")
        if self.init_lora and self.init_lora_weights == "orthogonal":
            raise ValueError("init_lora, init_lora_weights: orthogonal starts with both halves filled, where those of init_lora belong")
        if (self.lr_step_rules is None) == (self.lr_scheduler_name == "piecewise_constant"):
            raise ValueError("lr_step_rules, lr_scheduler_name: piecewise_constant needs lr_step_rules, and only it takes them")
        if self.lr_warmup_steps and self.lr_scheduler_name in ("constant", "piecewise_constant"):
            raise ValueError(f'lr_warmup_steps, lr_scheduler_name: "{self.lr_scheduler_name}" has no warm-up; take "constant_with_warmup"')
        if self.lr_scheduler_name == "polynomial" and self.learning_rate <= 1e-7:
            raise ValueError("lr_scheduler_name, learning_rate: polynomial ends at 1e-7, so learning_rate must be larger")
        if self.optimizer == "prodigy" and self.text_encoder_learning_rate not in (None, self.learning_rate):
            raise ValueError("optimizer, text_encoder_learning_rate: prodigy finds one rate for all; leave text_encoder_learning_rate out")
        if self.optimizer == "prodigy" and self.loraplus_lr_ratio != 1:
            raise ValueError("optimizer, loraplus_lr_ratio: prodigy finds one rate for all; leave loraplus_lr_ratio out")
        if self.text_encoder_learning_rate and not self.train_text_encoder:
            raise ValueError("text_encoder_learning_rate, train_text_encoder: the rate is of use only with train_text_encoder")
        if self.total_batch_size and self.gradient_accumulation_steps > 1:
            raise ValueError("total_batch_size, gradient_accumulation_steps: set one of the two, the other follows")
        if self.validation_steps == 0 and (self.early_stop_patience or self.final_weights == "best"):
            raise ValueError("validation_steps, early_stop_patience, final_weights: without validation nothing is best")
        if self.unmasked_weight and not self.masked_loss:
            raise ValueError("unmasked_weight, masked_loss: there are no masks without masked_loss")
        if self.masked_loss and "denoise" not in names_of(self.objective):
            raise ValueError("masked_loss, objective: masks weight the loss of denoise, which objective does not name")
        if self.masked_loss == "beside" and self.data_dir is None:
            raise ValueError("masked_loss, dataset_name: masks lie beside the pictures of data_dir")
        if self.keep_tokens and not self.caption_shuffle:
            raise ValueError("keep_tokens, caption_shuffle: tags are kept in place only where caption_shuffle moves the others")
        if self.repeats is not None and self.data_dir is None:
            raise ValueError("repeats, dataset_name: repeats go by the folders of data_dir")
        if self.prompt_embeds and (self.train_text_encoder or self.textual_inversion):
            raise ValueError("prompt_embeds, train_text_encoder, textual_inversion: text states that are given leave nothing of the text encoder to train")
        if self.resume_from_checkpoint and self.overwrite:
            raise ValueError("resume_from_checkpoint, overwrite: continue the run or replace it, not both")
        if self.embedding_dirs and self.prompt_syntax == "plain":
            raise ValueError('embedding_dirs, prompt_syntax: learnt words are read with prompt_syntax "a1111"')
        check_objectives(self)
        check_word_settings(self)
        check_motion_settings(self)
        return self


# What may change when a run is resumed. The rest is fixed: it would make another run of it.
APPLIED = {"learning_rate", "text_encoder_learning_rate", "lr_scheduler_name", "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_step_rules", "n_epochs", "max_train_steps", "adam_weight_decay", "max_grad_norm"}
FREE = {
    "caption_extension", "caption_lines", "init_lora", "base_loras", "prompt_embeds",
    "train_batch_size", "gradient_accumulation_steps", "total_batch_size", "mixed_precision", "enable_xformers_memory_efficient_attention",
    "gradient_checkpointing", "allow_tf32", "torch_compile", "deterministic", "data_dir", "missing_captions", "broken_images", "allow_symlinks",
    "max_image_pixels", "max_aspect", "cache_dir", "dataloader_num_workers", "dataset_name", "dataset_config_name", "dataset_split",
    "image_column", "caption_column", "output_dir", "ckpt_name", "save_format", "save_dtype", "final_weights", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "overwrite", "allow_data_change", "validation_steps", "validation_data_dir",
    "validation_timesteps", "validation_images", "early_stop_patience", "sample_steps", "sample_prompts", "sample_seeds", "sample_inference_steps",
    "prompt_syntax", "embedding_dirs",
    "sample_guidance_scale", "logging_steps", "report_to", "log_dir",
}
# fmt: on
FIXED = set(TrainConfig.model_fields) - APPLIED - FREE
