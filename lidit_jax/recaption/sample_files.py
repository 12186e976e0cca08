"""The files of a sample in a tar shard, which read back as the sample with what a model has added to it."""

import io
import json
from collections.abc import Mapping
from typing import Any

from lidit_jax.data.formats.image_headers import read_header
from lidit_jax.data.formats.shards import BOOKKEEPING, Sample, Unusable, captions_of, decode_text
from lidit_jax.data.formats.tar_shards import parse_texts
from lidit_jax.files import finite

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def sample_files(sample: Sample, encoded: bytes, new: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the content of the files of a sample by extension: image, txt and json.

    Args:
      sample: the sample, with texts and metadata as any storage format gives them.
      encoded: its image, which is written as it is.
      new: values to add to its json, in place of those of the same names; those that are strings are captions.

    Raises:
      Unusable: no such files give the texts back, which are too long or mean something else in a tar.
    """
    captions = {name: text for name, text in sample.captions.items() if name not in new}
    texts = dict(captions)
    files = {EXTENSIONS[read_header(io.BytesIO(encoded)).format]: encoded}
    if _is_same_in_a_file(texts.get("txt")):
        files["txt"] = texts.pop("txt").encode()
    metadata = {name: value for name, value in sample.metadata.items() if _is_json(value) and name not in new}
    if "txt" in files:
        metadata.pop("txt", None)
    expected = captions | {name: value for name, value in new.items() if isinstance(value, str)}
    # The metadata as they are hold many of the texts, but perhaps others than those that the sample has.
    for kept in (metadata, _without_texts(metadata)):
        values = {"key": sample.key} | kept
        there = captions_of(values)
        missing = {name: text for name, text in texts.items() if there.get(name) != text}
        content = json.dumps(finite(values | missing | dict(new)), ensure_ascii=False)
        files["json"] = content.encode("utf-8", "replace")
        if _read(files) == expected:
            return files
    raise Unusable("texts that a tar can't hold")


def _read(files: Mapping[str, bytes]) -> dict[str, str] | None:
    """Returns the captions that a reader finds in the files; None if it rejects them."""
    try:
        return parse_texts({extension: files[extension] for extension in ("txt", "json") if extension in files})[0]
    except Unusable:
        return None


def _is_same_in_a_file(text: str | None) -> bool:
    try:
        return text is not None and decode_text(text.encode()) == text
    except Unusable:  # it looks like UTF-16
        return False


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int | float)


def _without_texts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metadata without strings, but for img2dataset's bookkeeping."""
    return {
        name: value if name in BOOKKEEPING else _without_strings(value)
        for name, value in metadata.items()
        if name in BOOKKEEPING or not isinstance(value, str)
    }


def _without_strings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_strings(item) for name, item in value.items() if not isinstance(item, str)}
    if isinstance(value, list):
        return [_without_strings(item) for item in value if not isinstance(item, str)]
    return value
