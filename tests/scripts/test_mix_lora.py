"""Mixing LoRA files: the maths against dense weights, every verb on files, merged bases against adapters."""

import dataclasses
import json
import re
import shutil

import pytest
import safetensors.torch
import torch

import mix_lora
from lorakit.diffusion.lora import add_lora, extract, load_lora
from lorakit.ground.config_text import ConfigError
from lorakit.ground.errors import UserError
from lorakit.training.lora_check import verify_in_diffusers
from lorakit.weights.lora_file import LoraPair, kohya_name, lora_bytes
from lorakit.weights.lora_import import read_any
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.mixing import dare, factorise, factors, mix, scaled, squared_distance, ties, truncate
from lorakit.weights.tensors import chunks, serialize
from lorakit.weights.verbs import VERBS, parse_file

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
SHAPES = {  # kohya name -> (out, in, kernel)
    kohya_name("unet", f"{BLOCK}.attn1.to_q"): (24, 20, ()),
    kohya_name("unet", f"{BLOCK}.attn2.to_k"): (24, 16, ()),
    kohya_name("unet", "down_blocks.0.resnets.0.conv1"): (12, 8, (3, 3)),
    kohya_name("text_encoder", "encoder.layers.0.mlp.fc1"): (32, 16, ()),
}
Q, K, CONV, TEXT = SHAPES


def rng(seed):
    return torch.Generator().manual_seed(seed)


def lora(seed, rank=4, alpha=4.0, names=tuple(SHAPES), dtype=torch.float32):
    modules = {}
    for number, name in enumerate(names):
        out, into, kernel = SHAPES[name]
        random = rng(1000 * seed + number)
        down = torch.randn(rank, into, *kernel, generator=random)
        up = torch.randn(out, rank, *[1] * len(kernel), generator=random)
        modules[name] = LoraPair(down.to(dtype), up.to(dtype), alpha)
    return modules


def write(path, modules, layout="kohya", metadata=None):
    path.write_bytes(lora_bytes(modules, layout=layout, metadata=metadata or {}))
    return str(path)


def weighted(name, *terms):
    return sum(weight * modules[name].delta().double() for modules, weight in terms if name in modules)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def run(capsys, *argv):
    assert mix_lora.main([str(text) for text in argv]) == 0
    return capsys.readouterr().out


# ---- sums ----


@pytest.mark.parametrize("seed", range(4))
def test_the_exact_mix_is_the_weighted_sum_of_deltas_for_any_ranks_alphas_signs_and_modules(seed):
    a, b, c = (
        lora(seed, 4, 2.0),
        lora(seed + 50, 3, 7.0, names=(Q, K, CONV)),
        lora(seed + 90, 1, 1.0, names=(TEXT,)),
    )
    terms = [(a, 0.7), (b, -0.3), (c, 2.0)]
    mixed = mix([("", modules, weight) for modules, weight in terms], "exact")
    assert mixed.modules.keys() == SHAPES.keys()
    assert {pair.rank for pair in mixed.modules.values()} == {7, 5}
    for name, pair in mixed.modules.items():
        assert relative(pair.delta(), weighted(name, *terms)) < 1e-6
    assert mixed.error() < 1e-6
    assert len({pair.alpha for pair in mixed.modules.values()}) == 1  # or diffusers misreads the file


@pytest.mark.parametrize("method", ["exact", "svd", "ties", "dare"])
def test_the_order_of_files_is_irrelevant(method):
    a, b = ("a", lora(1), 0.7), ("b", lora(2, alpha=1.0), -0.4)
    there, back = mix([a, b], method).modules, mix([b, a], method).modules
    for name in SHAPES:
        torch.testing.assert_close(there[name].delta(), back[name].delta(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scaling_is_linear_and_exact_for_0_a_half_and_1(dtype):
    modules = lora(3, alpha=2.0, dtype=dtype)
    for weight in (0.0, 0.5, 1.0):
        for name, pair in scaled(modules, weight).items():
            assert torch.equal(pair.delta(), weight * modules[name].delta())
            assert pair.alpha == 2.0 and pair.up.dtype == dtype
    double = mix([("", modules, 0.6)], "exact", dtype=torch.float32).modules
    thrice = mix([("", modules, 1.8)], "exact", dtype=torch.float32).modules
    for name in SHAPES:
        torch.testing.assert_close(3 * double[name].delta(), thrice[name].delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_svd_is_as_good_as_a_dense_svd_and_exact_at_the_summed_rank(seed):
    terms = [(lora(seed), 0.7), (lora(seed + 9), 0.8)]
    sources = [("", modules, weight) for modules, weight in terms]
    low, full = mix(sources, "svd", rank=4), mix(sources, "svd", rank=8)
    assert full.error() < 1e-6
    for name in SHAPES:
        singular = torch.linalg.svdvals(weighted(name, *terms).flatten(1))
        best = float((singular[4:].square().sum() / singular.square().sum()).sqrt())
        assert low.error(name) == pytest.approx(best, rel=1e-3)
        assert relative(low.modules[name].delta(), weighted(name, *terms)) == pytest.approx(best, rel=1e-3)
        others = mix(sources, "linear").error(name), mix(sources, "ties", rank=4).error(name)
        assert best < min(others)  # Eckart and Young


def test_energy_keeps_the_fewest_singular_values_that_reach_it():
    basis = torch.linalg.qr(torch.randn(10, 10, generator=rng(0)))[0]
    values = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5])
    delta = (basis[:, :5] * values, basis[:5])
    shares = values.square().cumsum(0) / values.square().sum()
    for count in range(1, 6):
        for function, argument in ((truncate, delta), (factorise, delta[0] @ delta[1])):
            up, down = function(argument, None, float(shares[count - 1]) - 1e-4)
            assert down.shape[0] == count
            lost = squared_distance((up, down), delta) / float(values.square().sum())
            assert 1 - lost == pytest.approx(float(shares[count - 1]), abs=1e-5)
    assert truncate(delta, rank=2, energy=0.999)[1].shape[0] == 2
    nothing = torch.zeros(5, 2), torch.zeros(2, 6)
    assert truncate(nothing, energy=0.9)[1].shape == (1, 6)
    assert factorise(torch.zeros(5, 6), energy=0.9)[1].isfinite().all()


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (6, 5000)])
def test_factorise_is_the_best_approximation_of_a_matrix(shape):
    matrix = torch.randn(shape, generator=rng(1))
    up, down = factorise(matrix, 3)
    singular = torch.linalg.svdvals(matrix.double())
    assert float((matrix - up @ down).norm()) == pytest.approx(float(singular[3:].norm()), rel=1e-5)


def test_distances_are_right_far_below_the_precision_of_float32_squares():
    pair = factors(lora(1)[Q])
    for shift in (1e-2, 1e-4, 1e-6):
        near = pair[0] * (1 + shift), pair[1].clone() * (1 + shift)
        share = (squared_distance(near, pair) / squared_distance((0 * pair[0], pair[1]), pair)) ** 0.5
        assert share == pytest.approx(2 * shift, rel=0.2)


# ---- other rules ----


def test_ties_trims_elects_signs_and_averages_those_that_agree():
    a = torch.tensor([[4.0, -3.0, 0.1, 2.0]])
    b = torch.tensor([[2.0, 5.0, -4.0, 0.2]])
    # kept: 4 -3 . .  /  . 5 -4 .    elected: + + -
    torch.testing.assert_close(ties([a, b], 0.5), torch.tensor([[4.0, 5.0, -4.0, 0.0]]))
    torch.testing.assert_close(ties([a, b], 1.0), torch.tensor([[3.0, 5.0, -4.0, 1.1]]))
    torch.testing.assert_close(ties([a, a], 1.0), a)


def test_dare_keeps_the_mean_and_follows_the_seed_alone():
    delta = torch.ones(200, 200)
    dropped = dare(delta, 0.25, rng(0))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)
    sources = [("a", lora(1), 0.7), ("b", lora(2), 0.8)]
    deltas = [mix(sources, "dare", seed=seed).modules[Q].delta() for seed in (5, 5, 6)]
    assert torch.equal(deltas[0], deltas[1]) and not torch.equal(deltas[0], deltas[2])
    assert mix(sources, "dare", density=1.0, rank=8).error() < 1e-5


def test_linear_is_right_for_one_file_wrong_for_two_and_needs_equal_ranks():
    a, b = lora(1), lora(2)
    for weight in (0.5, -0.5, 0.0):
        one = mix([("", a, weight)], "linear").modules[Q].delta()
        torch.testing.assert_close(one, weight * a[Q].delta(), rtol=1e-5, atol=1e-5)
    wrong = mix([("", a, 0.7), ("", b, 0.8)], "linear")
    assert wrong.error() > 0.5
    assert relative(wrong.modules[Q].delta(), weighted(Q, (a, 0.7), (b, 0.8))) == pytest.approx(
        wrong.error(Q), rel=1e-4
    )
    with pytest.raises(UserError, match="equal ranks.*3, 4"):
        mix([("", a, 1.0), ("", lora(2, rank=3), 1.0)], "linear")


def test_files_of_different_bases_and_dora_are_refused():
    other = {K: LoraPair(torch.ones(4, 32), torch.ones(24, 4), 4.0)}
    with pytest.raises(UserError, match="a .* and b .* different base models"):
        mix([("a", lora(1), 1.0), ("b", other, 1.0)], "exact")
    # no module in common, but text of another width
    apart = {K.replace("to_k", "to_v"): LoraPair(torch.ones(4, 32), torch.ones(24, 4), 4.0)}
    with pytest.raises(UserError, match="different base models"):
        mix([("a", lora(1, names=(Q, K)), 1.0), ("b", apart, 1.0)], "exact")
    real = {K: LoraPair(torch.ones(4, 768), torch.ones(24, 4), 4.0)}
    with pytest.raises(UserError, match=r"a \(Stable Diffusion 1.x\) and b \(Stable Diffusion 2.x\)"):
        mix(
            [("a", real, 1.0), ("b", {K: LoraPair(torch.ones(4, 1024), torch.ones(24, 4), 4.0)}, 1.0)],
            "exact",
        )
    dora = {Q: dataclasses.replace(lora(1)[Q], magnitude=torch.ones(24))}
    for action in (lambda: mix([("a", dora, 1.0)], "exact"), lambda: scaled(dora, 0.5)):
        with pytest.raises(UserError, match="DoRA"):
            action()


# ---- verbs on files ----


def test_bytes_in_pieces_are_those_of_the_library():
    tensors = {
        name: torch.ones(3).to(getattr(torch, name)) for name in ("float32", "float16", "bfloat16", "int64")
    }
    tensors |= {
        "b": torch.ones(2, 3),
        "a": torch.tensor(2.0),
        "bool": torch.ones(1, dtype=torch.bool),
        "e": torch.ones(0),
    }
    assert b"".join(chunks(tensors, {"k": "v"})) == safetensors.torch.save(tensors, {"k": "v"})
    assert serialize({"t": torch.ones(2, 3).T}, {}) == safetensors.torch.save({"t": torch.ones(3, 2)})


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_mix_writes_the_sum_and_says_of_what(tmp_path, capsys, layout):
    a, b = lora(1, alpha=2.0), lora(2, rank=2)
    config = {"lorakit.config": "{}", "ss_v2": "False", "ss_training_started_at": "1"}
    names = [write(tmp_path / f"{n}.safetensors", m, layout, config) for n, m in (("a", a), ("b", b))]
    out = tmp_path / "c.safetensors"
    text = run(capsys, "mix", f"{names[0]}=0.7", f"{names[1]}=-0.3", f"out={out}", f"format={layout}")
    assert "wrote" in text and re.search(r"error +\d\.\d\de[+-]\d\d \(relative Frobenius\); worst", text)
    file = read_lora(out)
    assert file.layout == layout
    for name, pair in file.modules.items():
        assert relative(pair.delta(), weighted(name, (a, 0.7), (b, -0.3))) < 1e-6
    assert file.metadata["modelspec.merged_from"] == "0.7 * a.safetensors + -0.3 * b.safetensors (exact)"
    assert file.metadata["ss_v2"] == "False" and file.metadata["ss_network_dim"] == "6"
    assert not {"lorakit.config", "ss_training_started_at"} & file.metadata.keys()
    assert str(tmp_path) not in json.dumps(file.metadata)
    assert out.read_bytes() == lora_bytes(file.modules, layout=layout, metadata=file.metadata)


def test_nothing_is_overwritten_unless_asked_and_faults_are_one_message(tmp_path, capsys):
    path = write(tmp_path / "a.safetensors", lora(1))
    before = (tmp_path / "a.safetensors").read_bytes()
    cases = [
        (["mix", path, f"out={path}"], "exists; .*overwrite=true"),
        (["mxi", path], "did you mean mix"),
        (["mix", f"{path}=strong", "out=x.safetensors"], "weight after = is no number"),
        (["mix", f"{path}=inf", "out=x.safetensors"], "weight after = is no number"),
        (["mix", path, "rnk=3", "out=x.safetensors"], "did you mean rank"),
        (["mix", path, "rank=3", "out=x.safetensors"], "choose method svd"),
        (["mix", path, "out=x.ckpt"], "out"),
        (["mix", path], "out: missing"),
        (["mix", str(tmp_path / "none.safetensors"), "out=x.safetensors"], "no such file"),
        (["scale", path, "out=x.safetensors"], "say by what"),
        (["scale", path, path, "out=x.safetensors"], "not 2 files"),
        (["resize", path, "out=x.safetensors"], "give rank, energy"),
        (["convert", path, "rank=2", "out=x.safetensors"], "use resize"),
        (["diff", path], "not 1 files"),
        (["retrain", path], "no training config"),
    ]
    for argv, message in cases:
        with pytest.raises(UserError, match=message):
            mix_lora.main(argv)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    run(capsys, "scale", f"{path}=0.5", f"out={path}", "overwrite=true")
    assert torch.equal(read_lora(path).modules[Q].delta(), 0.5 * lora(1)[Q].delta())


def test_every_verb_that_is_described_runs():
    assert list(mix_lora.RUN) == list(VERBS)


def test_a_path_may_hold_an_equals_sign(tmp_path, capsys):
    (tmp_path / "lr=1").mkdir()
    path = write(tmp_path / "lr=1" / "w=2", lora(1))
    assert parse_file(path) == (path, None) and parse_file(f"{path}=-2e-1") == (path, -0.2)
    assert "rank        4, alpha 4: 4 modules" in run(capsys, "inspect", path)


def test_a_long_setting_is_no_path(tmp_path):
    path, long = write(tmp_path / "a.safetensors", lora(1)), "x" * 300
    assert parse_file(f"{long}=0.5") == (long, 0.5)
    with pytest.raises(ConfigError, match="note: unknown key"):
        mix_lora.main(["mix", path, f"out={tmp_path / 'b.safetensors'}", f"note={long}"])


def test_check_reads_and_writes_nothing(tmp_path, capsys):
    path = write(tmp_path / "a.safetensors", lora(1))
    out = tmp_path / "b.safetensors"
    assert "1 LoRA files" in run(capsys, "mix", path, f"out={out}", "--check")
    assert not out.exists()


def test_resize_tells_the_kept_energy_and_diffusers_reads_the_mixed_ranks(tmp_path, capsys, tiny_unet):
    model = tiny_unet()
    for parameter in add_lora(model, rank=4, alpha=2.0, targets="attention+ff"):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng(parameter.numel()))
    path = write(tmp_path / "a.safetensors", extract(model, "unet"))
    out = tmp_path / "b.safetensors"
    text = run(capsys, "resize", path, "energy=0.8", f"out={out}")
    kept = float(re.search(r"kept energy ([\d.]+)%", text)[1])
    resized = read_lora(out).modules
    assert 80 <= kept < 100 and len({pair.rank for pair in resized.values()}) > 1
    live = tiny_unet()
    load_lora(out, live, adapter_name="default")
    assert verify_in_diffusers(out, live) < 1e-5


@pytest.mark.parametrize("alpha", [1.0, 2.5, 4.0])
def test_convert_there_and_back_is_the_same_change_with_alpha_in_the_matrices(tmp_path, capsys, alpha):
    told = {"ss_tag_frequency": "{}", "ss_base_model_version": "sd_v2"}
    first = write(tmp_path / "a.safetensors", lora(1, alpha=alpha), metadata=told)
    files = [tmp_path / f"{name}.safetensors" for name in ("k", "d", "back", "folded", "again")]
    kohya, diffusers, back, folded, again = files
    for source, out, *keys in [
        (first, kohya),
        (kohya, diffusers, "format=diffusers"),
        (diffusers, back),
        (kohya, folded, "fold_alpha=true"),
        (folded, again, "fold_alpha=true"),
    ]:
        run(capsys, "convert", source, f"out={out}", *keys)
    assert read_lora(diffusers).layout == "diffusers"
    assert back.read_bytes() == folded.read_bytes() == again.read_bytes()
    assert (kohya.read_bytes() == folded.read_bytes()) == (alpha == 4.0)
    kept, converted = read_lora(kohya), read_lora(back)
    assert told.items() <= converted.metadata.items() and "ss_v2" not in converted.metadata
    for name, pair in lora(1, alpha=alpha).items():
        assert torch.equal(kept.modules[name].up, pair.up) and kept.modules[name].alpha == alpha
        found = converted.modules[name]
        assert found.alpha == 4 and torch.equal(found.up, pair.up * (alpha / 4))
        # What a reader sees that knows no alpha.
        torch.testing.assert_close(found.delta(), pair.delta(), rtol=1e-5, atol=1e-6)
        flat = found.up.flatten(1) @ found.down.flatten(1)
        torch.testing.assert_close(flat, pair.delta().flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_verb_takes_float8_and_writes_the_numbers_as_float16(tmp_path, capsys, dtype):
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pair = lora(1)[Q]
    down, up = (tensor.to(dtype) for tensor in (pair.down, pair.up))
    tensors = {f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up, f"{Q}.alpha": torch.tensor(4.0)}
    safetensors.torch.save_file(tensors, path)
    wanted = up.double() @ down.double()
    other = write(tmp_path / "c.safetensors", lora(2, names=(Q,)))
    for argv, factor, kind in [
        (["scale", f"{path}=0.5"], 0.5, torch.float16),
        (["convert", path], 1.0, torch.float16),
        (["resize", path, "rank=4"], 1.0, torch.float16),
        (["mix", f"{path}=-2"], -2.0, torch.float16),
        (["mix", path, f"{other}=0"], 1.0, torch.float32),
    ]:
        run(capsys, *argv, f"out={out}", "overwrite=true")
        found = read_lora(out).modules[Q]
        assert found.up.dtype == kind and relative(found.delta(), factor * wanted) < 2e-3
    said = run(capsys, "inspect", path)
    assert f" MB, {str(dtype).removeprefix('torch.')}, " in said and " MB, float16" not in said
    half = write(out, lora(1, names=(Q,), dtype=torch.float16))
    assert " MB, float16, " in run(capsys, "inspect", half)


def test_a_folder_of_peft_is_inspected_and_converted_at_its_strength(tmp_path, capsys):
    folder, out = tmp_path / "style", tmp_path / "b.safetensors"
    folder.mkdir()
    pair = lora(1)[Q]
    stem = f"base_model.model.{BLOCK}.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up}
    (folder / "adapter_model.safetensors").write_bytes(serialize(tensors, {}))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 16}')
    assert "rank        4, alpha 16: 1 modules" in run(capsys, "inspect", folder)
    assert "unknown" not in run(capsys, "convert", folder, f"out={out}")
    assert relative(read_lora(out).modules[Q].delta(), 4 * (pair.up @ pair.down).double()) < 1e-6
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    assert "strength is unknown" in run(capsys, "convert", bare, f"out={tmp_path / 'c.safetensors'}")


def test_convert_warns_of_differing_alphas_and_refuses_dora_in_kohya(tmp_path, capsys):
    path = write(tmp_path / "a.safetensors", lora(1, names=(Q,)) | lora(1, alpha=1.0, names=(K,)))
    assert "diffusers 0.42 misreads" in run(capsys, "convert", path, f"out={tmp_path / 'b.safetensors'}")
    assert "misreads" not in run(capsys, "mix", path, f"out={tmp_path / 'c.safetensors'}")
    dora = {Q: dataclasses.replace(lora(1)[Q], magnitude=torch.ones(24))}
    path = write(tmp_path / "d.safetensors", dora, "diffusers")
    with pytest.raises(UserError, match="format=diffusers"):
        mix_lora.main(["convert", path, f"out={tmp_path / 'e.safetensors'}"])
    assert "DoRA" in run(capsys, "inspect", path)


def test_inspect_diff_and_retrain_tell_what_is_there(tmp_path, capsys):
    a = write(tmp_path / "a.safetensors", lora(1), metadata={"lorakit.config": '{"rank": 4, "seed": 1}'})
    b = write(
        tmp_path / "b.safetensors",
        scaled(lora(1), -2.0),
        metadata={"lorakit.config": '{"rank": 4, "seed": 2}'},
    )
    text = run(capsys, "inspect", a)
    total = sum(pair.delta().double().square().sum() for pair in lora(1).values()).sqrt()
    for part in (
        "layout      kohya",
        "unet: 2 attention, 1 convolution",
        "text_encoder: 1 feed-forward",
        "width 16",
    ):
        assert part in text
    assert (
        f"norm        {total:.5g} over all" in text and "config      seed = 1" in text and "matches" in text
    )
    assert len([line for line in text.splitlines() if re.search(r" +4 +4 +[\d.]+$", line)]) == 4
    text = run(capsys, "diff", a, b)
    assert (
        "config      seed: 1 -> 2" in text
        and "cosine      -1.0000; relative distance ||2 - 1|| / ||1|| = 3" in text
    )
    out = tmp_path / "again.json"
    run(capsys, "retrain", a, f"out={out}")
    assert json.loads(out.read_text()) == {"rank": 4, "seed": 1}
    assert json.loads(run(capsys, "retrain", a)) == {"rank": 4, "seed": 1}


def test_inspect_finds_a_flipped_byte(tmp_path, capsys):
    path = write(tmp_path / "a.safetensors", lora(1))
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-7] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    assert "hash        DIFFERS" in run(capsys, "inspect", path)


# ---- numbered modules ----


@pytest.fixture(scope="module")
def sd15():
    """Stable Diffusion 1.5's U-Net by its config, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280))


def numbered(model, classes):
    """Linear layers and convolutions in the order in which a walk over such modules meets them."""
    found = []
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            layers = ((inner, each) for inner, each in module.named_modules())
            found += [
                f"{name}.{i}" for i, each in layers if isinstance(each, (torch.nn.Linear, torch.nn.Conv2d))
            ]
    return found


def positional(tmp_path, model, names, classes, text=48):
    tensors = {}
    for index, name in enumerate(names):
        shape = model.get_submodule(name).weight.shape
        tensors[f"unet:{index}:down"] = torch.full((1, *shape[1:]), float(index + 1), dtype=torch.float16)
        tensors[f"unet:{index}:up"] = torch.ones(shape[0], 1, *[1] * (len(shape) - 2), dtype=torch.float16)
    for index in range(text):
        tensors |= {
            f"text_encoder:{index}:{half}": torch.full((1, 1), index + 1.0) for half in ("down", "up")
        }
    path = tmp_path / "numbered.safetensors"
    path.write_bytes(serialize(tensors, {"unet": json.dumps(sorted(classes)), "unet:0:rank": "1"}))
    return path


@pytest.mark.parametrize("old_order", [False, True])
@pytest.mark.parametrize("classes", [{"Attention", "GEGLU"}, {"Attention", "GEGLU", "ResnetBlock2D"}])
def test_numbered_modules_are_named_in_both_orders_of_diffusers(tmp_path, capsys, sd15, classes, old_order):
    names = numbered(sd15, classes)
    if old_order:  # the feed-forward between the two attentions
        for start in [i for i, name in enumerate(names) if name.endswith("attn2.to_q")]:
            names[start : start + 5] = [names[start + 4], *names[start : start + 4]]
    path = positional(tmp_path, sd15, names, classes | {"CrossAttention"})
    file, notes = read_any(path)
    assert len(file.modules) == len(names) + 48 and notes
    for index, name in enumerate(names):
        assert float(file.modules[kohya_name("unet", name)].down.flatten()[0]) == index + 1
    own = {"k_proj": 1, "v_proj": 2, "q_proj": 3, "out_proj": 4}
    for end, value in own.items():
        pair = file.modules[kohya_name("text_encoder", f"encoder.layers.1.self_attn.{end}")]
        assert float(pair.down) == 4 + value
    out = tmp_path / "named.safetensors"
    run(capsys, "convert", path, f"out={out}")
    assert (
        read_lora(out).modules.keys() == file.modules.keys() and "unet:0:rank" not in read_lora(out).metadata
    )


def test_the_order_within_clip_is_that_of_transformers(tiny_text_encoder):
    names = numbered(tiny_text_encoder(), {"CLIPAttention"})
    ends = [name.rsplit(".", 1)[1] for name in names]
    assert ends == ["k_proj", "v_proj", "q_proj", "out_proj"] * 2


def test_numbered_modules_of_another_model_are_refused(tmp_path, sd15):
    names = numbered(sd15, {"Attention", "GEGLU"})
    for wrong in (names[:-1], names[1:] + names[:1]):
        with pytest.raises(UserError, match="cannot be named"):
            read_any(positional(tmp_path, sd15, wrong, {"Attention", "GEGLU"}))


# ---- LoHa and LoKr ----


def lycoris(tmp_path, name, tensors, alpha=2.0, prefix=""):
    path = tmp_path / "lycoris.safetensors"
    tensors = {f"{prefix or name}.{slot}": tensor for slot, tensor in tensors.items()}
    path.write_bytes(serialize(tensors | {f"{prefix or name}.alpha": torch.tensor(alpha)}, {}))
    return path


def normal(*shape, seed):
    return torch.randn(shape, generator=rng(seed))


def loha_linear():
    slots = ("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b")
    part = {slot: normal(24, 3, seed=i) for i, slot in enumerate(slots[0])}
    part |= {slot: normal(3, 20, seed=i + 5) for i, slot in enumerate(slots[1])}
    dense = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"]) * (2.0 / 3)
    return Q, part, dense


def loha_tucker():
    part = {f"hada_t{i}": normal(2, 2, 3, 3, seed=i) for i in (1, 2)}
    part |= {f"hada_w{i}_a": normal(2, 12, seed=i + 5) for i in (1, 2)}
    part |= {f"hada_w{i}_b": normal(2, 8, seed=i + 9) for i in (1, 2)}
    halves = [
        torch.einsum("ijkl,ip,jq->pqkl", *(part[f"hada_{key}"] for key in (f"t{i}", f"w{i}_a", f"w{i}_b")))
        for i in (1, 2)
    ]
    return CONV, part, halves[0] * halves[1]


def loha_conv():
    part = {f"hada_w{i}_a": normal(12, 2, seed=i) for i in (1, 2)}
    part |= {f"hada_w{i}_b": normal(2, 72, seed=i + 5) for i in (1, 2)}
    dense = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
    return CONV, part, dense.reshape(12, 8, 3, 3)


def lokr_low_rank():
    part = {
        "lokr_w1": normal(4, 5, seed=1),
        "lokr_w2_a": normal(6, 2, seed=2),
        "lokr_w2_b": normal(2, 4, seed=3),
    }
    return Q, part, torch.kron(part["lokr_w1"], part["lokr_w2_a"] @ part["lokr_w2_b"])


def lokr_whole():  # alpha counts for nothing
    part = {"lokr_w1": normal(4, 5, seed=1), "lokr_w2": normal(6, 4, seed=2)}
    return Q, part, torch.kron(part["lokr_w1"], part["lokr_w2"])


def lokr_conv():
    part = {
        "lokr_w1_a": normal(4, 2, seed=1),
        "lokr_w1_b": normal(2, 2, seed=2),
        "lokr_w2": normal(3, 4, 3, 3, seed=3),
    }
    first = (part["lokr_w1_a"] @ part["lokr_w1_b"])[:, :, None, None]
    return CONV, part, torch.kron(first, part["lokr_w2"])


def lokr_tucker():
    part = {"lokr_w1": normal(4, 2, seed=1), "lokr_t2": normal(2, 2, 3, 3, seed=2)}
    part |= {"lokr_w2_a": normal(2, 3, seed=3), "lokr_w2_b": normal(2, 4, seed=4)}
    second = torch.einsum("ijkl,ip,jq->pqkl", part["lokr_t2"], part["lokr_w2_a"], part["lokr_w2_b"])
    return CONV, part, torch.kron(part["lokr_w1"][:, :, None, None], second.contiguous())


FORMS = [loha_linear, loha_tucker, loha_conv, lokr_low_rank, lokr_whole, lokr_conv, lokr_tucker]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_loha_and_lokr_are_expanded_to_their_dense_formula(tmp_path, form):
    name, part, dense = form()
    file, notes = read_any(lycoris(tmp_path, name, part), energy=1.0)
    assert file.modules[name].delta().shape == dense.shape
    assert relative(file.modules[name].delta(), dense.double()) < 1e-5
    assert file.layout == form.__name__[:4] and "kept energy 100.0000%" in notes[0]
    part = {slot: -tensor if slot.endswith("w1_a") else tensor for slot, tensor in part.items()}
    changed, _ = read_any(
        lycoris(tmp_path, name, part | {next(iter(part)): -1.5 * part[next(iter(part))]}), energy=1.0
    )
    assert relative(changed.modules[name].delta(), dense.double()) > 0.1


def test_convert_makes_a_lora_of_loha_and_tells_the_energy_it_kept(tmp_path, capsys):
    name, part, dense = loha_linear()
    prefix = name.replace("lora_unet_", "lycoris_")
    out = tmp_path / "b.safetensors"
    text = run(capsys, "convert", lycoris(tmp_path, name, part, prefix=prefix), f"out={out}", "rank=4")
    pair = read_lora(out).modules[name]
    assert pair.rank == 4
    kept = float(re.search(r"kept energy ([\d.]+)%", text)[1]) / 100
    assert 1 - kept == pytest.approx(relative(pair.delta(), dense.double()) ** 2, rel=1e-3)
    assert 0.5 < kept < 1


@pytest.mark.parametrize("broken", ["missing", "foreign", "shapes"])
def test_a_broken_lycoris_file_is_one_message(tmp_path, broken):
    name, part, _ = loha_linear()
    if broken == "missing":
        del part["hada_w2_b"]
    elif broken == "foreign":
        part["diff_b"] = torch.ones(3)
    else:
        part["hada_w1_b"] = torch.ones(4, 19)
    with pytest.raises(UserError, match=f"{name} is not LoHa or LoKr"):
        read_any(lycoris(tmp_path, name, part))


# ---- bases ----


@pytest.fixture(scope="module")
def trained_pairs(tiny_unet, tiny_text_encoder):
    """A LoRA that fits the tiny base, text encoder and convolutions included."""
    modules = {}
    for component, model in (
        ("unet", tiny_unet()),
        ("text_encoder", tiny_text_encoder(vocab_size=199, max_position_embeddings=32)),
    ):
        for parameter in add_lora(model, rank=4, alpha=2.0, targets="all"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng(parameter.numel()))
        modules |= extract(model, component)
    return modules


def parts(folder):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    return UNet2DConditionModel.from_pretrained(folder / "unet"), CLIPTextModel.from_pretrained(
        folder / "text_encoder"
    )


@torch.no_grad()
def outputs(unet, text_encoder):
    states = text_encoder(torch.randint(199, (1, 9), generator=rng(1))).last_hidden_state
    return unet(torch.randn(1, 4, 8, 8, generator=rng(0)), 300, states).sample, states


def weights(folder, component):
    file = next((folder / component).glob("*.safetensors"))
    return safetensors.torch.load_file(file)


def test_a_merged_base_acts_as_the_adapters_and_subtracting_gives_the_base_back(
    tmp_path, capsys, tiny_base, trained_pairs
):
    path = write(tmp_path / "a.safetensors", trained_pairs)
    other = write(
        tmp_path / "b.safetensors", scaled({n: p for n, p in trained_pairs.items() if "attn" in n}, 0.5)
    )
    merged, back = tmp_path / "merged", tmp_path / "back"
    text = run(capsys, "merge", tiny_base, f"{path}=0.8", f"{other}=-0.5", f"out={merged}")
    assert "rounding    to float32" in text
    live = parts(tiny_base)
    before = outputs(*live)
    load_lora(path, *live, adapter_name="a", weight=0.8)
    load_lora(other, *live, adapter_name="b", weight=-0.5)
    wanted = outputs(*live)
    for found, due, base in zip(outputs(*parts(merged)), wanted, before, strict=True):
        torch.testing.assert_close(found, due, rtol=0, atol=1e-5)
        assert float((found - base).abs().max()) > 1e-2
    run(capsys, "merge", merged, f"{path}=-0.8", f"{other}=0.5", f"out={back}")
    for component in ("unet", "text_encoder"):
        original, returned = weights(tiny_base, component), weights(back, component)
        assert original.keys() == returned.keys()
        for key, tensor in original.items():
            torch.testing.assert_close(returned[key], tensor, rtol=0, atol=1e-6)
    for part in ("vae", "tokenizer", "scheduler", "model_index.json"):
        files = [tiny_base / part] if part.endswith(".json") else (tiny_base / part).iterdir()
        assert all((merged / each.relative_to(tiny_base)).read_bytes() == each.read_bytes() for each in files)


def test_only_changed_components_are_rewritten_and_stale_weights_are_left_out(
    tmp_path, capsys, tiny_base, trained_pairs
):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    half = {key: tensor.half() for key, tensor in weights(base, "unet").items()}
    safetensors.torch.save_file(half, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for stale in ("unet/diffusion_pytorch_model.bin", "v1-5.ckpt"):
        (base / stale).write_bytes(b"old")
    unet_only = {name: pair for name, pair in trained_pairs.items() if name.startswith("lora_unet_")}
    path, out = write(tmp_path / "a.safetensors", unet_only), tmp_path / "out"
    text = run(capsys, "merge", base, path, f"out={out}")
    assert "left out    unet/diffusion_pytorch_model.bin" in text and "left out    v1-5.ckpt" in text
    rounding = float(re.search(r"rounding    to float16, float32: ([\d.e-]+)", text)[1])
    assert 1e-5 < rounding < 1e-1
    name = "diffusion_pytorch_model.fp16.safetensors"
    merged, exact = safetensors.torch.load_file(out / "unet" / name), weights(tiny_base, "unet")
    key = f"{BLOCK}.attn1.to_q.weight"
    assert merged[key].dtype == torch.float16
    wanted = half[key].float() + unet_only[Q].delta()
    assert torch.equal(merged[key], wanted.half()) and not torch.equal(merged[key], exact[key].half())
    assert torch.equal(merged["conv_norm_out.weight"], half["conv_norm_out.weight"])
    text_file = "text_encoder/model.safetensors"
    assert (out / text_file).read_bytes() == (base / text_file).read_bytes()


def test_merging_with_weight_0_gives_the_same_bytes_from_shards_too(
    tmp_path, capsys, tiny_base, trained_pairs
):
    from diffusers import UNet2DConditionModel

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    shutil.rmtree(base / "unet")
    UNet2DConditionModel.from_pretrained(tiny_base / "unet").save_pretrained(
        base / "unet", max_shard_size="60KB"
    )
    shards = sorted((base / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    path = write(tmp_path / "a.safetensors", trained_pairs)
    for weight, same in ((0, True), (1, False)):
        out = tmp_path / f"out{weight}"
        run(capsys, "merge", base, f"{path}={weight}", f"out={out}")
        equal = [(out / "unet" / shard.name).read_bytes() == shard.read_bytes() for shard in shards]
        assert all(equal) if same else not any(equal)
    live = parts(tiny_base)
    load_lora(path, *live, adapter_name="a")
    torch.testing.assert_close(outputs(*parts(tmp_path / "out1"))[0], outputs(*live)[0], rtol=0, atol=1e-5)


def test_a_merge_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, tiny_base, trained_pairs):
    good = write(tmp_path / "a.safetensors", trained_pairs)
    pair = trained_pairs[Q]
    lost = write(
        tmp_path / "lost.safetensors", trained_pairs | {Q.replace("mid_block", "down_blocks_7"): pair}
    )
    wide = dataclasses.replace(pair, down=torch.ones(4, 99))
    misfit = write(tmp_path / "misfit.safetensors", {Q: wide})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    cases = [
        ([tiny_base, lost, f"out={tmp_path / 'o'}"], "1 of .* no place in its unet"),
        ([tiny_base, misfit, f"out={tmp_path / 'o'}"], "does not fit"),
        ([tiny_base, good, f"out={tiny_base}", "overwrite=true"], "the base itself"),
        ([tiny_base, good, f"out={tiny_base / 'unet' / 'x'}"], "inside it"),
        ([tiny_base, good, f"out={tmp_path / 'mine'}"], "exists"),
        ([tiny_base, good, f"out={tmp_path / 'mine'}", "overwrite=true"], "no base folder"),
        ([good, good, f"out={tmp_path / 'o'}"], "is a LoRA, not a base"),
    ]
    for argv, message in cases:
        with pytest.raises(UserError, match=message):
            mix_lora.main(["merge", *map(str, argv)])
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "mine" / "photo.png").exists()


def test_a_merge_that_breaks_midway_leaves_the_old_folder(
    tmp_path, capsys, monkeypatch, tiny_base, trained_pairs
):
    path, out = write(tmp_path / "a.safetensors", trained_pairs), tmp_path / "out"
    run(capsys, "merge", tiny_base, f"{path}=0.5", f"out={out}")
    before = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    names = sorted(tmp_path.iterdir())
    run(capsys, "merge", tiny_base, f"{path}=0.4", f"out={out}", "overwrite=true")
    after = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert after != before and sorted(tmp_path.iterdir()) == names
    monkeypatch.setattr("lorakit.weights.merging.tensor_bytes", lambda tensor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mix_lora.main(["merge", str(tiny_base), path, f"out={out}", "overwrite=true"])
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == after
    assert sorted(tmp_path.iterdir()) == names


@pytest.mark.quick
def test_extract_finds_the_lora_that_was_merged(tmp_path, capsys, tiny_base, trained_pairs):
    path, merged = write(tmp_path / "a.safetensors", trained_pairs), tmp_path / "merged"
    run(capsys, "merge", tiny_base, path, f"out={merged}")
    out = tmp_path / "b.safetensors"
    text = run(capsys, "extract", tiny_base, merged, "rank=4", f"out={out}")
    assert "outside     0.00%" in text
    found = read_lora(out).modules
    assert found.keys() == trained_pairs.keys()
    for name, pair in trained_pairs.items():
        assert relative(found[name].delta(), pair.delta().double()) < 1e-4
    text = run(
        capsys,
        "extract",
        tiny_base,
        merged,
        "rank=1",
        "targets=attention",
        f"out={tmp_path / 'c.safetensors'}",
    )
    assert 0 < float(re.search(r"outside +([\d.]+)%", text)[1]) < 100
    assert 10 < float(re.search(r"kept energy ([\d.]+)%", text)[1]) < 99
    with pytest.raises(UserError, match="do not differ"):
        mix_lora.main(
            ["extract", str(tiny_base), str(tiny_base), "rank=1", f"out={tmp_path / 'd.safetensors'}"]
        )


def test_extract_refuses_bases_of_different_make(tmp_path, tiny_base, tiny_unet):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tiny_unet(block_out_channels=(16, 32)).save_pretrained(other / "unet")
    with pytest.raises(UserError, match="differ in architecture: unet"):
        mix_lora.main(["extract", str(tiny_base), str(other), "rank=1", f"out={tmp_path / 'x.safetensors'}"])


def test_a_mixed_file_drives_a_model_as_its_parts_together(tmp_path, capsys, tiny_unet):
    files, pairs = [], []
    for seed in (1, 2):
        model = tiny_unet()
        for parameter in add_lora(model, rank=4, alpha=8.0, targets="attention", seed=seed):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng(parameter.numel() + seed))
        pairs.append(extract(model, "unet"))
        files.append(write(tmp_path / f"{seed}.safetensors", pairs[-1]))
    out = tmp_path / "mixed.safetensors"
    run(capsys, "mix", f"{files[0]}=0.7", f"{files[1]}=-0.2", f"out={out}")
    apart, together = tiny_unet(), tiny_unet()
    load_lora(files[0], apart, adapter_name="a", weight=0.7)
    load_lora(files[1], apart, adapter_name="b", weight=-0.2)
    load_lora(out, together, adapter_name="default")
    inputs = torch.randn(1, 4, 8, 8, generator=rng(0)), 300, torch.randn(1, 5, 16, generator=rng(1))
    with torch.no_grad():
        torch.testing.assert_close(together(*inputs).sample, apart(*inputs).sample, rtol=0, atol=1e-5)
    assert verify_in_diffusers(out, together) == 0.0


def test_numbers_that_overflow_are_refused_and_large_ones_are_not():
    up, down = torch.randn(8, 4), torch.randn(4, 8)
    assert truncate((up * 1e15, down * 1e15), rank=2)[0].isfinite().all()
    with pytest.raises(UserError, match="overflows"):
        truncate((up * float("inf"), down), rank=2)
    for large in (1e20, 1e38):  # the factors hold these, their product does not
        for seed in range(20):
            torch.manual_seed(seed)
            with pytest.raises(UserError, match="overflows"):
                truncate((torch.randn(8, 4) * large, torch.randn(4, 8) * large), rank=2)
