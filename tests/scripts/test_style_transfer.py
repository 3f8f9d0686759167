"""The script that restyles pictures: SDEdit, ControlNet, edges, grids, and the faults of its users."""

import copy
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import ONE_LEVEL, command_line, distance, levels, pictures_in, report_in, save_controlnet
from PIL import Image

import style_transfer
from lorakit.diffusion.models import Base
from lorakit.ground.config import ConfigError, load_config, schema
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.pictures.images import load_image, psnr, to_array
from lorakit.sampling.recipe import CONFIG_CHUNK
from lorakit.sampling.restyling import load_controlnet, restyle
from lorakit.sampling.samplers import encode_prompts, make_scheduler, picture_noise
from lorakit.sampling.style_plan import StyleConfig, find_pictures
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import lora_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tiny_base):
    return Base(inspect_base(str(tiny_base)))


@pytest.fixture(scope="module")
def controlnets(base, tiny_unet, tmp_path_factory):
    """Folders by name: fresh has no effect, filled has one, other and coarse are for other bases."""
    folder = tmp_path_factory.mktemp("controlnets")
    return {
        "fresh": save_controlnet(folder / "fresh", base.unet),
        "filled": save_controlnet(folder / "filled", base.unet, seed=1),
        "other": save_controlnet(folder / "other", tiny_unet(cross_attention_dim=24)),
        "coarse": save_controlnet(folder / "coarse", base.unet, channels=(8, 8, 16)),
    }


@pytest.fixture
def arguments(tiny_base, pictures, tmp_path):
    """Factory of the command line for one picture on the tiny base."""

    def make(*more, **changes):
        keys = dict(
            image=str(pictures / "0.png"),
            prompt="an ink drawing of mountains",
            num_inference_steps=4,
            strength=0.5,
        )
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    """Factory that runs the script in this process; returns the folder."""

    def make(**changes):
        assert style_transfer.main(arguments(**changes)) == 0
        return tmp_path / "out" / changes.get("name", "run")

    return make


# ---- pictures in ----


@pytest.mark.quick
def test_a_picture_gives_its_edges_a_result_a_sheet_and_a_report(run, capsys, pictures):
    folder = run()
    assert {p.name for p in folder.iterdir()} == {
        "0000.png",
        "edges.png",
        "sheet.png",
        "report.json",
        "index.html",
    }
    out = capsys.readouterr().out
    assert out.startswith("pictures    1 of 1 with ")
    assert f"note        {pictures / '0.png'} is 24x24, restyled at 16x16\n" in out
    assert "has no ControlNet: plain SDEdit" in out
    assert set(np.unique(levels(folder / "edges.png"))) == {0, 255}
    assert levels(folder / "edges.png").shape == levels(folder / "0000.png").shape == (16, 16, 3)
    report = report_in(folder)
    (row,) = report["pictures"]
    assert report["controlnet"] is None and report["seconds"] > 0 and row["subject"] == "0.png"
    assert set(report["definitions"]) == {"edge_f1", "colour_shift", "seconds"} <= set(row)
    assert 0 <= row["edge_f1"] <= 1 and row["colour_shift"] > 0 and row["seconds"] > 0


def test_a_folder_and_a_pattern_name_the_same_pictures_each_at_its_own_aspect(run, pictures, capsys):
    folder = run(image=str(pictures), batch_size=4)
    notes = [line for line in capsys.readouterr().out.splitlines() if "restyled at" in line]
    assert len(notes) == 4
    shapes = [picture.shape[:2] for picture in pictures_in(folder)]
    assert shapes[0] == shapes[3] == (16, 16) and shapes[1][0] < shapes[1][1] and shapes[2] == shapes[1][::-1]
    assert sorted(p.name for p in folder.glob("edges*")) == [f"edges_00{i}.png" for i in range(4)]
    assert [row["subject"] for row in report_in(folder)["pictures"]] == [f"{i}.png" for i in range(4)]
    single = run(image=str(pictures / "*.png"), batch_size=1, name="single")
    for one, other in zip(pictures_in(folder), pictures_in(single), strict=True):
        assert distance(one, other) <= ONE_LEVEL
    assert distance(pictures_in(folder)[0], pictures_in(folder)[3]) > 20


def test_results_of_a_picture_have_seed_plus_i(run):
    three = pictures_in(run(images_per_picture=3, seed=5, batch_size=2))
    last = pictures_in(run(seed=7, name="last"))
    assert distance(three[2], last[0]) <= ONE_LEVEL and distance(three[1], last[0]) > 5


def test_the_size_of_the_config_counts(run, capsys):
    folder = run(width=24, height=16)
    assert Image.open(folder / "0000.png").size == (24, 16)
    assert "restyled at 24x16" in capsys.readouterr().out


def test_names_with_brackets_and_without_suffix_are_files_first(tmp_path, pictures):
    odd = tmp_path / "photo [1]"
    shutil.copy(pictures / "0.png", odd)
    assert find_pictures(str(odd)) == [str(odd)]
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "B.PNG")
    shutil.copy(pictures / "0.png", tmp_path / "a.png")
    wanted = [str(tmp_path / name) for name in ("B.PNG", "a.png")]
    assert find_pictures(str(tmp_path)) == wanted
    assert find_pictures(str(tmp_path / "*")) == wanted


def test_a_pattern_may_be_longer_than_a_name_of_a_file(tmp_path, pictures):
    shutil.copy(pictures / "0.png", tmp_path / "a.png")
    assert find_pictures(str(tmp_path / f"[{'a' * 300}].png")) == [str(tmp_path / "a.png")]
    with pytest.raises(UserError, match="no such picture, folder or match"):
        find_pictures(str(tmp_path / f"{'b' * 300}.png"))


# ---- SDEdit ----


def draw(base, image, *, strength=0.5, steps=4, seeds=(0,), controlnet=None, scheduler="ddim", **control):
    """(B, H, W, 3) levels of a picture restyled once for each seed."""
    embeds = encode_prompts(base, ["an ink drawing", "blurred"])
    keys = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    hint = Image.fromarray(np.eye(image.width, dtype=np.uint8) * 255).convert("RGB")
    made = restyle(
        base,
        controlnet,
        make_scheduler(base, scheduler),
        [image] * len(seeds),
        [hint] * len(seeds),
        embeds[:1],
        embeds[1:],
        seeds=seeds,
        strength=strength,
        steps=steps,
        guidance_scale=3.0,
        control=dict(zip(keys, (1.0, 0.0, 1.0), strict=True)) | control,
    )
    return np.stack([np.asarray(each, np.int16) for each in made])


@pytest.fixture
def picture(pictures):
    return load_image(pictures / "0.png").resize((16, 16))


@torch.no_grad()
@pytest.mark.parametrize(("strength", "steps", "run_steps"), [(0.5, 6, 3), (1.0, 3, 3), (0.3, 5, 1)])
def test_it_is_the_loop_of_the_paper_with_the_base_s_scheduler(base, picture, strength, steps, run_steps):
    image = torch.from_numpy(to_array(picture))[None]
    latents = base.vae.encode(image).latent_dist.mean * base.scaling_factor
    scheduler = copy.deepcopy(base.scheduler)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[steps - run_steps :]
    x = scheduler.add_noise(latents, picture_noise(base, [9], (16, 16)), timesteps[:1])
    text, negative = encode_prompts(base, ["an ink drawing", "blurred"])
    for t in timesteps:
        eps_negative, eps_text = base.unet(torch.cat([x, x]), t, torch.stack([negative, text])).sample
        x = scheduler.step(eps_negative + 3.0 * (eps_text - eps_negative), t, x).prev_sample
    wanted = np.asarray(base.decode_pictures(x)[0], np.int16)
    made = draw(base, picture, strength=strength, steps=steps, seeds=(9,))[0]
    assert distance(made, wanted) <= ONE_LEVEL
    assert distance(draw(base, picture, strength=strength, steps=steps, seeds=(8,))[0], wanted) > ONE_LEVEL


def test_the_more_strength_the_less_is_kept_and_the_least_keeps_the_vae_s_round_trip(base, picture):
    image = torch.from_numpy(to_array(picture))[None]
    trip = base.decode_pictures(base.encode(image).chunk(2, dim=1)[0] * base.scaling_factor)[0]
    kept = []
    for strength in (0.1, 0.3, 0.5, 0.8, 1.0):
        made = draw(base, picture, strength=strength, steps=10, seeds=(0, 1))
        kept.append(np.mean([psnr(Image.fromarray(each.astype(np.uint8)), trip) for each in made]))
    assert kept[0] > kept[1] + 5 and all(more > less for more, less in pairwise(kept)), kept


@pytest.mark.parametrize("scheduler", ["dpm++", "euler", "euler_a", "heun", "unipc", "pndm", "lcm"])
def test_every_sampler_starts_from_the_picture(base, picture, scheduler):
    image = torch.from_numpy(to_array(picture))[None]
    trip = base.decode_pictures(base.encode(image).chunk(2, dim=1)[0] * base.scaling_factor)[0]
    near, far = (
        Image.fromarray(draw(base, picture, strength=s, steps=10, scheduler=scheduler)[0].astype(np.uint8))
        for s in (0.1, 0.9)
    )
    assert psnr(near, trip) > psnr(far, trip) + 1
    again = draw(base, picture, strength=0.9, steps=10, scheduler=scheduler, seeds=(4, 0))
    assert distance(again[1], np.asarray(far, np.int16)) <= ONE_LEVEL < distance(again[0], again[1])


# ---- ControlNet ----


def test_a_fresh_controlnet_changes_nothing_and_a_filled_one_by_its_scale(base, controlnets, picture):
    without = draw(base, picture)
    fresh, filled = (load_controlnet(controlnets[name], base) for name in ("fresh", "filled"))
    assert distance(draw(base, picture, controlnet=fresh), without) <= ONE_LEVEL
    moved = [
        np.abs(draw(base, picture, controlnet=filled, controlnet_conditioning_scale=scale) - without).mean()
        for scale in (0.0, 0.5, 1.0)
    ]
    assert moved[0] < 0.1 and moved[1] > 0.3 and moved[2] > moved[1], moved


def test_edges_are_held_between_start_and_end_only(base, controlnets, picture):
    filled = load_controlnet(controlnets["filled"], base)
    options = {"controlnet": filled, "steps": 8, "strength": 0.5}
    without, whole = draw(base, picture, steps=8), draw(base, picture, **options)
    first = draw(base, picture, **options, control_guidance_end=0.5)
    last = draw(base, picture, **options, control_guidance_start=0.5)
    for one, other in ((first, last), (first, whole), (last, whole), (first, without), (last, without)):
        assert distance(one, other) > ONE_LEVEL
    never = draw(base, picture, **options, control_guidance_end=0.01)
    assert distance(never, without) <= ONE_LEVEL


def test_the_hint_is_the_edges_at_the_working_size(run, controlnets, pictures, tmp_path):
    """Other thresholds, other edges, another result: but only where a ControlNet sees them."""
    few = {"canny_low": 2000, "canny_high": 2000}
    made = {
        (name, more): run(
            name=f"{name}{more}",
            controlnet=controlnets[name] if name != "none" else None,
            **(few if more else {}),
        )
        for name in ("filled", "none")
        for more in (False, True)
    }
    assert levels(made["filled", False] / "edges.png").any()
    assert not levels(made["filled", True] / "edges.png").any()
    pairs = {
        name: [pictures_in(made[name, more])[0] for more in (False, True)] for name in ("filled", "none")
    }
    assert distance(*pairs["filled"]) > ONE_LEVEL and distance(*pairs["none"]) == 0
    assert distance(pairs["filled"][0], pairs["none"][0]) > ONE_LEVEL
    assert report_in(made["filled", False])["controlnet"] == controlnets["filled"]


def test_auto_is_the_base_s_own_folder_and_null_is_none(run, tiny_base, controlnets, tmp_path, capsys):
    own = tmp_path / "base"
    shutil.copytree(tiny_base, own)
    shutil.copytree(controlnets["filled"], own / "controlnet")
    auto = run(pretrained_model_name_or_path=str(own))
    assert "has no ControlNet" not in capsys.readouterr().out
    assert report_in(auto)["controlnet"] == str(own / "controlnet")
    named = run(controlnet=controlnets["filled"], name="named")
    none = run(pretrained_model_name_or_path=str(own), controlnet=None, name="none")
    assert "has no ControlNet" not in capsys.readouterr().out  # it was not asked for
    without = run(name="without")
    assert "has no ControlNet" in capsys.readouterr().out
    made = [pictures_in(folder)[0] for folder in (auto, named, none, without)]
    assert distance(made[0], made[1]) == 0 == distance(made[2], made[3])
    assert distance(made[0], made[2]) > ONE_LEVEL


def test_a_controlnet_that_does_not_fit_is_refused_by_its_name_and_what_differs(base, controlnets, tmp_path):
    cut = shutil.copytree(controlnets["fresh"], tmp_path / "cut")
    (weights,) = cut.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    single = shutil.copy(base.info.files["unet"], tmp_path / "single.safetensors")
    part = shutil.copytree(controlnets["fresh"], tmp_path / "part")
    from safetensors.torch import load_file, save_file

    tensors = load_file(part / weights.name)
    save_file({key: value for key, value in tensors.items() if "mid_block" not in key}, part / weights.name)
    cases = {
        controlnets["other"]: "is made for another base: cross_attention_dim is 24, here 16",
        controlnets["coarse"]: "does not reduce hints by 2",
        str(cut): "cannot be loaded as a ControlNet",
        str(tmp_path / "empty"): "cannot be loaded as a ControlNet",
        str(single): "cannot be loaded as a ControlNet",
        str(part): "weights, such as controlnet_mid_block.",
        str(tmp_path / "missing"): "cannot be loaded as a ControlNet",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as caught:
            load_controlnet(name, base)
        text = str(caught.value)
        assert text.startswith(f"{name}: ") and message in text and len(text.splitlines()) == 1, text


# ---- edges ----


def edges_of(image, **keys):
    settings = [
        f"{key}={json.dumps(value)}" for key, value in ({"image": "x", "canny_blur": 0} | keys).items()
    ]
    return style_transfer.find_edges(load_config(StyleConfig, None, settings).config, image)


def test_thresholds_are_opencv_s():
    """A step of 50 levels is a gradient of 200."""
    values = np.full((16, 16, 3), 100, np.uint8)
    values[:, 8:] += 50
    image = Image.fromarray(values)
    assert edges_of(image, canny_low=100, canny_high=199).sum() == 16
    assert not edges_of(image, canny_low=100, canny_high=201).any()
    assert edges_of(image, canny_high=199).sum() == 16 and not edges_of(image, canny_high=201).any()
    assert edges_of(image).sum() == 16  # auto
    values[8:, 8:] -= 25  # a gradient of 100 in the lower half
    image = Image.fromarray(values)
    upper, lower = slice(0, 7), slice(11, 16)
    for low, found in ((90, True), (110, False)):
        edges = edges_of(image, canny_low=low, canny_high=150)
        assert edges[upper, 6:10].any() and edges[lower, 6:10].any() == found
    by_default = edges_of(image, canny_high=150)  # its lower threshold is 0.4 of it, 60
    assert (by_default == edges_of(image, canny_low=60, canny_high=150)).all()


def test_the_colour_shift_is_in_levels_and_not_a_matter_of_place():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 200, (8, 8, 3), dtype=np.uint8)
    shuffled = rng.permutation(values.reshape(-1, 3)).reshape(8, 8, 3)
    one, moved, lighter = map(Image.fromarray, (values, shuffled, values + 10))
    assert style_transfer.colour_shift(one, moved) == 0
    assert style_transfer.colour_shift(one, lighter) == pytest.approx(10)


# ---- captions and colours ----


@pytest.fixture
def captioned(pictures, tmp_path):
    """Two pictures, the first with a caption."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number in (0, 3):
        shutil.copy(pictures / f"{number}.png", folder)
    (folder / "0.txt").write_text("a photo of snowy mountains")
    return folder


def test_each_picture_s_own_words_stand_in_its_prompt(run, captioned, capsys):
    folder = run(image=str(captioned), prompt="an ink drawing of {caption}, in black")
    prompts = ["an ink drawing of snowy mountains, in black", "an ink drawing, in black"]
    assert [row["prompt"] for row in report_in(folder)["pictures"]] == prompts
    out = capsys.readouterr().out
    assert "0.png: caption “snowy mountains”, from 0.txt" in out
    assert "3.png: has no caption beside it: {caption} stays empty" in out and "0.png: has no" not in out
    (plain,) = pictures_in(run(image=str(captioned / "0.png"), prompt=prompts[0], name="plain"))
    assert distance(plain, pictures_in(folder)[0]) <= ONE_LEVEL
    config = json.loads(Image.open(folder / "0000.png").text[CONFIG_CHUNK])
    assert config["prompt"] == prompts[0] and config["caption_from"] is None


def test_the_base_fills_in_what_is_missing_by_its_own_words_only(run, captioned, tiny_base, tmp_path, capsys):
    options = {"image": str(captioned), "prompt": "ink of {caption}", "caption_from": "base"}
    open_ = run(**options)
    assert "has no closed vocabulary to try" in capsys.readouterr().out
    assert [row["prompt"] for row in report_in(open_)["pictures"]] == ["ink of snowy mountains", "ink"]
    closed = shutil.copytree(tiny_base, tmp_path / "closed")
    parts = [["a lake", "a hill"], [" at noon", " at night"]]
    (closed / "captions.json").write_text(json.dumps({"start": "a photo of ", "parts": parts}))
    folder = run(**options, name="closed", pretrained_model_name_or_path=str(closed))
    first, second = (row["prompt"] for row in report_in(folder)["pictures"])
    assert first == "ink of snowy mountains"
    assert second.removeprefix("ink of ") in {one + other for one in parts[0] for other in parts[1]}
    assert f"3.png: “{second.removeprefix('ink of ')}”, of the words of" in capsys.readouterr().out
    again = tmp_path / "again"  # what was chosen is kept, and not looked for anew
    assert style_transfer.main(["--from", str(folder / "0001.png"), f"output_dir={again}"]) == 0
    assert "of the words of" not in capsys.readouterr().out
    assert report_in(next(again.iterdir()))["pictures"][0]["prompt"] == second


def test_caption_from_needs_a_place_for_the_caption(arguments):
    with pytest.raises(ConfigError, match=r"caption_from, prompt: there is no \{caption\} in prompt"):
        style_transfer.main(arguments(caption_from="base"))


def test_the_colours_of_the_input_lie_on_the_brightness_of_the_result(run, pictures):
    made = {
        colour: Image.open(run(image=str(pictures / "0.png"), colour=colour, name=colour) / "0000.png")
        for colour in ("style", "input")
    }
    source = style_transfer.read_picture(str(pictures / "0.png"), made["style"].size)
    (style, kept, own) = (
        np.asarray(image.convert("YCbCr"), np.int16) for image in (made["style"], made["input"], source)
    )
    clipped = 6  # in the mean: where a colour is too strong for the brightness
    assert np.abs(kept[..., 0] - style[..., 0]).mean() < clipped
    assert (
        np.abs(kept[..., 1:] - own[..., 1:]).mean() < clipped < np.abs(style[..., 1:] - own[..., 1:]).mean()
    )


@pytest.mark.slow
def test_the_miniature_tells_night_from_noon():
    from lorakit.sampling.base_words import told_by_base
    from lorakit.weights.vocabulary import read_vocabulary
    from miniature.landscapes import Scene, render

    base = Base(inspect_base(str(ROOT / "ckpt/miniature")))
    vocabulary = read_vocabulary(base.info)
    assert vocabulary
    for time in ("night", "noon"):
        said = told_by_base(base, render(Scene.sample(3, time=time), "a photo", 128), vocabulary)
        assert f" at {time} " in said, said


# ---- grids, LoRAs and repetition ----


def test_a_grid_over_strength_and_weight(run, fitted, pictures):
    folder = run(
        image=str(pictures / "[01].png"),
        loras=[{"path": str(fitted[0])}],
        grid={"strength": [0.25, 0.75], "weight": [0, 1]},
    )
    rows, made = report_in(folder)["pictures"], pictures_in(folder)
    wanted = [[f"strength {s}", f"weight {w}"] for w in (0, 1) for s in (0.25, 0.75) for _ in range(2)]
    assert [row["cell"] for row in rows] == wanted
    assert sorted(p.name for p in folder.glob("sheet*")) == ["sheet_000.png", "sheet_001.png"]
    without = pictures_in(run(image=str(pictures / "[01].png"), strength=0.75, name="without"))
    assert all((one == other).all() for one, other in zip(made[2:4], without, strict=True))
    assert distance(made[2], made[6]) > ONE_LEVEL and distance(made[0], made[2]) > ONE_LEVEL


def test_a_grid_over_the_control_scale_has_the_edges_before_each_row(run, controlnets):
    key = "controlnet_conditioning_scale"
    folder = run(controlnet=controlnets["filled"], grid={key: [0, 1]})
    plain = run(controlnet=controlnets["filled"], name="plain")
    assert Image.open(folder / "sheet.png").width > Image.open(plain / "sheet.png").width
    made = pictures_in(folder)
    assert distance(made[0], made[1]) > ONE_LEVEL
    assert distance(made[0], pictures_in(run(name="none"))[0]) <= ONE_LEVEL


def test_a_picture_can_be_repeated_from_itself(run, fitted, pictures, tmp_path):
    folder = run(
        image=str(pictures),
        images_per_picture=2,
        loras=[{"path": str(fitted[1]), "weight": 0.7}],
        grid={"strength": [0.5, 1.0]},
        scheduler="euler_a",
        seed=3,
    )
    original = folder / "0011.png"
    config = json.loads(Image.open(original).text[CONFIG_CHUNK])
    assert (config["image"], config["seed"], config["strength"]) == ("1.png", 4, 1.0)
    assert "Seed: 4, Size: " in Image.open(original).text["parameters"]
    out = f"output_dir={tmp_path / 'again'}"
    assert style_transfer.main(["--from", str(original), out]) == 0
    (again,) = pictures_in(tmp_path / "again/run_0011")
    assert distance(again, levels(original)) <= ONE_LEVEL
    assert style_transfer.main(["--from", str(original), out, "strength=0.5", "name=half"]) == 0
    (half,) = pictures_in(tmp_path / "again/half")
    assert distance(half, levels(folder / "0003.png")) <= ONE_LEVEL < distance(half, again)


def test_a_run_that_fails_leaves_the_earlier_one_as_it_is(run, arguments, controlnets):
    folder = run()
    (folder / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="holds an earlier run"):
        style_transfer.main(arguments())
    with pytest.raises(UserError, match="made for another base"):
        style_transfer.main(arguments(controlnet=controlnets["other"], overwrite=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run(image=str(folder / "0000.png"), overwrite=True, seed=1)  # its own result, read before it goes
    assert {path.name for path in folder.iterdir()} == set(before)
    assert (folder / "0000.png").read_bytes() != before["0000.png"]


# ---- faults of users ----


def test_wrong_inputs_give_one_message_and_exit_code_2(arguments, tiny_unet, random_lora, tmp_path, capfd):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "nothing").mkdir()
    modules = random_lora(tiny_unet(cross_attention_dim=24), 1).modules
    other = tmp_path / "other.safetensors"
    other.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    cases = [
        (dict(image=str(tmp_path / "missing.jpg")), "missing.jpg: no such picture, folder or match"),
        (dict(image=str(tmp_path / "*.jpg")), "*.jpg: no such picture, folder or match"),
        (dict(image=str(tmp_path / "nothing")), "nothing: holds no picture"),
        (dict(image=str(tmp_path / "text.png")), "text.png: looks like text, not a picture"),
        (dict(image=""), "image: must be"),
        (dict(strength=0), "strength: must be a number > 0"),
        (dict(strength=1.1), "strength: must be"),
        (dict(strength=0.2), "strength 0.2 of 4 steps is less than one step; raise either"),
        (dict(grid={"strength": [0.5, 0.1]}), "strength 0.1 of 4 steps is less than one step"),
        (dict(grid={"strength": [0.5, 2]}), "grid: strength cannot be 2"),
        (dict(grid={"image": ["a.png"]}), "grid: image is no axis"),
        (
            dict(canny_low=200, canny_high=100),
            "canny_low, canny_high: the first must not be above the second",
        ),
        (dict(canny_low="high"), "canny_low: must be"),
        (dict(canny_high=-1), "canny_high: must be"),
        (dict(control_guidance_start=0.5, control_guidance_end=0.5), "the first must be the smaller one"),
        (dict(controlnet=""), "controlnet: must be"),
        (dict(width=16), "width, height: give both or neither"),
        (dict(width=16, height=18), "height 18: must divide by 4 for this base; take 16 or 20"),
        (dict(loras=[{"path": str(other)}]), f"{other}: "),
    ]
    for change, message in cases:
        argv = arguments(**change)
        assert run_guarded(lambda argv=argv: style_transfer.main(argv)) == 2, change
        captured = capfd.readouterr()
        error = captured.err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, captured.err
        assert "Traceback" not in captured.err
    assert not list(tmp_path.glob("out/run/*"))


# ---- the command line ----


def test_check_writes_nothing(arguments, tmp_path, capsys):
    assert style_transfer.main(arguments("--check", images_per_picture=2, grid={"strength": [0.5, 1]})) == 0
    assert "pictures    4 of 1 with" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_check_says_what_a_run_needs_and_refuses_a_lora_that_does_not_fit(
    arguments, fitted, tiny_unet, random_lora, tmp_path, capsys
):
    def lines(**changes):
        assert style_transfer.main(arguments("--check", **changes)) == 0
        return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}

    few, many = (
        lines(loras=[{"path": str(fitted[0])}], guidance_scale=g, num_inference_steps=n)
        for g, n in ((1, 4), (3, 8))
    )
    assert few["LoRA"].endswith("parameters, fits") and str(fitted[0]) in few["LoRA"]
    assert "2 rows through the U-Net" in few["work"] and "8 rows through" in many["work"]
    assert few.keys() >= {"base", "tokens", "memory", "time"} and "not known" in few["time"]
    modules = random_lora(tiny_unet(cross_attention_dim=24), 1).modules
    other = tmp_path / "other.safetensors"
    other.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    with pytest.raises(UserError, match="does not fit"):
        style_transfer.main(arguments("--check", loras=[{"path": str(other)}]))


def test_check_says_what_is_not_read_in_any_cell(arguments, capsys):
    long = ["mountains and a lake " * 20 + end for end in ("one", "two")]
    argv = arguments("--check", negative_prompt=long[1], grid={"prompt": ["short", long[0]]})
    assert style_transfer.main(argv) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "is not read" in line]
    assert len(notes) == 2 and "one”" in notes[0] + notes[1] and "two”" in notes[0] + notes[1]


@pytest.mark.parametrize("flag", ["--help", "--check", "--schema", "--print-config"])
def test_the_command_line_answers_at_once_and_without_torch(program, flag):
    result = program("style_transfer.py", ["loras=[]", flag])
    assert result.code == 0 and result.out, result.err
    assert not result.imported and result.blinks < 20


def test_the_committed_configs_and_schema_are_those_of_the_script():
    cls = StyleConfig
    stored = json.loads((ROOT / "cfg/style_transfer/schema.json").read_text())
    assert stored == schema(cls), "run: style_transfer.py --schema > cfg/style_transfer/schema.json"
    own = [path for path in (ROOT / "cfg/style_transfer").glob("*.json") if path.name != "schema.json"]
    own += [
        path for path in (ROOT / "cfg/sd15").glob("*.json") if "style_transfer/schema" in path.read_text()
    ]
    assert {path.name for path in own} >= {"ink.json", "style_transfer.json"}
    for path in own:
        config = load_config(cls, path).config
        assert find_pictures(str(ROOT / config.image))
        named = path.parent / json.loads(path.read_text())["$schema"]
        assert named.resolve() == ROOT / "cfg/style_transfer/schema.json"
    with pytest.raises(ConfigError, match="did you mean strength"):
        load_config(cls, None, ["image=x", "strenght=3"])
