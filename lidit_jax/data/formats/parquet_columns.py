"""Columns of Parquet files: which ones hold images, texts, numbers, and Hugging Face's class labels."""

import dataclasses
import json
from collections.abc import Mapping

import pyarrow as pa

from lidit_jax.errors import UserError

_MAX_DEPTH = 4  # of nested columns


@dataclasses.dataclass(frozen=True)
class Columns:
    """Roles of the columns of the files.

    Attributes:
      key: column of the image.
      image: columns or fields to read for the image; the first holds its bytes.
      others: columns or fields ("json.caption") with texts and single numbers.
      labels: class names of the integer columns that Hugging Face's metadata call class labels.
    """

    key: str
    image: tuple[str, ...]
    others: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]


def choose_columns(schema: pa.Schema, image_key: str, path: str) -> Columns:
    """Returns what the columns of a file are used for.

    Args:
      schema: schema of the file.
      image_key: column of the image.
      path: path of the file, for error messages.

    Raises:
      UserError: `image_key` is not an image column.
    """
    image = image_fields(schema.field(image_key)) if image_key in schema.names else ()
    if not image:
        raise UserError(
            f"data.image_key={image_key!r} is not an image column of {path!r}: it must be of type binary, or a struct "
            f"with a binary field 'bytes' (there are {', '.join(describe(schema))})"
        )
    others = [name for field in schema if field.name != image_key for name in _plain_fields(field, field.name)]
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


def _plain_fields(field: pa.Field, path: str, depth: int = 0) -> list[str]:
    """Returns the fields of a column that hold texts, lists of texts, or single numbers."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_struct(kind) and depth < _MAX_DEPTH:
        return [name for child in kind for name in _plain_fields(child, f"{path}.{child.name}", depth + 1)]
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    if any(is_list(kind) for is_list in lists):
        inner = kind.value_type
        inner = inner.value_type if pa.types.is_dictionary(inner) else inner
        return [path] if is_text(inner) or is_binary(inner) else []
    return [path] if is_text(kind) or is_binary(kind) or is_number(kind) else []


def describe(schema: pa.Schema) -> list[str]:
    """Returns the first columns and their types, for messages."""
    return [f"{field.name} ({str(field.type)[:40]})" for field in schema][:20]


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
