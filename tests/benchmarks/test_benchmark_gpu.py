"""benchmarks/gpu.py on the CPU: parts run through the scripts, what fails is said, the last line is JSON."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts

ROOT = Path(__file__).resolve().parents[2]

# Stands for diffusers' script: at batch 1 it takes the steps that it is asked for, at another it breaks.
PEER = """
import sys
import torch
from accelerate import Accelerator
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
assert options["train_batch_size"] == "1", "out of memory, for example"
weight = torch.nn.Parameter(torch.ones(3))
for _ in range(int(options["max_train_steps"])):
    Accelerator().backward(weight.square().sum())
"""


def test_parts_run_on_the_cpu_and_one_that_breaks_does_not_stop_the_rest(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    only = ["step, batch 4, f", "step, batch 4, x", "peer"]
    command = [sys.executable, "benchmarks/gpu.py", "device=cpu", "base=tiny", "minutes=60"]
    command += [f"output_dir={tmp_path / 'gpu'}", f"peer={peer}", f"only={json.dumps(only)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    parts = summary["parts"]
    assert parts.pop("build")["state"] == "done"
    assert {name: each["state"] for name, each in parts.items()} == {
        "step, batch 4, fp16": "skipped",
        "step, batch 4, xformers": "skipped",
        "peer, batch 1": "done",
        "peer, batch 4": "failed",
    }, done.stdout + done.stderr
    assert "out of memory, for example" in parts["peer, batch 4"]["why"]
    assert done.returncode == 1  # something failed
    found = parts["peer, batch 1"]
    assert found["images_per_second"] * found["ms"] == pytest.approx(1000, rel=1e-3)
    assert found["peak_mb"] > 100 and found["share"] is None
    assert 1.5 < summary["flops"]["step"] / summary["flops"]["forward"] < 3
    assert summary["device"] == "cpu" and summary["peak_tflops_bf16"] is None
    assert len(done.stdout.splitlines()) == len(parts) + 2


OTHERS = ("step, batch 4, checkpointing", "bare, batch 4", "morph", "generate, batch 4", "caching")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A setup whose base, pictures and LoRA are made."""
    setup = gpu.Setup(str(tmp_path_factory.mktemp("gpu")), "cpu", "tiny", None)
    gpu_parts.run_one("build", gpu.BUILD, setup)
    return setup


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_parts_find_their_figures(built, name):
    gpu_parts.run_one(name, gpu.PARTS[name], built)
    found = json.loads((Path(built.folder) / f"{gpu.slug(name)}.json").read_text())
    images = 4 if found["of"] == "step" else 1
    assert found["images_per_second"] * found["ms"] == pytest.approx(1000 * images, rel=1e-3)
    assert found["peak_mb"] > 100 and found["precision"] == "float32"
    assert (found["flops_per_image"] is None) == (name == "caching")


def test_operations_are_counted_as_by_hand(tmp_path):
    """Of a U-Net's first convolution, and twice of what is twice as large on each side."""
    from diffusers import UNet2DConditionModel

    counts = []
    for side in (8, 16):
        config = dict(
            sample_size=side,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            cross_attention_dim=16,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorakit.diffusion.lora.add_lora", lambda unet, **_: None)  # no attention here
            UNet2DConditionModel(**config).save_config(tmp_path / "unet")
            counts.append(gpu_parts.count_flops(tmp_path)["forward"])
    pixels = 8 * 8
    down, up = 2 * 9 * 32 * 32 * pixels, [2 * (9 * 64 * 32 + 9 * 32 * 32 + 64 * 32) * pixels] * 2
    ends = 2 * 9 * (4 * 32 + 32 * 4) * pixels
    of_time = counts[0] - (2 * down + sum(up) + ends)  # what does not grow with the picture
    assert counts[1] - of_time == 4 * (counts[0] - of_time) > 0


@pytest.fixture
def setup(tmp_path):
    return gpu.Setup(str(tmp_path), "cpu", "tiny", None)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Factory of a program that stands for the parts: run as a part, it executes `code`."""

    def make(code: str) -> None:
        path = tmp_path / "stub.py"
        path.write_text(f"import json, sys, time\nfolder = json.loads(sys.argv[3])['folder']\n{code}")
        monkeypatch.setattr(gpu, "__file__", str(path))

    return make


PART = gpu.Part("step", {}, 60)


def test_what_a_part_finds_is_read_back(stub, setup):
    stub("open(folder + '/a_part.json', 'w').write('{\"ms\": 3}')")
    result = gpu.run_part("a part", PART, setup, 60)
    assert result.pop("seconds") >= 0 and result == {"state": "done", "ms": 3}


def test_a_result_from_before_is_not_taken_for_one(stub, setup, tmp_path):
    (tmp_path / "a_part.json").write_text('{"ms": 3}')
    stub("raise ValueError('no such card')")
    result = gpu.run_part("a part", PART, setup, 60)
    assert result["state"] == "failed" and "ValueError: no such card" in result["why"]
    assert str(tmp_path / "a_part.log") in result["why"] and "ms" not in result


def test_a_part_that_takes_too_long_is_killed_with_all_that_it_started(stub, setup, tmp_path):
    stub(
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(folder + '/child', 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    limit = 1.0
    while not (tmp_path / "child").exists():  # a busy machine may need longer to come so far
        limit *= 2
        result = gpu.run_part("a part", PART, setup, limit)
    assert result["state"] == "stopped" and result["why"] == f"after {limit:.0f} s"
    stat = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":  # the test's timeout is the bound
        time.sleep(0.05)


def run_names(setup, monkeypatch, deadline: float, only: tuple[str, ...] = (), fails: str = "") -> dict:
    """What run_all tells when each part takes a second of a clock that stands still otherwise."""
    clock, told = [0.0], {}
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])

    def run_part(name, part, setup, limit):
        clock[0] += 1
        return {"state": "failed" if name == fails else "done", "why": "", "limit": limit, "seconds": 1}

    monkeypatch.setattr(gpu, "run_part", run_part)
    cfg = gpu.GpuConfig(only=only)
    gpu.run_all(cfg, setup, deadline, lambda name, result: told.update({name: result}))
    return told


def test_it_stops_when_its_time_is_over_with_what_it_has(setup, monkeypatch):
    setup = replace(setup, device="cuda", peer="peer.py")
    told = run_names(setup, monkeypatch, deadline=10)
    assert list(told) == ["build", *gpu.PARTS]
    states = [each["state"] for each in told.values()]
    assert states == ["done"] * 6 + ["skipped"] * (len(states) - 6)
    assert {each["why"] for each in told.values() if each["state"] == "skipped"} == {"no time left"}
    assert [told[name]["limit"] for name in ("build", "tests")] == [10, 9]  # no part outlives it


def test_a_bound_of_its_own_keeps_a_part_from_taking_all(setup, monkeypatch):
    told = run_names(replace(setup, device="cuda"), monkeypatch, deadline=10_000)
    assert told["generate, batch 4"]["limit"] == gpu.PARTS["generate, batch 4"].seconds
    assert told["peer, batch 1"] == {"state": "skipped", "why": "no peer=PATH was given"}
    slow = run_names(setup, monkeypatch, deadline=10_000)
    assert slow["generate, batch 4"]["limit"] == gpu.CPU_TAKES * gpu.PARTS["generate, batch 4"].seconds
    assert slow["step, batch 4, fp16"] == {"state": "skipped", "why": "needs a GPU"}


def test_without_a_base_nothing_is_tried_and_a_part_that_fails_is_passed_over(setup, monkeypatch):
    assert list(run_names(setup, monkeypatch, 10_000, fails="build")) == ["build"]
    told = run_names(setup, monkeypatch, 10_000, only=("step", "morph"), fails="step, batch 1")
    assert list(told)[:3] == ["build", "step, batch 1", "step, batch 4"]
    assert told["step, batch 1"]["state"] == "failed" and told["morph"]["state"] == "done"
    assert "tests" not in told and "caching" not in told


@pytest.mark.parametrize(
    ("card", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA GeForce RTX 4090", "bf16", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", None),
        ("Tesla T4", "bf16", None),
        ("Tesla T4", "fp16", 65),
        ("cpu", "bf16", None),
    ],
)
def test_peaks_are_those_of_the_card_itself(card, precision, peak):
    assert gpu.peak_of(card, precision) == peak


def test_the_share_is_work_done_over_work_possible():
    result = {"images_per_second": 10.0, "flops_per_image": 3.12e12, "precision": "bf16"}
    assert gpu.with_share(result, "NVIDIA A100-SXM4-80GB")["share"] == 0.1
    assert gpu.with_share(result, "cpu")["share"] is None
    assert "share" not in gpu.with_share({"passed": 5}, "NVIDIA A100-SXM4-80GB")
