"""Words learnt by textual inversion (Gal et al. 2022), in files of diffusers, A1111 and kohya's scripts.

A word is vectors that take the place of token embeddings. torch is imported where vectors are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.ground.errors import UserError
from lorakit.weights.adapter_config import lora_path
from lorakit.weights.identity import file_sha256
from lorakit.weights.tensors import PICKLE_SUFFIXES, Shapes, read_header, read_tensors

if TYPE_CHECKING:
    import torch

# The tensor of A1111 and kohya's scripts, whose word is named by its file; diffusers' is named by the word.
_UNNAMED = ("emb_params", "string_to_param.*", "*")
_ANY_NAME = "learned_embeds"  # what diffusers calls every file
_SDXL = {"clip_l", "clip_g"}
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|clip_[lg]|emb_params)")
"""The name of a word's tensor beside a LoRA, as A1111 reads it there."""


@dataclass(frozen=True)
class LearntWord:
    """The word `name`: `count` vectors of `width` numbers, under `key` of a file.

    `reason` says why it cannot be read at all; it is of use only to whom the word is named by.
    """

    name: str
    path: Path
    key: str = ""
    count: int = 0
    width: int = 0
    reason: str = ""

    def unusable(self, width: int, most: int) -> str:
        """Why a text encoder of `width` that reads `most` tokens at once cannot have it; empty if it can."""
        if self.reason:
            return f"{self.path}: {self.reason}; or leave {self.name} out of the prompt"
        if self.width != width:
            return (
                f"{self.path}: was learnt for another base, {self.width} wide, and this one is {width} wide; "
                f"leave {self.name} out of the prompt"
            )
        if self.count > most:
            return f"{self.path}: has {self.count} vectors; this base reads {most} at once"
        return ""


def places_of(word: str) -> re.Pattern[str]:
    """Where a word stands in a text: one without < > not inside of others."""
    bare = rf"(?<![\w-]){re.escape(word)}(?![\w-])"
    return re.compile(re.escape(word) if word.startswith("<") else bare, re.IGNORECASE)


def find_words(folders: Sequence[str], loras: Sequence[str] = ()) -> list[LearntWord]:
    """Every learnt word in the folders and below them, and those that LoRA files hold beside the LoRA.

    A word of a folder goes before one of the same name beside a LoRA.

    Raises:
        UserError: no such folder, a word in two files, or no such LoRA.
        OutputError: a file cannot be read.
    """
    found: dict[str, LearntWord] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"embedding_dirs: {folder}: there is no such folder")
        for path in sorted(Path(folder).rglob("*")):
            for word in _words_of(path) if path.is_file() else ():
                other = found.setdefault(word.name.lower(), word)
                if other.reason:  # what can be read goes before what cannot
                    found[word.name.lower()] = word
                elif not word.reason and other.path != path:
                    raise UserError(
                        f"embedding_dirs: {word.name} is in {other.path} and in {path}; rename or remove one"
                    )
    for path in dict.fromkeys(loras):
        for word in bundled_words(path):
            found.setdefault(word.name.lower(), word)
    return list(found.values())


def bundled_words(path: str) -> list[LearntWord]:
    """The words beside a LoRA, in kohya's layout.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    file, words = lora_path(path), []
    for key, shape in read_header(file)[0].items():
        if found := BUNDLED.fullmatch(key):
            count, width = (1, *shape)[-2:]
            reason = "holds it for SDXL; take one for this base" if found[2].startswith("clip_") else ""
            words.append(LearntWord(found[1], file, key, count, width, reason))
    return words


def word_hashes(texts: Sequence[str], folders: Sequence[str], loras: Sequence[str] = ()) -> dict[str, str]:
    """Name of each learnt word that the texts have -> the hash of its file.

    Raises:
        UserError: as `find_words`.
    """
    words = [word for word in find_words(folders, loras) if any(map(places_of(word.name).search, texts))]
    return {word.name: file_sha256(word.path) for word in words}


def read_vectors(word: LearntWord) -> torch.Tensor:
    """(count, width), float32.

    Raises:
        UserError: the file is damaged, or holds NaN or infinity.
        OutputError: it cannot be read.
    """
    vectors = read_tensors(word.path)[0][word.key].float().reshape(word.count, word.width)
    if not vectors.isfinite().all():
        raise UserError(f"{word.path}: holds NaN or infinity; leave {word.name} out of the prompt")
    return vectors


def _words_of(path: Path) -> list[LearntWord]:
    """The words that a file holds under their names; none of a file that is no such thing."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        reason = "is a pickle, which can run code when it is opened; look for a .safetensors version of it"
        return [LearntWord(path.stem, path, reason=reason)]
    if path.suffix.lower() != ".safetensors":
        return []
    try:
        shapes = read_header(path)[0]
    except UserError as error:
        return [LearntWord(path.stem, path, reason=str(error).removeprefix(f"{path}: "))]
    if shapes.keys() <= _SDXL and shapes:
        return [LearntWord(path.stem, path, reason="was learnt for SDXL; take one for this base")]
    if not _is_of_words(shapes):
        return []
    words = []
    for key, shape in shapes.items():
        count, width = (1, *shape)[-2:]
        is_named = key not in _UNNAMED
        names = [key] if is_named else []
        names += [path.stem] if len(shapes) == 1 and not (is_named and path.stem == _ANY_NAME) else []
        words += [LearntWord(name, path, key, count, width) for name in dict.fromkeys(names)]
    return words


def _is_of_words(shapes: Shapes) -> bool:
    return bool(shapes) and all(
        len(shape) in (1, 2) and 0 not in shape and (key in _UNNAMED or "." not in key)
        for key, shape in shapes.items()
    )
