"""One sample as it is stored, before its picture is decoded, and the rules for its texts that all formats share."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

MAX_TEXT_BYTES = 1 << 20
MAX_PICTURE_BYTES = 1 << 28
# The caption field of data sets of classes: the class's name.
CLASS_FIELD = "class"
# What img2dataset notes about a sample in its json; no caption, however it is written.
_BOOKKEEPING = frozenset(("key", "url", "status", "error_message", "sha256", "md5", "uid", "exif"))


class Sample(NamedTuple):
    """A sample of any format.

    Attributes:
      key: its name, for messages.
      captions: {field: text}, stripped and not empty.
      metadata: what else is known of it.
      picture: encoded, at its start. Of a sample that is only looked at, reading its header reads no more than that.
    """

    key: str
    captions: dict[str, str]
    metadata: dict[str, Any]
    picture: BinaryIO


class Unusable(Exception):
    """A sample to leave out; its message is the reason, in a few words."""


Place = tuple[int, int]  # where in its shard a sample is: what the format wants to know, e.g. first and last byte


class Shards(Protocol):
    """A data set on disk, in one or more parts that are walked through independently. Picklable; read by threads.

    Attributes:
      paths: of each part, by which its index is named.
      settings: what else decides how samples are read: an index made with others is made anew.
    """

    paths: Sequence[str]
    settings: str

    def size(self, shard: int) -> int:
        """A number that changes with the shard's content as a rule: an index of another one is made anew."""
        ...

    def scan(self, shard: int) -> Iterator[tuple[Place, Sample] | str]:
        """Its samples in order, and for each that cannot be used the reason.

        Raises:
          UserError: the shard cannot be read at all.
        """
        ...

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        """(shard, *place) each -> the sample, or why it can no longer be had."""
        ...


def scan_numbered(
    shard: int, count: int, read: Callable[[Sequence[tuple[int, int, int]]], list[Sample | Unusable]]
) -> Iterator[tuple[Place, Sample] | str]:
    """A shard's scan where its samples are numbered: number i is at the place (i, i + 1)."""
    for number in range(count):
        [sample] = read([(shard, number, number + 1)])
        yield str(sample) if isinstance(sample, Unusable) else ((number, number + 1), sample)


def parse_json(encoded: bytes) -> dict[str, Any]:
    """An object's members. Raises Unusable."""
    try:
        metadata = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise Unusable("unreadable json") from error
    if not isinstance(metadata, dict):
        raise Unusable("unreadable json")
    return metadata


def decode_text(encoded: bytes) -> str:
    """UTF-8, a byte-order mark left out. Raises Unusable."""
    if len(encoded) > MAX_TEXT_BYTES:
        raise Unusable("text over 1 MiB")
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption not in UTF-8") from error


def captions_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The texts among a sample's values, bookkeeping and blanks left out."""
    texts = {name: value for name, value in values.items() if isinstance(value, str) and name not in _BOOKKEEPING}
    # JSON can hold half of a surrogate pair, which no tokeniser takes.
    whole = lambda text: text.encode("utf-8", "replace").decode()  # noqa: E731
    texts = {whole(name): whole(text).strip() for name, text in texts.items()}
    return {name: text for name, text in texts.items() if text}


def class_name(value: int | str, names: Sequence[str]) -> str:
    """Of a class by its number, where `names` are given, or as it is.

    Raises:
      Unusable: the number has no name.
    """
    text = str(value).strip()
    if not names or not re.fullmatch(r"-?[0-9]+", text):
        return text
    digits = text.lstrip("0") or "0"
    if digits.startswith("-") or len(digits) > 10 or int(digits) >= len(names):
        raise Unusable("class without a name")
    return names[int(digits)]


def names_digest(names: Sequence[str]) -> str:
    """Of the classes' names; "" for none."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] if names else ""


def check_picture(size: int) -> None:
    """Raises Unusable for an encoded picture of so many bytes."""
    if not size:
        raise Unusable("empty picture")
    if size > MAX_PICTURE_BYTES:
        raise Unusable("picture file over 256 MiB")
