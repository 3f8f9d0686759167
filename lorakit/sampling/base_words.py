"""What a base with a closed vocabulary says of a picture: the caption by which it predicts noise best."""

from collections.abc import Sequence

import torch
from PIL import Image

from lorakit.diffusion.models import Base, evaluating
from lorakit.diffusion.paths import encode_picture
from lorakit.ground import randomness
from lorakit.sampling.samplers import encode_prompts
from lorakit.weights.vocabulary import Vocabulary

TIMESTEPS = (0.3, 0.45, 0.6, 0.75)
"""Of the schedule: where the scene is decided."""
DRAWS = 2
PASSES = 2


@torch.no_grad()
def told_by_base(base: Base, picture: Image.Image, vocabulary: Vocabulary) -> str:
    """The caption, one choice of each part of the vocabulary, of the lowest loss at fixed noise.

    Parts are chosen in turn, each with the others as they stand, PASSES times over.
    """
    latents = encode_picture(base, picture)
    schedule = base.noise_schedule()
    timesteps = torch.tensor(
        [int(share * schedule.num_timesteps) for share in TIMESTEPS for _ in range(DRAWS)]
    )
    noise = torch.cat(
        [randomness.normal(tuple(latents.shape), n, "base words") for n in range(len(timesteps))]
    )
    latents, noise = latents.expand(len(timesteps), -1, -1, -1), noise.to(latents)
    noisy, target = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)

    def loss(words: Sequence[str]) -> float:
        states = encode_prompts(base, [vocabulary.start + "".join(words)]).expand(len(timesteps), -1, -1)
        with evaluating(base.unet):
            output = base.unet(noisy.to(base.dtype), timesteps.to(base.device), states).sample
        return float((output.float() - target).square().mean())

    chosen = [options[0] for options in vocabulary.parts]
    for _ in range(PASSES):
        for number, options in enumerate(vocabulary.parts):
            tried = {option: loss([*chosen[:number], option, *chosen[number + 1 :]]) for option in options}
            chosen[number] = min(tried, key=tried.__getitem__)
    return "".join(chosen)
