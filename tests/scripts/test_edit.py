"""The script that edits one picture: exactness, masks, grids, what is kept, and the faults of its users."""

import json
import shutil
from pathlib import Path

import narrow
import numpy as np
import pytest
from galleries import ONE_LEVEL, command_line, distance, levels, pictures_in, report_in, runner
from PIL import Image

import edit
from lorakit.editing.config import EditConfig
from lorakit.ground.config import ConfigError, load_config, schema
from lorakit.ground.errors import UserError
from lorakit.sampling.recipe import CONFIG_CHUNK

ROOT = Path(__file__).resolve().parents[2]
OWN, OTHER, THIRD = "a photo of hills at noon", "a photo of hills at night", "a photo of snowy hills"


@pytest.fixture
def arguments(tiny_base, pictures, tmp_path):
    """Factory of the command line for one picture on the tiny base."""

    def make(*more, **changes):
        keys = dict(
            image=str(pictures / "0.png"), prompt=OWN, target_prompt=OTHER, num_inference_steps=4, width=16,
            height=16,
        )  # fmt: skip
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    return runner(edit, arguments, tmp_path)


@pytest.fixture
def mask(pictures, tmp_path):
    """A mask of the picture's size, white in its left half."""
    painted = np.zeros((24, 24), np.uint8)
    painted[:, :12] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


# ---- what comes out ----


@pytest.mark.quick
def test_several_targets_give_results_a_sheet_and_a_report(run, capsys):
    folder = run(target_prompt=[OTHER, OWN, THIRD])
    names = {"0000.png", "0001.png", "0002.png", "sheet.png", "report.json", "index.html"}
    assert {path.name for path in folder.iterdir()} == names
    out = capsys.readouterr().out
    assert out.startswith("pictures    3 of ") and "target_prompt is the prompt" in out
    report = report_in(folder)
    assert [row["prompt"] for row in report["pictures"]] == [OTHER, OWN, THIRD]
    assert set(report["definitions"]) == {"edge_f1", "psnr", "seconds"} <= set(report["pictures"][0])
    # 4 of the inversion; then the picture beside three results.
    assert report["evaluations"] == 4 + 4 * 4
    assert 0 < report["inversion_seconds"] < report["seconds"]
    rows = report["pictures"]
    assert rows[1]["psnr"] is None and rows[1]["edge_f1"] == 1 and rows[0]["psnr"] and rows[2]["psnr"]


def test_the_picture_s_own_prompt_gives_its_round_trip_to_the_bit_at_any_guidance(run, tiny_base, pictures):
    from lorakit.diffusion.models import Base
    from lorakit.diffusion.paths import decode_picture, encode_picture
    from lorakit.pictures.images import read_picture
    from lorakit.weights.base import inspect_base

    base = Base(inspect_base(str(tiny_base)))
    latents = encode_picture(base, read_picture(pictures / "0.png", (16, 16)))
    trip = np.asarray(decode_picture(base, latents[0]), np.int16)
    for solver in ("ddim", "ab2"):
        grid = {"guidance_scale": [1, 3], "start": [0, 0.5]}
        folder = run(target_prompt=OWN, name=solver, **{"grid": grid, "solver": solver})
        assert len(pictures_in(folder)) == 4
        assert all((found == trip).all() for found in pictures_in(folder))
    assert distance(pictures_in(run(name="other"))[0], trip) > ONE_LEVEL


def test_a_target_does_not_depend_on_the_others_and_the_path_is_kept(run):
    folder = run(target_prompt=[OTHER, THIRD])
    alone = run(target_prompt=THIRD, name="alone")
    assert distance(pictures_in(folder)[1], pictures_in(alone)[0]) <= ONE_LEVEL
    assert report_in(alone)["evaluations"] == 2 * 4  # no inversion: it is in the cache


def test_outside_of_the_mask_is_the_round_trip(run, mask):
    trip = pictures_in(run(target_prompt=OWN, name="trip"))[0]
    free = pictures_in(run(name="free"))[0]
    for method in ("swap", "sdedit"):
        found = pictures_in(run(mask=mask, method=method, start=0.25, name=method))[0]
        assert (found[:, 8:] == trip[:, 8:]).all() and distance(found[:, :4], trip[:, :4]) > ONE_LEVEL
    assert distance(free[:, 8:], trip[:, 8:]) > ONE_LEVEL


def test_what_the_words_hardly_move_is_the_round_trip(run):
    trip = pictures_in(run(target_prompt=OWN, name="trip"))[0]
    free, some, most = pictures_in(run(grid={"keep_below": [0, 0.9, 0.999]}, name="kept"))
    equal = [int((found == trip).all(-1).sum()) for found in (free, some, most)]
    assert equal[0] < equal[1] <= equal[2] < trip[..., 0].size


def test_sdedit_has_a_result_for_each_seed_and_swap_none(run, capsys):
    folder = run(method="sdedit", start=0.25, images_per_target=3, seed=5, batch_size=2)
    assert [row["seed"] for row in report_in(folder)["pictures"]] == [5, 6, 7]
    last = pictures_in(run(method="sdedit", start=0.25, seed=7, name="last"))[0]
    assert distance(pictures_in(folder)[2], last) <= ONE_LEVEL
    assert distance(pictures_in(folder)[0], last) > ONE_LEVEL
    capsys.readouterr()
    run(method="sdedit", name="whole")
    assert "sdedit from start 0 keeps next to nothing of the picture" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="images_per_target, method: swap draws no noise"):
        run(images_per_target=2)


def test_a_result_tells_how_it_was_made_and_is_made_again(run, tmp_path, mask):
    folder = run(target_prompt=[OTHER, THIRD], mask=mask, **{"grid": {"start": [0, 0.5]}})
    picture = folder / "0003.png"
    config = json.loads(Image.open(picture).text[CONFIG_CHUNK])
    assert config["target_prompt"] == THIRD and config["start"] == 0.5 and config["grid"] == {}
    assert edit.main(["--from", str(picture), f"output_dir={tmp_path / 'again'}", f"mask={mask}"]) == 0
    (again,) = pictures_in(tmp_path / "again/run_0003")
    assert distance(again, levels(picture)) <= ONE_LEVEL
    other = pictures_in(folder)[2]
    assert distance(again, other) > ONE_LEVEL


def test_a_lora_takes_part_in_the_inversion_and_in_the_edit(run, fitted):
    plain, own = run(name="plain"), run(lora=str(fitted[0]), guidance_scale=1.0, name="own")
    zero = run(lora=str(fitted[0]), lora_weight=0.0, name="zero")
    assert distance(pictures_in(plain)[0], pictures_in(own)[0]) > ONE_LEVEL
    assert (pictures_in(plain)[0] == pictures_in(zero)[0]).all()
    assert report_in(zero)["evaluations"] < report_in(own)["evaluations"]  # its path is that of none


def test_guidance_is_1_and_more_where_a_lora_holds_the_picture():
    def guidance(**changes):
        keys = {"image": "x", "target_prompt": OTHER} | changes
        cfg = EditConfig.model_validate_json(json.dumps(keys))
        return cfg.resolved()[0].sampler()[2]

    assert guidance() == guidance(lora="x", lora_weight=0.0) == 1
    assert guidance(lora="x") == guidance(method="sdedit") == 3
    assert guidance(lora="x", guidance_scale=2.0) == 2


def test_a_narrow_sd15_is_edited_too(run, tmp_path):
    base = narrow.write_base(tmp_path, "modern")
    keys = {"width": 64, "height": 64, "num_inference_steps": 2, "target_prompt": [OTHER, OWN]}
    folder = run(pretrained_model_name_or_path=str(base), **keys)
    assert [row["psnr"] is None for row in report_in(folder)["pictures"]] == [False, True]


@pytest.mark.slow
def test_a_missing_lora_is_fitted_to_the_picture_first(run, tmp_path, fit_config):
    lora = tmp_path / "own.safetensors"
    folder = run(lora=str(lora), train_if_missing=True, fit_config=fit_config, guidance_scale=1.0)
    assert lora.exists() and (folder / "fit/own/picture.png").exists()
    again = run(lora=str(lora), name="again", guidance_scale=1.0)
    assert distance(pictures_in(folder)[0], pictures_in(again)[0]) == 0


@pytest.fixture
def fit_config(tmp_path):
    from small import SHORT_RUN

    keys = {key: value for key, value in SHORT_RUN.items() if key not in ("resolution", "ckpt_name")}
    config = tmp_path / "fit.json"
    config.write_text(json.dumps(keys | {"data_dir": str(tmp_path), "max_train_steps": 2}))
    return str(config)


# ---- faults ----


def test_a_lora_that_does_not_fit_the_picture_is_said(run, capsys, random_lora, tiny_base, tmp_path):
    from lorakit.diffusion.models import Base
    from lorakit.weights.base import inspect_base
    from lorakit.weights.lora_file import lora_bytes

    path = tmp_path / "far.safetensors"
    modules = random_lora(Base(inspect_base(str(tiny_base))).unet, 3).modules
    path.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    run(lora=str(path))
    assert "no better than none does" in capsys.readouterr().out


def paint(path, size, value):
    Image.new("L", size, value).save(path)
    return str(path)


FAULTS = {
    "a mask of another size": (
        lambda f: {"mask": paint(f / "m.png", (20, 24), 255)},
        "m.png: is 20x24, and .* is 24x24: paint it on that picture",
    ),
    "a black mask": (lambda f: {"mask": paint(f / "m.png", (24, 24), 0)}, "m.png: is black all over"),
    "no mask there": (lambda f: {"mask": str(f / "none.png")}, "none.png: No such file"),
    "no picture": (lambda f: {"image": str(f / "none.png")}, "none.png: No such file"),
    "a start that leaves no step": (lambda f: {"start": 0.95}, "start 0.95 of 4 steps leaves none"),
    "a size": (lambda f: {"width": 15}, "width 15: must divide by"),
    "no LoRA": (lambda f: {"lora": str(f / "none.safetensors")}, "no such LoRA file; .* or set lora=null"),
    "a name": (
        lambda f: {"lora": str(f / "none.ckpt"), "train_if_missing": True},
        "needs a name that ends in .safetensors",
    ),
    "no config to fit with": (
        lambda f: {"lora": str(f / "a.safetensors"), "train_if_missing": True, "fit_config": "none.json"},
        "fit_config none.json: no such config",
    ),
    "LoRAs of a target": (
        lambda f: {"target_prompt": "hills <lora:a:1>", "prompt_syntax": "a1111"},
        "target_prompt",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_and_leaves_nothing(name, arguments, tmp_path):
    changes, message = FAULTS[name]
    with pytest.raises(UserError, match=message) as caught:
        edit.main(arguments(**changes(tmp_path)))
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "out").glob("*/*"))


def test_a_lora_for_few_steps_is_refused(arguments, fitted, tmp_path):
    lora = shutil.copy(fitted[0], tmp_path / "lcm-lora.safetensors")
    from lorakit.weights.tensors import read_tensors, serialize

    Path(lora).write_bytes(serialize(read_tensors(lora)[0], {}))  # without what train_lora.py says of itself
    with pytest.raises(UserError, match="looks like a LoRA for sampling in few steps"):
        edit.main(arguments(lora=str(lora)))


RULES = {
    "scheduler": ({"scheduler": "euler"}, "edited on the path of ddim"),
    "twice": ({"target_prompt": [OTHER, OTHER]}, "target_prompt: one of them is there twice"),
    "two ways": (
        {"target_prompt": [OTHER, THIRD], "grid": {"target_prompt": [OWN]}},
        "give several targets in one",
    ),
    "start": ({"start": 1.0}, "start: must be less than 1|start"),
    "the cache": ({"name": "cache"}, "names a folder that is in use"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_config_that_cannot_be_meant_is_refused(name):
    changes, message = RULES[name]
    keys = {"image": "x", "target_prompt": OTHER} | changes
    settings = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    with pytest.raises(ConfigError, match=message):
        load_config(EditConfig, None, settings)


def test_a_prompt_that_is_too_long_is_said_by_check_without_torch(command, arguments):
    result = command("edit", arguments("--check", target_prompt=["hills and " * 60, OTHER]))
    assert result.code == 0 and not result.torch and "is not read" in result.out
    # Two results and the picture beside them, four steps each.
    assert "work        12 rows through the U-Net, 4 before them for each new path" in result.out
    assert "\nmemory      about" in result.out and "\nbase        " in result.out


def test_presets_are_valid_and_the_schema_is_that_of_the_keys():
    presets = [path for path in ROOT.glob("cfg/edit/*.json") if path.stem not in ("schema", "fit")]
    presets += [ROOT / "cfg/sd15/edit.json", ROOT / "cfg/sd15/imagic.json"]
    assert len(presets) >= 2
    for path in presets:
        cfg = load_config(EditConfig, path).config
        assert cfg.fit_config and (ROOT / cfg.fit_config).is_file() and (ROOT / cfg.image).is_file()
    assert json.loads((ROOT / "cfg/edit/schema.json").read_text()) == schema(EditConfig)
