"""A ControlNet is the same to the bit as a folder, under A1111's names and under diffusers' in one file."""

import json
import shutil

import narrow
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.diffusion.models import Base
from lorakit.sampling.restyling import load_controlnet
from lorakit.weights.base import BaseError, inspect_base
from lorakit.weights.controlnet import inspect_controlnet

pytestmark = pytest.mark.slow  # its fixtures are


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def base(request, tmp_path_factory) -> Base:
    return Base(
        inspect_base(str(narrow.write_base(tmp_path_factory.mktemp("base"), "modern", request.param)))
    )


@pytest.fixture(scope="module")
def layouts(base, tmp_path_factory):
    return narrow.write_controlnet(tmp_path_factory.mktemp("controlnet"), base.unet)


@torch.no_grad()
def residuals(controlnet) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, states, hint = (
        torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 16), (1, 3, 64, 64))
    )
    down, mid = controlnet(latents, torch.tensor([500]), states, hint, return_dict=False)
    return [*down, mid]


def test_every_layout_gives_the_same_bits(base, layouts):
    from diffusers import ControlNetModel

    wanted = residuals(load_controlnet(str(layouts["folder"]), base))
    theirs = residuals(ControlNetModel.from_pretrained(layouts["folder"]).eval())
    for found, due in zip(wanted, theirs, strict=True):
        torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-5)
    for name in ("half", "diffusers", "bare", "a1111"):
        found = residuals(load_controlnet(str(layouts[name]), base))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)), name
    assert len(wanted) == 13 and all(each.any() for each in wanted)


def test_diffusers_reads_the_same_out_of_the_file(base, layouts):
    from diffusers import ControlNetModel

    theirs = ControlNetModel.from_single_file(
        str(layouts["a1111"]), config=str(layouts["folder"]), local_files_only=True
    ).state_dict()
    ours = load_controlnet(str(layouts["a1111"]), base).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_one_in_the_hubs_cache_is_used_though_only_its_half_precision_is_there(
    base, layouts, tmp_path, monkeypatch
):
    import huggingface_hub

    narrow.write_cache(tmp_path, layouts["half"], "some/controlnet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert inspect_controlnet("some/controlnet", base.info).known
    assert residuals(load_controlnet("some/controlnet", base))[0].any()
    with pytest.raises(BaseError) as caught:
        load_controlnet("some/other", base)
    text = str(caught.value)
    assert "offline mode" in text and "not in the hub's cache" in text and "controlnet=null" in text
    assert not inspect_controlnet("some/other", base.info).known


def refused(name, base) -> str:
    with pytest.raises(BaseError) as caught:
        inspect_controlnet(str(name), base.info)
    assert str(caught.value).startswith(f"{name}: ")
    return str(caught.value)


def test_what_is_no_controlnet_or_another_bases_is_refused_by_its_header(base, layouts, tmp_path):
    checkpoint = narrow.write_base(tmp_path, "file")
    assert "is a whole base" in refused(checkpoint, base)
    assert "is a UNet2DConditionModel" in refused(base.info.root / "unet", base)
    assert "no such folder or file" in refused("ckpt/nothing", base)
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "is a LoRA" in refused(tmp_path / "lora.safetensors", base)
    other = narrow.write_controlnet(tmp_path / "other", narrow.parts(cross_attention_dim=24)["unet"])
    for name in ("folder", "a1111"):
        assert "made for another base: cross_attention_dim is 24, here 16" in refused(other[name], base)
    tensors = load_file(layouts["bare"])
    coarse = {key: value for key, value in tensors.items() if not key.startswith(("input_hint_block.1", "x"))}
    save_file(coarse, tmp_path / "coarse.safetensors")
    assert "does not reduce hints by 8" in refused(tmp_path / "coarse.safetensors", base)
    old = shutil.copytree(layouts["folder"], tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config[
        "conditioning_embedding_out_channels"
    ]  # its default is that of ControlNetModel, which fits by number
    (old / "config.json").write_text(json.dumps(config))
    assert inspect_controlnet(str(old), base.info).known
    with pytest.raises(BaseError, match="as a ControlNet it cannot be loaded"):
        load_controlnet(str(old), base)
