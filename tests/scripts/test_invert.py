"""The script that prints how well each method inverts: its table, its files, and the faults of its users."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

import invert
from lorakit.diffusion.inversion_plan import InvertConfig, Method
from lorakit.diffusion.inversion_report import HEADER
from lorakit.ground.config import ConfigError, load_config, schema
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arguments(tiny_base, pictures, tmp_path):
    """Factory of the command line for a picture on the tiny base."""

    def make(*more, **changes):
        keys = dict(
            image=str(pictures / "0.png"),
            prompt="a photo of mountains",
            pretrained_model_name_or_path=str(tiny_base),
            num_inference_steps=4,
            output_dir=str(tmp_path / "out"),
        )
        return [*more, *(f"{key}={json.dumps(value)}" for key, value in (keys | changes).items())]

    return make


def table(text):
    """(method, guidance) -> the words of its line."""
    lines = [line.split() for line in text.splitlines()]
    return {(words[0], words[1]): words for words in lines if words and words[0] in get_args(Method)}


def test_the_table_has_a_line_for_each_method_and_guidance(arguments, tmp_path, capsys):
    assert invert.main(arguments()) == 0
    text = capsys.readouterr().out
    found = table(text)
    methods = get_args(Method)
    assert found.keys() == {(m, "1") for m in methods if m != "null_text"} | {(m, "3") for m in methods}
    assert "VAE round trip" in text and text.splitlines()[-1].startswith("wrote ")
    assert {len(line) for line in text.splitlines() if line.split()[0] in methods} == {len(HEADER)}
    folder = tmp_path / "out/0"
    report = json.loads((folder / "report.json").read_text())
    assert report["width"] == report["height"] == 16 and report["vae_round_trip"]["psnr"] > 0
    rows = {(row["method"], f"{row['guidance_scale']:g}"): row for row in report["rows"]}
    assert rows.keys() == found.keys() and set(rows["ddim", "1"]) - set(report["definitions"]) <= {
        "method",
        "guidance_scale",
        "inversion_seconds",
        "sampling_seconds",
    }
    for method, guidance in rows:
        name = folder / f"{method}_guidance_{guidance}.png"
        assert Image.open(name).size == (16, 16)
    assert Image.open(folder / "sheet.png").size[0] > 5 * 128
    assert {path.name for path in folder.iterdir()} >= {"picture.png", "vae.png"}


def test_evaluations_are_counted_and_exact_methods_score_better(arguments, tmp_path, capsys):
    invert.main(arguments())
    capsys.readouterr()
    report = json.loads((tmp_path / "out/0/report.json").read_text())
    rows = {(row["method"], row["guidance_scale"]): row for row in report["rows"]}
    spent = {key: (row["inversion_evaluations"], row["sampling_evaluations"]) for key, row in rows.items()}
    assert spent["ddim", 1] == (4, 4) and spent["ddim", 3] == (8, 8)
    assert spent["ab2", 1] == (5, 4) and spent["ab2", 3] == (10, 8)
    assert spent["obelm", 1] == (4, 3) and spent["anchored", 3] == (8, 16)
    assert 4 < spent["fixed_point", 1][0] <= 4 * 5 and spent["fixed_point", 1][1] == 4
    assert 8 < spent["null_text", 3][0] <= 4 + 4 * 12 and spent["null_text", 3][1] == 8
    for guidance in (1, 3):
        for method in ("obelm", "anchored"):  # equal to the round trip, or nearly
            assert (rows[method, guidance]["psnr_to_vae"] or 100) > 60
            assert rows[method, guidance]["psnr"] == pytest.approx(report["vae_round_trip"]["psnr"], abs=0.05)
        assert rows["ddim", guidance]["psnr_to_vae"] < 50


@pytest.mark.quick
def test_a_lora_counts_and_the_same_command_gives_the_same_table(arguments, random_lora, tmp_path, capsys):
    from inversion_pipeline import InversionPipeline
    from lorakit.weights.lora_file import lora_bytes

    pipe = InversionPipeline.from_pretrained(arguments()[2].split("=", 1)[1].strip('"'))
    modules = random_lora(pipe.unet, 1).modules | random_lora(pipe.text_encoder, 1, "text_encoder").modules
    path = tmp_path / "x.safetensors"
    path.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    noises = []
    for change in ({}, {"lora": str(path)}, {"lora": str(path), "lora_weight": 0.0}, {"lora": str(path)}):
        invert.main(arguments(methods=["ddim"], guidance_scales=[1.0], **change))
        noises.append(table(capsys.readouterr().out)["ddim", "1"][-2:])
    assert noises[0] == noises[2] and noises[1] == noises[3] and noises[0] != noises[1]


def test_a_picture_may_be_named_alone_and_then_the_mountain_s_prompt_is_not_its_own(tmp_path, capsys):
    path = tmp_path / "a photo.PNG"
    Image.new("RGB", (30, 20), "red").save(path)
    assert invert.main([str(path), "--check"]) == 0
    out = capsys.readouterr().out
    assert str(path) in out and "prompt and negative_prompt are the same" in out
    assert invert.main(["--check"]) == 0
    out = capsys.readouterr().out
    assert "dataset/mountain/mountain.jpg at 128x128, 11 inversions in 50 steps" in out and "note" not in out
    odd = tmp_path / "a=b.png"
    Image.new("RGB", (20, 20)).save(odd)
    assert invert.main([str(odd), "--check"]) == 0 and str(odd) in capsys.readouterr().out
    with pytest.raises(UserError, match="one picture at a time"):
        invert.main([str(path), str(odd)])


@pytest.mark.parametrize("end", ["", ".jpg", " and a=b.png"])
def test_a_long_prompt_is_no_path(arguments, capsys, end):
    assert invert.main([*arguments("--check"), "prompt=" + "a lake, " * 50 + end]) == 0
    assert " inversions in 4 steps" in capsys.readouterr().out


def test_a_picture_keeps_its_aspect_or_has_the_size_that_is_asked_for(arguments, pictures, capsys):
    invert.main(arguments("--check", image=str(pictures / "1.png")))
    width, height = capsys.readouterr().out.split(" at ")[1].split(",")[0].split("x")
    assert int(width) > int(height)
    invert.main(arguments("--check", width=24, height=18))
    assert " at 24x18," in capsys.readouterr().out


def test_check_writes_nothing(arguments, tmp_path):
    assert invert.main(arguments("--check")) == 0
    assert not (tmp_path / "out").exists()


def test_a_lora_for_few_steps_is_said(arguments, fitted, tmp_path, capsys):
    path = shutil.copy(fitted[0], tmp_path / "lcm_lora.safetensors")
    assert invert.main(arguments("--check", lora=str(path))) == 0
    assert "looks like a LoRA for sampling in few steps ('lcm' in 'lcm_lora')" in capsys.readouterr().out
    assert invert.main(arguments("--check", lora=str(fitted[0]))) == 0
    assert "few steps" not in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_said(arguments, capsys):
    long = "a photo of mountains " * 20 + "with a lake"
    assert invert.main(arguments("--check", negative_prompt=long)) == 0
    assert "with a lake” is not read" in capsys.readouterr().out
    assert invert.main(arguments("--check")) == 0
    assert "is not read" not in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_said_once_its_base_is_fetched(
    arguments, tiny_base, capsys, monkeypatch
):
    from lorakit.diffusion import inversion_plan, models
    from lorakit.weights.base import BaseInfo, inspect_base

    monkeypatch.setattr(inversion_plan, "inspect_base", lambda name, *_, **__: BaseInfo(name, "hub"))
    monkeypatch.setattr(models, "fetch_base", lambda *_: inspect_base(str(tiny_base)))
    options = {
        "prompt": "a lake " * 40,
        "methods": ["ddim"],
        "guidance_scales": [1.0],
        "width": 16,
        "height": 16,
    }
    assert invert.main(arguments("--check", **options)) == 0
    assert "is not read" not in capsys.readouterr().out
    assert invert.main(arguments(**options)) == 0
    assert capsys.readouterr().out.count("is not read") == 1


def test_a_reconstruction_that_is_not_finite_is_said_and_not_a_fault(
    arguments, tmp_path, capsys, monkeypatch
):
    from inversion_pipeline import InversionPipeline

    monkeypatch.setattr(InversionPipeline, "reconstruct", lambda self, found: found.noise * float("nan"))
    assert invert.main(arguments(methods=["ddim"], guidance_scales=[1.0])) == 0
    assert table(capsys.readouterr().out)["ddim", "1"][2:6] == ["-"] * 4
    (row,) = json.loads((tmp_path / "out/0/report.json").read_text())["rows"]
    assert row["psnr"] is row["ssim"] is None and not (tmp_path / "out/0/ddim_guidance_1.png").exists()


# ---- faults of users ----


def test_wrong_inputs_give_one_message_and_exit_code_2(arguments, tmp_path, capfd):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.safetensors").write_text("no LoRA")
    cases = [
        (dict(image=str(tmp_path / "missing.jpg")), "missing.jpg: No such file"),
        (dict(image=str(tmp_path / "text.png")), "looks like text, not a picture"),
        (dict(lora=str(tmp_path / "missing.safetensors")), "missing.safetensors"),
        (dict(lora=str(tmp_path / "text.safetensors")), "text.safetensors"),
        (dict(pretrained_model_name_or_path="ckpt/miniatur"), "ckpt/miniatur: no such folder"),
        (dict(width=32), "width, height: give both or neither"),
        (dict(width=33, height=33), "both must divide by the VAE's factor, 2"),
        (dict(width=8, height=16), "must be an integer >= 16"),
        (dict(methods=["ddin"]), '"ddim", "ab2", "fixed_point"'),
        (dict(methods=["null_text"], guidance_scales=[1.0]), "null_text needs a guidance above 1"),
        (dict(guidance_scales=[]), "length >= 1"),
        (dict(guidance_scales=[0.5]), ">= 1"),
        (dict(num_inference_steps=0), ">= 1 and <= 999"),
        (dict(number_of_steps=3), "unknown key"),
    ]
    for change, message in cases:
        argv = arguments(**change)
        assert run_guarded(lambda argv=argv: invert.main(argv)) == 2, change
        captured = capfd.readouterr()
        assert captured.err.startswith("error: ") and message in captured.err, captured.err
        assert len(captured.err.strip().splitlines()) == 1 and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_said_before_any_work(arguments, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    argv = arguments(output_dir=str(tmp_path / "file"))
    assert run_guarded(lambda: invert.main(argv)) == 4
    assert "rename that or use another folder" in capfd.readouterr().err


# ---- the command line ----


def test_help_comes_at_once_and_without_torch(program):
    result = program("invert.py", ["--help"])
    assert result.code == 0 and "guidance_scales = [1.0, 3.0]" in result.out
    assert not result.imported and result.blinks < 20


def test_check_needs_no_torch_either(program):
    result = program("invert.py", ["--check"])
    assert result.code == 0 and not result.imported, result.err


def test_all_methods_are_compared_unless_a_user_chooses():
    assert load_config(InvertConfig, None).config.methods == get_args(Method)


def test_the_committed_config_and_schema_are_those_of_the_script():
    found = list((ROOT / "cfg/invert").glob("*.json"))
    assert {path.name for path in found} == {"mountain.json", "schema.json"}
    config = load_config(InvertConfig, ROOT / "cfg/invert/mountain.json").config
    assert config.prompt and config.image == "dataset/mountain/mountain.jpg"
    own = json.loads((ROOT / "cfg/invert/mountain.json").read_text())["$schema"]
    assert own == "./schema.json"
    stored = json.loads((ROOT / "cfg/invert/schema.json").read_text())
    assert stored == schema(InvertConfig), "run: invert.py --schema > cfg/invert/schema.json"
    with pytest.raises(ConfigError, match="did you mean guidance_scales"):
        load_config(InvertConfig, None, ["guidance_scale=3"])
