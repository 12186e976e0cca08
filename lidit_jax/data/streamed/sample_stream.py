"""Streams of samples in the order of their shards, without an index, and the buffers that shuffle and bucket them.

A stream has some of the shards and reads them one after the other, from end to end, epoch after epoch; its state is a
position in a shard. Samples wait in a buffer until a batch of their bucket takes them.
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
# Length of a section of a shard in bytes: a resumed stream scans at most one section again to find its position.
PART = 1 << 26
_READ_AT_ONCE = 16  # number of samples, when a buffer is restored
# Limit for an encoded image: four uncompressed 16-bit channels, plus metadata.
_BYTES_A_PIXEL, _MORE_BYTES = 8, 1 << 20
Waiting = tuple[int, int, int, int]  # epoch, shard, first byte and end of a sample in a buffer
SPARES = 100  # most samples that are tried to replace one with a broken image


class Entry(NamedTuple):
    """A sample that passed the filters.

    Attributes:
      epoch: epoch of its stream in which it was read.
      place: shard, first byte and end.
      group: index of the bucket with the nearest aspect ratio.
      size: height and width in pixels.
      sample: the sample, with its encoded image in memory.
    """

    epoch: int
    place: tuple[int, int, int]
    group: int
    size: tuple[int, int]
    sample: Sample


@dataclasses.dataclass
class Seen:
    """Statistics of reading.

    Attributes:
      read: number of samples read.
      broken: (path of the shard or key of the sample, reason) of each unusable one.
      dropped: number of samples that filters dropped, by reason.
      borrowed: number of samples used in another bucket than their own, which had too few samples.
    """

    read: int = 0
    broken: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    borrowed: int = 0

    def add(self, other: "Seen") -> None:
        """Adds the statistics of `other`."""
        self.read += other.read
        self.broken += other.broken
        self.dropped += other.dropped
        self.borrowed += other.borrowed


@dataclasses.dataclass(frozen=True)
class Reading:
    """Reads and checks samples of shards; shared by all streams of a source.

    Attributes:
      shards: the shards of the source.
      buckets: the buckets.
      filters: filters that samples must pass.
      max_pixels: larger images count as broken.
    """

    shards: TarShards
    buckets: tuple[Bucket, ...]
    filters: tuple[Filter, ...] = ()
    max_pixels: int = MAX_PIXELS

    def look(
        self, epoch: int, place: tuple[int, int, int], sample: Sample, seen: Seen, with_picture: bool = True
    ) -> Entry | None:
        """Checks a sample.

        Args:
          epoch: epoch of its stream.
          place: shard, first byte and end.
          sample: the sample, with its image at the start.
          seen: statistics, to which the reason for leaving it out is added.
          with_picture: if False, read only the header of the image.

        Returns:
          The entry, or None for a sample to leave out.
        """
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
        """Returns the example of an entry, with its image resized to `bucket`, or without an image if that is None."""
        sample = entry.sample
        if bucket is None:
            return described(sample)
        image = read_picture(sample.key, sample.picture.getvalue(), self.max_pixels, entry.size, bucket)
        return image if isinstance(image, BrokenExample) else described(sample) | {"image": image}

    def read_again(self, entries: Sequence["Waiting"]) -> list[Entry | None]:
        """Reads samples again by their places; returns None for those that can no longer be read."""
        found: list[Entry | None] = []
        for start in range(0, len(entries), _READ_AT_ONCE):
            part = entries[start : start + _READ_AT_ONCE]
            for (epoch, *place), sample in zip(part, self.shards.read([place for _, *place in part]), strict=True):
                usable = not isinstance(sample, Unusable)
                found.append(self.look(epoch, tuple(place), sample, Seen()) if usable else None)
        return found


class Cursor(NamedTuple):
    """Position of a stream.

    Attributes:
      lender: index of the list of shards that it reads; 0: its own.
      epoch: number of epochs completed.
      nth: number of shards completed in the current epoch.
      start: offset of the current section of the current shard, in bytes.
      taken: number of samples, usable or not, read from that section.
      found: 1 if the current epoch has had a usable sample, else 0.
    """

    lender: int = 0
    epoch: int = 0
    nth: int = 0
    start: int = 0
    taken: int = 0
    found: int = 0


class SampleStream:
    """Endless stream of the samples of some shards; each epoch reads every shard once, in a new order.

    If an epoch has no usable sample, for example because all of its shards are damaged, the stream reads the shards of
    another stream from then on.
    """

    def __init__(self, reading: Reading, shards: Sequence[Sequence[int]], seed: tuple[int, ...]):
        """Begins at the first sample.

        Args:
          reading: reads and checks samples.
          shards: lists of shards: the stream's own, then those of other streams that it may borrow.
          seed: seed of the order of the shards.
        """
        self._reading, self._shards, self._seed = reading, shards, seed
        self.cursor = Cursor()

    @property
    def cursor(self) -> Cursor:
        """Position of the stream, which a checkpoint saves and restores."""
        return self._cursor

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        """Moves to a position.

        Raises:
          UserError: the position does not exist.
        """
        if not 0 <= cursor.lender < len(self._shards) or not 0 <= cursor.nth < len(self._shards[cursor.lender]):
            raise UserError(f"the checkpoint's position in the data is damaged (no such place: {cursor})")
        self._cursor, self._items = cursor, None
        shards = self._shards[cursor.lender]
        self._shard = shards[shuffled(len(shards), *self._seed, cursor.epoch)[cursor.nth]]

    def next(self, seen: Seen) -> Entry:
        """Returns the next usable sample, and adds those skipped to the statistics `seen`.

        Raises:
          UserError: no list of shards has had a usable sample, or a shard cannot be read.
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
        """Moves to the next section, which begins at `start`, or, if that is None, to the next shard."""
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
    """Shuffle buffer: samples of a stream wait here until a batch of their bucket takes them, in random order.

    The buffer is filled at least to its capacity before each batch, and no sample is lost: if a bucket has too few
    samples, those of the buckets with the nearest aspect ratio are taken. Within a bucket, all samples of an epoch come
    before those of the next one.
    """

    def __init__(
        self,
        stream: SampleStream,
        buckets: Sequence[Bucket],
        capacity: int,
        seed: tuple[int, ...],
        allow_enlarging: bool = True,
    ):
        """Creates an empty buffer.

        Args:
          stream: stream that fills the buffer.
          buckets: the buckets.
          capacity: number of samples to hold.
          seed: seed of the order.
          allow_enlarging: if False, take samples that would have to be enlarged only if there are no others.
        """
        self._stream, self._capacity, self._seed = stream, capacity, seed
        self._buckets = None if allow_enlarging else np.array(buckets)
        self._aspects = np.log([bucket.width / bucket.height for bucket in buckets])
        self._entries: tuple[Entry, ...] = ()

    def take(self, bucket: int, count: int, batch: int, seen: Seen) -> tuple[list[Entry], list[Entry]]:
        """Takes the samples of a batch.

        Args:
          bucket: index of the batch's bucket.
          count: number of samples.
          batch: number of the batch, which is mixed into the seed.
          seen: statistics to update.

        Returns:
          `count` samples, removed from the buffer; and up to `SPARES` samples that may replace broken ones and stay in
          the buffer.
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
        order = order[np.lexsort((epochs[order], distances[order]))]  # a stable sort, so ties keep the shuffled order
        chosen, others = order[:count], order[count : count + SPARES]
        seen.borrowed += int((groups[chosen] != bucket).sum())
        taken = set(chosen.tolist())
        self._entries = tuple(entry for i, entry in enumerate(entries) if i not in taken)
        return [entries[i] for i in chosen], [entries[i] for i in others]

    def read_on(self, seen: Seen) -> Entry:
        """Returns the next sample of the stream, after adding it to the buffer."""
        entry = self._stream.next(seen)
        self._entries += (entry,)
        return entry

    def snapshot(self) -> "Snapshot":
        """Returns the position of the stream and the places of the samples in the buffer."""
        return Snapshot(self._stream.cursor, tuple((entry.epoch, *entry.place) for entry in self._entries))

    def restore(self, reading: Reading, snapshot: "Snapshot") -> None:
        """Resumes from a snapshot.

        Raises:
          UserError: the shards have changed, or the position does not exist.
        """
        self._stream.cursor = snapshot.cursor
        entries = reading.read_again(snapshot.entries)
        if None in entries:
            raise UserError(f"{reading.shards.paths[snapshot.entries[entries.index(None)][1]]!r} {CHANGED}")
        self._entries = tuple(entries)


class Snapshot(NamedTuple):
    """Immutable position of a stream and places of the samples in its buffer."""

    cursor: Cursor
    entries: tuple[Waiting, ...]

    def to_json(self) -> dict[str, Any]:
        """Encodes the snapshot for a checkpoint."""
        return {"stream": list(self.cursor), "buffer": [list(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, value: Any, num_shards: int) -> "Snapshot":
        """Decodes what `to_json` returned.

        Raises:
          ValueError: the value is malformed or out of bounds.
        """
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
        return self  # immutable; grain copies the states of prefetched iterators


def shuffled(count: int, *seed: int) -> np.ndarray:
    """Returns a permutation of range(count), from raw bits, which NumPy guarantees never to change."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")
