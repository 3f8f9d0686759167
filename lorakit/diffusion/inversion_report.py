"""What is looked at of inversions: a table of likeness and cost, a sheet of reconstructions, the report."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from lorakit.diffusion.inversion_plan import InvertConfig
from lorakit.diffusion.metrics import ssim
from lorakit.pictures.images import psnr
from lorakit.pictures.sheet import contact_sheet


@dataclass(frozen=True)
class Row:
    """One line of the table; the definitions are in the report. None: not finite, or equal pictures."""

    method: str
    guidance_scale: float
    psnr: float | None
    ssim: float | None
    psnr_to_vae: float | None
    ssim_to_vae: float | None
    inversion_evaluations: int
    sampling_evaluations: int
    inversion_seconds: float
    sampling_seconds: float
    noise_mean: float
    noise_std: float


DEFINITIONS = {
    "psnr": "dB against the picture as the model sees it; null: not finite",
    "ssim": "structural similarity (Wang et al. 2004) against the picture",
    "psnr_to_vae": "dB against the picture's VAE round trip; null: equal to it, or not finite",
    "ssim_to_vae": "structural similarity against the picture's VAE round trip",
    "inversion_evaluations": "of the U-Net for one row; guidance above 1 takes two, null_text also gradients",
    "sampling_evaluations": "the same, for the way back",
    "noise_mean": "of the noise latents; 0 in what the model was trained on",
    "noise_std": "of the noise latents; 1 in what the model was trained on",
}
HEADER = (
    "method       guidance    PSNR    SSIM  to VAE: PSNR    SSIM  evaluations  seconds  noise mean     std"
)


def likeness(image: Image.Image | None, other: Image.Image) -> tuple[float | None, float | None]:
    """PSNR and SSIM; PSNR is None for equal pictures, both are without a picture."""
    if image is None:
        return None, None
    ratio = psnr(image, other)
    return ratio if math.isfinite(ratio) else None, ssim(image, other)


def scores(ratio: float | None, similarity: float | None) -> str:
    if similarity is None:
        return f"{'-':>8}{'-':>8}"
    return f"{'equal' if ratio is None else f'{ratio:.2f}':>8}{similarity:8.4f}"


def show(row: Row) -> str:
    """The row under HEADER."""
    return (
        f"{row.method:12}{row.guidance_scale:9g}{scores(row.psnr, row.ssim)}"
        f"{scores(row.psnr_to_vae, row.ssim_to_vae):>22}"
        f"{f'{row.inversion_evaluations} + {row.sampling_evaluations}':>13}"
        f"{row.inversion_seconds + row.sampling_seconds:9.1f}{row.noise_mean:12.3f}{row.noise_std:8.3f}"
    )


def sheet(
    cfg: InvertConfig,
    results: Sequence[tuple[Row, Image.Image | None]],
    picture: Image.Image,
    round_trip: Image.Image,
) -> Image.Image:
    """All reconstructions: a row for each guidance, a column for each method, below the picture itself."""
    found = {(row.guidance_scale, row.method): (row, image) for row, image in results}
    images: list[list[Image.Image | None]] = [[picture, round_trip]]
    captions = [["the picture", f"VAE round trip, {psnr(picture, round_trip):.1f} dB"]]
    for scale in cfg.guidance_scales:
        cells = [found.get((scale, method), (None, None)) for method in cfg.methods]
        images.append([image for _, image in cells])
        named = zip(cfg.methods, cells, strict=True)
        captions.append(
            [f"{method} {row.psnr:.1f} dB" if row and row.psnr else "" for method, (row, _) in named]
        )
    labels = ["input", *(f"guidance {scale:g}" for scale in cfg.guidance_scales)]
    title = f"There and back in {cfg.num_inference_steps} steps; PSNR to the picture"
    return contact_sheet(images, captions=captions, row_labels=labels, title=title)


def make_report(
    cfg: InvertConfig,
    size: tuple[int, int],
    device: str,
    bound: tuple[float | None, float | None],
    rows: Sequence[Row],
) -> dict[str, Any]:
    """What report.json holds; `bound` is the likeness of the VAE's round trip, which no inversion passes."""
    return {
        "config": cfg.model_dump(mode="json"),
        "width": size[0],
        "height": size[1],
        "device": device,
        "vae_round_trip": dict(zip(("psnr", "ssim"), bound, strict=True)),
        "rows": [asdict(row) for row in rows],
        "definitions": DEFINITIONS,
    }
