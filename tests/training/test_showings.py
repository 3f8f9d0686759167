"""What a showing draws and how it counts, in whole runs: mixed steps, captions, masks."""

import hashlib
import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from small import ROOT, torchrun

import train_lora
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.ground.config import load_config
from lorakit.ground.errors import StoppedError, UserError
from lorakit.training.batch import Batch
from lorakit.training.config import TrainConfig
from lorakit.training.data import Augmentation, TrainingData
from lorakit.training.denoise import Denoise
from lorakit.training.objectives import Models, Pass
from lorakit.training.plan import make_plan
from lorakit.weights.lora_reader import read_lora


def config_of(arguments: list[str]) -> TrainConfig:
    return load_config(TrainConfig, "cfg/mountain.json", arguments).config


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flat(path: Path) -> torch.Tensor:
    return torch.cat([pair.delta().flatten() for pair in read_lora(path).modules.values()])


def far(a: Path, b: Path) -> float:
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


# ---- steps of several buckets ----

SMALL = dict(aspect_ratio_buckets=True, resolution=32, n_epochs=4, max_train_steps=None)


@pytest.mark.slow(8)
def test_a_step_of_several_buckets_has_the_mean_of_its_samples(trained, tmp_path):
    """Buckets of two, one and one pictures: as one batch, and in parts of one and of two."""
    batch = trained(train_batch_size=4, **SMALL)
    parts = trained(train_batch_size=1, total_batch_size=4, output_dir=str(tmp_path / "parts"), **SMALL)
    assert far(parts, batch) < 1e-5
    pairs = trained(train_batch_size=2, total_batch_size=4, output_dir=str(tmp_path / "pairs"), **SMALL)
    assert far(pairs, batch) < 1e-5
    other = trained(train_batch_size=3, output_dir=str(tmp_path / "other"), **SMALL)
    assert far(other, batch) > 1e-3


@pytest.mark.slow(8)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2, "train_text_encoder": True}])
def test_a_run_of_small_buckets_resumes_to_the_bit(trained, settings, tmp_path, options):
    options = SMALL | options | {"train_batch_size": 3, "repeats": {".": 2}}
    straight = trained(**options)
    cfg = config_of(settings(output_dir=str(tmp_path / "stopped"), **options))
    plan, run = make_plan(cfg), Path(cfg.output_dir) / cfg.ckpt_name
    assert plan.steps == 11 and plan.order["showings"] == 32
    with pytest.raises(StoppedError):
        train_lora.train(cfg, plan, run, stop_after=5)
    (path,) = train_lora.train(cfg, plan, run, run / "checkpoint-00000005")
    assert sha(path) == sha(straight)


@pytest.mark.slow(20)
def test_two_processes_equal_one_where_steps_mix_buckets_and_the_last_is_short(trained, settings, tmp_path):
    options = SMALL | {"n_epochs": 3}
    # A last step of four: the second process has none of it. In two steps Adam makes much of how sums are
    # rounded, so that both runs add them up alike.
    single = trained(train_batch_size=4, total_batch_size=8, **options)
    arguments = settings(train_batch_size=4, output_dir=str(tmp_path / "two"), **options)
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        torchrun("train_lora.py", arguments), cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert far(tmp_path / "two" / "run.safetensors", single) < 1e-5


def test_repeats_show_a_folder_more_often(trained, pictures, tmp_path):
    data = tmp_path / "data"
    for folder, number in (("3_x", 0), ("1_y", 3)):
        (data / folder).mkdir(parents=True)
        (data / folder / "a.png").write_bytes((pictures / f"{number}.png").read_bytes())
        (data / folder / "a.txt").write_text("a photo of mountains")
    options = dict(data_dir=str(data), n_epochs=2, max_train_steps=None)
    often = trained(repeats="kohya", output_dir=str(tmp_path / "often"), **options)
    assert read_lora(often).metadata["ss_num_train_images"] == "4"
    alike = trained(output_dir=str(tmp_path / "alike"), **options)
    assert len((often.with_suffix("") / "metrics.jsonl").read_text().splitlines()) > 8
    assert read_lora(often).metadata["ss_steps"] == "8" and read_lora(alike).metadata["ss_steps"] == "4"


# ---- captions ----


def data_of(captions: tuple[str, ...], seed: int = 0, dropout: float = 0.0) -> TrainingData:
    data = object.__new__(TrainingData)
    data.table = SimpleNamespace(rows=[SimpleNamespace(captions=captions)])
    data.seed, data.augmentation = seed, Augmentation(caption_dropout=dropout)
    return data


def test_each_showing_has_one_of_the_captions_by_its_position():
    names = ("one", "two", "three")
    drawn = [data_of(names)._prompt(0, position) for position in range(3000)]
    assert all(900 < count < 1100 for count in Counter(drawn).values()) and set(drawn) == set(names)
    assert drawn == [data_of(names)._prompt(0, position) for position in range(3000)]
    assert drawn != [data_of(names, seed=1)._prompt(0, position) for position in range(3000)]
    dropped = [data_of(names, dropout=0.3)._prompt(0, position) for position in range(3000)]
    assert 800 < dropped.count("") < 1000
    assert all(a == b for a, b in zip(dropped, drawn, strict=True) if a)


@pytest.fixture
def tagged(pictures, tmp_path) -> str:
    data = tmp_path / "tagged"
    data.mkdir()
    for number in range(2):
        (data / f"{number}.png").write_bytes((pictures / f"{3 * number}.png").read_bytes())
        (data / f"{number}.txt").write_text("ridge, lake, snow, dawn\na photo of mountains\n")
    return str(data)


@pytest.mark.slow(5)
@pytest.mark.parametrize("text", [{}, {"train_text_encoder": True}])
def test_captions_of_every_kind_train_and_resume_to_the_bit(trained, settings, tagged, tmp_path, text):
    options = dict(
        data_dir=tagged,
        caption_lines="choice",
        caption_shuffle=True,
        keep_tokens=1,
        caption_orders=4,
        trigger_word="zwx",
        caption_dropout=0.2,
        **text,
    )
    straight = trained(**options)
    cfg = config_of(settings(output_dir=str(tmp_path / "stopped"), **options))
    run = Path(cfg.output_dir) / cfg.ckpt_name
    with pytest.raises(StoppedError):
        train_lora.train(cfg, make_plan(cfg), run, stop_after=3)
    (path,) = train_lora.train(cfg, make_plan(cfg), run, run / "checkpoint-00000003")
    assert sha(path) == sha(straight)
    one = trained(output_dir=str(tmp_path / "one"), **(options | {"caption_lines": "join"}))
    assert far(one, straight) > 1e-4
    assert read_lora(path).metadata["modelspec.trigger_phrase"] == "zwx"


def test_the_plan_shows_how_many_captions_a_picture_has(settings, tagged, capsys):
    words = settings(data_dir=tagged, caption_lines="choice", caption_shuffle=True, caption_orders=4)
    assert train_lora.main([*words, "--check"]) == 0
    assert "'ridge, lake, snow, dawn' and 4 more" in capsys.readouterr().out
    assert train_lora.main([*settings(data_dir=tagged), "--check"]) == 0
    assert "captions of several lines are trained as one each: 0.txt, 1.txt" in capsys.readouterr().out


# ---- masks ----


def test_the_loss_counts_each_place_by_its_weight():
    batch = Batch(
        *torch.randn(2, 2, 4, 8, 8), torch.tensor([100, 700]), torch.zeros(2, 5, 16), None, ((0, 0), (0, 1))
    )
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler())
    models = Models(lambda *_: batch.noise + error, lambda *_: None, lambda prompts: torch.zeros(1), schedule)
    error = torch.randn(2, 4, 8, 8)
    weights = torch.zeros(2, 1, 8, 8)
    weights[..., :4] = 0.5
    masked = Batch(**(vars(batch) | {"weights": weights}))
    term = Denoise(SimpleNamespace(snr_gamma=None))
    loss = term.loss(models, Pass(models, masked, batch.prompt_embeds))[0]
    torch.testing.assert_close(loss, (error[..., :4] ** 2).mean((1, 2, 3)) * 0.25)
    plain = term.loss(models, Pass(models, batch, batch.prompt_embeds))[0]
    torch.testing.assert_close(plain, (error**2).mean((1, 2, 3)))


@pytest.fixture
def masked(pictures, tmp_path):
    """Factory of a folder of one 24x24 picture and its mask, of which a share on the left is white."""

    def make(share: float, noise: int = 0) -> str:
        data = tmp_path / f"masked {share} {noise}"
        data.mkdir(exist_ok=True)
        pixels = np.asarray(Image.open(pictures / "0.png").convert("RGB")).copy()
        pixels[:, 12:] = np.random.default_rng(noise).integers(0, 256, (24, 12, 3))
        Image.fromarray(pixels).save(data / "a.png")
        (data / "a.txt").write_text("a photo of mountains")
        mask = np.zeros((24, 24), dtype=np.uint8)
        mask[:, : round(24 * share)] = 255
        Image.fromarray(mask).save(data / "a-masklabel.png")
        return str(data)

    return make


@pytest.mark.slow(5)
def test_a_white_mask_changes_no_bit_and_another_does(trained, masked, tmp_path):
    plain = trained(data_dir=masked(1.0))
    white = trained(data_dir=masked(1.0), masked_loss="beside", output_dir=str(tmp_path / "white"))
    half = trained(data_dir=masked(0.5), masked_loss="beside", output_dir=str(tmp_path / "half"))
    assert far(white, plain) == 0 and far(half, plain) > 1e-3
    some = trained(
        data_dir=masked(0.5), masked_loss="beside", unmasked_weight=0.5, output_dir=str(tmp_path / "some")
    )
    assert 0 < far(some, plain) < far(half, plain)


def test_the_loss_of_a_masked_run_is_that_of_the_white_part(trained, masked, tmp_path):
    lines = {}
    for name, share in (("whole", 1.0), ("half", 0.5)):
        path = trained(
            data_dir=masked(share), masked_loss="beside", learning_rate=0.0, output_dir=str(tmp_path / name)
        )
        lines[name] = [
            json.loads(line) for line in (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()
        ]
    for key in ("loss", "validation_loss"):
        whole, half = ([line[key] for line in lines[name] if key in line] for name in ("whole", "half"))
        assert all(0.2 * a < b < 0.8 * a for a, b in zip(whole, half, strict=True))


def test_another_mask_is_another_run(trained, settings, masked):
    trained(data_dir=masked(0.5), masked_loss="beside", max_train_steps=3)
    with pytest.raises(UserError, match="pictures or captions changed"):
        train_lora.main(
            [
                *settings(data_dir=masked(0.25), masked_loss="beside", max_train_steps=6),
                "resume_from_checkpoint=true",
            ]
        )
    cfg = config_of(settings(masked_loss="beside"))
    assert "4 of 4 pictures have no mask beside them" in " ".join(make_plan(cfg).notes)
    cfg = config_of(settings(masked_loss="alpha"))
    assert "4 of 4 pictures have no transparent part" in " ".join(make_plan(cfg).notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unmasked_weight": 0.1}, "no masks without masked_loss"),
        ({"keep_tokens": 1}, "caption_shuffle moves the others"),
        ({"data_dir": None, "dataset_name": "x", "repeats": "kohya"}, "repeats go by the folders"),
        ({"data_dir": None, "dataset_name": "x", "masked_loss": "beside"}, "beside the pictures of data_dir"),
        ({"repeats": {"a": 0}}, "repeats.a"),
        ({"caption_extension": "txt"}, "caption_extension"),
        ({"trigger_word": " "}, "trigger_word"),
    ],
)
def test_keys_that_do_not_agree_are_refused(settings, changes, words):
    with pytest.raises(UserError, match=words):
        config_of(settings(**changes))
