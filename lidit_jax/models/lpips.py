"""LPIPS, how different two pictures look (Zhang et al. 2018, arXiv 1801.03924), as a loss: version 0.1 on VGG16."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.products import product_precision

# VGG16's convolutions: (number in torchvision's `features`, width), up to each of the five layers that are compared.
VGG16_LAYERS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SMALLEST_SIDE = 2 ** (len(VGG16_LAYERS) - 1)  # pixels: the last layer then sees one position
# Of ImageNet's pictures with values in [-1, 1], as the authors' code has them.
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Perceptual distance of pictures, `[B, H, W, 3]` each, values in [-1, 1]: `[B]` float32, 0 for equal ones.

    Five layers' features, each position's scaled to length 1, are subtracted and squared; weights of 0 or more, one a
    channel, say how much each counts. Computes in float32.

    Attributes:
      product_dtype: with float32, convolutions multiply in float32 on accelerators too; with bfloat16, in whatever the
        accelerator is fastest at, which is as exact as pictures that were computed in bfloat16.
    """

    product_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Raises UserError for pictures with a side shorter than `SMALLEST_SIDE`."""
        height, width = first.shape[1:3]
        if min(height, width) < SMALLEST_SIDE:
            raise UserError(f"pictures of {height}x{width} are too small for LPIPS: {SMALLEST_SIDE} pixels or more")
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
            one, other = jnp.split(_unit_length(x), 2)
            distance += jnp.mean(jnp.sum(weights * (one - other) ** 2, axis=-1), axis=(1, 2))
        return distance


def _unit_length(x: jax.Array) -> jax.Array:
    # The root's gradient at 0, where a position has no feature at all, would be infinite.
    length = jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-20)
    return x / (length + 1e-10)
