"""Data sets whose shards are read from end to end, without an index.

The facts that an index would provide are estimated from the first samples of some shards: the share of each bucket,
which determines the order of the buckets, and what is broken or dropped.
"""

import collections
import dataclasses
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from lidit_jax.data.assembler import Assembler, BatchShape
from lidit_jax.data.broken_count import check_broken
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.caption_lengths import CaptionLengths, TokenCounter
from lidit_jax.data.captions import list_field
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.dataset import Dataset, spread
from lidit_jax.data.formats.files import is_remote
from lidit_jax.data.indexed.loader import rows_of_process
from lidit_jax.data.prompt_lengths import PromptLengths, StreamedPromptLengths
from lidit_jax.data.sources import BrokenExample, no_samples_error
from lidit_jax.data.streamed.loader import StreamLoader, StreamPlan
from lidit_jax.data.streamed.sample_stream import SECTION_BYTES, CaptionPlan, Entry, ReadStatistics, SampleReader
from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

# Limits of the estimate: number of shards; samples kept and samples read, over all these shards.
_MAX_SHARDS_READ = 32
_MAX_SAMPLES_KEPT, _MAX_SAMPLES_READ = 2048, 16384
_MAX_STREAMS = 256
_BATCHES_PER_BUCKET = 4  # default size of the shuffle buffers, in batches per bucket


class StreamedDataset(Dataset):
    """A `Dataset` read sequentially. `broken` and `dropped` count the first samples; the loader counts the rest."""

    def __init__(
        self,
        config: DataConfig,
        buckets: tuple[Bucket, ...],
        source_configs: Mapping[str, DataConfig],
        readers: Iterable[SampleReader],
        held_out: bool,
        with_captions: bool,
    ):
        """Reads the first samples of each source.

        Args:
          config: as for `Dataset`.
          buckets: as for `Dataset`.
          source_configs: as for `Dataset`.
          readers: how to read each of `source_configs`.
          held_out: as for `Dataset`.
          with_captions: as for `Dataset`.

        Raises:
          UserError: a mixture has no weights, too many samples are broken, the filters drop all of them, or no sample
            has a caption field that the config names.
        """
        super().__init__(config, buckets, source_configs, held_out, with_captions)
        if len(self._source_configs) > 1 and config.weights() is None:
            raise UserError(
                "data.sequential: the mixture's sources have unknown numbers of samples: give each a weight"
            )
        self._readers, self._samples = [], []
        for name, reader in zip(source_configs, readers, strict=True):
            samples, statistics, self.fields[name] = _read_first_samples(reader)
            self.broken.update(reason for _, reason in statistics.broken)
            self.dropped += statistics.dropped
            self.num_examined += statistics.read
            self._readers.append(reader)
            self._samples.append(samples)
        check_broken(self.num_examined, self.broken, config.max_broken)
        self._check_fields(f"none of the first {self.num_examined} samples")
        counts = np.array(
            [np.bincount([e.bucket for e in samples], minlength=len(self.buckets)) for samples in self._samples]
        )
        weights = np.array(self._weights or [1.0] * len(counts))
        # [sources, buckets], share of all rows.
        self._shares = counts / counts.sum(1, keepdims=True) * (weights / weights.sum())[:, None]

    @property
    def fingerprint(self) -> str:
        """Text that identifies the shards (names, and sizes of local files) and how they are read."""
        digest = hashlib.sha256()
        for reader in self._readers:
            digest.update(reader.shards.settings.encode())
            for path in reader.shards.paths:
                size = 0 if is_remote(path) or not os.path.exists(path) else os.path.getsize(path)
                digest.update(f"{os.path.basename(path)} {size}\n".encode())
        sizes = " ".join(str(bucket) for bucket in self.buckets)
        order = f" by {self._weights}" if self._weights else ""
        return f"sequential {digest.hexdigest()[:16]} in {sizes}{order}"

    def summary(self) -> str:
        shares = self._shares.sum(0)
        bucket_shares = [
            f"{bucket} {100 * share:.0f}%" for bucket, share in zip(self.buckets, shares, strict=True) if share
        ]
        shards = sum(len(reader.shards.paths) for reader in self._readers)
        lines = [f"data: {shards} shards, read from end to end; of the first {self.num_examined} samples: buckets "
                 f"{', '.join(bucket_shares)}"]  # fmt: skip
        return "; ".join(lines + self._describe_captions() + self._describe_left_out())

    def check_batch_size(self, batch_size: int) -> None:
        rows_of_process(batch_size, jax.process_index(), jax.process_count())
        self._streams_of_process(batch_size, jax.process_index(), jax.process_count())
        if self.config.shuffle_buffer and self.config.shuffle_buffer < batch_size:
            raise UserError(
                f"data.shuffle_buffer={self.config.shuffle_buffer} is below the batch size of {batch_size}: raise "
                "it, or give 0 for four batches per bucket"
            )

    def smallest_side(self) -> int:
        return min(min(self.buckets[i]) for i in np.flatnonzero(self._shares.sum(0)))

    def largest_bucket(self) -> Bucket:
        return self.buckets[int(self._shares.sum(0).argmax())]

    def captions(self, count: int, seed: int) -> list[str]:
        choosers, rng = self._choosers(0.0), np.random.default_rng(seed)
        found = self._spread(count)
        return [choosers[source](entry.sample.captions, rng) for source, entry in found]

    def images(self, count: int) -> list[np.ndarray]:
        images = []
        for source, entry in self._spread(count):
            reader = self._readers[source]
            [reread] = reader.read_again([(entry.epoch, *entry.place)])
            example = reread and reader.load(reread, self.buckets[entry.bucket])
            if example is None or isinstance(example, BrokenExample):
                logger.warning("example %r: %s; left out", entry.sample.key, example or "can no longer be read")
            else:
                images.append(example["image"])
        if not images:
            raise UserError("none of the images can be read: check the data files")
        return images

    def _spread(self, count: int) -> list[tuple[int, Entry]]:
        """Returns (source, entry) of up to `count` of the first samples, evenly spaced."""
        found = [(source, entry) for source, samples in enumerate(self._samples) for entry in samples]
        return [found[i] for i in spread(len(found), count)]

    def _streams_of_process(self, batch_size: int, process_index: int, process_count: int) -> tuple[int, range]:
        """Returns (number of streams, numbers of the streams of a process).

        Raises:
          UserError: `data.streams` does not fit the shards, the batch size and the number of processes.
        """
        shards = min(len(reader.shards.paths) for reader in self._readers)
        streams = self.config.streams
        if not streams:
            # Independent of the number of hosts, so that batches are, too.
            streams = max(n for n in range(1, min(shards, _MAX_STREAMS) + 1) if batch_size % n == 0)
        choices = [n for n in range(1, shards + 1) if math.gcd(n, batch_size) == n and n % process_count == 0]
        if streams > shards or batch_size % streams or streams % process_count:
            use = f"use one of {', '.join(map(str, choices[-8:]))}" if choices else "make more and smaller shards"
            raise UserError(
                f"data.streams={streams}: {shards} shards, a batch of {batch_size} and {process_count} hosts need a "
                f"number that divides the batch, is a multiple of the hosts, and has a shard for each: {use}, or give "
                "--config.data.sequential=False"
            )
        count = streams // process_count
        return streams, range(process_index * count, (process_index + 1) * count)

    def prompt_lengths(self, count_tokens: TokenCounter, num_lengths: int, max_length: int) -> PromptLengths:
        choosers = self._choosers(0.0)
        captions = [
            CaptionLengths.count((chooser.filled(entry.sample.captions) for entry in samples), count_tokens)
            for samples, chooser in zip(self._samples, choosers, strict=True)
        ]
        buckets = [np.array([entry.bucket for entry in samples]) for samples in self._samples]
        return StreamedPromptLengths(captions, choosers, buckets, self._shares, count_tokens, num_lengths, max_length)

    def _loader(self, assembler: Assembler, batch_size: int, first: int, prompts: PromptLengths | None) -> StreamLoader:
        assert prompts is None or isinstance(prompts, StreamedPromptLengths)
        self.check_batch_size(batch_size)
        streams, numbers = self._streams_of_process(batch_size, jax.process_index(), jax.process_count())
        # Buckets not met among the first samples never occur: their samples go to the nearest bucket that does.
        [occurring] = np.nonzero(self._shares.sum(0))
        buckets = tuple(self.buckets[i] for i in occurring)
        lengths = prompts.lengths if prompts else (0,)
        shares = prompts.shares if prompts else self._shares[..., None]  # [sources, buckets, lengths]
        shares = shares[:, occurring].reshape(len(self._readers), -1)
        num_shapes = int(np.count_nonzero(shares.sum(0)))
        buffer_size = self.config.shuffle_buffer or _BATCHES_PER_BUCKET * num_shapes * batch_size
        readers = [
            dataclasses.replace(
                reader, buckets=buckets, captions=CaptionPlan(chooser, prompts, assembler.seed) if prompts else None
            )
            for reader, chooser in zip(self._readers, self._choosers(0.0), strict=True)
        ]
        plan = StreamPlan(
            readers=tuple(readers),
            shares=shares,
            shapes=tuple(BatchShape(bucket, length) for bucket in buckets for length in lengths),
            batch_size=batch_size,
            num_streams=streams,
            capacity=buffer_size // streams,
            seed=assembler.seed,
            allow_enlarging=self.config.allow_enlarging,
        )
        return StreamLoader(
            plan,
            assembler,
            self.fingerprint,
            numbers,
            num_threads=self.config.num_threads,
            prefetch=self.config.prefetch,
            first_batch=first,
            max_broken=self.config.max_broken,
        )


def _read_first_samples(reader: SampleReader) -> tuple[list[Entry], ReadStatistics, collections.Counter[str]]:
    """Reads the first samples of some shards, without their images.

    Returns:
      The usable samples; and, of all samples read, statistics and the number with each text field.

    Raises:
      UserError: no sample can be used.
    """
    entries, total = [], ReadStatistics()
    fields: collections.Counter[str] = collections.Counter()
    keys: collections.Counter[str] = collections.Counter()
    shards = spread(len(reader.shards.paths), _MAX_SHARDS_READ)
    for shard in shards:
        statistics, kept = ReadStatistics(), []
        for found in itertools.islice(reader.shards.scan(shard, 0, SECTION_BYTES), _MAX_SAMPLES_READ // len(shards)):
            statistics.read += 1
            if isinstance(found, str):
                statistics.broken.append((reader.shards.paths[shard], found))
                continue
            place, sample = found
            fields.update({list_field(name) for name in sample.captions})
            keys.update(sample.metadata.keys())
            entry = reader.check(0, (shard, *place), sample, statistics, with_image=False)
            if entry is not None:
                kept.append(entry)
                if len(kept) == _MAX_SAMPLES_KEPT // len(shards):
                    break
        entries += kept
        total.add(statistics)
    if not entries:
        broken = collections.Counter(reason for _, reason in total.broken)
        raise no_samples_error(reader.shards.paths, total.read, broken, total.dropped, fields, keys)
    return entries, total, fields
