"""Layers of the autoencoder in NHWC layout, with the parameter names of the same layers in diffusers."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.initialize import partitioned
from lidit_jax.models.layers import CONV_INIT, Conv, Dense
from lidit_jax.models.sharded_matmul import add_bias, convolve, product_precision

KERNEL_AXES = ("conv_in", "conv_out")  # logical axes of a convolution's input and output channels
NORM_EPSILON = 1e-6  # a constant of diffusers' AutoencoderKL, not a config field
MAX_SCORES = 4096**2  # attention scores computed at once per image: 64 MB, all pairs of positions of 512 x 512 pixels


def _bias_init():
    return partitioned(nn.initializers.zeros, ("norm",))


def conv(features: int, dtype, name: str | None = None, kernel_size: int = 3, stride: int = 1, padding="SAME") -> Conv:
    """Returns a convolution for `[B, H, W, C]` with the logical axes of the autoencoder.

    With dtype float32 it has full float32 precision, on accelerators too.
    """
    return Conv(features, KERNEL_AXES, kernel_size, stride, padding, bias_axis="norm", dtype=dtype, name=name)


@flax.struct.dataclass
class GroupStatistics:
    """Mean and variance over the positions and channels of each group.

    Attributes:
      mean: `[B, groups]` float32.
      variance: `[B, groups]` float32.
    """

    mean: jax.Array
    variance: jax.Array


class GroupNorm(nn.Module):
    """Group normalisation (arXiv 1803.08494) of `[B, H, W, C]`, statistics in float32.

    Each channel is reduced over positions first, and the groups are formed on the resulting `[B, C]`: splitting C, the
    vectorised axis, of the full array would cost a quarter of a small autoencoder's step on a CPU. The variance takes a
    second pass over x, because E[x^2] - E[x]^2 cancels in groups with a large mean.
    """

    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, statistics: GroupStatistics | None = None) -> jax.Array:
        """Normalises x `[B, H, W, C]` by `statistics` (tiled decoding) or, if None, by those of x."""
        channels = x.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones, ("norm",)), (channels,))
        bias = self.param("bias", _bias_init(), (channels,))
        x = x.astype(jnp.float32)
        if statistics is None:
            statistics = group_statistics(x, self.num_groups)
        mean = _repeat_over_channels(statistics.mean, channels)
        inverse = _repeat_over_channels(jax.lax.rsqrt(statistics.variance + NORM_EPSILON), channels)
        return ((x - mean) * (inverse * scale) + bias).astype(self.dtype)


def _repeat_over_channels(statistic: jax.Array, channels: int) -> jax.Array:
    """Repeats a statistic of groups [B, groups] for each channel of a group: [B, 1, 1, C]."""
    return jnp.repeat(statistic, channels // statistic.shape[-1], axis=-1)[:, None, None, :]


def group_statistics(x: jax.Array, num_groups: int, weights: jax.Array | None = None) -> GroupStatistics:
    """Computes the group statistics of x.

    Args:
      x: `[B, H, W, C]` float32.
      num_groups: number of groups; divides C.
      weights: weights of the positions, `[H, W]`, with sum 1; None weighs all positions equally.
    """

    def group_mean(x: jax.Array) -> jax.Array:
        if weights is None:
            channel_means = jnp.mean(x, axis=(1, 2))
        else:
            channel_means = jnp.einsum("bhwc,hw->bc", x, weights, precision=product_precision(x.dtype))
        return jnp.mean(channel_means.reshape(x.shape[0], num_groups, -1), axis=-1)  # [B, groups]

    mean = group_mean(x)
    centred = x - _repeat_over_channels(mean, x.shape[-1])
    return GroupStatistics(mean, group_mean(centred**2))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU and 3x3 convolution, twice, with a residual: `[B, H, W, C] -> [B, H, W, features]`."""

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
    """Single-head self-attention over all positions, with a residual: `[B, H, W, C] -> [B, H, W, C]`."""

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
    """Computes attention of `[B, L, 1, C]`, in chunks of queries where all L x L scores would need too much memory.

    The softmax is float32 for any input dtype.
    """
    batch, length, heads, channels = query.shape
    if length**2 <= MAX_SCORES:
        return dot_product_attention(query, key, value, implementation="xla")
    chunk_length = max(1, MAX_SCORES // length)
    num_chunks = -(-length // chunk_length)
    padded = jnp.pad(query, ((0, 0), (0, num_chunks * chunk_length - length), (0, 0), (0, 0)))
    padded = padded.reshape(batch, num_chunks, chunk_length, heads, channels).swapaxes(0, 1)

    def attend(chunk: jax.Array) -> jax.Array:
        return dot_product_attention(chunk, key, value, implementation="xla")

    attended = jax.lax.map(attend, padded)
    return attended.swapaxes(0, 1).reshape(batch, num_chunks * chunk_length, heads, channels)[:, :length]


class MidBlock(nn.Module):
    """The layers at the coarsest resolution: a residual block, optional attention, a residual block."""

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
    """Halves both sides with a strided convolution, padded only at the bottom and right."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(x.shape[-1], self.dtype, "conv", stride=2, padding=((0, 1), (0, 1)))(x)  # [B, H/2, W/2, C]


class Upsample(nn.Module):
    """Doubles both sides: nearest-neighbour upsampling, then a 3x3 convolution, see `upsample_and_convolve`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _UpsampleConv(x.shape[-1], self.dtype, name="conv")(x)  # [B, 2H, 2W, C]


class _UpsampleConv(nn.Module):
    """Holds the parameters of the 3x3 convolution in `upsample_and_convolve`."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = partitioned(CONV_INIT, (None, None, *KERNEL_AXES))
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", _bias_init(), (self.features,))
        return add_bias(upsample_and_convolve(x.astype(self.dtype), kernel), bias, "norm", KERNEL_AXES[1])


# A three-tap convolution of an image with doubled rows, expressed on the original: output rows 2p - 1 and 2p are
# weighted sums of the original rows p - 1 and p, where each weight is a sum of taps.
_TAPS = np.array([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], np.float32)  # [output row, original row, tap]


@jax.custom_vjp
def upsample_and_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes nearest-neighbour upsampling by 2 and a 3x3 convolution as one convolution.

    After upsampling, the nine taps of an output position meet only four distinct pixels. A 2x2 convolution of the
    original with sums of taps gives the same result with 4/9 of the products, in half of the time on a CPU. The
    gradient is computed in the unfused form, whose own convolutions are faster.

    Args:
      x: `[B, H, W, C]` in any floating point dtype, which is also the compute dtype.
      kernel: `[3, 3, C, F]` float32.

    Returns:
      `[B, 2H, 2W, F]` in the dtype of x.
    """
    batch, height, width, _ = x.shape
    features = kernel.shape[-1]
    tap_sums = jnp.einsum("ruk,svl,klcf->uvcrsf", _TAPS, _TAPS, kernel, precision=product_precision(kernel.dtype))
    tap_sums = tap_sums.reshape(2, 2, -1, 4 * features).astype(x.dtype)
    # [B, H + 1, W + 1, 4F]: one output pixel too many on each side, removed below.
    y = convolve(x, tap_sums, (None, None), padding=((1, 1), (1, 1)))
    y = y.reshape(batch, height + 1, width + 1, 2, 2, features).swapaxes(2, 3)
    return y.reshape(batch, 2 * height + 2, 2 * width + 2, features)[:, 1:-1, 1:-1]


def _upsample_then_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes the same without fusing upsampling and convolution, for the gradient."""
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return convolve(x, kernel, KERNEL_AXES)


upsample_and_convolve.defvjp(
    lambda x, kernel: (upsample_and_convolve(x, kernel), (x, kernel)),
    lambda inputs, cotangent: jax.vjp(_upsample_then_convolve, *inputs)[1](cotangent),
)


class DownBlock(nn.Module):
    """The encoder's residual blocks at one resolution, then a downsampling unless it is the last one."""

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
    """The decoder's residual blocks at one resolution, then an upsampling unless it is the last one."""

    features: int
    num_layers: int
    norm_num_groups: int
    add_upsample: bool
    dtype: Any = jnp.float32

    def setup(self):
        self.resnets = [ResnetBlock(self.features, self.norm_num_groups, self.dtype) for _ in range(self.num_layers)]
        self.upsamplers = [Upsample(self.dtype)] if self.add_upsample else []

    def residual(self, x: jax.Array) -> jax.Array:
        """Runs the residual blocks: `[B, H, W, C]` -> `[B, H, W, features]`."""
        for resnet in self.resnets:
            x = resnet(x)
        return x

    def upsample(self, x: jax.Array) -> jax.Array:
        """Runs the upsampling, if there is one: `[B, H, W, C]` -> `[B, 2H, 2W, C]`."""
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x
