"""Rotary position embedding (RoFormer, Su et al. 2021): queries and keys turned by angles that grow with position."""

import jax
import jax.numpy as jnp

DEFAULT_THETA = 10_000.0


def rotary_tables(positions: jax.Array, head_dim: int, theta: float = DEFAULT_THETA) -> tuple[jax.Array, jax.Array]:
    """cos and sin of RoPE, float32 [L, D], halves repeated as transformers lays them out."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None] * frequencies  # [L, D / 2]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of x [B, L, H, D]; the product is float32, as the tables are."""
    half = x.shape[-1] // 2
    x32 = x.astype(jnp.float32)
    rotated = jnp.concatenate([-x32[..., half:], x32[..., :half]], axis=-1)
    return (x32 * cos[:, None] + rotated * sin[:, None]).astype(x.dtype)
