"""Whether a LoRA fits a base, as its header tells it without torch."""

import json

import pytest
from diffusers import UNet2DConditionModel

from lorakit.ground.errors import UserError
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import lora_bytes
from lorakit.weights.lora_fit import fit_of
from lorakit.weights.part_files import BaseError
from lorakit.weights.vocabulary import FILE, Vocabulary, read_vocabulary


def write(path, modules, layout="kohya"):
    path.write_bytes(lora_bytes(modules, layout=layout, metadata={}))
    return str(path)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_one_that_fits_is_described(tiny_base, random_lora, tmp_path, layout, targets):
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    modules = random_lora(unet, 1, targets=targets).modules
    info = inspect_base(str(tiny_base))
    said = fit_of(write(tmp_path / "a.safetensors", modules, layout), info)
    numbers = sum(tensor.numel() for pair in modules.values() for tensor in pair.tensors().values())
    assert said == f"rank 4, {len(modules)} modules, {numbers:,} parameters, fits"


def test_one_for_another_base_is_refused_by_what_does_not_fit(tiny_base, tiny_unet, random_lora, tmp_path):
    info = inspect_base(str(tiny_base))
    wide = write(tmp_path / "wide.safetensors", random_lora(tiny_unet(cross_attention_dim=24), 1).modules)
    with pytest.raises(UserError, match=r"attn2_to_k does not fit .*: it changes 8x24 numbers"):
        fit_of(wide, info)
    deep = tiny_unet(layers_per_block=2)
    with pytest.raises(UserError, match=r"modules have no place in the unet of"):
        fit_of(write(tmp_path / "deep.safetensors", random_lora(deep, 1).modules), info)


def test_a_vocabulary_is_read_or_refused(tiny_base, tmp_path):
    import shutil

    base = shutil.copytree(tiny_base, tmp_path / "base")
    assert read_vocabulary(inspect_base(str(base))) is None
    (base / FILE).write_text(json.dumps({"start": "a photo of ", "parts": [["a lake", "a hill"]]}))
    assert read_vocabulary(inspect_base(str(base))) == Vocabulary("a photo of ", (("a lake", "a hill"),))
    for text in ("{", "{}", '{"start": "", "parts": []}', '{"start": "", "parts": [[]]}', "[]"):
        (base / FILE).write_text(text)
        with pytest.raises(BaseError, match="parts"):
            read_vocabulary(inspect_base(str(base)))
