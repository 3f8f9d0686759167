"""What a user sees of train_lora.py when something is wrong: an exit code and one message with the remedy.

Faults of config, data and base must be found before torch is imported.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import Result
from PIL import Image
from safetensors.torch import load, load_file

import train_lora
from lorakit.ground import publish
from lorakit.ground.checkpoints import checkpoints, verify_checkpoint
from lorakit.ground.config import load_config, schema
from lorakit.ground.process import run_guarded
from lorakit.ground.shards import Shards
from lorakit.training.config import TrainConfig
from lorakit.training.denoise import Denoise

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(command):
    """Runs `train_lora.py ARGUMENTS` as a process of its own and returns its Result."""
    return functools.partial(command, "train_lora")


@pytest.fixture
def guarded(capsys):
    """The same inside this process, where faults can be planted and torch is imported already."""

    def run(arguments: list[str]) -> Result:
        capsys.readouterr()
        code = run_guarded(lambda: train_lora.main(arguments))
        return Result(code, *capsys.readouterr())

    return run


def assert_one_message(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
    message = result.err[result.err.index("error: ") :]
    for word in words:
        assert word in message, message


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if publish.OWN_NAME.fullmatch(path.name)]


def written(folder: Path) -> list[str]:
    """What a run left, apart from its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- data, config and base: refused before torch is imported and before anything is written ----


def edit_lines(change):
    """An edit of a folder of pictures that changes the list of lines of its metadata.jsonl."""

    def edit(folder: Path) -> None:
        path = folder / "metadata.jsonl"
        path.write_text("\n".join(change(path.read_text().splitlines())), encoding="utf-8")

    return edit


def put(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def line(**values) -> str:
    return json.dumps(values)


def more(text: str):
    return edit_lines(lambda lines: [*lines, text])


def first(text: str):
    return edit_lines(lambda lines: [text, *lines[1:]])


def picture(width: int, height: int, **options):
    return lambda folder: Image.new("L", (width, height)).save(folder / "1.png", **options)


def linked(folder: Path) -> None:
    shutil.move(folder / "1.png", folder.parent / "outside.png")
    (folder / "1.png").symlink_to(folder.parent / "outside.png")


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut(name: str):
    return lambda folder: put(name, (folder / name).read_bytes()[:80])(folder)


DATA_FAULTS = {
    "D1 no line": (edit_lines(lambda lines: lines[1:]), ["0.png", "no caption", "missing_captions"]),
    "D2 no file": (lambda folder: (folder / "1.png").unlink(), ["metadata.jsonl:2", "1.png", "file_name"]),
    "D3 twice": (
        edit_lines(lambda lines: [*lines, lines[0]]),
        ["metadata.jsonl:5", "metadata.jsonl:1", "one line"],
    ),
    "D5 outside": (more(line(file_name="../x.png", text="")), ["metadata.jsonl:5", ".."]),
    "D5 absolute": (more(line(file_name="/x.png", text="")), ["jsonl:5", "absolute"]),
    "D6 link": (linked, ["1.png", "symbolic link", "allow_symlinks"]),
    "D7 JSON": (more('{"file_name" "x"}'), ["metadata.jsonl:5:14", "one JSON object"]),
    "D8 encoding": (
        put("metadata.jsonl", b'{"file_name":"0.png",\n"text":"caf\xe9"}'),
        ["metadata.jsonl:2", "0xe9", "iconv"],
    ),
    "D10 key": (more(line(filename="0.png", text="")), ["metadata.jsonl:5", "file_name"]),
    "D11 number": (first(line(file_name="0.png", text=5)), ["jsonl:1", "a number", "quotes"]),
    "D11 null": (first(line(file_name="0.png", text=None)), ["jsonl:1", "no caption"]),
    "D13 no rows": (put("metadata.jsonl", b""), ["metadata.jsonl", "no rows", "write one line"]),
    "D14 empty": (emptied, ["pictures", "no pictures", ".png"]),
    "D15 both": (put("metadata.csv", b"file_name,text"), ["metadata.csv", "delete one"]),
    "I1 truncated": (cut("1.png"), ["1.png", "truncated", "replace", "broken_images"]),
    "I3 text": (put("1.png", b"hello"), ["1.png", "looks like text"]),
    "I3 pointer": (put("1.png", b"version https://git-lfs.github.com/spec/v1\n"), ["1.png", "git lfs pull"]),
    "I4 bomb": (picture(9000, 9000), ["1.png", "9000x9000", "64,000,000"]),
    "I8 animated": (
        picture(32, 32, save_all=True, append_images=[Image.new("L", (32, 32), 9)]),
        ["1.png", "several frames"],
    ),
    "I10 small": (picture(15, 20), ["1.png", "15x20", "larger pictures"]),
    "I10 aspect": (picture(20, 200), ["1.png", "max_aspect"]),
    "I11 type": (
        lambda folder: (emptied(folder), put("a.heic", b"x")(folder)),
        [".heic", "convert them to PNG"],
    ),
}


@pytest.mark.parametrize("key", ["data_dir", "validation_data_dir"])
@pytest.mark.parametrize("name", DATA_FAULTS)
def test_a_fault_of_the_pictures_or_captions(command, settings, pictures, tmp_path, name, key):
    edit, words = DATA_FAULTS[name]
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    edit(folder)
    result = command(settings(**{key: str(folder)}))
    assert_one_message(result, 2, str(folder), *words)
    assert "\n  -> " in result.err  # the remedy
    assert not result.torch and not (tmp_path / "ckpt").exists()


def test_all_faults_of_the_data_are_said_at_once(command, settings, pictures, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    cut("1.png")(folder)
    edit_lines(lambda lines: [*lines[:2], line(file_name="gone.png", text="x"), lines[3]])(folder)
    assert_one_message(command(settings(data_dir=str(folder))), 2, "1.png", "gone.png", "2.png")


@dataclass
class Fault:
    """Settings that are wrong, and words of the message."""

    changes: dict
    words: list[str]
    code: int = 2


SETTING_FAULTS = {
    "no such data_dir": Fault({"data_dir": "nowhere"}, ["nowhere", "no such folder"]),
    "data_dir is a file": Fault({"data_dir": str(ROOT / "Makefile")}, ["Makefile", "is a file"]),
    "no such validation_data_dir": Fault({"validation_data_dir": "nowhere"}, ["nowhere", "no such folder"]),
    "caption_column": Fault({"caption_column": "txt"}, ["metadata.jsonl", "txt", "did you mean 'text'?"]),
    "two sources": Fault({"dataset_name": "a/b"}, ["data_dir, dataset_name", "one of the two"]),
    "no source": Fault({"data_dir": None}, ["data_dir, dataset_name", "one of the two"]),
    "no length": Fault({"max_train_steps": None}, ["n_epochs, max_train_steps", "at least one"]),
    "C1 unknown key": Fault({"learning_rat": 1e-4}, ["learning_rat", "did you mean learning_rate?"]),
    "C2 wrong types": Fault(
        {"rank": "x", "seed": 1.5, "use_dora": 1},
        ["rank: must be an integer", "seed: must be", "use_dora: must be"],
    ),
    "L15 no steps": Fault({"max_train_steps": 0}, ["max_train_steps", "integer >= 1", "not 0"]),
    "resume and overwrite": Fault(
        {"resume_from_checkpoint": True, "overwrite": True}, ["resume_from_checkpoint, overwrite"]
    ),
    "name with a slash": Fault({"ckpt_name": "a/b"}, ["ckpt_name", "a/b"]),
    "name ..": Fault({"ckpt_name": ".."}, ["ckpt_name", '".."', "choose a name"]),
    "name .": Fault({"ckpt_name": ".", "overwrite": True}, ["ckpt_name", '"."', "choose a name"]),
    "name too long for the LoRA file": Fault({"ckpt_name": "a" * 250}, ["ckpt_name", "255 bytes", "shorten"]),
    "name too long for save_format both": Fault(
        {"ckpt_name": "ä" * 117, "save_format": "both"}, ["255 bytes", "shorten"]
    ),
    "resolution and VAE": Fault({"resolution": 17}, ["resolution 17", "VAE factor, 2"]),
    "total_batch_size": Fault(
        {"total_batch_size": 3, "train_batch_size": 2}, ["total_batch_size 3", "2 x 1"]
    ),
    "no such module": Fault({"target_modules": ["to_q", "to_x"]}, ["target_modules", "to_x", "to_k"]),
    "no modules": Fault({"target_modules": []}, ["target_modules", "to_q"]),
    "no such base": Fault(
        {"pretrained_model_name_or_path": "nowhere/at/all"}, ["nowhere/at/all", "no such folder", str(ROOT)]
    ),
    "a base that is gone": Fault(
        {"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5"},
        ["no longer exists", '"stable-diffusion-v1-5/'],
    ),
    "cache_dir is a file": Fault({"cache_dir": str(ROOT / "Makefile")}, ["cache_dir", "is a file"], 4),
    "output_dir is a file": Fault(
        {"output_dir": str(ROOT / "Makefile")}, ["Makefile", "use another folder"], 4
    ),
    "output_dir in a file": Fault(
        {"output_dir": str(ROOT / "Makefile/a/b")}, ["Makefile/a/b", "use another folder"], 4
    ),
    "output_dir in /proc": Fault(
        {"output_dir": "/proc/nowhere/x"}, ["/proc/nowhere/x", "use another folder"], 4
    ),
    "output_dir too long": Fault({"output_dir": f"/tmp/{'a' * 300}"}, ["too long", "shorten"], 4),
    "output_dir with NUL": Fault({"output_dir": "a\0b"}, [r"'a\x00b'", "not a possible path"], 4),
    "report_to": Fault({"report_to": "tensorbord"}, ["report_to", "tensorboard"]),
    "report_to list": Fault({"report_to": ["tensorboard", "x"]}, ["report_to", "tensorboard"]),
    "resume path": Fault(
        {"resume_from_checkpoint": "nowhere"}, ["resume_from_checkpoint: nowhere", "does not exist", "none"]
    ),
    "resume from a file": Fault({"resume_from_checkpoint": "Makefile"}, ["Makefile", "is a file"]),
    "resume from any folder": Fault(
        {"resume_from_checkpoint": "lorakit"}, ["lorakit: manifest.json is missing", "of this run"]
    ),
}


@pytest.mark.parametrize("name", SETTING_FAULTS)
def test_a_setting_that_is_wrong(command, settings, tmp_path, name):
    fault = SETTING_FAULTS[name]
    result = command(settings(**fault.changes))
    assert_one_message(result, fault.code, *fault.words)
    assert not result.torch and written(tmp_path) == []


def test_every_wrong_setting_is_found_by_check_too(command, settings):
    """Except what only a run looks at: where it writes, and what it resumes."""
    later = ("output_dir", "resume ")
    for name, fault in SETTING_FAULTS.items():
        if not name.startswith(later) or name == "resume and overwrite":
            assert_one_message(command([*settings(**fault.changes), "--check"]), fault.code, *fault.words)


CONFIG_FILES = {
    "C1": ('{\n  "rnak": 4\n}', ["bad.json:2:3", "rnak", "rank"]),
    "C3": ('{\n  "rank": 4,\n  "rank": 8\n}', ["bad.json:3:3", "rank", "given twice", "line 2"]),
    "C4 comma": ('{\n  "rank": 4,\n}', ["bad.json:2:12", "comma"]),
    "C4 empty": ("", ["bad.json", "empty"]),
    "C4 list": ("[1]", ["bad.json", "object"]),
    "C4 deep": ("[" * 20_000, ["bad.json"]),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_config_file_that_is_wrong(command, tmp_path, name):
    text, words = CONFIG_FILES[name]
    (tmp_path / "bad.json").write_text(text)
    result = command([str(tmp_path / "bad.json"), f"output_dir={tmp_path / 'ckpt'}"])
    assert_one_message(result, 2, *words)
    assert not result.torch and written(tmp_path) == ["bad.json"]


def test_a_config_file_that_is_missing_names_those_that_are_there(command):
    assert_one_message(command(["cfg/mountian.json"]), 2, "cfg/mountian.json", "mountain.json")


def remove_part(base: Path) -> None:
    shutil.rmtree(base / "vae")


UNET = "unet/diffusion_pytorch_model.safetensors"
BASE_FAULTS = {
    "no part": (remove_part, ["vae/"]),
    "no weights": (lambda base: (base / UNET).unlink(), ["unet", "no weights", "download complete"]),
    "cut": (cut(UNET), [UNET]),
    "pointer": (put(UNET, b"version https://git-lfs.github.com/spec/v1\n"), [UNET, "git lfs pull"]),
    "broken JSON": (put("vae/config.json", b"{"), ["vae/config.json", "JSON"]),
    "no config": (lambda base: (base / "unet/config.json").unlink(), ["unet/config.json", "missing"]),
}
OPEN_BASE_FAULTS = {
    "config without keys": (put("unet/config.json", b"{}"), ["unet/config.json"]),
    "config of another kind": (put("unet/config.json", b"[]"), ["unet/config.json"]),
    "config with a wrong value": (put("vae/config.json", b'{"block_out_channels": 3}'), ["vae/config.json"]),
    "index without map": (
        lambda base: ((base / UNET).unlink(), put(f"{UNET}.index.json", b"{}")(base)),
        [".index.json"],
    ),
    "empty tokenizer": (lambda base: emptied(base / "tokenizer"), ["tokenizer"]),
}


def check_base_fault(command, settings, tiny_base, tmp_path, edit, words):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    edit(base)
    result = command([*settings(pretrained_model_name_or_path=str(base)), "--check"])
    assert_one_message(result, 2, str(base), *words)
    assert not result.torch and not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("name", BASE_FAULTS)
def test_a_broken_base(command, settings, tiny_base, tmp_path, name):
    check_base_fault(command, settings, tiny_base, tmp_path, *BASE_FAULTS[name])


@pytest.mark.parametrize("name", OPEN_BASE_FAULTS)
def test_a_base_whose_files_are_there_and_wrong(command, settings, tiny_base, tmp_path, name):
    check_base_fault(command, settings, tiny_base, tmp_path, *OPEN_BASE_FAULTS[name])


def test_buckets_smaller_than_the_base_can_take(command, settings, tmp_path):
    result = command(settings(resolution=2, aspect_ratio_buckets=True))
    assert_one_message(result, 2, "resolution: must be an integer >= 8")
    arguments = [
        a for a in settings(resolution=8, aspect_ratio_buckets=True) if not a.startswith("pretrained_model")
    ]
    result = command(arguments)  # the miniature: multiples of more than 8 pixels
    assert_one_message(result, 2, "resolution 8, aspect_ratio_buckets", "multiples of")
    assert written(tmp_path) == []


def test_a_launcher_that_starts_one_process_instead_of_several(command, settings, tmp_path):
    result = command(settings(), MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    assert_one_message(result, 2, "accelerate launch", "torchrun --nproc_per_node")
    assert not result.torch and written(tmp_path) == []


def test_accelerate_launch_on_several_cpu_processes_is_refused_with_the_command_that_works(
    settings, tmp_path
):
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        "train_lora.py",
    ]
    result = subprocess.run([*launch, *settings()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("error: accelerate launch was asked for several CPU processes") >= 1
    assert "torchrun --nproc_per_node N train_lora.py" in result.stderr
    assert not (tmp_path / "ckpt/run.safetensors").exists()


def test_a_missing_package_leaves_nothing(guarded, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_one_message(
        guarded(settings(optimizer="prodigy")), 2, 'optimizer "prodigy"', "pip install prodigyopt"
    )
    assert written(tmp_path) == []


def test_a_hub_id_without_a_network(guarded, settings, tmp_path):
    result = guarded(settings(pretrained_model_name_or_path="nobody/nothing"))
    assert_one_message(result, 2, "nobody/nothing", "offline", "local folder or file", "ckpt/miniature")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_data_set_without_a_network(guarded, settings, tmp_path):
    result = guarded(settings(data_dir=None, dataset_name="nobody/nothing"))
    assert_one_message(result, 2, "dataset_name nobody/nothing", "cannot be loaded")
    assert written(tmp_path) == []


RULES = {"lr_scheduler_name": "piecewise_constant"}
OPEN_SETTING_FAULTS = {
    "lr_step_rules without end": Fault(RULES | {"lr_step_rules": "1:4"}, ["lr_step_rules"]),
    "lr_step_rules of words": Fault(RULES | {"lr_step_rules": "1:x,0.1"}, ["lr_step_rules"]),
}


@pytest.mark.parametrize("name", OPEN_SETTING_FAULTS)
def test_a_setting_that_a_library_would_stumble_over(command, settings, tmp_path, name):
    fault = OPEN_SETTING_FAULTS[name]
    result = command([*settings(**fault.changes), "--check"])
    assert_one_message(result, fault.code, *fault.words)
    assert not result.torch and written(tmp_path) == []


# ---- output: paths, full and read-only disks ----


def test_a_path_with_spaces_unicode_and_a_newline_works(guarded, settings, tmp_path):
    folder = tmp_path / "a b\nü 山"
    assert (
        guarded(settings(output_dir=str(folder), ckpt_name="näme mit ' \nzeile", max_train_steps=1)).code == 0
    )
    assert (folder / "näme mit ' \nzeile.safetensors").is_file()


def test_a_folder_with_the_name_of_the_lora_file_is_said_before_training(command, settings, tmp_path):
    (tmp_path / "ckpt/run_diffusers.safetensors").mkdir(parents=True)
    result = command(settings(save_format="both"))
    assert_one_message(result, 2, "run_diffusers.safetensors: a folder has the name", "rename")
    assert not result.torch and command([*settings(), "--check"]).code == 0


def test_a_disk_that_is_too_full_is_said_before_training(guarded, settings, tmp_path, monkeypatch):
    earlier = tmp_path / "ckpt/run.safetensors"
    earlier.parent.mkdir()
    earlier.write_bytes(b"earlier")
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_one_message(guarded(settings()), 4, str(tmp_path / "ckpt"), "100,000 free", "free some space")
    assert written(tmp_path / "ckpt") == ["run.safetensors"] and earlier.read_bytes() == b"earlier"


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """A tmpfs mounted on `folder`; the test is skipped where that is not allowed."""
    folder.mkdir()
    mounted = os.getuid() == 0 and shutil.which("mount")
    mounted = (
        mounted
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("a tmpfs can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_disk(command, settings, tmp_path):
    with small_disk(tmp_path / "disk", "size=4m,ro") as disk:
        result = command(settings(output_dir=str(disk / "ckpt")))
        assert_one_message(result, 4, str(disk / "ckpt"), "read-only", "write elsewhere")
        assert not result.torch


def test_a_cache_that_is_full_of_what_is_needed_may_be_read_only(trained, guarded, settings, tmp_path):
    """And one that lacks something is an error of output."""
    trained()
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        cache = shutil.copytree(tmp_path / "cache", disk / "cache")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        changes = {"output_dir": str(tmp_path / "other"), "cache_dir": str(cache)}
        assert guarded(settings(**changes)).code == 0
        result = guarded(settings(random_flip=True, ckpt_name="flipped", **changes))
        assert_one_message(result, 4, str(cache), "read-only", "write elsewhere")


def test_a_disk_that_fills_up_while_training(guarded, settings, tmp_path):
    with small_disk(tmp_path / "disk", "size=1400k") as disk:
        run = disk / "ckpt/run"
        (disk / "ckpt").mkdir()
        (disk / "ckpt/run.safetensors").write_bytes(b"earlier")
        changes = {"output_dir": str(disk / "ckpt"), "checkpointing_steps": 1, "checkpoints_total_limit": 40}
        result = guarded(settings(max_train_steps=40, overwrite=True, **changes))
        assert_one_message(result, 4, str(run / "checkpoint-"), "No space left", "bytes", "free some space")
        kept = checkpoints(run)
        assert kept and all(verify_checkpoint(folder)["step"] == step for step, folder in kept)
        assert not litter(disk) and (disk / "ckpt/run.safetensors").read_bytes() == b"earlier"


def test_a_limit_on_file_sizes_while_training(trained, settings, tmp_path):
    """As above for everybody, with ulimit -f in a forked child that resumes an earlier run."""
    lora, run = trained(), tmp_path / "ckpt/run"
    before = sha(lora)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            log = os.open(tmp_path / "log.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1), os.dup2(log, 2)
            largest = (run / "checkpoint-00000006/optimizer.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, resource.RLIM_INFINITY))
            arguments = settings(max_train_steps=9, resume_from_checkpoint=True)
            with open(log, "w", closefd=False) as sys.stderr:
                code = run_guarded(lambda: train_lora.main(arguments))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    text = (tmp_path / "log.txt").read_text()
    assert "checkpoint-00000008" in text and "ulimit -f" in text and "Traceback" not in text
    assert [step for step, folder in checkpoints(run) if verify_checkpoint(folder)] == [2, 4, 6]
    assert sha(lora) == before and not litter(tmp_path)


def test_a_full_disk_at_any_write_costs_nothing_and_the_run_resumes_to_the_same_bytes(
    trained, guarded, settings, tmp_path, monkeypatch
):
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 2}
    straight = sha(trained(output_dir=str(tmp_path / "straight"), **options))  # fills the cache too
    real, at, count = publish.write_synced, 0, 0

    def failing(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == at:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(publish, "write_synced", failing)
    monkeypatch.setattr("lorakit.ground.checkpoints.write_synced", failing)
    codes = []
    while not codes or codes[-1]:
        at, count = at + 1, 0
        folder = tmp_path / f"full{at}"
        folder.mkdir()
        lora, run = folder / "run.safetensors", folder / "run"
        lora.write_bytes(b"earlier")
        result = guarded(settings(output_dir=str(folder), overwrite=True, **options))
        codes.append(result.code)
        if result.code == 0:
            break
        assert_one_message(result, 4, str(folder), "No space left on device", "free some space")
        assert lora.read_bytes() == b"earlier" and not litter(folder), at
        assert all(verify_checkpoint(path)["step"] == step for step, path in checkpoints(run)), at
        if at % 3 == 0:  # each takes as long as a run
            at, again = 10**9, at
            assert guarded(settings(output_dir=str(folder), resume_from_checkpoint=True, **options)).code == 0
            at = again
            assert sha(lora) == straight, at
    assert len(codes) > 12 and set(codes[:-1]) == {4}


# ---- weights that are not finite ----


def all_finite(folder: Path) -> bool:
    files = list(folder.rglob("*.safetensors"))
    return all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())


@pytest.mark.parametrize("broken_call", [3, 6])
def test_a_gradient_that_is_infinite_under_a_finite_loss(
    trained, guarded, settings, tmp_path, monkeypatch, broken_call
):
    before = sha(trained())
    real, calls = Denoise.loss, []

    def poisoned(*args):
        calls.append(1)
        loss, parts = real(*args)
        zero = (loss - loss.detach()).sqrt()  # 0, with an infinite derivative
        return loss + zero if len(calls) == broken_call else loss, parts

    monkeypatch.setattr(Denoise, "loss", poisoned)
    result = guarded(settings(overwrite=True, validation_steps=0))
    assert_one_message(
        result, 3, f"step {broken_call}: ", ".png at timestep", "last checkpoint is", "learning_rate"
    )
    run = tmp_path / "ckpt/run"
    assert max(step for step, folder in checkpoints(run) if verify_checkpoint(folder)) < broken_call
    assert sha(tmp_path / "ckpt/run.safetensors") == before and all_finite(tmp_path / "ckpt")


def test_a_picture_that_encodes_to_nan_is_named(guarded, settings, tmp_path, monkeypatch):
    from lorakit.diffusion.models import Base

    real = Base.encode

    def broken(self, image):
        moments = real(self, image)
        moments[2] *= torch.nan
        return moments

    monkeypatch.setattr(Base, "encode", broken)
    result = guarded(settings(validation_steps=0))
    assert_one_message(result, 2, "2.png", "NaN", "leave it out")
    cached = Shards(tmp_path / "cache/latents")
    assert all(load(cached.read(name))["tensor"].isfinite().all() for name in list(cached.names))
    assert not (tmp_path / "ckpt/run.safetensors").exists() and all_finite(tmp_path / "ckpt")


# ---- earlier runs ----


def test_a_checkpoint_interval_longer_than_the_run_gives_one_at_the_end(trained):
    run = trained(checkpointing_steps=1000).with_suffix("")
    assert [step for step, folder in checkpoints(run) if verify_checkpoint(folder)] == [6]


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        ("latest", ["checkpoint-00000006 is at step 6, past the 3 steps", "max_train_steps", "raise them"]),
        ("nowhere", ["nowhere does not exist", "run/checkpoint-00000004"]),
        ("ckpt/run.safetensors", ["is a file (a LoRA?)", "run/checkpoint-00000004"]),
        ("ckpt/run", ["is a run folder", "run/checkpoint-00000006"]),
        ("ckpt", ["manifest.json is missing", "run/checkpoint-00000006"]),
        (False, ["already holds a run", "resume_from_checkpoint=latest", "overwrite=true", "ckpt_name"]),
    ],
)
def test_a_resume_that_cannot_be_leaves_the_run_as_it_is(trained, command, settings, tmp_path, resume, words):
    trained()
    before = {path: sha(path) for path in tmp_path.rglob("*") if path.is_file()}
    target = str(tmp_path / resume) if resume and resume != "latest" else resume
    result = command(settings(resume_from_checkpoint=target, max_train_steps=3))
    assert_one_message(result, 2, *words)
    assert not result.torch
    assert {path: sha(path) for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(trained, guarded, settings, tmp_path):
    lora = trained()
    before = sha(lora)
    (tmp_path / "ckpt/run/checkpoint-00000006/lora.safetensors").write_bytes(b"")
    result = guarded(settings(resume_from_checkpoint=True))
    assert result.code == 0 and "checkpoint-00000006: lora.safetensors has 0 bytes" in result.out
    assert "resuming from" in result.out and "checkpoint-00000004" in result.out and sha(lora) == before


def test_when_every_checkpoint_is_damaged_nothing_is_lost_and_each_has_its_reason(
    trained, command, settings, tmp_path
):
    before = sha(trained())
    for _, folder in checkpoints(tmp_path / "ckpt/run"):
        (folder / "lora.safetensors").write_bytes(b"")
    result = command(settings(resume_from_checkpoint=True))
    assert_one_message(result, 2, "checkpoint-00000002: lora", "checkpoint-00000006: lora", "overwrite=true")
    assert sha(tmp_path / "ckpt/run.safetensors") == before and len(checkpoints(tmp_path / "ckpt/run")) == 3


def test_after_a_failure_before_the_first_step_the_corrected_command_runs(guarded, settings, tmp_path):
    assert guarded(settings(pretrained_model_name_or_path="nobody/nothing")).code == 2
    assert guarded(settings()).code == 0


def test_a_lora_file_of_another_origin_is_not_replaced_unasked(guarded, settings, tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/run.safetensors").write_bytes(b"mine")
    assert_one_message(guarded(settings()), 2, "run.safetensors", "overwrite=true", "ckpt_name")
    assert (tmp_path / "ckpt/run.safetensors").read_bytes() == b"mine"


# ---- what is only worth a warning ----


@pytest.mark.parametrize("log_dir", ["/proc/nowhere", str(ROOT / "Makefile")])
def test_trackers_that_cannot_write_do_not_stop_a_run(trained, tmp_path, caplog, log_dir):
    assert trained(report_to="tensorboard", log_dir=log_dir).exists()
    assert caplog.text.count("cannot start, training goes on without") == 1


def test_sample_prompts_longer_than_the_text_encoder_reads_are_cut(trained, caplog):
    path = trained(sample_steps=6, sample_inference_steps=1, sample_prompts=["mountains " * 400, ""])
    assert (path.with_suffix("") / "samples/sheet.png").exists() and not caplog.text


def long_caption(pictures: Path, tmp_path: Path) -> str:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    words = " ".join(["mountains"] * 60)
    first(line(file_name="0.png", text=f"{words} sunset"))(folder)
    return str(folder)


def test_a_caption_longer_than_the_text_encoder_reads_is_said_by_check(command, settings, pictures, tmp_path):
    result = command([*settings(data_dir=long_caption(pictures, tmp_path)), "--check"])
    assert result.code == 0 and "metadata.jsonl:1:" in result.out and "lost: '" in result.out
    assert "sunset'" in result.out


def test_a_caption_longer_than_the_text_encoder_reads_is_said_by_a_run(guarded, settings, pictures, tmp_path):
    result = guarded(settings(data_dir=long_caption(pictures, tmp_path), max_train_steps=1))
    assert result.code == 0 and "metadata.jsonl:1:" in result.out


# ---- configs ----


def configs() -> list[str]:
    found = [*ROOT.glob("cfg/*.json"), *ROOT.glob("cfg/sd15/*.json")]
    others = ("schema", "morph", "style_transfer", "edit", "imagic", "drag", "animate")
    return sorted(str(path.relative_to(ROOT)) for path in found if path.stem not in others)


def test_the_configs_are_all_there():
    assert len(configs()) == 16


@pytest.mark.parametrize("path", configs())
def test_every_config_loads_and_names_the_schema(path):
    loaded = load_config(TrainConfig, ROOT / path)
    names = {
        "cfg/style.json": "ink",
        "cfg/motion_lora.json": "zoom_in",
        "cfg/sd15/motion_lora.json": "zoom_in",
    }
    assert loaded.config.ckpt_name.startswith(names.get(path, Path(path).stem))
    own = ROOT / path
    assert own.parent.joinpath(json.loads(own.read_text())["$schema"]).resolve() == ROOT / "cfg/schema.json"
    if own.parent.name == "cfg":  # trains as it is
        assert (ROOT / loaded.config.data_dir).is_dir()
        assert (ROOT / loaded.config.pretrained_model_name_or_path).is_dir()


def test_the_schema_is_current():
    assert json.loads((ROOT / "cfg/schema.json").read_text()) == schema(TrainConfig), "run: make schema"


TUTORIAL = {
    "log_dir": "log",
    "output_dir": "ckpt",
    "data_dir": "dataset/mountain",
    "ckpt_name": "mountain",
    "gradient_accumulation_steps": 1,
    "pretrained_model_name_or_path": None,
    "rank": 8,
    "enable_xformers_memory_efficient_attention": True,
    "learning_rate": 1e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-08,
    "resolution": 16,
    "n_epochs": 200,
    "checkpointing_steps": 100,
    "train_batch_size": 1,
    "dataloader_num_workers": 0,
    "lr_scheduler_name": "constant",
    "resume_from_checkpoint": False,
    "noise_offset": 0.1,
    "max_grad_norm": 1.0,
}


@pytest.mark.parametrize("extra", [{}, {"mixed_precision": "no", "seed": 1}])
def test_the_config_of_the_tutorial_trains(guarded, tiny_base, pictures, tmp_path, monkeypatch, extra):
    data = tmp_path / "dataset/mountain"
    data.mkdir(parents=True)
    shutil.copy(pictures / "0.png", data)  # one picture, so 200 steps
    (data / "metadata.jsonl").write_text(line(file_name="0.png", text="a photo of mountains"))
    config = TUTORIAL | extra | {"pretrained_model_name_or_path": str(tiny_base)}
    if extra:
        config["n_epochs"] = 2
    (tmp_path / "mountain.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert guarded(["mountain.json"]).code == 0
    assert (tmp_path / "ckpt/mountain.safetensors").is_file()
    steps = [step for step, _ in checkpoints(tmp_path / "ckpt/mountain")]
    assert steps == ([2] if extra else [100, 200])


def test_every_key_is_read_by_some_code(settings, pictures, tmp_path, monkeypatch):
    """A key that is accepted and has no effect is the worst kind of fault: nothing says so."""
    import datasets

    seen: set[str] = set()

    def while_checked(frame) -> bool:
        while frame is not None and frame.f_code.co_name != "_agree":
            frame = frame.f_back
        return frame is not None

    def spy(self, name):
        if name in TrainConfig.model_fields and name not in seen and not while_checked(sys._getframe(1)):
            seen.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(TrainConfig, "__getattribute__", spy, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    load_config(TrainConfig, None, settings())
    assert not seen  # neither loading nor its checks over two keys count
    changes = {"early_stop_patience": 5, "train_text_encoder": True, "crop": "random", "sample_steps": 6}
    assert train_lora.main(settings(sample_inference_steps=1, report_to="tensorboard", **changes)) == 0
    of_other_runs = {"dataset_name", "dataset_config_name", "dataset_split", "image_column", "smooth"}
    assert set(TrainConfig.model_fields) - seen == of_other_runs | {"allow_data_change"}
    hub = {"data_dir": None, "dataset_name": str(pictures), "caption_column": "text", "ckpt_name": "hub"}
    assert train_lora.main(settings(**hub)) == 0
    other = Path(shutil.copytree(pictures, tmp_path / "other"))
    edit_lines(lambda lines: lines[1:])(other)
    again = {"data_dir": str(other), "missing_captions": "skip", "allow_data_change": True}
    assert train_lora.main(settings(resume_from_checkpoint=True, max_train_steps=8, **changes, **again)) == 0
    assert train_lora.main(settings(objective=["denoise", "smooth"], ckpt_name="smooth")) == 0
    assert set(TrainConfig.model_fields) - seen == set()
