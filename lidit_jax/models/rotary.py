"""Rotary position embedding (RoFormer, Su et al. 2021): rotates queries and keys by angles proportional to position."""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.ranges import CountOrZero, Positive, between, check_ranges

DEFAULT_THETA = 10_000.0
RotaryTables = tuple[jax.Array, jax.Array]  # cos and sin, float32 [L, D]
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_Factor = Annotated[float, between(0.001, 1e6)]  # published ones are from 1 to 100
_Scale = Annotated[float, between(0, 1000)]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Context extension of rotary positions, named as in transformers' `rope_parameters`.

    Attributes:
      rope_type: one of `ROPE_TYPES`. "dynamic" changes only sequences longer than the model's context, which a prompt
        encoder never gets, so here it equals "default".
      factor: factor by which the context was extended.
      original_max_position_embeddings: context length before the extension ("llama3", "yarn").
      low_freq_factor: "llama3": frequencies with wavelengths above context / low_freq_factor are divided by `factor`.
      high_freq_factor: "llama3": frequencies with wavelengths below context / high_freq_factor are kept; those between
        the two limits are interpolated.
      attention_factor: "yarn" (Peng et al. 2023): factor on cos and sin; None computes it from `factor` and the two
        mscale values.
      beta_fast: "yarn": frequencies with more turns than this in the original context are kept.
      beta_slow: "yarn": frequencies with fewer turns than this are divided by `factor`.
      mscale: "yarn": see `attention_factor`.
      mscale_all_dim: "yarn": see `attention_factor`.
      truncate: "yarn": round the limits between kept and divided frequencies to whole indices.

    Raises:
      UserError: if a value is not supported.
    """

    rope_type: str = "default"
    factor: _Factor = 1.0
    original_max_position_embeddings: CountOrZero = 0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    attention_factor: _Factor | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: _Scale | None = None
    mscale_all_dim: _Scale | None = None
    truncate: bool = True

    def __post_init__(self):
        check_ranges(self, "")
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope_type {self.rope_type!r:.80} is not supported: use one of {', '.join(ROPE_TYPES)}")
        if self.rope_type in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise UserError(f"rope_type {self.rope_type!r} needs original_max_position_embeddings of at least 1")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError("rope_type 'llama3' needs low_freq_factor < high_freq_factor")


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Returns the radians per position, float32 [head_dim / 2], and the factor on cos and sin (1 except for "yarn")."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    unscaled = np.float32(1.0) / np.float32(theta) ** exponents
    if scaling is None or scaling.rope_type in ("default", "dynamic"):
        return unscaled, 1.0
    if scaling.rope_type == "linear":
        return unscaled / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(unscaled, scaling), 1.0
    return _yarn(unscaled, head_dim, theta, scaling)


def _llama3(unscaled: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    turns = context * unscaled / (2 * math.pi)  # in the original context
    unchanged = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: unchanged, 0: divided by the factor
    return (unscaled * (unchanged + (1.0 - unchanged) / scaling.factor)).astype(np.float32)


def _yarn(unscaled: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    def frequency_index(turns: float) -> float:
        """Returns the (fractional) frequency index that makes `turns` turns within the original context."""
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = frequency_index(scaling.beta_fast), frequency_index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - first) / (max(last - first, 0.001)), 0.0, 1.0)
    frequencies = unscaled / scaling.factor * ramp + unscaled * (1.0 - ramp)
    return frequencies.astype(np.float32), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float = DEFAULT_THETA, scaling: RopeScaling | None = None
) -> RotaryTables:
    """Returns the cos and sin of RoPE for positions int [L]: float32 [L, head_dim] each."""
    frequencies, factor = rotary_frequencies(head_dim, theta, scaling)
    return tables_of_angles(positions.astype(jnp.float32)[:, None] * frequencies, factor)


def tables_of_angles(angles: jax.Array, factor: float = 1.0) -> RotaryTables:
    """Returns `factor` times cos and sin of angles [L, D / 2]: [L, D] each, the second half a copy of the first.

    transformers pairs features in the same order.
    """
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies rotary tables [L, D] to x [B, L, H, D], in float32; returns the dtype of x."""
    half = x.shape[-1] // 2
    x32 = x.astype(jnp.float32)
    rotated = jnp.concatenate([-x32[..., half:], x32[..., :half]], axis=-1)
    return (x32 * cos[:, None] + rotated * sin[:, None]).astype(x.dtype)
