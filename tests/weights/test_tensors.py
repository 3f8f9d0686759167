"""Safetensors files have the same bytes for the same content, and broken ones are named for what they are."""

import hashlib
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorakit.ground.errors import UserError
from lorakit.weights.tensors import payload_sha256, read_header, read_tensors, serialize

ROOT = Path(__file__).resolve().parents[2]

METADATA = {f"key{i}": f"value {i} é" for i in range(12)}


def example():
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 4, generator=generator),
        "a": torch.randn(2, 5, generator=generator).half().T,
        "scalar": torch.tensor(2.5),
    }


def file_of(tmp_path, data, name="x.safetensors"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_bytes_are_the_same_in_another_process_with_another_hash_seed_and_order():
    code = (
        "import hashlib, sys; sys.path.insert(0, 'tests/weights'); import test_tensors as t;"
        "from lorakit.weights.tensors import serialize;"
        "tensors = dict(reversed(t.example().items())); metadata = dict(reversed(t.METADATA.items()));"
        "print(hashlib.sha256(serialize(tensors, metadata)).hexdigest())"
    )
    here = hashlib.sha256(serialize(example(), METADATA)).hexdigest()
    assert here == hashlib.sha256(serialize(example(), METADATA)).hexdigest()
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert here == other.stdout.strip()


def test_other_content_gives_other_bytes():
    changed = example()
    changed["b"][0, 0] += 1
    assert serialize(example(), METADATA) != serialize(changed, METADATA)
    assert serialize(example(), METADATA) != serialize(example(), METADATA | {"key0": "x"})


@pytest.mark.parametrize("metadata", [{}, METADATA, {"a": '"\\\n'}])
def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path, metadata):
    data = serialize(example(), metadata)
    path = file_of(tmp_path, data)
    tensors, found = read_tensors(path)
    theirs = safetensors.torch.load_file(path)
    assert found == metadata and tensors.keys() == theirs.keys() == example().keys()
    for name, tensor in example().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor) and torch.equal(theirs[name], tensor)
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert read_header(path)[0] == {"a": (5, 2), "b": (3, 4), "scalar": ()}


def test_the_payload_hash_does_not_see_the_metadata():
    assert payload_sha256(serialize(example(), {})) == payload_sha256(serialize(example(), METADATA))
    changed = example() | {"scalar": torch.tensor(3.0)}
    assert payload_sha256(serialize(example(), {})) != payload_sha256(serialize(changed, {}))


class Bomb:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('exploded').touch()",)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.pt", "x.BIN"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_is_refused_by_name_and_by_content_and_never_opened(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", pickle.dumps(Bomb()))
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="is a pickle"):
        read_tensors(path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # the control: opening it would have left a trace
    assert (tmp_path / "exploded").exists()


def test_a_header_length_that_begins_like_a_pickle_is_read(tmp_path):
    for length in range(200):
        data = serialize({"a": torch.zeros(1)}, {"x": "y" * length})
        if data[0] == 0x80:
            break
    assert data[0] == 0x80
    assert read_tensors(file_of(tmp_path, data))[0]["a"].shape == (1,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"abc", "is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is an HTML page"),
        (b"<html><body>404</body></html>", "is an HTML page"),
        (b"just some text, long enough", "does not begin with a header"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "does not begin with a header"),
        ((64).to_bytes(8, "little") + b'{"a"', "truncated inside its header"),
        ((4).to_bytes(8, "little") + b'{"a"', "bad safetensors header"),
        ((6).to_bytes(8, "little") + b'{"\xff":1', "bad safetensors header"),
        ((9).to_bytes(8, "little") + b'{"a":1e9}', "bad safetensors header"),
    ],
)
def test_what_is_no_safetensors_file_is_said_in_one_line(tmp_path, data, message):
    path = file_of(tmp_path, data)
    with pytest.raises(UserError, match=message) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def with_header(header, payload=b"\0" * 8):
    text = header if isinstance(header, str) else json.dumps(header)
    return len(text).to_bytes(8, "little") + text.encode() + payload


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": ENTRY},  # trailing bytes
        {"a": ENTRY, "b": ENTRY},  # overlap
        {"a": ENTRY | {"shape": [2]}, "b": ENTRY | {"data_offsets": [4, 8]}},
        {"a": ENTRY | {"dtype": "F33"}, "b": ENTRY | {"data_offsets": [4, 8]}},
        {"a": ENTRY | {"shape": [1 << 62, 1 << 62]}},
        {"a": ENTRY | {"shape": [1e999]}},
        {"__metadata__": {"x": 1}, "a": ENTRY},
        {"__metadata__": ["x"], "a": ENTRY},
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "{" + '"a":{' * 5000,
    ],
)
def test_a_damaged_header_is_a_user_error(tmp_path, header):
    with pytest.raises(UserError, match="damaged|bad safetensors header"):
        read_tensors(file_of(tmp_path, with_header(header)))


def test_a_whole_header_of_the_same_making_is_read(tmp_path):
    path = file_of(tmp_path, with_header({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 8]}}))
    assert set(read_tensors(path)[0]) == {"a", "b"}


def test_a_cut_file_tells_how_much_of_it_is_there(tmp_path):
    data = serialize({"a": torch.zeros(10_000)}, {})
    with pytest.raises(UserError, match="holds 41 % of the bytes"):
        read_tensors(file_of(tmp_path, data[: int(len(data) * 0.415)]))


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_and_no_flipped_header_byte_gives_another_kind_of_error(tmp_path, seed):
    data = bytearray(serialize(example(), METADATA))
    generator = torch.Generator().manual_seed(seed)
    where = int(torch.randint(len(data) - 100, (), generator=generator))
    if seed % 2:
        data = data[:where]
    else:
        data[where] ^= 1 << seed % 8
    try:
        read_tensors(file_of(tmp_path, bytes(data)))
    except UserError:
        return
    assert seed % 2 == 0, "a cut file was read"


def test_a_missing_file_and_a_folder_are_said(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        read_tensors(tmp_path)
