"""The recipe of the motion module on a tiny base: clips of a known camera, and a run that resumes exactly."""

import functools
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import animate
from lorakit.ground.checkpoints import verify_checkpoint
from lorakit.ground.errors import StoppedError
from lorakit.motion.camera import Move, between
from lorakit.motion.estimate import moves
from lorakit.weights.base import inspect_base
from lorakit.weights.motion_adapter import inspect_motion_adapter
from miniature import run as runs
from miniature.batches import ClipSamples
from miniature.clips import EDGE, MOVES, Clips
from miniature.pictures import base_table
from miniature.train_motion import MotionConfig, make_motion_unet, motion_settings, train

CLIPS = Clips(base_table(0, 40, 64), 4)


def config(folder, base, **given) -> MotionConfig:
    small = dict(batch_size=2, max_train_steps=4, warmup_steps=1, logging_steps=1, validation_steps=4)
    small |= dict(checkpointing_steps=2, picture_size=32, pictures=6, frames=3, heads=2, positions=8)
    return MotionConfig(**(small | given), output_dir=str(folder), base=str(base))


# ---- clips ----


@pytest.mark.parametrize("index", range(0, 3 * len(MOVES), 2))
def test_a_clip_moves_as_its_camera_does(index):
    name, poses, _ = CLIPS.camera(index)
    frames = [Image.fromarray(frame) for frame in CLIPS.render(index)]
    asked, found = between(poses[0], poses[-1]), functools.reduce(Move.then, moves(frames)[0])
    assert name == list(MOVES)[index // 3] and len(frames) == 4
    assert (found.dx, found.dy) == pytest.approx((asked.dx, asked.dy), abs=1.5)
    assert (found.log_scale, found.angle) == pytest.approx((asked.log_scale, asked.angle), abs=0.03)


def test_moves_have_the_signs_of_their_names_and_no_camera_leaves_the_painting():
    for index in range(600):
        name, poses, (x, y, side) = CLIPS.camera(index)
        move = between(poses[0], poses[-1])
        for word, value in {
            "right": -move.dx, "left": move.dx, "up": move.dy, "down": -move.dy, "in": move.log_scale,
            "out": -move.log_scale, "clockwise": -move.angle, "back": move.angle,
        }.items():  # fmt: skip
            assert value > 0 or word not in name.split()
        for pose in poses:
            half = 0.5 * side / pose.scale
            assert EDGE <= x + pose.x / 64 * side - half and y + pose.y / 64 * side + half <= 1 - EDGE
    assert CLIPS.camera(3) == CLIPS.camera(3) != CLIPS.camera(4)
    pairs = {(CLIPS.table.row(i)[1], CLIPS.camera(i)[0]) for i in range(27)}
    assert len(pairs) == 3 * len(MOVES)


def test_the_margin_of_a_watercolor_stands_still_while_what_is_painted_moves():
    index = next(i for i in range(40) if CLIPS.table.row(i)[1] == "a watercolor" and i // 3 == 1)
    frames = CLIPS.render(index).astype(int)
    rim = np.ones((64, 64), bool)
    rim[1:-1, 1:-1] = False
    changed = np.abs(frames[0] - frames[-1]).max(-1) > 3
    assert changed[rim].mean() < 0.2 < 0.5 < changed[8:-8, 8:-8].mean()


def test_noise_is_carried_by_the_clip_s_own_camera_for_a_share_of_the_samples(tiny_base):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    latents = [torch.zeros(40, 4, 4, 32, 32, dtype=torch.float16)]
    likeness = {}
    for carried in (0.0, 1.0):
        cfg = config("nowhere", "nowhere", carried=carried, frames=4, picture_size=64)
        samples = ClipSamples(latents, CLIPS, tokenizer, cfg)
        x_0, ids, timesteps, eps = samples.batch(3, 16, torch.device("cpu"))
        assert eps.shape == x_0.shape == (16, 4, 4, 32, 32) and len(ids) == len(timesteps) == 16
        assert (eps.std((1, 2, 3, 4)) - 1).abs().max() < 0.1 and eps.mean().abs() < 0.02
        likeness[carried] = (eps[:, 0] * eps[:, 1]).mean((1, 2, 3))
        assert torch.equal(eps, samples.batch(3, 16, torch.device("cpu"))[3])
    assert likeness[0.0].abs().max() < 0.1 < likeness[1.0].max()


# ---- the run ----


def test_a_new_module_has_no_effect_and_is_all_that_is_trained(tiny_base):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    settings = motion_settings(unet, config("nowhere", "nowhere"))
    model, module = make_motion_unet(unet, settings, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in module.named_parameters()} and len(trained) > 50
    clip, embeds = torch.randn(1, 4, 3, 8, 8), torch.randn(3, 5, 16)
    flat = unet(clip[0].transpose(0, 1), 5, embeds).sample
    torch.testing.assert_close(model(clip, 5, embeds).sample[0].transpose(0, 1), flat, atol=2e-6, rtol=0)


@pytest.fixture(scope="module")
def trained(once, tiny_base):
    """The folder of a whole run."""
    return once("motion", lambda folder: train(config(folder, tiny_base, ckpt_name="motion"), "…"))


@pytest.mark.slow
def test_what_was_trained_is_an_adapter_that_animate_takes(trained, tiny_base, tmp_path):
    adapter = trained / "motion/motion"
    info = inspect_motion_adapter(str(adapter), inspect_base(str(tiny_base)))
    assert info.positions == 8 and info.config["motion_num_attention_heads"] == 2
    keys = [f"pretrained_model_name_or_path={tiny_base}", f"output_dir={tmp_path}", "num_inference_steps=2"]
    keys += ["frames=3", "formats=[]", "width=16", "height=16", "camera.pan=0.5"]
    (tmp_path / "empty.json").write_text("{}")
    frames = {}
    for name, more in {"with": [f"motion_adapter={adapter}"], "without": []}.items():
        assert animate.main([str(tmp_path / "empty.json"), *keys, f"name={name}", *more]) == 0
        frames[name] = np.asarray(Image.open(tmp_path / name / "frames/0001.png"), int)
    assert np.abs(frames["with"] - frames["without"]).max() > 0


@pytest.mark.slow
def test_a_stopped_and_resumed_run_equals_a_straight_one(trained, tiny_base, tmp_path, monkeypatch):
    cfg = config(tmp_path, tiny_base, ckpt_name="again", resume_from_checkpoint="latest")
    take_step = runs.take_step

    def interrupted(config, optimizer, loss, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(config, optimizer, loss, step)

    monkeypatch.setattr(runs, "take_step", interrupted)
    with pytest.raises(StoppedError, match="step 2 of 4"):
        train(cfg, "the command")
    monkeypatch.setattr(runs, "take_step", take_step)
    train(cfg, "the command")
    straight, resumed = (
        verify_checkpoint(run / "checkpoint-00000004")["files"]
        for run in (trained / "motion", tmp_path / "again")
    )
    for name in ("weights.safetensors", "average.safetensors", "optimizer.safetensors"):
        assert straight[name] == resumed[name]
    lines = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
