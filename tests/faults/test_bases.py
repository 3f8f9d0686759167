"""Bases that are not what they are given as, B3 to B8 and B10: refused by their headers, before torch.

What is read of bases as they are published, and to which bits, is in tests/weights and tests/diffusion.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import narrow
import pytest
from harness import ROOT, assert_refused, snapshot

MINIATURE = ROOT / "ckpt/miniature"
SDXL = {"conditioner.embedders.0.transformer.weight": [1], "model.diffusion_model.out.2.weight": [1]}


def miniature(folder: Path, change: Callable[[Path], object]) -> Path:
    base = Path(shutil.copytree(MINIATURE, folder / "base"))
    change(base)
    return base


def only_pickles(base: Path) -> None:
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def cut_cache(folder: Path) -> str:
    """A cache whose text encoder was not fetched; the hub is not asked, since tests are offline."""
    snapshot = folder / "hub/models--some--base/snapshots/abc"
    shutil.copytree(MINIATURE, snapshot)
    shutil.rmtree(snapshot / "text_encoder")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    return "some/base"


HEADERS = {
    "B3 inpainting": (
        lambda folder: narrow.write_base(folder, "modern", in_channels=9),
        ["an inpainting model", "reads 9 channels"],
    ),
    "B4 SDXL": (
        lambda folder: narrow.write_header(folder / "xl.safetensors", SDXL),
        ["an SDXL checkpoint"],
    ),
    "B4 a LoRA": (
        lambda folder: narrow.write_header(folder / "x.safetensors", {"lora_unet_x.lora_up.weight": [1]}),
        ["is a LoRA", "beside its base"],
    ),
    "B4 a VAE": (
        lambda folder: narrow.write_header(
            folder / "vae.safetensors", {"encoder.conv_in.weight": [1], "decoder.conv_in.weight": [1]}
        ),
        ["autoencoder (VAE) alone"],
    ),
    "B4 a part of a base": (
        lambda folder: miniature(folder, lambda base: None) / "unet",
        ["UNet2DConditionModel alone"],
    ),
    "B5 pickles": (lambda folder: miniature(folder, only_pickles), ["pickle"]),
    "B6 a repository that is gone": (
        lambda folder: "runwayml/stable-diffusion-v1-5",
        ["no longer exists", "use "],
    ),
    "B6 a path that is none": (lambda folder: "ckpt/nothing", ["no such folder or file"]),
}


@pytest.mark.parametrize("script", ["train_lora", "generate"])
@pytest.mark.parametrize("case", HEADERS)
def test_refused_from_the_header(command, train, sampling, tmp_path, case, script):
    make, words = HEADERS[case]
    base = make(tmp_path)
    arguments = {"train_lora": train, "generate": sampling}[script](pretrained_model_name_or_path=str(base))
    before = snapshot(tmp_path)
    result = command(script, arguments)
    assert_refused(result, 2, str(base), *words)
    assert not result.torch and result.blinks < 20 and snapshot(tmp_path) == before


HUB = {
    "B6 a folder misspelt": (lambda folder: "models/sd15", ["no such folder here", "offline mode"]),
    "B7 a cache that was cut": (cut_cache, ["the cache lacks text_encoder/", "HF_HUB_OFFLINE"]),
}


@pytest.mark.parametrize("script", ["train_lora", "generate"])
@pytest.mark.parametrize("case", HUB)
def test_what_the_hub_would_have_is_said_where_it_cannot_be_asked(
    here, train, sampling, tmp_path, monkeypatch, case, script
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    make, words = HUB[case]
    name = make(tmp_path)
    arguments = {"train_lora": train, "generate": sampling}[script](pretrained_model_name_or_path=name)
    result = here(script, arguments)
    assert_refused(result, 2, name, *words)


def test_b8_a_base_that_changed_is_refused_at_resume(here, train, tmp_path):
    base = miniature(tmp_path, lambda base: None)
    arguments = train(pretrained_model_name_or_path=str(base), resume_from_checkpoint=True, max_train_steps=1)
    assert here("train_lora", arguments).code == 0
    path = base / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    assert_refused(
        here("train_lora", [*arguments, "max_train_steps=2"]), 2, "was trained otherwise", "base, scheduler"
    )


def no_controlnet(folder: Path) -> Path:
    return narrow.write_header(folder / "x.safetensors", {"lora_unet_x.lora_up.weight": [1]})


def another_width(folder: Path) -> Path:
    control = Path(shutil.copytree(MINIATURE / "controlnet", folder / "control"))
    path = control / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 768}))
    return control


CONTROLS = {
    "B10 a LoRA": (no_controlnet, ["is a LoRA", "controlnet=null"]),
    "B10 nothing": (lambda folder: folder / "nothing", ["no such folder or file", "controlnet=null"]),
    "B10 another base's": (another_width, ["is made for another base", "cross_attention_dim"]),
}


@pytest.mark.parametrize("flags", [[], ["--check"]])
@pytest.mark.parametrize("case", CONTROLS)
def test_a_controlnet_that_does_not_fit(command, restyling, tmp_path, case, flags):
    make, words = CONTROLS[case]
    control = make(tmp_path)
    result = command("style_transfer", [*restyling(controlnet=str(control)), *flags])
    assert_refused(result, 2, str(control), *words)
    assert not result.torch and result.blinks < 20 and not (tmp_path / "out").exists()
