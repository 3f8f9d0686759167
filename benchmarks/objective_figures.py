"""The parts of benchmarks/figures.py on objectives: lcm, prior, smooth, textual_inversion."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figure_parts import Command, Part, Values, file, table

SEEDS = ("0", "1", "2")


def train(config: str, *settings: str) -> Command:
    return Command(("train_lora.py", config, *settings), None)


def by_seed(numbers: Iterable[float | None], digits: int = 2) -> str:
    """One number, or several with semicolons."""
    return "; ".join("–" if number is None else f"{number:.{digits}f}" for number in numbers)


def grouped(rows: Sequence[Values], key: Callable[[Values], Any]) -> dict[Any, list[Values]]:
    """Rows of equal key together, in the order of the first of each."""
    found: dict[Any, list[Values]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def rounded(row: Mapping[str, Any], keys: Sequence[str], digits: int = 4) -> dict[str, Any]:
    return {key: round(row[key], digits) if isinstance(row[key], float) else row[key] for key in keys}


# ---- lcm ----

STUDENTS = tuple(f"ckpt/lcm_{seed}.safetensors" for seed in SEEDS)


def few_steps_rows(said: Values) -> list[Values]:
    """Students are told apart by their place in --lora, so that a row is a way and not a file."""
    names = [Path(path).stem for path in said["lora"]]
    rows = []
    for row in said["rows"]:
        who = ["LCM-LoRA" if name in names else "ink" for name in row["way"]["loras"]]
        kept = rounded(row, ("evaluations", "sharpness", "texture", "obeyed"))
        rows.append(
            {"who": " + ".join(who) or "base"}
            | rounded(row["way"], ("scheduler", "steps", "guidance"))
            | kept
        )
    return rows


def few_steps_table(rows: Sequence[Values]) -> str:
    samplers = {"ddim": "DDIM", "lcm": "lcm", "dpm++": "DPM++", "trailing": "DDIM, trailing"}
    header = ["", "sampler, steps, guidance", "evaluations", "sharpness", "texture"]
    judged = any(row["obeyed"] is not None for row in rows)
    lines = []
    for group in grouped(rows, lambda row: (row["who"], row["scheduler"], row["steps"])).values():
        first = group[0]
        who = f"**{first['who']}**" if "LCM" in first["who"] and first["scheduler"] == "lcm" else first["who"]
        cells = [
            who,
            f"{samplers[first['scheduler']]}, {first['steps']}, {first['guidance']:g}",
            str(first["evaluations"]),
        ]
        for key in ("sharpness", "texture", *(["obeyed"] if judged else [])):
            cells.append(by_seed(row[key] for row in group))
        lines.append(cells)
    return table([*header, *(["obeyed"] if judged else [])], lines)


FEW_STEPS = Part(
    commands=(
        *(train("cfg/lcm.json", f"seed={seed}", f"ckpt_name=lcm_{seed}") for seed in SEEDS),
        train("cfg/style.json"),
        Command(("benchmarks/few_steps.py", "--lora", *STUDENTS)),
        Command(
            (
                "benchmarks/few_steps.py",
                "--pictures",
                "24",
                "--lora",
                *STUDENTS,
                "--style",
                "ckpt/ink.safetensors",
            )
        ),
    ),
    values=lambda *said: {"plain": few_steps_rows(said[-2]), "ink": few_steps_rows(said[-1])},
    shown={
        "plain": lambda values: few_steps_table(values["plain"]),
        "ink": lambda values: few_steps_table(values["ink"]),
    },
    pictures={"few_steps.webp": lambda: file("out/few_steps/card.webp")},
)


# ---- prior ----

WAYS = (
    *("plain", "plain at half weight", "plain, 40 steps"),
    *("prior", "prior at 1, 200 steps", "prior at 1, 300 steps", "class images"),
)
SUBJECT = ("subject", "others", "obeyed", "sharpness")


def subjects_table(rows: Sequence[Values]) -> str:
    names = {
        "base": "the base",
        "plain": "without prior, 200 steps",
        "plain at half weight": "without, at weight 0.5",
        "plain, 40 steps": "without, 40 steps",
        "plain as long": "without, 400 steps, cosine",
        "prior": "**prior at 0.7, 400 steps, cosine**, as shipped",
    }
    lines = []
    for way, group in grouped(rows, lambda row: row["way"]).items():
        columns = [[row[key] for row in group] for key in SUBJECT]
        if way == "base":
            columns[1] = [None]
        cells = (by_seed(column, digits) for column, digits in zip(columns, (1, 1, 2, 3), strict=True))
        lines.append([names.get(way, way), *cells])
    return table(["", "subject, dB", "others to the base, dB", "obeyed", "sharpness of others"], lines)


SUBJECTS = Part(
    commands=(
        Command(("benchmarks/subjects.py", "--ways", *WAYS, "--seeds", *SEEDS)),
        Command(("benchmarks/subjects.py", "--ways", "plain as long")),
    ),
    values=lambda said, long: [rounded(row, ("way", "seed", *SUBJECT)) for row in (*said, *long[1:])],
    shown={"ways": subjects_table},
)


# ---- smooth ----

EVENNESS = ("istd", "cv", "distance", "sharpness")


def smooth_table(values: Values) -> str:
    lines = []
    for weight, group in grouped(values, lambda row: row["weight"]).items():
        label = "the base" if weight is None else f"weight {weight:g}"
        lines.append(
            [label, *(by_seed((row[key] for row in group), 3 if key == "cv" else 2) for key in EVENNESS)]
        )
    return table(["", "ISTD", "deviation / mean", "distance of the ends", "sharpness"], lines)


def smooth_ratios(values: Values) -> str:
    lines = []
    for weight, group in grouped([row for row in values if row["weight"]], lambda row: row["weight"]).items():
        ratios = ([row["of_weight_0"][key] for row in group] for key in EVENNESS)
        lines.append([f"weight {weight:g}", *(by_seed(each) for each in ratios)])
    return table(["of weight 0", "ISTD", "deviation / mean", "distance of the ends", "sharpness"], lines)


SMOOTH = Part(
    commands=(
        Command(("benchmarks/smooth.py", "--weights", "1", "--seeds", *SEEDS)),
        Command(("benchmarks/smooth.py", "--weights", "30")),
    ),
    values=lambda mild, strong: [
        rounded(row, ("weight", "seed", *EVENNESS))
        | ({"of_weight_0": rounded(row["of_weight_0"], EVENNESS)} if row["weight"] is not None else {})
        for row in [*mild["rows"], *strong["rows"][-1:]]
    ],
    shown={"weights": smooth_table, "ratios": smooth_ratios},
)

# ---- words ----

WORDS_KEYS = ("subject", "short", "others")


def words_table(rows: Sequence[Values]) -> str:
    lines = []
    for way, group in grouped(rows, lambda row: row["way"]).items():
        cells = [by_seed((row[key] for row in group), 1) for key in WORDS_KEYS]
        if group[0]["others"] >= 99:
            cells[2] = "equal"
        lines.append([way, *cells])
    return table(["", "its caption, dB", "“a photo of” it, dB", "other prompts to the base, dB"], lines)


WORDS = Part(
    commands=(Command(("benchmarks/words.py", "--seeds", *SEEDS)),),
    values=lambda said: [rounded(row, ("way", "seed", *WORDS_KEYS)) for row in said],
    shown={"ways": words_table},
)

PARTS = {
    "few_steps": FEW_STEPS,
    "subjects": SUBJECTS,
    "smooth": SMOOTH,
    "words": WORDS,
}
