"""Prompts as a config reads them, and what a user should know of them. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Any

from lorakit.sampling.config import SamplingConfig
from lorakit.sampling.prompt_chunks import Chunk, Cutter
from lorakit.sampling.prompt_syntax import read_marks
from lorakit.weights.base import BaseInfo
from lorakit.weights.learnt_words import find_words
from lorakit.weights.tokens import unread_notes

_REMEDY = "set prompt_syntax=a1111, or write it without them"


class MarkReader:
    """Reads prompts as A1111 does, in chunks for one base.

    Args:
        embedding_dirs: folders of learnt words.
        loras: files that may have words beside the LoRA.

    Raises:
        UserError: a folder of learnt words or a LoRA that is not there, or a word in two files.
        BaseError: the base's tokenizer cannot be read.
    """

    def __init__(
        self,
        info: BaseInfo,
        embedding_dirs: Sequence[str],
        loras: Sequence[str] = (),
        *,
        tokenizer: Any = None,
    ):
        self.cutter = Cutter(info, find_words(embedding_dirs, loras), tokenizer)

    def chunks(self, text: str, *, no_loras: str = "") -> list[Chunk]:
        """Raises UserError: marks that cannot be read, or a learnt word that cannot be used."""
        return self.cutter.chunks(read_marks(text, no_loras=no_loras).sections)


def prompt_notes(configs: Sequence[SamplingConfig], info: BaseInfo, tokenizer: Any = None) -> list[str]:
    """What of the prompts of these configs, one each, is not read.

    Raises:
        UserError: as MarkReader, for the syntax of A1111.
    """
    first = configs[0]
    texts = [
        (text, "" if key == "prompt" else key)
        for cfg in configs
        for key, text in (cfg.own_texts() | {"negative_prompt": cfg.negative_prompt}).items()
    ]
    loras = lora_files(configs)
    return text_notes(texts, first.prompt_syntax, first.embedding_dirs, info, loras, tokenizer)


def lora_files(configs: Iterable[SamplingConfig]) -> list[str]:
    """Every LoRA that these configs name, in prompts too."""
    loras = (lora for cfg in configs for lora in (*cfg.loras, *cfg.prompt_loras()))
    return list(dict.fromkeys(lora.path for lora in loras))


def text_notes(
    texts: Iterable[tuple[str, str]],
    syntax: str,
    embedding_dirs: Sequence[str],
    info: BaseInfo,
    loras: Sequence[str] = (),
    tokenizer: Any = None,
) -> list[str]:
    """What of these texts is not read.

    Args:
        texts: each with the key that cannot name LoRAs, if it is of one.
        loras: files that may have words beside the LoRA.

    Raises:
        UserError: as MarkReader, for the syntax of A1111.
    """
    texts = list(dict.fromkeys(texts))
    if syntax == "plain":
        return unread_notes(info, [text for text, _ in texts], tokenizer, _REMEDY)
    reader = MarkReader(info, embedding_dirs, loras, tokenizer=tokenizer) if info.known else None
    for text, no_loras in texts:
        if reader is None:  # a base that is not here yet: what can be said without its tokenizer
            read_marks(text, no_loras=no_loras)
        else:
            reader.chunks(text, no_loras=no_loras)
    return []
