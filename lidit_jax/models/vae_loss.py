"""The training loss of the autoencoder: that of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, appendix G).

Everything is per value of a picture. The paper's code (`LPIPSWithDiscriminator`) sums over a picture's values instead;
its weights mean the same here, only the step size differs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.vae import DiagonalGaussian

RECONSTRUCTION_LOSSES = ("l1", "l2")
# Of the adaptive weight: added to its denominator, and the largest that it may be at the scale of summed values.
EPSILON, LARGEST_WEIGHT = 1e-4, 1e4


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
    raise UserError(f"unknown reconstruction loss {kind!r}: use one of {', '.join(RECONSTRUCTION_LOSSES)}")


def kl_loss(posterior: DiagonalGaussian, images: jax.Array) -> jax.Array:
    """The latents' divergence from the standard normal, in nats per value of the picture: a float32 scalar.

    Args:
        posterior: batch B.
        images: `[B, H, W, C]`; only their size counts.
    """
    return jnp.mean(posterior.kl()) / values_per_image(images)


def hinge_loss(real_scores: jax.Array, fake_scores: jax.Array) -> jax.Array:
    """The discriminator's: real pictures' scores should be over 1, reconstructions' under -1. A float32 scalar."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real_scores)) + jnp.mean(jax.nn.relu(1.0 + fake_scores)))


def adversarial_loss(fake_scores: jax.Array) -> jax.Array:
    """The autoencoder's: its pictures' scores should be high. A float32 scalar."""
    return -jnp.mean(fake_scores)


def adaptive_weight(similarity_gradient: jax.Array, adversarial_gradient: jax.Array, values: int) -> jax.Array:
    """The factor that lets the discriminator move the last layer as much as the similarity to the picture does.

    ||dS/dw|| / (||dA/dw|| + 1e-4): equation 7 of Esser et al. 2021 (arXiv 2012.09841), with the constants of latent
    diffusion's code. A float32 scalar.

    Args:
        similarity_gradient: of reconstruction and perceptual loss, in the last convolution's kernel w.
        adversarial_gradient: of `adversarial_loss` in w.
        values: per picture, see `values_per_image`.
    """
    ratio = jnp.linalg.norm(similarity_gradient.ravel()) / (jnp.linalg.norm(adversarial_gradient.ravel()) + EPSILON)
    return jnp.minimum(ratio, LARGEST_WEIGHT / values)


def values_per_image(images: jax.Array) -> int:
    """H * W * C of `[B, H, W, C]`."""
    return images.size // images.shape[0]


def value_and_gradient_at(
    function: Callable[[jax.Array], tuple[jax.Array, Any]], reconstruction: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Of a function that gives (a scalar, more): the scalar, its gradient `[B, H, W, C]` in the reconstruction, more.

    None of them is differentiated further.
    """
    graded = jax.value_and_grad(function, has_aux=True)
    (value, more), gradient = graded(jax.lax.stop_gradient(reconstruction))
    return jax.lax.stop_gradient((value, gradient, more))


def with_gradient(value: jax.Array, reconstruction: jax.Array, gradient: jax.Array) -> jax.Array:
    """`value`, as a function of the reconstruction that has the gradient given.

    The loss needs its parts' gradients in the reconstruction to weigh them; so they pass the decoder once, weighed,
    instead of once for each part.
    """
    unchanged = reconstruction - jax.lax.stop_gradient(reconstruction)  # 0
    return jax.lax.stop_gradient(value) + jnp.sum(jax.lax.stop_gradient(gradient) * unchanged)
