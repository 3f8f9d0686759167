"""What each training objective needs, known before torch is imported: config, plan and checks ask here.

A new objective is a module with a Term (see objectives.py), one entry in KINDS, and, where it has settings, a
field of its name in TrainConfig that holds them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorakit.training.lcm_config import lcm_sampler
from lorakit.training.motion_config import EXCLUDED
from lorakit.training.prior_config import prior_prompts


@dataclass(frozen=True)
class Kind:
    """One objective.

    term            module of this package and name of the Term in it, imported when training starts
    alone           draws its own noisy rows, so that no other objective can share its pass
    teacher         evaluates the U-Net without its LoRA
    double_backward differentiates by the noise: attention without fused kernels, no fp16, no torch_compile
    prompts         text states that it needs besides the captions', from the whole config
    beside          goes with this objective, for alone it has nothing to learn
    among           goes alone, or with this objective among the others
    settings        what its settings must say, where it cannot do without them
    sampler         what its LoRAs are sampled with, from the whole config, if not as the base is
    anneals         needs a learning rate that ends near 0
    excludes        keys that must not be set beside it, and why
    """

    term: str
    alone: bool = False
    teacher: bool = False
    double_backward: bool = False
    prompts: Callable[[Any], tuple[str, ...]] | None = None
    beside: str | None = None
    among: str | None = None
    settings: str | None = None
    sampler: Callable[[Any], dict[str, Any]] | None = None
    anneals: bool = False
    excludes: tuple[tuple[str, str], ...] = ()


KINDS = {
    "denoise": Kind("denoise.Denoise"),
    "prior": Kind(
        "prior.Prior",
        teacher=True,
        prompts=prior_prompts,
        beside="denoise",
        settings="prompts of what must stay, or pictures of the class",
    ),
    "smooth": Kind("smooth.Smooth", double_backward=True, among="denoise"),
    "textual_inversion": Kind(
        "textual_inversion.TextualInversion", among="denoise", settings="the words to learn"
    ),
    "lcm": Kind(
        "lcm.Lcm",
        alone=True,
        teacher=True,
        prompts=lambda cfg: ("",),
        sampler=lcm_sampler,
        anneals=True,
        excludes=(
            ("snr_gamma", "weights the loss of denoise"),
            ("noise_offset", "makes noise that no sampler begins with"),
            ("train_text_encoder", "would part the student's text from the teacher's"),
        ),
    ),
    "motion": Kind(
        "motion.Motion",
        alone=True,
        settings="a motion_adapter, and a camera or clips",
        excludes=EXCLUDED,
    ),
}
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(KINDS)]


def names_of(objective: str | tuple[str, ...]) -> tuple[str, ...]:
    return (objective,) if isinstance(objective, str) else objective


def kinds_of(cfg: Any) -> list[Kind]:
    return [KINDS[name] for name in names_of(cfg.objective)]


def prompts_of(cfg: Any) -> tuple[str, ...]:
    """Prompts of the objectives, whose text states are cached beside those of the captions."""
    found = [prompt for kind in kinds_of(cfg) if kind.prompts for prompt in kind.prompts(cfg)]
    return tuple(dict.fromkeys(found))


def sampler_of(cfg: Any) -> dict[str, Any] | None:
    """Scheduler, num_inference_steps and guidance_scale of what is trained; None: those of the base."""
    return next((kind.sampler(cfg) for kind in kinds_of(cfg) if kind.sampler), None)


def check_objectives(cfg: Any) -> None:
    """Refuse objectives that cannot be trained together or with these settings.

    Raises:
        ValueError: names the keys that do not agree.
    """
    names = names_of(cfg.objective)
    if not names or len(set(names)) < len(names):
        raise ValueError("objective: name at least one, and each once")
    for name, kind in zip(names, kinds_of(cfg), strict=True):
        if kind.alone and len(names) > 1:
            others = " and ".join(other for other in names if other != name)
            raise ValueError(
                f'objective: "{name}" draws its own noisy latents and goes with no other ({others})'
            )
        if kind.beside and kind.beside not in names:
            raise ValueError(
                f'objective: "{name}" has nothing to learn by itself; write ["{kind.beside}", "{name}"]'
            )
        if kind.among and len(names) > 1 and kind.among not in names:
            raise ValueError(f'objective: "{name}" goes alone, or with "{kind.among}" among the others')
        if kind.settings and getattr(cfg, name) is None:
            raise ValueError(f'objective, {name}: "{name}" needs {kind.settings}; set {name}')
        for key, reason in kind.excludes:
            if getattr(cfg, key):
                raise ValueError(f'objective, {key}: {key} {reason}, and does not go with "{name}"')
        clashes = {
            "torch_compile": cfg.torch_compile,
            "enable_xformers_memory_efficient_attention": cfg.enable_xformers_memory_efficient_attention,
            "mixed_precision": cfg.mixed_precision == "fp16",
        }
        for key, on in clashes.items() if kind.double_backward else ():
            if on:
                raise ValueError(
                    f'objective, {key}: "{name}" differentiates twice, which {key} {getattr(cfg, key)!r} '
                    "does not allow"
                )
    for name in KINDS.keys() & type(cfg).model_fields.keys():
        if getattr(cfg, name) is not None and name not in names:
            raise ValueError(f'{name}, objective: settings of "{name}", which objective does not name')
