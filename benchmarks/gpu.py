"""What a card does with this toolkit, in eight minutes: tests, training steps, a morph, pictures, caches.

    make gpu minutes=8                                     # SD 1.5's shape with random weights, no download
    make gpu minutes=8 peer=…/train_text_to_image_lora.py  # beside diffusers' own script
    python benchmarks/gpu.py device=cpu base=narrow        # a tenth as wide: to see that all of it runs

A base is built first. Then each part runs in a process of its own, in order of worth, until the minutes are
over; one that fails or takes too long is reported as such, and the next one goes on. What is ours is timed
through train_lora.train, morph.py and generate.py as users run them, the caches being warm, training in bf16
(fp16 on cards without it, float32 on a CPU). `bare` is the same U-Net and LoRA stepped on tensors that never
change: the limit. `share` is of the card's dense peak in the part's precision; operations are counted by
torch.utils.flop_counter forward, and backward to the LoRA.
Prints a line for each part and, last, one JSON line; logs are in <output_dir>.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lorakit.ground.command import parse_command  # noqa: E402
from lorakit.ground.config import Config  # noqa: E402
from lorakit.ground.errors import UserError  # noqa: E402

# Dense TFLOP/s of bf16 and of fp16 by the name that torch gives a card, from NVIDIA's data sheets, with sums
# in float32 (GeForce cards are twice as fast with sums in fp16, which torch does not use).
PEAKS: tuple[tuple[str, float | None, float], ...] = (
    (r"A100", 312, 312),
    (r"H100 80GB HBM", 989, 989),  # SXM
    (r"H100 PCIe", 756, 756),
    (r"H200(?! NVL)", 989, 989),
    (r"RTX 4090(?! D| Laptop)", 165, 165),
    (r"RTX 3090(?! Ti)", 71, 71),
    (r"L40S", 362, 362),
    (r"L4\b", 121, 121),
    (r"A10\b", 125, 125),
    (r"T4\b", None, 65),
)


@dataclass(frozen=True)
class Size:
    """How much is measured: pixels a side, steps of training and of sampling, pictures cached, frames."""

    divisor: int
    side: int
    steps: int
    pictures: int
    frames: int
    inference_steps: int


SIZES = {
    "sd15": Size(1, 512, 30, 200, 16, 50),
    "narrow": Size(10, 128, 12, 40, 16, 10),
    "tiny": Size(10, 64, 4, 6, 3, 4),
}


@dataclass(frozen=True)
class Part:
    """`work` of gpu_parts, for `seconds` at most on a GPU; a CPU gets CPU_TAKES times as long."""

    work: str
    options: dict[str, Any]
    seconds: float
    needs_gpu: bool = False


def _step(batch: int, seconds: float, needs_gpu: bool = False, **changes: Any) -> Part:
    return Part("step", {"batch": batch} | changes, seconds, needs_gpu)


PARTS = {
    "tests": Part("tests", {}, 180),
    "step, batch 1": _step(1, 60),
    "step, batch 4": _step(4, 60),
    "bare, batch 1": Part("bare", {"batch": 1}, 60),
    "bare, batch 4": Part("bare", {"batch": 4}, 60),
    "step, batch 4, compiled": _step(4, 150, True, torch_compile=True),
    "step, batch 4, checkpointing": _step(4, 60, gradient_checkpointing=True),
    "step, batch 4, fp16": _step(4, 60, True, mixed_precision="fp16"),
    "step, batch 4, xformers": _step(4, 60, True, enable_xformers_memory_efficient_attention=True),
    "peer, batch 1": Part("peer", {"batch": 1}, 90),
    "peer, batch 4": Part("peer", {"batch": 4}, 90),
    "morph": Part("morph", {}, 150),
    "generate, batch 4": Part("generate", {}, 60),
    "caching": Part("caching", {}, 60),
}
BUILD = Part("build", {}, 120)
CPU_TAKES = 10  # times the seconds of a GPU, before a part is given up


class GpuConfig(Config):
    minutes: float = Field(8.0, gt=0, description="what is done by then is reported")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: a CUDA GPU where there is one")
    base: Literal["auto", "sd15", "narrow", "tiny"] = Field(
        "auto",
        description="SD 1.5's shape, or a tenth as wide for 128 or 64 px; auto: sd15 on a GPU, else narrow",
    )
    peer: str | None = Field(
        None, description="diffusers' examples/text_to_image/train_text_to_image_lora.py, which is timed too"
    )
    only: tuple[str, ...] = Field((), description="beginnings of the names of the parts to run; none: all")
    output_dir: str = Field(
        "out/gpu", min_length=1, description="base, pictures, logs and what the parts write"
    )


@dataclass(frozen=True)
class Setup:
    """What every part knows."""

    folder: str
    device: str
    size: str
    peer: str | None


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def run_part(name: str, part: Part, setup: Setup, limit: float) -> dict[str, Any]:
    """What became of a part: `state` (done, failed, stopped, skipped), and figures or `why` there are none.

    Args:
        limit: seconds after which its process, and what that started, are killed.
    """
    folder = Path(setup.folder)
    result, log = folder / f"{slug(name)}.json", folder / f"{slug(name)}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", name, json.dumps(asdict(setup))]
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, env=environment(setup), start_new_session=True
        )
        try:
            code = process.wait(limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stopped, KeyboardInterrupt):
                raise
            return {"state": "stopped", "why": f"after {limit:.0f} s", "seconds": round(limit, 1)}
    found = {"seconds": round(time.monotonic() - begun, 1)}
    if code == 0 and result.exists():
        return {"state": "done"} | found | json.loads(result.read_text(encoding="utf-8"))
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return {"state": "failed", "why": f"{lines[-1].strip()[:200] if lines else code} ({log})"} | found


def environment(setup: Setup) -> dict[str, str]:
    """That of the parts: no network, and on the CPU no GPU in sight."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if setup.device == "cpu" else {}
    return os.environ | {"HF_HUB_OFFLINE": "1"} | hidden


def run_all(cfg: GpuConfig, setup: Setup, deadline: float, tell: Callable[[str, dict], None]) -> None:
    """Build the base and run the parts that were asked for, until the time is over.

    Args:
        tell: called with each name and result.
    """
    slower = CPU_TAKES if setup.device == "cpu" else 1
    built = run_part("build", BUILD, setup, min(BUILD.seconds * slower, deadline - time.monotonic()))
    tell("build", built)
    if built["state"] != "done":
        return
    for name, part in PARTS.items():
        left = deadline - time.monotonic()
        if cfg.only and not name.startswith(cfg.only):
            continue
        if part.needs_gpu and setup.device == "cpu":
            result = {"state": "skipped", "why": "needs a GPU"}
        elif part.work == "peer" and setup.peer is None:
            result = {"state": "skipped", "why": "no peer=PATH was given"}
        elif left < 5:
            result = {"state": "skipped", "why": "no time left"}
        else:
            result = run_part(name, part, setup, min(part.seconds * slower, left))
        tell(name, result)


def peak_of(device: str, precision: str) -> float | None:
    """Dense TFLOP/s of a card in "bf16" or "fp16"; None for one that is not in the table."""
    for pattern, bf16, fp16 in PEAKS:
        if re.search(pattern, device):
            return fp16 if precision == "fp16" else bf16
    return None


def with_share(result: dict[str, Any], device: str) -> dict[str, Any]:
    """With the share of the card's peak, of a part that counts the operations of an image."""
    flops, peak = result.get("flops_per_image"), peak_of(device, result.get("precision", ""))
    if flops is None:
        return result
    share = flops * result["images_per_second"] / (peak * 1e12) if peak else None
    return result | {"share": None if share is None else round(share, 4)}


def line_of(name: str, result: dict[str, Any]) -> str:
    if result["state"] != "done":
        return f"{name:32}{result['state']}: {result['why']}"
    if "ms" not in result:
        shown = ", ".join(
            f"{key} {value}" for key, value in result.items() if key not in ("state", "seconds")
        )
        return f"{name:32}{shown}, {result['seconds']:.0f} s"
    share = f"{result['share']:8.1%} of the peak" if result.get("share") is not None else ""
    return (
        f"{name:32}{result['precision']:8}{result['ms']:10.1f} ms a {result['of']:8}"
        f"{result['images_per_second']:9.2f} images/s{result['peak_mb']:9,.0f} MB{share}"
    )


def main(argv: list[str]) -> int:
    if argv[:1] == ["--one"]:
        from benchmarks import gpu_parts

        return gpu_parts.run_one(argv[1], PARTS.get(argv[1], BUILD), Setup(**json.loads(argv[2])))
    begun = time.monotonic()
    cfg = parse_command(GpuConfig, argv, prog="benchmarks/gpu.py", description=str(__doc__)).config
    if cfg.peer and not Path(cfg.peer).is_file():
        raise UserError(f"peer {cfg.peer}: no such file")
    import torch

    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    size = cfg.base if cfg.base != "auto" else "sd15" if device == "cuda" else "narrow"
    folder = Path(cfg.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    setup = Setup(str(folder), device, size, str(Path(cfg.peer).absolute()) if cfg.peer else None)
    results: dict[str, dict[str, Any]] = {}

    def tell(name: str, result: dict[str, Any]) -> None:
        results[name] = with_share(result, results.get("build", result).get("device", ""))
        print(line_of(name, results[name]), flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_all(cfg, setup, begun + 60 * cfg.minutes - 3, tell)
    except KeyboardInterrupt:
        print("stopped by a signal", flush=True)
    built = results.get("build", {})
    summary = {"benchmark": "gpu", "base": size, "torch": torch.__version__}
    summary |= {key: built.get(key) for key in ("device", "diffusers", "flops")}
    summary |= {"peak_tflops_bf16": peak_of(built.get("device", ""), "bf16")}
    summary |= {"seconds": round(time.monotonic() - begun, 1), "parts": results}
    print(json.dumps(summary))
    return int(any(each["state"] == "failed" for each in results.values()))


if __name__ == "__main__":
    from lorakit.ground.process import run_guarded

    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
