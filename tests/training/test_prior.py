"""The prior: under other prompts the model stays as it is without its LoRA."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from harness import assert_refused, sha, snapshot
from runs import config_of, steps_of, train_run
from safetensors.torch import load_file

from lorakit.diffusion.lora import add_lora, lora_disabled
from lorakit.diffusion.schedule import NoiseSchedule
from lorakit.ground.errors import UserError
from lorakit.training.batch import Batch
from lorakit.training.objectives import Models, Objective, Pass, as_function
from lorakit.training.plan import make_plan
from lorakit.training.prior import Prior
from lorakit.training.prior_config import PriorSettings, prior_prompts
from lorakit.training.resume import check_resume
from lorakit.weights.identity import base_record

PROMPTS = ("a photo of a lake", "a red house", "a drawing of hills")


def make_batch(count: int = 4, first: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(first)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=rng)
    timesteps = torch.tensor([10, 500, 990, 700, 20, 300])[:count]
    keys = tuple((7, first + position) for position in range(count))
    return Batch(latents, noise, timesteps, torch.zeros(count, 5, 16), None, keys)


def term_of(**settings) -> Prior:
    return Prior(SimpleNamespace(prior=PriorSettings(**({"prompts": PROMPTS} | settings))))


def states_of(prompts) -> torch.Tensor:
    """Text states that tell the prompts apart."""
    return torch.stack([torch.full((5, 16), float(len(prompt))) for prompt in prompts])


def models_of(student, teacher) -> Models:
    return Models(student, teacher, states_of, NoiseSchedule.from_scheduler(DDIMScheduler()))


def loss_of(term: Prior, models: Models, batch: Batch, noise_gradient=False) -> tuple[torch.Tensor, Pass]:
    at = Pass(models, batch, batch.prompt_embeds, noise_gradient)
    return term.loss(models, at)[0], at


# ---- the loss by itself ----


@pytest.mark.parametrize(("every", "wanted"), [(1, [4, 4, 4, 4]), (2, [8, 0, 8, 0]), (3, [12, 0, 0, 12])])
def test_every_so_many_samples_carry_the_distance_so_many_times(every, wanted):
    models = models_of(lambda x_t, *_: x_t + 2, lambda x_t, *_: x_t)
    loss, _ = loss_of(term_of(every=every), models, make_batch())
    torch.testing.assert_close(loss, torch.tensor(wanted).float())


def test_student_and_teacher_see_the_same_rows_under_the_same_prompts():
    seen = []

    def spy(x_t, timesteps, embeds):
        seen.append((x_t, timesteps, embeds))
        return x_t

    batch = make_batch(6)
    loss_of(term_of(), models_of(spy, spy), batch)
    (teacher, student) = seen
    assert all(map(torch.equal, teacher, student))
    x_t = NoiseSchedule.from_scheduler(DDIMScheduler()).add_noise(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(student[0], x_t[::2]) and student[1].tolist() == [10, 990, 20]
    draws = batch.integers("prior prompt", len(PROMPTS))[::2]
    assert torch.equal(student[2], states_of([PROMPTS[draw] for draw in draws]))


def test_all_prompts_are_drawn_and_a_split_batch_draws_the_same():
    batch, prompts = make_batch(6), set()

    def student(x_t, timesteps, embeds):
        prompts.update(embeds[:, 0, 0].tolist())
        return x_t + embeds[:, :1, :1, None]

    models = models_of(student, lambda x_t, *_: x_t)
    whole, _ = loss_of(term_of(every=1), models, batch)
    parts = [
        Batch(batch.latents[s], batch.noise[s], batch.timesteps[s], batch.prompt_embeds, None, batch.keys[s])
        for s in (slice(0, 1), slice(1, 2), slice(2, 6))
    ]
    assert torch.equal(torch.cat([loss_of(term_of(every=1), models, part)[0] for part in parts]), whole)
    for first in range(0, 60, 6):
        loss_of(term_of(every=1), models, make_batch(6, first))
    assert prompts == {float(len(prompt)) for prompt in PROMPTS}


def test_a_fresh_lora_loses_nothing_and_the_gradient_goes_through_the_lora_alone(tiny_unet):
    unet = tiny_unet()
    lora = add_lora(unet, rank=2, alpha=2.0)

    def teacher(*args):
        with torch.no_grad(), lora_disabled(unet):
            return as_function(unet)(*args)

    models, batch = models_of(as_function(unet), teacher), make_batch()
    assert loss_of(term_of(), models, batch)[0].abs().max() == 0
    with torch.no_grad():
        for parameter in lora:
            parameter += 0.1
    loss, at = loss_of(term_of(), models, batch, noise_gradient=True)
    assert (loss > 0).tolist() == [True, False, True, False]
    loss.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in lora)
    trained = {id(parameter) for parameter in lora}
    assert all(p.grad is None for p in unet.parameters() if id(p) not in trained)
    assert at.noise.requires_grad and at.noise.grad is None  # beside smooth no second graph to the noise


def test_where_the_text_encoder_is_trained_the_teacher_reads_with_the_frozen_one():
    def unet(x_t, timesteps, embeds):
        return x_t + embeds[:, :1, :1, None]

    models = models_of(unet, unet)
    moved = replace(models, embed=lambda prompts: states_of(prompts) + 3, frozen_embed=states_of)
    assert loss_of(term_of(), models, make_batch())[0].max() == 0
    assert loss_of(term_of(), moved, make_batch())[0].max() == 18


def test_it_has_no_say_in_what_is_best():
    batch = make_batch()
    models = models_of(lambda x_t, *_: x_t + 2, lambda x_t, *_: x_t)
    with pytest.raises(AssertionError, match="judges"):
        Objective({"prior": term_of()}).validation(models, batch, batch.prompt_embeds)


# ---- what a config says of it ----


BOTH = 'objective=["denoise","prior"]'
BASIC = ["data_dir=x", "n_epochs=1"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["objective=prior"], '"prior" has nothing to learn by itself; write ["denoise", "prior"]'),
        ([BOTH], '"prior" needs prompts of what must stay'),
        ([BOTH, "prior.weight=2"], "here are none"),
        ([BOTH, 'prior.prompts=["a"]', "prior.class_prompt=b"], "prompts and class_data_dir or class_prompt"),
        ([BOTH, 'prior.prompts=["a"," "]'], "prompts: one is empty"),
        ([BOTH, 'prior.prompts=["a"]', "prior.subject=dog"], "subject, prompt_file"),
        ([BOTH, 'prior.prompts=["a"]', "prior.every=0"], "prior.every"),
        (['prior.prompts=["a"]'], 'settings of "prior", which objective does not name'),
    ],
)
def test_settings_that_say_nothing_or_two_things_are_refused(settings, told):
    with pytest.raises(UserError, match="prior") as caught:
        config_of([*BASIC, *settings])
    assert told in str(caught.value)


def test_prompts_come_from_a_file_with_the_subject_in_its_place(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# varied\na photo of {}\na red house\n\na photo of {}\n")
    settings = {"prompt_file": str(path), "subject": "a dog"}
    cfg = SimpleNamespace(prior=PriorSettings(**settings))
    assert prior_prompts(cfg) == ("a photo of a dog", "a red house")


@pytest.mark.parametrize(
    ("text", "subject", "told"),
    [
        ("a photo of {}", None, "say what it is with prior.subject"),
        ("a red house", "a dog", "leave subject out"),
        ("a red house --s 5", None, "prompts without options"),
        ("# nothing", None, "has no prompt"),
        (None, None, "No such file"),
    ],
)
def test_a_prompt_file_that_does_not_agree_is_refused_before_torch(
    command, settings, tmp_path, text, subject, told
):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    words = [BOTH, f"prior.prompt_file={path}", *([f"prior.subject={subject}"] if subject else [])]
    result = command("train_lora", [*settings(), *words, "--check"])
    assert result.code == 2 and told in result.err and not result.torch


def test_check_says_which_of_its_prompts_are_not_read(command, settings):
    long = "a photo of " + "very " * 60 + "high mountains"
    words = [BOTH, f'prior.prompts=["a photo of hills", "{long}"]', "--check"]
    result = command("train_lora", [*settings(), *words])
    assert result.code == 0 and "is not read" in result.out and "high mountains" in result.out


# ---- whole runs ----


def arguments(settings, tmp_path, name: str = "run", **changes) -> list[str]:
    own = {
        "objective": ["denoise", "prior"],
        "prior": {"prompts": PROMPTS},
        "output_dir": str(tmp_path / name),
    }
    return settings(**(own | changes))


@pytest.mark.slow
def test_a_run_resumes_exactly_and_logs_its_part(settings, tmp_path):
    [straight] = train_run(arguments(settings, tmp_path))
    [resumed] = train_run(arguments(settings, tmp_path, "resumed"), stop=3)
    assert sha(straight) == sha(resumed)
    records = steps_of(straight.with_suffix(""))
    assert {"loss/denoise", "loss/prior"} <= records[-1].keys()
    carried = [record["loss/prior"] > 0 for record in records]  # none at first, where the LoRA is none
    assert carried == [False, False, True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("trains_text", [False, True])
def test_a_step_does_not_depend_on_how_it_is_split(settings, tmp_path, trains_text):
    # An epsilon with which AdamW does not blow up the rounding of gradients that are nearly 0.
    common = {"train_text_encoder": trains_text, "max_train_steps": 3, "adam_epsilon": 1e-2}
    [whole] = train_run(arguments(settings, tmp_path, "whole", train_batch_size=4, **common))
    [parts] = train_run(arguments(settings, tmp_path, "parts", total_batch_size=4, **common))
    first, second = load_file(whole), load_file(parts)
    assert max(float((first[k] - second[k]).abs().max() / first[k].abs().max()) for k in first) < 1e-5


@pytest.mark.slow
def test_it_holds_other_prompts_where_they_are(settings, tmp_path):
    """The distance to the model without LoRA under other prompts, with the prior and without it."""

    def distance(weight):
        prior = {"prompts": PROMPTS, "weight": weight}
        common = {"train_batch_size": 4, "max_train_steps": 20, "validation_steps": 0}
        [path] = train_run(arguments(settings, tmp_path, f"run-{weight}", prior=prior, **common))
        return sum(record["loss/prior"] for record in steps_of(path.with_suffix(""))[-10:])

    assert distance(10.0) < 0.5 * distance(1e-6)


def test_other_prompts_are_another_run(settings, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red house")
    words = arguments(settings, tmp_path, prior={"prompt_file": str(path)})
    train_run(words)
    cfg = config_of(words)
    folder = tmp_path / "run" / "run" / "checkpoint-00000006"
    assert check_resume(cfg, make_plan(cfg), folder)
    path.write_text("a blue house")
    with pytest.raises(UserError, match="prompts of the objectives: others"):
        check_resume(cfg, make_plan(cfg), folder)


# ---- pictures of the class ----


def test_pictures_of_the_class_are_a_loss_of_their_own_samples():
    batch, shown, asked = make_batch(4), make_batch(2, first=50), []

    def class_batch(keys):
        asked.extend(keys)
        return shown, shown.prompt_embeds

    def never(*_):
        raise AssertionError("no teacher is needed")

    schedule = NoiseSchedule.from_scheduler(DDIMScheduler())
    models = models_of(lambda x_t, *_: torch.zeros_like(x_t), never)
    term = term_of(prompts=(), class_prompt="a photo of hills")
    loss, _ = loss_of(term, replace(models, class_batch=class_batch), batch)
    assert asked == [batch.keys[0], batch.keys[2]]
    wanted = 2 * (schedule.target(shown.latents, shown.noise, shown.timesteps) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss[::2], wanted)
    assert (loss[1::2] == 0).all()


def class_run(settings, tmp_path, name, stop=None, **prior):
    words = arguments(settings, tmp_path, name, prior=prior, sample_inference_steps=3, validation_steps=0)
    return train_run(words, stop)[0], config_of(words)


@pytest.mark.slow
def test_the_base_makes_pictures_of_the_class_once_and_a_run_with_them_resumes_exactly(settings, tmp_path):
    asked = {"class_prompt": "a photo of hills", "class_images": 5}
    straight, _ = class_run(settings, tmp_path, "straight", **asked)
    [folder] = (tmp_path / "cache" / "class").iterdir()
    made = snapshot(folder)
    assert len(list(folder.glob("*.png"))) == 5 and len({made[each] for each in made}) == 6
    resumed, _ = class_run(settings, tmp_path, "resumed", stop=3, **asked)
    assert sha(straight) == sha(resumed) and snapshot(folder) == made
    assert steps_of(straight.with_suffix(""))[0]["loss/prior"] > 0
    class_run(settings, tmp_path, "more", **asked | {"class_images": 6})
    assert made.items() <= snapshot(folder).items() and len(list(folder.glob("*.png"))) == 6

    given, cfg = class_run(settings, tmp_path, "given", class_data_dir=str(folder), class_prompt="hills")
    assert sha(given) != sha(straight)
    checkpoint = given.with_suffix("") / "checkpoint-00000006"
    assert check_resume(cfg, make_plan(cfg), checkpoint)
    (folder / "00005.png").unlink()
    with pytest.raises(UserError, match="pictures of the class: others"):
        check_resume(cfg, make_plan(cfg), checkpoint)


def test_pictures_of_the_class_that_another_base_made_are_refused(command, settings, tmp_path, pictures):
    folder = tmp_path / "class"
    shutil.copytree(pictures, folder)
    words = [*settings(), BOTH, f"prior.class_data_dir={folder}", "--check"]
    assert "4 pictures from" in command("train_lora", words).out
    cfg = config_of(words[:-1])
    record = base_record(make_plan(cfg).base)
    (folder / "class.json").write_text(json.dumps({"base": record}))
    assert command("train_lora", words).code == 0
    record["unet"]["files"] = "0" * 64
    (folder / "class.json").write_text(json.dumps({"base": record}))
    result = command("train_lora", words)
    assert_refused(result, 2, "prior.class_data_dir", "another base", "base, unet", "class_prompt")
    assert not result.torch


def test_a_folder_of_the_class_that_is_none_is_refused(command, settings, tmp_path):
    result = command("train_lora", [*settings(), BOTH, f"prior.class_data_dir={tmp_path / 'no'}", "--check"])
    assert_refused(result, 2, "no such folder")
