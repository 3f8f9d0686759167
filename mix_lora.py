"""Verbs on LoRA files: mix, scale, resize, convert, inspect, compare, merge into a base, extract.

    python mix_lora.py mix a.safetensors=0.7 b.safetensors=-0.3 out=c.safetensors method=svd rank=16
    python mix_lora.py merge ckpt/miniature a.safetensors=0.8 out=ckpt/merged

delta = sum_i w_i * (alpha_i / r_i) * B_i @ A_i in all of them. Reads LoRA files of every layout, writes one
LoRA file or a base folder. The maths is in lorakit/weights/mixing.py; docs/MIXING.md has measured errors and times.
"""

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from lorakit.ground.config import Config, parse_command
from lorakit.ground.errors import OutputError, UserError
from lorakit.ground.process import run_guarded
from lorakit.ground.publish import publish_file
from lorakit.weights.lora_file import LoraFile, LoraPair, base_of, component_of, lora_chunks
from lorakit.weights.lora_metadata import converted_metadata, mixed_metadata
from lorakit.weights.tensors import file_payload_sha256, read_header

if TYPE_CHECKING:  # help and faults of the command line come without torch
    from lorakit.weights.mixing import Mixed, Source


# fmt: off
class Table(Config):
    modules: bool = Field(True, description="a line per module too")


class Output(Config):
    out: str = Field(description="LoRA file to write", pattern=r"\.safetensors$")
    overwrite: bool = Field(False, description="replace it if it exists")
    format: Literal["kohya", "diffusers"] = Field("kohya", description="kohya is read by diffusers, ComfyUI and A1111; diffusers is PEFT's")
    dtype: Literal["float32", "fp16", "bf16"] | None = Field(None, description="of the tensors; null: as in the files, the wider one where they differ")


class Truncated(Output):
    rank: int | None = Field(None, ge=1, description="rank of each module at most")
    energy: float | None = Field(None, gt=0, le=1, description="share of the squared singular values to keep in each module")


class Mix(Truncated):
    method: Literal["exact", "svd", "ties", "dare", "linear"] = Field("exact", description="exact: concatenate, ranks add up; svd: the exact sum at a lower rank; ties, dare: rules on sparse deltas, at a lower rank; linear: add the factors, for comparison")
    density: float = Field(0.5, gt=0, le=1, description="share of entries that ties and dare keep")
    seed: int = Field(0, ge=0, lt=2**63, description="of dare")

    @model_validator(mode="after")
    def _rank_has_a_use(self) -> "Mix":
        if self.method in ("exact", "linear") and (self.rank or self.energy):
            raise ValueError(f"rank and energy do not go with method {self.method}; choose method svd")
        return self


class Resize(Truncated):
    @model_validator(mode="after")
    def _has_a_size(self) -> "Resize":
        if self.rank is None and self.energy is None:
            raise ValueError("give rank, energy or both")
        return self


class Extract(Resize):
    targets: Literal["attention", "attention+ff", "all"] = Field("all", description="modules: attention projections; with feed-forward and projections; with convolutions")


class Folder(Config):
    out: str = Field(description="base folder to write")
    overwrite: bool = Field(False, description="replace it if it is a base folder")


class Retrain(Config):
    out: str | None = Field(None, description="config file to write; null: print it", pattern=r"\.json$")
    overwrite: bool = Field(False, description="replace it if it exists")
# fmt: on


Files = list[tuple[str, float | None]]
"""Path and weight in the order of the command line; None where no weight is given."""


# ---- verbs ----


def inspect(cfg: Table, files: Files) -> None:
    from lorakit.weights.lora_report import describe

    for path, _ in files:
        file = read(path)
        print("\n".join(describe(Path(path), file, each=cfg.modules)))


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
    save(cfg, mixed.modules, of_sources(cfg, sources, metadata, mixed.modules, f" ({cfg.method})"))
    print(error_line(mixed, is_projection=cfg.method == "svd"))


def scale(cfg: Output, files: Files) -> None:
    from lorakit.weights.mixing import scaled

    if files[0][1] is None:
        raise UserError(f"say by what: {files[0][0]}=0.5")
    sources, metadata = read_sources(files)
    modules = scaled(sources[0][1], sources[0][2])
    save(cfg, modules, of_sources(cfg, sources, metadata, modules))


def resize(cfg: Resize, files: Files) -> None:
    from lorakit.weights import mixing

    sources, metadata = read_sources(files)
    mixed = mixing.mix(sources, "svd", rank=cfg.rank, energy=cfg.energy, dtype=torch_dtype(cfg.dtype))
    save(cfg, mixed.modules, of_sources(cfg, sources, metadata, mixed.modules, " (svd)"))
    ranks = sorted(pair.rank for pair in mixed.modules.values())
    print(f"rank        {ranks[0]} to {ranks[-1]}, {sum(ranks) / len(ranks):.1f} on average")
    print(error_line(mixed, is_projection=True))


def convert(cfg: Truncated, files: Files) -> None:
    file = read(files[0][0], cfg.rank, cfg.energy)
    if (cfg.rank or cfg.energy) and file.layout not in ("loha", "lokr"):
        raise UserError(f"rank and energy are for LoHa and LoKr, {files[0][0]} is {file.layout}: use resize")
    if cfg.format == "kohya" and any(pair.magnitude is not None for pair in file.modules.values()):
        raise UserError(
            f"{files[0][0]}: is DoRA, which kohya's readers drop or reinterpret; set format=diffusers"
        )
    alphas = {(component_of(name), pair.alpha) for name, pair in file.modules.items()}
    if cfg.format == "kohya" and len(alphas) > len({component for component, _ in alphas}):
        print(
            "note        alpha differs between modules, which diffusers 0.42 misreads in kohya's layout: "
            "`mix` of this one file writes one alpha, format=diffusers tells them apart"
        )
    save(cfg, file.modules, converted_metadata(file.metadata, is_v2=is_v2(file.modules)))


def merge(cfg: Folder, files: Files) -> None:
    from lorakit.weights import merging

    sources, _ = read_sources(files[1:])
    done = merging.merge(files[0][0], sources, Path(cfg.out), overwrite=cfg.overwrite)
    for name in done.left_out:
        print(f"left out    {name}: it holds the base without the LoRA")
    dtypes = ", ".join(sorted(done.dtypes))
    print(f"rounding    to {dtypes}: {done.error():.2e} of the change (relative Frobenius)")
    print(f"wrote       {cfg.out} ({', '.join(done.rewritten)} changed)")


def extract(cfg: Extract, files: Files) -> None:
    import torch

    from lorakit.weights import merging

    (base, _), (tuned, _) = files
    refuse_existing(cfg.out, cfg.overwrite)
    dtype = torch_dtype(cfg.dtype) or torch.float32
    options = {"rank": cfg.rank, "energy": cfg.energy, "targets": cfg.targets, "dtype": dtype}
    found = merging.extract(base, tuned, **options)
    modules = found.mixed.modules
    formula = f"{Path(tuned).name} - {Path(base).name}"
    save(cfg, modules, of_sources(cfg, [], [], modules, formula))
    print(error_line(found.mixed, is_projection=True))
    inside = sum(total for _, total in found.mixed.squares.values())
    share = found.outside / (inside + found.outside)
    print(
        f"outside     {share:.2%} of the whole change's energy lies in other tensors and is not in the LoRA"
    )


def retrain(cfg: Retrain, files: Files) -> None:
    path = files[0][0]
    _, metadata = read_header(Path(path))
    if "lorakit.config" not in metadata:
        raise UserError(
            f"{path}: holds no training config; only files that train_lora.py wrote do, mixes do not"
        )
    try:
        text = json.dumps(json.loads(metadata["lorakit.config"]), indent=2, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise UserError(f"{path}: its training config is no JSON ({error})") from error
    print("note        of absolute paths only the last part was kept: check data_dir", file=sys.stderr)
    if cfg.out is None:
        print(text, end="")
        return
    refuse_existing(cfg.out, cfg.overwrite)
    publish_file(cfg.out, text.encode())
    print(f"wrote       {cfg.out}; train it with `python train_lora.py {cfg.out}`")


# ---- files ----


def read(path: str, rank: int | None = None, energy: float | None = None) -> LoraFile:
    """A LoRA file of any layout; what was done to read it is printed."""
    from lorakit.weights.lora_import import read_any

    file, notes = read_any(path, rank, energy)
    print("".join(f"note        {path}: {note}\n" for note in notes), end="")
    return file


def read_sources(files: Files) -> tuple[list["Source"], list[Mapping[str, str]]]:
    """Modules and weights of LoRA files, and the metadata of each."""
    loaded = [(path, read(path), 1.0 if weight is None else weight) for path, weight in files]
    return [(path, file.modules, weight) for path, file, weight in loaded], [
        file.metadata for _, file, _ in loaded
    ]


def of_sources(
    cfg: Output,
    sources: list["Source"],
    metadata: list[Mapping[str, str]],
    modules: Mapping[str, LoraPair],
    suffix: str = "",
) -> dict[str, str]:
    """The metadata of a file made of others."""
    formula = " + ".join(f"{weight:g} * {Path(path).name}" for path, _, weight in sources) + suffix
    first = next(iter(modules.values()))
    facts = {
        "rank": max(pair.rank for pair in modules.values()),
        "alpha": first.alpha,
        "is_v2": is_v2(modules),
    }
    return mixed_metadata(name=Path(cfg.out).stem, formula=formula, sources=metadata, **facts)


def is_v2(modules: Mapping[str, LoraPair]) -> bool:
    return base_of(modules) == "Stable Diffusion 2.x"


def save(cfg: Output, modules: Mapping[str, LoraPair], metadata: Mapping[str, str]) -> None:
    """Publishes the file and compares what lies on the disk with the hash of what was to be written."""
    refuse_existing(cfg.out, cfg.overwrite)
    pieces = lora_chunks(modules, layout=cfg.format, dtype=torch_dtype(cfg.dtype), metadata=metadata)

    def write(temp: Path) -> None:
        with temp.open("wb") as file:
            file.writelines(pieces)

    publish_file(cfg.out, write)
    if read_header(Path(cfg.out))[1]["sshs_model_hash"] != file_payload_sha256(Path(cfg.out)):
        raise OutputError(f"{cfg.out}: does not hold what was written; the disk may be faulty")
    print(f"wrote       {cfg.out} ({Path(cfg.out).stat().st_size / 1e6:.2f} MB, {len(modules)} modules)")


def refuse_existing(out: str, overwrite: bool) -> None:
    if Path(out).exists() and not overwrite:
        raise UserError(f"{out}: exists; choose another name or set overwrite=true")


def torch_dtype(name: str | None) -> Any:
    import torch

    return {None: None, "float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def error_line(mixed: "Mixed", *, is_projection: bool) -> str:
    def words(error: float) -> str:
        return f"{error:.2e}" + (f", kept energy {1 - error**2:.4%}" if is_projection else "")

    worst = mixed.worst()
    whole, most = words(mixed.error()), words(mixed.error(worst))
    return f"error       {whole} (relative Frobenius); worst {most} in {worst}"


# ---- command line ----


class Verb(NamedTuple):
    config: type[Config]
    run: Callable[[Any, Files], None]
    usage: str
    count: tuple[int, float]
    """Fewest and most files."""
    about: str


# fmt: off
VERBS = {
    "inspect": Verb(Table, inspect, "FILE ...", (1, math.inf), "layout, base, rank, alpha and norm per module, training config, what it touches"),
    "mix": Verb(Mix, mix, "FILE[=WEIGHT] ...", (1, math.inf), "weighted sum of LoRAs; a negative weight subtracts"),
    "scale": Verb(Output, scale, "FILE=WEIGHT", (1, 1), "one LoRA times a weight"),
    "resize": Verb(Resize, resize, "FILE", (1, 1), "a lower rank, by SVD"),
    "convert": Verb(Truncated, convert, "FILE", (1, 1), "another layout, without loss; numbered modules are named, LoHa and LoKr become LoRA"),
    "merge": Verb(Folder, merge, "BASE FILE[=WEIGHT] ...", (2, math.inf), "a base folder with LoRAs in its weights; weight -1 takes one out again"),
    "extract": Verb(Extract, extract, "BASE TUNED", (2, 2), "the difference of two base folders as a LoRA"),
    "diff": Verb(Table, diff, "FILE FILE", (2, 2), "two LoRAs: config, norms, and cosine per module"),
    "retrain": Verb(Retrain, retrain, "FILE", (1, 1), "the training config out of a LoRA's metadata"),
}
# fmt: on


def overview() -> str:
    lines = [f"  {name:8} {verb.usage:24} {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        ["usage: mix_lora.py VERB FILE ... [key=value ...] [--help]", "", "verbs:", *lines, ""]
        + ["`mix_lora.py VERB --help` lists a verb's keys."]
    )


def parse_file(text: str) -> tuple[str, float | None]:
    """`a.safetensors=0.7` -> path and weight; what exists under its whole name is a path."""
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{text}: the weight after = is no number")
    return path, weight


def is_file(text: str, keys: Collection[str]) -> bool:
    """Whether an argument names a LoRA or a base, and is no setting, no option and no config."""
    name, equals, _ = text.partition("=")
    if name in keys and equals or text.startswith("-"):
        return False
    is_setting = equals and re.fullmatch(r"[A-Za-z_]\w*", name) and not Path(name).exists()
    return not text.endswith(".json") and (Path(text).exists() or not is_setting)


def main(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("", "-h", "--help"):
        print(overview())
        return 0 if name else 2
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        raise UserError(
            f"{name}: no such verb; " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(VERBS)}")
        )
    verb = VERBS[name]
    named = [text for text in rest if is_file(text, verb.config.model_fields)]
    command = parse_command(
        verb.config,
        [text for text in rest if text not in named],
        prog=f"mix_lora.py {name} {verb.usage}",
        description=verb.about,
    )
    files = [parse_file(text) for text in named]
    if not verb.count[0] <= len(files) <= verb.count[1]:
        raise UserError(f"{name} takes {verb.usage}, not {len(files)} files")
    if "check" in command.flags:
        check(name, command.config, files)
    else:
        verb.run(command.config, files)
    return 0


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


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
