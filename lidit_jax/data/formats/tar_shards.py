"""Tar shards of image-text pairs, as img2dataset and webdataset write them: KEY.png|jpg|jpeg|webp with its texts.

The key of a sample is the path of its files up to the first dot of the file name (the webdataset convention). Files of
one sample are adjacent, so a sample is one byte range, which is itself a small tar. Its captions are "txt", "class"
(KEY.cls) and the string fields of its json, except those that img2dataset adds (url, status, sha256 …); its metadata is
the json.
"""

import io
import os
import re
from collections.abc import Generator, Iterator, Sequence

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
    class_name,
    decode_text,
    names_digest,
    parse_json,
)
from lidit_jax.errors import UserError

_IMAGES = ("png", "jpg", "jpeg", "webp")
_TEXTS = ("txt", "json", "cls")
MAX_SAMPLE_BYTES = MAX_IMAGE_BYTES + 4 * MAX_TEXT_BYTES
_CHANGED = "changed since the tar was indexed"


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
                    sample = self._sample(file, found.key, found.files, path)
                    if found.end - found.start > MAX_SAMPLE_BYTES:
                        raise Unusable("sample over 260 MiB")
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
            return self._sample(file, found.key, found.files)
        except ValueError:
            return Unusable(_CHANGED)
        except Unusable as reason:
            return reason

    def _sample(self, file: File, key: str, files: dict[str, tar_headers.Member], path: str = "") -> Sample:
        image = next((files[extension] for extension in _IMAGES if extension in files), None)
        if image is None:
            raise Unusable("no image")
        if not all(member.complete for member in files.values()):
            raise Unusable("truncated file")
        check_image(image.size)
        texts = {extension: _read_text(file, files[extension]) for extension in _TEXTS if extension in files}
        metadata = parse_json(texts["json"]) if "json" in texts else {}
        values = dict(metadata)
        if "txt" in texts:
            values["txt"] = decode_text(texts["txt"])
        if "cls" in texts:
            values[CLASS_FIELD] = class_name(decode_text(texts["cls"]), self._class_names)
        if isinstance(file, _Bytes):
            encoded = io.BytesIO(file.read(image.offset, image.size))
        else:
            encoded = io.BufferedReader(_Region(file, path, image.offset, image.size))
        return Sample(key, captions_of(values), metadata, encoded)


class _SampleFiles:
    """The files found so far of one sample."""

    def __init__(self, key: str, start: int):
        self.key, self.start, self.end = key, start, start
        self.files: dict[str, tar_headers.Member] = {}

    @property
    def has_image_and_text(self) -> bool:
        return any(extension in self.files for extension in _IMAGES) and any(text in self.files for text in _TEXTS)


def _group_files(
    file: File, start: int = 0, length: int | None = None
) -> Generator[_SampleFiles | str, None, int | None]:
    """Yields each sample when its last file has been read, and a reason for each unusable one; see `TarShards.scan`."""
    current, incomplete, complete_keys, next_start = None, {}, set(), None

    def finish_current() -> Iterator[_SampleFiles | str]:
        if current is None:
            return
        if current.key in complete_keys:
            yield "repeated key"
        elif current.key in incomplete or not current.has_image_and_text:
            # Its other files may follow later, or came earlier.
            incomplete[current.key] = "sample split by another key" if current.key in incomplete else current
        else:
            complete_keys.add(current.key)
            yield current

    damage, members = None, tar_headers.walk(file, start)
    while True:
        try:
            member = next(members)
        except StopIteration:
            break
        except tar_headers.DamagedTar as error:
            damage = str(error)
            break
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        extension = extension.lower()
        if not stem or extension not in _IMAGES + _TEXTS:
            continue
        key = folder + slash + stem
        if current is None or key != current.key:
            yield from finish_current()
            current = None
            if length is not None and member.start >= start + length:
                next_start = member.start
                break
            current = _SampleFiles(key, member.start)
        if extension in current.files:
            yield "repeated file name"
        else:
            current.files[extension], current.end = member, member.end
    if damage and current is not None and not current.has_image_and_text and current.key not in incomplete:
        yield "truncated file"
        current = None
    yield from finish_current()
    for found in incomplete.values():
        # An image without texts is a sample, too.
        yield "repeated key" if not isinstance(found, str) and found.key in complete_keys else found
    if damage:
        yield damage
    return next_start


def _read_text(file: File, member: tar_headers.Member) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise Unusable("text over 1 MiB")
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
