"""What a picture costs: LoRA merged against LoRA live, one by one against in batches, ControlNet.

    python benchmarks/style.py                    # the miniature
    python benchmarks/style.py --rounds 5

The ways are timed by turns, round after round, so that a busy machine is as unfair to all of them; medians.
Peak memory is that of a process of its own for each way. Prints a table, and one JSON line last.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

PICTURES, STEPS, GUIDANCE = 8, 25, 3.0
CONTROL = {
    "controlnet_conditioning_scale": 0.7,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}


def prepare(way: str, base_name: str) -> Callable[[], Any]:
    """What makes PICTURES pictures in one of WAYS, its models loaded."""
    from lorakit.diffusion.models import open_base
    from lorakit.sampling.restyling import restyle
    from lorakit.sampling.samplers import encode_prompts, picture_noise, sample_images
    from lorakit.weights.base import inspect_base

    base = open_base(inspect_base(base_name))
    shape = (base.info.resolution, base.info.resolution)
    embeds = encode_prompts(base, ["a photo of snowy mountains at noon with a lake", ""])
    texts = embeds[:1], embeds[1:]
    options: dict[str, Any] = {"steps": STEPS, "guidance_scale": GUIDANCE}
    batch = 1 if way == "single" else 4
    groups = [list(range(start, start + batch)) for start in range(0, PICTURES, batch)]
    if way in ("live", "merged"):
        add_random_lora(base.unet, merge=way == "merged")
    if way not in ("img2img", "controlnet"):
        return lambda: [sample_images(base, *texts, seeds=seeds, shape=shape, **options) for seeds in groups]
    controlnet = small_controlnet(base) if way == "controlnet" else None
    pictures = base.decode_pictures(picture_noise(base, range(batch), shape))
    options |= {"strength": 0.6, "control": CONTROL}
    inputs = base, controlnet, base.scheduler, pictures, pictures, *texts
    return lambda: [restyle(*inputs, seeds=seeds, **options) for seeds in groups]


def add_random_lora(unet: Any, merge: bool) -> None:
    """A LoRA of rank 16 that does something, live or merged into the weights."""
    from torch.nn.init import normal_

    from lorakit.diffusion.lora import add_lora

    dtype = unet.dtype
    for parameter in add_lora(unet, rank=16, alpha=16, targets="attention+ff"):
        normal_(parameter, std=0.01)
    unet.to(dtype).requires_grad_(False)
    for module in unet.modules() if merge else ():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()


def small_controlnet(base: Any) -> Any:
    """One that does nothing yet, of the base's own shape."""
    import torch
    from diffusers import ControlNetModel

    made = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 64, 96))
    return made.to(base.device, base.dtype, memory_format=torch.channels_last).eval()


WAYS = {
    "batched": "text to image, batch of 4",
    "single": "text to image, one by one",
    "live": "batch of 4, LoRA of rank 16 live",
    "merged": "batch of 4, the same LoRA merged",
    "img2img": "SDEdit at strength 0.6",
    "controlnet": "SDEdit at strength 0.6 with ControlNet",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", default="ckpt/miniature")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        prepare(options.memory_of, options.base)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    memory = {}  # first: a child's peak begins at what its parent holds
    for way in WAYS:
        command = [sys.executable, __file__, "--memory-of", way, "--base", options.base]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        memory[way] = float(told.split()[-1])
    runs = {way: prepare(way, options.base) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[way].append((time.perf_counter() - start) / PICTURES)
    report = {}
    for way, label in WAYS.items():
        report[way] = {"seconds": median(seconds[way]), "peak_mb": memory[way]}
        print(f"{label:40}{report[way]['seconds']:8.3f} s a picture{memory[way]:9.0f} MB")
    cost = report["live"]["seconds"] / report["merged"]["seconds"]
    gain = report["single"]["seconds"] / report["batched"]["seconds"]
    print(f"a live LoRA costs {cost:.2f} times a merged one; one by one {gain:.2f} times a batch of 4")
    print(json.dumps({"rounds": options.rounds, "steps": STEPS, "guidance_scale": GUIDANCE, "ways": report}))


if __name__ == "__main__":
    main()
