"""The keys of edit.py. No torch here."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lorakit.diffusion.inversion_plan import Solver
from lorakit.sampling.config import LoraEntry, SamplingConfig, SchedulerName

Method = Literal["swap", "imagic", "sdedit"]
DRAWS = ("imagic", "sdedit")
"""Methods that begin with noise of a seed; the others have the picture's own."""
FALLBACK: dict[str, Any] = {"scheduler": "ddim", "num_inference_steps": 50}
GUIDANCE, GUIDANCE_WITH_NOISE = 1.0, 3.0
"""Where guidance_scale is null: on the picture's own path; and where a LoRA or fresh noise wants more."""


# fmt: off
class PictureConfig(SamplingConfig):
    """The keys that scripts which change one picture share."""

    headings: ClassVar[dict[str, str]] = SamplingConfig.headings | {"image": "Picture", "lora": "LoRA of the picture"}

    scheduler: SchedulerName | None = Field(None, description="null or ddim, on whose path a picture is edited")
    num_inference_steps: int | None = Field(None, ge=1, le=999, description="steps, of the inversion and of the edit alike; null: 50")
    solver: Solver = Field("ddim", description="of both; ab2: two-step Adams-Bashforth, of second order")

    image: str = Field(min_length=1, description="the picture")
    prompt: str = Field("", description="what it shows")
    mask: str | None = Field(None, min_length=1, description="picture of the same size, white where the result may change, or as the page of drag.py saves it; outside of it the result is what the autoencoder makes of the picture, to the bit; null: anywhere")

    lora: str | None = Field(None, min_length=1, description="a LoRA fitted to the picture, which keeps photographs what they are; null: none")
    lora_weight: float = Field(1.0, description="factor on its update")
    train_if_missing: bool = Field(False, description="fit it, if there is no such file yet, by train_lora.py with fit_config")
    fit_config: str = Field("cfg/edit/fit.json", min_length=1, description="training config for it")
    cache_dir: str | None = Field(None, description="inverted paths by content; null: <output_dir>/cache")
# fmt: on

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        if self.scheduler not in (None, "ddim"):
            raise ValueError(f'scheduler "{self.scheduler}": a picture is edited on the path of ddim; leave it out')
        if self.name == "cache":
            raise ValueError('name "cache": names a folder that is in use; choose another')
        return self

    def all_loras(self) -> tuple[LoraEntry, ...]:
        """Those that take part in every result: that of the picture, and the others."""
        own = LoraEntry(path=self.lora, weight=self.lora_weight, blocks={}, rank=None) if self.lora else None
        return (*([own] if own else []), *self.loras)


# fmt: off
class EditConfig(PictureConfig):
    """The keys of a config of edit.py."""

    script: ClassVar[str] = "edit.py"
    headings: ClassVar[dict[str, str]] = PictureConfig.headings | {"target_prompt": "Edit", "eta": "Imagic"}

    guidance_scale: float | None = Field(None, ge=1, description="classifier-free guidance, of the picture and the results alike, which doubles the work above 1; null: 1, or 3 where the picture's LoRA takes part and for imagic and sdedit")
    seed: int = Field(0, ge=0, lt=2**63, description="result i of a target has the noise of seed + i, where there is any")

    target_prompt: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="what the result shows: the prompt with other words; a list: several results at once")
    images_per_target: int = Field(1, ge=1, le=1000, description="results for each target, by seeds; swap draws nothing and has one")

    method: Method = Field("swap", description="swap: the prompt is swapped on the picture's own way from its noise, which is put right by what the picture itself misses it by; imagic: text states and a LoRA are fitted to the picture, and mixed with the target, for what words cannot swap; sdedit: fresh noise is laid on the picture")
    start: float = Field(0.0, ge=0, lt=1, description="share of the steps taken over from the picture: higher changes less")
    keep_below: float = Field(0.25, ge=0, lt=1, description="swap keeps the picture where the words move it less than this share of where they move it most; 0: nowhere")

    eta: float | None = Field(None, ge=0, le=2, description="share of the target in what imagic samples under: 0 the picture, 1 the target; null: 1")
    embed_steps: int = Field(50, ge=1, description="steps in which imagic's text states leave the target for the picture")
    embed_learning_rate: float = Field(2e-2, gt=0, description="of these steps, by Adam")
    embed_seed: int = Field(0, ge=0, lt=2**63, description="of what they draw")
    imagic_config: str = Field("cfg/edit/imagic/fit.json", min_length=1, description="training config for imagic's LoRA, which takes the place of fit_config")

    axes: ClassVar[tuple[str, ...]] = ("guidance_scale", "negative_prompt", "num_inference_steps", "solver", "prompt", "target_prompt", "method", "start", "lora_weight", "eta", "keep_below")
# fmt: on

    @model_validator(mode="after")
    def _agree(self) -> Self:
        targets = self.targets()
        if len(set(targets)) < len(targets):
            raise ValueError("target_prompt: one of them is there twice")
        if len(targets) > 1 and "target_prompt" in self.grid:
            raise ValueError("target_prompt, grid: give several targets in one of them")
        if self.images_per_target > 1 and self.method not in DRAWS:
            raise ValueError(f"images_per_target, method: {self.method} draws no noise, every seed is the same")
        if self.method == "imagic" and not self.lora:
            raise ValueError("method, lora: imagic fits a LoRA to the picture; name its file in lora")
        if self.method == "imagic" and "" in targets:
            raise ValueError("method, target_prompt: imagic begins with the target's words, and there are none")
        if self.eta is not None and self.method != "imagic":
            raise ValueError(f"eta, method: {self.method} mixes no text states; eta is of imagic")
        if "imagic" in self.grid.get("method", ()):
            raise ValueError("grid, method: imagic has a LoRA of its own for each target; run it by itself")
        return self

    def targets(self) -> tuple[str, ...]:
        """The prompts of the results."""
        return (self.target_prompt,) if isinstance(self.target_prompt, str) else self.target_prompt

    def seeds(self) -> range:
        """One for each result of a target."""
        return range(self.seed, self.seed + (self.images_per_target if self.method in DRAWS else 1))

    def first_node(self) -> int:
        """Of the nodes 0 (noise) … n (picture) the one at which a resolved config begins."""
        return int(self.start * self.sampler()[1] + 0.5)

    def resolved(self) -> tuple[Self, list[str]]:
        """With a value for each key that is null and counts; no LoRA is asked for one."""
        more = self.method in DRAWS or (self.lora is not None and self.lora_weight != 0)
        own: dict[str, Any] = {"guidance_scale": GUIDANCE_WITH_NOISE if more else GUIDANCE}
        own |= {"eta": 1.0} if self.method == "imagic" else {}
        unset = {key: value for key, value in (FALLBACK | own).items() if getattr(self, key) is None}
        return self.model_copy(update=unset), []

    def single(self, target: str, seed: int) -> Self:
        """What makes one result and no other."""
        update: dict[str, Any] = {"target_prompt": target, "seed": seed, "images_per_target": 1}
        return self.model_copy(update=update)
