"""Caches and batches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit.diffusion.models import Base
from lorakit.ground.shards import Shards
from lorakit.pictures.folder import read_folder
from lorakit.pictures.views import views_of
from lorakit.training.caches import (
    Cache,
    TextNames,
    encode_prompts,
    encode_views,
    missing_views,
    rows_together,
    write_entry,
)
from lorakit.training.data import Augmentation, TrainingData
from lorakit.weights.base import inspect_base, weights_hash

CPU, NAME = torch.device("cpu"), bytes(range(20))


def cache_latents(views, base, cache_dir, vae_hash="vae", threads=0) -> int:
    """Encode what is missing; return how many that were."""
    shards = Shards(cache_dir)
    missing = missing_views(views, shards, vae_hash)
    count = len(list(encode_views(missing, base, shards, vae_hash, image_options={}, threads=threads)))
    shards.seal()
    return count


def moments_of(view, cache_dir) -> torch.Tensor:
    return Cache(Shards(cache_dir), [view.entry("vae")], CPU)[0]


def text_states(prompts, base, cache_dir) -> Cache:
    names, shards = TextNames(base, "text"), Shards(cache_dir)
    encode_prompts(prompts, names, base, shards)
    return Cache(shards, names, CPU)


PLAIN = Augmentation()


@pytest.fixture(scope="module")
def base(tiny_base):
    return Base(inspect_base(str(tiny_base)))


@pytest.fixture
def make_data(base, pictures, tmp_path):
    """Factory of TrainingData over the small pictures at 16x16, with a cache of its own."""

    def make(augmentation=PLAIN, seed=0, flip=False, crops=1, budget=1 << 30):
        table = read_folder(pictures)
        rows = [views_of(row, (16, 16), flip=flip, crops=crops) for row in table.rows]
        views = [view for row in rows for view in row]
        cache_latents(views, base, tmp_path, "vae")
        prompts = ["", *(row.caption for row in table.rows)]
        return TrainingData(
            table,
            [(16, 16)] * 4,
            Cache(Shards(tmp_path), [view.entry("vae") for view in views], CPU, budget),
            [len(row) for row in rows],
            base,
            text_states=text_states(prompts, base, tmp_path),
            token_ids=None,
            augmentation=augmentation,
            num_timesteps=1000,
            seed=seed,
        )

    return make


# ---- caches ----


@pytest.mark.parametrize("tensor", [torch.randn(8, 3, 5), torch.arange(6.0)[::2]])
def test_an_entry_comes_back_exactly(tmp_path, tensor):
    shards = Shards(tmp_path)
    write_entry(shards, NAME, tensor)
    assert torch.equal(Cache(shards, [NAME], CPU)[0], tensor)


def test_only_what_is_missing_or_damaged_is_encoded(base, pictures, tmp_path):
    views = [views_of(row, (16, 16))[0] for row in read_folder(pictures).rows]
    assert cache_latents(views, base, tmp_path, "vae", threads=2) == 4
    first = moments_of(views[0], tmp_path)
    assert cache_latents(views, base, tmp_path, "vae") == 0
    [shard] = tmp_path.glob("*.shard")
    content = bytearray(shard.read_bytes())
    content[200] ^= 1  # in the first entry
    shard.write_bytes(content)
    assert cache_latents(views, base, tmp_path, "vae") == 1
    assert torch.equal(moments_of(views[0], tmp_path), first)
    assert cache_latents(views, base, tmp_path, "vae") == 0
    assert cache_latents(views, base, tmp_path, "another vae") == 4


def test_an_edited_picture_is_encoded_again_under_the_same_name(base, pictures, tmp_path):
    row = read_folder(pictures).rows[0]
    cache_latents(views_of(row, (16, 16)), base, tmp_path, "vae")
    edited = replace(row, sha256="0" * 64)
    assert cache_latents(views_of(edited, (16, 16)), base, tmp_path, "vae") == 1


def test_cached_moments_are_those_of_the_vae(base, pictures, tmp_path):
    from lorakit.pictures.images import load_image

    view = views_of(read_folder(pictures).rows[1], (16, 16))[0]
    cache_latents([view], base, tmp_path, "vae")
    pixels = torch.from_numpy(view.pixels(load_image(view.row.source)))[None]
    batch = torch.zeros(rows_together(view.shape, CPU), *pixels.shape[1:])
    batch[:1] = pixels
    cached = moments_of(view, tmp_path)
    torch.testing.assert_close(cached, base.encode(batch)[0], rtol=0, atol=0)
    torch.testing.assert_close(cached, base.encode(pixels)[0], rtol=0, atol=1e-5)


def test_moments_do_not_depend_on_what_was_encoded_beside_them(base, pictures, tmp_path):
    """Nor does a picture's place in its batch, nor how many there were, nor how many threads decode."""
    rows = read_folder(pictures).rows
    views = [view for row in rows for view in views_of(row, (16, 16), flip=True, crops=16)]
    assert len(views) > rows_together((16, 16), CPU)
    cache_latents(views, base, tmp_path / "together", threads=4)
    for number in (0, len(views) // 2, len(views) - 1):
        cache_latents(views[number : number + 1], base, tmp_path / "alone")
        alone = moments_of(views[number], tmp_path / "alone")
        assert torch.equal(alone, moments_of(views[number], tmp_path / "together"))
        assert not torch.equal(alone, moments_of(views[number - 1], tmp_path / "together"))


def test_what_was_encoded_before_a_stop_stays(base, pictures, tmp_path):
    views = [views_of(row, (16, 16))[0] for row in read_folder(pictures).rows]
    encoding = encode_views(views, base, Shards(tmp_path), "vae", image_options={})
    assert [next(encoding), next(encoding)] == views[:2]
    encoding.close()
    assert missing_views(views, Shards(tmp_path), "vae") == views[2:]


@pytest.mark.parametrize(("budget", "held"), [(1 << 30, 2), (1 << 11, 1), (0, 0)])
def test_latents_are_the_same_wherever_they_lie(make_data, budget, held):
    data = make_data(budget=budget)
    for _ in range(2):
        batch, reference = data.batch([0, 3], [5, 6]), make_data().batch([0, 3], [5, 6])
        assert torch.equal(batch.latents, reference.latents)
        assert len(data.latents.held) == held


def test_text_states_are_those_of_the_text_encoder_and_survive_without_it(base, tmp_path, tiny_base):
    prompt = "a photo of mountains"
    states = text_states([prompt, ""], base, tmp_path)
    expected = base.text_encoder(base.tokenize([prompt]))[0][0]
    torch.testing.assert_close(states[prompt], expected, rtol=0, atol=0)
    fresh = Base(inspect_base(str(tiny_base)))
    assert torch.equal(text_states([prompt], fresh, tmp_path)[prompt], states[prompt])
    assert "text_encoder" not in vars(fresh)  # never loaded


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_a_shorter_dtype_takes_half_the_disk_and_only_rounds(base, pictures, tmp_path, dtype, rounding):
    views, prompts = [views_of(row, (16, 16))[0] for row in read_folder(pictures).rows], ["mountains", ""]
    read = {}
    for each in ("float32", dtype):  # one cache: entries of two dtypes do not meet
        shards, names = Shards(tmp_path), TextNames(base, "text", each)
        assert len(missing_views(views, shards, "vae", each)) == len(views)
        list(encode_views(views, base, shards, "vae", image_options={}, dtype=each))
        encode_prompts(prompts, names, base, shards, each)
        shards.seal()
        moments = [Cache(shards, [view.entry("vae", each)], CPU)[0] for view in views]
        read[each] = [*moments, *(Cache(shards, names, CPU)[prompt] for prompt in prompts)]
    for exact, rounded in zip(*read.values(), strict=True):
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        torch.testing.assert_close(rounded, exact, rtol=rounding, atol=1e-7)
    whole, half = (path.stat().st_size for path in sorted(tmp_path.glob("*.shard")))
    assert half < 0.6 * whole


# ---- batches ----


def test_a_sample_does_not_depend_on_its_batch(make_data):
    data = make_data(Augmentation(noise_offset=0.1, caption_dropout=0.3), flip=True, crops=4)
    together = data.batch([0, 3, 0], [10, 11, 12])
    for i, (row, position) in enumerate([(0, 10), (3, 11), (0, 12)]):
        alone = data.batch([row], [position])
        for name in ("latents", "noise", "timesteps", "prompt_embeds"):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)[0]), name


def test_the_same_picture_gets_new_noise_timestep_and_latent_each_time(make_data):
    batch = make_data().batch([0, 0], [1, 2])
    assert not torch.equal(batch.noise[0], batch.noise[1])
    assert not torch.equal(batch.latents[0], batch.latents[1])
    assert batch.timesteps[0] != batch.timesteps[1]


def test_seed_changes_everything_and_options_change_nothing_else(make_data):
    plain, other = make_data().batch([0], [1]), make_data(seed=1).batch([0], [1])
    assert not torch.equal(plain.noise, other.noise)
    dropped = make_data(Augmentation(caption_dropout=1.0)).batch([0], [1])
    assert torch.equal(plain.noise, dropped.noise) and torch.equal(plain.timesteps, dropped.timesteps)
    assert not torch.equal(plain.prompt_embeds, dropped.prompt_embeds)


def test_latents_are_drawn_from_the_posterior(make_data, base):
    data = make_data()
    mean, logvar = data.latents[0].chunk(2)
    draws = torch.stack([data.batch([0], [p]).latents[0] for p in range(400)]) / base.scaling_factor
    std = torch.exp(0.5 * logvar)
    assert ((draws.mean(0) - mean).abs() / std).max() < 0.3
    torch.testing.assert_close(draws.std(0), std, rtol=0.2, atol=0)


def test_noise_offset_moves_whole_channels(make_data):
    plain = make_data().batch([0] * 64, range(64)).noise
    offset = make_data(Augmentation(noise_offset=0.5)).batch([0] * 64, range(64)).noise - plain
    torch.testing.assert_close(
        offset, offset.mean(dim=(2, 3), keepdim=True).expand_as(offset), rtol=0, atol=1e-5
    )
    assert abs(offset.mean(dim=(2, 3)).std() - 0.5) < 0.08


@pytest.mark.parametrize("bias", [-0.5, 0.0, 2.0])
def test_timesteps_have_the_density_that_their_bias_says(make_data, bias):
    data = make_data(Augmentation(timestep_bias=bias))
    steps = torch.tensor([data._timestep(position) for position in range(4000)])
    assert 0 <= int(steps.min()) and int(steps.max()) < data.num_timesteps
    for share in (0.25, 0.5, 0.75):  # below t lie t^(bias + 1) of them
        below = float((steps < share * data.num_timesteps).double().mean())
        assert abs(below - share ** (bias + 1)) < 0.03, share


def test_a_bias_of_timesteps_moves_nothing_else_and_not_the_validation(make_data):
    plain, biased = make_data(), make_data(Augmentation(timestep_bias=2.0))
    ours, theirs = plain.batch([0] * 8, range(8)), biased.batch([0] * 8, range(8))
    assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.latents, theirs.latents)
    assert not torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(plain.fixed_batch(0, 8).timesteps, biased.fixed_batch(0, 8).timesteps)
    again = make_data(Augmentation(timestep_bias=2.0)).batch([0, 0], [6, 7])
    assert torch.equal(again.timesteps, theirs.timesteps[6:])  # of its place in the run alone


def test_caption_dropout_drops_its_share(make_data):
    data = make_data(Augmentation(caption_dropout=0.25))
    dropped = sum(data._prompt(0, position) == "" for position in range(2000))
    assert 440 < dropped < 560


def test_flips_and_crops_are_drawn_evenly(make_data):
    data = make_data(flip=True, crops=4)
    assert data.views == [2, 8, 8, 2]  # a square has no other crop
    seen = {
        tuple(data.batch([1], [p]).latents.mean(dim=(0, 2, 3)).mul(50).round().tolist()) for p in range(200)
    }
    assert len(seen) >= 8


def test_the_fixed_batch_never_changes_and_spreads_its_timesteps(make_data):
    first, again = make_data(seed=0).fixed_batch(0, 4), make_data(seed=9).fixed_batch(0, 4)
    assert first.timesteps.tolist() == [125, 375, 625, 875]
    assert torch.equal(first.noise, again.noise) and torch.equal(first.latents, again.latents)
    assert not torch.equal(first.noise[0], first.noise[1])


def test_samples_are_named_for_a_run_that_diverged(make_data):
    text = make_data().describe([0, 2], [7, 8])
    assert "0.png at timestep" in text and "2.png" in text


def test_cache_names_are_hashes_of_real_weights(tiny_base):
    info = inspect_base(str(tiny_base))
    assert len(weights_hash(info.files["vae"])) == 64
    assert json.loads((Path(tiny_base) / "vae/config.json").read_text())["scaling_factor"] == 0.5
