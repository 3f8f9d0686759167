"""The frames between pictures: exact ends at any guidance, and nothing that depends on how work is cut."""

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from lorakit.diffusion import inversion
from lorakit.diffusion.attention import SharedAttention
from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.film import morphing
from lorakit.film.morphing import Ends, Settings, frame_rows, positions_to_rows
from lorakit.ground.chunks import Chunks

SCHEDULE = NoiseSchedule.from_scheduler(
    DDIMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
)
POSITIONS = [0.0, 0.001, 0.3, 0.5, 0.9, 1.0, 1.4, 2.0, 2.5]  # of a closed film of three pictures


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def adapted(adapted_unet):
    """Three LoRAs in a tiny U-Net, whose output is small enough for a path not to be chaos."""
    unet, _ = adapted_unet(3, targets="attention")
    unet.conv_out.weight.data *= 0.3
    return unet


@pytest.fixture(scope="module")
def adapted_dora(adapted_unet):
    unet, _ = adapted_unet(3, use_dora=True, targets="attention")
    unet.conv_out.weight.data *= 0.3
    return unet


@functools.cache
def make_ends(unet, n, same=False):
    """Three pictures, each inverted under its own LoRA and prompt."""
    rng = torch.Generator().manual_seed(2)
    clean = torch.randn(3, 4, 8, 8, generator=rng)
    embeds, negative = torch.randn(2, 3, 5, 16, generator=rng)
    rows = Rows(embeds, negative[:1].expand(3, -1, -1), torch.eye(3))
    if same:
        clean, rows = clean[[0, 0, 0]], rows[[0, 0, 0]]
    denoiser = Denoiser(unet, SCHEDULE, "abc")
    steps = inversion.invert(clean, SCHEDULE.grid(n), lambda x, t: denoiser(x, t, rows))
    return Ends(torch.stack([clean, *steps]).flip(0), rows)


class Film:
    """All that `denoise` takes, with what a test changes; `states()` runs it."""

    def __init__(
        self,
        unet,
        n=6,
        chunk=64,
        mode: str | None = "kv",
        positions=POSITIONS,
        denoiser=Denoiser,
        ends=None,
        **settings,
    ):
        self.settings = Settings(**settings)
        self.grid = SCHEDULE.grid(n, self.settings.solver)
        self.ends = make_ends(unet, n) if ends is None else ends
        unet = copy.deepcopy(unet)
        self.lies, self.inside = positions_to_rows(positions, 3)
        self.shared = SharedAttention(unet, mode) if mode else None  # type: ignore[arg-type]
        self.denoiser = denoiser(unet, SCHEDULE, "abc", self.shared)
        self.rows = frame_rows(self.ends, self.lies)
        self.chunks = Chunks(chunk)

    def states(self, state=None):
        state = state or morphing.start(self.ends, self.lies, self.settings)
        yield from morphing.denoise(
            self.denoiser, self.ends, self.lies, self.rows, self.grid, self.settings, self.chunks, state
        )

    def last(self):
        return list(self.states())[-1]


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# ---- ends ----


@pytest.mark.parametrize("solver", ["ddim", "ab2"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize(("n", "share"), [(10, 0.0), (10, 0.6), (10, 1.0), (50, 0.6)])
def test_the_film_ends_on_the_pictures_at_any_guidance_steps_and_attention(adapted, n, scale, share, solver):
    keys = {"guidance_scale": scale, "attention_share": share, "solver": solver}
    film = Film(adapted, n, positions=[0.001, 1.999], **keys)
    states = list(film.states())
    assert [state.step for state in states] == list(range(1, n + 1))
    for state in states:
        torch.testing.assert_close(state.ends, film.ends.trajectory[state.step], rtol=0, atol=1e-4)
    near = [
        relative(state, film.ends.trajectory[-1][k])
        for state, k in zip(states[-1].frames, (0, 2), strict=True)
    ]
    assert max(near) < 0.05, near  # at most 0.03 was measured, at guidance 7.5


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_without_anchor_the_film_does_not_end_on_the_pictures(adapted, scale):
    film = Film(adapted, positions=[0.001, 1.999], anchor=False, guidance_scale=scale)
    last = film.last()
    assert (last.ends - film.ends.trajectory[-1]).abs().max() > 0.1
    assert relative(last.frames[0], film.ends.trajectory[-1][0]) > 0.1
    assert relative(last.frames[0], last.ends[0]) < 0.02  # it is continuous all the same
    assert last.residual_ratio.abs().max() == 0


@pytest.mark.parametrize("mode", [None, "kv", "outer", "fused_outer"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_frame_at_a_picture_is_that_picture(adapted, mode, scale):
    """Frames are computed apart from the pictures, so this holds only if every part of them is right."""
    film = Film(adapted, mode=mode, positions=[0.5, 0.5, 0.5, 2.5], guidance_scale=scale)
    film.lies = replace(film.lies, alpha=torch.tensor([0.0, 1.0, 0.5, 1.0], dtype=torch.float64))
    film.rows = frame_rows(film.ends, film.lies)
    frames = film.last().frames
    clean = film.ends.trajectory[-1]
    torch.testing.assert_close(frames[[0, 1, 3]], clean[[0, 1, 0]], rtol=0, atol=1e-3)
    assert (frames[2] - clean[:2]).abs().amax((1, 2, 3)).min() > 0.1


def test_pictures_of_any_path_are_met_even_of_one_that_was_never_inverted(adapted):
    """As where a picture was inverted under another LoRA, prompt or guidance."""
    film = Film(adapted)
    path = torch.randn(7, 3, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    film.ends = replace(film.ends, trajectory=path)
    last = film.last()
    torch.testing.assert_close(last.ends, path[-1], rtol=0, atol=1e-4)
    assert (last.residual_ratio > 0.5).all()  # and it is said that the path does not fit


def test_the_residual_is_small_where_the_path_fits(adapted):
    fine = Film(adapted, n=40, mode=None, positions=[0.0]).last().residual_ratio
    coarse = Film(adapted, n=10, mode=None, positions=[0.0]).last().residual_ratio
    assert (fine < coarse).all() and (fine < 0.5).all()


# ---- equal pictures ----


def test_between_equal_pictures_all_frames_are_that_picture(adapted):
    ends = make_ends(adapted, 10, same=True)
    clean = ends.trajectory[-1][:1]
    errors = {}
    for power in (1.0, 2.0):
        film = Film(adapted, n=10, ends=ends, residual_power=power)
        frames = film.last().frames
        errors[power] = relative(frames, clean.expand_as(frames))
    assert errors[1.0] < 1e-3, errors
    assert 1e-3 < errors[2.0] < 0.5, errors  # half of the residuals is missing halfway; that is its price
    frames = Film(adapted, n=10, residual_power=1.0).last().frames
    assert relative(frames, clean.expand_as(frames)) > 0.5


# ---- chunks and memory ----


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("mode", [None, "kv", "fused_outer"])
def test_the_size_of_chunks_is_irrelevant(adapted, scale, mode):
    films = [Film(adapted, chunk=chunk, mode=mode, guidance_scale=scale) for chunk in (64, 3, 1)]
    states = [film.last() for film in films]
    for other in states[1:]:
        torch.testing.assert_close(other.frames, states[0].frames, rtol=1e-4, atol=1e-4)
    counts = {film.denoiser.evaluations for film in films}
    frames = len(films[0].inside)
    assert counts == {6 * (3 + frames) * (1 + (scale != 1))} and frames == 6


def test_dora_gives_a_film_too_whatever_the_chunks(adapted_dora):
    states = [
        Film(adapted_dora, n=4, chunk=chunk, guidance_scale=3.0, positions=[0.3, 1.5, 2.5]).last()
        for chunk in (64, 1)
    ]
    torch.testing.assert_close(states[0].frames, states[1].frames, rtol=1e-4, atol=1e-4)


class Cramped(Denoiser):
    """A denoiser on a GPU with room for `room` rows."""

    room = 2

    def __call__(self, latents, *args, **options):
        if len(latents) > self.room:
            raise torch.OutOfMemoryError(f"{len(latents)} rows")
        return super().__call__(latents, *args, **options)


@pytest.mark.parametrize("chunk", [64, 5, 3])
def test_where_memory_runs_out_chunks_are_halved_and_the_film_is_the_same(adapted, chunk):
    cramped, roomy = Film(adapted, chunk=chunk, denoiser=Cramped), Film(adapted)
    torch.testing.assert_close(cramped.last().frames, roomy.last().frames, rtol=1e-4, atol=1e-4)
    assert cramped.chunks.size <= 2 < roomy.chunks.size


def test_where_one_row_is_too_much_it_is_said(adapted, monkeypatch):
    monkeypatch.setattr(Cramped, "room", 0)
    film = Film(adapted, denoiser=Cramped)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        film.last()


def test_chunks_give_every_row_once_and_in_order():
    for size in (1, 2, 3, 7, 50):
        seen = []

        def work(at, seen=seen):
            seen.append(at)
            return torch.arange(7)[at]

        assert Chunks(size).map(7, work).tolist() == list(range(7))
        assert len(seen) == -(-7 // size)
    with pytest.raises(ZeroDivisionError):  # only want of memory is met with smaller chunks
        Chunks(4).map(7, lambda at: 1 / 0)


def test_attention_keeps_one_step_whatever_the_number_of_steps(adapted):
    sizes = []
    for n in (5, 20):
        film = Film(adapted, n, attention_share=1.0, positions=[0.5])
        sizes += [film.shared.stored_bytes() for _ in film.states()]
    assert len(sizes) == 25
    # Two layers of up blocks: keys and values of 64 tokens with 8 channels, for three pictures.
    assert set(sizes) == {2 * 2 * 64 * 8 * 3 * 4}


def test_pictures_are_looked_at_in_the_first_steps_only(adapted):
    films = {share: Film(adapted, attention_share=share) for share in (0.0, 0.25, 0.6, 1.0)}
    found = {share: [state.frames for state in film.states()] for share, film in films.items()}
    for share in (0.25, 0.6):
        same = [torch.equal(a, b) for a, b in zip(found[share], found[1.0], strict=True)]
        assert same == [i < share * 6 for i in range(6)]
    assert films[0.0].shared.stored_bytes() == 0
    plain = Film(adapted, mode=None).last().frames
    torch.testing.assert_close(found[0.0][-1], plain, rtol=1e-4, atol=1e-4)


# ---- going on ----


@pytest.mark.parametrize("solver", ["ddim", "ab2"])
@pytest.mark.parametrize("k", [1, 3, 4, 5])
def test_a_film_goes_on_from_any_step_to_the_same_bits(adapted, k, solver):
    keys = {"guidance_scale": 3.0, "solver": solver}
    straight = list(Film(adapted, **keys).states())
    saved = copy.deepcopy(straight[k - 1])
    resumed = list(Film(adapted, **keys).states(saved))
    assert len(resumed) == 6 - k
    for a, b in zip(straight[k:], resumed, strict=True):
        assert a.step == b.step and torch.equal(a.frames, b.frames) and torch.equal(a.ends, b.ends)
        assert torch.equal(a.residual_ratio, b.residual_ratio)
    other = replace(saved, frames=saved.frames + 1e-3)
    assert not torch.equal(list(Film(adapted, **keys).states(other))[-1].frames, straight[-1].frames)


def test_the_second_order_goes_by_what_the_step_before_evaluated(adapted):
    states = list(Film(adapted, solver="ab2").states())
    assert all(state.noise is not None for state in states)
    assert all(state.noise is None for state in Film(adapted).states())
    forgetful = replace(copy.deepcopy(states[2]), noise=None)
    assert not torch.equal(list(Film(adapted, solver="ab2").states(forgetful))[-1].frames, states[-1].frames)


def test_states_are_not_changed_by_going_on(adapted):
    states = Film(adapted).states()
    first = next(states)
    kept = copy.deepcopy(first)
    list(states)
    assert torch.equal(first.frames, kept.frames) and torch.equal(first.ends, kept.ends)


def test_a_film_of_pictures_alone_has_no_frames_to_make(adapted):
    film = Film(adapted, positions=[0.0, 1.0, 2.0])
    last = film.last()
    assert len(last.frames) == 0 and film.inside == []
    torch.testing.assert_close(last.ends, film.ends.trajectory[-1], rtol=0, atol=1e-4)


# ---- what frames are made of ----


def test_positions_are_told_apart_into_pictures_and_frames_between():
    lies, inside = positions_to_rows([0.0, 0.25, 1.0, 1.5, 2.0, 2.75, 3.0], 3)
    assert inside == [1, 3, 5]
    assert lies.left.tolist() == [0, 1, 2] and lies.right.tolist() == [1, 2, 0]  # the last one closes it
    assert lies.alpha.tolist() == [0.25, 0.5, 0.75] and lies.alpha.dtype == torch.float64
    lies, inside = positions_to_rows([0.5, 1.5], 2)
    assert lies.left.tolist() == [0, 1] and lies.right.tolist() == [1, 0]
    lies, inside = positions_to_rows([0, 1.0], 2)
    assert inside == [] and len(lies.left) == 0


def test_frames_are_made_under_mixed_loras_and_prompts():
    rng = torch.Generator().manual_seed(0)
    embeds, negative = torch.randn(2, 3, 5, 16, generator=rng)
    ends = Ends(torch.zeros(2, 3, 4, 8, 8), Rows(embeds, negative, 0.8 * torch.eye(3)))
    lies, _ = positions_to_rows([0.25, 1.5, 2.75], 3)
    rows = frame_rows(ends, lies)
    torch.testing.assert_close(
        rows.weights,
        0.8 * torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5], [0.75, 0.0, 0.25]]),
        rtol=0,
        atol=1e-6,
    )
    for found, of in ((rows.prompt_embeds, embeds), (rows.negative_embeds, negative)):
        for row, (a, b, alpha) in enumerate([(0, 1, 0.25), (1, 2, 0.5), (2, 0, 0.75)]):
            torch.testing.assert_close(found[row], torch.lerp(of[a], of[b], alpha), rtol=1e-5, atol=1e-6)
            assert (found[row] - of[a]).abs().max() > 0.1
    control = torch.ones(5, 16)
    bowed = frame_rows(ends, lies, control)
    assert (bowed.prompt_embeds[1] - rows.prompt_embeds[1]).abs().max() > 0.1
    assert torch.equal(bowed.negative_embeds, rows.negative_embeds)


def test_the_frames_noise_lies_on_the_arc_with_statistics_in_between(adapted):
    film = Film(adapted, positions=[0.25, 0.5, 0.75])
    plain = morphing.start(film.ends, film.lies, Settings(adain=False))
    moved = morphing.start(film.ends, film.lies, Settings())
    noise = film.ends.trajectory[0]
    for i, alpha in enumerate((0.25, 0.5, 0.75)):
        wanted = torch.lerp(noise[0].std((1, 2)), noise[1].std((1, 2)), alpha)
        torch.testing.assert_close(moved.frames[i].std((1, 2)), wanted, rtol=1e-4, atol=1e-4)
        assert (plain.frames[i].std((1, 2)) - wanted).abs().max() > 1e-3
    assert torch.equal(moved.ends, noise) and moved.step == 0


def test_every_setting_changes_the_film(adapted):
    base = Film(adapted).last().frames
    for change in (
        {"guidance_scale": 3.0},
        {"attention_share": 0.2},
        {"adain": False},
        {"anchor": False},
        {"residual_power": 1.0},
        {"solver": "ab2"},
        {"mode": "outer"},
        {"mode": "fused_outer"},
    ):
        assert (Film(adapted, **change).last().frames - base).abs().max() > 1e-4, change
    assert torch.equal(Film(adapted).last().frames, base)


def test_frames_change_little_by_little(adapted):
    positions = [k / 8 for k in range(1, 8)]
    film = Film(adapted, positions=positions)
    clean = film.ends.trajectory[-1]
    frames = [clean[0], *film.last().frames, clean[1]]
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(frames)]
    assert max(steps) < 4 * sum(steps) / len(steps), steps
