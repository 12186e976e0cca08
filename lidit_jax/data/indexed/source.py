"""Source of the samples of shards in any storage format, read through their indexes."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.formats.shards import Sample, Shards, Unusable
from lidit_jax.data.indexed.index import MAX_PIXELS, Examined
from lidit_jax.data.indexed.shared_array import SharedArray
from lidit_jax.data.sources import BrokenExample, Example, Source, described, nothing_left, read_picture


class IndexedSource(Source):
    """Usable samples of shards that pass the filters. Only their places and sizes are kept in memory.

    Attributes:
      broken: number of samples that could not be used, by reason; a damaged shard, whose readable samples are used,
        counts once.
      dropped: number of samples that filters dropped, by reason.
      looked_at: number of all samples, including those.
      fields: number of samples with each caption field, before filtering; counted only if there are filters.
      keys: number of samples with each metadata key, before filtering; counted only if there are filters.
      fingerprint: digest of keys, captions, metadata and the images' places and sizes, but not of their pixels.
    """

    def __init__(
        self,
        shards: Shards,
        examined: Sequence[Examined],
        max_pixels: int = MAX_PIXELS,
    ):
        """Collects the samples of all shards.

        Args:
          shards: the shards.
          examined: the results of `examine`, one per shard.
          max_pixels: larger images are broken.

        Raises:
          UserError: no sample is left.
        """
        self._shards, self._max_pixels = shards, max_pixels
        self.broken = sum((one.broken for one in examined), collections.Counter())
        self.dropped = sum((one.dropped for one in examined), collections.Counter())
        self.looked_at = sum(one.looked_at for one in examined)
        self.fields = sum((one.fields for one in examined), collections.Counter())
        self.keys = sum((one.keys for one in examined), collections.Counter())
        counts = [len(one.places) for one in examined]
        if not sum(counts):
            raise nothing_left(shards.paths, self.looked_at, self.broken, self.dropped, self.fields, self.keys)
        self._shard = SharedArray(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
        self._places = SharedArray(np.concatenate([one.places for one in examined]))
        self._sizes = SharedArray(np.concatenate([one.sizes for one in examined]))
        digest = hashlib.sha256("".join(one.digest for one in examined).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._sizes.array)

    def sizes(self) -> np.ndarray:
        return self._sizes.array

    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Example | BrokenExample]:
        return [
            sample if isinstance(sample, BrokenExample) else self._with_picture(index, sample, bucket)
            for index, sample in zip(indices, self._read(indices), strict=True)
        ]

    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        return [sample if isinstance(sample, BrokenExample) else described(sample) for sample in self._read(indices)]

    def _read(self, indices: Sequence[int]) -> list[Sample | BrokenExample]:
        places = [(int(self._shard.array[i]), *self._places.array[i].tolist()) for i in indices]
        read = self._shards.read(places)
        return [
            BrokenExample(f"{self._shards.paths[shard]}@{start}", str(sample))
            if isinstance(sample, Unusable)
            else sample
            for (shard, start, _), sample in zip(places, read, strict=True)
        ]

    def _with_picture(self, index: int, sample: Sample, bucket: Bucket | None) -> Example | BrokenExample:
        size = tuple(self._sizes.array[index].tolist())
        image = read_picture(sample.key, sample.picture.read(), self._max_pixels, size, bucket)
        return image if isinstance(image, BrokenExample) else described(sample) | {"image": image}
