import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.data.indexed.batch_plan import BatchPlan


def plan_of(counts: list[int], batch_size: int, seed: int = 0) -> tuple[BatchPlan, np.ndarray]:
    buckets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    return BatchPlan(buckets, batch_size, seed), buckets


some_counts = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


@given(counts=some_counts, batch_size=st.integers(1, 50), seed=st.integers(0, 2**32))
@settings(derandomize=True, max_examples=60)
def test_a_batch_holds_one_bucket_and_no_epoch_loses_or_repeats_an_example(counts, batch_size, seed):
    plan, bucket_of_example = plan_of(counts, batch_size, seed)
    streams = collections.defaultdict(list)
    for batch in range(60):
        bucket, indices = plan(batch)
        assert indices.shape == (batch_size,)
        assert (bucket_of_example[indices] == bucket).all()
        streams[bucket].extend(indices.tolist())
    for bucket, stream in streams.items():
        for start in range(0, len(stream) - counts[bucket] + 1, counts[bucket]):
            assert len(set(stream[start : start + counts[bucket]])) == counts[bucket]


@given(counts=some_counts, seed=st.integers(0, 2**32))
@settings(derandomize=True, max_examples=40)
def test_every_prefix_has_each_buckets_share_give_or_take_the_number_of_buckets(counts, seed):
    plan, _ = plan_of(counts, 1, seed)
    seen = np.zeros(len(counts))
    for batch in range(300):
        seen[plan(batch)[0]] += 1
        present = np.count_nonzero(counts)
        assert np.abs(seen[: len(plan.shares())] - plan.shares() * (batch + 1)).max() <= present
    assert not seen[np.array(counts) == 0].any()


def test_shares_converge_to_the_proportions_of_the_examples():
    plan, buckets = plan_of([700, 200, 0, 99, 1], 4)
    seen = np.bincount([plan(batch)[0] for batch in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(plan.shares(), np.bincount(buckets) / 1000)
    np.testing.assert_allclose(seen, plan.shares(), atol=0.002)


def test_a_distant_batch_equals_the_one_reached_by_iterating():
    counts = [5, 0, 90, 33, 2]
    walked, _ = plan_of(counts, 3, seed=5)
    batches = [walked(batch) for batch in range(2000)]
    fresh, _ = plan_of(counts, 3, seed=5)
    for batch in (1999, 3, 777, 1234):
        bucket, indices = fresh(batch)
        assert bucket == batches[batch][0]
        np.testing.assert_array_equal(indices, batches[batch][1])
    bucket, indices = fresh(10**9)
    assert counts[bucket] and len(indices) == 3


def test_rows_of_a_batch_are_slices_of_it():
    plan, _ = plan_of([20, 70], 12)
    for batch in range(20):
        bucket, whole = plan(batch)
        for start in range(0, 12, 3):
            part_bucket, part = plan.rows(batch, start, start + 3)
            assert part_bucket == bucket
            np.testing.assert_array_equal(part, whole[start : start + 3])


def test_buckets_are_interleaved_at_random():
    plan, _ = plan_of([100, 100, 100], 1)
    order = [plan(batch)[0] for batch in range(3000)]
    followers = collections.Counter(zip(order, order[1:], strict=False))
    assert all(followers[a, b] > 300 for a in range(3) for b in range(3) if a != b)
    assert not any(order[i : i + 5] == [order[i]] * 5 for i in range(len(order)))


@pytest.mark.parametrize("size", [997, 70_000])  # below and above the size from which grain's cipher is used
def test_epochs_and_seeds_differ_and_leave_no_example_near_its_place(size):
    zeros = np.zeros(size, int)
    plan, other = BatchPlan(zeros, size, 0), BatchPlan(zeros, size, 1)
    orders = [plan(0)[1], plan(1)[1], other(0)[1], np.arange(size)]
    for i, order in enumerate(orders):
        assert len(np.unique(order)) == size
        for later in orders[i + 1 :]:
            assert (order == later).sum() < 20
            assert abs(np.corrcoef(order, later)[0, 1]) < 0.12


def test_the_order_never_changes_between_releases():
    # A checkpoint stores only the batch number: with another order, a resumed run would repeat and miss examples.
    plan = BatchPlan(np.array([0, 0, 1, 0, 1, 0, 0]), 3, seed=42)
    batches = [(bucket, indices.tolist()) for bucket, indices in map(plan, range(4))]
    assert batches == [(0, [1, 6, 3]), (0, [0, 5, 1]), (1, [2, 4, 4]), (0, [0, 3, 6])]
    assert BatchPlan(np.zeros(100_000, int), 4, seed=42)(0)[1].tolist() == [13691, 6127, 96041, 75643]


def test_neighbours_are_cyclic_within_the_bucket():
    plan = BatchPlan(np.array([0, 1, 0, 1, 1]), 2, 0)
    assert [plan.neighbour(3, distance) for distance in range(4)] == [3, 4, 1, 3]
    assert plan.neighbour(2, 1) == 0
    assert (plan.list_size(2), plan.list_size(4)) == (2, 3)


def test_a_plan_without_examples_rows_or_a_valid_seed_is_rejected():
    for examples, batch_size, seed in (([], 1, 0), ([0], 0, 0), ([0], 1, -1)):
        with pytest.raises(ValueError, match="at least 1, 1, 0 are needed"):
            BatchPlan(np.array(examples, int), batch_size, seed)
    with pytest.raises(IndexError):
        BatchPlan(np.zeros(3, int), 1, 0)(-1)
