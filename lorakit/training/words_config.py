"""The settings of textual_inversion: new words, what each starts from, and where they are written. No torch here."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.pictures.folder import Table
from lorakit.training.objective_config import names_of
from lorakit.weights.base import BaseInfo
from lorakit.weights.learnt_words import places_of
from lorakit.weights.tokens import read_tokenizer

_WORD = re.compile(r"<[a-z0-9_-]+>|[a-z0-9_-]+")


# fmt: off
class WordSettings(Config):
    """Words that stand for vectors of their own, in place of token embeddings."""

    words: dict[str, str] = Field(min_length=1, description='new word -> a word that its vectors start from: {"<alps>": "mountains"}')
    vectors: int = Field(1, ge=1, le=32, description="of each word: as many tokens of a prompt")
    learning_rate: float = Field(2e-3, gt=0, description="of the vectors, without weight decay")
    bundle: bool = Field(False, description="put the words into the LoRA file too, in kohya's layout, as A1111 reads them there; diffusers refuses such a file")

    @model_validator(mode="after")
    def _agree(self):
        for word in self.words:
            if not _WORD.fullmatch(word):
                raise ValueError(f'words: "{word}": a new word is small letters, digits, - and _, in < > where you like')
        stems = [stem_of(word) for word in self.words]
        if len(set(stems)) < len(stems):
            raise ValueError("words: two have the same letters, and so the same file; rename one")
        return self


def stem_of(word: str) -> str:
    """The name of a word's file, by which A1111 and ComfyUI know it."""
    return word.strip("<>")


def encodes_text(cfg: Any) -> bool:
    """Whether steps run the text encoder: it is trained, or words are."""
    return cfg.train_text_encoder or cfg.textual_inversion is not None


def trains_lora(cfg: Any) -> bool:
    """Whether there is a LoRA at all, and not words alone."""
    return names_of(cfg.objective) != ("textual_inversion",)


def word_paths(cfg: Any) -> dict[str, Path]:
    """Word -> the file that a run writes of it."""
    if cfg.textual_inversion is None:
        return {}
    folder = Path(cfg.output_dir) / f"{cfg.ckpt_name}_words"
    return {word: folder / f"{stem_of(word)}.safetensors" for word in cfg.textual_inversion.words}


def check_word_settings(cfg: Any) -> None:
    """Refuse settings that do not go with words.

    Raises:
        ValueError: names the keys.
    """
    if cfg.textual_inversion is None:
        return
    if cfg.prompt_syntax != "plain":
        raise ValueError("textual_inversion, prompt_syntax: sample prompts have the words that are learnt in the plain syntax only")
    if not trains_lora(cfg) and (cfg.train_text_encoder or cfg.init_lora):
        raise ValueError('objective, train_text_encoder, init_lora: words alone train no LoRA; write ["denoise", "textual_inversion"]')
    if cfg.textual_inversion.bundle and (cfg.save_format != "kohya" or not trains_lora(cfg)):
        raise ValueError("textual_inversion.bundle, save_format: words go into a LoRA file of kohya's layout")
# fmt: on


def check_words(cfg: Any, base: BaseInfo, table: Table) -> None:
    """Refuse words that cannot be learnt with these captions and this base.

    Raises:
        UserError: names the word.
    """
    if cfg.textual_inversion is None:
        return
    captions = [caption for row in table.rows for caption in row.captions]
    backend = read_tokenizer(base)[0] if base.known else None
    for word, start in cfg.textual_inversion.words.items():
        label = f'textual_inversion.words: "{word}"'
        if not any(map(places_of(word).search, captions)):
            raise UserError(f"{label}: no caption has it; write it into captions, or set trigger_word={word}")
        if backend is None:
            continue
        if backend.token_to_id(word) is not None or backend.token_to_id(f"{word}</w>") is not None:
            raise UserError(f"{label}: this base has that word already; choose one that it does not have")
        count = len(backend.encode(start, add_special_tokens=False).ids)
        if count != 1:
            raise UserError(
                f'{label}: starts from "{start}", which is {count} tokens for this base; choose a word of one'
            )
