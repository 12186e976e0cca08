"""Tiled decoding of large images: the same result as decoding at once, in a fraction of the memory.

Decoding tiles independently is not exact: GroupNorm would use the statistics of the tile instead of the image, and
attention would see only the tile's positions. Tiles would then differ from one another and from the exact image by tens
of grey levels, which blending only smears. Here tiles use the statistics and the attention of the complete image:

- The layers at the resolution of the latents, attention included, run on the complete image (`decode_low_resolution`).
- Each upsampling, with the blocks after it, runs tile by tile. A first pass over the tiles accumulates the statistics
  of the first GroupNorm, a second pass, with these, those of the second GroupNorm, and so on; the last pass writes the
  features or the image. Tiles overlap by the receptive field of the convolutions, and each writes only its interior,
  where it equals the complete image.

The tiles therefore join without seams, up to rounding in the compute dtype. The cost is about five times the FLOPs of
decoding at once. Only the features between two upsamplings grow with the image, not the many intermediates within one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_layers import GroupNorm, GroupStatistics, group_statistics

SMALLEST_TILE = 32  # pixels
Statistics = dict[str, GroupStatistics]  # statistics of each GroupNorm, by its path in the model
# (GroupNorm's path, its input, number of groups) -> statistics to normalise by; None: those of the input.
StatisticsHook = Callable[[str, jax.Array, int], GroupStatistics | None]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of equal length along one side of the features before an upsampling.

    Attributes:
      length: positions per tile.
      starts: int [tiles], first position of each tile, ascending; the last tile ends at the end of the side.
      interiors: int [tiles, 2], the interior [from, to) of each tile, relative to its start: the positions that the
        tile writes. The interiors cover the side without overlap.
    """

    length: int
    starts: np.ndarray
    interiors: np.ndarray


def place_tiles(side: int, length: int, reach: int) -> Tiles:
    """Covers a side with the fewest tiles, evenly spread.

    Args:
      side: positions to cover.
      length: positions per tile.
      reach: positions by which a tile extends beyond its interior, except at the ends of the side.
    """
    if side <= length:
        return Tiles(side, np.array([0]), np.array([[0, side]]))
    count = -(-(side - 2 * reach) // (length - 2 * reach))
    starts = np.round(np.linspace(0, side - length, count)).astype(int)
    borders = np.concatenate([[0], (starts[:-1] + length + starts[1:]) // 2, [side]])
    return Tiles(length, starts, np.stack([borders[:-1] - starts, borders[1:] - starts], axis=1))


def stage_reach(config: VAEConfig) -> int:
    """Returns the receptive field radius of a decoder stage: upsampling, residual blocks and last convolution.

    The unit is positions of the features before the upsampling.
    """
    return -(-(2 + 2 * (config.layers_per_block + 1)) // 2)  # 3x3 convolutions, at twice the resolution


def smallest_tile(config: VAEConfig) -> int:
    """Returns the smallest tile side, in pixels, that leaves an interior between the overlaps."""
    return max(SMALLEST_TILE, 4 * stage_reach(config) + 4)


@flax.struct.dataclass
class Moments:
    """Accumulated statistics of each group over a number of positions.

    Attributes:
      positions: number of positions, a scalar.
      mean: mean of each group, `[1, groups]`.
      deviations: variance of each group times the number of positions, `[1, groups]`.
    """

    positions: jax.Array
    mean: jax.Array
    deviations: jax.Array

    def merge(self, other: "Moments") -> "Moments":
        """Combines two sets of positions, without cancellation where the mean is large (Chan et al. 1979)."""
        positions = self.positions + other.positions
        share = other.positions / positions
        difference = other.mean - self.mean
        deviations = self.deviations + other.deviations + difference**2 * self.positions * share
        return Moments(positions, self.mean + difference * share, deviations)

    def statistics(self) -> GroupStatistics:
        """Returns mean and variance."""
        return GroupStatistics(self.mean, self.deviations / self.positions)


def decode_within(
    model: AutoencoderKL, params: Any, latents: jax.Array, *, pixels_at_once: int, tile: int
) -> jax.Array:
    """Runs `AutoencoderKL.decode` within a memory budget: in slices of the batch, or in tiles for large images.

    Args:
      model: the autoencoder.
      params: its parameters.
      latents: `[B, h, w, latent_channels]` in the autoencoder's own scale.
      pixels_at_once: largest number of pixels, over all images, to decode at once; a larger image is decoded in tiles.
      tile: side of a tile in pixels.

    Returns:
      Images `[B, h*f, w*f, out_channels]` float32, with f the down-sampling factor.
    """
    batch, height, width, _ = latents.shape
    pixels = height * width * model.config.downsampling_factor**2  # per image
    if pixels > pixels_at_once:
        return decode_in_tiles(model, params, latents, tile)

    def decode(latents: jax.Array) -> jax.Array:
        return _apply(model, params, latents, method=AutoencoderKL.decode)

    if batch * pixels <= pixels_at_once:
        return decode(latents)
    return jax.lax.map(lambda one: decode(one[None])[0], latents, batch_size=pixels_at_once // pixels)


def decode_in_tiles(model: AutoencoderKL, params: Any, latents: jax.Array, tile: int) -> jax.Array:
    """Runs `AutoencoderKL.decode` on one image after the other, each in tiles.

    Args:
      model: the autoencoder.
      params: its parameters.
      latents: `[B, h, w, latent_channels]` in the autoencoder's own scale.
      tile: side of a tile after each upsampling, in positions of that resolution (after the last one, pixels).

    Returns:
      Images `[B, h*f, w*f, out_channels]` float32, with f the down-sampling factor.

    Raises:
      UserError: if the tile is smaller than `smallest_tile`.
    """
    config = model.config
    reach = stage_reach(config)
    if tile < smallest_tile(config):
        raise UserError(
            f"a tile of {tile} pixels is too small for this autoencoder: use {smallest_tile(config)} or more"
        )
    num_stages = len(config.block_out_channels) - 1
    if num_stages == 0:  # no upsampling: the image has the size of the latents
        return _apply(model, params, latents, method=AutoencoderKL.decode)

    def decode_one(latents: jax.Array) -> jax.Array:
        x = _apply(model, params, latents[None], method=AutoencoderKL.decode_low_resolution)
        for stage in range(num_stages):
            x = _run_stage(_Stage(model, params, stage, last=stage == num_stages - 1), x, tile // 2, reach)
        return x[0]

    return jax.lax.map(decode_one, latents)


def _apply(model: AutoencoderKL, params: Any, *inputs: Any, method: Callable[..., jax.Array]) -> jax.Array:
    """Calls a method of the autoencoder on its parameters; without mutable collections, `apply` returns no tuple."""
    return cast(jax.Array, model.apply({"params": params}, *inputs, method=method))


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One upsampling of the decoder and the blocks after it; the last stage includes the output layers.

    Attributes:
      model: the autoencoder.
      params: its parameters.
      index: number of the upsampling, from 0.
      last: True for the last upsampling.
    """

    model: AutoencoderKL
    params: Any
    index: int
    last: bool

    def __call__(self, x: jax.Array, hook: StatisticsHook) -> jax.Array:
        """Runs the stage on x `[1, H, W, C]`; `hook` gets the input of every GroupNorm and returns its statistics."""

        def intercept(call, args, kwargs, context):
            norm = context.module
            if not isinstance(norm, GroupNorm):
                return call(*args, **kwargs)
            return call(args[0], hook("/".join(norm.path), args[0], norm.num_groups))

        with nn.intercept_methods(intercept):
            x = _apply(self.model, self.params, x, self.index, method=AutoencoderKL.decode_stage)
            return _apply(self.model, self.params, x, method=AutoencoderKL.decode_output) if self.last else x

    def norms(self, x: jax.Array) -> list[str]:
        """Returns the paths of the stage's GroupNorms in the order in which they run."""
        names: list[str] = []

        def hook(name, x, groups):
            names.append(name)

        jax.eval_shape(lambda x: self(x, hook), x)
        return names


def _run_stage(stage: _Stage, x: jax.Array, length: int, reach: int) -> jax.Array:
    """Runs a stage on x `[1, H, W, C]` in tiles of `length` positions of x: `[1, 2H, 2W, …]`."""
    _, height, width, channels = x.shape
    rows, columns = place_tiles(height, length, reach), place_tiles(width, length, reach)
    tile_rows, tile_columns = np.divmod(np.arange(len(rows.starts) * len(columns.starts)), len(columns.starts))
    tiles = {
        "start": (rows.starts[tile_rows], columns.starts[tile_columns]),
        "interior": (rows.interiors[tile_rows], columns.interiors[tile_columns]),
    }

    def crop(tile) -> jax.Array:
        return jax.lax.dynamic_slice(x, (0, *tile["start"], 0), (1, rows.length, columns.length, channels))

    def interior_mask(tile) -> jax.Array:
        """Returns the interior of a tile after the upsampling, bool [2 rows, 2 columns]."""
        inside = [
            (np.arange(2 * length) >= 2 * interior[0]) & (np.arange(2 * length) < 2 * interior[1])
            for length, interior in zip((rows.length, columns.length), tile["interior"], strict=True)
        ]
        return inside[0][:, None] & inside[1]

    def moments(tile, name: str, statistics: Statistics) -> Moments:
        """Returns the moments of the named GroupNorm's input in a tile.

        The layers after that GroupNorm are traced, but XLA removes them as dead code.
        """
        found = []

        def hook(norm, x, groups):
            if norm == name:
                mask = interior_mask(tile)
                positions = jnp.sum(mask, dtype=jnp.float32)
                tile_statistics = group_statistics(x.astype(jnp.float32), groups, mask / positions)
                found.append(Moments(positions, tile_statistics.mean, tile_statistics.variance * positions))
            return statistics.get(norm)

        stage(crop(tile), hook)
        return found[0]

    first, rest = (jax.tree.map(lambda leaf, index=index: leaf[index], tiles) for index in (0, slice(1, None)))
    statistics: Statistics = {}
    for name in stage.norms(crop(first)):

        def merge(total, tile, name=name):
            return total.merge(moments(tile, name, statistics)), None

        total, _ = jax.lax.scan(merge, moments(first, name, statistics), rest)
        statistics[name] = total.statistics()

    def write(output, tile):
        decoded = stage(crop(tile), lambda name, x, groups: statistics[name])
        start = (0, 2 * tile["start"][0], 2 * tile["start"][1], 0)
        previous = jax.lax.dynamic_slice(output, start, decoded.shape)
        decoded = jnp.where(interior_mask(tile)[..., None], decoded, previous)
        return jax.lax.dynamic_update_slice(output, decoded, start), None

    decoded = jax.eval_shape(lambda x: stage(x, lambda *_: None), crop(first))
    blank = jnp.zeros((1, 2 * height, 2 * width, decoded.shape[-1]), decoded.dtype)
    return jax.lax.scan(write, blank, tiles)[0]
