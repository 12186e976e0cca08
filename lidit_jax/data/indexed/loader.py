"""Batches for training: examples read, fitted to their bucket, captioned and tokenised, ahead of time, by grain.

Batch k is a pure function of the source, the buckets, the seed and k. So the processes of a pod need not talk to each
other, a resumed run continues with a number, and threads, workers and prefetching change only the speed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
from absl import flags

from lidit_jax.data.assembler import Assembler
from lidit_jax.data.batch_stream import NEWS, BatchStream, News
from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.indexed.batch_plan import BatchPlan
from lidit_jax.data.sources import BrokenExample, Example, Source
from lidit_jax.errors import UserError

# Grain wants to know how many batches there are: more than anyone trains for.
_ENDLESS = 1 << 48
# So many unreadable neighbours are no longer accidents in the data but a lost disk or a wrong decoder.
_MAX_REPLACEMENTS = 100


def make_loader(
    source: Source,
    assembler: Assembler,
    batch_size: int,
    weights: Sequence[float] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
    first_batch: int = 0,
    max_broken: float = 1.0,
) -> "Loader":
    """An endless, checkpointable iterator over batches, of which this process reads only its own rows.

    It yields what the assembler makes of B / process_count examples, one bucket's a batch; process p has rows
    p * B / process_count onwards.

    Args:
      source: where examples come from.
      assembler: examples -> batch.
      batch_size: B, over all processes.
      weights: of a `ConcatenatedSource`, the share of the rows that each of its sources gets, in any unit; None: by how
        many examples it has.
      process_index, process_count: `jax.process_index()`, `jax.process_count()`.
      num_threads: threads that make batches, in each worker; 0 makes them when asked for.
      num_workers: worker processes (grain starts them afresh, so everything given here must be picklable).
      prefetch: batches made ahead of time, in each worker.
      first_batch: the number of the first batch, for a start without a saved iterator.
      max_broken: share of a thousand examples that may be found broken before the loader stops.

    Raises:
      UserError: batch_size does not divide by process_count; no example or no bucket; while iterating, too many
        examples are broken.
    """
    rows = rows_of_process(batch_size, process_index, process_count)
    buckets = assembler.buckets
    if not len(source) or not buckets:
        raise UserError(f"{len(source)} examples and {len(buckets)} buckets: a loader needs some of both")
    plan = make_plan(source, buckets, batch_size, assembler.seed, weights)
    return Loader(
        BatchReader(source, plan, assembler, rows), num_threads, num_workers, prefetch, first_batch, max_broken
    )


def make_plan(
    source: Source, buckets: Sequence[Bucket], batch_size: int, seed: int, weights: Sequence[float] | None = None
) -> BatchPlan:
    """Of a source's batches; see `make_loader`."""
    source_of_example = source.source_of_example if weights is not None else None
    return BatchPlan(assign(source.sizes(), buckets), batch_size, seed, source_of_example, weights)


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> range:
    """Which rows of each batch a process reads.

    Raises:
      UserError: they do not divide evenly, or there is no such process.
    """
    if batch_size < 1 or batch_size % process_count:
        lower = batch_size // process_count * process_count
        choice = f"{lower} or {lower + process_count}" if lower > 0 else str(process_count)
        raise UserError(f"batch_size={batch_size} does not divide over {process_count} processes: use {choice}")
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index={process_index} of process_count={process_count}: it is 0 to {process_count - 1}"
        )
    count = batch_size // process_count
    return range(process_index * count, (process_index + 1) * count)


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """This process's rows of batch k, as a function of k. Picklable; safe to call from several threads."""

    source: Source
    plan: BatchPlan
    assembler: Assembler
    rows: range

    def __call__(self, batch: int) -> dict[str, Any]:
        bucket_index, indices = self.plan.rows(batch, self.rows.start, self.rows.stop)
        bucket = self.assembler.buckets[bucket_index]
        indices, broken = indices.tolist(), []
        examples = self._read(indices, bucket)
        for row, example in enumerate(examples):
            if isinstance(example, BrokenExample):
                broken.append(example)
                examples[row] = self._replacement(indices[row], bucket, broken)
        elements = self.assembler(batch, self.rows.start, examples)
        news = News(bucket, len(examples), [(example.key, example.reason) for example in broken])
        return elements | {NEWS: news}

    def _read(self, indices: Sequence[int], bucket: Bucket) -> list[Example | BrokenExample]:
        if self.assembler.with_images:
            return self.source.load(indices, bucket)
        return self.source.describe(indices)

    def _replacement(self, index: int, bucket: Bucket, broken: list[BrokenExample]) -> Example:
        """The next readable example of its bucket or, of pictures, of any; broken ones are added to `broken`."""
        own = [self.plan.neighbour(index, i) for i in range(1, min(self.plan.list_size(index), _MAX_REPLACEMENTS))]
        others = ((index + i) % len(self.source) for i in range(1, min(len(self.source), _MAX_REPLACEMENTS)))
        fits = self.source.content == "image" or not self.assembler.with_images  # latents are cropped no more
        for other in (*own, *(others if fits else ())):
            [example] = self._read([other], bucket)
            if not isinstance(example, BrokenExample):
                return example
            broken.append(example)
        raise UserError(
            f"no readable example in bucket {bucket} or for it; of {len(own) + 1} there last {broken[-1]}: "
            "check the data's files"
        )


class Loader(BatchStream):
    """Batches of a source with random access; `make_loader` makes it.

    Its state does not depend on processes, threads, workers or prefetching.

    Attributes:
      shares: bucket -> its share of the batches; buckets without examples are left out.
    """

    def __init__(
        self,
        reader: BatchReader,
        num_threads: int,
        num_workers: int,
        prefetch: int,
        first_batch: int,
        max_broken: float,
    ):
        super().__init__(reader.source.fingerprint, first_batch, max_broken)
        self._reader = reader
        self._num_workers = num_workers
        self._read_options = grain.ReadOptions(min(num_threads, prefetch), prefetch)
        self._batches: grain.DatasetIterator | None = None
        shares = enumerate(reader.plan.shares().tolist())
        self.shares = {reader.assembler.buckets[bucket]: share for bucket, share in shares if share}

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(self.shares)

    def start_prefetch(self) -> None:
        if self._batches is None:
            numbers = grain.MapDataset.range(self._next_batch, _ENDLESS)
            batches = numbers.map(self._reader).to_iter_dataset(self._read_options)
            if self._num_workers:
                # Grain asks absl's flags about its workers, which fails where nobody parsed any: in Colab and tests.
                if not flags.FLAGS.is_parsed():
                    flags.FLAGS.mark_as_parsed()
                batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
            self._batches = iter(batches)
        self._batches.start_prefetch()

    def _next(self) -> dict[str, Any]:
        return next(self._batches)

    def _stop(self) -> None:
        # Grain can move an iterator to another place only with at most one worker, and a moved one would first finish
        # what it had begun, so a new one takes over.
        if self._batches is not None:
            self._batches.close()
            self._batches = None
