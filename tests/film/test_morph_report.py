"""What is looked at of a film: numbers with known answers, animations, sheets, a page that stands alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.diffusion.metrics import DEFINITIONS, FeatureDistance
from lorakit.film import morph_report
from lorakit.film.config import MorphConfig
from lorakit.film.morph_folder import FILM, Version, finished_version, frame_paths
from lorakit.film.morph_plan import make_morph_plan
from lorakit.film.morph_report import measure, summary, write_outputs
from lorakit.ground.config import load_config
from lorakit.pictures.images import save_png

NONE = (False, False, False)


class MeanGrey(FeatureDistance):
    """How bright a picture is."""

    def levels(self, image):
        return [image.mean((1, 2, 3), keepdim=True)]


def grain(level: float, contrast: float = 20.0, seed: int = 0, size=(32, 24)) -> Image.Image:
    """A grey picture of this mean and this contrast."""
    noise = np.random.default_rng(seed).choice([-1.0, 1.0], size[::-1])
    grey = np.clip(level + contrast * noise, 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))


def version(positions, **changes) -> Version:
    ends = len({u for u in positions if u == int(u)})
    settings = dict(
        positions=list(positions),
        noise_mean=[0.0] * ends,
        noise_std=[1.0] * ends,
        residual_ratio=[0.05] * ends,
        evaluations=77,
        seconds=1.234,
        attention_bytes=1000,
        fit={},
        warnings=[],
    )
    return Version(**(settings | changes))


@pytest.fixture
def film(morph_settings, tmp_path):
    """Factory of a film on the disk, without a model: config, folder, its report, and its pictures."""

    def make(positions, levels, without=None, **changes):
        cfg = load_config(MorphConfig, None, morph_settings(**{"loras": NONE} | changes)).config
        plan = make_morph_plan(cfg)
        folder = tmp_path / "film"
        ends = [grain(levels[positions.index(k)]) for k in range(len(cfg.images))]
        versions = [version(positions)]
        for frame, path in zip(levels, frame_paths(folder / "frames", len(levels)), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(grain(frame), path)
        if without:
            versions.append(version(positions, evaluations=55))
            for frame, path in zip(without, frame_paths(folder / "without_lora/frames", 9), strict=False):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(grain(frame), path)
        write_outputs(cfg, plan, folder, versions, ends, ends, MeanGrey())
        return cfg, folder, json.loads((folder / "report.json").read_text()), ends

    return make


# ---- numbers ----


def test_steps_and_metrics_of_a_film_whose_brightness_is_known():
    levels, positions = [60, 80, 140, 160], [0.0, 0.3, 0.6, 1.0]
    found = measure([grain(x) for x in levels], positions, [grain(60), grain(160)], MeanGrey())
    assert found.steps == pytest.approx([20 / 127.5, 60 / 127.5, 20 / 127.5], rel=5e-3)
    assert found.metrics["path_length"] == pytest.approx(100 / 127.5, rel=5e-3)
    assert found.metrics["directness"] == pytest.approx(1, rel=5e-3)
    assert found.metrics["max_over_mean"] == pytest.approx(1.8, rel=5e-3)
    assert found.metrics["largest_step_at"] == pytest.approx(0.45)
    assert set(found.metrics) <= set(DEFINITIONS)


def test_a_detour_is_no_straight_way_and_a_closed_film_comes_home():
    levels, positions = [60, 160, 110, 60], [0.0, 1.0, 1.5, 2.0]
    ends = [grain(60), grain(160), grain(60)]
    assert measure([grain(x) for x in levels], positions, ends, MeanGrey()).metrics[
        "directness"
    ] == pytest.approx(1, rel=5e-3)
    levels = [60, 160, 200, 60]
    assert measure([grain(x) for x in levels], positions, ends, MeanGrey()).metrics["directness"] > 1.3


def test_sharpness_of_the_middle_is_over_that_of_the_pictures():
    positions = [0.0, 0.25, 0.5, 0.75, 1.0]
    for contrast, wanted in ((20.0, 1.0), (10.0, 0.5)):
        frames = [grain(100, contrast if 0.3 < u < 0.7 else 20.0) for u in positions]
        found = measure(frames, positions, [grain(100), grain(100)], MeanGrey())
        assert found.sharpness[2] == pytest.approx(wanted, rel=0.05)
        assert found.sharpness[0] == pytest.approx(1)


# ---- files ----


def test_a_film_s_outputs(film):
    positions, levels = [0.0, 0.4, 0.7, 1.0], [60, 90, 120, 160]
    cfg, folder, report, _ = film(positions, levels, formats=["gif", "webp", "apng", "mp4"], fps=5)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("frames", "morph.gif", "morph.webp", "morph.apng", "morph.mp4"),
        *("sheet.png", "report.json", "index.html"),
    }
    for name in ("morph.gif", "morph.webp", "morph.apng"):
        with Image.open(folder / name) as image:
            assert image.n_frames == 4
    assert [f["alpha"] for f in report["frames"]] == pytest.approx([0, 0.4, 0.7, 1])
    assert [f["segment"] for f in report["frames"]] == [0, 0, 0, 0]
    assert [f["file"] for f in report["frames"]] == [f"frames/000{k}.png" for k in range(4)]
    assert len(report["distances"]) == 3 and report["unet_evaluations"] == 77
    assert report["settings"]["fps"] == 5 and set(report["libraries"]) >= {"torch", "diffusers", "peft"}
    assert report["metrics"]["middle_sharpness"] == pytest.approx(1, rel=0.05)
    assert report["cross_fade"]["path_length"] == pytest.approx(report["metrics"]["path_length"], rel=0.01)
    assert "other" not in report


def test_the_ends_are_compared_with_the_pictures(film, monkeypatch):
    _, _, report, _ = film([0.0, 0.5, 1.0], [60, 90, 160])
    for image in report["images"]:  # equal to the bit is no number
        assert image["endpoint_psnr"] is None and image["endpoint_psnr_to_vae"] is None
        assert image["endpoint_ssim"] == pytest.approx(1)
    lines = summary(report)
    assert sum("its frame equal, the VAE alone equal" in line for line in lines) == 2


def test_an_end_that_misses_its_picture_is_told_by_how_much(film, morph_settings, tmp_path):
    cfg, folder, _, ends = film([0.0, 0.5, 1.0], [60, 90, 160])
    save_png(grain(70), folder / "frames/0000.png")
    write_outputs(cfg, make_morph_plan(cfg), folder, [version([0.0, 0.5, 1.0])], ends, ends, MeanGrey())
    images = json.loads((folder / "report.json").read_text())["images"]
    assert (
        images[0]["endpoint_psnr"] == pytest.approx(20 * math.log10(255 / 10))
        and images[1]["endpoint_psnr"] is None
    )


def test_a_closed_film_has_a_step_back_to_its_first_picture(film):
    positions, levels = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [60, 80, 100, 130, 160, 110]
    _, folder, report, _ = film(positions, levels, count=3, loop=True, frames=3, formats=["gif"])
    assert len(report["frames"]) == len(report["distances"]) == 6
    assert report["distances"][-1] == pytest.approx(50 / 127.5, rel=5e-3)
    with Image.open(folder / "morph.gif") as image:
        assert image.n_frames == 6
    assert len(report["images"]) == 3


def test_two_films_beside_each_other(film, fitted):
    positions, levels = [0.0, 0.5, 1.0], [60, 90, 160]
    _, folder, report, _ = film(
        positions, levels, [60, 150, 160], compare=True, loras=(True, True), formats=["gif"]
    )
    assert report["other"]["frames"][1]["file"] == "without_lora/frames/0001.png"
    assert report["other"]["unet_evaluations"] == 55
    assert report["other"]["metrics"]["max_over_mean"] > report["metrics"]["max_over_mean"]
    with Image.open(folder / "compare.gif") as both:
        assert both.n_frames == 3
        both.seek(1)
        grey = np.asarray(both.convert("L"), float)
        half = grey.shape[1] // 2
        assert grey[:, : half - 4].mean() == pytest.approx(90, abs=3)
        assert grey[:, half + 4 :].mean() == pytest.approx(150, abs=3)
    with Image.open(folder / "compare.png") as sheet:
        assert sheet.height > 3 * 24
    page = (folder / "index.html").read_text()
    assert "without LoRA" in page and page.count("data:image/webp") >= 6
    lines = summary(report)
    assert any("without LoRA" in line for line in lines) and any("cross-fade" in line for line in lines)


def test_numbers_that_are_not_finite_never_reach_the_report(film, monkeypatch):
    monkeypatch.setattr(morph_report, "ssim", lambda a, b: math.nan)
    with pytest.raises(ValueError, match="JSON"):
        film([0.0, 0.5, 1.0], [60, 90, 160])


def test_a_film_longer_than_a_row_of_the_sheet(film):
    levels = list(range(60, 60 + 5 * 21, 5))
    _, folder, report, _ = film([k / 20 for k in range(21)], levels, frames=21)
    assert len(report["frames"]) == 21
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.height > 3 * 24 and sheet.width > 8 * 32


def test_the_page_needs_nothing_but_itself(film):
    _, folder, _, _ = film([0.0, 0.5, 1.0], [60, 90, 160])
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>") and "Morph: film" in page
    for word in ('src="http', 'href="http', 'src="//', "url(", "@import", "fetch("):
        assert word not in page


# ---- finished films ----


def test_a_finished_film_is_known_by_its_record_and_all_of_its_frames(tmp_path):
    made = version([0.0, 1 / 3, 1.0], fit={"none": [0.1, 0.2]}, warnings=["x"])
    assert finished_version(tmp_path) is None
    made.save(tmp_path)
    assert finished_version(tmp_path) is None  # without frames
    for path in made.frames(tmp_path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert finished_version(tmp_path) == made
    made.frames(tmp_path)[1].unlink()
    assert finished_version(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"positions": []}', "null"])
def test_a_damaged_record_is_no_finished_film(tmp_path, content):
    (tmp_path / FILM).write_text(content)
    assert finished_version(tmp_path) is None


def test_a_record_holds_no_tensor(tmp_path):
    made = version([0.0, 1.0], residual_ratio=torch.tensor([0.1, 0.2]).tolist())
    made.save(tmp_path)
    assert json.loads((tmp_path / FILM).read_text())["positions"] == [0.0, 1.0]
    assert Path(tmp_path / FILM).exists()
