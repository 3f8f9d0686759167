"""What a morph costs and what comes out, beside the ways of the tutorial and of DiffMorpher.

    python benchmarks/morph.py                                  # the miniature, 16 frames, 50 steps, 3 rounds
    python benchmarks/morph.py --frames 4 --steps 6 --rounds 1  # a quick look
    python benchmarks/morph.py --ways lorakit shipped           # these alone
    python benchmarks/morph.py --shape sd15                     # SD 1.5's shape, random weights: costs only

Six ways make the same morph in turns, each in a process of its own, over several rounds. All invert each
picture by DDIM under its own LoRA (the tutorial's script takes one LoRA for both, which costs the same and
would show it worse than need be), interpolate the prompts, and use one VAE, one DDIM and one dtype:
  tutorial         a loop over frames: LoRA weights, slerp of the noise, DDIM at guidance 1, nothing else
  features-stored  that loop with AdaIN, attention to the pictures' keys and values, kept for all steps that
                   use them, and a second pass over the frames between for even speed
  features-rerun   the same, but each frame's step evaluates both pictures again instead (as AID does)
  diffmorpher      its equations (arXiv 2312.07409): LoRA factors lerped and reloaded for each frame, inputs
                   of self-attention kept in float32 for every step, two passes over all frames. On DDIM, as
                   the paper has it; PNDM, on which its program runs, takes one evaluation in 50 more
  lorakit          morph.py's functions with its defaults, by ddim as the others
  shipped          the same by the solver and the fewer steps of cfg/morph/mountain.json
Timed is all from pictures to decoded frames; not imports, loading and a first evaluation. Writes a contact
sheet of all frames to out/benchmark/morph.png; prints a table and, last, one JSON line: medians, ratios round
by round, peak memory, stored attention, the frames' metrics, and which goals are met.
"""

import argparse
import contextlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.morph_figures import LONG, draw_sheet, judge, print_table, summarise
from benchmarks.morph_setup import Setup, prepare, set_up
from benchmarks.morph_ways import WAYS, Loop
from lorakit.diffusion.paths import encode_picture
from lorakit.film import endpoints
from lorakit.pictures.images import read_picture

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "ckpt/miniature"
IMAGES = (ROOT / "dataset/mountain/mountain.jpg", ROOT / "dataset/mountain_up/mountain_up.jpg")
LORAS = (ROOT / "ckpt/mountain.safetensors", ROOT / "ckpt/mountain_up.safetensors")
PROMPTS = (
    "a photo of rocky mountains at noon with a forest",
    "a photo of a single rocky mountain at noon with a meadow",
)
SHAPES = {
    "miniature": {"frames": 16, "steps": 50, "rounds": 3},
    "sd15": {"frames": 4, "steps": 4, "rounds": 1},
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Set the peak back to what is in use, where Linux lets us: loading takes more than it leaves."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def warm_up(setup: Setup) -> None:
    """A first evaluation of each network: libraries choose their kernels in it."""
    loop = Loop(setup)
    picture = read_picture(setup.cfg.images[0].path, setup.plan.shape)
    latents = encode_picture(setup.base, picture)
    rows = endpoints.conditions(setup.cfg, setup.base, setup.adapters)
    loop.predict(latents, loop.grid.timesteps[0], rows.prompt_embeds[:1])
    loop.decode(latents)
    setup.rows = setup.passes = 0


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """One way in this process: what it cost and, at the miniature's shape, what came out."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        setup = set_up(args, folder)
        gpu = setup.base.device.type == "cuda"
        forget_peak()
        before = peak_bytes()
        warm_up(setup)
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin, worked = time.perf_counter(), time.process_time()
        film = WAYS[args.one](setup)
        if gpu:
            torch.cuda.synchronize()
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        threads = torch.get_num_threads()
        record: dict[str, Any] = {
            "seconds": seconds,
            "cpu_seconds": worked,
            "evaluations": setup.rows,
            "passes": setup.passes,
            "before_bytes": before,
            "peak_bytes": peak_bytes(),
            "cuda_peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
            "attention_bytes": film.attention_bytes,
            "attention_bytes_at_50_steps": {
                name: film.bytes_at(args.steps, LONG, size) for name, size in (("fp16", 2), ("fp32", 4))
            },
            "precision": setup.precision,
            "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {threads} threads",
            "torch": torch.__version__,
            "positions": film.positions,
        }
        if args.shape == "miniature":
            record["metrics"] = judge(setup, film)
    if args.frames_to:
        for k, frame in enumerate(film.frames):
            frame.save(Path(args.frames_to) / f"{args.one}-{k:04d}.png")
    return record


def in_process(argv: list[str], more: list[str]) -> dict[str, Any]:
    """The record of one way, or of `prepare`, from a process of its own."""
    command = [sys.executable, __file__, *argv, *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parse(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="miniature")
    parser.add_argument("--frames", type=int, help="both pictures included (16; sd15: 4)")
    parser.add_argument("--steps", type=int, help="of DDIM (50; sd15: 4)")
    parser.add_argument("--rounds", type=int, help="how often each way runs (3; sd15: 1)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), help="of them, lorakit (all)")
    parser.add_argument("--images", nargs=2, type=Path, default=IMAGES, help="two pictures (the mountains)")
    parser.add_argument("--prompts", nargs=2, default=PROMPTS, help="what they show")
    parser.add_argument("--loras", nargs=2, type=Path, help="fitted to them (ckpt/mountain…, or random ones)")
    parser.add_argument("--base", type=Path, default=BASE, help="a diffusers folder (the miniature)")
    parser.add_argument("--precision", choices=("auto", "no", "fp16", "bf16"), default="auto")
    parser.add_argument("--sheet", type=Path, default=ROOT / "out/benchmark/morph.png", help="contact sheet")
    parser.add_argument("--one", choices=("prepare", *WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--frames-to", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in SHAPES[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.frames < 3 or args.steps < 2 or args.rounds < 1:
        parser.error("at least 3 frames, 2 steps and 1 round are needed")
    args.ways = [way for way in WAYS if way in (args.ways or WAYS) or way == "lorakit"]
    if args.loras and args.loras[0] == args.loras[1]:
        parser.error("--loras: two files are needed, one for each picture")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.one:
        print(json.dumps(prepare(args) if args.one == "prepare" else run_one(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        usual = args.shape == "miniature" and args.base == BASE and all(path.exists() for path in LORAS)
        base, loras = str(args.base), [str(path) for path in args.loras or (LORAS if usual else ())]
        note = None
        if args.shape == "sd15" or not loras:
            made = in_process(argv, ["--one=prepare", f"--folder={folder}"])
            note = None if loras else "random LoRAs, on whose values time and memory do not depend"
            base, loras = made["base"], made["loras"]
        given = [f"--base={base}", "--loras", *loras]
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
        for number in range(args.rounds):
            for way in args.ways:
                to = [] if number else [f"--frames-to={folder}"]
                results[way].append(in_process(argv, [*given, f"--one={way}", *to]))
                seconds = results[way][-1]["seconds"]
                print(f"round {number + 1}: {way} took {seconds:.1f} s", file=sys.stderr, flush=True)
        if args.shape == "miniature":
            draw_sheet(args, results, Path(folder))
    summary = summarise(args, results, note)
    print_table(args, summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
