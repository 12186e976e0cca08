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
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tqdm

from lidit_jax.data.captions import list_field
from lidit_jax.data.filters import Candidate, Filter, first_reason
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.files import modification_time
from lidit_jax.data.formats.index_files import facts_of, read_table, write_table
from lidit_jax.data.formats.shards import Place, Sample, Shards
from lidit_jax.parallel.preemption import ignore_ctrl_c

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

    def path(self, shard: str, suffix: str = SUFFIX) -> str:
        """Returns the path of a shard's index or, with another suffix, of another file beside it."""
        if not self.folder:
            return shard + suffix
        # Shards in different folders may have the same name.
        name = f"{hashlib.sha256(shard.encode()).hexdigest()[:8]}-{os.path.basename(shard)}{suffix}"
        return f"{self.folder.rstrip('/')}/{name}"


DEFAULT_OPTIONS = IndexOptions()


def examine(
    shards: Shards,
    filters: Sequence[Filter] = (),
    options: IndexOptions = DEFAULT_OPTIONS,
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


def captions_of(
    shards: Shards, filters: Sequence[Filter], options: IndexOptions, shard: int
) -> Iterator[dict[str, str]]:
    """Yields the captions, {name: text}, of a shard's samples that filters keep; see `examine` for the arguments."""
    table = _table(shards, options, shard, with_texts=True)
    kept = _filtered(table, filters)[0] if filters else np.arange(table.num_rows)
    for text in table.column("captions").take(kept):
        yield json.loads(text.as_py())


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
    facts = facts_of(table)
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
        write_table(table, path)
        table = table.select(names)
    return table


def _read(path: str, names: Sequence[str], expected: dict[str, Any], not_before: float | None) -> pa.Table | None:
    """Reads an index; returns None if it is missing, damaged, outdated, or older than `not_before` (seconds)."""
    table = read_table(path, names, not_before)
    if table is None:
        return None
    facts = facts_of(table)
    if any(facts.get(name) != value for name, value in expected.items()) or not _is_valid(table, facts):
        return None
    return table


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
