"""The numbers and pictures of the pages, made anew and put where they are shown.

    python benchmarks/figures.py                    # all of them; goes on where it was stopped
    python benchmarks/figures.py invert morph       # these
    python benchmarks/figures.py --fill             # nothing is run: docs/figures/*.json into the pages

What a part says is kept in docs/figures/NAME.json with its commands, base, date and machine; pages
show it between `<!-- figure NAME.WHAT -->` and `<!-- end -->`; tests/test_figures.py compares the two, and
the base with the one that ships. A command whose output lies in out/figures, made on the same base, is
not run again; `--again` runs it.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import bench_figures, figure_parts, objective_figures  # noqa: E402
from benchmarks.figure_parts import Command  # noqa: E402
from lorakit.ground.publish import publish_file  # noqa: E402
from lorakit.weights.base import inspect_base  # noqa: E402
from lorakit.weights.identity import base_identity  # noqa: E402

OUT = ROOT / "out/figures"
KEPT = ROOT / "docs/figures"
PAGES = (ROOT / "README.md", ROOT / "miniature/README.md", *sorted(ROOT.glob("docs/*.md")))
BASE = "ckpt/miniature"
PARTS = figure_parts.PARTS | objective_figures.PARTS | {"bench": bench_figures.BENCH}
REGION = re.compile(r"<!-- figure (\w+)\.(\w+) -->(.*?)<!-- end -->", re.S)


def base_name() -> str:
    """Which base figures are of."""
    return base_identity(inspect_base(str(ROOT / BASE)))[:16]


def machine() -> str:
    """What seconds depend on, in words."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, {libraries}"


def output_of(command: Command, kept: Path, base: str, again: bool) -> Any:
    """What the command says: its report, or the last line that it prints."""
    record = {"command": shlex.join(command.words), "base": base}
    if kept.exists() and not again:
        old = json.loads(kept.read_text(encoding="utf-8"))
        if {key: old[key] for key in record} == record:
            return old["said"]
    print(f"  python {record['command']}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command.words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    said = done.stdout.strip().splitlines()[-1:] or [""]
    if command.report is not None:
        text = (ROOT / command.report).read_text(encoding="utf-8") if command.report else said[0]
        said = [json.loads(text)]
    publish_file(kept, json.dumps(record | {"said": said[0]}).encode())
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return said[0]


def make(name: str, base: str, again: bool) -> None:
    """Run a part, keep its values, and make its pictures."""
    part = PARTS[name]
    said = [
        output_of(command, OUT / f"{name}-{number}.json", base, again)
        for number, command in enumerate(part.commands)
    ]
    record = {
        "commands": [f"python {shlex.join(command.words)}" for command in part.commands],
        "base": base,
        "version": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "values": part.values(*said),
    }
    publish_file(KEPT / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
    for picture, draw in part.pictures.items():
        publish_file(ROOT / "docs" / picture, draw())


def kept_values() -> dict[str, Any]:
    """Values by part, of all parts that were run."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["values"] for path in KEPT.glob("*.json")}


def filled(text: str, values: Mapping[str, Any]) -> str:
    """A page with what its regions are to show.

    Raises:
        KeyError: a region of a part that is unknown or was never run.
    """

    def shown(region: re.Match) -> str:
        name, what, old = region.groups()
        new = PARTS[name].shown[what](values[name])
        block = "\n" if old.startswith("\n") or new.startswith("|") else ""
        return f"<!-- figure {name}.{what} -->{block}{new}{block}<!-- end -->"

    return REGION.sub(shown, text)


def fill() -> None:
    values = kept_values()
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := filled(old, values)) != old:
            publish_file(page, new.encode())
            print(f"filled {page.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--fill", action="store_true", help="run nothing")
    parser.add_argument("--again", action="store_true", help="run what was run before, too")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}")
    names = [] if options.fill else [name for name in PARTS if name in options.parts or not options.parts]
    base = base_name()
    for number, name in enumerate(names, 1):
        print(f"{number} of {len(names)}: {name}", flush=True)
        make(name, base, options.again)
    fill()
    print(json.dumps({"parts": names, "base": base}))


if __name__ == "__main__":
    main()
