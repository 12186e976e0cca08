"""The T5 encoder (Raffel et al. 2020): bidirectional, with relative position biases; T5 v1.0, v1.1 (Flan) and mT5.

The outputs match transformers' `T5EncoderModel` and `MT5EncoderModel` (see the parity tests). The initialisation is
Mesh TensorFlow's: logits are not divided by the square root of the head size, so the query kernels start smaller by
that factor. Only the relative position biases start larger than there: a small model then learns to use the neighbours
of a masked token within hundreds of steps, while attention that starts nearly uniform stays so for thousands.
"""

import dataclasses
import functools
import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.initialize import LAYERS, partitioned
from lidit_jax.models.layers import ACTIVATIONS, Dense, RMSNorm
from lidit_jax.ranges import Blocks, Count, Epsilon, Size, between, check_ranges

EMBEDDING_INIT = nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Hyper-parameters of a T5 encoder, named as in transformers' config.json where it has the same field.

    Attributes:
      vocab_size: number of token embeddings.
      d_model: width of the model.
      d_kv: head size; num_heads * d_kv need not equal d_model.
      d_ff: inner width of the FFN.
      num_layers: number of blocks.
      num_heads: attention heads.
      relative_attention_num_buckets: buckets of the relative position bias, half of them for each direction.
      relative_attention_max_distance: distance from which on all tokens of a direction share one bucket.
      layer_norm_epsilon: epsilon of every RMSNorm.
      activation: activation in the FFN, one of `ACTIVATIONS`.
      gated: if True, the FFN's inner layer is activation(wi_0 x) * wi_1 x instead of activation(wi x) (v1.1, mT5).
      attention: attention implementation, see `dot_product_attention`.
      dtype: compute dtype.

    Raises:
      UserError: if a value is not supported or two do not fit together.
    """

    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Blocks
    num_heads: Size
    relative_attention_num_buckets: Annotated[int, between(4, 2**20)] = 32
    relative_attention_max_distance: Count = 128
    layer_norm_epsilon: Epsilon = 1e-6
    activation: str = "relu"
    gated: bool = False
    attention: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_ranges(self, "")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r:.80} is not supported: use one of {', '.join(ACTIVATIONS)}")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if distance <= buckets // 4:
            raise UserError(
                f"relative_attention_max_distance={distance} must be greater than {buckets // 4}, the number of "
                f"distances with their own bucket for relative_attention_num_buckets={buckets}"
            )


@functools.cache
def _normal(scale: float) -> Any:
    """Returns the normal initialiser of variance `scale` / fan-in; the same object for the same scale."""
    return nn.initializers.variance_scaling(scale, "fan_in", "normal")


class T5Block(nn.Module):
    """Pre-norm self-attention and FFN, without biases."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, position_bias: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """x [B, L, C], position_bias [1, H, L, L], mask bool [B, L] -> (x [B, L, C], None for `nn.scan`)."""
        x = x + self._attention(self._norm("attention_norm")(x), position_bias, mask)
        return x + self._feed_forward(self._norm("feed_forward_norm")(x)), None

    def _norm(self, name):
        return RMSNorm(self.config.layer_norm_epsilon, name=name)

    def _dense(self, name, features, axes, scale=1.0):
        return Dense(
            features, axes, use_bias=False, kernel_init=_normal(scale), dtype=jnp.dtype(self.config.dtype), name=name
        )

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
            scale=1.0,  # T5 initialises smaller queries instead (Raffel et al. 2020; Mesh TensorFlow)
            implementation=config.attention,
        )
        return self._dense("o", config.d_model, ("heads", "embed"))(y.reshape(batch, length, -1))


class T5Encoder(nn.Module):
    """The T5 encoder, including its final norm."""

    config: T5Config

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens int32 [B, L], mask bool [B, L] -> [B, L, C] in `config.dtype`.

        The mask is False on padding and has at least one True per row. The output of valid tokens does not depend on
        the padding; the output at padding is meaningless.
        """
        config = self.config
        init = partitioned(EMBEDDING_INIT, ("vocab", "embed"))
        embed_tokens = self.param("embed_tokens", init, (config.vocab_size, config.d_model), jnp.float32)
        blocks = nn.scan(
            T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )(config, name="layers")
        x = embed_tokens[tokens].astype(config.dtype)  # [B, L, C]
        x, _ = blocks(x, self._position_bias(tokens.shape[1]), mask)
        return RMSNorm(config.layer_norm_epsilon, name="final_layer_norm")(x)

    def _position_bias(self, length: int) -> jax.Array:
        """Returns the relative position bias that every block adds to its logits, [1, H, L, L] in `config.dtype`."""
        config = self.config
        init = partitioned(EMBEDDING_INIT, (None, None))
        table_shape = (config.relative_attention_num_buckets, config.num_heads)
        table = self.param("relative_attention_bias", init, table_shape, jnp.float32)
        bias_by_distance = table[relative_buckets(np.arange(-length + 1, length), config)]  # [2 L - 1, H]
        positions = jnp.arange(length)
        bias = bias_by_distance[positions - positions[:, None] + length - 1]  # [L, L, H]
        # Cast after the lookup: the gradient of a table entry, summed over all lookups, then stays in float32.
        return bias.transpose(2, 0, 1)[None].astype(config.dtype)


def relative_buckets(distances: np.ndarray, config: T5Config) -> np.ndarray:
    """Returns T5's bidirectional bucket, int32, of each distance (key position minus query position).

    The first half of the buckets is for keys at or before the query, the second for those after it. In each half, small
    distances have a bucket each; larger ones share buckets whose width grows in proportion to the distance.

    Computed in NumPy, once per length: the rounding of an accelerator's logarithm would shift the bucket limits.
    """
    num_buckets = config.relative_attention_num_buckets // 2  # of one direction
    num_exact = num_buckets // 2
    absolute = np.abs(distances)
    ratio = np.maximum(absolute, num_exact).astype(np.float32) / np.float32(num_exact)
    fraction = np.log(ratio) / np.float32(math.log(config.relative_attention_max_distance / num_exact))
    shared = num_exact + (fraction * np.float32(num_buckets - num_exact)).astype(np.int32)
    bucket = np.where(absolute < num_exact, absolute, np.minimum(shared, num_buckets - 1))
    return (bucket + num_buckets * (distances > 0)).astype(np.int32)
