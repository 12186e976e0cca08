"""Loader for random access: reads, resizes, captions and tokenizes examples ahead of time, with grain.

Batch k is a pure function of the source, the buckets, the seed and k. So the processes of a pod need no communication,
a resumed run continues from a batch number, and threads, workers and prefetching affect only the speed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from lidit_jax.data.assembler import Assembler, BatchShape, PlannedCaptions
from lidit_jax.data.batch_stream import STATISTICS, BatchStatistics, BatchStream
from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.indexed.batch_plan import BatchPlan
from lidit_jax.data.prompt_lengths import IndexedPromptLengths
from lidit_jax.data.sources import BrokenExample, Example, Source
from lidit_jax.errors import UserError
from lidit_jax.parallel.preemption import ignore_ctrl_c

# Grain needs a number of batches: more than any run trains for.
_ENDLESS = 1 << 48
# This many unreadable neighbours are not accidents in the data but a lost disk or a wrong decoder.
_MAX_REPLACEMENTS = 100


def make_loader(
    source: Source,
    assembler: Assembler,
    batch_size: int,
    weights: Sequence[float] | None = None,
    prompts: IndexedPromptLengths | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
    first_batch: int = 0,
    max_broken: float = 1.0,
) -> "Loader":
    """Returns an endless, checkpointable iterator over batches, of which this process reads only its own rows.

    Process p reads B / process_count examples of each batch, from row p * B / process_count. All rows of a batch are of
    one bucket and, with `prompts`, of one prompt length.

    Args:
      source: source of the examples.
      assembler: assembles examples into a batch.
      batch_size: B, over all processes.
      weights: share of the rows of each source of a `ConcatenatedSource`, in any unit; None: in proportion to its
        examples.
      prompts: lengths of the captions, to make batches of prompts of similar lengths; None: sample the captions
        independently of their lengths.
      process_index: `jax.process_index()`.
      process_count: `jax.process_count()`.
      num_threads: threads per worker that make batches; 0 makes them on demand.
      num_workers: worker processes (grain spawns them, so all arguments must be picklable).
      prefetch: batches that each worker prefetches.
      first_batch: number of the first batch, when starting without a saved state.
      max_broken: share of a window of 1,000 examples that may be broken before iteration stops.

    Raises:
      UserError: batch_size is not a multiple of process_count, or there are no examples or no buckets; while iterating,
        too many examples are broken.
    """
    rows = rows_of_process(batch_size, process_index, process_count)
    buckets = assembler.buckets
    if not len(source) or not buckets:
        raise UserError(f"{len(source)} examples and {len(buckets)} buckets: a loader needs at least one of each")
    plan = make_plan(source, buckets, batch_size, assembler.seed, weights, prompts)
    reader = BatchReader(source, plan, assembler, rows, prompts)
    return Loader(reader, num_threads, num_workers, prefetch, first_batch, max_broken)


def make_plan(
    source: Source,
    buckets: Sequence[Bucket],
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    prompts: IndexedPromptLengths | None = None,
) -> BatchPlan:
    """Returns the plan of a source's batches; see `make_loader` for the arguments.

    With `prompts`, the plan's examples are captions, and its buckets are pairs of a bucket and a prompt length,
    numbered bucket by bucket.
    """
    source_of_example = source.source_of_example if weights is not None else None
    bucket_of_example = assign(source.sizes(), buckets)
    if prompts is None:
        return BatchPlan(bucket_of_example, batch_size, seed, source_of_example, weights)
    examples = prompts.examples
    shapes = bucket_of_example[examples].astype(np.int64) * len(prompts.lengths) + prompts.length_indices
    sources = None if source_of_example is None else source_of_example[examples]
    return BatchPlan(shapes, batch_size, seed, sources, weights, prompts.shares)


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> range:
    """Returns the rows of each batch that a process reads.

    Raises:
      UserError: batch_size is not a multiple of process_count, or process_index is out of range.
    """
    if batch_size < 1 or batch_size % process_count:
        lower = batch_size // process_count * process_count
        choice = f"{lower} or {lower + process_count}" if lower > 0 else str(process_count)
        raise UserError(f"batch_size={batch_size} is not a multiple of {process_count} processes: use {choice}")
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index={process_index} of process_count={process_count} is out of range: "
            f"use 0 to {process_count - 1}"
        )
    count = batch_size // process_count
    return range(process_index * count, (process_index + 1) * count)


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Reads this process's rows of batch k, as a function of k. Picklable; safe to call from several threads."""

    source: Source
    plan: BatchPlan
    assembler: Assembler
    rows: range
    prompts: IndexedPromptLengths | None = None

    def __call__(self, batch: int) -> dict[str, Any]:
        number, planned = self.plan.rows(batch, self.rows.start, self.rows.stop)
        shape = self.shape(number)
        # Indices into the plan's list: of examples or, with planned captions, of captions.
        indices, broken = planned.tolist(), []
        examples = self._read(indices, shape.bucket)
        for row, example in enumerate(examples):
            if isinstance(example, BrokenExample):
                broken.append(example)
                indices[row], examples[row] = self._replacement(indices[row], shape, broken)
        captions = self.prompts and PlannedCaptions(self.prompts.names_of(indices), shape.prompt_length)
        elements = self.assembler(batch, self.rows.start, examples, captions)
        statistics = BatchStatistics(shape, len(examples), [(example.key, example.reason) for example in broken])
        return elements | {STATISTICS: statistics}

    def shape(self, number: int) -> BatchShape:
        """Returns the batch shape that is the plan's bucket `number`."""
        if self.prompts is None:
            return BatchShape(self.assembler.buckets[number])
        bucket, length = divmod(number, len(self.prompts.lengths))
        return BatchShape(self.assembler.buckets[bucket], self.prompts.lengths[length])

    def _read(self, indices: Sequence[int], bucket: Bucket) -> list[Example | BrokenExample]:
        if self.prompts is not None:
            indices = self.prompts.examples[np.asarray(indices)].tolist()
        if self.assembler.with_images:
            return self.source.load(indices, bucket)
        return self.source.describe(indices)

    def _replacement(self, index: int, shape: BatchShape, broken: list[BrokenExample]) -> tuple[int, Example]:
        """Returns index and content of a readable example to replace a broken one.

        Tries the following examples of its bucket, then, except for latents, of any bucket. Further broken ones are
        appended to `broken`.
        """
        total = len(self.source) if self.prompts is None else len(self.prompts.examples)
        own = [self.plan.neighbour(index, i) for i in range(1, min(self.plan.list_size(index), _MAX_REPLACEMENTS))]
        others = [(index + i) % total for i in range(1, min(total, _MAX_REPLACEMENTS))]
        if self.prompts is not None:
            others = [other for other in others if self.prompts.length_of(other) <= shape.prompt_length]
        fits = self.source.content == "image" or not self.assembler.with_images  # latents fit one bucket alone
        for other in (*own, *(others if fits else ())):
            [example] = self._read([other], shape.bucket)
            if not isinstance(example, BrokenExample):
                return other, example
            broken.append(example)
        raise UserError(
            f"no readable example for bucket {shape}, {len(own) + 1} of it were tried, last {broken[-1]}: "
            "check the data files"
        )


class Loader(BatchStream):
    """Iterator over the batches of a source with random access; `make_loader` returns one.

    Its state does not depend on the number of processes, threads or workers, nor on prefetching.

    Attributes:
      shares: share of the batches of each shape; shapes without examples are left out.
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
        self.shares = {reader.shape(i): share for i, share in enumerate(reader.plan.shares().tolist()) if share}

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        return tuple(self.shares)

    def start_prefetch(self) -> None:
        if self._batches is None:
            numbers = grain.MapDataset.range(self._next_batch, _ENDLESS)
            batches = numbers.map(self._reader).to_iter_dataset(self._read_options)
            if self._num_workers:
                # Grain reads absl flags for its workers, which fails if no flags were parsed, as in Colab and in tests.
                if not flags.FLAGS.is_parsed():
                    flags.FLAGS.mark_as_parsed()
                options = grain.MultiprocessingOptions(num_workers=self._num_workers)
                batches = batches.mp_prefetch(options, worker_init_fn=ignore_ctrl_c)
            self._batches = iter(batches)
        self._batches.start_prefetch()

    def _next(self) -> dict[str, Any]:
        return next(self._batches)

    def _stop(self) -> None:
        # Grain can move an iterator to another position only with at most one worker, and a moved one would first
        # finish the batches it has begun. So a new iterator replaces it.
        if self._batches is not None:
            self._batches.close()
            self._batches = None
