"""What can be said in numbers about a morph: likeness, sharpness, and how evenly it changes.

Images are PIL RGB pictures; tensors of images are (N, 3, H, W) in [-1, 1]. DEFINITIONS holds one sentence for
every name that a report prints.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from lorakit.diffusion.models import Base
from lorakit.ground.errors import UserError
from lorakit.pictures.images import from_array, to_array

DistanceName = Literal["vae", "lpips"]

DEFINITIONS: dict[str, str] = {
    "endpoint_psnr": "PSNR in dB of the first or last frame against its input picture as the model sees it.",
    "endpoint_ssim": "SSIM (Wang et al. 2004) of the first or last frame against its input picture.",
    "endpoint_psnr_to_vae": "PSNR in dB of the first or last frame against its picture's VAE round trip.",
    "vae_psnr": "PSNR in dB of the VAE round trip against the picture: the bound of endpoint_psnr.",
    "path_length": "Sum of the steps, a step being the distance between neighbouring frames.",
    "directness": "path_length over the direct distance of the ends; 1 is a straight path, more is a detour.",
    "step_variance": "Variance of the steps (PDV of DiffMorpher); depends on the scale of the distance.",
    "step_cv": "Standard deviation of the steps over their mean; 0 is even speed, on any scale.",
    "smoothness": "1 - Gini coefficient of the steps (AID); 1 is even speed.",
    "max_over_mean": "The largest step over the mean step; 1 is even speed, more is a jump.",
    "max_over_min": "The largest step over the smallest; 1 is even speed.",
    "largest_step_at": "The position in the middle of the largest step: where the jump is.",
    "middle_sharpness": "Mean relative sharpness of the middle third of the frames: the standard deviation of"
    " the Laplacian over the one interpolated from the two pictures; below 1 is blur.",
    "pixel_std": "Standard deviation of neighbouring frames' root mean square difference, in levels of 255"
    " (ISTD of Smooth Diffusion but for its scale).",
    "noise_mean": "Mean of an inverted latent; 0 in what the model was trained on.",
    "noise_std": "Standard deviation of an inverted latent; 1 in what the model was trained on.",
    "residual_ratio": "Mean norm of the anchored residual over the norm of the sampling step it corrects.",
}


# Pictures


def ssim(a: Image, b: Image) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), the mean of the three RGB channels' values.

    Gaussian window 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, population covariance; only where the
    window lies inside the picture. 1 for equal pictures.
    """
    assert a.size == b.size, f"pictures of different sizes: {a.size} and {b.size}"
    assert min(a.size) >= 11, f"{a.size} is smaller than the window of 11 pixels"
    x, y = (np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1) for image in (a, b))  # (3, H, W)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def local_mean(values: np.ndarray) -> np.ndarray:
        for axis in (-1, -2):
            values = np.lib.stride_tricks.sliding_window_view(values, 11, axis) @ window  # valid: 10 shorter
        return values

    mu_x, mu_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mu_x**2, local_mean(y * y) - mu_y**2
    covariance = local_mean(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def sharpness(image: Image) -> float:
    """Standard deviation of the Laplacian (3x3, four neighbours) of luma, in grey levels of 255.

    The usual variance of the Laplacian (Pech-Pacheco et al. 2000) is squared contrast: at half the contrast
    it falls to a quarter, so that its ratios overstate blur. The root is linear in contrast.
    """
    y = np.asarray(image.convert("RGB"), np.float64) @ (0.299, 0.587, 0.114)  # (H, W), Rec. 601
    neighbours = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:]
    return float((neighbours - 4 * y[1:-1, 1:-1]).std())


def relative_sharpness(
    frames: Sequence[Image], positions: Sequence[float], pictures: Sequence[Image]
) -> list[float]:
    """Each frame's sharpness over what its place between two pictures promises.

    Args:
        positions: of the frames, in [0, S].
        pictures: the S + 1 pictures at 0, 1, ..., S, in a closed film the first one once more at the end.
            Between two of them their sharpness is interpolated by a straight line.
    """
    at_pictures = [sharpness(picture) for picture in pictures]
    promised = np.interp(positions, np.arange(len(pictures)), at_pictures)
    found = [sharpness(frame) for frame in frames]
    # What is flat cannot lose sharpness.
    return [float(s / p) if p else 1.0 for s, p in zip(found, promised, strict=True)]


def middle_third(values: Sequence[float]) -> float:
    """Mean of the middle third of one segment's values (of 17: numbers 5 to 11)."""
    third = len(values) // 3
    return float(np.mean(values[third : len(values) - third]))


def pixel_std(frames: Sequence[Image]) -> float:
    """Standard deviation of the root mean square difference of neighbours, in levels of 255.

    As ISTD in Smooth Diffusion (Guo et al. 2024, sec. 4.1), which takes the sum of squares, not the mean.
    """
    arrays = [np.asarray(frame.convert("RGB"), np.float64) for frame in frames]
    steps = [np.sqrt(((b - a) ** 2).mean()) for a, b in zip(arrays[:-1], arrays[1:], strict=True)]
    return float(np.std(steps))


def cross_fade(a: Image, b: Image, alphas: Sequence[float]) -> list[Image]:
    """(1 - alpha) a + alpha b, pixel by pixel: the floor of every morph."""
    x, y = to_array(a), to_array(b)
    return [from_array((1 - alpha) * x + alpha * y) for alpha in alphas]


# Paths


def path_metrics(
    distances: Sequence[float], direct: float, positions: Sequence[float]
) -> dict[str, float | None]:
    """Length and evenness of a path by the names of DEFINITIONS; None where a ratio is over zero.

    Args:
        distances: the steps, from each frame to the next.
        direct: distance between the first and the last frame; over several segments, the sum of each one's.
        positions: of the frames, one more than steps.
    """
    steps = np.asarray(distances, np.float64)
    assert len(positions) == len(steps) + 1 >= 2, f"{len(steps)} steps, {len(positions)} positions"
    assert np.isfinite(steps).all() and (steps >= 0).all(), "a step is negative or not finite"
    n, mean, largest = len(steps), float(steps.mean()), int(steps.argmax())
    differences = float(np.abs(steps[:, None] - steps).sum())
    gini = _ratio(differences, 2 * n * n * mean)
    return {
        "path_length": float(steps.sum()),
        "directness": _ratio(float(steps.sum()), direct),
        "step_variance": float(steps.var()),
        "step_cv": _ratio(float(steps.std()), mean),
        "smoothness": None if gini is None else 1 - gini,
        "max_over_mean": _ratio(float(steps.max()), mean),
        "max_over_min": _ratio(float(steps.max()), float(steps.min())),
        "largest_step_at": (positions[largest] + positions[largest + 1]) / 2,
    }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 and np.isfinite(a / b) else None


# Perceptual distance


class FeatureDistance:
    """Distance between pictures as the distance between features of a network, level by level.

    d(a, b)^2 = sum over levels of the mean over places of |f(a) - f(b)|^2, with f normalised to unit length
    over the channels as in LPIPS (Zhang et al. 2018, eq. 1) and weighted by the subclass. We take the root:
    that is a metric, so no path is shorter than the direct distance, and lengths hardly depend on the number
    of frames. LPIPS itself, and the PPL and PDV that papers make of it, are squares.

    Pictures go through the network one at a time: the result does not depend on who else is in the batch, and
    memory not on their number.
    """

    def levels(self, image: Tensor) -> list[Tensor]:
        """Weighted features of one image (1, 3, H, W), each level (1, C, h, w)."""
        raise NotImplementedError

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] -> the levels (N, C, h, w), on the CPU in float16.

        Its rounding changed the steps of a cross-fade, 0.12 long, by 2e-6.
        """
        assert images.ndim == 4 and images.shape[1] == 3, f"(N, 3, H, W) is expected, not {images.shape}"
        # Contiguous, since `matrix` flattens them.
        rows = [
            [level.to("cpu", torch.float16).contiguous() for level in self.levels(image[None])]
            for image in images
        ]
        return [torch.cat(level) for level in zip(*rows, strict=True)]

    def between(self, f: list[Tensor], g: list[Tensor]) -> Tensor:
        """(N,) float64 of each row of `f` to the same row of `g`, or to its only one."""
        squared = torch.zeros(len(f[0]), dtype=torch.float64)
        for a, b in zip(f, g, strict=True):
            assert len(b) in (1, len(a)), f"{len(a)} rows against {len(b)}"
            places = a.shape[2] * a.shape[3]
            for i, row in enumerate(a):  # one by one: in float32 a level of all rows is large
                difference = row.float() - b[i % len(b)].float()
                squared[i] += difference.square().sum(dtype=torch.float64) / places
        return squared.sqrt()

    def matrix(self, f: list[Tensor]) -> Tensor:
        """(N, N) float64 of every row to every row."""
        squared = torch.zeros(len(f[0]), len(f[0]), dtype=torch.float64)
        for level in f:
            places = level.shape[2] * level.shape[3]
            for part in level.flatten(1).split(1 << 16, dim=1):
                part = part.double()
                part = part - part.mean(dim=0)  # distances stay, and the dot products below cancel less
                dot = part @ part.T
                norm = dot.diagonal()
                squared += (norm[:, None] + norm - 2 * dot) / places
        return squared.clamp(min=0).fill_diagonal_(0).sqrt()


class EncoderDistance(FeatureDistance):
    """Distance in the encoder of the base's VAE, which is in memory anyway: no download. The default.

    The levels are the outputs of its down blocks, with equal weights that sum to 1. `conv_in` is left out: a
    linear filter of the pixels that would take more memory than all others together. At 512 pixels SD 1.5's
    take 34 MB a picture.
    """

    def __init__(self, base: Base):
        self.base = base

    def levels(self, image: Tensor) -> list[Tensor]:
        encoder = self.base.vae.encoder
        x = image.to(self.base.device, torch.float32).contiguous(memory_format=torch.channels_last)
        x = encoder.conv_in(x)
        found = []
        for block in encoder.down_blocks:
            x = block(x)
            found.append(_unit(x) / len(encoder.down_blocks) ** 0.5)
        return found


class LpipsDistance(FeatureDistance):
    """The root of LPIPS 0.1 with AlexNet (Zhang et al. 2018), from the package lpips; square it to publish.

    Raises:
        UserError: the package is missing, or the weights of its trunk are and cannot be downloaded.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        other = "or set distance to vae, which needs no download"
        try:
            import lpips  # pyright: ignore[reportMissingImports]  # optional
        except ImportError:
            raise UserError(f"distance lpips needs the package lpips: pip install lpips; {other}") from None
        try:
            with warnings.catch_warnings():  # lpips names the weights in torchvision's old way
                warnings.filterwarnings(
                    "ignore", "The parameter 'pretrained'|Arguments other than a weight enum"
                )
                network = lpips.LPIPS(net="alex", verbose=False)
            self.network: Any = network.to(device).requires_grad_(False).eval()
        except Exception as error:  # urllib, the disk and torch.load raise a dozen kinds here
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"distance lpips: AlexNet's weights cannot be loaded ({reason}). They are fetched on first"
                " use: run once with a network, or copy alexnet-owt-7be5be79.pth to "
                f"{torch.hub.get_dir()}/checkpoints; {other}"
            ) from None
        self.device = device

    def levels(self, image: Tensor) -> list[Tensor]:
        x = self.network.scaling_layer(image.to(self.device, torch.float32))
        # The weight of a channel is the one 1x1 convolution of its level, never negative.
        weights = [level.model[-1].weight.clamp(min=0).sqrt() for level in self.network.lins]  # (1, C, 1, 1)
        return [_unit(f) * w for f, w in zip(self.network.net(x), weights, strict=True)]


def make_distance(name: DistanceName, base: Base) -> FeatureDistance:
    """The distance of that name, on the base's device."""
    assert name in get_args(DistanceName), name
    return EncoderDistance(base) if name == "vae" else LpipsDistance(base.device)


def _unit(features: Tensor) -> Tensor:
    """Unit length over the channels; what is zero stays zero."""
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)
