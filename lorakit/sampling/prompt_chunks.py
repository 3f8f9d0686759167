"""A prompt in chunks of as many tokens as the text encoder reads at once, as A1111 cuts it. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorakit.ground.errors import UserError
from lorakit.sampling.prompt_syntax import Part
from lorakit.weights.base import BaseInfo
from lorakit.weights.learnt_words import LearntWord
from lorakit.weights.tokens import read_tokenizer

LOOK_BACK = 20
"""So near to a chunk's end, in tokens, a comma is where it ends: what follows goes into the next one."""


class Vector(NamedTuple):
    """Row `row` of a learnt word, in place of a token."""

    word: LearntWord
    row: int


@dataclass
class Chunk:
    """Token ids or vectors, and the weight of each; without the marks of its ends, and not padded."""

    tokens: list[int | Vector] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, tokens: Sequence[int | Vector], weight: float) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)

    def cut(self, at: int) -> "Chunk":
        """Take away what stands from `at` on, and return it."""
        rest = Chunk(self.tokens[at:], self.weights[at:])
        del self.tokens[at:], self.weights[at:]
        return rest


class Cutter:
    """Cuts prompts for one base.

    Args:
        tokenizer: the base's, if it is loaded.
        words: learnt words, which count where their names stand.

    Raises:
        BaseError: the base's tokenizer cannot be read.
    """

    def __init__(self, info: BaseInfo, words: Sequence[LearntWord] = (), tokenizer: Any = None):
        self.backend, length = read_tokenizer(info, tokenizer)
        self.size = int(min(length, info.max_tokens)) - 2
        self.width = info.cross_attention_dim
        comma = self.ids(",")
        self.comma = comma[0] if len(comma) == 1 else None
        self.words: dict[int, list[tuple[list[int], LearntWord]]] = {}
        for word in words:
            if ids := self.ids(word.name):
                self.words.setdefault(ids[0], []).append((ids, word))
        for named in self.words.values():
            named.sort(key=lambda entry: -len(entry[0]))

    def ids(self, text: str) -> list[int]:
        self.backend.no_truncation()  # which calls of the tokenizer around it set
        self.backend.no_padding()
        return self.backend.encode(text, add_special_tokens=False).ids

    def chunks(self, sections: Sequence[Sequence[Part]]) -> list[Chunk]:
        """One chunk at least.

        Raises:
            UserError: a learnt word cannot be used with this base.
        """
        done: list[Chunk] = []
        chunk, comma = Chunk(), -1
        for number, section in enumerate(sections):
            if number:
                done.append(chunk)
                chunk, comma = Chunk(), -1
            for part in section:
                ids, place = self.ids(part.text), 0
                while place < len(ids):
                    tokens, step = self._next(ids, place)
                    is_comma = tokens == [self.comma]
                    if len(chunk.tokens) + len(tokens) > self.size:
                        near = comma >= 0 and self.size - comma <= LOOK_BACK
                        full = len(chunk.tokens) == self.size
                        rest = chunk.cut(comma + 1) if full and near and not is_comma else Chunk()
                        done.append(chunk)
                        chunk, comma = rest, -1
                        continue
                    if is_comma:
                        comma = len(chunk.tokens)
                    chunk.add(tokens, part.weight)
                    place += step
        return [*done, chunk] if chunk.tokens or not done else done

    def _next(self, ids: list[int], place: int) -> tuple[list[int | Vector], int]:
        """What stands at `place`, and how many ids it takes there: the longest learnt word, or one token."""
        for name, word in self.words.get(ids[place], ()):
            if ids[place : place + len(name)] == name:
                if reason := word.unusable(self.width, self.size):
                    raise UserError(reason)
                return [Vector(word, row) for row in range(word.count)], len(name)
        return [ids[place]], 1
