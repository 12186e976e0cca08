"""Small files: JSON written atomically, text files named by users, and which files of a folder are hidden."""

import codecs
import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from lidit_jax.errors import UserError

MAX_BYTES = 64 << 20  # of a file that is read as a whole
# Deeper JSON can be parsed, but then fails to be encoded, pickled or walked through by recursive functions.
_MAX_JSON_DEPTH = 100
# Entries that operating systems and other programs add to folders, besides those whose names start with a dot (._NAME,
# .ipynb_checkpoints, .Trash, …).
_ADDED_ENTRIES = (
    *("__MACOSX", "__pycache__", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "RECYCLER", "lost+found"),
    "System Volume Information",
)


def finite(value: Any) -> Any:
    """Returns a copy with NaN and infinities, which JSON lacks, replaced by None.

    Args:
      value: nested dictionaries, lists and tuples of strings, numbers, booleans and None.
    """
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(file: epath.Path) -> Any:
    """Returns the value in a JSON file, which may be damaged or forged.

    Raises:
      OSError: the file is missing or cannot be read.
      ValueError: it is a folder, larger than `MAX_BYTES`, not JSON, or nested too deeply.
    """
    try:
        size = file.stat().length
        if size > MAX_BYTES:
            raise ValueError(f"it has {size >> 20} MiB, more than {MAX_BYTES >> 20}")
        return decode_json(file.read_bytes().decode("utf-8"))
    except IsADirectoryError:
        raise ValueError("it is a folder") from None


def decode_json(encoded: str | bytes) -> Any:
    """Returns the value of a JSON text, which may be damaged or forged.

    Raises:
      ValueError: it is not JSON, or nested too deeply.
    """
    try:
        value = json.loads(encoded)
    except RecursionError:
        value = None
    else:
        if not _is_too_deep(value):
            return value
    raise ValueError("it is nested too deeply")


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        lists = (
            outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, dict | list)
        )
        level = [inner for values in lists for inner in values]
        if not level:
            return False
    return True


def write_json(file: epath.Path, value: Any, indent: int | None = 2) -> None:
    """Writes `value` atomically: readers never see a partly written file.

    Args:
      file: the file to write.
      value: JSON-serialisable.
      indent: indentation in spaces; None writes one line.

    Raises:
      OSError: if the file cannot be written; an existing one is kept.
    """
    write_bytes(file, (json.dumps(value, indent=indent) + "\n").encode())


def write_bytes(file: epath.Path, data: bytes) -> None:
    """Writes a file atomically.

    Raises:
      OSError: if the file cannot be written; an existing one is kept, and nothing else is left.
    """
    with new_file(file) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def new_file(file: epath.Path) -> Iterator[epath.Path]:
    """Yields a path to write to, which is renamed to `file` at the end, or removed if an exception is raised."""
    temporary = file.parent / f".{file.name}.new"
    try:
        yield temporary
        temporary.replace(file)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        name_file(error, file, temporary)
        raise


@contextlib.contextmanager
def created_folder(folder: epath.Path) -> Iterator[None]:
    """Creates a folder for what the body writes; removes it again if an exception is raised and nothing is in it."""
    is_local = "://" not in os.fspath(folder)
    created = [place for place in (folder, *folder.parents) if is_local and not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in created:
            with contextlib.suppress(OSError):  # something is in it, or the disk fails: the first error is raised
                os.rmdir(place)
        raise


def name_file(error: BaseException, file: os.PathLike | str, temporary: os.PathLike | None = None) -> None:
    """Sets the attribute `filename` of an error that names its temporary file or, as for a full disk, no file.

    Errors of libraries, which lack the attribute, get it too: `describe_system_error` looks there first.
    """
    if isinstance(error, OSError) and not error.errno:  # its text would get "[Errno None]"
        return
    if getattr(error, "filename", None) in (None, temporary and os.fspath(temporary)):
        setattr(error, "filename", os.fspath(file))  # noqa: B010  mypy knows no such attribute of BaseException


def is_unused(folder: epath.Path) -> bool:
    """Returns True if a folder is missing or holds only what interrupted writes have left in it."""
    return not folder.exists() or all(re.fullmatch(r"\..+\.(new|tmp)", entry.name) for entry in folder.iterdir())


def existing_parent(path: os.PathLike) -> Path:
    """Returns the nearest part of a local path that exists: the path itself, or one of the folders that it is in."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def check_writable(folder: epath.Path, named: str) -> None:
    """Raises UserError if a local folder can't be written or created, or its disk is full; creates nothing.

    Args:
      folder: the folder; others than local ones are not checked.
      named: how the user named it, e.g. "--out=x", for error messages.
    """
    if "://" in os.fspath(folder):
        return
    place = existing_parent(folder)
    if not place.is_dir():
        raise UserError(f"{named}: {place} is a file: name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        is_read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY  # Windows lacks it
        reason = "is on a read-only file system" if is_read_only else "is not yours to write"
        raise UserError(f"{named}: {place} {reason}: choose another folder")
    if not shutil.disk_usage(place).free:
        raise UserError(f"{named}: the disk of {place} is full: free disk space or choose another folder")


def is_writable(folder: epath.Path) -> bool:
    """Returns True unless a local folder can't be written or its disk is full; see `check_writable`."""
    try:
        check_writable(folder, "")
    except UserError:
        return False
    return True


def read_text(file: epath.Path, named: str, what: str) -> str:
    """Reads a text file in UTF-8 or UTF-16, without its byte-order mark.

    Args:
      file: the file to read.
      named: how the user named the file, e.g. "--file=x.txt", for error messages.
      what: what the file should contain, e.g. "a list of prompts", for error messages.

    Raises:
      UserError: if it is larger than `MAX_BYTES`, or in neither encoding.
    """
    if file.stat().length > MAX_BYTES:
        raise UserError(f"{named} is larger than {MAX_BYTES >> 20} MiB: check that it is {what}")
    encoded = file.read_bytes()
    try:
        return encoded.decode(text_encoding(encoded))
    except UnicodeDecodeError as error:
        raise UserError(f"{named} is not UTF-8 (byte {error.start}): if it is {what}, save it as UTF-8") from None


def text_encoding(start: bytes) -> str:
    """Returns the encoding of a text from its first bytes: UTF-16 if these say so, else UTF-8 ("utf-8-sig")."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a byte-order mark, every other byte of an ASCII character is zero.
    if len(start) > 1 and (start[0] == 0) != (start[1] == 0):
        return "utf-16-le" if start[0] else "utf-16-be"
    return "utf-8-sig"


def split_lines(text: str) -> list[str]:
    r"""Splits a text into lines, which only \n and \r\n end.

    `str.splitlines` also splits at characters that occur within prompts, such as U+2028, \x0b, \x0c and \x85.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def is_hidden(name: str) -> bool:
    """Returns True if a file or folder of this name was not put there by the user, such as "._0.jpg" and "__MACOSX"."""
    return name.startswith(".") or name in _ADDED_ENTRIES


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks through a local folder as `os.walk` does, in the order of names, without hidden entries.

    Links to folders are followed; a folder that several links lead to is visited once.

    Raises:
      OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:  # by default, `os.walk` leaves out what it cannot read
        raise error

    visited = set()
    for directory, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield directory, folders, sorted(name for name in names if not is_hidden(name))
