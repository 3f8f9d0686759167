"""How well each method finds the noise of a picture: a table of PSNR, SSIM, U-Net evaluations and seconds.

    python invert.py                                             # the mountain, on the embedded base
    python invert.py PICTURE.jpg prompt="a photo of a lake" lora=ckpt/lake.safetensors
    python invert.py cfg/invert/mountain.json num_inference_steps=20 methods='["ddim", "anchored"]'

DDIM inversion (Song et al. 2021, https://arxiv.org/abs/2010.02502, sec. 4.3) and its relatives, which
lorakit/diffusion/inversion.py describes; inversion_pipeline.py is the same for programs. Reads a base, a
picture and a LoRA. Writes to <output_dir>/<name of the picture>/: a PNG for each reconstruction, sheet.png,
report.json.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorakit.ground.config import Config, parse_command
from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.ground.publish import check_writable, publish_file
from lorakit.pictures.images import IMAGE_SUFFIXES, image_size, psnr, read_picture, save_png
from lorakit.pictures.views import assign_shapes
from lorakit.weights.base import BaseInfo, inspect_base
from lorakit.weights.base_settings import ClipSkip, PredictionType, check_clip_skip, clip_skip_notes
from lorakit.weights.tensors import read_header

if TYPE_CHECKING:  # help and faults of the command line come without torch
    from PIL.Image import Image

    from inversion_pipeline import InversionPipeline

Method = Literal["ddim", "fixed_point", "obelm", "null_text", "anchored"]


class InvertConfig(Config):
    """The keys of an inversion's config."""

    headings: ClassVar[dict[str, str]] = {
        "image": "Picture",
        "pretrained_model_name_or_path": "Model",
        "num_inference_steps": "Inversion",
        "output_dir": "Output",
    }

    image: str = Field("dataset/mountain/mountain.jpg", min_length=1, description="the picture")
    prompt: str = Field("", description="what it shows")
    negative_prompt: str = Field("", description="of no effect at guidance 1")
    width: int | None = Field(
        None, ge=16, description="pixels; null: near the picture's own aspect at the base's area"
    )
    height: int | None = Field(None, ge=16, description="pixels; give both or neither")
    pretrained_model_name_or_path: str = Field(
        "ckpt/miniature",
        min_length=1,
        description="base model: diffusers folder, hub id or single .safetensors file",
    )
    prediction_type: PredictionType = None
    clip_skip: ClipSkip = None
    lora: str | None = Field(None, description="a LoRA file, such as one fitted to the picture; null: none")
    lora_weight: float = Field(1.0, description="factor on the LoRA's update")
    num_inference_steps: int = Field(50, ge=1, le=999, description="DDIM steps, there and back alike")
    guidance_scales: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (1.0, 3.0), min_length=1, description="classifier-free guidance; above 1 doubles the work"
    )
    methods: tuple[Method, ...] = Field(
        ("ddim", "fixed_point", "obelm", "null_text", "anchored"),
        min_length=1,
        description="null_text is left out at guidance 1, where it is ddim",
    )
    output_dir: str = Field("out/invert", min_length=1, description="where the folder of the picture goes")

    @model_validator(mode="after")
    def _agree(self):
        if (self.width is None) != (self.height is None):
            raise ValueError("width, height: give both or neither")
        if set(self.methods) == {"null_text"} and max(self.guidance_scales) == 1:
            raise ValueError("methods, guidance_scales: null_text needs a guidance above 1")
        return self


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


def look(cfg: InvertConfig) -> tuple[BaseInfo, tuple[int, int]]:
    """What the base's files tell, and the size (width, height) at which it sees the picture. No torch.

    Raises:
        UserError: base, picture, LoRA or size cannot be used.
    """
    info = inspect_base(cfg.pretrained_model_name_or_path)
    check_clip_skip(info, cfg.clip_skip)
    size = image_size(cfg.image)
    if cfg.lora is not None:
        read_header(Path(cfg.lora))
    if cfg.width is None or cfg.height is None:
        return info, assign_shapes([size], info.resolution, info.size_multiple, True)[0]
    if info.known and (cfg.width % info.vae_factor or cfg.height % info.vae_factor):
        raise UserError(f"width, height: both must divide by the VAE's factor, {info.vae_factor}")
    return info, (cfg.width, cfg.height)


def pairs(cfg: InvertConfig) -> list[tuple[float, Method]]:
    """Every guidance with every method that it goes with."""
    scales = cfg.guidance_scales
    return [(scale, name) for scale in scales for name in cfg.methods if scale > 1 or name != "null_text"]


def load(cfg: InvertConfig, info: BaseInfo) -> "InversionPipeline":
    """The pipeline in float32, on a GPU where there is one, with the LoRA."""
    import torch

    from inversion_pipeline import InversionPipeline
    from lorakit.diffusion.lora import load_lora
    from lorakit.diffusion.models import Base, set_up_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_up_backend(device, allow_tf32=False)
    base = Base(info, device, prediction_type=cfg.prediction_type, clip_skip=cfg.clip_skip)
    pipe = InversionPipeline(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    if cfg.lora is not None:
        load_lora(cfg.lora, pipe.unet, pipe.text_encoder, adapter_name="lora", weight=cfg.lora_weight)
    return pipe


def measure(
    cfg: InvertConfig, pipe: "InversionPipeline", picture: "Image", round_trip: "Image"
) -> Iterator[tuple[Row, "Image | None"]]:
    """Invert and sample by each method; yields its line and the reconstruction, None if it is not finite."""
    evaluations = 0
    marks: list[tuple[int, float]] = []

    def count(_, inputs: Any) -> None:
        nonlocal evaluations
        evaluations += len(inputs[0])

    def mark() -> None:
        marks.append((evaluations, time.perf_counter()))

    hook = pipe.unet.register_forward_pre_hook(count)  # type: ignore[attr-defined]
    try:
        for scale, method in pairs(cfg):
            marks.clear()
            mark()
            options: Any = {"negative_prompt": cfg.negative_prompt, "method": method}
            options |= {"width": picture.width, "height": picture.height}
            (found,) = pipe.invert(picture, cfg.prompt, cfg.num_inference_steps, scale, **options)
            mark()
            latents = pipe.reconstruct(found)
            mark()
            image = pipe.decode_latents_to_pictures(latents)[0] if latents.isfinite().all() else None
            (e0, t0), (e1, t1), (e2, t2) = marks
            yield (
                Row(
                    method,
                    scale,
                    *likeness(image, picture),
                    *likeness(image, round_trip),
                    *(e1 - e0, e2 - e1),
                    *(t1 - t0, t2 - t1),
                    *(float(found.noise.mean()), float(found.noise.std())),
                ),
                image,
            )
    finally:
        hook.remove()


def likeness(image: "Image | None", other: "Image") -> tuple[float | None, float | None]:
    """PSNR and SSIM; PSNR is None for equal pictures, both are without a picture."""
    from lorakit.diffusion.metrics import ssim

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


def contact(
    cfg: InvertConfig,
    results: list[tuple[Row, "Image | None"]],
    picture: "Image",
    round_trip: "Image",
) -> "Image":
    """All reconstructions: a row for each guidance, a column for each method, below the picture itself."""
    from lorakit.pictures.sheet import contact_sheet

    found = {(row.guidance_scale, row.method): (row, image) for row, image in results}
    images: list[list[Image | None]] = [[picture, round_trip]]
    captions = [["the picture", f"VAE round trip, {psnr(picture, round_trip):.1f} dB"]]
    for scale in cfg.guidance_scales:
        cells = [found.get((scale, method), (None, None)) for method in cfg.methods]
        images.append([image for _, image in cells])
        scores = [row.psnr if row else None for row, _ in cells]
        captions.append(
            [
                f"{method} {score:.1f} dB" if score else ""
                for method, score in zip(cfg.methods, scores, strict=True)
            ]
        )
    labels = ["input", *(f"guidance {scale:g}" for scale in cfg.guidance_scales)]
    title = f"There and back in {cfg.num_inference_steps} steps; PSNR to the picture"
    return contact_sheet(images, captions=captions, row_labels=labels, title=title)


def invert(cfg: InvertConfig, info: BaseInfo, size: tuple[int, int], folder: Path) -> None:
    """Print the table, and write reconstructions, sheet and report."""
    picture = read_picture(cfg.image, size)
    pipe = load(cfg, info)
    round_trip = pipe.decode_latents_to_pictures(pipe.encode_image(picture, *size))[0]
    bound = likeness(round_trip, picture)
    print(f"{HEADER}\n{'VAE round trip':21}{scores(*bound)}", flush=True)
    save_png(picture, folder / "picture.png")
    save_png(round_trip, folder / "vae.png")
    results = []
    for row, image in measure(cfg, pipe, picture, round_trip):
        print(show(row), flush=True)
        if image is not None:
            save_png(image, folder / f"{row.method}_guidance_{row.guidance_scale:g}.png")
        results.append((row, image))
    save_png(contact(cfg, results, picture, round_trip), folder / "sheet.png")
    report = {
        "config": cfg.model_dump(mode="json"),
        "width": size[0],
        "height": size[1],
        "device": str(pipe.device),
        "vae_round_trip": dict(zip(("psnr", "ssim"), bound, strict=True)),
        "rows": [asdict(row) for row, _ in results],
        "definitions": DEFINITIONS,
    }
    publish_file(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())


def with_picture(argv: list[str]) -> list[str]:
    """`PICTURE` as `image=PICTURE`; what exists under its whole name, or has no =, is a file."""

    def names_picture(text: str) -> bool:
        is_file = "=" not in text or Path(text).is_file()
        return is_file and not text.startswith("-") and Path(text).suffix.lower() in IMAGE_SUFFIXES

    pictures = [text for text in argv if names_picture(text)]
    if len(pictures) > 1:
        raise UserError(f"{' and '.join(pictures)}: one picture at a time")
    return [f"image={json.dumps(text)}" if text in pictures else text for text in argv]


def main(argv: list[str]) -> int:
    argv = with_picture(argv)
    command = parse_command(
        InvertConfig,
        argv,
        prog="invert.py",
        description="Invert a picture by several methods and print how well each leads back to it.",
        # Its prompt is the mountain's; it does not go with another picture.
        default_config=None
        if any(text.startswith("image=") for text in argv)
        else "cfg/invert/mountain.json",
        epilog="`invert.py PICTURE` stands for `invert.py image=PICTURE`.",
    )
    cfg = command.config
    info, size = look(cfg)
    count = f"{len(pairs(cfg))} inversions in {cfg.num_inference_steps} steps"
    print(f"picture     {cfg.image} at {size[0]}x{size[1]}, {count}", flush=True)
    if max(cfg.guidance_scales) > 1 and cfg.prompt == cfg.negative_prompt:
        print("note        prompt and negative_prompt are the same, so that guidance changes nothing")
    for note in clip_skip_notes(cfg.clip_skip, [cfg.lora] if cfg.lora else []):
        print(f"note        {note}")
    if "check" in command.flags:
        return 0
    folder = Path(cfg.output_dir) / Path(cfg.image).stem
    check_writable(folder)
    invert(cfg, info, size, folder)
    print(f"wrote       {folder}: {len(pairs(cfg))} reconstructions, sheet.png, report.json")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
