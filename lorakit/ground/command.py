"""The command lines of scripts, `SCRIPT [CONFIG.json] [key=value ...] [--flag ...]`, and what they print."""

import argparse
import difflib
import json
import operator
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from pydantic_core import to_jsonable_python

from lorakit.ground.config import C, Config, Loaded, default_of, leaves, load_config, schema
from lorakit.ground.config_text import schema_at, schema_words, show
from lorakit.ground.errors import UserError


@dataclass(frozen=True)
class Command(Generic[C]):
    """A parsed command line; `path` is None where no file was read, `flags` are names without dashes."""

    config: C
    path: str | None
    origins: dict[str, str]
    flags: frozenset[str]


def parse_command(
    cls: type[C],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    flags: Mapping[str, str] = {},
    default_config: str | None = None,
    epilog: str = "",
) -> Command[C]:
    """Parse `SCRIPT [CONFIG.json] [key=value ...] [--flag ...]`.

    --help, --schema and --print-config print and exit with status 0; --print-config writes the config to
    stdout, as a file to reuse, and the origin of each value to stderr. --check is for the script to act upon.

    Args:
        argv: without the name of the script.
        flags: name without dashes -> help, of the script's own flags.
        default_config: read if no file is named; None starts from the defaults.
    Raises:
        ConfigError: as load_config.
        SystemExit: status 2, usage on stderr, for an unknown flag or a second file.
    """
    parser = _parser(cls, prog, description, flags, epilog)
    known, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        parser.error(_unknown_flag(cls, unknown[0], [*flags, "help", "check", "print-config", "schema"]))
    file = _config_file(parser, cls, known.settings)
    if known.schema:
        print(json.dumps(schema(cls), indent=2))
        parser.exit()
    path = default_config if file is None else file
    loaded = load_config(cls, path, [text for text in known.settings if text != file])
    if known.print_config:
        print(json.dumps(loaded.config.model_dump(mode="json"), indent=2))
        print(_origin_table(loaded), file=sys.stderr)
        parser.exit()
    chosen = frozenset(name for name in (*flags, "check") if getattr(known, name.replace("-", "_")))
    return Command(loaded.config, path, loaded.origins, chosen)


def with_picture(argv: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """`PICTURE` as `image=PICTURE`; what exists under its whole name, or has no =, is a file.

    Args:
        suffixes: of pictures, in lower case.

    Raises:
        UserError: two pictures.
    """

    def names_picture(text: str) -> bool:
        is_file = "=" not in text or os.path.isfile(text)
        return is_file and not text.startswith("-") and text.lower().endswith(tuple(suffixes))

    pictures = [text for text in argv if names_picture(text)]
    if len(pictures) > 1:
        raise UserError(f"{' and '.join(pictures)}: one picture at a time")
    return [f"image={json.dumps(text)}" if text in pictures else text for text in argv]


def print_notes(notes: Iterable[str]) -> None:
    """What users should know before the work, each line once."""
    print("".join(f"note        {note}\n" for note in dict.fromkeys(notes)), end="", flush=True)


def _config_file(parser: argparse.ArgumentParser, cls: type[Config], settings: Sequence[str]) -> str | None:
    """The one argument that names a file; an exit with status 2 where there are more, or it is a bare key."""
    files = [text for text in settings if "=" not in text or os.path.isfile(text)]
    if bare := [text for text in files if text in leaves(cls) and not os.path.exists(text)]:
        parser.error(f"{bare[0]} is a key; write {bare[0]}=VALUE")
    if len(files) > 1:
        parser.error(f"{len(files)} config files, {' and '.join(files)}; settings are written key=value")
    return files[0] if files else None


def _parser(
    cls: type[Config], prog: str, description: str, flags: Mapping[str, str], epilog: str
) -> argparse.ArgumentParser:
    width = max(shutil.get_terminal_size().columns - 2, 40)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [CONFIG.json] [key=value ...] [options]",
        description=_wrapped(description, width),
        epilog="\n\n".join([_key_help(cls, width), _wrapped(epilog, width)]).rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    own = {
        "check": "check the config and the files it names, then stop",
        "print-config": "print the resolved config (stdout) and where each value is from (stderr), then stop",
        "schema": "print the JSON schema of the config, then stop",
    }
    for name, text in {**flags, **own}.items():
        parser.add_argument(f"--{name}", action="store_true", help=text.replace("%", "%%"))
    return parser


def _unknown_flag(cls: type[Config], flag: str, flags: Sequence[str]) -> str:
    name, equals, value = flag.lstrip("-").partition("=")
    key = name.replace("-", "_")
    key = key if key in leaves(cls) else cls.aliases.get(key)
    if key in leaves(cls):
        return f"unknown option {flag}; keys take no dashes: write {key}={value if equals else 'VALUE'}"
    near = difflib.get_close_matches(name, flags, 1)
    return f"unknown option {flag}; " + (f"did you mean --{near[0]}?" if near else "--help lists all options")


def _key_help(cls: type[Config], width: int) -> str:
    """Every key with its default, its description and what it takes."""
    tree = schema(cls)
    head = "keys of the config, also set as key=value; paths start at the working directory:"
    lines = [_wrapped(head, width)]
    for name, info in leaves(cls).items():
        if name in cls.headings:
            lines += ["", f"{cls.headings[name]}:"]
        default = "(required)" if info.is_required() else f"= {show(default_of(info), width)}"
        words = schema_words(schema_at(tree, tuple(name.split("."))))
        about = f"{info.description or ''} [{words}]".strip()
        lines += [f"  {name} {default}", _wrapped(f"      {about}", width)]
    return "\n".join(lines)


def _origin_table(loaded: Loaded[Any]) -> str:
    config, origins = loaded.config, loaded.origins
    values = {name: show(to_jsonable_python(operator.attrgetter(name)(config))) for name in origins}
    wide, high = max(map(len, values), default=0), max(map(len, values.values()), default=0)
    return "\n".join(f"{name:{wide}}  {values[name]:{high}}  {origins[name]}" for name in origins)


def _wrapped(text: str, width: int) -> str:
    """Lines longer than `width` wrapped under their own indent; a shorter one, such as a command, stays."""
    lines = []
    for line in text.strip("\n").splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines.append(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False))
    return "\n".join(lines)
