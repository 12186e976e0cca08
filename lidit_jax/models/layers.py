"""Layers shared by the refiners and the diffusion transformer.

Parameters are float32 and carry logical axis names (`parallel/rules.py` maps them to mesh axes). Matrix products run
in `dtype`; normalisation, modulation and the timestep embedding stay in float32.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.products import add_bias, convolve, matmul
from lidit_jax.models.rotary import RotaryTables, rotate

# Xavier-uniform, as DiT and its descendants use for transformer matrices.
KERNEL_INIT = nn.initializers.xavier_uniform()
CONV_INIT = nn.initializers.lecun_normal()
# Zero: a gate or an output that starts closed leaves the residual stream untouched (adaLN-zero, DiT section 3.2).
ZERO_INIT = nn.initializers.zeros_init()
# What models compute in. Half precision without bfloat16's range overflows in LLMs.
DTYPES = ("float32", "bfloat16")
# Of tokens between layers, [B, L, C].
ACTIVATION = ("batch", "length", "embed_activation")
# Of published models, by the names that transformers gives them.
ACTIVATIONS = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What all attention and feed-forward layers of a network share.

    Attributes:
      num_heads: of each attention.
      mlp_ratio: width of the feed-forward layers over the model's width.
      qk_norm: RMSNorm of queries and keys over the head size before their product (paper section 3.2). It bounds the
        logits, and so keeps bfloat16 training of deep models stable.
      attention: implementation, see `dot_product_attention`.
      dtype: of matrix products.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    attention: str = "auto"
    dtype: Any = jnp.float32


def check_dtype(key: str, dtype: str) -> None:
    """Raises UserError, naming the config's key, unless the dtype is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(f"{key}={dtype!r:.80} is not supported: use one of {', '.join(DTYPES)}")


class Dense(nn.Module):
    """Affine map over the last axis whose kernel carries the logical axes (`axes[0]`, `axes[1]`).

    With `dtype` float32 the product is one, on accelerators too (`models/products.py`).
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
        kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = matmul(x.astype(self.dtype), kernel, self.axes)
        return _with_bias(self, y) if self.use_bias else y


class Conv(nn.Module):
    """Convolution of [B, H, W, C_in] whose kernel's last axes carry the logical axes (`axes[0]`, `axes[1]`)."""

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
        kernel_init = nn.with_logical_partitioning(self.kernel_init, (None, None, *self.axes))
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        strides = (self.strides, self.strides)
        y = convolve(x.astype(self.dtype), kernel, self.axes, strides=strides, padding=self.padding)
        return _with_bias(self, y) if self.use_bias else y


def _with_bias(layer: Dense | Conv, y: jax.Array) -> jax.Array:
    """Adds the layer's bias, a parameter that is zero at initialisation, to y [..., features]."""
    bias_init = nn.with_logical_partitioning(ZERO_INIT, (layer.bias_axis,))
    bias = layer.param("bias", bias_init, (layer.features,), jnp.float32)
    return add_bias(y, bias, layer.bias_axis, layer.axes[1])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; statistics in float32, result in the dtype of x."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        weight = self.param("weight", weight_init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * weight).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """LayerNorm without learned scale or shift, float32 inside and out: adaLN's modulation follows it."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """adaLN: x [B, L, C] scaled and shifted by one vector a sample, shift and scale [B, C]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """SiLU and a linear map, zero at the start, from the conditioning vector to `num_vectors` vectors of width C."""

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
    """Sinusoids of the timestep: [B] in [0, 1000) -> float32 [B, features], cosines first (DDPM; DiT's order)."""
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies  # [B, features / 2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoids, then a two-layer MLP: [B] -> [B, C], float32."""

    features: int
    frequency_features: int = 256

    @nn.compact
    def __call__(self, timesteps: jax.Array) -> jax.Array:
        x = timestep_embedding(timesteps, self.frequency_features)
        x = Dense(self.features, (None, "embed"), name="in")(x)
        return Dense(self.features, ("embed", "embed_out"), name="out")(nn.silu(x))


class FeedForward(nn.Module):
    """Dense, tanh-GELU, dense: [B, L, C] -> [B, L, C]."""

    layers: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, dtype = x.shape[-1], self.layers.dtype
        x = Dense(int(features * self.layers.mlp_ratio), ("embed", "mlp"), dtype=dtype, name="in")(x)
        x = nn.gelu(x, approximate=True)
        return Dense(features, ("mlp", "embed"), dtype=dtype, name="out")(x)


def rotate_query_and_key(
    query: jax.Array, key: jax.Array, rotary: RotaryTables | None, context_rotary: RotaryTables | None
) -> tuple[jax.Array, jax.Array]:
    """Rotates queries [B, L, H, D] and keys [B, M, H, D] by tables of L and M positions.

    Args:
      rotary: the queries' tables; None leaves both as they are.
      context_rotary: the keys' tables; None: the queries'.
    """
    if rotary is None:
        return query, key
    return rotate(query, *rotary), rotate(key, *(rotary if context_rotary is None else context_rotary))


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to a context."""

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

        `rotary` holds the tables of L positions, `context_rotary` those of M where there is a context: queries and keys
        are rotated by them, so that a token finds another by how far away it is.
        """
        batch, length, features = x.shape
        context = x if context is None else context
        num_heads, dtype = self.layers.num_heads, self.layers.dtype
        head_shape = (num_heads, features // num_heads)
        query = Dense(features, ("embed", "heads"), dtype=dtype, name="query")(x)
        key = Dense(features, ("embed", "heads"), dtype=dtype, name="key")(context)
        value = Dense(features, ("embed", "heads"), dtype=dtype, name="value")(context)
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
        return Dense(features, ("heads", "embed"), dtype=dtype, name="out")(y)
