"""Captions files: JSONL, CSV (separated by commas, semicolons, tabs or bars) and Parquet; each row names an image."""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import pyarrow.parquet as pq

from lidit_jax.data.formats.parquet_columns import beginnings, is_binary, plain_fields
from lidit_jax.data.formats.parquet_files import DamagedParquet, ParquetFiles, UnreadableFile
from lidit_jax.data.formats.shards import MAX_TEXT_BYTES, Unusable, parse_json
from lidit_jax.errors import UserError
from lidit_jax.files import text_encoding

# Names of the column with the image file: first the one of Hugging Face's ImageFolder, then other common ones. Case is
# ignored.
FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "path", "image_file_name", "image_file", "image_name", "image_path"),
    *("file_path", "filepath"),
)
_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_SEPARATORS = ",;\t|"
# Binary columns with larger values on average hold something other than text, such as embedded images.
_MAX_BINARY_TEXT = 1 << 14
# These stand for rows that cannot be used.
_OVERLONG, _TOO_MANY_VALUES = b"text over 1 MiB", b"row with more values than columns"
# A file whose rows take more memory than this multiple of its size, and this much, is forged.
_MAX_EXPANSION, _EXPANSION_SLACK = 32, 1 << 30
_ROWS_LOOKED_AT = 100  # to find the columns of a JSONL file


@dataclasses.dataclass(frozen=True)
class CaptionTable:
    """The rows of a captions file.

    Attributes:
      path: path of the file.
      column: name of the column with the image file.
      rows: each row as an encoded JSON object; malformed rows as they are.
    """

    path: str
    column: str
    rows: Sequence[bytes]

    def row(self, number: int) -> tuple[str, dict[str, Any]]:
        """Returns the image file that a row names, and its other values.

        Raises:
          Unusable: the row is malformed or names no file.
        """
        if self.rows[number] in (_OVERLONG, _TOO_MANY_VALUES):
            raise Unusable(self.rows[number].decode())
        values = parse_json(self.rows[number])
        name = values.pop(self.column, None)
        if not isinstance(name, str) or not name.strip():
            raise Unusable(f"no column {self.column!r}")
        return name.strip(), values


def is_table(name: str) -> bool:
    """Returns True if a file of this name may be a captions file; Kaggle calls its CSV files captions.txt."""
    return _suffix(name) in _SUFFIXES or name.lower() == "captions.txt"


def file_column(columns: Iterable[str]) -> str | None:
    """Returns the column with the image file; None if there is none."""
    by_name = {column.lower(): column for column in columns}
    return next((by_name[name] for name in FILE_COLUMNS if name in by_name), None)


def columns_of(file: str) -> tuple[str, ...]:
    """Returns the names of the columns with texts or numbers; none for a file that is not a readable table."""
    try:
        if _suffix(file) == ".parquet":
            return tuple(_parquet_columns(pq.ParquetFile(file).metadata))
        if _suffix(file) == ".jsonl":
            return _first_keys(_json_lines(file))
        with _open_text(file) as text:
            return tuple(_csv_reader(text).fieldnames or ())
    except (OSError, ValueError, csv.Error):  # pyarrow's errors are the first two
        return ()


def read_table(file: str) -> CaptionTable:
    """Reads a captions file.

    Raises:
      UserError: the file cannot be read, or no column names the images.
    """
    if _suffix(file) not in (*_SUFFIXES, ".txt"):
        raise UserError(f"{file!r} is not a captions file: it must be a .jsonl, .csv, .tsv or .parquet")
    columns = columns_of(file)
    column = file_column(columns)
    try:
        if column is None and columns:
            raise missing_column(file, columns)
        rows = _read_rows(file)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, OverflowError, csv.Error, DamagedParquet, UnreadableFile) as error:
        raise UserError(f"cannot read {file!r}: {' '.join(str(error).split())[:150]}") from error
    return CaptionTable(file, column or FILE_COLUMNS[0], rows)


def _read_rows(file: str) -> list[bytes]:
    limit = _MAX_EXPANSION * os.path.getsize(file) + _EXPANSION_SLACK
    rows, num_bytes = [], 0
    for row in _rows(file):
        rows.append(row)
        num_bytes += len(row)
        if num_bytes > limit:
            raise UserError(f"{file!r} would take more than {limit >> 20} MiB in memory: check that it is not forged")
    return rows


def _rows(file: str) -> Iterator[bytes]:
    readers = {".jsonl": _json_lines, ".parquet": _parquet_rows}
    return readers.get(_suffix(file), _csv_rows)(file)


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def missing_column(file: str, columns: Sequence[str]) -> UserError:
    """Returns the error to raise if no column of a captions file names the images."""
    found = ", ".join(columns[:20])[:200]
    return UserError(
        f"{file!r} has no column {FILE_COLUMNS[0]!r} (or image, path, …) with the images' file names, only {found}: "
        "rename the column that has them"
    )


def _open_text(file: str, newline: str = "") -> TextIO:
    with open(file, "rb") as opened:
        encoding = text_encoding(opened.read(2))
    # A text that is not UTF-8 makes its own row unusable, not the file.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    return open(file, encoding=encoding, errors=errors, newline=newline)


def _lines(text: TextIO) -> Iterator[str]:
    """Yields lines; a line that is longer than a text may be is replaced by one that is too long, whatever it held."""
    while line := text.readline(MAX_TEXT_BYTES + 1):
        yield line if len(line) <= MAX_TEXT_BYTES else "x" * (MAX_TEXT_BYTES + 1)
        while len(line) > MAX_TEXT_BYTES and not line.endswith(("\n", "\r")):
            line = text.readline(MAX_TEXT_BYTES + 1)


# --- JSONL --------------------------------------------------------------------------------------------------------


def _json_lines(file: str) -> Iterator[bytes]:
    with _open_text(file, newline="\n") as text:
        for line in _lines(text):
            if len(line) > MAX_TEXT_BYTES:
                yield _OVERLONG
            elif line.strip():
                yield line.encode("utf-8", "surrogateescape")


def _first_keys(lines: Iterator[bytes]) -> tuple[str, ...]:
    """Returns the keys of the first rows, of which any may be malformed."""
    keys: dict[str, None] = {}
    for line in itertools.islice(lines, _ROWS_LOOKED_AT):
        with contextlib.suppress(Unusable):
            keys |= dict.fromkeys(key for key, value in parse_json(line).items() if not isinstance(value, dict))
    return tuple(keys)


# --- CSV ----------------------------------------------------------------------------------------------------------


def _csv_reader(text: TextIO) -> csv.DictReader:
    """Returns a reader of the rows, with the separator that finds a column of image files in the first line."""
    lines = _lines(text)
    header = next(lines, "")
    names = {
        separator: [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        for separator in _SEPARATORS
    }
    separator = next((separator for separator in _SEPARATORS if file_column(names[separator])), ",")
    return csv.DictReader(lines, names[separator], delimiter=separator, skipinitialspace=True)


def _csv_rows(file: str) -> Iterator[bytes]:
    limit = csv.field_size_limit(MAX_TEXT_BYTES)
    try:
        with _open_text(file) as text:
            reader = _csv_reader(text)
            while (row := _next_csv_row(reader)) is not None:
                yield row
    finally:
        csv.field_size_limit(limit)


def _next_csv_row(reader: csv.DictReader) -> bytes | None:
    try:
        row = next(reader)
    except StopIteration:
        return None
    except csv.Error:  # a value over the limit: perhaps a quotation mark is not closed
        return _OVERLONG
    if any(row.pop(None, ())):  # a separator within a text without quotation marks
        return _TOO_MANY_VALUES
    return json.dumps({name: value for name, value in row.items() if value is not None}).encode()


# --- Parquet ------------------------------------------------------------------------------------------------------


def _parquet_rows(file: str) -> Iterator[bytes]:
    files, columns = ParquetFiles([file]), _parquet_columns(pq.ParquetFile(file).metadata)
    for group in range(len(files.footer(0).starts) - 1):
        for row in files.rows(0, group, columns):
            yield json.dumps({name: _decoded(value) for name, value in row.items()}).encode()


def _parquet_columns(metadata: pq.FileMetaData) -> list[str]:
    """Returns the columns and fields of texts, lists of texts, and single numbers; see `parquet_columns.plain_fields`.

    Others, such as dates and images, are not used and may hold values that Python cannot represent.
    """
    fields = plain_fields(metadata.schema, metadata.schema.to_arrow_schema().names)
    sizes = dict.fromkeys(fields, 0)
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            names = beginnings(column.path_in_schema)
            for name in names & fields.keys():
                sizes[name] += column.total_uncompressed_size
    limit = _MAX_BINARY_TEXT * max(metadata.num_rows, 1)
    return [name for name, kind in fields.items() if not is_binary(kind) or sizes[name] <= limit]


def _decoded(value: Any) -> Any:
    """Decodes binary values; None for those that are not UTF-8, and so no text."""
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _decoded(entry) for name, entry in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value
