"""What a source of examples is, for every source there is: the contract that filters and the loader rely on."""

import hashlib
from typing import Any, Protocol

import numpy as np

from lidit_jax.errors import UserError


class Source(Protocol):
    """Random access to captioned pictures. Picklable (grain's workers are processes) and safe to read from threads.

    A source may also have `describe(i)`, which is `self[i]` without "image", for those who need not decode it.

    Attributes:
      fingerprint: short hex digest of what the content is, so that a resumed run can refuse other data.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: height and width of each picture, as `self[i]["image"]` has them, known without decoding."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"key": str, "image": uint8 [H, W, 3], "captions": {field: str}, "metadata": dict}.

        Raises:
          BrokenExample: its data cannot be read; any other example still can.
        """
        ...


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


class SubsetSource:
    """The examples of a source at the given indices, in that order: what filters kept."""

    def __init__(self, source: Source, indices: np.ndarray):
        """Args: indices: int [M], each within 0 to len(source) - 1.

        Raises:
          UserError: there are none.
        """
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        if not len(self._indices):
            raise UserError("a subset of no examples: loosen what selects them")
        digest = hashlib.sha256(source.fingerprint.encode())
        digest.update(self._indices.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._indices)

    def sizes(self) -> np.ndarray:
        return self._source.sizes()[self._indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def describe(self, index: int) -> dict[str, Any]:
        return describe(self._source, int(self._indices[index]))


def describe(source: Source, index: int) -> dict[str, Any]:
    """Key, captions and metadata of an example, without decoding its picture where the source can do that."""
    return source.describe(index) if hasattr(source, "describe") else source[index]
