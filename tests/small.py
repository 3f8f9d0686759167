"""What tests run on: a small Stable Diffusion, small pictures, a short training, a disk that fills up."""

import errno
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]

# A training of a few steps on the tiny base, without what only a user would look at.
SHORT_RUN: dict[str, Any] = dict(
    ckpt_name="run",
    resolution=16,
    aspect_ratio_buckets=False,
    rank=4,
    target_modules="attention",
    learning_rate=1e-2,
    lr_scheduler_name="constant",
    adam_beta1=0.9,
    adam_beta2=0.999,
    timestep_bias=0.0,
    n_epochs=None,
    checkpointing_steps=2,
    validation_timesteps=2,
    sample_steps=0,
    report_to=None,
)


def settings_of(**values: object) -> list[str]:
    """`key=value` for the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def processors(bytes_each: int) -> int:
    """Processors for this process, in its control group, with memory for each to work; 1 at least."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = Path("/sys/fs/cgroup/cpu.max")
    if share.exists() and not (words := share.read_text().split())[0].startswith("max"):
        count = min(count, round(int(words[0]) / int(words[1])))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(count, memory // bytes_each))


def run_forked(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run([python, PROGRAM, …]) in a child of this process, which has imported what takes long."""
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            sys.argv = command[1:]
            runpy.run_path(command[1], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else bool(end.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = ((file.seek(0), file.read())[1] for file in files)
    return subprocess.CompletedProcess(command, code, out, err)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(script: str, arguments: list[str]) -> list[str]:
    """The command line of two processes; at a port of their own, for other tests run beside this one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*launcher, "--master_port", str(free_port()), script, *arguments]


def short_morph(base: Path, pictures: Path, loras: Mapping[int, Path], count: int) -> dict[str, Any]:
    """A morph of a few frames through pictures of a folder; picture k has LoRA k, if there is one."""
    images = [
        {
            "path": str(pictures / f"{k}.png"),
            "prompt": f"a photo of mountains {k}",
            "lora": str(loras[k]) if k in loras else None,
        }
        for k in range(count)
    ]
    return dict(
        pretrained_model_name_or_path=str(base),
        images=images,
        train_if_missing=False,
        frames=5,
        num_inference_steps=6,
        inversion_method="ab2",
        probe_steps=3,
        probe_points=5,
        name="film",
        formats=[],
        min_side=16,
    )


def full_disk(monkeypatch: "pytest.MonkeyPatch", at: int) -> Callable[[], int]:
    """From here on the at-th fsync finds the disk full; returns how many there were."""
    count, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return lambda: count


def tiny_unet(seed: int = 0, **overrides: Any) -> Any:
    """A U-Net of SD 1.x's make: 8x8 latents, two levels, cross attention of width 16."""
    import torch
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = dict(
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


def tiny_text_encoder(seed: int = 0, **overrides: Any) -> Any:
    """A CLIP text encoder of width 16 with two layers; 77 tokens of a vocabulary of 100."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    settings: dict[str, Any] = dict(
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


def tiny_base(folder: Path) -> Path:
    """A whole base on disk, random and very small: 16-pixel pictures, VAE factor 2, 32 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    levels: dict[str, Any] = dict(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.5, **levels
        )
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "ckpt/miniature", subfolder="tokenizer")
    text_encoder = tiny_text_encoder(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: list[Any] = [vae, text_encoder, tokenizer, tiny_unet(), scheduler, None, None]
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def small_pictures(folder: Path) -> Path:
    """Four small pictures of three aspects with captions in metadata.jsonl."""
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    rng, lines = np.random.default_rng(0), []
    for number, size in enumerate([(24, 24), (40, 24), (24, 40), (24, 24)]):
        pixels = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        pixels.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a photo of mountains {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
