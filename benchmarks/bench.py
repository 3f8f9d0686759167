"""What a step, a morph and a picture cost here, beside the figures that were committed.

    python benchmarks/bench.py      # or `make bench`: some seven minutes on two slow cores

One round of each; `python benchmarks/figures.py bench` takes more and keeps what comes out. Seconds are those
of a machine, and of what else it does: look at the ratios of two ways first. Prints committed, now and
now over committed, and one JSON line last.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.bench_figures import BENCH  # noqa: E402
from benchmarks.figure_parts import Command  # noqa: E402
from benchmarks.figures import KEPT, OUT, base_name, machine, output_of  # noqa: E402


def numbers(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """What is measured, by a name of what it is of."""
    for key, value in values.items():
        inner = f"{name} {key}".strip()
        yield from numbers(value, inner) if isinstance(value, dict) else [(inner, value)]


def main() -> None:
    base = base_name()
    said = [
        output_of(
            Command((*command.words, "--rounds", "1")), OUT / f"make_bench-{number}.json", base, again=True
        )
        for number, command in enumerate(BENCH.commands)
    ]
    now, kept = BENCH.values(*said), json.loads((KEPT / "bench.json").read_text(encoding="utf-8"))
    print(f"committed {kept['date']}: {kept['machine']}\nnow: {machine()}")
    before, ratios = dict(numbers(kept["values"])), {}
    print(f"{'':40}{'committed':>12}{'now':>12}{'ratio':>8}")
    for name, value in numbers(now):
        old = before.get(name)
        ratios[name] = value / old if old else None
        print(f"{name:40}{old or 0:12.3f}{value:12.3f}{ratios[name] or 0:8.2f}")
    print(json.dumps({"benchmark": "bench", "now": now, "to_committed": ratios}))


if __name__ == "__main__":
    main()
