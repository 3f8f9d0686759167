"""A1111's marks in prompts: what is read, by values worked out by hand, and what is refused."""

import pytest

from lorakit.ground.errors import UserError
from lorakit.sampling.prompt_chunks import Cutter
from lorakit.sampling.prompt_syntax import escaped, read_marks, read_plain
from lorakit.weights.base import BaseInfo


def read(text):
    """[[(text, weight), …], …], a list for each section."""
    return [[(part.text, round(part.weight, 9)) for part in section] for section in read_marks(text).sections]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("a (red:1.25) cat", [("a ", 1.0), ("red", 1.25), (" cat", 1.0)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(red:-0.5) cat", [("red", -0.5), (" cat", 1.0)]),
        ("[red] cat", [("red", 0.909090909), (" cat", 1.0)]),
        ("((red)) [[cat]]", [("red", 1.21), (" ", 1.0), ("cat", 0.826446281)]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1.0), (" c", 1.1)]),
        ("(a (b:1.5) c:1.2)", [("a ", 1.2), ("b", 1.8), (" c", 1.2)]),
        ("(a)(b)", [("ab", 1.1)]),
        (r"rem \(re:zero\), \[x\]", [("rem (re:zero), [x]", 1.0)]),
        (r"(a \(b\):1.3)", [("a (b)", 1.3)]),
        ("a \\\\ b \\c", [("a \\ b c", 1.0)]),
        ("a) b] c:1.2) 10:30", [("a) b] c:1.2) 10:30", 1.0)]),
        ("a [b (c", [("a ", 1.0), ("b ", 0.909090909), ("c", 1.0)]),
        # ((…:1.3) closes one of three, ) another, and the first is open to the end.
        (
            "(((cat:1.3)) [on] (mat:0.5), (((sun)))",
            [
                ("cat", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" ", 1.1),
                ("mat", 0.55),
                (", ", 1.1),
                ("sun", 1.4641),
            ],
        ),
        ("a lake # at night\nor a sea", [("a lake \nor a sea", 1.0)]),
        ("# a (lake) <lora:x:1>", []),
        ("", []),
        ("()", []),
        ("(a:0)", [("a", 0.0)]),
        ("a < b, <cat-toy>, :)", [("a < b, <cat-toy>, :)", 1.0)]),
    ],
)
def test_weights_are_those_of_a1111(text, parts):
    assert read(text) == [parts]


def test_break_ends_a_section_inside_brackets_too():
    assert read("a BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert read("a\nBREAK\nBREAK b BREAK") == [[("a", 1.0)], [], [("b", 1.0)], []]
    assert read("(a BREAK b:1.5) c") == [[("a", 1.5)], [("b", 1.5), (" c", 1.0)]]
    assert read("BREAKFAST, a break, unBREAKable") == [[("BREAKFAST, a break, unBREAKable", 1.0)]]


@pytest.mark.parametrize(
    ("mark", "name", "unet", "text_encoder"),
    [
        ("<lora:ink:0.8>", "ink", 0.8, 0.8),
        ("<lora:ink>", "ink", 1.0, 1.0),
        ("<lyco:my ink_v2:-1>", "my ink_v2", -1.0, -1.0),
        ("<lora:ink:0.5:0.9>", "ink", 0.9, 0.5),
        ("<lora:ink:0.5:unet=0.9>", "ink", 0.9, 0.5),
        ("<lora:ink:te=0:unet=0.9>", "ink", 0.9, 0.0),
        ("<lora:ink:0>", "ink", 0.0, 0.0),
    ],
)
def test_a_lora_is_taken_out_of_the_text(mark, name, unet, text_encoder):
    prompt = read_marks(f"a (cat{mark}:1.2)")
    assert prompt.loras == ((name, unet, text_encoder, mark),)
    assert prompt.sections == read_marks("a (cat:1.2)").sections


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a [cat:dog:0.5]", "[cat:dog:0.5]: changes the prompt between steps"),
        ("a [cat::10]", "[cat::10]: changes the prompt between steps"),
        ("a [cat:-2e1 ]", "changes the prompt between steps"),
        ("a [red:1.2] cat", "with ( ) for a weight"),
        ("a [the (big:1.2) cat: dog :.5]", "changes the prompt between steps"),
        ("a [cat|dog]", "[cat|dog]: changes the prompt between steps"),
        ("a cat AND a dog", "AND: prompts side by side are not read"),
        ("(a:1.2.3)", "(:1.2.3): 1.2.3 is no number"),
        ("<hypernet:x:1>", "<hypernet:x:1>: only LoRAs are read here"),
        ("<lora:x:high>", "<lora:x:high>: high is no number"),
        ("<lora:x:nan>", "nan is no number"),
        ("<lora:x:1:1:8>", "is read as <lora:NAME:WEIGHT>"),
        ("<lora:x:1:lbw=MIDD>", "weights by block stand in loras"),
        ("<lora:x:1:0>", "is for the text encoder alone"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(text, words):
    with pytest.raises(UserError) as caught:
        read_marks(text)
    assert words in str(caught.value) and str(caught.value).startswith("prompt: ")


@pytest.mark.parametrize(
    "text", [r"a \[cat:dog:0.5]", "a (cat|dog)", "a cat and a DANDY", "[a:b]", "[(red:1.2)]", r"[a\|b]"]
)
def test_what_only_looks_like_it_is_read(text):
    assert read(text)


def test_a_negative_prompt_names_no_lora():
    with pytest.raises(UserError, match="negative_prompt: <lora:x:1>: no LoRA can be named there"):
        read_marks("blurry <lora:x:1>", no_loras="negative_prompt")
    assert read_marks("(blurry:1.2)", no_loras="negative_prompt") == read_marks("(blurry:1.2)")


@pytest.mark.parametrize("text", ["(a:1.2), [b] \\(c\\) \\", "a cat", "((x))"])
def test_an_escaped_text_has_no_mark(text):
    assert read_marks(escaped(text)) == read_plain(text)


# ---- chunks ----

CAT, COMMA = 2368, 267  # in CLIP's vocabulary


@pytest.fixture(scope="module")
def clip():
    """Cuts for CLIP, which reads 75 tokens and the marks of their ends."""
    return Cutter(BaseInfo("a.safetensors", "file", known=True))


def cut(cutter, text):
    return [chunk.tokens for chunk in cutter.chunks(read_marks(text).sections)]


def test_a_prompt_is_cut_into_chunks_of_75(clip):
    assert (clip.size, clip.comma) == (75, COMMA)
    assert cut(clip, "") == [[]] and cut(clip, "cat, cat") == [[CAT, COMMA, CAT]]
    for count, sizes in ((75, [75]), (76, [75, 1]), (200, [75, 75, 50])):
        chunks = cut(clip, "cat " * count)
        assert [len(chunk) for chunk in chunks] == sizes
        assert sum(chunks, []) == [CAT] * count


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        (70, 10, [71, 10]),  # the comma is token 70, and 75 - 70 <= 20
        (55, 30, [56, 30]),  # 75 - 55 = 20, the farthest that counts
        (54, 30, [75, 10]),  # 21
        (74, 1, [75, 1]),  # the comma is the last that fits
        (75, 1, [75, 2]),  # and here it opens the next chunk
        (20, 54, [75]),  # all fits
    ],
)
def test_the_comma_before_the_end_of_a_chunk_is_where_it_ends(clip, before, after, sizes):
    chunks = cut(clip, "cat " * before + "," + " cat" * after)
    assert [len(chunk) for chunk in chunks] == sizes
    assert sum(chunks, []) == [CAT] * before + [COMMA] + [CAT] * after


def test_weights_go_with_their_tokens_and_break_ends_a_chunk(clip):
    prompt = read_marks("cat " * 70 + ", (cat cat cat cat cat cat:1.5) BREAK [cat]")
    chunks = clip.chunks(prompt.sections)
    assert [len(chunk.tokens) for chunk in chunks] == [71, 6, 1]
    assert [set(chunk.weights) for chunk in chunks] == [{1.0}, {1.5}, {1 / 1.1}]
    assert cut(clip, "BREAK cat") == [[], [CAT]] and cut(clip, "cat BREAK") == [[CAT]]


def test_pieces_of_other_weights_are_words_of_their_own(clip):
    assert cut(clip, "(ca)t") == [[*cut(clip, "ca")[0], *cut(clip, "t")[0]]] != cut(clip, "cat")
