"""The pipeline that runs backwards: pictures of every kind, each under its own LoRA, on any base."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from peft.tuners.lora import LoraLayer

from inversion_pipeline import InversionPipeline
from lorakit.diffusion.lora import active_adapters, load_lora
from lorakit.diffusion.row_weights import RowMixtures
from lorakit.ground.errors import UserError
from lorakit.pictures.images import load_image, psnr, to_array
from lorakit.weights.lora_file import LoraFile

PROMPT = "a photo of mountains"
MOUNTAIN = "dataset/mountain/mountain.jpg", "a photo of rocky mountains at noon with a forest"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_base):
    return quiet(InversionPipeline.from_pretrained(tiny_base))


@pytest.fixture(scope="module")
def miniature():
    return quiet(InversionPipeline.from_pretrained("ckpt/miniature"))


@pytest.fixture(scope="module")
def loras(tiny_base, random_lora):
    """Two LoRA files of U-Net and text encoder for the tiny base."""
    pipe = InversionPipeline.from_pretrained(tiny_base)
    files = []
    for seed in (1, 2):
        unet = random_lora(pipe.unet, seed).modules
        text = random_lora(pipe.text_encoder, seed, "text_encoder").modules
        files.append(LoraFile(unet | text, {}, "diffusers"))
    return files


def with_loras(pipe, files):
    for name, file in zip("ab", files, strict=False):
        load_lora(file, pipe.unet, pipe.text_encoder, adapter_name=name)
    return pipe


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# ---- pictures ----


def test_a_path_a_picture_and_a_tensor_are_one(pipe, pictures):
    path = pictures / "0.png"
    image = load_image(path).resize((16, 16))
    image.save(pictures.parent / "small.png")
    tensor = torch.from_numpy(to_array(image))
    kinds = [str(pictures.parent / "small.png"), pictures.parent / "small.png", image, tensor, tensor[None]]
    noises = [pipe.inverse(kind, PROMPT, 5) for kind in kinds]
    assert all(torch.equal(noise, noises[0]) for noise in noises) and noises[0].shape == (1, 4, 8, 8)
    assert not torch.equal(pipe.inverse(1 - tensor, PROMPT, 5), noises[0])
    assert noises[0].dtype == torch.float32 and not noises[0].requires_grad


def test_a_tensor_of_several_pictures_is_several_pictures(pipe):
    both = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pipe.inverse(both, [PROMPT, "another"], 5)
    for i, prompt in enumerate((PROMPT, "another")):
        torch.testing.assert_close(found[i : i + 1], pipe.inverse(both[i], prompt, 5), rtol=1e-4, atol=1e-4)


def test_pictures_of_different_shapes_keep_their_aspect_and_their_order(pipe, pictures):
    paths = [pictures / f"{i}.png" for i in (0, 1, 2, 3)]
    prompts = [f"{PROMPT} {i}" for i in range(4)]
    found = pipe.invert(paths, prompts, 4)
    shapes = [tuple(one.noise.shape[-2:]) for one in found]
    assert shapes[0] == shapes[3] == (8, 8)
    assert shapes[1][1] > shapes[1][0] and shapes[2] == shapes[1][::-1]
    for path, prompt, one in zip(paths, prompts, found, strict=True):
        (alone,) = pipe.invert(path, prompt, 4)
        torch.testing.assert_close(one.trajectory, alone.trajectory, rtol=1e-4, atol=1e-4)
        assert one.evaluations == alone.evaluations == 4
        assert torch.equal(one.trajectory[-1], pipe.encode_image(path)) or one.trajectory.shape[0] == 5
    noises = pipe.inverse(paths, prompts, 4)
    assert isinstance(noises, list) and len(noises) == 4
    assert pipe.inverse(paths, prompts, 4, width=16, height=24).shape == (4, 4, 12, 8)


def test_one_prompt_does_for_all_and_each_may_have_its_own(pipe, pictures):
    paths = [pictures / "0.png", pictures / "3.png"]
    same = pipe.inverse(paths, PROMPT, 4)
    torch.testing.assert_close(same, pipe.inverse(paths, [PROMPT] * 2, 4), rtol=0, atol=0)
    assert (pipe.inverse(paths, [PROMPT, "a lake"], 4)[1] - same[1]).abs().max() > 1e-4


def test_a_photograph_is_seen_as_in_training(miniature):
    """Scaled to cover, cropped in the middle, at the bucket of its aspect."""
    image = load_image(MOUNTAIN[0])
    latents = miniature.encode_image(MOUNTAIN[0])
    side = miniature.unet.config.sample_size
    assert 0.7 * side**2 <= latents[0, 0].numel() <= side**2
    assert (latents.shape[-1] > latents.shape[-2]) == (image.width > image.height)
    wide = miniature.encode_image(image.crop((0, 0, image.width, image.width // 2)))
    assert wide.shape[-1] / wide.shape[-2] == pytest.approx(2, rel=0.2)
    channels = miniature.vae.config.latent_channels
    tall = miniature.encode_image(MOUNTAIN[0], 72, 104)  # any size that the VAE divides
    assert tall.shape == (1, channels, 13, 9)


# ---- the sampler ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_whatever_sampler_a_base_ships_it_is_ddim_on_the_grid_of_the_inversion(
    tiny_base, tmp_path, prediction_type, pictures
):
    base = tmp_path / "pndm"
    shutil.copytree(tiny_base, base)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        prediction_type=prediction_type,
    )
    scheduler.save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    pipe = quiet(InversionPipeline.from_pretrained(base))
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == prediction_type and not pipe.scheduler.config.clip_sample
    (found,) = pipe.invert(pictures / "0.png", PROMPT, 20)
    pipe.scheduler.set_timesteps(20)
    assert pipe.scheduler.timesteps.tolist() == list(found.grid.timesteps)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() != list(found.grid.timesteps)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_with_the_pipeline_is_reconstruct(pipe, pictures, guidance):
    (found,) = pipe.invert(pictures / "0.png", PROMPT, 10, guidance)
    latents = pipe.reconstruct(found)
    options = dict(guidance_scale=guidance, latents=found.noise, output_type="latent")
    theirs = pipe(PROMPT, 16, 16, 10, **options).images
    torch.testing.assert_close(theirs, latents, rtol=1e-3, atol=1e-3)
    assert (pipe("a lake", 16, 16, 10, **options).images - latents).abs().max() > 1e-2


def test_the_noise_of_a_photograph_leads_back_to_it(miniature):
    path, prompt = MOUNTAIN
    noise = miniature.inverse(path, prompt, 25, width=128, height=128)
    picture = miniature.decode_latents_to_pictures(miniature.encode_image(path, 128, 128))[0]

    def seen(prompt, latents):
        images = miniature(prompt, 128, 128, 25, guidance_scale=1, latents=latents).images
        return psnr(images[0], picture)

    random = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    back = seen(prompt, noise)
    assert back > seen(prompt, random) + 6
    assert back > seen("a photo of a lake at night", noise) + 1
    assert 0.8 < noise.std() < 1.2


# ---- methods ----


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("method", ["obelm", "anchored"])
def test_exact_methods_are_exact_on_any_base_at_any_guidance(pipe, pictures, method, guidance):
    paths = [pictures / "0.png", pictures / "3.png"]
    for path, found in zip(paths, pipe.invert(paths, PROMPT, 10, guidance, method=method), strict=True):
        clean = pipe.encode_image(path)
        assert found.method == method and found.evaluations == 10 * (1 + (guidance != 1))
        torch.testing.assert_close(pipe.reconstruct(found), clean, rtol=0, atol=1e-3)
        (ddim,) = pipe.invert(path, PROMPT, 10, guidance)
        assert relative(pipe.reconstruct(ddim), clean) > 0.1


@pytest.mark.parametrize("method", ["ddim", "ab2", "fixed_point", "obelm", "anchored"])
def test_one_step_is_enough_for_every_method(pipe, pictures, method):
    (found,) = pipe.invert(pictures / "0.png", PROMPT, 1, method=method)
    clean = pipe.encode_image(pictures / "0.png")
    assert len(found.trajectory) == 2
    assert relative(pipe.reconstruct(found), clean) < 0.1


def test_a_fixed_point_spends_more_and_ab2_does_not_and_both_reconstruct_a_photograph_better(miniature):
    path, prompt = MOUNTAIN
    clean = miniature.encode_image(path)
    errors = {}
    for method in ("ddim", "ab2", "fixed_point"):
        (found,) = miniature.invert(path, prompt, 15, method=method)
        errors[method] = relative(miniature.reconstruct(found), clean), found.evaluations
    assert errors["fixed_point"][0] < 0.5 * errors["ddim"][0]
    assert errors["ddim"][1] == 15 < errors["fixed_point"][1] <= 15 * 5
    assert errors["ab2"][0] < 0.5 * errors["ddim"][0] and errors["ab2"][1] == 16


def test_null_text_gives_negative_embeddings_for_each_step(pipe, pictures):
    (found,) = pipe.invert(pictures / "0.png", PROMPT, 5, 3.0, method="null_text", iterations=3)
    assert len(found.negative_embeds) == 5 and 10 <= found.evaluations - 5 <= 5 * 5
    (ddim,) = pipe.invert(pictures / "0.png", PROMPT, 5, 1.0)
    assert torch.equal(found.trajectory, ddim.trajectory)  # its path is that of guidance 1
    assert pipe.reconstruct(found).isfinite().all()


def test_an_edit_with_the_picture_s_own_prompt_is_the_picture_where_it_is_anchored(miniature):
    path, prompt = MOUNTAIN
    clean = miniature.encode_image(path)
    edit = "a photo of rocky mountains at night with a forest"
    back, edited = {}, {}
    for method in ("ddim", "anchored"):
        (found,) = miniature.invert(path, prompt, 15, 3.0, method=method)
        back[method] = miniature.reconstruct(found, prompt)
        edited[method] = miniature.reconstruct(found, edit)
        assert torch.equal(miniature.reconstruct(found), back[method])
    assert torch.equal(back["anchored"], clean) and relative(back["ddim"], clean) > 0.05
    assert relative(edited["anchored"], clean) > 0.2  # the prompt counts
    assert relative(edited["anchored"], edited["ddim"]) > 0.02  # and so does the anchor


# ---- LoRAs ----


def test_each_picture_is_inverted_under_its_own_lora_and_no_other(tiny_base, pictures, loras):
    paths = [pictures / "0.png", pictures / "3.png"]
    pipe = with_loras(quiet(InversionPipeline.from_pretrained(tiny_base)), loras)
    found = pipe.invert(paths, PROMPT, 6, 2.0, adapter_weights=[{"a": 1.0}, {"b": 1.0}])
    for i, path in enumerate(paths):
        only = with_loras(quiet(InversionPipeline.from_pretrained(tiny_base)), loras[i : i + 1])
        (alone,) = only.invert(path, PROMPT, 6, 2.0)
        torch.testing.assert_close(found[i].trajectory, alone.trajectory, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(only.reconstruct(alone), pipe.reconstruct(found[i]), rtol=1e-3, atol=1e-3)
        (other,) = pipe.invert(path, PROMPT, 6, 2.0, adapter_weights={"ba"[i]: 1.0})
        assert relative(other.noise, alone.noise) > 0.05  # the mistake of loading both and inverting
        (both,) = pipe.invert(path, PROMPT, 6, 2.0)
        assert relative(both.noise, alone.noise) > 0.05


def test_in_every_evaluation_each_row_has_the_weights_of_its_picture(pipe, pictures, loras, monkeypatch):
    with_loras(pipe, loras)
    seen = []
    use = RowMixtures.use

    def spy(mixtures, weights):
        if mixtures.model is pipe.unet:
            seen.append((tuple(mixtures.adapters), weights.tolist()))
        return use(mixtures, weights)

    monkeypatch.setattr(RowMixtures, "use", spy)
    options = dict(method="fixed_point", adapter_weights=[{"a": 1.0}, {"b": 0.5}])
    pipe.invert([pictures / "0.png", pictures / "3.png"], PROMPT, 3, 2.0, **options)
    assert len(seen) >= 3 * 3
    for adapters, weights in seen:  # the negative half of the batch, then the positive one
        table = dict(zip(adapters, weights, strict=True))
        assert table["a"] == [1.0, 0.0, 1.0, 0.0] and table["b"] == [0.0, 0.5, 0.0, 0.5]


def test_a_lora_of_the_text_encoder_counts(pipe, pictures, loras, tiny_base):
    with_loras(pipe, loras)
    weights = [{"a": 1.0}, {}, {"a": 0.5, "b": 0.5}]
    found = pipe.invert([pictures / "0.png"] * 3, PROMPT, 2, adapter_weights=weights)
    embeds = [one.rows.prompt_embeds for one in found]
    base = quiet(InversionPipeline.from_pretrained(tiny_base))
    plain, _ = base.encode_prompt(PROMPT, "cpu", 1, False)
    torch.testing.assert_close(embeds[1], plain, rtol=1e-4, atol=1e-5)
    with_loras(base, loras[:1])
    first, _ = base.encode_prompt(PROMPT, "cpu", 1, False)
    torch.testing.assert_close(embeds[0], first, rtol=1e-4, atol=1e-5)
    assert (embeds[0] - plain).abs().max() > 1e-2 and (embeds[2] - embeds[0]).abs().max() > 1e-2
    # an edit's prompt is read by the same text encoder
    anchored = pipe.invert(pictures / "0.png", PROMPT, 2, method="anchored", adapter_weights={"a": 1.0})[0]
    torch.testing.assert_close(
        pipe.reconstruct(anchored, PROMPT), pipe.reconstruct(anchored), rtol=1e-4, atol=1e-4
    )


def test_a_lora_of_the_text_encoder_alone_can_be_weighed(pipe, pictures, random_lora):
    load_lora(
        random_lora(pipe.text_encoder, 5, "text_encoder"), pipe.unet, pipe.text_encoder, adapter_name="t"
    )
    noises = [
        pipe.inverse(pictures / "0.png", PROMPT, 3, adapter_weights={"t": weight}) for weight in (0.0, 1.0)
    ]
    assert (noises[0] - noises[1]).abs().max() > 1e-4
    torch.testing.assert_close(noises[1], pipe.inverse(pictures / "0.png", PROMPT, 3), rtol=1e-4, atol=1e-5)


def test_without_weights_a_picture_takes_what_is_active_also_beside_others(pipe, pictures, loras):
    with_loras(pipe, loras)
    pipe.unet.set_adapter("b")
    pipe.text_encoder.set_adapter("b")
    path = pictures / "0.png"
    (active,) = pipe.invert(path, PROMPT, 4)
    (named,) = pipe.invert(path, PROMPT, 4, adapter_weights={"b": 1.0})
    beside = pipe.invert([path, path], PROMPT, 4, adapter_weights=[{"a": 1.0}, None])
    torch.testing.assert_close(active.noise, named.noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(beside[1].noise, named.noise, rtol=1e-4, atol=1e-4)
    assert relative(beside[0].noise, named.noise) > 0.05


def state(pipe):
    return [
        (
            active_adapters(model),
            [dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)],
            [parameter.requires_grad for parameter in model.parameters()],
        )
        for model in (pipe.unet, pipe.text_encoder)
    ]


def test_what_was_active_is_active_again_also_after_a_fault(pipe, pictures, loras, monkeypatch):
    with_loras(pipe, loras)
    pipe.set_adapters(["b"], [0.7])
    before = state(pipe)
    options = dict(adapter_weights=[{"a": 1.0}, {"b": 1.0}])
    paths = [pictures / "0.png", pictures / "3.png"]
    found = pipe.invert(paths, PROMPT, 2, **options)
    assert state(pipe) == before
    pipe.reconstruct(found[0], "a lake")
    assert state(pipe) == before
    (null,) = pipe.invert(paths[0], PROMPT, 2, 3.0, method="null_text", adapter_weights={"a": 1.0})
    assert state(pipe) == before
    pipe.reconstruct(null)

    def broken(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(pipe.unet, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        pipe.invert(paths, PROMPT, 2, **options)
    assert state(pipe) == before


# ---- half precision ----


def test_a_half_precision_base_works_and_its_vae_does_not_lose_precision(tiny_base, pictures):
    pipe = quiet(InversionPipeline.from_pretrained(tiny_base, dtype=torch.bfloat16))
    path = pictures / "0.png"
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16
    clean = pipe.encode_image(path)
    assert clean.dtype == torch.float32 and pipe.vae.dtype == torch.bfloat16
    for method in ("obelm", "anchored", "ddim"):
        (found,) = pipe.invert(path, PROMPT, 5, method=method)
        error = (pipe.reconstruct(found) - clean).abs().max()
        assert error < 1e-3 if method != "ddim" else error > 1e-3
    noise = pipe.inverse(path, PROMPT, 5, method="obelm")
    image = pipe(PROMPT, 16, 16, 5, guidance_scale=1, latents=noise).images[0]  # noise of another dtype
    assert np.asarray(image).std() > 0


# ---- faults of users ----


def test_faults_are_explained_with_their_remedy(pipe, pictures, loras, tmp_path):
    path = pictures / "0.png"
    with_loras(pipe, loras)
    before = state(pipe)
    cases = [
        (dict(adapter_weights={"c": 1.0}), r"no adapter 'c'; loaded are \['a', 'b'\]"),
        (dict(adapter_weights=[{"a": 1.0}, {}]), "1 pictures, 1 prompts and 2 adapter weights: give one"),
        (dict(prompt=["x", "y"]), "1 pictures, 2 prompts and 1 adapter weights"),
        (dict(method="magic"), "method 'magic': choose one of ddim, ab2, fixed_point"),
        (dict(method="null_text"), "null_text .* guidance_scale 1 does not use; raise it"),
        (dict(n_steps=0), "takes 1 to 999"),
        (dict(n_steps=1000), "takes 1 to 999"),
        (dict(width=16), "give both or neither"),
        (dict(width=15, height=16), "15x16: both must divide by the VAE's factor, 2"),
        (dict(width=0, height=16), "0x16: both must divide"),
        (dict(width=-16, height=16), "-16x16: both must divide"),
        (dict(image=torch.zeros(3, 15, 16)), "16x15: both must divide"),
        (dict(image=torch.zeros(3, 16, 16), width=32, height=32), "keeps the size it has, 16x16: resize it"),
        (dict(image=torch.zeros(1, 16, 16)), r"shape \(1, 16, 16\): give pictures as \(3, H, W\)"),
        (dict(image=torch.zeros(16, 16)), r"shape \(16, 16\): give pictures as"),
        (dict(image=tmp_path / "missing.png"), "missing.png: No such file"),
    ]
    for change, message in cases:
        options = dict(image=path, prompt=PROMPT, n_steps=2) | change
        with pytest.raises(UserError, match=message):
            pipe.invert(**options)
    assert state(pipe) == before
    assert pipe.inverse(path, PROMPT, 2).isfinite().all()


def test_without_loras_naming_one_is_explained(pipe, pictures):
    with pytest.raises(UserError, match="no adapter 'a'; loaded are none"):
        pipe.inverse(pictures / "0.png", PROMPT, 2, adapter_weights={"a": 1.0})


def test_obelm_is_not_edited(pipe, pictures):
    (found,) = pipe.invert(pictures / "0.png", PROMPT, 3, method="obelm")
    for change in ({"prompt": "a lake"}, {"guidance_scale": 3.0}):
        with pytest.raises(UserError, match="obelm reconstructs under .*; try anchored"):
            pipe.reconstruct(found, **change)
    pipe.reconstruct(found, guidance_scale=1.0)


def test_no_pictures_give_no_noise(pipe):
    assert pipe.inverse([], PROMPT, 2) == []
