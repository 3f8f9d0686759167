"""Prompts with marks through a live text encoder: weights, chunks, learnt words, clip skip."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.diffusion.models import Base
from lorakit.ground.errors import UserError
from lorakit.sampling.encoding import PromptEncoder, weighted
from lorakit.sampling.samplers import encode_prompts
from lorakit.weights.base import inspect_base
from lorakit.weights.learnt_words import find_words
from lorakit.weights.lora_file import lora_bytes
from lorakit.weights.lora_reader import read_lora

LONG = "a photo of mountains, " * 10


@pytest.fixture(scope="module")
def biased(tiny_base, tmp_path_factory):
    """The tiny base with a final layer norm as training leaves it: not every token's mean is 0."""
    folder = tmp_path_factory.mktemp("biased") / "base"
    shutil.copytree(tiny_base, folder)
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if "final_layer_norm" in name]
    assert len(names) == 2
    generator = torch.Generator().manual_seed(3)
    for name in names:
        tensors[name] = tensors[name] + 0.3 + 0.5 * torch.rand(tensors[name].shape, generator=generator)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(biased):
    return Base(inspect_base(str(biased)))


@pytest.fixture(scope="module")
def encode(base):
    """Factory of the states (C * L, D) of one prompt."""
    encoder = PromptEncoder(base, "a1111")
    return lambda text: encoder.encode([text], "")[0][0]


def plain(base, text):
    return encode_prompts(base, [text])[0]


@pytest.mark.parametrize("text", ["", "a photo of mountains", "at noon, a lake"])
def test_without_marks_it_is_the_plain_prompt_to_the_bit(base, encode, text):
    both = PromptEncoder(base, "plain").encode([text], "blurred")
    marked = PromptEncoder(base, "a1111").encode([text], "blurred")
    assert all(torch.equal(one, other) for one, other in zip(both, marked, strict=True))
    assert torch.equal(encode(text), plain(base, text))
    assert not torch.equal(encode(text), plain(base, text + " at night"))


def test_states_are_times_their_weights_and_the_mean_comes_back(base, encode):
    """By hand: z' = w z · mean(z) / mean(w z), over the whole chunk."""
    z = plain(base, "a lake at night").double()
    w = torch.ones(32, 1, dtype=torch.float64)
    count = [len(base.tokenizer(text, add_special_tokens=False).input_ids) for text in ("a", "lake")]
    w[1 + count[0] : 1 + sum(count)] = 1.5
    wanted = w * z * z.mean() / (w * z).mean()
    made = encode("a (lake:1.5) at night").double()
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    assert made.mean().item() == pytest.approx(z.mean().item(), rel=1e-5)
    assert (made - z).abs().max() > 0.1
    assert not torch.equal(encode("a (lake:1.5) at night"), encode("a lake (at night:1.5)"))


def test_a_row_does_not_depend_on_its_batch(base):
    encoder = PromptEncoder(base, "a1111")
    texts = ["a (lake:1.5)", "mountains", "[at] (night)"]
    together = encoder.encode(texts, "")[0]
    for row, text in zip(together, texts, strict=True):
        torch.testing.assert_close(row, encoder.encode([text], "")[0][0], rtol=1e-5, atol=1e-6)
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    assert torch.equal(weighted(states, weights)[0], states[0])
    assert torch.equal(weighted(states, weights)[1:], weighted(states[1:], weights[1:]))


def test_chunks_stand_side_by_side_and_the_negative_prompt_has_as_many(base, encode):
    assert torch.equal(
        encode("a lake BREAK mountains"), torch.cat([plain(base, "a lake"), plain(base, "mountains")])
    )
    made, negative = PromptEncoder(base, "a1111").encode([LONG, "a lake"], "blurred")
    count = made.shape[1] // 32
    assert count == PromptEncoder(base, "a1111").count(LONG, "") == len(LONG.split(",")) * 5 // 30 + 1
    assert made.shape == (2, count * 32, 16) and negative.shape == (1, count * 32, 16)
    empty = plain(base, "")
    torch.testing.assert_close(negative[0], torch.cat([plain(base, "blurred"), *[empty] * (count - 1)]))
    torch.testing.assert_close(made[1], torch.cat([plain(base, "a lake"), *[empty] * (count - 1)]))
    other = PromptEncoder(base, "a1111").encode([LONG + "at night"], "")[0][0]
    assert not torch.allclose(made[0], other)  # what is plainly cut is read


def test_without_a_mean_there_is_nothing_to_bring_back(tiny_base):
    base = Base(inspect_base(str(tiny_base)))  # each token's mean is 0, but for rounding
    z = plain(base, "a lake")
    assert z.mean().abs() < 1e-6
    assert (
        PromptEncoder(base, "a1111").encode(["a (lake:1.5)"], "")[0].abs().max() <= 1.5 * z.abs().max() + 1e-4
    )


def test_clip_skip_counts(biased, encode):
    last_but_one = Base(inspect_base(str(biased)), clip_skip=2)
    made = PromptEncoder(last_but_one, "a1111").encode(["a lake BREAK mountains"], "")[0][0]
    assert torch.equal(made, torch.cat([plain(last_but_one, "a lake"), plain(last_but_one, "mountains")]))
    assert not torch.allclose(made, encode("a lake BREAK mountains"))


def test_a_tokenizer_that_pads_with_another_token_pads_after_the_end(base):
    """As that of Stable Diffusion 2.x does."""
    base = copy.copy(base)
    vars(base)["tokenizer"] = copy.deepcopy(base.tokenizer)
    base.tokenizer.pad_token = "a"
    seen = []
    handle = base.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].tolist()))
    PromptEncoder(base, "a1111").encode(["lake"], "")
    encode_prompts(base, ["lake", ""])
    handle.remove()
    assert seen[0] == seen[1] and seen[0].count(base.tokenizer.eos_token_id) == 1


# ---- learnt words ----


@pytest.fixture
def vectors():
    return torch.randn(2, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def words(tmp_path, vectors):
    """Factory of a folder of learnt words by file: {"a.safetensors": {key: tensor}}."""

    def make(**files):
        folder = tmp_path / "embeddings"
        folder.mkdir(exist_ok=True)
        for name, tensors in files.items():
            save_file(tensors, folder / f"{name}.safetensors")
        return str(folder)

    return make


def by_diffusers(folder, vectors, prompt):
    """States of a prompt with the word zwx as diffusers' own loader and encoder give them."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.load_textual_inversion({"zwx": vectors})
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0][0]


@pytest.mark.parametrize("key", ["zwx", "emb_params", "*", "string_to_param.*"])
def test_a_learnt_word_is_what_diffusers_makes_of_it(biased, base, words, vectors, key):
    folder = words(zwx={key: vectors})
    made = PromptEncoder(base, "a1111", [folder]).encode(["a photo of zwx at night"], "")[0][0]
    wanted = by_diffusers(biased, vectors, "a photo of zwx at night")
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    without = PromptEncoder(base, "a1111").encode(["a photo of zwx at night"], "")[0][0]
    assert (made - without).abs().max() > 0.05
    again = PromptEncoder(base, "a1111").encode(["a photo of zwx at night"], "")[0][0]
    assert torch.equal(without, again)  # nothing stays in the text encoder


def test_one_vector_a_weight_and_both_prompts(base, words, vectors):
    folder = words(zwx={"emb_params": vectors[0]})
    encoder = PromptEncoder(base, "a1111", [folder])
    heavy, negative = encoder.encode(["a (ZWX:1.5)"], "zwx")
    plain_word = encoder.encode(["a zwx"], "")[0]
    weights = torch.ones(1, 32)
    weights[0, 1 + len(base.tokenizer("a", add_special_tokens=False).input_ids)] = 1.5
    torch.testing.assert_close(heavy, weighted(plain_word, weights))
    assert not torch.allclose(negative, encoder.encode(["a"], "zwxx")[1])


def test_the_longest_word_counts_and_one_that_does_not_fit_goes_to_the_next_chunk(base, words, vectors):
    folder = words(zwx={"emb_params": vectors}, **{"zwx-2": {"emb_params": vectors.repeat(10, 1)}})
    cutter = PromptEncoder(base, "a1111", [folder]).reader.cutter

    def chunks(text):
        return [len(chunk.tokens) for chunk in PromptEncoder(base, "a1111", [folder]).reader.chunks(text)]

    assert cutter.size == 30
    assert chunks("zwx") == [2] and chunks("zwx-2") == [20] and chunks("zwx-2 zwx-2") == [20, 20]
    assert chunks("zwx " * 15) == [30] and chunks("zwx " * 16) == [30, 2]


def test_names_are_those_of_files_and_words(words, vectors, tmp_path):
    folder = words(
        easy={"emb_params": vectors},
        toy={"<cat-toy>": vectors[0]},
        learned_embeds={"<s1>": vectors[0], "<s2>": vectors[1]},
    )
    save_file({"lora_unet_x.lora_up.weight": vectors}, tmp_path / "embeddings/a_lora.safetensors")
    (tmp_path / "embeddings/notes.txt").write_text("no word")
    found = {word.name: (word.path.stem, word.count, word.width) for word in find_words([folder])}
    assert found == {
        "easy": ("easy", 2, 16),
        "toy": ("toy", 1, 16),
        "<cat-toy>": ("toy", 1, 16),
        "<s1>": ("learned_embeds", 1, 16),
        "<s2>": ("learned_embeds", 1, 16),
    }


def test_a_word_that_cannot_be_read_is_refused_where_a_prompt_has_it_and_only_there(
    base, words, vectors, tmp_path
):
    folder = words(
        wide={"emb_params": torch.zeros(1, 24)},
        xl={"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)},
        many={"emb_params": torch.zeros(31, 16)},
        broken={"emb_params": torch.full((1, 16), torch.nan)},
    )
    (tmp_path / "embeddings/old.pt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "embeddings/cut.safetensors").write_bytes(b"\x10")
    encoder = PromptEncoder(base, "a1111", [folder])
    assert encoder.encode(["a lake"], "")[0].shape == (1, 32, 16)
    cases = {
        "wide": "24 wide, and this one is 16 wide; leave wide out of the prompt",
        "xl": "was learnt for SDXL",
        "many": "has 31 vectors; this base reads 30 at once",
        "broken": "NaN or infinity",
        "old": "old.pt: is a pickle, which can run code",
        "cut": "too few for a safetensors file",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            encoder.encode([f"a {name} lake"], "")
        assert f"embeddings/{name}." in str(caught.value)


def test_a_word_beside_a_lora_is_read_from_there_unless_a_folder_has_it(
    words, vectors, base, fitted, tmp_path
):
    bundle = tmp_path / "bundle.safetensors"
    lora = read_lora(fitted[0])
    bundle.write_bytes(lora_bytes(lora.modules, layout="kohya", metadata={}, words={"easy": vectors}))

    def states(*sources):
        return PromptEncoder(base, "a1111", *sources).encode(["an easy lake"], "")[0]

    beside, without = states([], [str(bundle)]), states([], [str(fitted[0])])
    assert (beside - without).abs().max() > 0.1
    assert torch.equal(beside, states([words(easy={"emb_params": vectors})]))
    assert torch.equal(states([words(easy={"emb_params": -vectors})], [str(bundle)]), states([words()]))
    assert not torch.equal(states([words()]), beside)


def test_a_word_in_two_files_is_refused_unless_one_of_them_cannot_be_read(words, vectors, tmp_path):
    folder = words(easy={"emb_params": vectors})
    (tmp_path / "embeddings/easy.pt").write_bytes(b"PK\x03\x04")
    assert [word.path.suffix for word in find_words([folder])] == [".safetensors"]
    (tmp_path / "embeddings/more").mkdir()
    shutil.copy(tmp_path / "embeddings/easy.safetensors", tmp_path / "embeddings/more/EASY.safetensors")
    with pytest.raises(UserError, match="EASY is in .*easy.safetensors and in .*EASY.safetensors"):
        find_words([folder])
    with pytest.raises(UserError, match="embedding_dirs: nowhere: there is no such folder"):
        find_words(["nowhere"])
