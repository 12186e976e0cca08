"""Computes the examples of batch k as a pure function of k: any batch is found without computing earlier ones."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from grain.experimental import index_shuffle

from lidit_jax.data.shared_array import SharedArray

_CIPHER_ROUNDS = 4  # of the cipher behind grain's index_shuffle; grain's own default
# The cipher works on at least 16 bits and repeats until its value is a valid index: 20,000 steps per index for a bucket
# of 3 examples.
_MIN_CIPHER_SIZE = 1 << 16
_JITTER_STEPS = 1 << 20
# grain's index_shuffle works on 32 bits and wraps around silently beyond them.
_MAX_BUCKET_SIZE = 1 << 32


class Interleaving:
    """Endless sequence of choices in given shares, with random access to its elements.

    The m-th occurrence of choice c, whose share is s_c, has the time (m + u) / s_c, with u in [0, 1) derived from the
    seed, c and m; elements are numbered in order of time. After k elements, the count of each choice differs from its
    share of k by at most the number of choices.
    """

    def __init__(self, periods: Mapping[int, float], seed: int, *purpose: int):
        """Initializes the sequence.

        Args:
          periods: 1 / share of each choice; the shares sum to 1.
          seed: seed of the order.
          *purpose: further numbers mixed into the seed, so that sequences with the same seed differ.
        """
        self._periods = dict(periods)
        self._seeds = {choice: _hash(seed, *purpose, choice) for choice in periods}

    def __call__(self, number: int) -> tuple[int, int]:
        """Returns (choice, number of its earlier occurrences) of element `number`, counted from 0.

        Raises:
          IndexError: `number` is negative.
        """
        if number < 0:
            raise IndexError(f"element {number} does not exist: they are counted from 0")
        if len(self._periods) == 1:
            return next(iter(self._periods)), number
        # Before time t a choice has occurred floor(share * t) times or once more, so all choices together t - choices
        # to t + choices times: element `number` lies within this window.
        margin = len(self._periods) + 1
        firsts = {choice: self._times_before(choice, number - margin) for choice in self._periods}
        events = []
        for choice, nth in firsts.items():
            while (time := self._time(choice, nth)) < number + margin:
                events.append((time, choice, nth))
                nth += 1
        events.sort()
        _, choice, nth = events[number - sum(firsts.values())]
        return choice, nth

    def _times_before(self, choice: int, time: float) -> int:
        nth = max(math.floor(time / self._periods[choice]) - 1, 0)
        while self._time(choice, nth) < time:
            nth += 1
        return nth

    def _time(self, choice: int, nth: int) -> float:
        block, index = divmod(nth, _JITTER_STEPS)
        seed = (self._seeds[choice] + block) % (1 << 32)
        jitter = index_shuffle(index, _JITTER_STEPS - 1, seed, _CIPHER_ROUNDS) / _JITTER_STEPS
        return (nth + jitter) * self._periods[choice]


class BatchSchedule:
    """Assigns batches to buckets, and rows of a bucket to choices (sources), in given shares."""

    def __init__(self, periods: Mapping[int, Mapping[int, float]], seed: int):
        """Initializes the schedule.

        Args:
          periods: {bucket: {choice: 1 / share of all rows}}.
          seed: seed of the order.
        """
        # The period of a single choice is used as it is, to avoid rounding twice.
        self._periods = {
            bucket: next(iter(choices.values()))
            if len(choices) == 1
            else 1 / sum(1 / period for period in choices.values())
            for bucket, choices in periods.items()
        }
        self._buckets = Interleaving(self._periods, seed, 1)
        self._rows = {
            bucket: Interleaving(
                {choice: period / self._periods[bucket] for choice, period in choices.items()}, seed, 2
            )
            for bucket, choices in periods.items()
        }

    def __call__(self, batch: int) -> tuple[int, int]:
        """Returns (bucket, number of earlier batches of that bucket) of a batch."""
        return self._buckets(batch)

    def rows(self, bucket: int, first: int, stop: int) -> list[tuple[int, int]]:
        """Returns (choice, number of its earlier rows in the bucket) of a bucket's rows `first` to `stop`."""
        return [self._rows[bucket](row) for row in range(first, stop)]

    def shares(self) -> dict[int, float]:
        """Returns the long-run share of batches of each bucket."""
        return {bucket: 1 / period for bucket, period in self._periods.items()}


class BatchPlan:
    """Plan of batches of one bucket each; a bucket is an endless stream of epochs, each a new permutation.

    Each batch of a bucket continues its stream where the previous one stopped, across epochs: no example is lost or
    repeated within an epoch, and a bucket with fewer examples than a batch repeats them only after all have occurred.
    Buckets occur in proportion to their numbers of examples.

    In a weighted mixture, the rows of a bucket interleave one such stream per source with examples in the bucket; each
    source has its own epochs. Examples that occur more or less often than others (`share_of_example`) have a stream for
    each share.
    """

    def __init__(
        self,
        bucket_of_example: np.ndarray,
        batch_size: int,
        seed: int,
        source_of_example: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
        share_of_example: np.ndarray | None = None,
    ):
        """Initializes the plan.

        Args:
          bucket_of_example: int [N], N > 0; an empty bucket (a missing number) never occurs.
          batch_size: rows of a batch.
          seed: seed of the order.
          source_of_example: source of each example in a weighted mixture, int [N]; None without weights.
          weights: each source's share of the rows, in any unit; None: a single source, or sources that are mixed in
            proportion to their examples.
          share_of_example: how often each example occurs relative to the others of its source, float [N], above 0 and
            with few distinct values; None: equally often.

        Raises:
          ValueError: there are no examples or too many, or an argument is out of bounds.
        """
        if not len(bucket_of_example) or batch_size < 1 or seed < 0:
            raise ValueError(f"{len(bucket_of_example)} examples, {batch_size=}, {seed=}: at least 1, 1, 0 are needed")
        self.batch_size = batch_size
        self._seed = seed
        self._num_sources = 1 if weights is None else len(weights)
        stratum_of_example = np.asarray(bucket_of_example)  # (bucket, source, share) of each example as one number
        if weights is not None:
            stratum_of_example = stratum_of_example * self._num_sources + source_of_example
        # Without shares the strata keep their numbers, from which the permutations of existing runs derive.
        self._shares: list[float] = [1]
        if share_of_example is not None:
            distinct, number_of_share = np.unique(share_of_example, return_inverse=True)
            self._shares = distinct.tolist()
            stratum_of_example = stratum_of_example * len(distinct) + number_of_share
        sizes = np.bincount(stratum_of_example)  # [strata]
        if sizes.max() > _MAX_BUCKET_SIZE:
            raise ValueError(f"a bucket of {sizes.max()} examples: at most 2^32 can be shuffled")
        self._sizes = sizes.tolist()
        self._bucket_sizes = np.bincount(bucket_of_example).tolist()
        self._starts = (np.cumsum(sizes) - sizes).tolist()
        self._members = SharedArray(np.argsort(stratum_of_example, kind="stable"))
        self._schedule = BatchSchedule(self._periods(weights), seed)  # choices are strata

    def _periods(self, weights: Sequence[float] | None) -> dict[int, dict[int, float]]:
        """Returns {bucket: {stratum: 1 / share of all rows}}."""
        masses: dict[tuple[int, int, int], float] = {}  # of (stratum, bucket, source)
        source_masses: list[float] = [0] * self._num_sources
        for stratum, size in enumerate(self._sizes):
            bucket_and_source, share = divmod(stratum, len(self._shares))
            bucket, source = divmod(bucket_and_source, self._num_sources)
            if size:
                masses[stratum, bucket, source] = size * self._shares[share]
                source_masses[source] += size * self._shares[share]
        if weights is None:
            weights = source_masses
        if not (all(weight > 0 for weight in weights) and all(mass > 0 for mass in (*source_masses, *masses.values()))):
            raise ValueError(f"{weights=}, sources of {source_masses} examples: all must be above 0")
        periods: dict[int, dict[int, float]] = {}
        for (stratum, bucket, source), mass in masses.items():
            # Without weights and shares these are integers, so that only the quotient is rounded.
            period = sum(weights) * source_masses[source] / (weights[source] * mass)
            periods.setdefault(bucket, {})[stratum] = period
        return periods

    def __call__(self, batch: int) -> tuple[int, np.ndarray]:
        """Returns (bucket, indices of the examples as int64 [batch_size]) of a batch, counted from 0."""
        return self.rows(batch, 0, self.batch_size)

    def rows(self, batch: int, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Returns (bucket, int64 [stop - start]) of rows `start` to `stop` of a batch."""
        bucket, nth = self._schedule(batch)
        first = nth * self.batch_size
        positions = self._schedule.rows(bucket, first + start, first + stop)
        return bucket, self._members.array[self._shuffled(positions)].astype(np.int64)

    def _shuffled(self, positions: Sequence[tuple[int, int]]) -> np.ndarray:
        """Returns the index into `_members` of each (stratum, position in its stream), int64 [positions]."""
        ranks = np.empty(len(positions), np.int64)
        seeds: dict[tuple[int, int], int] = {}
        for row, (stratum, position) in enumerate(positions):
            size = self._sizes[stratum]
            epoch, position = divmod(position, size)
            if (stratum, epoch) not in seeds:
                seeds[stratum, epoch] = _hash(self._seed, 0, stratum, epoch)
            if size < _MIN_CIPHER_SIZE:
                rank = int(_permutation(size, seeds[stratum, epoch])[position])
            else:
                rank = index_shuffle(position, size - 1, seeds[stratum, epoch], _CIPHER_ROUNDS)
            ranks[row] = self._starts[stratum] + rank
        return ranks

    def neighbour(self, index: int, distance: int) -> int:
        """Returns the example `distance` places after example `index` in a cyclic list.

        The list holds the examples of its bucket and, in a weighted mixture, of its source.
        """
        stratum = self._stratum(index)
        start, size = self._starts[stratum], self._sizes[stratum]
        members = self._members.array[start : start + size]
        rank = int(np.searchsorted(members, index))
        return int(members[(rank + distance) % size])

    def _stratum(self, index: int) -> int:
        for stratum, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
            members = self._members.array[start : start + size]  # ascending, because the sort is stable
            rank = np.searchsorted(members, index)
            if rank < size and members[rank] == index:
                return stratum
        raise IndexError(f"example {index} does not exist")

    def list_size(self, index: int) -> int:
        """Returns the length of the list in which `neighbour` finds the neighbours of example `index`."""
        return self._sizes[self._stratum(index)]

    def shares(self) -> np.ndarray:
        """Returns the long-run share of batches of each bucket, float64 [buckets]."""
        shares = np.zeros(len(self._bucket_sizes))
        for bucket, share in self._schedule.shares().items():
            shares[bucket] = share
        return shares


def _hash(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# Enough for the epochs of several threads; 32 MiB at most.
@functools.lru_cache(maxsize=256)
def _permutation(size: int, seed: int) -> np.ndarray:
    """Returns a permutation of range(size), uint16 [size].

    Uses raw bits, which NumPy guarantees never to change, unlike `Generator.permutation`.
    """
    return np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable").astype(np.uint16)
