"""Streams of samples in the order of their shards, without an index, and the buffers that shuffle and bucket them.

A stream has some of the shards and reads them one after the other, from end to end, epoch after epoch; its state is a
position in a shard. Samples wait in a buffer until a batch of their bucket takes them.
"""

import collections
import dataclasses
import io
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.filters import Candidate, Filter, first_reason
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.shards import Sample, SequentialShards, Unusable
from lidit_jax.data.formats.tar_shards import MAX_SAMPLE_BYTES
from lidit_jax.data.indexed.index import MAX_PIXELS
from lidit_jax.data.prompt_lengths import StreamedPromptLengths
from lidit_jax.data.sources import BrokenExample, Example, decode_to_bucket, without_image
from lidit_jax.errors import UserError

_log = logging.getLogger(__name__)

CHANGED = "changed since the checkpoint was written: restore the file, or start a new workdir"
# Length of a section of a shard in bytes: a resumed stream scans at most one section again to find its position.
SECTION_BYTES = 1 << 26
_RESTORE_BATCH = 16  # number of samples, when a buffer is restored
# A larger encoded image does not wait in memory: four uncompressed 16-bit channels, plus metadata.
_BYTES_PER_PIXEL, _EXTRA_BYTES = 8, 1 << 20
BufferedPlace = tuple[int, int, int, int]  # epoch, shard, first byte and end of a sample in a buffer
_SEED_CAPTION = 6  # mixed into the seed; `StreamLoader` and `BatchSchedule` use the numbers before
_READ_AHEAD = 4  # most samples in a buffer that lacks prompts of a batch's length, as a multiple of its capacity
MAX_REPLACEMENTS = 100  # most samples that are tried to replace one with a broken image


class Entry(NamedTuple):
    """A sample that passed the filters.

    Attributes:
      epoch: epoch of its stream in which it was read.
      place: shard, first byte and end.
      bucket: index of the bucket with the nearest aspect ratio.
      size: height and width in pixels.
      sample: the sample; its encoded image is in memory, or empty if it is far larger than its pixels and has to be
        read again.
      caption: name of the caption that is used; None if it is sampled later.
      length: index of the length that its prompt is padded to; 0 if there is one.
    """

    epoch: int
    place: tuple[int, int, int]
    bucket: int
    size: tuple[int, int]
    sample: Sample
    caption: str | None = None
    length: int = 0


@dataclasses.dataclass(frozen=True)
class CaptionPlan:
    """Chooses the caption of a sample when it is read, so that its length is known before its batch.

    Attributes:
      chooser: samples captions, without dropout.
      lengths: the lengths that prompts are padded to.
      seed: of the choice, beside the sample's epoch and place.
    """

    chooser: CaptionChooser
    lengths: StreamedPromptLengths
    seed: int

    def __call__(self, epoch: int, place: tuple[int, int, int], captions: Mapping[str, str]) -> tuple[str, int]:
        """Returns the name of the caption to use, and the index of its length."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, _SEED_CAPTION, epoch, *place))))
        name, text = self.chooser.sample(captions, rng)
        assert name is not None  # there is no dropout
        return name, int(self.lengths.indices(self.lengths.count_tokens([text]))[0])


@dataclasses.dataclass
class ReadStatistics:
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

    def add(self, other: "ReadStatistics") -> None:
        """Adds the statistics of `other`."""
        self.read += other.read
        self.broken += other.broken
        self.dropped += other.dropped
        self.borrowed += other.borrowed


@dataclasses.dataclass(frozen=True)
class SampleReader:
    """Reads and checks samples of shards; shared by all streams of a source.

    Attributes:
      shards: the shards of the source.
      buckets: the buckets.
      filters: filters that samples must pass.
      max_pixels: larger images count as broken.
      captions: chooses the captions; None if they are sampled later.
    """

    shards: SequentialShards
    buckets: tuple[Bucket, ...]
    filters: tuple[Filter, ...] = ()
    max_pixels: int = MAX_PIXELS
    captions: CaptionPlan | None = None

    def check(
        self,
        epoch: int,
        place: tuple[int, int, int],
        sample: Sample,
        statistics: ReadStatistics,
        with_image: bool = True,
    ) -> Entry | None:
        """Checks a sample.

        Args:
          epoch: epoch of its stream.
          place: shard, first byte and end.
          sample: the sample, with its image at the start.
          statistics: updated with the reason for leaving the sample out.
          with_image: if False, read only the header of the image.

        Returns:
          The entry, or None for a sample to leave out.
        """
        try:
            size = decoding.read_size(sample.image, self.max_pixels)
        except decoding.BrokenImage as error:
            statistics.broken.append((self.shards.paths[place[0]], str(error)))
            return None
        reason = first_reason(Candidate(sample.captions, sample.metadata, *size), self.filters)
        if reason is not None:
            statistics.dropped[reason] += 1
            return None
        num_bytes = sample.image.seek(0, io.SEEK_END)
        with_image &= num_bytes <= _BYTES_PER_PIXEL * size[0] * size[1] + _EXTRA_BYTES
        sample.image.seek(0)
        sample = sample._replace(image=io.BytesIO(sample.image.read() if with_image else b""))
        caption, length = self.captions(epoch, place, sample.captions) if self.captions else (None, 0)
        return Entry(epoch, place, int(assign(np.array([size]), self.buckets)[0]), size, sample, caption, length)

    def load(self, entry: Entry, bucket: Bucket | None) -> Example | BrokenExample:
        """Returns the example of an entry, with its image resized to `bucket`, or without an image if that is None.

        If captions are chosen when a sample is read, the example has the name of its own as "caption".
        """
        sample = entry.sample
        example = without_image(sample) | ({"caption": entry.caption} if self.captions else {})
        if bucket is None:
            return example
        encoded = sample.image.getvalue()
        if not encoded:
            [again] = self.shards.read([entry.place])
            if isinstance(again, Unusable):
                return BrokenExample(sample.key, str(again))
            encoded = again.image.read()
        image = decode_to_bucket(sample.key, encoded, self.max_pixels, entry.size, bucket)
        return image if isinstance(image, BrokenExample) else example | {"image": image}

    def read_again(self, entries: Sequence["BufferedPlace"]) -> list[Entry | None]:
        """Reads samples again by their places; returns None for those that can no longer be read."""
        found: list[Entry | None] = []
        for start in range(0, len(entries), _RESTORE_BATCH):
            chunk = entries[start : start + _RESTORE_BATCH]
            for (epoch, *place), sample in zip(chunk, self.shards.read([place for _, *place in chunk]), strict=True):
                usable = not isinstance(sample, Unusable)
                found.append(self.check(epoch, tuple(place), sample, ReadStatistics()) if usable else None)
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

    def __init__(self, reader: SampleReader, shards: Sequence[Sequence[int]], seed: tuple[int, ...]):
        """Begins at the first sample.

        Args:
          reader: reads and checks samples.
          shards: lists of shards: the stream's own, then those of other streams that it may borrow.
          seed: seed of the order of the shards.
        """
        self._reader, self._shards, self._seed = reader, shards, seed
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
            raise UserError(f"the checkpoint's position in the data is damaged (invalid {cursor})")
        self._cursor, self._items = cursor, None
        shards = self._shards[cursor.lender]
        self._shard = shards[shuffled(len(shards), *self._seed, cursor.epoch)[cursor.nth]]

    def next(self, statistics: ReadStatistics) -> Entry:
        """Returns the next usable sample, and adds those skipped to `statistics`.

        Raises:
          UserError: no list of shards has had a usable sample, or a shard cannot be read.
        """
        while True:
            entry = self._read_next(statistics)
            if entry is not None:
                self._cursor = self._cursor._replace(found=1)
                return entry

    def _read_next(self, statistics: ReadStatistics) -> Entry | None:
        cursor, shard, path = self._cursor, self._shard, self._reader.shards.paths[self._shard]
        if self._items is None:
            self._items = self._reader.shards.scan(shard, cursor.start, SECTION_BYTES)
            if sum(1 for _ in itertools.islice(self._items, cursor.taken)) < cursor.taken:
                raise UserError(f"{path!r} {CHANGED}")
        try:
            found = next(self._items)
        except StopIteration as end:
            self._advance(end.value)
            return None
        self._cursor = cursor._replace(taken=cursor.taken + 1)
        statistics.read += 1
        if isinstance(found, str):
            statistics.broken.append((path, found))
            return None
        place, sample = found
        return self._reader.check(cursor.epoch, (shard, *place), sample, statistics)

    def _advance(self, start: int | None) -> None:
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
        first = self._reader.shards.paths[self._shards[self._cursor.lender][0]]
        more = f" and {count - 1} more" if (count := len(self._shards[self._cursor.lender])) > 1 else ""
        if self._cursor.lender + 1 == len(self._shards):
            raise UserError(f"no usable sample, last in {first!r}{more}: fix the data, or loosen the filters")
        _log.warning("no usable sample in %r%s: reading other shards instead", first, more)
        return self._cursor.lender + 1


class ShuffleBuffer:
    """Shuffle buffer: samples of a stream wait here until a batch of their bucket takes them, in random order.

    The buffer is filled at least to its capacity before each batch, and no sample is lost: if a bucket has too few
    samples, those of the buckets with the nearest aspect ratio are taken. Within a bucket, all samples of an epoch come
    before those of the next one. With several prompt lengths, a batch takes prompts of its own length, then shorter
    ones; longer ones, which are truncated, only if the next `_READ_AHEAD` times the capacity brings too few others.
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

    def take(
        self, bucket: int, length: int, count: int, batch: int, statistics: ReadStatistics
    ) -> tuple[list[Entry], list[Entry]]:
        """Takes the samples of a batch.

        Args:
          bucket: index of the batch's bucket.
          length: index of the batch's prompt length.
          count: number of samples.
          batch: number of the batch, which is mixed into the seed.
          statistics: updated in place.

        Returns:
          `count` samples, removed from the buffer; and up to `MAX_REPLACEMENTS` samples that may replace broken ones
          and stay in the buffer.
        """
        entries = list(self._entries)
        fitting = sum(entry.length <= length for entry in entries)
        while len(entries) < max(self._capacity, count) or (
            fitting < count and len(entries) < _READ_AHEAD * max(self._capacity, count)
        ):
            entries.append(self._stream.next(statistics))
            fitting += entries[-1].length <= length
        buckets, epochs, lengths = (
            np.array([getattr(entry, name) for entry in entries]) for name in ("bucket", "epoch", "length")
        )
        order = shuffled(len(entries), *self._seed, batch)
        distances = np.abs(self._aspects[buckets] - self._aspects[bucket])
        excess = np.maximum(lengths - length, 0)  # above 0: prompts that would be truncated
        missing = np.maximum(length - lengths, 0)
        if self._buckets is not None:
            sizes = np.array([entry.size for entry in entries])
            distances = np.where((sizes < self._buckets[bucket]).any(1), np.inf, distances)
        keys = (epochs, missing, distances, excess)  # the last is the first to sort by
        order = order[np.lexsort([key[order] for key in keys])]  # a stable sort, so ties keep the shuffled order
        chosen, others = order[:count], order[count : count + MAX_REPLACEMENTS]
        statistics.borrowed += int(((buckets[chosen] != bucket) | (lengths[chosen] != length)).sum())
        taken = set(chosen.tolist())
        self._entries = tuple(entry for i, entry in enumerate(entries) if i not in taken)
        return [entries[i] for i in chosen], [entries[i] for i in others]

    def read_replacement(self, statistics: ReadStatistics) -> Entry:
        """Returns the next sample of the stream, after adding it to the buffer."""
        entry = self._stream.next(statistics)
        self._entries += (entry,)
        return entry

    def snapshot(self) -> "Snapshot":
        """Returns the position of the stream and the places of the samples in the buffer."""
        return Snapshot(self._stream.cursor, tuple((entry.epoch, *entry.place) for entry in self._entries))

    def restore(self, reader: SampleReader, snapshot: "Snapshot") -> None:
        """Resumes from a snapshot.

        Raises:
          UserError: the shards have changed, or the position does not exist.
        """
        self._stream.cursor = snapshot.cursor
        entries = reader.read_again(snapshot.entries)
        if None in entries:
            raise UserError(f"{reader.shards.paths[snapshot.entries[entries.index(None)][1]]!r} {CHANGED}")
        self._entries = tuple(entries)


class Snapshot(NamedTuple):
    """Immutable position of a stream and places of the samples in its buffer."""

    cursor: Cursor
    entries: tuple[BufferedPlace, ...]

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
            raise ValueError(f"not a snapshot: {error!r}") from error
        if not all(type(number) is int and 0 <= number < 1 << 62 for one in (cursor, *entries) for number in one):
            raise ValueError("a number is out of bounds")
        for _, shard, start, end in entries:
            if shard >= num_shards or not start < end <= start + MAX_SAMPLE_BYTES:
                raise ValueError("a sample is out of bounds")
        return cls(cursor, entries)

    def __deepcopy__(self, memo: dict) -> "Snapshot":
        return self  # immutable; grain copies the states of prefetched iterators


def shuffled(count: int, *seed: int) -> np.ndarray:
    """Returns a permutation of range(count), from raw bits, which NumPy guarantees never to change."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")
