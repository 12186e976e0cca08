"""Layers of the autoencoder, NHWC, each with the parameter names of its twin in diffusers."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.layers import CONV_INIT, Conv, Dense
from lidit_jax.models.products import add_bias, convolve, product_precision

KERNEL_AXES = ("conv_in", "conv_out")  # the logical axes of a convolution's input and output channels
NORM_EPSILON = 1e-6  # diffusers' AutoencoderKL fixes it; it is in no config
MAX_SCORES = 4096**2  # of attention at once, a picture: 64 MB, those of all positions of 512 x 512 pixels


def _bias_init():
    return nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))


def conv(features: int, dtype, name: str | None = None, kernel_size: int = 3, stride: int = 1, padding="SAME") -> Conv:
    """A convolution of `[B, H, W, C]`; with dtype float32, in float32 on accelerators too."""
    return Conv(features, KERNEL_AXES, kernel_size, stride, padding, bias_axis="norm", dtype=dtype, name=name)


@flax.struct.dataclass
class GroupStatistics:
    """Mean and variance over the positions and channels of each group: `[B, groups]` float32."""

    mean: jax.Array
    variance: jax.Array


class GroupNorm(nn.Module):
    """Group normalisation (arXiv 1803.08494) of `[B, H, W, C]`, statistics in float32.

    Sums each channel first and joins the groups on `[B, C]`: splitting C, the axis that a vector unit holds, would cost
    a quarter of a small autoencoder's step on a CPU. The variance takes a second pass, because E[x^2] - E[x]^2 loses
    that of a group whose mean is large.
    """

    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, statistics: GroupStatistics | None = None) -> jax.Array:
        """Normalises by the statistics of x or, where x is a part of a picture, by those given."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (channels,))
        bias = self.param("bias", _bias_init(), (channels,))
        x = x.astype(jnp.float32)
        if statistics is None:
            statistics = group_statistics(x, self.num_groups)
        spread = lambda value: jnp.repeat(value, channels // self.num_groups, axis=-1)[:, None, None, :]  # noqa: E731
        inverse = spread(jax.lax.rsqrt(statistics.variance + NORM_EPSILON))  # [B, 1, 1, C]
        return ((x - spread(statistics.mean)) * (inverse * scale) + bias).astype(self.dtype)


def group_statistics(x: jax.Array, num_groups: int, weights: jax.Array | None = None) -> GroupStatistics:
    """Of float32 `[B, H, W, C]`; the positions weighted by `[H, W]`, which sum to 1, or all alike."""

    def group_mean(x: jax.Array) -> jax.Array:
        if weights is None:
            of_channels = jnp.mean(x, axis=(1, 2))
        else:
            of_channels = jnp.einsum("bhwc,hw->bc", x, weights, precision=product_precision(x.dtype))
        return jnp.mean(of_channels.reshape(x.shape[0], num_groups, -1), axis=-1)  # [B, groups]

    mean = group_mean(x)
    centred = x - jnp.repeat(mean, x.shape[-1] // num_groups, axis=-1)[:, None, None, :]
    return GroupStatistics(mean, group_mean(centred**2))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU and a 3x3 convolution, twice, and a residual: `[B, H, W, C] -> [B, H, W, features]`."""

    features: int
    norm_num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        x = nn.silu(GroupNorm(self.norm_num_groups, self.dtype, name="norm1")(x))
        x = conv(self.features, self.dtype, "conv1")(x)  # [B, H, W, features]
        x = nn.silu(GroupNorm(self.norm_num_groups, self.dtype, name="norm2")(x))
        x = conv(self.features, self.dtype, "conv2")(x)
        if residual.shape[-1] != self.features:
            residual = conv(self.features, self.dtype, "conv_shortcut", kernel_size=1)(residual)
        return residual + x


class AttentionBlock(nn.Module):
    """One-head self-attention over all positions, around a residual: `[B, H, W, C] -> [B, H, W, C]`."""

    norm_num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape

        def dense(name: str) -> Dense:
            return Dense(channels, KERNEL_AXES, bias_axis="norm", kernel_init=CONV_INIT, dtype=self.dtype, name=name)

        hidden = GroupNorm(self.norm_num_groups, self.dtype, name="group_norm")(x)
        hidden = hidden.reshape(batch, height * width, 1, channels)  # [B, L, 1 head, C]
        query, key, value = dense("to_q")(hidden), dense("to_k")(hidden), dense("to_v")(hidden)
        hidden = dense("to_out_0")(_attend(query, key, value))
        return x + hidden.reshape(batch, height, width, channels)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of `[B, L, 1, C]`; for many positions, some queries at a time: all scores at once would be L x L.

    Its softmax is float32 whatever the inputs are.
    """
    batch, length, heads, channels = query.shape
    if length**2 <= MAX_SCORES:
        return dot_product_attention(query, key, value, implementation="xla")
    at_once = max(1, MAX_SCORES // length)
    chunks = -(-length // at_once)
    padded = jnp.pad(query, ((0, 0), (0, chunks * at_once - length), (0, 0), (0, 0)))
    padded = padded.reshape(batch, chunks, at_once, heads, channels).swapaxes(0, 1)
    attend = lambda part: dot_product_attention(part, key, value, implementation="xla")  # noqa: E731
    attended = jax.lax.map(attend, padded)
    return attended.swapaxes(0, 1).reshape(batch, chunks * at_once, heads, channels)[:, :length]


class MidBlock(nn.Module):
    """The coarsest resolution: a residual block, attention if asked for, a residual block."""

    norm_num_groups: int
    add_attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = ResnetBlock(channels, self.norm_num_groups, self.dtype, name="resnets_0")(x)
        if self.add_attention:
            x = AttentionBlock(self.norm_num_groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(channels, self.norm_num_groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves both sides with a strided convolution, padded at the bottom and right alone."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(x.shape[-1], self.dtype, "conv", stride=2, padding=((0, 1), (0, 1)))(x)  # [B, H/2, W/2, C]


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a 3x3 convolution, see `enlarge_and_convolve`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _EnlargingConv(x.shape[-1], self.dtype, name="conv")(x)  # [B, 2H, 2W, C]


class _EnlargingConv(nn.Module):
    """A 3x3 convolution's parameters, used by `enlarge_and_convolve`."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(CONV_INIT, (None, None, *KERNEL_AXES))
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", _bias_init(), (self.features,))
        return add_bias(enlarge_and_convolve(x.astype(self.dtype), kernel), bias, "norm", KERNEL_AXES[1])


# Rows 2p - 1 and 2p of an enlarged picture convolved with three taps: what rows p - 1 and p of the original give to
# each, as sums of taps.
_TAPS = np.array([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], np.float32)  # [row, original's row, tap]


@jax.custom_vjp
def enlarge_and_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest-neighbour doubling and a 3x3 convolution in one: `[B, H, W, C]` -> `[B, 2H, 2W, F]`.

    Four equal neighbours meet nine taps: sums of taps over the original give the same with 4/9 of the products, in half
    of the time on a CPU. The gradient is that of the plain form, whose own convolutions are the faster ones.

    Args:
        x: of any floating point type, in which it is computed.
        kernel: `[3, 3, C, F]` float32.
    """
    batch, height, width, _ = x.shape
    features = kernel.shape[-1]
    sums = jnp.einsum("ruk,svl,klcf->uvcrsf", _TAPS, _TAPS, kernel, precision=product_precision(kernel.dtype))
    sums = sums.reshape(2, 2, -1, 4 * features).astype(x.dtype)
    # [B, H + 1, W + 1, 4F]: a pixel too many on each side.
    fours = convolve(x, sums, (None, None), padding=((1, 1), (1, 1)))
    fours = fours.reshape(batch, height + 1, width + 1, 2, 2, features).swapaxes(2, 3)
    return fours.reshape(batch, 2 * height + 2, 2 * width + 2, features)[:, 1:-1, 1:-1]


def _enlarge_then_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return convolve(x, kernel, KERNEL_AXES)


enlarge_and_convolve.defvjp(
    lambda x, kernel: (enlarge_and_convolve(x, kernel), (x, kernel)),
    lambda inputs, cotangent: jax.vjp(_enlarge_then_convolve, *inputs)[1](cotangent),
)


class DownBlock(nn.Module):
    """The encoder's residual blocks at one resolution, then a halving unless it is the last."""

    features: int
    num_layers: int
    norm_num_groups: int
    add_downsample: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.num_layers):
            x = ResnetBlock(self.features, self.norm_num_groups, self.dtype, name=f"resnets_{layer}")(x)
        return Downsample(self.dtype, name="downsamplers_0")(x) if self.add_downsample else x


class UpBlock(nn.Module):
    """The decoder's residual blocks at one resolution, then a doubling unless it is the last."""

    features: int
    num_layers: int
    norm_num_groups: int
    add_upsample: bool
    dtype: Any = jnp.float32

    def setup(self):
        self.resnets = [ResnetBlock(self.features, self.norm_num_groups, self.dtype) for _ in range(self.num_layers)]
        self.upsamplers = [Upsample(self.dtype)] if self.add_upsample else []

    def residual(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x

    def upsample(self, x: jax.Array) -> jax.Array:
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x
