"""Spellings, forms and dtypes of LoRA files as people bring them: read for what they say, or named."""

import json

import pytest
import torch

from lorakit.ground.errors import UserError
from lorakit.weights.lora_file import LoraPair, base_of, folded, is_vector, kohya_name, lora_bytes
from lorakit.weights.lora_import import read_any
from lorakit.weights.lora_keys import parse_key
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.original_names import unet_name
from lorakit.weights.tensors import serialize

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Q = kohya_name("unet", TO_Q)
DOWN_Q = Q.replace("mid_block_attentions", "down_blocks_0_attentions")
CONV = kohya_name("unet", "mid_block.resnets.0.conv1")
TEXT = "encoder.layers.0.self_attn.q_proj"
T = kohya_name("text_encoder", TEXT)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


DOWN, UP = normal(4, 16, seed=1), normal(8, 4, seed=2)
DELTA = UP @ DOWN


def written(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize(tensors, metadata or {}))
    return path


def pair(stem, halves=("lora_down.weight", "lora_up.weight"), alpha=2.0):
    tensors = {f"{stem}.{halves[0]}": DOWN, f"{stem}.{halves[1]}": UP}
    return tensors | ({f"{stem}.alpha": torch.tensor(alpha)} if alpha else {})


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- names ----

AB = ("lora_A.weight", "lora_B.weight")
SPELLINGS = {
    "original, kohya": (pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"), DOWN_Q),
    "original, ComfyUI": (pair("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"), DOWN_Q),
    "original, ComfyUI, A and B": (
        pair("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", AB),
        DOWN_Q,
    ),
    "ComfyUI's text encoder": (pair(f"text_encoders.clip_l.transformer.text_model.{TEXT}"), T),
    "lycoris": (pair("lycoris_" + TO_Q.replace(".", "_")), Q),
    "lycoris, text encoder": (pair("lycoris_text_model_" + TEXT.replace(".", "_")), T),
    "lycoris, text encoder of transformers 5.6": (pair("lycoris_" + TEXT.replace(".", "_")), T),
    "lycoris with kohya's prefix": (pair("lycoris_unet_" + TO_Q.replace(".", "_")), Q),
    "adapter name": (pair(TO_Q, ("lora_A.default.weight", "lora_B.default.weight")), Q),
    "adapter name, PEFT": (
        pair(f"base_model.model.{TO_Q}", ("lora_A.my-style.weight", "lora_B.my-style.weight")),
        Q,
    ),
    "in DDP and compiled": (pair(f"module._orig_mod.base_model.model.{TO_Q}", AB), Q),
    "PEFT, text encoder of transformers 5.6": (pair(f"base_model.model.{TEXT}", AB), T),
    "doubled, kohya": (pair(f"lora_unet_{Q}"), Q),
    "doubled, kohya, half": (pair(Q.replace("lora_unet_", "lora_unet_unet_")), Q),
    "doubled, kohya, text encoder": (pair(f"lora_te_{T}"), T),
    "doubled, lycoris": (pair(f"lycoris_{Q}"), Q),
    "doubled, diffusers": (pair(f"unet.unet.{TO_Q}", AB), Q),
    "doubled, PEFT": (pair(f"base_model.model.base_model.model.{TO_Q}", AB), Q),
    "doubled, text encoder": (pair(f"text_encoder.text_encoder.{TEXT}", AB), T),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_module_is_the_same_under_every_spelling(tmp_path, spelling):
    tensors, name = SPELLINGS[spelling]
    file, notes = read_any(written(tmp_path, tensors))
    assert list(file.modules) == [name]
    close(file.modules[name].delta(), 0.5 * DELTA)
    assert any("doubled prefix" in note for note in notes) == spelling.startswith("doubled")
    assert not any("unknown" in note for note in notes)  # it has alpha


def test_loha_under_every_prefix_is_named_by_its_model(tmp_path):
    part = {f"hada_w{i}_a": normal(16, 2, seed=i) for i in (1, 2)}
    part |= {f"hada_w{i}_b": normal(2, 16, seed=i + 2) for i in (1, 2)}
    for stem, name in [
        ("lycoris_" + TEXT.replace(".", "_"), T),
        ("lora_te1_" + TEXT.replace(".", "_"), T),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", DOWN_Q),
        ("lycoris_" + TO_Q.replace(".", "_"), Q),
        (f"lora_unet_{Q}", Q),
        (f"base_model.model.{TO_Q}", Q),
    ]:
        tensors = {f"{stem}.{slot}": tensor for slot, tensor in part.items()}
        file, _ = read_any(written(tmp_path, tensors))
        assert list(file.modules) == [name]


def test_original_names_map_for_a_whole_unet_of_sd_15():
    """The other side is the layout of the original code's U-Net, block by block, written out here."""
    counts = {"attentions": 0, "resnets": 0, "samplers": 0}
    for level in range(4):
        for index in range(2):
            number = 1 + 3 * level + index
            expected = {f"input_blocks_{number}_0_in_layers_2": f"down_blocks_{level}_resnets_{index}_conv1"}
            if level < 3:
                expected[f"input_blocks_{number}_1_proj_in"] = (
                    f"down_blocks_{level}_attentions_{index}_proj_in"
                )
            if level and not index:
                skip = f"down_blocks_{level}_resnets_0_conv_shortcut"
                expected[f"input_blocks_{number}_0_skip_connection"] = skip
            check_names(expected, counts)
        for index in range(3):
            number = 3 * level + index
            expected = {
                f"output_blocks_{number}_0_emb_layers_1": f"up_blocks_{level}_resnets_{index}_time_emb_proj"
            }
            if level:
                ff = "transformer_blocks_0_ff_net_0_proj"
                expected[f"output_blocks_{number}_1_{ff}"] = f"up_blocks_{level}_attentions_{index}_{ff}"
            check_names(expected, counts)
        if level < 3:
            place = 1 if level == 0 else 2
            check_names(
                {f"input_blocks_{3 * level + 3}_0_op": f"down_blocks_{level}_downsamplers_0_conv"}, counts
            )
            up = {f"output_blocks_{3 * level + 2}_{place}_conv": f"up_blocks_{level}_upsamplers_0_conv"}
            check_names(up, counts)
    check_names({"middle_block_2_out_layers_3": "mid_block_resnets_1_conv2"}, counts)
    check_names({"input_blocks_0_0": "conv_in", "out_2": "conv_out"}, counts)
    check_names({"time_embed_2": "time_embedding_linear_2"}, counts)
    assert counts == {"attentions": 6 + 9, "resnets": 8 + 3 + 12 + 1, "samplers": 6}


def check_names(expected, counts):
    for original, today in expected.items():
        assert parse_key(f"lora_unet_{original}.alpha").name == f"lora_unet_{today}"
        for kind in counts:
            counts[kind] += kind in today
    assert unet_name("input_blocks.1.1.proj_in.weight", 2) == "down_blocks.0.attentions.0.proj_in.weight"


@pytest.mark.parametrize(
    ("original", "width", "base"),
    [
        (["input_blocks_1_1_transformer_blocks_0_attn1_to_q"], 16, "SD"),
        (["input_blocks_4_1_transformer_blocks_0_attn2_to_k"], 768, "SD"),
        (["input_blocks_4_1_transformer_blocks_0_attn2_to_k"], 1024, "SD"),
        (["output_blocks_9_0_in_layers_2"], 16, "SD"),
        (["input_blocks_4_1_transformer_blocks_0_attn2_to_k"], 2048, "SDXL"),
        (["input_blocks_4_1_transformer_blocks_1_attn2_to_k"], 768, "SDXL"),
        (["output_blocks_0_1_transformer_blocks_0_attn1_to_q"], 16, "SDXL"),
        (["input_blocks_4_1_transformer_blocks_0_attn1_to_q"], 640, "SDXL"),  # both have it: not trusted
    ],
)
def test_original_names_tell_sd_from_sdxl(tmp_path, original, width, base):
    tensors = {}
    for name in original:
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": torch.ones(2, width),
            f"lora_unet_{name}.lora_up.weight": torch.ones(8, 2),
        }
    path = written(tmp_path, tensors)
    if base == "SDXL":
        with pytest.raises(UserError, match="is for SDXL"):
            read_lora(path)
    else:
        assert len(read_lora(path).modules) == len(original)


def test_two_adapters_in_one_file_and_names_of_no_module_are_refused(tmp_path):
    two = pair(TO_Q, ("lora_A.a.weight", "lora_B.a.weight"), None)
    two |= pair(TO_Q, ("lora_A.b.weight", "lora_B.b.weight"), None)
    with pytest.raises(UserError, match="the adapters a, b in one file"):
        read_lora(written(tmp_path, two))
    for stem in (
        "lora_unet_encoder_layers_0_mlp_fc1",
        "lora_te_down_blocks_0_x",
        "unet.encoder.layers.0.mlp.fc1",
    ):
        with pytest.raises(UserError, match="no LoRA for Stable Diffusion"):
            read_lora(written(tmp_path, pair(stem)))
        with pytest.raises(UserError, match="no known LoRA layout"):
            read_lora(written(tmp_path, pair(stem) | pair(Q)))


# ---- forms ----


def test_lora_mid_is_an_exact_lora_of_the_same_rank(tmp_path):
    mid, down, up = normal(4, 4, 3, 3, seed=3), normal(4, 16, 1, 1, seed=4), normal(8, 4, 1, 1, seed=5)
    tensors = {f"{CONV}.lora_{half}.weight": t for half, t in (("mid", mid), ("down", down), ("up", up))}
    found = read_lora(written(tmp_path, tensors | {f"{CONV}.alpha": torch.tensor(1.0)})).modules[CONV]
    wanted = 0.25 * torch.einsum("oi,ijkl,jc->ockl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert found.rank == 4
    close(found.delta(), wanted)
    x = normal(1, 16, 6, 6, seed=6)  # as three convolutions
    steps = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    close(torch.conv2d(x, found.delta(), padding=1), 0.25 * steps)
    turned = read_lora(
        written(tmp_path, tensors | {f"{CONV}.lora_mid.weight": mid.transpose(0, 1).contiguous()})
    )
    assert (turned.modules[CONV].scale * turned.modules[CONV].delta() - wanted).norm() > 0.1 * wanted.norm()
    with pytest.raises(UserError, match="do not multiply: mid"):
        read_lora(written(tmp_path, tensors | {f"{CONV}.lora_mid.weight": normal(3, 3, 3, 3)}))


def test_convolutions_of_dylora_are_read_and_its_strength_is_said(tmp_path):
    down, up = normal(4, 16, 3, 3, seed=3), normal(8, 4, seed=4)
    tensors = {f"{CONV}.lora_down.weight": down, f"{CONV}.lora_up.weight": up}
    file, notes = read_any(written(tmp_path, tensors))
    close(file.modules[CONV].delta(), torch.einsum("or,rikl->oikl", up, down))
    assert ["is DyLoRA" in note for note in notes] == [True]
    told = {"ss_network_args": json.dumps({"algo": "dylora"})}
    assert "is DyLoRA" in read_any(written(tmp_path, pair(Q), told))[1][0]
    assert read_any(written(tmp_path, pair(Q), {"ss_network_args": json.dumps({"algo": "lora"})}))[1] == []


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (8, 16, 3, 3), (64, 4, 3, 3)])
def test_whole_differences_are_exact_and_are_cut_where_it_is_asked_for(tmp_path, shape):
    diff = normal(*shape, seed=3)
    path = written(tmp_path, {f"{CONV}.diff": diff})
    for file in (read_lora(path), read_any(path, energy=1)[0]):
        assert torch.equal(file.modules[CONV].delta(), diff)
    file, notes = read_any(path)
    close(file.modules[CONV].delta(), diff)
    assert "whole weights were expanded" in notes[0] and file.layout == "whole"
    cut = read_any(path, rank=2)[0].modules[CONV]
    assert cut.rank == 2
    u, s, vh = torch.linalg.svd(diff.flatten(1), full_matrices=False)
    close(cut.delta().flatten(1), (u[:, :2] * s[:2]) @ vh[:2])


def test_biases_and_norms_go_to_kohyas_file_and_back_and_to_no_other(tmp_path):
    norm = kohya_name("unet", "mid_block.resnets.0.norm1")
    tensors = {f"{CONV}.diff_b": normal(8, seed=1), f"{norm}.w_norm": normal(8, seed=2)}
    tensors |= {f"{norm}.b_norm": normal(8, seed=3), **pair(Q)}
    file, notes = read_any(written(tmp_path, tensors))
    assert set(file.modules) == {Q, f"{CONV}.bias", norm, f"{norm}.bias"} and notes == []
    assert {name for name in file.modules if is_vector(name)} == file.modules.keys() - {Q}
    content = lora_bytes(file.modules, layout="kohya", metadata={})
    again = tmp_path / "again.safetensors"
    again.write_bytes(content)
    back = read_any(again)[0].modules
    for name, one in file.modules.items():
        close(back[name].delta(), one.delta())
    assert set(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])) >= tensors.keys()
    with pytest.raises(UserError, match="3 biases and norms, .* no place in the diffusers layout"):
        lora_bytes(file.modules, layout="diffusers", metadata={})


def test_lora_beside_a_whole_difference_of_the_same_weight_is_refused(tmp_path):
    with pytest.raises(UserError, match="both a LoRA and a whole difference"):
        read_lora(written(tmp_path, pair(Q) | {f"{Q}.diff": normal(8, 16)}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_the_same_numbers_in_float16(tmp_path, dtype):
    down, up = DOWN.to(dtype), UP.to(dtype)
    tensors = {f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up}
    path = tmp_path / "x.safetensors"
    from safetensors.torch import save_file

    save_file(tensors, path)
    file, notes = read_any(path)
    found = file.modules[Q]
    assert found.down.dtype == found.up.dtype == torch.float16 and "float8" in notes[0]
    assert torch.equal(found.down.float(), down.float()) and torch.equal(found.up.float(), up.float())
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = every[every.isfinite()]
    assert len(finite) > 240 and torch.equal(finite.half().float(), finite)


def test_a_learnt_word_beside_the_lora_is_named_and_the_lora_is_read(tmp_path):
    word = {"bundle_emb.my word.string_to_param.*": torch.ones(2, 16)}
    file, notes = read_any(written(tmp_path, pair(Q) | word))
    assert list(file.modules) == [Q] and "learnt word" in notes[0] and "my word" in notes[0]
    with pytest.raises(UserError, match="looks like a textual inversion"):
        read_lora(written(tmp_path, word))


# ---- what is named and not read ----

DORA = {f"{Q}.dora_scale": torch.ones(8, 1)}
LOHA = {f"{Q}.hada_w{i}_{s}": normal(*((8, 2) if s == "a" else (2, 16))) for i in (1, 2) for s in "ab"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair(Q) | DORA, "holds DoRA in kohya's form.*LyCORIS"),
        (LOHA | DORA, "holds DoRA on LoHa or LoKr .dora_scale"),
        ({f"{Q}.oft_blocks": torch.ones(2, 4, 4)}, "is an OFT file.*LyCORIS"),
        ({f"{Q}.oft_blocks": torch.ones(3, 2, 4, 4)}, "is a BOFT file.*LyCORIS"),
        ({f"{Q}.weight": torch.ones(8), f"{Q}.on_input": torch.tensor(False)}, "is an IA3 file.*LyCORIS"),
        ({f"{Q}.{ab}{i}.weight": torch.ones(2, 2) for ab in "ab" for i in "12"}, "is a GLoRA file"),
        ({f"{Q}.lambda_layer": torch.ones(1, 2), f"{Q}.q_layer.weight": torch.ones(2, 2)}, "is a T-LoRA"),
        ({f"base_model.model.{TO_Q}.oft_R": torch.ones(2, 6)}, "is PEFT's OFT.*merge_and_unload"),
        ({f"base_model.model.{TO_Q}.ia3_l": torch.ones(8, 1)}, "is PEFT's IA3"),
        ({f"base_model.model.{TO_Q}.hira_A": torch.ones(2, 8)}, "is PEFT's HIRA"),
        ({"base_model.unilora_theta_d": torch.ones(8)}, "is PEFT's UNILORA"),
        ({f"base_model.model.{TO_Q}.lora_{x}": torch.ones(2, 8) for x in "ABE"}, "is an AdaLoRA"),
        (pair(TO_Q, AB) | {f"{TO_Q}.lora_B.bias": torch.ones(8)}, "LoRA with a bias of its own"),
        ({"base_model.model.x.lora_embedding_A": torch.ones(2, 8)}, "LoRA on embeddings"),
        ({"diffusion_model.blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8)}, "is for Flux"),
    ],
)
def test_what_is_not_read_is_called_by_its_name(tmp_path, tensors, message):
    path = written(tmp_path, tensors)
    for reader in (read_lora, read_any):
        with pytest.raises(UserError, match=message) as caught:
            reader(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_files_without_what_makes_them_so_are_read(tmp_path):
    assert base_of(read_lora(written(tmp_path, pair(Q))).modules) is None
    assert list(read_any(written(tmp_path, LOHA))[0].modules) == [Q]
    assert list(read_lora(written(tmp_path, pair(TO_Q, AB))).modules) == [Q]


# ---- alpha in the matrices ----


@pytest.mark.parametrize("alpha", [0.5, 3.0, 4.0, 16.0])
def test_folded_changes_are_the_same_with_alpha_as_the_rank(alpha):
    modules = {Q: LoraPair(DOWN, UP, alpha), CONV: LoraPair(normal(2, 4, 3, 3), normal(8, 2, 1, 1), alpha)}
    for name, one in folded(modules).items():
        assert one.alpha == one.rank and one.up.dtype == modules[name].up.dtype
        close(one.delta(), modules[name].delta())
        assert torch.equal(one.down, modules[name].down)
    assert (alpha == 4) == torch.equal(folded(modules)[Q].up, UP)
