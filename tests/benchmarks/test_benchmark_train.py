"""benchmarks/train.py: every way takes its steps on the embedded base, of any number of latent channels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import run_forked

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("way", ["bare", "ours", "uncached"])
def test_each_way_takes_its_steps_on_the_embedded_base(way):
    command = [sys.executable, "benchmarks/train.py", f"--one={way}", "--shape=miniature", "--steps=3"]
    command += ["--precision=no", f"--base={ROOT / 'ckpt/miniature'}"]
    run = subprocess.run if way == "ours" else run_forked  # one starts anew, as a user's does
    done = run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["seconds"] > 0 and figures["peak_bytes"] > 1e8
