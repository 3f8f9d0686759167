"""The folder that a sampling script fills: PNGs that can be repeated, sheets, report.json. No torch."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit.ground.command import Command, print_notes
from lorakit.ground.errors import UserError
from lorakit.ground.publish import check_writable, publish_file, remove
from lorakit.pictures.images import save_png
from lorakit.pictures.sheet import contact_sheet
from lorakit.sampling.config import SamplingConfig
from lorakit.sampling.model_files import fingerprint_ahead
from lorakit.sampling.recipe import png_text

NUMBERED = re.compile(
    r"\d{4,}\.png|(sheet|edges|overlay)(_\d+)?\.png|(report|track)\.json|index\.html|\.[0-9a-f]{16}\.tmp"
)


def earlier_files(folder: Path) -> list[Path]:
    """Those that an earlier run has left; what a user put beside them is not among them."""
    return [path for path in folder.iterdir() if NUMBERED.fullmatch(path.name)]


def claim_folder(cfg: SamplingConfig) -> Path:
    """The folder of a run; what an earlier one left there stays until there is a picture to replace it.

    Raises:
        UserError: there is an earlier run and `overwrite` is not set.
        OutputError: nothing can be written there.
    """
    folder = Path(cfg.output_dir) / cfg.name
    check_writable(folder)
    if not cfg.overwrite and any(path.suffix != ".tmp" for path in earlier_files(folder)):
        raise UserError(f"{folder} holds an earlier run: set overwrite=true, or another name=…")
    return folder


def fill_folder(
    command: Command[Any],
    make: Callable[[Path], Sequence[Path]],
    *,
    what: str,
    notes: Iterable[str],
    forecast: Callable[[], Iterable[str]],
    files: str,
) -> int:
    """Say what is to be made and, but for `--check`, make it in the folder of the run; returns the exit code.

    Args:
        make: fills the folder and returns the paths of its sheets.
        what: the pictures in words; `notes` what a user should know of them before, each said once.
        forecast: what the run will need, in lines for `--check`.
        files: what was written, in words.

    Raises:
        UserError, OutputError: as `claim_folder`.
    """
    print(f"pictures    {what}", flush=True)
    if "check" in command.flags:
        print("\n".join(forecast()))
    print_notes(notes)
    if "check" in command.flags:
        return 0
    folder = claim_folder(command.config)
    fingerprint_ahead(command.config.pretrained_model_name_or_path)
    sheets = make(folder)
    print(f"page        {folder / 'index.html'}")
    print(f"wrote       {folder}: {files}; look at {sheets[0]}")
    return 0


@dataclass(frozen=True)
class Picture:
    """One result.

    Args:
        subject: the number of its prompt or input; `cell`: (row, column) of the grid.
        cfg: makes this picture and no other.
        facts: what report.json says of it besides.
        ways: lines that its page draws over it, in its pixels; the last place of each is a target.
    """

    image: Image.Image
    subject: int
    seed: int
    cell: tuple[int, int]
    cfg: SamplingConfig
    prompt: str
    facts: dict[str, Any] = field(default_factory=dict)
    ways: Sequence[Sequence[tuple[float, float]]] = ()


@dataclass(frozen=True)
class Table:
    """How pictures stand on a sheet.

    Args:
        rows: label, number of the subject whose leads stand before it or -1, numbers of the pictures.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, int, Sequence[int | None]]]


@dataclass
class Gallery:
    """Saves pictures as they come.

    Args:
        subjects: a label for each prompt or input.
        leads: for each subject, pictures that stand before its row, as (label, picture).
    """

    folder: Path
    cfg: SamplingConfig
    subjects: Sequence[str]
    leads: Sequence[Sequence[tuple[str, Image.Image]]] = ()
    pictures: list[Picture] = field(default_factory=list)

    def add(self, picture: Picture) -> None:
        if not self.pictures:
            for path in earlier_files(self.folder):
                remove(path)
        size = picture.image.size
        path = self.folder / self.file(len(self.pictures))
        save_png(picture.image, path, text=png_text(picture.cfg, picture.prompt, picture.seed, size))
        self.pictures.append(picture)

    @staticmethod
    def file(number: int) -> str:
        return f"{number:04d}.png"

    def finish(self, report: dict[str, Any]) -> list[Path]:
        """Write the sheets and the report; returns the sheets' paths."""
        entries = []
        for number, each in enumerate(self.pictures):
            entries.append(
                {
                    "file": self.file(number),
                    "subject": self.subjects[each.subject],
                    "prompt": each.prompt,
                    "seed": each.seed,
                    "cell": self._cell_words(each.cell),
                }
                | each.facts
            )
        config = self.cfg.model_dump(mode="json")
        text = json.dumps({"config": config, **report, "pictures": entries}, indent=2, ensure_ascii=False)
        publish_file(self.folder / "report.json", (text + "\n").encode())
        paths = []
        sheets = [self._drawn(table) for table in self.tables()]
        for number, sheet in enumerate(sheets):
            paths.append(self.folder / (f"sheet_{number:03d}.png" if len(sheets) > 1 else "sheet.png"))
            save_png(sheet, paths[-1])
        return paths

    def _cell_words(self, cell: tuple[int, int]) -> list[str]:
        across, down = self.cfg.axis_labels()
        return [*across[cell[1] : cell[1] + 1], *down[cell[0] : cell[0] + 1]]

    def tables(self) -> list[Table]:
        """Without a grid a row for each subject and a column for each seed; along one axis a row for each
        subject and seed; over two axes a table for each of them.
        """
        across, down = self.cfg.axis_labels()
        found = {(p.subject, p.seed, p.cell): number for number, p in enumerate(self.pictures)}
        seeds = sorted({picture.seed for picture in self.pictures})
        subjects = range(len(self.subjects))
        if not across:
            columns = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else []
            cells = [[found.get((subject, seed, (0, 0))) for seed in seeds] for subject in subjects]
            return [Table("", columns, [(self.subjects[s], s, cells[s]) for s in subjects])]
        runs = [(subject, seed) for subject in subjects for seed in seeds]
        words = [self.subjects[s] + (f" · seed {seed}" if len(seeds) > 1 else "") for s, seed in runs]

        def row(run: tuple[int, int], number: int) -> list[int | None]:
            return [found.get((*run, (number, column))) for column in range(len(across))]

        if not down:
            rows = [(text, run[0], row(run, 0)) for run, text in zip(runs, words, strict=True)]
            return [Table("", across, rows)]
        return [
            Table(title, across, [(text, -1 if i else run[0], row(run, i)) for i, text in enumerate(down)])
            for run, title in zip(runs, words, strict=True)
        ]

    def _drawn(self, table: Table) -> Image.Image:
        """The sheet, with the leads of each row's subject before it."""
        heads = [label for label, _ in self.leads[0]] if self.leads else []
        rows: list[list[Image.Image | None]] = []
        for _, subject, numbers in table.rows:
            own = [image for _, image in self.leads[subject]] if subject >= 0 and heads else []
            lead = own or [None] * len(heads)
            rows.append([*lead, *(None if n is None else self.pictures[n].image for n in numbers)])
        labels = [*heads, *table.columns] if table.columns or heads else []
        return contact_sheet(
            rows, row_labels=[label for label, *_ in table.rows], column_labels=labels, title=table.title
        )
