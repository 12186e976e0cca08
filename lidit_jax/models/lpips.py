"""LPIPS, the perceptual distance of two images (Zhang et al. 2018, arXiv 1801.03924): version 0.1 with VGG16."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.sharded_matmul import product_precision

# VGG16's convolutions up to each of the five layers that are compared: (index in torchvision's `features`, channels).
VGG16_LAYERS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SMALLEST_SIDE = 2 ** (len(VGG16_LAYERS) - 1)  # pixels: the last layer then has one position
# Channel means and standard deviations of ImageNet for values in [-1, 1], as in the authors' code.
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Perceptual distance between two batches of images.

    The features of five layers, each position scaled to unit length, are subtracted and squared, then averaged with a
    learned non-negative weight per channel. Computes in float32.

    Attributes:
      product_dtype: with float32, convolutions have full float32 precision on accelerators too; with bfloat16, they
        use the accelerator's default precision, which is as accurate as images that were computed in bfloat16.
    """

    product_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """first and second [B, H, W, 3], values in [-1, 1] -> distances [B] float32, 0 for equal images.

        Raises:
          UserError: if a side of the images is shorter than `SMALLEST_SIDE`.
        """
        height, width = first.shape[1:3]
        if min(height, width) < SMALLEST_SIDE:
            raise UserError(
                f"images of {height}x{width} pixels are too small for LPIPS: each side must be at least {SMALLEST_SIDE}"
            )
        x = jnp.concatenate([first, second]).astype(jnp.float32)
        x = (x - jnp.array(MEAN)) / jnp.array(DEVIATION)
        distance = jnp.zeros(first.shape[0])
        precision = product_precision(self.product_dtype)
        for index, layer in enumerate(VGG16_LAYERS):
            if index:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for number, width in layer:
                x = nn.relu(nn.Conv(width, (3, 3), precision=precision, name=f"features_{number}")(x))
            weights = self.param(f"lin{index}", nn.initializers.ones, (x.shape[-1],))
            first_features, second_features = jnp.split(_unit_length(x), 2)
            squares = (first_features - second_features) ** 2
            distance += jnp.mean(jnp.sum(weights * squares, axis=-1), axis=(1, 2))
        return distance


def _unit_length(x: jax.Array) -> jax.Array:
    # The square root's gradient at 0, where all features of a position are zero, would be infinite.
    length = jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-20)
    return x / (length + 1e-10)
