"""The settings of prior: what must stay as it is while a subject is learnt. No torch here."""

from typing import Any

from pydantic import Field, model_validator

from lorakit.ground.config import Config
from lorakit.ground.errors import UserError
from lorakit.sampling.prompt_file import read_prompt_file

SUBJECT = "{}"  # in a prompt file, stands for the subject


# fmt: off
class PriorSettings(Config):
    """What must stay is said by prompts, or shown by pictures of the class."""

    weight: float = Field(1.0, gt=0, description="of this part of the loss")
    every: int = Field(2, ge=1, description="every how many samples one carries the prior, with as many times the weight; 1: each, at 2.2 times the cost of a step")
    prompts: tuple[str, ...] = Field((), description="prompts under which the model shall answer as it does without its LoRA; eight that differ do far more than two")
    prompt_file: str | None = Field(None, min_length=1, description="text file of such prompts, one a line; # begins a comment, {} stands for subject")
    subject: str | None = Field(None, min_length=1, description="what {} in prompt_file stands for, such as dog")
    class_data_dir: str | None = Field(None, min_length=1, description="instead of prompts (DreamBooth): pictures of the class that the subject is one of, read as data_dir is")
    class_prompt: str | None = Field(None, min_length=1, description="the class in words, such as a photo of a dog: caption of all pictures in class_data_dir; without that folder, pictures of it are made by the base and cached")
    class_images: int = Field(100, ge=1, description="how many pictures of class_prompt are made")

    @model_validator(mode="after")
    def _agree(self):
        ways = {
            "prompts": self.prompts, "prompt_file": self.prompt_file,
            "class_data_dir or class_prompt": self.class_data_dir or self.class_prompt,
        }
        given = [name for name, value in ways.items() if value]
        if len(given) != 1:
            raise ValueError(f"say what must stay by one of prompts, prompt_file, and class_data_dir or class_prompt; here are {' and '.join(given) or 'none'}")
        if any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("prompts: one is empty; leave it out")
        if self.subject and not self.prompt_file:
            raise ValueError("subject, prompt_file: the subject stands in prompts of prompt_file")
        return self
# fmt: on


def prior_prompts(cfg: Any) -> tuple[str, ...]:
    """The prompts under which the model shall stay as it is; none where pictures show it.

    Raises:
        UserError: prompt_file cannot be read, or its lines do not agree with `subject`.
    """
    settings: PriorSettings = cfg.prior
    if settings.prompt_file is None:
        return settings.prompts
    path, subject = settings.prompt_file, settings.subject
    lines = read_prompt_file(path)
    for line in lines:
        if line.settings:
            raise UserError(f"{path}: line {line.number}: prior.prompt_file takes prompts without options")
        if SUBJECT in line.prompt and subject is None:
            raise UserError(f"{path}: line {line.number}: has {SUBJECT}; say what it is with prior.subject")
    if subject and not any(SUBJECT in line.prompt for line in lines):
        raise UserError(f"prior.subject: no line of {path} has {SUBJECT}; leave subject out")
    return tuple(dict.fromkeys(line.prompt.replace(SUBJECT, subject or "") for line in lines))
