"""The KL-regularised convolutional autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

A Flax twin of diffusers' `AutoencoderKL`, NHWC: the same graph, the same hyper-parameter names and (with `_0` for `.0`)
the same parameter names, so SD 1.x, SDXL, SD3 and FLUX autoencoders load as they are (`weights/diffusers_vae.py`) and
one trained here loads in diffusers.
"""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_layers import DownBlock, GroupNorm, MidBlock, UpBlock, conv


@flax.struct.dataclass
class DiagonalGaussian:
    """A normal distribution with a diagonal covariance, one a picture: the encoder's output.

    Attributes:
        mean: `[B, h, w, C]` float32.
        logvar: `[B, h, w, C]` float32, the logarithm of the variance, within [-30, 20].
    """

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: jax.Array) -> "DiagonalGaussian":
        """Splits the encoder's `[B, h, w, 2C]` into mean and log-variance, clipped as diffusers does."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw a picture, `[B, h, w, C]`; differentiable in the moments."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> jax.Array:
        """The most likely latents, `[B, h, w, C]`."""
        return self.mean

    def kl(self) -> jax.Array:
        """Kullback-Leibler divergence to the standard normal in nats, summed over a picture's latents: `[B]`."""
        terms = self.mean**2 + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=tuple(range(1, terms.ndim)))


def to_model_latents(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """The autoencoder's latents `[..., C]` in the diffusion model's scale, as diffusers' pipelines have it.

    (latents - shift_factor) * scaling_factor; an autoencoder with latents_mean and latents_std states these in place of
    the shift: (latents - latents_mean) * scaling_factor / latents_std.
    """
    shift, scale = _shift_and_scale(config)
    return (latents - shift.astype(latents.dtype)) * scale.astype(latents.dtype)


def from_model_latents(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """The inverse of `to_model_latents`: what `AutoencoderKL.decode` takes."""
    shift, scale = _shift_and_scale(config)
    return latents / scale.astype(latents.dtype) + shift.astype(latents.dtype)


def _shift_and_scale(config: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    if config.latents_mean is not None and config.latents_std is not None:
        return np.array(config.latents_mean), config.scaling_factor / np.array(config.latents_std)
    return np.array(config.shift_factor or 0.0), np.array(config.scaling_factor)


class Encoder(nn.Module):
    """Pictures `[B, H, W, in_channels]` -> `[B, h, w, out_channels]`, float32."""

    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(self.block_out_channels[0], self.dtype, "conv_in")(x)
        last = len(self.block_out_channels) - 1
        for index, features in enumerate(self.block_out_channels):
            x = DownBlock(
                features,
                self.layers_per_block,
                self.norm_num_groups,
                add_downsample=index < last,
                dtype=self.dtype,
                name=f"down_blocks_{index}",
            )(x)
        x = MidBlock(self.norm_num_groups, self.mid_block_add_attention, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(self.norm_num_groups, self.dtype, name="conv_norm_out")(x))
        return conv(self.out_channels, jnp.float32, "conv_out")(x)


class Decoder(nn.Module):
    """Latents `[B, h, w, latent_channels]` -> pictures `[B, H, W, out_channels]`, float32."""

    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: Any = jnp.float32

    def setup(self):
        widths = tuple(reversed(self.block_out_channels))
        self.conv_in = conv(widths[0], self.dtype)
        self.mid_block = MidBlock(self.norm_num_groups, self.mid_block_add_attention, self.dtype)
        self.up_blocks = [
            UpBlock(
                features,
                self.layers_per_block + 1,
                self.norm_num_groups,
                add_upsample=index < len(widths) - 1,
                dtype=self.dtype,
            )
            for index, features in enumerate(widths)
        ]
        self.conv_norm_out = GroupNorm(self.norm_num_groups, self.dtype)
        self.conv_out = conv(self.out_channels, jnp.float32)

    def at_latent_size(self, latents: jax.Array) -> jax.Array:
        """What is computed at the latents' own resolution, attention included: `[B, h, w, widest]`."""
        return self.up_blocks[0].residual(self.mid_block(self.conv_in(latents)))

    def enlarge(self, x: jax.Array, stage: int) -> jax.Array:
        """One doubling and the residual blocks at that resolution: `[B, H, W, C]` -> `[B, 2H, 2W, next C]`."""
        return self.up_blocks[stage + 1].residual(self.up_blocks[stage].upsample(x))

    def normalise(self, x: jax.Array) -> jax.Array:
        """What the last convolution, `conv_out`, takes."""
        return nn.silu(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """Pictures to a Gaussian over latents and back; float32 parameters, compute in `dtype`.

    Attributes:
        config: the hyper-parameters.
        dtype: of the convolutions and the attention. GroupNorm statistics, the attention's softmax, the moments and
            the decoded pictures are float32 in any case.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        shared = {
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_num_groups,
            "mid_block_add_attention": config.mid_block_add_attention,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(2 * config.latent_channels, **shared)
        self.decoder = Decoder(config.out_channels, **shared)
        if config.use_quant_conv:
            self.quant_conv = conv(2 * config.latent_channels, jnp.float32, kernel_size=1)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(config.latent_channels, jnp.float32, kernel_size=1)

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, DiagonalGaussian]:
        """Reconstructs pictures: (`[B, H, W, out_channels]`, their posterior).

        The latents in between are a sample with a `key` (training), the mode without one (evaluation).
        """
        posterior = self.encode(images)
        latents = posterior.mode() if key is None else posterior.sample(key)
        return self.decode(latents), posterior

    def encode(self, images: jax.Array) -> DiagonalGaussian:
        """The Gaussian over latents `[B, H/f, W/f, latent_channels]`, f the down-sampling factor.

        Args:
            images: `[B, H, W, in_channels]` float, values in [-1, 1].

        Raises:
            UserError: f does not divide H or W, or the number of channels is not the model's.
        """
        check_image_size(images.shape[1], images.shape[2], self.config.downsampling_factor)
        _check_channels("picture", images, self.config.in_channels)
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return DiagonalGaussian.from_moments(moments)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pictures `[B, h*f, w*f, out_channels]` float32, about [-1, 1] and not clipped, f the down-sampling factor.

        Args:
            latents: `[B, h, w, latent_channels]` in the autoencoder's own scale, see `from_model_latents`.

        Raises:
            UserError: the number of channels is not the model's.
        """
        return self.decode_last(self.decode_features(latents))

    # The stages of `decode`, for those who need what is between them.

    def decode_far(self, latents: jax.Array) -> jax.Array:
        """What works at the latents' resolution, where each position may see every other:
        `[B, h, w, latent_channels]` -> `[B, h, w, widest]`.
        """
        _check_channels("latent", latents, self.config.latent_channels)
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder.at_latent_size(latents)

    def decode_stage(self, x: jax.Array, stage: int) -> jax.Array:
        """One doubling and the blocks after it, the first being stage 0: `[B, H, W, C]` -> `[B, 2H, 2W, next C]`.

        But for the statistics of GroupNorm, a position depends on what is near alone.
        """
        return self.decoder.enlarge(x, stage)

    def decode_end(self, x: jax.Array) -> jax.Array:
        """From the last doubling's features `[B, H, W, narrowest]` to the picture."""
        return self.decode_last(self.decoder.normalise(x))

    def decode_features(self, latents: jax.Array) -> jax.Array:
        """All but the last convolution: `[B, h, w, latent_channels]` -> `[B, H, W, narrowest]`."""
        x = self.decode_far(latents)
        for stage in range(len(self.config.block_out_channels) - 1):
            x = self.decode_stage(x, stage)
        return self.decoder.normalise(x)

    def decode_last(self, features: jax.Array) -> jax.Array:
        """The last convolution: `[B, H, W, narrowest]` -> `[B, H, W, out_channels]`."""
        return self.decoder.conv_out(features)


def check_image_size(height: int, width: int, factor: int) -> None:
    """Raises UserError, naming the nearest sizes that work, if `factor` does not divide both sides (pixels)."""
    if height % factor == 0 and width % factor == 0:
        return
    larger = f"{-(-height // factor) * factor}x{-(-width // factor) * factor}"
    smaller = f"{height // factor * factor}x{width // factor * factor}"
    works = f"{smaller} or {larger}" if min(height, width) >= factor else larger
    raise UserError(
        f"a picture of {height}x{width} pixels (height x width) does not fit the autoencoder, which reduces each side "
        f"by {factor}: use {works}"
    )


def _check_channels(what: str, array: jax.Array, expected: int) -> None:
    if array.shape[-1] != expected:
        raise UserError(f"a {what} of {array.shape[-1]} channels does not fit the autoencoder, which takes {expected}")
