"""The recipe of the miniature on tiny models: it runs from nothing, resumes exactly, and its parts fit."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.ground.checkpoints import verify_checkpoint
from lorakit.ground.errors import StoppedError, UserError
from lorakit.pictures.edges import canny, edge_f1
from miniature import autoencoder, classifier, diffusion, photographs, pictures, text
from miniature import run as runs
from miniature.batches import Photographs
from miniature.landscapes import BASE_STYLES, STYLES, Scene, held_out
from miniature.settings import RunConfig
from miniature.train_autoencoder import AutoencoderConfig
from miniature.train_autoencoder import train as train_autoencoder
from miniature.train_controlnet import ControlNetConfig
from miniature.train_controlnet import train as train_controlnet
from miniature.train_motion import MotionConfig
from miniature.train_text_to_image import TextToImageConfig
from miniature.train_text_to_image import train as train_text_to_image

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train_autoencoder", "train_text_to_image", "train_controlnet", "train_motion", "evaluate")
COMMON = {
    "batch_size": 4,
    "max_train_steps": 4,
    "warmup_steps": 1,
    "logging_steps": 1,
    "validation_steps": 4,
    "checkpointing_steps": 2,
    "picture_size": 64,
    "pictures": 24,
}


def autoencoder_config(folder: Path, **given) -> AutoencoderConfig:
    small = {"block_out_channels": (8, 8, 16, 16), "latent_channels": 4, "norm_num_groups": 4, "crop": 32}
    named = {"output_dir": str(folder), "ckpt_name": "autoencoder"}
    return AutoencoderConfig(**(COMMON | small | named | given))


def text_config(folder: Path, vae: Path, **given) -> TextToImageConfig:
    small = {
        "block_out_channels": (16, 32, 32),
        "text_width": 32,
        "text_layers": 1,
        "sample_inference_steps": 2,
    }
    named = {"output_dir": str(folder), "ckpt_name": "text_to_image", "vae": str(vae)}
    return TextToImageConfig(**(COMMON | small | named | given))


@pytest.fixture(scope="module")
def recipe(once) -> tuple[Path, Path, Path, Path]:
    """The whole recipe: its folder, and what its three stages wrote."""

    def make(folder: Path) -> None:
        vae = train_autoencoder(autoencoder_config(folder), "…")
        base = train_text_to_image(text_config(folder, vae), "…")
        cfg = ControlNetConfig(**COMMON, output_dir=str(folder), ckpt_name="controlnet", base=str(base))
        paths = vae, base, train_controlnet(cfg, "…")
        (folder / "paths.json").write_text(json.dumps([str(path) for path in paths]))

    folder = once("recipe", make)
    vae, base, controlnet = map(Path, json.loads((folder / "paths.json").read_text()))
    return folder, vae, base, controlnet


def weights(checkpoint: Path) -> dict[str, str]:
    files = verify_checkpoint(checkpoint)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def test_the_recipe_makes_a_base_that_diffusers_and_this_toolkit_load(recipe):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

    from lorakit.diffusion.models import Base
    from lorakit.weights.base import inspect_base

    _, _, folder, controlnet = recipe
    info = inspect_base(folder)
    assert (info.resolution, info.vae_factor, info.latent_channels, info.max_tokens) == (64, 8, 4, 32)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    (folder / "probe").touch()  # with the umask's permissions
    allowed = (folder / "probe").stat().st_mode
    (folder / "probe").unlink()
    assert all(path.stat().st_mode == allowed for path in [*files, *controlnet.iterdir()])
    configs = [path for path in [*files, *controlnet.iterdir()] if path.suffix == ".json"]
    assert not any(str(folder.parent) in path.read_text(encoding="utf-8") for path in configs)
    base = Base(info)
    latents = base.encode(torch.zeros(1, 3, 64, 64)).chunk(2, dim=1)[0]
    assert base.decode(latents * base.scaling_factor).shape == (1, 3, 64, 64)
    prompt = Scene(seed=0).caption("a photo")
    options = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images
    assert picture.shape == (1, 64, 64, 3) and np.isfinite(picture).all()
    steered = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=ControlNetModel.from_pretrained(controlnet, dtype=torch.float32)
    )
    steered.set_progress_bar_config(disable=True)
    hint = torch.rand(1, 3, 64, 64)
    controlled = steered(prompt, image=hint, generator=torch.Generator().manual_seed(0), **options).images
    assert controlled.shape == picture.shape and np.abs(controlled - picture).max() > 0


@pytest.mark.slow
def test_every_stage_encodes_with_the_values_that_are_shipped(recipe):
    _, vae, base, _ = recipe
    first = diffusion.load_vae(vae, torch.device("cpu")).state_dict()
    last = diffusion.load_vae(base / "vae", torch.device("cpu")).state_dict()
    assert all(torch.equal(first[name], last[name]) for name in first)
    scale = diffusion.load_vae(vae, torch.device("cpu")).config.scaling_factor
    assert scale == diffusion.load_vae(base / "vae", torch.device("cpu")).config.scaling_factor > 0


@pytest.mark.parametrize("stage, every", [("autoencoder", 1), ("text_to_image", 1), ("controlnet", 4)])
def test_a_stopped_and_resumed_run_equals_a_straight_one(recipe, tmp_path, monkeypatch, stage, every):
    """A signal comes during step 2 of 4; the checkpoint of step 4 then has the same bytes."""
    folder, vae, base, _ = recipe
    again = {"resume_from_checkpoint": "latest", "ckpt_name": f"{stage}-again", "logging_steps": every}
    train, cfg = {
        "autoencoder": (train_autoencoder, autoencoder_config(folder, **again)),
        "text_to_image": (train_text_to_image, text_config(folder, vae, **again)),
        "controlnet": (
            train_controlnet,
            ControlNetConfig(**(COMMON | again), output_dir=str(folder), base=str(base)),
        ),
    }[stage]
    take_step = runs.take_step

    def interrupted(config, optimizer, loss, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(config, optimizer, loss, step)

    monkeypatch.setattr(runs, "take_step", interrupted)
    with pytest.raises(StoppedError) as stopped:
        train(cfg, "the command")
    assert stopped.value.exit_code == 143 and "step 2 of 4" in str(stopped.value)
    monkeypatch.setattr(runs, "take_step", take_step)
    train(cfg, "the command")
    straight, resumed = folder / stage, folder / f"{stage}-again"
    final = "checkpoint-00000004"
    assert weights(straight / final) == weights(resumed / final)
    losses = {}
    for run in (straight, resumed):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses[run] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses[resumed]) == list(range(every, 5, every))
    since = 1 if every == 1 else 2  # the mean of the line at step 4 is of steps 3 and 4
    assert losses[resumed][4] == pytest.approx(sum(losses[straight][4 - k] for k in range(since)) / since)


def test_another_config_does_not_resume_the_run(recipe):
    folder, _, _, _ = recipe
    cfg = autoencoder_config(folder, resume_from_checkpoint="latest", kl_weight=1.0)
    with pytest.raises(UserError, match="kl_weight: 0.0001 -> 1.0"):
        train_autoencoder(cfg, "…")
    with pytest.raises(UserError, match="already holds a run"):
        train_autoencoder(autoencoder_config(folder), "…")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_faults_answer_without_torch(program, script):
    done = program(f"miniature/{script}.py", ["--help"])
    assert done.code == 0 and "output_dir" in done.out and not done.torch
    done = program(f"miniature/{script}.py", ["sede=1"])
    assert done.code == 2 and "unknown key" in done.err and not done.torch


def test_every_shipped_config_is_valid():
    from lorakit.ground.config import load_config

    classes = {
        "autoencoder": AutoencoderConfig,
        "text_to_image": TextToImageConfig,
        "controlnet": ControlNetConfig,
        "motion": MotionConfig,
    }
    found = sorted((ROOT / "miniature/cfg").glob("*.json"))
    assert {path.stem for path in found} == set(classes)
    for path in found:
        assert load_config(classes[path.stem], path).config.ckpt_name == path.stem


# ---- the parts ----


def test_the_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    cfg = RunConfig(learning_rate=1.0, warmup_steps=10, max_train_steps=110)
    rates = [runs.learning_rate(cfg, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[60] == pytest.approx(0.505, abs=0.01) and 0.01 <= rates[-1] < 0.011


def test_the_average_follows_the_weights_and_gives_them_back():
    layer = torch.nn.Linear(2, 1)
    average = runs.Average({"layer": layer}, 8)
    torch.nn.init.zeros_(layer.weight)
    average.update(0)
    assert torch.equal(average.weights["layer.weight"], torch.zeros(1, 2)), "the random start is forgotten"
    torch.nn.init.ones_(layer.weight)
    with average.applied():
        assert torch.equal(layer.weight.detach(), torch.zeros(1, 2)) and not layer.training
    assert torch.equal(layer.weight.detach(), torch.ones(1, 2)) and layer.training


@pytest.mark.parametrize("power", [0, 2, 8])
@pytest.mark.parametrize("steps", [200, 2000])
def test_the_average_lies_the_same_share_of_any_run_behind(power, steps):
    layer = torch.nn.Linear(1, 1)
    average = runs.Average({"layer": layer}, power)
    for step in range(steps):
        torch.nn.init.constant_(layer.weight, step + 1)
        average.update(step)
    behind = 1 - float(average.weights["layer.weight"]) / steps
    assert behind == pytest.approx(1 / (power + 2), abs=2 / steps)


def test_tables_leave_out_what_is_held_out_and_render_what_they_say(tmp_path):
    table = pictures.base_table(0, 300, 32)
    rows = [table.row(index) for index in range(300)]
    assert not any(held_out(style, scene) for scene, style in rows)
    assert {style for _, style in rows} == set(BASE_STYLES)
    everything = pictures.Table(0, 300, BASE_STYLES, 32, everything=True)
    assert any(held_out(style, scene) for scene, style in map(everything.row, range(300)))
    assert everything.folder(tmp_path) != table.folder(tmp_path)
    small = pictures.base_table(0, 5, 32)
    parts = pictures.rendered(small, tmp_path)
    scene, style = small.row(4)
    np.testing.assert_array_equal(pictures.picture(parts, 4), np.asarray(pictures.render(scene, style, 32)))
    for combination in (False, True):
        scene = pictures.judging_scene(3, "a photo", combination)
        assert held_out("a photo", scene) == combination


def test_several_processes_render_what_one_does(tmp_path):
    table = pictures.base_table(0, pictures.PART + 8, 32)
    several, one = (pictures.rendered(table, tmp_path / str(workers), workers) for workers in (None, 1))
    assert [len(part) for part in several] == [pictures.PART, 8]
    for ours, theirs in zip(several, one, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_mountain_pair_is_not_among_the_photographs():
    names = {path.name for path in photographs.FOLDER.glob("*.jpg")}
    assert len(names) >= 3 and all(
        name in (photographs.FOLDER / "ATTRIBUTION.md").read_text() for name in names
    )
    from PIL import Image

    held = [
        np.asarray(Image.open(ROOT / name).convert("L").resize((16, 16)))
        for name in autoencoder.HELD_OUT_PHOTOGRAPHS
    ]
    for path in photographs.FOLDER.glob("*.jpg"):
        own = np.asarray(Image.open(path).convert("L").resize((16, 16)))
        assert all(np.corrcoef(own.ravel(), other.ravel())[0, 1] < 0.9 for other in held), path


def test_a_share_of_the_hints_are_of_photographs():
    """The pictures and the hints are of the same crops, and a function of the step alone."""
    crops, hints = Photographs(64, 0.25, seed=3).batch(7, 8)
    assert crops.shape == hints.shape == (2, 3, 64, 64) and crops.min() >= -1 and crops.max() <= 1
    again = Photographs(64, 0.25, seed=3).batch(7, 8)
    assert torch.equal(crops, again[0]) and torch.equal(hints, again[1])
    other, other_hints = Photographs(64, 0.25, seed=3).batch(8, 8)
    assert not torch.equal(crops, other) and not torch.equal(hints, other_hints)
    edges = [canny((crop.permute(1, 2, 0).numpy() + 1) / 2) for crop in crops]
    own, swapped = (
        [edge_f1(a, b[0].numpy() > 0.5) for a, b in zip(edges, h, strict=True)]
        for h in (hints, hints.flip(0))
    )
    assert min(own) > max(swapped)


def test_the_pair_is_judged_whole_and_in_quarters():
    from miniature.gates import photograph_views, photographs

    views, captions = photograph_views(32)
    (whole, own), (large, _) = photographs(32), photographs(64)
    assert views.shape == (10, 3, 32, 32) and captions == own * 5 and torch.equal(views[:2], whole)
    assert torch.equal(views[2], large[0, :, :32, :32]) and torch.equal(views[9], large[1, :, 32:, 32:])


def test_crops_of_photographs_and_dead_leaves_are_pictures():
    rng = np.random.default_rng(0)
    levels = photographs.pyramids(64)
    crops = [photographs.photograph_crop(rng, levels, 64) for _ in range(40)]
    assert all(crop.shape == (64, 64, 3) and 0 <= crop.min() and crop.max() <= 1 for crop in crops)
    assert np.mean([crop.std() for crop in crops]) > 0.08
    leaves = photographs.dead_leaves(rng, 96)
    assert leaves.shape == (96, 96, 3) and leaves.std() > 0.08


def test_the_tokenizer_knows_the_words_of_captions_and_the_letters_of_others(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = text.train_tokenizer(320, 32)
    captions = list(text.all_captions())
    assert len(captions) == len(STYLES) * 4**3 * 3 == len(set(captions))
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= 32
    words = set(" ".join(captions).replace(",", " ,").split())
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert "<|endoftext|>" not in tokenizer.tokenize("a quick brown fox, jumps over 13 lazy dogs.")
    assert tokenizer.get_vocab() == text.train_tokenizer(320, 32).get_vocab()
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 32
    assert torch.equal(text.tokenize(again, captions[:50]), text.tokenize(tokenizer, captions[:50]))
    ids = text.tokenize(tokenizer, ["", captions[0]])
    assert ids.shape == (2, 32) and int(ids.max()) == len(tokenizer) - 1


def test_frechet_distance_is_zero_for_equal_sets_and_grows_with_the_difference():
    torch.manual_seed(0)
    model = classifier.Classifier().eval()
    images = torch.rand(300, 3, 32, 32) * 2 - 1
    other = torch.rand(300, 3, 32, 32) * 2 - 1
    same = classifier.frechet_distance(model, images, images)
    near, far = (classifier.frechet_distance(model, images, x) for x in (other, other * 0.3))
    assert abs(same) < 1e-3 and same < near < far


def test_psnr_is_that_of_rounded_pictures():
    a = torch.zeros(2, 3, 8, 8)
    b = a.clone()
    b[1] += 10 / 127.5
    values = autoencoder.psnr(a, b)
    assert float(values[1]) == pytest.approx(20 * np.log10(255 / 10), abs=0.05) and float(values[0]) > 75


def test_guidance_of_one_needs_no_negative_prompt():
    calls = []

    class Unet:
        def __call__(self, x, t, encoder_hidden_states):
            calls.append(len(x))
            return type("Output", (), {"sample": 0.1 * x + encoder_hidden_states.mean()})

    noise, embeds = torch.randn(3, 4, 8, 8), torch.zeros(3, 2, 5)
    plain = diffusion.sample_latents(Unet(), embeds, embeds, noise, 4, 1.0)
    guided = diffusion.sample_latents(Unet(), embeds, embeds, noise, 4, 5.0)
    assert calls == [3] * 4 + [6] * 4
    torch.testing.assert_close(plain, guided, rtol=1e-4, atol=1e-4)  # both prompts are the same


def test_the_gates_are_read_off_the_figures():
    from miniature.evaluate import verdicts

    heads = dict.fromkeys(("style", "time", "mountain", "foreground"), 0.99)
    figures = {
        "autoencoder": {style: 32.0 for style in STYLES} | {"photographs": 25.0, "photograph crops": 27.0},
        "text": {
            "classifier": heads,
            "known": heads,
            "held_out": heads | {"time": 0.5},
            "without_prompt": dict.fromkeys(heads, 0.3),
            "chance": dict.fromkeys(heads, 0.25),
            "frechet": 5.0,
            "frechet_renders": 2.0,
        },
        "control": {"f1_at_1": 0.7, "f1_at_0": 0.5, "f1_photographs_at_1": 0.56, "prompts_at_1": heads},
    }
    failed = {what for _, what, value, limit, least in verdicts(figures) if (value < limit) == least}
    assert failed == {
        "autoencoder, photographs, dB",
        "held-out combinations, time",
        "edge F1, scale 1 less scale 0",
    }
    assert verdicts({}) == []
