"""Samples in the order in which their shards hold them, without an index; and a buffer that shuffles and groups them.

A stream has some of the shards and reads them one after the other, from end to end, epoch after epoch; its state is a
place in a shard. What it reads waits in a buffer until a batch of its group comes.
"""

import collections
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lidit_jax.data import decoding
from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.filters import Candidate, Filter, first_reason
from lidit_jax.data.index import MAX_PIXELS
from lidit_jax.data.sample import Sample, Unusable
from lidit_jax.data.sources import BrokenExample, Example, described, read_picture
from lidit_jax.data.tar_shards import TarShards
from lidit_jax.errors import UserError

# Of a shard, in bytes: what a resumed stream may have to walk through again to find its place.
PART = 1 << 26
SPARES = 100  # samples that may take the place of one whose picture is found broken, at the most


class Entry(NamedTuple):
    """A sample that is worth training on.

    Attributes:
      epoch: of its stream.
      place: shard, first and last byte.
      group: index of the bucket that is nearest to it in aspect.
      size: height and width in pixels.
      sample: its picture is in memory.
    """

    epoch: int
    place: tuple[int, int, int]
    group: int
    size: tuple[int, int]
    sample: Sample


@dataclasses.dataclass
class Seen:
    """What was met while reading.

    Attributes:
      read: number of samples.
      broken: (shard, reason) of those that cannot be used.
      dropped: how many the filters dropped, by reason.
      borrowed: how many were put into a group beside their own, because theirs had too many and that too few.
    """

    read: int = 0
    broken: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    borrowed: int = 0

    def add(self, other: "Seen") -> None:
        self.read += other.read
        self.broken += other.broken
        self.dropped += other.dropped
        self.borrowed += other.borrowed


@dataclasses.dataclass(frozen=True)
class Reading:
    """How samples of shards are read; what all streams of a source have in common.

    Attributes:
      buckets: the groups there are.
      filters: what they drop is left out.
    """

    shards: TarShards
    buckets: tuple[Bucket, ...]
    filters: tuple[Filter, ...] = ()
    max_pixels: int = MAX_PIXELS

    def look(
        self, epoch: int, place: tuple[int, int, int], sample: Sample, seen: Seen, with_picture: bool = True
    ) -> Entry | None:
        """None for what is left out; `seen` says why. Without its picture, no more than the header is read."""
        try:
            size = decoding.read_size(sample.picture, self.max_pixels)
        except decoding.BrokenPicture as error:
            seen.broken.append((self.shards.paths[place[0]], str(error)))
            return None
        reason = first_reason(Candidate(sample.captions, sample.metadata, *size), self.filters)
        if reason is not None:
            seen.dropped[reason] += 1
            return None
        sample.picture.seek(0)
        sample = sample._replace(picture=io.BytesIO(sample.picture.read() if with_picture else b""))
        return Entry(epoch, place, int(assign(np.array([size]), self.buckets)[0]), size, sample)

    def load(self, entry: Entry, bucket: Bucket | None) -> Example | BrokenExample:
        """Args: bucket: the picture is fitted to it; None: without a picture."""
        sample = entry.sample
        if bucket is None:
            return described(sample)
        image = read_picture(sample.key, sample.picture.getvalue(), self.max_pixels, entry.size, bucket)
        return image if isinstance(image, BrokenExample) else described(sample) | {"image": image}

    def read_again(self, entries: Sequence[tuple[int, int, int, int]]) -> list[Entry]:
        """(epoch, *place) each -> the entry.

        Raises:
          UserError: it is no longer there.
        """
        samples = self.shards.read([tuple(place) for _, *place in entries])
        found = []
        for (epoch, *place), sample in zip(entries, samples, strict=True):
            entry = None if isinstance(sample, Unusable) else self.look(epoch, tuple(place), sample, Seen())
            if entry is None:
                raise UserError(
                    f"{self.shards.paths[place[0]]!r} changed since the checkpoint was written: restore it, or start a "
                    "new workdir"
                )
            found.append(entry)
        return found


class SampleStream:
    """Endless: the samples of some shards; in each epoch every shard once, from end to end, in another order."""

    def __init__(self, reading: Reading, shards: Sequence[int], seed: tuple[int, ...]):
        self._reading, self._shards, self._seed = reading, tuple(shards), seed
        self._epoch = self._nth = self._start = self._taken = 0
        self._order = shuffled(len(self._shards), *seed, 0)
        self._items: Iterator | None = None
        self._found_in_epoch = False

    @property
    def state(self) -> list[int]:
        """Epoch, how many of its shards are done, where the part of the present one begins, samples taken of it."""
        return [self._epoch, self._nth, self._start, self._taken]

    @state.setter
    def state(self, state: Sequence[int]) -> None:
        self._epoch, self._nth, self._start, self._taken = map(int, state)
        self._order = shuffled(len(self._shards), *self._seed, self._epoch)
        self._items, self._found_in_epoch = None, True

    def next(self, seen: Seen) -> Entry:
        """The next sample to train on; what is passed over is in `seen`.

        Raises:
          UserError: an epoch of the shards had none, or one cannot be read.
        """
        while True:
            entry = self._step(seen)
            if entry is not None:
                self._found_in_epoch = True
                return entry

    def _step(self, seen: Seen) -> Entry | None:
        shard = self._shards[self._order[self._nth]]
        if self._items is None:
            self._items = self._reading.shards.scan(shard, self._start, PART)
            for _ in range(self._taken):
                next(self._items)
        try:
            found = next(self._items)
        except StopIteration as end:
            self._go_on(end.value)
            return None
        self._taken += 1
        seen.read += 1
        if isinstance(found, str):
            seen.broken.append((self._reading.shards.paths[shard], found))
            return None
        place, sample = found
        return self._reading.look(self._epoch, (shard, *place), sample, seen)

    def _go_on(self, start: int | None) -> None:
        """To the next part, which begins there, or the next shard."""
        self._items, self._taken, self._start = None, 0, start or 0
        if start is None:
            self._nth += 1
        if self._nth == len(self._shards):
            if not self._found_in_epoch:
                first = self._reading.shards.paths[self._shards[0]]
                more = f" and {len(self._shards) - 1} more" if len(self._shards) > 1 else ""
                raise UserError(
                    f"no sample of {first!r}{more} can be used: loosen the filters, or lower --config.data.streams"
                )
            self._nth, self._epoch, self._found_in_epoch = 0, self._epoch + 1, False
            self._order = shuffled(len(self._shards), *self._seed, self._epoch)


class GroupingBuffer:
    """Samples of a stream that wait for a batch of their group, of each group in random order.

    It is kept full at least, and nothing is lost: where a group has too few, samples of the groups nearest in aspect
    are taken. Of a group, all samples of an epoch come before those of the next.
    """

    def __init__(self, stream: SampleStream, buckets: Sequence[Bucket], capacity: int, seed: tuple[int, ...]):
        self._stream, self._capacity, self._seed = stream, capacity, seed
        self._aspects = np.log([bucket.width / bucket.height for bucket in buckets])
        self._entries: tuple[Entry, ...] = ()

    def take(self, bucket: int, count: int, batch: int, seen: Seen) -> tuple[list[Entry], list[Entry]]:
        """Args: bucket: the batch's group, an index.

        Returns:
          `count` samples; and some to take the place of broken ones, which stay here.
        """
        entries = list(self._entries)
        while len(entries) < max(self._capacity, count):
            entries.append(self._stream.next(seen))
        groups, epochs = (np.array([getattr(entry, name) for entry in entries]) for name in ("group", "epoch"))
        order = shuffled(len(entries), *self._seed, batch)
        distances = np.abs(self._aspects[groups] - self._aspects[bucket])
        order = order[np.lexsort((epochs[order], distances[order]))]  # stable: otherwise as shuffled
        chosen, others = order[:count], order[count : count + SPARES]
        seen.borrowed += int((groups[chosen] != bucket).sum())
        taken = set(chosen.tolist())
        self._entries = tuple(entry for i, entry in enumerate(entries) if i not in taken)
        return [entries[i] for i in chosen], [entries[i] for i in others]

    def read_on(self, seen: Seen) -> Entry:
        """The stream's next sample, which waits here all the same."""
        entry = self._stream.next(seen)
        self._entries += (entry,)
        return entry

    def snapshot(self) -> "Snapshot":
        return Snapshot(self._stream.state, self._entries)

    def restore(self, reading: Reading, stream: Sequence[int], entries: Sequence[tuple[int, int, int, int]]) -> None:
        """From a snapshot's JSON. Raises UserError where the shards changed."""
        self._stream.state = stream
        self._entries = tuple(reading.read_again(entries))


class Snapshot(NamedTuple):
    """A stream's place and what waits in its buffer; nothing of it is changed afterwards."""

    stream: list[int]
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        return {"stream": self.stream, "buffer": [(entry.epoch, *entry.place) for entry in self.entries]}

    def __deepcopy__(self, memo: dict) -> "Snapshot":
        return self  # grain copies the states of what it prefetches: the pictures need not be


def shuffled(count: int, *seed: int) -> np.ndarray:
    """A permutation of range(count). From raw bits, which numpy promises never to change."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")
