"""Scores of a prompt's pairs by where in the prompt they stand (paper, appendix A.3 and Figure 3)."""

from collections.abc import Sequence

import numpy as np

QUARTERS = 4
QUARTER_NAMES = ("0-25 %", "25-50 %", "50-75 %", "75-100 %")  # as in Figure 3
BOOTSTRAP_ROUNDS, BOOTSTRAP_SEED = 2000, 20240617


def mean_by_quarter(
    values: Sequence[float], positions: Sequence[int], counts: Sequence[int], prompts: Sequence[int]
) -> np.ndarray:
    """Returns the mean score of each quarter, float64 [4]: over a prompt's segment first, then over prompts (A.3).

    A prompt's segment has the values of all its images. With four pairs, as in the paper, each pair is one segment.
    For other numbers, ours: pair i of n covers the prompt from i/n to (i + 1)/n and counts in each quarter by the share
    of it that lies there. Every prompt then has a value in every quarter and counts once, so no quarter has more of the
    long prompts, which are harder.

    Args:
      values: one score per pair and image.
      positions: the pair's index in its prompt, from 0.
      counts: number of pairs in its prompt.
      prompts: which prompt the pair is of.

    Raises:
      ValueError: a position is not within its count, a prompt's segment has no value, or there is no value at all.
    """
    return segment_means(values, positions, counts, prompts).mean(axis=0)


def segment_means(
    values: Sequence[float], positions: Sequence[int], counts: Sequence[int], prompts: Sequence[int]
) -> np.ndarray:
    """Returns each prompt's mean score in each quarter, float64 [prompts, 4], by ascending prompt.

    Arguments and errors are those of `mean_by_quarter`.
    """
    weights = quarter_weights(positions, counts)
    names, prompt_of = np.unique(np.asarray(prompts), return_inverse=True)
    sums, totals = np.zeros((2, len(names), QUARTERS))
    np.add.at(sums, prompt_of, np.asarray(values, np.float64)[:, None] * weights)
    np.add.at(totals, prompt_of, weights)
    if not totals.size or not totals.all():
        raise ValueError("a segment of a prompt has no value")
    return sums / totals


def quarter_weights(positions: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Returns the share of each pair in each quarter, float64 [pairs, 4]; rows sum to 1. See `mean_by_quarter`.

    Raises:
      ValueError: a position is not within its count.
    """
    index, n = np.asarray(positions, np.float64)[:, None], np.asarray(counts, np.float64)[:, None]
    if ((index < 0) | (index >= n)).any():
        raise ValueError("a position is not within its count")
    # In units of a pair, so that no share is a difference of rounded fractions.
    starts = np.arange(QUARTERS) * n / QUARTERS
    return np.clip(np.minimum(index + 1, starts + n / QUARTERS) - np.maximum(index, starts), 0, None)


def mean_over_prompts(values: Sequence[float], prompts: Sequence[int]) -> float:
    """Returns the mean of the prompts' means, so that a prompt counts once, however many pairs or images it has."""
    _, prompt_of = np.unique(np.asarray(prompts), return_inverse=True)
    return float(np.mean(np.bincount(prompt_of, np.asarray(values, np.float64)) / np.bincount(prompt_of)))


def interval_by_quarter(
    values: Sequence[float], positions: Sequence[int], counts: Sequence[int], prompts: Sequence[int]
) -> np.ndarray:
    """Returns 95 % bootstrap intervals of `mean_by_quarter`, float64 [4, 2], by resampling prompts.

    Arguments and errors are those of `mean_by_quarter`.
    """
    means = segment_means(values, positions, counts, prompts)
    # How often each prompt is resampled, [rounds, prompts].
    times = np.random.default_rng(BOOTSTRAP_SEED).multinomial(
        len(means), np.full(len(means), 1 / len(means)), BOOTSTRAP_ROUNDS
    )
    return np.percentile(times @ means / len(means), (2.5, 97.5), axis=0).T
