"""Parses the headers of a tar file: names, offsets and sizes of its files, without extracting anything.

Not the standard library's `tarfile`, because shards are untrusted: tarfile silently takes a damaged header in the
middle for the end of the file, and has had endless loops on forged sizes (CVE-2025-8194).
Format: POSIX.1-1988 ustar, POSIX.1-2001 pax ("path" and "size") and GNU long names, sparse files and base-256 sizes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lidit_jax.data.formats.files import File

BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or pax records
_MAX_RECORDS = 1000  # of a pax header
_MAX_NAME_BYTES = 1 << 12  # longest path that Linux opens
_MAX_SPARSE_MAPS = 1 << 10  # blocks that describe one sparse file
_MAX_EXTENSIONS = 16  # long names, long links and pax headers before one file
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_WITHOUT_DATA = (*_LINKS, b"3", b"4", b"5", b"6", b"V")  # also devices, folders, volume labels: ignore their size field
_GNU_SPARSE = b"S"
_ZEROS_AT_ONCE = 1 << 20
# Archives end in zeros, and other archives may follow (`cat *.tar`). Looking for those has to end in a file of zeros.
_MAX_ZEROS = 1 << 24
# First bytes of files that are often given the name of a tar, and what they are.
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
}


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
      name: path of the file; bytes that are not UTF-8 are surrogates, so different names stay different.
      start: offset of its headers in bytes.
      offset: offset of its data in bytes.
      size: size of its data in bytes.
      end: offset of the headers of the next file.
      headers: number of headers from the beginning of the walk to its data.
      fault: why its data cannot be read, in a few words; "" if they can.
    """

    name: str
    start: int
    offset: int
    size: int
    end: int
    headers: int
    fault: str = ""


class DamagedTar(Exception):
    """The rest of the tar cannot be read; the message gives the reason in a few words."""


def walk(file: File, start: int = 0) -> Iterator[Member]:
    """Yields the files of an uncompressed tar, and of tars that are appended to it, in order; no folders or devices.

    Args:
      file: the open tar.
      start: offset of the headers to begin with (`Member.start`).

    Raises:
      DamagedTar: the tar is damaged here; all files before the damage have been yielded.
    """
    end = file.size
    if not end:
        raise DamagedTar("empty tar")
    position, overrides, headers, extensions, is_appended = start, {}, 0, 0, False
    while position < end:
        header = file.read(position, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar("truncated tar")
        if not any(header):
            start = position = _skip_zeros(file, position)
            overrides, extensions, is_appended = {}, 0, True
            continue
        reason = "damaged tar" if position else _not_a_tar(header)
        _check(header, "unknown data after the tar" if is_appended else reason)
        is_appended = False
        headers += 1
        kind, data = header[156:157], position + BLOCK
        size = _number(header[124:136])
        if kind in (b"L", b"x", b"X", b"K", b"g"):
            extensions += 1
            if extensions > _MAX_EXTENSIONS:
                raise DamagedTar("damaged tar")
            overrides |= _read_overrides(file, kind, data, size)
            position = data + _padded(size)
            continue
        size = 0 if kind in _WITHOUT_DATA else int(overrides.get("size", size))
        path = overrides.get("path", _name(header))
        if len(path) > _MAX_NAME_BYTES:
            raise DamagedTar("damaged tar")
        name = path.decode("utf-8", "surrogateescape")
        if kind == _GNU_SPARSE:
            data = _skip_sparse_maps(file, header, data)
        complete = data + size <= end
        position = data + _padded(size)
        if not name.endswith("/") and (kind not in _WITHOUT_DATA or kind in _LINKS):
            is_sparse = kind == _GNU_SPARSE or "sparse" in overrides
            fault = "" if complete else "truncated file"
            yield Member(name, start, data, size, position, headers, fault or _unread(kind, is_sparse))
        if not complete:
            raise DamagedTar("truncated tar")
        overrides, extensions, start = {}, 0, position


def _unread(kind: bytes, is_sparse: bool) -> str:
    """Returns why files of a kind are not read, or ""."""
    if kind in _LINKS:
        return "link instead of a file"
    if is_sparse:
        return "sparse file in the tar"
    return "" if kind in _REGULAR else "unknown kind of file in the tar"


def _skip_zeros(file: File, position: int) -> int:
    """Returns the offset of the first block that is not zero, or the end of the file."""
    first = position
    while position < file.size:
        if position - first > _MAX_ZEROS:
            raise DamagedTar("tar with over 16 MiB of zeros")
        chunk = file.read(position, _ZEROS_AT_ONCE)
        rest = chunk.lstrip(b"\0")
        if rest:
            return position + (len(chunk) - len(rest)) // BLOCK * BLOCK
        if not chunk:
            break
        position += len(chunk)
    return file.size


def _skip_sparse_maps(file: File, header: bytes, position: int) -> int:
    """Returns the offset of the data of a GNU sparse file, after the blocks that continue its map."""
    block, flag = header, 482
    for _ in range(_MAX_SPARSE_MAPS):
        if block[flag : flag + 1] in (b"\0", b""):
            return position
        block, flag = file.read(position, BLOCK), 504
        position += BLOCK
    raise DamagedTar("damaged tar")


def _not_a_tar(header: bytes) -> str:
    """Returns what a file that does not begin with a tar header is, in a few words."""
    for magic, found in _OTHER_FORMATS.items():
        if header.startswith(magic):
            return f"not a tar but {found} (unpack it first)"
    return "not a tar"


def _check(header: bytes, otherwise: str) -> None:
    """Raises DamagedTar with the reason `otherwise` if the checksum of a header is wrong."""
    try:
        stored = _number(header[148:156])
    except DamagedTar as error:
        raise DamagedTar(otherwise) from error
    blanked = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blanked)
    signed = unsigned - 256 * sum(byte > 127 for byte in blanked) if stored != unsigned else stored
    if stored not in (unsigned, signed):  # some old writers add signed bytes
        raise DamagedTar(otherwise)


def _number(field: bytes) -> int:
    """Parses a number field: octal digits, or big-endian binary if the first byte is 0x80 (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not all(0x30 <= digit <= 0x37 for digit in digits):
        raise DamagedTar("damaged tar")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # The old GNU format ("ustar" and two blanks) stores other fields where POSIX has the prefix.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _read_overrides(file: File, kind: bytes, offset: int, size: int) -> dict[str, bytes]:
    """Returns the values that an extension header sets for the next file: "path", "size", "sparse"."""
    if offset + size > file.size:
        raise DamagedTar("truncated tar")
    if kind in (b"K", b"g"):  # the target of a link, and records for all files
        return {}
    if size > _MAX_EXTENSION_BYTES:
        raise DamagedTar("damaged tar")
    body = file.read(offset, size)
    if len(body) < size:
        raise DamagedTar("truncated tar")
    return {"path": body.rstrip(b"\0")} if kind == b"L" else _pax_records(body)


def _pax_records(body: bytes) -> dict[str, bytes]:
    r"""Parses the pax records ("LENGTH KEY=VALUE\n") "path" and "size"; adds "sparse" for files stored with holes."""
    records, position, end, count = {}, 0, len(body.rstrip(b"\0")), 0
    while position < end:
        length, blank, _ = body[position : position + 8].partition(b" ")
        count += 1
        if not (blank and length.isdigit() and len(length) + 3 <= int(length) <= len(body) - position):
            raise DamagedTar("damaged tar")
        if count > _MAX_RECORDS:
            raise DamagedTar("damaged tar")
        keyword, _, value = body[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        if keyword == b"path" or (keyword == b"size" and value.isdigit() and len(value) < 20):
            records[keyword.decode()] = value
        elif keyword.startswith(b"GNU.sparse."):
            records["sparse"] = b""
            if keyword == b"GNU.sparse.name":
                records["name"] = value
        position += int(length)
    if "name" in records:  # the path is that of a file that GNU tar would make up
        records["path"] = records.pop("name")
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
