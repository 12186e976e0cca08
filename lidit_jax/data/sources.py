"""Interface of all sources of examples, on which the loaders rely."""

import abc
import collections
import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tqdm

from lidit_jax.data.buckets import Bucket, resize_to_cover_and_crop
from lidit_jax.data.caption_lengths import CaptionLengths, TokenCounter
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.filters import NO_CAPTION
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.shards import Sample
from lidit_jax.errors import UserError

Example = dict[str, Any]
_COUNTED_AT_ONCE = 1024  # examples that are described at once to count their tokens


class BrokenExample(Exception):
    """An example that turned out to be unreadable when it was read; the loader counts it and uses another one.

    Attributes:
      key: the example's key.
      reason: the cause in a few words, equal for all examples with the same cause.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"example {self.key!r}: {self.reason}"


def without_image(sample: Sample) -> Example:
    """Returns the example of a sample without its image."""
    return {"key": sample.key, "captions": sample.captions, "metadata": sample.metadata}


def decode_to_bucket(
    key: str, data: bytes, max_pixels: int, size: tuple[int, int], bucket: Bucket | None
) -> np.ndarray | BrokenExample:
    """Decodes an image and resizes it to its bucket.

    Args:
      key: key of the example.
      data: the encoded image.
      max_pixels: larger images are broken.
      size: expected height and width; a different size means that the file was changed.
      bucket: bucket to resize to; None: keep the size.

    Returns:
      uint8 [H, W, 3], or a `BrokenExample`.
    """
    try:
        image = decoding.decode(data, max_pixels, bucket, size)
    except decoding.BrokenImage as error:
        return BrokenExample(key, str(error))
    return resize_to_cover_and_crop(image, bucket) if bucket else image


def no_samples_error(
    paths: Sequence[str],
    num_samples: int,
    broken: collections.Counter[str],
    dropped: collections.Counter[str],
    fields: Collection[str],
    keys: Collection[str],
) -> UserError:
    """Returns the error to raise if no sample of some files can be trained on.

    Args:
      paths: the files.
      num_samples: number of samples in them.
      broken: number of samples that cannot be used, by reason.
      dropped: number of samples that filters dropped, by reason.
      fields: text fields that the samples have.
      keys: metadata keys that the samples have.
    """
    reasons = ", ".join(f"{reason}: {count}" for reason, count in (broken + dropped).most_common())
    place = f"{paths[0]!r}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if not dropped:
        return UserError(
            f"no usable sample in {place} ({reasons or 'it is empty'}): each needs an image and its caption"
        )
    texts, metadata = (", ".join(sorted(names)[:20]) or "(none)" for names in (fields, keys))
    found = f"there are texts {texts}; metadata {metadata}"
    if set(dropped) == {NO_CAPTION}:
        return UserError(
            f"none of the {num_samples} samples of {place} has a caption ({reasons}; {found}): name the texts that are "
            "captions with --config.data.captions.NAME=1, or add captions"
        )
    return UserError(
        f"the filters leave none of the {num_samples} samples of {place} ({reasons}; {found}): loosen them"
    )


class Source(abc.ABC):
    """Random access to captioned images. Picklable (grain's workers are processes) and safe to read from threads.

    Attributes:
      content: key of the image data in an example, "image" or, for latents, "moments" (see `precomputed.py`).
      fingerprint: short text that identifies the content, so that a run cannot resume with other data.
    """

    content = "image"
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def sizes(self) -> np.ndarray:
        """Returns the height and width of every image in pixels, int32 [N, 2], without decoding any."""

    @abc.abstractmethod
    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Example | BrokenExample]:
        """Reads several examples at once.

        Args:
          indices: indices of the examples.
          bucket: bucket to resize the images to; None: keep their size. (Passing it here allows decoding a large JPEG
            at reduced size.)

        Returns:
          For each index, {"key": str, "image": uint8 [H, W, 3], "captions": {field: str}, "metadata": dict}, or a
          `BrokenExample` if its data cannot be read.
        """

    @abc.abstractmethod
    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        """Reads examples as `load` does, but without their images."""

    def caption_lengths(self, chooser: CaptionChooser, count_tokens: TokenCounter) -> CaptionLengths:
        """Counts the prompt tokens of every caption; shows progress on a terminal.

        Args:
          chooser: tells which texts are captions, and has their templates.
          count_tokens: counts the tokens of prompts.
        """
        chunks = range(0, len(self), _COUNTED_AT_ONCE)
        progress = tqdm.tqdm(chunks, desc="counting prompt tokens", unit_scale=_COUNTED_AT_ONCE, disable=None)
        captions = (
            {} if isinstance(example, BrokenExample) else chooser.filled(example["captions"])
            for start in progress
            for example in self.describe(range(start, min(start + _COUNTED_AT_ONCE, len(self))))
        )
        return CaptionLengths.count(captions, count_tokens)

    def __getitem__(self, index: int) -> Example:
        """Reads one example, with its image in its own size.

        Raises:
          BrokenExample: its data cannot be read.
        """
        [example] = self.load([index])
        if isinstance(example, BrokenExample):
            raise example
        return example


class ConcatenatedSource(Source):
    """Concatenation of several sources; each example holds the index of its source as "source".

    Attributes:
      source_of_example: int32 [N], index of the source of each example.
    """

    def __init__(self, sources: Sequence[Source]):
        if not sources:
            raise UserError("the mixture has no sources: name at least one")
        if len({source.content for source in sources}) > 1:
            raise UserError("the mixture has images and latents: precompute all of its sources, or none")
        self._sources, self.content = tuple(sources), sources[0].content
        lengths = [len(source) for source in sources]
        self._starts = np.cumsum([0, *lengths])  # [sources + 1]
        digest = hashlib.sha256("".join(source.fingerprint for source in sources).encode())
        self.fingerprint = digest.hexdigest()[:16]
        self.source_of_example = np.repeat(np.arange(len(sources), dtype=np.int32), lengths)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sizes(self) -> np.ndarray:
        return np.concatenate([source.sizes() for source in self._sources])

    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Example | BrokenExample]:
        return self._load_by_source(indices, lambda source, within: source.load(within, bucket))

    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        return self._load_by_source(indices, lambda source, within: source.describe(within))

    def _load_by_source(self, indices: Sequence[int], read) -> list[Example | BrokenExample]:
        """Calls `read(source, indices)` once per source, and returns the examples in the order of `indices`."""
        indices = np.asarray(indices, np.int64)
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        examples: list[Any] = [None] * len(indices)
        for number in np.unique(numbers).tolist():
            [rows] = np.nonzero(numbers == number)
            found = read(self._sources[number], (indices[rows] - self._starts[number]).tolist())
            for row, example in zip(rows.tolist(), found, strict=True):
                examples[row] = example if isinstance(example, BrokenExample) else example | {"source": number}
        return examples
