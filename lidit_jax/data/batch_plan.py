"""Which examples make up batch k, as a pure function of k: any batch is found without going through those before."""

import functools
import math

import numpy as np
from grain.experimental import index_shuffle

_ROUNDS = 4  # of the cipher behind grain's index_shuffle, as grain itself has them
# The cipher works on at least 16 bits and repeats until its value is an index: 20,000 steps an index for a bucket of 3.
_MIN_CIPHER_SIZE = 1 << 16
_JITTER_STEPS = 1 << 20
# grain's index_shuffle works on 32 bits and wraps silently beyond.
_MAX_BUCKET_SIZE = 1 << 32


class BatchPlan:
    """Batches of one bucket each; every bucket is an endless stream of epochs, each epoch a fresh permutation.

    Batches of a bucket continue its stream where its last one stopped, across epochs, so nothing is lost or repeated
    within an epoch, and a bucket with fewer examples than a batch holds repeats only after all have come.

    Buckets come in proportion to their examples: bucket b, with a share s_b of the examples, has its m-th batch at
    the time (m + u) / s_b with u in [0, 1) from the seed, b and m; batches are numbered in order of time. After k
    batches each bucket has had its share of k, give or take the number of buckets.
    """

    def __init__(self, bucket_of_example: np.ndarray, batch_size: int, seed: int):
        """Args: bucket_of_example: int [N], N > 0; an empty bucket (a number that is missing) never comes."""
        if not len(bucket_of_example) or batch_size < 1 or seed < 0:
            raise ValueError(f"{len(bucket_of_example)} examples, {batch_size=}, {seed=}: no plan for that")
        sizes = np.bincount(bucket_of_example)  # [buckets]
        if sizes.max() > _MAX_BUCKET_SIZE:
            raise ValueError(f"a bucket of {sizes.max()} examples; 2^32 are the most that can be shuffled")
        self.batch_size = batch_size
        self._seed = seed
        self._sizes = sizes.tolist()
        self._present = np.flatnonzero(sizes).tolist()
        self._periods = {bucket: len(bucket_of_example) / self._sizes[bucket] for bucket in self._present}
        self._jitter_seeds = {bucket: self._hash(1, bucket) for bucket in self._present}
        self._members = np.argsort(bucket_of_example, kind="stable")
        self._starts = (np.cumsum(sizes) - sizes).tolist()

    def __call__(self, batch: int) -> tuple[int, np.ndarray]:
        """(bucket, int64 [batch_size]: indices of examples) of a batch, counted from 0."""
        return self.rows(batch, 0, self.batch_size)

    def rows(self, batch: int, start: int, stop: int) -> tuple[int, np.ndarray]:
        """As a call, but only the rows [start, stop) of the batch: (bucket, int64 [stop - start])."""
        bucket, nth = self._bucket_of(batch)
        first = nth * self.batch_size
        ranks = self._shuffled(bucket, range(first + start, first + stop))
        return bucket, self._members[self._starts[bucket] + ranks].astype(np.int64)

    def _shuffled(self, bucket: int, positions: range) -> np.ndarray:
        """int64 [positions]: where in its bucket's list the example at each position of its stream is."""
        size = self._sizes[bucket]
        ranks = np.empty(len(positions), np.int64)
        seed = epoch = None
        for row, position in enumerate(positions):
            if position // size != epoch:
                epoch = position // size
                seed = self._hash(0, bucket, epoch)
            if size < _MIN_CIPHER_SIZE:
                ranks[row] = _permutation(size, seed)[position % size]
            else:
                ranks[row] = index_shuffle(position % size, size - 1, seed, _ROUNDS)
        return ranks

    def neighbour(self, bucket: int, index: int, distance: int) -> int:
        """The example `distance` places after example `index` in its bucket's list, which goes around."""
        start, size = self._starts[bucket], self._sizes[bucket]
        members = self._members[start : start + size]
        rank = int(np.searchsorted(members, index))  # members ascend: the sort is stable
        return int(members[(rank + distance) % size])

    def bucket_size(self, bucket: int) -> int:
        """How many examples the bucket has."""
        return self._sizes[bucket]

    def shares(self) -> np.ndarray:
        """float64 [buckets]: the share of the examples, and of the batches in the long run, of each bucket."""
        return np.array(self._sizes) / len(self._members)

    def _bucket_of(self, batch: int) -> tuple[int, int]:
        """(bucket, how many batches it had before) of a batch."""
        if batch < 0:
            raise IndexError(f"batch {batch}: they are counted from 0")
        if len(self._present) == 1:
            return self._present[0], batch
        # Until time t a bucket has had floor(share * t) batches or one more, so all of them t - buckets to
        # t + buckets: batch number `batch` is within this window.
        margin = len(self._present) + 1
        firsts = {bucket: self._batches_before(bucket, batch - margin) for bucket in self._present}
        events = []
        for bucket, nth in firsts.items():
            while (time := self._time(bucket, nth)) < batch + margin:
                events.append((time, bucket, nth))
                nth += 1
        events.sort()
        _, bucket, nth = events[batch - sum(firsts.values())]
        return bucket, nth

    def _batches_before(self, bucket: int, time: float) -> int:
        nth = max(math.floor(time / self._periods[bucket]) - 1, 0)
        while self._time(bucket, nth) < time:
            nth += 1
        return nth

    def _time(self, bucket: int, nth: int) -> float:
        block, index = divmod(nth, _JITTER_STEPS)
        seed = (self._jitter_seeds[bucket] + block) % (1 << 32)
        jitter = index_shuffle(index, _JITTER_STEPS - 1, seed, _ROUNDS) / _JITTER_STEPS
        return (nth + jitter) * self._periods[bucket]

    def _hash(self, *numbers: int) -> int:
        return int(np.random.SeedSequence((self._seed, *numbers)).generate_state(1)[0])


# Enough for the epochs of several threads; 32 MiB at most.
@functools.lru_cache(maxsize=256)
def _permutation(size: int, seed: int) -> np.ndarray:
    """uint16 [size]. From raw bits, which numpy promises never to change, unlike what `permutation` makes of them."""
    return np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable").astype(np.uint16)
