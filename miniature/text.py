"""The words: every caption there is, the tokenizer that is trained on them, and a small CLIP text encoder."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from lorakit.ground.randomness import derive_seed
from miniature.landscapes import FOREGROUNDS, LAYERS, MOUNTAINS, STYLES, TIMES, Scene

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"


def all_captions() -> Iterator[str]:
    """Each style, mountain, time, foreground and depth once, with all extras."""
    for style, time, mountain, foreground, layers in product(STYLES, TIMES, MOUNTAINS, FOREGROUNDS, LAYERS):
        scene = Scene(
            seed=0,
            time=time,
            mountain=mountain,
            foreground=foreground,
            layers=layers,
            disc=True,
            clouds=True,
            trees=True,
            house=True,
        )
        yield scene.caption(style, details=True)


def train_tokenizer(vocabulary: int, max_length: int) -> Any:
    """A CLIPTokenizer of at most `vocabulary` tokens whose merges are learned from the captions.

    It knows every letter, so that any English word has tokens: letters, where no caption has the word.
    """
    from transformers import CLIPTokenizer

    frame = CLIPTokenizer().backend_tokenizer  # for CLIP's own way of cutting text into words
    words = Counter(
        word
        for caption in all_captions()
        for word, _ in frame.pre_tokenizer.pre_tokenize_str(frame.normalizer.normalize_str(caption))
    )
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    merges = learn_merges(words, vocabulary - len(letters) - 2)
    tokens = [*letters, *(first + second for first, second in merges), BOS, EOS]
    vocab = {token: number for number, token in enumerate(tokens)}
    make: Any = CLIPTokenizer  # it takes a list of pairs, its annotation does not
    return make(vocab=vocab, merges=merges, model_max_length=max_length)


def learn_merges(words: Mapping[str, int], limit: int) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al. 2016, algorithm 1): join the commonest pair, again and again.

    Of equally common pairs the first in the alphabet goes first; the library leaves that to chance.
    """
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            break
        first, second = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((first, second))
        for parts in split.values():
            for i in reversed(range(len(parts) - 1)):
                if parts[i : i + 2] == [first, second]:
                    parts[i : i + 2] = [first + second]
    return merges


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """(B, L) int64, padded and cut to the tokenizer's own length."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def make_text_encoder(tokenizer: Any, width: int, layers: int, seed: int) -> Any:
    """A CLIPTextModel of random weights for the tokenizer's vocabulary and length."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(derive_seed(seed, "text-encoder/weights"))
    eos = tokenizer.convert_tokens_to_ids(EOS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return CLIPTextModel(config)
