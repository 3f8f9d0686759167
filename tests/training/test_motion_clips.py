"""Clips that motion is learnt from: a camera over stills, takes of films."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.motion.camera import Pose, between, path
from lorakit.motion.estimate import similarity
from lorakit.pictures.captions import DataError
from lorakit.pictures.folder import Row, read_folder
from lorakit.training.clips import check_stills, film_clips, seen_box, still_clips

SHAPE = 64, 64
CAMERAS = {
    "pan left": {"pan": -0.3},
    "tilt up": {"tilt": 0.25},
    "zoom in": {"zoom": 1.35},
    "zoom out": {"zoom": 0.75},
    "roll": {"roll": 15.0},
    "pan and zoom": {"pan": 0.2, "zoom": 1.2},
}


def poses_of(camera: dict, frames: int = 4, shape=SHAPE) -> list[Pose]:
    rest = {"pan": 0.0, "tilt": 0.0, "zoom": 1.0, "roll": 0.0}
    keys = {name: [at, camera.get(name, at)] for name, at in rest.items()}
    return path(frames, shape, keys, "linear", False)


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> Row:
    """Blots of all sizes, 300 x 200."""
    folder, rng = tmp_path_factory.mktemp("still"), np.random.default_rng(0)
    blots = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((300, 200)), float)
        for n in (4, 9, 20)
    ]
    Image.fromarray(np.mean(blots, 0).astype(np.uint8)).save(folder / "a.png")
    (folder / "a.txt").write_text("blots")
    return read_folder(folder).rows[0]


@pytest.mark.parametrize("name", CAMERAS)
def test_a_still_moves_as_the_camera_says_in_every_take(still, name):
    poses = poses_of(CAMERAS[name])
    asked = [between(a, b) for a, b in zip(poses, poses[1:], strict=False)]
    for clip in still_clips(still, SHAPE, [poses], 3, 1.0):
        frames = torch.from_numpy(np.stack(list(clip.frames(10**6)))) / 2 + 0.5
        found = similarity(frames[:-1], frames[1:]).tolist()
        for move, (dx, dy, log_scale, angle) in zip(asked, found, strict=True):
            assert math.hypot(dx - move.dx, dy - move.dy) < 0.3
            assert abs(log_scale - move.log_scale) < 0.006 and abs(angle - move.angle) < 0.006


def test_takes_start_at_places_of_their_own_that_follow_from_the_picture_alone(still):
    poses = poses_of(CAMERAS["zoom in"])
    first, second = still_clips(still, SHAPE, [poses], 4, 1.0), still_clips(still, SHAPE, [poses], 4, 1.0)
    assert first == second and len({(clip.side, clip.corner) for clip in first}) == 4
    assert first[:2] == still_clips(still, SHAPE, [poses], 2, 1.0)
    other = still_clips(replace(still, sha256="b" * 64), SHAPE, [poses], 4, 1.0)
    assert other[0].corner == first[0].corner and other[1].corner != first[1].corner
    for clip in first:
        left, top, right, bottom = seen_box(poses, SHAPE)
        assert min(clip.corner) >= 0
        assert clip.corner[0] + clip.side * (right - left) <= still.width + 1e-6
        assert clip.corner[1] + clip.side * (bottom - top) <= still.height + 1e-6
        assert clip.side >= 1.35  # where the camera is far a pixel is one of the still


def test_a_camera_that_goes_nowhere_shows_the_still_as_a_picture_of_it_is_shown(still):
    poses = [Pose(), Pose()]
    (clip,) = still_clips(still, SHAPE, [poses], 1, 1.0)
    one, other = clip.frames(10**6)
    from lorakit.pictures.images import load_image
    from lorakit.pictures.views import View

    shown = View(still, SHAPE).pixels(load_image(still.source))
    assert np.array_equal(one, other) and np.abs(one - shown).mean() < 0.01


@pytest.mark.parametrize(
    ("camera", "enlarge", "needed"),
    [({"pan": 3.0}, 1.0, (256, 64)), ({"zoom": 4.0}, 1.0, (256, 256)), ({"zoom": 4.0}, 2.0, (128, 128))],
)
def test_a_still_too_small_for_its_camera_is_refused_with_what_it_needs(still, camera, enlarge, needed):
    paths = [poses_of(camera)]
    fits = replace(still, width=needed[0], height=needed[1])
    check_stills("folder", [fits], [SHAPE], [paths], enlarge)
    small = replace(fits, width=needed[0] - 1)
    words = rf"folder/a.png: is {needed[0] - 1}x{needed[1]}, the camera needs {needed[0]}x{needed[1]} pixels"
    with pytest.raises(DataError, match=words + r"[\s\S]*motion.enlarge"):
        check_stills("folder", [fits, small], [SHAPE] * 2, [paths] * 2, enlarge)


def test_takes_of_a_film_lie_evenly_over_it_and_are_fewer_where_it_is_short(still):
    film = replace(still, frames=20)
    assert [clip.start for clip in film_clips(film, SHAPE, 4, 2, 3)] == [0, 6, 13]
    assert [clip.start for clip in film_clips(film, SHAPE, 4, 2, 1)] == [0]
    assert [clip.start for clip in film_clips(replace(still, frames=8), SHAPE, 4, 2, 5)] == [0, 1]
    entries = {clip.entry("vae") for clip in film_clips(film, SHAPE, 4, 2, 3)}
    assert len(entries) == 3 and entries.isdisjoint(
        clip.entry("other") for clip in film_clips(film, SHAPE, 4, 2, 3)
    )
