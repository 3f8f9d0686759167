"""Every picture of a contact sheet is seen whole, whatever the texts around it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lorakit.pictures.sheet import contact_sheet, film_strip

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def count(sheet, colour):
    return int((np.asarray(sheet) == colour).all(-1).sum())


def test_a_contact_sheet_shows_every_picture_whole():
    rows = [[Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 32), BLUE)], [None]]
    options = dict(row_labels=["one", "two"], column_labels=["a", "b"], title="Title")
    sheet = contact_sheet(rows, captions=[["x", "long " * 200], ["y"]], cell=64, **options)
    assert count(sheet, RED) == 64 * 64 and count(sheet, BLUE) == 64 * 32
    assert sheet.getpixel((0, 0)) == sheet.getpixel((sheet.width - 1, sheet.height - 1)) == WHITE


@pytest.mark.parametrize(
    "text", ["w" * 5000, "many words " * 500, " " * 500, "x", "日本語 \ud800", "a\nb\tc"]
)
def test_text_never_runs_over_a_picture_or_widens_the_sheet(text):
    rows = [[Image.new("RGB", (64, 64), RED)] * 2] * 2
    sheets = [
        contact_sheet(rows, cell=64, captions=[[text] * 2] * 2),
        contact_sheet(rows, cell=64, column_labels=[text] * 2),
        contact_sheet(rows, cell=64, title=text),
    ]
    for sheet in sheets:
        assert count(sheet, RED) == 4 * 64 * 64
        assert sheet.width == contact_sheet(rows, cell=64).width
        rim = [sheet.crop((0, 0, 5, sheet.height)), sheet.crop((sheet.width - 5, 0, *sheet.size))]
        assert all(part.getcolors() == [(5 * sheet.height, WHITE)] for part in rim)
    assert count(contact_sheet(rows, cell=64, row_labels=[text] * 2), RED) == 4 * 64 * 64


def test_a_contact_sheet_scales_to_the_cell():
    sheet = contact_sheet([[Image.new("RGB", (8, 8), RED), Image.new("RGB", (500, 250), BLUE)]], cell=100)
    assert count(sheet, RED) == 100 * 100 and count(sheet, BLUE) == 100 * 50


def test_a_film_strip_shows_every_frame_in_reading_order():
    frames = [Image.new("RGB", (32, 32), (level, 0, 0)) for level in range(1, 12)]
    sheet = np.asarray(film_strip(frames, [f"alpha {i / 10:.3f}" for i in range(11)], columns=4, cell=32))
    corners = [np.argwhere((sheet == (level, 0, 0)).all(-1))[0].tolist() for level in range(1, 12)]
    assert all((sheet == (level, 0, 0)).all(-1).sum() == 32 * 32 for level in range(1, 12))
    assert corners == sorted(corners) and len({row for row, _ in corners}) == 3
    assert len({column for _, column in corners}) == 4


def test_importing_sheet_imports_no_torch():
    code = "import sys, lorakit.pictures.sheet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
