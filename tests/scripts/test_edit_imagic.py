"""edit.py by method imagic: its stages, what they leave on the disk, kills and signals, faults of users."""

import json
import os
import signal
from pathlib import Path

import narrow
import pytest
from galleries import ONE_LEVEL, command_line, distance, pictures_in, report_in, runner
from PIL import Image

import edit
import train_lora
from lorakit.editing import imagic_fitting
from lorakit.ground.config import ConfigError
from lorakit.ground.errors import StoppedError, UserError
from lorakit.ground.process import run_guarded
from lorakit.sampling import fitting
from lorakit.sampling.recipe import CONFIG_CHUNK
from lorakit.weights.lora_metadata import STATES_KEY
from lorakit.weights.tensors import read_header, read_tensors, serialize
from lorakit.weights.text_states import STATES, states_digest

TARGET, OTHER = "a photo of hills at night", "a photo of snowy hills"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The LoRA is trained here: a process of its own would cost more than all the rest."""

    def train(fit, stop, script):
        assert script.name == "train_lora.py" and script.exists()
        assert train_lora.main([fit.config, *fitting._training_words(fit)]) == 0

    monkeypatch.setattr(imagic_fitting, "fit_lora", train)


@pytest.fixture
def arguments(tiny_base, pictures, tmp_path):
    """Factory of the command line for one picture on the tiny base."""
    config = tmp_path / "imagic_fit.json"
    keys = {"rank": 2, "learning_rate": 1e-2, "n_epochs": None, "max_train_steps": 2, "data_dir": "x"}
    keys |= {"validation_steps": 0, "sample_steps": 0, "report_to": None, "ckpt_name": "x"}
    config.write_text(json.dumps(keys))

    def make(*more, **changes):
        keys = dict(
            image=str(pictures / "0.png"), prompt="hills", target_prompt=TARGET, num_inference_steps=2,
            width=16, height=16, method="imagic", lora=str(tmp_path / "own.safetensors"),
            train_if_missing=True, imagic_config=str(config), embed_steps=3, guidance_scale=1.0,
        )  # fmt: skip
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    return runner(edit, arguments, tmp_path)


# ---- what comes out ----


def test_each_target_has_its_own_embedding_and_lora(run, tmp_path):
    folder = run(target_prompt=[TARGET, OTHER], grid={"eta": [0, 1]})
    assert [row["prompt"] for row in report_in(folder)["pictures"]] == [TARGET, OTHER, TARGET, OTHER]
    found = pictures_in(folder)
    assert distance(found[0], found[2]) > 0 and distance(found[1], found[3]) > 0
    for number in range(2):
        lora = tmp_path / f"own_{number}.safetensors"
        embedding = tmp_path / f"own_{number}.embedding.safetensors"
        assert read_header(lora)[1][STATES_KEY] == states_digest(str(embedding))
        tensors, _ = read_tensors(embedding)
        assert not (tensors[STATES] == tensors["target_embeds"]).all()
    kept = {path: path.read_bytes() for path in tmp_path.glob("own_*.safetensors")}
    picture = folder / "0003.png"
    config = json.loads(Image.open(picture).text[CONFIG_CHUNK])
    assert config["lora"] == "own_1.safetensors" and config["eta"] == 1 and config["target_prompt"] == OTHER
    settings = [f"output_dir={tmp_path / 'again'}", f"imagic_config={tmp_path / 'imagic_fit.json'}"]
    assert edit.main(["--from", str(picture), *settings, f"lora={tmp_path / 'own_1.safetensors'}"]) == 0
    assert distance(pictures_in(tmp_path / "again/run_0003")[0], found[3]) <= ONE_LEVEL
    assert kept == {path: path.read_bytes() for path in kept}  # nothing was fitted again


def test_eta_and_the_seed_count_and_the_lora_can_be_left_out(run):
    keys = {"images_per_target": 2, "grid": {"lora_weight": [0, 1]}}
    plain, other, own, _ = pictures_in(run(**keys))
    assert distance(plain, other) > ONE_LEVEL
    assert distance(plain, own) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["imagic", "sdedit"])
def test_a_narrow_sd15_is_edited_too(run, tmp_path, method):
    base = str(narrow.write_base(tmp_path, "modern"))
    own = {"lora": None, "start": 0.5} if method == "sdedit" else {"embed_steps": 1}
    keys = {"width": 64, "height": 64, "pretrained_model_name_or_path": base, "method": method}
    folder = run(target_prompt=[TARGET, OTHER], **keys, **own)
    assert [row["psnr"] is not None for row in report_in(folder)["pictures"]] == [True, True]


# ---- stopped and killed ----


def killed_at_every_rename(arguments, log: Path, kinds: Path) -> list[int]:
    """Exit codes of children, each killed when a file of a kind that none died at is to get its name."""

    def child() -> int:
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        real, seen = os.replace, kinds.read_text().split()

        def replace(source, target):
            target = Path(target)
            kind = target.name if "embedding" not in target.name else f"{target.name}{target.exists()}"
            if kind not in seen and target.suffix in (".safetensors", ".png"):
                kinds.write_text(" ".join([*seen, kind]))
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                os.replace, imagic_fitting.SAVE_EVERY = replace, 1
                code = run_guarded(lambda: edit.main(arguments))
        finally:
            os._exit(code)

    codes = [child()]
    while codes[-1] and len(codes) < 16:
        codes.append(child())
    return codes


@pytest.mark.slow
def test_kill_9_before_every_kind_of_rename_and_the_same_command_gives_the_same_bytes(
    run, arguments, tmp_path
):
    straight = run(name="straight", lora=str(tmp_path / "straight/own.safetensors"))
    log, kinds = tmp_path / "log.txt", tmp_path / "kinds.txt"
    kinds.touch()
    codes = killed_at_every_rename(arguments(overwrite=True), log, kinds)
    assert codes[-1] == 0 and set(codes) == {-signal.SIGKILL, 0}, log.read_text()
    names = kinds.read_text().split()
    own = "own.embedding.safetensors"
    assert {f"{own}False", f"{own}True", "own.safetensors", "0000.png"} <= set(names)
    for name in (own, "own.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert (tmp_path / "out/run/0000.png").read_bytes() == (straight / "0000.png").read_bytes()
    litter = [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    assert all(path.parent == tmp_path / "out/run/fit/own" for path in litter)  # of the data, made anew


class Stop:
    """As StopFlag, with a signal that has come."""

    signum = signal.SIGTERM

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def poll(self):
        return self.signum


def test_a_signal_keeps_the_step_and_the_same_command_goes_on(run, arguments, tmp_path, monkeypatch, capsys):
    run(name="straight", lora=str(tmp_path / "straight/own.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(imagic_fitting, "StopFlag", Stop)
        with pytest.raises(StoppedError, match="at step 1 of .*own.embedding") as caught:
            edit.main(arguments())
    assert caught.value.exit_code == 143 and not (tmp_path / "own.safetensors").exists()
    assert edit.main(arguments("--check")) == 0
    assert "2 steps of 4 rows through the U-Net and back" in capsys.readouterr().out
    run()
    own = "own.embedding.safetensors"
    assert (tmp_path / own).read_bytes() == (tmp_path / "straight" / own).read_bytes()


# ---- faults ----


@pytest.fixture
def fitted_once(run, tmp_path):
    run(name="first")
    return tmp_path / "own.embedding.safetensors"


@pytest.mark.slow
def test_what_was_fitted_otherwise_is_refused(arguments, fitted_once, pictures, tmp_path, fitted, capsys):
    own = tmp_path / "own.safetensors"
    refusals = {
        "picture: another": {"image": str(pictures / "1.png")},
        "target_prompt: another": {"target_prompt": OTHER},
        "embed_learning_rate: another": {"embed_learning_rate": 1.0},
        "size: another": {"width": 24},
        "has 3 steps, embed_steps asks for 2": {"embed_steps": 2},
        "was not fitted under": {"embed_steps": 5},
    }
    for message, changes in refusals.items():
        with pytest.raises(UserError, match=message) as caught:
            edit.main(arguments(name="other", **changes))
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out/other").exists()
    tensors, metadata = read_tensors(fitted_once)
    record = json.loads(metadata["lorakit.imagic"])
    record["base"]["unet"]["files"] = "0" * 64
    fitted_once.write_bytes(serialize(tensors, metadata | {"lorakit.imagic": json.dumps(record)}))
    with pytest.raises(UserError, match=r"was fitted otherwise:\n  base, unet: other files"):
        edit.main(arguments(name="other"))
    fitted_once.write_bytes(serialize(tensors, {}))
    with pytest.raises(UserError, match="is no embedding of method imagic"):
        edit.main(arguments(name="other"))
    fitted_once.unlink()
    with pytest.raises(UserError, match="was not fitted under .*; name another lora"):
        edit.main(arguments(name="other"))
    own.write_bytes(Path(fitted[0]).read_bytes())
    with pytest.raises(UserError, match="was not fitted under"):
        edit.main(arguments(name="other"))


RULES = {
    "no file": ({"lora": None}, "method, lora: imagic fits a LoRA"),
    "no words": ({"target_prompt": ""}, "imagic begins with the target's words"),
    "eta of swap": ({"method": "swap", "eta": 0.5}, "eta, method: swap mixes no text states"),
    "eta in its grid": ({"method": "swap", "grid": {"eta": [0, 1]}}, "grid: eta cannot be 0"),
    "far": ({"eta": 2.5}, "eta"),
    "several methods": (
        {"method": "swap", "grid": {"method": ["swap", "imagic"]}},
        "imagic has a LoRA of its own",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_keys_that_do_not_go_together_are_refused(name, arguments):
    changes, message = RULES[name]
    with pytest.raises(ConfigError, match=message):
        edit.main(arguments(**changes))


def test_check_tells_what_is_fitted_and_warns_of_an_eta_past_the_target(command, arguments):
    result = command("edit", arguments("--check", grid={"eta": [1, 1.2]}))
    assert result.code == 0 and not result.torch
    assert "own.embedding.safetensors, 3 steps of 4 rows" in result.out and "to train    " in result.out
    assert "eta 1.2 is past the target" in result.out and "eta 1 is" not in result.out
    with pytest.raises(UserError, match="no such LoRA file; .* or set method=swap"):
        edit.main(arguments(train_if_missing=False))
