"""What a source of examples is, for every source there is: the contract that the loader relies on."""

import abc
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lidit_jax.data.buckets import Bucket
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
