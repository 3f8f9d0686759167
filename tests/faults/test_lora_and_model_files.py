"""Faults of LoRA files and bases, F1 to F10.

What a header shows is found without torch by the checks of morph.py, invert.py and generate.py and by
`mix_lora.py retrain`; what only the whole file shows, by `mix_lora.py inspect`. tests/test_lora_file.py has
more contents.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soak
from harness import ROOT, assert_refused, sha, snapshot
from small import settings_of

from lorakit.ground.errors import UserError

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
FETCH = "fetch it again"


def safetensors_of(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    return framed(header, b"".join(tensor.tobytes() for tensor in tensors.values()))


def framed(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def a_lora(width: int = 768, rank: int = 4, out: int = 64, module: str = MODULE) -> dict[str, np.ndarray]:
    """One module's LoRA; `width` is of the text that cross attention reads, by which a base is told."""
    rng = np.random.default_rng(0)
    return {
        f"{module}.lora_down.weight": rng.normal(size=(rank, width)).astype(np.float32),
        f"{module}.lora_up.weight": rng.normal(size=(out, rank)).astype(np.float32),
        f"{module}.alpha": np.array(rank, np.float32),
    }


WHOLE = safetensors_of(a_lora(), {"lorakit.config": "{}"})
HEADER = 8 + int.from_bytes(WHOLE[:8], "little")
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = ENTRY | {"data_offsets": [8, 16]}


class Trap:
    """A pickle that leaves a trace where it is opened."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def readers(command, film, inversion, sampling):
    """Every command that reads the header of a LoRA file without torch."""

    def run(path: Path):
        yield command("morph", [*film(lora=path), "--check"])
        yield command("invert", [*inversion(lora=str(path)), "--check"])
        yield command("generate", [*sampling(path), "--check"])
        yield command("mix_lora", ["retrain", str(path)])

    return run


def test_the_whole_file_is_taken(readers, here, tmp_path):
    """Of one for the miniature by every reader; generate.py compares sizes with the base too."""
    (tmp_path / "fits.safetensors").write_bytes(
        safetensors_of(a_lora(128, out=256), {"lorakit.config": "{}"})
    )
    assert [result.code for result in readers(tmp_path / "fits.safetensors")] == [0, 0, 0, 0]
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    assert [result.code for result in readers(tmp_path / "x.safetensors")] == [0, 0, 2, 0]
    assert (
        "rank        4, alpha 4: 1 modules"
        in here("mix_lora", ["inspect", str(tmp_path / "x.safetensors")]).out
    )


IN_THE_HEADER = {
    "F1 cut at 0": (WHOLE[:0], ["is empty (0 bytes)", FETCH]),
    "F1 cut at 4": (WHOLE[:4], ["is truncated: 4 bytes"]),
    "F1 cut at 8": (WHOLE[:8], ["is truncated: 8 bytes"]),
    "F1 cut in the header": (WHOLE[: HEADER // 2], ["truncated inside its header", FETCH]),
    "F1 cut in the data": (WHOLE[: HEADER + 100], ["is truncated: it holds", "% of the bytes", FETCH]),
    "F1 one byte short": (WHOLE[:-1], ["it holds 99 % of the bytes", FETCH]),
    "F1 header of 2^63 bytes": (b"\0" * 7 + b"\x80" + WHOLE[8:], ["does not begin with a header"]),
    "F1 header over 100 MB": ((10**8 + 1).to_bytes(8, "little") + WHOLE[8:], ["does not begin with"]),
    "F1 name that is not UTF-8": (framed(b'{"\xff":1}', b""), ["bad safetensors header", FETCH]),
    "F1 deep header": (framed(b'{"a":' * 20_000, b""), ["bad safetensors header", FETCH]),
    "F1 5,000 digits": (framed(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}", b""), ["bad safetensors header"]),
    "F1 offsets of text": (framed({"a": ENTRY | {"data_offsets": ["x", None]}}, b""), ["bad safetensors"]),
    "F2 a name twice": (framed(b'{"a":{},"a":{}}', bytes(8)), ["bad safetensors header", "a name twice"]),
    "F3 zip": (b"PK\x03\x04" + bytes(60), ["is a pickle", "run code", "Look for a .safetensors"]),
    "F4 pointer": (b"version https://git-lfs.github.com/spec/v1\n", ["git-LFS pointer", "`git lfs pull`"]),
    "F4 web page": (b"<!DOCTYPE html><html>404</html>", ["HTML page", "download the file itself"]),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_THE_HEADER)
def test_refused_from_the_header(readers, tmp_path, case):
    content, words = IN_THE_HEADER[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for result in readers(path):
        assert_refused(result, 2, str(path), *words)
        assert not result.torch and result.blinks < 20
    assert path.read_bytes() == content and not (tmp_path / "out").exists()


BAD = a_lora()
BAD[f"{MODULE}.lora_up.weight"] = BAD[f"{MODULE}.lora_up.weight"].copy()
BAD[f"{MODULE}.lora_up.weight"][3, 1] = np.nan
HALF = {name: tensor for name, tensor in a_lora().items() if not name.endswith("lora_up.weight")}
SKEWED = a_lora() | {f"{MODULE}.lora_up.weight": np.ones((64, 5), np.float32)}
METADATA = {"lora_adapter_metadata": '{"unet.lora_alpha": "strong"}'}
PEFT = {
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": np.ones((4, 8), np.float32),
    "unet.mid_block.attentions.0.proj_in.lora_B.weight": np.ones((8, 4), np.float32),
}
IN_THE_FILE = {
    "F1 trailing bytes": (WHOLE + b"\0", ["damaged safetensors file", FETCH]),
    "F1 overlap": (framed({"a": ENTRY, "b": ENTRY}, bytes(8)), ["holds no LoRA"]),
    "F1 hole": (framed({"a": ENTRY, "b": NEXT | {"data_offsets": [9, 17]}}, bytes(17)), ["holds no LoRA"]),
    "F1 shape beyond every number": (
        framed({f"{MODULE}.lora_up.weight": ENTRY | {"shape": [1 << 62, 1 << 62]}}, bytes(8)),
        ["damaged safetensors file", FETCH],
    ),
    "F1 shape of another size": (
        framed({f"{MODULE}.lora_up.weight": ENTRY | {"shape": [3]}}, bytes(8)),
        ["damaged safetensors file", FETCH],
    ),
    "F1 overlap in a LoRA": (
        framed({f"{MODULE}.lora_up.weight": ENTRY, f"{MODULE}.lora_down.weight": ENTRY}, bytes(8)),
        ["damaged safetensors file", FETCH],
    ),
    "F2 not finite": (safetensors_of(BAD), ["NaN or infinity", "lora_up"]),
    "F2 no tensors": (framed({}, b""), ["holds no tensors"]),
    "F2 shapes that do not multiply": (safetensors_of(SKEWED), ["not multiply", "down [4, 768], up [64, 5]"]),
    "F5 SDXL": (safetensors_of(a_lora(2048)), ["is for SDXL", "Stable Diffusion 1.x or 2.x"]),
    "F5 Flux": (
        safetensors_of({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": np.zeros(4, np.float32)}),
        ["is for Flux, SD3", "Stable Diffusion 1.x or 2.x"],
    ),
    "F6 half a pair": (safetensors_of(HALF), [f"{MODULE} has no up weight", "incomplete"]),
    "F8 metadata that hides the strength": (safetensors_of(PEFT, METADATA), ["strength is unknown"]),
    "F8 metadata that is no JSON": (
        safetensors_of(PEFT, {"lora_adapter_metadata": "{"}),
        ["strength is unknown"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_THE_FILE)
def test_refused_from_the_whole_file(here, tmp_path, case):
    content, words = IN_THE_FILE[case]
    path, out = tmp_path / "x.safetensors", tmp_path / "mixed.safetensors"
    path.write_bytes(content)
    out.write_bytes(b"earlier")
    commands = [["inspect", str(path)], ["mix", str(path), f"out={out}", "overwrite=true"]]
    for arguments in commands:
        assert_refused(here("mix_lora", arguments), 2, str(path), *words)
    assert snapshot(tmp_path) == {"x.safetensors": sha(path), "mixed.safetensors": sha(out)}
    assert out.read_bytes() == b"earlier"


def test_f2_a_byte_of_the_numbers_that_flipped_differs_from_the_hash(here, tmp_path):
    """The format has no checksum; the hash that this toolkit and kohya's write into the metadata is one."""
    path, mixed = tmp_path / "x.safetensors", tmp_path / "mixed.safetensors"
    path.write_bytes(WHOLE)
    assert here("mix_lora", ["mix", str(path), f"out={mixed}"]).code == 0
    assert "hash        matches" in here("mix_lora", ["inspect", str(mixed)]).out
    content = bytearray(mixed.read_bytes())
    content[-2] ^= 1
    mixed.write_bytes(content)
    assert "hash        DIFFERS" in here("mix_lora", ["inspect", str(mixed)]).out


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.pt", "x.bin"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_f3_a_pickle_is_refused_by_every_reader_and_not_opened(
    command, readers, train, inversion, film, sampling, restyling, tmp_path, name, protocol
):
    path, trace = tmp_path / name, tmp_path / "trace"
    path.write_bytes(pickle.dumps(Trap(trace), protocol=protocol) + bytes(600))
    base = {"pretrained_model_name_or_path": str(path)}
    results = [
        *readers(path),
        command("train_lora", train(**base)),
        command("morph", film(**base)),
        command("invert", inversion(**base)),
        command("generate", sampling(**base)),
        command("style_transfer", restyling(**base)),
    ]
    for result in results:
        assert_refused(result, 2, str(path), "pickle")
        assert not result.torch
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # the control: opened, it leaves its trace
    assert trace.exists()


def test_f3_a_base_of_pickled_weights_is_refused_and_not_opened(command, train, film, inversion, tmp_path):
    base, trace = Path(shutil.copytree(ROOT / "ckpt/miniature", tmp_path / "base")), tmp_path / "trace"
    for part in ("unet", "vae", "text_encoder"):
        for path in (base / part).glob("*.safetensors"):
            path.with_suffix(".bin").write_bytes(pickle.dumps(Trap(trace)))
            path.unlink()
    chosen = {"pretrained_model_name_or_path": str(base)}
    for script, make in (("train_lora", train), ("morph", film), ("invert", inversion)):
        result = command(script, make(**chosen))
        assert_refused(result, 2, str(base / "unet"), "only pickled weights", "safetensors")
        assert not result.torch
    assert not trace.exists()


@pytest.mark.parametrize(
    ("width", "made_for"), [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x")]
)
def test_f5_a_lora_of_another_width_says_for_which_base_it_is(here, tmp_path, width, made_for):
    path, out = tmp_path / "x.safetensors", tmp_path / "merged"
    path.write_bytes(safetensors_of(a_lora(width)))
    result = here("mix_lora", ["merge", str(ROOT / "ckpt/miniature"), str(path), f"out={out}"])
    assert_refused(result, 2, "does not fit", f"the LoRA is made for {made_for}")
    assert not out.exists() and snapshot(tmp_path) == {"x.safetensors": sha(path)}


def test_f6_a_lora_of_fewer_modules_is_a_whole_lora(here, tmp_path):
    """Trainers leave out modules on purpose; only a module without one of its halves is incomplete."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one.write_bytes(safetensors_of(a_lora()))
    two.write_bytes(safetensors_of(a_lora() | a_lora(module=MODULE.replace("to_k", "to_v"))))
    result = here("mix_lora", ["mix", str(one), str(two), f"out={tmp_path / 'out.safetensors'}"])
    assert result.code == 0 and "2 modules" in result.out


def test_f8_unknown_fields_of_metadata_are_passed_over(here, tmp_path):
    told = {"unet.lora_alpha": 2, "unet.r": 4, "unet.from_the_future": {"a": [1]}}
    (tmp_path / "x.safetensors").write_bytes(
        safetensors_of(PEFT, {"lora_adapter_metadata": json.dumps(told), "another_tool": "9"})
    )
    assert (
        "rank        4, alpha 2: 1 modules"
        in here("mix_lora", ["inspect", str(tmp_path / "x.safetensors")]).out
    )


def test_f9_code_beside_a_base_does_not_run(trained, tiny_base, tmp_path):
    """Nothing asks for remote code, wherever a base names it; only parts that are known are loaded."""
    base, trace = Path(shutil.copytree(tiny_base, tmp_path / "base")), tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()\nclass Part: pass\n"
    for name in ("pipeline.py", "unet/modeling.py", "text_encoder/modeling.py", "tokenizer/tokenization.py"):
        (base / name).write_text(code)
    edits = {
        "model_index.json": {"_class_name": ["pipeline", "Part"], "unet": ["modeling", "Part"]},
        "unet/config.json": {"auto_map": {"AutoModel": "modeling.Part"}},
        "text_encoder/config.json": {"auto_map": {"AutoModel": "modeling.Part"}},
        "tokenizer/tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization.Part", None]}},
    }
    for name, changes in edits.items():
        config = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(config | changes))
    path = trained(pretrained_model_name_or_path=str(base), max_train_steps=1, validation_steps=0)
    assert path.is_file() and not trace.exists()
    exec(code)  # the control: run, it leaves its trace
    assert trace.exists()


BROKEN_BASE = {
    "F9 no folder": (lambda base: shutil.rmtree(base), ["no such folder or file", "relative to"]),
    "F9 a part is missing": (lambda base: shutil.rmtree(base / "vae"), ["without vae/"]),
    "F4 pointer": (
        lambda base: (base / "unet/diffusion_pytorch_model.safetensors").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\n"
        ),
        ["unet/diffusion_pytorch_model.safetensors", "`git lfs pull`"],
    ),
    "F1 weights that are cut": (
        lambda base: (base / "text_encoder/model.safetensors").write_bytes(
            (base / "text_encoder/model.safetensors").read_bytes()[:5000]
        ),
        ["text_encoder/model.safetensors", "truncated", FETCH],
    ),
    "F9 a config that is cut": (
        lambda base: (base / "vae/config.json").write_text("{"),
        ["vae/config.json", "not readable as JSON"],
    ),
}


@pytest.mark.parametrize("script", ["train_lora", "morph", "invert", "generate", "style_transfer"])
@pytest.mark.parametrize("case", BROKEN_BASE)
def test_a_broken_base(command, train, film, inversion, sampling, restyling, tmp_path, case, script):
    damage, words = BROKEN_BASE[case]
    base = Path(shutil.copytree(ROOT / "ckpt/miniature", tmp_path / "base"))
    makers = {"train_lora": train, "morph": film, "invert": inversion}
    make = (makers | {"generate": sampling, "style_transfer": restyling})[script]
    arguments = make(pretrained_model_name_or_path=str(base))
    assert command(script, [*arguments, "--check"]).code == 0
    damage(base)
    result = command(script, arguments)
    assert_refused(result, 2, str(base), *words)
    assert not result.torch and result.blinks < 20 and not (tmp_path / "out").exists()


def test_a_merge_into_a_broken_base_leaves_what_was_there(here, tmp_path):
    base, out = Path(shutil.copytree(ROOT / "ckpt/miniature", tmp_path / "base")), tmp_path / "merged"
    shutil.copytree(base, out)
    before = snapshot(out)
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (tmp_path / "x.safetensors").write_bytes(safetensors_of(a_lora(128, out=256)))
    result = here(
        "mix_lora",
        ["merge", str(base), str(tmp_path / "x.safetensors"), *settings_of(out=str(out), overwrite=True)],
    )
    assert_refused(result, 2, str(weights), "truncated", FETCH)
    assert snapshot(out) == before


# ---- F10: every reader against damaged input ----


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_f10_damaged_input_raises_nothing_but_errors_for_the_user(tmp_path):
    """A slice of tests/soak.py: every reader, from a seed of its own."""
    counts = soak.fuzz_here(tmp_path, seed=1, inputs=600)
    assert sum(counts.inputs.values()) == 600 and set(counts.inputs) == set(soak.READERS)
    assert counts.uncaught == [] and counts.slow == []
    harmed = {name for name in soak.READERS if counts.refused[name]}
    assert harmed == set(soak.READERS) - {"metrics"}  # which drops lines that it cannot read


def test_f10_the_fuzzer_counts_a_reader_that_fails(tmp_path, monkeypatch):
    def careless(path: Path) -> None:
        if b"\0" in path.read_bytes():
            raise KeyError("unforeseen")
        raise UserError("foreseen")

    kept = {"config": soak.READERS["config"]._replace(read=careless)}
    monkeypatch.setattr(soak, "READERS", kept)
    counts = soak.fuzz_here(tmp_path, seed=1, inputs=300)
    assert 0 < len(counts.uncaught) < 300 and "KeyError" in counts.uncaught[0]
