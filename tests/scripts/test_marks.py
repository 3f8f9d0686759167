"""Sampling scripts with A1111's marks: LoRAs, words, long prompts, and what their PNGs keep."""

import json
import os
import re
import shutil
from pathlib import Path

import narrow
import pytest
import torch
from galleries import ONE_LEVEL, command_line, distance, levels, pictures_in, report_in
from PIL import Image
from safetensors.torch import save_file

import generate
import style_transfer
from lorakit.ground.errors import UserError
from lorakit.sampling.model_files import fingerprint
from lorakit.sampling.recipe import CONFIG_CHUNK, FILES_CHUNK
from lorakit.weights.base import weights_hash
from lorakit.weights.tensors import file_payload_sha256


@pytest.fixture
def arguments(tiny_base, tmp_path):
    """Factory of the command line for one picture on the tiny base."""

    def make(*more, **changes):
        keys = dict(prompt="a photo of mountains", num_inference_steps=2, prompt_syntax="a1111")
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    """Factory that runs generate.py in this process; returns the folder."""

    def make(*more, **changes):
        assert generate.main(arguments(*more, **changes)) == 0
        return tmp_path / "out" / changes.get("name", "run")

    return make


@pytest.fixture
def loras(fitted, tmp_path):
    """A folder with ink.safetensors and deep/chalk.safetensors."""
    folder = tmp_path / "loras"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(fitted[0], folder / "ink.safetensors")
    shutil.copy(fitted[1], folder / "deep/chalk.safetensors")
    return folder


# ---- what is read ----


def test_a_lora_in_a_prompt_is_that_lora_in_the_config(run, loras):
    prompts = ["a lake <lora:ink:0.7>", "a lake", "a <lora:chalk:-0.5>lake<lora:ink:0.7>"]
    made = pictures_in(run(prompt=prompts, model_dirs=[str(loras)], batch_size=3))
    ink, chalk = str(loras / "ink.safetensors"), str(loras / "deep/chalk.safetensors")
    for number, entries in enumerate(([(ink, 0.7)], [], [(chalk, -0.5), (ink, 0.7)])):
        named = [{"path": path, "weight": weight} for path, weight in entries]
        alone = pictures_in(run(prompt="a lake", loras=named, name=f"alone{number}"))[0]
        assert distance(alone, made[number]) <= ONE_LEVEL, number
    assert distance(made[0], made[1]) > ONE_LEVEL and distance(made[0], made[2]) > ONE_LEVEL


def test_weights_chunks_and_words_change_the_picture_and_nothing_is_said_to_be_unread(run, tmp_path, capsys):
    (tmp_path / "words").mkdir()
    save_file({"emb_params": 3 * torch.randn(2, 16)}, tmp_path / "words/zwx.safetensors")
    long = "a photo of mountains, " * 12
    prompts = ["a lake", "a (lake:3)", "zwx", long, long + "a lake at night"]
    made = pictures_in(
        run(prompt=prompts, embedding_dirs=[str(tmp_path / "words")], negative_prompt="(bad:2)")
    )
    out = capsys.readouterr()
    assert "note" not in out.out + out.err
    for one, other in ((0, 1), (0, 2), (3, 4)):
        assert distance(made[one], made[other]) > ONE_LEVEL, (one, other)
    plain = pictures_in(run(prompt=prompts, prompt_syntax="plain", negative_prompt="bad", name="plain"))
    out = capsys.readouterr()
    said = (out.out + out.err).replace("\r", "\n")
    assert said.count("is not read") == 2 and "(lake:3); set prompt_syntax=a1111" in said
    assert distance(plain[3], plain[4]) <= ONE_LEVEL  # the end is cut


def test_pictures_do_not_depend_on_their_batch(run):
    prompts = ["a lake", "mountains, " * 20, "a (lake:1.3)", "a lake BREAK mountains"]
    together = pictures_in(run(prompt=prompts, batch_size=4, negative_prompt="blurred"))
    single = pictures_in(run(prompt=prompts, batch_size=1, negative_prompt="blurred", name="single"))
    assert all(distance(a, b) <= ONE_LEVEL for a, b in zip(together, single, strict=True))


def test_hints_of_a_lora_in_a_prompt_count_and_those_by_name(run, loras, capsys):
    shutil.move(loras / "ink.safetensors", loras / "LCM_LoRA_SD15_4steps.safetensors")
    unset = dict.fromkeys(("num_inference_steps", "scheduler", "guidance_scale"))
    options = {"prompt": "a lake <lora:LCM_LoRA_SD15_4steps:1>", "model_dirs": [str(loras)], **unset}
    folder = run(**options)
    out = capsys.readouterr().out
    assert (
        "note        scheduler lcm, as “LCM_LoRA_SD15_4steps”, by its name for few steps, asks for\n" in out
    )
    text = Image.open(folder / "0000.png").text["parameters"]
    assert "Steps: 4, Sampler: LCM, CFG scale: 1," in text
    shutil.copy(loras / "LCM_LoRA_SD15_4steps.safetensors", loras / "turbo boat.safetensors")
    assert generate.main(command_of(folder, loras, "a lake <lora:turbo boat:1>")) == 0
    assert "if “turbo” means that it is for few steps, set scheduler=lcm" in capsys.readouterr().out


def command_of(folder, loras, prompt):
    config = json.loads(Image.open(folder / "0000.png").text[CONFIG_CHUNK])
    keys = {"prompt": prompt, "prompt_syntax": config["prompt_syntax"], "model_dirs": [str(loras)]}
    return command_line(folder.parent.parent, base_of(folder), keys, "--check")


def base_of(folder):
    return report_in(folder)["config"]["pretrained_model_name_or_path"]


@pytest.mark.parametrize("script", [generate, style_transfer])
def test_marks_that_cannot_be_obeyed_are_refused_by_check_too(script, arguments, pictures, loras):
    image = {} if script is generate else {"image": str(pictures / "0.png"), "strength": 0.5}
    cases = {
        "a [lake:sea:0.5]": "changes the prompt between steps",
        "<lora:oil:1>": "no such file in",
        "<lora:ink:much>": "much is no number",
    }
    for prompt, message in cases.items():
        for more in (["--check"], []):
            with pytest.raises(UserError, match=message):
                script.main(arguments(*more, prompt=prompt, model_dirs=[str(loras)], **image))
    with pytest.raises(UserError, match="negative_prompt: <lora:ink:1>"):
        script.main(arguments("--check", negative_prompt="<lora:ink:1>", **image))
    assert script.main(arguments("--check", prompt="<lora:ink:1>", model_dirs=[str(loras)], **image)) == 0


def test_a_prompt_file_of_sd_scripts(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# my prompts\na lake --n blurry --w 24 --h 16 --d 3 --s 3 --l 2\n"
        "--prompt a (lake:1.5) --negative_prompt x\n"
    )
    folder = run(prompt_file=str(path), images_per_prompt=2, seed=1)
    rows = report_in(folder)["pictures"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        ("a lake", 3), ("a lake", 4), ("a (lake:1.5)", 1), ("a (lake:1.5)", 2)
    ]  # fmt: skip
    made = pictures_in(folder)
    assert [each.shape[:2] for each in made] == [(16, 24)] * 2 + [(16, 16)] * 2
    own = dict(width=24, height=16, negative_prompt="blurry", num_inference_steps=3, guidance_scale=2)
    assert [row["line"] for row in rows[1:3]] == [
        {"number": 2, **own, "seed": 3}, {"number": 3, "negative_prompt": "x"}
    ]  # fmt: skip
    alone = pictures_in(run(prompt="a lake", seed=4, **own, name="alone"))[0]
    assert distance(alone, made[1]) <= ONE_LEVEL
    other = pictures_in(run(prompt="a lake", seed=4, **own | {"negative_prompt": ""}, name="other"))[0]
    assert distance(other, made[1]) > ONE_LEVEL
    line = Image.open(folder / "0001.png").text["parameters"]
    assert "Negative prompt: blurry\nSteps: 3, Sampler: DDIM, CFG scale: 2, Seed: 4, Size: 24x16" in line


# ---- what a picture keeps ----


@pytest.fixture
def elsewhere(tiny_base, loras, tmp_path):
    """Options that name all files by absolute paths."""
    base = shutil.copytree(tiny_base, tmp_path / "home of alice/base, Seed: 9")
    return {
        "pretrained_model_name_or_path": str(base),
        "prompt": "a lake <lora:chalk:0.5>",
        "loras": [{"path": str(loras / "ink.safetensors")}],
        "model_dirs": [str(loras)],
        "scheduler": "euler_a",
        "seed": 3,
    }


def facts_of(picture):
    """A1111's own way to read the last line."""
    *lines, last = Image.open(picture).text["parameters"].split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return lines, {key: json.loads(value) if value[0] == '"' else value for key, value in pairs}


def test_a_picture_keeps_no_absolute_path_and_what_a1111_reads_is_right(run, elsewhere, loras, tmp_path):
    folder = run(**elsewhere)
    chunks = Image.open(folder / "0000.png").text
    assert str(tmp_path) not in json.dumps(chunks) and "alice" not in json.dumps(chunks)
    files = json.loads(chunks[FILES_CHUNK])
    assert files["ink.safetensors"] == file_payload_sha256(loras / "ink.safetensors")
    assert set(files) == {"base, Seed: 9", "ink.safetensors", "chalk.safetensors"} and all(files.values())
    lines, facts = facts_of(folder / "0000.png")
    assert lines == ["a lake <lora:chalk:0.5> <lora:ink:1>"]
    assert (facts["Model"], facts["Seed"], facts["Sampler"]) == ("base, Seed: 9", "3", "Euler a")
    assert "Denoising strength" not in facts


def test_a_base_in_one_file_is_known_by_all_of_it_and_a_lora_by_its_tensors(loras, tmp_path):
    base = narrow.write_base(tmp_path, "file")
    assert fingerprint(str(base)) == weights_hash(base) != file_payload_sha256(base)
    ink = loras / "ink.safetensors"
    assert fingerprint(str(ink)) == file_payload_sha256(ink) != weights_hash(ink)
    (tmp_path / "cut.safetensors").write_bytes(ink.read_bytes()[:-9])
    assert fingerprint(str(tmp_path / "cut.safetensors")) is None


def test_what_stands_plain_is_no_mark_to_a1111(run):
    folder = run(prompt="a (red:1.3) lake [x]", prompt_syntax="plain")
    assert facts_of(folder / "0000.png")[0] == [r"a \(red:1.3\) lake \[x\]"]


def test_from_finds_files_by_their_names_and_hashes(run, elsewhere, loras, tmp_path, capsys, monkeypatch):
    original = run(**elsewhere) / "0000.png"
    shelf = tmp_path / "shelf"
    shutil.move(tmp_path / "home of alice", shelf / "bases")
    shutil.move(loras, shelf / "loras")
    other = [f"output_dir={tmp_path / 'again'}", "name=x", "overwrite=true"]
    with pytest.raises(UserError, match=r"0000.png: pretrained_model_name_or_path: base, Seed: 9 is neither"):
        generate.main(["--from", str(original), *other])
    with pytest.raises(
        UserError, match=r"loras.0.path: ink.safetensors is neither at ink.safetensors nor in"
    ):
        generate.main(["--from", str(original), *other, f'model_dirs=["{shelf / "bases"}"]'])
    capsys.readouterr()
    found = [*other, f'model_dirs=["{shelf}"]']
    assert generate.main(["--from", str(original), *found]) == 0
    assert "note" not in capsys.readouterr().out
    (again,) = pictures_in(tmp_path / "again/x")
    assert distance(again, levels(original)) <= ONE_LEVEL
    # Of two files of a name the one with the right content; if only another is there, that is said.
    (shelf / "aaa").mkdir()
    shutil.copy(shelf / "loras/deep/chalk.safetensors", shelf / "aaa/ink.safetensors")
    assert generate.main(["--from", str(original), *found]) == 0
    assert "note" not in capsys.readouterr().out
    assert distance(*pictures_in(tmp_path / "again/x"), again) == 0
    os.remove(shelf / "loras/ink.safetensors")
    assert generate.main(["--from", str(original), *found]) == 0
    said = capsys.readouterr().out
    assert f"note        {shelf}/aaa/ink.safetensors is not as it was when {original} was made\n" in said
    assert distance(*pictures_in(tmp_path / "again/x"), again) > ONE_LEVEL


def test_two_files_of_one_name_are_told_apart(run, fitted, tmp_path):
    paths = [tmp_path / "alice" / name / "best.safetensors" for name in ("one", "two")]
    for path, source in zip(paths, fitted, strict=False):
        path.parent.mkdir(parents=True)
        shutil.copy(source, path)
    loras = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (1, 0.3), strict=True)]
    original = run(loras=loras) / "0000.png"
    config = json.loads(Image.open(original).text[CONFIG_CHUNK])
    assert [lora["path"] for lora in config["loras"]] == ["best.safetensors", "two/best.safetensors"]
    shutil.move(tmp_path / "alice", tmp_path / "bob")
    again = [f"output_dir={tmp_path / 'again'}", "name=x", f'model_dirs=["{tmp_path / "bob"}"]']
    assert generate.main(["--from", str(original), *again]) == 0
    assert distance(*pictures_in(tmp_path / "again/x"), levels(original)) <= ONE_LEVEL
    swapped = [
        {"path": str(path).replace("alice", "bob"), "weight": weight}
        for path, weight in zip(paths, (0.3, 1), strict=True)
    ]
    assert distance(*pictures_in(run(loras=swapped, name="swapped")), levels(original)) > ONE_LEVEL


def test_from_needs_no_files_that_a_setting_replaces(run, elsewhere, tiny_base, tmp_path):
    original = run(**elsewhere) / "0000.png"
    shutil.rmtree(tmp_path / "home of alice")
    shutil.rmtree(tmp_path / "loras")
    own = [f"pretrained_model_name_or_path={tiny_base}", "loras=[]", "prompt=a lake"]
    assert generate.main(["--from", str(original), *own, f"output_dir={tmp_path / 'again'}"]) == 0


def test_a_picture_of_before_without_hashes_is_taken_as_it_is(run, elsewhere, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    original = run(**elsewhere) / "0000.png"
    old = PngInfo()
    with Image.open(original) as image:
        config = json.loads(image.text[CONFIG_CHUNK]) | elsewhere
        old.add_text(CONFIG_CHUNK, json.dumps(config))
        image.save(tmp_path / "old.png", pnginfo=old)
    assert generate.main(["--from", str(tmp_path / "old.png"), f"output_dir={tmp_path / 'again'}"]) == 0
    folder = next((tmp_path / "again").iterdir())
    assert distance(*pictures_in(folder), levels(original)) == 0


def test_a_restyled_picture_tells_its_strength_and_finds_its_input(arguments, pictures, loras, tmp_path):
    own = {"image": str(pictures / "1.png"), "strength": 0.55, "num_inference_steps": 4, "clip_skip": 2}
    prompt = "(ink:1.4) drawing <lora:ink:0.6>"
    assert style_transfer.main(arguments(prompt=prompt, model_dirs=[str(loras)], **own)) == 0
    original = Path(shutil.copy(tmp_path / "out/run/0000.png", tmp_path / "posted.png"))
    assert str(pictures) not in json.dumps(Image.open(original).text)
    facts = facts_of(original)[1]
    assert (facts["Denoising strength"], facts["Clip skip"]) == ("0.55", "2")
    report = tmp_path / "out/run"
    base = f"pretrained_model_name_or_path={base_of(report)}"
    again = [base, f"output_dir={tmp_path / 'again'}", "name=x", f'model_dirs=["{loras}"]']
    with pytest.raises(UserError, match="image: 1.png is neither at 1.png nor in"):
        style_transfer.main(["--from", str(original), *again])
    shutil.copy(pictures / "1.png", original.parent / "1.png")
    assert style_transfer.main(["--from", str(original), *again]) == 0
    assert distance(*pictures_in(tmp_path / "again/x"), levels(original)) <= ONE_LEVEL
    # Beside its report a picture finds all that is still where it was.
    beside = ["--from", str(report / "0000.png"), f"output_dir={tmp_path / 'again'}", "name=y"]
    assert style_transfer.main(beside) == 0
    assert distance(*pictures_in(tmp_path / "again/y"), levels(original)) <= ONE_LEVEL


def test_a_grid_goes_with_marks(run, loras, tmp_path):
    prompts = ["a lake <lora:chalk:0.5>", "a (lake:1.4)"]
    folder = run(
        grid={"prompt": prompts, "guidance_scale": [2, 4]},
        loras=[{"path": str(loras / "ink.safetensors"), "weight": 0.5}],
        model_dirs=[str(loras)],
    )
    made = pictures_in(folder)
    assert len(made) == 4 and all(distance(made[0], made[other]) > ONE_LEVEL for other in (1, 2))
    again = ["--from", str(folder / "0002.png"), f"output_dir={tmp_path / 'again'}", "name=x"]
    assert generate.main(again) == 0
    assert distance(*pictures_in(tmp_path / "again/x"), made[2]) <= ONE_LEVEL
