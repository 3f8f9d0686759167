"""The strength of LoHa and LoKr by LyCORIS's own rule, rs_lora too.

Checked once against lycoris-lora 4.1.3 itself (docs/FILES.md); here its rule is written out: alpha is
registered as alpha * r / r_factor with r_factor = sqrt(r) under rs_lora, and is r before that where both
matrices are whole; the forward pass scales by alpha / r_factor.
"""

import json
import math

import pytest
import torch

from lorakit.weights.lora_import import read_any
from lorakit.weights.tensors import serialize

BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lokr(end, r, rs_lora, *, whole, alpha=1.0, seed=0):
    """Tensors of a LoKr module as LyCORIS saves it, and the change that its forward pass makes."""
    w1, a, b, w2 = normal(4, 2, seed=seed), normal(6, r, seed=seed + 1), normal(r, 8, seed=seed + 2), None
    r_factor = math.sqrt(r) if rs_lora else r
    if whole:
        alpha, w2 = r, normal(6, 8, seed=seed + 3)
    tensors = {"lokr_w1": w1, "alpha": torch.tensor(alpha * r / r_factor)}
    tensors |= {"lokr_w2_a": a, "lokr_w2_b": b} if w2 is None else {"lokr_w2": w2}
    change = alpha / r_factor * torch.kron(w1, a @ b if w2 is None else w2)
    return {f"{BLOCK}{end}.{slot}": tensor for slot, tensor in tensors.items()}, change


def read(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize(tensors, metadata or {}))
    file, notes = read_any(path)
    doubts = [note for note in notes if "rs_lora" in note]
    return {name.removeprefix(BLOCK): pair.delta() for name, pair in file.modules.items()}, doubts


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [2, 3, 4, 5, 9, 16])
@pytest.mark.parametrize("rs_lora", [False, True])
def test_low_rank_modules_tell_the_strength_of_whole_ones_beside_them(tmp_path, r, rs_lora):
    whole, change = lokr("q", r, rs_lora, whole=True)
    low, other = lokr("k", r, rs_lora, whole=False, alpha=0.5, seed=7)
    found, doubts = read(tmp_path, whole | low)
    close(found["q"], change)
    close(found["k"], other)
    assert not doubts


@pytest.mark.parametrize("r", [2, 3, 4, 5, 9, 16])
@pytest.mark.parametrize("rs_lora", [False, True])
def test_whole_modules_alone_go_by_metadata_and_by_alphas_that_are_no_whole_number(tmp_path, r, rs_lora):
    tensors, change = lokr("q", r, rs_lora, whole=True)
    args = {"algo": "lokr"} | ({"rs_lora": "True"} if rs_lora else {})
    found, doubts = read(tmp_path, tensors, {"ss_network_args": json.dumps(args)})
    close(found["q"], change)
    assert not doubts
    found, doubts = read(tmp_path, tensors, {"ss_network_dim": str(r)})
    close(found["q"], change)
    assert not doubts
    found, doubts = read(tmp_path, tensors)
    alpha = r**1.5 if rs_lora else r
    if rs_lora and r in (4, 9, 16):  # alpha 8, 27, 64: a rank as likely as a root's power
        assert len(doubts) == 1 and f"{math.sqrt(r):g} times" in doubts[0]
        close(found["q"] * math.sqrt(r), change)
    else:
        close(found["q"], change)
        assert bool(doubts) == (round(alpha ** (1 / 3)) ** 3 == alpha)


def test_infinite_alphas_of_whole_matrices_count_for_nothing_and_of_others_are_refused(tmp_path):
    tensors, change = lokr("q", 4, False, whole=True)
    tensors[f"{BLOCK}q.alpha"] = torch.tensor(100000.0).half()
    assert tensors[f"{BLOCK}q.alpha"].isinf()
    close(read(tmp_path, tensors)[0]["q"], change)
    low, _ = lokr("q", 4, False, whole=False)
    with pytest.raises(Exception, match="NaN or infinity.*alpha"):
        read(tmp_path, low | {f"{BLOCK}q.alpha": torch.tensor(math.inf)})


def test_loha_with_rs_lora_has_its_scale_in_alpha(tmp_path):
    parts = [normal(6, 4, seed=1), normal(4, 8, seed=2), normal(6, 4, seed=3), normal(4, 8, seed=4)]
    slots = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{BLOCK}q.{slot}": part for slot, part in zip(slots, parts, strict=True)}
    tensors[f"{BLOCK}q.alpha"] = torch.tensor(1.0 * 4 / 2)
    found, _ = read(tmp_path, tensors)
    close(found["q"], 1.0 / 2 * (parts[0] @ parts[1]) * (parts[2] @ parts[3]))
