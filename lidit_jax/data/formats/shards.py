"""Interface of the storage formats: a sample before its image is decoded, and the rules for texts that all share."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

from lidit_jax.files import decode_json, text_encoding

MAX_TEXT_BYTES = 1 << 20
MAX_LIST = 64  # texts that are read of a list of captions
MAX_DEPTH = 4  # of nested texts that are read
_MAX_PREFIX = 100  # characters before the last part of a nested text's name: a short file must not give many long names
MAX_IMAGE_BYTES = 1 << 28
# Caption field that holds the class name, for data sets with classes.
CLASS_FIELD = "class"
# Text with the number of a class that has no name: a caption only if `DataConfig.captions` names it.
CLASS_NUMBER_FIELD = "class_number"
# Fields that img2dataset adds to a sample's json; they are never captions.
BOOKKEEPING = frozenset(("key", "url", "status", "error_message", "sha256", "md5", "uid", "exif"))
# Unicode categories of characters that show nothing: controls, format characters, unpaired surrogates.
_INVISIBLE = ("Cc", "Cf", "Cs")


class Sample(NamedTuple):
    """A sample, independent of its storage format.

    Attributes:
      key: name of the sample, for messages.
      captions: {name: text}, stripped and not empty, named as by `flatten`, with "/" for dots. Which of them are
        captions is decided for all samples at once (`DataConfig.captions`).
      metadata: further values.
      image: the encoded image, positioned at its start. While scanning it reads lazily: reading the header of the
        image reads no more of the file than that.
    """

    key: str
    captions: dict[str, str]
    metadata: dict[str, Any]
    image: BinaryIO


class Unusable(Exception):
    """A sample that cannot be used; the message gives the reason in a few words."""


Place = tuple[int, int]  # position of a sample within its shard; depends on the format, e.g. first byte and end


class Shards(Protocol):
    """A stored data set, in one or more shards that are scanned independently. Picklable; safe to read from threads.

    Attributes:
      paths: path of each shard, from which the name of its index is derived.
      settings: text that identifies the settings of the reader; an index built with other settings is rebuilt.
    """

    paths: Sequence[str]
    settings: str

    def size(self, shard: int) -> int:
        """Returns a number that usually changes with the shard's content; an index with another one is rebuilt."""
        ...

    def scan(self, shard: int) -> Iterator[tuple[Place, Sample] | str]:
        """Yields the samples of a shard in order, each with its place; for unusable ones, the reason instead.

        Raises:
          UserError: the shard cannot be read at all.
        """
        ...

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        """Reads the sample at each (shard, *place), or returns why it can no longer be read."""
        ...


class SequentialShards(Shards, Protocol):
    """Shards that can also be read from end to end, in sections."""

    def scan(
        self, shard: int, start: int = 0, length: int | None = None
    ) -> Generator[tuple[Place, Sample] | str, None, int | None]:
        """Scans a section of a shard, as `Shards.scan` does a whole one.

        Args:
          shard: index of the shard.
          start: start of the section: 0, or what scanning the previous section returned.
          length: about the length of the section in bytes; None: to the end of the shard.

        Returns:
          Start of the next section; None at the end of the shard.
        """
        ...


def scan_numbered(
    shard: int, count: int, read: Callable[[Sequence[tuple[int, int, int]]], list[Sample | Unusable]]
) -> Iterator[tuple[Place, Sample] | str]:
    """Implements `Shards.scan` for formats with numbered samples: sample i has the place (i, i + 1)."""
    for number in range(count):
        [sample] = read([(shard, number, number + 1)])
        yield str(sample) if isinstance(sample, Unusable) else ((number, number + 1), sample)


def parse_json(encoded: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      Unusable: the data are not a JSON object.
    """
    try:
        metadata = decode_json(encoded)
    except ValueError as error:
        raise Unusable("unreadable json") from error
    if not isinstance(metadata, dict):
        raise Unusable("unreadable json")
    return metadata


def decode_text(encoded: bytes) -> str:
    """Decodes UTF-8, or UTF-16, and drops a byte-order mark.

    Raises:
      Unusable: the text is too long or in neither encoding.
    """
    check_text(len(encoded))
    try:
        return encoded.decode(text_encoding(encoded))
    except UnicodeDecodeError as error:
        raise Unusable("caption not in UTF-8") from error


def captions_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts among the values of a sample, some of which are captions.

    Blank texts and img2dataset's bookkeeping are left out. Dots in names count as slashes: a config cannot name a field
    with a dot.

    Args:
      values: the values, which may be nested as in JSON; see `flatten`.
    """
    return stripped({name.replace(".", "/"): value for name, value in flatten(values).items()})


def stripped(texts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts that are neither blank nor img2dataset's bookkeeping; stripped, without unpaired surrogates."""
    return {
        _replace_surrogates(name): _replace_surrogates(text).strip()
        for name, text in texts.items()
        if isinstance(text, str) and name.split("/")[0] not in BOOKKEEPING and not _is_blank(text)
    }


def flatten(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Flattens nested values; lists of anything but texts and objects with texts are left out.

    An object {"a": {"b": value}} gets the name "a/b", a list of texts {"a": [text, …]} "a/0", "a/1", …, and a list of
    objects {"a": [{"b": text}, …]} "a/b/0", "a/b/1", …. A list of one has no number.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if depth < MAX_DEPTH and len(name) <= _MAX_PREFIX:
                flat |= flatten(value, f"{name}/", depth + 1)
        elif isinstance(value, list):
            flat |= _flatten_list(value, name)
        else:
            flat[name] = value
    return flat


def _flatten_list(values: list, name: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for i, value in enumerate(values[:MAX_LIST]):
        number = f"/{i}" if len(values) > 1 else ""
        if isinstance(value, bytes | str):
            flat[f"{name}{number}"] = value
        elif isinstance(value, Mapping) and len(name) <= _MAX_PREFIX:
            texts = {key: text for key, text in value.items() if isinstance(text, bytes | str)}
            flat |= {f"{name}/{key}{number}": text for key, text in texts.items()}
    return flat


def printable(name: str) -> str:
    r"""Returns the name of a file with bytes that are not UTF-8 as "\xe9": distinct, and safe to print and encode."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_blank(text: str) -> bool:
    """Returns True if all characters are spaces or invisible: zero-width spaces, NUL, unpaired surrogates."""
    return all(character.isspace() or unicodedata.category(character) in _INVISIBLE for character in text)


def _replace_surrogates(text: str) -> str:
    """Replaces unpaired surrogates, which JSON can hold and tokenizers reject."""
    return text.encode("utf-8", "replace").decode()


def class_name(value: int | str, names: Sequence[str]) -> str | None:
    """Returns the name of a class; None for a number, which is no caption, if there are no names.

    Args:
      value: the class, as a number or a name.
      names: names of the classes, by number.

    Raises:
      Unusable: `names` has no entry for the number.
    """
    text = str(value).strip()
    if not re.fullmatch(r"-?[0-9]+", text):
        return text
    if not names:
        return None
    digits = text.lstrip("0") or "0"
    if digits.startswith("-") or len(digits) > 10 or int(digits) >= len(names):
        raise Unusable("class without a name")
    return names[int(digits)]


def with_class_name(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Returns values with the name of the class as the text "class", or its number as "class_number" if it has no name.

    Args:
      values: the values of a sample; "class" may be a number or a name.
      names: names of the classes, by number.

    Raises:
      Unusable: `names` has no entry for the number.
    """
    value = values.get(CLASS_FIELD)
    if not isinstance(value, int | str) or isinstance(value, bool):
        return dict(values)
    others = {name: other for name, other in values.items() if name != CLASS_FIELD}
    name = class_name(value, names)
    return others | ({CLASS_NUMBER_FIELD: str(value).strip()} if name is None else {CLASS_FIELD: name})


def names_digest(names: Sequence[str]) -> str:
    """Returns a digest of the class names; "" if there are none."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] if names else ""


def check_text(size: int) -> None:
    """Raises Unusable if a text of `size` bytes or characters is too long."""
    if size > MAX_TEXT_BYTES:
        raise Unusable("text over 1 MiB")


def check_image(size: int) -> None:
    """Raises Unusable if an encoded image of `size` bytes is empty or too large."""
    if not size:
        raise Unusable("empty image")
    if size > MAX_IMAGE_BYTES:
        raise Unusable("image file over 256 MiB")
