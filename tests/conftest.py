import os

# Before torch is imported, here and in the processes that tests start. Threads that wait for a busy core cost
# far more than they save on small models; one thread gives the same bits everywhere, and lets tests fork.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_unet():
    """Factory of a U-Net of SD 1.x's make: 8x8 latents, two levels, cross attention of width 16."""
    import torch
    from diffusers import UNet2DConditionModel

    def make(seed=0, **overrides):
        settings = dict(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return UNet2DConditionModel(**(settings | overrides)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_text_encoder():
    """Factory of a CLIP text encoder of width 16 with two layers; 77 tokens of a vocabulary of 100."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    def make(seed=0, **overrides):
        settings = dict(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=98,
            eos_token_id=99,
            pad_token_id=99,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CLIPTextModel(CLIPTextConfig(**(settings | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_base(tiny_unet, tiny_text_encoder, tmp_path_factory) -> Path:
    """A whole base on disk, random and very small: 16-pixel pictures, VAE factor 2, 32 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.5,
        )
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "ckpt/miniature", subfolder="tokenizer")
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipe = StableDiffusionPipeline(
        vae,
        tiny_text_encoder(**text),
        tokenizer,
        tiny_unet(),
        DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        None,
        None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("base") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_lora():
    """Factory of a LoRA file for a model, as if trained from a start of its own: far from every other one."""
    import copy

    import torch

    from lorakit.lora import add_lora, extract
    from lorakit.lora_file import LoraFile

    def make(model, seed, component="unet", **options):
        model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        for parameter in add_lora(
            model, **({"rank": 4, "alpha": 2.0, "targets": "all", "seed": seed} | options)
        ):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        return LoraFile(extract(model, component), {}, "diffusers")

    return make


@pytest.fixture(scope="session")
def adapted_unet(tiny_unet, random_lora):
    """Factory of a tiny U-Net with LoRAs a, b, … loaded and active, and of the files they are from."""
    from lorakit.lora import load_lora

    def make(count=2, seed=0, unet=None, **options):
        unet = unet or tiny_unet(seed)
        files = [random_lora(unet, 100 + i, **options) for i in range(count)]
        for name, file in zip("abc", files, strict=False):
            load_lora(file, unet, adapter_name=name)
        return unet, files

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Four small pictures of three aspects with captions in metadata.jsonl."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate([(24, 24), (40, 24), (24, 40), (24, 24)]):
        pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        name = f"{number}.png"
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"a photo of mountains {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def every_number_is_a_number():
    """A script flushes denormals for its whole process; the next test starts without that, as any process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps precision in a global; each test starts without one."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


@pytest.fixture
def settings(tiny_base, pictures, tmp_path):
    """Factory of the command line of a short run on the tiny base: `settings(max_train_steps=4, rank=2)`."""

    def make(**changes) -> list[str]:
        keys = dict(
            pretrained_model_name_or_path=str(tiny_base),
            data_dir=str(pictures),
            output_dir=str(tmp_path / "ckpt"),
            log_dir=str(tmp_path / "log"),
            cache_dir=str(tmp_path / "cache"),
            ckpt_name="run",
            resolution=16,
            aspect_ratio_buckets=False,
            rank=4,
            target_modules="attention",
            learning_rate=1e-2,
            n_epochs=None,
            max_train_steps=6,
            checkpointing_steps=2,
            validation_steps=3,
            validation_timesteps=2,
            sample_steps=0,
            report_to=None,
            logging_steps=2,
        )
        return [f"{key}={json.dumps(value)}" for key, value in (keys | changes).items()]

    return make


@pytest.fixture
def trained(settings):
    """Factory that runs train_lora.main on the tiny base in this process and returns its LoRA file's path."""
    import train_lora

    def run(**changes) -> Path:
        arguments = settings(**changes)
        assert train_lora.main(arguments) == 0
        values = dict(argument.split("=", 1) for argument in arguments)
        return Path(json.loads(values["output_dir"])) / f"{json.loads(values['ckpt_name'])}.safetensors"

    return run


@pytest.fixture(scope="session")
def fitted(tiny_base, random_lora, tmp_path_factory) -> list[Path]:
    """Three LoRA files for the tiny base, far from each other."""
    from diffusers import UNet2DConditionModel

    from lorakit.lora_file import lora_bytes

    folder = tmp_path_factory.mktemp("fitted")
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    paths = [folder / f"fit_{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        modules = random_lora(unet, 100 + number, targets="attention").modules
        path.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    return paths


@pytest.fixture
def morph_settings(tiny_base, pictures, fitted, tmp_path):
    """Factory of morph.py's command line for a short film on the tiny base: `morph_settings(frames=4)`.

    Picture k has LoRA k of `fitted`; `count` says how many pictures, `loras` which of them have one.
    """

    def make(count: int = 2, loras: tuple[bool, ...] = (True, True, True), **changes) -> list[str]:
        images = [
            {
                "path": str(pictures / f"{k}.png"),
                "prompt": f"a photo of mountains {k}",
                "lora": str(fitted[k]) if loras[k] else None,
            }
            for k in range(count)
        ]
        keys = dict(
            pretrained_model_name_or_path=str(tiny_base),
            images=images,
            train_if_missing=False,
            frames=5,
            num_inference_steps=6,
            probe_steps=3,
            probe_points=5,
            output_dir=str(tmp_path / "out"),
            name="film",
            formats=[],
            min_side=16,
        )
        return [f"{key}={json.dumps(value)}" for key, value in (keys | changes).items()]

    return make


@pytest.fixture
def morphed(morph_settings):
    """Factory that runs morph.main on the tiny base in this process; returns its folder and its report."""
    import morph

    def run(**changes) -> tuple[Path, dict]:
        arguments = morph_settings(**changes)
        assert morph.main(arguments) == 0
        values = {key: json.loads(value) for key, _, value in (each.partition("=") for each in arguments)}
        folder = Path(values["output_dir"]) / values["name"]
        return folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))

    return run
