"""Weighted means: merging partial means equals averaging all values, and the means over steps for the log."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.weighted_mean import Perplexity, WeightedMean, mean_of_steps


@settings(max_examples=50)
@given(parts=st.lists(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans()), max_size=5), min_size=1))
def test_merging_means_equals_averaging_all_counted_values(parts):
    def over(part):
        values, counted = np.array([v for v, _ in part], np.float32), np.array([c for _, c in part], bool)
        return WeightedMean(*map(np.float32, (values[counted].mean() if counted.any() else 0.0, counted.sum())))

    merged = functools.reduce(WeightedMean.merge, map(over, parts))
    counted = np.array([value for part in parts for value, is_counted in part if is_counted], np.float64)
    assert merged.weight == len(counted)
    assert merged.mean == pytest.approx(counted.mean() if len(counted) else 0.0, rel=1e-4, abs=1e-2)


def test_a_mean_is_over_the_counted_values_only():
    values = jnp.array([[1.0, 2.0], [jnp.nan, 6.0]])
    some = WeightedMean.over(values, jnp.array([[True, True], [False, True]]))
    assert (some.mean, some.weight) == (3.0, 3.0)
    none = WeightedMean.over(values, jnp.zeros((2, 2), bool))
    assert (none.mean, none.weight) == (0.0, 0.0)
    everything = WeightedMean.over(jnp.array([True, False, False, True]))
    assert (everything.mean, everything.weight) == (0.5, 4.0)
    assert {leaf.dtype for leaf in jax.tree.leaves((some, none, everything))} == {jnp.dtype(jnp.float32)}


def test_steps_are_averaged_by_weight_and_those_without_are_left_out():
    rows = [
        {"loss": WeightedMean(1.0, 1.0), "quarter": WeightedMean(0.0, 0.0), "grad_norm": np.float32(2.0)},
        {"loss": WeightedMean(5.0, 3.0), "quarter": WeightedMean(0.0, 0.0), "grad_norm": np.float32(4.0)},
        {"loss": WeightedMean(np.nan, 0.0), "late": WeightedMean(7.0, 2.0), "grad_norm": np.float32(6.0)},
    ]
    assert mean_of_steps(rows) == {"loss": 4.0, "grad_norm": 4.0, "late": 7.0}
    assert mean_of_steps([]) == {}


def test_the_perplexity_is_over_all_tokens_not_the_mean_of_perplexities():
    rows = [{"perplexity": Perplexity(np.log(2.0), 300.0)}, {"perplexity": Perplexity(np.log(32.0), 100.0)}]
    assert mean_of_steps(rows) == {"perplexity": pytest.approx(4.0)}
