"""The page of a training run shows its samples, losses and data, moves in a browser, and is reproducible."""

import json
import math
import shlex

import numpy as np
import pytest
import torch
from pages import HOSTILE, Elements, data_of, encoded, seen
from small import SHORT_RUN, settings_of

import train_lora
from lorakit.ground.config import load_config
from lorakit.ground.errors import StoppedError
from lorakit.sampling.generate_plan import GenerateConfig
from lorakit.training.config import TrainConfig
from lorakit.training.page import POINTS, run_page, write_page
from lorakit.training.plan import make_plan
from lorakit.training.words_config import WordSettings
from lorakit.weights.lora_file import LoraPair, lora_bytes
from lorakit.weights.programs import read_by

STEPS = (0, 2, 4, 6)
COLOURS = [[(60 * i, 200 - 60 * i, 90 + 40 * row) for i in range(4)] for row in range(2)]
MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
LORA = {MODULE: LoraPair(down=torch.ones(2, 8), up=torch.ones(8, 2), alpha=1.0)}
ODD = """it's "1" & <b>2.png"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for name, caption in (("0.png", HOSTILE), (ODD, "a photo of a lake")):
        (folder / name).write_bytes(encoded((10, 200, 30), size=(24, 24)))
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def finished(tiny_base, data, tmp_path):
    """Factory of the config, plan and folder of a run of six steps whose files are made up."""

    def make(count=6, samples=STEPS, validation=((3, 0.5), (6, 0.25)), **changes):
        keys = SHORT_RUN | dict(
            pretrained_model_name_or_path=str(tiny_base),
            data_dir=str(data),
            output_dir=str(tmp_path),
            max_train_steps=count,
            sample_prompts=[HOSTILE, "a lake"],
            sample_seeds=[7],
        )
        cfg = load_config(TrainConfig, None, settings_of(**(keys | changes))).config
        run = tmp_path / cfg.ckpt_name
        (run / "samples").mkdir(parents=True, exist_ok=True)
        records = [
            {"step": i, "loss": 1 / i, "loss_smoothed": 2 / i, "images_per_second": i}
            for i in range(1, count + 1)
        ]
        records += [{"step": step, "validation_loss": loss} for step, loss in validation]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        asked = {"prompts": cfg.sample_prompts, "seeds": cfg.sample_seeds}
        (run / "samples/settings.json").write_text(json.dumps(asked))
        for row in range(2):
            for step, colour in zip(samples, COLOURS[row], strict=False):
                (run / f"samples/{step:08d}-{row:02d}.png").write_bytes(encoded(colour))
        run.with_suffix(".safetensors").write_bytes(b"1234")
        return cfg, make_plan(cfg), run

    return make


# ---- the file ----


def test_losses_samples_and_data_are_in_the_page(finished):
    page = run_page(*finished())
    found = data_of(page)
    assert found["loss"] == [[i, 1 / i] for i in range(1, 7)] and found["stride"] == 1
    assert found["validation"] == [[3, 0.5], [6, 0.25]] and found["best"] == 6
    assert found["samples"]["steps"] == list(STEPS)
    assert [row["label"] for row in found["samples"]["rows"]] == [f"{HOSTILE} · seed 7", "a lake · seed 7"]
    text = Elements(page).text
    for expected in ("6 steps", "each picture 3 times", "torch 2", "03ac674216f3e15c", "mix_lora.py inspect"):
        assert expected in text, expected
    assert "images_per_second" not in page  # nothing of the clock


def test_an_interrupted_run_says_how_to_go_on_and_not_how_to_use_it(finished):
    cfg, plan, run = finished(count=6)
    stopped, whole = (Elements(run_page(cfg, plan, run, hint)).text for hint in ("python again.py", ""))
    assert "python again.py" in stopped and "stopped at step 6 of 6" in stopped
    assert "generate.py" not in stopped and "generate.py" in whole and "stopped" not in whole


def test_a_run_without_samples_or_validation_leaves_their_parts_out(finished):
    found = data_of(run_page(*finished(samples=(), validation=())))
    assert found["samples"] == {"steps": [], "rows": []} and found["best"] is None
    assert data_of(run_page(*finished()))["samples"]["rows"]


def test_the_programs_that_read_the_file_are_those_that_were_measured(finished):
    cfg, plan, run = finished()
    run.with_suffix(".safetensors").write_bytes(lora_bytes(LORA, layout="kohya", metadata={}))
    text = Elements(run_page(cfg, plan, run)).text
    assert read_by(LORA, "kohya") in text and "not OpenVINO" in text


def test_words_alone_are_told_as_what_they_are(finished):
    """No LoRA is named, and prompts are read as learnt words ask for."""
    cfg, plan, run = finished()
    words = WordSettings(words={"<alps>": "mountains"})
    told = cfg.model_copy(update={"objective": "textual_inversion", "textual_inversion": words})
    folder = run.parent / f"{cfg.ckpt_name}_words"
    folder.mkdir()
    (folder / "alps.safetensors").write_bytes(b"1234")
    page = run_page(told, plan, run)
    text = Elements(page).text
    assert "embedding_dirs=" in text and "prompt_syntax=a1111" in text and "word <alps>" in text
    assert "load_lora_weights" not in text and data_of(page)["first"] == "before"
    assert "load_lora_weights" in Elements(run_page(cfg, plan, run)).text


def test_a_long_run_is_thinned_to_its_means(finished):
    cfg, plan, run = finished()
    losses = [math.sin(i) for i in range(10 * POINTS)]
    lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = data_of(run_page(cfg, plan, run))
    assert len(found["loss"]) == POINTS and found["stride"] == 10
    assert found["loss"][1] == [20, pytest.approx(np.mean(losses[10:20]))]


def test_what_a_user_wrote_stays_text_and_nothing_is_loaded(finished):
    page = run_page(*finished(trigger_word=HOSTILE))
    elements = Elements(page)
    assert len(elements.of("script")) == 2 and len(elements.of("b")) == 0
    assert not [attributes for _, attributes in elements.found if "onerror" in attributes]
    assert HOSTILE in elements.text and ODD in elements.text
    sources = [found[key] for _, found in elements.found for key in ("src", "href") if key in found]
    assert len(sources) == 2 and all(source.startswith("data:image/webp") for source in sources)
    for text in ("http:", "https:", "@import", "url(", "<link", "<iframe"):
        assert text not in page, text
    assert len(Elements(HOSTILE).of("script")) == 1  # the control


def test_the_commands_are_those_that_the_scripts_take(finished):
    """Quotes and all: as a shell splits them, generate.py reads the prompt and the path back."""
    for prompt in ('it\'s a "lake" & more', "[1, 2]", "true"):
        page = run_page(*finished(sample_prompts=[prompt], ckpt_name="a b"))
        commands = [line for line in Elements(page).text.split("Copy") if "generate.py" in line]
        words = shlex.split(commands[1].split(":", 1)[1])
        cfg = load_config(GenerateConfig, None, words[2:]).config
        assert cfg.prompt == prompt and cfg.loras[0].path.endswith("/a b.safetensors")
        assert cfg.grid == {"weight": (0, 0.5, 1)} and cfg.pretrained_model_name_or_path != "ckpt/miniature"


def test_a_page_that_cannot_be_made_does_not_end_the_run(finished, caplog):
    cfg, plan, run = finished()
    (run / "index.html").mkdir()
    write_page(cfg, plan, run)
    assert "no index.html" in caplog.text


def test_a_stopped_and_resumed_run_has_the_page_of_a_straight_one(settings, tmp_path):
    pages = {}
    for name, stop_after in (("straight", None), ("resumed", 3)):
        own = dict(ckpt_name="run", output_dir=str(tmp_path / name), sample_steps=2, sample_inference_steps=1)
        cfg = load_config(TrainConfig, None, settings(**own)).config
        run = tmp_path / name / "run"
        if stop_after:
            with pytest.raises(StoppedError):
                train_lora.train(cfg, make_plan(cfg), run, stop_after=stop_after, hint="HINT")
            assert "HINT" in (run / "index.html").read_text()
            cfg = load_config(TrainConfig, None, settings(**own, resume_from_checkpoint="latest")).config
            train_lora.train(cfg, make_plan(cfg), run, run / "checkpoint-00000003")
        else:
            train_lora.train(cfg, make_plan(cfg), run)
        pages[name] = (run / "index.html").read_text().replace(str(tmp_path / name), "")
    assert pages["straight"] == pages["resumed"]
    assert len(data_of(pages["straight"])["samples"]["steps"]) == 4  # 0, 2, 4, 6


# ---- in a browser ----


def is_colour(tab, where, colour):
    return np.abs(np.subtract(seen(tab, where), colour)).max() <= 6


def test_the_slider_shows_another_step_beside_the_one_without(opened, finished):
    tab = opened(run_page(*finished()))
    places = [f".pair:nth-child({row}) > div:nth-child({column}) img" for row in (1, 2) for column in (1, 2)]
    assert [is_colour(tab, place, COLOURS[i // 2][3 * (i % 2)]) for i, place in enumerate(places)] == [
        True
    ] * 4
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#readout").inner_text() == "step 4 of 6"
    assert is_colour(tab, places[1], COLOURS[0][2]) and is_colour(tab, places[0], COLOURS[0][0])
    assert not is_colour(tab, places[1], COLOURS[0][3])
    assert tab.locator("#loss .value").inner_text() == "step 4: loss 0.5000, validation 0.5000"
    svg = tab.locator("#loss svg")
    box = svg.bounding_box()
    svg.hover(position={"x": box["width"] - 12, "y": 60})
    assert tab.locator("#loss .value").inner_text().startswith("step 6: ")
    assert is_colour(tab, places[1], COLOURS[0][2])  # looking does not move
    svg.click(position={"x": box["width"] - 12, "y": 60})
    assert is_colour(tab, places[1], COLOURS[0][3])


def test_a_command_is_copied(opened, finished):
    tab = opened(run_page(*finished()), permissions=["clipboard-read", "clipboard-write"])
    block = tab.locator("#use .command").nth(2)
    block.get_by_role("button").click()
    tab.wait_for_selector("text=Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == block.locator("pre").inner_text()


def test_hostile_text_runs_nothing(opened, finished):
    tab = opened(run_page(*finished(trigger_word=HOSTILE)))
    assert tab.evaluate("window.hacked") is None
    tab.keyboard.press("Home")
    assert tab.locator("#readout").inner_text() == "step 0 of 6"


@pytest.mark.parametrize("samples", [STEPS, ()])
@pytest.mark.parametrize("width", [340, 1400])
def test_it_fits_phones_and_desks(opened, finished, width, samples):
    tab = opened(run_page(*finished(samples=samples, ckpt_name="x" * 90)), width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#samples").is_visible() == bool(samples)
