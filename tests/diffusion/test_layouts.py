"""A base is the same to the bit in every layout that it is published in."""

import platform
import subprocess
import sys

import narrow
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import tiny_base

from lorakit.diffusion.models import Base
from lorakit.weights.base import BaseError, inspect_base

pytestmark = pytest.mark.slow  # its fixtures are


def open_layout(root, layout: str, dtype: torch.dtype = torch.float32) -> Base:
    file = root / f"{layout}.safetensors"
    name, config = (file, str(root / "modern")) if file.exists() else (root / layout, None)
    return Base(inspect_base(str(name), config), dtype=dtype)


@torch.no_grad()
def outputs(base: Base) -> dict[str, torch.Tensor]:
    """What each part makes of the same input."""
    generator = torch.Generator().manual_seed(0)
    latents, image = (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.rand(1, 3, 64, 64, generator=generator),
    )
    ids = base.tokenize(["a photo of a cat, wow!"])
    states = base.text_encoder(ids)[0]
    noise = base.unet(latents.to(base.dtype), torch.tensor([500]), states).sample
    return {
        "ids": ids,
        "states": states,
        "noise": noise,
        "moments": base.encode(2 * image - 1),
        "picture": base.decode(latents),
        "schedule": base.noise_schedule().alpha_bar,
        "target": torch.tensor([len(base.prediction_type)]),
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, bool]:
    return {name: torch.equal(first[name], second[name]) for name in first}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def root(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    for layout in (*narrow.FULL, *narrow.HALF):
        narrow.write_base(root, layout, request.param)
    return root


def test_every_layout_of_one_precision_gives_the_same_bits(root):
    full, half = (outputs(open_layout(root, own[0])) for own in (narrow.FULL, narrow.HALF))
    for layout in narrow.FULL[1:]:
        assert all(equal(outputs(open_layout(root, layout)), full).values()), layout
    for layout in narrow.HALF[1:]:
        assert all(equal(outputs(open_layout(root, layout)), half).values()), layout
    assert {name for name, same in equal(full, half).items() if not same} == {
        *("states", "noise", "moments", "picture")
    }


def test_a_changed_weight_is_seen(root, tmp_path):
    tensors = load_file(root / "file.safetensors")
    tensors["first_stage_model.post_quant_conv.bias"] += 1e-3
    save_file(tensors, tmp_path / "file.safetensors")
    base = Base(inspect_base(str(tmp_path / "file.safetensors"), str(root / "modern")))
    same = equal(outputs(base), outputs(open_layout(root, "modern")))
    assert [name for name in same if not same[name]] == ["picture"]


@pytest.mark.parametrize("layout", ["modern", "file", "file-half-ema"])
def test_parts_come_in_the_dtype_wanted_and_the_vae_in_float32(root, layout):
    base = open_layout(root, layout, torch.bfloat16)
    assert {p.dtype for part in (base.unet, base.text_encoder) for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.unet.parameters()) and not base.unet.training


def test_diffusers_loads_the_folder_to_the_same_bits(root):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(root / "modern")
    base = open_layout(root, "old")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(base, part).state_dict(), getattr(pipe, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert base.scaling_factor == pipe.vae.config.scaling_factor == 0.18215


def test_weights_that_are_missing_are_named_when_the_part_is_loaded(root, tmp_path):
    tensors = load_file(root / "file.safetensors")
    del tensors["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]
    save_file(tensors, tmp_path / "file.safetensors")
    base = Base(inspect_base(str(tmp_path / "file.safetensors"), str(root / "modern")))
    with pytest.raises(
        BaseError, match="its unet lacks 1 weights, such as down_blocks.0.resnets.0.conv1.weight"
    ):
        _ = base.unet


HEAP = """
import sys, torch
from lorakit.diffusion.models import Base
from lorakit.weights import base
base.LARGE = 0 if sys.argv[2] == "large" else base.LARGE
Base(base.inspect_base(sys.argv[1]))
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
before = anonymous()
torch.ones(1 << 22)  # 16 MB that are freed at once teach glibc to keep the next of that size
blocks = [torch.ones(1 << 20) for _ in range(16)]
pin = torch.ones(1 << 18)  # above them on the heap
del blocks
print(anonymous() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc keeps what is freed")
def test_a_large_base_gives_freed_blocks_back_to_the_system(tmp_path):
    """64 MB are freed under something small that stays: the heap of a small base keeps them."""
    tiny_base(tmp_path / "base")
    command = [sys.executable, "-c", HEAP, str(tmp_path / "base")]
    kept = {
        size: int(subprocess.run([*command, size], capture_output=True, check=True, text=True).stdout)
        for size in ("small", "large")
    }
    assert kept["large"] < 10e6 < kept["small"]
