"""morph.py as its user sees it: films, faults with a remedy, kills that cost little."""

import hashlib
import json
import math
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import full_disk, torchrun

import morph
from lorakit.diffusion import inversion
from lorakit.diffusion.denoiser import Denoiser
from lorakit.diffusion.paths import decode_picture, encode_picture
from lorakit.film import endpoints, morph_plan, shooting
from lorakit.film.config import MorphConfig
from lorakit.ground import publish
from lorakit.ground.config import load_config, schema
from lorakit.ground.process import run_guarded
from lorakit.ground.runs import lock_run
from lorakit.pictures.images import read_picture

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
NONE = (False, False, False)
QUICK = {"loras": NONE, "reschedule": "off", "frames": 3}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def frames_of(folder: Path) -> list[str]:
    """The hashes of the frames, in their order."""
    return [sha(path) for path in sorted((folder / "frames").iterdir())]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int16)


@pytest.fixture
def guarded(capsys):
    """Runs morph.py in this process: (exit code, stdout, stderr)."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_guarded(lambda: morph.main(arguments))
        return code, *capsys.readouterr()

    return run


def assert_one_message(result: tuple[int, str, str], code: int, *words: str) -> None:
    assert result[0] == code, result[2]
    assert "Traceback" not in result[2] and result[2].count("error: ") == 1
    message = result[2][result[2].index("error: ") :]
    for word in words:
        assert word in message, message


@pytest.fixture
def evaluations(monkeypatch):
    """Counts what the U-Net is asked for, by the rows of every pass."""
    counted, real = [], Denoiser.__call__

    def spy(self, latents, *args, **options):
        counted.append(len(latents))
        return real(self, latents, *args, **options)

    monkeypatch.setattr(Denoiser, "__call__", spy)
    return counted


@pytest.fixture
def inversions(monkeypatch):
    """The latents that were inverted, one entry for each call."""
    seen, real = [], inversion.invert

    def spy(latents, *args, **options):
        seen.append(latents.clone())
        return real(latents, *args, **options)

    monkeypatch.setattr(inversion, "invert", spy)
    return seen


def round_trips(cfg: MorphConfig) -> list[np.ndarray]:
    """Each picture through the VAE alone."""
    from lorakit.diffusion.models import Base
    from lorakit.weights.base import inspect_base

    base = Base(inspect_base(cfg.pretrained_model_name_or_path))
    shape = cfg.width or base.info.resolution, cfg.height or base.info.resolution
    pictures = [read_picture(picture.path, shape) for picture in cfg.images]
    latents = [encode_picture(base, picture)[0] for picture in pictures]
    return [np.asarray(decode_picture(base, each), np.int16) for each in latents]


def config_of(arguments: list[str]) -> MorphConfig:
    return load_config(MorphConfig, ROOT / "cfg/morph/mountain.json", arguments).config


# ---- films ----


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_film_ends_on_its_pictures_to_the_bit(morphed, morph_settings, guidance):
    changes = {"guidance_scale": guidance, "frames": 4, "reschedule": "off"}
    folder, report = morphed(**changes)
    first, last = round_trips(config_of(morph_settings(**changes)))
    assert (pixels(folder / "frames/0000.png") == first).all()
    assert (pixels(folder / "frames/0003.png") == last).all()
    assert [image["endpoint_psnr_to_vae"] for image in report["images"]] == [None, None]  # nothing differs
    folder, report = morphed(**changes, anchor=False, overwrite=True)
    assert (pixels(folder / "frames/0000.png") != first).any()
    assert all(image["endpoint_psnr_to_vae"] < 60 for image in report["images"])


def test_a_closed_film_of_three_pictures(morphed, morph_settings, inversions):
    changes = {"count": 3, "loop": True, "loras": (True, False, True), "guidance_scale": 3.0}
    folder, report = morphed(**changes)
    cfg = config_of(morph_settings(**changes))
    assert len(report["frames"]) == 3 * (cfg.frames - 1) and len(inversions) == 3  # each once
    positions = [frame["segment"] + frame["alpha"] for frame in report["frames"]]
    assert all(a < b for a, b in pairwise(positions)) and positions[-1] < 3
    for k, wanted in enumerate(round_trips(cfg)):
        frame = folder / report["frames"][positions.index(k)]["file"]
        assert (pixels(frame) == wanted).all(), k
    assert len(report["distances"]) == len(report["frames"])  # the step back to the first counts
    open_film, open_report = morphed(**changes | {"loop": False}, name="open")
    assert len(open_report["frames"]) == 2 * (cfg.frames - 1) + 1
    assert len(inversions) == 3  # from the cache


def test_two_pictures_with_one_lora_file_load_it_once(morphed, morph_settings, fitted, monkeypatch):
    loaded, real = [], endpoints.load_lora
    monkeypatch.setattr(
        endpoints,
        "load_lora",
        lambda path, *args, **options: (loaded.append(path), real(path, *args, **options)),
    )
    images = config_of(morph_settings(count=3)).model_dump(mode="json")["images"]
    images[2]["lora"] = images[0]["lora"]
    images[1]["lora"] = None
    _, report = morphed(images=images, frames=2, reschedule="off")
    assert loaded == [str(fitted[0])] and set(report["fit"]) == {"none", str(fitted[0])}


def test_a_lora_of_any_rank_and_weight_is_taken_and_weight_zero_is_none(
    morphed, morph_settings, tiny_base, random_lora, tmp_path
):
    from diffusers import UNet2DConditionModel

    from lorakit.weights.lora_file import lora_bytes

    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    lora = tmp_path / "rank7.safetensors"
    lora.write_bytes(lora_bytes(random_lora(unet, 5, rank=7).modules, layout="kohya", metadata={}))
    images = config_of(morph_settings(loras=NONE)).model_dump(mode="json")["images"]
    options = {"frames": 3, "reschedule": "off"}
    plain, _ = morphed(images=images, **options, name="plain")
    images[0]["lora"] = str(lora)
    with_lora, _ = morphed(images=images, **options, name="with")
    images[0]["lora_weight"] = 0.0
    without, _ = morphed(images=images, **options, name="without")
    assert frames_of(without) == frames_of(plain)
    assert frames_of(with_lora)[1] != frames_of(plain)[1]


@pytest.mark.quick
def test_the_same_picture_twice_is_a_film_too(morphed, morph_settings):
    """Its corrections sum to the picture's own at power 1 only, so that it stands still then."""
    images = config_of(morph_settings(loras=NONE)).model_dump(mode="json")["images"][:1] * 2
    folder, report = morphed(images=images, formats=["gif", "webp"], residual_power=1.0)
    paths = sorted((folder / "frames").iterdir())
    assert len(paths) == 5
    assert all(np.abs(pixels(path) - pixels(paths[0])).max() <= 1 for path in paths)
    assert report["metrics"]["directness"] is None  # a way of no length has no direction


def test_compare_makes_the_film_without_lora_too(morphed):
    folder, report = morphed(compare=True, formats=["gif"])
    plain, alone = morphed(loras=NONE, name="alone")
    assert frames_of(folder / "without_lora") == frames_of(plain) != frames_of(folder)
    assert report["other"]["metrics"] == alone["metrics"] != report["metrics"]
    with Image.open(folder / "compare.gif") as both, Image.open(folder / "morph.gif") as single:
        assert both.n_frames == single.n_frames == 5 and both.width == 2 * single.width + 4
    assert (folder / "compare.png").exists() and report["other"]["fit"] == {}
    assert "without LoRA" in (folder / "index.html").read_text()


def test_the_same_config_twice_gives_the_same_bytes(morphed, morph_settings, tmp_path):
    one, _ = morphed(formats=["gif", "webp", "apng"])
    two, _ = morphed(formats=["gif", "webp", "apng"], output_dir=str(tmp_path / "again"))
    for name in ("morph.gif", "morph.webp", "morph.apng", "sheet.png"):
        assert sha(one / name) == sha(two / name)
    assert frames_of(one) == frames_of(two)
    other, _ = morphed(anchor_prompt="a hill", frames=3, name="other")
    assert frames_of(other)[0] == frames_of(one)[0] and frames_of(other)[1] not in frames_of(one)


def test_every_format_opens_with_every_frame(morphed):
    import av

    quick = {"loras": NONE, "reschedule": "off"}
    folder, report = morphed(**quick, formats=["gif", "webp", "apng", "mp4"], fps=10, hold_ms=300)
    assert len(report["frames"]) == 5
    for name in ("morph.gif", "morph.webp", "morph.apng"):
        with Image.open(folder / name) as image:
            assert image.n_frames == 5, name
            shown = 0
            for number in range(5):
                image.seek(number)
                image.load()
                shown += image.info["duration"]
            assert shown == 5 * 100 + 2 * 300, name
    with av.open(str(folder / "morph.mp4")) as video:
        stream = video.streams.video[0]
        distinct = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(stream)]
        assert len(distinct) == 11 * stream.average_rate / 10
    changes = sum(np.abs(a - b).mean() > 1 for a, b in pairwise(distinct))
    assert changes == 4
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 5 * 64
    folder, _ = morphed(**quick, formats=["gif"], pingpong=True, name="back")
    with Image.open(folder / "morph.gif") as image:
        assert image.n_frames == 8


class Sources(HTMLParser):
    """All that a page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href", "srcset", "data") and value]


def test_the_report_is_strict_json_and_the_page_fetches_nothing(morphed, pictures):
    folder, report = morphed(count=3, loop=True, compare=True, frames=3, loras=(True, False, False))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((folder / "report.json").read_text(), parse_constant=refuse) == report
    read = {"frames", "distances", "metrics", "definitions", "images", "settings", "unet_evaluations"}
    assert read | {"seconds", "other", "cross_fade", "libraries", "warnings", "fit"} <= set(report)
    for frame in report["frames"]:
        assert (folder / frame["file"]).is_file() and frame["sharpness"] > 0
    for image in report["images"]:
        assert {"endpoint_psnr", "vae_psnr", "endpoint_ssim", "noise_std", "residual_ratio"} <= set(image)
        assert math.isfinite(image["vae_psnr"]) and image["residual_ratio"] > 0
    assert set(report["metrics"]) <= set(report["definitions"])
    page = (folder / "index.html").read_text(encoding="utf-8")
    sources = Sources(page).found
    assert len(sources) >= 3 and all(source.startswith(("data:", "#")) for source in sources)
    assert "{{" not in page and "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_config_that_made_a_film_makes_it_again(morphed, guarded, tmp_path):
    folder, _ = morphed(frames=3)
    again = [str(folder / "config.json"), f"output_dir={tmp_path / 'again'}"]
    assert guarded(again)[0] == 0
    assert frames_of(tmp_path / "again/film") == frames_of(folder)


# ---- given again, and other films in the same folder ----


def test_a_finished_film_given_again_makes_no_frame_anew_and_writes_what_is_looked_at(
    morphed, evaluations, inversions
):
    folder, report = morphed(compare=True, formats=["gif"])
    before = {path: path.stat().st_mtime_ns for path in (folder / "frames").iterdir()}
    worked, inverted = sum(evaluations), len(inversions)
    (folder / "sheet.png").unlink()
    _, again = morphed(compare=True, formats=["webp"], fps=3)
    assert sum(evaluations) == worked and len(inversions) == inverted
    assert {path: path.stat().st_mtime_ns for path in (folder / "frames").iterdir()} == before
    assert (folder / "morph.webp").exists() and (folder / "sheet.png").exists()
    assert again["settings"]["fps"] == 3
    for report_, again_ in ((report, again), (report["other"], again["other"])):
        for key in ("frames", "distances", "metrics", "images", "fit", "warnings", "unet_evaluations"):
            assert again_[key] == report_[key], key


def test_a_frame_that_was_lost_from_a_finished_film_comes_back(morphed):
    folder, _ = morphed(**QUICK)
    before = frames_of(folder)
    (folder / "frames/0001.png").unlink()
    morphed(**QUICK)
    assert frames_of(folder) == before


def test_another_film_in_the_same_folder_is_refused_and_overwrite_replaces_it(
    morphed, morph_settings, guarded
):
    quick = {"loras": NONE, "reschedule": "off"}
    folder, _ = morphed(**quick, frames=6, formats=["gif", "webp"])
    (folder / "notes.txt").write_text("mine")
    before = {path: sha(path) for path in folder.rglob("*") if path.is_file()}
    other = morph_settings(**quick, frames=4, formats=["gif"])
    result = guarded(other)
    assert_one_message(result, 2, str(folder), "holds another morph", "overwrite=true", "another name")
    assert {path: sha(path) for path in folder.rglob("*") if path.is_file()} == before
    assert guarded([*other, "overwrite=true"])[0] == 0
    fresh, _ = morphed(**quick, frames=4, name="fresh")
    assert frames_of(folder) == frames_of(fresh) and len(frames_of(folder)) == 4
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "morph.webp").exists()  # the old film must not lie beside the new one
    assert guarded(other)[0] == 0  # the same film again needs no overwrite


@pytest.fixture
def hub(monkeypatch):
    """Factory of a hub: name -> folder of bases of which nothing is known before they are fetched."""
    from dataclasses import replace

    from lorakit.diffusion import models
    from lorakit.weights.base import BaseInfo, inspect_base

    def make(folders) -> set[str]:
        """Returns the names of those that have been fetched."""
        here = set()

        def inspect(name, *_):
            if name not in here:
                return BaseInfo(name, "hub")
            return replace(inspect_base(str(folders[name])), name=name, kind="hub")

        def fetch(info, prediction_type=None):
            here.add(info.name)
            return inspect(info.name)

        monkeypatch.setattr(morph_plan, "inspect_base", inspect)
        monkeypatch.setattr(models, "fetch_base", fetch)
        return here

    return make


def test_a_base_that_is_fetched_first_gives_a_film_that_goes_on(
    morphed, morph_settings, guarded, evaluations, hub, tiny_base, tmp_path
):
    """Before that nothing is known of it: no film may be taken for another one."""
    other = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    settings = other / "scheduler/scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"beta_end": 0.02}))
    here = hub({"some/base": tiny_base, "other/base": other})
    sizes = {"width": 16, "height": 16}
    folder, _ = morphed(**QUICK, **sizes, pretrained_model_name_or_path="some/base")
    before, worked = frames_of(folder), sum(evaluations)
    morphed(**QUICK, **sizes, pretrained_model_name_or_path="some/base")
    assert frames_of(folder) == before and sum(evaluations) == worked
    arguments = morph_settings(**QUICK, **sizes, pretrained_model_name_or_path="other/base")
    assert_one_message(guarded(arguments), 2, "holds another morph")
    assert frames_of(folder) == before and here == {"some/base", "other/base"}


@pytest.mark.parametrize("fetched", [False, True])
def test_what_is_not_read_of_a_prompt_is_said_once(morph_settings, guarded, hub, tiny_base, fetched):
    if fetched:
        hub({str(tiny_base): tiny_base})
    options = QUICK | {"width": 16, "height": 16, "frames": 2}
    code, out, err = guarded(morph_settings(**options, anchor_prompt="a lake " * 40))
    assert code == 0 and out.count("a prompt is over 32 tokens") == 1, err
    code, out, err = guarded(morph_settings(**options, anchor_prompt="a lake", name="short"))
    assert code == 0 and "is not read" not in out, err


@pytest.mark.parametrize("key", ["picture", "lora", "prompt"])
def test_a_changed_file_under_the_same_name_is_another_film(
    morphed, morph_settings, guarded, pictures, fitted, tmp_path, key
):
    mine = Path(shutil.copy(pictures / "0.png", tmp_path / "mine.png"))
    lora = Path(shutil.copy(fitted[0], tmp_path / "mine.safetensors"))
    images = config_of(morph_settings(loras=NONE)).model_dump(mode="json")["images"]
    images[0] |= {"path": str(mine), "lora": str(lora)}
    options = {"images": images, "frames": 3, "reschedule": "off"}
    folder, _ = morphed(**options)
    before = frames_of(folder)
    if key == "picture":
        shutil.copy(pictures / "3.png", mine)
    elif key == "lora":
        shutil.copy(fitted[1], lora)
    else:
        images[0]["prompt"] = "a lake"
    assert_one_message(guarded(morph_settings(**options)), 2, "holds another morph")
    assert frames_of(folder) == before
    morphed(**options, overwrite=True)
    assert frames_of(folder)[1] != before[1]


def test_the_folder_of_a_training_is_not_taken_for_a_film_s(trained, morph_settings, guarded, tmp_path):
    run = trained(max_train_steps=1).with_suffix("")
    before = {path: sha(path) for path in run.rglob("*") if path.is_file()}
    result = guarded(morph_settings(output_dir=str(run.parent), name=run.name))
    assert_one_message(result, 2, str(run), "another name")
    assert {path: sha(path) for path in before} == before
    assert not (run / "frames").exists() and not (run / "morph.json").exists()


def test_the_cache_is_shared_by_films_and_a_damaged_entry_is_made_anew(morphed, inversions, tmp_path):
    folder, _ = morphed(**QUICK)
    assert len(inversions) == 2
    morphed(**QUICK, guidance_scale=2.0, name="guided")  # of sampling: the paths are the same
    assert len(inversions) == 2
    entries = sorted((tmp_path / "out/cache/paths").iterdir())
    assert len(entries) == 2
    entries[0].write_bytes(entries[0].read_bytes()[:-9])
    third, _ = morphed(**QUICK, name="third")
    assert len(inversions) == 3 and frames_of(third) == frames_of(folder)
    morphed(**QUICK, num_inference_steps=5, name="steps")
    assert len(inversions) == 5
    morphed(**QUICK | {"loras": (True, False)}, name="lora")
    assert len(inversions) == 6  # the picture without a LoRA has its path already
    morphed(**QUICK, cache_dir=str(tmp_path / "elsewhere"), name="elsewhere")
    assert len(inversions) == 8 and len(list((tmp_path / "elsewhere/paths").iterdir())) == 2


# ---- faults ----


def image(**changes):
    return {"path": "dataset/mountain/mountain.jpg", "prompt": "", "lora": None, **changes}


FAULTS = {
    "no such picture": ({"images": [image(), image(path="no.png")]}, 2, ["no.png", "No such file"]),
    "a text as a picture": (
        {"images": [image(), image(path="Makefile")]},
        2,
        ["Makefile", "looks like text"],
    ),
    "one picture": ({"images": [image()]}, 2, ["images", "2"]),
    "no LoRA file": ({"images": [image(), image(lora="no.safetensors")]}, 2, ["train_if_missing=true"]),
    "a pickle": ({"images": [image(), image(lora="TMP/a.pt")]}, 2, ["a.pt", "is a pickle"]),
    "a LoRA that is cut": ({"images": [image(), image(lora="TMP/cut.safetensors")]}, 2, ["truncated"]),
    "a LoRA of few steps": (
        {"images": [image(), image(lora="TMP/lcm-lora.safetensors")]},
        2,
        ["lcm-lora", "few steps", "train_lora.py"],
    ),
    "one frame": ({"frames": 1}, 2, ["frames", ">= 2", "not 1"]),
    "one step": ({"num_inference_steps": 1}, 2, ["num_inference_steps", ">= 2", "not 1"]),
    "compare nothing": ({"compare": True}, 2, ["compare, images", "nothing to compare"]),
    "unknown key": ({"frame": 3}, 2, ["frame", "did you mean frames?"]),
    "unknown key of a picture": (
        {"images": [image(), image(prompts="x")]},
        2,
        ["images.1", "prompts", "prompt?"],
    ),
    "unknown format": ({"formats": ["avi"]}, 2, ["formats", "mp4"]),
    "width": ({"width": 20}, 2, ["width 20", "VAE factor, 8"]),
    "too small": ({"width": 8, "height": 8}, 2, ["width", ">= 16"]),
    "no such base": ({"pretrained_model_name_or_path": "no/where/x"}, 2, ["no/where/x", "no such folder"]),
    "name": ({"name": "a/b"}, 2, ["name", "a/b"]),
    "name of the cache": ({"name": "cache"}, 2, ["name", "cache", "choose another"]),
    "a file as output": ({"output_dir": "Makefile"}, 4, ["Makefile", "choose another folder"]),
    "no place": ({"output_dir": "/proc/nowhere"}, 4, ["/proc/nowhere", "use another folder"]),
    "NUL": ({"output_dir": "a\0b"}, 4, [r"'a\x00b'", "not a possible path"]),
    "a long name": ({"name": "a" * 300}, 4, ["too long", "shorten"]),
}

NO_TORCH = """
import json, sys, morph
from lorakit.ground.process import run_guarded
for arguments in json.loads(sys.argv[1]):
    code = run_guarded(lambda: morph.main(arguments))
    print("---", code, "torch" in sys.modules, file=sys.stderr)
"""


def test_what_is_wrong_is_said_before_torch_is_imported(fitted, tmp_path):
    """One process for all faults; each with its exit code, one message and its remedy."""
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(fitted[0].read_bytes()[:-100])
    shutil.copy(fitted[0], tmp_path / "lcm-lora.safetensors")
    usual = {"output_dir": str(tmp_path / "out"), "images": [image(), image()], "train_if_missing": False}
    commands = [
        [f"{key}={json.dumps(value)}" for key, value in (usual | changes).items()]
        for changes, _, _ in FAULTS.values()
    ]
    program = [sys.executable, "-c", NO_TORCH, json.dumps(commands).replace("TMP", str(tmp_path))]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = result.stderr.split("---")
    assert len(said) == len(FAULTS) + 1
    for number, (name, (_, code, words)) in enumerate(FAULTS.items()):
        text = said[number] if number == 0 else said[number].split("\n", 1)[1]
        ending = said[number + 1].split("\n", 1)[0]
        assert ending == f" {code} False", (name, ending, text)
        assert_one_message((code, "", text), code, *words)
    assert not list(tmp_path.rglob("*.png"))


def test_a_file_in_the_place_of_the_film_s_folder(guarded, morph_settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/film").write_text("mine")
    assert_one_message(guarded(morph_settings()), 4, str(tmp_path / "out/film"), "rename")
    assert (tmp_path / "out/film").read_text() == "mine"


def test_a_lora_for_another_base_or_another_kind_of_file(
    guarded, morph_settings, tiny_unet, random_lora, tmp_path
):
    from lorakit.weights.lora_file import lora_bytes

    other = random_lora(tiny_unet(block_out_channels=(16, 16)), 5, targets="attention")
    contents = {
        "wide": lora_bytes(other.modules, layout="kohya", metadata={}),
        "base": (ROOT / "ckpt/miniature/vae/diffusion_pytorch_model.safetensors").read_bytes(),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        images = config_of(morph_settings(loras=NONE)).model_dump(mode="json")["images"]
        images[1]["lora"] = str(path)
        assert_one_message(guarded(morph_settings(images=images, name=name)), 2, path.name)
        assert not list((tmp_path / "out" / name).rglob("*.png"))


def test_a_picture_that_is_broken_behind_its_header(guarded, morph_settings, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "1.png").read_bytes()[:-400])
    images = config_of(morph_settings(loras=NONE)).model_dump(mode="json")["images"]
    images[1]["path"] = str(broken)
    assert_one_message(
        guarded(morph_settings(images=images)), 2, "broken.png", "truncated or broken", "replace"
    )


def test_writers_and_distances_that_are_not_installed(guarded, morph_settings, monkeypatch, tmp_path):
    monkeypatch.setattr(morph_plan, "missing_writers", lambda formats: {"mp4": "pip install imageio-ffmpeg"})
    assert_one_message(guarded(morph_settings(formats=["mp4"])), 2, "mp4", "pip install imageio-ffmpeg")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_one_message(guarded(morph_settings(distance="lpips")), 2, "pip install lpips")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_full_is_said_before_work(guarded, morph_settings, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_one_message(guarded(morph_settings()), 4, str(tmp_path / "out"), "1,000 free", "free some space")


def test_a_disk_that_fills_up_at_any_write_keeps_what_is_finished(
    morphed, morph_settings, guarded, monkeypatch, tmp_path
):
    options = {"loras": NONE, "frames": 4, "formats": ["gif"]}
    straight, _ = morphed(**options, name="straight", cache_dir=str(tmp_path / "other"))
    monkeypatch.setattr(shooting, "SAVE_SECONDS", 0.05)
    folder, codes, finished = tmp_path / "out/film", [], {}
    while not codes or codes[-1]:
        with monkeypatch.context() as planted:
            full_disk(planted, len(codes) + 1)
            result = guarded(morph_settings(**options))
        codes.append(result[0])
        if result[0]:
            assert_one_message(result, 4, "No space left on device", "space")
        now = {path.name: sha(path) for path in folder.glob("frames/*.png")}
        assert finished.items() <= now.items()
        finished = now
        assert not [path for path in folder.rglob("*") if publish.OWN_NAME.fullmatch(path.name)]
    assert len(codes) > 15 and set(codes[:-1]) == {4}
    assert frames_of(folder) == frames_of(straight) and sha(folder / "morph.gif") == sha(
        straight / "morph.gif"
    )


# ---- kills, signals and two processes on one folder ----


def fork(arguments: list[str], log: Path, prepare=lambda: None) -> int:
    """A process that has imported everything already and runs morph.py; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            with open(log, "a", buffering=1) as sys.stdout, open(log, "a", buffering=1) as sys.stderr:
                os.dup2(sys.stderr.fileno(), 2)
                shooting.SAVE_SECONDS = 0.0  # a state after every step
                prepare()
                code = run_guarded(lambda: morph.main(arguments))
        finally:
            os._exit(code)
    return pid


def wait_for(condition: Callable[[], object], pid: int, log: Path) -> None:
    """Until a condition holds, which the process has to bring about."""
    while not condition():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.002)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


KILLED = {"count": 3, "loop": True, "loras": (True, False, False), "num_inference_steps": 12, "frames": 4}


def test_kill_9_at_random_moments_and_the_same_command_gives_the_same_bytes(
    morphed, morph_settings, evaluations, tmp_path
):
    straight, _ = morphed(**KILLED, name="straight", cache_dir=str(tmp_path / "other"))
    whole = len(evaluations)
    arguments, folder, log = morph_settings(**KILLED), tmp_path / "out/film", tmp_path / "log.txt"
    saved, kills = set(), 0
    done = mmap.mmap(-1, 4)  # passes of the U-Net that a child has begun

    def prepare():
        real = Denoiser.__call__

        def counting(*args, **options):
            done[:] = (int.from_bytes(done[:], "little") + 1).to_bytes(4, "little")
            return real(*args, **options)

        Denoiser.__call__ = counting

    rng = random.Random(0)
    while not list(folder.glob("state/*")) or len(saved) < 3:  # paths first, then passes
        done[:] = bytes(4)
        target, pid = rng.randint(14, 36), fork(arguments, log, prepare)
        wait_for(lambda target=target: int.from_bytes(done[:], "little") >= target, pid, log)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        saved |= {path.name for path in folder.glob("state/*.safetensors")}
        kills += 1
    assert 3 <= kills < 20 and not list(folder.glob("frames/*"))
    done[:] = bytes(4)
    assert ended(fork(arguments, log, prepare)) == 0, log.read_text()
    inversions = 3 * KILLED["num_inference_steps"]
    left = int.from_bytes(done[:], "little")
    assert left < whole - inversions - 6  # neither paths nor passes of the killed ones were lost
    assert frames_of(folder) == frames_of(straight)
    assert sha(folder / "sheet.png") == sha(straight / "sheet.png")


def test_kill_9_before_every_kind_of_rename_leaves_nothing_half_done(morphed, morph_settings, tmp_path):
    """Each child dies when a file of a kind that none before it died at is about to get its name."""
    options = {"loras": NONE, "frames": 3, "num_inference_steps": 4, "reschedule": "off", "formats": ["gif"]}
    straight, _ = morphed(**options, name="straight", cache_dir=str(tmp_path / "other"))
    arguments, log, kinds = morph_settings(**options), tmp_path / "log.txt", tmp_path / "kinds.txt"
    kinds.touch()

    def prepare():
        real, seen = os.replace, kinds.read_text().split()

        def replace(source, target):
            target = Path(target)
            kind = target.name if target.suffix != ".safetensors" else target.parent.name
            if kind not in seen:
                kinds.write_text(" ".join([*seen, kind]))
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.replace = replace

    codes = [ended(fork(arguments, log, prepare)) for _ in range(14)]
    assert codes[-1] == 0 and set(codes) == {-signal.SIGKILL, 0}, log.read_text()
    died_at = {".lock.json", "morph.json", "config.json", "paths", "state", "film.json", "sheet.png"}
    died_at |= {f"000{k}.png" for k in range(3)} | {"morph.gif", "report.json", "index.html"}
    assert set(kinds.read_text().split()) == died_at
    folder = tmp_path / "out/film"
    assert frames_of(folder) == frames_of(straight)  # by number too: no litter among the frames
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name]
    assert {path.name for path in folder.iterdir()} == {path.name for path in straight.iterdir()}


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_the_printed_command_goes_on(
    morphed, morph_settings, evaluations, tmp_path, signum, code
):
    options = {"loras": NONE, "num_inference_steps": 40, "reschedule": "off", "frames": 4}
    straight, _ = morphed(**options, name="straight")
    whole = sum(evaluations)
    arguments, log = morph_settings(**options), tmp_path / "log.txt"
    pid = fork(arguments, log)
    wait_for(lambda: list((tmp_path / "out/film").glob("state/*.safetensors")), pid, log)
    os.kill(pid, signum)
    assert ended(pid) == code, log.read_text()
    text = log.read_text()
    message = text[text.index("stopped: ") :]
    assert "are kept" in message and "python morph.py " in message and "Traceback" not in text
    assert "'frames=4'" in message or "frames=4" in message
    evaluations.clear()
    folder, _ = morphed(**options)
    assert frames_of(folder) == frames_of(straight)
    assert 0 < sum(evaluations) < whole - 2 * 40  # neither the inversions nor the steps before it again


def test_the_hint_leaves_overwrite_out_so_that_going_on_does_not_begin_anew(morph_settings, tmp_path):
    options = {"loras": NONE, "num_inference_steps": 300, "reschedule": "off", "frames": 4}
    log = tmp_path / "log.txt"
    pid = fork(morph_settings(**options, overwrite=True), log)
    wait_for(lambda: list((tmp_path / "out").glob("cache/paths/*.safetensors")), pid, log)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143
    message = log.read_text()[log.read_text().index("stopped: ") :]
    assert "overwrite=" not in message and str(tmp_path) in message


def test_two_runs_on_one_folder(morph_settings, guarded, tmp_path):
    folder, log = tmp_path / "out/film", tmp_path / "log.txt"
    arguments = morph_settings(loras=NONE, num_inference_steps=300, reschedule="off")
    pid = fork(arguments, log)
    wait_for((folder / "morph.json").exists, pid, log)
    assert_one_message(guarded(arguments), 2, str(folder), "in use", f"process {pid}", "another")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    with lock_run(folder):  # free again, although nobody cleaned up
        pass


# ---- LoRAs that are fitted first ----


def fit_images(pictures: Path, tmp_path: Path) -> list[dict]:
    return [
        {"path": str(pictures / "1.png"), "prompt": """a "photo" of Ann's \\ 山\n""", "lora": lora}
        for lora in (str(tmp_path / "loras/it's one.safetensors"), None)
    ]


def fit_config(tmp_path: Path, **changes) -> str:
    path = tmp_path / "fit.json"
    settings = {"rank": 2, "n_epochs": 2, "learning_rate": 1e-2, "target_modules": ["to_q", "to_v"]}
    settings |= {"sample_steps": 0, "report_to": None, "data_dir": "x", "ckpt_name": "x"}
    path.write_text(json.dumps(settings | changes))
    return str(path)


def test_a_missing_lora_is_fitted_to_its_picture_first(morphed, guarded, pictures, tmp_path):
    from lorakit.weights.lora_reader import read_lora

    images = fit_images(pictures, tmp_path)
    options = {"images": images, "train_if_missing": True, "frames": 3, "width": 24, "height": 16}
    folder, report = morphed(**options, fit_config=fit_config(tmp_path))
    lora = Path(images[0]["lora"])
    assert lora.is_file() and set(report["fit"]) == {"none", str(lora)}
    config = json.loads(read_lora(lora).metadata["lorakit.config"])
    assert config["n_epochs"] == 2 and config["rank"] == 2
    data = folder / "fit" / lora.stem
    assert json.loads((data / "metadata.jsonl").read_text())["text"] == images[0]["prompt"]
    seen = read_picture(images[0]["path"], (24, 16))
    assert (pixels(data / "picture.png") == np.asarray(seen)).all()
    before = lora.stat().st_mtime_ns
    morphed(**options, fit_config=fit_config(tmp_path), name="again")
    assert lora.stat().st_mtime_ns == before  # what is there is not trained again


def test_a_training_that_fails_is_said_with_its_exit_code(morph_settings, pictures, tmp_path, capfd):
    images = fit_images(pictures, tmp_path)
    settings = {"images": images, "train_if_missing": True}
    arguments = morph_settings(**settings, fit_config=fit_config(tmp_path, rank=0))
    code = run_guarded(lambda: morph.main(arguments))
    said = capfd.readouterr().err
    own, message = said.split("error: ", 1)[1].split("error: ")  # the training's stands above
    assert code == 2 and "rank" in own and "Traceback" not in said
    assert images[0]["lora"] in message and "training failed (exit code 2)" in message
    assert not Path(images[0]["lora"]).exists()


@pytest.mark.parametrize("code", [130, 143])
def test_a_training_that_was_stopped_stops_the_morph(
    guarded, morph_settings, pictures, tmp_path, monkeypatch, code
):
    stub = tmp_path / "stub"
    stub.write_text(f"#!/bin/sh\nexit {code}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    images = fit_images(pictures, tmp_path)
    result = guarded(morph_settings(images=images, train_if_missing=True, fit_config=fit_config(tmp_path)))
    assert result[0] == code and "stopped: while" in result[2] and "the same command goes on" in result[2]


def test_a_signal_to_the_morph_reaches_the_training(morph_settings, pictures, tmp_path):
    stub, log = tmp_path / "stub", tmp_path / "log.txt"
    stub.write_text(
        f"#!/bin/sh\ntrap 'exit 143' TERM\ntouch '{tmp_path}/begun'\nwhile :; do sleep 0.05; done\n"
    )
    stub.chmod(0o755)

    def prepare():
        sys.executable = str(stub)

    images = fit_images(pictures, tmp_path)
    arguments = morph_settings(images=images, train_if_missing=True, fit_config=fit_config(tmp_path))
    pid = fork(arguments, log, prepare)
    wait_for((tmp_path / "begun").exists, pid, log)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143, log.read_text()


# ---- the miniature ----


def mountains(**changes) -> list[dict]:
    cfg = load_config(MorphConfig, ROOT / "cfg/morph/mountain.json").config
    return [picture.model_dump(mode="json") | {"lora": None} | changes for picture in cfg.images]


def test_a_probe_makes_the_speed_of_two_mountains_even(morphed):
    options = {
        "pretrained_model_name_or_path": "ckpt/miniature",
        "images": mountains(),
        "frames": 7,
        "num_inference_steps": 10,
        "probe_points": 9,
        "probe_steps": 5,
    }
    plain, even = (
        morphed(**options, reschedule=reschedule, name=reschedule)[1] for reschedule in ("off", "probe")
    )
    uneven = [report["metrics"]["max_over_min"] - 1 for report in (plain, even)]
    assert uneven[1] < 0.5 * uneven[0] and uneven[1] < 0.4
    assert even["metrics"]["step_cv"] < plain["metrics"]["step_cv"]
    assert [image["endpoint_psnr_to_vae"] for image in even["images"]] == [None, None]


def test_loras_that_are_mixed_up_are_warned_of_and_right_ones_are_not(morphed, trained):
    """Eight steps of training are enough to tell whose a LoRA is."""
    images = mountains()
    for picture in images:
        name = Path(picture["path"]).stem
        data = {"data_dir": f"dataset/{name}", "ckpt_name": name, "resolution": 128}
        lora = trained(
            **data,
            pretrained_model_name_or_path="ckpt/miniature",
            max_train_steps=8,
            learning_rate=1e-3,
            checkpointing_steps=100,
            validation_steps=0,
        )
        picture["lora"] = str(lora)
    options = {
        "pretrained_model_name_or_path": "ckpt/miniature",
        "frames": 2,
        "num_inference_steps": 4,
        "reschedule": "off",
    }
    _, right = morphed(**options, images=images, name="right")
    assert right["warnings"] == [], right["fit"]
    images[0]["lora"], images[1]["lora"] = images[1]["lora"], images[0]["lora"]
    _, wrong = morphed(**options, images=images, name="wrong")
    assert len(wrong["warnings"]) == 2, wrong["fit"]
    for k, warning in enumerate(wrong["warnings"]):
        assert f"images.{k}: " in warning and "mixed up?" in warning


def test_two_processes_share_the_frames_and_give_what_one_gives(morphed, morph_settings, tmp_path):
    options = {"count": 3, "loop": True, "loras": (True, True, False), "formats": ["gif"]}
    single, _ = morphed(**options, name="single")
    arguments = morph_settings(**options, name="double", cache_dir=str(tmp_path / "other"))
    command = torchrun("morph.py", arguments)
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    double = tmp_path / "out/double"
    assert len(frames_of(double)) == len(frames_of(single)) == 12
    for path in sorted((single / "frames").iterdir()):
        assert np.abs(pixels(path) - pixels(double / "frames" / path.name)).max() <= 1
    report = json.loads((double / "report.json").read_text())
    assert (
        len(report["frames"]) == 12 and (double / "morph.gif").exists() and (double / "index.html").exists()
    )
    assert not (double / "state").exists()


def test_a_launcher_cannot_train(guarded, morph_settings, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    images = fit_images(pictures, tmp_path)
    arguments = morph_settings(images=images, train_if_missing=True, fit_config=fit_config(tmp_path))
    assert_one_message(guarded(arguments), 2, "train_if_missing", "once without the launcher")


# ---- configs and the command line ----


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--help"], 0), (["--schema"], 0), (["--print-config"], 0), (["--check"], 0), (["frames=x"], 2)],
)
def test_what_needs_no_model_answers_at_once_without_torch(program, argv, code):
    result = program("morph.py", argv)
    assert result.code == code and not result.torch and result.blinks < 20


def test_the_schema_is_current():
    written = json.loads((ROOT / "cfg/morph/schema.json").read_text())
    assert written == schema(MorphConfig), "run: make schema"


def test_every_config_loads_and_names_its_schema():
    from lorakit.training.config import TrainConfig

    paths = [path for path in ROOT.glob("cfg/morph/*.json") if path.name != "schema.json"]
    paths += ROOT.glob("cfg/sd15/morph*.json")
    assert len(paths) >= 2
    for path in paths:
        is_fit = path.name.startswith("fit")
        loaded = load_config(TrainConfig if is_fit else MorphConfig, path).config
        named = path.parent.joinpath(json.loads(path.read_text())["$schema"]).resolve()
        assert named == ROOT / ("cfg/schema.json" if is_fit else "cfg/morph/schema.json")
        if isinstance(loaded, MorphConfig) and path.parent.name == "morph":
            assert all((ROOT / picture.path).is_file() for picture in loaded.images)
            assert (ROOT / loaded.fit_config).is_file()
