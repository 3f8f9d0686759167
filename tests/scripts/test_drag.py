"""The script that drags things in a picture: exactness, masks, both methods, kills, the faults of users."""

import base64
import io
import json
import os
import random
import re
import signal
from pathlib import Path

import narrow
import numpy as np
import pytest
from galleries import ONE_LEVEL, command_line, distance, levels, pictures_in, report_in, runner
from PIL import Image

import drag
from lorakit.editing.drag_config import DragConfig
from lorakit.editing.drag_plan import View, make_drag_plan, pull_bytes
from lorakit.ground.config import load_config, schema
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.pictures.painted import EMBEDDED
from lorakit.sampling.recipe import CONFIG_CHUNK

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
WAY = [[8.0, 12.0], [16.0, 12.0]]
STILL = [[8.0, 12.0], [8.0, 12.0]]
# Of the tiny base's shape: a cell of its latents is two pixels, of its features four.
PULL = {"method": "drag", "iterations": 3, "learning_rate": 0.3, "start": 0.5}


@pytest.fixture
def arguments(tiny_base, pictures, tmp_path):
    """Factory of the command line for one picture of 24 pixels, seen at 16, on the tiny base."""

    def make(*more, **changes):
        keys = dict(
            image=str(pictures / "0.png"), prompt="a photo of hills", points=[WAY], num_inference_steps=4,
            width=16, height=16, radius=4.0, start=0.5,
        )  # fmt: skip
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    return runner(drag, arguments, tmp_path)


@pytest.fixture
def painted():
    """(24, 24) uint8, white in its upper part, where the way lies."""
    found = np.zeros((24, 24), np.uint8)
    found[3:18] = 255
    return found


@pytest.fixture
def mask(painted, tmp_path):
    Image.fromarray(painted).save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


def tracks_in(folder):
    return json.loads((folder / "track.json").read_text(encoding="utf-8"))


def embedded(painted):
    buffer = io.BytesIO()
    Image.fromarray(painted).save(buffer, "PNG")
    return EMBEDDED + base64.b64encode(buffer.getvalue()).decode()


# ---- what comes out ----


@pytest.mark.quick
def test_a_drag_gives_a_picture_its_ways_its_track_and_a_page(run, capsys, mask):
    folder = run(mask=mask)
    names = {"0000.png", "overlay_0000.png", "sheet.png", "report.json", "track.json", "index.html"}
    assert {path.name for path in folder.iterdir()} == names
    out = capsys.readouterr().out
    assert out.startswith("pictures    1 of ") and "drag        the pixels were moved; " in out
    (track,) = tracks_in(folder)
    (way,) = track["ways"]
    assert way["handle"] == WAY[0] and way["target"] == WAY[1] == way["tracked"]
    assert way["track"] == WAY and way["left"] == pytest.approx(
        np.hypot(*np.subtract(way["seen"], WAY[1])), abs=0.02
    )
    (entry,) = report_in(folder)["pictures"]
    assert entry["left"] == pytest.approx(way["left"], abs=0.06) and entry["psnr"] and entry["stopped"]
    # 4 of the inversion; then picture and result from node 2 of 4.
    assert report_in(folder)["evaluations"] == 4 + 2 * 2
    assert 0 < report_in(folder)["inversion_seconds"] < report_in(folder)["seconds"]
    assert '"ways": [[[' in (folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def trip(tiny_base, pictures):
    """Levels of what the autoencoder makes of the picture."""
    from lorakit.diffusion.models import Base
    from lorakit.diffusion.paths import decode_picture, encode_picture
    from lorakit.pictures.images import read_picture
    from lorakit.weights.base import inspect_base

    base = Base(inspect_base(str(tiny_base)))
    latents = encode_picture(base, read_picture(pictures / "0.png", (16, 16)))
    return np.asarray(decode_picture(base, latents[0]), np.int16)


@pytest.mark.parametrize("ways", [PULL, {"grid": {"kind": ["move", "stretch"], "noise": ["moved", "own"]}}])
def test_a_way_that_leads_nowhere_gives_the_round_trip_to_the_bit(run, trip, mask, capsys, ways):
    folder = run(points=[STILL], mask=mask, guidance_scale=2.0, **ways)
    assert len(pictures_in(folder)) == (1 if ways is PULL else 4)
    assert all((found == trip).all() for found in pictures_in(folder))
    assert "way 0 leads nowhere" in capsys.readouterr().out
    assert all(row["psnr"] is None for row in report_in(folder)["pictures"])
    moved = run(mask=mask, name="moved", guidance_scale=2.0, **ways)
    assert all(distance(found, trip) > ONE_LEVEL for found in pictures_in(moved))


@pytest.mark.parametrize("method", ["warp", "drag"])
def test_outside_of_the_mask_is_the_round_trip(run, mask, trip, method, capsys):
    options = PULL if method == "drag" else {}
    found = pictures_in(run(mask=mask, **options))[0]
    assert (found[12:] == trip[12:]).all() and distance(found[3:11], trip[3:11]) > ONE_LEVEL
    assert "everything may change" not in capsys.readouterr().out
    free = pictures_in(run(name="free", **options))[0]
    assert distance(free[12:], trip[12:]) > ONE_LEVEL
    assert "mask is null: everything may change" in capsys.readouterr().out


def test_the_mask_lies_in_the_config_as_well_and_is_kept_with_the_picture(run, mask, painted, tmp_path):
    folder = run(mask=mask)
    inside = run(mask=embedded(painted), name="inside")
    assert (pictures_in(folder)[0] == pictures_in(inside)[0]).all()
    picture = inside / "0000.png"
    assert json.loads(Image.open(picture).text[CONFIG_CHUNK])["mask"] == embedded(painted)
    assert drag.main(["--from", str(picture), f"output_dir={tmp_path / 'again'}"]) == 0
    assert (pictures_in(tmp_path / "again/inside_0000")[0] == pictures_in(inside)[0]).all()


def test_dragdiffusion_follows_the_features_and_says_why_it_stopped(run, mask, capsys):
    folder = run(mask=mask, **(PULL | {"learning_rate": 1e-6}))
    (track,) = tracks_in(folder)
    assert track["stopped"] == "the handles had 3 iterations" and track["steps"] == 3
    assert len(track["ways"][0]["track"]) == 4
    # 4 of the inversion, the features of the start, 3 pulls and a last look, picture and result twice.
    assert report_in(folder)["evaluations"] == 4 + 1 + 4 + 2 * 2
    short = run(points=[[[8.0, 12.0], [10.0, 12.0]]], name="short", mask=mask, **PULL)
    assert tracks_in(short)[0]["stopped"] == "every handle arrived after 0 iterations"
    assert "less than a cell of the latents" in capsys.readouterr().out


def test_the_same_command_gives_the_same_bytes_and_takes_the_path_from_the_cache(run, mask):
    folder, again = run(mask=mask, **PULL), run(mask=mask, name="again", **PULL)
    assert (pictures_in(folder)[0] == pictures_in(again)[0]).all()
    assert report_in(again)["evaluations"] == report_in(folder)["evaluations"] - 4


def test_a_narrow_sd15_is_dragged_too_with_the_same_feature_block(run, tmp_path):
    base = narrow.write_base(tmp_path, "modern")
    keys = {"pretrained_model_name_or_path": str(base), "width": 64, "height": 64, "num_inference_steps": 2}
    for name, changes in {"warp": {}, "drag": PULL}.items():
        folder = run(**(keys | changes), name=name)
        assert report_in(folder)["pictures"][0]["psnr"]
    from lorakit.diffusion.models import Base
    from lorakit.weights.base import inspect_base

    unet = Base(inspect_base(str(base))).unet
    assert len(unet.up_blocks) == 4 and DragConfig.model_fields["feature_block"].default == -2


@pytest.mark.slow
def test_a_missing_lora_is_fitted_to_the_picture_first(run, tmp_path):
    from small import SHORT_RUN

    keys = {key: value for key, value in SHORT_RUN.items() if key not in ("resolution", "ckpt_name")}
    (tmp_path / "fit.json").write_text(json.dumps(keys | {"data_dir": str(tmp_path), "max_train_steps": 2}))
    lora = tmp_path / "own.safetensors"
    fit = {"lora": str(lora), "train_if_missing": True, "fit_config": str(tmp_path / "fit.json")}
    folder = run(**fit)
    assert lora.exists() and (folder / "fit/own/picture.png").exists()
    again, without = run(lora=str(lora), name="again"), run(name="without")
    assert distance(pictures_in(folder)[0], pictures_in(again)[0]) == 0
    assert distance(pictures_in(folder)[0], pictures_in(without)[0]) > 0


# ---- places ----


def test_places_of_the_picture_are_found_where_it_is_scaled_and_cut():
    assert View((24, 24), (16, 16)).seen((12.0, 6.0)) == (8.0, 4.0)
    wide = View((400, 200), (128, 128))  # scaled to 256 x 128, 64 cut off at the left
    assert wide.seen((200.0, 100.0)) == (64.0, 64.0) and wide.seen((100.0, 0.0)) == (0.0, 0.0)
    for view in (wide, View((333, 512), (96, 160)), View((24, 24), (16, 16))):
        assert view.own(view.seen((17.0, 21.0))) == pytest.approx((17.0, 21.0))


# ---- kills ----


def fork(arguments, log, prepare=lambda: None):
    """The exit code of a process that has imported everything already and runs drag.py."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(descriptor, number)
            prepare()
            code = run_guarded(lambda: drag.main(arguments))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_before_any_rename_the_same_command_gives_the_same_bytes(run, arguments, mask, tmp_path):
    """Each child dies when a file of a kind that none before it died at is about to get its name."""
    straight = run(mask=mask, name="straight", cache_dir=str(tmp_path / "other"), **PULL)
    options, kinds = arguments(mask=mask, overwrite=True, **PULL), tmp_path / "kinds.txt"
    kinds.touch()

    def prepare():
        real, seen = os.replace, kinds.read_text().split()

        def replace(source, target):
            kind = Path(target).name if Path(target).suffix != ".safetensors" else "path"
            if kind not in seen:
                kinds.write_text(" ".join([*seen, kind]))
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.replace = replace

    codes = [fork(options, tmp_path / "log.txt", prepare) for _ in range(8)]
    assert codes == [-signal.SIGKILL] * 7 + [0], (tmp_path / "log.txt").read_text()
    files = {"0000.png", "overlay_0000.png", "track.json", "report.json", "sheet.png", "index.html"}
    assert set(kinds.read_text().split()) == files | {"path"}
    folder = tmp_path / "out/run"
    assert {path.name for path in folder.iterdir()} == files
    for name in ("overlay_0000.png", "track.json", "sheet.png"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    assert (levels(folder / "0000.png") == levels(straight / "0000.png")).all()


def test_killed_at_random_the_same_command_gives_the_same_bytes(run, arguments, mask, tmp_path):
    straight = run(mask=mask, name="straight", cache_dir=str(tmp_path / "other"), **PULL)
    options = arguments(mask=mask, **PULL)
    for at in random.Random(0).sample(range(1, 6), 3):

        def prepare(at=at):
            from lorakit.diffusion.denoiser import Denoiser

            real, left = Denoiser.__call__, [at]

            def counting(*args, **options):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            Denoiser.__call__ = counting

        code = fork(options, tmp_path / "log.txt", prepare)
        assert code == -signal.SIGKILL and not list((tmp_path / "out/run").glob("*.png"))
    assert fork(options, tmp_path / "log.txt") == 0
    for name in ("overlay_0000.png", "track.json", "sheet.png"):
        assert (tmp_path / "out/run" / name).read_bytes() == (straight / name).read_bytes()


def test_ctrl_c_during_a_drag_ends_it_with_130_and_nothing_half_written(arguments, mask, tmp_path):
    def prepare():
        from lorakit.editing import drag_desk

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        drag_desk.drag_latents = interrupted

    assert fork(arguments(mask=mask, **PULL), tmp_path / "log.txt", prepare) == 130
    assert not list((tmp_path / "out/run").iterdir())
    assert fork(arguments(mask=mask, **PULL), tmp_path / "log.txt") == 0


# ---- faults ----


def test_a_rate_that_breaks_it_leaves_nothing(arguments, mask, tmp_path):
    with pytest.raises(UserError, match="lower learning_rate") as caught:
        drag.main(arguments(mask=mask, **(PULL | {"learning_rate": 1e30})))
    assert caught.value.exit_code == 3 and not list((tmp_path / "out").glob("run/*"))


def test_a_lora_of_another_picture_is_said(run, fitted, capsys):
    run(lora=str(fitted[0]))
    assert "no better than none does" in capsys.readouterr().out


NOTES = {
    "a short way": (
        {"points": [[[8, 12], [9, 12]]]},
        "way 0 is 1 pixels long, less than a cell of the latents, 3",
    ),
    "cut off": ({"points": [[[8, 12], [23, 12]]]}, "way 0 ends so near to the picture's edge"),
    "no words": ({"prompt": ""}, "prompt is empty"),
    "an early start": ({"start": 0.0}, "the model may take back what was moved"),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_may_not_be_meant_is_said_before_the_work(name, command, arguments):
    changes, message = NOTES[name]
    result = command("drag", arguments("--check", **changes))
    assert result.code == 0 and not result.torch and message in result.out
    assert message not in command("drag", arguments("--check", start=0.75)).out


def test_check_tells_work_and_memory_without_torch(command, arguments, mask):
    result = command("drag", arguments("--check", mask=mask, prompt="hills and " * 60, **PULL))
    assert result.code == 0 and not result.torch and "is not read" in result.out
    assert "ways        1, of 8 pixels" in result.out
    assert re.search(
        r"a pull of the latents keeps [\d.]+ MB for the way back, half of it in half", result.out
    )
    assert "a pull of the latents" not in command("drag", arguments("--check", mask=mask)).out
    # The features of the start, 3 pulls and a last look; picture and result from node 2 of 4.
    assert "work        9 rows through the U-Net at most, 4 before them for each new path" in result.out


@pytest.mark.parametrize("base", ["tiny", "narrow"])
def test_a_pull_keeps_what_the_plan_says_and_no_gradient_of_a_weight(
    base, arguments, mask, fitted, tiny_base, tmp_path, monkeypatch
):
    import torch

    from lorakit.editing import drag_desk

    kept, real = [0], drag_desk.drag_latents

    def watched(look, *rest):
        def looked(latents):
            seen = {}

            def pack(tensor):
                seen[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                found = look(latents)
            assert not any(
                isinstance(each, torch.nn.Parameter) and each.requires_grad for each in seen.values()
            )
            own = (each.untyped_storage().nbytes() for each in seen.values() if each.requires_grad)
            kept.append(sum(own))
            return found

        return real(looked, *rest)

    monkeypatch.setattr(drag_desk, "drag_latents", watched)
    own = {"lora": str(fitted[0])} if base == "tiny" else {"width": 64, "height": 64}
    folder = tiny_base if base == "tiny" else narrow.write_base(tmp_path, "modern")
    most = {}
    for weight in (0.1, 0.0):
        keys = PULL | own | {"iterations": 1, "mask": mask, "mask_weight": weight, "name": f"run_{weight}"}
        words = arguments(**keys, pretrained_model_name_or_path=str(folder))
        cfg = load_config(DragConfig, words[0], words[1:]).config
        kept[:] = [0]
        assert drag.main(words) == 0
        most[weight] = max(kept)
        assert 0.7 < max(kept) / pull_bytes(cfg.resolved()[0], make_drag_plan(cfg)) < 1.2
    assert most[0.0] < 0.9 * most[0.1]  # the pass ends at the block


def test_presets_are_valid_and_the_schema_is_that_of_the_keys():
    presets = [path for path in ROOT.glob("cfg/drag/*.json") if path.stem != "schema"]
    presets += ROOT.glob("cfg/sd15/drag*.json")
    assert len(presets) >= 2
    for path in presets:
        cfg = load_config(DragConfig, path).config
        assert cfg.points and cfg.mask and (ROOT / cfg.fit_config).is_file() and (ROOT / cfg.image).is_file()
    assert json.loads((ROOT / "cfg/drag/schema.json").read_text()) == schema(DragConfig)
