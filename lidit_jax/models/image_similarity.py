"""PSNR and SSIM of reconstructed images, one value per image."""

import dm_pix
import jax
import jax.numpy as jnp

SSIM_WINDOW = 11  # pixels; smaller images use the largest odd window that fits


def psnr(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Computes the peak signal-to-noise ratio of each image in decibels.

    The squared error is floored at 1e-10 (106 dB), so that a perfect copy does not make an average infinite.

    Args:
      reconstruction: `[B, H, W, C]`, clipped to [-1, 1] as for display.
      images: `[B, H, W, C]`, values in [-1, 1], so the peak is 2.

    Returns:
      `[B]` float32.
    """
    error = jnp.clip(reconstruction.astype(jnp.float32), -1.0, 1.0) - images.astype(jnp.float32)
    mean_squared_error = jnp.mean(error**2, axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-10))


def ssim(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Computes the structural similarity of each image (Wang et al. 2004), averaged over channels.

    The window is the authors' Gaussian of 11 pixels (sigma 1.5).

    Args:
      reconstruction: `[B, H, W, C]`, clipped to [-1, 1].
      images: `[B, H, W, C]`, values in [-1, 1].

    Returns:
      `[B]` float32, 1 for a perfect copy.
    """
    side = min(SSIM_WINDOW, *images.shape[1:3])
    window = side - 1 + side % 2
    return dm_pix.ssim(_to_unit_range(reconstruction), _to_unit_range(images), max_val=1.0, filter_size=window)


def _to_unit_range(images: jax.Array) -> jax.Array:
    """Clips images to [-1, 1] and maps them to [0, 1], float32."""
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0) * 0.5 + 0.5
