"""The text of a config file: where its keys and values stand, what is wrong with it, what its keys take.

Lowest layer, beside errors.py. Lines and columns count from 1, columns in characters.
"""

import contextlib
import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from lorakit.ground.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

Key = tuple[str | int, ...]

_TOKEN = re.compile(r'"(?:[^"\\]+|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_LIMITS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
    "minLength": "of length >= {}",
    "maxLength": "of length <= {}",
    "minItems": "of length >= {}",
    "maxItems": "of length <= {}",
    "pattern": "matching {}",
}


class ConfigError(UserError):
    """A config file or a setting on the command line is wrong; the message lists every fault."""


class ConfigText:
    """A JSON text, its data, and the offsets of keys and values.

    Raises:
        ConfigError: the text is not JSON, or nests deeper than MAX_DEPTH.
    """

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text
        self.keys: dict[Key, int] = {}
        self.values: dict[Key, int] = {}
        self.duplicates: dict[Key, tuple[int, int]] = {}
        if not text.strip():
            raise ConfigError(f"{name}: the file is empty; the smallest config is {{}}")
        try:
            self.data = json.loads(text, parse_int=_integer)
        except json.JSONDecodeError as error:
            position, message = _syntax_fault(text, error)
            raise ConfigError(f"{self.place(position)}: {message}\n{self._excerpt(position)}") from None
        except RecursionError:
            raise ConfigError(f"{name}: more than {MAX_DEPTH} levels of nesting") from None
        self._scan()

    def _scan(self) -> None:
        """Fill keys, values and duplicates; the text is known to be JSON."""
        path: list[Any] = []  # None stands for the key of an object that is still to come
        for match in _TOKEN.finditer(self.text):
            token, start = match.group(), match.start()
            if token in "}]":
                path.pop()
            elif token == ",":
                path[-1] = path[-1] + 1 if isinstance(path[-1], int) else None
            elif path and path[-1] is None:
                path[-1] = json.loads(token)
                key = tuple(path)
                if key in self.keys:
                    self.duplicates[key] = self.keys[key], start
                self.keys[key] = start
            elif token != ":":
                self.values[tuple(path)] = start
                if token in "{[":
                    path.append(None if token == "{" else 0)
            if len(path) > MAX_DEPTH:
                raise ConfigError(f"{self.place(start)}: more than {MAX_DEPTH} levels of nesting")

    def line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def place(self, position: int) -> str:
        """`file:line:column`."""
        column = position - self.text.rfind("\n", 0, position)
        return f"{self.name}:{self.line(position)}:{column}"

    def token(self, position: int) -> str:
        """The number, string, word or bracket that begins at `position`."""
        match = _TOKEN.match(self.text, position)
        return match.group() if match else ""

    def _excerpt(self, position: int) -> str:
        start = max(self.text.rfind("\n", 0, position) + 1, position - 60)
        line = self.text[start : start + 100].partition("\n")[0]
        line = "".join(char if char.isprintable() else " " for char in line)
        return f"    {line}\n    {' ' * (position - start)}^"


def read_config_text(path: str | Path) -> ConfigText:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        ConfigError: as ConfigText, and for a file that cannot be read, is larger than MAX_BYTES, is not UTF-8
            or holds no object.
    """
    name = str(path) or '""'
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; {_neighbours(Path(path))}") from None
    except (OSError, ValueError) as error:
        fault = "is a directory; name a file in it" if os.path.isdir(path) else f"cannot be read: {error}"
        raise ConfigError(f"{name}: {fault}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES:,} bytes, so not a config file; name another")
    try:
        text = ConfigText(name, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not isinstance(text.data, dict):
        raise ConfigError(f"{name}: must hold an object {{...}} of keys and values, not {show(text.data)}")
    return text


def _integer(digits: str) -> int | float:
    """An int, or infinity, which no field takes, for one beyond every float; int() refuses 4301 digits."""
    return int(digits) if math.isfinite(float(digits)) else math.inf


def _syntax_fault(text: str, error: json.JSONDecodeError) -> tuple[int, str]:
    """Where the text stops being JSON, and how to mend it."""
    if "escape" in error.msg:
        return error.pos, 'a backslash begins an escape; write paths with "/"'
    if "control character" in error.msg or "Unterminated" in error.msg:
        return error.pos, "a string has no closing quote in its line"
    position = error.pos
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    rest, before = text[position : position + 40], text[:position].rstrip(" \t\r\n")
    if rest.startswith(("//", "/*", "#")):
        return position, "JSON has no comments; remove this one"
    if before.endswith(",") and rest[:1] in ("}", "]"):
        return len(before) - 1, f"trailing comma: JSON has none before {rest[0]}; remove it"
    if (
        rest.startswith(",")
        and before[-1:] not in ("{", "[", ",")
        and text[position + 1 :].lstrip(" \t\r\n")[:1] in ("}", "]")
    ):
        return position, "trailing comma: JSON has none before a closing bracket; remove it"
    if not rest:
        return position, "the file ends before the last bracket is closed"
    if rest[0] in "'\u2018\u2019\u201c\u201d":
        return position, 'strings and keys stand in straight double quotes: "'
    if error.msg == "Extra data":
        return position, "nothing may follow the last bracket"
    if "',' delimiter" in error.msg:
        return position, "a comma or closing bracket is missing before this"
    if word := re.match(r"[^\W\d]\w*", rest):
        hint = "text and keys stand in double quotes; true, false and null are lower case"
        return position, f"{word.group()} is not JSON; {hint}"
    return position, f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}"


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = sorted(entry.stem for entry in path.parent.glob("*.json"))
    if near := difflib.get_close_matches(path.stem, names, 3, 0.5):
        return f"did you mean {' or '.join(str(path.parent / f'{name}.json') for name in near)}?"
    listed = ", ".join(f"{name}.json" for name in names[:8])
    return f"{path.parent} holds {listed or 'no .json file'}"


def show(value: Any, limit: int = 60) -> str:
    """JSON on one line of at most `limit` characters; what a terminal would not show is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def is_text(value: Any) -> bool:
    """Whether all strings in a JSON value can be written as UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode() == text


def dotted(key: Key) -> str:
    """`prompts.0`, as written on the command line; at most 80 characters."""
    return ".".join(str(part) if str(part).isprintable() else show(part) for part in key)[:80]


def value_at(data: Any, key: Key) -> Any:
    node: Any = data
    for part in key:
        node = node[part]
    return node


def assign(data: Any, key: Key, value: Any) -> tuple[Key, str]:
    """data[key] = value; one past the end of a list appends. Returns the key and what is wrong with it."""
    node: Any = data
    done: Key = ()
    for depth, part in enumerate(key, 1):
        if isinstance(node, dict):
            part = str(part)
            node[part] = value if depth == len(key) else {} if node.get(part) is None else node[part]
        elif isinstance(node, list) and isinstance(part, int) and part <= len(node):
            node[part : part + 1] = [value] if depth == len(key) else node[part : part + 1] or [{}]
        else:
            return key, f"{dotted(done)} is {show(node)}, which has no entry {dotted((part,))}"
        node, done = value_at(node, (part,)), (*done, part)
    return done, ""


def present(data: Any, location: Key) -> Key:
    """The parts of pydantic's location that are keys of `data`; the others name members of a union."""
    key: Key = ()
    for part in location:
        with contextlib.suppress(LookupError, TypeError):
            value_at(data, (*key, part))
            key = (*key, part)
    return key


def without_references(node: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema with its references replaced by what they refer to."""
    if isinstance(node, list):
        return [without_references(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if isinstance(reference := node.get("$ref"), str):
        node = definitions[reference.rpartition("/")[2]] | {key: node[key] for key in node if key != "$ref"}
    return {key: without_references(value, definitions) for key, value in node.items() if key != "$defs"}


def schema_options(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a JSON schema, references resolved beforehand."""
    return [
        option for part in node.get("anyOf", node.get("oneOf", [])) for option in schema_options(part)
    ] or [node]


def schema_at(tree: dict[str, Any], key: Key) -> dict[str, Any]:
    """The part of a schema that governs a key; {} if none does."""
    for part in key:
        found: list[Any] = []
        for option in schema_options(tree):
            if isinstance(part, int):
                found += [*option.get("prefixItems", [])[part : part + 1], option.get("items")]
            found += [option.get("properties", {}).get(part), option.get("additionalProperties")]
        tree = next((child for child in found if isinstance(child, dict)), {})
    return tree


def schema_words(node: dict[str, Any]) -> str:
    """What a schema takes, such as "an integer >= 1 or null"."""
    if len(options := schema_options(node)) > 1:
        return " or ".join(dict.fromkeys(schema_words(option) for option in options))
    node = options[0]
    if "const" in node or "enum" in node:
        values = node.get("enum", [node.get("const")])
        return f"{'one of ' if len(values) > 1 else ''}{', '.join(show(value) for value in values)}"
    if entries := node.get("prefixItems"):
        return f"a list of {len(entries)}: {'; '.join(schema_words(entry) for entry in entries)}"
    kind = node.get("type", "")
    names = {"boolean": "true or false", "null": "null", "array": "a list", "": "any value"}
    words = names.get(kind, f"{'an' if kind in ('integer', 'object') else 'a'} {kind}")
    given = {limit: node[limit] for limit in _LIMITS if limit in node}
    shown = (_LIMITS[key].format(f"{at:g}" if isinstance(at, float) else at) for key, at in given.items())
    words = f"{words} {' and '.join(shown)}".strip()
    inner = node.get("items") or node.get("additionalProperties")
    return f"{words}, each entry {schema_words(inner)}" if isinstance(inner, dict) else words
