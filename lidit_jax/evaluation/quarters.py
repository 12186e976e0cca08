"""Scores of a prompt's parts by where in the prompt they stand, as in the paper's Figure 3."""

from collections.abc import Sequence

import numpy as np

QUARTERS = 4
QUARTER_NAMES = ("0-25 %", "25-50 %", "50-75 %", "75-100 %")  # as in Figure 3
BOOTSTRAP_ROUNDS, BOOTSTRAP_SEED = 2000, 20240617


def mean_by_quarter(values: Sequence[float], positions: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Mean value in each quarter of the prompts, float64 [4]; NaN where there is none.

    Ours, the paper does not say how it bins: part i of n covers the prompt from i/n to (i + 1)/n and counts in each
    quarter by the share of it that lies there. So each part counts once in all, and a prompt as much in each quarter,
    however many parts it has: no quarter has more of the long prompts, which are harder. With 4 or 8 parts it is plain
    binning.

    Args:
      values: of each part.
      positions: its index in its prompt, from 0.
      counts: how many parts its prompt has.

    Raises:
      ValueError: a position is not within its count.
    """
    return _means(np.asarray(values, np.float64), quarter_weights(positions, counts))


def quarter_weights(positions: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """The share of each part in each quarter, float64 [parts, 4]; rows sum to 1. See `mean_by_quarter`."""
    index, n = np.asarray(positions, np.float64)[:, None], np.asarray(counts, np.float64)[:, None]
    if ((index < 0) | (index >= n)).any():
        raise ValueError("a position is not within its count")
    # In units of a part, so that no share is a difference of rounded fractions.
    starts = np.arange(QUARTERS) * n / QUARTERS
    return np.clip(np.minimum(index + 1, starts + n / QUARTERS) - np.maximum(index, starts), 0, None)


def interval_by_quarter(
    values: Sequence[float], positions: Sequence[int], counts: Sequence[int], prompts: Sequence[int]
) -> np.ndarray:
    """95 % bootstrap intervals of `mean_by_quarter`, float64 [4, 2]: prompts are drawn anew, with all their parts.

    Args: prompts: which prompt each part is of.
    """
    values, weights = np.asarray(values, np.float64), quarter_weights(positions, counts)
    names, of = np.unique(np.asarray(prompts), return_inverse=True)
    sums, totals = np.zeros((2, len(names), QUARTERS))
    np.add.at(sums, of, values[:, None] * weights)
    np.add.at(totals, of, weights)
    # How often each prompt is drawn, [rounds, prompts].
    times = np.random.default_rng(BOOTSTRAP_SEED).multinomial(
        len(names), np.full(len(names), 1 / len(names)), BOOTSTRAP_ROUNDS
    )
    return np.percentile((times @ sums) / (times @ totals), (2.5, 97.5), axis=0).T


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    totals = weights.sum(0)
    sums = (values[:, None] * weights).sum(0)
    return np.divide(sums, totals, out=np.full(QUARTERS, np.nan), where=totals > 0)
