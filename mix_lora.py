"""Verbs on LoRA files: mix, scale, resize, convert, inspect, compare, merge into a base, extract.

    python mix_lora.py mix a.safetensors=0.7 b.safetensors=-0.3 out=c.safetensors method=svd rank=16
    python mix_lora.py merge ckpt/miniature a.safetensors=0.8 out=ckpt/merged

delta = sum_i w_i * (alpha_i / r_i) * B_i @ A_i in all of them. Reads LoRA files of every layout, writes one
LoRA file or a base. The maths is in lorakit/weights/mixing.py; docs/MIXING.md has measured errors and
times.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.ground.errors import UserError
from lorakit.ground.process import run_guarded
from lorakit.ground.publish import publish_file
from lorakit.weights.adapter_config import lora_path
from lorakit.weights.derived import is_v2, metadata_of_sum, publish_lora, refuse_existing, torch_dtype
from lorakit.weights.lora_file import LoraFile, LoraPair, component_of, folded, is_vector
from lorakit.weights.lora_metadata import converted_metadata, training_config_text
from lorakit.weights.programs import read_by
from lorakit.weights.tensors import read_header
from lorakit.weights.verbs import (
    Convert,
    Extract,
    Files,
    Folder,
    Mix,
    Output,
    Resize,
    Retrain,
    Table,
    overview,
    parse_verb,
)

if TYPE_CHECKING:  # help and faults of the command line come without torch
    from lorakit.weights.mixing import Mixed, Source


# ---- verbs ----


def inspect(cfg: Table, files: Files) -> None:
    from lorakit.weights.lora_report import describe

    for path, _ in files:
        file = read(path)
        print("\n".join(describe(lora_path(path), file, each=cfg.modules)))


def diff(cfg: Table, files: Files) -> None:
    from lorakit.weights.lora_report import compare
    from lorakit.weights.mixing import check_same_base

    first, second = (read(path) for path, _ in files)
    check_same_base(
        [(path, file.modules, 1.0) for (path, _), file in zip(files, (first, second), strict=True)]
    )
    print("\n".join(compare(first, second, each=cfg.modules)))


def mix(cfg: Mix, files: Files) -> None:
    from lorakit.weights import mixing

    sources, metadata = read_sources(files)
    options = {"rank": cfg.rank, "energy": cfg.energy, "density": cfg.density, "seed": cfg.seed}
    mixed = mixing.mix(sources, cfg.method, **options, dtype=torch_dtype(cfg.dtype))
    save(cfg, mixed.modules, metadata_of_sum(cfg.out, sources, metadata, mixed.modules, f" ({cfg.method})"))
    print(error_line(mixed, is_projection=cfg.method == "svd"))


def scale(cfg: Output, files: Files) -> None:
    from lorakit.weights.mixing import scaled

    if files[0][1] is None:
        raise UserError(f"say by what: {files[0][0]}=0.5")
    sources, metadata = read_sources(files)
    modules = scaled(sources[0][1], sources[0][2])
    save(cfg, modules, metadata_of_sum(cfg.out, sources, metadata, modules))


def resize(cfg: Resize, files: Files) -> None:
    from lorakit.weights import mixing
    from lorakit.weights.lora_report import rank_span

    sources, metadata = read_sources(files)
    mixed = mixing.mix(sources, "svd", rank=cfg.rank, energy=cfg.energy, dtype=torch_dtype(cfg.dtype))
    save(cfg, mixed.modules, metadata_of_sum(cfg.out, sources, metadata, mixed.modules, " (svd)"))
    ranks = [pair.rank for pair in mixed.modules.values()]
    print(f"rank        {rank_span(ranks)}, {sum(ranks) / len(ranks):.1f} on average")
    print(error_line(mixed, is_projection=True))


def convert(cfg: Convert, files: Files) -> None:
    from lorakit.weights.lora_import import KEPT_ENERGY

    path = files[0][0]
    file = read(path, cfg.rank, cfg.energy or (None if cfg.rank else KEPT_ENERGY))
    if (cfg.rank or cfg.energy) and file.layout not in ("loha", "lokr", "whole"):
        raise UserError(
            f"rank and energy are for LoHa, LoKr and whole weights, {path} is {file.layout}: use resize"
        )
    if cfg.format == "kohya" and any(pair.magnitude is not None for pair in file.modules.values()):
        raise UserError(
            f"{files[0][0]}: is DoRA, which kohya's readers drop or reinterpret; set format=diffusers"
        )
    modules = folded(file.modules) if cfg.fold_alpha else file.modules
    alphas = {(component_of(name), pair.alpha) for name, pair in modules.items() if not is_vector(name)}
    if cfg.format == "kohya" and len(alphas) > len({component for component, _ in alphas}):
        print(
            "note        alpha differs between modules, which diffusers 0.42 misreads in kohya's layout: "
            "`mix` of this one file writes one alpha, format=diffusers tells them apart"
        )
    save(cfg, modules, converted_metadata(file.metadata, is_v2=is_v2(modules)))


def merge(cfg: Folder, files: Files) -> None:
    from lorakit.weights import merging

    sources, _ = read_sources(files[1:], energy=1.0)
    options = {"overwrite": cfg.overwrite, "base_config": cfg.base_config}
    done = merging.merge(files[0][0], sources, Path(cfg.out), **options)
    for name in done.left_out:
        print(f"left out    {name}: it holds the base without the LoRA")
    dtypes = ", ".join(sorted(done.dtypes))
    print(f"rounding    to {dtypes}: {done.error():.2e} of the change (relative Frobenius)")
    print(f"wrote       {cfg.out} ({', '.join(done.rewritten)} changed)")


def extract(cfg: Extract, files: Files) -> None:
    import torch

    from lorakit.weights import extracting

    (base, _), (tuned, _) = files
    refuse_existing(cfg.out, cfg.overwrite)
    dtype = torch_dtype(cfg.dtype) or torch.float32
    options = {"rank": cfg.rank, "energy": cfg.energy, "targets": cfg.targets, "dtype": dtype}
    options["biases"] = cfg.biases
    found = extracting.extract(base, tuned, **options, base_config=cfg.base_config)
    modules = found.mixed.modules
    formula = f"{Path(tuned).name} - {Path(base).name}"
    save(cfg, modules, metadata_of_sum(cfg.out, [], [], modules, formula))
    print(error_line(found.mixed, is_projection=True))
    inside = sum(total for _, total in found.mixed.squares.values())
    share = found.outside / (inside + found.outside)
    print(
        f"outside     {share:.2%} of the whole change's energy lies in other tensors and is not in the LoRA"
    )


def retrain(cfg: Retrain, files: Files) -> None:
    path = files[0][0]
    text = training_config_text(path, read_header(lora_path(path))[1])
    print("note        of absolute paths only the last part was kept: check data_dir", file=sys.stderr)
    if cfg.out is None:
        print(text, end="")
        return
    refuse_existing(cfg.out, cfg.overwrite)
    publish_file(cfg.out, text.encode())
    print(f"wrote       {cfg.out}; train it with `python train_lora.py {cfg.out}`")


RUN: dict[str, Callable[[Any, Files], None]] = {
    run.__name__: run for run in (inspect, mix, scale, resize, convert, merge, extract, diff, retrain)
}
"""By the names of VERBS."""


# ---- files ----


def read(path: str, rank: int | None = None, energy: float | None = None) -> LoraFile:
    """A LoRA file of any layout; what was done to read it is printed."""
    from lorakit.weights.lora_import import read_any

    file, notes = read_any(path, rank, energy)
    print("".join(f"note        {path}: {note}\n" for note in notes), end="")
    return file


def read_sources(files: Files, energy: float | None = None) -> tuple[list["Source"], list[Mapping[str, str]]]:
    """Modules and weights of LoRA files, and the metadata of each."""
    loaded = [(path, read(path, energy=energy), 1.0 if weight is None else weight) for path, weight in files]
    return [(path, file.modules, weight) for path, file, weight in loaded], [
        file.metadata for _, file, _ in loaded
    ]


def save(cfg: Output, modules: Mapping[str, LoraPair], metadata: Mapping[str, str]) -> None:
    refuse_existing(cfg.out, cfg.overwrite)
    publish_lora(cfg.out, modules, layout=cfg.format, dtype=torch_dtype(cfg.dtype), metadata=metadata)
    print(f"wrote       {cfg.out} ({Path(cfg.out).stat().st_size / 1e6:.2f} MB, {len(modules)} modules)")
    print(f"read by     {read_by(modules, cfg.format)}")


def error_line(mixed: "Mixed", *, is_projection: bool) -> str:
    """How far the result is from the exact sum, over all and in the worst module."""

    def words(error: float) -> str:
        return f"{error:.2e}" + (f", kept energy {1 - error**2:.4%}" if is_projection else "")

    worst = mixed.worst()
    whole, most = words(mixed.error()), words(mixed.error(worst))
    return f"error       {whole} (relative Frobenius); worst {most} in {worst}"


def check(name: str, cfg: Any, files: Files) -> None:
    """Reads the LoRA files and looks whether they fit together and the output is free."""
    from lorakit.weights.mixing import check_same_base

    if getattr(cfg, "out", None):
        refuse_existing(cfg.out, cfg.overwrite)
    skipped = {"merge": 1, "extract": 2}.get(name, 0)
    sources, _ = read_sources(files[skipped:])
    if name in ("mix", "merge", "diff"):
        check_same_base(sources)
    print(f"checked     {len(sources)} LoRA files can be read")


def main(argv: list[str]) -> int:
    name, *rest = argv or [""]
    if name in ("", "-h", "--help"):
        print(overview())
        return 0 if name else 2
    command, files = parse_verb(name, rest)
    if "check" in command.flags:
        check(name, command.config, files)
    else:
        RUN[name](command.config, files)
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
