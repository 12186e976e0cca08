"""Base class of the loaders: endless iterators over batches that checkpoint their position and report statistics."""

import abc
import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain

from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.broken_count import BrokenCount
from lidit_jax.errors import UserError

MAX_BATCHES = 1 << 48  # batches of a stream; the position of a later one is damaged
STATISTICS = "statistics"  # key of the statistics within a batch; removed before the batch is returned


class BatchStatistics(NamedTuple):
    """Statistics of one batch, carried inside it from the threads or workers that read it.

    Attributes:
      shape: bucket and prompt length of the batch.
      read: number of examples read for the batch.
      broken: (key, reason) of each example that could not be used.
      dropped: number of samples that filters dropped, by reason; only for loaders that filter while reading.
      borrowed: number of examples taken from another bucket; see `ShuffleBuffer`.
    """

    shape: BatchShape
    read: int
    broken: Sequence[tuple[str, str]] = ()
    dropped: Mapping[str, int] = {}
    borrowed: int = 0


class BatchStream(grain.DatasetIterator):
    """Endless iterator over batches. Closing or deleting it ends its threads and workers.

    Its state is JSON: the number of the next batch, the fingerprint of the data, and any state of the subclass.
    """

    def __init__(self, fingerprint: str, first_batch: int, max_broken: float):
        super().__init__()
        self.fingerprint = fingerprint
        self._next_batch = first_batch
        self._broken = BrokenCount(max_broken)
        self._dropped: collections.Counter[str] = collections.Counter()
        self._shape_counts: collections.Counter[BatchShape] = collections.Counter()
        self._read = self._borrowed = 0
        self._shape: BatchShape | None = None

    @property
    @abc.abstractmethod
    def shapes(self) -> tuple[BatchShape, ...]:
        """Shapes that batches have; excludes those that never occur."""

    @property
    def shape(self) -> BatchShape:
        """Shape of the batch returned last; raises ValueError before the first."""
        if self._shape is None:
            raise ValueError("no batch has been returned yet")
        return self._shape

    @property
    def broken(self) -> collections.Counter[str]:
        """Number of unusable examples met while reading the batches returned so far, by reason."""
        return self._broken.by_reason

    @property
    def dropped(self) -> collections.Counter[str]:
        """Number of samples dropped by filters while reading the batches returned so far, by reason."""
        return self._dropped

    def __next__(self) -> dict[str, Any]:
        """Returns the next batch.

        Raises:
          UserError: too many examples are broken.
        """
        self._assert_not_closed()
        self.start_prefetch()
        elements = self._next()
        self._next_batch += 1
        statistics: BatchStatistics = elements.pop(STATISTICS)
        self._shape = statistics.shape
        self._shape_counts[statistics.shape] += 1
        self._dropped.update(statistics.dropped)
        self._read += statistics.read
        self._borrowed += statistics.borrowed
        self._broken.add(statistics.read, statistics.broken)
        return elements

    def report(self) -> dict[str, float]:
        """Returns metrics for the log.

        These are the share of each bucket, and of each prompt length if there are several, in the batches since the
        last report, and the number of samples left out so far.
        """
        batches = self._shape_counts.total()
        numbers: dict[str, float] = collections.defaultdict(float)
        for shape, count in sorted(self._shape_counts.items()):
            numbers[f"bucket/{shape.bucket}"] += count / batches
            if shape.prompt_length:
                numbers[f"prompt_length/{shape.prompt_length}"] += count / batches
        self._shape_counts.clear()
        for name, count in (("broken", self.broken), ("dropped", self.dropped)):
            if count:
                numbers[f"data/{name}"] = count.total()
        if self._borrowed:
            numbers["data/borrowed"] = self._borrowed
        return dict(numbers)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batch returned last, as JSON values."""
        return {"next_batch": self._next_batch, "fingerprint": self.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position.

        Raises:
          UserError: the state was saved with other data.
        """
        self.restore([state])

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Resumes from the states of all processes, whose number may differ from the current one.

        Raises:
          UserError: the states were saved with other data.
        """
        self._stop()
        self._next_batch = self._next_of(states)

    def _next_of(self, states: Sequence[Mapping[str, Any]]) -> int:
        """Returns the number of the next batch.

        Raises:
          UserError: the states were saved with other data, or are damaged.
        """
        for state in states:
            if not isinstance(state, Mapping):
                raise UserError(f"the checkpoint's position in the data is damaged ({state!r:.80})")
            if state.get("fingerprint") != self.fingerprint:
                raise UserError(
                    f"the data (fingerprint {self.fingerprint}) are not those of the checkpoint "
                    f"({state.get('fingerprint')!r:.80}): use the same data and filters, or start a new workdir"
                )
        numbers = [state.get("next_batch") for state in states]
        are_equal = bool(numbers) and all(number == numbers[0] for number in numbers)
        if not are_equal or type(numbers[0]) is not int or not 0 <= numbers[0] < MAX_BATCHES:
            raise UserError(f"the checkpoint's position in the data is damaged (next batches {numbers!r:.80})")
        return numbers[0]

    def close(self) -> None:
        """Ends threads and workers; the iterator cannot be used afterwards."""
        self._closed = True
        self._stop()

    @abc.abstractmethod
    def start_prefetch(self) -> None:
        """Starts threads and workers, so that they read ahead while, for example, a checkpoint is being restored."""

    @abc.abstractmethod
    def _next(self) -> dict[str, Any]:
        """Returns the next batch, with its statistics under the key `STATISTICS`."""

    @abc.abstractmethod
    def _stop(self) -> None:
        """Ends threads and workers and discards the batches they had prefetched."""
