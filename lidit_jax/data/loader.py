"""Batches for training: examples read, fitted to their bucket, captioned and tokenised, ahead of time, by grain.

Batch k is a pure function of the source, the buckets, the seed and k. So the processes of a pod need not talk to each
other, a resumed run continues with a number, and threads, workers and prefetching change only the speed.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from lidit_jax.data.batch_plan import BatchPlan
from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.sources import BrokenExample, Example, Source
from lidit_jax.errors import UserError

ChooseCaption = Callable[[Mapping[str, str], np.random.Generator], str]
Tokenize = Callable[[list[str]], Mapping[str, np.ndarray]]

# Grain wants to know how many batches there are: more than anyone trains for.
_ENDLESS = 1 << 48
# So many unreadable neighbours are no longer accidents in the data but a lost disk or a wrong decoder.
_MAX_REPLACEMENTS = 100
_MAX_LOGGED = 10
BROKEN = "broken examples"  # of a batch on its way
# The limit on broken examples is a share of so many.
BROKEN_WINDOW = 1000

_log = logging.getLogger(__name__)


def make_loader(
    source: Source,
    assembler: "Assembler",
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
class Assembler:
    """Examples of one bucket, read and fitted, to a batch: captions drawn and tokenised, pictures stacked. Picklable.

    It gives {"image": uint8 [B, H, W, 3], **tokenize(captions)}; of a source of latents, "moments" [B, h, w, 2C] in
    place of "image".

    Attributes:
      buckets: the picture sizes; each example goes to the nearest in aspect.
      seed: 0 to 2^64 - 1; with the batch's number and the row it decides order, captions and dropout.
      choosers: of each source of a `ConcatenatedSource`, or of the one: ({field: text}, generator) -> the caption to
        train on.
      tokenize: B captions -> arrays with that many rows. None: captions are not trained on.
      with_captions: also give "caption", a list of B strings.
      with_images: give "image"; without, for language models, no picture is decoded.
    """

    buckets: tuple[Bucket, ...]
    seed: int
    choosers: tuple[ChooseCaption, ...]
    tokenize: Tokenize | None
    with_captions: bool = False
    with_images: bool = True

    def __post_init__(self):
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed={self.seed}: it is 0 to 2^64 - 1")

    def __call__(
        self, batch: int, first_row: int, examples: Sequence[Example], broken: Sequence[BrokenExample]
    ) -> dict[str, Any]:
        """Args:
        batch, first_row: which batch it is, and which of its rows the first example.
        broken: those that some of the examples are in place of; they travel with the batch to be counted.
        """
        elements: dict[str, Any] = {BROKEN: [(e.key, e.reason) for e in broken]}
        if self.tokenize or self.with_captions:
            generators = _RowGenerators(self.seed, batch)
            captions = [
                self.choosers[example.get("source", 0)](example["captions"], generators.of_row(first_row + row))
                for row, example in enumerate(examples)
            ]
            elements |= self.tokenize(captions) if self.tokenize else {}
            if self.with_captions:
                elements["caption"] = captions
        if self.with_images:
            content = "moments" if "moments" in examples[0] else "image"
            elements[content] = np.stack([example[content] for example in examples])
        return elements


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
        return self.assembler(batch, self.rows.start, examples, broken)

    def _read(self, indices: Sequence[int], bucket: Bucket) -> list[Example | BrokenExample]:
        if self.assembler.with_images:
            return self.source.load(indices, bucket)
        return self.source.describe(indices)

    def _replacement(self, index: int, bucket: Bucket, broken: list[BrokenExample]) -> Example:
        """The next readable example of its bucket; those passed over are added to `broken`."""
        tries = min(self.plan.list_size(index), _MAX_REPLACEMENTS)
        for distance in range(1, tries):
            [example] = self._read([self.plan.neighbour(index, distance)], bucket)
            if not isinstance(example, BrokenExample):
                return example
            broken.append(example)
        raise UserError(
            f"no readable example in bucket {bucket} among {tries} neighbours, last {broken[-1]}: "
            "check the data's files"
        )


class _RowGenerators:
    """One random stream for each row of a batch, the same whichever process reads the row.

    A counter-based generator is moved to the row's place: seeding a new one would cost more than a tiny picture.
    """

    def __init__(self, seed: int, batch: int):
        self._batch = batch
        self._bits = np.random.Philox(key=seed)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def of_row(self, row: int) -> np.random.Generator:
        """Valid until the next call."""
        self._state["state"]["counter"][:] = (0, row, self._batch, 0)
        self._state["buffer_pos"] = 4  # nothing is left over from the row before
        self._state["has_uint32"] = 0
        self._bits.state = self._state
        return self._generator


class BrokenCount:
    """What was found broken while reading, by reason; says the first of them, and when it is too much."""

    def __init__(self, max_broken: float, consequence: str = "another one took its place"):
        """Args:
        max_broken: share of every `BROKEN_WINDOW` examples.
        consequence: for the log.
        """
        self._consequence = consequence
        self.by_reason: collections.Counter[str] = collections.Counter()
        self._max_broken, self._read_in_window, self._broken_in_window = max_broken, 0, 0

    def add(self, read: int, broken: Sequence[tuple[str, str]]) -> None:
        """(key, reason) of the broken ones among `read` examples.

        Raises:
          UserError: it is too much.
        """
        for key, reason in broken:
            self.by_reason[reason] += 1
            if self.by_reason.total() <= _MAX_LOGGED:
                _log.warning("example %r: %s; %s", key, reason, self._consequence)
        self._read_in_window += read
        self._broken_in_window += len(broken)
        if self._broken_in_window > self._max_broken * BROKEN_WINDOW:
            raise UserError(_too_many_broken(self._broken_in_window, self._read_in_window, self.by_reason))
        if self._read_in_window >= BROKEN_WINDOW:
            self._read_in_window = self._broken_in_window = 0


def check_broken(looked_at: int, broken: Mapping[str, int], max_broken: float) -> None:
    """Raises UserError where too many samples of a data set cannot be used; a small one may lose more of them."""
    count = sum(broken.values())
    if count > max_broken * max(looked_at, BROKEN_WINDOW):
        raise UserError(_too_many_broken(count, looked_at, broken))


def _too_many_broken(count: int, read: int, broken: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {number}" for reason, number in collections.Counter(broken).most_common(5))
    return (
        f"{count} of {read} samples cannot be used ({reasons}): mend the data, or raise --config.data.max_broken, the "
        f"share of {BROKEN_WINDOW} samples that may be broken"
    )


class Loader(grain.DatasetIterator):
    """Iterates over batches; `make_loader` makes it. Close it (or let it go) to end threads and workers.

    Its state is the next batch's number and the data's fingerprint, and so does not depend on processes, threads,
    workers or prefetching; `grain.checkpoint.CheckpointSave(loader)` saves it with Orbax.

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
        super().__init__()
        self._reader = reader
        self._num_workers = num_workers
        self._read_options = grain.ReadOptions(min(num_threads, prefetch), prefetch)
        self._next_batch = first_batch
        self._batches: grain.DatasetIterator | None = None
        self._broken = BrokenCount(max_broken)
        shares = enumerate(reader.plan.shares().tolist())
        self.shares = {reader.assembler.buckets[bucket]: share for bucket, share in shares if share}

    @property
    def fingerprint(self) -> str:
        """The source's."""
        return self._reader.source.fingerprint

    @property
    def broken(self) -> collections.Counter[str]:
        """How many reads found a `BrokenExample` and took another, by reason, of the batches handed out so far."""
        return self._broken.by_reason

    def __next__(self) -> dict[str, Any]:
        self._assert_not_closed()
        self.start_prefetch()
        elements = next(self._batches)
        self._next_batch += 1
        self._broken.add(len(self._reader.rows), elements.pop(BROKEN))
        return elements

    def start_prefetch(self) -> None:
        """Starts threads and workers, for instance while a model is still being restored."""
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

    def get_state(self) -> dict[str, Any]:
        return {"next_batch": self._next_batch, "fingerprint": self.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError where the state was saved with other data."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the data differ (fingerprint {self.fingerprint}) from those that the checkpoint was trained on "
                f"({state['fingerprint']}): give the same data and filters, or start a new workdir"
            )
        self._stop()
        self._next_batch = int(state["next_batch"])

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        # Grain can move an iterator to another place only with at most one worker, and a moved one would first finish
        # what it had begun, so a new one takes over.
        if self._batches is not None:
            self._batches.close()
            self._batches = None
