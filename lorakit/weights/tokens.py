"""What a base's text encoder does not read of a text, or reads as it stands. No torch here."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.weights.base import BaseInfo
from lorakit.weights.part_files import BaseError
from lorakit.weights.published import load_tokenizer

# What A1111 and programs like it do not draw but obey: a LoRA, (word:1.2), ((word)), [word], BREAK.
_MARKS = re.compile(
    r"<(?:lora|lyco|hypernet):[^<>]*>|\([^()]*:\s*\d*\.?\d+\s*\)|\(\(.*?\)\)|(?<!\\)\[[^\[\]]*\]|\bBREAK\b"
)

_UNSPACED = "\u2e80"  # from here on scripts have no spaces between words, which the tokenizer takes for one


class Overlong(NamedTuple):
    """Text number `index` has `tokens`, with the marks of its ends; `limit` are read.

    `words` are not, the first of them perhaps in part.
    """

    index: int
    tokens: int
    limit: int
    words: str


def overlong(info: BaseInfo, texts: Sequence[str], tokenizer: Any = None) -> list[Overlong]:
    """The texts that are longer than the base's text encoder reads; none while the base is not known.

    Args:
        tokenizer: the base's, if it is loaded.

    Raises:
        BaseError: the base's tokenizer cannot be read.
    """
    if not info.known:
        return []
    backend, length = read_tokenizer(info, tokenizer)
    limit, found = int(min(length, info.max_tokens)), []
    room = limit - len(backend.encode("").ids)
    for index, text in enumerate(texts):
        if text.isascii() and len(text) <= room:  # a token has a letter at least
            continue
        encoding = backend.encode(text)
        if len(encoding.ids) > limit:
            start, _ = encoding.offsets[limit - 1]  # the last that is read is the mark of the end
            words = encoding.word_ids
            if words[limit - 1] == words[limit - 2] and text[start] < _UNSPACED:
                start, _ = encoding.word_to_chars(words[limit - 1])
            found.append(Overlong(index, len(encoding.ids), limit, text[start:].strip()))
    return found


def unread_notes(
    info: BaseInfo, prompts: Sequence[str], tokenizer: Any = None, remedy: str = "write it without them"
) -> list[str]:
    """A line for each prompt whose end has no effect, and for those with marks that are obeyed elsewhere.

    Args:
        remedy: what a user whose prompt has marks can do.
        info, tokenizer: as of `overlong`, whose errors it raises.
    """
    prompts = list(dict.fromkeys(prompts))
    found = overlong(info, prompts, tokenizer)
    notes = [f"a prompt is over {each.limit} tokens: “{each.words}” is not read" for each in found]
    marked = (", ".join(dict.fromkeys(_MARKS.findall(prompt))) for prompt in prompts)
    notes += [
        f"a prompt has marks of A1111, which are read as plain text here: {marks}; {remedy}"
        for marks in dict.fromkeys(marked)
        if marks
    ]
    return notes


def read_tokenizer(info: BaseInfo, tokenizer: Any = None) -> tuple[Any, float]:
    """The tokenizer, of the package tokenizers, neither cutting nor padding, and the tokens it is made for.

    In one file it is read within a tenth of a second; transformers, which knows the others, takes seconds.

    Args:
        tokenizer: the base's, if it is loaded.

    Raises:
        BaseError: the base's tokenizer cannot be read.
    """
    folder = info.tokenizer
    if tokenizer is None and folder is not None and (folder / "tokenizer.json").is_file():
        backend, length = _read_file(folder)
    else:
        tokenizer = tokenizer or load_tokenizer(folder, info.pad_token)
        backend, length = tokenizer.backend_tokenizer, tokenizer.model_max_length
    backend.no_truncation()
    backend.no_padding()
    return backend, length


def _read_file(folder: Path) -> tuple[Any, float]:
    from tokenizers import Tokenizer

    settings = folder / "tokenizer_config.json"
    try:
        given = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        return Tokenizer.from_file(str(folder / "tokenizer.json")), given.get("model_max_length", math.inf)
    except Exception as error:  # tokenizers has no kind of its own
        raise BaseError(f"{folder}: cannot be loaded: {error}") from None
