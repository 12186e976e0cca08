"""The training loss of the autoencoder, and how well it reconstructs."""

import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.vae import DiagonalGaussian


def reconstruction_loss(reconstruction: jax.Array, images: jax.Array, kind: str = "l1") -> jax.Array:
    """Mean absolute (`"l1"`) or squared (`"l2"`) error over all pictures, pixels and channels: a float32 scalar.

    Args:
        reconstruction: `[B, H, W, C]`.
        images: `[B, H, W, C]`, values in [-1, 1].

    Raises:
        UserError: `kind` is neither.
    """
    error = reconstruction.astype(jnp.float32) - images.astype(jnp.float32)
    if kind == "l1":
        return jnp.mean(jnp.abs(error))
    if kind == "l2":
        return jnp.mean(error**2)
    raise UserError(f"unknown reconstruction loss {kind!r}: use 'l1' or 'l2'")


def vae_loss(
    reconstruction: jax.Array, images: jax.Array, posterior: DiagonalGaussian, *, kl_weight: float, kind: str = "l1"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Reconstruction error + kl_weight * KL, both per value of the picture.

    The KL of a picture is summed over its latents and divided by the picture's H * W * C values, then averaged over
    the batch. The latent diffusion paper's loss (arXiv 2112.10752, `LPIPSWithDiscriminator` of its code) sums both
    terms, so its `kl_weight` (1e-6) means the same here; only the step size differs.

    Args:
        reconstruction: `[B, H, W, C]`.
        images: `[B, H, W, C]`, values in [-1, 1].
        posterior: the latents' distribution, batch B.
        kl_weight: strength of the KL term.
        kind: of the reconstruction error, `"l1"` or `"l2"`.

    Returns:
        The loss, and its parts before weighting: `reconstruction` and `kl`. All float32 scalars.

    Raises:
        UserError: `kind` is neither.
    """
    values_per_image = images.size // images.shape[0]
    parts = {
        "reconstruction": reconstruction_loss(reconstruction, images, kind),
        "kl": jnp.mean(posterior.kl()) / values_per_image,
    }
    return parts["reconstruction"] + kl_weight * parts["kl"], parts


def psnr(reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each picture in decibels, `[B]` float32.

    Pictures are `[B, H, W, C]` with values in [-1, 1], so the peak is 2; the reconstruction is clipped to that range,
    as it is when shown. The squared error is floored at 1e-10 (106 dB), so that a perfect copy does not make an
    average infinite.
    """
    error = jnp.clip(reconstruction.astype(jnp.float32), -1.0, 1.0) - images.astype(jnp.float32)
    mean_squared_error = jnp.mean(error**2, axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-10))
