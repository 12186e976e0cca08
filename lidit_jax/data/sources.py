"""What a source of examples is, for every source there is: the contract that the loader relies on."""

import abc
import collections
import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from lidit_jax.data.buckets import Bucket, resize_to_cover_and_crop
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.shards import Sample
from lidit_jax.errors import UserError

Example = dict[str, Any]


class BrokenExample(Exception):
    """An example that was found unreadable only when read. The loader puts another one in its place and counts it.

    Attributes:
      key: the example's key.
      reason: a few words, the same for all examples that broke in the same way.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"example {self.key!r}: {self.reason}"


def described(sample: Sample) -> Example:
    """All of a sample but its picture."""
    return {"key": sample.key, "captions": sample.captions, "metadata": sample.metadata}


def read_picture(
    key: str, data: bytes, max_pixels: int, size: tuple[int, int], bucket: Bucket | None
) -> np.ndarray | BrokenExample:
    """An encoded picture -> uint8 [H, W, 3].

    Args:
      key: its example's.
      size: height and width that it must have; another one means that the file was changed.
      bucket: fit it to that; None: as it is.
    """
    try:
        image = decoding.decode(data, max_pixels, bucket, size)
    except decoding.BrokenPicture as error:
        return BrokenExample(key, str(error))
    return resize_to_cover_and_crop(image, bucket) if bucket else image


def nothing_left(
    paths: Sequence[str],
    looked_at: int,
    broken: collections.Counter[str],
    dropped: collections.Counter[str],
    fields: Collection[str],
    keys: Collection[str],
) -> UserError:
    """Why no sample of some files can be trained on.

    Args:
      broken, dropped: how many, by reason.
      fields, keys: the caption fields and the metadata that the samples have.
    """
    reasons = ", ".join(f"{reason}: {count}" for reason, count in (broken + dropped).most_common())
    place = f"{paths[0]!r}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if not dropped:
        return UserError(
            f"no usable sample in {place} ({reasons or 'it is empty'}): each needs a picture and its caption"
        )
    names = lambda found: ", ".join(sorted(found)[:20]) or "(none)"  # noqa: E731
    return UserError(
        f"the filters leave none of the {looked_at} samples of {place} ({reasons}; there are captions {names(fields)}; "
        f"metadata {names(keys)}): loosen them"
    )


class Source(abc.ABC):
    """Random access to captioned pictures. Picklable (grain's workers are processes) and safe to read from threads.

    Attributes:
      content: what an example holds, "image" or "moments" (of latents; see `precomputed.py`).
      fingerprint: short text that says what the content is, so that a resumed run can refuse other data.
    """

    content = "image"
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: height and width of each picture, as `self[i]["image"]` has them, known without decoding."""

    @abc.abstractmethod
    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Example | BrokenExample]:
        """Examples, read together: {"key": str, "image": uint8 [H, W, 3], "captions": {field: str}, "metadata": dict}.

        Args:
          bucket: fit the pictures to it; None: as they are. (Some pictures need not be decoded in full to be fitted.)

        Returns:
          One for each index; a `BrokenExample` where its data cannot be read.
        """

    @abc.abstractmethod
    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        """As `load`, but without "image"."""

    def __getitem__(self, index: int) -> Example:
        """One example; its picture as it is. Raises BrokenExample."""
        [example] = self.load([index])
        if isinstance(example, BrokenExample):
            raise example
        return example


class ConcatenatedSource(Source):
    """Several sources, one after the other; an example says which of them it is from ("source": int).

    Attributes:
      source_of_example: int32 [N], which of them each example is from.
    """

    def __init__(self, sources: Sequence[Source]):
        if not sources:
            raise UserError("a mixture of no sources: name one")
        if len({source.content for source in sources}) > 1:
            raise UserError("a mixture of pictures and latents: precompute all of its sources, or none")
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
        return self._each(indices, lambda source, within: source.load(within, bucket))

    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        return self._each(indices, lambda source, within: source.describe(within))

    def _each(self, indices: Sequence[int], read) -> list[Example | BrokenExample]:
        """Asks each source once, for all of its examples."""
        indices = np.asarray(indices, np.int64)
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        examples: list[Any] = [None] * len(indices)
        for number in np.unique(numbers).tolist():
            [rows] = np.nonzero(numbers == number)
            found = read(self._sources[number], (indices[rows] - self._starts[number]).tolist())
            for row, example in zip(rows.tolist(), found, strict=True):
                examples[row] = example if isinstance(example, BrokenExample) else example | {"source": number}
        return examples
