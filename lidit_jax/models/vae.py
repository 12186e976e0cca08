"""The KL-regularised convolutional autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

A Flax twin of diffusers' `AutoencoderKL`, NHWC: the same graph, the same hyper-parameter names and (with `_0` for `.0`)
the same parameter names, so SD 1.x, SDXL, SD3 and FLUX autoencoders load as they are (`weights/diffusers_vae.py`) and
one trained here loads in diffusers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.errors import UserError

DOWN_BLOCK_TYPE = "DownEncoderBlock2D"
UP_BLOCK_TYPE = "UpDecoderBlock2D"
NORM_EPSILON = 1e-6  # diffusers' AutoencoderKL fixes it; it is in no config

MAX_SCORES = 4096**2  # of attention at once, a picture: 64 MB, those of all positions of 512 x 512 pixels

# A config.json is input from outside: beyond these sizes it is a mistake, and building the graph would never end.
MAX_BLOCKS = 10
MAX_LAYERS_PER_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The hyper-parameters of an `AutoencoderKL`, named as in diffusers' config.json.

    Attributes:
        in_channels: channels of the pictures that are encoded.
        out_channels: channels of the pictures that are decoded.
        block_out_channels: width of each resolution, finest first; one fewer than their number are halvings.
        layers_per_block: residual blocks a resolution in the encoder; the decoder has one more.
        latent_channels: channels of a latent.
        norm_num_groups: groups of every GroupNorm; divides every width.
        mid_block_add_attention: self-attention over all positions at the coarsest resolution.
        use_quant_conv: a 1x1 convolution after the encoder (SD 1.x and SDXL have it, SD3 and FLUX do not).
        use_post_quant_conv: a 1x1 convolution before the decoder.
        scaling_factor: what the diffusion model's latents are multiplied by, see `to_model_latents`.
        shift_factor: what is subtracted before that; None is 0.
        latents_mean: per-channel mean of the latents, for autoencoders that state it in place of one shift.
        latents_std: per-channel standard deviation, likewise.
        sample_size: side in pixels that it was trained on; information only.

    Raises:
        UserError: a value is out of range or the wrong type; the message names it.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    sample_size: int | tuple[int, ...] = 32

    def __post_init__(self):
        for name in ("block_out_channels", "latents_mean", "latents_std", "sample_size"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable, as a module attribute must be
        _check_config(self)

    @property
    def downsampling_factor(self) -> int:
        """Pixels of a picture's side per latent position."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """The config that the parsed config.json of a diffusers `vae/` folder describes.

        Keys that are absent take diffusers' defaults; keys that change nothing here (`force_upcast`, …) are ignored.

        Raises:
            UserError: not an AutoencoderKL, or one with blocks or values that this module does not implement.
        """
        if not isinstance(config, Mapping):
            raise UserError(
                f"VAE config: expected a JSON object, found {type(config).__name__}; give a vae/config.json"
            )
        class_name = config.get("_class_name")
        if class_name != "AutoencoderKL":
            raise UserError(f"VAE config: _class_name is {class_name!r}; only 'AutoencoderKL' is supported")
        if config.get("act_fn", "silu") not in ("silu", "swish"):
            raise UserError(f"VAE config: act_fn is {config['act_fn']!r}; only 'silu' is supported")
        known = {field.name for field in dataclasses.fields(cls)}
        vae_config = cls(**{name: value for name, value in config.items() if name in known})
        for key, supported in (("down_block_types", DOWN_BLOCK_TYPE), ("up_block_types", UP_BLOCK_TYPE)):
            expected = [supported] * len(vae_config.block_out_channels)
            found = config.get(key, [supported])
            if not isinstance(found, list | tuple) or list(found) != expected:
                raise UserError(f"VAE config: {key} is {found!r}; only {len(expected)} x {supported!r} is supported")
        return vae_config


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_config(config: VAEConfig) -> None:
    def refuse(name: str, requirement: str):
        raise UserError(f"VAE config: {name} is {getattr(config, name)!r}; it must be {requirement}")

    for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
        if not _is_count(getattr(config, name)):
            refuse(name, "a positive integer")
    for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
        if not isinstance(getattr(config, name), bool):
            refuse(name, "true or false")
    if config.layers_per_block > MAX_LAYERS_PER_BLOCK:
        refuse("layers_per_block", f"at most {MAX_LAYERS_PER_BLOCK}")
    widths = config.block_out_channels
    if not isinstance(widths, tuple) or not 0 < len(widths) <= MAX_BLOCKS or not all(map(_is_count, widths)):
        refuse("block_out_channels", f"1 to {MAX_BLOCKS} positive integers")
    if any(width % config.norm_num_groups for width in widths):
        refuse("block_out_channels", f"multiples of norm_num_groups ({config.norm_num_groups})")
    if not _is_number(config.scaling_factor) or config.scaling_factor == 0:
        refuse("scaling_factor", "a number other than 0")
    if config.shift_factor is not None and not _is_number(config.shift_factor):
        refuse("shift_factor", "a number or null")
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        if values is None:
            continue
        if not isinstance(values, tuple) or len(values) != config.latent_channels or not all(map(_is_number, values)):
            refuse(name, f"null or {config.latent_channels} numbers, one a latent channel")
    if config.latents_std is not None and min(config.latents_std) <= 0:
        refuse("latents_std", "positive numbers")
    sizes = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,)
    if not sizes or not all(map(_is_count, sizes)):
        refuse("sample_size", "a positive integer or two")


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


def _bias_init():
    return nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))


def _kernel_init():
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, "conv_in", "conv_out"))


def _conv(
    features: int, dtype, name: str | None = None, kernel_size: int = 3, stride: int = 1, padding="SAME"
) -> nn.Conv:
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        kernel_init=_kernel_init(),
        bias_init=_bias_init(),
        name=name,
    )


@flax.struct.dataclass
class GroupStatistics:
    """Mean and variance over the positions and channels of each group: `[B, groups]` float32."""

    mean: jax.Array
    variance: jax.Array


class GroupNorm(nn.Module):
    """Group normalisation (arXiv 1803.08494) of `[B, H, W, C]`, statistics in float32.

    Sums each channel first and joins the groups on `[B, C]`: splitting C, the axis that a vector unit holds, would cost
    a quarter of a small autoencoder's step on a CPU. The variance takes a second pass, because E[x^2] - E[x]^2 loses
    that of a group whose mean is large.
    """

    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, statistics: GroupStatistics | None = None) -> jax.Array:
        """Normalises by the statistics of x or, where x is a part of a picture, by those given."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (channels,))
        bias = self.param("bias", _bias_init(), (channels,))
        x = x.astype(jnp.float32)
        if statistics is None:
            statistics = group_statistics(x, self.num_groups)
        spread = lambda value: jnp.repeat(value, channels // self.num_groups, axis=-1)[:, None, None, :]  # noqa: E731
        inverse = spread(jax.lax.rsqrt(statistics.variance + NORM_EPSILON))  # [B, 1, 1, C]
        return ((x - spread(statistics.mean)) * (inverse * scale) + bias).astype(self.dtype)


def group_statistics(x: jax.Array, num_groups: int, weights: jax.Array | None = None) -> GroupStatistics:
    """Of float32 `[B, H, W, C]`; the positions weighted by `[H, W]`, which sum to 1, or all alike."""

    def group_mean(x: jax.Array) -> jax.Array:
        of_channels = jnp.mean(x, axis=(1, 2)) if weights is None else jnp.einsum("bhwc,hw->bc", x, weights)
        return jnp.mean(of_channels.reshape(x.shape[0], num_groups, -1), axis=-1)  # [B, groups]

    mean = group_mean(x)
    centred = x - jnp.repeat(mean, x.shape[-1] // num_groups, axis=-1)[:, None, None, :]
    return GroupStatistics(mean, group_mean(centred**2))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU and a 3x3 convolution, twice, and a residual: `[B, H, W, C] -> [B, H, W, features]`."""

    features: int
    norm_num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual = x
        x = nn.silu(GroupNorm(self.norm_num_groups, self.dtype, name="norm1")(x))
        x = _conv(self.features, self.dtype, "conv1")(x)  # [B, H, W, features]
        x = nn.silu(GroupNorm(self.norm_num_groups, self.dtype, name="norm2")(x))
        x = _conv(self.features, self.dtype, "conv2")(x)
        if residual.shape[-1] != self.features:
            residual = _conv(self.features, self.dtype, "conv_shortcut", kernel_size=1)(residual)
        return residual + x


class AttentionBlock(nn.Module):
    """One-head self-attention over all positions, around a residual: `[B, H, W, C] -> [B, H, W, C]`."""

    norm_num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape

        def dense(name: str) -> nn.Dense:
            kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("conv_in", "conv_out"))
            return nn.Dense(channels, dtype=self.dtype, kernel_init=kernel_init, bias_init=_bias_init(), name=name)

        hidden = GroupNorm(self.norm_num_groups, self.dtype, name="group_norm")(x)
        hidden = hidden.reshape(batch, height * width, 1, channels)  # [B, L, 1 head, C]
        query, key, value = dense("to_q")(hidden), dense("to_k")(hidden), dense("to_v")(hidden)
        hidden = dense("to_out_0")(_attend(query, key, value))
        return x + hidden.reshape(batch, height, width, channels)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of `[B, L, 1, C]`; for many positions, some queries at a time: all scores at once would be L x L.

    Its softmax is float32 whatever the inputs are.
    """
    batch, length, heads, channels = query.shape
    if length**2 <= MAX_SCORES:
        return jax.nn.dot_product_attention(query, key, value)
    at_once = max(1, MAX_SCORES // length)
    chunks = -(-length // at_once)
    padded = jnp.pad(query, ((0, 0), (0, chunks * at_once - length), (0, 0), (0, 0)))
    padded = padded.reshape(batch, chunks, at_once, heads, channels).swapaxes(0, 1)
    attended = jax.lax.map(lambda part: jax.nn.dot_product_attention(part, key, value), padded)
    return attended.swapaxes(0, 1).reshape(batch, chunks * at_once, heads, channels)[:, :length]


class MidBlock(nn.Module):
    """The coarsest resolution: a residual block, attention if asked for, a residual block."""

    norm_num_groups: int
    add_attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = ResnetBlock(channels, self.norm_num_groups, self.dtype, name="resnets_0")(x)
        if self.add_attention:
            x = AttentionBlock(self.norm_num_groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(channels, self.norm_num_groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves both sides with a strided convolution, padded at the bottom and right alone."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _conv(x.shape[-1], self.dtype, "conv", stride=2, padding=((0, 1), (0, 1)))(x)  # [B, H/2, W/2, C]


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a 3x3 convolution, see `enlarge_and_convolve`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _EnlargingConv(x.shape[-1], self.dtype, name="conv")(x)  # [B, 2H, 2W, C]


class _EnlargingConv(nn.Module):
    """A 3x3 convolution's parameters, used by `enlarge_and_convolve`."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _kernel_init(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", _bias_init(), (self.features,))
        return enlarge_and_convolve(x.astype(self.dtype), kernel) + bias.astype(self.dtype)


# Rows 2p - 1 and 2p of an enlarged picture convolved with three taps: what rows p - 1 and p of the original give to
# each, as sums of taps.
_TAPS = np.array([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], np.float32)  # [row, original's row, tap]


@jax.custom_vjp
def enlarge_and_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest-neighbour doubling and a 3x3 convolution in one: `[B, H, W, C]` -> `[B, 2H, 2W, F]`.

    Four equal neighbours meet nine taps: sums of taps over the original give the same with 4/9 of the products, in half
    of the time on a CPU. The gradient is that of the plain form, whose own convolutions are the faster ones.

    Args:
        x: of any floating point type, in which it is computed.
        kernel: `[3, 3, C, F]` float32.
    """
    batch, height, width, _ = x.shape
    features = kernel.shape[-1]
    sums = jnp.einsum("ruk,svl,klcf->uvcrsf", _TAPS, _TAPS, kernel, precision="highest")
    sums = sums.reshape(2, 2, -1, 4 * features).astype(x.dtype)
    fours = _convolve(x, sums, ((1, 1), (1, 1)))  # [B, H + 1, W + 1, 4F]: a pixel too many on each side
    fours = fours.reshape(batch, height + 1, width + 1, 2, 2, features).swapaxes(2, 3)
    return fours.reshape(batch, 2 * height + 2, 2 * width + 2, features)[:, 1:-1, 1:-1]


def _enlarge_then_convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return _convolve(x, kernel.astype(x.dtype), "SAME")


def _convolve(x: jax.Array, kernel: jax.Array, padding) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


enlarge_and_convolve.defvjp(
    lambda x, kernel: (enlarge_and_convolve(x, kernel), (x, kernel)),
    lambda inputs, cotangent: jax.vjp(_enlarge_then_convolve, *inputs)[1](cotangent),
)


class DownBlock(nn.Module):
    """The encoder's residual blocks at one resolution, then a halving unless it is the last."""

    features: int
    num_layers: int
    norm_num_groups: int
    add_downsample: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.num_layers):
            x = ResnetBlock(self.features, self.norm_num_groups, self.dtype, name=f"resnets_{layer}")(x)
        return Downsample(self.dtype, name="downsamplers_0")(x) if self.add_downsample else x


class UpBlock(nn.Module):
    """The decoder's residual blocks at one resolution, then a doubling unless it is the last."""

    features: int
    num_layers: int
    norm_num_groups: int
    add_upsample: bool
    dtype: Any = jnp.float32

    def setup(self):
        self.resnets = [ResnetBlock(self.features, self.norm_num_groups, self.dtype) for _ in range(self.num_layers)]
        self.upsamplers = [Upsample(self.dtype)] if self.add_upsample else []

    def residual(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x

    def upsample(self, x: jax.Array) -> jax.Array:
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


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
        x = _conv(self.block_out_channels[0], self.dtype, "conv_in")(x)
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
        return _conv(self.out_channels, jnp.float32, "conv_out")(x)


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
        self.conv_in = _conv(widths[0], self.dtype)
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
        self.conv_out = _conv(self.out_channels, jnp.float32)

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
            self.quant_conv = _conv(2 * config.latent_channels, jnp.float32, kernel_size=1)
        if config.use_post_quant_conv:
            self.post_quant_conv = _conv(config.latent_channels, jnp.float32, kernel_size=1)

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
