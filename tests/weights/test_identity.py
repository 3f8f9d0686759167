"""What is the same base, and what is another one."""

import json
import shutil
from pathlib import Path

import pytest

from lorakit.weights.base import COMPONENTS, BaseError, inspect_base
from lorakit.weights.identity import base_identity, base_record, changes

MINIATURE = Path(__file__).resolve().parents[2] / "ckpt" / "miniature"
CONFIGS = {part: f"{part}/config.json" for part in ("unet", "vae", "text_encoder")} | {
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
}


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(MINIATURE, tmp_path / "base"))


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def identities(folder: Path) -> dict[str, str]:
    info = inspect_base(str(folder))
    return {part: base_identity(info, part) for part in COMPONENTS}


def differences(folder: Path) -> list[str]:
    return changes(base_record(inspect_base(str(MINIATURE))), base_record(inspect_base(str(folder))))


def test_a_copy_is_the_same_base_whoever_wrote_its_configs(copy):
    for path in CONFIGS.values():
        edit(copy / path, _diffusers_version="0.1", _name_or_path="/elsewhere", transformers_version="4")
    edit(copy / "text_encoder/config.json", dtype="float32", torch_dtype="float32")
    assert identities(copy) == identities(MINIATURE) and differences(copy) == []
    assert base_identity(inspect_base(str(copy))) == base_identity(inspect_base(str(MINIATURE)))


CHANGED = {
    "unet": ("norm_eps", 1e-6),
    "vae": ("scaling_factor", 0.5),
    "text_encoder": ("num_hidden_layers", 2),
    "scheduler": ("prediction_type", "v_prediction"),
    "tokenizer": ("pad_token", "!"),
}


@pytest.mark.parametrize("part", CHANGED)
def test_another_config_is_another_part_and_the_others_stay(copy, part):
    key, value = CHANGED[part]
    edit(copy / CONFIGS[part], **{key: value})
    before, after = identities(MINIATURE), identities(copy)
    assert [each for each in COMPONENTS if before[each] != after[each]] == [part]
    [line] = differences(copy)
    assert line.startswith(f"base, {part}: {key}: ") and line.endswith(f" -> {value!r}")
    assert base_identity(inspect_base(str(copy))) != base_identity(inspect_base(str(MINIATURE)))


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("tokenizer", "tokenizer.json"),
    ],
)
def test_other_files_are_another_part_and_the_others_stay(copy, part, file):
    path = copy / part / file
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    before, after = identities(MINIATURE), identities(copy)
    assert [each for each in COMPONENTS if before[each] != after[each]] == [part]
    [line] = differences(copy)
    assert line.startswith(f"base, {part}: other files (sha256 ")


def test_a_key_that_only_one_has_is_a_difference_unless_it_is_null(copy):
    edit(copy / CONFIGS["unet"], class_embed_type=None, a_new_option=None)
    assert differences(copy) == []
    edit(copy / CONFIGS["unet"], a_new_option="on")
    assert differences(copy) == ["base, unet: a_new_option: None -> 'on'"]


def test_a_record_survives_json_and_tuples_are_lists():
    info = inspect_base(str(MINIATURE))
    record = base_record(info)
    assert json.loads(json.dumps(record)) == record
    channels = tuple(info.configs["unet"]["block_out_channels"])
    info.configs["unet"]["block_out_channels"] = channels
    assert base_record(info) == record


def test_a_broken_tokenizer_config_is_named(copy):
    (copy / CONFIGS["tokenizer"]).write_text("[")
    with pytest.raises(BaseError, match="tokenizer_config.json: not readable as JSON"):
        identities(copy)


def test_files_of_many_pieces_differ_wherever_they_do(copy, monkeypatch):
    """Pieces are hashed apart: one that moved is not the same file."""
    from lorakit.weights import base

    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    monkeypatch.setattr(base, "PIECE", 1000)
    base._file_hash.cache_clear()
    data = path.read_bytes()
    cut = len(data) // 1000 * 1000
    hashes = set()
    for content in (data, data[:-1] + b"x", data[1000:cut] + data[:1000] + data[cut:], data[:cut]):
        path.write_bytes(content)
        hashes.add(base.weights_hash(path))
    assert len(hashes) == 4
    base._file_hash.cache_clear()
