"""Pictures in tar files as WebDataset has them: KEY.jpg and KEY.txt, or KEY.json, one behind the other.

They are read where they lie, at any place of a file; no picture is opened here. Imports no torch.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lorakit.pictures.caption_rules import class_of
from lorakit.pictures.captions import SKIP_OR_EMPTY, Fault, Item, listing
from lorakit.pictures.inspection import file_marks
from lorakit.pictures.names import is_unicode

_AGAIN = "copy or download it again, or write it to its end"
_NAMES = "give each picture a name of its own"
_BLOCK = 512  # bytes of which tar files are made; a block of zeros ends one


class Member(NamedTuple):
    """A file in a tar file, which is read when it is called."""

    archive: str
    start: int
    size: int

    def __call__(self) -> bytes:
        with open(self.archive, "rb", buffering=0) as file:
            file.seek(self.start)
            return file.read(self.size)

    def marks(self) -> tuple[object, ...] | None:
        marks = file_marks(self.archive)
        return marks and (*marks, self.start, self.size)


class TarReader:
    """Pairs the pictures of tar files with their captions, and collects faults and warnings.

    Args:
        names: of the tar files, relative to the root.
        extension: of captions.
        column: key of the caption in KEY.json; None: captions stand in KEY.txt.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        suffixes: tuple[str, ...],
        extension: str,
        column: str | None,
        faults: list[Fault],
        warnings: list[str],
    ):
        self.root, self.names, self.suffixes, self.column = root, names, suffixes, column
        self.kind = ".json" if column else extension.lower()
        self.faults, self.warnings = faults, warnings

    def items(self, missing_captions: str) -> tuple[list[Item], str]:
        """The rows to check, and where their captions come from."""
        before = len(self.faults)
        found = [item for name in self.names for item in self._of_file(name, missing_captions)]
        where = f"{self.kind} in {len(self.names)} tar file(s)"
        if not found and len(self.faults) == before:
            problem = f"no pictures in {len(self.names)} tar file(s); looked for {', '.join(self.suffixes)}"
            self.faults.append(Fault(str(self.root), problem, f"name them KEY.jpg, beside KEY{self.kind}"))
        elif missing_captions == "error" and found and not any(item.line for item in found):
            problem = f"{len(found)} picture(s) in tar files, and no {self.kind} beside any"
            remedy = f"write KEY{self.kind}, name the key of KEY.json in caption_column, or {SKIP_OR_EMPTY}"
            self.faults.append(Fault(str(self.root), problem, remedy))
            return [], where
        return found, f"{where}, key '{self.column}'" if self.column else where

    def _of_file(self, name: str, missing_captions: str) -> Iterator[Item]:
        path, samples, captions = self.root / name, {}, {}
        if not name.lower().endswith(".tar"):
            remedy = "unpack it to .tar: pictures are read where they lie"
            self.faults.append(Fault(str(path), "is compressed", remedy))
            return
        try:
            with open(path, "rb") as file:
                for member in self._members(path, file):
                    key, ending = _split(member.name)
                    if ending != self.kind and ending not in self.suffixes:
                        continue
                    own = samples.setdefault(key, {})
                    if ending in own:
                        problem = f"'{member.name}' is there twice"
                        self.faults.append(Fault(str(path), problem, _NAMES))
                    own[ending] = member
                    if ending == self.kind:
                        captions[key] = self._caption(path, member, file)
                    elif missing_captions == "folder":
                        captions.setdefault(key, class_of(member.name) or None)
        except OSError as error:
            self.faults.append(Fault(str(path), f"{error.strerror}", "make the file readable"))
            return
        yield from self._paired(name, samples, captions)

    def _members(self, path: Path, file: Any) -> Iterator[tarfile.TarInfo]:
        """The files of a tar file; what is cut short or damaged is a fault behind those before it."""
        end = os.fstat(file.fileno()).st_size
        try:
            archive: Any = tarfile.open(fileobj=file, mode="r:")
            while (member := archive.next()) is not None:
                archive.members.clear()  # a million of them would take a gigabyte
                if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
                    if not is_unicode(member.name):
                        readable = member.name.encode("utf-8", "backslashreplace").decode()
                        self.faults.append(Fault(f"{path}: {readable}", "its name is not UTF-8", "rename it"))
                    elif member.offset_data + member.size > end:
                        self._torn(path, f"is cut short in '{member.name}'")
                        return
                    else:
                        yield member
        except tarfile.TarError as error:
            self._torn(path, f"no tar file that can be read ({error})")
            return
        file.seek(archive.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            self._torn(path, f"is cut short or damaged behind byte {archive.offset:,}, where no file begins")

    def _torn(self, path: Path, problem: str) -> None:
        self.faults.append(Fault(str(path), problem, _AGAIN))

    def _caption(self, path: Path, member: tarfile.TarInfo, file: Any) -> Any:
        """What stands in KEY.txt, or under a key of KEY.json; None after a fault."""
        where, column = f"{path}: {member.name}", self.column
        file.seek(member.offset_data)
        try:
            text = file.read(member.size).decode("utf-8-sig")
            if column is None:
                return text
            record = json.loads(text)
        except UnicodeDecodeError as error:
            self.faults.append(Fault(where, f"is not UTF-8 text (at byte {error.start})", "save it as UTF-8"))
        except (ValueError, RecursionError) as error:
            self.faults.append(Fault(where, f"is not JSON ({error})", "write one JSON object"))
        else:
            if isinstance(record, dict) and column in record:
                return record[column]
            keys = (
                f"only {listing(record)}" if isinstance(record, dict) and record else "it is no JSON object"
            )
            self.faults.append(Fault(where, f"has no key '{column}', {keys}", "correct caption_column"))
        return None

    def _paired(
        self, name: str, samples: dict[str, dict[str, tarfile.TarInfo]], captions: dict[str, Any]
    ) -> Iterator[Item]:
        unused = []
        for key, own in samples.items():
            pictures = [own[ending] for ending in self.suffixes if ending in own]
            if len(pictures) > 1:
                problem = f"two pictures have the name '{key}': {listing(each.name for each in pictures)}"
                self.faults.append(Fault(str(self.root / name), problem, _NAMES))
            if not pictures:
                unused.append(own[self.kind].name)
            for each in pictures[:1]:
                source = Member(str(self.root / name), each.offset_data, each.size)
                line = f"{name}/{own[self.kind].name}" if self.kind in own else ""
                yield Item(f"{name}/{each.name}", source, captions.get(key), line, in_file=not self.column)
        if unused:
            self.warnings.append(f"{name}: no picture belongs to {listing(unused)}")


def _split(name: str) -> tuple[str, str]:
    """The key of a file and its ending, which begins at the first dot of its own name, as in WebDataset."""
    folder, slash, own = name.removeprefix("./").rpartition("/")
    key, dot, ending = own.partition(".")
    return f"{folder}{slash}{key}", (dot + ending).lower()
