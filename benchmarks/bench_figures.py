"""What things cost as a part of figures.py and of `make bench`: a step, a morph, a picture."""

from benchmarks.figure_parts import Command, Part, Values, table

TRAIN = {"bare": "bare", "ours": "train_lora.py", "uncached": "uncached"}
MORPH = {"tutorial": "tutorial", "lorakit": "morph.py by ddim", "shipped": "morph.py as shipped"}
STYLE = {
    "single": "text to image, one by one",
    "batched": "text to image, batch of 4",
    "live": "batch of 4, LoRA of rank 16 live",
    "merged": "batch of 4, the same LoRA merged",
    "img2img": "SDEdit at strength 0.6",
    "controlnet": "SDEdit at strength 0.6 with ControlNet",
}


def bench_values(train: Values, morph: Values, style: Values) -> Values:
    kept = ("seconds", "evaluations", "ms_per_evaluation", "attention_bytes")
    ways = {way: {key: morph["ways"][way][key] for key in kept} for way in MORPH}
    for way, entry in ways.items():
        entry["ratio"] = morph["ways"][way]["ratio_to_lorakit"]["seconds"]
    return {
        "train": {way: train[way] for way in TRAIN},
        "morph": ways,
        "style": {way: style["ways"][way] for way in STYLE},
    }


def train_table(values: Values) -> str:
    rows = []
    for way, label in TRAIN.items():
        row = values["train"][way]
        numbers = f"{row['ms']:.0f}", f"{row['images_per_second']:.1f}", f"{row['peak_mb'] / 1e3:.2f} GB"
        rows.append((label, *numbers, f"{row['ratio_to_bare']:.2f}"))
    return table(("way", "ms per step", "images/s", "peak memory", "against the limit"), rows)


def morph_table(values: Values) -> str:
    rows = []
    for way, label in MORPH.items():
        row = values["morph"][way]
        work = f"{row['evaluations']:,}", f"{row['ms_per_evaluation']:.1f}"
        rows.append((label, f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", *work))
    return table(
        ("way", "seconds", "against morph.py by ddim", "U-Net evaluations", "ms per evaluation"), rows
    )


def style_table(values: Values) -> str:
    rows = [(label, values["style"][way]) for way, label in STYLE.items()]
    header = ("way", "seconds a picture", "peak memory")
    return table(header, [(a, f"{b['seconds']:.2f}", f"{b['peak_mb'] / 1e3:.2f} GB") for a, b in rows])


BENCH = Part(
    commands=(
        Command(("benchmarks/train.py", "--rounds", "2")),
        Command(("benchmarks/morph.py", "--ways", *MORPH, "--rounds", "1")),
        Command(("benchmarks/style.py", "--rounds", "2")),
    ),
    values=bench_values,
    shown={"train": train_table, "morph": morph_table, "style": style_table},
)
