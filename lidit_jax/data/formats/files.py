"""Finds the files of a data set and reads byte ranges of them, on a disk or through fsspec (gs://, s3://, …)."""

import collections
import glob
import itertools
import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from lidit_jax.errors import UserError
from lidit_jax.files import is_hidden

_MAX_FILES = 1_000_000
_OPEN_FILES_PER_THREAD = 16
_REMOTE_BLOCK = 1 << 23  # bytes per request when a remote file is read sequentially


class File(Protocol):
    """An open file; its methods raise OSError."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, fewer at the end of the file."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


def is_remote(path: str) -> bool:
    """Returns True if a path is a URL, which is read through fsspec."""
    return "://" in path


def open_file(path: str) -> File:
    """Opens a file for sequential reading, which may skip ranges.

    Raises:
      OSError: the file cannot be opened.
      UserError: the protocol of the path is unknown.
    """
    return _RemoteFile(path) if is_remote(path) else _LocalFile(path)


class _LocalFile:
    """A file descriptor that is closed when its owner is deleted or the owner's thread ends."""

    def __init__(self, path: str):
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        self.__del__()

    def __del__(self, close=os.close):  # bound early: module globals are gone at interpreter exit
        if self._descriptor >= 0:
            close(self._descriptor)
            self._descriptor = -1


class _RemoteFile:
    def __init__(self, path: str):
        filesystem, name = remote_filesystem(path)
        self._file = filesystem.open(name, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead")
        self.size = filesystem.size(name)

    def read(self, offset: int, size: int) -> bytes:
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except OSError:
            raise
        except Exception as error:  # each protocol has its own exceptions
            raise OSError(str(error)) from error

    def close(self) -> None:
        self._file.close()


class RangeReader:
    """Reads byte ranges of several files. Each thread opens its own, so that none closes a file that another reads."""

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)
        self._local = threading.local()

    def __reduce__(self):
        return RangeReader, (self.paths,)

    def read(self, ranges: Sequence[tuple[int, int, int]]) -> list[bytes | OSError]:
        """Reads several ranges; those of remote files concurrently.

        Args:
          ranges: (index of the file, first byte, end) of each range.

        Returns:
          For each range its bytes, fewer at the end of the file, or the OSError.
        """
        if not any(is_remote(self.paths[file]) for file, _, _ in ranges):
            return [self._read_local(*byte_range) for byte_range in ranges]
        filesystem, _ = remote_filesystem(self.paths[ranges[0][0]])
        names = [filesystem._strip_protocol(self.paths[file]) for file, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [end for _, _, end in ranges]
        found = filesystem.cat_ranges(names, starts, ends, on_error="return")
        return [data if isinstance(data, bytes) else OSError(str(data)) for data in found]

    def _read_local(self, file: int, start: int, end: int) -> bytes | OSError:
        opened = self._local.__dict__.setdefault("opened", collections.OrderedDict())
        try:
            if file not in opened:
                if len(opened) >= _OPEN_FILES_PER_THREAD:
                    opened.popitem(last=False)
                opened[file] = _LocalFile(self.paths[file])
            opened.move_to_end(file)
            return opened[file].read(start, end - start)
        except OSError as error:
            return error


def remote_filesystem(path: str):
    """Returns the fsspec file system of a path, and the path's name in it.

    Raises:
      UserError: the protocol is unknown, or the package for it is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path!r} cannot be read: {error}") from error


def modification_time(path: str) -> float | None:
    """Returns the modification time in seconds; None for missing and remote files (objects never change in place)."""
    return None if is_remote(path) or not os.path.exists(path) else os.stat(path).st_mtime


# --- finding ----------------------------------------------------------------------------------------------------


def find_files(path: str | os.PathLike, kind: str, name: re.Pattern[str]) -> tuple[str, ...]:
    """Returns the files that a path names, sorted; hidden ones (`files.is_hidden`) only if the path names them.

    Args:
      path: a folder, a single file, a glob pattern or a brace range.
      kind: kind of file for error messages, e.g. ".tar".
      name: regular expression that selects the files of a folder.

    Raises:
      UserError: no file matches, or one of a brace range is missing.
    """
    path = os.fspath(path)
    filesystem = _Remote(path) if is_remote(path) else _Local()
    if filesystem.is_folder(path):
        found = [file for file in filesystem.listed(path) if name.search(file) and _is_visible(file, path)]
        if not found:
            below = _folders_with(filesystem, path, name)
            hint = f", but {' and '.join(map(repr, below[:5]))} does: name that with" if below else ": check"
            raise UserError(f"folder {path!r} holds no {kind} file{hint} data.path")
        return tuple(sorted(set(found)))
    if filesystem.exists(path):
        return (path,)
    expanded = list(itertools.islice(_expand_braces(path), _MAX_FILES + 1))
    if len(expanded) > _MAX_FILES:
        raise UserError(f"data path {path!r} names more than {_MAX_FILES} files: check the numbers in its braces")
    if any(character in path for character in "*?["):
        found = [file for pattern in expanded for file in filesystem.matching(pattern) if _is_visible(file, pattern)]
        if not found:
            raise UserError(f"no file matches {path!r}: check data.path")
        return tuple(sorted(set(found)))
    if not expanded:
        raise UserError(f"data path {path!r} names no file: its braces count down, so write the lower number first")
    missing = [file for file in expanded if not filesystem.exists(file)]
    if missing and len(expanded) > 1:
        raise UserError(f"{len(missing)} of the {len(expanded)} files of {path!r} do not exist, first {missing[0]!r}")
    if missing:
        raise UserError(f"data path {path!r} does not exist: give a folder of {kind} files, one file, or a pattern")
    return tuple(sorted(set(expanded)))


def select_shards(path: str | os.PathLike, found: Sequence[str], shards: slice | None) -> tuple[str, ...]:
    """Returns a slice of the files that a path names; None: all.

    Raises:
      UserError: the slice is empty.
    """
    selected = tuple(found[shards] if shards else found)
    if not selected:
        raise UserError(
            f"{os.fspath(path)!r} has {len(found)} shards, too few to hold some out: "
            "lower --config.data.held_out_shards"
        )
    return selected


def _is_visible(file: str, path: str) -> bool:
    """Returns True unless a part of the file's path that `path` does not spell out is hidden."""
    spelled_out = path.split("/")
    return not any(is_hidden(part) for part in file.split("/") if part not in spelled_out)


def _folders_with(filesystem: "_Local | _Remote", folder: str, name: re.Pattern[str]) -> list[str]:
    """Returns the first folders in a folder that hold a file of this name."""
    entries = itertools.islice(
        (entry for entry in sorted(filesystem.listed(folder)) if _is_visible(entry, folder)), 100
    )
    folders = (entry for entry in entries if filesystem.is_folder(entry))
    return [entry for entry in folders if any(map(name.search, filesystem.listed(entry)))]


class _Local:
    is_folder = staticmethod(os.path.isdir)
    exists = staticmethod(os.path.exists)

    def listed(self, folder: str) -> list[str]:
        return glob.glob(os.path.join(glob.escape(folder), "*"))

    def matching(self, pattern: str) -> list[str]:
        return glob.glob(pattern, recursive=True)


class _Remote:
    def __init__(self, path: str):
        self._filesystem, _ = remote_filesystem(path)
        self._folders: dict[str, set[str]] = {}

    def is_folder(self, path: str) -> bool:
        return self._call(self._filesystem.isdir, path)

    def exists(self, path: str) -> bool:
        """Looks up the folder's listing, fetched once: a brace range may name thousands of files in one folder."""
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = {found.rpartition("/")[2] for found in self.listed(folder)}
        return name in self._folders[folder]

    def listed(self, folder: str) -> list[str]:
        try:
            names = self._call(self._filesystem.ls, folder, detail=False)
        except FileNotFoundError:
            return []
        return [self._filesystem.unstrip_protocol(name) for name in names]

    def matching(self, pattern: str) -> list[str]:
        return [self._filesystem.unstrip_protocol(name) for name in self._call(self._filesystem.glob, pattern)]

    def _call(self, function, path: str, **options):
        try:
            return function(path, **options)
        except FileNotFoundError:
            raise
        except Exception as error:  # each protocol has its own exceptions: no login, no bucket, no network
            raise UserError(f"{path!r} cannot be read: {error}") from error


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expands braces as a shell does.

    "{00..02}" counts, zero-padded like its first number; "{a,b}" lists alternatives. A generator, because a pattern may
    name very many files.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1]) if match else None
    if not match or not (numbers or "," in match[1]):
        yield pattern
        return
    if numbers:
        first, last = numbers.groups()
        choices = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        choices = iter(match[1].split(","))
    for choice in choices:
        for rest in _expand_braces(pattern[match.end() :]):
            yield pattern[: match.start()] + choice + rest
