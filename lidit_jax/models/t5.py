"""T5's encoder (Raffel et al. 2020): bidirectional, with relative positions; v1.0, v1.1 (Flan) and mT5 by its config.

Numerically this is transformers' `T5EncoderModel` and `MT5EncoderModel` (the parity tests compare them). Initial values
are Mesh TensorFlow's (logits are not divided by the root of the head size, so queries begin smaller by as much), but
for those of relative positions, which begin larger: a small model then learns from a masked token's neighbours in
hundreds of steps, where attention that begins next to uniform stays so for thousands.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.layers import ACTIVATIONS, Dense, RMSNorm

EMBEDDING_INIT = nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and switches, under the names of transformers' config.json where it has one.

    Attributes:
      d_model: width of the model.
      d_kv: width of a head; heads times d_kv need not be d_model.
      d_ff: width inside the FFN.
      relative_attention_num_buckets: entries a head in the table of relative positions, half of them for each side.
      relative_attention_max_distance: from here on all tokens of a side share one entry.
      activation: one of `ACTIVATIONS`, in the FFN.
      gated: the FFN is activation(wi_0 x) * wi_1 x instead of activation(wi x) (v1.1, mT5).
      attention: the implementation (`models/attention.py`).
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    attention: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r:.80} is not supported: use one of {', '.join(ACTIVATIONS)}")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4:
            raise UserError(f"relative_attention_num_buckets={buckets}: two sides, near and far, need at least 4")
        if distance <= buckets // 4:
            raise UserError(
                f"relative_attention_max_distance={distance} is not beyond the {buckets // 4} distances that "
                f"relative_attention_num_buckets={buckets} gives a bucket each"
            )


class T5Block(nn.Module):
    """Pre-norm self-attention and FFN, without biases."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, position_bias: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """x [B, L, C], position_bias [1, H, L, L], mask bool [B, L] -> (x [B, L, C], None), as a scan wants it."""
        x = x + self._attention(self._norm("attention_norm")(x), position_bias, mask)
        return x + self._feed_forward(self._norm("feed_forward_norm")(x)), None

    def _norm(self, name):
        return RMSNorm(self.config.layer_norm_epsilon, name=name)

    def _dense(self, name, features, axes, scale=1.0):
        init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
        return Dense(features, axes, use_bias=False, kernel_init=init, dtype=jnp.dtype(self.config.dtype), name=name)

    def _feed_forward(self, x):
        config = self.config
        activation = ACTIVATIONS[config.activation]
        if config.gated:
            y = activation(self._dense("wi_0", config.d_ff, ("embed", "mlp"))(x))
            y = y * self._dense("wi_1", config.d_ff, ("embed", "mlp"))(x)
        else:
            y = activation(self._dense("wi", config.d_ff, ("embed", "mlp"))(x))
        return self._dense("wo", config.d_model, ("mlp", "embed"))(y)

    def _attention(self, x, position_bias, mask):
        config = self.config
        batch, length, _ = x.shape

        def project(name, scale=1.0):
            y = self._dense(name, config.num_heads * config.d_kv, ("embed", "heads"), scale)(x)
            return y.reshape(batch, length, config.num_heads, config.d_kv)

        y = dot_product_attention(
            project("q", 1 / config.d_kv),
            project("k"),
            project("v"),
            key_mask=mask,
            bias=position_bias,
            scale=1.0,  # T5's initial queries are smaller instead (Raffel et al. 2020; Mesh TensorFlow)
            implementation=config.attention,
        )
        return self._dense("o", config.d_model, ("heads", "embed"))(y.reshape(batch, length, -1))


class T5Encoder(nn.Module):
    """The encoder, with its final norm."""

    config: T5Config

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens int32 [B, L], mask bool [B, L] (False: padding; not a whole row of it) -> [B, L, C] in the dtype.

        No valid token's output depends on the padding; the output at padding means nothing.
        """
        config = self.config
        init = nn.with_logical_partitioning(EMBEDDING_INIT, ("vocab", "embed"))
        embed_tokens = self.param("embed_tokens", init, (config.vocab_size, config.d_model), jnp.float32)
        blocks = nn.scan(
            T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers")
        x = embed_tokens[tokens].astype(config.dtype)  # [B, L, C]
        x, _ = blocks(x, self._position_bias(tokens.shape[1]), mask)
        return RMSNorm(config.layer_norm_epsilon, name="final_layer_norm")(x)

    def _position_bias(self, length: int) -> jax.Array:
        """What every block adds to its logits: [1, H, L, L] in the dtype, by how far the key is after the query."""
        config = self.config
        init = nn.with_logical_partitioning(EMBEDDING_INIT, (None, None))
        table_shape = (config.relative_attention_num_buckets, config.num_heads)
        table = self.param("relative_attention_bias", init, table_shape, jnp.float32)
        of_distance = table[relative_buckets(np.arange(-length + 1, length), config)]  # [2 L - 1, H]
        positions = jnp.arange(length)
        bias = of_distance[positions - positions[:, None] + length - 1]  # [L, L, H]
        # Cast last: the gradient of an entry is a sum over all places that look it up.
        return bias.transpose(2, 0, 1)[None].astype(config.dtype)


def relative_buckets(distances: np.ndarray, config: T5Config) -> np.ndarray:
    """Key's position minus query's -> entry of the table, int32: T5's bidirectional buckets.

    The first half is for keys at or before the query, the second for those after it. In each half the near distances
    have an entry each; farther ones share entries whose width grows in proportion to the distance.

    In NumPy, once a length, because the rounding of an accelerator's logarithm would move the borders.
    """
    one_side = config.relative_attention_num_buckets // 2
    near = one_side // 2
    away = np.abs(distances)
    ratio = np.maximum(away, near).astype(np.float32) / np.float32(near)
    octaves = np.log(ratio) / np.float32(math.log(config.relative_attention_max_distance / near))
    far = near + (octaves * np.float32(one_side - near)).astype(np.int32)
    bucket = np.where(away < near, away, np.minimum(far, one_side - 1))
    return (bucket + one_side * (distances > 0)).astype(np.int32)
