"""The script that makes films: what comes out, adapters, LoRAs, resumption, and the faults of its users."""

import json
import os
import signal
from pathlib import Path

import narrow
import numpy as np
import pytest
import torch
from galleries import ONE_LEVEL, command_line, distance, pictures_in, report_in
from harness import snapshot
from safetensors.torch import save_file
from small import tiny_unet

import animate
import generate
from lorakit.ground.config import ConfigError, load_config, schema
from lorakit.ground.errors import UserError
from lorakit.motion import filming
from lorakit.motion.config import AnimateConfig

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a photo of hills at noon"
ALONE = {"agreement": 0}


@pytest.fixture
def arguments(tiny_base, tmp_path):
    """Factory of the command line of a short film on the tiny base."""

    def make(*more, **changes):
        keys = dict(prompt=PROMPT, frames=4, num_inference_steps=3, formats=["gif"], min_side=16)
        return command_line(tmp_path, tiny_base, keys | changes, *more)

    return make


@pytest.fixture
def run(arguments, tmp_path):
    """Factory that runs the script in this process; returns the folder."""

    def make(*more, **changes):
        assert animate.main(arguments(*more, **changes)) == 0
        return tmp_path / "out" / changes.get("name", "run")

    return make


def frames_of(folder: Path) -> list[np.ndarray]:
    return pictures_in(folder / "frames")


def differ(one: Path, other: Path) -> int:
    return max(distance(a, b) for a, b in zip(frames_of(one), frames_of(other), strict=True))


@pytest.fixture
def pan_lora(tmp_path):
    """Factory of a LoRA on the temporal attention, in AnimateDiff's own names."""

    def make(size=0.6):
        generator, tensors = torch.Generator().manual_seed(2), {}
        for block in (0, 1):
            stem = f"down_blocks.{block}.motion_modules.0.temporal_transformer.transformer_blocks.0"
            for layer in ("to_q_lora", "to_out_lora"):
                name, width = f"{stem}.attention_blocks.0.processor.{layer}", 8 * (block + 1)
                tensors[f"{name}.down.weight"] = torch.randn(2, width, generator=generator)
                tensors[f"{name}.up.weight"] = size * torch.randn(width, 2, generator=generator)
        save_file(tensors, tmp_path / "pan.safetensors")
        return str(tmp_path / "pan.safetensors")

    return make


# ---- what comes out ----


@pytest.mark.quick
def test_a_film_is_frames_an_animation_a_sheet_a_report_and_a_page(run, capsys):
    folder = run(camera={"pan": 0.5, "zoom": [1, 1.2, 1]}, formats=["gif", "webp"])
    names = {"frames", "film.gif", "film.webp", "sheet.png", "report.json", "index.html", "config.json"}
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert found == names | {"animation.json"} and len(frames_of(folder)) == 4
    report = report_in(folder)
    assert report["metrics"]["asked"] == {"pan": 0.5, "tilt": 0.0, "zoom": 1.0, "roll": 0.0}
    assert len(report["distances"]) == len(report["moves"]) == 3 and len(report["frames"]) == 4
    assert report["unet_evaluations"] == 4 * 3 * 2 and set(report["definitions"]) >= set(report["metrics"])
    out = capsys.readouterr().out
    assert "asked       pan +0.50" in out and "measured    pan" in out
    assert "frame" in (folder / "index.html").read_text(encoding="utf-8")


def test_the_first_frame_is_the_picture_that_generate_makes_of_the_seed(run, arguments, tmp_path):
    folder = run(seed=3, camera={"pan": 1}, **ALONE)
    keys = [word for word in arguments(seed=3) if word.split("=")[0] not in ("frames", "formats", "min_side")]
    assert generate.main([*keys, "name=picture"]) == 0
    (picture,) = pictures_in(tmp_path / "out/picture")[:1]
    first, *_, last = frames_of(folder)
    assert distance(first, picture) <= ONE_LEVEL < distance(last, picture)


def test_a_camera_at_rest_makes_one_picture_and_frames_of_their_own_noise_differ(run):
    still = frames_of(run(**ALONE))
    assert max(distance(still[0], each) for each in still) <= ONE_LEVEL
    own = frames_of(run(name="own", scene_share=0, **ALONE))
    assert min(distance(own[0], each) for each in own[1:]) > ONE_LEVEL
    agreed = frames_of(run(name="agreed", scene_share=0, agreement=1, agreement_reach=50))
    assert np.abs(agreed[0] - agreed[3]).mean() < 0.7 * np.abs(own[0] - own[3]).mean()


def test_a_list_of_prompts_holds_at_moments_and_is_mixed_between(run):
    other = "a watercolor of mountains at night"
    mixed, plain = run(prompt=[PROMPT, other], **ALONE), run(name="plain", **ALONE)
    night = run(name="night", prompt=other, **ALONE)
    found, first, last = map(frames_of, (mixed, plain, night))
    assert distance(found[0], first[0]) <= ONE_LEVEL and distance(found[3], last[3]) <= ONE_LEVEL
    assert distance(found[1], first[1]) > ONE_LEVEL < distance(found[1], last[1])


def test_a_loop_goes_back_so_that_its_second_and_last_frame_lie_alike(run):
    report = report_in(run(camera={"pan": 1}, loop=True))
    assert [round(move["asked"]["pan"], 3) for move in report["moves"]] == [0.5, 0.5, -0.5]


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "heun", "unipc", "pndm"])
def test_every_sampler_makes_a_film_in_which_frames_agree(run, scheduler):
    apart, agreed = (
        run(name=f"film_{share}", scheduler=scheduler, scene_share=0, agreement=share, agreement_reach=50)
        for share in (0, 1)
    )
    far, near = (np.abs(f[0] - f[3]).mean() for f in map(frames_of, (apart, agreed)))
    assert near < 0.8 * far


def test_the_film_does_not_depend_on_the_batch(run):
    one, other = run(camera={"pan": 0.5}), run(name="other", batch_size=1, camera={"pan": 0.5})
    assert differ(one, other) <= ONE_LEVEL < differ(one, run(name="third", camera={"pan": -0.5}))


# ---- from a picture ----


@pytest.fixture
def from_picture(run, pictures):
    """Factory of a film that starts from a picture, without guidance."""

    def make(*more, **changes):
        keys = dict(image=str(pictures / "0.png"), width=16, height=16, guidance_scale=1.0)
        return run(*more, **(keys | changes))

    return make


def round_trip(tiny_base, path):
    from lorakit.diffusion.models import Base
    from lorakit.diffusion.paths import decode_picture, encode_picture
    from lorakit.pictures.images import read_picture
    from lorakit.weights.base import inspect_base

    base = Base(inspect_base(str(tiny_base)))
    return np.asarray(decode_picture(base, encode_picture(base, read_picture(path, (16, 16)))[0]))


def test_a_film_starts_on_its_picture_to_the_bit_and_comes_back_to_it(from_picture, tiny_base, pictures):
    found = frames_of(from_picture(camera={"zoom": [1, 2, 1]}, frames=5))
    wanted = round_trip(tiny_base, pictures / "0.png")
    assert distance(found[0], wanted) == distance(found[4], wanted) == 0
    assert min(distance(found[i], wanted) for i in (1, 2, 3)) > ONE_LEVEL
    assert distance(frames_of(from_picture(name="seed", seed=5))[0], wanted) == 0
    other = from_picture(name="other", image=str(pictures / "1.png"))
    assert distance(frames_of(other)[0], wanted) > ONE_LEVEL


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_camera_at_rest_keeps_the_picture_and_another_prompt_changes_it(
    from_picture, tiny_base, pictures, guidance_scale
):
    wanted = round_trip(tiny_base, pictures / "0.png")
    still = frames_of(from_picture(guidance_scale=guidance_scale))
    assert max(distance(frame, wanted) for frame in still) == 0
    keys = dict(prompt=[PROMPT, "a watercolor of mountains at night"], agreement=0)
    mixed = frames_of(from_picture(name="mixed", guidance_scale=guidance_scale, **keys))
    assert distance(mixed[0], wanted) == 0 < distance(mixed[3], wanted)


def test_a_film_from_a_picture_goes_on_to_the_same_bytes_and_is_another_s_with_another(
    from_picture, arguments, tmp_path, pictures, monkeypatch
):
    keys = dict(camera={"pan": 0.5}, num_inference_steps=5)
    whole = snapshot(from_picture(name="whole", **keys) / "frames")
    monkeypatch.setattr(filming, "SAVE_SECONDS", 0.0)
    save = filming._save

    def dies(*words):
        save(*words)
        raise Killed

    monkeypatch.setattr(filming, "_save", dies)
    with pytest.raises(Killed):
        from_picture(**keys)
    monkeypatch.setattr(filming, "_save", save)
    assert snapshot(from_picture(**keys) / "frames") == whole
    with pytest.raises(UserError, match="holds another animation"):
        from_picture(image=str(pictures / "1.png"), **keys)


def test_a_film_from_a_picture_goes_with_an_adapter_and_windows(from_picture, adapters, tiny_base, pictures):
    keys = dict(frames=11, motion_adapter=adapters["folder"], camera={"pan": 0.5})
    found = frames_of(from_picture(**keys))
    assert distance(found[0], round_trip(tiny_base, pictures / "0.png")) == 0 and len(found) == 11


@pytest.mark.slow
def test_the_lora_of_the_picture_is_fitted_first_where_it_is_missing(from_picture, tmp_path):
    from small import SHORT_RUN

    keys = {key: value for key, value in SHORT_RUN.items() if key not in ("resolution", "ckpt_name")}
    (tmp_path / "fit.json").write_text(json.dumps(keys | {"data_dir": str(tmp_path), "max_train_steps": 2}))
    lora = tmp_path / "own.safetensors"
    with pytest.raises(UserError, match=r"own.safetensors: no such LoRA file.*train_if_missing=true"):
        from_picture(lora=str(lora))
    fit = {"lora": str(lora), "train_if_missing": True, "fit_config": str(tmp_path / "fit.json")}
    folder = from_picture(camera={"pan": 0.5}, **fit)
    again = from_picture(camera={"pan": 0.5}, loras=[{"path": str(lora)}], name="again")
    assert (folder / "fit/own/picture.png").exists() and differ(folder, again) == 0


# ---- adapters and LoRAs ----


def test_both_layouts_of_an_adapter_make_the_same_film_and_it_couples_frames(run, adapters):
    plain = run(scene_share=0, **ALONE)
    films = [run(name=name, motion_adapter=path, scene_share=0, **ALONE) for name, path in adapters.items()]
    assert differ(*films) == 0 and differ(plain, films[0]) > ONE_LEVEL


def test_an_adapter_of_zeros_makes_the_film_of_none(run, tmp_path):
    from diffusers import MotionAdapter

    paths = narrow.write_motion_adapter(tmp_path, tiny_unet())
    model = MotionAdapter.from_pretrained(paths["folder"])
    for name, parameter in model.named_parameters():
        parameter.data *= "proj_out" not in name
    model.save_pretrained(paths["folder"])
    none, zeros = (
        run(camera={"pan": 0.5}),
        run(name="zeros", camera={"pan": 0.5}, motion_adapter=str(paths["folder"])),
    )
    assert differ(none, zeros) <= ONE_LEVEL


def test_the_adapter_is_what_diffusers_makes_of_it(adapters, tiny_base):
    """The same latents through diffusers' own pipeline."""
    from lorakit.diffusion.models import Base
    from lorakit.motion.animate_plan import make_animate_plan
    from lorakit.weights.base import inspect_base

    keys = dict(motion_adapter=adapters["folder"], num_inference_steps=3, guidance_scale=3.0, frames=4)
    cfg = AnimateConfig(pretrained_model_name_or_path=str(tiny_base), prompt=PROMPT, **(keys | ALONE))
    plan = make_animate_plan(cfg)
    ours, theirs = Base(inspect_base(str(tiny_base))), Base(inspect_base(str(tiny_base)))
    noise = filming.scene_noise(plan, ours)
    filming.inflate(ours, plan.adapter)
    latents = filming.open_studio(plan, ours).denoise(noise, 3)
    pipe = narrow.animatediff_pipeline(theirs, adapters["folder"])
    embeds = [theirs.text_encoder(theirs.tokenize([text]))[0] for text in (PROMPT, "")]
    found = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        latents=noise.transpose(0, 1)[None],
        num_frames=4,
        height=16,
        width=16,
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="latent",
    ).frames
    torch.testing.assert_close(found[0].transpose(0, 1), latents, atol=2e-4, rtol=0)


def test_a_film_longer_than_the_adapter_is_made_in_windows(run, adapters, capsys):
    folder = run(frames=11, motion_adapter=adapters["folder"])
    assert len(frames_of(folder)) == 11
    assert report_in(folder)["unet_evaluations"] == 2 * 8 * 3 * 2
    narrower = run(name="narrower", frames=11, motion_adapter=adapters["folder"], window=4, overlap=1)
    assert differ(folder, narrower) > ONE_LEVEL


def test_a_style_and_a_motion_lora_stand_side_by_side(run, adapters, fitted, pan_lora):
    keys = dict(motion_adapter=adapters["folder"], scene_share=0, **ALONE)
    style, motion = {"path": str(fitted[0])}, {"path": pan_lora()}
    films = [
        run(name=f"film_{i}", loras=loras, **keys)
        for i, loras in enumerate([[], [style], [motion], [style, motion], [style | {"weight": 0.0}]])
    ]
    assert all(differ(films[i], films[j]) > ONE_LEVEL for i, j in ((0, 1), (0, 2), (1, 3), (2, 3)))
    assert differ(films[0], films[4]) == 0


def test_a_narrow_sd15_with_every_module_makes_a_film(run, tmp_path):
    base = narrow.write_base(tmp_path, "modern")
    unet = narrow.parts()["unet"]
    paths = narrow.write_motion_adapter(tmp_path / "adapter", unet, use_motion_mid_block=True)
    preset = load_config(AnimateConfig, ROOT / "cfg/sd15/animate.json").config
    folder = run(
        pretrained_model_name_or_path=str(base),
        motion_adapter=str(paths["original"]),
        beta_schedule=preset.beta_schedule,
        negative_prompt=preset.negative_prompt,
        guidance_scale=preset.guidance_scale,
        camera={"pan": 0.3},
        num_inference_steps=2,
    )
    assert len(frames_of(folder)) == 4


def test_betas_are_those_that_are_asked_for(run):
    one, same, linear = (
        run(name=str(name), beta_schedule=name) for name in (None, "scaled_linear", "linear")
    )
    assert differ(one, same) == 0 < differ(one, linear)


# ---- going on ----


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_film_that_was_killed_goes_on_to_the_same_bytes(run, arguments, tmp_path, monkeypatch, at):
    keys = dict(camera={"pan": 0.5}, num_inference_steps=6)
    whole = snapshot(run(name="whole", **keys) / "frames")
    monkeypatch.setattr(filming, "SAVE_SECONDS", 0.0)
    calls, save = 0, filming._save

    def dies(*words):
        nonlocal calls
        save(*words)
        calls += 1
        if calls == at:
            raise Killed

    monkeypatch.setattr(filming, "_save", dies)
    if at <= 6:
        with pytest.raises(Killed):
            run(**keys)
        assert (tmp_path / "out/run/state/film.safetensors").exists()
    again = run(**keys)
    assert calls == 6 and snapshot(again / "frames") == whole and not (again / "state").exists()


def test_a_signal_stops_it_where_it_goes_on_and_frames_that_are_there_stay(
    run, arguments, tmp_path, monkeypatch
):
    whole, count = snapshot(run(name="whole") / "frames"), 0
    evaluate = filming.Studio._unet

    def stopped(studio, *words):
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(studio, *words)

    monkeypatch.setattr(filming.Studio, "_unet", stopped)
    with pytest.raises(UserError, match=r"To go on: python animate.py") as stop:
        animate.main(arguments())
    assert stop.value.exit_code == 143
    folder = run()
    assert count == 3 and snapshot(folder / "frames") == whole
    (folder / "frames/0002.png").unlink()
    kept = (folder / "frames/0001.png").stat().st_mtime_ns
    assert snapshot(run() / "frames") == whole
    assert (folder / "frames/0001.png").stat().st_mtime_ns == kept


def test_a_damaged_state_and_one_of_another_film_are_not_used(run, tmp_path, monkeypatch):
    whole = snapshot(run(name="whole") / "frames")
    state = tmp_path / "out/run/state"
    state.mkdir(parents=True)
    (state / "film.safetensors").write_bytes(b"broken")
    assert snapshot(run() / "frames") == whole
    state.mkdir()
    latents = torch.zeros(4, 4, 8, 8)
    save_file({"latents": latents}, state / "film.safetensors", {"step": "2", "key": "another"})
    (tmp_path / "out/run/frames/0000.png").unlink()
    assert snapshot(run() / "frames") == whole


def test_another_film_is_refused_and_replaced_where_that_is_asked_for(run, arguments):
    folder = run()
    before = snapshot(folder / "frames")
    with pytest.raises(UserError, match="holds another animation.*overwrite=true"):
        animate.main(arguments(seed=1))
    assert snapshot(folder / "frames") == before
    run(fps=4.0)  # only shown otherwise
    assert snapshot(folder / "frames") == before
    run(seed=1, overwrite=True)
    assert snapshot(folder / "frames") != before


def test_a_film_is_made_again_from_one_of_its_frames(run, tmp_path, tiny_base, monkeypatch):
    folder = run(camera={"pan": 0.5}, seed=2)
    monkeypatch.chdir(tmp_path)
    made = ["--from", "out/run/frames/0002.png", f"output_dir={tmp_path / 'out'}", "name=again"]
    assert animate.main([*made, f"pretrained_model_name_or_path={tiny_base}"]) == 0
    assert differ(folder, tmp_path / "out/again") == 0


# ---- faults ----


FAULTS = {
    "a window beyond its positions": (
        dict(window=9, motion_adapter="ADAPTER"),
        "window 9: .*has 8 positions",
    ),
    "no adapter": (dict(motion_adapter="nowhere"), "nowhere: .*no such folder or file.*motion_adapter=null"),
    "a sampler that draws": (dict(scheduler="euler_a"), "draws noise.*scheduler=ddim"),
    "a missing LoRA": (dict(loras=[{"path": "no.safetensors"}]), "no.safetensors: there is no such file"),
    "a picture that is missing": (dict(image="no.png"), "no.png"),
    "a side that does not divide": (dict(width=17, height=16), "width 17: must divide"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_message_before_any_work_and_leaves_nothing(name, arguments, adapters, tmp_path):
    changes, words = FAULTS[name]
    changes = {key: adapters["folder"] if value == "ADAPTER" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=words):
        animate.main(arguments(**changes))
    assert not (tmp_path / "out").exists()


def test_a_motion_lora_without_an_adapter_is_refused_with_the_remedy(arguments, pan_lora, tmp_path):
    keys = arguments(loras=[{"path": pan_lora()}])
    for flag in ([], ["--check"]):
        with pytest.raises(UserError, match="give it to animate.py, with its motion_adapter"):
            animate.main([*keys, *flag])


def test_a_codec_that_is_missing_is_said_first(arguments, monkeypatch):
    from lorakit.pictures import animation

    monkeypatch.setattr(animation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='formats: "mp4" cannot be written.*imageio-ffmpeg'):
        animate.main(arguments(formats=["mp4"]))


IMPOSSIBLE = {
    "a grid": (["grid.guidance_scale=[1,2]"], "grid: a film has none"),
    "windows of nothing": (["window=8"], "only an adapter looks along frames"),
    "more prompts than frames": (["frames=2", 'prompt=["a","b","c"]'], "3 prompts for 2 frames"),
    "an overlap as wide as the window": (["motion_adapter=x", "window=4", "overlap=4"], "share 3 at most"),
    "no zoom": (["camera.zoom=0"], "zoom: from 0.1 to 8"),
    "a camera that is elsewhere at first": (
        ["image=x.png", "camera.zoom=[2,1]"],
        "lists begin with 0, zoom's with 1",
    ),
    "another sampler for a picture": (["image=x.png", "scheduler=euler"], "on the path of ddim"),
    "a LoRA of no picture": (["lora=x.safetensors"], "name it as image, or put the file into loras"),
    "another camera": (["camera.yaw=1"], "yaw: unknown key"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_config_that_cannot_be_meant_is_refused(name):
    settings, words = IMPOSSIBLE[name]
    with pytest.raises(ConfigError, match=words):
        load_config(AnimateConfig, None, settings)


def test_check_tells_the_plan_and_writes_nothing(command, arguments, adapters, tmp_path):
    keys = arguments(motion_adapter=adapters["folder"], frames=20, camera={"pan": 0.5})
    result = command("animate", [*keys, "--check"])
    assert result.code == 0 and not result.torch and not (tmp_path / "out").exists()
    for words in (
        "8 positions",
        "camera      pan [0.0, 0.5]",
        "windows     3 of 8 frames",
        "memory      about",
    ):
        assert words in result.out


def test_presets_are_valid_and_the_schema_is_that_of_the_keys():
    stored = json.loads((ROOT / "cfg/animate/schema.json").read_text())
    assert stored == schema(AnimateConfig), "run: animate.py --schema > cfg/animate/schema.json"
    assert load_config(AnimateConfig, ROOT / "cfg/animate/film.json").config.frames == 16
    assert load_config(AnimateConfig, ROOT / "cfg/animate/picture.json").config.image
    assert load_config(AnimateConfig, ROOT / "cfg/sd15/animate.json").config.beta_schedule == "linear"


def test_a1111_s_marks_name_loras_and_weights(run, fitted, tmp_path):
    """With one prompt; among several they could not be everyone's."""
    keys = dict(prompt_syntax="a1111", model_dirs=[str(fitted[0].parent)], **ALONE)
    named = run(prompt=f"{PROMPT} <lora:{fitted[0].stem}:0.7>", **keys)
    given = run(name="given", prompt=PROMPT, loras=[{"path": str(fitted[0]), "weight": 0.7}], **keys)
    plain = run(name="plain", prompt=PROMPT, **keys)
    assert differ(named, given) == 0 < differ(named, plain)
    with pytest.raises(UserError, match="prompt"):
        run(name="several", prompt=[f"a <lora:{fitted[0].stem}:1>", "b"], **keys)
