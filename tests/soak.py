"""The long test: kills in the hundreds and damaged input in the tens of thousands. Not part of `make test`.

    python tests/soak.py minutes=30 seed=0

Half of the time, trainings and morphs are killed by SIGKILL at random points and started again by the same
command, until they end; after every kill the newest checkpoint must be whole, and at the end every byte must
be that of an unbroken run. The other half, every reader gets damaged input; whatever is raised that is not an
error for the user counts, and so does a second of work. The last line is JSON; the exit code is 1 if anything
failed.
"""

import contextlib
import faulthandler
import hashlib
import importlib
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in conftest.py: one thread, the same bits everywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from pydantic import Field  # noqa: E402
from small import SHORT_RUN, settings_of, short_morph, small_pictures, tiny_base  # noqa: E402

from lorakit.ground.command import parse_command  # noqa: E402
from lorakit.ground.config import Config  # noqa: E402
from lorakit.ground.errors import UserError  # noqa: E402

SLOW = 1.0  # seconds of work that count as a hang
BUSY = 30.0  # seconds of work without progress after which a process is killed for hanging
SILENT = 600.0  # seconds by the clock: a busy machine keeps a process waiting, a deadlock does so for ever
MAX_PIXELS = 4_000_000  # of fuzzed pictures: what a header may ask for is part of their memory
ROOM = 128 * 2**20  # bytes of memory besides three times the largest input: a decoded picture of MAX_PIXELS


class SoakConfig(Config):
    minutes: float = Field(30.0, gt=0, description="how long, half of it for kills")
    seed: int = Field(0, ge=0, description="of the kills and of the damage")


# ---- damage ----

TOKENS = [b"\0", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 4000, b'{"a":' * 4000, b"null", b"true"]
TOKENS += [
    b'"\\ud800"',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"../",
    b"\\",
    b'"',
    b"\r\n",
    b"//",
    b"x" * 70_000,
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    5,
    2**63,
    -(10**30),
    1e308,
    float("nan"),
    float("inf"),
    0.1,
    "",
    "x",
    "\0",
]
VALUES += [
    "\ud800",
    "a" * 10_000,
    "../x",
    "/etc/passwd",
    "é",
    [],
    {},
    [[]],
    [None, 1],
    {"a": {"b": []}},
    ["x"] * 500,
]


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four wounds that know nothing of the format."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, upto = sorted(rng.randint(0, len(content)) for _ in range(2))
        wound = rng.randrange(7)
        if wound == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif wound == 1 and content:
            content[at % len(content)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, *b'"{}[],:'])
        elif wound == 2:
            del content[at:upto]
        elif wound == 3:
            content[at:at] = content[at:upto][:5000]
        elif wound == 4:
            content[at:at] = rng.choice(TOKENS)
        elif wound == 5:
            del content[at:]
        else:
            content[at:upto] = rng.randbytes(min(upto - at, 64))
    return bytes(content)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one place changed, removed, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        change = rng.randrange(6)
        if change == 0:
            return {name: item for name, item in value.items() if name != key}
        if change == 1:
            return value | {rng.choice(["", "x", key + "s", "a.b", "\0", "__proto__"]): value[key]}
        if change == 2:
            return value | {key: rng.choice(VALUES)}
        return value | {key: damaged_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(rng, value[at]), *value[at + rng.randrange(2) :]]
    return rng.choice(VALUES)


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """Damage to the values, the text or both."""
    if rng.random() < 0.6:
        with contextlib.suppress(ValueError):
            value = json.loads(data)
            for _ in range(rng.randint(1, 3)):
                value = damaged_value(rng, value)
            data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
            if rng.random() < 0.8:
                return data
    return damaged_bytes(rng, data)


def damaged_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(rng, lines[at])
    if rng.random() < 0.2:
        lines.insert(at, lines[rng.randrange(len(lines))])
    return b"\n".join(lines)


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Damage within the header, whose length is set right again, or anywhere."""
    if rng.random() < 0.4:
        return damaged_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = damaged_json(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damaged_picture(rng: random.Random, data: bytes) -> bytes:
    """Damage anywhere; in a PNG also within a chunk, whose checksum is set right again."""
    if not data.startswith(b"\x89PNG") or rng.random() < 0.4:
        return damaged_bytes(rng, data)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    number = rng.randrange(len(chunks))
    name, content = chunks[number]
    chunks[number] = name, damaged_bytes(rng, content)[: 2**20]
    if rng.random() < 0.2:
        chunks.insert(number, rng.choice(chunks))
    parts = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return data[:8] + b"".join(parts)


# ---- readers ----


class Reader(NamedTuple):
    """What reads one kind of file: sound contents, how they are damaged, and the reading of a damaged one."""

    corpus: Callable[[], list[bytes]]
    damage: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], None]


def _configs() -> list[bytes]:
    found = [path for path in ROOT.glob("cfg/**/*.json") if path.name != "schema.json"]
    return [path.read_bytes() for path in sorted(found)]


def _read_config(path: Path) -> None:
    from lorakit.ground.config import load_config
    from lorakit.training.config import TrainConfig
    from morph import MorphConfig

    load_config(MorphConfig if b'"images"' in path.read_bytes() else TrainConfig, path)


def _settings() -> list[bytes]:
    return [
        b"rank=4",
        b"learning_rate=1e-4",
        b'target_modules=["to_q", "to_v"]',
        b'images.0={"path": "a.png", "prompt": "x", "lora": null}',
        b"images.1.prompt=mountains",
        b"sample_prompts.0=a lake",
    ]


def _read_settings(path: Path) -> None:
    from lorakit.ground.config import load_config
    from lorakit.training.config import TrainConfig
    from morph import MorphConfig

    setting = os.fsdecode(path.read_bytes())
    if "images" in setting:
        load_config(MorphConfig, ROOT / "cfg/morph/mountain.json", [setting])
    else:
        load_config(TrainConfig, ROOT / "cfg/mountain.json", [setting])


def _metadata() -> list[bytes]:
    texts = ["mountains at noon", "山 und Täler", "x" * 500]
    lines = [json.dumps({"file_name": f"{k % 2}.png", "text": text}) for k, text in enumerate(texts)]
    return ["\n".join(lines[:2]).encode(), "\r\n".join(["\ufeff" + lines[2], "", lines[1]]).encode()]


def _captions() -> list[bytes]:
    return [b"mountains", "山 und Täler\n".encode()]


def _beside_pictures(path: Path, name: str) -> None:
    """Reads a folder of two small pictures in which the damaged file has the name."""
    from lorakit.pictures.folder import read_folder

    folder = path.with_name("pictures")
    if not folder.exists():
        folder.mkdir()
        for number in range(2):
            Image.new("L", (20, 20), number).save(folder / f"{number}.png")
    for other in ("metadata.jsonl", "0.txt", "1.txt"):
        (folder / other).unlink(missing_ok=True)
    if name == "0.txt":
        (folder / "1.txt").write_text("a lake")
    shutil.copyfile(path, folder / name)
    read_folder(folder)


def _manifests() -> list[bytes]:
    entries = {"state.json": {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}}
    manifest = {"format": "lorakit-checkpoint", "version": 1, "step": 5, "files": entries}
    return [json.dumps(manifest, indent=1).encode()]


def _read_manifest(path: Path) -> None:
    from lorakit.ground.checkpoints import latest_checkpoint

    folder = path.with_name("run") / "checkpoint-00000005"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_bytes(b"{}")
    shutil.copyfile(path, folder / "manifest.json")
    latest_checkpoint(folder.parent)


def _metrics() -> list[bytes]:
    records = [{"step": step, "loss": 0.1 * step, "lr": 1e-4} for step in range(1, 6)]
    return ["".join(json.dumps(record) + "\n" for record in records).encode()]


def _read_metrics(path: Path) -> None:
    from lorakit.ground.runs import MetricsFile

    MetricsFile(path).truncate_after(3)


def _loras() -> list[bytes]:
    import torch

    from lorakit.weights.lora_file import LoraPair, lora_bytes
    from lorakit.weights.tensors import serialize

    rng, rank = torch.Generator().manual_seed(0), 2
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    modules = {}
    for name, out, into in ((f"{block}_attn1_to_q", 8, 8), (f"{block}_attn2_to_k", 8, 768)):
        down, up = torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng)
        modules[name] = LoraPair(down, up, 1.0)
    loha = {
        f"{block}_attn1_to_q.hada_w{k}_{s}": torch.randn(4, 4, generator=rng) for k in (1, 2) for s in "ab"
    }
    numbered = {f"unet:{k}:{half}": torch.ones(2, 2) for k in range(4) for half in ("up", "down")}
    written = [lora_bytes(modules, layout=layout, metadata={"x": "y"}) for layout in ("kohya", "diffusers")]
    return [*written, serialize(loha, {}), serialize(numbered, {})]


def _read_lora(path: Path) -> None:
    from lorakit.weights.lora_import import read_any

    read_any(path)


def _shards() -> list[bytes]:
    from lorakit.ground.shards import Shards

    contents = []
    for sealed in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            shards = Shards(Path(folder))
            for number in range(4):
                shards.write(bytes([number] * 20), bytes(range(64)) * number)
            if sealed:
                shards.seal()
            contents += [path.read_bytes() for path in Path(folder).iterdir()]
    return contents


def _read_shard(path: Path) -> None:
    from lorakit.ground.shards import Shards

    folder = path.with_name("shards")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / "00000001-000000000000.shard")
    shards = Shards(folder)
    for number in range(4):
        if (data := shards.read(bytes([number] * 20))) is None:
            raise UserError("no entry")  # which is how a damaged one is refused
        assert data == bytes(range(64)) * number


def _pictures() -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8))
    deep = Image.fromarray(np.arange(24 * 36, dtype=np.uint16).reshape(24, 36) * 70)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = noise.convert("RGBA")
    clear.putalpha(100)
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (noise, "PNG", {}),
        (deep, "PNG", {}),
        (clear, "PNG", {"exif": exif}),
        (noise.quantize(16), "PNG", {"transparency": 3}),
        (noise, "JPEG", {"exif": exif}),
        (noise.convert("CMYK"), "JPEG", {}),
        (noise, "JPEG", {"progressive": True}),
        (noise, "WEBP", {}),
        (clear, "WEBP", {"lossless": True}),
        (noise, "GIF", {}),
        (noise, "GIF", {"save_all": True, "append_images": [clear.convert("RGB")]}),
        (noise, "BMP", {}),
        (noise, "TIFF", {"compression": "tiff_lzw"}),
        (deep, "TIFF", {}),
        (noise, "AVIF", {}),
    ]
    contents = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        with contextlib.suppress(KeyError):  # a Pillow without AVIF
            image.save(buffer, kind, **options)
            contents.append(buffer.getvalue())
    return contents


def _read_picture(path: Path) -> None:
    from lorakit.pictures.images import image_size, load_image

    size = image_size(path, max_pixels=MAX_PIXELS, animated="first")
    assert load_image(path, max_pixels=MAX_PIXELS, animated="first").size == size
    load_image(path.read_bytes(), max_pixels=MAX_PIXELS)


def _base_configs() -> list[bytes]:
    return [(ROOT / "ckpt/miniature/unet/config.json").read_bytes()]


def _read_base(path: Path) -> None:
    from lorakit.weights.base import inspect_base

    base = path.with_name("base")
    if not base.exists():
        shutil.copytree(ROOT / "ckpt/miniature", base, copy_function=os.symlink)
    (base / "unet/config.json").unlink(missing_ok=True)
    shutil.copyfile(path, base / "unet/config.json")
    inspect_base(str(base))


READERS = {
    "config": Reader(_configs, damaged_json, _read_config),
    "setting": Reader(_settings, damaged_bytes, _read_settings),
    "metadata": Reader(_metadata, damaged_lines, lambda path: _beside_pictures(path, "metadata.jsonl")),
    "caption": Reader(_captions, damaged_bytes, lambda path: _beside_pictures(path, "0.txt")),
    "manifest": Reader(_manifests, damaged_json, _read_manifest),
    "metrics": Reader(_metrics, damaged_lines, _read_metrics),
    "LoRA": Reader(_loras, damaged_safetensors, _read_lora),
    "shard": Reader(_shards, damaged_bytes, _read_shard),
    "picture": Reader(_pictures, damaged_picture, _read_picture),
    "base": Reader(_base_configs, damaged_json, _read_base),
}  # fmt: skip


@dataclass
class Fuzzed:
    """Counts, and the inputs that failed by the names from which they can be made again."""

    inputs: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    uncaught: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0
    grown: int = 0

    def add(self, other: "Fuzzed") -> None:
        self.inputs += other.inputs
        self.refused += other.refused
        self.uncaught += other.uncaught
        self.slow += other.slow
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)
        self.grown = max(self.grown, other.grown)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_here(
    folder: Path,
    seed: int,
    inputs: int,
    start: int = 0,
    begun: Callable[[int], None] = lambda number: None,
) -> Fuzzed:
    """Give the readers in turn damaged inputs, each of which depends on the seed and its number alone."""
    corpora = {name: reader.corpus() for name, reader in READERS.items()}
    names, counts = list(READERS), Fuzzed()
    path, before = folder / "input", peak_memory()
    for number in range(start, start + inputs):
        begun(number)
        name = names[number % len(names)]
        rng = random.Random(f"{seed} {number}")
        content = READERS[name].damage(rng, rng.choice(corpora[name]))
        path.write_bytes(content)
        started = time.process_time()
        try:
            READERS[name].read(path)
        except UserError:
            counts.refused[name] += 1
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            counts.uncaught.append(f"{name} {number}: {type(error).__name__} at {where}: {str(error)[:100]}")
        took = time.process_time() - started
        if took > SLOW:
            counts.slow.append(f"{name} {number}: {took:.1f} s")
        counts.inputs[name] += 1
        counts.slowest, counts.largest = max(counts.slowest, took), max(counts.largest, len(content))
    counts.grown = peak_memory() - before
    return counts


BATCH = 2000  # inputs to a process


def fuzz(seed: int, seconds: float) -> Fuzzed:
    """Fuzz in processes of BATCH inputs, each watched for a hang that Python itself cannot see."""
    total, start, deadline = Fuzzed(), 0, time.monotonic() + seconds
    current = mmap.mmap(-1, 8)
    while time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            pid = fork(lambda here=Path(folder), first=start: _fuzz_child(here, seed, first, current))
            told, code = Path(folder) / "counts.json", None
            patience = Patience(pid)
            while (code := ended(pid)) is None:
                time.sleep(0.05)
                if patience.is_lost(current[:]):
                    os.kill(pid, signal.SIGKILL)
            if told.exists():
                counts = json.loads(told.read_text())
                counters = {name: Counter(counts.pop(name)) for name in ("inputs", "refused")}
                total.add(Fuzzed(**counters, **counts))
            else:
                number = int.from_bytes(current[:], "little")
                name = list(READERS)[number % len(READERS)]
                total.slow.append(f"{name} {number}: no end, or the process died (exit code {code})")
        start += BATCH
        done = f"{total.inputs.total():,} inputs, {len(total.uncaught)} uncaught, {len(total.slow)} slow"
        say(f"fuzzed      {done}")
    return total


def _fuzz_child(folder: Path, seed: int, start: int, current: mmap.mmap) -> int:
    def begun(number: int) -> None:
        current[:] = number.to_bytes(8, "little")

    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff writes what it thinks of the damage
    counts = fuzz_here(folder, seed, BATCH, start, begun)
    (folder / "counts.json").write_text(json.dumps(vars(counts)))
    return 0


# ---- processes ----


def fork(work: Callable[[], int]) -> int:
    """A child that has imported everything already; returns its id.

    A lock that another thread holds at this moment would stay locked in the child: the soak, which forks
    thousands of times, runs nothing but imports in its own process.
    """
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def seconds_of_work(pid: int) -> float:
    """What a process has had of the processors."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Patience:
    """Whether a process hangs: it works, or sleeps, and gets nowhere."""

    def __init__(self, pid: int):
        self.pid, self.seen = pid, b""
        self.worked, self.at = 0.0, time.monotonic()

    def is_lost(self, progress: bytes) -> bool:
        worked = seconds_of_work(self.pid)
        if progress != self.seen:
            self.seen, self.worked, self.at = progress, worked, time.monotonic()
        return worked - self.worked > BUSY or time.monotonic() - self.at > SILENT


def ended(pid: int) -> int | None:
    """The exit code of a child (minus the signal that killed it), None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# ---- what is killed ----


@dataclass(frozen=True)
class Story:
    """A command that can be given again and again, in a folder of its own.

    Args:
        command: the words of the command line that writes into a folder.
        unusable: what in the folder is visible and not whole.
        results: hashes of all that must be the same for any number of kills.
    """

    name: str
    script: str
    command: Callable[[Path], list[str]]
    unusable: Callable[[Path], list[str]]
    results: Callable[[Path], dict[str, str]]


def training(name: str, base: Path, pictures: Path, **changes: Any) -> Story:
    keys = SHORT_RUN | dict(
        pretrained_model_name_or_path=str(base),
        data_dir=str(pictures),
        logging_steps=1,
        resume_from_checkpoint="latest",
    )
    return Story(
        name,
        "train_lora",
        lambda folder: settings_of(**(keys | changes | {"output_dir": str(folder)})),
        lambda folder: unusable_checkpoints(folder / "run"),
        lambda folder: {"LoRA": sha(folder / "run.safetensors"), **of_best(folder), **losses(folder / "run")},
    )


def unusable_checkpoints(run: Path) -> list[str]:
    """The newest checkpoint, if it is not whole, and each visible LoRA file that is not."""
    from safetensors.torch import load

    from lorakit.ground.checkpoints import checkpoints, verify_checkpoint
    from lorakit.weights.lora_reader import read_lora

    found = []
    loras = [path for path in (run / "best.safetensors", run.with_suffix(".safetensors")) if path.exists()]
    newest = [folder for _, folder in checkpoints(run)[-1:]]
    for path in (*newest, *loras):
        try:
            if path in loras:
                read_lora(path)
            else:
                verify_checkpoint(path)
                json.loads((path / "state.json").read_bytes())
                for tensors in path.glob("*.safetensors"):
                    load(tensors.read_bytes())
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def of_best(folder: Path) -> dict[str, str]:
    best = folder / "run/best.safetensors"
    return {"best": sha(best)} if best.exists() else {}


def losses(run: Path) -> dict[str, str]:
    """Every loss of every step, as logged; times are left out."""
    kept = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept.append({key: record[key] for key in sorted(record) if "loss" in key or key in ("step", "lr")})
    return {"metrics": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}


def morphing(name: str, base: Path, pictures: Path, lora: Path, count: int, **changes: Any) -> Story:
    keys = short_morph(base, pictures, {0: lora}, count) | {"formats": ["gif"]} | changes
    return Story(
        name,
        "morph",
        lambda folder: settings_of(**(keys | {"output_dir": str(folder)})),
        lambda folder: unusable_files(folder),
        lambda folder: {
            str(path.relative_to(folder)): sha(path)
            for kind in ("**/*.png", "film/*.gif")
            for path in sorted(folder.glob(kind))
        },
    )


def unusable_files(folder: Path) -> list[str]:
    """Every visible file of a morph that cannot be opened."""
    from lorakit.pictures.images import load_image
    from lorakit.weights.tensors import read_tensors

    found = []
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            if path.suffix == ".png":
                load_image(path)
            elif path.suffix == ".gif":
                load_image(path, animated="first")
            elif path.suffix == ".safetensors":
                read_tensors(path)
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".html" and not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
                raise ValueError("cut short")
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- kills ----

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def run_story(story: Story, folder: Path, log: Path, done: mmap.mmap, die_at: int) -> int:
    """A child that runs the story, and counts what it does to files in its folder.

    Args:
        done: the count, shared with the parent.
        die_at: the child kills itself before it does what has this number; 0: never.
    """

    def work() -> int:
        from lorakit.film import shooting
        from lorakit.ground.process import run_guarded

        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in EVENTS and str(arguments[0]).startswith(str(folder)):
                count += 1
                done[:] = count.to_bytes(8, "little")
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        shooting.SAVE_SECONDS = 0.0  # a state after every step
        with log.open("a", buffering=1) as sys.stdout, log.open("a", buffering=1) as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            faulthandler.dump_traceback_later(0.9 * SILENT, file=sys.stderr)  # where it hangs, if it does
            sys.addaudithook(watch)
            return run_guarded(lambda: importlib.import_module(story.script).main(story.command(folder)))

    done[:] = bytes(8)
    return fork(work)


@dataclass
class Killed:
    """Counts of kills by story, and what went wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    in_a_write: int = 0
    with_checkpoint: int = 0
    unusable: list[str] = field(default_factory=list)
    finished: int = 0
    identical: int = 0
    differing: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)
    litter_outside: int = 0


def own_litter(folder: Path) -> list[Path]:
    """Temporary names of ours."""
    from lorakit.ground.publish import OWN_NAME

    found = folder.rglob(".*")
    return [path for path in found if OWN_NAME.fullmatch(path.name) or path.name.endswith(".tmp")]


class Straight(NamedTuple):
    results: dict[str, str]
    events: int


def unbroken(story: Story, folder: Path, log: Path) -> Straight:
    """The same command without a kill."""
    done = mmap.mmap(-1, 8)
    pid = run_story(story, folder, log, done, 0)
    while (code := ended(pid)) is None:
        time.sleep(0.01)
    assert code == 0, log.read_text()[-2000:]
    return Straight(story.results(folder), int.from_bytes(done[:], "little"))


def kill_until_done(
    story: Story, straight: Straight, folder: Path, log: Path, rng: random.Random, counts: Killed
) -> None:
    """Start the story and kill it, time and again, until it ends by itself; then compare."""
    done = mmap.mmap(-1, 8)
    farthest = max(2, straight.events // 6)
    while True:
        farthest += 1 + farthest // 40  # so that it ends, however much a start does to files
        target = rng.randint(1, farthest)
        itself = rng.random() < 0.5
        left_before = set(own_litter(folder))
        pid = run_story(story, folder, log, done, target if itself else 0)
        pause, patience = rng.uniform(0, 0.03), Patience(pid)
        while (code := ended(pid)) is None:
            if not itself and int.from_bytes(done[:], "little") >= target:
                time.sleep(pause)
                os.kill(pid, signal.SIGKILL)
            if patience.is_lost(done[:]):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                counts.failed.append(f"{story.name}: hangs: {log.read_text()[-3000:]}")
                return
            time.sleep(0.001)
        if code != -signal.SIGKILL:
            break
        counts.kills[story.name] += 1
        counts.in_a_write += bool(set(own_litter(folder)) - left_before)
        counts.with_checkpoint += any(folder.glob("run/checkpoint-*")) or any(folder.glob("film/**/*.*"))
        counts.unusable += story.unusable(folder)
    if code:
        counts.failed.append(f"{story.name}: exit code {code}: {log.read_text()[-500:]}")
        return
    found = story.results(folder)
    counts.finished += 1
    counts.identical += found == straight.results
    names = found.keys() | straight.results.keys()
    counts.differing += [f"{story.name}: {k}" for k in names if found.get(k) != straight.results.get(k)]
    inside = [path for path in own_litter(folder) if path.relative_to(folder).parts[0] in ("run", "film")]
    counts.litter += [f"{story.name}: {path.relative_to(folder)} is left" for path in inside]
    counts.litter_outside += len(own_litter(folder)) - len(inside)


def kill(work: Path, seed: int, seconds: float) -> Killed:
    """Tell the stories in turn until the time is over."""
    deadline, rng, counts = time.monotonic() + seconds, random.Random(seed), Killed()
    log = work / "log.txt"
    base, pictures = work / "base", small_pictures(work / "pictures")
    _, status = os.waitpid(fork(lambda: tiny_base(base) != base), 0)
    assert status == 0 and len(os.listdir("/proc/self/task")) == 1  # no thread that could hold a lock
    options = {"max_train_steps": 40, "validation_steps": 9}
    first = training("training", base, pictures, **options)
    known = {first.name: unbroken(first, work / "straight", log)}
    lora = work / "lora.safetensors"
    shutil.copy(work / "straight/run.safetensors", lora)
    everything = dict(
        gradient_accumulation_steps=2,
        train_batch_size=3,
        random_flip=True,
        crop="random",
        caption_dropout=0.3,
        lora_dropout=0.2,
        train_text_encoder=True,
        lr_scheduler_name="cosine",
        lr_warmup_steps=2,
        target_modules="all",
        final_weights="best",
    )
    stories = [
        first,
        morphing("morph of three, in a loop", base, pictures, lora, 3, loop=True),
        training(
            "training of everything", base, pictures, **everything, max_train_steps=16, validation_steps=4
        ),
        morphing("morph with and without LoRA", base, pictures, lora, 2, compare=True, reschedule="off"),
    ]
    number = 0
    while time.monotonic() < deadline:
        story = stories[number % len(stories)]
        if story.name not in known:
            shutil.rmtree(work / "straight", ignore_errors=True)
            known[story.name] = unbroken(story, work / "straight", log)
        folder = work / f"killed{number}"
        log.write_text("")
        kill_until_done(story, known[story.name], folder, log, rng, counts)
        shutil.rmtree(folder)
        number += 1
        say(
            f"killed      {counts.kills.total()} times, {counts.in_a_write} in a write, "
            f"{len(counts.unusable)} unusable; {counts.identical} of {counts.finished} runs identical, "
            f"{len(counts.failed)} failed"
        )
    return counts


# ---- the whole ----


def warm_up() -> None:
    """Import in the parent, once, what children need."""
    for name in (
        *("film.shooting", "film.morph_report", "training.saving", "training.setup", "training.watch"),
        "weights.lora_import",
    ):
        importlib.import_module(f"lorakit.{name}")
    for name in ("morph", "train_lora"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def soak(cfg: SoakConfig) -> dict[str, Any]:
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        killed = kill(Path(folder), cfg.seed, 30 * cfg.minutes)
    fuzzed = fuzz(cfg.seed, 30 * cfg.minutes)
    memory_is_bounded = fuzzed.grown < 3 * fuzzed.largest + ROOM
    faults = (killed.unusable, killed.differing, killed.failed, killed.litter, fuzzed.uncaught, fuzzed.slow)
    for text in (text for kind in faults for text in kind):
        say(f"FAILED      {text}")
    looked = killed.kills.total() > 0 and killed.finished > 0 and fuzzed.inputs.total() > 0
    return {
        "date": date.today().isoformat(),
        "command": f"python tests/soak.py minutes={cfg.minutes:g} seed={cfg.seed}",
        "kills": killed.kills.total(),
        "kills_by_story": dict(killed.kills),
        "kills_in_a_write": killed.in_a_write,
        "kills_with_something_saved": killed.with_checkpoint,
        "unusable_newest": len(killed.unusable),
        "runs_finished": killed.finished,
        "runs_identical": killed.identical,
        "runs_failed": len(killed.failed),
        "litter_in_run_folders": len(killed.litter),
        "litter_in_caches_and_output_folders": killed.litter_outside,
        "inputs": sum(fuzzed.inputs.values()),
        "inputs_by_reader": dict(fuzzed.inputs),
        "refused": sum(fuzzed.refused.values()),
        "uncaught": len(fuzzed.uncaught),
        "slower_than_1_s": len(fuzzed.slow),
        "slowest_s": round(fuzzed.slowest, 3),
        "largest_input_bytes": fuzzed.largest,
        "memory_growth_bytes": fuzzed.grown,
        "ok": looked and not any(faults) and memory_is_bounded and killed.finished == killed.identical,
    }


def main(argv: list[str]) -> int:
    command = parse_command(
        SoakConfig,
        argv,
        prog="soak.py",
        description="Kill trainings and morphs, and fuzz every reader, for a while.",
    )
    if "check" in command.flags:
        return 0
    result = soak(command.config)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    from lorakit.ground.process import run_guarded

    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
