"""Folders of images with captions files, with a text beside each image, or with one folder per class."""

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lidit_jax.data.formats.caption_tables import read_table
from lidit_jax.data.formats.files import is_remote, modification_time
from lidit_jax.data.formats.folder_layout import (
    ImageFile,
    find_images,
    find_tables,
    images_folder,
    is_inside,
    locate,
    unread_tables,
)
from lidit_jax.data.formats.shards import (
    CLASS_FIELD,
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
    scan_numbered,
    with_class_name,
)
from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

_ROWS_LOOKED_AT = 100
# Text with the name of an image's folder where it is no class: a caption only if `data.captions` names it.
_FOLDER_FIELD = "folder"


class FolderShards:
    """One shard per captions file, or a single one of the images themselves; see `Shards`.

    A row of a captions file names its image in the column "file_name", relative to the folder of the captions file or
    to a folder beside it. Its texts and lists of texts may be captions, and all its values are metadata. Without a
    captions file, the captions are the files KEY.txt, KEY.caption and KEY.json beside the images or, if no image has
    one, the names of the folders. All rows are kept in memory.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        class_names: Sequence[str] = (),
        split: str = "train",
        are_classes: bool = False,
    ):
        """Reads the captions files or lists the images.

        Args:
          path: a captions file; or a folder that has one (if it has several, one must be called "metadata" or
            "captions"); or a folder of such folders; or a folder of images.
          class_names: names of the classes that rows give as numbers.
          split: split to read of a folder of folders that are called train, validation and test.
          are_classes: folders without texts are classes, whatever else is there.

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
        tables = find_tables(path, split) if os.path.isdir(path) else [path]
        self._parts: list[_Table] | list[_Images]
        if tables:
            self._parts, self.paths = [_Table(table) for table in tables], tuple(tables)
            logger.info("captions from %s", ", ".join(tables[:10]))
        else:
            images = _Images(path, find_images(path, split), are_classes)
            self._parts, self.paths = [images], (images.path,)
            self.settings += images.digest()  # no captions file whose modification time would change

    def size(self, shard: int) -> int:
        return len(self._parts[shard])

    def scan(self, shard: int) -> Iterator[tuple[Place, Sample] | str]:
        return scan_numbered(shard, len(self._parts[shard]), self.read)

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        return [self._sample(shard, number) for shard, number, _ in places]

    def _sample(self, shard: int, number: int) -> Sample | Unusable:
        part = self._parts[shard]
        try:
            if number >= len(part):
                raise Unusable("changed since it was indexed")
            name, values, metadata = part.read(number)
            values = with_class_name(values, self._class_names)
            texts = [text for text in values.values() if isinstance(text, str)]
            if any("\udc80" <= character <= "\udcff" for text in texts for character in text):
                raise Unusable("caption not in UTF-8")
            captions = captions_of(values)
            check_text(max(map(len, captions.values()), default=0))
            image = _read_image(part.folder, name)  # so the name is that of a file
            return Sample(printable(name), captions, metadata, image)
        except Unusable as reason:
            return reason


class _Table:
    """The rows of a captions file, with the folder that their images are in."""

    def __init__(self, path: str):
        self._table = read_table(path)
        self.folder = images_folder(path, self._first_names())

    def __len__(self) -> int:
        return len(self._table.rows)

    def read(self, number: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Returns the image's name, the values that hold its texts, and the metadata."""
        name, values = self._table.row(number)
        return name, values, values

    def _first_names(self) -> list[str]:
        names = []
        for number in range(min(len(self), _ROWS_LOOKED_AT)):
            try:
                names.append(self._table.row(number)[0])
            except Unusable:
                continue
        return names


class _Images:
    """The images of a folder, with their texts or classes."""

    def __init__(self, folder: str, images: Sequence[ImageFile], are_classes: bool):
        self.folder, self._images = folder, tuple(images)
        self._have_texts = any(image.texts for image in images)
        self.path = os.path.join(folder, "texts" if self._have_texts else "classes")
        self._field = CLASS_FIELD
        classes = {image.class_name for image in images} - {""}
        if self._have_texts:
            source = "the texts beside the images"
        elif classes and are_classes:
            source = f"the names of {len(classes)} class folders"
        elif unread := unread_tables(folder):
            self._field = _FOLDER_FIELD
            source = (
                f"none: if {', '.join(unread[:5])} has them, write them as .jsonl or .csv with a column 'file_name'"
            )
        elif len(classes) == 1:
            self._field = _FOLDER_FIELD
            source = f"none: the only folder, {min(classes)!r}, is not taken for a class"
        else:
            source = f"the names of {len(classes)} class folders" if classes else "none"
        logger.info("%s: captions from %s", folder, source)

    def __len__(self) -> int:
        return len(self._images)

    def digest(self) -> str:
        """Returns a digest of the images' names and classes, and of the times at which their texts were written."""
        digest = hashlib.sha256()
        for image in self._images:
            written = [modification_time(self._text_file(image, suffix)) for suffix in image.texts]
            digest.update(repr((self._field, *image, written)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def read(self, number: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Returns the image's name, the values that hold its texts, and the metadata."""
        image = self._images[number]
        values: dict[str, Any] = {self._field: image.class_name} if image.class_name else {}
        metadata: dict[str, Any] = {}
        for suffix in image.texts:
            text = _read_text(self._text_file(image, suffix))
            if suffix.lower() == ".json":
                metadata = parse_json(text)
                values |= metadata
            else:
                values[suffix.removeprefix(".").lower()] = decode_text(text)
        return image.name, values, metadata

    def _text_file(self, image: ImageFile, suffix: str) -> str:
        return os.path.join(self.folder, os.path.splitext(image.name)[0] + suffix)


def _read_text(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            encoded = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise Unusable("unreadable text") from error
    check_text(len(encoded))
    return encoded


def _read_image(folder: str, name: str) -> io.BytesIO:
    if not is_inside(folder, name):
        raise Unusable("file outside the folder")
    try:
        path = locate(folder, name)
        if path is None:
            raise Unusable("no image")
        check_image(os.path.getsize(path))
        with open(path, "rb") as file:
            return io.BytesIO(file.read())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unusable("no image") from error
