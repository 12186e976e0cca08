"""PatchGAN discriminator for training the autoencoder (Isola et al. 2017, arXiv 1611.07004).

The network is `NLayerDiscriminator` of the latent diffusion code: it scores overlapping patches, not complete images.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.models.initialize import partitioned
from lidit_jax.models.layers import Conv

KERNEL_INIT = nn.initializers.normal(0.02)
MAX_WIDTH_MULTIPLIER = 8  # largest layer width as a multiple of the first layer's width


class PatchDiscriminator(nn.Module):
    """Scores every patch of images `[B, H, W, C]`: `[B, h, w, 1]` float32, high for patches that look real.

    4x4 convolutions and leaky ReLUs: the first `layers` convolutions have stride 2, the last two have stride 1 and
    shrink each side by one pixel. All but the first and the last are followed by batch normalisation with the
    statistics of the current batch (or micro-batch) over all devices, so real images and reconstructions go through in
    separate calls.

    Attributes:
      width: number of features of the first layer; each layer doubles it, up to eight times.
      layers: number of layers with batch normalisation.
      dtype: dtype of the convolutions; batch normalisation and the scores are float32.
    """

    width: int = 64
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = _leaky(self._conv(self.width, 2, "conv_0")(images))
        for layer in range(1, self.layers + 1):
            width = self.width * min(2**layer, MAX_WIDTH_MULTIPLIER)
            stride = 2 if layer < self.layers else 1
            x = self._conv(width, stride, f"conv_{layer}", use_bias=False)(x)
            x = _leaky(BatchNorm(name=f"norm_{layer}")(x).astype(self.dtype))
        return self._conv(1, 1, "conv_out", dtype=jnp.float32)(x)

    def _conv(self, features: int, stride: int, name: str, use_bias: bool = True, dtype: Any = None) -> Conv:
        return Conv(
            features,
            ("conv_in", "conv_out"),
            kernel_size=4,
            strides=stride,
            padding=((1, 1), (1, 1)),
            use_bias=use_bias,
            bias_axis="norm",
            kernel_init=KERNEL_INIT,
            dtype=dtype or self.dtype,
            name=name,
        )


class BatchNorm(nn.Module):
    """Normalises each channel of `[B, H, W, C]` over batch and positions in float32, without running averages."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", partitioned(_normal_around_one, ("norm",)), (x.shape[-1],))
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=(0, 1, 2))
        return x * (jax.lax.rsqrt(jnp.mean(x**2, axis=(0, 1, 2)) + 1e-5) * scale) + bias


def smallest_side(layers: int) -> int:
    """Returns the smallest image side, in pixels, that contains one complete patch."""
    return 3 * 2**layers


def _normal_around_one(key, shape, dtype=jnp.float32):
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


def _leaky(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, 0.2)
