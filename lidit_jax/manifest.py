"""Manifests of checkpoints: the size and checksum of every file, written when a save is complete, verified before use.

A checksum finds accidents (a failing disk, an interrupted copy, a file edited by hand), not an attacker, who would
write a manifest that fits. No path in a manifest is ever opened: its names are only compared with those in the folder.
"""

import concurrent.futures
import errno
import os
from collections.abc import Mapping
from typing import Any

import xxhash
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import read_json, write_json

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
CHUNK = 8 << 20  # bytes read at a time
THREADS = 8  # hash in parallel: xxhash and reads release the GIL
# Files at the top of a checkpoint that Orbax writes after the manifest. Nothing is restored from them.
WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class DamagedError(Exception):
    """A checkpoint that differs from what was saved; the message says how."""


def write_manifest(folder: epath.Path) -> None:
    """Writes the manifest of a complete checkpoint, atomically.

    Args:
      folder: folder of the checkpoint.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    files = files_of(folder)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        entries = dict(zip(files, pool.map(_entry, files.values()), strict=True))
    write_json(folder / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": entries}, indent=1)


def verify(folder: epath.Path, part: int = 0, parts: int = 1) -> bool:
    """Compares a checkpoint with its manifest.

    Args:
      folder: folder of the checkpoint.
      part: number of the part of the files whose checksums are compared; names and sizes are compared in each.
      parts: number of parts, for hosts that share the work.

    Returns:
      True, or False if there is no manifest, as in checkpoints of earlier versions.

    Raises:
      DamagedError: a file is missing, has been added, or has other contents than when it was saved.
      UserError: a file cannot be read.
    """
    try:
        found, entries = files_of(folder), _read(folder / MANIFEST_FILE)
        if entries is None:
            return False
        if differing := sorted(found.keys() ^ entries.keys()):
            name = differing[0]
            raise DamagedError(f"{name:.200} is missing" if name in entries else f"{name:.200} is not in its manifest")
        for name, file in found.items():
            size = file.stat().length
            if size != entries[name].get("bytes"):
                raise DamagedError(f"{name:.200} has {size} bytes instead of {entries[name].get('bytes')!r:.40}")
        mine = sorted(found, key=lambda name: (-entries[name]["bytes"], name))[part::parts]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for name, entry in zip(mine, pool.map(_entry, (found[name] for name in mine)), strict=True):
                if entry != entries[name]:
                    raise DamagedError(f"{name:.200} has other contents than when it was saved")
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:  # a bad sector
            raise DamagedError(f"{error.filename or 'a file'} can't be read ({error.strerror})") from error
        raise UserError(f"{folder} can't be read ({error.strerror or error})") from error
    return True


def files_of(folder: epath.Path) -> dict[str, epath.Path]:
    """Returns the files of a checkpoint that its manifest lists, by their path in the folder, sorted.

    Raises:
      DamagedError: it is no folder, or there is something other than files and folders in it. A link could lead out of
        the folder.
    """
    if "://" not in str(folder) and os.path.islink(folder):
        raise DamagedError("it is a link")
    if folder.exists() and not folder.is_dir():
        raise DamagedError("it is not a folder")
    files, folders = {}, [(folder, "")]
    while folders:
        parent, prefix = folders.pop()
        for path in parent.iterdir():
            name = f"{prefix}{path.name}"
            if "://" not in str(path) and os.path.islink(path):
                raise DamagedError(f"{name:.200} is a link")
            if path.is_dir():
                folders.append((path, f"{name}/"))
            elif not path.is_file():
                raise DamagedError(f"{name:.200} is not a file")
            # Hidden files are those of file managers and network disks.
            elif name not in (MANIFEST_FILE, *WRITTEN_LATER) and not path.name.startswith("."):
                files[name] = path
    return dict(sorted(files.items()))


def _entry(file: epath.Path) -> dict[str, Any]:
    """Returns the manifest's entry of a file."""
    checksum, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            checksum.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3_128": checksum.hexdigest()}


def _read(file: epath.Path) -> Mapping[str, Mapping[str, Any]] | None:
    """Returns the entries of a manifest by file, or None if it does not exist.

    Raises:
      DamagedError: it is not a manifest, or of another version.
    """
    if not file.exists():
        return None
    try:
        manifest = read_json(file)
        version, entries = manifest["format_version"], manifest["files"]
        are_entries = all(type(entry["bytes"]) is int for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST_FILE} is not a manifest") from error
    if version != FORMAT_VERSION or not are_entries:
        raise DamagedError(f"{MANIFEST_FILE} is not a manifest of version {FORMAT_VERSION}")
    return entries
