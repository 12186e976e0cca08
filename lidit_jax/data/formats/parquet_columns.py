"""Columns of Parquet files: which ones hold images, texts, numbers, and Hugging Face's class labels."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from lidit_jax.data.formats.shards import MAX_DEPTH
from lidit_jax.errors import UserError

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Roles of the columns of the files.

    Attributes:
      key: column of the image.
      image: columns or fields to read for the image; the first holds its bytes.
      others: columns or fields ("json.caption", "captions.list.element.text") with texts and single numbers.
      labels: class names of the integer columns that Hugging Face's metadata call class labels.
    """

    key: str
    image: tuple[str, ...]
    others: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]


def choose_columns(stored: pq.ParquetSchema, image_key: str, path: str) -> Columns:
    """Returns what the columns of a file are used for.

    Args:
      stored: schema of the file.
      image_key: column of the image.
      path: path of the file, for error messages.

    Raises:
      UserError: `image_key` is not an image column.
    """
    schema = stored.to_arrow_schema()
    image = image_fields(schema.field(image_key)) if image_key in schema.names else ()
    if not image:
        raise UserError(
            f"data.image_key={image_key!r} is not an image column of {path!r}: it must be of type binary, or a struct "
            f"with a binary field 'bytes' (there are {', '.join(describe(schema))})"
        )
    others = plain_fields(stored, [name for name in schema.names if name != image_key])
    return Columns(image_key, image, tuple(others), _class_labels(schema))


def image_fields(field: pa.Field) -> tuple[str, ...]:
    """Returns the fields to read for an image in a column; () if the column cannot hold images."""
    if is_binary(field.type):
        return (field.name,)
    if pa.types.is_struct(field.type):
        names = [child.name for child in field.type if child.name == "bytes" and is_binary(child.type)]
        names += [child.name for child in field.type if child.name == "path" and is_text(child.type)]
        if names[:1] == ["bytes"]:
            return tuple(f"{field.name}.{name}" for name in names)
    return ()


def plain_fields(stored: pq.ParquetSchema, columns: Sequence[str]) -> dict[str, pa.DataType]:
    """Returns the fields of columns that hold texts, lists of texts, or single numbers; see `shards.flatten`.

    Args:
      stored: schema of the file.
      columns: names of the columns.

    Returns:
      {path: type of its values}. The path is that of a stored field, as "captions.list.element.text" in a list of
      structs, or the beginning of one.
    """
    schema, entries = stored.to_arrow_schema(), _entry_fields(stored)
    fields: dict[str, pa.DataType] = {}
    for name in columns:
        fields |= _plain_fields(schema.field(name), name, entries)
    return fields


def _plain_fields(
    field: pa.Field, path: str, entries: Mapping[tuple[str, str], str], depth: int = 0
) -> dict[str, pa.DataType]:
    kind, fields = _decoded_type(field.type), {}
    if pa.types.is_struct(kind) and depth < MAX_DEPTH:
        for child in kind:
            fields |= _plain_fields(child, f"{path}.{child.name}", entries, depth + 1)
        return fields
    if any(is_list(kind) for is_list in _LISTS):
        inner = _decoded_type(kind.value_type)
        if pa.types.is_struct(inner):
            kinds = {entries.get((path, child.name)): _decoded_type(child.type) for child in inner}
            return {leaf: kind for leaf, kind in kinds.items() if leaf and (is_text(kind) or is_binary(kind))}
        return {path: inner} if is_text(inner) or is_binary(inner) else {}
    return {path: kind} if is_text(kind) or is_binary(kind) or is_number(kind) else {}


def _entry_fields(stored: pq.ParquetSchema) -> dict[tuple[str, str], str]:
    """Returns the paths of stored fields by the path of a list and the name of a field of its entries.

    Between the two, a path has two names that depend on the writer, such as "list.element"; older writers have one.
    """
    entries: dict[tuple[str, str], str] = {}
    for path in (stored.column(i).path for i in range(len(stored))):
        parts = path.split(".")
        for between in (2, 1):
            if len(parts) > between + 1:
                entries.setdefault((".".join(parts[: -between - 1]), parts[-1]), path)
    return entries


def _decoded_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def unread_columns(schema: pa.Schema, fields: Sequence[str]) -> list[str]:
    """Returns the columns, with their types, of which no field is read, for messages."""
    read = {name for field in fields for name in beginnings(field)}
    return describe([field for field in schema if field.name not in read])


def beginnings(path: str) -> set[str]:
    """Returns a path and those of the structs and lists that it is in: "a.b" and "a" for "a.b"."""
    parts = path.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def describe(schema: Iterable[pa.Field]) -> list[str]:
    """Returns the first columns and their types, for messages."""
    return [f"{field.name} ({str(field.type)[:40]})" for field in itertools.islice(schema, 20)]


def _class_labels(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Returns the names of class labels, from the metadata that the library `datasets` writes; {} if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: feature for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, feature["names"])) for name, feature in labels.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):  # missing, or by another writer
        return {}


def is_text(kind: pa.DataType) -> bool:
    """Returns True for the types of texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Returns True for the types of byte strings."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_number(kind: pa.DataType) -> bool:
    """Returns True for the types of numbers that metadata may have."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
