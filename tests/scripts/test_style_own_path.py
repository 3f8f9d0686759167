"""style_transfer.py from a picture's own noise: exactness, edges, the cache, faults of users."""

import json
from itertools import pairwise

import narrow
import numpy as np
import pytest
import torch
from galleries import (
    ONE_LEVEL,
    command_line,
    distance,
    pictures_in,
    report_in,
    runner,
    save_controlnet,
)
from PIL import Image

import style_transfer
from lorakit.diffusion.control import Controlled
from lorakit.diffusion.models import Base
from lorakit.diffusion.paths import decode_picture, encode_picture
from lorakit.ground.config import ConfigError
from lorakit.ground.errors import UserError
from lorakit.pictures.images import read_picture
from lorakit.sampling.recipe import CONFIG_CHUNK
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import lora_bytes

OWN, STYLED = "a photo of hills", "an ink drawing of hills"
WITH_EDGES = {"controlnet_conditioning_scale": 1.0}


@pytest.fixture(scope="module")
def base(tiny_base):
    return Base(inspect_base(str(tiny_base)))


@pytest.fixture(scope="module")
def controlnet(base, tmp_path_factory):
    """One that has an effect."""
    return save_controlnet(tmp_path_factory.mktemp("controlnets") / "filled", base.unet, seed=1)


@pytest.fixture
def arguments(tiny_base, pictures, tmp_path, controlnet):
    """Factory of the command line for one picture on the tiny base, its edges held."""

    def make(*more, **changes):
        keys = dict(
            image=str(pictures / "0.png"), prompt=STYLED, source_prompt=OWN, start_from="inversion",
            num_inference_steps=4, strength=0.5, controlnet=controlnet,
        )  # fmt: skip
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    return runner(style_transfer, arguments, tmp_path)


def round_trip(base, path, shape):
    """What the autoencoder makes of a picture, (H, W, 3)."""
    latents = encode_picture(base, read_picture(path, shape))
    return np.asarray(decode_picture(base, latents[0]), np.int16)


@pytest.fixture
def trip(base, pictures):
    return round_trip(base, pictures / "0.png", (16, 16))


# ---- exactness ----


@pytest.mark.quick
def test_own_words_without_style_give_the_round_trip_to_the_bit_at_any_strength(run, trip, fitted):
    common = {"prompt": OWN, "loras": [{"path": str(fitted[0]), "weight": 0}]}
    folder = run(grid={"strength": [0.25, 0.5, 1], "guidance_scale": [1, 3]}, **common)
    assert len(pictures_in(folder)) == 6
    assert all((found == trip).all() for found in pictures_in(folder))
    anew = run(start_from="noise", name="noise", **common)
    styled = run(name="styled", grid={"guidance_scale": [1, 3]}, **(common | {"prompt": STYLED}))
    assert all(distance(found, trip) > ONE_LEVEL for found in [*pictures_in(anew), *pictures_in(styled)])


def test_that_is_no_special_case(run, trip, fitted):
    """What is next to no style is within rounding of none, with edges, guidance and every step."""
    common = {"prompt": OWN, "strength": 1.0, "guidance_scale": 3.0}
    faint, full = (
        pictures_in(run(loras=[{"path": str(fitted[0]), "weight": w}], name=f"{w}", **common))[0]
        for w in (1e-7, 1.0)
    )
    assert distance(faint, trip) <= ONE_LEVEL < distance(full, trip)


def test_the_more_weight_or_strength_the_further_from_the_picture(run, trip, fitted):
    folder = run(
        prompt=OWN,
        loras=[{"path": str(fitted[0])}],
        grid={"weight": [0, 0.25, 0.5, 1], "strength": [0.5, 1]},
    )
    far = np.array([np.abs(found - trip).mean() for found in pictures_in(folder)]).reshape(2, 4)
    assert (far[:, 0] == 0).all() and all((more > less).all() for less, more in pairwise(far.T)), far
    assert (far[1, 1:] > far[0, 1:]).all(), far


def test_a_share_of_the_anchor_lies_between_and_none_is_sampling_from_the_picture_s_noise(run, trip):
    common = {"prompt": OWN, "guidance_scale": 3.0, "strength": 1.0}
    folder = run(grid={"anchor": [0, 0.01, 0.5, 0.99, 1]}, **common)
    far = [np.abs(found - trip).mean() for found in pictures_in(folder)]
    assert all(less < more for more, less in pairwise(far)) and far[-1] == 0, far
    own, other = (run(anchor=0, source_prompt=words, name=words[2:7], **common) for words in (OWN, STYLED))
    assert distance(pictures_in(own)[0], pictures_in(folder)[0]) == 0
    assert distance(pictures_in(own)[0], pictures_in(other)[0]) > ONE_LEVEL


def test_without_edges_it_is_the_formula_of_the_anchored_path(run, base, pictures):
    """z_{i+1} = z*_{i+1} + step(z_i; style) - step(z*_i; own words), by hand."""
    from lorakit.diffusion.schedule import ddim_step
    from lorakit.sampling.samplers import encode_prompts

    grid = base.noise_schedule().grid(4)
    own, styled = encode_prompts(base, [OWN, STYLED]).split(1)

    def step(x, i, j, states):
        """From the level of node i to that of node j, with the noise of the timestep between them."""
        noise = base.unet(x, grid.timesteps[min(i, j)], states).sample
        return ddim_step(x, noise, grid.alpha_bar[i], grid.alpha_bar[j])

    with torch.no_grad():
        path = [encode_picture(base, read_picture(pictures / "0.png", (16, 16)))]
        for i in (4, 3, 2, 1):
            path.insert(0, step(path[0], i, i - 1, own))
        z = path[1]
        for i in (1, 2, 3):
            z = path[i + 1] + step(z, i, i + 1, styled) - step(path[i], i, i + 1, own)
    wanted = np.asarray(base.decode_pictures(z)[0], np.int16)
    made = pictures_in(run(controlnet=None, strength=0.75))[0]
    assert distance(made, wanted) <= ONE_LEVEL
    assert distance(pictures_in(run(controlnet=None, strength=0.5, name="later"))[0], wanted) > ONE_LEVEL


def test_a_narrow_sd15_is_restyled_too(run, tmp_path, pictures):
    folder = narrow.write_base(tmp_path, "modern")
    keys = {"width": 64, "height": 64, "num_inference_steps": 2, "controlnet": None, "strength": 1.0}
    made = run(pretrained_model_name_or_path=str(folder), grid={"prompt": [OWN, STYLED]}, **keys)
    own, styled = pictures_in(made)
    wanted = round_trip(Base(inspect_base(str(folder))), pictures / "0.png", (64, 64))
    assert distance(own, wanted) == 0 and distance(styled, own) > ONE_LEVEL


# ---- edges ----


def test_edges_are_held_by_their_scale_and_between_start_and_end_only(run):
    names = {
        "none": {"controlnet": None}, "zero": {"controlnet_conditioning_scale": 0}, "whole": WITH_EDGES,
        "first": WITH_EDGES | {"control_guidance_end": 0.5},
        "last": WITH_EDGES | {"control_guidance_start": 0.5},
    }  # fmt: skip
    made = {name: pictures_in(run(name=name, strength=1.0, **keys))[0] for name, keys in names.items()}
    assert distance(made["none"], made["zero"]) == 0
    different = [made[name] for name in ("none", "whole", "first", "last")]
    for i, one in enumerate(different):
        assert all(distance(one, other) > ONE_LEVEL for other in different[i + 1 :])


def test_a_controlled_unet_is_the_library_s(base, controlnet):
    from lorakit.sampling.restyling import load_controlnet

    net, generator = load_controlnet(controlnet, base), torch.Generator().manual_seed(0)
    channels, width = base.info.latent_channels, base.unet.config.cross_attention_dim
    x, states, hint = (
        torch.randn(shape, generator=generator)
        for shape in ((2, channels, 8, 8), (2, 5, width), (1, 3, 16, 16))
    )
    options = {"encoder_hidden_states": states, "return_dict": False}
    with torch.no_grad():
        down, middle = net(x, 7, controlnet_cond=hint.repeat(2, 1, 1, 1), conditioning_scale=0.5, **options)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        wanted, plain = base.unet(x, 7, **options, **added)[0], base.unet(x, 7, **options)[0]
        model = Controlled(base.unet, net, hint, 0.5, {7})
        assert torch.equal(model(x, 7, **options)[0], wanted)
        assert not torch.equal(wanted, plain)
        assert torch.equal(model(x, 8, **options)[0], base.unet(x, 8, **options)[0])


# ---- folders, captions, the cache ----


def test_a_picture_does_not_depend_on_the_others_of_its_batch_and_has_its_own_words(run, pictures, tmp_path):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number, words in enumerate(["a photo of hills", "a photo of a lake", None]):
        Image.open(pictures / "0.png").rotate(90 * number).save(folder / f"{number}.png")
        if words:
            (folder / f"{number}.txt").write_text(words)
    words = {"prompt": "an ink drawing of {caption}", "source_prompt": "a photo of {caption}"}
    made = run(image=str(folder), batch_size=4, **words)
    sources = [
        json.loads(Image.open(made / f"000{i}.png").text[CONFIG_CHUNK])["source_prompt"] for i in range(3)
    ]
    assert sources == ["a photo of hills", "a photo of a lake", "a photo"]
    assert [row["prompt"] for row in report_in(made)["pictures"]][1:] == [
        "an ink drawing of a lake",
        "an ink drawing",
    ]
    alone = run(image=str(folder / "1.png"), name="alone", **words)
    assert distance(pictures_in(alone)[0], pictures_in(made)[1]) <= ONE_LEVEL
    other = run(image=str(folder / "1.png"), name="other", **(words | {"source_prompt": OWN}))
    assert distance(pictures_in(other)[0], pictures_in(made)[1]) > ONE_LEVEL


def test_paths_are_kept_by_content_and_the_same_with_and_without_them(run, tmp_path, monkeypatch):
    from lorakit.diffusion import inversion

    cache, calls = tmp_path / "out/cache/paths", []
    invert = inversion.invert
    monkeypatch.setattr(inversion, "invert", lambda *args: calls.append(1) or invert(*args))
    first = run(grid={"strength": [0.5, 1], "guidance_scale": [1, 3]})
    assert len(calls) == 1 == len(list(cache.iterdir()))
    again = run(grid={"strength": [0.5, 1], "guidance_scale": [1, 3]}, name="again")
    assert len(calls) == 1
    assert all((a == b).all() for a, b in zip(pictures_in(first), pictures_in(again), strict=True))
    run(source_prompt=STYLED, name="other")
    run(num_inference_steps=8, name="finer")
    assert len(calls) == 3 == len(list(cache.iterdir()))
    run(cache_dir=str(tmp_path / "mine"), name="elsewhere")
    assert len(calls) == 4 and len(list((tmp_path / "mine/paths").iterdir())) == 1


def test_a_lora_does_not_reach_the_inversion(run, fitted, tmp_path):
    plain = run(name="plain")
    kept = list((tmp_path / "out/cache/paths").iterdir())
    styled = run(loras=[{"path": str(fitted[1])}], name="styled")
    assert list((tmp_path / "out/cache/paths").iterdir()) == kept
    assert distance(pictures_in(plain)[0], pictures_in(styled)[0]) > ONE_LEVEL


def test_one_grid_holds_both_starts_and_each_is_repeated_from_itself(run, tmp_path):
    folder = run(grid={"start_from": ["noise", "inversion"]}, guidance_scale=3.0, seed=5)
    noise, own = pictures_in(folder)
    for number, wanted in enumerate((noise, own)):
        out = tmp_path / f"again{number}"
        assert style_transfer.main(["--from", str(folder / f"000{number}.png"), f"output_dir={out}"]) == 0
        (found,) = pictures_in(out / f"run_000{number}")
        assert distance(found, wanted) <= ONE_LEVEL
    assert distance(noise, own) > ONE_LEVEL
    other = pictures_in(run(grid={"start_from": ["noise", "inversion"]}, guidance_scale=3.0, name="other"))
    assert distance(other[0], noise) > ONE_LEVEL and distance(other[1], own) == 0  # it draws nothing


# ---- what is said, and refused ----


def test_guidance_is_1_where_nothing_says_more(run):
    plain, one, seven = (
        pictures_in(run(name=f"{g}", guidance_scale=g, strength=1.0))[0] for g in (None, 1.0, 7.5)
    )
    assert distance(plain, one) == 0 and distance(plain, seven) > ONE_LEVEL


def test_check_counts_the_picture_beside_its_result_and_the_inversion(arguments, capsys, tmp_path):
    def lines(**changes):
        assert style_transfer.main(arguments("--check", guidance_scale=1.0, **changes)) == 0
        return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}

    own, anew = lines(), lines(start_from="noise")
    assert "2 rows through the U-Net" in lines(anchor=0)["work"]
    assert "4 rows through the U-Net" in own["work"] and "2 rows through the U-Net" in anew["work"]
    assert own["paths"].split()[1] == "4" and "paths" not in anew
    assert not (tmp_path / "out").exists()


def test_source_words_that_are_not_read_are_said_and_a_lora_in_them_is_refused(arguments, capsys):
    long = "hills and a lake " * 20
    assert style_transfer.main(arguments("--check", source_prompt=long)) == 0
    assert "is not read" in capsys.readouterr().out
    assert style_transfer.main(arguments("--check", source_prompt=long, start_from="noise")) == 0
    assert "is not read" not in capsys.readouterr().out
    with pytest.raises(UserError, match="source_prompt"):
        style_transfer.main(arguments("--check", source_prompt="hills <lora:x:1>", prompt_syntax="a1111"))


def test_what_has_no_path_to_its_noise_is_refused(arguments, fitted, random_lora, base, tmp_path):
    def lora(name, **metadata):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(lora_bytes(random_lora(base.unet, 1).modules, layout="kohya", metadata=metadata))
        return [{"path": str(path)}]

    few = lora("hyper-sd-8steps")
    hints = {"lorakit.sampling": json.dumps({"scheduler": "euler_a"})}
    asking = lora("ancestral", **hints)
    cases = [
        (dict(scheduler="euler_a"), 'path of ddim; leave "euler_a" out'),
        (dict(grid={"scheduler": ["ddim", "lcm"]}), 'grid: scheduler cannot be "lcm"'),
        (dict(images_per_picture=2), "images_per_picture, start_from: inversion draws no noise"),
        (dict(name="cache"), 'name "cache": names a folder that is in use'),
        (dict(loras=few), "few steps.*leave it out, or set start_from=noise"),
        (dict(loras=asking), "a LoRA asks for euler_a; set scheduler=ddim"),
        (dict(start_from="picture"), 'start_from: must be one of "noise", "inversion"'),
    ]
    for change, message in cases:
        with pytest.raises((UserError, ConfigError), match=message):
            style_transfer.main(arguments(**change))
    assert not (tmp_path / "out").exists()
    for change in (dict(loras=asking, scheduler="ddim"), dict(loras=[few[0] | {"weight": 0}])):
        assert style_transfer.main(arguments("--check", **change)) == 0
    for change in (dict(scheduler="euler_a"), dict(images_per_picture=2), dict(loras=few)):
        assert style_transfer.main(arguments("--check", start_from="noise", **change)) == 0
