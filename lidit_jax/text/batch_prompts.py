"""Selects the prompts to encode for a batch of images: each device encodes the prompts of its own rows, once each.

No features are then sent between devices, for any number of images per prompt. A prompt whose images are on two devices
is encoded on both, in parallel.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

NO_PROMPT = -1


@dataclasses.dataclass(frozen=True)
class SharedPrompts:
    """Assigns prompts to the rows of the model's batch: R images and, with guidance, R unconditional rows after them.

    Attributes:
      num_images: R, the number of images in a batch.
      images_per_prompt: consecutive images with the same prompt.
      is_guided: True if the batch has unconditional rows.
      shards: number of equal shards of the rows.
    """

    num_images: int
    images_per_prompt: int
    is_guided: bool
    shards: int

    @property
    def encoded(self) -> int:
        """Number of prompts to encode per batch on all devices, the same for every batch: one compilation."""
        return self.shards * self._encoded_per_shard

    def batch(self, prompts: Sequence[str], start: int, negative_prompt: str = "") -> tuple[list[str], np.ndarray]:
        """Selects the prompts of a batch.

        Args:
          prompts: all prompts of the run.
          start: index of the batch's first image.
          negative_prompt: prompt of the unconditional rows, and of the padding.

        Returns:
          The prompts to encode, [shards x E], padded with the negative prompt; and for each row the index of its prompt
          among the E encoded prompts of its shard, int32 [R or 2R].
        """
        to_encode, indices = [], []
        for rows in self._prompt_of_row(start):
            distinct, index_of_row = np.unique(rows, return_inverse=True)
            padding = [NO_PROMPT] * (self._encoded_per_shard - len(distinct))
            to_encode += [prompts[i] if 0 <= i < len(prompts) else negative_prompt for i in [*distinct, *padding]]
            indices.append(index_of_row)
        return to_encode, np.concatenate(indices).astype(np.int32)

    def _prompt_of_row(self, start: int) -> np.ndarray:
        """Returns the index of each row's prompt, int [shards, rows per shard]; `NO_PROMPT` in unconditional rows."""
        prompts = np.arange(start, start + self.num_images) // self.images_per_prompt
        if self.is_guided:  # conditional rows first, as in `samplers.guided`
            prompts = np.concatenate([prompts, np.full(self.num_images, NO_PROMPT)])
        return prompts.reshape(self.shards, -1)

    @functools.cached_property
    def _encoded_per_shard(self) -> int:
        """E, the largest number of distinct prompts in any shard of any batch; the pattern repeats after the lcm."""
        starts = range(0, math.lcm(self.num_images, self.images_per_prompt), self.num_images)
        return max(len(np.unique(rows)) for start in starts for rows in self._prompt_of_row(start))
