"""Bases on the hub: a hub on localhost, asked by a process of its own, which has a fresh cache."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import narrow
import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0" * 40
ASK = """
import json, sys
from lorakit.ground.errors import UserError
from lorakit.weights.base import fetch_base, inspect_base
for name in sys.argv[1:]:
    found = {}
    try:
        info = inspect_base(name)
        found |= {"known": info.known, "notes": info.notes}
        info = info if info.known else fetch_base(info)
        found |= {"root": str(info.root), "notes_after": info.notes, "name": info.name, "kind": info.kind}
        found["files"] = {part: path.name for part, path in info.files.items()}
    except UserError as error:
        found["error"] = str(error)
    print(json.dumps(found))
assert "torch" not in sys.modules
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a folder for each id; ids that begin with gone/, private/ and gated/ as the real hub does."""

    folders: dict[str, Path] = {}
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        words = path.removeprefix("/api/models").strip("/").split("/")
        name, kind = "/".join(words[:2]), words[0]
        if kind in ("gone", "private"):
            self.answer({"error": "?"}, 404 if kind == "gone" else 401, {"X-Error-Code": "RepoNotFound"})
        elif kind == "gated" and "resolve" in words:
            self.answer({"error": "?"}, 401, {"X-Error-Code": "GatedRepo"})
        elif kind == "busy":
            self.answer({"error": "?"}, 418)
        elif name not in self.folders:
            self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "resolve" in words:
            self.file(self.folders[name] / "/".join(words[4:]))
        else:
            folder = self.folders[name]
            files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
            if "tree" in words:
                tree = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0"}
                    for n, p in files.items()
                ]
                self.answer(tree)
            else:
                self.answer(
                    {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files], "tags": []}
                )

    def answer(self, content, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), code, {"Content-Type": "application/json"} | (headers or {}))

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self.send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def send(self, body: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("narrow")
    found = {name: narrow.write_base(root, name) for name in ("old", "both", "half", "bin")}
    found["inpaint"] = narrow.write_base(tmp_path_factory.mktemp("inpaint"), "modern", in_channels=9)
    found["nothing"] = tmp_path_factory.mktemp("nothing")
    (found["nothing"] / "v1.safetensors").write_bytes(b"?")
    return found


@pytest.fixture
def hub(layouts):
    """A hub on localhost; `hub.ask(home, id, …)` looks for bases on it, `hub.asked` is what it was asked."""
    handler = type("Own", (Hub,), {"asked": []})
    handler.folders = {f"some/{name}": folder for name, folder in layouts.items()}
    handler.folders |= {"gated/old": layouts["old"]}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked = handler.asked
    server.ask = lambda home, *names, **env: ask(home, server.server_port, names, env)
    yield server
    server.shutdown()
    server.server_close()


def ask(home: Path, port: int, names, env) -> list[dict]:
    own = {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
    own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env=os.environ | own | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def weights(asked: list[str]) -> set[str]:
    """The weights that were asked for."""
    found = (re.search(r"/resolve/[^/]+/(.+\.(?:safetensors|bin))", line) for line in asked)
    return {each[1] for each in found if each}


def test_a_base_is_fetched_once_with_what_is_used_of_it(hub, tmp_path, layouts):
    first, second = hub.ask(tmp_path, "some/both", "some/both")
    assert not first["known"] and first["name"] == "some/both" and first["kind"] == "hub"
    assert "not in the hub's cache" in first["notes"][0] and first["notes_after"] == []
    assert second["known"] and second["root"] == first["root"] and second["notes"] == []
    names = {str(p.relative_to(first["root"])) for p in Path(first["root"]).rglob("*") if p.is_file()}
    assert names == {
        str(p.relative_to(layouts["both"])) for p in layouts["both"].rglob("*") if p.is_file()
    } - {*(f"{part}/{stem}.fp16.safetensors" for part, stem in narrow.STEMS.items())}
    before = len(hub.asked)
    (third,) = hub.ask(tmp_path, "some/both", HF_HUB_OFFLINE="1")
    assert third["root"] == first["root"] and len(hub.asked) == before


def test_half_precision_alone_is_fetched_and_said(hub, tmp_path):
    first, second = hub.ask(tmp_path, "some/half", "some/half")
    assert first["files"]["unet"] == "diffusion_pytorch_model.fp16.safetensors"
    assert all("only half-precision weights" in found["notes_after"][0] for found in (first, second))


REFUSED = {
    "gone/x": ["no such repository on the hub (404)", "no folder of that name here either"],
    "private/x": ["without a login (401)", "hf auth login", "no folder of that name here either"],
    "gated/old": ["is gated", "accept its licence on https://huggingface.co/gated/old", "hf auth login"],
    "busy/x": ["the hub answers 418", "ckpt/miniature"],
    "some/bin": ["only pickled weights (unet/diffusion_pytorch_model.bin)", "ships safetensors"],
    "some/inpaint": ["is an inpainting model", "reads 9 channels"],
    "some/nothing": ["without text_encoder, unet, vae/", "v1.safetensors may be one"],
}


def test_what_cannot_be_used_is_refused_before_any_weights_are_fetched(hub, tmp_path):
    for name, found in zip(REFUSED, hub.ask(tmp_path, *REFUSED), strict=True):
        assert found["error"].startswith(f"{name}: "), found
        assert all(word in found["error"] for word in REFUSED[name]), found["error"]
    assert weights(hub.asked) == set()
    hub.ask(tmp_path, "some/old")  # the control: what can be used is fetched
    assert {each.split("/")[0] for each in weights(hub.asked)} == {"unet", "vae", "text_encoder"}


def test_a_complete_cache_works_offline_whatever_else_is_absent(tmp_path, layouts):
    narrow.write_cache(tmp_path, layouts["old"], "some/old")
    narrow.write_cache(tmp_path, layouts["old"], "runwayml/stable-diffusion-v1-5")
    for found in ask(tmp_path, 9, ["some/old", "runwayml/stable-diffusion-v1-5"], {"HF_HUB_OFFLINE": "1"}):
        assert found["known"] and found["notes"] == [] and "error" not in found


def test_a_partial_cache_names_what_is_missing_and_is_completed_where_it_can_be(hub, tmp_path, layouts):
    narrow.write_cache(tmp_path, layouts["old"], "some/old", leave_out="vae/diffusion")
    narrow.write_cache(tmp_path, layouts["old"], "runwayml/stable-diffusion-v1-5", leave_out="text_encoder/")
    old, gone = hub.ask(tmp_path, "some/old", "runwayml/stable-diffusion-v1-5", HF_HUB_OFFLINE="1")
    lost = "the cache lacks vae/diffusion_pytorch_model.safetensors"
    assert not old["known"] and lost in old["notes"][0]
    assert lost in old["error"] and "offline mode" in old["error"] and "unset HF_HUB_OFFLINE" in old["error"]
    assert "no longer exists" in gone["error"] and "lacks text_encoder/config.json" in gone["error"]
    (found,) = hub.ask(tmp_path, "some/old")
    assert "error" not in found and weights(hub.asked) == {"vae/diffusion_pytorch_model.safetensors"}


def test_without_an_answer_the_hub_is_tried_once(hub, tmp_path):
    hub.RequestHandlerClass.do_GET = lambda self: (self.asked.append(self.path), self.connection.close())
    (found,) = hub.ask(tmp_path, "models/sd15")
    assert [path for path in hub.asked if "sd15" in path] == ["/api/models/models/sd15"]
    assert "no such folder here, and not in the hub's cache" in found["error"]
    assert "no connection" in found["error"] and "local folder or file" in found["error"]
    assert "no such folder here" in found["notes"][0]
