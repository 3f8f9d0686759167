"""benchmarks/train.py: every way takes its steps on the embedded base, of any number of latent channels."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from small import run_forked

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks import train  # noqa: E402


@pytest.mark.parametrize("way", ["bare", "ours", "uncached"])
def test_each_way_takes_its_steps_on_the_embedded_base(way):
    command = [sys.executable, "benchmarks/train.py", f"--one={way}", "--shape=miniature", "--steps=3"]
    command += ["--precision=no", f"--base={ROOT / 'ckpt/miniature'}"]
    run = subprocess.run if way == "ours" else run_forked  # one starts anew, as a user's does
    done = run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["seconds"] > 0 and figures["peak_bytes"] > 1e8


def test_the_peer_is_timed_from_one_backward_pass_to_the_next(tmp_path, monkeypatch):
    script = tmp_path / "peer.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "assert sys.argv[1:] == ['--steps=4', '--rank=8']\n"
        "weight = torch.ones(1, requires_grad=True)\n"
        "for step in range(4):\n"
        "    Accelerator().backward(weight.sum())\n"
        "assert weight.grad.item() == 4\n"
    )
    monkeypatch.setattr(Accelerator, "backward", Accelerator.backward)  # put back afterwards
    monkeypatch.setattr(sys, "argv", [])
    ticks = iter([1.0, 2.0, 4.0, 8.0])
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert train.peer_steps(str(script), {"steps": 4, "rank": 8}) == [1, 2, 4]
