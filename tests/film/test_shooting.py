"""A film's frames: paced evenly, resumed at any step to the same bits, developed once."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.models import Base
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.film import morphing, shooting
from lorakit.film.morph_folder import frame_paths, open_frame
from lorakit.film.shooting import Studio, develop, probe, shoot
from lorakit.ground.chunks import Chunks
from lorakit.ground.errors import OutputError, StoppedError

SCHEDULE = NoiseSchedule(torch.linspace(0.999, 0.005, 1000).double())


def sigmoid(u: float) -> float:
    """Little changes near the pictures and much in the middle of each segment."""
    k = math.floor(u)
    return k + 1 / (1 + math.exp(-14 * (u - k - 0.5)))


def jump(u: float) -> float:
    return math.floor(u) + (u - math.floor(u) > 0.3)


def still(u: float) -> float:
    return 0.0


class Distance:
    """Of frames that are one number each."""

    def between(self, f, g):
        return (f[0] - g[0]).abs().flatten().double()

    def matrix(self, f):
        return (f[0].flatten()[:, None] - f[0].flatten()).abs().double()


class Stage:
    """A studio whose frame at u is the number curve(u); it remembers what it was asked for."""

    def __init__(self, curve):
        self.curve, self.distance, self.asked = curve, Distance(), []

    def render(self, positions, stride=1):
        self.asked.append((list(positions), stride))
        return torch.tensor([self.curve(u) for u in positions], dtype=torch.float64)[:, None]

    def look(self, latents):
        return [latents]

    steps = Studio.steps


def config(**changes):
    settings = dict(
        frames=17,
        easing="linear",
        reschedule="probe",
        probe_points=9,
        probe_steps=13,
        num_inference_steps=50,
        loop=False,
        images=(1, 2),
    )
    return SimpleNamespace(**(settings | changes))


def shot(curve=sigmoid, pictures=2, **changes):
    cfg = config(images=tuple(range(pictures)), **changes)
    stage = Stage(curve)
    plan = SimpleNamespace(segments=pictures if cfg.loop else pictures - 1)
    positions, latents = shoot(cfg, plan, stage)
    assert latents.flatten().tolist() == [curve(u) for u in positions]
    return positions, stage


@pytest.fixture(autouse=True)
def one_process():
    PartialState()


def unevenness(curve, positions):
    steps = [abs(curve(b) - curve(a)) for a, b in pairwise(positions)]
    return max(steps) / min(steps)


# ---- pacing ----


@pytest.mark.parametrize("reschedule", ["probe", "full", "select", "off"])
@pytest.mark.parametrize("curve", [sigmoid, jump, still])
@pytest.mark.parametrize(("pictures", "loop", "frames"), [(2, False, 9), (3, True, 5), (4, False, 2)])
def test_every_film_passes_every_picture_in_order(reschedule, curve, pictures, loop, frames):
    positions, _ = shot(curve, pictures, reschedule=reschedule, loop=loop, frames=frames)
    segments = pictures if loop else pictures - 1
    assert len(positions) == segments * (frames - 1) + (not loop)
    assert all(map(math.isfinite, positions)) and all(a < b for a, b in pairwise(positions))
    whole = [u for u in positions if u == math.floor(u)]
    assert whole == [float(k) for k in range(pictures)]
    assert positions[0] == 0 and positions[-1] <= segments


def test_one_probe_makes_the_sigmoid_even_and_a_full_pass_more_so():
    """Goal: max/min of the steps at most 1.4 after a probe of nine points."""
    found = {name: unevenness(sigmoid, shot(reschedule=name)[0]) for name in ("off", "probe", "full")}
    assert found["off"] > 15
    assert found["probe"] <= 1.4
    assert found["full"] < min(found["probe"], 1.1)


def test_a_probe_costs_less_than_a_full_pass():
    def work(reschedule):
        _, stage = shot(reschedule=reschedule)
        return sum(len(positions) * -(-50 // stride) for positions, stride in stage.asked[:-1])

    assert 0 < work("probe") <= 0.6 * 17 * 50 < work("full")


def test_speed_is_even_over_the_whole_film_and_not_in_each_segment():
    def long_then_short(u):
        return 3 * u if u < 1 else 3 + (u - 1)

    positions, _ = shot(long_then_short, 3, frames=17)
    first = sum(u < 1 for u in positions)
    assert first == 24 and len(positions) == 33  # three quarters of the way, three quarters of the steps
    assert unevenness(long_then_short, positions) < 1.05
    selected, _ = shot(long_then_short, 3, frames=17, reschedule="select")
    assert sum(u < 1 for u in selected) == 16  # chosen within each segment


def test_a_probe_looks_in_few_steps_and_where_most_changes():
    cfg, stage = config(), Stage(sigmoid)
    known, steps = probe(cfg, SimpleNamespace(segments=1), stage)
    assert len(known) == cfg.probe_points and len(steps) == len(known) - 1
    assert known[0] == 0 and known[-1] == 1 and all(stride == 4 for _, stride in stage.asked)
    even, later = stage.asked[0][0], stage.asked[1][0]
    assert np.diff(even) == pytest.approx([0.25] * 4)
    assert not set(even) & set(later) and sum(0.25 < u < 0.75 for u in later) > len(later) / 2
    assert sum(steps) == pytest.approx(sigmoid(1 - 1e-12) - sigmoid(0), abs=0.01)


def test_a_probe_of_what_stands_still_does_not_look_again():
    stage = Stage(still)
    known, steps = probe(config(), SimpleNamespace(segments=1), stage)
    assert len(stage.asked) == 1 and set(steps) == {0.0} and len(known) == 5


def test_select_renders_twice_as_many_and_chooses_among_them():
    positions, stage = shot(reschedule="select", frames=9)
    ((dense, stride),) = stage.asked
    assert len(dense) == 17 and stride == 1 and set(positions) < set(dense)
    assert unevenness(sigmoid, positions) < 0.5 * unevenness(sigmoid, np.linspace(0, 1 - 1e-9, 9))


@pytest.mark.parametrize("reschedule", ["off", "probe"])
def test_easing_slows_down_where_it_says(reschedule):
    def steps(easing):
        positions, _ = shot(lambda u: u, reschedule=reschedule, easing=easing)
        return np.diff(positions)

    assert steps("linear") == pytest.approx([1 / 16] * 16, rel=1e-3)
    assert steps("cosine")[0] < 0.5 / 16 < 1.2 / 16 < steps("cosine")[8]
    assert steps("sine")[8] < 0.8 / 16 < 1.2 / 16 < steps("sine")[0]


# ---- passes that are resumed ----


@pytest.fixture
def studio(tiny_unet, tmp_path):
    """Factory of a studio on a tiny U-Net: three pictures, eight steps."""
    unet = tiny_unet()

    def make(folder="state", **changes):
        rng = torch.Generator().manual_seed(3)
        trajectory = torch.randn(9, 3, 4, 8, 8, generator=rng)
        rows = Rows(*torch.randn(2, 3, 5, 16, generator=rng), torch.zeros(3, 0))
        base = SimpleNamespace(device=torch.device("cpu"), decode=lambda latents: latents[:, :3].clamp(-1, 1))
        base.decode_pictures = lambda latents: Base.decode_pictures(base, latents)
        settings = dict(
            base=base,
            denoiser=Denoiser(unet, SCHEDULE),
            ends=morphing.Ends(trajectory, rows),
            settings=morphing.Settings(guidance_scale=2.0),
            control=None,
            chunks=Chunks(2),
            distance=Distance(),
            folder=tmp_path / folder,
            key="key",
        )
        return Studio(**(settings | changes))

    return make


POSITIONS = [0.0, 0.2, 0.7, 1.0, 1.5, 2.0, 2.5]


class Stop:
    """Raises in its n-th call, as a signal does."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self, evaluations):
        self.count += 1
        if self.count == self.at:
            raise StoppedError("stopped", 15)


@pytest.mark.parametrize("solver", ["ddim", "ab2"])
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_pass_that_was_stopped_at_any_step_goes_on_to_the_same_bits(studio, stop, solver):
    settings = morphing.Settings(guidance_scale=2.0, solver=solver)
    whole = studio("straight", settings=settings)
    straight = whole.render(POSITIONS)
    broken = studio(step=Stop(stop), settings=settings)
    with pytest.raises(StoppedError):
        broken.render(POSITIONS)
    again = studio(settings=settings)
    assert (again.render(POSITIONS) == straight).all()
    assert again.denoiser.evaluations == (8 - stop) * (3 + 4) * 2  # only the steps that were left
    assert (again.residual_ratio == whole.residual_ratio).all()


def test_pictures_are_their_own_paths_end_and_are_not_among_the_frames(studio):
    made = studio()
    latents = made.render(POSITIONS)
    for index, k in ((0, 0), (3, 1), (5, 2)):
        assert (latents[index] == made.ends.trajectory[-1, k]).all()
    assert made.denoiser.evaluations == 8 * (3 + 4) * 2
    assert latents.shape == (7, 4, 8, 8) and len({x.sum().item() for x in latents}) == 7


def test_a_probe_passes_every_so_many_th_node(studio):
    made = studio()
    made.render(POSITIONS, stride=3)
    assert made.denoiser.evaluations == 3 * (3 + 4) * 2
    assert len(made.residual_ratio) == 0  # that of whole passes


@pytest.mark.parametrize(
    "change", [{"key": "other"}, {"positions": [*POSITIONS[:-1], 2.6]}, {"stride": 2}], ids=str
)
def test_the_state_of_another_pass_is_not_taken(studio, change):
    with pytest.raises(StoppedError):
        studio(step=Stop(5)).render(POSITIONS)
    other = studio(key=change.pop("key", "key"))
    options = {"positions": POSITIONS} | change
    found = other.render(**options)
    fresh = studio("fresh", key=other.key)
    assert (found == fresh.render(**options)).all()
    assert other.denoiser.evaluations == fresh.denoiser.evaluations


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_damaged_state_begins_the_pass_anew(studio, content):
    straight = studio("straight").render(POSITIONS)
    with pytest.raises(StoppedError):
        studio(step=Stop(5)).render(POSITIONS)
    (state,) = studio().folder.iterdir()
    state.write_bytes(state.read_bytes()[:-30] if content is None else content)
    again = studio()
    assert (again.render(POSITIONS) == straight).all() and again.denoiser.evaluations == 8 * 7 * 2


def test_a_chunk_size_that_memory_forced_is_kept_by_a_resumed_pass(studio):
    """The size of a chunk is in the bits of what comes out."""
    with pytest.raises(StoppedError):
        studio(step=Stop(5), chunks=Chunks(1)).render(POSITIONS)
    again = studio(chunks=Chunks(4))
    again.render(POSITIONS)
    assert again.chunks.size == 1


def test_states_are_saved_as_the_clock_says(studio, monkeypatch):
    monkeypatch.setattr(shooting, "SAVE_SECONDS", 0.0)
    count = iter(range(99))

    def killed(evaluations):
        if next(count) == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        studio(step=killed).render(POSITIONS)
    again = studio()
    again.render(POSITIONS)
    assert again.denoiser.evaluations == 3 * (3 + 4) * 2
    monkeypatch.setattr(shooting, "SAVE_SECONDS", 1e9)
    count = iter(range(99))
    with pytest.raises(RuntimeError, match="killed"):
        studio("never", step=killed).render(POSITIONS)
    assert not studio("never").folder.exists()


def test_a_state_that_cannot_be_written_ends_the_pass(studio, tmp_path, monkeypatch):
    monkeypatch.setattr(shooting, "SAVE_SECONDS", 0.0)
    (tmp_path / "state").write_text("a file")
    with pytest.raises(OutputError, match="rename"):
        studio().render(POSITIONS)


# ---- frames as files ----


def test_frames_are_developed_once_and_stay_as_they_are(studio, tmp_path):
    made = studio()
    latents = made.render(POSITIONS)
    develop(made, latents, tmp_path / "frames")
    paths = sorted((tmp_path / "frames").iterdir())
    assert paths == frame_paths(tmp_path / "frames", 7) and paths[6].name == "0006.png"
    with Image.open(paths[2]) as image:
        wanted = np.rint((latents[2, :3].clamp(-1, 1).numpy().transpose(1, 2, 0) + 1) * 127.5)
        assert image.mode == "RGB" and (np.asarray(image) == wanted).all()
    before = {path: path.stat().st_mtime_ns for path in paths}
    paths[4].unlink()
    develop(made, latents, tmp_path / "frames")
    assert all(path.stat().st_mtime_ns == before[path] for path in paths if path != paths[4])
    assert open_frame(paths[4]).size == (8, 8)


def test_a_signal_between_frames_keeps_those_that_are_there(studio, tmp_path):
    made = studio()
    latents = made.render(POSITIONS)
    made.step = Stop(3)
    with pytest.raises(StoppedError):
        develop(made, latents, tmp_path / "frames")
    assert len(list((tmp_path / "frames").iterdir())) == 3


def test_a_whole_base_looks_at_what_it_decodes(tiny_base, studio):
    from lorakit.diffusion.metrics import EncoderDistance
    from lorakit.weights.base import inspect_base

    base = Base(inspect_base(str(tiny_base)))
    made = studio(base=base, distance=EncoderDistance(base))
    features = made.look(made.render(POSITIONS))
    assert all(len(level) == 7 for level in features)
    steps = made.steps(features)
    assert len(steps) == 6 and min(steps) > 0
    same = [torch.cat([level[:1], level[:1]]) for level in features]
    assert made.steps(same) == [0.0]
