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
from lidit_jax.data.buckets import Bucket, assign, needs_enlarging, resize_to_cover_and_crop
from lidit_jax.data.sources import BrokenExample, Source, describe
from lidit_jax.errors import UserError

ChooseCaption = Callable[[Mapping[str, str], np.random.Generator], str]
Tokenize = Callable[[list[str]], Mapping[str, np.ndarray]]

# Grain wants to know how many batches there are: more than anyone trains for.
_ENDLESS = 1 << 48
# So many unreadable neighbours are no longer accidents in the data but a lost disk or a wrong decoder.
_MAX_REPLACEMENTS = 100
_MAX_LOGGED = 10
_BROKEN = "broken examples"

_log = logging.getLogger(__name__)


def make_loader(
    source: Source,
    buckets: Sequence[Bucket],
    batch_size: int,
    seed: int,
    choose_caption: ChooseCaption,
    tokenize: Tokenize,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
    first_batch: int = 0,
    allow_enlarging: bool = True,
    with_captions: bool = False,
    with_images: bool = True,
) -> "Loader":
    """An endless, checkpointable iterator over batches, of which this process reads only its own rows.

    It yields {"image": uint8 [B / process_count, H, W, 3], **tokenize(captions)}, one bucket's H and W a batch;
    process p has rows p * B / process_count onwards.

    Args:
      source: where examples come from.
      buckets: the picture sizes; each example goes to the nearest in aspect.
      batch_size: B, over all processes.
      seed: 0 to 2^64 - 1; with the batch's number and the row it decides order, captions and dropout.
      choose_caption: ({field: text}, generator) -> the caption to train on, e.g. a `CaptionChooser`.
      tokenize: B / process_count captions -> arrays with that many rows.
      process_index, process_count: `jax.process_index()`, `jax.process_count()`.
      num_threads: threads that make batches, in each worker; 0 makes them when asked for.
      num_workers: worker processes (grain starts them afresh, so everything given here must be picklable).
      prefetch: batches made ahead of time, in each worker.
      first_batch: the number of the first batch, for a start without a saved iterator.
      allow_enlarging: whether pictures smaller than their bucket may be scaled up.
      with_captions: also yield "caption", a list of B / process_count strings.
      with_images: yield "image"; without, for language models, no picture is decoded.

    Raises:
      UserError: batch_size does not divide by process_count; no example or no bucket; a picture would need enlarging
        and must not; while iterating, too many examples in a row are broken.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(_does_not_divide(batch_size, process_count))
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index={process_index} of process_count={process_count}: it is 0 to {process_count - 1}"
        )
    if not 0 <= seed < 1 << 64:
        raise UserError(f"seed={seed}: it is 0 to 2^64 - 1")
    if not len(source) or not buckets:
        raise UserError(f"{len(source)} examples and {len(buckets)} buckets: a loader needs some of both")
    bucket_of_example = assign(source.sizes(), buckets)
    if not allow_enlarging:
        _check_no_enlarging(source.sizes(), bucket_of_example, buckets)
    rows = batch_size // process_count
    reader = BatchReader(
        source=source,
        buckets=tuple(buckets),
        plan=BatchPlan(bucket_of_example, batch_size, seed),
        seed=seed,
        choose_caption=choose_caption,
        tokenize=tokenize,
        first_row=process_index * rows,
        num_rows=rows,
        with_captions=with_captions,
        with_images=with_images,
    )
    return Loader(reader, num_threads, num_workers, prefetch, first_batch)


def _does_not_divide(batch_size: int, process_count: int) -> str:
    lower = batch_size // process_count * process_count
    choice = f"{lower} or {lower + process_count}" if lower > 0 else str(process_count)
    return f"batch_size={batch_size} does not divide over {process_count} processes: use {choice}"


def _check_no_enlarging(sizes: np.ndarray, bucket_of_example: np.ndarray, buckets: Sequence[Bucket]) -> None:
    too_small = int(needs_enlarging(sizes, bucket_of_example, buckets).sum())
    if too_small:
        raise UserError(
            f"{too_small} of {len(sizes)} pictures are smaller than their bucket: filter them by smallest_side, "
            "lower the resolution or allow enlarging"
        )


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """This process's rows of batch k, as a function of k. Picklable; safe to call from several threads."""

    source: Source
    buckets: tuple[Bucket, ...]
    plan: BatchPlan
    seed: int
    choose_caption: ChooseCaption
    tokenize: Tokenize
    first_row: int
    num_rows: int
    with_captions: bool
    with_images: bool = True

    def __call__(self, batch: int) -> dict[str, Any]:
        bucket_index, indices = self.plan.rows(batch, self.first_row, self.first_row + self.num_rows)
        bucket = self.buckets[bucket_index]
        images = np.empty((self.num_rows, bucket.height, bucket.width, 3), np.uint8)
        captions: list[str] = []
        broken: list[BrokenExample] = []
        generators = _RowGenerators(self.seed, batch)
        for row, index in enumerate(indices.tolist()):
            example = self._read(bucket_index, index, broken)
            if self.with_images:
                images[row] = resize_to_cover_and_crop(example["image"], bucket)
            captions.append(self.choose_caption(example["captions"], generators.of_row(self.first_row + row)))
        elements = {**self.tokenize(captions), _BROKEN: [(e.key, e.reason) for e in broken]}
        if self.with_images:
            elements["image"] = images
        if self.with_captions:
            elements["caption"] = captions
        return elements

    def _read(self, bucket: int, index: int, broken: list[BrokenExample]) -> dict[str, Any]:
        """The example, or the next readable one of its bucket."""
        if not self.with_images:
            return describe(self.source, index)
        for distance in range(min(self.plan.bucket_size(bucket), _MAX_REPLACEMENTS)):
            try:
                return self.source[self.plan.neighbour(bucket, index, distance) if distance else index]
            except BrokenExample as error:
                broken.append(error)
        raise UserError(
            f"no readable example in bucket {self.buckets[bucket]} among {distance + 1} neighbours, last {broken[-1]}: "
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


class Loader(grain.DatasetIterator):
    """Iterates over batches; `make_loader` makes it. Close it (or let it go) to end threads and workers.

    Its state is the next batch's number and the data's fingerprint, and so does not depend on processes, threads,
    workers or prefetching; `grain.checkpoint.CheckpointSave(loader)` saves it with Orbax.

    Attributes:
      shares: bucket -> its share of the batches; buckets without examples are left out.
      broken: how many reads found a `BrokenExample` and took another, by reason, of the batches handed out so far.
    """

    def __init__(self, reader: BatchReader, num_threads: int, num_workers: int, prefetch: int, first_batch: int):
        super().__init__()
        self._reader = reader
        self._num_workers = num_workers
        self._read_options = grain.ReadOptions(min(num_threads, prefetch), prefetch)
        self._next_batch = first_batch
        self._batches: grain.DatasetIterator | None = None
        self.broken: collections.Counter[str] = collections.Counter()
        shares = enumerate(reader.plan.shares().tolist())
        self.shares = {reader.buckets[bucket]: share for bucket, share in shares if share}

    @property
    def fingerprint(self) -> str:
        """The source's."""
        return self._reader.source.fingerprint

    def __next__(self) -> dict[str, Any]:
        self._assert_not_closed()
        self.start_prefetch()
        elements = next(self._batches)
        self._next_batch += 1
        self._count(elements.pop(_BROKEN))
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

    def _count(self, broken: list[tuple[str, str]]) -> None:
        for key, reason in broken:
            self.broken[reason] += 1
            if self.broken.total() <= _MAX_LOGGED:
                _log.warning("example %r: %s; another one took its place", key, reason)
