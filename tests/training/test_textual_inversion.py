"""Learnt words: their rows alone move, runs resume exactly, and files are read elsewhere to the bit."""

import copy
from pathlib import Path

import pytest
import torch
from harness import assert_refused, sha
from runs import config_of, steps_of, train_run
from safetensors.torch import load_file

from lorakit.diffusion.models import Base
from lorakit.diffusion.words import add_words, start_vectors, words_at_start
from lorakit.ground.errors import DivergedError, UserError
from lorakit.sampling.encoding import PromptEncoder
from lorakit.training import saving
from lorakit.training.verify import verify_resume
from lorakit.weights.base import inspect_base
from lorakit.weights.learnt_words import find_words, places_of, read_vectors
from lorakit.weights.lora_reader import read_lora

PROMPTS = ["a photo of mountains", "", "two lakes at night"]


@pytest.fixture
def readers(tiny_base):
    """A tokenizer and a text encoder of the tiny base."""
    base = Base(inspect_base(str(tiny_base)))
    return base.tokenizer, base.text_encoder


def states(tokenizer, text_encoder, prompts):
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    return text_encoder(ids.input_ids)[0]


# ---- words in a text encoder ----


@torch.no_grad()
def test_a_new_word_starts_as_its_start_word_and_others_do_not_notice(readers):
    tokenizer, text_encoder = readers
    before = states(tokenizer, text_encoder, PROMPTS)
    start = start_vectors(tokenizer, text_encoder, {"<alps>": "mountains"}, 1)
    words = add_words(tokenizer, text_encoder, start)
    assert torch.equal(states(tokenizer, text_encoder, PROMPTS), before)
    assert torch.equal(states(tokenizer, text_encoder, ["a photo of <alps>"])[0], before[0])
    words.put({"<alps>": start["<alps>"] + 1})
    assert not torch.equal(states(tokenizer, text_encoder, ["a photo of <alps>"])[0], before[0])
    assert torch.equal(states(tokenizer, text_encoder, PROMPTS), before)
    with words_at_start(words):
        assert torch.equal(states(tokenizer, text_encoder, ["a photo of <alps>"])[0], before[0])
    assert torch.equal(words.vectors()["<alps>"], start["<alps>"] + 1)


def test_a_word_of_several_vectors_is_as_many_tokens_wherever_it_stands(readers):
    tokenizer, text_encoder = readers
    start = start_vectors(tokenizer, text_encoder, {"<alps>": "mountains", "tarn": "lake"}, 3)
    words = add_words(tokenizer, text_encoder, start)
    first = words.rows.first
    ids = tokenizer(words.spell("<alps>, Tarn."), add_special_tokens=False).input_ids
    assert [each for each in ids if each >= first] == [
        first,
        first + 1,
        first + 2,
        *range(first + 3, first + 6),
    ]
    plain = words.spell("tarnish <alp>")
    assert plain == "tarnish <alp>" and max(tokenizer(plain).input_ids) < first
    assert places_of("tarn").search("a tarn, at noon") and not places_of("tarn").search("a tarn-like lake")


def test_the_gradient_goes_to_the_rows_alone_and_steps_move_nothing_else(readers):
    tokenizer, text_encoder = readers
    words = add_words(
        tokenizer, text_encoder, start_vectors(tokenizer, text_encoder, {"<alps>": "mountains"}, 2)
    )
    before = copy.deepcopy(text_encoder.state_dict())
    vectors = words.rows.vectors.requires_grad_(True)
    optimizer = torch.optim.AdamW([vectors], lr=0.1, weight_decay=0.0)
    for _ in range(5):
        states(
            tokenizer, text_encoder, [words.spell("a photo of <alps>"), "hills"]
        ).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = text_encoder.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if key.endswith("token_embedding.vectors")} and len(moved) == 1


# ---- whole runs ----


def arguments(settings, tmp_path, name: str, lora: bool = False, **changes) -> list[str]:
    own = {
        "objective": ["denoise", "textual_inversion"] if lora else "textual_inversion",
        "textual_inversion": {"words": {"<alps>": "mountains"}, "vectors": 2, "learning_rate": 0.05},
        "trigger_word": "<alps>",
        "output_dir": str(tmp_path / name),
    }
    return settings(**(own | changes))


@pytest.mark.slow
def test_words_alone_resume_exactly_and_nothing_else_moves(settings, tmp_path, tiny_base, monkeypatch):
    learners, real = [], saving.publish_result

    def publish_result(cfg, plan, learner, progress):
        learners.append(learner)
        return real(cfg, plan, learner, progress)

    monkeypatch.setattr(saving, "publish_result", publish_result)
    [straight] = train_run(arguments(settings, tmp_path, "straight"))
    assert straight == tmp_path / "straight" / "run_words" / "alps.safetensors"
    [resumed] = train_run(arguments(settings, tmp_path, "resumed"), stop=3)
    assert sha(straight) == sha(resumed)
    assert sorted(path.name for path in (tmp_path / "straight").iterdir()) == ["run", "run_words"]

    fresh = Base(inspect_base(str(tiny_base)))
    start = fresh.text_encoder.get_input_embeddings().weight
    live = learners[0].text_encoder.get_input_embeddings()
    assert torch.equal(live.embedding.weight, start)
    assert all(map(torch.equal, learners[0].unet.state_dict().values(), fresh.unet.state_dict().values()))
    mountains = fresh.tokenizer("mountains", add_special_tokens=False).input_ids
    vectors = load_file(straight)["<alps>"]
    assert vectors.shape == (2, 16) and (vectors - start[mountains]).abs().min() > 0

    monkeypatch.setattr("lorakit.diffusion.words.Words.put", lambda self, vectors: None)
    [forgetful] = train_run(arguments(settings, tmp_path, "forgetful"), stop=3)
    assert sha(forgetful) != sha(straight)


@pytest.mark.slow
def test_a_word_and_a_lora_together_do_not_depend_on_how_a_step_is_split(settings, tmp_path):
    common = {"lora": True, "max_train_steps": 3, "adam_epsilon": 1e-2, "validation_steps": 0}
    whole = train_run(arguments(settings, tmp_path, "whole", train_batch_size=4, **common))
    parts = train_run(arguments(settings, tmp_path, "parts", total_batch_size=4, **common))
    assert [path.name for path in whole] == ["run.safetensors", "alps.safetensors"]
    for one, other in zip(whole, parts, strict=True):
        first, second = load_file(one), load_file(other)
        assert max(float((first[k] - second[k]).abs().max() / first[k].abs().max()) for k in first) < 1e-5


@pytest.mark.slow
def test_a_word_bundled_with_a_lora_and_the_best_of_both(settings, tmp_path):
    """Resumed from before the best step, the best word goes with the best LoRA."""
    bundled = {"textual_inversion": {"words": {"<alps>": "mountains"}, "vectors": 2, "bundle": True}}
    options = {"lora": True, "final_weights": "best", "train_text_encoder": True, **bundled}
    straight = train_run(arguments(settings, tmp_path, "straight", **options))
    resumed = train_run(arguments(settings, tmp_path, "resumed", **options), stop=4)
    assert list(map(sha, straight)) == list(map(sha, resumed))
    lora, word = straight
    tensors = load_file(lora)
    assert torch.equal(tensors["bundle_emb.alps.string_to_param.*"], load_file(word)["<alps>"])
    assert len(read_lora(lora).modules) == (len(tensors) - 1) // 3
    assert {"loss/denoise", "loss/textual_inversion"} <= steps_of(lora.with_suffix(""))[0].keys()


@pytest.fixture(scope="module")
def learnt(tiny_base, pictures, tmp_path_factory) -> Path:
    """A word of two vectors, learnt in a few steps."""
    import small

    folder = tmp_path_factory.mktemp("learnt")
    keys = small.SHORT_RUN | {
        "pretrained_model_name_or_path": str(tiny_base),
        "data_dir": str(pictures),
        "output_dir": str(folder),
        "cache_dir": str(folder / "cache"),
        "max_train_steps": 2,
        "validation_steps": 0,
        "objective": "textual_inversion",
        "textual_inversion": {"words": {"<alps>": "mountains"}, "vectors": 2, "learning_rate": 0.5},
        "trigger_word": "<alps>",
    }
    [path] = train_run(small.settings_of(**keys))
    return path


@torch.no_grad()
def test_diffusers_and_our_own_reader_read_a_word_to_the_bit(tiny_base, learnt):
    from diffusers import StableDiffusionPipeline

    prompt, vectors = "a photo of <alps> at noon", load_file(learnt)["<alps>"]
    base = Base(inspect_base(str(tiny_base)))
    base.learn_words({"<alps>": vectors})
    wanted = base.text_encoder(base.tokenize([prompt]))[0]

    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    plain = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    pipe.load_textual_inversion(str(learnt))
    assert (pipe.encode_prompt(prompt, "cpu", 1, False)[0] - wanted).abs().max() == 0
    assert (plain - wanted).abs().max() > 1e-3

    words = {word.name: word for word in find_words([str(learnt.parent)])}
    assert words.keys() == {"<alps>", "alps"} and torch.equal(read_vectors(words["alps"]), vectors)
    encoder = PromptEncoder(Base(inspect_base(str(tiny_base))), "a1111", [str(learnt.parent)])
    for name in ("<alps>", "alps"):
        own = encoder.encode([prompt.replace("<alps>", name)], "")[0]
        assert (own - wanted).abs().max() == 0


def test_verify_resume_proves_words_alone(settings, tmp_path):
    import train_lora
    from lorakit.training.plan import make_plan

    cfg = config_of(arguments(settings, tmp_path, "verified"))
    assert "resume is exact" in verify_resume(train_lora.train, cfg, make_plan(cfg), steps=1)


def test_a_word_that_is_not_finite_is_not_written(settings, tmp_path):
    cfg = config_of(arguments(settings, tmp_path, "broken"))
    with pytest.raises(DivergedError, match="<alps>"):
        saving.write_words(cfg, {"<alps>": torch.full((2, 16), float("nan"))})
    assert not (tmp_path / "broken").exists()


# ---- faults ----


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needs the words to learn"),
        (["textual_inversion.words={}"], "textual_inversion.words"),
        (['textual_inversion.words={"<Alps>": "hill"}'], "small letters"),
        (['textual_inversion.words={"<alps>": "hill", "alps": "hill"}'], "the same file"),
        (['textual_inversion.words={"<a>": "hill"}', "prompt_syntax=a1111"], "prompt_syntax"),
        (['textual_inversion.words={"<a>": "hill"}', "train_text_encoder=true"], "words alone train no LoRA"),
        (['textual_inversion.words={"<a>": "hill"}', "textual_inversion.bundle=true"], "kohya's layout"),
        (
            ['textual_inversion.words={"<a>": "hill"}', 'objective=["smooth","textual_inversion"]'],
            'goes alone, or with "denoise"',
        ),
    ],
)
def test_settings_that_do_not_go_with_words_are_refused(words, told):
    with pytest.raises(UserError) as caught:
        config_of(["data_dir=x", "n_epochs=1", "objective=textual_inversion", *words])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("words", "trigger", "told"),
    [
        ({"lake": "mountains"}, "lake", "this base has that word already"),
        ({"<alps>": "snowy mountains"}, "<alps>", "which is 2 tokens for this base"),
        ({"<alps>": "mountains"}, None, "no caption has it"),
    ],
)
def test_words_that_this_base_cannot_learn_are_refused_before_torch(
    command, settings, tmp_path, words, trigger, told
):
    changes = {"textual_inversion": {"words": words}, "trigger_word": trigger}
    result = command("train_lora", [*arguments(settings, tmp_path, "x", **changes), "--check"])
    assert_refused(result, 2, "textual_inversion.words", told)
    assert not result.torch


def test_check_names_the_words_and_their_files(command, settings, tmp_path):
    result = command("train_lora", [*arguments(settings, tmp_path, "x"), "--check"])
    assert result.code == 0 and "LoRA        none" in result.out
    assert "<alps>, 2 vector(s) from 'mountains'" in result.out and "run_words/alps.safetensors" in result.out
