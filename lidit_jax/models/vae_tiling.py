"""Decoding of large pictures in tiles: what whole decoding gives, in a fraction of its memory.

A tile is not a small picture: GroupNorm would normalise it by its own statistics in place of the picture's, and
attention would see its own positions alone, so that tiles differ from one another and from the whole by tens of grey
levels, which blending only smears. Here tiles are given what the whole picture has:

- What works at the latents' resolution, attention included, is computed for the whole picture (`decode_far`).
- Each doubling, with the blocks after it, goes tile by tile. A pass over the tiles merges the statistics of the first
  GroupNorm, the next pass, by these, those of the second, and so on; the last pass writes the features, or the picture.
  A tile reaches over its own part by what convolutions see, so its part is that of the whole picture.

So tiles fit without a seam, to the rounding of the type that is computed in. It costs some five times the operations of
whole decoding; what grows with the picture is the features between two doublings, not the many that a doubling works
with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

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
Statistics = dict[str, GroupStatistics]  # of GroupNorms, by their paths in the model
# (name, input, number of groups) -> what to normalise by; None is the input's own.
Look = Callable[[str, jax.Array, int], GroupStatistics | None]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Where tiles lie along one side of the features that are doubled, all of one length.

    Attributes:
        length: positions of a tile.
        starts: int [tiles], ascending; the last tile ends where the side ends.
        parts: int [tiles, 2], the positions [from, to) of each tile, counted from its start, that it answers for;
            together they are the side.
    """

    length: int
    starts: np.ndarray
    parts: np.ndarray


def place_tiles(side: int, length: int, reach: int) -> Tiles:
    """The fewest tiles that cover a side, evenly spread; each ends `reach` beyond its part, or where the side ends."""
    if side <= length:
        return Tiles(side, np.array([0]), np.array([[0, side]]))
    count = -(-(side - 2 * reach) // (length - 2 * reach))
    starts = np.round(np.linspace(0, side - length, count)).astype(int)
    borders = np.concatenate([[0], (starts[:-1] + length + starts[1:]) // 2, [side]])
    return Tiles(length, starts, np.stack([borders[:-1] - starts, borders[1:] - starts], axis=1))


def stage_reach(config: VAEConfig) -> int:
    """Positions, on each side of one, that a doubling, the residual blocks after it and the last convolution see."""
    return -(-(2 + 2 * (config.layers_per_block + 1)) // 2)  # 3x3 convolutions, at twice the resolution


def smallest_tile(config: VAEConfig) -> int:
    """Pixels of a tile's side that leave it something of its own."""
    return max(SMALLEST_TILE, 4 * stage_reach(config) + 4)


@flax.struct.dataclass
class Moments:
    """Mean and summed squared deviation of each group over some positions, `[1, groups]`, and how many positions."""

    positions: jax.Array
    mean: jax.Array
    deviations: jax.Array

    def merge(self, other: "Moments") -> "Moments":
        """Of the positions of both (Chan et al. 1979): loses nothing to a mean that is large beside the deviation."""
        positions = self.positions + other.positions
        share = other.positions / positions
        apart = other.mean - self.mean
        deviations = self.deviations + other.deviations + apart**2 * self.positions * share
        return Moments(positions, self.mean + apart * share, deviations)

    def statistics(self) -> GroupStatistics:
        return GroupStatistics(self.mean, self.deviations / self.positions)


def decode_within(
    model: AutoencoderKL, params: Any, latents: jax.Array, *, pixels_at_once: int, tile: int
) -> jax.Array:
    """As `AutoencoderKL.decode`, in slices of the batch or in tiles where there is more than is to be decoded at once.

    Args:
        latents: `[B, h, w, latent_channels]` in the autoencoder's own scale.
        pixels_at_once: of all pictures together; a picture of more is cut into tiles.
        tile: side of a tile in pixels.
    """
    batch, height, width, _ = latents.shape
    pixels = height * width * model.config.downsampling_factor**2  # of a picture
    if pixels > pixels_at_once:
        return decode_in_tiles(model, params, latents, tile)
    decode = lambda latents: model.apply({"params": params}, latents, method=AutoencoderKL.decode)  # noqa: E731
    if batch * pixels <= pixels_at_once:
        return decode(latents)
    return jax.lax.map(lambda one: decode(one[None])[0], latents, batch_size=pixels_at_once // pixels)


def decode_in_tiles(model: AutoencoderKL, params: Any, latents: jax.Array, tile: int) -> jax.Array:
    """As `AutoencoderKL.decode`, one picture after the other, each in tiles: `[B, h*f, w*f, out_channels]` float32.

    Args:
        latents: `[B, h, w, latent_channels]` in the autoencoder's own scale.
        tile: side of a tile in pixels, in the middle of the decoder as at its end.

    Raises:
        UserError: a tile is smaller than `smallest_tile`.
    """
    config = model.config
    reach = stage_reach(config)
    if tile < smallest_tile(config):
        raise UserError(
            f"a tile of {tile} pixels is too small for this autoencoder: use {smallest_tile(config)} or more"
        )
    num_stages = len(config.block_out_channels) - 1
    if num_stages == 0:  # nothing is larger than the latents
        return model.apply({"params": params}, latents, method=AutoencoderKL.decode)

    def decode_one(latents: jax.Array) -> jax.Array:
        x = model.apply({"params": params}, latents[None], method=AutoencoderKL.decode_far)
        for stage in range(num_stages):
            x = _run_stage(_Stage(model, params, stage, last=stage == num_stages - 1), x, tile // 2, reach)
        return x[0]

    return jax.lax.map(decode_one, latents)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A doubling and the blocks after it; the last one goes on to the picture."""

    model: AutoencoderKL
    params: Any
    index: int
    last: bool

    def __call__(self, x: jax.Array, look: Look) -> jax.Array:
        def intercept(call, args, kwargs, context):
            norm = context.module
            if not isinstance(norm, GroupNorm):
                return call(*args, **kwargs)
            return call(args[0], look("/".join(norm.path), args[0], norm.num_groups))

        with nn.intercept_methods(intercept):
            x = self.model.apply({"params": self.params}, x, self.index, method=AutoencoderKL.decode_stage)
            return self.model.apply({"params": self.params}, x, method=AutoencoderKL.decode_end) if self.last else x

    def norms(self, x: jax.Array) -> list[str]:
        """The names of its GroupNorms in the order of their work."""
        names: list[str] = []

        def look(name, x, groups):
            names.append(name)

        jax.eval_shape(lambda x: self(x, look), x)
        return names


def _run_stage(stage: _Stage, x: jax.Array, length: int, reach: int) -> jax.Array:
    """`[1, H, W, C]` -> `[1, 2H, 2W, …]`, in tiles of `length` positions of x."""
    _, height, width, channels = x.shape
    rows, columns = place_tiles(height, length, reach), place_tiles(width, length, reach)
    row_of, column_of = np.divmod(np.arange(len(rows.starts) * len(columns.starts)), len(columns.starts))
    places = {
        "start": (rows.starts[row_of], columns.starts[column_of]),
        "part": (rows.parts[row_of], columns.parts[column_of]),
    }

    def cut(place) -> jax.Array:
        return jax.lax.dynamic_slice(x, (0, *place["start"], 0), (1, rows.length, columns.length, channels))

    def mask(place) -> jax.Array:
        """bool [2 rows, 2 columns]: what the tile answers for, after the doubling."""
        inside = [
            (np.arange(2 * length) >= 2 * part[0]) & (np.arange(2 * length) < 2 * part[1])
            for length, part in zip((rows.length, columns.length), place["part"], strict=True)
        ]
        return inside[0][:, None] & inside[1]

    def moments(place, name: str, known: Statistics) -> Moments:
        """Of the input that the named GroupNorm has in a tile. What comes after it is traced, and not computed."""
        found = []

        def look(of, x, groups):
            if of == name:
                positions = jnp.sum(mask(place), dtype=jnp.float32)
                own = group_statistics(x.astype(jnp.float32), groups, mask(place) / positions)
                found.append(Moments(positions, own.mean, own.variance * positions))
            return known.get(of)

        stage(cut(place), look)
        return found[0]

    first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], places) for part in (0, slice(1, None)))
    known: Statistics = {}
    for name in stage.norms(cut(first)):

        def merge(total, place, name=name):
            return total.merge(moments(place, name, known)), None

        total, _ = jax.lax.scan(merge, moments(first, name, known), rest)
        known[name] = total.statistics()

    def write(whole, place):
        made = stage(cut(place), lambda name, x, groups: known[name])
        start = (0, 2 * place["start"][0], 2 * place["start"][1], 0)
        there = jax.lax.dynamic_slice(whole, start, made.shape)
        made = jnp.where(mask(place)[..., None], made, there)
        return jax.lax.dynamic_update_slice(whole, made, start), None

    made = jax.eval_shape(lambda x: stage(x, lambda *_: None), cut(first))
    blank = jnp.zeros((1, 2 * height, 2 * width, made.shape[-1]), made.dtype)
    return jax.lax.scan(write, blank, places)[0]
