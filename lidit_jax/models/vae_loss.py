"""The training losses of the autoencoder, as in latent diffusion (Rombach et al. 2022, arXiv 2112.10752, appendix G).

All losses are means over the values (pixels times channels) of an image. The code of latent diffusion
(`LPIPSWithDiscriminator`) sums over them instead: its loss weights mean the same here, only the gradient scale differs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.vae import DiagonalGaussian

RECONSTRUCTION_LOSSES = ("l1", "l2")
# Adaptive weight: constant in its denominator, and its upper limit when losses are summed over the values of an image.
EPSILON, MAX_ADAPTIVE_WEIGHT = 1e-4, 1e4


def reconstruction_loss(reconstruction: jax.Array, images: jax.Array, kind: str = "l1") -> jax.Array:
    """Computes the mean absolute or squared error over all images, pixels and channels.

    Args:
      reconstruction: `[B, H, W, C]`.
      images: `[B, H, W, C]`, values in [-1, 1].
      kind: "l1" (absolute) or "l2" (squared).

    Returns:
      A float32 scalar.

    Raises:
      UserError: if `kind` is unknown.
    """
    error = reconstruction.astype(jnp.float32) - images.astype(jnp.float32)
    if kind == "l1":
        return jnp.mean(jnp.abs(error))
    if kind == "l2":
        return jnp.mean(error**2)
    raise UserError(f"unknown reconstruction loss {kind!r}: use one of {', '.join(RECONSTRUCTION_LOSSES)}")


def kl_loss(posterior: DiagonalGaussian, images: jax.Array) -> jax.Array:
    """Computes the KL divergence of the latents from the standard normal, in nats per image value.

    Args:
      posterior: distribution over the latents of B images.
      images: `[B, H, W, C]`; only their shape is used.

    Returns:
      A float32 scalar.
    """
    return jnp.mean(posterior.kl()) / values_per_image(images)


def hinge_loss(real_scores: jax.Array, fake_scores: jax.Array) -> jax.Array:
    """Computes the hinge loss of the discriminator, a float32 scalar.

    It pushes the scores of real images above 1 and those of reconstructions below -1.
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real_scores)) + jnp.mean(jax.nn.relu(1.0 + fake_scores)))


def adversarial_loss(fake_scores: jax.Array) -> jax.Array:
    """Computes the adversarial loss of the autoencoder: the negative mean score of its images, a float32 scalar."""
    return -jnp.mean(fake_scores)


def adaptive_weight(similarity_gradient: jax.Array, adversarial_gradient: jax.Array, values: int) -> jax.Array:
    """Computes the weight that equalises the gradients of similarity and adversarial loss in the last layer.

    ||dS/dw|| / (||dA/dw|| + 1e-4) for the kernel w of the last convolution: equation 7 of Esser et al. 2021 (arXiv
    2012.09841), with the constants of latent diffusion's code.

    Args:
      similarity_gradient: gradient dS/dw of the reconstruction and perceptual losses.
      adversarial_gradient: gradient dA/dw of `adversarial_loss`.
      values: values per image, see `values_per_image`.

    Returns:
      A float32 scalar, at most 1e4 / values.
    """
    ratio = jnp.linalg.norm(similarity_gradient.ravel()) / (jnp.linalg.norm(adversarial_gradient.ravel()) + EPSILON)
    return jnp.minimum(ratio, MAX_ADAPTIVE_WEIGHT / values)


def values_per_image(images: jax.Array) -> int:
    """Returns H * W * C for images `[B, H, W, C]`."""
    return images.size // images.shape[0]


def value_and_gradient_at(
    function: Callable[[jax.Array], tuple[jax.Array, Any]], reconstruction: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Evaluates a function and its gradient at a reconstruction, all without further gradients.

    Args:
      function: reconstruction -> (scalar, auxiliary output).
      reconstruction: `[B, H, W, C]`.

    Returns:
      The scalar, its gradient in the reconstruction `[B, H, W, C]`, and the auxiliary output.
    """
    value_and_gradient = jax.value_and_grad(function, has_aux=True)
    (value, auxiliary), gradient = value_and_gradient(jax.lax.stop_gradient(reconstruction))
    return jax.lax.stop_gradient((value, gradient, auxiliary))


def with_gradient(value: jax.Array, reconstruction: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns `value` as a function of the reconstruction whose gradient is `gradient`.

    The loss weighs its terms by their gradients in the reconstruction. With the weighted sum of these gradients given
    here, the backward pass runs through the decoder once instead of once per term.
    """
    zero = reconstruction - jax.lax.stop_gradient(reconstruction)
    return jax.lax.stop_gradient(value) + jnp.sum(jax.lax.stop_gradient(gradient) * zero)
