"""Parquet files with embedded images, as Hugging Face data sets and img2dataset store them.

A row is a sample. Its image is a binary column, or a struct column with a field "bytes" (Hugging Face's Image feature).
The other columns are texts and metadata: see `ParquetShards`.
"""

import collections
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lidit_jax.data.formats.files import find_files, select_shards
from lidit_jax.data.formats.folder_layout import split_of
from lidit_jax.data.formats.parquet_columns import Columns, choose_columns, describe, image_fields, unread_columns
from lidit_jax.data.formats.parquet_files import (
    Chunk,
    DamagedParquet,
    Footer,
    ParquetFiles,
    UnreadableFile,
    until_damage,
)
from lidit_jax.data.formats.record_shards import make_sample
from lidit_jax.data.formats.row_cache import RowCache
from lidit_jax.data.formats.shards import (
    CLASS_FIELD,
    Place,
    Sample,
    Unusable,
    class_name,
    flatten,
    names_digest,
    printable,
)
from lidit_jax.errors import UserError

_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet$")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
_SNIFFED_GROUPS, _SNIFFED_ROWS = 4, 16
_BETWEEN_IMAGES = 1 << 14  # bytes between two stored images, at most: page headers may hold statistics
_SLOW_GROUP_BYTES = 1 << 21  # compressed row groups above which random access is slow

_log = logging.getLogger(__name__)


class ParquetShards:
    """Parquet files with an image in every row; see `Shards` and `SequentialShards`.

    Texts (also dictionary-encoded, binary, or in lists) may be captions, single numbers are metadata; fields of structs
    are named "json/caption". Other columns are not read. The name of a class label is the text "class".
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_key: str = "",
        class_names: Sequence[str] = (),
        split: str = "train",
        shards: slice | None = None,
    ):
        """Finds the files, and the columns of the first one that can be read.

        Args:
          path: a folder of .parquet files, one file, a glob pattern or a brace range, also at an fsspec URL.
          image_key: column of the image; "": the only column with images.
          class_names: names of the classes that a column "class" or "label" gives as numbers.
          split: if the folder holds several splits (SPLIT-00000-of-00010.parquet, train.parquet), the one to use.
          shards: slice of the sorted files to use; None: all.

        Raises:
          UserError: there is no such file, none can be read, or it is unclear which column holds the image.
        """
        found = find_files(path, ".parquet", re.compile(r"\.parquet$"))
        self.paths = select_shards(path, _files_of_split(found, split, path), shards)
        self._class_names = tuple(class_names)
        self._files = ParquetFiles(self.paths)
        self._columns = self._find_columns(image_key)
        facts = json.dumps([self._columns.image, self._columns.others, sorted(self._columns.labels.items())])
        self.settings = f"{hashlib.sha256(facts.encode()).hexdigest()[:16]} {names_digest(class_names)}"
        self._cache = RowCache()
        self._image_ranges: dict[tuple[int, int], np.ndarray] = {}  # (shard, group) -> int64 [rows, 2]

    def __getstate__(self):
        return self.__dict__ | {"_image_ranges": {}}

    def size(self, shard: int) -> int:
        try:
            return self._files.size(shard)
        except UnreadableFile as error:
            raise self._unreadable(shard, error) from error

    def scan(
        self, shard: int, start: int = 0, length: int | None = None
    ) -> Generator[tuple[Place, Sample] | str, None, int | None]:
        """Scans row groups of a file, as `SequentialShards.scan` does; a section begins at the first row of one.

        Raises:
          UserError: the file cannot be read, or no row group begins at row `start`.
        """
        try:
            footer = self._files.footer(shard)
            group = footer.group_of(start) if start else 0
            if start and footer.starts[group] != start:
                raise UserError(f"{self.paths[shard]!r} has no row group at row {start}: it has changed")
            scanned = 0
            while group < len(footer.starts) - 1:
                # Row groups may be empty: a section that began and ended at the same row would be scanned forever.
                if length is not None and scanned >= length and footer.starts[group] > start:
                    return int(footer.starts[group])
                chunks = footer.chunks(group, self._columns.image)
                yield from self._scan_group(shard, footer, group)
                scanned += sum(chunk.end - chunk.start for chunk in chunks)
                group += 1
        except DamagedParquet as reason:
            yield str(reason)
        except UnreadableFile as error:
            raise self._unreadable(shard, error) from error
        return None

    def _scan_group(self, shard: int, footer: Footer, group: int) -> Iterator[tuple[Place, Sample] | str]:
        row = int(footer.starts[group])
        try:
            for values in self._files.rows(shard, group, self._columns.others, self._columns.image):
                sample = self._sample(shard, row, values)
                yield str(sample) if isinstance(sample, Unusable) else ((row, row + 1), sample)
                row += 1
        except DamagedParquet as reason:  # later row groups may be intact
            yield str(reason)

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        by_group = collections.defaultdict(list)
        found: list[Any] = [Unusable("changed since it was indexed")] * len(places)
        for i, (shard, row, _) in enumerate(places):
            try:
                footer = self._files.footer(shard)
            except (DamagedParquet, UnreadableFile):
                found[i] = Unusable("unreadable file")
                continue
            if row < footer.num_rows:
                group = footer.group_of(row)
                by_group[shard, group].append((i, row - int(footer.starts[group])))
        for (shard, group), wanted in by_group.items():
            first = int(self._files.footer(shard).starts[group])
            try:
                rows = self._rows(shard, group, sorted({row for _, row in wanted}))
            except (DamagedParquet, UnreadableFile):
                rows = dict.fromkeys((row for _, row in wanted), Unusable("unreadable file"))
            for i, row in wanted:
                if row in rows:
                    values = rows[row]
                    found[i] = values if isinstance(values, Unusable) else self._sample(shard, first + row, values)
        return found

    def _rows(self, shard: int, group: int, wanted: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Returns rows of a row group by their number in it, without those after damage."""
        images = self._uncompressed_images(shard, group, wanted)
        if images is None:
            read = functools.partial(self._files.rows, shard, group, self._columns.others, self._columns.image)
            return self._cache.rows((shard, group, True), read, wanted)
        rows = dict.fromkeys(wanted, {})
        if self._columns.others:
            read = functools.partial(self._files.rows, shard, group, self._columns.others)
            rows = self._cache.rows((shard, group, False), read, wanted)
        return {row: values | {self._columns.key: images[row]} for row, values in rows.items()}

    def _uncompressed_images(self, shard: int, group: int, wanted: Sequence[int]) -> dict[int, bytes] | None:
        """Returns images of rows that are stored as they are, each read as one byte range.

        Returns None if the row group must be decompressed for one of the rows. The row group is read once to find the
        images' byte ranges.
        """
        footer = self._files.footer(shard)
        chunk = footer.chunks(group, self._columns.image[:1])[0]
        if chunk.is_compressed:
            return None
        if (shard, group) not in self._image_ranges:
            rows = self._files.rows(shard, group, (), self._columns.image[:1])
            images = (_image_bytes(row[self._columns.key]) for row in until_damage(rows))
            self._image_ranges[shard, group] = _find_ranges(self._files, shard, chunk, images)
        stored = self._image_ranges[shard, group]
        ranges = stored[[row for row in wanted if row < len(stored)]].tolist()
        if len(ranges) < len(wanted) or any(end == 0 for _, end in ranges):
            return None
        found = self._files.ranges.read([(shard, start, end) for start, end in ranges])
        if any(isinstance(data, OSError) for data in found):
            raise UnreadableFile("cannot be read")
        return dict(zip(wanted, found, strict=True))

    def warn_of_slow_access(self) -> None:
        """Logs a warning if reading a single image means decompressing many."""
        footer = self._files.footer(self._first)
        groups = range(len(footer.starts) - 1)
        try:
            chunks = [chunk for group in groups for chunk in footer.chunks(group, self._columns.image[:1])]
        except DamagedParquet:  # counted when it is read
            return
        size = max((chunk.uncompressed_size for chunk in chunks if chunk.is_compressed), default=0)
        if size > _SLOW_GROUP_BYTES:
            _log.warning(
                "%s: its images are compressed in row groups of up to %d MB, which are decompressed to read one of "
                "them: give --config.data.sequential=True, or store column %r uncompressed (docs/data.md)",
                *(self.paths[self._first], size // 1_000_000, self._columns.image[0]),
            )

    def _sample(self, shard: int, row: int, values: dict[str, Any]) -> Sample | Unusable:
        key = self._columns.key
        values = dict(values)
        image = values.pop(key, None)
        encoded = _image_bytes(image)
        try:
            if encoded is None:
                is_path = isinstance(image, Mapping) and image.get("path")
                raise Unusable("image given by a path alone" if is_path else "no image")
            flat = {name: value for name, value in flatten(values).items() if value is not None}
            class_names: Sequence[str] | None = self._class_names
            for name, names in self._columns.labels.items():
                if isinstance(flat.get(name), int) and not (self._class_names and name in ("class", "label")):
                    field, label = CLASS_FIELD if len(self._columns.labels) == 1 else name, flat.pop(name)
                    flat |= {field: class_name(label, names)} if names else {}
                    class_names = None if field == CLASS_FIELD else class_names
            name = f"{printable(os.path.basename(self.paths[shard]))}#{row}"
            return make_sample(name, flat | {key: encoded}, key, class_names)
        except Unusable as reason:
            return reason

    # --- columns ------------------------------------------------------------------------------------------------

    def _find_columns(self, image_key: str) -> Columns:
        for shard, path in enumerate(self.paths):
            try:
                stored = self._files.footer(shard).metadata.schema
                schema = stored.to_arrow_schema()
                self._first = shard
                columns = choose_columns(stored, image_key or self._sniff(shard, schema), path)
                unread = unread_columns(schema, (columns.key, *columns.others))
                if unread:
                    _log.info("%s: columns that are not read: %s", path, ", ".join(unread))
                return columns
            except (DamagedParquet, UnreadableFile, pa.ArrowException) as error:
                reason = error
        more = f" (nor can any of the other {len(self.paths) - 1} files)" if len(self.paths) > 1 else ""
        raise UserError(f"{path!r} cannot be read: {reason}{more}; check data.path and the files")

    def _sniff(self, shard: int, schema: pa.Schema) -> str:
        """Returns the only column whose first values are images.

        Raises:
          UserError: there is none, or there are several.
        """
        candidates = {field.name: image_fields(field) for field in schema if image_fields(field)}
        columns = {name for name, fields in candidates.items() if self._holds_images(shard, name, fields[0])}
        if not columns:  # perhaps the first images are missing or damaged
            columns = {name for name, fields in candidates.items() if len(fields) == 2}
        if len(columns) == 1:
            return columns.pop()
        names = ", ".join(sorted(columns)) or "(none; there are " + ", ".join(describe(schema)) + ")"
        raise UserError(f"{self.paths[shard]!r} has the image columns {names}: name one with --config.data.image_key")

    def _holds_images(self, shard: int, name: str, field: str) -> bool:
        """Returns True if the first values of a column that can be read include an image."""
        for group in range(min(len(self._files.footer(shard).starts) - 1, _SNIFFED_GROUPS)):
            rows = until_damage(self._files.rows(shard, group, (), (field,)))
            values = [_image_bytes(row[name]) for row in itertools.islice(rows, _SNIFFED_ROWS)]
            if any(value is not None and value.startswith(_MAGIC) for value in values):
                return True
        return False

    def _unreadable(self, shard: int, error: UnreadableFile) -> UserError:
        return UserError(f"cannot read {self.paths[shard]!r}: {error}")


def _files_of_split(files: Sequence[str], split: str, path: str | os.PathLike) -> Sequence[str]:
    """Returns the files of one split if their names tell several splits apart."""
    split_of_file = {file: _split_of_file(os.path.basename(file)) for file in files}
    splits = set(split_of_file.values()) - {None}
    if len({split_of(name) or name for name in splits}) < 2:
        return files
    chosen = {split} & splits or {name for name in splits if split_of(name) and split_of(name) == split_of(split)}
    if not chosen:
        raise UserError(
            f"{os.fspath(path)!r} has the splits {', '.join(sorted(splits)[:20])}: name one with --config.data.split"
        )
    found = tuple(file for file in files if split_of_file[file] in chosen)
    _log.info("%s: left out %d files (data.split=%r)", path, len(files) - len(found), split)
    return found


def _split_of_file(name: str) -> str | None:
    """Returns the split that a file belongs to by its name, such as "train-00000-of-00010.parquet"."""
    if match := _NUMBERED.match(name):
        return match[1]
    stem = os.path.splitext(name)[0]
    return stem if split_of(stem) else None


def _image_bytes(value: Any) -> bytes | None:
    encoded = value.get("bytes") if isinstance(value, Mapping) else value
    return encoded if isinstance(encoded, bytes) else None


def _find_ranges(files: ParquetFiles, shard: int, chunk: Chunk, images: Iterator[bytes | None]) -> np.ndarray:
    """Returns the byte range of every image in an uncompressed column chunk, int64 [rows, 2]; (0, 0) if not found.

    Images follow one another in the order of the rows, with only page headers, indices and lengths between them; a
    repeated one may be stored once.
    """
    ranges, position = [], chunk.start
    for image in images:
        found = -1
        if image:
            window = files.read(shard, position, min(position + len(image) + _BETWEEN_IMAGES, chunk.end))
            found = window.find(image)
        if found < 0:
            ranges.append((0, 0))
        else:
            position += found
            ranges.append((position, position + len(image)))
            position += len(image)
    return np.array(ranges, np.int64).reshape(-1, 2)
