"""What only a CUDA GPU shows. Skipped without one: pytest's summary says so."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import train_lora
from lorakit.weights.lora_reader import read_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_trains_with_float32_lora_weights(trained, precision):
    path = trained(mixed_precision=precision, sample_steps=3)
    checkpoint = path.with_suffix("") / "checkpoint-00000006" / "lora.safetensors"
    assert {pair.up.dtype for pair in read_lora(checkpoint).modules.values()} == {torch.float32}
    assert (path.with_suffix("") / "samples" / "sheet.png").exists()


def test_deterministic_runs_resume_to_the_bit(settings, capsys):
    arguments = settings(deterministic=True, mixed_precision="no", max_train_steps=100)
    assert train_lora.main([*arguments, "--verify-resume"]) == 0
    assert "resume is exact" in capsys.readouterr().out


def test_an_xformers_probe_decides(settings, capsys):
    """Whether its kernels run or not, training does, and one line says which."""
    assert train_lora.main(settings(enable_xformers_memory_efficient_attention=True)) == 0
    assert "wrote" in capsys.readouterr().out


def test_steps_run_on_the_gpu_and_agree_with_the_cpu(trained, tmp_path, monkeypatch):
    gpu = trained(mixed_precision="no", allow_tf32=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cpu = trained(mixed_precision="no", output_dir=str(tmp_path / "cpu"))

    def losses(path: Path) -> list[float]:
        lines = (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-2)


def test_the_compiled_unet_trains(trained):
    assert trained(torch_compile=True, mixed_precision="bf16").exists()
