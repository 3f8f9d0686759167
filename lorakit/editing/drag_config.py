"""The keys of drag.py. No torch here."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lorakit.editing.config import FALLBACK, GUIDANCE, PictureConfig

Place = tuple[float, float]
DragMethod = Literal["warp", "drag"]
START: dict[str, float] = {"warp": 0.8, "drag": 0.3}
"""Where `start` is null."""


# fmt: off
class DragConfig(PictureConfig):
    """The keys of a config of drag.py."""

    script: ClassVar[str] = "drag.py"
    headings: ClassVar[dict[str, str]] = PictureConfig.headings | {"points": "Drag", "feature_block": "Optimisation, of method drag"}

    guidance_scale: float | None = Field(None, ge=1, description="classifier-free guidance, of the picture and the result alike, which doubles the work above 1; null: 1")
    seed: int = Field(0, ge=0, lt=2**63, description="of no effect: a drag draws no noise")

    points: Annotated[tuple[tuple[Place, Place], ...], Field(max_length=64)] = Field((), description="handle and target of each way, [[[x0, y0], [x1, y1]], …], in pixels of the picture from its upper left corner; `--page PICTURE` points with the mouse")
    method: DragMethod = Field("warp", description="warp: the pixels are moved, and the model makes good what that leaves, from a late step of the picture's own way from its noise; drag: DragDiffusion, the latents of an early step are optimised until the features of the handle are found at the target")
    kind: Literal["move", "stretch"] = Field("move", description="of warp: move what lies within `radius` of a handle, and fill its place from around; or stretch all between the mask's edge and the target")
    radius: float | None = Field(None, gt=0, description="of the thing about a handle, pixels of the picture; null: two thirds of the way from the handle to the mask's edge, or without a mask a sixteenth of the shorter side")
    start: float | None = Field(None, ge=0, lt=1, description="share of the steps taken over from the picture: higher changes less; null: 0.8, for drag 0.3")
    noise: Literal["moved", "own"] = Field("moved", description="of move: the picture's own noise, which is moved along with the thing or stays")
    reference_attention: bool = Field(True, description="self-attention of the up blocks looks at keys and values of the picture instead of the result's own")

    feature_block: int = Field(-2, description="up block of the U-Net whose features are followed; from the end, so that it is the same level in every base")
    iterations: int = Field(60, ge=0, le=10_000, description="at most")
    learning_rate: float = Field(0.03, gt=0, description="of Adam, on the latents")
    mask_weight: float = Field(0.1, ge=0, description="lambda: how hard the latents of the next step are held to the picture's outside of the mask")
    motion_radius: int = Field(1, ge=0, le=64, description="of the patch that is moved one step at a time, in cells of half the picture")
    track_radius: int = Field(3, ge=1, le=64, description="about the last place of a handle in which it is looked for, in cells of half the picture")

    axes: ClassVar[tuple[str, ...]] = ("guidance_scale", "negative_prompt", "num_inference_steps", "solver", "prompt", "lora_weight", "method", "kind", "radius", "start", "noise", "reference_attention", "feature_block", "iterations", "learning_rate", "mask_weight", "motion_radius", "track_radius")
# fmt: on

    @model_validator(mode="after")
    def _can_be_meant(self) -> Self:
        handles = [handle for handle, _ in self.points]
        if len(set(handles)) < len(handles):
            raise ValueError("points: two ways begin at the same handle; give it one target")
        return self

    def first_node(self) -> int:
        """Of the nodes 0 (noise) … n (picture) the one at which a resolved config begins."""
        assert self.start is not None, "not resolved"
        return int(self.start * self.sampler()[1] + 0.5)

    def resolved(self) -> tuple[Self, list[str]]:
        """With a value for each key of the sampler and the start that is null."""
        defaults: dict[str, Any] = FALLBACK | {"guidance_scale": GUIDANCE, "start": START[self.method]}
        return self.model_copy(
            update={key: value for key, value in defaults.items() if getattr(self, key) is None}
        ), []
