"""Commands as processes, and settings on the embedded miniature, for which nothing needs torch."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, Result
from small import settings_of

from lorakit.ground.process import run_guarded


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The same inside this process, where torch is imported and faults can be planted."""

    def run(script: str, arguments: list[str]) -> Result:
        main = importlib.import_module(script).main
        capsys.readouterr()
        code = run_guarded(lambda: main(arguments))
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


@pytest.fixture
def data(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the four small pictures with their metadata.jsonl, to be damaged."""
    return Path(shutil.copytree(pictures, tmp_path / "data"))


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Factory of train_lora.py's command line on the embedded miniature."""

    def make(**changes: object) -> list[str]:
        keys = dict(
            pretrained_model_name_or_path=str(ROOT / "ckpt/miniature"),
            data_dir=str(data),
            output_dir=str(tmp_path / "out"),
            ckpt_name="run",
            resolution=32,
            aspect_ratio_buckets=False,
            max_train_steps=3,
            report_to=None,
            sample_steps=0,
        )
        return settings_of(**(keys | changes))

    return make


@pytest.fixture
def film(pictures: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Factory of morph.py's command line on the embedded miniature; `second` is the second picture."""

    def make(second: Path | None = None, lora: Path | None = None, **changes: object) -> list[str]:
        paths = [pictures / "0.png", second or pictures / "1.png"]
        images = [{"path": str(path), "prompt": "mountains", "lora": None} for path in paths]
        if lora is not None:
            images[1]["lora"] = str(lora)
        keys = dict(
            pretrained_model_name_or_path=str(ROOT / "ckpt/miniature"),
            images=images,
            output_dir=str(tmp_path / "out"),
            name="film",
            train_if_missing=False,
        )
        return settings_of(**(keys | changes))

    return make


@pytest.fixture
def inversion(pictures: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Factory of invert.py's command line on the embedded miniature."""

    def make(image: Path | None = None, **changes: object) -> list[str]:
        keys = dict(
            image=str(image or pictures / "0.png"),
            pretrained_model_name_or_path=str(ROOT / "ckpt/miniature"),
            output_dir=str(tmp_path / "out"),
        )
        return settings_of(**(keys | changes))

    return make


@pytest.fixture
def restyling(pictures: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Factory of style_transfer.py's command line on the embedded miniature."""

    def make(image: Path | None = None, **changes: object) -> list[str]:
        keys = dict(
            image=str(image or pictures / "0.png"),
            pretrained_model_name_or_path=str(ROOT / "ckpt/miniature"),
            loras=[],
            controlnet=None,
            output_dir=str(tmp_path / "out"),
        )
        return settings_of(**(keys | changes))

    return make


@pytest.fixture
def sampling(tmp_path: Path) -> Callable[..., list[str]]:
    """Factory of generate.py's command line on the embedded miniature, with a LoRA or without."""

    def make(lora: Path | None = None, **changes: object) -> list[str]:
        keys = dict(
            prompt="mountains",
            pretrained_model_name_or_path=str(ROOT / "ckpt/miniature"),
            loras=[{"path": str(lora)}] if lora else [],
            output_dir=str(tmp_path / "out"),
        )
        return settings_of(**(keys | changes))

    return make


@pytest.fixture
def a_run(tmp_path: Path) -> Callable[..., Path]:
    """Factory of a run folder with checkpoints as train_lora.py writes them, for commands that only look.

    The state is that of the given command line; tensors are stand-ins, which nothing reads before torch is.
    """
    from lorakit.ground.checkpoints import publish_checkpoint
    from lorakit.ground.config import load_config
    from lorakit.training.config import TrainConfig
    from lorakit.training.plan import make_plan
    from lorakit.training.resume import STATE_VERSION, run_record

    def make(arguments: list[str], steps: tuple[int, ...] = (2, 4, 6), **state: object) -> Path:
        cfg = load_config(TrainConfig, ROOT / "cfg/mountain.json", arguments).config  # as the script does
        run = Path(cfg.output_dir) / cfg.ckpt_name
        record = run_record(cfg, make_plan(cfg)) | {"version": STATE_VERSION} | state
        for step in steps:
            content = {"state.json": json.dumps(record | {"step": step}).encode()}
            publish_checkpoint(run, step, content | {"lora.safetensors": b"%d" % step * 100})
        return run

    return make
