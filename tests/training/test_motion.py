"""The objective motion: what it trains, on which clips, what its files do, and the faults of its users."""

import json
import math
import sys
from pathlib import Path

import narrow
import pytest
import torch
from galleries import ONE_LEVEL, command_line, distance, pictures_in
from PIL import Image
from runs import config_of, steps_of, train_run
from safetensors import safe_open
from small import tiny_unet

import animate
import mix_lora
import train_lora
from lorakit.diffusion.lora import adapter_layers, add_lora, load_lora
from lorakit.diffusion.models import Base
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.ground.config import ConfigError, load_config
from lorakit.ground.errors import UserError
from lorakit.motion.filming import inflate
from lorakit.pictures.animation import save_animation
from lorakit.training.clips import StillClip
from lorakit.training.config import TrainConfig
from lorakit.training.motion import Carried, motion_weight
from lorakit.training.objectives import as_function
from lorakit.training.plan import make_plan, training_views
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import is_motion
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.motion_adapter import inspect_motion_adapter

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"objective": "motion", "target_modules": "temporal", "save_format": "diffusers", "lora_alpha": 8.0}


@pytest.fixture
def moving(settings, adapters):
    """Factory of the command line of a short run on clips of four frames, on the tiny base."""

    def make(motion=(), **changes):
        own = {"motion_adapter": adapters["folder"], "camera": {"zoom": 1.3}, "frames": 4, "takes": 2}
        return settings(**(KEYS | {"motion": own | dict(motion)} | changes))

    return make


@pytest.fixture(scope="module")
def opened(tiny_base, adapters):
    """Factory of the tiny base with the adapter in it."""

    def make() -> Base:
        info = inspect_base(str(tiny_base))
        base = Base(info)
        inflate(base, inspect_motion_adapter(adapters["folder"], info))
        return base

    return make


def answer(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 4, 8, 8, generator=generator)  # (B, F, C, h, w)
    states = torch.randn(2, 8, 16, generator=generator)
    with torch.no_grad():
        return as_function(unet)(x_t, torch.tensor([3, 700]), states)


# ---- what is trained ----


def test_the_preset_adapts_the_temporal_attention_alone_and_attention_would_not(opened):
    wanted = {"to_q", "to_k", "to_v", "to_out.0"}
    unet = opened().unet
    add_lora(unet, rank=2, alpha=2.0, targets="temporal")
    layers = adapter_layers(unet, "default")
    attentions = [name for name, _ in unet.named_modules() if is_motion(name) and name[-6:-1] == ".attn"]
    assert set(layers) == {f"{name}.{end}" for name in attentions for end in wanted} and attentions
    assert all(is_motion(name) for name, p in unet.named_parameters() if p.requires_grad)
    both = opened().unet
    add_lora(both, rank=2, alpha=2.0, targets="attention")
    assert set(layers) < set(adapter_layers(both, "default"))


@pytest.mark.slow
def test_a_run_leaves_the_base_and_the_adapter_as_they_are_and_changes_what_frames_tell_each_other(
    moving, opened, tmp_path
):
    (path,) = train_run(moving(sample_steps=6, sample_inference_steps=2, sample_seeds=[0]))
    modules = read_lora(path).modules
    assert modules and all(map(is_motion, modules))
    base = opened()
    before = {name: p.clone() for name, p in base.unet.named_parameters()}
    plain = answer(base.unet)
    assert load_lora(path, base.unet, adapter_name="a") == len(modules)
    changed = answer(base.unet)
    assert (changed - plain).abs().max() > 1e-3
    after = {name.replace(".base_layer", ""): p for name, p in base.unet.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [record["step"] for record in steps_of(tmp_path / "ckpt/run")] == [*range(1, 7)]
    strip = Image.open(tmp_path / "ckpt/run/samples/00000006-00.png")
    assert strip.size == (4 * 16, 16)


def test_the_student_sees_the_frames_of_a_clip_together(opened):
    """The order of frames counts, where a base alone would not know it."""
    unet = opened().unet
    generator = torch.Generator().manual_seed(0)
    x_t, states = torch.randn(1, 4, 4, 8, 8, generator=generator), torch.randn(1, 8, 16, generator=generator)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        frames = as_function(unet)(x_t, torch.tensor([500]), states)[:, order]
        mixed = as_function(unet)(x_t[:, order], torch.tensor([500]), states)
        alone = as_function(tiny_unet())
        one = torch.stack([alone(frame, torch.tensor([500]), states) for frame in x_t.unbind(1)], 1)
        two = torch.stack([alone(frame, torch.tensor([500]), states) for frame in x_t[:, order].unbind(1)], 1)
    assert (frames - mixed).abs().max() > 1e-2 and torch.equal(one[:, order], two)


def test_each_sample_is_a_still_and_a_take_that_follow_from_seed_and_position(moving):
    cfg = config_of(moving({"takes": 3, "camera": [{"pan": 0.2}, {"zoom": 1.2}]}))
    views = training_views(cfg, make_plan(cfg))
    assert [len(row) for row in views] == [6] * 4
    assert all(isinstance(view, StillClip) and len(view.poses) == 4 for row in views for view in row)
    again = training_views(cfg, make_plan(cfg))
    assert views == again and len({view for row in views for view in row}) == 24


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_weight_makes_every_loss_one_on_v_where_it_is_not_cut(prediction):
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 50, dtype=torch.float64), prediction)
    at = torch.arange(50)
    error = torch.ones(50, dtype=torch.float64)  # of x_0
    snr = schedule.snr(at)
    own = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction] * error
    weighted = own * motion_weight(snr, math.inf, prediction)
    torch.testing.assert_close(weighted, (snr + 1) * error, rtol=1e-9, atol=0)
    cut = own * motion_weight(snr, 4.0, prediction) / weighted
    assert (cut[snr >= 1 / 3] == 1).all() and (cut[snr < 0.3] < 1).all()


# ---- noise ----


def test_carried_noise_moves_with_the_camera_and_that_of_the_others_is_their_own(moving, tiny_base):
    none, half, whole = (
        config_of(moving({"camera": {"pan": 1.0}, "frames": 3, "enlarge": 4, "carried": share}))
        for share in (0.0, 0.5, 1.0)
    )
    row = training_views(whole, make_plan(whole))[0]
    own = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def correlation(noise):  # half a width of 8 latent pixels from frame to frame
        here, there = noise[:-1, ..., 4:], noise[1:, ..., :4]
        return float((here * there).mean())

    assert all(torch.equal(Carried(row, none, 2)(0, k, own), own) for k in range(20))
    seen = [Carried(row, whole, 2)(0, k, own) for k in range(20)]
    assert min(map(correlation, seen)) > 0.3 > abs(correlation(own))
    assert abs(float(torch.stack(seen).std()) - 1) < 0.05
    some = [Carried(row, half, 2)(0, k, own) for k in range(40)]
    assert 10 < sum(not torch.equal(noise, own) for noise in some) < 30
    assert torch.equal(seen[3], Carried(row, whole, 2)(0, 3, own))


@pytest.mark.slow
def test_a_run_with_carried_noise_is_another_run(moving, tmp_path):
    losses = []
    for share in (0.0, 1.0):
        keys = {"output_dir": str(tmp_path / f"{share}"), "max_train_steps": 2, "validation_steps": 0}
        train_run(moving({"carried": share}, **keys))
        losses.append([record["loss"] for record in steps_of(tmp_path / f"{share}/run")])
    assert losses[0] != losses[1]


# ---- clips of users ----


@pytest.fixture
def films(tmp_path) -> Path:
    """Three clips of 7 frames of two kinds, with captions."""
    root = tmp_path / "films"
    root.mkdir()
    for name in ("a.gif", "b.webp", "c.gif"):
        shades = [Image.linear_gradient("L").resize((24, 24)).rotate(20 * k).convert("RGB") for k in range(7)]
        save_animation(shades, root / name, [100] * 7)
        (root / name).with_suffix(".txt").write_text(f"a film {name[0]}")
    return root


def of_films(films: Path) -> dict:
    return {"motion": {"camera": None, "clips_dir": str(films), "frame_stride": 2}, "data_dir": None}


@pytest.mark.slow
def test_a_lora_is_trained_on_clips_and_goes_on_to_the_same_bytes(moving, films, tmp_path):
    keys = of_films(films)
    (straight,) = train_run(moving(**keys))
    (resumed,) = train_run(moving(**keys, output_dir=str(tmp_path / "again")), stop=3)
    assert straight.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
def test_another_adapter_or_camera_is_another_run_and_a_folder_that_was_moved_is_not(
    moving, films, adapters, tmp_path
):
    keys = of_films(films) | {"max_train_steps": 2, "validation_steps": 0}
    train_run(moving(**keys))
    moved = films.rename(tmp_path / "moved")
    again = of_films(moved) | {
        "max_train_steps": 3,
        "validation_steps": 0,
        "resume_from_checkpoint": "latest",
    }
    assert train_lora.main(moving(**again)) == 0
    again["motion"] |= {"frame_stride": 1}
    with pytest.raises(UserError, match="motion: other settings, or another adapter"):
        train_lora.main(moving(**again))
    again["motion"] |= {"frame_stride": 2, "motion_adapter": adapters["original"]}
    with pytest.raises(UserError, match="motion: other settings, or another adapter"):
        train_lora.main(moving(**again))


# ---- files ----


@pytest.fixture(scope="module")
def trained_lora(tiny_base, adapters, once, tmp_path_factory):
    """A LoRA file of some steps, far from where it started."""
    from small import SHORT_RUN, settings_of, small_pictures

    folder = tmp_path_factory.mktemp("motion")
    keys = (
        SHORT_RUN
        | KEYS
        | {
            "pretrained_model_name_or_path": str(tiny_base),
            "data_dir": str(once("pictures", small_pictures)),
            "output_dir": str(folder / "ckpt"),
            "cache_dir": str(folder / "cache"),
            "log_dir": str(folder / "log"),
            "max_train_steps": 4,
            "validation_steps": 0,
            "learning_rate": 5e-2,
            "motion": {"motion_adapter": adapters["folder"], "camera": {"pan": 0.4}, "frames": 4, "takes": 1},
        }
    )
    (path,) = train_run(settings_of(**keys))
    return path


def effect(opened, path: Path) -> torch.Tensor:
    base = opened()
    load_lora(path, base.unet, adapter_name="a")
    return answer(base.unet)


def test_plain_diffusers_reads_the_file_as_it_was_trained(trained_lora, opened, tiny_base, adapters):
    """Alpha is twice the rank: a reader that does not know it has half the effect."""
    with safe_open(trained_lora, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        assert {key for key in told} >= {"unet.r", "unet.lora_alpha", "unet.target_modules"}
        assert all(is_motion(name) for name in told["unet.target_modules"])
    theirs = Base(inspect_base(str(tiny_base)))
    pipe = narrow.animatediff_pipeline(theirs, adapters["folder"])
    pipe.unet.eval()
    plain = answer(pipe.unet)
    pipe.load_lora_weights(str(trained_lora))
    found, ours = answer(pipe.unet), effect(opened, trained_lora)
    assert (found - ours).abs().max() <= 2e-6 and (ours - plain).abs().max() > 0.05


def test_the_export_under_animatediff_s_names_has_the_same_effect(
    trained_lora, opened, adapters, tmp_path, capsys
):
    out = tmp_path / "original.safetensors"
    assert mix_lora.main(["convert", str(trained_lora), f"out={out}", "format=animatediff"]) == 0
    assert "AnimateDiff-Evolved" in capsys.readouterr().out
    ours, theirs = read_lora(trained_lora).modules, read_lora(out).modules
    assert ours.keys() == theirs.keys()
    for name, pair in ours.items():
        torch.testing.assert_close(pair.delta(), theirs[name].delta(), atol=1e-6, rtol=1e-5)
    assert (effect(opened, out) - effect(opened, trained_lora)).abs().max() <= 1e-5
    with safe_open(out, "pt") as file, safe_open(adapters["original"], "pt") as adapter:
        keys, places = set(file.keys()), set(adapter.keys())
        # The rules of ComfyUI AnimateDiff-Evolved: a pair is put where its name without these words points.
        for key in keys:
            assert "temporal" in key and (key.replace(".down.", ".up.") in keys)
            place = key.replace("processor.", "").replace("_lora", "").replace("down.", "").replace("up.", "")
            assert place.replace("to_out.", "to_out.0.") in places
        first = min(key for key in keys if ".down." in key)
        product = file.get_tensor(first.replace(".down.", ".up.")) @ file.get_tensor(first)
    torch.testing.assert_close(product, ours[min(ours)].delta(), atol=1e-6, rtol=1e-5)


def test_both_names_are_one_set_of_modules_for_every_verb(trained_lora, tmp_path):
    original, back, mixed = (tmp_path / f"{name}.safetensors" for name in ("original", "back", "mixed"))
    assert mix_lora.main(["convert", str(trained_lora), f"out={original}", "format=animatediff"]) == 0
    assert mix_lora.main(["convert", str(original), f"out={back}", "format=diffusers"]) == 0
    sources = [f"{trained_lora}=0.5", f"{original}=0.5"]
    assert mix_lora.main(["mix", *sources, f"out={mixed}", "format=animatediff"]) == 0
    ours = read_lora(trained_lora).modules
    for path in (back, mixed):
        found = read_lora(path).modules
        assert found.keys() == ours.keys()
        for name, pair in ours.items():
            torch.testing.assert_close(found[name].delta(), pair.delta(), atol=1e-6, rtol=1e-5)


def test_a_style_has_no_place_under_animatediff_s_names(trained_lora, fitted, tmp_path):
    out = f"out={tmp_path / 'x.safetensors'}"
    with pytest.raises(UserError, match="not of a motion adapter.*Choose format=diffusers"):
        mix_lora.main(["convert", str(fitted[0]), out, "format=animatediff"])
    assert not list(tmp_path.glob("x*"))


@pytest.mark.slow
def test_animate_takes_the_file_at_any_weight(trained_lora, tiny_base, adapters, tmp_path):
    def film(name, *loras):
        keys = dict(prompt="a photo of hills at noon", frames=4, num_inference_steps=2, formats=["gif"])
        keys |= dict(min_side=16, scene_share=0, agreement=0, motion_adapter=adapters["folder"], name=name)
        assert animate.main(command_line(tmp_path, tiny_base, keys | {"loras": list(loras)})) == 0
        return pictures_in(tmp_path / "out" / name / "frames")

    plain = film("plain")
    films = [film(f"at{i}", {"path": str(trained_lora), "weight": float(i)}) for i in (-1, 0, 1)]
    far = [max(distance(a, b) for a, b in zip(plain, other, strict=True)) for other in films]
    assert far[1] == 0 and min(far[0], far[2]) > ONE_LEVEL
    assert max(distance(a, b) for a, b in zip(films[0], films[2], strict=True)) > ONE_LEVEL


def test_a_run_goes_on_from_a_motion_lora(moving, trained_lora, opened, tmp_path):
    keys = {"init_lora": str(trained_lora), "learning_rate": 0.0, "max_train_steps": 1, "lora_alpha": None}
    assert train_lora.main(moving(**keys, validation_steps=0)) == 0
    again = effect(opened, tmp_path / "ckpt/run.safetensors")
    assert (again - effect(opened, trained_lora)).abs().max() < 1e-5


@pytest.mark.slow
def test_a_step_on_the_shape_of_stable_diffusion_and_a_film_of_its_file(settings, tmp_path):
    base = narrow.write_base(tmp_path, "modern")
    unet = narrow.parts()["unet"]
    paths = narrow.write_motion_adapter(tmp_path / "adapter", unet, use_motion_mid_block=True)
    preset = load_config(TrainConfig, ROOT / "cfg/sd15/motion_lora.json").config
    own = {"motion_adapter": str(paths["original"]), "camera": {"zoom": 1.3}, "frames": 4, "enlarge": 4}
    keys = dict(objective=preset.objective, target_modules=preset.target_modules, validation_steps=0)
    keys |= dict(save_format=preset.save_format, pretrained_model_name_or_path=str(base), resolution=64)
    keys |= dict(max_train_steps=1, motion=own | {"beta_schedule": "linear"}, gradient_checkpointing=True)
    assert train_lora.main(settings(**keys)) == 0
    modules = read_lora(tmp_path / "ckpt/run.safetensors").modules
    places = inspect_motion_adapter(str(paths["original"]), inspect_base(str(base))).shapes
    assert len(modules) == sum(".to_" in name and name.endswith(".weight") for name in places)
    film = dict(prompt="a lake", frames=4, num_inference_steps=1, formats=["gif"], beta_schedule="linear")
    film |= dict(
        motion_adapter=str(paths["folder"]), loras=[{"path": str(tmp_path / "ckpt/run.safetensors")}]
    )
    assert animate.main(command_line(tmp_path, base, film)) == 0
    assert len(pictures_in(tmp_path / "out/run/frames")) == 4


def test_betas_are_those_of_the_config(moving):
    losses = []
    for schedule in (None, "scaled_linear", "linear"):
        cfg = config_of(moving({"beta_schedule": schedule}))
        plan = make_plan(cfg)
        losses.append(Base(plan.base).noise_schedule().alpha_bar)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


# ---- faults ----


IMPOSSIBLE = {
    "no settings": ({"objective": "motion"}, 'objective, motion: "motion" needs a motion_adapter'),
    "no adapter": ({"motion": {"camera": {"zoom": 1.3}}}, "motion.motion_adapter: missing"),
    "neither camera nor clips": ({"motion": {"motion_adapter": "x"}}, "camera, clips_dir: set exactly one"),
    "both": (
        {"motion": {"motion_adapter": "x", "camera": {"pan": 1}, "clips_dir": "y"}},
        "camera, clips_dir: set exactly one",
    ),
    "a camera at rest": (
        {"motion": {"motion_adapter": "x", "camera": [{"pan": 1}, {"zoom": 1}]}},
        "camera: one is at rest",
    ),
    "a stride of stills": ({"motion.frame_stride": 2}, "frame_stride, camera"),
    "clips and pictures": (
        {"motion": {"motion_adapter": "x", "clips_dir": "y"}},
        "motion.clips_dir, data_dir, dataset_name: clips or pictures",
    ),
    "noise through an unknown camera": (
        {"motion": {"motion_adapter": "x", "clips_dir": "y", "carried": 0.5}, "data_dir": None},
        "carried, clips_dir",
    ),
    "one frame": ({"motion.frames": 1}, "motion.frames"),
    "the layers of the base": ({"target_modules": "attention"}, 'target_modules: "motion" leaves'),
    "some layers of the base": ({"target_modules": ["to_q"]}, 'target_modules: "motion" leaves'),
    "temporal without motion": (
        {"objective": "denoise", "motion": None},
        'target_modules, objective: "temporal" is of a motion adapter',
    ),
    "settings without motion": ({"objective": "denoise", "target_modules": "all"}, 'settings of "motion"'),
    "kohya's names": ({"save_format": "kohya"}, 'save_format: .*set save_format to "diffusers"'),
    "denoise beside it": ({"objective": ["denoise", "motion"]}, 'objective: "motion" .* goes with no other'),
    "mirrored": ({"random_flip": True}, "random_flip: random_flip would turn the way"),
    "random crops": ({"crop": "random"}, "motion.takes; leave crop out"),
    "xformers": ({"enable_xformers_memory_efficient_attention": True}, "has no kernel"),
    "the text encoder": ({"train_text_encoder": True}, "learns words"),
    "a weight of its own": ({"snr_gamma": 5.0}, "motion.most_weight"),
    "masks": ({"masked_loss": "alpha"}, "masked_loss"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_config_that_cannot_be_meant_is_refused(name):
    changes, words = IMPOSSIBLE[name]
    own = {"motion_adapter": "x", "camera": {"zoom": 1.3}}
    keys = {"data_dir": "x", "n_epochs": 1} | KEYS | {"motion": own} | changes
    if name == "no settings":
        del keys["motion"]
    from small import settings_of

    load_config(TrainConfig, None, settings_of(**({"data_dir": "x", "n_epochs": 1} | KEYS | {"motion": own})))
    with pytest.raises(ConfigError, match=words):
        load_config(TrainConfig, None, settings_of(**keys))


FAULTS = {
    "an adapter that is not there": ({"motion_adapter": "nowhere"}, "nowhere: .*no such folder or file"),
    "more frames than positions": ({"frames": 9}, "motion.frames 9: .*has 8 positions; lower it"),
    "a still without room": ({"camera": {"zoom": 3.0}}, "the camera needs 48x48 pixels"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_before_any_work(name, moving, tmp_path):
    changes, words = FAULTS[name]
    for flag in ([], ["--check"]):
        with pytest.raises(UserError, match=words) as caught:
            train_lora.main([*moving(changes), *flag])
        assert caught.value.exit_code == 2
    assert not (tmp_path / "ckpt").exists()


def test_an_adapter_of_another_base_is_refused(moving, tmp_path):
    wide = narrow.write_motion_adapter(tmp_path / "wide", tiny_unet(block_out_channels=(16, 32)))
    with pytest.raises(UserError, match="made for another base: block_out_channels"):
        train_lora.main(moving({"motion_adapter": str(wide["folder"])}))


def test_a_target_that_the_adapter_lacks_is_named(moving):
    assert make_plan(config_of(moving(target_modules=["motion_modules.*.attn1.to_q"]))).adapter
    with pytest.raises(UserError, match="no layer of the U-Net ends in .*attn7"):
        make_plan(config_of(moving(target_modules=["motion_modules.*.attn7.to_q"])))


def test_check_tells_of_clips_adapter_and_memory_and_loads_no_torch(command, moving, adapters, tmp_path):
    result = command(
        "train_lora", [*moving({"frames": 8, "camera": [{"pan": 0.2}, {"pan": -0.2}]}), "--check"]
    )
    assert result.code == 0 and not result.torch and not (tmp_path / "ckpt").exists()
    parts = (
        "clips       2 camera(s), 2 take(s)",
        "of 8 frames; adapter",
        "0 of 16 latents",
        "memory      about",
    )
    assert all(part in result.out for part in parts)
    assert "frozen base" in result.out


def test_memory_grows_with_the_frames_and_with_the_adapter(moving):
    from lorakit.training.forecast import activation_bytes, lora_parameters, predict_memory

    def of(**motion):
        cfg = config_of(moving(motion, target_modules="temporal"))
        plan = make_plan(cfg)
        return cfg, plan, activation_bytes(cfg, plan) or 0

    (cfg, plan, four), (_, _, eight) = of(frames=4), of(frames=8)
    assert eight == pytest.approx(2 * four, rel=1e-6)
    adapter = sum(map(math.prod, plan.adapter.shapes.values()))
    base = plan.base.parameters["unet"]
    assert predict_memory(cfg, plan)["frozen base"] == 4 * (base + adapter)
    info = inspect_base(cfg.pretrained_model_name_or_path)
    opened = Base(info)
    inflate(opened, plan.adapter)
    made = add_lora(opened.unet, rank=cfg.rank, alpha=1.0, targets="temporal")
    assert lora_parameters(cfg, info) == sum(p.numel() for p in made)


@pytest.mark.slow
def test_what_autograd_keeps_of_a_clip_is_what_is_told(settings, tmp_path):
    """On the embedded base, with a random adapter."""
    from lorakit.training.forecast import activation_bytes

    keys = {"pretrained_model_name_or_path": str(ROOT / "ckpt/miniature"), "resolution": 64}
    base = Base(inspect_base(keys["pretrained_model_name_or_path"]))
    paths = narrow.write_motion_adapter(tmp_path, base.unet)
    own = {"motion_adapter": str(paths["folder"]), "camera": {"pan": 0.2}, "frames": 4, "enlarge": 4}
    cfg = config_of(settings(**(KEYS | keys | {"motion": own})))
    plan = make_plan(cfg)
    inflate(base, plan.adapter)
    add_lora(base.unet, rank=4, alpha=4.0, targets="temporal")
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x_t, states = torch.randn(1, 4, 8, 8, 8), torch.randn(1, 8, plan.base.cross_attention_dim)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = as_function(base.unet)(x_t, torch.tensor([500]), states)
    weights = {p.untyped_storage().data_ptr() for p in base.unet.parameters()}
    found = sum(size for place, size in kept.items() if place not in weights)
    assert output.shape == x_t.shape and 0.7 < found / activation_bytes(cfg, plan) < 1.3


def test_the_presets_are_valid():
    for name, schedule in (("cfg/motion_lora.json", None), ("cfg/sd15/motion_lora.json", "linear")):
        cfg = load_config(TrainConfig, ROOT / name).config
        assert cfg.motion is not None and cfg.motion.camera and cfg.motion.beta_schedule == schedule
    assert "torch" in sys.modules
