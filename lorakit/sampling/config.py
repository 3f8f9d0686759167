"""The keys that generate.py and style_transfer.py share: LoRAs, sizes, samplers and grids. No torch here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.pictures.images import image_size
from lorakit.pictures.views import assign_shapes
from lorakit.sampling.model_files import find_lora
from lorakit.sampling.prompt_syntax import read_marks
from lorakit.weights.adapter_config import lora_path
from lorakit.weights.base import BaseInfo
from lorakit.weights.base_settings import (
    BaseConfig,
    ClipSkip,
    PredictionType,
    check_clip_skip,
    clip_skip_notes,
)
from lorakit.weights.few_steps import few_steps
from lorakit.weights.lora_keys import layer_names
from lorakit.weights.lora_metadata import HINTS_KEY
from lorakit.weights.tensors import read_header

PromptSyntax = Annotated[
    Literal["plain", "a1111"],
    Field(
        description="plain: prompts are read as they stand, up to the text encoder's length; a1111: (word:1.2), "
        "[word], BREAK, <lora:NAME:WEIGHT> and learnt words count, and long prompts are read in chunks"
    ),
]
SchedulerName = Literal["ddim", "dpm++", "euler", "euler_a", "heun", "unipc", "pndm", "lcm"]
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "dpm++": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "unipc": "UniPC",
    "pndm": "PLMS",
    "lcm": "LCM",
}
"""Our name of a sampler -> A1111's."""
HINTED = ("scheduler", "num_inference_steps", "guidance_scale")
FALLBACK: dict[str, Any] = {"scheduler": "ddim", "num_inference_steps": 25, "guidance_scale": 7.5}
LCM_STEPS = 50
"""Steps of the sampler that latent consistency models are distilled from, and so the most they can take."""
LORA_AXES = ("weight", "lora", "rank")
"""Axes of a grid that are no keys: the weight or rank of every LoRA, and the file of the first."""


# fmt: off
class LoraEntry(Config):
    """A LoRA to sample with."""

    path: str = Field(min_length=1, description="a LoRA file of any layout")
    weight: float = Field(1.0, description="factor on its update; 0: as without it, negative: away from it")
    blocks: dict[str, float] = Field({}, description="further factors by part: text_encoder, down_blocks, mid_block, up_blocks.1, or any beginning of a module's name; the longest counts")
    rank: int | None = Field(None, ge=1, description="cut it down to this rank by SVD; null: as it is")


class SamplingConfig(Config):
    """The keys that every script which samples has."""

    script: ClassVar[str]
    """The file that reads them."""
    headings: ClassVar[dict[str, str]] = {
        "pretrained_model_name_or_path": "Model",
        "width": "Size",
        "prompt_syntax": "Prompts and sampler",
        "grid": "Grid",
        "output_dir": "Output",
    }

    pretrained_model_name_or_path: str = Field("ckpt/miniature", min_length=1, description="base model: diffusers folder, hub id or single .safetensors file")
    base_config: BaseConfig = None
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field("auto", description="dtype of U-Net and text encoder; auto: fp16 on a CUDA GPU, float32 elsewhere. The VAE is float32")
    prediction_type: PredictionType = None
    clip_skip: ClipSkip = None
    loras: tuple[LoraEntry, ...] = Field((), description="LoRAs, whose updates add up")
    model_dirs: tuple[str, ...] = Field(("ckpt",), description="folders, and what is below them, with the LoRAs that prompts name as <lora:NAME:WEIGHT>; --from looks there for LoRAs, bases and ControlNets too")
    embedding_dirs: tuple[str, ...] = Field((), description="folders of words learnt by textual inversion (.safetensors of diffusers, A1111 or kohya), which stand in prompts by the file's name or by their own, as words beside a LoRA do; needs prompt_syntax a1111")

    width: int | None = Field(None, ge=8, description="pixels; null: the base's own resolution, near the aspect of a picture that is restyled")
    height: int | None = Field(None, ge=8, description="pixels; give both or neither")

    prompt_syntax: PromptSyntax = "plain"
    negative_prompt: str = Field("", description="of no effect at guidance 1")
    scheduler: SchedulerName | None = Field(None, description="sampler; null: as the LoRA's file asks for, else ddim")
    num_inference_steps: int | None = Field(None, ge=1, le=999, description="steps; null: as the LoRA's file asks for, else 25")
    guidance_scale: float | None = Field(None, ge=1, description="classifier-free guidance, which doubles the work above 1; null: as the LoRA's file asks for, else 7.5")
    seed: int = Field(0, ge=0, lt=2**63, description="picture i of a prompt or input has the noise of seed + i, whatever the batch")
    batch_size: int = Field(4, ge=1, description="pictures in one pass of the U-Net; halved by itself where memory runs out")

    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field({}, description='one or two axes of a sheet: a key of this config, "weight" or "rank" of every LoRA, or "lora" for the file of the first; the first axis runs to the right')

    output_dir: str = Field("out", min_length=1, description="where the folder of the run goes")
    name: str = Field("samples", pattern=r"^[^/\\\x00]+$", description="name of that folder")
    overwrite: bool = Field(False, description="replace what is in it")

    axes: ClassVar[tuple[str, ...]] = ("guidance_scale", "negative_prompt", "num_inference_steps", "scheduler")
    """Keys that a grid may vary."""
# fmt: on

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.name in (".", ".."):
            raise ValueError(f'name "{self.name}": names a folder that is in use; choose another')
        if (self.width is None) != (self.height is None):
            raise ValueError("width, height: give both or neither")
        if self.embedding_dirs and self.prompt_syntax == "plain":
            raise ValueError('embedding_dirs, prompt_syntax: learnt words are read with prompt_syntax "a1111"')
        if len(self.grid) > 2:
            raise ValueError("grid: a sheet has two axes at most")
        for axis, values in self.grid.items():
            if axis not in (*LORA_AXES, *self.axes):
                raise ValueError(f"grid: {axis} is no axis; choose {', '.join((*LORA_AXES, *self.axes))}")
            if axis in LORA_AXES and not self.loras:
                raise ValueError(f"grid, loras: the axis {axis} needs a LoRA in loras")
            for value in values:
                try:
                    self.at(axis, value)
                except ValidationError as error:
                    reason = error.errors(include_url=False)[0]["msg"]
                    raise ValueError(f"grid: {axis} cannot be {json.dumps(value)}: {reason}") from None
        return self

    def at(self, axis: str, value: Any) -> Self:
        """This config at a value of an axis, without its grid.

        Raises:
            ValidationError: the config cannot have that value.
        """
        data = self.model_dump(mode="json") | {"grid": {}}
        if axis == "lora":
            data["loras"][0]["path"] = value
        elif axis in LORA_AXES:
            data["loras"] = [lora | {axis: value} for lora in data["loras"]]
        else:
            data[axis] = value
        return type(self).model_validate_json(json.dumps(data))

    def cells(self) -> list[list[Self]]:
        """The config of every cell of the grid, row by row; a single one without a grid."""
        (across, columns), (down, rows) = (*self.grid.items(), ("", ()), ("", ()))[:2]
        starts = [self.at(down, value) for value in rows] or [self.model_copy(update={"grid": {}})]
        return [[start.at(across, value) for value in columns] or [start] for start in starts]

    def numbered_cells(self) -> list[tuple[tuple[int, int], Self]]:
        """Every cell with its (row, column)."""
        cells = self.cells()
        return [((i, j), cell) for i, row in enumerate(cells) for j, cell in enumerate(row)]

    def sampler(self) -> tuple[str, int, float]:
        """Scheduler, steps and guidance of a resolved config."""
        assert self.scheduler and self.num_inference_steps and self.guidance_scale, "not resolved"
        return self.scheduler, self.num_inference_steps, self.guidance_scale

    def own_texts(self) -> dict[str, str]:
        """By their keys, the words of a picture's own, in which pictures of one batch may differ."""
        return {"prompt": str(getattr(self, "prompt", ""))}

    def prompt_loras(self) -> tuple[LoraEntry, ...]:
        """Those that the prompt of a picture names, by their files.

        Raises:
            UserError: marks that cannot be read, or no such file.
        """
        prompt = getattr(self, "prompt", None)
        if self.prompt_syntax == "plain" or not isinstance(prompt, str):
            return ()
        entries = []
        for lora in read_marks(prompt).loras:
            same = lora.text_encoder == lora.unet
            blocks = {} if same else {"text_encoder": lora.text_encoder / lora.unet}
            path = find_lora(lora.name, self.model_dirs)
            entries.append(LoraEntry(path=path, weight=lora.unet, blocks=blocks, rank=None))
        return tuple(entries)

    def axis_labels(self) -> tuple[list[str], list[str]]:
        """Texts above the columns and beside the rows of the grid."""
        axes = [[f"{axis} {word}" for word in _words(axis, values)] for axis, values in self.grid.items()]
        return (*axes, [], [])[0], (*axes, [], [])[1]

    def resolved(self) -> tuple[Self, list[str]]:
        """With a value for each of HINTED: its own, a LoRA's or the fallback; and what was taken from whom.

        Raises:
            UserError: a LoRA's file cannot be read, its hints are not usable, LCM would take too many steps, or
                what `prompt_loras`, `weights_of` and `check_blocks` raise.
        """
        hints, notes = {}, []
        loras = (*self.loras, *self.prompt_loras())
        weights_of(loras)
        for lora in loras:
            if lora.blocks:
                check_blocks(lora, layer_names(read_header(_existing(lora.path))[0]))
        at_work = [lora.path for lora in loras if lora.weight]
        for path in at_work:
            asked, who, note = asked_of(path)
            notes += note
            for key, value in asked.items():
                if getattr(self, key) is None and key not in hints:
                    hints[key] = value
                    notes.append(f"{key} {value}, as {who} asks for")
                elif (value_here := getattr(self, key) or hints.get(key)) != value:
                    notes.append(f"{key} {value_here}, although {who} asks for {value}")
        notes += clip_skip_notes(self.clip_skip, at_work)
        unset = {key: value for key, value in (FALLBACK | hints).items() if getattr(self, key) is None}
        cfg = self.model_copy(update=unset)
        if cfg.scheduler == "lcm" and cfg.sampler()[1] > LCM_STEPS:
            raise UserError(
                f"num_inference_steps {cfg.num_inference_steps}: lcm takes {LCM_STEPS} at most; lower it, or "
                "choose another scheduler"
            )
        return cfg, notes


def _words(axis: str, values: Sequence[Any]) -> list[str]:
    """Values as labels: texts as they are, files by their stem and, where that is shared, by their folder."""
    if axis != "lora":
        return [value if isinstance(value, str) else json.dumps(value) for value in values]
    paths = [Path(value) for value in values]
    stems = [path.stem for path in paths]
    return [
        path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in paths
    ]


# ---- LoRAs ----


def weights_of(loras: Iterable[LoraEntry]) -> dict[tuple[str, int | None], tuple[float, Mapping[str, float]]]:
    """(path, rank) -> weight and blocks; the weights of one that is named twice add up.

    Raises:
        UserError: one named twice has blocks.
    """
    found: dict[tuple[str, int | None], tuple[float, Mapping[str, float]]] = {}
    for lora in loras:
        before, blocks = found.get((lora.path, lora.rank), (0.0, {}))
        if blocks or (lora.blocks and (lora.path, lora.rank) in found):
            raise UserError(f"loras: {lora.path} is named twice, with blocks; name it once")
        found[lora.path, lora.rank] = before + lora.weight, lora.blocks
    return found


def check_blocks(lora: LoraEntry, layers: Sequence[str]) -> None:
    """Whether each name in blocks is the beginning of a layer's that the LoRA changes.

    Args:
        layers: as `layer_names`; of a file that numbers its modules there are none, and nothing is known.

    Raises:
        UserError: it has no such part.
    """
    for block in lora.blocks if layers else ():
        if not any(f"{layer}.".startswith(f"{block}.") for layer in layers):
            parts = sorted({".".join(layer.split(".")[:2]) for layer in layers})
            raise UserError(f"loras: blocks: {lora.path} has nothing in {block}; it has {', '.join(parts)}")


def _existing(path: str) -> Path:
    """The file of a LoRA. Raises UserError: there is none."""
    if not Path(path).exists():
        raise UserError(f"loras: {path}: there is no such file; train it with train_lora.py, or set loras=[]")
    return lora_path(path)


def read_hints(path: str) -> dict[str, Any]:
    """The sampler that a LoRA was trained for, out of its metadata; empty for most files.

    Raises:
        UserError: the file cannot be read, or the hints are no values of HINTED.
    """
    text = read_header(_existing(path))[1].get(HINTS_KEY)
    if text is None:
        return {}
    try:
        hints = json.loads(text)
        SamplingConfig.model_validate_json(json.dumps(hints))
        return {key: hints[key] for key in HINTED if hints.get(key) is not None}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its {HINTS_KEY} is not usable ({text[:80]})") from error


def asked_of(path: str) -> tuple[dict[str, Any], str, list[str]]:
    """What a LoRA asks for by its metadata, or else by its name; who that is; what a user should know.

    Raises:
        UserError: as read_hints.
    """
    if own := read_hints(path):
        return own, path, []
    found = few_steps(path)
    if found is None:
        return {}, path, []
    if found.sure:
        return found.hints(), f"“{found.text}”, by its name for few steps,", []
    settings = " ".join(f"{key}={value}" for key, value in found.hints().items())
    return {}, path, [f"{path}: if “{found.word}” means that it is for few steps, set {settings}"]


def check_size(cfg: SamplingConfig, info: BaseInfo) -> None:
    """Refuse a size that the base cannot make, and a layer that it has not.

    Raises:
        UserError: sides that do not divide; clip_skip.
    """
    check_clip_skip(info, cfg.clip_skip)
    if faults := size_faults(cfg, info):
        raise UserError("\n".join(faults))


def shape_of(cfg: SamplingConfig, info: BaseInfo, path: str) -> tuple[int, int]:
    """Width and height at which a picture is worked on: those that are set, or near its own aspect."""
    if cfg.width and cfg.height:
        return cfg.width, cfg.height
    return assign_shapes([image_size(path)], info.resolution, info.size_multiple, True)[0]


def size_faults(cfg: SamplingConfig, info: BaseInfo) -> list[str]:
    """A line for each side that does not divide."""
    faults, unit = [], info.size_multiple
    for key, side in (("width", cfg.width), ("height", cfg.height)):
        if side is not None and side % unit:
            low = side // unit * unit
            near = " or ".join(str(each) for each in (low, low + unit) if each)
            faults.append(f"{key} {side}: must divide by {unit} for this base; take {near}")
    return faults
