"""Pictures from prompts by the script: seeds, grids, repetition, folders, and the faults of its users."""

import json
import re
from pathlib import Path

import pytest
from galleries import ONE_LEVEL, command_line, distance, levels, pictures_in, report_in
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import generate
from lorakit.ground.config import ConfigError, load_config, schema
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.sampling.config import HINTS_KEY
from lorakit.sampling.generate_plan import GenerateConfig, read_lines
from lorakit.sampling.recipe import CONFIG_CHUNK
from lorakit.weights.lora_file import lora_bytes
from lorakit.weights.lora_reader import read_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arguments(tiny_base, tmp_path):
    """Factory of the command line for one picture on the tiny base."""

    def make(*more, **changes):
        keys = dict(prompt="a photo of mountains", num_inference_steps=2)
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    """Factory that runs the script in this process; returns the folder."""

    def make(**changes):
        assert generate.main(arguments(**changes)) == 0
        return tmp_path / "out" / changes.get("name", "run")

    return make


# ---- pictures ----


def test_picture_i_of_a_prompt_has_the_noise_of_seed_plus_i_whatever_the_batch(run, capsys):
    prompts = ["a photo of mountains", "a lake at night"]
    folder = run(prompt=prompts, images_per_prompt=3, seed=7, batch_size=4)
    out = capsys.readouterr().out
    assert out.startswith("pictures    6 at 16x16 with ")
    assert out.splitlines()[-1] == (
        f"wrote       {folder}: 6 pictures, report.json; look at {folder / 'sheet.png'}"
    )
    together = pictures_in(folder)
    rows = report_in(folder)["pictures"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, 7 + i) for p in prompts for i in range(3)]
    assert [row["file"] for row in rows] == [f"{i:04d}.png" for i in range(6)]
    assert all(row["seconds"] > 0 and row["cell"] == [] for row in rows)
    single = pictures_in(run(prompt=prompts, images_per_prompt=3, seed=7, batch_size=1, name="single"))
    assert all(distance(a, b) <= ONE_LEVEL for a, b in zip(together, single, strict=True))
    last = pictures_in(run(prompt=prompts[1], seed=9, name="last"))
    assert distance(last[0], together[5]) <= ONE_LEVEL
    assert all(distance(other, together[5]) > ONE_LEVEL for other in together[:5])


def test_a_negative_prompt_counts_above_guidance_1_and_only_there(run):
    plain = [pictures_in(run(name=f"a{g}", guidance_scale=g))[0] for g in (1.0, 4.0)]
    negative = [
        pictures_in(run(name=f"b{g}", guidance_scale=g, negative_prompt="a lake at night"))[0]
        for g in (1.0, 4.0)
    ]
    assert (plain[0] == negative[0]).all() and distance(plain[1], negative[1]) > ONE_LEVEL
    assert distance(plain[0], plain[1]) > ONE_LEVEL


def test_the_size_is_that_of_the_config_or_the_base(run, capsys):
    folder = run(width=16, height=24)
    assert Image.open(folder / "0000.png").size == (16, 24) and " at 16x24 with " in capsys.readouterr().out
    assert Image.open(run(name="own") / "0000.png").size == (16, 16)


def test_hints_of_a_lora_are_said_and_used(run, arguments, fitted, tmp_path, capsys):
    hints = {"scheduler": "lcm", "num_inference_steps": 3, "guidance_scale": 1.5}
    path = tmp_path / "fast.safetensors"
    metadata = {HINTS_KEY: json.dumps(hints)}
    path.write_bytes(lora_bytes(read_lora(fitted[0]).modules, layout="kohya", metadata=metadata))
    loras = [{"path": str(path)}]
    unset = dict.fromkeys(hints)
    obeyed = run(loras=loras, **unset)
    out = capsys.readouterr().out
    assert f"note        scheduler lcm, as {path} asks for\n" in out
    assert f"note        num_inference_steps 3, as {path} asks for\n" in out
    said = run(loras=loras, **hints, name="said")
    assert "note" not in capsys.readouterr().out
    assert distance(*pictures_in(obeyed), *pictures_in(said)) == 0
    own = run(loras=loras, **unset | {"scheduler": "ddim"}, name="own")
    assert f"note        scheduler ddim, although {path} asks for lcm\n" in capsys.readouterr().out
    assert distance(*pictures_in(obeyed), *pictures_in(own)) > ONE_LEVEL
    few = unset | {"num_inference_steps": 2}
    off = run(loras=[{"path": str(path), "weight": 0}], **few, name="off")
    assert "note" not in capsys.readouterr().out
    assert distance(*pictures_in(off), *pictures_in(run(**few, name="none"))) == 0


# ---- grids ----


def test_one_axis_is_a_row_of_cells_for_each_prompt_and_seed(run, fitted):
    folder = run(
        prompt=["a lake", "mountains"],
        images_per_prompt=2,
        loras=[{"path": str(fitted[0])}],
        grid={"weight": [0, 1, 1.0]},
    )
    made, rows = pictures_in(folder), report_in(folder)["pictures"]
    assert len(made) == len(rows) == 12 and sorted(p.name for p in folder.glob("sheet*")) == ["sheet.png"]
    assert [row["cell"] for row in rows] == [["weight 0"]] * 4 + [["weight 1"]] * 4 + [["weight 1.0"]] * 4
    assert [row["subject"] for row in rows] == ["a lake", "a lake", "mountains", "mountains"] * 3
    for off, on, again in zip(made[:4], made[4:8], made[8:], strict=True):
        assert distance(off, on) > ONE_LEVEL and (on == again).all()
    without = pictures_in(run(prompt=["a lake", "mountains"], images_per_prompt=2, name="without"))
    assert all((a == b).all() for a, b in zip(made[:4], without, strict=True))


def test_two_axes_are_a_sheet_for_each_prompt_and_seed(run, fitted):
    folder = run(
        images_per_prompt=2,
        loras=[{"path": str(fitted[0])}, {"path": str(fitted[1]), "weight": 0}],
        grid={"lora": [str(path) for path in fitted], "guidance_scale": [1, 5]},
    )
    rows = report_in(folder)["pictures"]
    assert len(rows) == len(pictures_in(folder)) == 12
    assert sorted(p.name for p in folder.glob("sheet*")) == ["sheet_000.png", "sheet_001.png"]
    wanted = [[f"lora fit_{j}", f"guidance_scale {g}"] for g in (1, 5) for j in range(3) for _ in range(2)]
    assert [row["cell"] for row in rows] == wanted
    made = pictures_in(folder)
    for row, loras in ((0, fitted[0]), (10, fitted[2])):
        seed, guidance = rows[row]["seed"], (1, 5)[row == 10]
        alone = run(name=f"alone{row}", loras=[{"path": str(loras)}], seed=seed, guidance_scale=guidance)
        assert distance(*pictures_in(alone), made[row]) <= ONE_LEVEL
    assert distance(made[0], made[2]) > ONE_LEVEL and distance(made[0], made[6]) > ONE_LEVEL


def test_cells_in_any_order_give_the_same_pictures(run, fitted):
    loras = [{"path": str(fitted[0])}, {"path": str(fitted[1]), "weight": 0.5, "blocks": {"up_blocks": 0.0}}]
    forth = pictures_in(run(loras=loras, grid={"weight": [0, 1, -1], "rank": [None, 1]}))
    back = pictures_in(run(loras=loras, grid={"weight": [-1, 1, 0], "rank": [1, None]}, name="back"))
    for number, (one, other) in enumerate(zip(forth, back[::-1], strict=True)):
        assert (one == other).all(), number
    assert distance(forth[1], forth[2]) > ONE_LEVEL and distance(forth[1], forth[4]) > ONE_LEVEL
    assert (forth[0] == forth[3]).all()  # of weight 0


def test_an_axis_of_prompts_is_one_subject(run):
    folder = run(prompt=["not", "used"], grid={"prompt": ["a lake", "mountains"]})
    rows = report_in(folder)["pictures"]
    assert [(row["prompt"], row["cell"]) for row in rows] == [
        ("a lake", ["prompt a lake"]),
        ("mountains", ["prompt mountains"]),
    ]
    listed = pictures_in(run(prompt=["a lake", "mountains"], name="listed"))
    assert all(distance(a, b) <= ONE_LEVEL for a, b in zip(pictures_in(folder), listed, strict=True))


# ---- repetition ----


@pytest.fixture
def original(run, fitted):
    """A picture out of a grid with all that may matter, and its levels."""
    folder = run(
        prompt=["a lake", "mountains, “quoted” = 山\nat dawn"],
        negative_prompt="blurred",
        images_per_prompt=2,
        seed=41,
        scheduler="euler_a",
        loras=[{"path": str(fitted[0]), "blocks": {"up_blocks": 0.5}}],
        grid={"weight": [0.3, 0.8]},
        width=16,
        height=24,
        guidance_scale=3.5,
        overwrite=True,
    )
    return folder / "0007.png"


def test_a_picture_can_be_repeated_from_itself_and_later_settings_win(original, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in original.parent.iterdir()}
    out = [f"output_dir={tmp_path / 'again'}"]
    assert generate.main(["--from", str(original), *out]) == 0
    folder = tmp_path / "again/run_0007"
    (again,) = pictures_in(folder)
    assert distance(again, levels(original)) <= ONE_LEVEL
    (row,) = report_in(folder)["pictures"]
    assert row["seed"] == 42 and row["prompt"] == "mountains, “quoted” = 山\nat dawn"
    assert generate.main([f"--from={original}", *out, "seed=5", "name=other"]) == 0
    assert distance(*pictures_in(tmp_path / "again/other"), again) > 20
    assert generate.main(["seed=5", "--from", str(original), *out, "name=other2"]) == 0
    assert distance(*pictures_in(tmp_path / "again/other2"), *pictures_in(tmp_path / "again/other")) == 0
    capsys.readouterr()
    with pytest.raises(UserError, match="holds an earlier run"):  # overwrite is not taken over
        generate.main(["--from", str(original), *out])
    assert {path.name: path.read_bytes() for path in original.parent.iterdir()} == before


def test_the_chunk_says_how_but_not_where(original):
    config = json.loads(Image.open(original).text[CONFIG_CHUNK])
    assert config["seed"] == 42 and config["grid"] == {} and config["loras"][0]["weight"] == 0.8
    assert (config["scheduler"], config["num_inference_steps"]) == ("euler_a", 2)
    assert config["guidance_scale"] == 3.5
    assert not {"output_dir", "name", "overwrite"} & set(config)


def test_the_parameters_chunk_is_what_a1111_reads(original, run):
    text = Image.open(original).text["parameters"]
    # A1111's own way to read it: the last line, then what stands before "Negative prompt: ".
    *lines, last = text.split("\n")
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert found == {
        "Steps": "2",
        "Sampler": "Euler a",
        "CFG scale": "3.5",
        "Seed": "42",
        "Size": "16x24",
        "Model": "tiny",
    }
    assert lines[-1] == "Negative prompt: blurred"
    assert "\n".join(lines[:-1]) == "mountains, “quoted” = 山\nat dawn <lora:fit_0:0.8>"
    assert "Negative prompt" not in Image.open(run(name="plain") / "0000.png").text["parameters"]


def test_a_picture_that_cannot_be_repeated_is_refused_by_its_name(tmp_path, original, capfd):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "cut.png").write_bytes(original.read_bytes()[:150])
    (tmp_path / "text.png").write_text("no picture")
    with Image.open(original) as image:
        for name, text in (("list", "[1]"), ("broken", "{"), ("style", '{"seed": 1, "strength": 0.5}')):
            chunks = PngInfo()
            chunks.add_text(CONFIG_CHUNK, text)
            image.save(tmp_path / f"{name}.png", pnginfo=chunks)
    cases = {
        "plain.png": "does not tell how it was made",
        "style.png": "was made by another script, for it has strength; use that one",
        "list.png": "does not tell how it was made",
        "broken.png": "not a whole PNG; --from takes a PNG that this toolkit has made",
        "photo.jpg": "not a whole PNG; --from takes a PNG",
        "cut.png": "--from takes a PNG",
        "text.png": "not a whole PNG; --from takes a PNG",
        "missing.png": "No such file or directory; --from takes a PNG",
        ".": "Is a directory; --from takes a PNG",
    }
    for name, message in cases.items():
        path = str(tmp_path / name)
        assert run_guarded(lambda path=path: generate.main(["--from", path])) == 2, name
        error = capfd.readouterr().err
        assert error.startswith(f"error: {path}: ") or name == ".", error
        assert message in error and len(error.splitlines()) == 1, error
    for argv in (["--from"], ["seed=3", "--from"]):
        assert run_guarded(lambda argv=argv: generate.main(argv)) == 2
        assert "--from: name a PNG" in capfd.readouterr().err


# ---- prompts ----


def prompts_of(path):
    cfg = load_config(GenerateConfig, None, ["prompt=not this", f"prompt_file={path}"]).config
    return [line.prompt for line in read_lines(cfg)]


def test_a_prompt_file_has_a_prompt_in_each_line_that_is_not_blank(tmp_path, run):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa lake\r\n\r\n   \n  山 at dawn  \nlast".encode())
    assert prompts_of(path) == ["a lake", "山 at dawn", "last"]
    folder = run(prompt_file=str(path))
    assert [row["prompt"] for row in report_in(folder)["pictures"]] == ["a lake", "山 at dawn", "last"]
    config = json.loads(Image.open(folder / "0001.png").text[CONFIG_CHUNK])
    assert config["prompt"] == "山 at dawn" and config["prompt_file"] is None


def test_a_prompt_file_that_holds_none_is_refused_by_its_name(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n  \n\t\n")
    (tmp_path / "latin.txt").write_bytes("Gebirge am Küste".encode("latin-1"))
    cases = {
        "empty.txt": "has no prompt in it",
        "blank.txt": "has no prompt in it",
        "latin.txt": "not UTF-8 text",
        "missing.txt": "No such file",
        ".": "Is a directory",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            prompts_of(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "prompt" in str(caught.value)


def test_a_prompt_that_is_too_long_is_said_once(run, capsys, fitted):
    long = "a photo of mountains " * 20 + "with a lake"
    run(prompt=[long, "short"], loras=[{"path": str(fitted[0])}], grid={"weight": [0, 1]})
    out = capsys.readouterr()
    notes = [line for line in (out.out + out.err).replace("\r", "\n").splitlines() if "is not read" in line]
    assert len(notes) == 1 and "over 32 tokens" in notes[0] and "with a lake”" in notes[0]


# ---- the folder ----


def test_an_earlier_run_stays_unless_overwrite_is_set_and_then_only_its_own_files_go(run, arguments):
    folder = run(images_per_prompt=3)
    for name in ("notes.txt", "my sheet.png", "photo.png", "00001.jpg"):
        (folder / name).write_text("mine")
    (folder / "sub").mkdir()
    before = {path.name for path in folder.iterdir()}
    first = (folder / "0000.png").read_bytes()
    message = "holds an earlier run: set overwrite=true, or another name="
    with pytest.raises(UserError, match=message) as caught:
        generate.main(arguments(seed=1))
    assert str(folder) in str(caught.value) and {path.name for path in folder.iterdir()} == before
    run(seed=1, overwrite=True)
    assert {path.name for path in folder.iterdir()} == before - {"0001.png", "0002.png"}
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "0000.png").read_bytes() != first


def test_a_run_that_makes_no_picture_leaves_the_earlier_one_as_it_is(run, arguments, fitted):
    folder = run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loras = [{"path": str(fitted[0]), "blocks": {"middle": 0.5}}]
    with pytest.raises(UserError, match="has nothing in middle"):
        generate.main(arguments(loras=loras, overwrite=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("weight", [1, 0])
def test_check_refuses_a_part_that_the_lora_does_not_have(arguments, fitted, tmp_path, weight):
    path = str(fitted[0])

    def check(*loras):
        entries = [{"path": path, "weight": weight, **lora} for lora in loras]
        return generate.main(arguments("--check", loras=entries))

    assert check({"blocks": {"mid_block": 0.5, "up_blocks.1": 0}}) == 0
    for block in ("middle", "up_blocks.1.att", "text_encoder"):
        with pytest.raises(UserError, match=f"{path} has nothing in {block}; it has .*mid_block.attentions"):
            check({"blocks": {block: 0.5}})
    with pytest.raises(UserError, match="named twice, with blocks"):
        check({}, {"blocks": {"mid_block": 0.5}})
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_the_same_command_gives_the_same_files(run):
    one, other = run(overwrite=True), run(name="other")
    for name in ("0000.png", "sheet.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


# ---- faults of users ----


def test_wrong_inputs_give_one_message_and_exit_code_2(arguments, random_lora, tiny_unet, tmp_path, capfd):
    modules = random_lora(tiny_unet(cross_attention_dim=24), 1).modules
    other = tmp_path / "other.safetensors"
    other.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    (tmp_path / "text.safetensors").write_text("not a LoRA at all")
    cases = [
        (dict(width=16), "width, height: give both or neither"),
        (dict(height=16), "width, height: give both or neither"),
        (dict(width=18, height=16), "width 18: must divide by 4 for this base; take 16 or 20"),
        (dict(width=16, height=9), "height 9: must divide by 4 for this base; take 8 or 12"),
        (dict(width=4, height=16), "width: must be"),
        (dict(loras=[{"path": str(other)}]), f"{other}: "),
        (
            dict(loras=[{"path": str(tmp_path / "text.safetensors")}]),
            "text.safetensors: is not a safetensors",
        ),
        (dict(loras=[{"path": str(tmp_path / "no.safetensors")}]), "no.safetensors: there is no such file"),
        (dict(loras=[{"path": "x", "wieght": 1}]), "wieght: unknown key; did you mean weight?"),
        (dict(pretrained_model_name_or_path="ckpt/miniatur"), "ckpt/miniatur: no such folder"),
        (dict(scheduler="ddmi"), 'scheduler: must be one of "ddim", "dpm++"'),
        (dict(num_inference_steps=1000), "num_inference_steps: must be"),
        (dict(num_inference_steps=60, scheduler="lcm"), "num_inference_steps 60: lcm takes 50 at most"),
        (dict(guidance_scale=0.5), "guidance_scale: must be"),
        (dict(prompt=[]), "prompt: must be"),
        (dict(name="a/b"), "name: must be"),
        (dict(name=".."), 'name "..": names a folder that is in use'),
        (dict(grid={"weight": [0, 1]}), "grid, loras: the axis weight needs a LoRA"),
        (dict(grid={"height": [16]}), "grid: height is no axis"),
        (dict(grid={"guidance_scale": []}), "grid.guidance_scale: must be"),
    ]
    for change, message in cases:
        argv = arguments(**change)
        assert run_guarded(lambda argv=argv: generate.main(argv)) == 2, change
        captured = capfd.readouterr()
        error = captured.err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, captured.err
        assert "Traceback" not in captured.err
    assert not list(tmp_path.glob("out/run/*"))


def test_a_folder_that_cannot_be_written_is_said_before_any_work(arguments, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    argv = arguments(output_dir=str(tmp_path / "file"))
    assert run_guarded(lambda: generate.main(argv)) == 4
    assert "rename that or use another folder" in capfd.readouterr().err


# ---- the command line ----


def test_check_says_what_would_be_made_and_writes_nothing(arguments, tmp_path, capsys):
    argv = arguments("--check", prompt=["a", "b"], images_per_prompt=3, grid={"guidance_scale": [1, 2, 3]})
    assert generate.main(argv) == 0
    assert "18 at 16x16" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_check_says_what_is_not_read_in_any_cell(arguments, capsys):
    ends = [f"to the end of {number}" for number in range(3)]
    long = ["a photo of mountains " * 20 + end for end in ends]
    argv = arguments("--check", negative_prompt=long[2], grid={"prompt": [long[0], "short", long[1]]})
    assert generate.main(argv) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "is not read" in line]
    assert len(notes) == 3 and all(any(f"{end}”" in note for note in notes) for end in ends)


@pytest.mark.parametrize("flag", ["--help", "--check", "--schema", "--print-config"])
def test_the_command_line_answers_at_once_and_without_torch(program, flag):
    result = program("generate.py", [flag])
    assert result.code == 0 and result.out, result.err
    assert not result.imported and result.blinks < 20


def test_the_committed_configs_and_schema_are_those_of_the_script():
    stored = json.loads((ROOT / "cfg/generate/schema.json").read_text())
    assert stored == schema(GenerateConfig), "run: generate.py --schema > cfg/generate/schema.json"
    own = [path for path in (ROOT / "cfg/generate").glob("*.json") if path.name != "schema.json"]
    own += [path for path in (ROOT / "cfg/sd15").glob("*.json") if "generate/schema" in path.read_text()]
    assert own
    for path in own:
        config = load_config(GenerateConfig, path).config
        assert read_lines(config)
        named = path.parent / json.loads(path.read_text())["$schema"]
        assert named.resolve() == ROOT / "cfg/generate/schema.json"
    with pytest.raises(ConfigError, match="did you mean guidance_scale"):
        load_config(GenerateConfig, None, ["guidance=3"])
