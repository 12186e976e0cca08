"""Source of the samples of shards in any storage format, read through their indexes."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np
import tqdm

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.caption_lengths import CaptionLengths, TokenCounter, digest_of
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.filters import Filter
from lidit_jax.data.formats.shards import Sample, Shards, Unusable
from lidit_jax.data.indexed.index import DEFAULT_OPTIONS, IndexOptions, captions_of, examine
from lidit_jax.data.shared_array import SharedArray
from lidit_jax.data.sources import BrokenExample, Example, Source, decode_to_bucket, no_samples_error, without_image


class IndexedSource(Source):
    """Usable samples of shards that pass the filters. Only their places and sizes are kept in memory.

    Attributes:
      broken: number of samples that could not be used, by reason; a damaged shard, whose readable samples are used,
        counts once.
      dropped: number of samples that filters dropped, by reason.
      num_samples: number of all samples, including those.
      fields: number of samples with each text field, before filtering; counted only if there are filters.
      keys: number of samples with each metadata key, before filtering; counted only if there are filters.
      fingerprint: digest of keys, captions, metadata and the images' places and sizes, but not of their pixels.
    """

    def __init__(
        self,
        shards: Shards,
        filters: Sequence[Filter] = (),
        options: IndexOptions = DEFAULT_OPTIONS,
        first: int = 0,
    ):
        """Examines all shards, and builds the indexes that are missing; see `examine` for the arguments.

        Raises:
          UserError: no sample is left.
        """
        examined = examine(shards, filters, options, first)
        self._shards, self._filters, self._options, self._first = shards, tuple(filters), options, first
        self._digests, self._counts = [shard.digest for shard in examined], [len(shard.places) for shard in examined]
        self.broken = sum((shard.broken for shard in examined), collections.Counter())
        self.dropped = sum((shard.dropped for shard in examined), collections.Counter())
        self.num_samples = sum(shard.num_samples for shard in examined)
        self.fields = sum((shard.fields for shard in examined), collections.Counter())
        self.keys = sum((shard.keys for shard in examined), collections.Counter())
        if not sum(self._counts):
            raise no_samples_error(shards.paths, self.num_samples, self.broken, self.dropped, self.fields, self.keys)
        self._shard = SharedArray(np.repeat(np.arange(len(self._counts), dtype=np.int32), self._counts))
        self._places = SharedArray(np.concatenate([shard.places for shard in examined]))
        self._sizes = SharedArray(np.concatenate([shard.sizes for shard in examined]))
        digest = hashlib.sha256("".join(shard.digest for shard in examined).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._sizes.array)

    def sizes(self) -> np.ndarray:
        return self._sizes.array

    def caption_lengths(self, chooser: CaptionChooser, count_tokens: TokenCounter) -> CaptionLengths:
        """Counts the prompt tokens of every caption, as `Source` does, but once: the counts are stored.

        They lie beside the shards' indexes.
        """
        parts: dict[int, CaptionLengths] = {}
        order = range(self._first, self._first + len(self._counts))
        for shard in tqdm.tqdm(order, desc="counting prompt tokens", unit="shard", disable=None, leave=False):
            shard %= len(self._counts)
            digest = digest_of(self._digests[shard], chooser, count_tokens)
            path = self._options.path(self._shards.paths[shard], f".lengths-{digest}")
            lengths = CaptionLengths.read(path, digest, self._counts[shard])
            if lengths is None:
                captions = captions_of(self._shards, self._filters, self._options, shard)
                lengths = CaptionLengths.count(map(chooser.filled, captions), count_tokens)
                lengths.write(path, digest)
            parts[shard] = lengths
        return CaptionLengths.concatenate([parts[i] for i in range(len(parts))], self._counts)

    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Example | BrokenExample]:
        return [
            sample if isinstance(sample, BrokenExample) else self._with_image(index, sample, bucket)
            for index, sample in zip(indices, self.read_samples(indices), strict=True)
        ]

    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        return [
            sample if isinstance(sample, BrokenExample) else without_image(sample)
            for sample in self.read_samples(indices)
        ]

    def read_samples(self, indices: Sequence[int]) -> list[Sample | BrokenExample]:
        """Reads samples as they are stored, with their images encoded."""
        places = [(int(self._shard.array[i]), *self._places.array[i].tolist()) for i in indices]
        read = self._shards.read(places)
        return [
            BrokenExample(f"{self._shards.paths[shard]}@{start}", str(sample))
            if isinstance(sample, Unusable)
            else sample
            for (shard, start, _), sample in zip(places, read, strict=True)
        ]

    def _with_image(self, index: int, sample: Sample, bucket: Bucket | None) -> Example | BrokenExample:
        size = tuple(self._sizes.array[index].tolist())
        image = decode_to_bucket(sample.key, sample.image.read(), self._options.max_pixels, size, bucket)
        return image if isinstance(image, BrokenExample) else without_image(sample) | {"image": image}
