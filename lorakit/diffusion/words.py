"""New words of a text encoder: vectors that take the place of token embeddings (Gal et al. 2022)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from lorakit.weights.learnt_words import places_of


class WordRows(nn.Module):
    """A token embedding with rows for new tokens, whose own rows are left as they are.

    Args:
        embedding: of the text encoder.
        first: id of the first new token.
        vectors: of the new tokens, (n, D), float32.
    """

    def __init__(self, embedding: nn.Embedding, first: int, vectors: Tensor):
        super().__init__()
        self.embedding, self.first = embedding, first
        self.vectors = nn.Parameter(vectors.float(), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, D) in the embedding's dtype."""
        is_new = ids >= self.first
        known = self.embedding(ids.masked_fill(is_new, 0))
        new = self.vectors[(ids - self.first).clamp(min=0)].to(known.dtype)
        return torch.where(is_new[..., None], new, known)


class Words:
    """The new words of a base whose tokenizer and text encoder know them.

    rows      in the text encoder
    spelled   word -> the tokens that stand for it, as text
    start     the vectors that they came with
    """

    def __init__(self, rows: WordRows, spelled: dict[str, str]):
        self.rows, self.spelled = rows, spelled
        self.start = rows.vectors.detach().clone()

    def spell(self, prompt: str) -> str:
        """A prompt in which each word is as many tokens as it has vectors."""
        for word, tokens in self.spelled.items():
            prompt = places_of(word).sub(tokens, prompt)
        return prompt

    def vectors(self) -> dict[str, Tensor]:
        """Copies of what each word stands for, (n, D), on the CPU."""
        counts = [len(tokens.split()) for tokens in self.spelled.values()]
        parts = self.rows.vectors.detach().to("cpu", copy=True).split(counts)
        return dict(zip(self.spelled, (part.contiguous() for part in parts), strict=True))

    @torch.no_grad()
    def put(self, vectors: Mapping[str, Tensor]) -> None:
        """The inverse of `vectors`."""
        self.rows.vectors.copy_(torch.cat([vectors[word] for word in self.spelled]))


def add_words(tokenizer: Any, text_encoder: Any, vectors: Mapping[str, Tensor]) -> Words:
    """Teach a tokenizer and a text encoder words; each is as many new tokens as its vectors (n, D) are.

    The tokens are named as diffusers names them: <word>, <word>_1, <word>_2, …
    """
    spelled = {
        word: " ".join([word, *(f"{word}_{number}" for number in range(1, len(rows)))])
        for word, rows in vectors.items()
    }
    first = len(tokenizer)
    names = [token for tokens in spelled.values() for token in tokens.split()]
    tokens = [AddedToken(name, single_word=not name.startswith("<")) for name in names]
    assert tokenizer.add_tokens(tokens) == len(names), names
    embedding = text_encoder.get_input_embeddings()
    rows = WordRows(embedding, first, torch.cat([*vectors.values()])).to(embedding.weight.device)
    text_encoder.set_input_embeddings(rows)
    return Words(rows, spelled)


def start_vectors(
    tokenizer: Any, text_encoder: Any, words: Mapping[str, str], count: int
) -> dict[str, Tensor]:
    """New word -> `count` times the embedding of the word that it starts from, float32."""
    weight = text_encoder.get_input_embeddings().weight
    ids = {word: tokenizer(start, add_special_tokens=False).input_ids for word, start in words.items()}
    return {word: weight[tokens].detach().float().repeat(count, 1) for word, tokens in ids.items()}


@contextmanager
def words_at_start(words: Words | None) -> Iterator[None]:
    """The words as they came; afterwards they are as they were."""
    if words is None:
        yield
        return
    now = words.rows.vectors.data
    try:
        words.rows.vectors.data = words.start
        yield
    finally:
        words.rows.vectors.data = now
