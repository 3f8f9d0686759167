"""The forward process of a diffusion model, its three parameterisations, and DDIM, in float64.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                     (Ho et al. 2020, eq. 4)
v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0                     (Salimans & Ho 2022, sec. 4)
SNR_t = alpha_bar_t / (1 - alpha_bar_t)

DDIM (Song et al. 2021, eq. 12 with sigma = 0) is the deterministic sampler of all that must be inverted, by
itself or in steps of second order. Its grid is made here, whatever sampler a base ships: PNDM in SD 1.5
evaluates one timestep twice.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.diffusion.inversion_plan import Solver
from lorakit.ground.errors import UserError

WIDEST = 2.0
"""Of two neighbouring steps' widths, the ratio by which a multistep method extrapolates at most."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Grid:
    """The nodes of a deterministic sampler, noisiest first, and how it steps from one to the next.

    `timesteps`: n integers. `alpha_bar`: n + 1 numbers, the last one that of the clean end, where nothing is
    evaluated: alpha_bar_0, as Stable Diffusion's `set_alpha_to_one: false` has it.
    """

    timesteps: tuple[int, ...]
    alpha_bar: tuple[float, ...]
    solver: Solver = "ddim"

    def __len__(self) -> int:
        return len(self.timesteps)

    def along(self, i: int, epsilon: Tensor, before: Tensor | None) -> Tensor:
        """What step i goes along: for ddim, and for the first step of a path, `epsilon`.

        ab2 is two-step Adams-Bashforth in the log-SNR: eps_i + r / 2 (eps_i - eps_{i-1}), r =
        min(h_i / h_{i-1}, 2), h the widths of the steps; an exponential multistep method of second order, as
        DPM-Solver's (Lu et al. 2022, arXiv:2206.00927).

        Args:
            epsilon: at node i; `before` at node i - 1.
        """
        if before is None or self.solver == "ddim":
            return epsilon
        last, here, next_ = (math.log(a / (1 - a)) for a in self.alpha_bar[i - 1 : i + 2])
        ratio = min((next_ - here) / (here - last), WIDEST)
        return epsilon + ratio / 2 * (epsilon - before)

    def backwards(self) -> "Grid":
        """The same nodes from the picture to the noise: what is evaluated at the clean end is timestep 0."""
        timesteps = 0, *reversed(self.timesteps[1:])
        return replace(self, timesteps=timesteps, alpha_bar=self.alpha_bar[::-1])

    def after(self, first: int) -> "Grid":
        """The nodes from `first` on."""
        return replace(self, timesteps=self.timesteps[first:], alpha_bar=self.alpha_bar[first:])

    def nodes(self, stride: int) -> list[int]:
        """Every `stride`-th node, from the noise on, and the clean end."""
        return [*range(0, len(self), stride), len(self)]

    def coarse(self, stride: int) -> "Grid":
        """The grid of these nodes: fewer steps through points that this grid passes too."""
        nodes = self.nodes(stride)
        timesteps = tuple(self.timesteps[i] for i in nodes[:-1])
        return replace(self, timesteps=timesteps, alpha_bar=tuple(self.alpha_bar[i] for i in nodes))


def ddim_step(latents: Tensor, epsilon: Tensor, alpha_bar_from: float, alpha_bar_to: float) -> Tensor:
    """Moves latents from one noise level to another along `epsilon`, in either direction.

    sqrt(a_to) (x - sqrt(1 - a_from) eps) / sqrt(a_from) + sqrt(1 - a_to) eps, with a = alpha_bar.
    """
    keep = math.sqrt(alpha_bar_to / alpha_bar_from)
    return keep * latents + (math.sqrt(1 - alpha_bar_to) - keep * math.sqrt(1 - alpha_bar_from)) * epsilon


@dataclass(frozen=True)
class NoiseSchedule:
    """`alpha_bar`: (T,) float64 on the CPU, the share of signal variance left at each timestep.

    `timesteps` are CPU tensors everywhere here, so that no coefficient makes a GPU wait.
    """

    alpha_bar: Tensor
    prediction_type: str = "epsilon"

    @classmethod
    def from_scheduler(cls, scheduler, prediction_type: str | None = None) -> "NoiseSchedule":
        """Take the betas of any diffusers scheduler, whatever it samples with (PNDM in SD 1.5)."""
        alpha_bar = torch.cumprod(1.0 - scheduler.betas.double(), dim=0)
        return cls(alpha_bar, prediction_type or scheduler.config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)

    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like`: (B, 1, 1, 1)."""
        a = self.alpha_bar[timesteps].view(-1, *[1] * (like.ndim - 1))
        return a.sqrt().to(like), (1 - a).sqrt().to(like)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x_0 `latents` (B, C, h, w), `noise` of the same shape and `timesteps` (B,)."""
        signal, sigma = self.at(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the U-Net is asked to predict, (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self.at(timesteps, latents)
        return signal * noise - sigma * latents

    def predicted(self, output: Tensor, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 and eps that a U-Net's `output` (B, C, h, w) at `timesteps` (B,) stands for."""
        signal, sigma = self.at(timesteps, x_t)
        if self.prediction_type == "v_prediction":
            return signal * x_t - sigma * output, signal * output + sigma * x_t
        if self.prediction_type == "sample":
            return output, (x_t - signal * output) / sigma
        return (x_t - sigma * output) / signal, output

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio, (B,) float64."""
        a = self.alpha_bar[timesteps]
        return a / (1 - a)

    def grid(self, steps: int, solver: Solver = "ddim") -> Grid:
        """The DDIM grid of Stable Diffusion: evenly spaced from timestep 1 on ("leading", offset 1)."""
        if not 1 <= steps < self.num_timesteps:
            raise UserError(
                f"{steps} steps: a schedule of {self.num_timesteps} takes 1 to {self.num_timesteps - 1}"
            )
        spacing = self.num_timesteps // steps
        timesteps = tuple(i * spacing + 1 for i in reversed(range(steps)))
        levels = *(float(self.alpha_bar[t]) for t in timesteps), float(self.alpha_bar[0])
        return Grid(timesteps, levels, solver)

    def epsilon(self, output: Tensor, latents: Tensor, timestep: int) -> Tensor:
        """The noise that a U-Net's `output` (B, C, h, w) stands for, whatever it predicts."""
        signal, sigma = (
            float(x) for x in (self.alpha_bar[timestep].sqrt(), (1 - self.alpha_bar[timestep]).sqrt())
        )
        if self.prediction_type == "v_prediction":
            return signal * output + sigma * latents
        if self.prediction_type == "sample":
            return (latents - signal * output) / sigma
        return output
