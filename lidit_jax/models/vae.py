"""The KL-regularised convolutional autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

A Flax version of diffusers' `AutoencoderKL` in NHWC layout, with the same graph, the same hyper-parameter names and
(with `_0` for `.0`) the same parameter names. SD 1.x, SDXL, SD3 and FLUX autoencoders load unchanged
(`weights/diffusers_vae.py`), and one trained here loads in diffusers.
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
    """The encoder's output: a normal distribution over the latents of each image, with diagonal covariance.

    Attributes:
      mean: `[B, h, w, C]` float32.
      logvar: `[B, h, w, C]` float32, the logarithm of the variance, within [-30, 20].
    """

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: jax.Array) -> "DiagonalGaussian":
        """Splits the encoder's `[B, h, w, 2C]` output into mean and log-variance, clipped as in diffusers."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key: jax.Array) -> jax.Array:
        """Samples latents for each image, `[B, h, w, C]`; differentiable in the moments."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> jax.Array:
        """Returns the most likely latents, `[B, h, w, C]`."""
        return self.mean

    def kl(self) -> jax.Array:
        """Returns the KL divergence from the standard normal in nats, summed over the latents of each image: `[B]`."""
        terms = self.mean**2 + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=tuple(range(1, terms.ndim)))


def to_model_latents(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """Normalises the autoencoder's latents `[..., C]` for the diffusion model, as diffusers' pipelines do.

    The result is (latents - shift_factor) * scaling_factor. For an autoencoder that has latents_mean and latents_std
    instead of the shift, it is (latents - latents_mean) * scaling_factor / latents_std.
    """
    shift, scale = _shift_and_scale(config)
    return (latents - shift.astype(latents.dtype)) * scale.astype(latents.dtype)


def from_model_latents(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """Inverts `to_model_latents`: returns latents in the scale that `AutoencoderKL.decode` takes."""
    shift, scale = _shift_and_scale(config)
    return latents / scale.astype(latents.dtype) + shift.astype(latents.dtype)


def _shift_and_scale(config: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    if config.latents_mean is not None:
        return np.array(config.latents_mean), config.scaling_factor / np.array(config.latents_std)
    return np.array(config.shift_factor or 0.0), np.array(config.scaling_factor)


class Encoder(nn.Module):
    """The encoder: images `[B, H, W, in_channels]` -> `[B, h, w, out_channels]`, float32."""

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
    """The decoder: latents `[B, h, w, latent_channels]` -> images `[B, H, W, out_channels]`, float32.

    It has no `__call__`: `AutoencoderKL.decode` runs its stages one after the other, and so does tiled decoding.
    """

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

    def low_resolution(self, latents: jax.Array) -> jax.Array:
        """Runs the layers at the resolution of the latents, attention included: `[B, h, w, widest]`."""
        return self.up_blocks[0].residual(self.mid_block(self.conv_in(latents)))

    def upsample_stage(self, x: jax.Array, stage: int) -> jax.Array:
        """Runs one upsampling and the residual blocks after it: `[B, H, W, C]` -> `[B, 2H, 2W, next C]`."""
        return self.up_blocks[stage + 1].residual(self.up_blocks[stage].upsample(x))

    def output_norm(self, x: jax.Array) -> jax.Array:
        """Runs the GroupNorm and SiLU before the last convolution, `conv_out`."""
        return nn.silu(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """Encodes images to a Gaussian over latents and decodes latents to images; parameters are float32.

    Attributes:
      config: the hyper-parameters.
      dtype: compute dtype of the convolutions and the attention. GroupNorm statistics, the attention's softmax, the
        moments and the decoded images are always float32.
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
        """Reconstructs images.

        Args:
          images: `[B, H, W, in_channels]` float, values in [-1, 1].
          key: random key for sampling the latents (training); None decodes the mode (evaluation).

        Returns:
          The reconstructions `[B, H, W, out_channels]`, and the posterior over the latents.
        """
        posterior = self.encode(images)
        latents = posterior.mode() if key is None else posterior.sample(key)
        return self.decode(latents), posterior

    def encode(self, images: jax.Array) -> DiagonalGaussian:
        """Encodes images to a Gaussian over latents.

        Args:
          images: `[B, H, W, in_channels]` float, values in [-1, 1].

        Returns:
          The posterior over latents `[B, H/f, W/f, latent_channels]`, with f the down-sampling factor.

        Raises:
          UserError: if f does not divide H and W, or the number of channels is not in_channels.
        """
        check_image_size(images.shape[1], images.shape[2], self.config.downsampling_factor)
        _check_channels("images", images, self.config.in_channels)
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return DiagonalGaussian.from_moments(moments)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes latents to images.

        Args:
          latents: `[B, h, w, latent_channels]` in the autoencoder's own scale, see `from_model_latents`.

        Returns:
          Images `[B, h*f, w*f, out_channels]` float32, with f the down-sampling factor; values about in [-1, 1], not
          clipped.

        Raises:
          UserError: if the number of channels is not latent_channels.
        """
        return self.decode_last(self.decode_features(latents))

    # The stages of `decode`, for tiled decoding and for the adaptive weight of the adversarial loss.

    def decode_low_resolution(self, latents: jax.Array) -> jax.Array:
        """Runs the layers at the resolution of the latents: `[B, h, w, latent_channels]` -> `[B, h, w, widest]`.

        They include attention, so every output position can depend on all latents.
        """
        _check_channels("latents", latents, self.config.latent_channels)
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder.low_resolution(latents)

    def decode_stage(self, x: jax.Array, stage: int) -> jax.Array:
        """Runs upsampling number `stage` (from 0) and the blocks after it: `[B, H, W, C]` -> `[B, 2H, 2W, next C]`.

        Apart from the statistics of GroupNorm, an output position depends only on nearby positions.
        """
        return self.decoder.upsample_stage(x, stage)

    def decode_output(self, x: jax.Array) -> jax.Array:
        """Decodes the features of the last stage, `[B, H, W, narrowest]`, to images `[B, H, W, out_channels]`."""
        return self.decode_last(self.decoder.output_norm(x))

    def decode_features(self, latents: jax.Array) -> jax.Array:
        """Runs all but the last convolution: `[B, h, w, latent_channels]` -> `[B, H, W, narrowest]`."""
        x = self.decode_low_resolution(latents)
        for stage in range(len(self.config.block_out_channels) - 1):
            x = self.decode_stage(x, stage)
        return self.decoder.output_norm(x)

    def decode_last(self, features: jax.Array) -> jax.Array:
        """Runs the last convolution: `[B, H, W, narrowest]` -> `[B, H, W, out_channels]`."""
        return self.decoder.conv_out(features)


def check_image_size(height: int, width: int, factor: int) -> None:
    """Raises UserError, with the nearest valid sizes, if `factor` does not divide both sides (in pixels)."""
    if height % factor == 0 and width % factor == 0:
        return
    larger = f"{-(-height // factor) * factor}x{-(-width // factor) * factor}"
    smaller = f"{height // factor * factor}x{width // factor * factor}"
    works = f"{smaller} or {larger}" if min(height, width) >= factor else larger
    raise UserError(
        f"an image of {height}x{width} pixels (height x width) does not fit the autoencoder, which reduces each side "
        f"by {factor}: use {works}"
    )


def _check_channels(name: str, array: jax.Array, expected: int) -> None:
    if array.shape[-1] != expected:
        raise UserError(f"the {name} have {array.shape[-1]} channels, the autoencoder expects {expected}")
