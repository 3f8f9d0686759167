"""merge and extract on bases of every layout: the same sums under other names."""

import json

import narrow
import pytest
import torch

import mix_lora
from lorakit.diffusion.lora import add_lora, extract
from lorakit.ground.errors import UserError
from lorakit.weights.base import inspect_base
from lorakit.weights.lora_file import is_vector, kohya_name, lora_bytes
from lorakit.weights.lora_reader import read_lora
from lorakit.weights.part_files import read_places
from lorakit.weights.tensors import read_header, serialize

pytestmark = pytest.mark.slow  # its fixtures are

PARTS = ("unet", "vae", "text_encoder")
CHANGED = ("unet", "text_encoder")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def bases(request, tmp_path_factory):
    """A folder with a base in every layout, and a LoRA for it, text encoder and convolutions included."""
    root = tmp_path_factory.mktemp(request.param)
    for layout in ("modern", "old", "half", *narrow.FILES):
        narrow.write_base(root, layout, request.param)
    modules, models = {}, narrow.parts(request.param)
    for part in CHANGED:
        for number, parameter in enumerate(add_lora(models[part], rank=2, alpha=1.0, targets="all")):
            generator = torch.Generator().manual_seed(number)
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        modules |= extract(models[part], part)
    (root / "lora.safetensors").write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    return root


def run(*argv) -> None:
    assert mix_lora.main([str(each) for each in argv]) == 0


def merged(bases, layout, out, *more) -> dict[str, torch.Tensor]:
    """The tensors of a base after a merge into it, by their names of today."""
    is_file = layout in narrow.FILES
    base = bases / (f"{layout}.safetensors" if is_file else layout)
    config = [f"base_config={bases / 'modern'}"] if is_file else []
    out = out.with_suffix(".safetensors") if is_file else out
    run("merge", base, f"{bases / 'lora.safetensors'}=0.7", f"out={out}", *config, *more)
    return tensors(out, bases / "modern")


def tensors(path, config) -> dict[str, torch.Tensor]:
    info = inspect_base(str(path), str(config) if path.is_file() else None)
    return {f"{part}.{name}": value for part in PARTS for name, value in read_places(info.places(part))}


def test_a_merge_adds_the_same_whatever_the_names(bases, tmp_path):
    wanted = merged(bases, "modern", tmp_path / "modern")
    for layout in ("old", "file", "file-bare"):
        found = merged(bases, layout, tmp_path / layout)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    half = merged(bases, "half", tmp_path / "half")
    found = merged(bases, "file-half-ema", tmp_path / "file-half-ema")
    assert all(torch.equal(found[key], half[key]) for key in half)
    before = tensors(bases / "modern", None)
    changed = {key for key in before if not torch.equal(before[key], wanted[key])}
    lora = read_lora(bases / "lora.safetensors").modules
    assert len(changed) == len(lora) > 100 and not any(key.startswith("vae") for key in changed)
    assert any(not torch.equal(half[key].float(), wanted[key]) for key in changed)


def test_averages_are_left_out_and_every_other_byte_stays(bases, tmp_path, capsys):
    base, out = bases / "file-half-ema.safetensors", tmp_path / "file-half-ema.safetensors"
    merged(bases, "file-half-ema", tmp_path / "file-half-ema")
    assert "left out    model_ema.*: it holds the base without the LoRA" in capsys.readouterr().out
    (old, metadata), (new, same) = read_header(base), read_header(out)
    assert (
        {key for key in old if key not in new}
        == {key for key in old if key.startswith("model_ema.")}
        != set()
    )
    assert list(new) == [key for key in old if key in new] and metadata == same
    from safetensors import safe_open

    with safe_open(base, "pt") as first, safe_open(out, "pt") as second:
        for key in ("betas", "first_stage_model.decoder.conv_out.weight"):
            assert torch.equal(first.get_tensor(key), second.get_tensor(key))


def test_weight_0_gives_the_bytes_of_the_file_and_taking_out_gives_the_base_back(bases, tmp_path):
    base, lora, config = (
        bases / "file.safetensors",
        bases / "lora.safetensors",
        f"base_config={bases / 'modern'}",
    )
    zero, there, back = (tmp_path / f"{name}.safetensors" for name in ("zero", "there", "back"))
    run("merge", base, f"{lora}=0", f"out={zero}", config)
    assert zero.read_bytes() == base.read_bytes()
    run("merge", base, lora, f"out={there}", config)
    run("merge", there, f"{lora}=-1", f"out={back}", config)
    original, returned = (tensors(path, bases / "modern") for path in (base, back))
    for key in original:
        torch.testing.assert_close(returned[key], original[key], rtol=0, atol=1e-6)
    assert there.read_bytes() != base.read_bytes()


def test_extract_sees_through_layouts(bases, tmp_path):
    config = f"base_config={bases / 'modern'}"
    merged(bases, "file", tmp_path / "tuned")
    merged(bases, "modern", tmp_path / "tuned-folder")
    lora = read_lora(bases / "lora.safetensors").modules
    found = {}
    for number, (base, tuned) in enumerate(
        [
            ("modern", tmp_path / "tuned-folder"),
            ("old", tmp_path / "tuned-folder"),
            ("old", tmp_path / "tuned.safetensors"),
            ("file-bare.safetensors", tmp_path / "tuned-folder"),
        ]
    ):
        out = tmp_path / f"{number}.safetensors"
        run("extract", bases / base, tuned, "rank=2", f"out={out}", config)
        found[base, tuned.name] = read_lora(out).modules
    first, *others = found.values()
    assert first.keys() == lora.keys()
    for name, pair in lora.items():
        torch.testing.assert_close(first[name].delta(), 0.7 * pair.delta(), rtol=1e-3, atol=1e-5)
        assert all(torch.equal(other[name].up, first[name].up) for other in others)


def test_whole_differences_are_merged_and_extracted_with_biases_and_norms(bases, tmp_path):
    """A fine-tune of every tensor, as .diff and .diff_b and w_norm and b_norm, in each layout of a base."""
    first = tensors(bases / "modern", None)
    config = f"base_config={bases / 'modern'}"
    whole, wanted, module = {}, {}, {}
    for number, (key, value) in enumerate(first.items()):
        part, _, name = key.partition(".")
        stem, _, end = name.rpartition(".")
        if part not in CHANGED or "embedding." in f"{stem}.":
            continue
        change = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        norm = (
            {"weight": "w_norm", "bias": "b_norm"} if "norm" in stem else {"weight": "diff", "bias": "diff_b"}
        )
        whole[f"{kohya_name(part, stem)}.{norm[end]}"] = change
        wanted[key] = value + change
        module[key] = kohya_name(part, stem) + (".bias" if end == "bias" else "")
    assert {key.rpartition(".")[2] for key in whole} == {"diff", "diff_b", "w_norm", "b_norm"}
    path = tmp_path / "whole.safetensors"
    path.write_bytes(serialize(whole, {}))
    for layout, out in (("modern", tmp_path / "a"), ("file", tmp_path / "b.safetensors")):
        base = bases / (f"{layout}.safetensors" if layout == "file" else layout)
        run("merge", base, path, f"out={out}", *([config] if layout == "file" else []))
        found = tensors(out, bases / "modern")
        for key, value in first.items():
            torch.testing.assert_close(found[key], wanted.get(key, value), rtol=0, atol=1e-6)
    out = tmp_path / "found.safetensors"
    run("extract", bases / "modern", tmp_path / "a", "energy=1", "biases=true", f"out={out}")
    run("merge", bases / "modern", out, f"out={tmp_path / 'again'}")
    extracted = read_lora(out).modules
    vectors = {name for name in module.values() if is_vector(name)}
    assert vectors and vectors == {name for name in extracted if is_vector(name)}
    kept = [key for key in wanted if module[key] in extracted]
    assert len(kept) > len(vectors) + 100  # some layers are no targets: time_embedding, conv_in, conv_out
    found = tensors(tmp_path / "again", None)
    assert max(float((found[key] - wanted[key]).abs().max()) for key in kept) < 1e-4
    run("extract", bases / "modern", tmp_path / "a", "energy=1", f"out={out}", "overwrite=true")
    assert not any(is_vector(name) for name in read_lora(out).modules)
    run("merge", bases / "modern", out, f"out={tmp_path / 'without'}")
    found = tensors(tmp_path / "without", None)
    assert max(float((found[key] - wanted[key]).abs().max()) for key in kept) > 0.1


def test_a_base_in_the_hubs_cache_is_merged_into_and_compared(bases, tmp_path, monkeypatch):
    import huggingface_hub

    narrow.write_cache(tmp_path / "home", bases / "old", "some/base")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    run("merge", "some/base", f"{bases / 'lora.safetensors'}=0.7", f"out={tmp_path / 'out'}")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    wanted, found = merged(bases, "old", tmp_path / "old"), tensors(tmp_path / "out", None)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    out = tmp_path / "x.safetensors"
    run("extract", "some/base", tmp_path / "out", "rank=2", f"out={out}")
    assert read_lora(out).modules.keys() == read_lora(bases / "lora.safetensors").modules.keys()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="not in the hub's cache.*name a base that is here"):
        run("merge", "some/base", bases / "lora.safetensors", f"out={tmp_path / 'other'}")


def test_what_cannot_be_written_is_refused_before_anything_is(bases, tmp_path):
    lora, config = bases / "lora.safetensors", f"base_config={bases / 'modern'}"
    file, folder = bases / "file.safetensors", bases / "modern"
    (tmp_path / "taken.safetensors").write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    cases = [
        (
            [file, lora, f"out={tmp_path / 'x'}", config],
            "out must be a file, whose name ends in .safetensors",
        ),
        ([folder, lora, f"out={tmp_path / 'x.safetensors'}"], "out must be a folder"),
        ([folder, lora, f"out={tmp_path / 'x.ckpt'}"], "out must be a folder"),
        ([file, lora, f"out={file}", "overwrite=true", config], "the base itself"),
        ([file, lora, f"out={tmp_path / 'taken.safetensors'}", config], "exists"),
        ([file, lora, f"out={tmp_path / 'x.safetensors'}"], "give the folder of its configs as base_config"),
        ([lora, lora, f"out={tmp_path / 'x'}"], "is a LoRA, not a base"),
    ]
    for argv, message in cases:
        with pytest.raises(UserError, match=message):
            run("merge", *argv)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "taken.safetensors").read_bytes() == b"mine"


def test_a_file_that_is_refused_midway_leaves_the_old_one(bases, tmp_path):
    """fp8 weights cannot be merged into; the file is found out while it is written."""
    path, out = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    data = (bases / "file.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["model.diffusion_model.out.2.weight"]["dtype"] = "F32"
    key = next(key for key in header if key.endswith("attn1.to_q.weight"))
    header[key]["dtype"] = "I32"
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    out.write_bytes(b"earlier")
    with pytest.raises(UserError, match=f"{key} is I32; take a base of float32, fp16 or bf16"):
        run(
            "merge",
            path,
            bases / "lora.safetensors",
            f"out={out}",
            "overwrite=true",
            f"base_config={bases / 'modern'}",
        )
    assert out.read_bytes() == b"earlier" and sorted(each.name for each in tmp_path.iterdir()) == [
        *("fp8.safetensors", "out.safetensors")
    ]
