"""The measurements behind the gates; evaluate.py puts them into a table."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.diffusion.inversion import invert, sample
from lorakit.diffusion.lora import load_lora
from lorakit.diffusion.metrics import EncoderDistance
from lorakit.diffusion.models import Base
from lorakit.ground.randomness import normal
from lorakit.pictures.edges import canny, edge_f1, hint_picture
from lorakit.pictures.images import read_picture
from lorakit.weights.base import inspect_base
from miniature.autoencoder import HELD_OUT_PHOTOGRAPHS, held_out_pictures, judge, psnr, to_tensor
from miniature.classifier import HEADS, Classifier, accuracy, frechet_distance, labels_of
from miniature.control import steering
from miniature.diffusion import decode, sample_latents
from miniature.judging import Parts, embed, sample_pictures, sharpness, texture, texture_distance
from miniature.landscapes import BASE_STYLES, render
from miniature.pictures import judging_scene

ROOT = Path(__file__).resolve().parents[1]


def parts_of(base: Base) -> Parts:
    return base.vae, base.unet, base.text_encoder, base.tokenizer


def autoencoder_figures(base: Base, size: int, per_style: int) -> dict[str, float]:
    """PSNR of the round trip in dB, by kind of picture."""
    return judge(base.vae, held_out_pictures(size, per_style, ROOT))


def judged_renders(
    count: int, size: int, first: int, combinations: bool = False
) -> tuple[Tensor, Tensor, list[str]]:
    """Renders that no training saw, in the base styles by turns; their labels (B, heads) and captions."""
    images, labels, captions = [], [], []
    for index in range(count):
        style = BASE_STYLES[index % len(BASE_STYLES)]
        scene = judging_scene(first + index, style, combinations)
        images.append(np.asarray(render(scene, style, size)))
        labels.append(labels_of(scene, style))
        captions.append(scene.caption(style))
    return to_tensor(images), torch.tensor(labels), captions


def text_figures(
    base: Base, judge_model: Classifier, counts: tuple[int, int], size: int, guidance_scale: float, steps: int
) -> dict[str, Any]:
    """Accuracy of samples by attribute (known and held-out combinations, no prompts), and fidelity.

    `frechet` compares samples with renders of the same captions, `frechet_renders` those with other renders;
    `texture` likewise, over that of those renders, and `sharpness` as a share of theirs. `*_blurred` are of
    the samples after a blur that prompts survive.
    """
    options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
    known, labels, captions = judged_renders(counts[0], size, 0)
    samples = sample_pictures(parts_of(base), captions, range(len(captions)), **options)
    _, rare_labels, rare_captions = judged_renders(counts[1], size, 0, combinations=True)
    rare = sample_pictures(parts_of(base), rare_captions, range(len(rare_captions)), **options)
    blind = sample_pictures(
        parts_of(base), [""] * len(rare_captions), range(len(rare_captions)), steps=steps, guidance_scale=1.0
    )
    others, other_labels, _ = judged_renders(counts[0], size, 1_000_000)
    blurred = F.interpolate(F.avg_pool2d(samples, 2), scale_factor=2, mode="bilinear")
    distance = EncoderDistance(base)
    true = texture(distance, known)
    unit = texture_distance(texture(distance, others), true)
    return {
        "classifier": accuracy(judge_model, torch.cat([known, others]), torch.cat([labels, other_labels])),
        "known": accuracy(judge_model, samples, labels),
        "held_out": accuracy(judge_model, rare, rare_labels),
        "without_prompt": accuracy(judge_model, blind, rare_labels),
        "chance": {name: 1 / len(known) for name, known in HEADS.items()},
        "frechet": frechet_distance(judge_model, samples, known),
        "frechet_renders": frechet_distance(judge_model, others, known),
        "texture": texture_distance(texture(distance, samples), true) / unit,
        "texture_blurred": texture_distance(texture(distance, blurred), true) / unit,
        "sharpness": sharpness(samples) / sharpness(known),
        "sharpness_blurred": sharpness(blurred) / sharpness(known),
        "known_blurred": accuracy(judge_model, blurred, labels),
    }


def photographs(size: int) -> tuple[Tensor, list[str]]:
    """The mountain pair of the demo, whole, and their captions."""
    images, captions = [], []
    for name in HELD_OUT_PHOTOGRAPHS:
        image = read_picture(ROOT / name, (size, size))
        images.append(np.asarray(image))
        line = (ROOT / name).with_name("metadata.jsonl").read_text(encoding="utf-8").splitlines()[0]
        captions.append(json.loads(line)["text"])
    return to_tensor(images), captions


def photograph_views(size: int) -> tuple[Tensor, list[str]]:
    """Each of the pair whole and in quarters, (10, 3, size, size) in [-1, 1], and their captions."""
    pictures, captions = photographs(2 * size)
    halves = (slice(size), slice(size, None))
    quarters = torch.cat([pictures[..., y, x] for y in halves for x in halves])
    whole, _ = photographs(size)
    return torch.cat([whole, quarters]), captions * 5


@torch.no_grad()
def inversion_psnr(base: Base, images: Tensor, captions: list[str], steps: int = 50) -> Tensor:
    """Of DDIM inversion and reconstruction at guidance 1, against the VAE round trip, dB (B,)."""
    embeds = embed(base.text_encoder, base.tokenizer, captions)
    latents = base.mean_latents(images)
    grid = base.noise_schedule().grid(steps)

    def predict(x: Tensor, timestep: int) -> Tensor:
        return base.unet(x, timestep, encoder_hidden_states=embeds).sample

    *_, noise = invert(latents, grid, predict)
    *_, rebuilt = sample(noise, grid, predict)
    return psnr(base.decode(rebuilt).cpu(), base.decode(latents).cpu())


def inversion_figures(base: Base, size: int, count: int) -> dict[str, Any]:
    """Inversion of held-out renders (mean) and of the two photographs, without LoRA."""
    images, _, captions = judged_renders(count, size, 2_000_000)
    pair, pair_captions = photographs(size)
    return {
        "renders": float(inversion_psnr(base, images, captions).mean()),
        "photographs": inversion_psnr(base, pair, pair_captions).tolist(),
    }


def lora_figures(base_folder: str, size: int, folder: Path) -> dict[str, Any]:
    """The demo's LoRA for each photograph: inversion with it, milliseconds a step, peak memory in MB."""
    pair, captions = photographs(size)
    figures: dict[str, Any] = {"inversion": [], "step_ms": []}
    options = ["overwrite=true", "report_to=null", "sample_steps=0", "validation_steps=0"]
    options += [f"pretrained_model_name_or_path={base_folder}", f"output_dir={folder}"]
    for number, name in enumerate(("mountain", "mountain_up")):
        command = [sys.executable, "train_lora.py", f"cfg/{name}.json", *options]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [json.loads(line).get("images_per_second") for line in lines]
        figures["step_ms"].append(1000 / float(np.median([rate for rate in rates if rate])))
        base = Base(inspect_base(base_folder))
        load_lora(folder / f"{name}.safetensors", base.unet, adapter_name="fitted")
        own = slice(number, number + 1)
        figures["inversion"].append(float(inversion_psnr(base, pair[own], captions[own])))
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return figures


@torch.no_grad()
def controlled_samples(
    base: Base,
    controlnet: Any,
    captions: list[str],
    hints: Tensor,
    scale: float,
    guidance_scale: float,
    steps: int,
) -> Tensor:
    """(B, 3, H, W) in [-1, 1]; hints (B, 3, H, W) in [0, 1]. Picture i has the noise of seed i."""
    embeds = embed(base.text_encoder, base.tokenizer, [*captions, ""])
    side = base.unet.config.sample_size
    shape = (base.info.latent_channels, side, side)
    outputs = []
    for start in range(0, len(captions), 16):
        rows = range(start, min(start + 16, len(captions)))
        noise = torch.stack([normal(shape, seed, "sample") for seed in rows]).to(base.device)
        part = hints[start : start + 16].to(base.device)
        steered = steering(controlnet, part, scale) if scale else None
        positive, negative = embeds[rows.start : rows.stop], embeds[-1:].expand(len(rows), -1, -1)
        x = sample_latents(base.unet, positive, negative, noise, steps, guidance_scale, steered)
        outputs.append(decode(base.vae, x).clamp(-1, 1).cpu())
    return torch.cat(outputs)


def control_figures(
    base: Base, controlnet: Any, judge_model: Classifier, count: int, guidance_scale: float, steps: int
) -> dict[str, Any]:
    """Edge F1 between hint and output with and without the ControlNet; whether prompts are still obeyed.

    Keys end in the scale: `f1_at_` and `prompts_at_` of renders, `f1_photographs_at_` of the demo's pair,
    whole and in quarters.
    """
    options = {"guidance_scale": guidance_scale, "steps": steps}
    size = base.info.resolution
    images, labels, captions = judged_renders(count, size, 3_000_000)
    views, view_captions = photograph_views(size)
    figures: dict[str, Any] = {}
    for scale in (1.0, 0.0):
        outputs, score = followed(base, controlnet, images, captions, scale, **options)
        figures[f"f1_at_{scale:g}"] = score
        figures[f"prompts_at_{scale:g}"] = accuracy(judge_model, outputs, labels)
        _, score = followed(base, controlnet, views, view_captions, scale, **options)
        figures[f"f1_photographs_at_{scale:g}"] = score
    return figures


def followed(
    base: Base, controlnet: Any, images: Tensor, captions: list[str], scale: float, **options: Any
) -> tuple[Tensor, float]:
    """Samples whose hints are edges of pictures (B, 3, H, W), and their own edges' mean F1 against these."""
    edges = [canny(_array(image)) for image in images]
    hints = torch.from_numpy(np.stack([hint_picture(edge) for edge in edges]))
    outputs = controlled_samples(base, controlnet, captions, hints, scale, **options)
    found = [canny(_array(output)) for output in outputs]
    return outputs, float(np.mean([edge_f1(edge, own) for edge, own in zip(edges, found, strict=True)]))


def _array(image: Tensor) -> np.ndarray:
    return (image.permute(1, 2, 0).numpy() + 1) / 2


def speed_figures(base: Base) -> dict[str, float]:
    """Seconds of one picture in 50 steps at guidance 1, the second of two."""
    prompt, seconds = "a photo of snowy mountains at noon with a lake", 0.0
    for _ in range(2):
        start = time.perf_counter()
        sample_pictures(parts_of(base), [prompt], [0], steps=50, guidance_scale=1.0)
        seconds = time.perf_counter() - start
    return {"picture_s": seconds}
