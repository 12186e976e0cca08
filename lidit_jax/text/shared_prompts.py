"""Which prompts are encoded for a batch of pictures: each device encodes those of its own rows, each of them once.

So no features travel between devices, whatever the number of pictures a prompt; a prompt whose pictures are on two
devices is encoded on both, at the same time.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

NO_PROMPT = -1


@dataclasses.dataclass(frozen=True)
class SharedPrompts:
    """How the rows that the model sees share prompts: R pictures, and with guidance R rows without a prompt after them.

    Attributes:
      pictures: R, at once.
      images_per_prompt: pictures of a prompt, one after the other.
      is_guided: whether there are rows without a prompt.
      shards: parts of equal size that the rows are cut into.
    """

    pictures: int
    images_per_prompt: int
    is_guided: bool
    shards: int

    @property
    def encoded(self) -> int:
        """Prompts to encode at once on all devices, the same for every batch: one shape, one compilation."""
        return self.shards * self._encoded_per_shard

    def batch(self, prompts: Sequence[str], start: int) -> tuple[list[str], np.ndarray]:
        """Of the batch that begins with picture `start`.

        Returns:
          Prompts to encode [shards x E], where a place is left over the empty one; and for each row, at which of its
          shard's E encoded prompts it finds its own, int32 [R or 2R].
        """
        chosen, places = [], []
        for rows in self._numbers(start):
            numbers, of_rows = np.unique(rows, return_inverse=True)
            padding = [NO_PROMPT] * (self._encoded_per_shard - len(numbers))
            chosen += [prompts[i] if 0 <= i < len(prompts) else "" for i in [*numbers, *padding]]
            places.append(of_rows)
        return chosen, np.concatenate(places).astype(np.int32)

    def _numbers(self, start: int) -> np.ndarray:
        """Of each row's prompt, int [shards, rows a shard]."""
        numbers = np.arange(start, start + self.pictures) // self.images_per_prompt
        if self.is_guided:  # conditional rows first, as `samplers.guided` wants them
            numbers = np.concatenate([numbers, np.full(self.pictures, NO_PROMPT)])
        return numbers.reshape(self.shards, -1)

    @functools.cached_property
    def _encoded_per_shard(self) -> int:
        """E: the most that any batch needs; after these, batches cut their prompts as before."""
        starts = range(0, math.lcm(self.pictures, self.images_per_prompt), self.pictures)
        return max(len(np.unique(rows)) for start in starts for rows in self._numbers(start))
