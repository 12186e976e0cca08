"""Reads and writes the Parquet files beside shards: indexes, and counts of prompt tokens. Any of them may be forged."""

import functools
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lidit_jax.data.formats.files import is_remote, remote_filesystem
from lidit_jax.data.formats.parquet_files import column_chunks
from lidit_jax.data.formats.parquet_pages import check_pages
from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

_NUMBER_BYTES = 8  # of a number, which is an int64
_ROWS_AT_ONCE = 1 << 14
# Snappy shortens data at most 21-fold, and texts have no dictionary, so a file that would take more memory than this
# multiple of its size is forged. (With another compression or encoding, 19 KB can become 2 GiB.)
_TEXT_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # the last two are those of nulls
_MAX_EXPANSION, _EXPANSION_SLACK = 32, 1 << 20
_TEXTS_AT_ONCE = 64


def read_table(path: str, names: Sequence[str], not_before: float | None) -> pa.Table | None:
    """Reads columns of a file that `write_table` wrote; the caller checks their types and values.

    Args:
      path: path or fsspec URL of the file.
      names: names of the columns.
      not_before: oldest time of modification of a local file, in seconds; None: any.

    Returns:
      The table; None if the file is missing, too old, or not such a file, which a warning says.
    """
    try:
        if is_remote(path):
            filesystem, name = remote_filesystem(path)
            opened = filesystem.open(name, "rb")
        else:
            if not_before is not None and os.stat(path).st_mtime < not_before:
                return None
            opened = open(path, "rb")  # noqa: SIM115
        with opened:
            table = _read_columns(opened, names)
        facts_of(table)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with the file, it can be made again from its shard
        logger.warning("%s: not an index (%s); rebuilding it", path, " ".join(str(error).split())[:100])
        return None
    return table


def facts_of(table: pa.Table) -> dict[str, Any]:
    """Returns the facts that a table holds beside its columns."""
    return dict(json.loads(table.schema.metadata[b"facts"]))


def _read_columns(file: BinaryIO, names: Sequence[str]) -> pa.Table:
    """Reads columns of a Parquet file that may be forged, in memory proportional to its size.

    Raises:
      ValueError: the columns expand to more than such a file can.
      DamagedPages: a page does, or is damaged.
      DamagedParquet: the footer is damaged.
    """
    limit = _MAX_EXPANSION * file.seek(0, os.SEEK_END) + _EXPANSION_SLACK
    parquet = pq.ParquetFile(file)
    metadata, schema = parquet.metadata, parquet.schema_arrow
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(metadata.num_columns))
    num_bytes = _NUMBER_BYTES * _numbers(schema, names) * metadata.num_rows
    if num_bytes > limit or any(_can_expand(column) for column in columns if column.path_in_schema in names):
        raise ValueError("too large when it is decompressed")
    for chunk in (chunk for group in range(metadata.num_row_groups) for chunk in column_chunks(metadata, group)):
        check_pages(functools.partial(_read_bytes, file), chunk.start, chunk.end, chunk.num_values, limit)
    batches, num_bytes = [], 0
    rows = _ROWS_AT_ONCE if _numbers(schema, names) == len(names) else _TEXTS_AT_ONCE
    for batch in parquet.iter_batches(rows, columns=list(names), use_threads=False):
        num_bytes += batch.nbytes
        if num_bytes > limit:
            raise ValueError("too large when it is decompressed")
        batches.append(batch)
    schema = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
    return pa.Table.from_batches(batches, schema)


def _read_bytes(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _numbers(schema: pa.Schema, names: Sequence[str]) -> int:
    """Returns how many of the columns hold numbers; the other ones hold texts."""
    return sum(schema.field(name).type == pa.int64() for name in names)


def _can_expand(column: pq.ColumnChunkMetaData) -> bool:
    return column.physical_type != "INT64" and not set(column.encodings) <= _TEXT_ENCODINGS


def write_table(table: pa.Table, path: str) -> None:
    """Writes a table atomically; without write permission, warns once, and the table serves this run alone."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="snappy", use_dictionary=False, row_group_size=_ROWS_AT_ONCE)
    encoded = sink.getvalue()
    try:
        if path.startswith("hf://"):
            raise OSError(f"{path!r} would be a commit to the data set's repository")
        if is_remote(path):
            filesystem, name = remote_filesystem(path)
            filesystem.pipe_file(name, encoded.to_pybytes())  # objects appear only when complete
            return
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".index-", delete=False) as file:
            try:
                file.write(encoded)
                file.flush()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except (OSError, UserError) as error:
        _warn_once(f"indexes cannot be written, so the next run builds them again: {error}; set data.index_dir")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
