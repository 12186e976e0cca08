"""Samples in the order in which their shards hold them, without an index; and a buffer that shuffles and groups them.

A stream has some of the shards and reads them one after the other, from end to end, epoch after epoch; its state is a
place in a shard. What it reads waits in a buffer until a batch of its group comes.
"""

import collections
import dataclasses
import io
import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.filters import Candidate, Filter, first_reason
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.shards import Sample, Unusable
from lidit_jax.data.formats.tar_shards import MAX_SAMPLE_BYTES, TarShards
from lidit_jax.data.indexed.index import MAX_PIXELS
from lidit_jax.data.sources import BrokenExample, Example, described, read_picture
from lidit_jax.errors import UserError

_log = logging.getLogger(__name__)

CHANGED = "changed since the checkpoint was written: restore it, or start a new workdir"
# Of a shard, in bytes: what a resumed stream may have to walk through again to find its place.
PART = 1 << 26
_READ_AT_ONCE = 16  # samples, when a buffer is filled again
# Sixteen bits of four channels, uncompressed, and notes.
_BYTES_A_PIXEL, _MORE_BYTES = 8, 1 << 20
Waiting = tuple[int, int, int, int]  # epoch and place of what is in a buffer
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
        encoded = sample.picture.seek(0, io.SEEK_END)
        if encoded > _BYTES_A_PIXEL * size[0] * size[1] + _MORE_BYTES:  # it would wait in memory
            seen.broken.append((self.shards.paths[place[0]], "picture file far larger than its pixels"))
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

    def read_again(self, entries: Sequence["Waiting"]) -> list[Entry | None]:
        """None for what is no longer there."""
        found: list[Entry | None] = []
        for start in range(0, len(entries), _READ_AT_ONCE):
            part = entries[start : start + _READ_AT_ONCE]
            for (epoch, *place), sample in zip(part, self.shards.read([place for _, *place in part]), strict=True):
                usable = not isinstance(sample, Unusable)
                found.append(self.look(epoch, tuple(place), sample, Seen()) if usable else None)
        return found


class Cursor(NamedTuple):
    """Where a stream is.

    Attributes:
      lender: whose shards it reads; 0: its own.
      epoch, nth: how many epochs, and how many of the present one's shards, are done.
      start: where the part of the present shard begins.
      taken: samples taken of it.
      found: whether the present epoch had something to train on, 0 or 1.
    """

    lender: int = 0
    epoch: int = 0
    nth: int = 0
    start: int = 0
    taken: int = 0
    found: int = 0


class SampleStream:
    """Endless: the samples of some shards; in each epoch every shard once, from end to end, in another order.

    Where an epoch has nothing to train on, all its shards being damaged, say, the stream reads another's from then on.
    """

    def __init__(self, reading: Reading, shards: Sequence[Sequence[int]], seed: tuple[int, ...]):
        """Args: shards: its own, then those that it may borrow."""
        self._reading, self._shards, self._seed = reading, shards, seed
        self.cursor = Cursor()

    @property
    def cursor(self) -> Cursor:
        return self._cursor

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        """Goes there.

        Raises:
          UserError: there is no such place.
        """
        if not 0 <= cursor.lender < len(self._shards) or not 0 <= cursor.nth < len(self._shards[cursor.lender]):
            raise UserError(f"the checkpoint's position in the data is damaged (no such place: {cursor})")
        self._cursor, self._items = cursor, None
        shards = self._shards[cursor.lender]
        self._shard = shards[shuffled(len(shards), *self._seed, cursor.epoch)[cursor.nth]]

    def next(self, seen: Seen) -> Entry:
        """The next sample to train on; what is passed over is in `seen`.

        Raises:
          UserError: an epoch of the shards had none, or one cannot be read.
        """
        while True:
            entry = self._step(seen)
            if entry is not None:
                self._cursor = self._cursor._replace(found=1)
                return entry

    def _step(self, seen: Seen) -> Entry | None:
        cursor, shard, path = self._cursor, self._shard, self._reading.shards.paths[self._shard]
        if self._items is None:
            self._items = self._reading.shards.scan(shard, cursor.start, PART)
            if sum(1 for _ in itertools.islice(self._items, cursor.taken)) < cursor.taken:
                raise UserError(f"{path!r} {CHANGED}")
        try:
            found = next(self._items)
        except StopIteration as end:
            self._go_on(end.value)
            return None
        self._cursor = cursor._replace(taken=cursor.taken + 1)
        seen.read += 1
        if isinstance(found, str):
            seen.broken.append((path, found))
            return None
        place, sample = found
        return self._reading.look(cursor.epoch, (shard, *place), sample, seen)

    def _go_on(self, start: int | None) -> None:
        """To the next part, which begins there, or the next shard."""
        cursor = self._cursor
        if start is not None:
            cursor = cursor._replace(start=start, taken=0)
        elif cursor.nth + 1 < len(self._shards[cursor.lender]):
            cursor = cursor._replace(nth=cursor.nth + 1, start=0, taken=0)
        else:
            cursor = Cursor(cursor.lender if cursor.found else self._next_lender(), cursor.epoch + 1)
        self.cursor = cursor

    def _next_lender(self) -> int:
        first = self._reading.shards.paths[self._shards[self._cursor.lender][0]]
        more = f" and {count - 1} more" if (count := len(self._shards[self._cursor.lender])) > 1 else ""
        if self._cursor.lender + 1 == len(self._shards):
            raise UserError(f"no sample can be used, last of {first!r}{more}: mend the data, or loosen the filters")
        _log.warning("no sample of %r%s can be used: others take their place", first, more)
        return self._cursor.lender + 1


class GroupingBuffer:
    """Samples of a stream that wait for a batch of their group, of each group in random order.

    It is kept full at least, and nothing is lost: where a group has too few, samples of the groups nearest in aspect
    are taken. Of a group, all samples of an epoch come before those of the next.
    """

    def __init__(
        self,
        stream: SampleStream,
        buckets: Sequence[Bucket],
        capacity: int,
        seed: tuple[int, ...],
        allow_enlarging: bool = True,
    ):
        """Args: allow_enlarging: False takes pictures that would have to be enlarged last."""
        self._stream, self._capacity, self._seed = stream, capacity, seed
        self._buckets = None if allow_enlarging else np.array(buckets)
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
        if self._buckets is not None:
            sizes = np.array([entry.size for entry in entries])
            distances = np.where((sizes < self._buckets[bucket]).any(1), np.inf, distances)
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
        return Snapshot(self._stream.cursor, tuple((entry.epoch, *entry.place) for entry in self._entries))

    def restore(self, reading: Reading, snapshot: "Snapshot") -> None:
        """Goes on from there.

        Raises:
          UserError: the shards changed, or there is no such place.
        """
        self._stream.cursor = snapshot.cursor
        entries = reading.read_again(snapshot.entries)
        if None in entries:
            raise UserError(f"{reading.shards.paths[snapshot.entries[entries.index(None)][1]]!r} {CHANGED}")
        self._entries = tuple(entries)


class Snapshot(NamedTuple):
    """A stream's place and what waits in its buffer; nothing of it is changed afterwards."""

    cursor: Cursor
    entries: tuple[Waiting, ...]

    def to_json(self) -> dict[str, Any]:
        return {"stream": list(self.cursor), "buffer": [list(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, value: Any, num_shards: int) -> "Snapshot":
        """Raises ValueError for what `to_json` cannot have given."""
        try:
            cursor = Cursor(*value["stream"])
            entries = tuple((epoch, shard, start, end) for epoch, shard, start, end in value["buffer"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"no snapshot: {error!r}") from error
        if not all(type(number) is int and 0 <= number < 1 << 62 for one in (cursor, *entries) for number in one):
            raise ValueError("no numbers")
        for _, shard, start, end in entries:
            if shard >= num_shards or not start < end <= start + MAX_SAMPLE_BYTES:
                raise ValueError("no such sample")
        return cls(cursor, entries)

    def __deepcopy__(self, memo: dict) -> "Snapshot":
        return self  # grain copies the states of what it prefetches


def shuffled(count: int, *seed: int) -> np.ndarray:
    """A permutation of range(count). From raw bits, which numpy promises never to change."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")
