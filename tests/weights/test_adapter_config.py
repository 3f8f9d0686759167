"""Strength that stands beside the tensors: PEFT's configs, by PEFT's own rules."""

import json

import pytest
import torch
from peft.utils.other import get_pattern_key

from lorakit.ground.errors import UserError
from lorakit.weights.adapter_config import CONFIG, AdapterAlphas, config_beside, lora_path
from lorakit.weights.lora_import import read_any
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.tensors import serialize

TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
NAME = "lora_unet_" + TO_K.replace(".", "_")
PEFT = f"base_model.model.{TO_K}"
CHANGE = {f"{PEFT}.lora_A.weight": torch.ones(4, 16), f"{PEFT}.lora_B.weight": torch.ones(8, 4)}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}


def folder(tmp_path, config, tensors=None, name="adapter_model.safetensors"):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(serialize(CHANGE if tensors is None else tensors, {}))
    if config is not None:
        (tmp_path / CONFIG).write_text(json.dumps(config))
    return tmp_path


# ---- where it lies ----


def test_a_folder_of_peft_and_a_file_beside_its_config_have_the_strength_of_the_config(tmp_path):
    folder(tmp_path, LORA)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        file, notes = read_any(path)
        assert (file.modules[NAME].alpha, file.modules[NAME].scale, notes) == (16, 4, [])
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    assert read_any(tmp_path / "style.safetensors")[0].modules[NAME].alpha == 16
    (tmp_path / CONFIG).unlink()
    file, notes = read_any(tmp_path / "style.safetensors")
    assert file.modules[NAME].alpha == 4 and ["strength is unknown" in note for note in notes] == [True]


def test_files_of_other_layouts_do_not_heed_a_config_that_lies_beside_them(tmp_path):
    dotted = {key.replace("base_model.model.", "unet."): tensor for key, tensor in CHANGE.items()}
    folder(tmp_path, LORA, dotted, "style.safetensors")
    assert read_lora(tmp_path / "style.safetensors").modules[NAME].alpha == 4
    assert config_beside(tmp_path / "style.safetensors", dotted) is None
    assert config_beside(tmp_path / "style.safetensors", CHANGE) == LORA
    kohya = {f"{NAME}.lora_down.weight": torch.ones(4, 16), f"{NAME}.lora_up.weight": torch.ones(8, 4)}
    (tmp_path / "kohya.safetensors").write_bytes(serialize(kohya | {f"{NAME}.alpha": torch.tensor(1.0)}, {}))
    file, notes = read_any(tmp_path / "kohya.safetensors")
    assert file.modules[NAME].alpha == 1 and notes == []


def test_a_folder_without_an_adapter_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="is a folder; name the .safetensors file in it"):
        lora_path(tmp_path)
    folder(tmp_path / "unet", LORA)
    folder(tmp_path / "text_encoder", LORA)
    with pytest.raises(UserError, match="the adapters text_encoder, unet; name one"):
        lora_path(tmp_path)
    assert lora_path(tmp_path / "unet") == tmp_path / "unet/adapter_model.safetensors"
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match="holds a pickle"):
        read_lora(tmp_path / "pickled")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ("{}", "no lora_alpha.*strength is unknown"),
        ('{"lora_alpha": "much"}', "strength is unknown"),
        ('{"lora_alpha": 4, "r": 8}', "rank 4, but its config says 8.*another adapter"),
        ('{"lora_alpha": 4, "r": 8, "rank_pattern": {"to_k": 4}}', None),
        ('{"lora_alpha": 4, "alpha_pattern": {"(": 4}}', "no regular expression"),
        ('{"lora_alpha": 4, "peft_type": "OFT"}', "is PEFT's OFT, not a LoRA.*merge_and_unload"),
        ('{"lora_alpha": 4, "use_qalora": true}', "more than a LoRA .use_qalora"),
        (
            '{"lora_alpha": 4, "lora_bias": true, "layer_replication": [[0, 1]]}',
            "layer_replication, lora_bias",
        ),
        ('{"lora_alpha": 4, "bias": "all", "modules_to_save": ["conv_in"]}', "LoRA .modules_to_save, bias"),
        ('{"lora_alpha": 4, "bias": "none", "modules_to_save": null}', None),
        (
            '{"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}',
            "base that PEFT had changed.*pissa_niter_4",
        ),
        ('{"lora_alpha": 4, "init_lora_weights": "gaussian", "use_qalora": false}', None),
    ],
)
def test_a_config_that_leaves_the_strength_open_or_tells_of_something_else_is_refused(
    tmp_path, text, message
):
    (folder(tmp_path, None) / CONFIG).write_text(text)
    if message is None:
        assert read_lora(tmp_path).modules[NAME].alpha == 4
        return
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ---- what it says ----


@pytest.mark.parametrize(
    "pattern",
    ["to_k", ".*attn2.*", "attn1|attn2.to_k", r"mid_block\..*", "^to_k", f"^{TO_K}", "o_k", r"to_\w"],
)
def test_patterns_are_regular_expressions_by_the_rule_of_peft(pattern):
    """One side is `get_pattern_key` of PEFT itself."""
    config = LORA | {"alpha_pattern": {pattern: 3}, "rank_pattern": {pattern: 2}}
    fits = get_pattern_key([pattern], TO_K) == pattern
    alphas = AdapterAlphas({}, config)
    assert alphas.alpha("unet", TO_K, 2 if fits else 4) == (3 if fits else 16)
    assert alphas.rank("unet", TO_K) == (2 if fits else 4)


def test_the_first_of_two_patterns_that_fit_counts():
    both = {"to_k": 3, ".*attn2.*": 5}
    for pattern in (both, dict(reversed(both.items()))):
        wanted = pattern[get_pattern_key(list(pattern), TO_K)]
        assert AdapterAlphas({}, LORA | {"alpha_pattern": pattern}).alpha("unet", TO_K, 4) == wanted


def test_patterns_fit_the_text_encoder_with_and_without_text_model():
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    for spelling in (name, name.removeprefix("text_model.")):
        config = LORA | {"alpha_pattern": {f"^{spelling}": 3}}
        assert AdapterAlphas({}, config).alpha("text_encoder", name, 4) == 3
    assert AdapterAlphas({}, LORA | {"alpha_pattern": {"^encoder": 3}}).alpha("text_encoder", name, 4) == 16


def test_rslora_divides_by_the_root_of_the_rank():
    assert AdapterAlphas({}, LORA | {"use_rslora": True}).alpha("unet", TO_K, 4) / 4 == 16 / 2


def test_the_metadata_of_a_file_count_more_than_a_config_beside_it():
    alphas = AdapterAlphas({"lora_adapter_metadata": '{"unet.lora_alpha": 2, "unet.r": 4}'}, LORA)
    assert alphas.alpha("unet", TO_K, 4) == 2 and alphas.alpha("text_encoder", TO_K, 4) == 16


def test_lokr_of_whole_matrices_takes_the_rank_of_the_config(tmp_path):
    w1, w2 = torch.randn(2, 4), torch.randn(4, 4)
    config = {"peft_type": "LOKR", "r": 8, "alpha": 4}
    folder(tmp_path, config, {f"{PEFT}.lokr_w1": w1, f"{PEFT}.lokr_w2": w2})
    found = read_any(tmp_path)[0].modules[NAME].delta()
    torch.testing.assert_close(found, 0.5 * torch.kron(w1, w2), rtol=1e-4, atol=1e-5)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"rank_pattern": {"to_k": 2}}))
    found = read_any(tmp_path)[0].modules[NAME].delta()
    torch.testing.assert_close(found, 2 * torch.kron(w1, w2), rtol=1e-4, atol=1e-5)
