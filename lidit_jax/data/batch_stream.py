"""What all loaders are: endless iterators over batches, with a position for checkpoints and a report for the log."""

import abc
import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain

from lidit_jax.data.broken_count import BrokenCount
from lidit_jax.data.buckets import Bucket
from lidit_jax.errors import UserError

NEWS = "news"  # of a batch on its way


class News(NamedTuple):
    """What is to be said of a batch; travels with it.

    Attributes:
      bucket: its group.
      read: examples that were read for it.
      broken: (key, reason) of those that could not be used.
      dropped: how many the filters dropped, by reason, where they look while reading.
      borrowed: examples put into the group that belong to another; see `GroupingBuffer`.
    """

    bucket: Bucket
    read: int
    broken: Sequence[tuple[str, str]] = ()
    dropped: Mapping[str, int] = {}
    borrowed: int = 0


class BatchStream(grain.DatasetIterator):
    """Endless batches. Close it (or let it go) to end threads and workers.

    Its state is JSON: the next batch, the data's fingerprint, and what more a kind of loader needs.
    """

    def __init__(self, fingerprint: str, first_batch: int, max_broken: float):
        super().__init__()
        self.fingerprint = fingerprint
        self._next_batch = first_batch
        self._broken = BrokenCount(max_broken)
        self._dropped: collections.Counter[str] = collections.Counter()
        self._groups: collections.Counter[Bucket] = collections.Counter()
        self._read = self._borrowed = 0
        self._bucket: Bucket | None = None

    @property
    @abc.abstractmethod
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets that batches come in; those without a share of them are left out."""

    @property
    def bucket(self) -> Bucket:
        """The bucket of the batch handed out last."""
        if self._bucket is None:
            raise ValueError("no batch was handed out yet")
        return self._bucket

    @property
    def broken(self) -> collections.Counter[str]:
        """How many reads found something that cannot be used, by reason, of the batches handed out so far."""
        return self._broken.by_reason

    @property
    def dropped(self) -> collections.Counter[str]:
        """How many samples the filters dropped while reading, by reason, of the batches handed out so far."""
        return self._dropped

    def __next__(self) -> dict[str, Any]:
        """Raises UserError where too much is broken."""
        self._assert_not_closed()
        self.start_prefetch()
        elements = self._next()
        self._next_batch += 1
        news: News = elements.pop(NEWS)
        self._bucket = news.bucket
        self._groups[news.bucket] += 1
        self._dropped.update(news.dropped)
        self._read += news.read
        self._borrowed += news.borrowed
        self._broken.add(news.read, news.broken)
        return elements

    def report(self) -> dict[str, float]:
        """For the log: each group's share of the batches since the last report, and how many were left out so far."""
        batches = self._groups.total()
        numbers = {f"group/{bucket}": count / batches for bucket, count in sorted(self._groups.items())}
        self._groups.clear()
        for name, count in (("broken", self.broken), ("dropped", self.dropped)):
            if count:
                numbers[f"data/{name}"] = count.total()
        if self._borrowed:
            numbers["data/borrowed"] = self._borrowed
        return numbers

    def get_state(self) -> dict[str, Any]:
        return {"next_batch": self._next_batch, "fingerprint": self.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where the state was saved with other data."""
        self.restore([state])

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes on where the loaders of all processes were, however many there were.

        Raises:
          UserError: the states were saved with other data.
        """
        self._stop()
        self._next_batch = self._next_of(states)

    def _next_of(self, states: Sequence[Mapping[str, Any]]) -> int:
        """The next batch's number. Raises UserError where the states cannot be this data's."""
        for state in states:
            if state.get("fingerprint") != self.fingerprint:
                raise UserError(
                    f"the data differ (fingerprint {self.fingerprint}) from those that the checkpoint was trained on "
                    f"({state.get('fingerprint')!r:.80}): give the same data and filters, or start a new workdir"
                )
        numbers = {state.get("next_batch") for state in states}
        [number] = numbers if len(numbers) == 1 else [None]
        if type(number) is not int or number < 0:
            raise UserError(f"the checkpoint's position in the data is damaged (next batches {numbers!r:.80})")
        return number

    def close(self) -> None:
        self._closed = True
        self._stop()

    @abc.abstractmethod
    def start_prefetch(self) -> None:
        """Starts threads and workers, for instance while a model is still being restored."""

    @abc.abstractmethod
    def _next(self) -> dict[str, Any]:
        """The next batch, with `NEWS`."""

    @abc.abstractmethod
    def _stop(self) -> None:
        """Ends threads and workers and forgets what they had begun."""
