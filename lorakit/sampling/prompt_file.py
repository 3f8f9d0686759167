"""Files with a prompt in each line, as sd-scripts and A1111 have them. No torch here.

# a comment
a photo of a lake --n blurry --w 192 --h 128 --s 30 --l 5 --d 7
--prompt "a photo of hills" --negative_prompt blurry --steps 30 --cfg_scale 5 --seed 7
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.ground.config import MAX_FAULTS
from lorakit.ground.errors import UserError
from lorakit.sampling.config import A1111_SAMPLERS

# Option -> key of a config: sd-scripts' letters, then the words of A1111's script for such files.
_KEYS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "num_inference_steps",
    "l": "guidance_scale",
    "ss": "scheduler",
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "sampler_name": "scheduler",
}
_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_SAMPLERS = {name.lower(): key for key, name in A1111_SAMPLERS.items()} | {
    "pndm": "pndm",
    "euler_a": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "dpmsolver++": "dpm++",
}


class Line(NamedTuple):
    """A prompt and what its line sets besides, by key; `number` counts from 1."""

    number: int
    prompt: str
    settings: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"line": {"number": self.number, **self.settings}} if self.settings else {}


def read_prompt_file(path: str, check: Callable[[Line], object] = lambda _: None) -> list[Line]:
    """The lines that are neither blank nor comments.

    Args:
        check: raises UserError for a line that sets what cannot be.

    Raises:
        UserError: a file that cannot be read or has no prompt; all lines with options that cannot be read, or
            that do not pass `check`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: {reason}; prompt_file names a text file") from error
    texts = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found, faults = [], []
    for number, text in texts:
        if text and not text.startswith("#"):
            line, own = _read_line(path, number, text)
            found.append(line)
            try:
                check(line)
            except UserError as error:
                own += str(error).splitlines()
            faults += own
    if faults:
        raise UserError("\n".join(faults[:MAX_FAULTS] + ["and more"] * (len(faults) > MAX_FAULTS)))
    if not found:
        raise UserError(f"{path}: has no prompt in it")
    return found


def _read_line(path: str, number: int, text: str) -> tuple[Line, list[str]]:
    """A line as far as it can be read, and what is wrong with it."""
    prompt, *options = _OPTION.split(text)
    settings: dict[str, Any] = {"prompt": prompt.strip()} if prompt.strip() else {}
    faults = []
    for option in options:
        name, _, value = option.partition(" ")
        where = f"{path}: line {number}: --{name}"
        if (key := _KEYS.get(name.lower())) is None:
            known = ", ".join(f"--{each}" for each in _KEYS)
            faults.append(f"{where}: is not read here; known are {known}")
        elif key in settings:
            faults.append(f"{where}: {key} stands there twice")
        else:
            try:
                settings[key] = _value(where, key, value.strip())
            except UserError as error:
                faults.append(str(error))
    if "prompt" not in settings:
        faults.append(f"{path}: line {number}: has no prompt; begin with it, or write # before a comment")
    return Line(number, settings.pop("prompt", ""), settings), faults


def _value(where: str, key: str, text: str) -> Any:
    """Raises UserError: no sampler, or no number."""
    if key in ("prompt", "negative_prompt"):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    if key == "scheduler":
        if text.strip('"').lower() not in _SAMPLERS:
            known = ", ".join(A1111_SAMPLERS.values())
            raise UserError(f"{where}: {text} is no sampler here; choose one of {known}")
        return _SAMPLERS[text.strip('"').lower()]
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"{where}: {key} must be a number, not “{text}”") from None
