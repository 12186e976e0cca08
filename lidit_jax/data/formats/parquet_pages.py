"""Checks what the pages of a Parquet file claim to expand to, before anything is decompressed.

A page of a few kilobytes can expand to gigabytes, and the sizes in the footer of a file need not be true. Page headers
are Thrift structs in the compact protocol; pyarrow reads the rest.
"""

from collections.abc import Callable

_HEADER_BYTES = (1 << 14, 1 << 20, 1 << 24)  # statistics in a header may hold whole values
_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3  # field numbers of PageHeader
_MAX_DEPTH = 8


class DamagedPages(Exception):
    """Pages that cannot be read, or that would expand to more than is allowed; the message gives the reason."""


def check_pages(read: Callable[[int, int], bytes], start: int, end: int, num_values: int, max_bytes: int) -> None:
    """Checks the headers of all pages of a column chunk.

    Args:
      read: returns a number of bytes from an offset of the file, fewer at its end.
      start: offset of the chunk.
      end: end of the chunk.
      num_values: number of values in the chunk.
      max_bytes: largest page, uncompressed.

    Raises:
      DamagedPages: a page is larger, or a header is damaged.
    """
    position, pages = start, 0
    while position < end:
        header_size, uncompressed, compressed = _read_header(read, position, end)
        if uncompressed > max_bytes:
            raise DamagedPages(f"Parquet page over {max_bytes >> 20} MiB")
        position, pages = position + header_size + compressed, pages + 1
        if pages > num_values + 1:  # one page may be the dictionary
            raise DamagedPages("damaged Parquet page")


def _read_header(read: Callable[[int, int], bytes], position: int, end: int) -> tuple[int, int, int]:
    """Returns the size of a page header, and the uncompressed and compressed size of its page."""
    for size in _HEADER_BYTES:
        data = read(position, min(size, end - position))
        try:
            reader = _CompactReader(data)
            sizes = reader.struct()
            uncompressed, compressed = sizes[_UNCOMPRESSED_SIZE], sizes[_COMPRESSED_SIZE]
        except IndexError:
            if len(data) < size:
                break
            continue
        except (KeyError, ValueError):
            break
        if min(uncompressed, compressed) >= 0:
            return reader.position, uncompressed, compressed
        break
    raise DamagedPages("damaged Parquet page")


class _CompactReader:
    """Reads Thrift's compact protocol; raises IndexError at the end of the data, ValueError if they are malformed."""

    def __init__(self, data: bytes):
        self._data, self.position = data, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Reads a struct and returns its fields that are integers, by number."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        found, number = {}, 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            value = self._value(header & 15, depth)
            if value is not None:
                found[number] = value
        return found

    def _value(self, kind: int, depth: int) -> int | None:
        """Reads a value; returns it if it is an integer."""
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 3:
            self._skip(1)
        elif kind == 7:
            self._skip(8)
        elif kind == 8:
            self._skip(self._varint())
        elif kind == 12:
            self.struct(depth + 1)
        elif kind not in (1, 2):  # a boolean is its type alone; page headers have no lists
            raise ValueError(f"type {kind}")
        return None

    def _byte(self) -> int:
        value = self._data[self.position]
        self.position += 1
        return value

    def _skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self._data):
            raise IndexError("end of the data")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("integer too long")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
