"""The hyper-parameters of an autoencoder, named as in diffusers' config.json and validated like any external input."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from lidit_jax.errors import UserError
from lidit_jax.ranges import Size, between, check_ranges

DOWN_BLOCK_TYPE = "DownEncoderBlock2D"
UP_BLOCK_TYPE = "UpDecoderBlock2D"

# Limits for a config.json: larger values are mistakes, with which tracing the model would not end.
MAX_BLOCKS = 10
MAX_LAYERS_PER_BLOCK = 32
_Moment = Annotated[float, between(-1e6, 1e6)]
_Deviation = Annotated[float, between(1e-6, 1e6)]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The hyper-parameters of an `AutoencoderKL`, named as in diffusers' config.json.

    Attributes:
      in_channels: channels of the encoder's input images.
      out_channels: channels of the decoder's output images.
      block_out_channels: width of each resolution, finest first; each entry after the first halves both sides.
      layers_per_block: residual blocks per resolution in the encoder; the decoder has one more.
      latent_channels: channels of a latent.
      norm_num_groups: groups of every GroupNorm; divides every width.
      mid_block_add_attention: apply self-attention over all positions at the coarsest resolution.
      use_quant_conv: apply a 1x1 convolution after the encoder (SD 1.x and SDXL do, SD3 and FLUX do not).
      use_post_quant_conv: apply a 1x1 convolution before the decoder.
      scaling_factor: factor on the latents for the diffusion model, see `to_model_latents`.
      shift_factor: value subtracted from the latents before that; None is 0.
      latents_mean: per-channel mean of the latents, in autoencoders that have it instead of one shift.
      latents_std: per-channel standard deviation of the latents, likewise.
      sample_size: side in pixels of the training images; not used here.

    Raises:
      UserError: if a value has the wrong type or is out of range; the message names the field.
    """

    in_channels: Size = 3
    out_channels: Size = 3
    block_out_channels: tuple[Size, ...] = (64,)
    layers_per_block: Annotated[int, between(1, MAX_LAYERS_PER_BLOCK)] = 1
    latent_channels: Size = 4
    norm_num_groups: Size = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: _Moment = 0.18215
    shift_factor: _Moment | None = None
    latents_mean: tuple[_Moment, ...] | None = None
    latents_std: tuple[_Deviation, ...] | None = None
    sample_size: int | tuple[int, ...] = 32

    def __post_init__(self):
        for name in ("block_out_channels", "latents_mean", "latents_std", "sample_size"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable, as a module attribute must be
        check_ranges(self, "VAE config: ")
        _check_config(self)

    @property
    def downsampling_factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Builds the config from the parsed config.json of a diffusers `vae/` folder.

        Absent keys have diffusers' defaults; keys that have no effect here (`force_upcast`, …) are ignored.

        Raises:
          UserError: if it is not an AutoencoderKL, or has blocks or values that this module does not implement.
        """
        if not isinstance(config, Mapping):
            raise UserError(
                f"VAE config: expected a JSON object, found {type(config).__name__}; give a vae/config.json"
            )
        class_name = config.get("_class_name")
        if class_name != "AutoencoderKL":
            raise UserError(f"VAE config: _class_name is {class_name!r:.80}; only 'AutoencoderKL' is supported")
        if config.get("act_fn", "silu") not in ("silu", "swish"):
            raise UserError(f"VAE config: act_fn is {config['act_fn']!r:.80}; only 'silu' is supported")
        known = {field.name for field in dataclasses.fields(cls)}
        vae_config = cls(**{name: value for name, value in config.items() if name in known})
        for key, supported in (("down_block_types", DOWN_BLOCK_TYPE), ("up_block_types", UP_BLOCK_TYPE)):
            expected = [supported] * len(vae_config.block_out_channels)
            found = config.get(key, [supported])
            if not isinstance(found, list | tuple) or list(found) != expected:
                raise UserError(
                    f"VAE config: {key} is {found!r:.80}; only {len(expected)} x {supported!r} is supported"
                )
        return vae_config


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_config(config: VAEConfig) -> None:
    def reject(name: str, requirement: str):
        raise UserError(f"VAE config: {name} is {getattr(config, name)!r:.80}; it must be {requirement}")

    for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
        if not isinstance(getattr(config, name), bool):
            reject(name, "true or false")
    widths = config.block_out_channels
    if not isinstance(widths, tuple) or not 0 < len(widths) <= MAX_BLOCKS:
        reject("block_out_channels", f"1 to {MAX_BLOCKS} positive integers")
    if any(width % config.norm_num_groups for width in widths):
        reject("block_out_channels", f"multiples of norm_num_groups ({config.norm_num_groups})")
    if abs(config.scaling_factor) < 1e-6:
        reject("scaling_factor", "at least 1e-06 in magnitude, because latents are divided by it")
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        if values is None:
            continue
        if not isinstance(values, tuple) or len(values) != config.latent_channels:
            reject(name, f"null or {config.latent_channels} numbers, one a latent channel")
    if (config.latents_mean is None) != (config.latents_std is None):
        raise UserError(
            f"VAE config: latents_mean is {config.latents_mean!r:.80} and latents_std is {config.latents_std!r:.80}; "
            "give both or neither"
        )
    sizes = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,)
    if not sizes or not all(map(_is_count, sizes)):
        reject("sample_size", "a positive integer or two")
