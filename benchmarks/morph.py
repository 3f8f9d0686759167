"""What a morph costs and what comes out, beside the ways of the tutorial and of DiffMorpher.

    python benchmarks/morph.py                                   # the miniature, 16 frames, 50 steps, 3 rounds
    python benchmarks/morph.py --frames 4 --steps 6 --rounds 1   # a quick look
    python benchmarks/morph.py --shape sd15                      # SD 1.5's shape, random weights: costs only

Five ways make the same morph in turns, each in a process of its own, over several rounds. All invert each
picture by DDIM under its own LoRA (the tutorial's script takes one LoRA for both, which costs the same and
would show it worse than need be), interpolate the prompts, and use one VAE, one DDIM and one dtype:
  tutorial         a loop over frames: LoRA weights, slerp of the noise, DDIM at guidance 1, nothing else
  features-stored  that loop with AdaIN, attention to the pictures' keys and values, kept for all steps that
                   use them, and a second pass over the frames between for even speed
  features-rerun   the same, but each frame's step evaluates both pictures again instead (as AID does)
  diffmorpher      its equations (arXiv 2312.07409): LoRA factors lerped and reloaded for each frame, inputs
                   of self-attention kept in float32 for every step, two passes over all frames. On DDIM, as
                   the paper has it; PNDM, on which its program runs, takes one evaluation in 50 more
  lorakit          morph.py's functions with its defaults
Timed is all from pictures to decoded frames; not imports, loading and a first evaluation. Writes a contact
sheet of all frames to out/benchmark/morph.png; prints a table and, last, one JSON line: medians, ratios round
by round, peak memory, stored attention, the frames' metrics, and which goals are met.
"""

import argparse
import contextlib
import json
import math
import operator
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train import build_sd15
from lorakit.diffusion import inversion, lora, metrics
from lorakit.diffusion.attention import Between, SharedAttention
from lorakit.diffusion.denoiser import Denoiser
from lorakit.diffusion.interpolate import adain, bezier, slerp
from lorakit.diffusion.models import Base, compute_dtype, set_up_backend
from lorakit.diffusion.row_weights import lora_layers
from lorakit.diffusion.schedule import ddim_step
from lorakit.film import endpoints, morph_plan, morph_report, morphing, shooting
from lorakit.ground.chunks import Chunks
from lorakit.ground.errors import UserError
from lorakit.pictures.images import load_image, psnr, read_picture, to_array
from lorakit.pictures.sheet import contact_sheet
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import LoraPair, lora_bytes
from morph import MorphConfig

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
SHOWN = ("path_length", "directness", "max_over_mean", "middle_sharpness")
LONG = 50  # steps for which stored attention is told as well, whatever was run


# ---- what every way starts from ----


@dataclass
class Setup:
    """A base with both LoRAs, and what is asked for; `rows` and `passes` count at the U-Net."""

    cfg: Any
    plan: Any
    base: Any
    adapters: dict[str, str]
    precision: str
    rows: int = 0
    passes: int = 0

    def count(self, unet: Any, inputs: tuple) -> None:
        self.rows += len(inputs[0])
        self.passes += 1


@dataclass
class Film:
    """Decoded frames, where they lie, and the attention that was held: bytes in all and of a number.

    `share` of the steps is that for which it was held at once; None: for a single step.
    """

    frames: list[Image.Image]
    positions: list[float]
    attention_bytes: int = 0
    number_bytes: int = 4
    share: float | None = None

    def bytes_at(self, steps: int, long: int, number_bytes: int) -> int:
        """What `attention_bytes` of a run of `steps` are at `long` steps, in another precision."""
        held, longer = (sum(i < self.share * n for i in range(n)) if self.share else 1 for n in (steps, long))
        return self.attention_bytes * longer // held * number_bytes // self.number_bytes


def set_up(args: argparse.Namespace, folder: str) -> Setup:
    triples = zip(args.images, args.prompts, args.loras, strict=True)
    settings = {
        "pretrained_model_name_or_path": str(args.base),
        "images": tuple(
            {"path": str(path), "prompt": text, "lora": str(file)} for path, text, file in triples
        ),
        "frames": args.frames,
        "num_inference_steps": args.steps,
        "probe_steps": min(args.steps, MorphConfig.model_fields["probe_steps"].default),
        "mixed_precision": args.precision,
        "output_dir": folder,
    }
    cfg = MorphConfig.model_validate(settings)
    device = PartialState().device
    assert device is not None
    set_up_backend(device.type)
    precision = args.precision
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "no"
    base = Base(inspect_base(str(args.base)), device, compute_dtype(precision))
    adapters = endpoints.load_adapters(base, [str(path) for path in args.loras])
    setup = Setup(cfg, morph_plan.make_morph_plan(cfg), base, adapters, precision)
    _ = base.vae, base.text_encoder, base.tokenizer  # which load when they are touched
    base.unet.register_forward_pre_hook(setup.count)
    return setup


def even_alphas(count: int) -> list[float]:
    return [k / (count - 1) for k in range(count)]


# ---- one frame at a time ----


class Loop:
    """A loop over frames: weights of both LoRAs are set before each, then the U-Net runs on one row.

    `noise` and `prompts` are those of the pictures, (1, C, h, w) and (1, L, D) each, once `invert` has run.
    """

    def __init__(self, setup: Setup):
        self.setup, self.cfg, self.base = setup, setup.cfg, setup.base
        self.schedule = setup.base.noise_schedule()
        self.grid = self.schedule.grid(setup.cfg.num_inference_steps)
        self.names = list(setup.adapters.values())
        self.layers = lora_layers(setup.base.unet, self.names)
        self.noise: list[Tensor] = []
        self.prompts: list[Tensor] = []

    def mix(self, alpha: float) -> None:
        """As set_adapters([a, b], [1 - alpha, alpha]) does, through PEFT's scaling."""
        for layer, name in self.layers:
            layer.set_scale(name, 1 - alpha if name == self.names[0] else alpha)

    def predict(self, x: Tensor, timestep: int, embeds: Tensor) -> Tensor:
        dtype = self.base.dtype
        output = self.base.unet(x.to(dtype), timestep, embeds.to(dtype), return_dict=False)[0]
        return self.schedule.epsilon(output.to(x.dtype), x, timestep)

    def invert(self) -> None:
        rows = endpoints.conditions(self.cfg, self.base, self.setup.adapters)
        self.prompts = list(rows.prompt_embeds.split(1))
        for k, (picture, embeds) in enumerate(zip(self.cfg.images, self.prompts, strict=True)):
            image = read_picture(picture.path, self.setup.plan.shape)
            self.mix(float(k))
            start = endpoints.encode_picture(self.base, image)
            *_, last = inversion.invert(start, self.grid, lambda x, t, e=embeds: self.predict(x, t, e))
            self.noise.append(last)

    def sample(self, alpha: float, statistics: bool, during: Callable[[int], Any]) -> Iterator[Tensor]:
        """DDIM from the noise between the pictures'; yields the latents before each step, and the last.

        Args:
            statistics: give the noise the interpolated mean and deviation (AdaIN).
            during: step i happens in the context `during(i)`.
        """
        self.mix(alpha)
        weight = torch.tensor([alpha], dtype=torch.float64, device=self.base.device)
        a, b = self.noise
        x = slerp(a, b, weight)
        x = adain(x, a, b, weight) if statistics else x
        embeds = bezier(self.prompts[0], self.prompts[1], weight)
        for i, timestep in enumerate(self.grid.timesteps):
            yield x
            with during(i):
                epsilon = self.predict(x, timestep, embeds)
            x = ddim_step(x, epsilon, self.grid.alpha_bar[i], self.grid.alpha_bar[i + 1])
        yield x

    def shares(self, i: int) -> bool:
        """Whether step i is one of those in which frames look at the pictures."""
        return i < self.cfg.attention_share * len(self.grid)

    def decode(self, latents: Tensor) -> Image.Image:
        return endpoints.decode_picture(self.base, latents[0])

    def two_passes(self, render: Callable[[list[float]], list[Image.Image]]) -> Any:
        """Frames and alphas, after DiffMorpher's eqs. 11-12: a first film is measured, and alpha as a piecewise
        linear function of the length seen so far is read off at equal lengths."""
        first = even_alphas(self.cfg.frames)
        distance = metrics.make_distance(self.cfg.distance, self.base)
        pixels = torch.stack([torch.from_numpy(to_array(frame)) for frame in render(first)])
        levels = distance.features(pixels)
        steps = distance.between([f[:-1] for f in levels], [f[1:] for f in levels]).numpy()
        length = np.concatenate([[0.0], np.cumsum(steps)])
        alphas = np.interp(first, length / length[-1], first).tolist()
        return render(alphas), alphas


def plain(i: int) -> Any:
    return contextlib.nullcontext()


def tutorial(setup: Setup) -> Film:
    loop = Loop(setup)
    loop.invert()
    alphas, frames = even_alphas(setup.cfg.frames), []
    for alpha in alphas:
        *_, last = loop.sample(alpha, False, plain)
        frames.append(loop.decode(last))
    return Film(frames, alphas)


class KeptPairs:
    """Keys and values of both pictures: those of all steps are kept, or those of a step made when used."""

    def __init__(self, loop: Loop, rerun: bool):
        self.loop, self.rerun = loop, rerun
        self.shared = SharedAttention(loop.base.unet, "kv", loop.cfg.attention_blocks)
        self.pairs: list[dict[str, Any]] = [{} for _ in loop.grid.timesteps]
        self.latents: list[list[Tensor]] = []

    def picture(self, k: int) -> Image.Image:
        """The first or last frame, with which no other shares; what others will need is kept."""
        *path, last = self.loop.sample(float(k), True, plain if self.rerun else self._keep)
        self.latents.append(path)
        return self.loop.decode(last)

    @contextlib.contextmanager
    def _keep(self, i: int) -> Iterator[None]:
        if not self.loop.shares(i):
            yield
            return
        for name, processor in self.shared.own.items():
            processor.recorded = self.pairs[i].get(name)
        with self.shared.record(more=bool(self.pairs[i])):
            yield
        self.pairs[i] = {name: processor.recorded for name, processor in self.shared.own.items()}

    def frame(self, alpha: float) -> Image.Image:
        left, right = torch.tensor([[0], [1]], device=self.loop.base.device)
        lies = Between(left, right, torch.tensor([alpha], dtype=torch.float64, device=left.device))

        def during(i: int) -> Any:
            if not self.loop.shares(i):
                return plain(i)
            if self.rerun:
                self._evaluate(i)
                self.loop.mix(alpha)
            else:
                for name, processor in self.shared.own.items():
                    processor.recorded = self.pairs[i][name]
            return self.shared.use(lies)

        *_, last = self.loop.sample(alpha, True, during)
        return self.loop.decode(last)

    def _evaluate(self, i: int) -> None:
        for k, embeds in enumerate(self.loop.prompts):
            self.loop.mix(float(k))
            with self.shared.record(more=k == 1):
                self.loop.predict(self.latents[k][i], self.loop.grid.timesteps[i], embeds)

    def stored_bytes(self) -> int:
        if self.rerun:
            return self.shared.stored_bytes()
        return sum(x.nbytes for step in self.pairs for pair in step.values() for x in pair)


def features(setup: Setup, rerun: bool) -> Film:
    """Two passes over the frames between; the pictures' own frames do not depend on alphas: made once."""
    loop = Loop(setup)
    loop.invert()
    kept = KeptPairs(loop, rerun)
    first, last = kept.picture(0), kept.picture(1)
    frames, alphas = loop.two_passes(lambda at: [first, *(kept.frame(alpha) for alpha in at[1:-1]), last])
    share = None if rerun else setup.cfg.attention_share
    return Film(frames, alphas, kept.stored_bytes(), setup.base.dtype.itemsize, share)


class FactorLoop(Loop):
    """One LoRA in the U-Net, with factors (1 - alpha) A_0 + alpha A_1, and B alike, reloaded for each frame.

    That is what DiffMorpher's program does; its paper's eq. 4 mixes the deltas B A.
    """

    def __init__(self, setup: Setup):
        super().__init__(setup)
        unet = setup.base.unet
        self.factors = [lora.extract(unet, "unet", name) for name in self.names]
        shapes = [{name: (p.rank, p.alpha) for name, p in factors.items()} for factors in self.factors]
        if shapes[0] != shapes[1]:
            raise UserError("DiffMorpher lerps factors: give two LoRAs of the same modules, ranks and alphas")
        unet.delete_adapters(self.names[1])
        unet.set_adapter(self.names[0])

    def mix(self, alpha: float) -> None:
        mixed = {}
        for name, a in self.factors[0].items():
            b = self.factors[1][name]
            mixed[name] = LoraPair(a.down.lerp(b.down, alpha), a.up.lerp(b.up, alpha), a.alpha)
        lora.insert(self.base.unet, "unet", mixed, self.names[0])


class KeptInputs:
    """Self-attention of the up blocks that keeps its inputs (1, tokens, C), or reads mixed ones.

    K = W_k ((1 - alpha) h_0 + alpha h_1), V alike, with W the frame's own: DiffMorpher's program. Its paper's
    eq. 7 mixes keys and values, each under its picture's LoRA.
    """

    def __init__(self, unet: Any):
        names = [name for name in unet.attn_processors if name.startswith("up_") and ".attn1." in name]
        self.inputs: dict[str, list[list[Tensor]]] = {name: [[], []] for name in names}
        self.keeping: int | None = None  # the picture whose inputs are kept
        self.reading: tuple[int, float] | None = None  # step and alpha
        own = {name: self._processor(name) for name in names}
        unet.set_attn_processor(unet.attn_processors | own)

    def _processor(self, name: str) -> Any:
        attend = AttnProcessor2_0()

        def process(attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
            source = hidden_states
            if self.keeping is not None:
                self.inputs[name][self.keeping].append(hidden_states.float())
            if self.reading is not None:
                step, alpha = self.reading
                first, second = (steps[step] for steps in self.inputs[name])
                source = first.lerp(second, alpha).to(hidden_states)
            return attend(attn, hidden_states, source)

        return process

    @contextlib.contextmanager
    def during(self, picture: int | None = None, step: int = 0, alpha: float | None = None) -> Iterator[None]:
        self.keeping, self.reading = picture, None if alpha is None else (step, alpha)
        yield
        self.keeping = self.reading = None

    def clear(self) -> None:
        self.inputs.update({name: [[], []] for name in self.inputs})

    def stored_bytes(self) -> int:
        return sum(x.nbytes for pictures in self.inputs.values() for steps in pictures for x in steps)


def diffmorpher(setup: Setup) -> Film:
    loop = FactorLoop(setup)
    loop.invert()
    kept = KeptInputs(setup.base.unet)

    def frame(alpha: float) -> Image.Image:
        def during(i: int) -> Any:
            if alpha in (0.0, 1.0):
                return kept.during(picture=int(alpha))
            return kept.during(step=i, alpha=alpha) if loop.shares(i) else plain(i)

        *_, last = loop.sample(alpha, True, during)
        return loop.decode(last)

    def render(alphas: list[float]) -> list[Image.Image]:
        kept.clear()
        first, last = frame(0.0), frame(1.0)
        return [first, *(frame(alpha) for alpha in alphas[1:-1]), last]

    frames, alphas = loop.two_passes(render)
    return Film(frames, alphas, kept.stored_bytes(), number_bytes=4, share=1.0)


# ---- all frames at once ----


def lorakit(setup: Setup) -> Film:
    """What morph.morph does from pictures to frames, without the files that show them."""
    cfg, plan, base = setup.cfg, setup.plan, setup.base
    schedule, names = base.noise_schedule(), list(setup.adapters.values())
    pictures = [read_picture(picture.path, plan.shape) for picture in cfg.images]
    latents = [endpoints.encode_picture(base, picture) for picture in pictures]
    rows = endpoints.conditions(cfg, base, setup.adapters)
    alone = Denoiser(base.unet, schedule, names)
    cache = Path(cfg.output_dir) / "cache"
    files = endpoints.path_names(cfg, plan, base.info, cache, setup.precision, True)
    endpoints.check_fit(cfg, alone, rows, latents, setup.adapters)
    ends = endpoints.prepare_ends(cfg, base, alone, rows, latents, files, lambda: None)
    shared = SharedAttention(base.unet, cfg.attention, cfg.attention_blocks)
    studio = shooting.Studio(
        base=base,
        denoiser=Denoiser(base.unet, schedule, names, shared),
        ends=ends,
        settings=morphing.Settings(
            cfg.guidance_scale, cfg.attention_share, cfg.adain, cfg.anchor, cfg.residual_power
        ),
        control=endpoints.control_embeds(cfg, base, setup.adapters),
        chunks=Chunks(cfg.batch_size),
        distance=metrics.make_distance(cfg.distance, base),
        folder=Path(cfg.output_dir) / "state",
        key=morph_plan.fingerprint(cfg, plan, setup.precision),
    )
    positions, found = shooting.shoot(cfg, plan, studio)
    frames = [endpoints.decode_picture(base, x) for x in found]
    return Film(frames, positions, shared.stored_bytes(), base.dtype.itemsize)


WAYS: dict[str, Callable[[Setup], Film]] = {
    "tutorial": tutorial,
    "features-stored": lambda setup: features(setup, rerun=False),
    "features-rerun": lambda setup: features(setup, rerun=True),
    "diffmorpher": diffmorpher,
    "lorakit": lorakit,
}


# ---- one way in a process of its own ----


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
    latents = endpoints.encode_picture(setup.base, picture)
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


def judge(setup: Setup, film: Film) -> dict[str, Any]:
    """How near the ends come to the VAE's round trip of the pictures, and lorakit.diffusion.metrics of the film."""
    pictures = [read_picture(picture.path, setup.plan.shape) for picture in setup.cfg.images]
    latents = [endpoints.encode_picture(setup.base, picture) for picture in pictures]
    around = [endpoints.decode_picture(setup.base, each[0]) for each in latents]
    distance = metrics.make_distance(setup.cfg.distance, setup.base)
    found = morph_report.measure(film.frames, film.positions, around, distance).metrics
    likeness = [psnr(film.frames[k], around[k]) for k in (0, -1)]
    ends = [value if math.isfinite(value) else None for value in likeness]  # None: equal to the bit
    return {"endpoint_psnr_to_vae": ends} | {name: found[name] for name in SHOWN}


# ---- all ways ----


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """What is not there, made in a folder: a base of SD 1.5's shape, two LoRAs like cfg/morph/fit.json's."""
    folder = Path(args.folder)
    made = {"base": str(args.base), "loras": [str(path) for path in args.loras or ()]}
    if args.shape == "sd15":
        made["base"] = str(folder / "sd15")
        build_sd15(folder / "sd15")
    if not args.loras:
        unet, generator = Base(inspect_base(made["base"])).unet, torch.Generator().manual_seed(0)
        for name in ("random_a", "random_b"):
            for parameter in lora.add_lora(unet, rank=16, alpha=16, adapter_name=name):
                parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
            path = folder / f"{name}.safetensors"
            path.write_bytes(lora_bytes(lora.extract(unet, "unet", name), layout="kohya", metadata={}))
            made["loras"].append(str(path))
    return made


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
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number in range(args.rounds):
            for way in WAYS:
                to = [] if number else [f"--frames-to={folder}"]
                results[way].append(in_process(argv, [*given, f"--one={way}", *to]))
                seconds = results[way][-1]["seconds"]
                print(f"round {number + 1}: {way} took {seconds:.1f} s", file=sys.stderr, flush=True)
        if args.shape == "miniature":
            draw_sheet(args, results, Path(folder))
    summary = summarise(args, results, note)
    print_table(args, summary)
    print(json.dumps(summary))


def draw_sheet(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    rows = [[load_image(path) for path in sorted(folder.glob(f"{way}-[0-9]*.png"))] for way in WAYS]
    captions = [[f"at {at:.2f}" for at in results[way][0]["positions"]] for way in WAYS]
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, row_labels=list(WAYS), captions=captions).save(args.sheet)


def summarise(
    args: argparse.Namespace, results: dict[str, list[dict[str, Any]]], note: str | None
) -> dict[str, Any]:
    """Medians over the rounds, and medians of the ratios to lorakit round by round."""
    one = results["lorakit"][0]
    summary: dict[str, Any] = {"benchmark": "morph", "shape": args.shape}
    summary |= {key: one[key] for key in ("device", "torch", "precision")}
    summary |= {"frames": args.frames, "steps": args.steps, "rounds": args.rounds, "note": note, "ways": {}}
    for way, records in results.items():
        first, pairs = records[0], list(zip(records, results["lorakit"], strict=True))
        ms = [1e3 * r["seconds"] / r["evaluations"] for r in records]
        ours = [1e3 * r["seconds"] / r["evaluations"] for r in results["lorakit"]]
        ratios = {
            "seconds": statistics.median(r["seconds"] / o["seconds"] for r, o in pairs),
            "cpu_seconds": statistics.median(r["cpu_seconds"] / o["cpu_seconds"] for r, o in pairs),
            "ms_per_evaluation": statistics.median(a / b for a, b in zip(ms, ours, strict=True)),
            "evaluations": first["evaluations"] / one["evaluations"],
            "attention_bytes": first["attention_bytes"] / one["attention_bytes"],
        }
        entry = {
            "seconds": round(statistics.median(r["seconds"] for r in records), 3),
            "cpu_seconds": round(statistics.median(r["cpu_seconds"] for r in records), 3),
            "ms_per_evaluation": round(statistics.median(ms), 3),
            "ratio_to_lorakit": {name: round(value, 4) for name, value in ratios.items()},
            "grown_bytes": max(r["peak_bytes"] - r["before_bytes"] for r in records),
            "peak_bytes": max(r["peak_bytes"] for r in records),
        }
        kept = ("evaluations", "passes", "cuda_peak_bytes", "attention_bytes", "attention_bytes_at_50_steps")
        summary["ways"][way] = entry | {key: first[key] for key in (*kept, "metrics") if key in first}
    summary["goals"] = goals(summary["ways"])
    return summary


def goals(ways: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios to lorakit, and what they are to be: at least 3, never below 1, and more than 10 of memory."""
    ratios = {way: entry["ratio_to_lorakit"] for way, entry in ways.items()}
    long = [ways[way]["attention_bytes_at_50_steps"]["fp32"] for way in ("diffmorpher", "lorakit")]
    found = [
        ("seconds of features-stored", ratios["features-stored"]["seconds"], operator.ge, 3),
        ("seconds of features-rerun", ratios["features-rerun"]["seconds"], operator.ge, 3),
        ("seconds per evaluation of tutorial", ratios["tutorial"]["ms_per_evaluation"], operator.ge, 1),
        ("attention memory of diffmorpher", ratios["diffmorpher"]["attention_bytes"], operator.gt, 10),
        (f"the same at {LONG} steps, both in float32", long[0] / long[1], operator.gt, 10),
    ]
    return [
        {"goal": name, "value": round(value, 3), "target": target, "met": reached(value, target)}
        for name, value, reached, target in found
    ]


def print_table(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Ratios are to lorakit. "grown" is the process's peak over what it was before the morph, "CPU s" the time
    that it computed for, which other work on the machine changes less."""
    told = f"{args.shape} on {summary['device']}, precision {summary['precision']}"
    print(f"{told}: {args.frames} frames, {args.steps} steps, median of {args.rounds} rounds")
    if summary["note"]:
        print(f"note: {summary['note']}")
    print(
        f"{'':15s}{'seconds':>9s}{'ratio':>7s}{'CPU s':>8s}{'ratio':>7s}{'evals':>7s}{'passes':>7s}{'ms/eval':>9s}{'ratio':>7s}"
        f"{'grown MB':>10s}{'peak MB':>9s}{'GPU MB':>8s}{'attention MB':>14s}{'ratio':>7s}"
    )
    for way, e in summary["ways"].items():
        ratio, gpu = e["ratio_to_lorakit"], e["cuda_peak_bytes"]
        print(
            f"{way:15s}{e['seconds']:9.2f}{ratio['seconds']:7.2f}{e['cpu_seconds']:8.2f}"
            f"{ratio['cpu_seconds']:7.2f}{e['evaluations']:7d}{e['passes']:7d}"
            f"{e['ms_per_evaluation']:9.2f}{ratio['ms_per_evaluation']:7.2f}{e['grown_bytes'] / 1e6:10.0f}"
            f"{e['peak_bytes'] / 1e6:9.0f}{f'{gpu / 1e6:.0f}' if gpu else '-':>8s}"
            f"{e['attention_bytes'] / 1e6:14.2f}{ratio['attention_bytes']:7.1f}"
        )
    print(f"attention at {LONG} steps, in MB of fp16 and of fp32:")
    for way, e in summary["ways"].items():
        print(f"{way:15s}" + "".join(f"{x / 1e6:10.2f}" for x in e["attention_bytes_at_50_steps"].values()))
    if "metrics" in summary["ways"]["lorakit"]:
        print_metrics(summary["ways"])
        print(f"wrote {args.sheet}")
    for goal in summary["goals"]:
        met = "met" if goal["met"] else "NOT met"
        print(f"goal: {goal['goal']} / lorakit {goal['value']:.2f}, wanted {goal['target']}: {met}")


def print_metrics(ways: dict[str, dict[str, Any]]) -> None:
    """Definitions: lorakit.diffusion.metrics.DEFINITIONS."""
    print(f"{'':15s}{'PSNR to the VAE':>18s}" + "".join(f"{name:>18s}" for name in SHOWN))
    for way, entry in ways.items():
        found = entry["metrics"]
        ends = [f"{x:.1f}" if x is not None else "equal" for x in found["endpoint_psnr_to_vae"]]
        shown = (f"{found[name]:18.3f}" if found[name] is not None else f"{'-':>18s}" for name in SHOWN)
        print(f"{way:15s}{' '.join(ends):>18s}" + "".join(shown))


if __name__ == "__main__":
    main(sys.argv[1:])
