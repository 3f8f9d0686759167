"""What PEFT itself saves, put on by our loader: the output of PEFT's forward pass, or a refusal by name."""

import shutil
import warnings

import peft
import pytest
import torch

from lorakit.diffusion.lora import load_lora
from lorakit.ground.errors import UserError
from lorakit.weights.lora_import import read_any

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [*ATTENTION, "proj_in", "conv1", "ff.net.2", "time_emb_proj", "conv_shortcut"]
READ = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=ALL),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules=ALL, use_rslora=True),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=ALL,
        alpha_pattern={r".*attn2.*": 3, "to_q|to_k": 5},
        rank_pattern={"conv1": 2, r"down_blocks\..*to_v": 6},
    ),
    "fan_in_fan_out": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, fan_in_fan_out=True
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=2, target_modules=ALL),
    "loha, Tucker": lambda: peft.LoHaConfig(
        r=4, alpha=2, target_modules=ALL, use_effective_conv2d=True, alpha_pattern={"conv1": 8}
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=8, target_modules=ALL),
    "lokr, both": lambda: peft.LoKrConfig(
        r=2, alpha=8, target_modules=ALL, decompose_both=True, use_effective_conv2d=True, decompose_factor=2
    ),
    "lokr, whole": lambda: peft.LoKrConfig(r=64, alpha=16, target_modules=ALL, rank_pattern={"to_q": 32}),
}
REFUSED = {
    "pissa": (lambda: peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="pissa"), "pissa"),
    "lora_bias": (
        lambda: peft.LoraConfig(r=2, target_modules=ATTENTION, lora_bias=True),
        "more than a LoRA .lora_bias",
    ),
    "OFT": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=ATTENTION), "PEFT's OFT"),
    "IA3": (lambda: peft.IA3Config(target_modules=ATTENTION, feedforward_modules=[]), "PEFT's IA3"),
    "VeRA": (lambda: peft.VeraConfig(r=2, target_modules=["attn1.to_q"]), "PEFT's VERA"),
}


def states():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)


@torch.no_grad()
def output(model):
    latents, text = states()
    return model(latents, 300, text).sample


def saved(unet, config, folder):
    """A folder of save_pretrained, trained by hand, and what PEFT makes of it."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(unet, config)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.eval()
        model.save_pretrained(str(folder))
    return output(model)


@pytest.mark.parametrize("kind", READ)
def test_a_folder_of_peft_gives_the_output_of_peft(tiny_unet, tmp_path, kind):
    base, wanted = output(tiny_unet()), saved(tiny_unet(), READ[kind](), tmp_path)
    unet = tiny_unet()
    load_lora(tmp_path, unet, adapter_name="a")
    effect = (wanted - base).norm()
    assert effect > 1e-2 and (output(unet) - wanted).norm() < 1e-4 * effect
    bare = tmp_path / "bare" / "style.safetensors"
    bare.parent.mkdir()
    shutil.copy(tmp_path / "adapter_model.safetensors", bare)
    notes = []
    unet = tiny_unet()
    load_lora(bare, unet, adapter_name="a", notes=notes)
    assert any("strength is unknown" in note for note in notes)
    assert (output(unet) - wanted).norm() > 1e-2 * effect  # the control: without the config it is another


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_of_peft_are_refused_by_their_names(tiny_unet, tmp_path, kind):
    config, message = REFUSED[kind]
    saved(tiny_unet(), config(), tmp_path)
    with pytest.raises(UserError, match=message):
        read_any(tmp_path)
