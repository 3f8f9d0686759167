"""Faults of a data set, D1 to D17: found before torch is imported, named by file and line, nothing written.

The plain form of most rows is in tests/test_user_errors.py (DATA_FAULTS) and tests/test_folder.py; here are
the other forms of each, through the whole of train_lora.py.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from harness import ROOT, assert_refused, sha, snapshot
from PIL import Image

from lorakit.ground.config import load_config
from lorakit.training.config import TrainConfig
from lorakit.training.plan import make_plan, training_views


def line(**values):
    return json.dumps(values, ensure_ascii=False)


def lines(*texts, encoding="utf-8", end="\n"):
    """An edit that writes metadata.jsonl anew."""

    def edit(folder: Path) -> None:
        (folder / "metadata.jsonl").write_bytes((end.join(texts) + end).encode(encoding, "surrogatepass"))

    return edit


def name(file_name):
    """An edit that adds a line with this file_name."""

    def edit(folder: Path) -> None:
        with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"file_name": file_name, "text": "x"}))

    return edit


def first(caption):
    """An edit of the caption of the first picture."""

    def edit(folder: Path) -> None:
        texts = (folder / "metadata.jsonl").read_text().splitlines()
        texts[0] = json.dumps({"file_name": "0.png", "text": caption})
        (folder / "metadata.jsonl").write_text("\n".join(texts))

    return edit


def without_metadata(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()


def sidecars(**texts):
    """An edit that puts captions into .txt files."""

    def edit(folder: Path) -> None:
        without_metadata(folder)
        for number in range(4):
            (folder / f"{number}.txt").write_bytes(texts.get(f"_{number}", b"mountains"))

    return edit


def many_pictures_without_a_line(folder: Path) -> None:
    for number in range(30):
        Image.new("L", (24, 24), number).save(folder / f"more{number:02d}.png")


def three_files_gone(folder: Path) -> None:
    for number in (0, 2):
        (folder / f"{number}.png").unlink()
    (folder / "1.png").rename(folder / "1.PNG")


def sibling(folder: Path) -> None:
    """A folder whose name begins like that of the data."""
    other = folder.with_name(folder.name + "-secret")
    other.mkdir()
    shutil.copy(folder / "0.png", other)
    name(f"../{other.name}/0.png")(folder)


def linked_folder(folder: Path) -> None:
    outside = folder.with_name("outside")
    outside.mkdir()
    Image.new("L", (24, 24)).save(outside / "x.png")
    (folder / "inside").symlink_to(outside)
    name("inside/x.png")(folder)


def linked_caption(folder: Path) -> None:
    sidecars()(folder)
    outside = folder.with_name("secret.txt")
    outside.write_text("a secret")
    (folder / "1.txt").unlink()
    (folder / "1.txt").symlink_to(outside)


def dangling(folder: Path) -> None:
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to("gone.png")


def loop(folder: Path) -> None:
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to("1.png")


def only_unsupported(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    for unsupported in ("a.heic", "b.svg", "c.txt"):
        (folder / unsupported).write_text("x")


def only_hidden(folder: Path) -> None:
    without_metadata(folder)
    for path in list(folder.iterdir()):
        path.rename(folder / f".{path.name}")


def csv_alone(folder: Path) -> None:
    without_metadata(folder)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,x\n")


GOOD = line(file_name="0.png", text="x")
REFUSED = {
    "D1 thirty pictures": (
        many_pictures_without_a_line,
        ["data/more00.png: ", "has no caption", "more)", "missing_captions"],
    ),
    "D2 three at once": (
        three_files_gone,
        ["jsonl:1", "jsonl:2", "did you mean '1.PNG'?", "jsonl:3", "correct file_name"],
    ),
    "D5 http": (name("http://host/x.png"), ["metadata.jsonl:5", "is a URL", "inside the folder"]),
    "D5 file URL": (name("file:///etc/passwd"), ["metadata.jsonl:5", "is a URL"]),
    "D5 backslash": (name("..\\x.png"), ["metadata.jsonl:5", "backslash"]),
    "D5 drive": (name("C:/x.png"), ["metadata.jsonl:5", "absolute"]),
    "D5 NUL": (name("0.png\0.txt"), ["metadata.jsonl:5", "no file name can have"]),
    "D5 up and down": (name("a/../../x.png"), ["metadata.jsonl:5", "'..'"]),
    "D5 up inside": (name("a/../0.png"), ["metadata.jsonl:5", "'..'"]),
    "D5 sibling": (sibling, ["metadata.jsonl:5", "'..'"]),
    "D5 empty": (name(""), ["metadata.jsonl:5", "is empty"]),
    "D5 dot": (name("./."), ["metadata.jsonl:5", "is empty"]),
    "D5 number": (name(5), ["metadata.jsonl:5", "is not text"]),
    "D6 folder": (linked_folder, ["inside", "symbolic link", "allow_symlinks"]),
    "D6 caption": (linked_caption, ["1.txt", "symbolic link", "allow_symlinks"]),
    "D6 dangling": (dangling, ["metadata.jsonl:2", "no file '1.png'"]),
    "D6 loop": (loop, ["metadata.jsonl:2", "no file '1.png'"]),
    "D7 two lines": (
        lines(GOOD, '{"file_name": "1.png", "text": "x"', '{"file_name": "2.png",}'),
        ["metadata.jsonl:2:35", "metadata.jsonl:3:", "one JSON object on each line"],
    ),
    "D7 deep": (lines(GOOD, "[" * 20_000), ["metadata.jsonl:2", "not JSON"]),
    "D7 list": (lines(GOOD, '["1.png", "x"]'), ["metadata.jsonl:2", "not a JSON object"]),
    "D7 number": (lines(GOOD, f'{{"file_name": "1.png", "text": {"9" * 5000}}}'), ["metadata.jsonl:2"]),
    "D8 UTF-16": (lines(GOOD, encoding="utf-16"), ["metadata.jsonl:1", "is UTF-16", "iconv -f UTF-16"]),
    "D8 caption file": (sidecars(_2=b"Z\xfcrich"), ["2.txt:1", "0xfc at offset 1", "iconv -f LATIN1"]),
    "D10 image": (
        lines(line(image="0.png", text="x"), line(file_nam="1.png", text="x")),
        ["metadata.jsonl:1", "did you mean 'image'?", "metadata.jsonl:2", "did you mean 'file_nam'?"],
    ),
    "D11 list": (first(["a", "b"]), ["metadata.jsonl:1", "has a list for a caption", "in quotes"]),
    "D11 object": (first({"en": "x"}), ["metadata.jsonl:1", "has an object for a caption"]),
    "D11 truth": (first(True), ["metadata.jsonl:1", "has true or false for a caption"]),
    "D11 blank": (first("  \n"), ["metadata.jsonl:1", "an empty caption", "missing_captions"]),
    "D11 half a character": (first("a \ud800"), ["metadata.jsonl:1", "half a character", "retype"]),
    "D13 blank lines": (lines("", "  ", ""), ["metadata.jsonl", "no rows", "write one line"]),
    "D13 BOM alone": (lines("\ufeff"), ["metadata.jsonl", "no rows"]),
    "D14 unsupported": (only_unsupported, ["data: no pictures", ".heic, .svg", "convert them to PNG"]),
    "D14 hidden": (only_hidden, ["data: no pictures", "looked for .png", "correct the path"]),
    "D15 csv alone": (csv_alone, ["metadata.csv", "metadata.jsonl", "write one line"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(command, train, data, tmp_path, case):
    edit, words = REFUSED[case]
    edit(data)
    before = snapshot(tmp_path)
    result = command("train_lora", train())
    assert_refused(result, 2, str(data), *words)
    assert "\n  -> " in result.err  # the remedy
    assert not result.torch and result.blinks < 20 and snapshot(tmp_path) == before


def sub_folders(folder: Path) -> None:
    """Four pictures of one name or one stem."""
    without_metadata(folder)
    for number, new in enumerate(("a/x.png", "b/x.png", "x.png", "x.jpg")):
        (folder / new).parent.mkdir(exist_ok=True)
        if new.endswith(".jpg"):
            Image.open(folder / f"{number}.png").save(folder / new)
            (folder / f"{number}.png").unlink()
        else:
            (folder / f"{number}.png").rename(folder / new)
        (folder / new).with_suffix(".txt").write_text(f"mountains {number}")


def one_picture(folder: Path) -> None:
    for number in (1, 2, 3):
        (folder / f"{number}.png").unlink()
    lines(GOOD)(folder)


def uncaptioned(folder: Path) -> None:
    lines(GOOD, line(file_name="1.png", text=None))(folder)


def far_captions(folder: Path) -> None:
    separators = line(file_name="0.png", text="one\u2028line\u2029of\x85text")
    texts = [separators, "", *(line(file_name=f"{k}.png", text="x") for k in (1, 2, 3)), "   "]
    lines("\ufeff" + texts[0], *texts[1:], end="\r\n")(folder)


TAKEN = {
    "D1 left out": (uncaptioned, {"missing_captions": "skip"}, "3 picture(s) without a caption are left out"),
    "D1 empty": (uncaptioned, {"missing_captions": "empty"}, "3 picture(s) without a caption are trained"),
    "D4 equal names": (sub_folders, {}, "several pictures share one caption file: x.txt"),
    "D6 allowed": (linked_folder, {"allow_symlinks": True}, "5 picture"),
    "D9 BOM, CRLF, blank lines": (far_captions, {}, "4 picture"),
    "D17 one picture": (one_picture, {}, "1 picture"),
    "D17 fewer than the batch": (one_picture, {"train_batch_size": 8}, "1 picture"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_taken(command, train, data, tmp_path, case):
    """What is no fault, or is asked for, passes --check with a line that says what becomes of it."""
    edit, changes, words = TAKEN[case]
    edit(data)
    before = snapshot(tmp_path)
    result = command("train_lora", [*train(**changes), "--check"])
    assert result.code == 0 and words in result.out, result.out + result.err
    assert not result.torch and snapshot(tmp_path) == before


def plan_of(arguments):
    cfg = load_config(TrainConfig, ROOT / "cfg/mountain.json", arguments).config
    return cfg, make_plan(cfg)


def test_d4_equal_names_have_cache_entries_of_their_own(train, data):
    sub_folders(data)
    cfg, plan = plan_of(train())
    entries = {view.entry("vae") for views in training_views(cfg, plan) for view in views}
    assert len(plan.table.rows) == len(entries) == 4
    shutil.copy(data / "a/x.png", data / "b/x.png")  # the same picture is the same entry
    cfg, plan = plan_of(train())
    assert len({views[0].entry("vae") for views in training_views(cfg, plan)}) == 3


def test_d16_a_caption_that_was_edited_under_the_same_size_and_time_is_seen(command, train, data, a_run):
    run = a_run(train(max_train_steps=9))
    resume = train(max_train_steps=3, resume_from_checkpoint="latest")
    assert_refused(command("train_lora", resume), 2, "is at step 6, past the 3 steps")  # so far the same data
    path = data / "metadata.jsonl"
    status, before = path.stat(), snapshot(run)
    path.write_text(path.read_text().replace("mountains 2", "mountains 9"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    result = command("train_lora", resume)
    assert_refused(result, 2, str(run), "captions changed", "allow_data_change")
    assert not result.torch and snapshot(run) == before
    wanted = train(max_train_steps=3, resume_from_checkpoint="latest", allow_data_change=True)
    assert_refused(command("train_lora", wanted), 2, "is at step 6, past the 3 steps")


def test_d17_a_hundred_thousand_lines_are_refused_in_linear_time_and_in_a_screenful(command, train, data):
    lines(*(line(file_name=f"{k}.png", text="x") for k in range(10_000)))(data)
    fewer = command("train_lora", train())
    lines(*(line(file_name=f"{k}.png", text="x") for k in range(100_000)))(data)
    result = command("train_lora", train())
    assert_refused(result, 2, "metadata.jsonl:5: no file '4.png'", "(and 99976 more)", "correct file_name")
    assert len(result.err.splitlines()) < 30 and result.seconds < 30 * fewer.seconds and not result.torch


def test_d17_every_picture_is_shown_when_the_batch_is_larger_than_the_data(train, data):
    one_picture(data)
    shutil.copy(data / "0.png", data / "1.png")
    lines(GOOD, line(file_name="1.png", text="x"))(data)
    _, plan = plan_of(train(train_batch_size=8, n_epochs=8, max_train_steps=None))
    assert plan.steps == 2 and plan.total_batch == 8  # no step is dropped
    assert plan.steps * plan.total_batch == 8 * len(plan.table.rows)


def test_a_refusal_leaves_the_data_as_it_was(command, train, data):
    """Reading alone: not even the time of a file changes, with a fault or without."""
    times = {path: path.stat().st_mtime_ns for path in [data, *data.iterdir()]}
    digest = {path: sha(path) for path in data.iterdir()}
    assert command("train_lora", [*train(), "--check"]).code == 0
    assert command("train_lora", train(caption_column="nothing")).code == 2
    assert {path: path.stat().st_mtime_ns for path in [data, *data.iterdir()]} == times
    assert {path: sha(path) for path in data.iterdir()} == digest
