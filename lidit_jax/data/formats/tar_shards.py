"""Tar shards of image-text pairs, as img2dataset and webdataset write them: KEY.png|jpg|jpeg|webp with its texts.

The key of a sample is the path of its files up to the first dot of the file name (the webdataset convention). Files of
one sample are adjacent, so a sample is one byte range, which is itself a small tar. Its texts, of which some are
captions, are "txt", "class" (KEY.cls), and the strings in its json (`shards.flatten`); its metadata is the json.
`_divide` states what happens to names of several dots.
"""

import bisect
import dataclasses
import io
import os
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lidit_jax.data.formats import tar_headers
from lidit_jax.data.formats.files import File, RangeReader, find_files, open_file, select_shards
from lidit_jax.data.formats.shards import (
    CLASS_FIELD,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Place,
    Sample,
    Unusable,
    captions_of,
    check_image,
    check_text,
    decode_text,
    names_digest,
    parse_json,
    printable,
    with_class_name,
)
from lidit_jax.errors import UserError
from lidit_jax.files import is_hidden

_IMAGES = ("png", "jpg", "jpeg", "webp")
_TEXTS = ("txt", "json", "cls")
MAX_SAMPLE_BYTES = MAX_IMAGE_BYTES + 4 * MAX_TEXT_BYTES
_MAX_HEADERS = 256  # headers that are parsed whenever a sample is read
_CHANGED = "changed since the tar was indexed"
_SPLIT, _TOO_MANY_FILES = "sample split by another key", "sample of over 256 files"


class TarShards:
    """Reader of tar shards; see `Shards`."""

    def __init__(self, path: str | os.PathLike, class_names: Sequence[str] = (), shards: slice | None = None):
        """Finds the shards.

        Args:
          path: a folder of .tar files, one file, a glob pattern or a brace range ("{00000..00003}.tar").
          class_names: names of the classes that KEY.cls gives as numbers.
          shards: slice of the sorted shards to use; None: all.

        Raises:
          UserError: the path does not exist, holds no tar, or the slice is empty.
        """
        self.paths = select_shards(path, find_files(path, ".tar", re.compile(r"\.tar$")), shards)
        self._class_names = tuple(class_names)
        self.settings = names_digest(class_names)
        self._files = RangeReader(self.paths)

    def size(self, shard: int) -> int:
        return _open(self.paths[shard]).size

    def scan(
        self, shard: int, start: int = 0, length: int | None = None
    ) -> Generator[tuple[Place, Sample] | str, None, int | None]:
        """Scans a section of a shard, as `Shards.scan` does.

        Args:
          shard: index of the shard.
          start: offset of the section in bytes: 0, or the offset that scanning the previous section returned.
          length: length of the section in bytes, rounded up to a complete sample; None: to the end of the shard. Split
            samples and repeated keys are only noticed within a section.

        Returns:
          Offset of the next section; None at the end of the shard.
        """
        path = self.paths[shard]
        file = _open(path)
        try:
            groups = _group_files(file, start, length)
            while True:
                try:
                    found = next(groups)
                except StopIteration as end:
                    return end.value
                if isinstance(found, str):
                    yield found
                    continue
                try:
                    sample = self._sample(file, found, path)
                    if found.end - found.start > MAX_SAMPLE_BYTES:
                        raise Unusable("sample over 260 MiB")
                    if found.num_headers > _MAX_HEADERS:
                        raise Unusable(_TOO_MANY_FILES)
                except Unusable as reason:
                    yield str(reason)
                else:
                    yield (found.start, found.end), sample
        except OSError as error:
            raise UserError(f"cannot read {path!r}: {error.strerror or error}") from error
        finally:
            file.close()

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        return [self._parse(data) for data in self._files.read(places)]

    def _parse(self, data: bytes | OSError) -> Sample | Unusable:
        """Parses a sample from its byte range."""
        if isinstance(data, OSError):
            return Unusable("unreadable file")
        file = _Bytes(data)
        try:
            # Repeated file names yield reasons besides the sample.
            [found] = [item for item in _group_files(file) if isinstance(item, _SampleFiles)]
            return self._sample(file, found)
        except ValueError:
            return Unusable(_CHANGED)
        except Unusable as reason:
            return reason

    def _sample(self, file: File, found: "_SampleFiles", path: str = "") -> Sample:
        files = found.files
        image = next((files[extension] for extension in _IMAGES if extension in files), None)
        if image is None:
            raise Unusable("no image")
        fault = next((member.fault for member in files.values() if member.fault), None)
        if fault:
            raise Unusable(fault)
        check_image(image.size)
        texts = {extension: _read_text(file, files[extension]) for extension in _TEXTS if extension in files}
        captions, metadata = parse_texts(texts, self._class_names)
        if isinstance(file, _Bytes):
            encoded = io.BytesIO(file.read(image.offset, image.size))
        else:
            encoded = io.BufferedReader(_Region(file, path, image.offset, image.size))
        return Sample(printable(found.key), captions, metadata, encoded)


def parse_texts(texts: Mapping[str, bytes], class_names: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, Any]]:
    """Parses the text files of a sample.

    Args:
      texts: content of the files by extension, "txt", "json" and "cls".
      class_names: names of the classes that KEY.cls gives as numbers.

    Returns:
      The captions and the metadata of its `Sample`.

    Raises:
      Unusable: a text is too long or can't be decoded, or a class has no name.
    """
    for encoded in texts.values():
        check_text(len(encoded))
    metadata = parse_json(texts["json"]) if "json" in texts else {}
    values = dict(metadata)
    if "txt" in texts:
        values["txt"] = decode_text(texts["txt"])
    if "cls" in texts:
        values[CLASS_FIELD] = decode_text(texts["cls"])
    return captions_of(with_class_name(values, class_names)), metadata


class _NamedFile(NamedTuple):
    """A file of a shard and the parts of its name.

    Attributes:
      key: path up to the first dot of the file name.
      stem: path up to the last dot of the file name.
      extension: what follows the last dot, in lower case.
      member: where the file is.
    """

    key: str
    stem: str
    extension: str
    member: tar_headers.Member


@dataclasses.dataclass
class _SampleFiles:
    """The image and the texts of a sample by extension, and the byte range of its files."""

    key: str
    files: dict[str, tar_headers.Member]

    @property
    def start(self) -> int:
        return min(member.start for member in self.files.values())

    @property
    def end(self) -> int:
        return max(member.end for member in self.files.values())

    @property
    def num_headers(self) -> int:
        numbers = [member.headers for member in self.files.values()]
        return max(numbers) - min(numbers) + 1

    @property
    def has_image(self) -> bool:
        return any(extension in self.files for extension in _IMAGES)

    @property
    def has_image_and_text(self) -> bool:
        return self.has_image and any(text in self.files for text in _TEXTS)


def _parse_name(member: tar_headers.Member) -> _NamedFile | None:
    """Parses the name of a file; returns None for hidden files (`files.is_hidden`) and for names without a dot."""
    folder, slash, name = member.name.rpartition("/")
    folders = folder.split("/")
    if any(is_hidden(part) and part not in (".", "..") for part in folders):
        return None
    key, dot, _ = name.partition(".")
    if not key or not dot:
        return None
    stem, _, extension = name.rpartition(".")
    return _NamedFile(folder + slash + key, folder + slash + stem, extension.lower(), member)


def _samples_of(files: Sequence[_NamedFile]) -> Iterator[_SampleFiles | str]:
    """Divides adjacent files with the same key into samples, and yields a reason for each unusable one.

    A sample is only used if its byte range, which may have other files in it, is divided into that sample again.
    """
    starts, divided = [file.member.start for file in files], list(_divide(files))
    for found in divided:
        if isinstance(found, str) or not found.files:
            yield found
            continue
        inside = files[bisect.bisect_left(starts, found.start) : bisect.bisect_left(starts, found.end)]
        if len(inside) > _MAX_HEADERS:
            yield _TOO_MANY_FILES
            continue
        again = divided if len(inside) == len(files) else _divide(inside)
        yield found if [one for one in again if not isinstance(one, str)] == [found] else _SPLIT


def _divide(files: Sequence[_NamedFile]) -> Iterator[_SampleFiles | str]:
    """Divides adjacent files with the same key by their names.

    With KEY.txt and KEY.image.jpg, the sample has both. With KEY.jpg and KEY.mask.png, the mask is ignored. KEY.0.jpg
    and KEY.0.txt beside KEY.1.jpg and KEY.1.txt are a sample of their own, with the key "KEY.0".
    """
    key, samples = files[0].key, {}
    for file in files:
        if file.extension not in _IMAGES + _TEXTS:
            continue
        sample = samples.setdefault(file.stem, _SampleFiles(file.stem, {}))
        if file.extension in sample.files:
            yield "repeated file name"
        else:
            sample.files[file.extension] = file.member
    if not samples:
        yield _SampleFiles(key, {})  # counted as a sample without an image
        return
    main = samples.pop(key, None)
    if main is None:
        yield from samples.values()
        return
    images = [sample for sample in samples.values() if sample.has_image]
    if len(images) == 1 and not main.has_image and not main.files.keys() & images[0].files.keys():
        yield _SampleFiles(key, main.files | images[0].files)
        return
    yield "several images with one key" if len(images) > 1 and not main.has_image else main
    yield from (sample for sample in images if sample.has_image_and_text)


def _adjacent_files(file: File, start: int, length: int | None) -> Generator[list[_NamedFile], None, int | None]:
    """Yields the adjacent files of each key, and returns the offset of the next section; see `TarShards.scan`.

    Raises:
      DamagedTar: as `tar_headers.walk` does, after all files before the damage have been yielded.
    """
    current: list[_NamedFile] = []
    try:
        for member in tar_headers.walk(file, start):
            named = _parse_name(member)
            if named is None:
                continue
            if not current or named.key != current[0].key:
                if current:
                    yield current
                current = []
                if length is not None and member.start >= start + length:
                    return member.start
            current.append(named)
    except tar_headers.DamagedTar:
        if current:
            yield current
        raise
    if current:
        yield current
    return None


def _group_files(
    file: File, start: int = 0, length: int | None = None
) -> Generator[_SampleFiles | str, None, int | None]:
    """Yields each sample when its last file has been read, and a reason for each unusable one; see `TarShards.scan`."""
    groups, complete_keys, last = _adjacent_files(file, start, length), set(), None
    incomplete: dict[str, _SampleFiles | str] = {}
    damage = next_start = None
    while True:
        try:
            files = next(groups)
        except StopIteration as end:
            next_start = end.value
            break
        except tar_headers.DamagedTar as error:
            damage = str(error)
            break
        for last in _samples_of(files):
            if isinstance(last, str):
                yield last
            elif last.key in complete_keys:
                yield "repeated key"
            elif last.key in incomplete or not last.has_image_and_text:
                # Its other files may follow later, or came earlier.
                incomplete[last.key] = _SPLIT if last.key in incomplete else last
            else:
                complete_keys.add(last.key)
                yield last
    for key, found in incomplete.items():
        if isinstance(found, str):
            yield found
        elif damage and found is last:
            yield "truncated file"
        else:  # an image without texts is a sample, too
            yield "repeated key" if key in complete_keys else found
    if damage:
        yield damage
    return next_start


def _read_text(file: File, member: tar_headers.Member) -> bytes:
    check_text(member.size)
    return file.read(member.offset, member.size)


def _open(path: str) -> File:
    try:
        return open_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror or error}") from error


class _Bytes:
    """A `File` in memory."""

    def __init__(self, data: bytes):
        self._data, self.size = data, len(data)

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def close(self) -> None:
        pass


class _Region(io.RawIOBase):
    """A byte range of an open file as a file of its own, so that reading an image's header reads only that."""

    def __init__(self, file: File, path: str, offset: int, size: int):
        super().__init__()
        self._path = path
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("seek to before the start")
        self._position = start + offset
        return self._position

    def readall(self) -> bytes:
        """Reads the rest at once; the base class would read a few kilobytes at a time."""
        return self._read(max(self._size - self._position, 0))

    def readinto(self, buffer) -> int:
        data = self._read(max(min(len(buffer), self._size - self._position), 0))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        """Reads up to `size` bytes; raises UserError, not OSError, which would be taken for a broken image."""
        try:
            data = self._file.read(self._offset + self._position, size)
        except OSError as error:
            raise UserError(f"cannot read {self._path!r}: {error.strerror or error}") from error
        self._position += len(data)
        return data
