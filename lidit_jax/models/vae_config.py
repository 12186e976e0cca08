"""The hyper-parameters of an autoencoder, as diffusers' config.json has them, checked as input from outside."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lidit_jax.errors import UserError

DOWN_BLOCK_TYPE = "DownEncoderBlock2D"
UP_BLOCK_TYPE = "UpDecoderBlock2D"

# Beyond these sizes a config.json is a mistake, and building the graph would never end.
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
