"""What method imagic will fit for each target: an embedding, and a LoRA under it. No torch here.

The embedding's file, beside the LoRA, holds the text states, what they began as, the optimizer's moments, and
as JSON all that they are a function of: so a stopped fit goes on, and another picture's or base's is known.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.editing.config import EditConfig
from lorakit.ground.errors import UserError
from lorakit.weights.base import BaseInfo
from lorakit.weights.identity import base_record, changes, file_sha256
from lorakit.weights.lora_metadata import STATES_KEY
from lorakit.weights.tensors import read_header
from lorakit.weights.text_states import states_digest

RECORD, STEP = "lorakit.imagic", "lorakit.step"
"""Keys of the file's metadata: what the embedding is a function of, and how many steps are done."""
BATCH = 4
"""Samples of a step."""


@dataclass(frozen=True)
class ImagicFit:
    """What is fitted for one target; `steps` of its embedding are asked for, `done` of them are."""

    target: str
    lora: str
    steps: int
    done: int

    @property
    def embedding(self) -> Path:
        return embedding_of(self.lora)


def embedding_of(lora: str) -> Path:
    """The file of the embedding that a LoRA was fitted under."""
    return Path(lora).with_suffix(".embedding.safetensors")


def fit_record(cfg: EditConfig, base: BaseInfo, shape: tuple[int, int], target: str) -> dict[str, Any]:
    """All that the embedding of a target is a function of, but for the number of steps.

    Args:
        shape: (width, height) at which the picture is seen.
    """
    keys = ("prediction_type", "clip_skip", "prompt_syntax", "embed_learning_rate", "embed_seed")
    return {
        "base": base_record(base),
        "picture": file_sha256(cfg.image),
        "size": list(shape),
        "target_prompt": hashlib.sha256(target.encode()).hexdigest(),
    } | {key: getattr(cfg, key) for key in keys}


def plan_fits(cfg: EditConfig, base: BaseInfo, shape: tuple[int, int]) -> tuple[ImagicFit, ...]:
    """One for each target; of several the LoRAs are numbered.

    Raises:
        UserError: what lies there is of another base, picture or setting, or would have to be fitted and may
            not be.
    """
    cells = [cell for _, cell in cfg.numbered_cells() if cell.method == "imagic"]
    targets = list(dict.fromkeys(target for cell in cells for target in cell.targets()))
    fits = []
    for number, target in enumerate(targets):
        assert cfg.lora is not None
        path = Path(cfg.lora)
        lora = cfg.lora if len(targets) == 1 else str(path.with_name(f"{path.stem}_{number}{path.suffix}"))
        done = _steps_done(cfg, base, shape, target, embedding_of(lora))
        fits.append(ImagicFit(target, lora, cfg.embed_steps, done))
        _check_lora(fits[-1])
    return tuple(fits)


def parts_of(cell: EditConfig, fits: Sequence[ImagicFit]) -> list[EditConfig]:
    """A cell by what shares a LoRA: with imagic each target has its own."""
    if cell.method != "imagic":
        return [cell]
    loras = {fit.target: fit.lora for fit in fits}
    changes = [{"lora": loras[target], "target_prompt": target} for target in cell.targets()]
    return [cell.model_copy(update=each) for each in changes]


def _steps_done(cfg: EditConfig, base: BaseInfo, shape: tuple[int, int], target: str, path: Path) -> int:
    if not path.exists():
        return 0
    _, metadata = read_header(path)
    try:
        record, done = json.loads(metadata[RECORD]), int(metadata[STEP])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: is no embedding of method imagic ({error}); move it away") from None
    if not base.known:
        return done
    now = fit_record(cfg, base, shape, target)
    lines = changes(record["base"], now["base"])
    lines += [f"{key}: another" for key in now if key != "base" and record.get(key) != now[key]]
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise UserError(f"{path} was fitted otherwise:{listed}\nset these back, or name another lora")
    if done > cfg.embed_steps:
        raise UserError(
            f"{path} has {done} steps, embed_steps asks for {cfg.embed_steps}; raise it, or name another lora"
        )
    return done


def _check_lora(fit: ImagicFit) -> None:
    """Raises UserError: there is a LoRA that was fitted without the embedding beside it."""
    if not Path(fit.lora).exists():
        return
    told = read_header(Path(fit.lora))[1].get(STATES_KEY)
    whole = fit.embedding.exists() and fit.done == fit.steps
    if not whole or told != states_digest(str(fit.embedding)):
        raise UserError(
            f"{fit.lora}: was not fitted under {fit.embedding}, as method imagic does it; name another lora, "
            "or move it away"
        )
