"""Finds what is in a folder of images: captions files, texts beside the images, or one folder per class."""

import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from lidit_jax.data.formats.caption_tables import columns_of, file_column, is_table, missing_column
from lidit_jax.errors import UserError
from lidit_jax.files import is_hidden, walk

logger = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
# Files beside an image, by its name: KEY.txt and KEY.json as img2dataset writes them, KEY.caption as kohya does.
TEXTS = (".json", ".caption", ".txt")
_TABLE_NAMES = ("metadata", "captions")
# Folders with these names, also with a number (val2017, test_1), are splits of the data, never classes.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "data")
_NAMES_LOOKED_UP = 100  # to find the folder that a captions file's names are relative to


class ImageFile(NamedTuple):
    """An image in a folder.

    Attributes:
      name: its path, relative to the folder.
      class_name: name of its class folder; "" if it is in none.
      texts: suffixes of its files of `TEXTS`, as they are spelt.
    """

    name: str
    class_name: str
    texts: tuple[str, ...]


def find_tables(folder: str, split: str, levels: int = 2) -> list[str]:
    """Returns the captions file of a folder, or the captions files of the folders in it; none if it has none.

    Args:
      folder: path of the folder.
      split: split to read, where folders or files are named after splits.
      levels: how far below to look.

    Raises:
      UserError: it is unclear which file has the captions, or there is no such split.
    """
    found = _tables_in(folder, split)
    if found or not levels:
        return found
    below = {
        name: find_tables(os.path.join(folder, name), split, levels - 1 if _is_neutral(name) else 0)
        for name in of_split(folder, _folders_in(folder), split)
    }
    tables = [table for found in below.values() for table in found]
    without = [name for name, found in below.items() if not found]
    if tables and without:
        logger.info("%s: left out %s, which have no captions file", folder, ", ".join(without[:10]))
    return tables


def _folders_in(folder: str) -> list[str]:
    return [
        name for name in sorted(os.listdir(folder)) if os.path.isdir(os.path.join(folder, name)) and not is_hidden(name)
    ]


def _is_neutral(name: str) -> bool:
    """Returns True if the name of a folder says nothing about its images, such as "train" and "images"."""
    return split_of(name) is not None or name.lower() in _IMAGE_FOLDERS


def _tables_in(folder: str, split: str) -> list[str]:
    """Returns the captions file directly in a folder, in a list of at most one."""
    names = [name for name in sorted(os.listdir(folder)) if is_table(name) and not is_hidden(name)]
    names = [name for name in names if file_column(columns_of(os.path.join(folder, name)))]
    called = [name for name in names if os.path.splitext(name)[0].lower() in _TABLE_NAMES]
    if not called and len(names) > 1:
        names = [name for name in names if split_of(os.path.splitext(name)[0]) == split_of(split)] or names
    chosen = called or names
    if len(chosen) > 1:
        raise UserError(f"{folder!r} has several captions files ({', '.join(chosen[:5])}): name one as data.path")
    return [os.path.join(folder, name) for name in chosen]


def of_split(folder: str, names: Sequence[str], split: str) -> list[str]:
    """Returns the folders to read: all of them or, if some are named after splits, those of the split.

    Raises:
      UserError: all folders are other splits.
    """
    splits = [name for name in names if split_of(name)]
    chosen = [name for name in splits if name == split]
    chosen = chosen or [name for name in splits if split_of(name) == split_of(split)]
    others = [name for name in names if name not in splits]
    if splits and not chosen and not others:
        raise UserError(
            f"{folder!r} has the splits {', '.join(splits)}, none of which is {split!r}: name one with "
            f"--config.data.split={splits[0]}"
        )
    if left_out := [name for name in names if name not in (chosen or others)]:
        logger.info("%s: left out %s (data.split=%r)", folder, ", ".join(left_out[:10]), split)
    return chosen or others


def split_of(name: str) -> str | None:
    """Returns the split that a name stands for, "train", "validation" or "test"; None for other names."""
    return _SPLITS.get(re.sub(r"[-_]?[0-9]*$", "", name.lower()))


def find_images(folder: str, split: str) -> list[ImageFile]:
    """Lists the images of a folder at any depth, in the order of their names.

    Texts beside images are their captions. Only if no image has one are the folders taken for classes.

    Raises:
      UserError: there is no image or no such split, or the only captions are in a file that does not name the images.
    """
    images: list[ImageFile] = []
    for directory, folders, names in walk(folder):
        folders[:] = of_split(directory, folders, split)
        relative = os.path.relpath(directory, folder)
        parts = [] if relative == os.curdir else relative.split(os.sep)
        class_name = next((part for part in parts if not _is_neutral(part)), "")
        texts_of = _texts_by_stem(names)
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGES:
                texts = texts_of.get(stem, ())
                images.append(ImageFile(os.path.normpath(os.path.join(relative, name)), class_name, texts))
    if not any(image.class_name or image.texts for image in images):
        _check_tables(folder)
    if not images:
        raise UserError(
            f"{folder!r} has neither a captions file (.jsonl, .csv or .parquet) nor images with their texts (KEY.txt) "
            "or in folders named after their class: add one of them"
        )
    if any(image.texts for image in images):
        return [image._replace(class_name="") for image in images]
    return images


def _texts_by_stem(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the suffixes of the texts among the files of a folder, in the order of `TEXTS`, by the files' stems."""
    found: dict[str, dict[str, str]] = {}  # {stem: {suffix in lower case: suffix}}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in TEXTS:
            found.setdefault(stem, {}).setdefault(suffix.lower(), suffix)
    return {stem: tuple(texts[suffix] for suffix in TEXTS if suffix in texts) for stem, texts in found.items()}


def unread_tables(folder: str) -> list[str]:
    """Returns the files of a folder that may have the captions of its images, but cannot be read for them.

    These are JSON files, also in a folder "annotations" (as COCO's), and tables that are damaged or without a column
    that names the images.
    """
    return [
        os.path.join(below, name)
        for below in ("", *(name for name in _folders_in(folder) if name.lower() == "annotations"))
        for name in sorted(os.listdir(os.path.join(folder, below)))
        if not is_hidden(name)
        if name.lower().endswith(".json") or is_table(name) and os.path.getsize(os.path.join(folder, below, name))
    ]


def _check_tables(folder: str) -> None:
    """Raises UserError if a folder has a captions file without a column that names the images."""
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if is_table(name) and not is_hidden(name) and (columns := columns_of(path)):
            raise missing_column(path, columns)


def images_folder(table: str, names: Sequence[str]) -> str:
    """Returns the folder that a captions file's image names are relative to: its own, or one beside it.

    Args:
      table: path of the captions file.
      names: the first image names in it.
    """
    own = os.path.dirname(os.path.abspath(table))
    beside = sorted(_folders_in(own), key=lambda name: name.lower() not in _IMAGE_FOLDERS)
    folders = [own, *(os.path.join(own, name) for name in beside)]
    names = names[:_NAMES_LOOKED_UP]

    def found(folder: str) -> int:
        return sum(locate(folder, name) is not None for name in names)

    if found(own) == len(names):
        return own
    return max(folders, key=found)


def locate(folder: str, name: str) -> str | None:
    """Returns the path of an image that a captions file names; None if there is no such file.

    Backslashes may separate folders, and a name may lack its suffix.
    """
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        path = os.path.join(folder, spelling)
        for suffix in ("", *IMAGES):
            if os.path.isfile(path + suffix):
                return path + suffix
    return None


def is_inside(folder: str, name: str) -> bool:
    """Returns True if a name, relative to the folder or absolute, is of a file inside the folder.

    Links are judged by their own path, not by that of their target.
    """
    for spelling in (name, name.replace("\\", "/")):
        path = os.path.normpath(os.path.join(folder, spelling))
        folders = (os.path.abspath(folder), os.path.realpath(folder))
        if not any(path.startswith(inside.rstrip(os.sep) + os.sep) for inside in folders):
            return False
    return True
