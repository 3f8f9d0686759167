"""What a picture may be named, and which names belong together. No picture is opened here."""

import re
import unicodedata
from pathlib import PurePosixPath


def name_objection(name: object) -> str:
    """Why a file_name cannot be used, or nothing."""
    if not isinstance(name, str):
        return "is not text"
    if not name.strip() or PurePosixPath(name) == PurePosixPath("."):
        return "is empty"
    if "\0" in name or not is_unicode(name):
        return "holds a character that no file name can have"
    if "://" in name:
        return "is a URL"
    if "\\" in name:
        return "holds a backslash; write /"
    if name.startswith("/") or re.match("[A-Za-z]:/", name):
        return "is absolute"
    return "leaves the folder by '..'" if ".." in PurePosixPath(name).parts else ""


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which neither a file nor a tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_tar(name: str) -> bool:
    """Compressed ones among them."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def stem(name: str) -> str:
    """A relative name without its suffix; PurePosixPath takes ten times as long, which many pictures feel."""
    head, _, suffix = name.rpartition(".")
    return head if suffix and "/" not in suffix and head and head[-1] != "/" else name


def loose(name: str) -> str:
    """What names have in common that differ in case, suffix or Unicode form (macOS writes NFD)."""
    return unicodedata.normalize("NFC", stem(name)).casefold()
