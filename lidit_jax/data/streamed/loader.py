"""Loader of shards that are read from end to end, without an index.

Every row of a batch belongs to one stream, whatever the number of hosts; a host reads the streams of its rows. Streams
are independent of one another: the bucket of batch k follows from k and from shares that every host measures equally.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lidit_jax.data.assembler import Assembler, BatchShape, PlannedCaptions
from lidit_jax.data.batch_stream import STATISTICS, BatchStatistics, BatchStream
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.indexed.batch_plan import BatchSchedule
from lidit_jax.data.sources import BrokenExample, Example
from lidit_jax.data.streamed.sample_stream import (
    MAX_REPLACEMENTS,
    Entry,
    ReadStatistics,
    SampleReader,
    SampleStream,
    ShuffleBuffer,
    Snapshot,
    shuffled,
)
from lidit_jax.errors import UserError

# Numbers mixed into the seed, one per purpose; `BatchSchedule` uses 1 and 2.
_SEED_DEALING, _SEED_SHARD_ORDER, _SEED_BUFFER = 3, 4, 5


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """Settings that are equal on all processes.

    Attributes:
      readers: reader of each source.
      shares: share of all rows of each source and shape, float64 [sources, shapes]; they sum to 1.
      shapes: the shapes of batches: the buckets, or bucket by bucket its prompt lengths.
      batch_size: rows of a batch over all processes.
      num_streams: number of streams over all processes; a divisor of batch_size.
      capacity: number of samples in the shuffle buffers of a stream.
      seed: seed of all random choices.
      allow_enlarging: if False, a batch takes samples that its bucket would enlarge only if there are no others.
    """

    readers: tuple[SampleReader, ...]
    shares: np.ndarray
    shapes: tuple[BatchShape, ...]
    batch_size: int
    num_streams: int
    capacity: int
    seed: int
    allow_enlarging: bool = True

    def digest(self) -> str:
        """Returns a digest of everything that determines the order of the samples, except the shards themselves."""
        filters = [check for reader in self.readers for check in reader.filters]
        rules = [(getattr(f, "func", f).__name__, str(getattr(f, "keywords", {}))) for f in filters]
        # Without prompt lengths, the digest is that of checkpoints from before they existed.
        shapes = self.shapes if self.lengths else self.buckets
        facts = [self.shares.tolist(), shapes, self.batch_size, self.num_streams, self.capacity, self.seed, rules]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets, in the order of the readers."""
        return tuple(dict.fromkeys(shape.bucket for shape in self.shapes))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The prompt lengths; empty if prompts are padded to `text.max_length`."""
        return tuple(dict.fromkeys(shape.prompt_length for shape in self.shapes if shape.prompt_length))

    def split(self, number: int) -> tuple[int, int]:
        """Returns the indices of the bucket and the prompt length of shape `number`."""
        return divmod(number, max(len(self.lengths), 1))

    @property
    def rows_per_stream(self) -> int:
        """Rows of a batch that each stream provides."""
        return self.batch_size // self.num_streams

    def schedule(self) -> BatchSchedule:
        """Returns the shape of every batch and the source of every row."""
        periods: dict[int, dict[int, float]] = {}
        for source, number in zip(*np.nonzero(self.shares), strict=True):
            periods.setdefault(int(number), {})[int(source)] = float(1 / self.shares[source, number])
        return BatchSchedule(periods, self.seed)


class _Stream:
    """Provides the rows of one stream in every batch, from its subset of each source's shards."""

    def __init__(self, plan: StreamPlan, schedule: BatchSchedule, number: int):
        self._plan, self._schedule = plan, schedule
        self._first_row = number * plan.rows_per_stream
        self._buffers = []
        for source, reader in enumerate(plan.readers):
            order = shuffled(len(reader.shards.paths), plan.seed, _SEED_DEALING, source)
            dealt = [order[n :: plan.num_streams].tolist() for n in range(plan.num_streams)]
            shards = dealt[number:] + dealt[:number]  # the stream's own shards first
            samples = SampleStream(reader, shards, (plan.seed, _SEED_SHARD_ORDER, source, number))
            capacity = int(np.ceil(plan.capacity * plan.shares[source].sum()))
            seed = (plan.seed, _SEED_BUFFER, source, number)
            self._buffers.append(ShuffleBuffer(samples, plan.buckets, capacity, seed, plan.allow_enlarging))

    def examples(self, batch: int, number: int, nth: int, with_images: bool) -> tuple[list[Example], ReadStatistics]:
        """Returns the stream's rows of a batch, and statistics of reading them.

        Args:
          batch: number of the batch.
          number: index of its shape.
          nth: number of earlier batches of that shape.
          with_images: whether to decode images.
        """
        plan, statistics = self._plan, ReadStatistics()
        first = nth * plan.batch_size + self._first_row
        sources = np.array([s for s, _ in self._schedule.rows(number, first, first + plan.rows_per_stream)])
        bucket_index, length = plan.split(number)
        bucket = plan.shapes[number].bucket if with_images else None
        examples: list[Any] = [None] * len(sources)
        for source in np.unique(sources).tolist():
            [rows] = np.nonzero(sources == source)
            chosen, others = self._buffers[source].take(bucket_index, length, len(rows), batch, statistics)
            spares = iter(others)
            for row, entry in zip(rows.tolist(), chosen, strict=True):
                example = self._load(source, entry, spares, bucket, statistics)
                examples[row] = example if len(plan.readers) == 1 else example | {"source": source}
        return examples, statistics

    def _load(
        self, source: int, entry: Entry, spares: Iterator[Entry], bucket: Bucket | None, statistics: ReadStatistics
    ) -> Example:
        """Returns the example of an entry, or of a spare one if its image is broken.

        A spare entry remains in the buffer, so it is used again in its own turn.
        """
        reader = self._plan.readers[source]
        example = reader.load(entry, bucket)
        for _ in range(MAX_REPLACEMENTS):
            if not isinstance(example, BrokenExample):
                return example
            statistics.broken.append((example.key, example.reason))
            spare = next(spares, None)
            example = reader.load(spare or self._buffers[source].read_replacement(statistics), bucket)
        raise UserError(f"{MAX_REPLACEMENTS} unreadable images in a row, last {example}: check the data files")

    def snapshot(self) -> list[Snapshot]:
        return [buffer.snapshot() for buffer in self._buffers]

    def restore(self, saved: Sequence[Snapshot]) -> None:
        for buffer, reader, snapshot in zip(self._buffers, self._plan.readers, saved, strict=True):
            buffer.restore(reader, snapshot)


class _Batches(grain.DatasetIterator):
    """Iterator over batches in order; the streams read and decode concurrently."""

    def __init__(
        self, plan: StreamPlan, assembler: Assembler, numbers: range, num_threads: int, first_batch: int, saved: Any
    ):
        super().__init__()
        self._assembler, self._batch = assembler, first_batch
        self._shapes, self._schedule = plan.shapes, plan.schedule()
        self._first_row = numbers.start * plan.rows_per_stream
        self._streams = {number: _Stream(plan, self._schedule, number) for number in numbers}
        self._pool = concurrent.futures.ThreadPoolExecutor(max(1, num_threads), "lidit-stream")
        if saved:
            list(self._pool.map(lambda number: self._streams[number].restore(saved[number]), numbers))

    def __next__(self) -> dict[str, Any]:
        batch = self._batch
        number, nth = self._schedule(batch)
        with_images, shape = self._assembler.with_images, self._shapes[number]
        results = list(self._pool.map(lambda s: s.examples(batch, number, nth, with_images), self._streams.values()))
        examples = [example for of_stream, _ in results for example in of_stream]
        names = [example.pop("caption", None) for example in examples]
        planned = PlannedCaptions(names, shape.prompt_length) if shape.prompt_length else None
        elements = self._assembler(batch, self._first_row, examples, planned)
        statistics = ReadStatistics()
        for _, stream_statistics in results:
            statistics.add(stream_statistics)
        self._batch += 1
        return elements | {
            STATISTICS: BatchStatistics(
                shape,
                statistics.read,
                statistics.broken,
                statistics.dropped,
                statistics.borrowed,
            )
        }

    def get_state(self) -> dict[int, list[Snapshot]]:
        return {number: stream.snapshot() for number, stream in self._streams.items()}

    def set_state(self, state: Any) -> None:
        raise TypeError("this iterator cannot be moved: StreamLoader.restore makes a new one")

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)  # a pool thread may call this: do not wait


class StreamLoader(BatchStream):
    """Iterator over batches of streams.

    Its state holds the positions of this process's streams and the places of the samples in their buffers. Without a
    state, the streams begin at their first samples, whatever the number of the first batch.
    """

    def __init__(
        self,
        plan: StreamPlan,
        assembler: Assembler,
        fingerprint: str,
        numbers: range,
        *,
        num_threads: int,
        prefetch: int,
        first_batch: int,
        max_broken: float,
    ):
        """Initializes the loader; reading begins with `start_prefetch` or the first batch.

        Args:
          plan: settings that are equal on all processes.
          assembler: assembles examples into a batch.
          fingerprint: text that identifies the data.
          numbers: numbers of this process's streams.
          num_threads: threads that read and decode; at most one per stream is busy.
          prefetch: batches to prefetch.
          first_batch: number of the first batch.
          max_broken: share of a window of 1,000 examples that may be broken before iteration stops.
        """
        super().__init__(fingerprint, first_batch, max_broken)
        self._plan, self._assembler, self._numbers = plan, assembler, numbers
        self._num_threads, self._prefetch = num_threads, prefetch
        self._batches: grain.DatasetIterator | None = None
        self._snapshots: dict[int, list[Snapshot]] = {}

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        return tuple(shape for shape, share in zip(self._plan.shapes, self._plan.shares.sum(0), strict=True) if share)

    def start_prefetch(self) -> None:
        if self._batches is None:
            batches = _Batches(
                self._plan, self._assembler, self._numbers, self._num_threads, self._next_batch, self._snapshots
            )
            self._batches = grain.experimental.ThreadPrefetchDatasetIterator(batches, max(1, self._prefetch))
        self._batches.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        saved = {str(number): [one.to_json() for one in snapshots] for number, snapshots in self._snapshots.items()}
        return super().get_state() | {"plan": self._plan.digest(), "streams": saved}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        self._next_of(states)
        if any(state.get("plan") != self._plan.digest() for state in states):
            raise UserError(
                "the checkpoint was saved with other data streams: use the same seed, batch size, filters, "
                "data.streams and data.shuffle_buffer, or start a new workdir"
            )
        try:
            shards = [len(reader.shards.paths) for reader in self._plan.readers]
            found = {
                int(number): [Snapshot.from_json(one, count) for one, count in zip(saved, shards, strict=True)]
                for state in states
                for number, saved in state["streams"].items()
            }
            if found and not all(number in found for number in self._numbers):
                raise ValueError("some streams are missing")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"the checkpoint's position in the data is damaged ({error!r:.100})") from error
        super().restore(states)
        self._snapshots = {number: found[number] for number in self._numbers} if found else {}

    def _next(self) -> dict[str, Any]:
        elements = next(self._batches)
        self._snapshots = self._batches.get_state()
        return elements

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None
