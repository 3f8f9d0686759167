"""Going on from somebody's LoRA: init_lora starts with its change, base_loras are part of the base."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train_lora
from lorakit.diffusion.models import Base
from lorakit.ground.config import load_config
from lorakit.ground.errors import UserError
from lorakit.training.config import TrainConfig
from lorakit.training.start import settled
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import LoraFile, LoraPair, lora_bytes
from lorakit.weights.lora_reader import read_lora


def config_of(arguments: list[str], path: str | None = None) -> TrainConfig:
    return load_config(TrainConfig, path, arguments).config


def write(path: Path, file: LoraFile, layout="kohya") -> str:
    path.write_bytes(lora_bytes(file.modules, layout=layout, metadata={}))
    return str(path)


def deltas(path: Path | str) -> dict[str, torch.Tensor]:
    return {name: pair.delta() for name, pair in read_lora(path).modules.items()}


@pytest.fixture
def without_targets(settings):
    """The command line of a short run that sets neither rank nor targets."""

    def make(**changes) -> list[str]:
        unset = ("rank=", "target_modules=")
        return [
            word
            for word in settings(**changes)
            if not word.startswith(unset) or word.split("=")[0] in changes
        ]

    return make


@pytest.fixture
def start(tiny_unet, random_lora, tmp_path) -> str:
    """A LoRA of rank 3 and alpha 2 for the attention of the tiny base."""
    return write(tmp_path / "start.safetensors", random_lora(tiny_unet(), 7, rank=3, targets="attention"))


def train_from(arguments: list[str]) -> Path:
    """Train without a config file, whose rank and targets would be set."""
    from dataclasses import replace

    from lorakit.training.plan import make_plan

    cfg, notes = settled(config_of(arguments))
    plan = make_plan(cfg)
    run = Path(cfg.output_dir) / cfg.ckpt_name
    run.mkdir(parents=True)
    (path,) = train_lora.train(cfg, replace(plan, notes=(*plan.notes, *notes)), run)
    return path


# ---- init_lora ----


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_at_rate_0_the_change_that_went_in_comes_out(
    without_targets, tiny_unet, random_lora, tmp_path, layout
):
    file = random_lora(tiny_unet(), 7, rank=3, targets="attention")
    path = write(tmp_path / "start.safetensors", file, layout)
    out = read_lora(train_from(without_targets(init_lora=path, learning_rate=0.0))).modules
    assert out.keys() == file.modules.keys()
    for name, pair in file.modules.items():
        assert out[name].rank == 3 and out[name].alpha == pytest.approx(2.0)
        assert torch.equal(out[name].up, pair.up) and torch.equal(out[name].down, pair.down)


def test_at_another_rate_it_goes_on_from_there(without_targets, start, tmp_path):
    moved = deltas(train_from(without_targets(init_lora=start, learning_rate=1e-4)))
    before = deltas(start)
    far = {name: float((moved[name] - before[name]).norm() / before[name].norm()) for name in before}
    assert 0 < max(far.values()) < 0.2


def test_rank_alpha_and_targets_are_taken_unless_they_are_set(without_targets, start):
    cfg, notes = settled(config_of(without_targets(init_lora=start)))
    assert (cfg.rank, cfg.lora_alpha, cfg.target_modules) == (3, pytest.approx(2.0), "attention")
    assert "rank 3, lora_alpha 2" in notes[-1] and "target_modules attention" in notes[-1]
    cfg, _ = settled(config_of(without_targets(init_lora=start, rank=6, target_modules="all")))
    assert (cfg.rank, cfg.lora_alpha, cfg.target_modules) == (6, pytest.approx(4.0), "all")
    cfg, _ = settled(config_of(without_targets(init_lora=start, lora_alpha=1.0)))
    assert cfg.lora_alpha == 1.0
    plain = config_of(without_targets())
    assert settled(plain) == (plain, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 6},
        {"lora_alpha": 5.0},
        {"use_rslora": True},
        {"target_modules": "all"},
        {"rank": 5, "lora_alpha": 1.0},
    ],
)
def test_settings_of_ones_own_keep_the_change(without_targets, start, changes):
    out = deltas(train_from(without_targets(init_lora=start, learning_rate=0.0, **changes)))
    for name, delta in deltas(start).items():
        torch.testing.assert_close(out.pop(name), delta, rtol=1e-5, atol=1e-6)
    assert all(float(delta.abs().max()) == 0 for delta in out.values())
    assert bool(out) == ("target_modules" in changes)


def test_modules_of_several_ranks_and_scales_keep_their_changes(without_targets, start, tmp_path):
    modules = dict(read_lora(start).modules)
    first, second, *_ = modules
    modules[first] = LoraPair(modules[first].down[:1], modules[first].up[:, :1], 7.0)
    modules[second] = LoraPair(modules[second].down, modules[second].up, 0.5)
    path = write(tmp_path / "mixed.safetensors", LoraFile(modules, {}, "kohya"))
    out = read_lora(train_from(without_targets(init_lora=path, learning_rate=0.0))).modules
    assert {(pair.rank, round(pair.alpha, 5)) for pair in out.values()} == {(3, 2.0)}
    for name, pair in modules.items():
        torch.testing.assert_close(out[name].delta(), pair.delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [-2.0, 0.0])
def test_a_sign_is_kept_and_alpha_0_needs_an_alpha(without_targets, start, tmp_path, alpha):
    modules = {n: LoraPair(p.down, p.up, alpha) for n, p in read_lora(start).modules.items()}
    path = write(tmp_path / "other.safetensors", LoraFile(modules, {}, "kohya"))
    if alpha == 0:
        with pytest.raises(UserError, match="has alpha 0, so that it changes nothing: set lora_alpha"):
            settled(config_of(without_targets(init_lora=path)))
        cfg, _ = settled(config_of(without_targets(init_lora=path, lora_alpha=3.0)))
        assert cfg.lora_alpha == 3
        for entry, said in ((path, True), (start, False)):
            _, notes = settled(config_of(without_targets(base_loras=[{"path": entry}])))
            assert any("has alpha 0, so that it changes nothing" in note for note in notes) == said
        return
    out = read_lora(train_from(without_targets(init_lora=path, learning_rate=0.0))).modules
    assert all(pair.alpha == pytest.approx(2.0) for pair in out.values())
    for name, pair in modules.items():
        torch.testing.assert_close(out[name].delta(), pair.delta(), rtol=1e-5, atol=1e-6)


def test_directions_beyond_the_file_are_trained_too(without_targets, start):
    out = read_lora(train_from(without_targets(init_lora=start, rank=5, learning_rate=1e-2))).modules
    assert all(float(pair.up[:, 3:].abs().max()) > 0 for pair in out.values())


def test_a_text_encoder_in_the_file_is_trained_with_it(
    without_targets, tiny_unet, tiny_text_encoder, random_lora, tmp_path
):
    unet = random_lora(tiny_unet(), 7, rank=2, targets="attention")
    text = random_lora(tiny_text_encoder(), 8, component="text_encoder", rank=2, targets="attention")
    path = write(tmp_path / "both.safetensors", LoraFile(unet.modules | text.modules, {}, "kohya"))
    arguments = without_targets(init_lora=path, learning_rate=0.0)
    assert settled(config_of(arguments))[0].train_text_encoder
    out = deltas(train_from(arguments))
    assert out.keys() == deltas(path).keys()
    assert all(torch.equal(out[name], delta) for name, delta in deltas(path).items())
    with pytest.raises(UserError, match="changes the text encoder too"):
        settled(config_of(without_targets(init_lora=path, train_text_encoder=False)))


def test_targets_of_a_text_encoder_are_taken_with_more_of_the_unet_where_they_must(
    without_targets, tiny_unet, tiny_text_encoder, random_lora, tmp_path
):
    unet = random_lora(tiny_unet(), 7, rank=2, targets="attention")
    text = random_lora(tiny_text_encoder(), 8, component="text_encoder", rank=2, targets="all")
    for name, modules in (("both", unet.modules | text.modules), ("text", text.modules)):
        path = write(tmp_path / f"{name}.safetensors", LoraFile(modules, {}, "kohya"))
        words = without_targets(init_lora=path, learning_rate=0.0, output_dir=str(tmp_path / name))
        assert settled(config_of(words))[0].target_modules == "attention+ff"
        out = deltas(train_from(words))
        assert all(torch.equal(out.pop(each), delta) for each, delta in deltas(path).items())
        assert out and all(float(delta.abs().max()) == 0 for delta in out.values())


def test_what_clip_skip_drops_of_a_start_is_said(without_targets, tiny_text_encoder, random_lora, tmp_path):
    text = random_lora(tiny_text_encoder(), 8, component="text_encoder", rank=2, targets="all").modules
    path = write(tmp_path / "text.safetensors", LoraFile(text, {}, "kohya"))
    assert "layers that clip_skip" not in " ".join(settled(config_of(without_targets(init_lora=path)))[1])
    words = without_targets(init_lora=path, learning_rate=0.0, clip_skip=2)
    dropped = [name for name in text if "_layers_1_" in name]
    assert f"{len(dropped)} modules lie in layers that clip_skip 2 drops" in settled(config_of(words))[1][0]
    out = deltas(train_from(words))
    assert dropped and text.keys() - out.keys() == set(dropped)


def test_dora_goes_on_with_its_magnitudes_where_dora_is_asked_for(
    without_targets, tiny_unet, random_lora, tmp_path
):
    file = random_lora(tiny_unet(), 7, rank=2, targets="attention", use_dora=True)
    path = write(tmp_path / "dora.safetensors", file, "diffusers")
    with pytest.raises(UserError, match="is DoRA; set use_dora to true"):
        settled(config_of(without_targets(init_lora=path)))
    asked = dict(use_dora=True, save_format="diffusers", learning_rate=0.0)
    out = read_lora(train_from(without_targets(init_lora=path, **asked))).modules
    for name, pair in file.modules.items():
        for slot, tensor in pair.tensors().items():
            assert torch.equal(out[name].tensors()[slot].flatten(), tensor.flatten()), slot


def test_a_loha_file_is_a_start_as_well(without_targets, start, tmp_path):
    name = next(iter(read_lora(start).modules))
    side = read_lora(start).modules[name].up.shape[0]
    torch.manual_seed(0)
    halves = {
        f"hada_w{k}_{s}": torch.randn(*((side, 1) if s == "a" else (1, side))) for k in (1, 2) for s in "ab"
    }
    save_file(
        {f"{name}.{slot}": tensor for slot, tensor in halves.items()} | {f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "loha.safetensors",
    )
    delta = (halves["hada_w1_a"] @ halves["hada_w1_b"]) * (halves["hada_w2_a"] @ halves["hada_w2_b"])
    path = train_from(without_targets(init_lora=str(tmp_path / "loha.safetensors"), learning_rate=0.0))
    torch.testing.assert_close(deltas(path)[name], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 2}, "rank 3, which 2 cannot hold"),
        ({"target_modules": ["to_q"]}, "not among target_modules"),
        ({"use_dora": True, "save_format": "diffusers"}, "has no magnitudes"),
        ({"pretrained_model_name_or_path": "ckpt/miniature"}, "has"),
    ],
)
def test_what_would_lose_something_is_refused(without_targets, start, changes, words):
    with pytest.raises(UserError, match=words):
        settled(config_of(without_targets(init_lora=start, **changes)))
    with pytest.raises(UserError, match="orthogonal"):
        config_of(without_targets(init_lora=start, init_lora_weights="orthogonal"))


def test_a_run_from_a_lora_stops_and_resumes_to_the_bit(settings, start, tmp_path):
    options = dict(init_lora=start, rank=4, target_modules="attention")
    assert train_lora.main(settings(output_dir=str(tmp_path / "straight"), **options)) == 0
    for steps, resume in ((3, False), (6, True)):
        words = settings(output_dir=str(tmp_path / "parts"), max_train_steps=steps, **options)
        assert train_lora.main([*words, f"resume_from_checkpoint={json.dumps(resume)}"]) == 0
    straight, parts = (tmp_path / name / "run.safetensors" for name in ("straight", "parts"))
    assert all(torch.equal(delta, deltas(parts)[name]) for name, delta in deltas(straight).items())


def test_the_plan_says_where_it_goes_on(settings, start, capsys):
    assert train_lora.main([*settings(init_lora=start, rank=4), "--check"]) == 0
    assert f"going on from {start}" in capsys.readouterr().out


# ---- base_loras ----


def test_the_base_is_the_one_with_the_lora_merged_in(tiny_base, tiny_unet, random_lora):
    from lorakit.diffusion.lora import load_lora

    file = random_lora(tiny_unet(), 7, rank=3, targets="all")
    merged = Base(inspect_base(str(tiny_base)), merged=[("x", file.modules, 0.7)]).unet
    beside = Base(inspect_base(str(tiny_base))).unet
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 32, 16)
    before = beside(x, 500, states).sample
    load_lora(file, beside, adapter_name="x", weight=0.7)
    after = beside(x, 500, states).sample
    torch.testing.assert_close(merged(x, 500, states).sample, after, rtol=1e-4, atol=1e-5)
    assert float((after - before).abs().max()) > 1e-2


@pytest.mark.slow(8)
def test_a_base_lora_is_trained_upon_and_is_no_part_of_the_file(
    settings, trained, tiny_unet, tiny_text_encoder, random_lora, tmp_path
):
    unet = random_lora(tiny_unet(), 7, rank=2, targets="all")
    text = random_lora(tiny_text_encoder(), 8, component="text_encoder", rank=2, targets="attention")
    path = write(tmp_path / "style.safetensors", LoraFile(unet.modules | text.modules, {}, "kohya"))
    base_loras = [{"path": path, "weight": 0.5}]
    plain = trained()
    still = trained(base_loras=base_loras, learning_rate=0.0, output_dir=str(tmp_path / "still"))
    assert all(float(delta.abs().max()) == 0 for delta in deltas(still).values())
    above = trained(base_loras=base_loras, output_dir=str(tmp_path / "above"))
    none = trained(base_loras=[{"path": path, "weight": 0.0}], output_dir=str(tmp_path / "none"))
    assert all(torch.equal(delta, deltas(none)[name]) for name, delta in deltas(plain).items())
    assert not all(torch.equal(delta, deltas(above)[name]) for name, delta in deltas(plain).items())
    # Text states lie in the same cache, and are those of the other text encoder.
    kept = trained(output_dir=str(tmp_path / "kept"))
    assert hashlib.sha256(kept.read_bytes()).digest() == hashlib.sha256(plain.read_bytes()).digest()
    with pytest.raises(UserError, match="base_loras: other files or weights"):
        train_lora.main(
            [
                *settings(base_loras=[], output_dir=str(tmp_path / "above"), max_train_steps=7),
                "resume_from_checkpoint=true",
            ]
        )


def test_a_base_lora_of_another_base_or_with_magnitudes_is_refused(
    settings, tiny_unet, random_lora, tmp_path
):
    dora = write(tmp_path / "dora.safetensors", random_lora(tiny_unet(), 7, use_dora=True), "diffusers")
    for path, words in ((dora, "is DoRA"), (dora, "has")):
        entry = [{"path": path}]
        base = {"pretrained_model_name_or_path": "ckpt/miniature"} if words == "has" else {}
        with pytest.raises(UserError, match=words):
            train_lora.main(settings(base_loras=entry, **base))
    with pytest.raises(UserError):
        train_lora.main(settings(base_loras=[{"path": str(tmp_path / "none.safetensors")}]))


@pytest.mark.parametrize("key", ["init_lora", "base_loras"])
def test_biases_are_refused_by_what_they_are_before_a_model_is_loaded(settings, tmp_path, key):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"
    path = tmp_path / "biases.safetensors"
    save_file({f"{name}.diff_b": torch.ones(64)}, path)
    value = str(path) if key == "init_lora" else [{"path": str(path)}]
    with pytest.raises(
        UserError, match=r"biases.safetensors: changes 1 biases and norms, .* `mix_lora.py merge`"
    ):
        train_lora.main([*settings(**{key: value}), "--check"])
