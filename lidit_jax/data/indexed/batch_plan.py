"""Which examples make up batch k, as a pure function of k: any batch is found without going through those before."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from grain.experimental import index_shuffle

from lidit_jax.data.indexed.shared_array import SharedArray

_ROUNDS = 4  # of the cipher behind grain's index_shuffle, as grain itself has them
# The cipher works on at least 16 bits and repeats until its value is an index: 20,000 steps an index for a bucket of 3.
_MIN_CIPHER_SIZE = 1 << 16
_JITTER_STEPS = 1 << 20
# grain's index_shuffle works on 32 bits and wraps silently beyond.
_MAX_BUCKET_SIZE = 1 << 32


class Interleaving:
    """An endless sequence of choices in given shares, any element of which is found without those before it.

    Choice c, with a share s_c of the sequence, comes for the m-th time at the time (m + u) / s_c with u in [0, 1) from
    the seed, c and m; elements are numbered in order of time. After k elements each choice has had its share of k, give
    or take the number of choices.
    """

    def __init__(self, periods: Mapping[int, float], seed: int, *purpose: int):
        """Args: periods: choice -> 1 / its share; the shares sum to 1."""
        self._periods = dict(periods)
        self._seeds = {choice: _hash(seed, *purpose, choice) for choice in periods}

    def __call__(self, number: int) -> tuple[int, int]:
        """(the choice, how often it came before) of an element, counted from 0."""
        if number < 0:
            raise IndexError(f"element {number}: they are counted from 0")
        if len(self._periods) == 1:
            return next(iter(self._periods)), number
        # Until time t a choice has come floor(share * t) times or once more, so all of them t - choices to t + choices
        # times: element `number` is within this window.
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
        jitter = index_shuffle(index, _JITTER_STEPS - 1, seed, _ROUNDS) / _JITTER_STEPS
        return (nth + jitter) * self._periods[choice]


class GroupSchedule:
    """Which group a batch is of, and which of several choices each row of a group is, in given shares."""

    def __init__(self, periods: Mapping[int, Mapping[int, float]], seed: int):
        """Args: periods: group -> choice -> 1 / its share of all rows."""
        # One choice's is taken as it is, not rounded twice.
        self._periods = {
            group: next(iter(of.values())) if len(of) == 1 else 1 / sum(1 / period for period in of.values())
            for group, of in periods.items()
        }
        self._groups = Interleaving(self._periods, seed, 1)
        self._rows = {
            group: Interleaving({choice: period / self._periods[group] for choice, period in of.items()}, seed, 2)
            for group, of in periods.items()
        }

    def __call__(self, batch: int) -> tuple[int, int]:
        """(its group, how many batches of that came before)."""
        return self._groups(batch)

    def rows(self, group: int, first: int, stop: int) -> list[tuple[int, int]]:
        """(choice, how often it came before in the group) of each of a group's rows, counted over its batches."""
        return [self._rows[group](row) for row in range(first, stop)]

    def shares(self) -> dict[int, float]:
        """group -> its share of the batches in the long run."""
        return {group: 1 / period for group, period in self._periods.items()}


class BatchPlan:
    """Batches of one bucket each; every bucket is an endless stream of epochs, each epoch a fresh permutation.

    Batches of a bucket continue its stream where its last one stopped, across epochs, so nothing is lost or repeated
    within an epoch, and a bucket with fewer examples than a batch holds repeats only after all have come. Buckets come
    in proportion to their examples.

    In a mixture by weight, a bucket's rows are an interleaving of such streams, one of each source that has examples in
    the bucket; each source has its own epochs.
    """

    def __init__(
        self,
        bucket_of_example: np.ndarray,
        batch_size: int,
        seed: int,
        source_of_example: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
    ):
        """Args:
        bucket_of_example: int [N], N > 0; an empty bucket (a number that is missing) never comes.
        source_of_example, weights: of a mixture, int [N] and each source's share of the rows, in any unit; None: the
          examples are of one source, or of several that all count alike.
        """
        if not len(bucket_of_example) or batch_size < 1 or seed < 0:
            raise ValueError(f"{len(bucket_of_example)} examples, {batch_size=}, {seed=}: no plan for that")
        self.batch_size = batch_size
        self._seed = seed
        self._num_sources = 1 if weights is None else len(weights)
        stratum_of_example = np.asarray(bucket_of_example)  # a bucket's examples of one source
        if weights is not None:
            stratum_of_example = stratum_of_example * self._num_sources + source_of_example
        sizes = np.bincount(stratum_of_example)  # [strata]
        if sizes.max() > _MAX_BUCKET_SIZE:
            raise ValueError(f"a bucket of {sizes.max()} examples; 2^32 are the most that can be shuffled")
        self._sizes = sizes.tolist()
        self._bucket_sizes = np.bincount(bucket_of_example).tolist()
        self._starts = (np.cumsum(sizes) - sizes).tolist()
        self._members = SharedArray(np.argsort(stratum_of_example, kind="stable"))
        self._schedule = GroupSchedule(self._periods(weights), seed)  # its choices are strata

    def _periods(self, weights: Sequence[float] | None) -> dict[int, dict[int, float]]:
        """bucket -> stratum -> 1 / its share of all rows."""
        of_source = [0] * self._num_sources
        for stratum, size in enumerate(self._sizes):
            of_source[stratum % self._num_sources] += size
        if weights is None:
            weights = of_source
        if not (all(weight > 0 for weight in weights) and all(of_source)):
            raise ValueError(f"{weights=}, sources of {of_source} examples: all must be above 0")
        periods: dict[int, dict[int, float]] = {}
        for stratum, size in enumerate(self._sizes):
            if size:
                bucket, source = divmod(stratum, self._num_sources)
                # Integers where no weights are given, so that the quotient alone is rounded.
                period = sum(weights) * of_source[source] / (weights[source] * size)
                periods.setdefault(bucket, {})[stratum] = period
        return periods

    def __call__(self, batch: int) -> tuple[int, np.ndarray]:
        """(bucket, int64 [batch_size]: indices of examples) of a batch, counted from 0."""
        return self.rows(batch, 0, self.batch_size)

    def rows(self, batch: int, start: int, stop: int) -> tuple[int, np.ndarray]:
        """As a call, but only the rows [start, stop) of the batch: (bucket, int64 [stop - start])."""
        bucket, nth = self._schedule(batch)
        first = nth * self.batch_size
        positions = self._schedule.rows(bucket, first + start, first + stop)
        return bucket, self._members.array[self._shuffled(positions)].astype(np.int64)

    def _shuffled(self, positions: Sequence[tuple[int, int]]) -> np.ndarray:
        """int64 [positions]: where in the list of all members the example at each (stratum, place of its stream) is."""
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
                rank = index_shuffle(position, size - 1, seeds[stratum, epoch], _ROUNDS)
            ranks[row] = self._starts[stratum] + rank
        return ranks

    def neighbour(self, index: int, distance: int) -> int:
        """The example `distance` places after example `index` in the list of its bucket and source, which goes around.

        The list ascends, so the example is found by what it is a member of.
        """
        stratum = self._stratum(index)
        start, size = self._starts[stratum], self._sizes[stratum]
        members = self._members.array[start : start + size]
        rank = int(np.searchsorted(members, index))
        return int(members[(rank + distance) % size])

    def _stratum(self, index: int) -> int:
        for stratum, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
            members = self._members.array[start : start + size]  # ascends: the sort is stable
            rank = np.searchsorted(members, index)
            if rank < size and members[rank] == index:
                return stratum
        raise IndexError(f"example {index}: there is none of that number")

    def list_size(self, index: int) -> int:
        """How many examples the list has that `neighbour` goes along."""
        return self._sizes[self._stratum(index)]

    def shares(self) -> np.ndarray:
        """float64 [buckets]: the share of the batches in the long run, of each bucket."""
        shares = np.zeros(len(self._bucket_sizes))
        for bucket, share in self._schedule.shares().items():
            shares[bucket] = share
        return shares


def _hash(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# Enough for the epochs of several threads; 32 MiB at most.
@functools.lru_cache(maxsize=256)
def _permutation(size: int, seed: int) -> np.ndarray:
    """uint16 [size]. From raw bits, which numpy promises never to change, unlike what `permutation` makes of them."""
    return np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable").astype(np.uint16)
