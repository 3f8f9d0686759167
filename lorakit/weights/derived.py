"""LoRA files made of others: what they say of themselves, and how they are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.publish import publish_file
from lorakit.weights.lora_file import Layout, LoraPair, base_of, folded, lora_chunks
from lorakit.weights.lora_metadata import HINTS_KEY, mixed_metadata
from lorakit.weights.tensors import file_payload_sha256, read_header

if TYPE_CHECKING:  # faults of the command line come without torch
    import torch

    from lorakit.weights.mixing import Source


def refuse_existing(out: str, overwrite: bool) -> None:
    """Raises UserError where there is a file that is not to be replaced."""
    if Path(out).exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another name or set overwrite=true")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a config's word; None stays None."""
    import torch

    return {None: None, "float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def is_v2(modules: Mapping[str, LoraPair]) -> bool | None:
    """Whether a LoRA is for Stable Diffusion 2.x; None where its modules do not tell."""
    base = base_of(modules)
    return None if base is None else base == "Stable Diffusion 2.x"


def metadata_of_sum(
    out: str,
    sources: Sequence[Source],
    metadata: Sequence[Mapping[str, str]],
    modules: Mapping[str, LoraPair],
    suffix: str = "",
) -> dict[str, str]:
    """The metadata of the file `out`, whose modules are the weighted sum of the sources.

    Args:
        metadata: of the sources' files; `suffix` ends the formula by which the file names them.
    """
    formula = " + ".join(f"{weight:g} * {Path(path).name}" for path, _, weight in sources) + suffix
    facts = {
        "rank": max(pair.rank for pair in modules.values()),
        "alpha": next(iter(modules.values())).alpha,
        "is_v2": is_v2(modules),
    }
    told = [  # who is taken away says nothing of how the sum is sampled
        {key: value for key, value in own.items() if weight > 0 or key != HINTS_KEY}
        for (_, _, weight), own in zip(sources, metadata, strict=True)
    ]
    return mixed_metadata(name=Path(out).stem, formula=formula, sources=told, **facts)


def publish_lora(
    out: str,
    modules: Mapping[str, LoraPair],
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Writes a LoRA file and compares what lies on the disk with the hash of what was to be written.

    In the diffusers layout alpha is folded into lora_B.

    Raises:
        UserError, DivergedError: as `lora_chunks`.
        OutputError: it cannot be written, or reads otherwise.
    """
    if layout == "diffusers":  # its alpha stands in the metadata, which other programs do not read
        modules = folded(modules)
    pieces = lora_chunks(modules, layout=layout, dtype=dtype, metadata=metadata)

    def write(temp: Path) -> None:
        with temp.open("wb") as file:
            file.writelines(pieces)

    publish_file(out, write)
    if read_header(Path(out))[1]["sshs_model_hash"] != file_payload_sha256(Path(out)):
        raise OutputError(f"{out}: does not hold what was written; the disk may be faulty")
