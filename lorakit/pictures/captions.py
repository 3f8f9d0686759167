"""Which pictures a folder holds and what their captions are, with every fault of names, links and text.

Captions come from `metadata.jsonl` at the root (one JSON object a line: file_name and a caption) or from a
`.txt` file beside each picture (or `.caption`, by `caption_extension`). No picture is opened here.
"""

import difflib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from lorakit.ground.errors import UserError
from lorakit.pictures.names import is_tar, is_unicode, loose, name_objection, stem

METADATA = "metadata.jsonl"
MASK_SUFFIX = "-masklabel"  # of the file beside a picture that is its mask
LISTED_FAULTS = 20
LISTED_NAMES = 5
SKIP_OR_EMPTY = 'set missing_captions to "skip", "empty" or "folder"'
_ONE_LINE = 'write one line for each picture: {"file_name": "a.png", "text": "a cat"}'
_UNSUPPORTED = {".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".pdf", ".jp2", ".cr2", ".nef", ".dng"}
_NAME_KEYS = ("filename", "file", "image", "path", "image_path", "file_path", "img")


class Fault(NamedTuple):
    where: str  # file, file:line or file:line:column
    problem: str
    remedy: str


class DataError(UserError):
    """All faults of a data set: one line each, then one line for each kind of remedy."""

    def __init__(self, faults: Sequence[Fault]):
        lines = [f"{fault.where}: {fault.problem}" for fault in faults[:LISTED_FAULTS]]
        if len(faults) > LISTED_FAULTS:
            lines.append(f"(and {len(faults) - LISTED_FAULTS} more)")
        lines += [f"  -> {remedy}" for remedy in dict.fromkeys(fault.remedy for fault in faults)]
        super().__init__("\n".join(lines))
        self.faults = tuple(faults)


Stored: TypeAlias = Callable[[], bytes]
"""A picture that is fetched from where it lies whenever it is needed."""


class Item(NamedTuple):
    """A picture that is still to be checked."""

    name: str
    source: str | bytes | Stored  # a path, what is in the file, or what fetches that
    caption: Any  # None where there is none, a list where there are several
    line: str  # where the caption stands, "" for nowhere
    in_file: bool = False  # of its own, whose lines were broken by an editor or are several captions
    mask: Path | None = None


class FolderReader:
    """Collects faults and warnings while it lists a folder and pairs its pictures with captions.

    Args:
        extension: of caption files.
    """

    def __init__(self, root: Path, suffixes: tuple[str, ...], allow_symlinks: bool, extension: str = ".txt"):
        self.root, self.suffixes, self.allow_symlinks = root, suffixes, allow_symlinks
        self.extension = extension.lower()
        self.faults: list[Fault] = []
        self.warnings: list[str] = []
        self.files = self._listed()
        images = [name for name in self.files if name.lower().endswith(suffixes)]
        stems = {stem(name): name for name in images}
        masks = [name for name in images if stem(name).endswith(MASK_SUFFIX)]
        pairs = {name: stems.get(stem(name).removesuffix(MASK_SUFFIX)) for name in masks}
        self.masks = {image: name for name, image in pairs.items() if image}
        self.images = [name for name in images if name not in self.masks.values()]

    def fault(self, where: str, problem: str, remedy: str) -> None:
        self.faults.append(Fault(f"{self.root}/{where}" if where else str(self.root), problem, remedy))

    def items(self, caption_column: str | None, missing_captions: str) -> tuple[list[Item], str]:
        """The rows to check, and where their captions come from."""
        if "metadata.csv" in self.files:
            both = METADATA in self.files
            problem = f"stands beside {METADATA}" if both else f"is not read; captions come from {METADATA}"
            self.fault("metadata.csv", problem, "delete one of the two" if both else _ONE_LINE)
            return [], ""
        if METADATA in self.files:
            return self._from_metadata(caption_column)
        return self._from_sidecars(missing_captions), f"{self.extension} files"

    def with_masks(self, items: list[Item]) -> list[Item]:
        """The items with the masks that lie beside them."""
        masks = {image: name for image, name in self.masks.items() if not self._refuse_link(name, "")}
        return [
            item._replace(mask=self.root / masks[item.name]) if item.name in masks else item for item in items
        ]

    def tar_files(self) -> list[str]:
        """Those that hold the pictures, where none lie beside them."""
        found = [name for name in self.files if is_tar(name) and not self._refuse_link(name, "")]
        if found and (self.images or METADATA in self.files):
            self.warnings.append(f"pictures lie beside tar files, of which none is read: {listing(found)}")
            return []
        return found

    def _listed(self) -> list[str]:
        """Relative names, with forward slashes, of all files that are not hidden.

        Those that need no second look, files behind no link, become `_plain`.
        """
        names, odd, seen = [], set(), set()
        self._plain: set[str] = set()

        def unreadable(error: OSError) -> None:
            self.faults.append(Fault(str(error.filename), f"{error.strerror}", "make the folder readable"))

        for folder, folders, files in os.walk(self.root, onerror=unreadable, followlinks=self.allow_symlinks):
            real = os.path.realpath(folder)
            if real in seen:  # a link back to a folder above
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = Path(folder).relative_to(self.root)
            for name in folders:
                self._refuse_link((inside / name).as_posix(), "")
            before = "" if inside == Path() else f"{inside.as_posix()}/"
            names += [before + name for name in files if not name.startswith(".")]
            with os.scandir(folder) as entries:
                odd |= {before + each.name for each in entries if not each.is_file(follow_symlinks=False)}
        for name in names:
            if not is_unicode(name):
                readable = name.encode("utf-8", "backslashreplace").decode()
                self.fault(readable, "the name of the file is not UTF-8", "rename it")
        self._plain = {name for name in names if "\\" not in name and ":" not in name and name.strip()} - odd
        return sorted(filter(is_unicode, names))

    def _refuse_link(self, name: str, line: str) -> bool:
        """Whether a name leads out of the root through a symbolic link, which is then a fault."""
        # Not Path.resolve(), which raises on a link to itself.
        if self.allow_symlinks or name in self._plain:
            return False
        if Path(os.path.realpath(self.root / name)).is_relative_to(self._real_root):
            return False
        problem = f"'{name}' is, or lies behind, a symbolic link out of the folder"
        self.fault(line or name, problem, "copy the files into the folder or set allow_symlinks to true")
        return True

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    @cached_property
    def _by_loose_name(self) -> dict[str, str]:
        return {loose(name): name for name in self.images}

    def _text(self, name: str) -> str | None:
        """The text of a UTF-8 file, with or without BOM; None after a fault."""
        if self._refuse_link(name, ""):
            return None
        try:
            content = (self.root / name).read_bytes()
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # Without the BOM of UTF-8, which counts towards the offset in the file but not in the error.
            offset = error.start + 3 * content.startswith(b"\xef\xbb\xbf")
            line = content.count(b"\n", 0, offset) + 1
            kind, encoding = "is not UTF-8 text", "LATIN1"
            if content.startswith((b"\xff\xfe", b"\xfe\xff")):
                kind, encoding = "is UTF-16, not UTF-8 text", "UTF-16"
            remedy = f"save as UTF-8, for example with: iconv -f {encoding} -t UTF-8 FILE > NEW"
            self.fault(f"{name}:{line}", f"{kind} (byte 0x{content[offset]:02x} at offset {offset})", remedy)
        except OSError as error:
            self.fault(name, f"{error.strerror}", "make the file readable")
        return None

    def _from_metadata(self, asked: str | None) -> tuple[list[Item], str]:
        faults_before = len(self.faults)
        records = self._records(self._text(METADATA))
        readable = len(self.faults) == faults_before
        if not records and readable:
            self.fault(METADATA, "no rows", _ONE_LINE)
        names = [self._checked_name(line, record) for line, record in records]
        column = self._caption_column([record for _, record in records], asked) if records else None
        if column is None:
            return [], ""
        items = [
            Item(name, self._path(name), record.get(column), line)
            for name, (line, record) in zip(names, records, strict=True)
            if name is not None
        ]
        if readable:  # a line that cannot be read may have named them
            named = set(names)
            others = (name for name in self.images if name not in named)
            kept = (name for name in others if not self._refuse_link(name, ""))
            items += [Item(name, self._path(name), None, "") for name in kept]
        stems = {stem(name) for name in self.images}
        unused = [name for name in self.files if self._holds_caption(name) and stem(name) in stems]
        if unused:
            self.warnings.append(f"captions come from {METADATA}; not read: {listing(unused)}")
        return items, f"{METADATA}, key '{column}'"

    def _records(self, text: str | None) -> list[tuple[str, dict[str, Any]]]:
        """(file:line, object) of each line that is not blank."""
        records = []
        # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
        for number, line in enumerate((text or "").split("\n"), 1):
            if not line.strip():
                continue
            where, remedy = f"{METADATA}:{number}", "write one JSON object on each line"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                self.fault(f"{where}:{error.colno}", f"not JSON, {error.msg}: {short(line)}", remedy)
            except (ValueError, RecursionError) as error:
                self.fault(where, f"not JSON that can be read ({error}): {short(line)}", remedy)
            else:
                if isinstance(record, dict):
                    records.append((where, record))
                else:
                    self.fault(where, f"not a JSON object: {short(line)}", remedy)
        return records

    def _checked_name(self, line: str, record: dict[str, Any]) -> str | None:
        """The file_name of a line, relative and inside the root; None after a fault."""
        if "file_name" not in record:
            close = [key for key in record if key.lower() in _NAME_KEYS]
            close += difflib.get_close_matches("file_name", record)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            problem = f"no key file_name, only {listing(record)}{hint}" if record else "no key file_name"
            self.fault(line, problem, "name the picture in file_name")
            return None
        name = record["file_name"]
        if isinstance(name, str) and name in self._plain:
            return name
        objection = name_objection(name)
        if objection:
            self.fault(line, f"file_name {short(repr(name))} {objection}", "name a file inside the folder")
            return None
        name = PurePosixPath(name).as_posix()
        if not self._is_there(name):
            near = self._by_loose_name.get(loose(name))
            hint = f"; did you mean '{near}'?" if near else ""
            self.fault(line, f"no file '{short(name)}'{hint}", "add the missing files or correct file_name")
            return None
        return None if self._refuse_link(name, line) else name

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _is_there(self, name: str) -> bool:
        return os.path.isfile(self.root / name)

    def _caption_column(self, records: list[dict[str, Any]], asked: str | None) -> str | None:
        """The key that holds the captions; None after a fault."""
        keys = list(dict.fromkeys(key for record in records for key in record if key != "file_name"))
        texts = [key for key in keys if any(isinstance(record.get(key), str) for record in records)]
        texts = [key for key in texts if key.lower() not in _NAME_KEYS]
        wanted = asked or ("text" if "text" in keys else texts[0] if len(texts) == 1 else None)
        if wanted in keys:
            return wanted
        if not keys:
            self.fault(METADATA, "no captions: file_name is the only key", 'add "text": "…" to each line')
        elif wanted is None:
            problem = f"which key is the caption? Found: {listing(keys)}"
            self.fault(METADATA, problem, "name it in caption_column")
        else:
            close = difflib.get_close_matches(wanted, keys, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            problem = f"no line has the key '{wanted}'; {hint}Found: {listing(keys)}"
            self.fault(METADATA, problem, "correct caption_column")
        return None

    def _from_sidecars(self, missing_captions: str) -> list[Item]:
        kind = self.extension
        by_stem = {stem(name): name for name in self.files if self._holds_caption(name)}
        # The other habits: files of another name, and one metadata.jsonl in each sub-folder.
        other = ".txt" if kind == ".caption" else ".caption"
        strange = [name for name in self.files if name.endswith((other, f"/{METADATA}"))]
        ignored = f"; not read: {listing(strange)}" if strange else ""
        if any(name.endswith(other) for name in strange):
            ignored += f' (caption_extension "{other}" reads these)'
        hint = f"write a {kind} beside each picture, or {METADATA} at the root, or {SKIP_OR_EMPTY}"
        if not self.images:
            self._no_images()
        elif missing_captions == "error" and not any(stem(name) in by_stem for name in self.images):
            found = f"{len(self.images)} picture(s), but neither {METADATA} nor {kind} files beside them"
            self.fault("", found + ignored, hint)
            return []
        elif strange:
            self.warnings.append(f"captions come from {kind} files beside the pictures{ignored}")
        items, users = [], defaultdict(list)
        for name in self.images:
            text_name = by_stem.get(stem(name), "")
            users[text_name].append(name)
            caption = self._text(text_name) if text_name else None
            unreadable = bool(text_name) and caption is None
            if not self._refuse_link(name, "") and not unreadable:
                items.append(Item(name, self._path(name), caption, text_name, in_file=True))
        shared = [text_name for text_name, names in users.items() if text_name and len(names) > 1]
        if shared:
            self.warnings.append(f"several pictures share one caption file: {listing(shared)}")
        unused = [name for name in by_stem.values() if name not in users]
        if unused:
            self.warnings.append(f"no picture belongs to {listing(unused)}")
        return items

    def _holds_caption(self, name: str) -> bool:
        return name.lower().endswith(self.extension)

    def _no_images(self) -> None:
        problem = f"no pictures here or in sub-folders; looked for {', '.join(self.suffixes)}"
        others = sorted({PurePosixPath(name).suffix.lower() for name in self.files} & _UNSUPPORTED)
        if others:
            problem += f"; found only unsupported types ({', '.join(others)})"
        self.fault("", problem, "convert them to PNG" if others else "put pictures there or correct the path")


def short(text: str, limit: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listing(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more
