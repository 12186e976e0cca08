"""How well a picture was reconstructed: PSNR and SSIM, one value a picture."""

import dm_pix
import jax
import jax.numpy as jnp

SSIM_WINDOW = 11  # pixels; smaller pictures are compared in the largest odd window that fits


def psnr(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each picture in decibels, `[B]` float32.

    Pictures are `[B, H, W, C]` with values in [-1, 1], so the peak is 2; the reconstruction is clipped to that range,
    as it is when shown. The squared error is floored at 1e-10 (106 dB), so that a perfect copy does not make an
    average infinite.
    """
    error = jnp.clip(reconstruction.astype(jnp.float32), -1.0, 1.0) - images.astype(jnp.float32)
    mean_squared_error = jnp.mean(error**2, axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-10))


def ssim(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Structural similarity of each picture (Wang et al. 2004), `[B]` float32, 1 for a perfect copy.

    Pictures are `[B, H, W, C]` with values in [-1, 1], the reconstruction clipped to that; the mean over channels, with
    the authors' Gaussian window of 11 pixels (sigma 1.5).
    """
    to_unit = lambda x: jnp.clip(x.astype(jnp.float32), -1.0, 1.0) * 0.5 + 0.5  # noqa: E731
    side = min(SSIM_WINDOW, *images.shape[1:3])
    window = side - 1 + side % 2
    return dm_pix.ssim(to_unit(reconstruction), to_unit(images), max_val=1.0, filter_size=window)
