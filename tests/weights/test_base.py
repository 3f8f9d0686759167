"""What is said of a base before it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorakit.weights.base import BaseError, inspect_base, weights_hash
from lorakit.weights.part_files import weight_shapes

MINIATURE = Path(__file__).resolve().parents[2] / "ckpt" / "miniature"


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(MINIATURE, tmp_path / "base"))


def refused(name) -> str:
    with pytest.raises(BaseError) as caught:
        inspect_base(str(name))
    return str(caught.value)


def test_sizes_come_from_the_configs():
    info = inspect_base(str(MINIATURE))
    assert (info.kind, info.known) == ("folder", True)
    assert (info.vae_factor, info.size_multiple, info.resolution, info.max_tokens) == (8, 32, 128, 32)
    assert info.cross_attention_dim == 128 and info.prediction_type == "epsilon"


def test_parameters_are_counted_without_loading():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet")
    assert inspect_base(str(MINIATURE)).parameters["unet"] == unet.num_parameters()


def test_a_hub_id_that_is_not_here_is_taken_as_sd15_until_it_is_fetched():
    info = inspect_base("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert (info.kind, info.known, info.resolution) == ("hub", False, 512)


def test_a_hub_id_that_is_gone_names_its_successor():
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in refused("runwayml/stable-diffusion-v1-5")


@pytest.mark.parametrize("name", ["ckpt/none", "/nowhere/base", "none", "a/b/c", "base.safetensors"])
def test_a_missing_path_is_said(name):
    assert name in refused(name) and "no such folder or file" in refused(name)


def test_a_folder_that_is_not_a_base_is_said(tmp_path):
    assert "without unet, vae" in refused(tmp_path)


def test_a_missing_part_is_named(copy):
    shutil.rmtree(copy / "vae")
    assert refused(copy).endswith("without vae/")


def test_missing_weights_are_named(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet: no weights (diffusion_pytorch_model.safetensors)" in refused(copy)


def test_pickled_weights_are_refused(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    assert "only pickled weights" in refused(copy)


def test_a_pickled_single_file_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    assert "pickled" in refused(tmp_path / "model.ckpt")


def test_a_git_lfs_pointer_is_said(copy):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "git lfs pull" in refused(copy)


def test_cut_weights_are_said(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    assert str(path) in refused(copy)


@pytest.fixture
def sharded(copy):
    """The miniature with its U-Net in two files, as diffusers shards large ones."""
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    shards = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, path.with_name(shard))
    path.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return copy


def test_shards_are_counted_like_one_file(sharded):
    info, whole = inspect_base(str(sharded)), inspect_base(str(MINIATURE))
    assert info.parameters == whole.parameters
    assert weight_shapes(info.files["unet"]) == weight_shapes(whole.files["unet"])


def test_a_missing_shard_is_named(sharded):
    (sharded / "unet" / "part-1.safetensors").unlink()
    assert str(sharded / "unet" / "part-1.safetensors") in refused(sharded)


@pytest.mark.parametrize("content", ["{", ""])
def test_a_broken_config_is_named(copy, content):
    (copy / "vae" / "config.json").write_text(content)
    assert str(copy / "vae" / "config.json") in refused(copy)


def test_a_half_precision_variant_alone_is_enough(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert inspect_base(str(copy)).known


def test_v_prediction_is_read_from_the_scheduler(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert inspect_base(str(copy)).prediction_type == "v_prediction"


def test_the_hash_follows_the_content(copy):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights_hash(path)
    assert before == weights_hash(MINIATURE / "vae" / path.name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights_hash(path) != before
