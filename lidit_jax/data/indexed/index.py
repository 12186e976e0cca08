"""Indexes of shards, built by scanning each shard once and stored beside it: SHARD.index, a Parquet file.

With an index, any sample is read without reading those before it, which allows a global shuffle and exact resuming; and
filters see captions and metadata without opening the shards. An index that is missing, has another version or belongs
to another shard is rebuilt.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from lidit_jax.data.captions import list_field
from lidit_jax.data.filters import Candidate, Filter, first_reason
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.files import is_remote, modification_time, remote_filesystem
from lidit_jax.data.formats.parquet_files import column_chunks
from lidit_jax.data.formats.parquet_pages import check_pages
from lidit_jax.data.formats.shards import Place, Sample, Shards
from lidit_jax.errors import UserError
from lidit_jax.parallel.preemption import ignore_ctrl_c

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 26  # default limit for an image
SUFFIX = ".index"
# Version 3 has texts of invisible characters; version 2 no nested texts; version 1 no lists of captions, and may expand
# without bound.
_VERSION = 4
_NUMBER_COLUMNS = ("start", "end", "height", "width")
_TEXT_COLUMNS = ("key", "captions", "metadata")
_SCHEMA = pa.schema(
    [*((name, pa.int64()) for name in _NUMBER_COLUMNS), *((name, pa.string()) for name in _TEXT_COLUMNS)],
)
_ROWS_AT_ONCE = 1 << 14
# Snappy shortens data at most 21-fold, and texts have no dictionary, so an index that would take more memory than this
# multiple of its size is forged. (With another compression or encoding, 19 KB can become 2 GiB.)
_TEXT_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED"}  # the last two are those of nulls
_MAX_EXPANSION, _EXPANSION_SLACK = 32, 1 << 20
_TEXTS_AT_ONCE = 64
_MAX_SAMPLE_BYTES = 1 << 29  # above any format's limit: a forged index must not cause huge reads
# Starting a process takes as long as reading the headers of a few hundred samples.
_SHARDS_FOR_PROCESSES = 32
_MAX_PROCESSES = 64


@dataclasses.dataclass(frozen=True)
class ExaminedShard:
    """The samples of a shard that filters keep, with statistics.

    Attributes:
      places: int64 [N, 2], place of each sample kept; see `Place`.
      sizes: int32 [N, 2], height and width of each sample kept, in pixels.
      broken: number of samples that could not be used, by reason; a damaged shard, whose readable samples are used,
        counts once.
      dropped: number of samples that filters dropped, by reason.
      num_samples: number of all samples, including broken ones.
      fields: number of samples with each text field; counted only if there are filters.
      keys: number of samples with each metadata key; counted only if there are filters.
      digest: digest of the samples kept, without their pixels.
    """

    places: np.ndarray
    sizes: np.ndarray
    broken: collections.Counter
    dropped: collections.Counter
    num_samples: int
    fields: collections.Counter
    keys: collections.Counter
    digest: str


@dataclasses.dataclass(frozen=True)
class IndexOptions:
    """Settings for building indexes.

    Attributes:
      folder: folder for the indexes; "": each beside its shard.
      max_pixels: larger images count as broken and are not decoded.
    """

    folder: str = ""
    max_pixels: int = MAX_PIXELS

    def path(self, shard: str) -> str:
        """Returns the path of a shard's index."""
        if not self.folder:
            return shard + SUFFIX
        # Shards in different folders may have the same name.
        name = f"{hashlib.sha256(shard.encode()).hexdigest()[:8]}-{os.path.basename(shard)}{SUFFIX}"
        return f"{self.folder.rstrip('/')}/{name}"


def examine(
    shards: Shards,
    filters: Sequence[Filter] = (),
    options: IndexOptions = IndexOptions(),
    first: int = 0,
) -> list[ExaminedShard]:
    """Reads or builds the index of every shard, on all cores if there are many; shows progress on a terminal.

    Args:
      shards: the shards.
      filters: filters that samples must pass.
      options: settings for building indexes.
      first: the shard to begin with. If each process of a pod begins at a different shard and the indexes are on a
        shared file system, each process builds some of them and finds the others built.

    Returns:
      The result for every shard, in order.
    """
    count = len(shards.paths)
    order = [(first + i) % count for i in range(count)]
    examine_shard = functools.partial(_examine_shard, shards, options, tuple(filters))
    progress = tqdm.tqdm(total=count, desc="index", unit="shard", disable=None, leave=False)
    found: dict[int, ExaminedShard] = {}
    with progress:
        for shard, examined in (
            _in_processes(examine_shard, order) if count >= _SHARDS_FOR_PROCESSES else map(examine_shard, order)
        ):
            found[shard] = examined
            progress.update()
    return [found[shard] for shard in range(count)]


def _in_processes(examine_shard, order: Sequence[int]) -> Iterator[tuple[int, ExaminedShard]]:
    workers = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=ignore_ctrl_c) as pool:
        yield from pool.map(examine_shard, order, chunksize=max(1, min(16, len(order) // (4 * workers))))


def _examine_shard(
    shards: Shards, options: IndexOptions, filters: Sequence[Filter], shard: int
) -> tuple[int, ExaminedShard]:
    return shard, _filtered_shard(_table(shards, options, shard, with_texts=bool(filters)), filters)


def _filtered_shard(table: pa.Table, filters: Sequence[Filter]) -> ExaminedShard:
    facts = json.loads(table.schema.metadata[b"facts"])
    places = np.stack([table.column(name).to_numpy() for name in _NUMBER_COLUMNS], axis=1).reshape(-1, 4)
    keep, dropped, fields, keys = _filtered(table, filters) if filters else (slice(None), {}, {}, {})
    digest = hashlib.sha256(facts["digest"].encode())
    digest.update(places[keep].tobytes())
    return ExaminedShard(
        places=places[keep, :2],
        sizes=places[keep, 2:].astype(np.int32),
        broken=collections.Counter(facts["broken"]),
        dropped=collections.Counter(dropped),
        num_samples=len(places) + sum(facts["broken"].values()),
        fields=collections.Counter(fields),
        keys=collections.Counter(keys),
        digest=digest.hexdigest(),
    )


def _filtered(table: pa.Table, filters: Sequence[Filter]):
    kept, dropped = [], collections.Counter()
    fields, keys = collections.Counter(), collections.Counter()
    columns = [table.column(name).to_pylist() for name in ("captions", "metadata", "height", "width")]
    for row, (captions, metadata, height, width) in enumerate(zip(*columns, strict=True)):
        candidate = Candidate(json.loads(captions), json.loads(metadata), height, width)
        fields.update({list_field(name) for name in candidate.captions})
        keys.update(candidate.metadata.keys())
        reason = first_reason(candidate, filters)
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    return np.array(kept, np.int64), dropped, fields, keys


# --- files ------------------------------------------------------------------------------------------------------


def _table(shards: Shards, options: IndexOptions, shard: int, with_texts: bool) -> pa.Table:
    """Returns the index of a shard; builds it if there is no valid one."""
    path, source = options.path(shards.paths[shard]), shards.paths[shard]
    names = (*_NUMBER_COLUMNS, *_TEXT_COLUMNS) if with_texts else _NUMBER_COLUMNS
    expected = {"version": _VERSION, "size": shards.size(shard), "max_pixels": options.max_pixels}
    expected["settings"] = shards.settings
    table = _read(path, names, expected, modification_time(source))
    if table is None:
        table = _to_table(shards.scan(shard), expected)
        _write(table, path)
        table = table.select(names)
    return table


def _read(path: str, names: Sequence[str], expected: dict[str, Any], not_before: float | None) -> pa.Table | None:
    """Reads an index; returns None if it is missing, damaged, outdated, or older than `not_before` (seconds)."""
    try:
        if is_remote(path):
            filesystem, name = remote_filesystem(path)
            opened = filesystem.open(name, "rb")
        else:
            if not_before is not None and os.stat(path).st_mtime < not_before:
                return None
            opened = open(path, "rb")  # noqa: SIM115
        with opened:
            table = _read_table(opened, names)
        facts = dict(json.loads(table.schema.metadata[b"facts"]))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with an index, it can be rebuilt from its shard
        logger.warning("%s: not an index (%s); rebuilding it", path, " ".join(str(error).split())[:100])
        return None
    if any(facts.get(name) != value for name, value in expected.items()) or not _is_valid(table, facts):
        return None
    return table


def _read_table(file: BinaryIO, names: Sequence[str]) -> pa.Table:
    """Reads columns of a Parquet file that may be forged, in memory proportional to its size.

    Raises:
      ValueError: the columns expand to more than an index can.
      DamagedPages: a page does, or is damaged.
      DamagedParquet: the footer is damaged.
    """
    limit = _MAX_EXPANSION * file.seek(0, os.SEEK_END) + _EXPANSION_SLACK
    parquet = pq.ParquetFile(file)
    metadata, schema = parquet.metadata, parquet.schema_arrow
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(metadata.num_columns))
    num_bytes = 8 * len(_NUMBER_COLUMNS) * metadata.num_rows
    if num_bytes > limit or any(_can_expand(column) for column in columns if column.path_in_schema in names):
        raise ValueError("too large when it is decompressed")
    for chunk in (chunk for group in range(metadata.num_row_groups) for chunk in column_chunks(metadata, group)):
        check_pages(functools.partial(_read_bytes, file), chunk.start, chunk.end, chunk.num_values, limit)
    batches, num_bytes = [], 0
    rows = _TEXTS_AT_ONCE if set(names) & set(_TEXT_COLUMNS) else _ROWS_AT_ONCE
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


def _can_expand(column: pq.ColumnChunkMetaData) -> bool:
    return column.path_in_schema not in _NUMBER_COLUMNS and not set(column.encodings) <= _TEXT_ENCODINGS


def _is_valid(table: pa.Table, facts: dict[str, Any]) -> bool:
    """Returns True if every value of an index has the right type and is in bounds; the file may be forged."""
    if table.schema.names != [name for name in _SCHEMA.names if name in table.schema.names]:
        return False
    if any(table.schema.field(name).type != _SCHEMA.field(name).type for name in table.schema.names):
        return False
    if any(table.column(name).null_count for name in table.schema.names) or not isinstance(facts.get("digest"), str):
        return False
    broken = facts.get("broken")
    if not isinstance(broken, dict) or not all(isinstance(count, int) and count >= 0 for count in broken.values()):
        return False
    if any(isinstance(count, bool) or count >= 1 << 40 for count in broken.values()):
        return False
    start, end, height, width = (table.column(name).to_numpy() for name in _NUMBER_COLUMNS)
    order = np.argsort(start, kind="stable")
    if not ((start[order][1:] >= end[order][:-1]).all() and (np.maximum(height, width) <= facts["max_pixels"]).all()):
        return False  # samples must not overlap, and height * width must not overflow
    pixels = height * width
    in_bounds = (
        (start >= 0)
        & (end >= start)
        & (end - start <= _MAX_SAMPLE_BYTES)
        & (height > 0)
        & (width > 0)
        & (pixels > 0)
        & (pixels <= facts["max_pixels"])
    )
    return bool(in_bounds.all()) and _has_valid_texts(table)


def _has_valid_texts(table: pa.Table) -> bool:
    """Returns True if captions are {field: text} and metadata are objects, or if these columns were not read."""
    if "captions" not in table.schema.names:
        return True
    try:
        for text in table.column("captions"):
            captions = json.loads(text.as_py())
            if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
                return False
        return all(isinstance(json.loads(text.as_py()), dict) for text in table.column("metadata"))
    except (ValueError, RecursionError):
        return False


def _to_table(scanned: Iterable[tuple[Place, Sample] | str], facts: dict[str, Any]) -> pa.Table:
    """Builds an index.

    Args:
      scanned: what `Shards.scan` yields.
      facts: version, size of the shard, and settings, which a later reader of the index compares with its own.
    """
    broken = collections.Counter()
    rows: dict[str, list] = {name: [] for name in _SCHEMA.names}
    digest = hashlib.sha256()
    for found in scanned:
        if isinstance(found, str):
            broken[found] += 1
            continue
        (start, end), sample = found
        try:
            height, width = decoding.read_size(sample.image, facts["max_pixels"])
        except decoding.BrokenImage as error:
            broken[str(error)] += 1
            continue
        texts = [json.dumps(sample.captions), json.dumps(sample.metadata, default=str)]
        for name, value in zip(_SCHEMA.names, (start, end, height, width, sample.key, *texts), strict=True):
            rows[name].append(value)
        for part in (sample.key, *texts, repr((start, end, height, width))):
            digest.update(len(part).to_bytes(8, "big") + part.encode())
    facts = facts | {"broken": broken, "digest": digest.hexdigest()}
    return pa.table(rows, schema=_SCHEMA.with_metadata({"facts": json.dumps(facts)}))


def _write(table: pa.Table, path: str) -> None:
    """Writes an index atomically; without write permission, warns once, and the index serves this run alone."""
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
