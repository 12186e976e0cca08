"""Reads rows of Parquet files, on a disk or through fsspec, in bounded memory even if the files are forged."""

import bisect
import collections
import contextlib
import dataclasses
import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lidit_jax.data.formats.files import RangeReader, open_file
from lidit_jax.data.formats.parquet_pages import DamagedPages, check_pages

MAX_PAGE_BYTES = 1 << 30  # pyarrow writes the first 1,024 images of a row group as a single page
MAX_TEXT_PAGE_BYTES = 1 << 26
_MAX_FOOTER_BYTES = 1 << 26
_MAX_ROWS = 1 << 40
_OPEN_FOOTERS = 256
_READ_AT_ONCE = 1 << 26  # column chunks of a row group that are read in one go; larger ones are read in pieces
_GAP = 1 << 20  # bytes between two chunks that are cheaper to read than to request separately
_BUFFER = 1 << 22
_TEXT_ROWS_AT_ONCE = 16


class DamagedParquet(Exception):
    """A Parquet file that cannot be read, at all or from some row on; the message gives the reason in a few words."""


class UnreadableFile(Exception):
    """A file that the disk or the network fails to provide, whatever it contains."""


class Chunk(NamedTuple):
    """A column chunk, the values of one column in a row group.

    Attributes:
      path: the column, or the field of a struct column ("image.bytes").
      start: its first byte in the file.
      end: its end.
      num_values: number of values, including nulls.
      uncompressed_size: size of its pages when uncompressed. Like all of these values, it may be forged.
      is_compressed: True if the sizes of its pages show that they are compressed.
    """

    path: str
    start: int
    end: int
    num_values: int
    uncompressed_size: int
    is_compressed: bool


@dataclasses.dataclass(frozen=True)
class Footer:
    """Footer of a file.

    Attributes:
      metadata: the parsed footer.
      starts: first row of every row group and, last, the number of rows, int64 [groups + 1].
      file_size: size of the file in bytes.
    """

    metadata: pq.FileMetaData
    starts: np.ndarray
    file_size: int

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return int(self.starts[-1])

    def group_of(self, row: int) -> int:
        """Returns the row group of a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def chunks(self, group: int, columns: Sequence[str]) -> list[Chunk]:
        """Returns the column chunks of a row group that belong to the given columns or fields ("image.bytes").

        Raises:
          DamagedParquet: the file lacks one of them, or the footer is damaged.
        """
        return _chunks_of(column_chunks(self.metadata, group), columns)


def column_chunks(metadata: pq.FileMetaData, group: int) -> list[Chunk]:
    """Returns all column chunks of a row group.

    Raises:
      DamagedParquet: the footer is damaged.
    """
    try:
        row_group = metadata.row_group(group)
        return [_chunk(row_group.column(i)) for i in range(row_group.num_columns)]
    except Exception as error:  # pyarrow raises OSError, ValueError and others on damaged data
        raise DamagedParquet("damaged Parquet footer") from error


def _chunks_of(chunks: Sequence[Chunk], columns: Sequence[str]) -> list[Chunk]:
    """Returns the chunks that belong to the given columns or fields.

    Raises:
      DamagedParquet: one of them has none.
    """
    found: list[Chunk] = []
    for name, numbers in _numbers_of(chunks, columns).items():
        if not numbers:
            raise DamagedParquet(f"no column {name!r}"[:200])
        found += (chunks[number] for number in numbers)
    return found


def _numbers_of(chunks: Sequence[Chunk], columns: Sequence[str]) -> dict[str, list[int]]:
    """Returns the numbers of the chunks that belong to each of the columns or fields."""
    # Sorted, so that files of very many columns do not take the square of their number.
    paths = sorted((f"{chunk.path}.", number) for number, chunk in enumerate(chunks))
    found = {}
    for name in columns:
        first = end = bisect.bisect_left(paths, (f"{name}.", 0))
        while end < len(paths) and paths[end][0].startswith(f"{name}."):
            end += 1
        found[name] = sorted(number for _, number in paths[first:end])
    return found


def _chunk(chunk: pq.ColumnChunkMetaData) -> Chunk:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    return Chunk(
        chunk.path_in_schema,
        start,
        start + chunk.total_compressed_size,
        chunk.num_values,
        chunk.total_uncompressed_size,
        # Its codec is not read: an unknown one would abort the process.
        chunk.total_compressed_size != chunk.total_uncompressed_size,
    )


class ParquetFiles:
    """Reads rows of several files. Picklable; safe to use from threads."""

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)
        self.ranges = RangeReader(paths)
        self._lock = threading.Lock()
        self._footers: collections.OrderedDict[int, Footer] = collections.OrderedDict()

    def __reduce__(self):
        return ParquetFiles, (self.paths,)

    def size(self, number: int) -> int:
        """Returns the size of a file in bytes.

        Raises:
          UnreadableFile: the file cannot be opened.
        """
        try:
            file = open_file(self.paths[number])
        except OSError as error:
            raise UnreadableFile(str(error.strerror or error)) from error
        file.close()
        return file.size

    def footer(self, number: int) -> Footer:
        """Returns the footer of a file.

        Raises:
          DamagedParquet: the file is not a Parquet file, or its footer is damaged.
          UnreadableFile: the file cannot be read.
        """
        with self._lock:
            if number in self._footers:
                self._footers.move_to_end(number)
                return self._footers[number]
        footer = self._read_footer(number)
        with self._lock:
            self._footers[number] = footer
            if len(self._footers) > _OPEN_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _read_footer(self, number: int) -> Footer:
        file_size = self.size(number)
        tail = self.read(number, max(file_size - (1 << 16), 0), file_size)
        if file_size < 12 or tail[-4:] != b"PAR1":
            raise DamagedParquet("encrypted Parquet file" if tail[-4:] == b"PARE" else "not a Parquet file")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > min(file_size - 4, _MAX_FOOTER_BYTES):
            raise DamagedParquet("damaged Parquet footer")
        if length > len(tail):
            tail = self.read(number, file_size - length, file_size)
        try:
            metadata = pq.read_metadata(pa.BufferReader(tail[-length:]))
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except Exception as error:  # as in `column_chunks`
            raise DamagedParquet("damaged Parquet footer") from error
        if any(count < 0 for count in counts) or sum(counts) > _MAX_ROWS:
            raise DamagedParquet("damaged Parquet footer")
        return Footer(metadata, np.cumsum([0, *counts], dtype=np.int64), file_size)

    def read(self, number: int, start: int, end: int) -> bytes:
        """Returns a byte range of a file, shorter at its end; raises UnreadableFile."""
        [data] = self.ranges.read([(number, start, end)])
        if isinstance(data, OSError):
            raise UnreadableFile(str(data.strerror or data))
        return data

    def rows(
        self, number: int, group: int, columns: Sequence[str], image: Sequence[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Yields the rows of a row group, decompressing one page of each column at a time.

        Args:
          number: index of the file.
          group: index of the row group.
          columns: columns, or fields of struct columns ("json.caption"), to read as texts and numbers; those that the
            file lacks are left out.
          image: columns or fields of the image, in which large values are expected.

        Yields:
          {column: value as a Python object}; fields are nested dicts.

        Raises:
          DamagedParquet: the row group is damaged from here on.
          UnreadableFile: the file cannot be read.
        """
        footer = self.footer(number)
        if footer.starts[group] == footer.starts[group + 1]:  # writers may store no pages for no rows
            return
        file = _GroupFile(self, number, footer.file_size)
        try:
            chunks = column_chunks(footer.metadata, group)
            columns = [name for name, numbers in _numbers_of(chunks, columns).items() if numbers]
            if not columns and not image:
                yield from ({} for _ in range(footer.starts[group + 1] - footer.starts[group]))
                return
            file.prepare(_chunks_of(chunks, (*columns, *image)))
            for names, limit in ((columns, MAX_TEXT_PAGE_BYTES), (image, MAX_PAGE_BYTES)):
                for chunk in _chunks_of(chunks, names):
                    check_pages(file.at, chunk.start, chunk.end, chunk.num_values, limit)
            parquet = pq.ParquetFile(
                pa.PythonFile(file, mode="r"),
                metadata=footer.metadata,
                pre_buffer=False,
                buffer_size=_BUFFER,
                page_checksum_verification=True,
            )
            # A dictionary page can hold one image that all rows refer to: never expand more than one row of images.
            size = 1 if image else _TEXT_ROWS_AT_ONCE
            count = 0
            for batch in parquet.iter_batches(size, [group], [*columns, *image], use_threads=False):
                count += len(batch)
                yield from batch.to_pylist()
        except (UnreadableFile, DamagedParquet, MemoryError):
            raise
        except DamagedPages as error:
            raise DamagedParquet(str(error)) from error
        except Exception as error:  # as in `column_chunks`
            raise DamagedParquet("damaged Parquet file") from error
        if count != footer.metadata.row_group(group).num_rows:
            raise DamagedParquet("damaged Parquet file")


def until_damage(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows that can be read."""
    with contextlib.suppress(DamagedParquet):
        yield from rows


class _GroupFile(io.RawIOBase):
    """A Parquet file from which pyarrow reads one row group; small column chunks are read together in advance."""

    def __init__(self, files: ParquetFiles, number: int, size: int):
        super().__init__()
        self._files, self._number, self._size = files, number, size
        self._position, self._segments = 0, {}

    def prepare(self, chunks: Sequence[Chunk]) -> None:
        """Checks where column chunks lie, and reads them if they are small.

        Raises:
          DamagedParquet: a chunk lies outside the file.
          UnreadableFile: the file cannot be read.
        """
        ranges = sorted((chunk.start, chunk.end) for chunk in chunks)
        if any(not 4 <= start < end <= self._size for start, end in ranges):
            raise DamagedParquet("damaged Parquet footer")
        merged: list[list[int]] = []
        for start, end in ranges:
            if merged and start <= merged[-1][1] + _GAP:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        if sum(end - start for start, end in merged) > _READ_AT_ONCE:
            return
        found = self._files.ranges.read([(self._number, start, end) for start, end in merged])
        for (start, _), data in zip(merged, found, strict=True):
            if isinstance(data, OSError):
                raise UnreadableFile(str(data.strerror or data))
            self._segments[start] = data

    def at(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from an offset, fewer at the end of the file."""
        for start, data in self._segments.items():
            if start <= offset and offset + size <= start + len(data):
                return data[offset - start : offset - start + size]
        return self._files.read(self._number, offset, min(offset + size, self._size))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes; -1: to the end of the file."""
        data = self.at(self._position, self._size - self._position if size < 0 else size)
        self._position += len(data)
        return data
