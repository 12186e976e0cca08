"""Position embeddings of the image tokens in the diffusion transformer.

The paper uses one convolutional ResBlock ("conv", section 3.2). Two 3x3 convolutions have a receptive field of 5x5
tokens, so their zero padding distinguishes only the two outer rings of tokens. "sincos" and "rope" (ours) distinguish
all tokens, at any height and width and without a learned table: coordinates are relative to the image centre and scaled
by the area, so that a layout learned at one resolution carries over to another. `docs/architecture.md` has the
measurements.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.layers import Conv, layer_norm
from lidit_jax.models.rotary import RotaryTables, rotary_frequencies, tables_of_angles

CONV, SINCOS, ROPE = KINDS = ("conv", "sincos", "rope")
# Base of the frequencies, the same as in the refiners. Grids have 8 to 64 tokens a side: with the LLMs' base of 10,000
# most frequencies would hardly change across an image.
THETA = 100.0


def parse_position(position: str) -> tuple[str, ...]:
    """Splits `model.position` at "+": "conv+rope" -> ("conv", "rope").

    Raises:
      UserError: if a kind is unknown or named twice.
    """
    kinds = tuple(position.split("+"))
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise UserError(
            f"model.position={position!r:.80} is unknown: use one of {', '.join(KINDS)}, or several joined as in "
            "'conv+rope'"
        )
    return kinds


def grid_coordinates(height: int, width: int, reference_side: int) -> tuple[jax.Array, jax.Array]:
    """Returns the coordinates of a grid's rows and columns relative to the image centre.

    An image of any size and aspect ratio covers the area `reference_side`^2: neighbouring tokens are 1 apart on a
    square grid of that side, and 1/2 apart on one of twice the side.

    Args:
      height: rows of the grid.
      width: columns of the grid.
      reference_side: side of the square grid on which neighbouring tokens are 1 apart.

    Returns:
      float32 [height] and [width].
    """
    unit = reference_side / math.sqrt(height * width)
    rows, columns = (
        (jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2) * jnp.float32(unit) for side in (height, width)
    )
    return rows, columns


def sincos_embedding(height: int, width: int, features: int, reference_side: int) -> jax.Array:
    """Returns two-dimensional sine-cosine position embeddings, float32 [height, width, features].

    The first half of the features encodes the row, the second the column, each as sines and then cosines (DiT,
    Peebles and Xie 2023, with our coordinates). If 4 does not divide `features`, the last ones are zero.
    """
    quarter = features // 4
    frequencies = THETA ** -(jnp.arange(quarter, dtype=jnp.float32) / max(quarter, 1))

    def encode(coordinates: jax.Array) -> jax.Array:
        angles = coordinates[:, None] * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # [side, features / 2]

    rows, columns = (encode(axis) for axis in grid_coordinates(height, width, reference_side))
    shape = (height, width, 2 * quarter)
    rows, columns = jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)
    return jnp.pad(jnp.concatenate([rows, columns], axis=-1), ((0, 0), (0, 0), (0, features - 4 * quarter)))


def rope_tables(height: int, width: int, head_dim: int, reference_side: int) -> RotaryTables:
    """Returns cos and sin of two-dimensional rotary positions, float32 [height * width, head_dim] each.

    Half of a head's feature pairs rotate with the row, the other half with the column (axial RoPE, Heo et al. 2024).
    The logits then depend on the offset between two tokens, not on their absolute positions.
    """
    frequencies, _ = rotary_frequencies(head_dim // 2, THETA)  # [head_dim / 4]
    rows, columns = grid_coordinates(height, width, reference_side)
    shape = (height, width, head_dim // 4)
    angles = jnp.concatenate(
        [
            jnp.broadcast_to((rows[:, None] * frequencies)[:, None], shape),
            jnp.broadcast_to((columns[:, None] * frequencies)[None], shape),
        ],
        axis=-1,
    )
    return tables_of_angles(angles.reshape(height * width, head_dim // 2))


class ConvPositionEmbedding(nn.Module):
    """A convolutional ResBlock on the grid of tokens (paper section 3.2): [B, h, w, C] -> [B, h, w, C].

    Zero padding encodes the distance to the borders, up to two tokens. The inner width is a quarter of the outer
    (ours), so that the block has less than one per cent of the model's parameters.
    """

    bottleneck: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        inner = features // self.bottleneck
        h = Conv(inner, ("embed", "conv_out"), dtype=self.dtype, name="conv_in")(nn.silu(layer_norm(x)))
        h = Conv(features, ("conv_out", "embed"), dtype=self.dtype, name="conv_out")(nn.silu(layer_norm(h)))
        return x + h
