"""The pictures as the ends of a film: each under its own prompt and LoRA, inverted once, kept by content."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorakit.diffusion import inversion
from lorakit.diffusion.denoiser import Denoiser, Rows
from lorakit.diffusion.models import Base
from lorakit.diffusion.paths import decode_picture, encode_picture
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.film import endpoints
from lorakit.film.config import MorphConfig
from lorakit.film.morph_plan import fingerprint, make_morph_plan
from lorakit.ground import randomness
from lorakit.ground.config import load_config
from lorakit.ground.errors import OutputError, UserError
from lorakit.pictures.folder import Row
from lorakit.pictures.images import load_image, read_picture, to_array
from lorakit.pictures.views import View
from lorakit.weights.base import inspect_base


@pytest.fixture
def opened(morph_settings):
    """Factory of config, plan and base of a morph, and the names of its adapters, loaded."""

    def make(**changes):
        cfg = load_config(MorphConfig, None, morph_settings(**changes)).config
        plan, base = make_morph_plan(cfg), Base(inspect_base(cfg.pretrained_model_name_or_path))
        return cfg, plan, base, endpoints.load_adapters(base, plan.loras)

    return make


@pytest.fixture
def text_lora(tiny_base, random_lora, tmp_path) -> str:
    """A LoRA file that adapts the text encoder too."""
    from transformers import CLIPTextModel

    from lorakit.weights.lora_file import lora_bytes

    encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder")
    modules = random_lora(encoder, 9, component="text_encoder", targets="attention").modules
    path = tmp_path / "text.safetensors"
    path.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    return str(path)


def latents_of(cfg, plan, base):
    pictures = [read_picture(picture.path, plan.shape) for picture in cfg.images]
    return [encode_picture(base, picture) for picture in pictures]


# ---- pictures ----


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 24), (40, 40)])
def test_a_picture_is_seen_as_in_training(pictures, shape):
    for number in range(3):
        path = pictures / f"{number}.png"
        image = load_image(path)
        seen = read_picture(str(path), shape)
        assert seen.size == shape
        row = Row(str(path), path.name, "", image.width, image.height, "", "metadata.jsonl:1")
        assert (to_array(seen) == View(row, shape).pixels(image)).all()


def test_latents_are_the_mean_of_the_posterior_and_come_back_through_the_decoder(opened):
    cfg, plan, base, _ = opened(loras=(False, False))
    picture = read_picture(cfg.images[0].path, plan.shape)
    found = encode_picture(base, picture)
    image = torch.from_numpy(to_array(picture))[None]
    with torch.no_grad():
        wanted = base.vae.encode(image).latent_dist.mode() * base.scaling_factor
        back = base.vae.decode(wanted / base.scaling_factor).sample[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert found.shape[1:] == plan.latent_shape
    decoded = to_array(decode_picture(base, found[0]))
    assert np.abs(decoded - back.clamp(-1, 1).numpy()).max() <= 1 / 127.5


# ---- prompts and LoRAs ----


def test_each_picture_lies_under_its_own_prompt_and_lora(opened):
    cfg, _, base, adapters = opened(count=3, loras=(True, False, True))
    rows = endpoints.conditions(cfg, base, adapters)
    assert rows.weights.tolist() == [[1, 0], [0, 0], [0, 1]]
    for k, picture in enumerate(cfg.images):
        with torch.no_grad():
            alone = base.text_encoder(base.tokenize([picture.prompt]))[0]
        torch.testing.assert_close(rows.prompt_embeds[k], alone[0])
    assert (rows.prompt_embeds[0] != rows.prompt_embeds[1]).any()
    without = endpoints.conditions(cfg, base, adapters, loras=False)
    assert without.weights.abs().sum() == 0
    torch.testing.assert_close(without.prompt_embeds, rows.prompt_embeds)


def test_a_lora_of_the_text_encoder_acts_on_its_own_picture_alone_and_by_its_weight(
    opened, morph_settings, text_lora
):
    def embeds(weight):
        images = load_config(MorphConfig, None, morph_settings()).config.model_dump(mode="json")["images"]
        images[0] |= {"lora": text_lora, "lora_weight": weight}
        images[1]["lora"] = None
        cfg, _, base, adapters = opened(images=images, negative_prompt="fog", anchor_prompt="a hill")
        rows = endpoints.conditions(cfg, base, adapters)
        return rows, endpoints.control_embeds(cfg, base, adapters), cfg, base, adapters

    rows, control, cfg, base, adapters = embeds(1.0)
    plain = endpoints.conditions(cfg, base, adapters, loras=False)
    assert (rows.prompt_embeds[0] - plain.prompt_embeds[0]).abs().max() > 1e-2
    assert (rows.negative_embeds[0] - plain.negative_embeds[0]).abs().max() > 1e-2
    torch.testing.assert_close(rows.prompt_embeds[1], plain.prompt_embeds[1])
    torch.testing.assert_close(rows.negative_embeds[1], plain.negative_embeds[1])
    none, control_again, *_ = embeds(0.0)
    torch.testing.assert_close(none.prompt_embeds, plain.prompt_embeds)
    torch.testing.assert_close(control, control_again)  # the anchor prompt knows no LoRA
    half, _, *_ = embeds(0.5)
    assert (half.prompt_embeds[0] - rows.prompt_embeds[0]).abs().max() > 1e-3


def test_without_an_anchor_prompt_there_is_no_control(opened):
    cfg, _, base, adapters = opened(loras=(False, False))
    assert endpoints.control_embeds(cfg, base, adapters) is None


@pytest.fixture
def word(tmp_path) -> str:
    """A folder with the word zwx, of two vectors."""
    (tmp_path / "words").mkdir()
    save_file({"emb_params": 3 * torch.randn(2, 16)}, tmp_path / "words/zwx.safetensors")
    return str(tmp_path / "words")


def test_a_learnt_word_in_a_prompt_is_read_and_part_of_what_a_film_is_made_of(opened, word, tmp_path):
    def made(syntax: str):
        cfg, plan, base, adapters = opened(prompt_syntax=syntax, embedding_dirs=[word] * (syntax != "plain"))
        images = [
            picture.model_copy(update={"prompt": text})
            for picture, text in zip(cfg.images, ("a zwx lake", "a lake, " * 20), strict=True)
        ]
        cfg = cfg.model_copy(update={"images": tuple(images)})
        rows = endpoints.conditions(cfg, base, adapters)
        names = endpoints.path_names(cfg, plan, base.info, Path("cache"), "no", True)
        return rows.prompt_embeds, names, fingerprint(cfg, plan, "no")

    plain, with_word = made("plain"), made("a1111")
    assert plain[0].shape[1] == 32 and with_word[0].shape[1] == 64  # the long prompt is read to its end
    assert (with_word[0][0, 2:4] - plain[0][0, 2:4]).abs().max() > 0.1
    assert not set(plain[1]) & set(with_word[1]) and plain[2] != with_word[2]
    save_file({"emb_params": 3 * torch.randn(2, 16)}, tmp_path / "words/zwx.safetensors")
    other = made("a1111")
    assert not set(other[1]) & set(with_word[1]) and other[2] != with_word[2]
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "words/unused.safetensors")
    assert made("a1111")[1:] == other[1:]  # a word that no prompt has is nothing to the film


# ---- inversion and its cache ----


def prepared(opened_, folder: Path, calls: list, **changes):
    cfg, plan, base, adapters = opened_
    cfg = cfg.model_copy(update=changes)
    rows = endpoints.conditions(cfg, base, adapters)
    denoiser = Denoiser(base.unet, base.noise_schedule(), list(adapters.values()))
    names = endpoints.path_names(cfg, plan, base.info, folder, "no", True)
    latents = latents_of(cfg, plan, base)
    ends = endpoints.prepare_ends(cfg, base, denoiser, rows, latents, names, lambda: calls.append(1))
    return ends, denoiser, names, latents


@pytest.mark.parametrize("method", ["ddim", "ab2"])
def test_each_picture_is_inverted_alone_under_its_own_conditions(opened, tmp_path, method):
    state = opened(count=3, loras=(True, False, True), inversion_method=method)
    cfg, _, base, adapters = state
    calls: list = []
    ends, denoiser, names, latents = prepared(state, tmp_path, calls)
    steps = cfg.num_inference_steps
    spent = 3 * (steps + (method == "ab2"))
    assert ends.trajectory.shape[:2] == (steps + 1, 3) and denoiser.evaluations == len(calls) == spent
    grid = denoiser.schedule.grid(steps, method)
    for k in range(3):
        assert (ends.trajectory[-1, k] == latents[k][0]).all()

        def predict(x, timestep, weights):
            rows = replace(ends.rows[k : k + 1], weights=weights)  # noqa: B023
            return denoiser(x, timestep, rows)

        def path(weights):
            with torch.no_grad():
                return list(inversion.invert(latents[k], grid, lambda x, t: predict(x, t, weights)))[-1]  # noqa: B023

        own = path(ends.rows.weights[k : k + 1])
        assert (ends.trajectory[0, k] == own[0]).all()
        other = path(ends.rows.weights[(k + 1) % 3][None])
        assert (ends.trajectory[0, k] - other[0]).abs().max() > 1e-3
    again, _, _, _ = prepared(state, tmp_path, calls)
    assert len(calls) == spent and (again.trajectory == ends.trajectory).all()


def test_a_path_does_not_depend_on_what_else_is_in_the_film(opened, tmp_path):
    ends, *_ = prepared(opened(count=3, loras=(True, False, True)), tmp_path / "a", [])
    alone, *_ = prepared(opened(count=2, loras=(True, False)), tmp_path / "b", [])
    assert (alone.trajectory == ends.trajectory[:, :2]).all()


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello, this is no safetensors file"),
    "another film's": lambda path: shutil.copy(path.parent.parent / "other.safetensors", path),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_made_anew(opened, tmp_path, name):
    from safetensors.torch import save_file

    save_file({"trajectory": torch.zeros(3, 1, 4, 8, 8)}, tmp_path / "other.safetensors")
    state, calls = opened(loras=(False, False)), []
    ends, _, names, _ = prepared(state, tmp_path, calls)
    whole, before = len(calls), names[0].read_bytes()
    DAMAGES[name](names[0])
    again, *_ = prepared(state, tmp_path, calls)
    assert (again.trajectory == ends.trajectory).all()
    assert len(calls) == 1.5 * whole and names[0].read_bytes() == before


def test_an_entry_that_cannot_be_read_is_an_error_of_input(opened, tmp_path):
    state = opened(loras=(False, False))
    _, _, names, _ = prepared(state, tmp_path, [])
    names[0].unlink()
    names[0].mkdir()
    with pytest.raises(UserError):
        prepared(state, tmp_path, [])


def test_a_cache_that_is_full_is_an_error_of_output(opened, tmp_path, monkeypatch):
    import errno

    def full(path, data):
        raise OSError(errno.ENOSPC, "", str(path))

    monkeypatch.setattr("lorakit.ground.publish.write_synced", full)
    with pytest.raises(OutputError, match="free some space"):
        prepared(opened(loras=(False, False)), tmp_path, [])


CHANGES = {
    "steps": {"num_inference_steps": 7},
    "method": {"inversion_method": "fixed_point"},
    "guidance of the inversion": {"inversion_guidance_scale": 2.0},
    "prediction type": {"prediction_type": "v_prediction"},
    "size": {"width": 24},
}
SAME = {
    "guidance of sampling": {"guidance_scale": 3.0},
    "negative prompt, without guidance": {"negative_prompt": "fog"},
    "iterations of another method": {"fixed_point_iterations": 5},
    "frames": {"frames": 9},
    "attention": {"attention": "off"},
    "the other picture": {"count": 3},
}


@pytest.fixture
def entries(morph_settings):
    """Factory of the names of the cache entries of both pictures."""

    def make(images=None, base=None, dtype="no", loras=True, **changes):
        cfg = load_config(MorphConfig, None, morph_settings(**changes)).config
        update = {"images": images} if images else {}
        update |= {"pretrained_model_name_or_path": str(base)} if base else {}
        cfg = cfg.model_copy(update=update)
        plan = make_morph_plan(cfg)
        return endpoints.path_names(cfg, plan, plan.base, Path("cache"), dtype, loras)

    return make


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_path_depends_on_makes_another_entry(entries, name):
    assert not set(entries(**CHANGES[name])) & set(entries())


@pytest.mark.parametrize("name", SAME)
def test_what_a_path_does_not_depend_on_makes_none(entries, name):
    assert entries(**SAME[name])[:2] == entries()


def test_guided_inversion_depends_on_the_negative_prompt(entries):
    guided = {"inversion_guidance_scale": 2.0}
    assert not set(entries(**guided, negative_prompt="fog")) & set(entries(**guided))


def test_an_entry_is_named_by_the_content_of_files(entries, morph_settings, fitted, tiny_base, tmp_path):
    cfg = load_config(MorphConfig, None, morph_settings()).config
    one = entries()
    assert one[0] != one[1]
    assert not set(entries(dtype="bf16")) & set(one) and not set(entries(loras=False)) & set(one)

    def first(**changes):
        name = entries(images=(cfg.images[0].model_copy(update=changes), cfg.images[1]))
        assert name[1] == one[1]  # the other picture's entry is its own affair
        return name[0]

    moved = str(shutil.copy(cfg.images[0].path, tmp_path / "moved.png"))
    lora = str(shutil.copy(fitted[0], tmp_path / "moved.safetensors"))
    assert first(path=moved, lora=lora) == one[0]
    shutil.copy(fitted[1], lora)
    others = [first(lora=lora), first(prompt="x"), first(lora_weight=0.5), first(lora=None)]
    others.append(first(path=cfg.images[1].path))
    assert len({one[0], *others}) == 6
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    assert entries(base=base) == one
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    assert not set(entries(base=base)) & set(one)


# ---- whether a LoRA fits its picture ----


class Fitting:
    """A denoiser that errs by `error(picture, weights)` in the mean square; it knows the pictures."""

    def __init__(self, pictures, adapters, error):
        alpha_bar = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
        self.schedule = NoiseSchedule(alpha_bar)
        self.pictures, self.adapters, self.error = pictures, adapters, error
        self.calls = 0

    def __call__(self, noisy, timestep, rows):
        a = float(self.schedule.alpha_bar[timestep])
        out, self.calls = [], self.calls + len(noisy)
        for x, weights in zip(noisy, rows.weights, strict=True):
            candidates = [(x - math.sqrt(a) * p[0]) / math.sqrt(1 - a) for p in self.pictures]
            k = min(range(len(candidates)), key=lambda k: float(candidates[k].square().mean()))
            off = torch.tensor(self.error(k, weights.tolist())).sqrt()
            out.append(candidates[k] + off)
        return torch.stack(out)


def fit_of(opened_, error):
    cfg, plan, base, adapters = opened_
    pictures = [torch.full((1, 4, 8, 8), 40.0 * k) for k in range(len(cfg.images))]  # easy to tell apart
    denoiser = Fitting(pictures, list(adapters.values()), error)
    count = len(pictures)
    rows = Rows(torch.zeros(count, 1, 1), torch.zeros(count, 1, 1), torch.zeros(count, len(adapters)))
    return *endpoints.check_fit(cfg, denoiser, rows, pictures, adapters), denoiser


@pytest.fixture
def doras(tiny_unet, random_lora, tmp_path) -> list[str]:
    """Two DoRA files for the tiny base, their magnitudes half as large again as those of its weights."""
    from lorakit.weights.lora_file import lora_bytes

    paths = [tmp_path / f"dora_{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        modules = {
            name: replace(
                pair, magnitude=pair.magnitude * (1 + torch.rand(len(pair.up), generator=generator))
            )
            for name, pair in random_lora(
                tiny_unet(), number, targets="attention", use_dora=True
            ).modules.items()
        }
        path.write_bytes(lora_bytes(modules, layout="diffusers", metadata={}))
    return [str(path) for path in paths]


@pytest.mark.slow
@torch.no_grad()
def test_no_lora_is_the_base_alone_under_the_pictures_own_prompt_whatever_doras_are_loaded(opened, doras):
    """The same figure on ckpt/miniature, by prompt: docs/LOG.md."""
    cfg, plan, bare, _ = opened(loras=(False, False))
    schedule, pictures = bare.noise_schedule(), latents_of(cfg, plan, bare)

    def by_hand(start, prompt):
        embeds, losses = bare.text_encoder(bare.tokenize([prompt]))[0], []
        for timestep in (200, 400, 600, 800):
            a = float(schedule.alpha_bar[timestep])
            noise = randomness.normal(tuple(start.shape), 0, "fit", timestep)
            noisy = math.sqrt(a) * start + math.sqrt(1 - a) * noise
            losses.append(float((bare.unet(noisy, timestep, embeds).sample - noise).square().mean()))
        return sum(losses) / 4

    wanted = [by_hand(start, picture.prompt) for start, picture in zip(pictures, cfg.images, strict=True)]
    images = cfg.model_dump(mode="json")["images"]
    for named in ((0, 1), (1, 0), (0, None)):
        own = [
            image | {"lora": None if number is None else doras[number]}
            for image, number in zip(images, named, strict=True)
        ]
        cfg, plan, base, adapters = opened(images=own)
        denoiser = Denoiser(base.unet, base.noise_schedule(), list(adapters.values()))
        rows = endpoints.conditions(cfg, base, adapters)
        table, _ = endpoints.check_fit(cfg, denoiser, rows, pictures, adapters)
        assert table["none"] == pytest.approx(wanted, rel=1e-5)
        assert all(abs(table[path][0] / wanted[0] - 1) > 1e-4 for path in adapters)
    assert abs(by_hand(pictures[0], "") / wanted[0] - 1) > 1e-4  # the prompt decides it too


def test_losses_are_those_of_each_lora_on_each_picture(opened, fitted):
    state = opened(count=3, loras=(True, False, True))
    table, warnings, denoiser = fit_of(state, lambda k, w: 0.1 + 0.01 * k + 0.2 * w[0] + 0.4 * w[1])
    assert list(table) == ["none", str(fitted[0]), str(fitted[2])] and denoiser.calls == 3 * 3 * 4
    for column, extra in zip(table.values(), (0.0, 0.2, 0.4), strict=True):
        assert column == pytest.approx([0.1 + extra, 0.11 + extra, 0.12 + extra], rel=1e-3)
    assert [w.split(":")[0] for w in warnings] == ["images.0", "images.2"]  # worse than no LoRA
    assert all("no LoRA fits" in w for w in warnings)


def own(k, weights):
    return 0.2 if weights[k] else 0.3


def test_right_loras_are_not_warned_of(opened):
    assert fit_of(opened(), own)[1] == []


def test_loras_that_are_mixed_up_are_warned_of_with_both_losses(opened, fitted):
    _, warnings, _ = fit_of(opened(), lambda k, w: own(1 - k, w))
    assert len(warnings) == 2
    assert f"{fitted[1]} fits" in warnings[0] and f"than {fitted[0]} does" in warnings[0]
    assert "loss 0.2000 against 0.3000" in warnings[0] and "images.1" in warnings[1]


def test_a_lora_that_fits_both_nearly_alike_is_no_mistake(opened):
    assert fit_of(opened(), lambda k, w: 0.3 - 0.1 * w[k] - 0.1005 * w[1 - k])[1] == []


def test_one_lora_for_both_pictures_is_no_mistake(opened, morph_settings):
    images = load_config(MorphConfig, None, morph_settings()).config.model_dump(mode="json")["images"]
    images[1]["lora"] = images[0]["lora"]
    assert fit_of(opened(images=images), lambda k, w: 0.3 - 0.1 * w[0])[1] == []
