"""prompt_embeds of prompts in either syntax, (B, C * L, D); with A1111's marks in as many chunks C as needed.

Weights count as in A1111: what the text encoder makes of a token is multiplied by its weight, and then all of
the chunk so that its mean is again what it was before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorakit.diffusion.models import Base
from lorakit.sampling.prompt_chunks import Chunk, Vector
from lorakit.sampling.prompts import MarkReader
from lorakit.sampling.samplers import encode_prompts
from lorakit.weights.learnt_words import LearntWord, read_vectors

_ROUNDING = 1e-5


class PromptEncoder:
    """The text encoder of a base as it stands, its LoRAs included.

    Args:
        syntax: "plain" or "a1111".
        embedding_dirs: folders of learnt words.
        loras: files that may have words beside the LoRA.

    Raises:
        UserError: as MarkReader.
    """

    def __init__(
        self, base: Base, syntax: str, embedding_dirs: Sequence[str] = (), loras: Sequence[str] = ()
    ):
        self.base = base
        words = embedding_dirs, loras
        self.reader = None if syntax == "plain" else MarkReader(base.info, *words, tokenizer=base.tokenizer)
        self.vectors: dict[LearntWord, Tensor] = {}

    def count(self, prompt: str, negative: str) -> int:
        """Chunks of the longer of the two: prompts of one batch must agree in it.

        Raises:
            UserError: as MarkReader.chunks.
        """
        return max(len(row) for row in self._rows([prompt], negative))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative: str) -> tuple[Tensor, Tensor]:
        """(B, C * L, D) of the prompts and (1, C * L, D) of the negative one, filled up with empty chunks.

        Raises:
            UserError: as MarkReader.chunks.
        """
        if self.reader is None:
            embeds = encode_prompts(self.base, [*prompts, negative])
        else:
            rows = self._rows(prompts, negative)
            most = max(map(len, rows))
            rows = [[*row, *[Chunk()] * (most - len(row))] for row in rows]
            embeds = torch.cat([self._encode([row[i] for row in rows]) for i in range(most)], dim=1)
        return embeds[:-1], embeds[-1:]

    @torch.no_grad()
    def encode_alone(self, text: str, beside: Sequence[str]) -> Tensor:
        """(1, C * L, D) of one text without LoRA marks, in as many chunks as the longest of `beside` takes.

        Raises:
            UserError: as MarkReader.chunks.
        """
        if self.reader is None:
            return encode_prompts(self.base, [text])
        own, *others = (self.reader.chunks(each, no_loras="prompt") for each in (text, *beside))
        own = [*own, *[Chunk()] * (max(map(len, (own, *others))) - len(own))]
        return torch.cat([self._encode([chunk]) for chunk in own], dim=1)

    def _rows(self, prompts: Sequence[str], negative: str) -> list[list[Chunk]]:
        if self.reader is None:
            return [[Chunk()]]
        own = [self.reader.chunks(prompt) for prompt in prompts]
        return [*own, self.reader.chunks(negative, no_loras="negative_prompt")]

    def _encode(self, chunks: Sequence[Chunk]) -> Tensor:
        """(B, L, D) of a chunk for each row."""
        assert self.reader is not None
        tokenizer, size = self.base.tokenizer, self.reader.cutter.size
        ids, weights, places = [], [], []
        for row, chunk in enumerate(chunks):
            own = [0 if isinstance(token, Vector) else token for token in chunk.tokens]
            rest = size - len(own)
            end = [tokenizer.eos_token_id, *[tokenizer.pad_token_id] * rest]
            ids.append([tokenizer.bos_token_id, *own, *end])
            weights.append([1.0, *chunk.weights, *[1.0] * (rest + 1)])
            for place, token in enumerate(chunk.tokens, 1):
                places += [(row, place, self._vector(token))] if isinstance(token, Vector) else []
        with self._in_place(places):
            states = self.base.text_encoder(torch.tensor(ids, device=self.base.device))[0]
        return weighted(states, torch.tensor(weights, device=states.device))

    def _vector(self, token: Vector) -> Tensor:
        if token.word not in self.vectors:
            self.vectors[token.word] = read_vectors(token.word).to(self.base.device)
        return self.vectors[token.word][token.row]

    @contextmanager
    def _in_place(self, places: Sequence[tuple[int, int, Tensor]]) -> Iterator[None]:
        """Vectors (row, place, (D,)) stand for token embeddings in the passes of this context."""

        def put(_, __, embeds: Tensor) -> Tensor:
            embeds = embeds.clone()
            for row, place, vector in places:
                embeds[row, place] = vector.to(embeds.dtype)
            return embeds

        handle = self.base.text_encoder.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States (B, L, D) times weights (B, L), each row then scaled to the mean that it had.

    A1111 takes the mean over all rows; here a row does not depend on its batch. A mean that is but rounding,
    as a final layer norm without a bias leaves it, has nothing to be scaled by.
    """
    if (weights == 1).all():
        return states
    before = states.float()
    after = before * weights[..., None]
    mean, new_mean = (each.mean(dim=(1, 2), keepdim=True) for each in (before, after))
    has_mean = new_mean.abs() > _ROUNDING * after.std(dim=(1, 2), keepdim=True)
    scaled = after * torch.where(has_mean, mean / new_mean, 1.0)
    # A row without weights stays as it is to the bit.
    changed = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(changed, scaled, before).to(states.dtype)
