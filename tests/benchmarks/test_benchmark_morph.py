"""benchmarks/morph.py on the tiny base: all ways run, counts are as computed by hand; no clock is judged."""

import contextlib
import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from small import run_forked

from lorakit.weights.lora_file import lora_bytes

pytestmark = pytest.mark.slow  # its fixtures are

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "morph.py"
FRAMES, STEPS = 3, 4
SHARED = math.ceil(0.6 * STEPS)  # steps in which frames look at the pictures
WAYS = ["tutorial", "features-stored", "features-rerun", "diffmorpher", "lorakit", "shipped"]


@pytest.fixture(scope="module")
def benchmark():
    """The program as a module of another name: `morph` is that of the root."""
    spec = importlib.util.spec_from_file_location("benchmark_morph", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
        patch.setattr(sys, "path", [*sys.path])
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def arguments(tiny_base, tiny_unet, random_lora, pictures, folder) -> list[str]:
    """The command line; what follows "--loras" are two files."""
    words = [f"--base={tiny_base}", f"--frames={FRAMES}", f"--steps={STEPS}", "--rounds=1", "--precision=no"]
    words += [f"--sheet={folder / 'sheet.png'}", "--images", str(pictures / "0.png"), str(pictures / "3.png")]
    files = [folder / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(files):
        path.write_bytes(lora_bytes(random_lora(tiny_unet(), seed).modules, layout="kohya", metadata={}))
    return [*words, "--loras", *map(str, files)]


@pytest.fixture(scope="module")
def printed(benchmark, arguments, folder) -> list[str]:
    """The lines of a whole run with random LoRAs: what makes these starts anew, the ways are forked."""

    def run(command, **options):
        return (subprocess.run if "--one=prepare" in command else run_forked)(command, **options)

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(benchmark, "subprocess", SimpleNamespace(run=run))
        benchmark.main(arguments[: arguments.index("--loras")])
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def summary(printed) -> dict:
    """The JSON line of a whole run."""
    return json.loads(printed[-1])


def test_evaluations_are_those_of_the_formulas(summary):
    inversion, between = 2 * STEPS, FRAMES - 2
    fit = 2 * 3 * 4  # two pictures under no LoRA and two LoRAs, at four timesteps
    probe = (2 + 3 + 2 + 4) * STEPS  # nine points: both pictures ride along in two rounds
    assert {way: entry["evaluations"] for way, entry in summary["ways"].items()} == {
        "tutorial": inversion + FRAMES * STEPS,
        "features-stored": inversion + 2 * STEPS + 2 * between * STEPS,
        "features-rerun": inversion + 2 * STEPS + 2 * between * (STEPS + 2 * SHARED),
        "diffmorpher": inversion + 2 * FRAMES * STEPS,
        "lorakit": inversion + fit + probe + FRAMES * STEPS,
        "shipped": (inversion + probe + FRAMES * STEPS) // 2 + 2 + fit,  # ab2 inverts in one more each
    }
    for way in WAYS[:-2]:
        assert summary["ways"][way]["passes"] == summary["ways"][way]["evaluations"]
    assert summary["ways"]["lorakit"]["passes"] < summary["ways"]["lorakit"]["evaluations"] / 1.5


def test_stored_attention_is_what_each_way_says(summary):
    """One block of the tiny U-Net shares attention: 2 layers of 8 channels over 8x8 places."""
    numbers = 2 * 8 * 64
    pair, pictures, element = 2, 2, 4
    one_step = pair * pictures * numbers * element
    expected = {
        "tutorial": 0,
        "features-stored": one_step * SHARED,
        "features-rerun": one_step,
        "diffmorpher": pictures * numbers * 4 * STEPS,
        "lorakit": one_step,
        "shipped": one_step,
    }
    assert {way: entry["attention_bytes"] for way, entry in summary["ways"].items()} == expected
    long = {way: entry["attention_bytes_at_50_steps"] for way, entry in summary["ways"].items()}
    assert long["features-stored"] == {"fp16": one_step * 30 // 2, "fp32": one_step * 30}
    assert long["diffmorpher"] == {"fp16": pictures * numbers * 2 * 50, "fp32": pictures * numbers * 4 * 50}
    assert long["lorakit"] == {"fp16": one_step // 2, "fp32": one_step}


def test_films_are_measured_alike(summary, folder):
    found = {way: entry["metrics"] for way, entry in summary["ways"].items()}
    ends = {way: metrics.pop("endpoint_psnr_to_vae") for way, metrics in found.items()}
    assert ends["lorakit"] == ends["shipped"] == [None, None]  # equal to the bit
    # What is kept and what is evaluated again are the same keys and values.
    assert found["features-rerun"] == pytest.approx(found["features-stored"], rel=1e-3)
    for way in WAYS[1:-2]:  # the pictures' own frames look at nothing else
        assert ends[way] == pytest.approx(ends["tutorial"], rel=1e-2)
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > FRAMES * 64 and sheet.height > len(WAYS) * 64


def test_goals_are_those_of_the_figures(summary):
    values = [goal["value"] for goal in summary["goals"]]
    ratios = {way: entry["ratio_to_lorakit"] for way, entry in summary["ways"].items()}
    seconds = [ratios[way]["seconds"] for way in ("features-stored", "features-rerun")]
    attention = [STEPS / 2, 25.0]  # inputs of every step against keys and values of one
    shipped = [ratios["shipped"][what] for what in ("evaluations", "seconds")]
    expected = [*seconds, ratios["tutorial"]["ms_per_evaluation"], *attention, *shipped]
    assert values == pytest.approx(expected, abs=1e-3)
    met = [goal["met"] for goal in summary["goals"]]
    assert met[:5] == [seconds[0] >= 3, seconds[1] >= 3, expected[2] >= 1, False, True]
    assert met[5:] == [shipped[0] <= 0.4, shipped[1] <= 0.45]


def test_ways_may_be_chosen_and_goals_are_theirs(benchmark):
    assert benchmark.parse(["--ways", "shipped"]).ways == ["lorakit", "shipped"]
    assert benchmark.parse([]).ways == WAYS


def test_sd15_is_costs_only(benchmark, arguments):
    """Its default numbers, and a record without metrics; the base stays the tiny one."""
    assert benchmark.parse(["--shape=sd15"]).frames < benchmark.parse([]).frames == 16
    record = benchmark.run_one(benchmark.parse([*arguments, "--shape=sd15", "--one=tutorial"]))
    assert record["evaluations"] == (2 + FRAMES) * STEPS
    assert "metrics" not in record


def test_a_whole_run_with_random_loras_in_processes_of_their_own(printed, summary, folder):
    """The last line is JSON; what goes before is for people, and says that the LoRAs are random."""
    table = printed[:-1]
    assert list(summary["ways"]) == WAYS
    assert "random LoRAs" in summary["note"] and any("random LoRAs" in text for text in table)
    assert all(entry["peak_bytes"] > entry["grown_bytes"] >= 0 for entry in summary["ways"].values())
    assert (folder / "sheet.png").exists()


def test_two_loras_of_one_file_are_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--loras", "a.safetensors", "a.safetensors"])
    assert "one for each picture" in capsys.readouterr().err
