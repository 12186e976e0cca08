"""Folders of images with their captions in one JSONL, CSV or Parquet file, or with one folder per class."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lidit_jax.data.formats.files import is_remote
from lidit_jax.data.formats.shards import (
    CLASS_FIELD,
    MAX_TEXT_BYTES,
    Place,
    Sample,
    Unusable,
    captions_of,
    check_image,
    class_name,
    names_digest,
    parse_json,
    scan_numbered,
)
from lidit_jax.errors import UserError

_CAPTION_FILES = (".jsonl", ".csv", ".parquet")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
# Names of the column with the image file: first the one of Hugging Face's ImageFolder, then other common ones.
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")


class FolderShards:
    """A single shard: the rows of a captions file, or the images of class folders; see `Shards`.

    A row names its image in the column "file_name", relative to the folder of the captions file; its other texts are
    captions, and its other values metadata. All rows are kept in memory.
    """

    def __init__(self, path: str | os.PathLike, class_names: Sequence[str] = ()):
        """Reads the captions file or lists the class folders.

        Args:
          path: the captions file; or its folder, if it is the only captions file or is called "metadata" or "captions";
            or a folder of folders, each named after its class.
          class_names: names of the classes that rows give as numbers.

        Raises:
          UserError: the path does not exist, is remote, has no captions, or cannot be read.
        """
        path = os.fspath(path)
        if is_remote(path):
            raise UserError(f"{path}: image folders can only be read from a disk: pack them into tar shards")
        if not os.path.exists(path):
            raise UserError(f"data path {path!r} does not exist: give a folder of images, or its captions file")
        self._class_names = tuple(class_names)
        self.settings = names_digest(class_names)
        file = _captions_file(path) if os.path.isdir(path) else path
        self._folder = path if file is None else os.path.dirname(os.path.abspath(file))
        self.paths = (file or os.path.join(path, "classes"),)
        self._rows = _class_rows(path) if file is None else _read_rows(file)
        if file is None:  # no captions file whose modification time would change when classes are renamed
            self.settings += hashlib.sha256(b"\n".join(self._rows)).hexdigest()[:16]

    def size(self, shard: int) -> int:
        del shard
        return len(self._rows)

    def scan(self, shard: int) -> Iterator[tuple[Place, Sample] | str]:
        return scan_numbered(shard, len(self._rows), self.read)

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        return [self._sample(number) for _, number, _ in places]

    def _sample(self, number: int) -> Sample | Unusable:
        try:
            if number >= len(self._rows):
                raise Unusable("changed since it was indexed")
            values = parse_json(self._rows[number])
            column = next((name for name in FILE_COLUMNS if isinstance(values.get(name), str)), None)
            if column is None:
                raise Unusable(f"no column {FILE_COLUMNS[0]!r}")
            name = values.pop(column)
            texts = {key: value for key, value in values.items() if isinstance(value, str)}
            if any("\udc80" <= character <= "\udcff" for text in texts.values() for character in text):
                raise Unusable("caption not in UTF-8")
            if any(len(text) > MAX_TEXT_BYTES for text in texts.values()):
                raise Unusable("text over 1 MiB")
            if CLASS_FIELD in values and isinstance(values[CLASS_FIELD], int | str):
                texts[CLASS_FIELD] = class_name(values[CLASS_FIELD], self._class_names)
            return Sample(name, captions_of(texts), values, self._image(name))
        except Unusable as reason:
            return reason

    def _image(self, name: str) -> io.BytesIO:
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
            raise Unusable("file outside the folder")
        path = os.path.join(self._folder, inside)
        try:
            check_image(os.path.getsize(path))
            with open(path, "rb") as file:
                return io.BytesIO(file.read())
        except (OSError, ValueError) as error:
            raise Unusable("no image") from error


def _captions_file(folder: str) -> str | None:
    names = sorted(name for name in os.listdir(folder) if name.endswith(_CAPTION_FILES))
    called = [name for name in names if os.path.splitext(name)[0] in ("metadata", "captions")]
    if len(names) > 1 and len(called) != 1:
        raise UserError(f"{folder!r} has several captions files ({', '.join(names[:5])}): name one as data.path")
    chosen = called or names
    return os.path.join(folder, chosen[0]) if chosen else None


def _class_rows(folder: str) -> list[bytes]:
    rows = []
    for directory, folders, files in os.walk(folder):
        folders.sort()
        if directory == folder:
            continue
        name = os.path.relpath(directory, folder)
        for file in sorted(files):
            if file.lower().endswith(_IMAGES):
                row = {FILE_COLUMNS[0]: os.path.join(name, file), CLASS_FIELD: name.split(os.sep)[0]}
                rows.append(json.dumps(row).encode())
    if not rows:
        raise UserError(
            f"{folder!r} has neither a captions file (.jsonl, .csv or .parquet) nor folders of images named after "
            "their class: add one of them"
        )
    return rows


def _read_rows(file: str) -> list[bytes]:
    """Returns each row as an encoded JSON object; malformed rows stay as they are and are counted when parsed."""
    try:
        if file.endswith(".jsonl"):
            with open(file, "rb") as lines:
                return [line for line in lines if line.strip()]
        if file.endswith(".csv"):
            return list(_csv_rows(file))
        if file.endswith(".parquet"):
            return list(_parquet_rows(file))
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:  # pyarrow raises the first four
        raise UserError(f"cannot read {file!r}: {' '.join(str(error).split())[:150]}") from error
    raise UserError(f"{file!r} is not a captions file: it must be a .jsonl, .csv or .parquet")


_MAX_FIELD = 1 << 30


def _csv_rows(file: str) -> Iterator[bytes]:
    limit = csv.field_size_limit(_MAX_FIELD)  # overlong texts are counted as broken later and must not raise here
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            for row in csv.DictReader(lines):
                values = {name: value for name, value in row.items() if isinstance(name, str) and value is not None}
                yield json.dumps(values).encode()
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(file: str) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    # Other columns, such as dates or images, are not used and may hold values that Python cannot represent.
    plain = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    columns = [field.name for field in parquet.schema_arrow if any(is_plain(field.type) for is_plain in plain)]
    for batch in parquet.iter_batches(batch_size=4096, columns=columns):
        for row in batch.to_pylist():
            yield json.dumps({name: value for name, value in row.items() if _is_plain(value)}).encode()


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
