"""Prompt files of sd-scripts and A1111, and what a picture keeps of the files it was made with."""

from pathlib import Path
from typing import get_args

import pytest

from lorakit.ground.config import load_config
from lorakit.ground.errors import UserError
from lorakit.sampling import model_files
from lorakit.sampling.config import A1111_SAMPLERS, SchedulerName
from lorakit.sampling.generate_plan import GenerateConfig, all_asked, read_lines
from lorakit.sampling.model_files import find_lora, fingerprint, fingerprint_ahead, portable
from lorakit.sampling.prompt_file import read_prompt_file
from lorakit.weights.base import inspect_base


@pytest.fixture
def lines(tmp_path):
    """Factory of the lines of a file of this text."""

    def read(text):
        path = tmp_path / "prompts.txt"
        path.write_text(text, encoding="utf-8")
        return read_prompt_file(str(path))

    return read


def test_comments_and_options_are_read_as_sd_scripts_and_a1111_mean_them(lines):
    text = (
        "# my prompts\n\na photo of a lake --n blurry --w 192 --h 128\n"
        "--prompt a photo of hills --negative_prompt blurry\n"
    )
    lake = {"negative_prompt": "blurry", "width": 192, "height": 128}
    assert lines(text) == [
        (3, "a photo of a lake", lake),
        (4, "a photo of hills", {"negative_prompt": "blurry"}),
    ]


@pytest.mark.parametrize(
    ("text", "prompt", "settings"),
    [
        ("a lake", "a lake", {}),
        ("a lake --d 7 --s 30", "a lake", {"seed": 7, "num_inference_steps": 30}),
        ("a lake --l 5.5", "a lake", {"guidance_scale": 5.5}),
        ("a lake --W 64 --H 32", "a lake", {"width": 64, "height": 32}),
        ("a lake --n bad, (ugly:1.2) -- or so", "a lake", {"negative_prompt": "bad, (ugly:1.2) -- or so"}),
        ("a well-known lake -- at dawn, 5--6", "a well-known lake -- at dawn, 5--6", {}),
        ('--prompt "a lake, # dawn" --cfg_scale 7', "a lake, # dawn", {"guidance_scale": 7}),
        ('--steps 9 --prompt a lake', "a lake", {"num_inference_steps": 9}),
        ('--prompt a lake --sampler_name "Euler a"', "a lake", {"scheduler": "euler_a"}),
        ("a lake --ss k_euler", "a lake", {"scheduler": "euler"}),
        ("a lake --n ", "a lake --n", None),
    ],
)  # fmt: skip
def test_what_a_line_sets(lines, text, prompt, settings):
    if settings is None:  # an option without a value
        assert lines(text) == [(1, "a lake", {"negative_prompt": ""})]
    else:
        assert lines(text) == [(1, prompt, settings)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a lake\nhills --t 3", "line 2: --t: is not read here; known are --n, --w"),
        ("a lake --s many", "line 1: --s: num_inference_steps must be a number, not “many”"),
        ("--n blurry", "line 1: has no prompt"),
        ("a lake --n a --negative_prompt b", "line 1: --negative_prompt: negative_prompt stands there twice"),
        ("a lake --ss ddpm", "line 1: --ss: ddpm is no sampler here; choose one of DDIM"),
        ("# only a comment\n", "has no prompt in it"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(lines, tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        lines(text)
    assert words in str(caught.value) and str(caught.value).startswith(str(tmp_path / "prompts.txt"))


def asked(tmp_path, text, *settings):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    cfg = load_config(GenerateConfig, None, [f"prompt_file={path}", *settings]).config
    return all_asked(cfg, read_lines(cfg))


def test_each_subject_has_a_config_of_its_own(tmp_path):
    lake, hills = asked(tmp_path, "a lake --w 32 --h 16 --d 5\nhills", "negative_prompt=bad", "seed=2")
    assert (lake.prompt, lake.width, lake.height, lake.seed) == ("a lake", 32, 16, 5)
    assert (hills.prompt, hills.width, hills.seed) == ("hills", None, 2)
    assert lake.negative_prompt == hills.negative_prompt == "bad" and lake.prompt_file is None
    both = asked(tmp_path, "a lake --l 3\nhills", "grid.num_inference_steps=[2,3]")
    assert [(each.prompt, each.num_inference_steps, each.guidance_scale) for each in both] == [
        ("a lake", 2, 3), ("hills", 2, None), ("a lake", 3, 3), ("hills", 3, None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb --s 0", "line 2: num_inference_steps: must be an integer >= 1 and <= 999 or null, not 0"),
        ("a --d -1", "line 1: seed: must be an integer >= 0 and "),
        ("a --w 64", "line 1: width, height: give both or neither"),
        ("a --l 3", "line 1: sets guidance_scale, which the grid varies"),
    ],
)
def test_a_line_that_sets_what_cannot_be_is_refused(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        asked(tmp_path, text, "grid.guidance_scale=[1,2]")
    assert words in str(caught.value)


def test_all_faults_of_a_file_are_said_at_once_each_with_its_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a --s 0 --d -1\nb\nc --w 60 --h 60\nd --t 3 --s x --ss ddpm\n--n only\ne --l 0.5")
    cfg = load_config(GenerateConfig, None, [f"prompt_file={path}"]).config
    with pytest.raises(UserError) as caught:
        read_lines(cfg, inspect_base("ckpt/miniature"))
    starts = [line.removeprefix(f"{path}: line ")[:12] for line in str(caught.value).splitlines()]
    assert starts[:4] == ["1: num_infer", "1: seed: mus", "3: width 60:", "3: height 60"]
    assert starts[4:] == ["4: --t: is n", "4: --s: num_", "4: --ss: ddp", "5: has no pr", "6: guidance_"]
    assert len(asked(tmp_path, "a --s 1 --d 1\nb\nc --w 64 --h 64")) == 3
    with pytest.raises(UserError) as caught:
        asked(tmp_path, "a --s 0\n" * 30)
    assert len(str(caught.value).splitlines()) == 21 and str(caught.value).endswith("and more")


def test_every_sampler_has_a_name_of_a1111():
    assert set(A1111_SAMPLERS) == set(get_args(SchedulerName))
    assert (A1111_SAMPLERS["euler_a"], A1111_SAMPLERS["dpm++"]) == ("Euler a", "DPM++ 2M")


# ---- files by name ----


@pytest.fixture
def shelf(tmp_path):
    """Factory of empty LoRA files, which no name needs to be read of."""

    def make(*names, root="a"):
        for name in names:
            path = tmp_path / root / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(tmp_path / root)

    return make


def test_a_lora_is_found_by_its_name(shelf):
    one, other = shelf("ink", "run/ink", "run/best", "styles/deep/oil"), shelf("ink", "chalk", root="b")
    assert find_lora("ink", [one, other]) == f"{one}/ink.safetensors"
    assert find_lora("ink", [other, one]) == f"{other}/ink.safetensors"
    assert find_lora("oil", [one, other]) == f"{one}/styles/deep/oil.safetensors"
    assert find_lora("run/ink", [one]) == f"{one}/run/ink.safetensors"
    assert find_lora("chalk", [one, other]) == f"{other}/chalk.safetensors"


def test_a_lora_that_is_not_there_or_there_twice_is_refused(shelf, tmp_path):
    folder = shelf("x/ink", "y/ink", "chalk")
    with pytest.raises(UserError, match=r"<lora:ink:…>: is .*x/ink.* and .*y/ink.*; rename one"):
        find_lora("ink", [folder])
    with pytest.raises(UserError, match=r"<lora:../a/chalk:…>: no such file in .*; name its folder"):
        find_lora("../a/chalk", [str(tmp_path / "a/x")])
    with pytest.raises(UserError, match="in any folder"):
        find_lora("chalk", [])


def test_what_a_picture_keeps_of_a_path():
    here = str(Path.cwd())
    assert (
        portable("ckpt/ink.safetensors") == "ckpt/ink.safetensors"
        and portable("some/hub-id") == "some/hub-id"
    )
    assert portable(f"{here}/ckpt/ink.safetensors") == portable("../x/ink.safetensors") == "ink.safetensors"


def test_a_hash_that_was_begun_ahead_is_the_same_and_made_once(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("a")
    other.write_text("a")
    before = model_files._file_hash.cache_info().misses
    fingerprint_ahead(str(path))
    assert fingerprint(str(path)) == fingerprint(str(path)) is not None
    assert model_files._file_hash.cache_info().misses == before + 1
    assert fingerprint(str(other)) == fingerprint(str(path))
    fingerprint_ahead(str(tmp_path / "missing"))
    assert fingerprint(str(tmp_path / "missing")) is None
