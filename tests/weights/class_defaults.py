"""The defaults of diffusers' and transformers' classes, as JSON.

python tests/weights/class_defaults.py > lorakit/weights/published/class_defaults.json
"""

import inspect
import json
from typing import Any

MODELS = ("AutoencoderKL", "ControlNetModel", "UNet2DConditionModel")
SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler"),
    *("PNDMScheduler", "UniPCMultistepScheduler"),
)
# What a noise schedule is a function of; the rest of a scheduler's config is about sampling.
SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)


def class_defaults() -> dict[str, dict[str, Any]]:
    import diffusers
    from transformers import CLIPTextConfig, PreTrainedConfig

    found = {name: signature(getattr(diffusers, name)) for name in MODELS}
    shared = signature(PreTrainedConfig)
    own = signature(CLIPTextConfig)
    found["CLIPTextModel"] = {key: own[key] for key in own if key not in shared}
    for name in SCHEDULERS:
        own = signature(getattr(diffusers, name))
        found[name] = {key: own[key] for key in SCHEDULE if key in own}
    return json.loads(json.dumps(dict(sorted(found.items()))))


def signature(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.name not in ("self", "kwargs")}


if __name__ == "__main__":
    rows = (f" {json.dumps(name)}: {json.dumps(own)}" for name, own in class_defaults().items())
    print("{\n" + ",\n".join(rows) + "\n}")
