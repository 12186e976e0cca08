"""Tar shards of image-text pairs, as img2dataset and webdataset write them: KEY.png|jpg|jpeg|webp with its texts.

A sample's key is its files' name up to the first dot, with its folder (the webdataset convention); its files follow one
another, so a sample is one range of bytes, which is itself a little tar. Its captions are "txt", "class" (KEY.cls) and
the json's string fields, img2dataset's own notes (url, status, sha256 …) excepted; its metadata is the json.
"""

import io
import os
import re
from collections.abc import Generator, Iterator, Sequence

from lidit_jax.data.formats import tar_headers
from lidit_jax.data.formats.files import File, RangeReader, find_files, open_file
from lidit_jax.data.formats.shards import (
    CLASS_FIELD,
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    Place,
    Sample,
    Unusable,
    captions_of,
    check_picture,
    class_name,
    decode_text,
    names_digest,
    parse_json,
)
from lidit_jax.errors import UserError

_PICTURES = ("png", "jpg", "jpeg", "webp")
_TEXTS = ("txt", "json", "cls")
MAX_SAMPLE_BYTES = MAX_PICTURE_BYTES + 4 * MAX_TEXT_BYTES
_CHANGED = "changed since the tar was indexed"


class TarShards:
    """Tar files; see `Shards`."""

    def __init__(self, path: str | os.PathLike, class_names: Sequence[str] = (), shards: slice | None = None):
        """Args:
          path: a folder of .tar files, one file, a glob pattern or a brace range ("{00000..00003}.tar").
          class_names: of the numbers in KEY.cls.
          shards: which of the path's shards, in their order.

        Raises:
          UserError: no such path, no tar there, or none of the shards asked for.
        """
        found = find_files(path, ".tar", re.compile(r"\.tar$"))
        self.paths = found[shards] if shards else found
        if not self.paths:
            raise UserError(
                f"{os.fspath(path)!r} has {len(found)} shards, too few to hold some out: "
                "lower --config.data.held_out_shards"
            )
        self._class_names = tuple(class_names)
        self.settings = names_digest(class_names)
        self._files = RangeReader(self.paths)

    def size(self, shard: int) -> int:
        return _open(self.paths[shard]).size

    def scan(
        self, shard: int, start: int = 0, length: int | None = None
    ) -> Generator[tuple[Place, Sample] | str, None, int | None]:
        """As `Shards.scan`, of a part of the shard.

        Args:
          start: where a part begins, in bytes: 0, or what the part before returned.
          length: of the part in bytes, after which it ends with a sample; None: to the shard's end. What belongs
            together, and what comes twice, is noticed within a part.

        Returns:
          Where the next part begins; None at the shard's end.
        """
        path = self.paths[shard]
        file = _open(path)
        try:
            groups = _group(file, start, length)
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
        """A sample from its range of bytes."""
        if isinstance(data, OSError):
            return Unusable("unreadable file")
        file = _Bytes(data)
        try:
            [found] = [one for one in _group(file) if isinstance(one, _Found)]  # it may have repeated file names too
            return self._sample(file, found.key, found.files)
        except ValueError:
            return Unusable(_CHANGED)
        except Unusable as reason:
            return reason

    def _sample(self, file: File, key: str, files: dict[str, tar_headers.Member], path: str = "") -> Sample:
        picture = next((files[extension] for extension in _PICTURES if extension in files), None)
        if picture is None:
            raise Unusable("no picture")
        if not all(member.complete for member in files.values()):
            raise Unusable("cut-off file")
        check_picture(picture.size)
        texts = {extension: _read_text(file, files[extension]) for extension in _TEXTS if extension in files}
        metadata = parse_json(texts["json"]) if "json" in texts else {}
        values = dict(metadata)
        if "txt" in texts:
            values["txt"] = decode_text(texts["txt"])
        if "cls" in texts:
            values[CLASS_FIELD] = class_name(decode_text(texts["cls"]), self._class_names)
        if isinstance(file, _Bytes):
            encoded = io.BytesIO(file.read(picture.offset, picture.size))
        else:
            encoded = io.BufferedReader(_Region(file, path, picture.offset, picture.size))
        return Sample(key, captions_of(values), metadata, encoded)


class _Found:
    """The files of one sample that has been met so far."""

    def __init__(self, key: str, start: int):
        self.key, self.start, self.end = key, start, start
        self.files: dict[str, tar_headers.Member] = {}

    @property
    def is_whole(self) -> bool:
        return any(extension in self.files for extension in _PICTURES) and any(text in self.files for text in _TEXTS)


def _group(file: File, start: int = 0, length: int | None = None) -> Generator[_Found | str, None, int | None]:
    """Samples as they end; and a reason for each that is left out. See `TarShards.scan`."""
    current, parts, done, rest = None, {}, set(), None

    def ended() -> Iterator[_Found | str]:
        if current is None:
            return
        if current.key in done:
            yield "repeated key"
        elif current.key in parts or not current.is_whole:
            # Its other files may come later, or came before.
            parts[current.key] = "sample split by another key" if current.key in parts else current
        else:
            done.add(current.key)
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
        if not stem or extension not in _PICTURES + _TEXTS:
            continue
        key = folder + slash + stem
        if current is None or key != current.key:
            yield from ended()
            current = None
            if length is not None and member.start >= start + length:
                rest = member.start
                break
            current = _Found(key, member.start)
        if extension in current.files:
            yield "repeated file name"
        else:
            current.files[extension], current.end = member, member.end
    if damage and current is not None and not current.is_whole and current.key not in parts:
        yield "cut-off file"
        current = None
    yield from ended()
    for part in parts.values():
        # A picture alone is a sample, though without a caption.
        yield "repeated key" if not isinstance(part, str) and part.key in done else part
    if damage:
        yield damage
    return rest


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
    """A file that is in memory."""

    def __init__(self, data: bytes):
        self._data, self.size = data, len(data)

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def close(self) -> None:
        pass


class _Region(io.RawIOBase):
    """A part of an open file as a file of its own, so that reading a picture's header reads no more than that."""

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
        """In one piece, where the base class would ask for a few kilobytes at a time."""
        return self._read(max(self._size - self._position, 0))

    def readinto(self, buffer) -> int:
        data = self._read(max(min(len(buffer), self._size - self._position), 0))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        """Raises UserError where the file cannot be read, which nobody is to take for a broken picture."""
        try:
            data = self._file.read(self._offset + self._position, size)
        except OSError as error:
            raise UserError(f"cannot read {self._path!r}: {error.strerror or error}") from error
        self._position += len(data)
        return data
