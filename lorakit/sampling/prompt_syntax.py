r"""The marks that A1111 and its kin obey in prompts. No torch here.

    (word) 1.1 times as strong, [word] 1 / 1.1 times, (word:1.2) 1.2 times; they nest, and then multiply
    \( \) \[ \] \\ the sign itself
    BREAK ends a chunk
    # to the end of the line is a comment
    <lora:NAME:WEIGHT> a LoRA; <lora:NAME:OF_TEXT_ENCODER:OF_UNET> with two weights, also as te=…, unet=…

Two deviations from A1111: BREAK breaks inside brackets too, where A1111 reads a word of weight -1.1; and what
is not done here (the prompt changed between steps, AND, hypernetworks) is refused rather than read as text.
"""

import math
import re
from typing import NamedTuple

from lorakit.ground.errors import UserError

_STRONGER = 1.1
_SIGN = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_COMMENT = re.compile(r"#[^\n]*")
_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_STEP = re.compile(
    r":\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*$", re.IGNORECASE
)  # before ]: when a text is exchanged for another


class Part(NamedTuple):
    """A piece of a prompt, and the factor on what the text encoder makes of it."""

    text: str
    weight: float


class NamedLora(NamedTuple):
    """A LoRA that a prompt names: the factors on its update of the U-Net and of the text encoder."""

    name: str
    unet: float
    text_encoder: float
    mark: str


class Prompt(NamedTuple):
    """A prompt as it is meant: its sections, between which BREAK stood, each in parts; and its LoRAs."""

    sections: tuple[tuple[Part, ...], ...]
    loras: tuple[NamedLora, ...]


def read_plain(text: str) -> Prompt:
    """A prompt without marks."""
    return Prompt(((Part(text, 1.0),),), ())


def read_marks(text: str, *, no_loras: str = "") -> Prompt:
    """A prompt as A1111 reads it.

    Args:
        no_loras: the key of a prompt that cannot name LoRAs.

    Raises:
        UserError: a mark that cannot be read, or that is not obeyed here.
    """
    text = _COMMENT.sub("", text)
    loras = tuple(_lora(match) for match in _NETWORK.finditer(text))
    if no_loras and loras:
        raise UserError(f"{no_loras}: {loras[0].mark}: no LoRA can be named there; remove it")
    text = _NETWORK.sub("", text)
    _refuse_schedules(text)
    return Prompt(_sections(text), loras)


def escaped(text: str) -> str:
    """A text in which A1111 finds no mark of weight."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def _sections(text: str) -> tuple[tuple[Part, ...], ...]:
    pieces: list[list] = []  # [text or None for BREAK, weight]
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for piece in pieces[opened[bracket].pop() :]:
            piece[1] *= factor

    for match in _SIGN.finditer(text):
        sign, weight = match[0], match[1]
        if sign[0] == "\\":
            pieces.append([sign[1:], 1.0])
        elif sign in opened:
            opened[sign].append(len(pieces))
        elif weight is not None and opened["("]:
            close("(", _number(weight, f"({sign[:-1].strip()})"))
        elif sign == ")" and opened["("]:
            close("(", _STRONGER)
        elif sign == "]" and opened["["]:
            close("[", 1 / _STRONGER)
        else:
            for number, piece in enumerate(_BREAK.split(sign)):
                pieces += [[None, 1.0]] * bool(number) + [[piece, 1.0]]
    while opened["("]:  # brackets that are never closed
        close("(", _STRONGER)
    while opened["["]:
        close("[", 1 / _STRONGER)
    sections: list[list[Part]] = [[]]
    for piece, weight in pieces:
        if piece is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1].weight == weight:
            sections[-1][-1] = Part(sections[-1][-1].text + piece, weight)
        else:
            sections[-1].append(Part(piece, weight))
    return tuple(tuple(part for part in section if part.text) for section in sections)


def _number(text: str, where: str) -> float:
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise UserError(f"prompt: {where}: {text.strip()} is no number; write a weight such as 1.2")


def _lora(match: re.Match[str]) -> NamedLora:
    kind, (name, *words) = match[1], match[2].split(":")
    if kind not in ("lora", "lyco"):
        raise UserError(f"prompt: {match[0]}: only LoRAs are read here; remove it")
    named = dict(word.split("=", 1) for word in words if "=" in word)
    weights = [_number(word, match[0]) for word in words if "=" not in word]
    if len(weights) > 2 or named.keys() - {"te", "unet"}:
        raise UserError(
            f"prompt: {match[0]}: is read as <lora:NAME:WEIGHT>, or with a weight for the text encoder and "
            "one for the U-Net; weights by block stand in loras, as blocks"
        )
    text_encoder = _number(named["te"], match[0]) if "te" in named else (weights or [1.0])[0]
    unet = _number(named["unet"], match[0]) if "unet" in named else (*weights[1:], text_encoder)[0]
    if text_encoder and not unet:
        raise UserError(f"prompt: {match[0]}: is for the text encoder alone; name it in loras, with blocks")
    return NamedLora(name.strip(), unet, text_encoder, match[0])


def _refuse_schedules(text: str) -> None:
    """Raises UserError: prompt editing [from:to:when], alternation [one|other], or AND."""
    opened: list[tuple[str, int]] = []
    for match in re.finditer(r"\\.|[()\[\]|]", text, re.DOTALL):
        sign = match[0]
        if sign in ("(", "["):
            opened.append((sign, match.start()))
        elif sign == "|" and opened and opened[-1][0] == "[":
            raise _unread(text[opened[-1][1] :].partition("]")[0] + "]")
        elif sign in (")", "]") and opened:
            bracket, start = opened.pop()
            if sign == "]" and bracket == "[" and _STEP.search(text[start : match.start()]):
                raise _unread(text[start : match.end()])
    if re.search(r"\bAND\b", text):
        raise UserError("prompt: AND: prompts side by side are not read here; write and, or two prompts")


def _unread(mark: str) -> UserError:
    return UserError(
        f"prompt: {mark}: changes the prompt between steps, which is not done here; write one of its texts, "
        "with ( ) for a weight, or \\[ for the sign itself"
    )
