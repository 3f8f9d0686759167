"""How far pictures follow a camera: noise in the scene, agreement about it, a motion adapter, none of them.

    python benchmarks/motion.py                              # five cameras, two prompts, one seed
    python benchmarks/motion.py --seeds 3 --prompts 8
    python benchmarks/motion.py --adapter ADAPTER --cameras "zoom in" static

Each film is measured by the similarity transforms that fit each frame to the next (motion/estimate.py).
Prints a row for each camera and way: the share of the move that was made, its deviation over films, in how
many its sign is right, pixels of a move that nobody asked for, dB between neighbours after the fitting move,
coherence, and sharpness over that of single pictures. One JSON line comes last.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

CAMERAS: dict[str, dict[str, float]] = {
    "static": {},
    "pan right": {"pan": 0.3},
    "pan left": {"pan": -0.3},
    "tilt up": {"tilt": 0.2},
    "tilt down": {"tilt": -0.2},
    "zoom in": {"zoom": 1.35},
    "zoom out": {"zoom": 1 / 1.35},
    "roll clockwise": {"roll": 17.0},
    "roll back": {"roll": -17.0},
}
FEW = ("static", "pan right", "tilt up", "zoom in", "roll clockwise")
WAYS: dict[str, dict[str, Any]] = {
    "own noise": {"scene_share": 0.0, "agreement": 0.0},
    "scene": {"agreement": 0.0},
    "scene, agreement 0.8": {},
    "scene, agreement 1": {"agreement": 1.0},
}
PROMPTS = (
    "a photo of snowy mountains at noon with a lake",
    "a watercolor of red desert mountains at sunset with sand dunes",
    "a flat poster of green mountains at dawn with a forest",
    "a photo of rocky mountains at night with a meadow",
    "a watercolor of snowy mountains at dawn with a lake",
    "a flat poster of red desert mountains at noon with sand dunes",
    "a photo of green mountains at sunset with a forest",
    "a watercolor of distant ranges of rocky mountains at noon with a meadow",
)
FRAMES, STEPS, GUIDANCE = 9, 12, 3.0


def film(base: Any, distance: Any, prompt: str, seed: int, camera: str, changes: dict[str, Any]) -> dict:
    """The metrics of one film, its sharpness, and the seconds that it took."""
    import torch

    from lorakit.diffusion.metrics import sharpness
    from lorakit.motion.animate_plan import make_animate_plan
    from lorakit.motion.animate_report import measure
    from lorakit.motion.config import AnimateConfig
    from lorakit.motion.filming import open_studio, scene_noise

    settings = {"frames": FRAMES, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
    settings |= {"pretrained_model_name_or_path": base.info.name, "prompt": prompt, "camera": CAMERAS[camera]}
    cfg = AnimateConfig.model_validate_json(json.dumps(settings | changes))
    plan, begun = make_animate_plan(cfg, base.info), time.perf_counter()
    with torch.no_grad():
        latents = open_studio(plan, base).denoise(scene_noise(plan, base), STEPS)
    frames = base.decode_pictures(latents)
    seconds = time.perf_counter() - begun
    metrics = measure(frames, plan.poses, distance)["metrics"]
    return metrics | {"sharpness": mean(map(sharpness, frames)), "seconds": seconds}


def row(films: list[dict], camera: str, side: int, single: float) -> dict[str, Any]:
    """What the films of one camera and way have in common."""

    def size(name: str, value: float) -> float:
        return math.log(value) if name == "zoom" else value

    (name,) = CAMERAS[camera] or ("pan",)
    asked = size(name, films[0]["asked"][name])
    found = [size(name, each["measured"][name]) for each in films]
    aside = [each["measured"]["tilt" if name == "pan" else "pan"] * side for each in films]
    shares = [value / asked for value in found] if asked else []
    return {
        "share": round(mean(shares), 3) if shares else None,
        "deviation": round(pstdev(shares), 3) if shares else None,
        "sign": sum(share > 0 for share in shares) if shares else None,
        "films": len(films),
        "aside_px": round(mean(map(abs, aside if shares else [value * side for value in found])), 2),
        "fit_psnr": round(mean(each["fit_psnr"] for each in films), 2),
        "coherence": round(mean(each["coherence"] for each in films), 3),
        "sharpness": round(mean(each["sharpness"] for each in films) / single, 3),
        "seconds": round(mean(each["seconds"] for each in films), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="ckpt/miniature")
    parser.add_argument("--adapter", help="a motion adapter, for all ways")
    parser.add_argument("--cameras", nargs="+", choices=CAMERAS, default=FEW)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()

    from lorakit.diffusion.metrics import EncoderDistance
    from lorakit.diffusion.models import open_base
    from lorakit.motion.filming import inflate
    from lorakit.weights.base import inspect_base
    from lorakit.weights.motion_adapter import inspect_motion_adapter

    base = open_base(inspect_base(args.base))
    if args.adapter:
        inflate(base, inspect_motion_adapter(args.adapter, base.info))
    distance = EncoderDistance(base)
    common = {"motion_adapter": args.adapter}
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for camera, prompt, seed in product(args.cameras, PROMPTS[: args.prompts], range(args.seeds)):
        for way in args.ways:
            found[camera, way].append(film(base, distance, prompt, seed, camera, WAYS[way] | common))
            print(f"{camera}, {way}, {prompt}: {found[camera, way][-1]}", file=sys.stderr, flush=True)
    alone = [way for way in args.ways if WAYS[way].get("agreement") == 0]  # frames are pictures there
    singles = [each["sharpness"] for (_, way), films in found.items() for each in films if way in alone]
    single = mean(singles) if singles else 1.0
    rows = {key: row(films, key[0], base.info.resolution, single) for key, films in found.items()}
    for (camera, way), each in rows.items():
        print(f"{camera:15s} {way:22s} " + "  ".join(f"{name} {value}" for name, value in each.items()))
    print(
        json.dumps({"rows": [{"camera": camera, "way": way} | each for (camera, way), each in rows.items()]})
    )


if __name__ == "__main__":
    main()
