import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from lorakit.ground.command import parse_command
from lorakit.ground.config import Config, ConfigError, load_config, schema

ROOT = Path(__file__).resolve().parents[2]


class Optimizer(Config):
    beta: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    warm_steps: int = Field(default=0, ge=0, description="Steps of warm-up.")


class Picture(Config):
    path: str
    weight: float = 1.0


class Toy(Config):
    """Train a toy."""

    headings: ClassVar[dict[str, str]] = {"ckpt_name": "Output", "rank": "Adapter"}

    ckpt_name: str = Field(default="toy", min_length=1, description="Name of the file.")
    data_dir: str = "dataset/toy"
    rank: int = Field(default=4, ge=1, le=512, description="Rank of the update.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Step size, the same on 100% of the steps.")
    resolution: int = Field(default=512, ge=64, multiple_of=8, description="Side of the crop, pixels.")
    use_dora: bool = False
    resume_from_checkpoint: str | None = None
    max_train_steps: int | None = Field(default=None, ge=1, description="Null: off.")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    prompts: tuple[str, ...] = ("a hill", "a lake")
    crop: tuple[int, int] = (0, 0)
    adapters: dict[str, float] = Field(default_factory=dict)
    pictures: tuple[str | Picture, ...] = ()
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _rank_fits(self) -> "Toy":
        if self.rank > self.resolution:
            raise ValueError("rank must not exceed resolution")
        return self


class Strict(Config):
    name: str
    size: int = Field(ge=1)


VALID = """{
  "$schema": "./schema.json",
  "ckpt_name": "mountain",
  "rank": 8,
  "learning_rate": 5e-5,
  "use_dora": true,
  "prompts": ["a hill", "a tree é"],
  "adapters": {"ckpt/a.safetensors": 0.5},
  "pictures": ["a.png", {"path": "b.png", "weight": 2}],
  "optimizer": {"beta": 0.5}
}
"""


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "toy.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def faults(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The message of the ConfigError, with the folder left out."""
    with pytest.raises(ConfigError) as caught:
        load_config(Toy, write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(folder) + os.sep, "")


def command(*argv: str, flags: dict[str, str] | None = None, default_config: str | None = None):
    names = flags or {}
    return parse_command(
        Toy, argv, prog="toy.py", description="A toy.", flags=names, default_config=default_config
    )


# ---- a good file ---------------------------------------------------------------------------------


def test_a_valid_file_gives_its_values_and_where_each_is_from(tmp_path):
    path = write(tmp_path, VALID)
    loaded = load_config(Toy, path, ["optimizer.warm_steps=3", "rank=16"])
    assert loaded.config == Toy(
        ckpt_name="mountain",
        rank=16,
        learning_rate=5e-5,
        use_dora=True,
        prompts=("a hill", "a tree é"),
        adapters={"ckpt/a.safetensors": 0.5},
        pictures=("a.png", Picture(path="b.png", weight=2.0)),
        optimizer=Optimizer(beta=0.5, warm_steps=3),
    )
    assert loaded.origins["ckpt_name"] == f"{path}:3"
    assert loaded.origins["rank"] == "command line"
    assert loaded.origins["resolution"] == "default"
    assert loaded.origins["optimizer.beta"] == f"{path}:10"
    assert loaded.origins["optimizer.warm_steps"] == "command line"


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        Toy().rank = 5


def test_without_a_file_the_defaults_hold():
    assert load_config(Toy, None).config == Toy()


def test_a_byte_order_mark_is_accepted_and_shifts_no_column(tmp_path):
    assert load_config(Toy, write(tmp_path, b"\xef\xbb\xbf" + VALID.encode())).config.rank == 8
    assert faults(tmp_path, b'\xef\xbb\xbf{"rnk": 1}').startswith("toy.json:1:2: rnk: unknown key")


def test_a_relative_path_stays_as_written_wherever_the_file_lies(tmp_path):
    (tmp_path / "deep").mkdir()
    path = write(tmp_path / "deep", '{"data_dir": "../pictures"}')
    assert load_config(Toy, path).config.data_dir == "../pictures"


# ---- faults of keys and values -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("learning_rat", "did you mean learning_rate?"),
        ("Learning-Rate", "did you mean learning_rate?"),
        ("lr", "did you mean learning_rate?"),
        ("network_dim", "did you mean rank?"),
        ("train_data_dir", "did you mean data_dir?"),
        ("beta", "it belongs under optimizer"),
        ("train_batch_size", "--help lists all keys"),
        ("batch_size", "--help lists all keys"),
        ("zzz", "--help lists all keys"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_key(tmp_path, key, suggestion):
    assert faults(tmp_path, f'{{\n  "{key}": 1}}') == f"toy.json:2:3: {key}: unknown key; {suggestion}"
    assert faults(tmp_path, "{}", f"{key}=1") == f"command line: {key}: unknown key; {suggestion}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"optimizer": {"rank": 3}}', "16: optimizer.rank: unknown key; it belongs at the top level"),
        ('{"optimizer": {"bta": 3}}', "16: optimizer.bta: unknown key; did you mean beta?"),
        (
            '{"pictures": [{"path": "a", "wight": 1}]}',
            "29: pictures.0.wight: unknown key; did you mean weight?",
        ),
        ('{"pictures": [{}]}', "15: pictures.0.path: missing; it must be a string"),
        ('{"rank": true}', "10: rank: must be an integer >= 1 and <= 512, not true"),
        ('{"rank": "5"}', '10: rank: must be an integer >= 1 and <= 512, not "5"'),
        ('{"rank": 1.0}', "10: rank: must be an integer >= 1 and <= 512, not 1.0"),
        ('{"rank": 0}', "10: rank: must be an integer >= 1 and <= 512, not 0"),
        ('{"rank": null}', "10: rank: must be an integer >= 1 and <= 512, not null"),
        ('{"learning_rate": NaN}', "19: learning_rate: must be a number > 0, not NaN"),
        ('{"learning_rate": -Infinity}', "19: learning_rate: must be a number > 0, not -Infinity"),
        ('{"learning_rate": 1e400}', "19: learning_rate: must be a number > 0, not 1e400"),
        ('{"resolution": 100}', "16: resolution: must be an integer >= 64 and a multiple of 8, not 100"),
        ('{"use_dora": 1}', "14: use_dora: must be true or false, not 1"),
        ('{"max_train_steps": 0}', "21: max_train_steps: must be an integer >= 1 or null, not 0"),
        ('{"mixed_precision": "f16"}', '21: mixed_precision: must be one of "no", "fp16", "bf16", not "f16"'),
        ('{"prompts": "a"}', '13: prompts: must be a list, each entry a string, not "a"'),
        ('{"prompts": ["a", 5]}', "19: prompts.1: must be a string, not 5"),
        ('{"crop": [1]}', "10: crop.1: missing; it must be an integer"),
        ('{"crop": 1}', "10: crop: must be a list of 2: an integer; an integer, not 1"),
        ('{"ckpt_name": ""}', '15: ckpt_name: must be a string of length >= 1, not ""'),
        ('{"adapters": {"a": "x"}}', '20: adapters.a: must be a number, not "x"'),
        ('{"rank": 100,\n "resolution": 64}', "10: rank must not exceed resolution"),
        (
            '{"ckpt_name": "\\ud800"}',
            "15: ckpt_name: holds half of a character (a lone surrogate, or bytes that are not UTF-8)",
        ),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(tmp_path, text, message):
    assert faults(tmp_path, text) == f"toy.json:1:{message}"


def test_all_faults_come_at_once_in_the_order_of_the_file_then_the_command_line(tmp_path):
    text = '{\n  "use_dora": 1,\n  "rnak": 4,\n  "rank": 0,\n  "optimizer": {"beta": 2}\n}'
    lines = faults(tmp_path, text, "resolution=1", "x=2").splitlines()
    places = ["toy.json:2:15", "toy.json:3:3", "toy.json:4:11", "toy.json:5:25"] + 2 * ["command line"]
    assert [line.split(": ")[0] for line in lines] == places


def test_missing_keys_name_the_file_or_the_command_line(tmp_path):
    path = write(tmp_path, '{"size": 0}')
    for source, place in ((path, path), (None, "command line")):
        with pytest.raises(ConfigError) as caught:
            load_config(Strict, source)
        assert f"{place}: name: missing; it must be a string" in str(caught.value).splitlines()


def test_a_duplicate_key_is_refused_with_both_lines(tmp_path):
    text = '{\n  "rank": 4,\n  "optimizer": {"beta": 0.1, "beta": 0.2},\n  "rank": 4\n}'
    assert faults(tmp_path, text).splitlines() == [
        "toy.json:3:30: optimizer.beta: given twice, first in line 3; remove one",
        "toy.json:4:3: rank: given twice, first in line 2; remove one",
    ]


def test_a_long_list_of_faults_is_cut(tmp_path):
    text = json.dumps({f"key{n}": n for n in range(500)})
    lines = faults(tmp_path, text).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and more"


# ---- texts that are not a config -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ('{\n  "rank": 4,\n}', "toy.json:2:12: trailing comma", ","),
        ('{"prompts": ["a" , ]}', "toy.json:1:18: trailing comma", ","),
        ('{"rank": 4, // four\n}', "toy.json:1:13: JSON has no comments", "/"),
        ('{"rank": 4 # four\n}', "toy.json:1:12: JSON has no comments", "#"),
        ('/* toy */ {"rank": 4}', "toy.json:1:1: JSON has no comments", "/"),
        ("{'rank': 4}", "toy.json:1:2: strings and keys stand in straight double quotes", "'"),
        ("{rank: 4}", "toy.json:1:2: rank is not JSON", "r"),
        ('{"use_dora": True}', "toy.json:1:14: True is not JSON", "T"),
        ('{"rank": 4\n "use_dora": true}', "toy.json:2:2: a comma or closing bracket is missing", '"'),
        ('{"data_dir": "C:\\data"}', "toy.json:1:17: a backslash begins an escape", "\\"),
        ('{"rank": 4} {}', "toy.json:1:13: nothing may follow the last bracket", "{"),
        ('{"rank": 4,, "use_dora": true}', "toy.json:1:12: not JSON", ","),
        ('\t{"rank" 4}', "toy.json:1:10: not JSON", "4"),
    ],
)
def test_a_syntax_error_shows_its_line_with_a_caret_below_the_fault(tmp_path, text, message, marked):
    first, line, caret = faults(tmp_path, text).split("\n")
    assert first.startswith(message)
    assert line[caret.index("^")] == marked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "toy.json: the file is empty"),
        (" \n", "toy.json: the file is empty"),
        ("[1]", "toy.json: must hold an object {...} of keys and values, not [1]"),
        ("null", "toy.json: must hold an object {...} of keys and values, not null"),
        ('{"rank": 4', "toy.json:1:11: the file ends before the last bracket is closed"),
        ('{"ckpt_name": "toy,\n}', "toy.json:1:20: a string has no closing quote in its line"),
        ('{"ckpt_name": "toy\n}', "toy.json:1:19: a string has no closing quote in its line"),
        (b'{\n"ckpt_name": "\xe9"}', "toy.json:2: not UTF-8 text (byte 16)"),
        ('{"rank": 4}'.encode("utf-16"), "toy.json:1: not UTF-8 text (byte 0)"),
        ("[" * 10_000, "toy.json: more than 32 levels of nesting"),
        ('{"a": ' * 10_000 + "1" + "}" * 10_000, "toy.json: more than 32 levels of nesting"),
        ('{"rank": ' + "[" * 32 + "]" * 32 + "}", "toy.json:1:41: more than 32 levels of nesting"),
        (
            '{"rank": ' + "9" * 5000 + "}",
            "toy.json:1:10: rank: must be an integer >= 1 and <= 512, not a number",
        ),
        (
            '{"learning_rate": ' + "9" * 5000 + ".5}",
            "toy.json:1:19: learning_rate: must be a number > 0, not a number",
        ),
        ('{"' + "rank" * 100_000 + '": 1}', "toy.json:1:2: rankrank"),
        (" " * 1_000_001, "toy.json: larger than 1,000,000 bytes"),
    ],
)
def test_a_file_that_is_no_config_gives_one_short_message(tmp_path, text, message):
    shown = faults(tmp_path, text)
    assert shown.startswith(message)
    assert len(shown) < 400


def test_nesting_within_the_limit_is_not_a_syntax_matter(tmp_path):
    assert "must be an integer" in faults(tmp_path, '{"rank": ' + "[" * 31 + "]" * 31 + "}")


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "mountain.json").write_text("{}")
    for name, message in (
        ("montain.json", f"did you mean {tmp_path / 'mountain.json'}?"),
        ("mountain", f"did you mean {tmp_path / 'mountain.json'}?"),
        ("style.json", "holds mountain.json"),
        ("sub/a.json", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match="no such file") as caught:
            load_config(Toy, tmp_path / name)
        assert message in str(caught.value)


def test_a_directory_and_an_impossible_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a directory; name a file in it"):
        load_config(Toy, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Toy, "a\0b.json")


# ---- settings on the command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("ckpt_name=foo", "ckpt_name", "foo"),
        ("ckpt_name=123", "ckpt_name", "123"),
        ("ckpt_name=1e5", "ckpt_name", "1e5"),
        ("ckpt_name=true", "ckpt_name", "true"),
        ('ckpt_name="a b"', "ckpt_name", "a b"),
        ("ckpt_name=a=b", "ckpt_name", "a=b"),
        ("use_dora=true", "use_dora", True),
        ("learning_rate=5e-5", "learning_rate", 5e-5),
        ("learning_rate=1", "learning_rate", 1.0),
        ("resume_from_checkpoint=latest", "resume_from_checkpoint", "latest"),
        ("resume_from_checkpoint=500", "resume_from_checkpoint", "500"),
        ("resume_from_checkpoint=null", "resume_from_checkpoint", None),
        ('prompts=["x"]', "prompts", ("x",)),
        ("prompts.0=42", "prompts", ("42", "a lake")),
        ("prompts.2=a tree", "prompts", ("a hill", "a lake", "a tree")),
        ("adapters.a=0.5", "adapters", {"a": 0.5}),
        ("adapters.0=0.5", "adapters", {"0": 0.5}),
        ("optimizer.beta=0.5", "optimizer", Optimizer(beta=0.5)),
    ],
)
def test_a_setting_overrides_one_key(override, key, value):
    loaded = load_config(Toy, None, [override])
    assert loaded.config == Toy(**{key: value})
    assert loaded.origins[key if key != "optimizer" else "optimizer.beta"] == "command line"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank=foo", 'command line: rank: must be an integer >= 1 and <= 512, not "foo"'),
        ("rank=", 'command line: rank: must be an integer >= 1 and <= 512, not ""'),
        ("rank=1e400", "command line: rank: must be an integer >= 1 and <= 512, not 1e400"),
        ("rank.x=1", "command line: rank.x: rank is 8, which has no entry x"),
        ("prompts.7=x", 'command line: prompts.7: prompts is ["a hill", "a tree é"], which has no entry 7'),
        ("rank", "command line: rank: is not of the form key=value"),
        ("=4", "command line: =4: is not of the form key=value"),
        ("optimizer.=4", "command line: optimizer.=4: is not of the form key=value"),
        ('adapters={"a": 1, "a": 2}', "command line: adapters: its value gives a twice"),
        ("resolution=0", "command line: resolution: must be an integer >= 64 and a multiple of 8, not 0"),
        ("ckpt_name=\udcff", "command line: ckpt_name: holds half of a character"),
        (
            'pictures.0={"path": 5}',
            "command line: pictures.0.path: must be a string, not 5",
        ),
    ],
)
def test_a_wrong_setting_is_placed_on_the_command_line(tmp_path, override, message):
    assert faults(tmp_path, VALID, override).startswith(message)


def test_a_setting_replaces_a_wrong_value_of_the_file_and_the_last_one_counts(tmp_path):
    path = write(tmp_path, '{"rank": 0}')
    assert load_config(Toy, path, ["rank=3", "rank=5"]).config.rank == 5


def test_a_rule_over_two_keys_names_the_command_line_if_it_set_the_first(tmp_path):
    assert (
        faults(tmp_path, '{"resolution": 64}', "rank=65") == "command line: rank must not exceed resolution"
    )


# ---- the command line ----------------------------------------------------------------------------


def test_file_settings_and_flags_may_come_in_any_order(tmp_path):
    path = write(tmp_path, VALID)
    parsed = command(
        "rank=5", "--check", path, "--over-write", "use_dora=false", flags={"over-write": "replace"}
    )
    assert (parsed.config.rank, parsed.config.use_dora, parsed.config.ckpt_name) == (5, False, "mountain")
    assert parsed.path == path
    assert parsed.flags == {"check", "over-write"}
    assert command().flags == frozenset()


def test_the_default_config_is_read_only_if_no_file_is_named(tmp_path):
    path = write(tmp_path, '{"rank": 7}')
    other = tmp_path / "other.json"
    other.write_text('{"rank": 9}')
    assert command(default_config=path).config.rank == 7
    assert command(str(other), default_config=path).config.rank == 9
    assert command().path is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--chek"], "unknown option --chek; did you mean --check?"),
        (["--che"], "unknown option --che; did you mean --check?"),
        (["--rank", "4"], "unknown option --rank; keys take no dashes: write rank=VALUE"),
        (["--lr=4"], "unknown option --lr=4; keys take no dashes: write learning_rate=4"),
        (["-z"], "unknown option -z; --help lists all options"),
        (["rank"], "rank is a key; write rank=VALUE"),
        (["a.json", "b.json"], "2 config files, a.json and b.json"),
    ],
)
def test_a_usage_error_exits_with_2_and_says_what_was_meant(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        command(*argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_print_config_writes_a_config_that_loads_to_the_same_values(tmp_path, capsys):
    path = write(tmp_path, VALID)
    with pytest.raises(SystemExit) as caught:
        command(path, "rank=5", "--print-config")
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    again = load_config(Toy, write(tmp_path, out)).config
    assert again == load_config(Toy, write(tmp_path, VALID), ["rank=5"]).config
    rows = {line.split()[0]: line for line in err.splitlines()}
    assert rows["rank"].split() == ["rank", "5", "command", "line"]
    assert rows["ckpt_name"].endswith(f"{path}:3")
    assert rows["optimizer.warm_steps"].endswith("default")


def test_help_lists_every_key_with_default_range_and_meaning_within_the_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as caught:
        command("--help", flags={"overwrite": "replace 100% of the files"})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    lines = [line.strip() for line in text.splitlines()]
    order = [lines.index(line) for line in ("Output:", 'ckpt_name = "toy"', "Adapter:", "rank = 4")]
    assert order == sorted(order)
    joined = " ".join(lines)
    assert "Rank of the update. [an integer >= 1 and <= 512]" in joined
    assert "optimizer.beta = 0.9 Decay of the first moment. [a number >= 0 and < 1]" in joined
    assert "the same on 100% of the steps" in joined
    assert "--overwrite replace 100% of the files" in " ".join(joined.split())
    for name in Toy.model_fields:
        assert f"{name} = " in text or f"{name}." in text


def test_help_marks_a_required_key(capsys):
    with pytest.raises(SystemExit):
        parse_command(Strict, ["--help"], prog="strict.py", description="Strict.")
    assert "size (required)" in capsys.readouterr().out


def test_help_imports_no_torch(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(
        "import atexit, sys\n"
        "from lorakit.ground.command import parse_command\n"
        "from lorakit.ground.config import Config\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'peft'}\n"
        "atexit.register(lambda: print('loaded:', sorted(heavy & set(sys.modules))))\n"
        "class Toy(Config):\n"
        "    rank: int = 4\n"
        "parse_command(Toy, sys.argv[1:], prog='toy.py', description='A toy.')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "rank = 4" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"


# ---- the schema ----------------------------------------------------------------------------------


def test_the_schema_describes_each_key_and_refuses_others(capsys):
    tree = schema(Toy)
    assert tree["additionalProperties"] is False
    assert set(tree["properties"]) == {"$schema", *Toy.model_fields}
    rank = tree["properties"]["rank"]
    assert (rank["minimum"], rank["maximum"], rank["default"]) == (1, 512, 4)
    assert rank["description"] == "Rank of the update."
    assert tree["properties"]["optimizer"]["properties"]["beta"]["exclusiveMaximum"] == 1
    assert tree["properties"]["optimizer"]["additionalProperties"] is False
    assert "$ref" not in json.dumps(tree)
    with pytest.raises(SystemExit):
        command("--schema")
    assert json.loads(capsys.readouterr().out) == tree


# ---- properties ----------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
toys = st.builds(
    Toy,
    ckpt_name=texts.filter(len),
    rank=st.integers(1, 64),
    learning_rate=st.floats(min_value=1e-12, max_value=1e3),
    use_dora=st.booleans(),
    resume_from_checkpoint=st.none() | texts,
    mixed_precision=st.sampled_from(["no", "fp16", "bf16"]),
    prompts=st.lists(texts, max_size=3).map(tuple),
    adapters=st.dictionaries(texts, numbers, max_size=3),
    pictures=st.lists(texts | st.builds(Picture, path=texts, weight=numbers), max_size=3).map(tuple),
)
in_one_folder = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(config=toys, indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
@in_one_folder
def test_a_config_survives_the_way_through_json(tmp_path, config, indent, ascii_only):
    text = json.dumps(config.model_dump(mode="json"), indent=indent, ensure_ascii=ascii_only)
    assert load_config(Toy, write(tmp_path, text)).config == config


@given(config=toys)
@in_one_folder
def test_a_config_survives_the_way_through_settings(config):
    given_keys = [f"{key}={json.dumps(value)}" for key, value in config.model_dump(mode="json").items()]
    assert load_config(Toy, None, given_keys).config == config


@given(data=st.data())
@in_one_folder
def test_a_damaged_file_raises_nothing_but_a_config_error(tmp_path, data):
    raw = bytearray(VALID.encode())
    flips = st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4)
    for position, byte in data.draw(flips):
        raw[position] = byte
    lines = bytes(raw).split(b"\n")
    dropped = data.draw(st.sets(st.integers(0, len(lines) - 1), max_size=3))
    moved = data.draw(st.permutations(range(len(lines))) | st.just(range(len(lines))))
    path = write(tmp_path, b"\n".join(lines[n] for n in moved if n not in dropped))
    try:
        assert isinstance(load_config(Toy, path).config, Toy)
    except ConfigError as error:
        assert str(error).startswith(path)


@given(overrides=st.lists(st.text('rank.optimzeb0123{}[]"=,:- \ud800', max_size=20), max_size=3))
@in_one_folder
def test_any_settings_raise_nothing_but_a_config_error(overrides):
    try:
        assert isinstance(load_config(Toy, None, overrides).config, Toy)
    except ConfigError as error:
        assert all(line.startswith("command line: ") for line in str(error).splitlines())


@given(
    st.recursive(
        st.none() | st.booleans() | numbers | texts,
        lambda part: st.lists(part) | st.dictionaries(texts, part),
    )
)
@in_one_folder
def test_any_value_under_any_key_raises_nothing_but_a_config_error(tmp_path, value):
    path = write(tmp_path, json.dumps(dict.fromkeys(Toy.model_fields, value)))
    with pytest.raises(ConfigError) as caught:
        load_config(Toy, path)
    assert all(line.startswith(path) for line in str(caught.value).splitlines()[:20])
