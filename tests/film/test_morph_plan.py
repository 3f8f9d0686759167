"""What a morph will do is known before it is done: counts, memory, and everything that is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest

import morph
from lorakit.film import morph_plan
from lorakit.film.config import MorphConfig
from lorakit.film.morph_plan import (
    attention_bytes,
    count_evaluations,
    describe_morph,
    fingerprint,
    lora_sha256,
    make_morph_plan,
    predict_memory,
    probe_rounds,
    probe_stride,
)
from lorakit.ground.config import load_config
from lorakit.ground.errors import OutputError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def planned(morph_settings):
    """Factory of a config and its plan."""

    def make(**changes):
        cfg = load_config(MorphConfig, None, morph_settings(**changes)).config
        return cfg, make_morph_plan(cfg)

    return make


# ---- counts ----


def test_the_shipped_morph_takes_at_most_two_fifths_of_fifty_steps_of_ddim():
    cfg = load_config(MorphConfig, ROOT / "cfg/morph/mountain.json").config
    assert (cfg.frames, cfg.solver, cfg.num_inference_steps, cfg.reschedule) == (16, "ab2", 16, "probe")
    own = sum(count_evaluations(cfg, make_morph_plan(cfg)).values())
    cfg = cfg.model_copy(update={"solver": "ddim", "num_inference_steps": 50})
    counts = count_evaluations(cfg, make_morph_plan(cfg))
    assert own <= 0.4 * sum(counts.values()) and sum(counts.values()) <= 1100
    full = cfg.model_copy(update={"reschedule": "full"})  # as DiffMorpher does it
    assert sum(count_evaluations(full, make_morph_plan(full)).values()) > 1600


NONE = (False, False, False)
WORK = {
    "probe": {},
    "guided": {"guidance_scale": 3.0, "attention_blocks": ["down", "mid", "up"]},
    "full": {"reschedule": "full", "loras": (True, False, False)},
    "full, guided": {"reschedule": "full", "guidance_scale": 3.0, "loras": NONE},
    "select": {"reschedule": "select", "loras": NONE},
    "select, loop, guided": {
        "reschedule": "select",
        "count": 3,
        "loop": True,
        "guidance_scale": 3.0,
        "loras": NONE,
    },
    "off": {"reschedule": "off", "attention_blocks": ["mid"], "loras": NONE},
    "three": {"count": 3, "loras": (True, False, False), "attention": "fused_outer"},
    "two, loop": {"loop": True, "loras": NONE, "attention": "off"},
    "a probe of one point": {"probe_points": 3, "loras": NONE, "attention_blocks": ["down"]},
    "odd sizes": {"width": 18, "height": 30, "loras": NONE},
    "guided inversion": {"inversion_guidance_scale": 2.0, "loras": NONE, "frames": 3},
}


@pytest.mark.parametrize("name", WORK)
def test_a_run_does_what_was_planned(planned, morphed, name):
    changes = WORK[name]
    cfg, plan = planned(**changes)
    folder, report = morphed(**changes)
    assert report["unet_evaluations"] == sum(count_evaluations(cfg, plan).values())
    assert report["attention_bytes"] == attention_bytes(cfg, plan)
    assert len(report["frames"]) == plan.total == len(list((folder / "frames").iterdir()))
    pictures = sum(frame["alpha"] in (0, 1) for frame in report["frames"])
    assert pictures == len(cfg.images)  # each once


def test_a_run_of_two_frames_a_segment_is_the_pictures_alone(planned, morphed):
    cfg, plan = planned(frames=2, count=3, loras=NONE)
    _, report = morphed(frames=2, count=3, loras=NONE)
    assert plan.total == 3 and [frame["alpha"] for frame in report["frames"]] == [0, 0, 1]
    assert report["unet_evaluations"] == sum(count_evaluations(cfg, plan).values())


def test_fixed_point_takes_no_more_than_was_planned(planned, morphed):
    changes = {"loras": NONE, "frames": 3, "reschedule": "off", "solver": "ddim"}
    changes["inversion_method"] = "fixed_point"
    bound = sum(count_evaluations(*planned(**changes)).values())
    plain = sum(count_evaluations(*planned(**changes | {"inversion_method": "ddim"})).values())
    assert plain < morphed(**changes)[1]["unet_evaluations"] <= bound


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("frames", [2, 3, 16])
def test_frames_are_counted_without_joints_twice(planned, number, loop, frames):
    cfg, _ = planned(count=2)
    images = (cfg.images * 3)[:number]
    plan = make_morph_plan(cfg.model_copy(update={"images": images, "loop": loop, "frames": frames}))
    segments = number if loop else number - 1
    assert plan.segments == segments and plan.total == segments * (frames - 1) + (not loop)


@pytest.mark.parametrize("points", range(3, 20))
def test_the_rounds_of_a_probe_place_its_inner_points(planned, points):
    cfg, _ = planned(loras=NONE)
    rounds = probe_rounds(cfg.model_copy(update={"probe_points": points}))
    assert sum(rounds) == points - 2 and min(rounds) >= 1 and len(rounds) <= 2


@pytest.mark.parametrize(("steps", "most"), [(50, 13), (10, 10), (7, 3), (999, 2)])
def test_a_probe_has_no_more_steps_than_it_may(planned, steps, most):
    cfg, _ = planned(loras=NONE)
    stride = probe_stride(cfg.model_copy(update={"num_inference_steps": steps, "probe_steps": most}))
    assert -(-steps // stride) <= most
    assert stride == 1 or -(-steps // (stride - 1)) > most  # and as many as it can


def test_memory_grows_with_what_takes_it(planned):
    def memory(half=False, **changes):
        found = predict_memory(*planned(loras=NONE, frames=40, **changes), half)
        assert found is not None
        return found

    plain = memory()
    assert memory(half=True)["base"] < plain["base"]
    assert memory(batch_size=16)["one pass of the U-Net"] == 2 * plain["one pass of the U-Net"]
    assert memory(batch_size=16)["shared attention"] == plain["shared attention"]
    assert memory(guidance_scale=2.0)["shared attention"] == 2 * plain["shared attention"]
    steps = memory(num_inference_steps=60)  # attention is that of one step, however many there are
    assert steps["shared attention"] == plain["shared attention"] and steps["paths"] > 8 * plain["paths"]
    assert attention_bytes(*planned(attention="off", loras=NONE)) == 0


# ---- the plan in words ----


def test_check_prints_the_plan_and_writes_nothing(morph_settings, fitted, tmp_path, capsys):
    assert morph.main([*morph_settings(count=3, loras=(True, False, True)), "--check"]) == 0
    text = capsys.readouterr().out
    assert text.count("\npicture ") == 3 and str(fitted[0]) in text and "no LoRA" in text
    assert "'a photo of mountains 2'" in text and "9 of 16x16" in text and "evaluations (inversion 21" in text
    assert "MB in float32" in text and "is cut to 16x16" in text
    assert list(tmp_path.iterdir()) == []


def test_texts_that_are_too_long_are_said(planned):
    ends = ["one", "two", "three"]
    long = ["mountains and a lake " * 20 + end for end in ends]
    images = planned()[0].model_dump(mode="json")["images"]
    images[1]["prompt"] = long[0]
    _, plan = planned(images=images, negative_prompt=long[1], anchor_prompt=long[2])
    notes = [note for note in plan.notes if "is not read" in note]
    assert len(notes) == 3 and all(f"{end}”" in note for end, note in zip(ends, notes, strict=True))
    assert not any("is not read" in note for note in planned(anchor_prompt="mountains and a lake")[1].notes)


def test_check_says_what_is_to_be_trained_and_that_compare_does_it_twice(planned, tmp_path):
    lora = str(tmp_path / "new.safetensors")
    cfg, _ = planned(compare=True)
    images = (cfg.images[0].model_copy(update={"lora": lora}), cfg.images[1])
    cfg = cfg.model_copy(update={"images": images, "train_if_missing": True})
    text = describe_morph(cfg, make_morph_plan(cfg))
    assert f"to train    {lora}" in text and "the same again without LoRA" in text


def test_small_and_odd_pictures_are_noted(planned, pictures, tmp_path):
    _, plan = planned(width=16, height=16, loras=NONE)
    assert not any("soft" in note for note in plan.notes)
    _, plan = planned(width=64, height=64, loras=NONE)
    assert sum("less than half as large" in note for note in plan.notes) == 2
    _, plan = planned(width=20, height=16, loras=NONE)  # neither 24x24 nor 40x24
    assert [note.split(":")[0] for note in plan.notes if "is cut to" in note] == ["images.0", "images.1"]


# ---- what is wrong with it ----


def refused(planned, *words, kind=UserError, **changes):
    with pytest.raises(kind) as caught:
        planned(**changes)
    for word in words:
        assert word in str(caught.value), caught.value


def image(**changes):
    return {"path": "dataset/mountain/mountain.jpg", "prompt": "", **changes}


def test_a_missing_picture(planned):
    refused(planned, "nowhere.png", "No such file", images=[image(), image(path="nowhere.png")])


def test_a_lora_that_is_missing_names_three_ways_out(planned):
    images = [image(), image(lora="nowhere.safetensors")]
    refused(planned, "nowhere.safetensors", "train_lora.py", "train_if_missing=true", "null", images=images)
    fit = {"images": images, "train_if_missing": True}
    refused(planned, "nowhere.json", "no such config", fit_config="nowhere.json", **fit)
    _, plan = planned(**fit)
    assert plan.missing == plan.loras == ("nowhere.safetensors",)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.pt", "a.safetensors/"])
def test_a_lora_that_training_could_not_write_under_its_name(planned, name):
    images = [image(), image(lora=name)]
    refused(planned, name, ".safetensors", images=images, train_if_missing=True)


def test_a_lora_that_is_no_whole_safetensors_file(planned, fitted, tmp_path):
    for name, content, word in [
        ("a.safetensors", fitted[0].read_bytes()[:-100], "truncated"),
        ("b.safetensors", b"\x80\x02}q\x00.", "pickle"),
        ("c.pt", b"PK\x03\x04", "pickle"),
        ("d.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ]:
        (tmp_path / name).write_bytes(content)
        refused(planned, name, word, images=[image(), image(lora=str(tmp_path / name))])
    refused(planned, "is a folder", images=[image(), image(lora=str(tmp_path))])


def with_metadata(path: Path, source: Path, metadata: dict[str, str]) -> str:
    from safetensors.torch import load_file, save_file

    save_file(load_file(source), path, metadata)
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "lcm-lora-sdv1-5",
        "LCM_sd15",
        "Hyper-SD15-8steps-lora",
        "hyper_sd_1step",
        "sd15-turbo",
        "sdxl_lightning_4step_lora",
        "dmd2-4step",
        "TCD-SD15-LoRA",
    ],
)
def test_a_lora_for_few_steps_is_refused_by_its_name(planned, fitted, tmp_path, name):
    path = Path(shutil.copy(fitted[0], tmp_path / f"{name}.safetensors"))
    refused(planned, name, "few steps", "train_lora.py", images=[image(), image(lora=str(path))])


@pytest.mark.parametrize("name", ["mountain", "dreamlcmx", "volcano", "turbot", "hyperreal", "palcmoss"])
def test_an_ordinary_name_is_not_taken_for_one(planned, fitted, tmp_path, name):
    path = Path(shutil.copy(fitted[0], tmp_path / f"{name}.safetensors"))
    assert planned(images=[image(), image(lora=str(path))])[1].loras == (str(path),)


@pytest.mark.parametrize("key", ["ss_output_name", "modelspec.title", "ss_base_model_version"])
def test_a_lora_for_few_steps_is_refused_by_its_metadata(planned, fitted, tmp_path, key):
    path = with_metadata(tmp_path / "x.safetensors", fitted[0], {key: "SD15 LCM distilled"})
    refused(planned, "x.safetensors", "few steps", "'LCM'", images=[image(), image(lora=path)])
    path = with_metadata(tmp_path / "y.safetensors", fitted[0], {key: "mountain"})
    assert planned(images=[image(), image(lora=path)])[1].loras == (path,)


@pytest.mark.parametrize("objective", ["denoise", ["denoise", "another"]])
def test_what_train_lora_wrote_is_fitted_to_pictures_whatever_it_is_called(
    planned, fitted, tmp_path, objective
):
    own = {"lorakit.config": json.dumps({"objective": objective}), "ss_output_name": "turbo_boat"}
    path = with_metadata(tmp_path / "lightning_over_a_lake.safetensors", fitted[0], own)
    assert planned(images=[image(), image(lora=path)])[1].loras == (path,)


@pytest.mark.parametrize("config", ["{", "[]", '{"objective": "another"}', '{"rank": 4}'])
def test_another_objective_or_none_that_is_told_leaves_it_to_the_name(planned, fitted, tmp_path, config):
    own = {"lorakit.config": config}
    path = with_metadata(tmp_path / "lightning_over_a_lake.safetensors", fitted[0], own)
    refused(planned, "lightning_over_a_lake", "few steps", images=[image(), image(lora=path)])


@pytest.mark.parametrize(("width", "height", "words"), [(17, 16, "width 17"), (16, 19, "height 19")])
def test_sizes_that_the_vae_does_not_divide(planned, width, height, words):
    refused(planned, words, "VAE factor, 2", width=width, height=height)


def test_a_writer_that_is_not_there(planned, monkeypatch):
    monkeypatch.setattr(
        morph_plan, "missing_writers", lambda formats: dict.fromkeys(set(formats) & {"mp4"}, "pip install x")
    )
    refused(planned, 'formats: "mp4"', "pip install x", "leave it out", formats=["gif", "mp4"])
    assert planned(formats=["gif"])


def test_lpips_without_its_package(planned, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(planned, "pip install lpips", '"vae" needs none', distance="lpips")


def test_a_file_in_the_place_of_the_output_folder(planned):
    refused(planned, "Makefile", "choose another folder", kind=OutputError, output_dir=str(ROOT / "Makefile"))


# ---- identity ----


@pytest.mark.parametrize("key", sorted(morph_plan.PRESENTATION))
def test_what_only_shows_frames_is_a_key_and_no_part_of_the_fingerprint(planned, key):
    values = {
        "fps": 3.0,
        "hold_ms": 5,
        "pingpong": True,
        "min_side": 99,
        "formats": ("webp",),
        "compare": True,
        "overwrite": True,
        "train_if_missing": True,
    }
    cfg, plan = planned()
    other = cfg.model_copy(update={key: values.get(key, "other")})
    assert getattr(other, key) != getattr(cfg, key)
    assert fingerprint(other, plan, "no") == fingerprint(cfg, plan, "no")


OTHER_VALUES = {
    "mixed_precision": "bf16",
    "prediction_type": "v_prediction",
    "clip_skip": 2,
    "loop": True,
    "frames": 6,
    "prompt_syntax": "a1111",
    "negative_prompt": "fog",
    "anchor_prompt": "a hill",
    "num_inference_steps": 8,
    "solver": "ab2",
    "guidance_scale": 2.0,
    "inversion_method": "fixed_point",
    "fixed_point_iterations": 2,
    "inversion_guidance_scale": 2.0,
    "anchor": False,
    "residual_power": 1.0,
    "attention": "outer",
    "attention_share": 0.5,
    "attention_blocks": ("mid",),
    "adain": False,
    "reschedule": "off",
    "probe_points": 6,
    "probe_steps": 2,
    "easing": "sine",
    "distance": "lpips",
    "batch_size": 3,
}


def test_every_key_either_changes_the_fingerprint_or_only_shows_frames(planned):
    cfg, plan = planned()
    content = {
        "images",
        "pretrained_model_name_or_path",
        "base_config",
        "embedding_dirs",
        "width",
        "height",
    }  # what they stand for
    assert set(MorphConfig.model_fields) == set(OTHER_VALUES) | morph_plan.PRESENTATION | content
    one = fingerprint(cfg, plan, "no")
    for key, value in OTHER_VALUES.items():
        assert fingerprint(cfg.model_copy(update={key: value}), plan, "no") != one, key
    assert fingerprint(cfg, plan, "fp16") != one and fingerprint(cfg, plan, "no", loras=False) != one
    assert fingerprint(*planned(width=24), "no") != one


def test_the_strength_in_the_config_of_a_folder_of_peft_is_part_of_the_fingerprint(planned, fitted, tmp_path):
    folder = tmp_path / "style"
    folder.mkdir()
    file = shutil.copy(fitted[0], folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"

    def found(alpha: int) -> tuple[str, str]:
        config.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
        return lora_sha256(str(folder)), lora_sha256(str(file))

    assert found(4) == found(4) and len(set(found(4))) == 1 and found(4) != found(8)
    config.unlink()
    assert lora_sha256(str(folder)) == morph_plan.file_sha256(file) != found(4)[0]
    cfg, plan = planned()
    images = tuple(picture.model_copy(update={"lora": str(folder)}) for picture in cfg.images)
    cfg = cfg.model_copy(update={"images": images})
    assert make_morph_plan(cfg).loras == (str(folder),)
    found(4)
    one = fingerprint(cfg, plan, "no")
    found(8)
    assert fingerprint(cfg, plan, "no") != one


def test_the_fingerprint_knows_files_by_content_and_not_by_name(planned, fitted, tiny_base, tmp_path):
    cfg, plan = planned()
    one = fingerprint(cfg, plan, "no")
    moved = Path(shutil.copy(cfg.images[0].path, tmp_path / "moved.png"))
    lora = Path(shutil.copy(fitted[0], tmp_path / "moved.safetensors"))
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))

    def other(path=str(moved), lora=str(lora), **changes):
        first = cfg.images[0].model_copy(update={"path": path, "lora": lora, **changes})
        update = {"images": (first, cfg.images[1]), "pretrained_model_name_or_path": str(base)}
        again = cfg.model_copy(update=update)
        return fingerprint(again, make_morph_plan(again), "no")

    assert other() == one
    assert other(path=cfg.images[1].path) != one
    assert other(lora=str(fitted[1])) != one
    assert other(lora=None) != one
    assert other(prompt="x") != one and other(lora_weight=0.5) != one
    scheduler = base / "scheduler/scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(settings | {"prediction_type": "v_prediction"}))
    assert other() != one  # the same weights with another schedule are another base
