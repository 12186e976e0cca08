"""Image-text tar shards as img2dataset and webdataset write them: KEY.png|jpg|jpeg|webp, KEY.txt and/or KEY.json."""

import collections
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from lidit_jax.data import decoding, tar_headers
from lidit_jax.data.sources import BrokenExample
from lidit_jax.errors import UserError

_PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_TEXT_EXTENSIONS = ("txt", "json")
# What img2dataset notes about a sample in its json; no caption, however it is written.
_BOOKKEEPING = frozenset(("key", "url", "status", "error_message", "sha256", "md5", "uid", "exif"))
_MAX_TEXT_BYTES = 1 << 20
_MAX_PICTURE_BYTES = 1 << 28
_MAX_SHARDS = 1_000_000
_OPEN_FILES_PER_THREAD = 16
_FORMAT_VERSION = b"tar 1"
_ALL = slice(None)


class TarSource:
    """Captioned pictures of one or more tar shards. Headers are read once; captions and metadata stay in memory.

    A sample's key is its file name up to the first dot, with its folder (the webdataset convention). Its caption
    fields are "txt" and the json's string fields, img2dataset's own notes (url, status, sha256 …) excepted; its
    metadata is the json. Samples that cannot be used are left out and counted in `report` by reason.

    Attributes:
      report: number of samples (for "… tar": shards, whose readable part is used) left out, by reason.
      fingerprint: digest of keys, captions, metadata and the pictures' places and sizes, not of their pixels.
    """

    def __init__(self, path: str | os.PathLike, max_pixels: int = 1 << 26, shards: slice = _ALL):
        """Args:
          path: a folder of .tar files, one file, a glob pattern or a brace range ("{00000..00003}.tar").
          max_pixels: larger pictures are left out, undecoded.
          shards: which of the path's shards, in their order.

        Raises:
          UserError: no such path, no tar there, none of the shards asked for, or no usable sample in them.
        """
        self._max_pixels = max_pixels
        found = find_shards(path)
        if not found[shards]:
            raise UserError(
                f"{os.fspath(path)!r} has {len(found)} shards, too few to hold some out: "
                "lower --config.data.held_out_shards"
            )
        self._files = _ShardFiles(found[shards])
        index = _build_index(self._files.paths, max_pixels)
        if not index.keys:
            raise UserError(_nothing_usable(os.fspath(path), len(self._files.paths), index))
        self.report = dict(index.report)
        self.fingerprint = index.digest.hexdigest()[:16]
        self._places = np.array(index.places, np.int64)  # [N, 3]: shard, offset, bytes
        self._sizes = np.array(index.sizes, np.int32)  # [N, 2]
        self._keys, self._captions, self._metadata = index.keys, index.captions, index.metadata

    def __len__(self) -> int:
        return len(self._keys)

    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: height and width."""
        return self._sizes

    def describe(self, index: int) -> dict[str, Any]:
        """As `self[index]`, without "image"."""
        return {"key": self._keys[index], "captions": self._captions[index], "metadata": self._metadata[index]}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"key": str, "image": uint8 [H, W, 3], "captions": {field: str}, "metadata": dict}.

        Raises:
          BrokenExample: the header was fine, but the data are not.
        """
        example = self.describe(index)
        try:
            image = decoding.decode(self._files.read(*self._places[index].tolist()), self._max_pixels)
        except decoding.BrokenPicture as error:
            raise BrokenExample(example["key"], str(error)) from error
        except OSError as error:
            raise BrokenExample(example["key"], "unreadable file") from error
        if image.shape[:2] != tuple(self._sizes[index]):
            raise BrokenExample(example["key"], "changed since the tar was indexed")
        return example | {"image": image}


# --- which shards -----------------------------------------------------------------------------------------------


def find_shards(path: str | os.PathLike) -> tuple[str, ...]:
    """The tar files that a path names, sorted: a folder's, one file, a glob pattern's or a brace range's.

    Raises:
      UserError: there is none, or one of a brace range is missing.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _at_least_one(glob.glob(os.path.join(glob.escape(path), "*.tar")), f"folder {path!r} holds no .tar file")
    if os.path.exists(path):
        return (path,)
    expanded = list(itertools.islice(_expand_braces(path), _MAX_SHARDS + 1))
    if len(expanded) > _MAX_SHARDS:
        raise UserError(f"data path {path!r} names more than {_MAX_SHARDS} files: check the numbers in its braces")
    if any(character in path for character in "*?["):
        return _at_least_one([file for pattern in expanded for file in glob.glob(pattern, recursive=True)],
                             f"no file matches {path!r}")  # fmt: skip
    missing = [file for file in expanded if not os.path.exists(file)]
    if missing and len(expanded) > 1:
        raise UserError(f"{len(missing)} of the {len(expanded)} files of {path!r} do not exist, first {missing[0]!r}")
    if missing:
        raise UserError(f"data path {path!r} does not exist: give a folder of .tar files, a .tar, or a pattern of them")
    return tuple(sorted(expanded))


def _at_least_one(files: list[str], otherwise: str) -> tuple[str, ...]:
    if not files:
        raise UserError(f"{otherwise}: give the place of image-text shards (KEY.png or .jpg, KEY.txt or .json)")
    return tuple(sorted(set(files)))


def _expand_braces(pattern: str) -> Iterator[str]:
    """As a shell does: "{00..02}" counts, zero-padded like its first number; "{a,b}" lists. Lazy: it may be huge."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1]) if match else None
    if not match or not (numbers or "," in match[1]):
        yield pattern
        return
    if numbers:
        first, last = numbers.groups()
        choices = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        choices = iter(match[1].split(","))
    for choice in choices:
        for rest in _expand_braces(pattern[match.end() :]):
            yield pattern[: match.start()] + choice + rest


# --- index ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Index:
    """What the headers say, one entry a usable sample; `pictures` and `texts` count files, usable or not."""

    keys: list[str] = dataclasses.field(default_factory=list)
    places: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    captions: list[dict[str, str]] = dataclasses.field(default_factory=list)
    metadata: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    report: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    digest: Any = dataclasses.field(default_factory=lambda: hashlib.sha256(_FORMAT_VERSION))
    num_pictures: int = 0
    num_captioned: int = 0


class _Unusable(Exception):
    """A sample to leave out; its message is the reason."""


def _build_index(paths: tuple[str, ...], max_pixels: int) -> _Index:
    index = _Index()
    for shard, path in enumerate(paths):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {path!r}: {error.strerror}") from error
        try:
            for key, files in _group(descriptor, index.report).items():
                try:
                    _add_sample(index, shard, descriptor, key, files, max_pixels)
                except _Unusable as reason:
                    index.report[str(reason)] += 1
        except OSError as error:
            raise UserError(f"cannot read {path!r}: {error.strerror}") from error
        finally:
            os.close(descriptor)
    return index


def _group(descriptor: int, report: collections.Counter) -> dict[str, dict[str, tar_headers.Member]]:
    """Pictures and texts of a shard: key -> extension -> file."""
    samples: dict[str, dict[str, tar_headers.Member]] = {}
    try:
        for member in tar_headers.walk(descriptor):
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            extension = extension.lower()
            if not stem or extension not in _PICTURE_EXTENSIONS + _TEXT_EXTENSIONS:
                continue
            files = samples.setdefault(folder + slash + stem, {})
            if extension in files:
                report["repeated file name"] += 1
            else:
                files[extension] = member
    except tar_headers.DamagedTar as error:
        report[str(error)] += 1
    return samples


def _add_sample(index: _Index, shard: int, descriptor: int, key: str, files: dict, max_pixels: int) -> None:
    picture = next((files[extension] for extension in _PICTURE_EXTENSIONS if extension in files), None)
    index.num_pictures += picture is not None
    if picture is None:
        raise _Unusable("no picture")
    if not all(file.complete for file in files.values()):
        raise _Unusable("cut-off file")
    texts = {
        extension: _read_text(descriptor, files[extension]) for extension in _TEXT_EXTENSIONS if extension in files
    }
    metadata = _parse_json(texts["json"]) if "json" in texts else {}
    captions = _captions(texts.get("txt"), metadata)
    if not captions:
        raise _Unusable("no caption")
    index.num_captioned += 1
    size = _picture_size(descriptor, picture, max_pixels)
    index.keys.append(key)
    index.places.append((shard, picture.offset, picture.size))
    index.sizes.append(size)
    index.captions.append(captions)
    index.metadata.append(metadata)
    described = (key, *texts.values(), repr((picture.offset, picture.size, size)))
    for part in (part if isinstance(part, bytes) else part.encode() for part in described):
        index.digest.update(len(part).to_bytes(8, "big") + part)


def _read_text(descriptor: int, file: tar_headers.Member) -> bytes:
    if file.size > _MAX_TEXT_BYTES:
        raise _Unusable("text over 1 MiB")
    return os.pread(descriptor, file.size, file.offset)


def _parse_json(encoded: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise _Unusable("unreadable json") from error
    if not isinstance(metadata, dict):
        raise _Unusable("unreadable json")
    return metadata


def _captions(txt: bytes | None, metadata: dict[str, Any]) -> dict[str, str]:
    fields = {name: value for name, value in metadata.items() if isinstance(value, str) and name not in _BOOKKEEPING}
    if txt is not None:
        try:
            fields["txt"] = txt.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _Unusable("caption not in UTF-8") from error
    # JSON can hold half of a surrogate pair, which no tokeniser takes.
    fields = {name: text.encode("utf-8", "replace").decode().strip() for name, text in fields.items()}
    return {name: text for name, text in fields.items() if text}


def _picture_size(descriptor: int, file: tar_headers.Member, max_pixels: int) -> tuple[int, int]:
    if not file.size:
        raise _Unusable("empty picture")
    if file.size > _MAX_PICTURE_BYTES:
        raise _Unusable("picture file over 256 MiB")
    try:
        return decoding.read_size(io.BufferedReader(_Region(descriptor, file.offset, file.size)), max_pixels)
    except decoding.BrokenPicture as error:
        raise _Unusable(str(error)) from error


def _nothing_usable(path: str, num_shards: int, index: _Index) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in index.report.most_common())
    found = f"{index.num_pictures} pictures, {index.num_captioned} captions" + (f" ({reasons})" if reasons else "")
    return (
        f"no usable sample in {path!r} ({num_shards} tar file{'s' * (num_shards > 1)}): {found}; "
        "each picture KEY.png, .jpg or .webp needs its caption in KEY.txt or KEY.json"
    )


# --- reading ----------------------------------------------------------------------------------------------------


class _Region(io.RawIOBase):
    """A part of an open file as a file of its own, so that reading a picture's header reads no more than that."""

    def __init__(self, descriptor: int, offset: int, size: int):
        super().__init__()
        self._descriptor, self._offset, self._size, self._position = descriptor, offset, size, 0

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

    def readinto(self, buffer) -> int:
        wanted = max(min(len(buffer), self._size - self._position), 0)
        data = os.pread(self._descriptor, wanted, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _ShardFiles:
    """Reads ranges of files. Each thread opens its own, so that none closes a file under another's read."""

    def __init__(self, paths: tuple[str, ...]):
        self.paths = paths
        self._local = threading.local()

    def __reduce__(self):
        return _ShardFiles, (self.paths,)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes (fewer at the file's end). Raises OSError."""
        return os.pread(self._descriptor(shard), size, offset)

    def _descriptor(self, shard: int) -> int:
        opened = self._local.__dict__.setdefault("opened", collections.OrderedDict())
        if shard not in opened:
            if len(opened) >= _OPEN_FILES_PER_THREAD:
                opened.popitem(last=False)
            opened[shard] = _OpenFile(self.paths[shard])
        opened.move_to_end(shard)
        return opened[shard].descriptor


class _OpenFile:
    """A file descriptor that closes when its owner, or the owner's thread, is gone."""

    def __init__(self, path: str):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # bound now: at the interpreter's end the module's names are gone
        if self.descriptor >= 0:
            close(self.descriptor)
