"""Layers shared by the refiners and the diffusion transformer.

Parameters are float32 and carry logical axis names (`parallel/rules.py` maps them to mesh axes). Matrix products run
in `dtype`; normalisation, modulation and the timestep embedding stay in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.initialize import partitioned
from lidit_jax.models.remat import ATTENTION_OUTPUT, FFN_OUTPUT, PROJECTION, saved_as
from lidit_jax.models.rotary import RotaryTables, rotate
from lidit_jax.models.sharded_matmul import add_bias, convolve, matmul

# Xavier-uniform, as in DiT and its descendants.
KERNEL_INIT = nn.initializers.xavier_uniform()
CONV_INIT = nn.initializers.lecun_normal()
# Gates and outputs start at zero, so that every block starts as the identity (adaLN-zero, DiT section 3.2).
ZERO_INIT = nn.initializers.zeros_init()
# Supported compute dtypes. float16 is not one of them: its range overflows in LLMs.
DTYPES = ("float32", "bfloat16")
# Logical axes of the activations between layers, [B, L, C].
ACTIVATION = ("batch", "length", "embed_activation")
# Activation functions of published models, by their names in transformers.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Hyper-parameters shared by all attention and feed-forward layers of a network.

    Attributes:
      num_heads: number of attention heads.
      mlp_ratio: inner width of the feed-forward layers as a multiple of the model width.
      qk_norm: apply RMSNorm over the head size to queries and keys before their product (paper section 3.2). It bounds
        the logits, and so keeps bfloat16 training of deep models stable.
      attention: attention implementation, see `dot_product_attention`.
      dtype: dtype of the matrix products.
      remat: rematerialisation policy of a block of these layers, one of `REMAT_POLICIES`.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    attention: str = "auto"
    dtype: Any = jnp.float32
    remat: str = "none"


def check_dtype(key: str, dtype: str) -> None:
    """Raises UserError, with the name of the config field `key`, if `dtype` is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(f"{key}={dtype!r:.80} is not supported: use one of {', '.join(DTYPES)}")


class Dense(nn.Module):
    """Linear layer over the last axis, whose kernel has the logical axes `axes`.

    With `dtype` float32 the product has full float32 precision, on accelerators too (`models/sharded_matmul.py`).
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    bias_axis: str = "bias"
    kernel_init: Any = KERNEL_INIT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C_in] -> [..., features] in `dtype`."""
        kernel_init = partitioned(self.kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = matmul(x.astype(self.dtype), kernel, self.axes)
        return _with_bias(self, y) if self.use_bias else y


class Conv(nn.Module):
    """Two-dimensional convolution, whose kernel's channel axes (the last two) have the logical axes `axes`."""

    features: int
    axes: tuple[str | None, str | None]
    kernel_size: int = 3
    strides: int = 1
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME"
    use_bias: bool = True
    bias_axis: str = "bias"
    kernel_init: Any = CONV_INIT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C_in] -> [B, H', W', features] in `dtype`."""
        kernel_init = partitioned(self.kernel_init, (None, None, *self.axes))
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        strides = (self.strides, self.strides)
        y = convolve(x.astype(self.dtype), kernel, self.axes, strides=strides, padding=self.padding)
        return _with_bias(self, y) if self.use_bias else y


def _with_bias(layer: Dense | Conv, y: jax.Array) -> jax.Array:
    """Adds the layer's bias parameter, initialised to zero, to y [..., features]."""
    bias_init = partitioned(ZERO_INIT, (layer.bias_axis,))
    bias = layer.param("bias", bias_init, (layer.features,), jnp.float32)
    return add_bias(y, bias, layer.bias_axis, layer.axes[1])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 and returned in the dtype of x."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight_init = partitioned(nn.initializers.ones, ("norm",))
        weight = self.param("weight", weight_init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * weight).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Applies LayerNorm without learned scale or shift; returns float32, for the adaLN modulation that follows."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Applies adaLN modulation, x (1 + scale) + shift, to x [B, L, C]; shift and scale are [B, C]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """SiLU and a zero-initialised linear layer, from the conditioning vector to `num_vectors` modulation vectors."""

    num_vectors: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, conditioning: jax.Array) -> list[jax.Array]:
        """conditioning [B, C_in] -> `num_vectors` arrays [B, C], float32."""
        dense = Dense(
            self.num_vectors * self.features, ("embed", "modulation"), kernel_init=ZERO_INIT, dtype=self.dtype
        )
        vectors = dense(nn.silu(conditioning)).astype(jnp.float32)
        return jnp.split(vectors, self.num_vectors, axis=-1)


def timestep_embedding(timesteps: jax.Array, features: int, max_period: float = 10_000.0) -> jax.Array:
    """Returns the sinusoidal embedding of timesteps [B], float32 [B, features], cosines first as in DiT."""
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies  # [B, features / 2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep embedding followed by a two-layer MLP, in float32: [B] -> [B, C]."""

    features: int
    frequency_features: int = 256

    @nn.compact
    def __call__(self, timesteps: jax.Array) -> jax.Array:
        x = timestep_embedding(timesteps, self.frequency_features)
        x = Dense(self.features, (None, "embed"), name="in")(x)
        return Dense(self.features, ("embed", "embed_out"), name="out")(nn.silu(x))


class FeedForward(nn.Module):
    """Feed-forward network, linear, tanh-GELU, linear: [B, L, C] -> [B, L, C]."""

    layers: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, dtype = x.shape[-1], self.layers.dtype
        x = Dense(int(features * self.layers.mlp_ratio), ("embed", "mlp"), dtype=dtype, name="in")(x)
        x = nn.gelu(x, approximate=True)
        return saved_as(FFN_OUTPUT, Dense(features, ("mlp", "embed"), dtype=dtype, name="out")(x))


def rotate_query_and_key(
    query: jax.Array, key: jax.Array, rotary: RotaryTables | None, context_rotary: RotaryTables | None
) -> tuple[jax.Array, jax.Array]:
    """Applies rotary position embedding to queries and keys.

    Args:
      query: [B, L, H, D].
      key: [B, M, H, D].
      rotary: tables of the queries' L positions; None disables the rotation of both.
      context_rotary: tables of the keys' M positions; None uses those of the queries.

    Returns:
      The rotated queries and keys.
    """
    if rotary is None:
        return query, key
    return rotate(query, *rotary), rotate(key, *(rotary if context_rotary is None else context_rotary))


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention to a context."""

    layers: LayerConfig
    is_causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        key_mask: jax.Array | None = None,
        rotary: RotaryTables | None = None,
        context_rotary: RotaryTables | None = None,
    ) -> jax.Array:
        """x [B, L, C], context [B, M, C] (default: x), key_mask bool [B, M] -> [B, L, C].

        `rotary` holds the rotary tables of the L queries, `context_rotary` those of the M keys of a context. The
        rotation makes logits depend on the distance between two tokens.
        """
        batch, length, features = x.shape
        context = x if context is None else context
        num_heads, dtype = self.layers.num_heads, self.layers.dtype
        head_shape = (num_heads, features // num_heads)
        query = Dense(features, ("embed", "heads"), dtype=dtype, name="query")(x)
        key = Dense(features, ("embed", "heads"), dtype=dtype, name="key")(context)
        value = Dense(features, ("embed", "heads"), dtype=dtype, name="value")(context)
        query, key, value = (saved_as(PROJECTION, x) for x in (query, key, value))
        query = query.reshape(batch, length, *head_shape)  # [B, L, H, D]
        key = key.reshape(batch, -1, *head_shape)  # [B, M, H, D]
        value = value.reshape(batch, -1, *head_shape)
        if self.layers.qk_norm:
            query = RMSNorm(name="query_norm")(query)
            key = RMSNorm(name="key_norm")(key)
        query, key = rotate_query_and_key(query, key, rotary, context_rotary)
        y = dot_product_attention(
            query, key, value, key_mask=key_mask, is_causal=self.is_causal, implementation=self.layers.attention
        )
        y = y.reshape(batch, length, features)
        return saved_as(ATTENTION_OUTPUT, Dense(features, ("heads", "embed"), dtype=dtype, name="out")(y))
