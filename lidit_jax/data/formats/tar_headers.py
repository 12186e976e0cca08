"""Parses the headers of a tar file: names, offsets and sizes of its regular files, without extracting anything.

Not the standard library's `tarfile`, because shards are untrusted: tarfile silently takes a damaged header in the
middle for the end of the file, and has had endless loops on forged sizes (CVE-2025-8194).
Format: POSIX.1-1988 ustar, POSIX.1-2001 pax ("path" and "size") and GNU long names and base-256 sizes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lidit_jax.data.formats.files import File

BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or pax records
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories: ignore their size field


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
      name: path of the file.
      start: offset of its headers in bytes.
      offset: offset of its data in bytes.
      size: size of its data in bytes.
      end: offset of the headers of the next file.
      complete: False if the tar ends within the file's data.
    """

    name: str
    start: int
    offset: int
    size: int
    end: int
    complete: bool


class DamagedTar(Exception):
    """The rest of the tar cannot be read; the message gives the reason in a few words."""


def walk(file: File, start: int = 0) -> Iterator[Member]:
    """Yields the regular files of an uncompressed tar, in order, until its end mark or its last byte.

    Args:
      file: the open tar.
      start: offset of the headers to begin with (`Member.start`).

    Raises:
      DamagedTar: the tar is damaged here; all files before the damage have been yielded.
    """
    end = file.size
    if not end:
        raise DamagedTar("empty tar")
    position, overrides = start, {}
    while position < end:
        header = file.read(position, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar("truncated tar")
        if not any(header):
            return
        _check(header, position)
        kind, data = header[156:157], position + BLOCK
        size = _number(header[124:136], position)
        if kind in _WITHOUT_DATA:
            position, overrides = data, {}
            start = position
            continue
        if kind in (b"L", b"x", b"X"):
            body = _read_extension(file, data, size)
            overrides |= _pax_records(body) if kind != b"L" else {"path": body.rstrip(b"\0")}
            position = data + _padded(size)
            continue
        if kind in (b"K", b"g"):
            if data + size > end:
                raise DamagedTar("truncated tar")
            position = data + _padded(size)
            continue
        size = int(overrides.get("size", size))
        name = overrides.get("path", _name(header)).decode("utf-8", "replace")
        complete = data + size <= end
        position = data + _padded(size)
        if kind in _REGULAR and not name.endswith("/") and "sparse" not in overrides:
            yield Member(name, start, data, size, position, complete)
        if not complete:
            raise DamagedTar("truncated tar")
        overrides, start = {}, position


def _check(header: bytes, position: int) -> None:
    stored = _number(header[148:156], position)
    blanked = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blanked)
    signed = unsigned - 256 * sum(byte > 127 for byte in blanked) if stored != unsigned else stored
    if stored not in (unsigned, signed):  # some old writers add signed bytes
        raise _damaged(position)


def _damaged(position: int) -> DamagedTar:
    return DamagedTar("damaged tar" if position else "not a tar")


def _number(field: bytes, position: int) -> int:
    """Parses a number field: octal digits, or big-endian binary if the first byte is 0x80 (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not all(0x30 <= digit <= 0x37 for digit in digits):
        raise _damaged(position)
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # The old GNU format ("ustar" and two blanks) stores other fields where POSIX has the prefix.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _read_extension(file: File, offset: int, size: int) -> bytes:
    if size > _MAX_EXTENSION_BYTES:
        raise DamagedTar("damaged tar")
    body = file.read(offset, size)
    if len(body) < size:
        raise DamagedTar("truncated tar")
    return body


def _pax_records(body: bytes) -> dict[str, bytes]:
    r"""Parses the pax records ("LENGTH KEY=VALUE\n") "path" and "size"; adds "sparse" for files stored with holes."""
    records = {}
    while body.strip(b"\0"):
        length, _, _ = body.partition(b" ")
        if not (length.isdigit() and len(length) < 8 and len(length) + 3 <= int(length) <= len(body)):
            raise DamagedTar("damaged tar")
        keyword, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path" or (keyword == b"size" and value.isdigit() and len(value) < 20):
            records[keyword.decode()] = value
        elif keyword.startswith(b"GNU.sparse."):
            records["sparse"] = b""
        body = body[int(length) :]
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
