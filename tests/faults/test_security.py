"""What no file of a user's may do: run code, be read from outside its folder, fill the memory, speak HTML.

One child trains, resumes, mixes, inverts and morphs with a hostile prompt, under hooks that the interpreter
calls for every pickle, file, process and connection; the tests read what the hooks saw.
"""

import ast
import importlib
import io
import json
import os
import pickle
import stat
import struct
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import soak
from harness import ROOT
from PIL import Image, ImageFile
from small import settings_of

from lorakit.pictures.captions import DataError
from lorakit.pictures.folder import read_folder
from lorakit.pictures.images import ImageError, image_size, load_image

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
HOSTILE = """</script><script>alert(1)</script>"'><img src=x onerror=alert(2)> {{title}} & mountains"""
UMASK = 0o027


def hooked(seen: dict[str, list[str]]) -> None:
    """Records pickles read or written, files opened to be written, processes and connections, for good."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            seen["pickled"].append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                seen["written"].append(os.path.abspath(os.fsdecode(arguments[0])))
        elif event in ("os.rename", "os.link", "os.symlink"):
            seen["written"].append(os.path.abspath(os.fsdecode(arguments[1])))
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            seen["started"].append(f"{event} {arguments[0]}")
        elif event == "socket.connect":
            seen["connected"].append(f"{arguments[1]}")

    def recorder(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen["pickled"].append(f"{name} from {''.join(traceback.format_stack(limit=3)[:-1])}")
            return real(*args, **options)

        return call

    import torch

    for module, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps"))):
        for name in names:
            setattr(module, name, recorder(f"{module.__name__}.{name}", getattr(module, name)))
    sys.addaudithook(watch)


@pytest.fixture(scope="module")
def watched(tiny_base, pictures, fitted, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder that the child wrote into, and what the hooks saw, with what they saw of the control."""
    folder = tmp_path_factory.mktemp("watched")
    told = folder.with_name("told.json")
    steps = dict(validation_steps=2, train_text_encoder=True, final_weights="best", sample_steps=2)
    story = soak.training("training", tiny_base, pictures, **steps, sample_inference_steps=1)
    train = [word for word in story.command(folder / "train") if not word.startswith("report_to=")]
    film = soak.morphing(
        "film", tiny_base, pictures, fitted[0], 2, reschedule="off", frames=3, formats=["gif"]
    )
    images = [
        {"path": str(pictures / f"{k}.png"), "prompt": HOSTILE, "lora": str(fitted[k])} for k in range(2)
    ]
    mixed = settings_of(out=str(folder / "mix/mixed.safetensors"))
    inversion = dict(
        image=str(pictures / "0.png"), pretrained_model_name_or_path=str(tiny_base), prompt=HOSTILE
    )
    inversion |= dict(num_inference_steps=2, methods=["ddim"], output_dir=str(folder / "invert"))
    commands = [
        ("train_lora", [*train, "max_train_steps=2", 'report_to="tensorboard"', f"log_dir={folder / 'log'}"]),
        ("train_lora", [*train, "max_train_steps=4", "report_to=null"]),
        ("morph", [*film.command(folder / "morph"), *settings_of(images=images)]),
        ("mix_lora", ["mix", *map(str, fitted), *mixed]),
        ("invert", settings_of(**inversion)),
    ]

    def work() -> int:
        for script, _ in commands:
            importlib.import_module(script)
        os.umask(UMASK)
        seen: dict[str, list[str]] = {"pickled": [], "written": [], "started": [], "connected": []}
        hooked(seen)
        codes = [importlib.import_module(script).main(arguments) for script, arguments in commands]
        of_runs = {name: list(entries) for name, entries in seen.items()}
        control(seen)
        of_control = {name: entries[len(of_runs[name]) :] for name, entries in seen.items()}
        told.write_text(json.dumps({"codes": codes, "runs": of_runs, "control": of_control}))
        return 0

    pid = soak.fork(work)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    return folder, json.loads(told.read_text())


def control(seen: dict[str, list[str]]) -> None:
    """What the hooks must see: a pickle in every way, a file elsewhere, a process, a connection."""
    import socket
    import subprocess

    import torch

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    torch.load(io.BytesIO(buffer.getvalue()))
    pickle.Unpickler(io.BytesIO(pickle.dumps(Path))).load()
    with tempfile.NamedTemporaryFile():
        pass
    subprocess.run(["true"], check=True)
    with socket.socket() as client:
        client.connect_ex(("127.0.0.1", 9))


def test_the_commands_ran_and_the_hooks_see_what_they_should(watched):
    folder, told = watched
    assert told["codes"] == [0] * 5
    seen = told["control"]
    assert {"torch.save", "torch.load", "pickle.find_class"} <= {
        entry.split()[0] for entry in seen["pickled"]
    }
    assert seen["started"] and seen["connected"]
    assert any(not path.startswith(str(folder)) for path in seen["written"])


def test_no_pickle_is_read_or_written(watched):
    assert watched[1]["runs"]["pickled"] == []


def test_nothing_is_written_elsewhere_and_nobody_is_called(watched):
    folder, told = watched
    written = told["runs"]["written"]
    assert len(written) > 50
    assert [path for path in written if not path.startswith((str(folder), os.devnull))] == []
    assert told["runs"]["started"] == [] and told["runs"]["connected"] == []


def test_no_file_holds_a_pickle(watched):
    """Of all that was written: no suffix of one, and no first bytes."""
    files = [path for path in watched[0].rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        start = path.read_bytes()[:9]
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".ckpt"), path
        assert not start.startswith(b"PK\x03\x04") and (start[:1] != b"\x80" or start[8:9] == b"{"), path


def test_files_and_folders_have_the_umask_s_mode(watched):
    """safetensors and tempfile would give them to their owner alone."""
    paths = [path for path in watched[0].rglob("*") if not path.is_symlink()]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    folders = {path for path in paths if path.is_dir()}
    assert {modes[path] for path in folders} == {0o777 & ~UMASK}
    assert {
        path: mode for path, mode in modes.items() if path not in folders and mode != 0o666 & ~UMASK
    } == {}


# ---- HTML ----


class Page(HTMLParser):
    """Elements with their attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.elements[-1][0] if self.elements else ""
        (self.scripts if inside == "script" else self.words).append(data)


def hostile_elements(page: Page) -> list[tuple[str, dict[str, str | None]]]:
    handlers = ("onerror", "onload", "onclick", "onmouseover")
    return [
        (tag, attributes)
        for tag, attributes in page.elements
        if any(name in attributes for name in handlers) or attributes.get("src") == "x"
    ]


def test_pages_show_what_users_wrote_as_text(watched):
    folder, _ = watched
    paths = sorted(folder.rglob("index.html"))
    own = Page((ROOT / "lorakit/pictures/page.html").read_text(encoding="utf-8"))
    for path in paths:
        page = Page(path.read_text(encoding="utf-8"))
        assert HOSTILE.split("<")[1] not in [tag for tag, _ in page.elements]
        assert hostile_elements(page) == []
        scripts = [tag for tag, _ in page.elements].count("script")
        assert scripts == [tag for tag, _ in own.elements].count("script")
    texts = [Page(path.read_text(encoding="utf-8")).words for path in paths]
    assert any(HOSTILE in words for text in texts for words in text)  # it is there, as text
    assert hostile_elements(Page(f"<p>{HOSTILE}</p>"))  # the control: unescaped it would be an element


# ---- paths ----


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that this process opens during the test."""
    paths: list[str] = []
    hook = _Opened(paths)
    sys.addaudithook(hook)
    yield paths
    hook.paths = None  # an audit hook stays for good


class _Opened:
    def __init__(self, paths: list[str]):
        self.paths: list[str] | None = paths

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.paths is not None and isinstance(arguments[0], str | bytes | os.PathLike):
            self.paths.append(os.path.realpath(os.fsdecode(arguments[0])))


OUTSIDE = {
    "by dots": lambda data, secret: listed(data, f"../{secret.parent.name}/{secret.name}"),
    "by its whole path": lambda data, secret: listed(data, str(secret)),
    "by a URL": lambda data, secret: listed(data, secret.as_uri()),
    "by a link": lambda data, secret: linked(data / "9.png", secret) or listed(data, "9.png"),
    "by a linked folder": lambda data, secret: linked(data / "in", secret.parent) or listed(data, "in/s.png"),
    "by a link without a line": lambda data, secret: linked(data / "9.png", secret),
    "by a linked caption": lambda data, secret: (
        (data / "metadata.jsonl").unlink() or linked(data / "0.txt", secret)
    ),
}


def listed(data: Path, name: str) -> None:
    with (data / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": name, "text": "x"}))


def linked(link: Path, target: Path) -> None:
    link.symlink_to(target)


@pytest.mark.parametrize("way", OUTSIDE)
def test_nothing_outside_the_data_folder_is_opened(data, tmp_path, opened, way):
    secret = tmp_path / "elsewhere/s.png"
    secret.parent.mkdir()
    Image.new("L", (20, 20)).save(secret)
    OUTSIDE[way](data, secret)
    del opened[:]
    with pytest.raises(DataError):
        read_folder(data)
    assert str(data / "1.png") in opened and str(secret) not in opened
    if "link" in way:  # the control: where links are allowed, the same hook sees it opened
        try:
            read_folder(data, allow_symlinks=True, missing_captions="empty")
        except DataError:
            pass
        assert str(secret) in opened


# ---- bombs ----


def test_a_bomb_is_refused_before_a_pixel_of_it_is_decoded(tmp_path, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    for side in (8_001, 13_400, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x" * 8))
        for read in (load_image, image_size):
            with pytest.raises(ImageError, match="bomb.png: .*pixels"):
                read(tmp_path / "bomb.png")
    Image.new("L", (20, 20)).save(tmp_path / "small.png")
    with pytest.raises(ImageError, match="decoded"):  # the control
        load_image(tmp_path / "small.png")


# ---- source ----


def dangers(tree: ast.AST) -> list[str]:
    """Ways to run what a file says: eval and exec, shells, pickles, remote code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in ("pickle", "shelve", "marshal", "dill")]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "os.system", "os.popen", "torch.load", "torch.save", "np.load"):
                found.append(called)
            found += [
                f"{called}({word.arg}=…)"
                for word in node.keywords
                if word.arg in ("trust_remote_code", "shell", "allow_pickle", "weights_only")
            ]
    return found


def test_no_source_runs_what_a_file_says():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("lorakit/**/*.py")]
    assert len(paths) > 40
    found = {path.name: dangers(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    assert {name: what for name, what in found.items() if what} == {}
    bad = "import pickle\nexec(x)\ntorch.load(p)\nrun(c, shell=True)\nM.load(trust_remote_code=True)"
    assert len(dangers(ast.parse(bad))) == 5
