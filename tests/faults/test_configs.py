"""Faults of configs, C1 to C7, in every script: refused before torch is imported, with file, line and column.

tests/test_config.py holds every form of each fault against the reader itself; here are whole commands.
"""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from harness import ROOT, SCRIPTS, assert_refused, snapshot

from lorakit.diffusion.inversion_plan import InvertConfig
from lorakit.editing.config import EditConfig
from lorakit.editing.drag_config import DragConfig
from lorakit.film.config import MorphConfig
from lorakit.ground.config import load_config
from lorakit.motion.config import AnimateConfig, Camera
from lorakit.sampling.generate_plan import GenerateConfig
from lorakit.sampling.style_plan import StyleConfig
from lorakit.training.config import TrainConfig
from lorakit.weights.verbs import VERBS

NUMBER = {
    "train_lora": "rank",
    "morph": "frames",
    "invert": "num_inference_steps",
    "mix_lora": "rank",
    "generate": "images_per_prompt",
    "style_transfer": "images_per_picture",
    "edit": "images_per_target",
    "animate": "frames",
    "drag": "iterations",
}
"""A key of each script that takes an integer."""


def on_file(script: str, path: Path) -> list[str]:
    """The command line that reads a config file."""
    return ["mix", "x.safetensors", str(path)] if script == "mix_lora" else [str(path)]


TEXTS = {
    "C1 a letter missing": ('{\n  "KE": 4\n}', ["c.json:2:3: KE: unknown key", "did you mean KEY?"]),
    "C1 nothing like it": ('{"zzzzzzzz": 4}', ["c.json:1:2: zzzzzzzz: unknown key", "--help lists all keys"]),
    "C2 text": ('{"KEY":\n "5"}', ["c.json:2:2: KEY: must be an integer", 'not "5"']),
    "C2 truth": ('{"KEY":\n true}', ["c.json:2:2: KEY: must be an integer", "not true"]),
    "C2 a fraction": ('{"KEY": 4.5}', ["KEY: must be an integer", "not 4.5"]),
    "C2 a whole fraction": ('{"KEY": 1.0}', ["KEY: must be an integer", "not 1.0"]),
    "C2 NaN": ('{"KEY": NaN}', ["KEY: must be an integer", "not NaN"]),
    "C2 beyond every float": ('{"KEY": 1e400}', ["KEY: must be an integer", "not 1e400"]),
    "C2 below the least": ('{"KEY": -1}', ["KEY: must be an integer >= ", "not -1"]),
    "C2 a list": ('{"KEY": [4]}', ["KEY: must be an integer", "not [4]"]),
    "C3 twice": ('{\n"KEY": 4,\n"KEY": 8}', ["c.json:3:1: KEY: given twice, first in line 2; remove one"]),
    "C4 trailing comma": ('{"KEY":\n4,\n}', ["c.json:2:2", "trailing comma", "remove it"]),
    "C4 comment": ('{\n  // steps\n  "KEY": 4}', ["c.json:2:3", "JSON has no comments"]),
    "C4 single quotes": ("{'KEY': 4}", ["c.json:1:2", "straight double quotes"]),
    "C4 Python": ('{"KEY":\n None}', ["c.json:2:2", "None is not JSON"]),
    "C4 not closed": ('{"KEY": 4', ["c.json:1:", "the file ends before"]),
    "C4 10,000 deep": ('{"KEY": ' + "[" * 10_000, ["c.json", "levels of nesting"]),
    "C4 10,000 deep and closed": ('{"KEY": ' + "[" * 10_000 + "]" * 10_000 + "}", ["levels of nesting"]),
    "C4 5,000 digits": ('{"KEY": ' + "9" * 5000 + "}", ["c.json:1:", "KEY: must be an integer", "5000"]),
    "C4 a list": ("[4]", ["c.json: must hold an object", "not [4]"]),
    "C4 empty": ("", ["c.json: the file is empty", "{}"]),
    "C4 UTF-16": ('{"KEY": 4}'.encode("utf-16"), ["c.json:1: not UTF-8 text", "save it as UTF-8"]),
    "C4 latin-1": (b'{\n"KEY": "\xe9"}', ["c.json:2: not UTF-8 text"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", TEXTS)
def test_refused(command, tmp_path, case, script):
    content, words = TEXTS[case]
    key = NUMBER[script]

    def named(text: str) -> str:
        return text.replace("KEY", key).replace("KE", key[:-1])

    content = named(content).encode() if isinstance(content, str) else content
    (tmp_path / "c.json").write_bytes(content)
    result = command(script, on_file(script, tmp_path / "c.json"))
    assert_refused(result, 2, *map(named, words))
    assert not result.torch and result.blinks < 20 and list(snapshot(tmp_path)) == ["c.json"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_c4_what_is_no_file_of_a_config_s_size(command, tmp_path, script):
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    result = command(script, on_file(script, path))
    assert_refused(result, 2, "big.json: larger than 1,000,000 bytes", "name another")
    assert result.grown < 20e6 and result.blinks < 20
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert_refused(command(script, on_file(script, folder)), 2, "folder.json: is a directory; name a file")
    gone = command(script, on_file(script, tmp_path / "bgi.json"))
    assert_refused(gone, 2, "bgi.json: no such file", "big.json?")


@pytest.mark.parametrize("script", ["train_lora", "morph", "invert"])
def test_c4_a_byte_order_mark_is_no_fault(command, tmp_path, script):
    path = tmp_path / "c.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({NUMBER[script]: 7}).encode())
    more = {
        "train_lora": ["data_dir=dataset/mountain", "n_epochs=1"],
        "morph": [f"images={json.dumps([{'path': 'dataset/mountain/mountain.jpg'}] * 2)}"],
        "invert": [],
    }[script]
    result = command(script, [str(path), *more, "--print-config"])
    assert result.code == 0 and json.loads(result.out)[NUMBER[script]] == 7


NESTED = {
    "a letter missing": ({"promt": "x"}, ["images.0.promt: unknown key", "did you mean prompt?"]),
    "of the level above": ({"frames": 5}, ["images.0.frames: unknown key", "it belongs at the top level"]),
    "missing": ({"path": None}, ["images.0.path: must be a string"]),
    "a wrong type": ({"lora_weight": "much"}, ["images.0.lora_weight: must be a number", 'not "much"']),
}


@pytest.mark.parametrize("case", NESTED)
def test_c1_and_c2_within_a_list_of_groups(command, tmp_path, case):
    changes, words = NESTED[case]
    picture = {"path": "dataset/mountain/mountain.jpg"}
    config = {"images": [picture | changes, picture]}
    (tmp_path / "c.json").write_text(json.dumps(config, indent=1))
    result = command("morph", [str(tmp_path / "c.json")])
    assert_refused(result, 2, "c.json:", *words)
    assert not result.torch


def test_c2_all_faults_come_at_once_in_the_order_of_the_file(command, tmp_path):
    text = '{\n"rank": "8",\n"seed": 1.5,\n"learning_rat": 1,\n"n_epochs": 0,\n"resolution": true}'
    (tmp_path / "c.json").write_text(text)
    result = command("train_lora", [str(tmp_path / "c.json"), "crop=middle"])
    lines = result.err.removeprefix("error: ").splitlines()
    assert result.code == 2 and len(lines) == 6
    wanted = [
        ("2:9", "rank"),
        ("3:9", "seed"),
        ("4:1", "learning_rat"),
        ("5:13", "n_epochs"),
        ("6:15", "resolution"),
    ]
    for line, (place, key) in zip(lines, wanted, strict=False):
        assert line.startswith(f"{tmp_path / 'c.json'}:{place}: {key}: "), line
    assert lines[5].startswith("command line: crop: must be one of ")


# ---- C5: every key has an effect ----


def names_read(paths: list[Path]) -> set[str]:
    """Attributes that are read in these files, and words by which a table may look them up."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return read | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


READ_BY = {
    "morph": ({**MorphConfig.model_fields}, ["morph.py", "lorakit"]),
    "invert": (
        {**InvertConfig.model_fields},
        ["invert.py", "lorakit/diffusion/inversion_plan.py", "lorakit/diffusion/inversion_report.py"],
    ),
    "generate": ({**GenerateConfig.model_fields}, ["generate.py", "lorakit"]),
    "style_transfer": ({**StyleConfig.model_fields}, ["style_transfer.py", "lorakit"]),
    "edit": ({**EditConfig.model_fields}, ["edit.py", "lorakit"]),
    "drag": ({**DragConfig.model_fields}, ["drag.py", "lorakit"]),
    "animate": ({**AnimateConfig.model_fields, **Camera.model_fields}, ["animate.py", "lorakit"]),
    "mix_lora": ({key: 1 for verb in VERBS.values() for key in verb.config.model_fields}, ["mix_lora.py"]),
}


@pytest.mark.parametrize("script", READ_BY)
def test_c5_every_key_is_read_by_code_that_the_script_runs(script):
    """train_lora.py's keys are watched while it runs, in test_user_errors.py."""
    keys, places = READ_BY[script]
    files = [
        path for place in places for path in [ROOT / place, *(ROOT / place).rglob("*.py")] if path.is_file()
    ]
    read = names_read(files)
    assert len(keys) >= 10 and set(keys) - read == set()
    assert "a_key_that_nobody_reads" not in read


# ---- C6: relative paths ----


def test_c6_relative_paths_start_at_the_working_directory_and_messages_say_so(command, train, data, tmp_path):
    sub = tmp_path / "sub"
    sub.mkdir()
    config = {key: json.loads(value) for key, _, value in (word.partition("=") for word in train())}
    config |= {"data_dir": "data", "output_dir": "out"}
    (sub / "c.json").write_text(json.dumps(config))
    assert command("train_lora", [str(sub / "c.json"), "--check"], cwd=tmp_path).code == 0
    result = command("train_lora", [str(sub / "c.json"), "--check"], cwd=sub)
    assert_refused(result, 2, "data: no such folder")
    config |= {"pretrained_model_name_or_path": "ckpt/nowhere"}
    (sub / "c.json").write_text(json.dumps(config))
    result = command("train_lora", [str(sub / "c.json"), "--check"], cwd=tmp_path)
    assert_refused(result, 2, "ckpt/nowhere", f"paths are relative to {tmp_path}")
    assert not (tmp_path / "out").exists() and not (sub / "out").exists()


# ---- C7: what is shipped ----

CLASSES = {
    "": TrainConfig,
    "morph": MorphConfig,
    "invert": InvertConfig,
    "generate": GenerateConfig,
    "style_transfer": StyleConfig,
    "edit": EditConfig,
    "drag": DragConfig,
    "animate": AnimateConfig,
}
"""By the folder of the schema that a config names."""


def shipped() -> list[str]:
    found = (path for path in ROOT.glob("cfg/**/*.json") if path.name != "schema.json")
    return sorted(str(path.relative_to(ROOT / "cfg")) for path in found)


def test_c7_the_configs_and_their_schemas_are_found():
    schemas = {str(path.parent.relative_to(ROOT / "cfg")) for path in ROOT.glob("cfg/**/schema.json")}
    assert len(shipped()) >= 9 and schemas == {folder or "." for folder in CLASSES}


@pytest.mark.parametrize("name", shipped())
def test_c7_every_shipped_config_loads(name):
    path = ROOT / "cfg" / name
    schema = (path.parent / json.loads(path.read_text(encoding="utf-8"))["$schema"]).resolve()
    folder = schema.parent.relative_to(ROOT / "cfg")
    assert schema.is_file() and load_config(CLASSES["" if folder == Path() else str(folder)], path).config


def commands_of(text: str) -> list[str]:
    """Commands of our scripts in a text, without comments, but for those that leave something out."""
    script = "|".join(SCRIPTS)
    found = re.findall(rf"(?:^|`)(?:python |accelerate launch )((?:{script})\.py[^\n#`]*)", text, re.M)
    return [line.strip() for line in found if not re.search(r"…|--from| [A-Z]+(?![\w.])", line)]


def documented() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    for script in SCRIPTS:
        doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")))
        texts.append("\n".join(line.strip() for line in (doc or "").splitlines()))
    return sorted({command for text in texts for command in commands_of(text)})


def test_c7_the_documented_commands_are_found():
    assert len(documented()) >= 40
    assert {command.split(".py")[0] for command in documented()} == set(SCRIPTS)


@pytest.mark.parametrize("line", documented())
def test_c7_every_documented_command_is_understood(command, line):
    """Its keys, values and config are right; what it reads need not be there."""
    script, *words = shlex.split(line)
    words = [word for word in words if not word.startswith("--")]
    result = command(script.removesuffix(".py"), [*words, "--print-config"])
    assert result.code == 0, result.err
    assert json.loads(result.out) and not result.torch
    wrong = command(script.removesuffix(".py"), [*words, "no_such_key=1", "--print-config"])
    assert_refused(wrong, 2, "no_such_key: unknown key")
