"""Rotary position embedding (RoFormer, Su et al. 2021): queries and keys turned by angles that grow with position."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.errors import UserError

DEFAULT_THETA = 10_000.0
RotaryTables = tuple[jax.Array, jax.Array]  # cos and sin, float32 [L, D]
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model's context was stretched after its training, under the names of transformers' `rope_parameters`.

    Attributes:
      rope_type: one of `ROPE_TYPES`. "dynamic" leaves sequences within the model's context alone, and longer ones are
        none that a prompt encoder is given, so it computes what "default" does.
      factor: by which the context grew.
      original_max_position_embeddings: context before ("llama3", "yarn").
      low_freq_factor, high_freq_factor: "llama3"'s: wavelengths beyond context / low are divided by `factor`, those
        within context / high stay, between them it blends.
      attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate: "yarn"'s (Peng et al. 2023).
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope_type {self.rope_type!r:.80} is not supported: use one of {', '.join(ROPE_TYPES)}")
        if self.rope_type in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise UserError(f"rope_type {self.rope_type!r} needs original_max_position_embeddings of at least 1")
        if self.rope_type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError("rope_type 'llama3' needs 0 < low_freq_factor < high_freq_factor")


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[np.ndarray, float]:
    """Radians a position, float32 [head_dim / 2], and the factor on cos and sin (1 but for "yarn")."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / np.float32(theta) ** exponents
    if scaling is None or scaling.rope_type in ("default", "dynamic"):
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, head_dim, theta, scaling)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    turns = context * plain / (2 * math.pi)  # in the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: as it was, 0: divided by the factor
    return (plain * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def _yarn(plain: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    def dimension(turns: float) -> float:
        """The frequency index at which a wave turns so often within the original context."""
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - first) / (max(last - first, 0.001)), 0.0, 1.0)
    frequencies = plain / scaling.factor * ramp + plain * (1.0 - ramp)
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
    """Returns cos and sin of RoPE for positions int [L]: float32 [L, D] each."""
    frequencies, factor = rotary_frequencies(head_dim, theta, scaling)
    return tables_of_angles(positions.astype(jnp.float32)[:, None] * frequencies, factor)


def tables_of_angles(angles: jax.Array, factor: float = 1.0) -> RotaryTables:
    """Returns cos and sin, times `factor`, of angles [L, D / 2], halves repeated as transformers lays them out."""
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of x [B, L, H, D]; the product is float32, as the tables are."""
    half = x.shape[-1] // 2
    x32 = x.astype(jnp.float32)
    rotated = jnp.concatenate([-x32[..., half:], x32[..., :half]], axis=-1)
    return (x32 * cos[:, None] + rotated * sin[:, None]).astype(x.dtype)
