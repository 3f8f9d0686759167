"""What a LoRA file holds, and how two of them differ, in lines of text."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorakit.weights.lora_file import LoraFile, LoraPair, base_of, component_of, reads_text, unflatten
from lorakit.weights.mixing import factors, inner, squared_distance
from lorakit.weights.tensors import file_payload_sha256, header_dtypes

_KINDS = {
    "biases and norms": (".bias", "norm"),
    "attention": ("attn1", "attn2", "self_attn"),
    "feed-forward": (".ff.", ".mlp."),
    "projection": ("proj_in", "proj_out"),
    "time embedding": ("time_emb",),
}


def describe(path: Path, file: LoraFile, *, each: bool) -> list[str]:
    """Layout, base, what it touches, ranks, norms and training config, after a line per module if `each`.

    A norm is the Frobenius norm of alpha / r * B @ A; that of DoRA depends on the base and is left out.
    """
    modules = file.modules
    norms = {name: _norm(pair) for name, pair in modules.items() if pair.magnitude is None}
    lines = [f"{'module':78} {'rank':>5} {'alpha':>7} {'norm':>9}"] * each
    for name, pair in sorted(modules.items()) if each else ():
        norm = f"{norms[name]:9.4g}" if name in norms else "     DoRA"
        lines.append(f"{_dotted(name):78} {pair.rank:5d} {pair.alpha:7g} {norm}")
    width = next((pair.down.shape[1] for name, pair in modules.items() if reads_text(name)), None)
    base = base_of(modules) or "unknown"
    dtypes = sorted({dtype for key, dtype in header_dtypes(path).items() if not key.endswith("alpha")})
    parameters = sum(tensor.numel() for pair in modules.values() for tensor in pair.tensors().values())
    size = path.stat().st_size / 1e6
    ranks = Counter((pair.rank, pair.alpha) for pair in modules.values())
    lines += [
        f"file        {path} ({size:.2f} MB, {', '.join(dtypes)}, {parameters:,} parameters)",
        f"layout      {file.layout}",
        f"base        {base}" + (f" (cross attention reads width {width})" if width else ""),
        *(f"touches     {line}" for line in _touched(modules)),
        *(f"rank        {r}, alpha {a:g}: {count} modules" for (r, a), count in sorted(ranks.items())),
        *(f"norm        {line}" for line in _norms(norms)),
    ]
    if "modelspec.hash_sha256" in file.metadata:
        same = file.metadata["modelspec.hash_sha256"] == "0x" + file_payload_sha256(path)
        lines.append(f"hash        {'matches' if same else 'DIFFERS from'} that in the metadata")
    lines += [f"config      {key} = {value}" for key, value in training_config(file.metadata).items()]
    return lines + [
        f"merged from {file.metadata[key]}" for key in ("modelspec.merged_from",) if key in file.metadata
    ]


def compare(first: LoraFile, second: LoraFile, *, each: bool) -> list[str]:
    """Where config, modules, norms and directions of two files differ; cosine of the deltas as vectors."""
    configs = [training_config(file.metadata) for file in (first, second)]
    lines = [
        f"config      {key}: {configs[0].get(key, 'none')} -> {configs[1].get(key, 'none')}"
        for key in sorted(configs[0].keys() | configs[1].keys())
        if configs[0].get(key) != configs[1].get(key)
    ]
    a, b = first.modules, second.modules
    lines += [f"only in 1   {_dotted(name)}" for name in sorted(a.keys() - b.keys())]
    lines += [f"only in 2   {_dotted(name)}" for name in sorted(b.keys() - a.keys())]
    sums = [0.0, 0.0, 0.0, 0.0]
    rows = [f"{'module':78} {'ranks':>9} {'norm 1':>9} {'norm 2':>9} {'cosine':>8}"]
    for name in sorted(a.keys() | b.keys()):
        ours, theirs = (factors(own[name]) if name in own else None for own in (a, b))
        squares = [inner(each, each) if each else 0.0 for each in (ours, theirs)]
        product = inner(ours, theirs) if ours and theirs else 0.0
        distance = squared_distance(ours, theirs) if ours and theirs else sum(squares)
        sums = [total + one for total, one in zip(sums, [*squares, product, distance], strict=True)]
        if ours and theirs:
            norms = [math.sqrt(square) for square in squares]
            ranks, cosine = f"{a[name].rank}, {b[name].rank}", _cosine(product, *squares)
            rows.append(f"{_dotted(name):78} {ranks:>9} {norms[0]:9.4g} {norms[1]:9.4g} {cosine:>8}")
    share = f"{math.sqrt(sums[3] / sums[0]):.3g}" if sums[0] else "-"
    return (
        lines
        + rows * each
        + [
            f"modules     {len(a)} and {len(b)}, {len(a.keys() & b.keys())} in both",
            f"norm        {math.sqrt(sums[0]):.5g} and {math.sqrt(sums[1]):.5g}",
            f"cosine      {_cosine(sums[2], *sums[:2])}; relative distance ||2 - 1|| / ||1|| = {share}",
        ]
    )


def training_config(metadata: Mapping[str, str]) -> dict[str, str]:
    """How a file was trained: our own config or, in files of other tools, what kohya's keys say."""
    if "lorakit.config" in metadata:
        try:
            return {
                key: json.dumps(value, ensure_ascii=False)
                for key, value in json.loads(metadata["lorakit.config"]).items()
            }
        except (ValueError, AttributeError):
            return {"lorakit.config": "not readable"}
    long = ("ss_tag_frequency", "ss_bucket_info", "ss_dataset_dirs", "ss_datasets")
    return {
        key: value for key, value in sorted(metadata.items()) if key.startswith("ss_") and key not in long
    }


def rank_span(ranks: Sequence[int]) -> str:
    """`4 to 16`, or `16` where all are alike."""
    low, high = min(ranks), max(ranks)
    return f"{low} to {high}" if low < high else f"{low}"


def _cosine(product: float, square_1: float, square_2: float) -> str:
    size = math.sqrt(square_1 * square_2)
    return f"{product / size:.4f}" if size else "-"


def _norm(pair: LoraPair) -> float:
    delta = factors(pair)
    return math.sqrt(inner(delta, delta))


def _dotted(name: str) -> str:
    component, dotted = unflatten(name)
    return dotted if component == "unet" else f"text_encoder {dotted}"


def _kind(name: str) -> str:
    dotted = f".{unflatten(name)[1]}"
    return next(
        (kind for kind, parts in _KINDS.items() if any(part in dotted for part in parts)), "convolution"
    )


def _touched(modules: Mapping[str, LoraPair]) -> list[str]:
    counts = Counter((component_of(name), _kind(name)) for name in modules)
    components = sorted({component for component, _ in counts}, reverse=True)
    return [
        f"{component}: "
        + ", ".join(f"{count} {kind}" for (own, kind), count in counts.most_common() if own == component)
        for component in components
    ]


def _norms(norms: Mapping[str, float]) -> Sequence[str]:
    if not norms:
        return ()
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    largest = max(norms, key=norms.__getitem__)
    return (f"{total:.5g} over all, largest {norms[largest]:.4g} in {_dotted(largest)}",)
