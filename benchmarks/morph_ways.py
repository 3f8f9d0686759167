"""Six ways to make one morph, each as its source has it; see benchmarks/morph.py."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch import Tensor

from benchmarks.morph_setup import Film, Setup
from lorakit.diffusion import inversion, lora, metrics
from lorakit.diffusion.attention import Between, SharedAttention
from lorakit.diffusion.denoiser import Denoiser
from lorakit.diffusion.interpolate import adain, bezier, slerp
from lorakit.diffusion.paths import decode_picture, encode_picture
from lorakit.diffusion.row_weights import lora_layers
from lorakit.diffusion.schedule import ddim_step
from lorakit.film import endpoints, morph_plan, morphing, shooting
from lorakit.ground.chunks import Chunks
from lorakit.ground.errors import UserError
from lorakit.pictures.images import read_picture, to_array
from lorakit.weights.lora_file import LoraPair

SHIPPED = Path(__file__).resolve().parents[1] / "cfg/morph/mountain.json"


def even_alphas(count: int) -> list[float]:
    return [k / (count - 1) for k in range(count)]


# ---- tutorial: one frame at a time ----


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
            start = encode_picture(self.base, image)
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
        return decode_picture(self.base, latents[0])

    def two_passes(self, render: Callable[[list[float]], list[Image.Image]]) -> Any:
        """Frames and alphas, after DiffMorpher's eqs. 11-12.

        A first film is measured, and alpha as a piecewise linear function of the length seen so far is read
        off at equal lengths.
        """
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
    """LoRA weights, slerp of the noise, DDIM at guidance 1."""
    loop = Loop(setup)
    loop.invert()
    alphas, frames = even_alphas(setup.cfg.frames), []
    for alpha in alphas:
        *_, last = loop.sample(alpha, False, plain)
        frames.append(loop.decode(last))
    return Film(frames, alphas)


# ---- features: frames look at the pictures' keys and values ----


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


# ---- diffmorpher (Zhang et al. 2024, https://arxiv.org/abs/2312.07409) ----


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
    """Two passes over all frames; in each the pictures' frames come first, whose inputs the others read."""
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


# ---- lorakit: all frames at once ----


def lorakit(setup: Setup) -> Film:
    """What morph.make_film does from pictures to frames, without the files that show them."""
    cfg, plan, base = setup.cfg, setup.plan, setup.base
    schedule, names = base.noise_schedule(), list(setup.adapters.values())
    pictures = [read_picture(picture.path, plan.shape) for picture in cfg.images]
    latents = [encode_picture(base, picture) for picture in pictures]
    rows = endpoints.conditions(cfg, base, setup.adapters)
    alone = Denoiser(base.unet, schedule, names)
    cache = Path(cfg.output_dir) / "cache"
    files = endpoints.path_names(cfg, plan, base.info, cache, setup.precision, True)
    endpoints.check_fit(cfg, alone, rows, latents, setup.adapters)
    ends = endpoints.prepare_ends(cfg, base, alone, rows, latents, files, lambda: None)
    assert cfg.attention != "off"  # frames look at the pictures in each of the ways
    shared = SharedAttention(base.unet, cfg.attention, cfg.attention_blocks)
    studio = shooting.Studio(
        base=base,
        denoiser=Denoiser(base.unet, schedule, names, shared),
        ends=ends,
        settings=morphing.Settings.of(cfg),
        control=endpoints.control_embeds(cfg, base, setup.adapters),
        chunks=Chunks(cfg.batch_size),
        distance=metrics.make_distance(cfg.distance, base),
        folder=Path(cfg.output_dir) / "state",
        key=morph_plan.fingerprint(cfg, plan, setup.precision),
    )
    positions, found = shooting.shoot(cfg, plan, studio)
    frames = [decode_picture(base, x) for x in found]
    return Film(frames, positions, shared.stored_bytes(), base.dtype.itemsize)


def shipped(setup: Setup) -> Film:
    """The same by ab2, in as small a share of the steps as cfg/morph/mountain.json takes of ddim's fifty."""
    kept = json.loads(SHIPPED.read_text(encoding="utf-8"))
    steps = max(2, round(setup.cfg.num_inference_steps * kept["num_inference_steps"] / 50))
    fewer = {"num_inference_steps": steps} | {key: kept[key] for key in ("solver", "inversion_method")}
    fewer["probe_steps"] = min(steps, setup.cfg.probe_steps)
    setup.cfg = setup.cfg.model_copy(update=fewer)
    return lorakit(setup)


WAYS: dict[str, Callable[[Setup], Film]] = {
    "tutorial": tutorial,
    "features-stored": lambda setup: features(setup, rerun=False),
    "features-rerun": lambda setup: features(setup, rerun=True),
    "diffmorpher": diffmorpher,
    "lorakit": lorakit,
    "shipped": shipped,
}
