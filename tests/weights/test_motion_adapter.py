"""Motion adapters as their files describe them, and LoRAs for them under every name."""

import json
import re

import narrow
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import tiny_unet

from lorakit.ground.errors import UserError
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_fit import fit_of
from lorakit.weights.lora_keys import layer_names, parse_key
from lorakit.weights.motion_adapter import inspect_motion_adapter
from lorakit.weights.part_files import BaseError


@pytest.fixture(scope="module")
def adapters(once):
    folder = once("adapters", lambda folder: narrow.write_motion_adapter(folder, tiny_unet()))
    return {"folder": folder / "folder", "original": folder / "original.safetensors"}


@pytest.fixture
def info(tiny_base):
    return inspect_base(str(tiny_base))


def test_a_folder_and_animatediff_s_own_names_say_the_same(adapters, info):
    folder, file = (inspect_motion_adapter(str(path), info) for path in adapters.values())
    assert folder.shapes == file.shapes and len(file.shapes) > 50
    told = {key: value for key, value in folder.config.items() if key in file.config}
    assert json.loads(json.dumps(told)) == file.config
    assert file.positions == 8 and not file.config["use_motion_mid_block"]
    raw = load_file(adapters["original"])
    assert not any(".attn1." in key for key in raw) and any("pos_encoder" in key for key in raw)


def test_a_middle_block_is_seen(tmp_path, info):
    paths = narrow.write_motion_adapter(
        tmp_path, tiny_unet(), use_motion_mid_block=True, motion_max_seq_length=24
    )
    found = inspect_motion_adapter(str(paths["original"]), info)
    assert found.config["use_motion_mid_block"] and found.positions == 24


def test_what_is_none_is_refused_by_its_name(tmp_path, info, adapters):
    (tmp_path / "mm.ckpt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    lora = {"down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 8)}
    save_file(lora, tmp_path / "lora.safetensors")
    pia = load_file(adapters["original"]) | {"conv_in.weight": torch.zeros(8, 9, 3, 3)}
    save_file(pia, tmp_path / "pia.safetensors")
    wanted = {
        "mm.ckpt": "pickled",
        "empty": "without diffusion_pytorch_model.safetensors",
        "other.safetensors": "holds no motion modules",
        "lora.safetensors": "name it in loras",
        "pia.safetensors": "of another kind, with conv_in.weight",
        "nowhere": "no such folder",
    }
    for name, words in wanted.items():
        with pytest.raises(BaseError, match=f"{re.escape(name)}: .*{words}.*motion_adapter=null"):
            inspect_motion_adapter(str(tmp_path / name), info)


def test_one_of_another_base_is_refused(tmp_path, info):
    wide = narrow.write_motion_adapter(tmp_path / "a", tiny_unet(block_out_channels=(16, 32)))
    deep = narrow.write_motion_adapter(tmp_path / "b", tiny_unet(layers_per_block=2))
    for path, key in ((wide, "block_out_channels"), (deep, "layers_per_block")):
        with pytest.raises(BaseError, match=f"made for another base: {key}"):
            inspect_motion_adapter(str(path["original"]), info)


NAMES = {
    "diffusers": "unet.down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_out.0.lora_B.weight",
    "bare": "down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_out.0.lora_B.weight",
    "AnimateDiff": "down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0."
    "attention_blocks.1.processor.to_out_lora.up.weight",
    "kohya": "lora_unet_down_blocks_0_motion_modules_1_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
}


@pytest.mark.parametrize("layout", NAMES)
def test_a_layer_of_a_motion_lora_is_the_same_under_every_name(layout):
    key = parse_key(NAMES[layout])
    assert key is not None and key.slot == "up"
    assert key.name == "lora_unet_down_blocks_0_motion_modules_1_transformer_blocks_0_attn2_to_out_0"
    assert layer_names([NAMES[layout]]) == [
        "down_blocks.0.motion_modules.1.transformer_blocks.0.attn2.to_out.0"
    ]


def test_a_motion_lora_fits_beside_its_adapter_and_else_its_place_is_told(tmp_path, info, adapters):
    adapter = inspect_motion_adapter(str(adapters["folder"]), info)
    stem = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_"
    path = tmp_path / "pan.safetensors"
    save_file({f"{stem}A.weight": torch.ones(2, 8), f"{stem}B.weight": torch.ones(8, 2)}, path)
    assert fit_of(str(path), info, adapter.shapes).endswith("fits")
    with pytest.raises(UserError, match="give it to animate.py, with its motion_adapter"):
        fit_of(str(path), info)
    save_file({f"{stem}A.weight": torch.ones(2, 9), f"{stem}B.weight": torch.ones(8, 2)}, path)
    with pytest.raises(UserError, match="does not fit"):
        fit_of(str(path), info, adapter.shapes)


def test_a_missing_adapter_is_said_before_the_base_is_here():
    base = inspect_base("nobody/nothing")
    assert not base.known
    with pytest.raises(BaseError, match="nowhere: .*no such folder or file"):
        inspect_motion_adapter("nowhere", base)
