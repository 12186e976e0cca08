"""Means with their weight, so that means of micro-batches and of steps combine into the mean of all values."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class WeightedMean:
    """Mean of some values, and its weight relative to other means of the same quantity.

    Attributes:
      mean: float32 scalar; 0 if the weight is 0.
      weight: float32 scalar, not negative: the number of samples, tokens … averaged over. No gradient flows through it.
    """

    mean: jax.Array
    weight: jax.Array

    @classmethod
    def over(cls, values: jax.Array, counted: jax.Array | None = None) -> "WeightedMean":
        """Averages values in float32.

        Args:
          values: [...], of any shape.
          counted: bool [...], True for the values to average; None averages all of them.
        """
        values = values.astype(jnp.float32)
        if counted is None:
            return cls(jnp.mean(values), jnp.float32(values.size))
        weight = jnp.sum(counted, dtype=jnp.float32)
        return cls(jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(weight, 1.0), weight)

    def value(self) -> Any:
        """Returns the number to log."""
        return self.mean

    def share_of(self, total: "WeightedMean") -> jax.Array:
        """Returns this mean's share of the weight of `total`; 0 if that is 0."""
        return self.weight / jnp.where(total.weight > 0, total.weight, 1.0)

    def merge(self, other: "WeightedMean") -> "WeightedMean":
        """Returns the mean over the values of both."""
        total = self.replace(weight=self.weight + other.weight)
        return total.replace(mean=self.mean + other.share_of(total) * (other.mean - self.mean))


@flax.struct.dataclass
class Perplexity(WeightedMean):
    """Mean negative log-likelihood of tokens, in nats, logged as its exponential."""

    def value(self) -> Any:
        return np.exp(self.mean)


def mean_of_steps(rows: Sequence[Mapping[str, WeightedMean | np.ndarray]]) -> dict[str, float]:
    """Averages the metrics of several steps on the host, in float64.

    Args:
      rows: metrics of each step by name, as NumPy scalars. A plain number has weight 1. Steps may lack some names.

    Returns:
      The averages, without the names that have no weight in any step.
    """
    averages = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        entries = [row[name] for row in rows if name in row]
        means = [entry if isinstance(entry, WeightedMean) else WeightedMean(entry, 1.0) for entry in entries]
        weights = np.array([mean.weight for mean in means], np.float64)
        if weights.any():
            # Entries without weight are dropped, because 0 times a non-finite number is not 0.
            values = np.array([mean.mean for mean in means], np.float64)[weights > 0]
            weights = weights[weights > 0]
            averages[name] = float(means[0].replace(mean=values @ weights / weights.sum(), weight=None).value())
    return averages
