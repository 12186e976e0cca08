"""Source of LLaVA's data: a JSON list of conversations, each about an image of a folder."""

import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np
import tqdm
from etils import epath
from PIL import Image

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.files import is_remote
from lidit_jax.data.formats.folder_layout import is_inside
from lidit_jax.data.indexed.index import DEFAULT_OPTIONS
from lidit_jax.data.sources import BrokenExample, Example, Source
from lidit_jax.errors import UserError
from lidit_jax.text.conversations import parse_record, to_text

FIELD = "conversation"
MAX_FILE = 4 << 30  # bytes of a JSON file; LLaVA-1.5's has 1 GB


class ConversationSource(Source):
    """Conversations about images, which are padded to squares as LLaVA-1.5 pads them. All texts are kept in memory."""

    def __init__(self, file: str, images: str, side: int, pad_color: tuple[int, int, int]):
        """Reads and checks all records, and that their images exist.

        Args:
          file: JSON file with a list of {id, image, conversations}.
          images: folder that the records' images are relative to; "" is the folder of the file.
          side: height and width of the images in a batch, in pixels.
          pad_color: red, green and blue beside an image that is not a square.

        Raises:
          UserError: the file is missing, too large or not such a list; `parse_record` rejects a record; or an image is
            missing or outside the folder.
        """
        path = epath.Path(file)
        folder = str(images or path.parent)
        self._folder = folder if is_remote(folder) else os.path.abspath(folder)
        self._side, self._pad_color = side, pad_color
        records = _read_records(path)
        self._images, self._texts = [], []
        for number, record in enumerate(records):
            image, turns = parse_record(record, f"{file}, record {_name(record, number)}")
            if not _is_inside(self._folder, image):
                raise UserError(
                    f"{file}, record {_name(record, number)}: image {image!r:.200} is outside {self._folder}"
                )
            self._images.append(image)
            self._texts.append(to_text(turns))
        self._check_images(file, records)
        digest = hashlib.sha256("\0".join([*self._images, *self._texts]).encode("utf-8", "surrogatepass"))
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._images)

    def sizes(self) -> np.ndarray:
        return np.full((len(self), 2), self._side, np.int32)  # after padding

    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Example | BrokenExample]:
        del bucket  # all images are squares of one size
        return [self._with_image(index) for index in indices]

    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        return [
            {"key": self._images[index], "captions": {FIELD: self._texts[index]}, "metadata": {}} for index in indices
        ]

    def texts(self) -> list[str]:
        """Returns all conversations, as `to_text` returns them."""
        return self._texts

    def name(self, index: int) -> str:
        """Returns text that identifies a record, for error messages."""
        return f"the conversation about {self._images[index]} (record {index})"

    def _with_image(self, index: int) -> Example | BrokenExample:
        file = epath.Path(self._folder) / self._images[index]
        try:
            image = decoding.decode(file.read_bytes(), DEFAULT_OPTIONS.max_pixels)
            if max(image.shape) ** 2 > DEFAULT_OPTIONS.max_pixels:
                raise decoding.BrokenImage("as a square it has too many pixels")
        except (decoding.BrokenImage, OSError) as error:
            return BrokenExample(str(file), str(error) if isinstance(error, decoding.BrokenImage) else "unreadable")
        [example] = self.describe([index])
        assert not isinstance(example, BrokenExample)
        return example | {"image": pad_and_resize(image, self._side, self._pad_color)}

    def _check_images(self, file: str, records: Sequence[object]) -> None:
        """Raises UserError for the first image that is missing. Lists each folder once, which buckets do fast."""
        present: dict[str, set[str]] = {}
        for number, image in enumerate(tqdm.tqdm(self._images, desc="looking for images", disable=None, leave=False)):
            folder, name = os.path.split(os.path.normpath(image))
            if folder not in present:
                place = epath.Path(self._folder) / folder
                present[folder] = {path.name for path in place.iterdir()} if place.is_dir() else set()
            if name not in present[folder]:
                raise UserError(
                    f"{file}, record {_name(records[number], number)}: image {image!r:.200} is missing in "
                    f"{self._folder}: give the folder that images are relative to as data_dir"
                )


def _is_inside(folder: str, name: str) -> bool:
    """Returns True if an image's name leads into the folder."""
    if not is_remote(folder):
        return is_inside(folder, name)
    return not name.startswith("/") and "://" not in name and ".." not in name.split("/")


def pad_and_resize(image: np.ndarray, side: int, color: tuple[int, int, int]) -> np.ndarray:
    """Pads an image to a square, its centre in the middle, and resizes it with a bicubic filter.

    Args:
      image: uint8 [H, W, 3].
      side: height and width of the result.
      color: red, green and blue of the padding.

    Returns:
      uint8 [side, side, 3].
    """
    height, width, _ = image.shape
    if height != width:
        longest = max(height, width)
        padded = np.empty((longest, longest, 3), np.uint8)
        padded[:] = color
        top, left = (longest - height) // 2, (longest - width) // 2
        padded[top : top + height, left : left + width] = image
        image = padded
    if image.shape[0] == side:
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def _read_records(path: epath.Path) -> list[object]:
    try:
        size = path.stat().length
        if size > MAX_FILE:
            raise UserError(f"{path} has {size >> 30} GiB: at most {MAX_FILE >> 30} are read; split it")
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as a JSON list ({' '.join(str(error).split())[:200]}): use LLaVA's form, one list "
            "of {id, image, conversations}"
        ) from error
    if not isinstance(records, list) or not records:
        raise UserError(
            f"{path} is not a list of conversations: use LLaVA's form, a list of {{id, image, conversations}}"
        )
    return records


def _name(record: object, number: int) -> str:
    """Returns the id of a record, or its number if it has none."""
    found = record.get("id") if isinstance(record, dict) else None
    return repr(found)[:80] if isinstance(found, str | int) else str(number)
