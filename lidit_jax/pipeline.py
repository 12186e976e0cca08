"""Prompts to pictures: the one path for previews while training, for `sample` and for evaluation."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lidit_jax.diffusion.samplers import guided, initial_noise, sample, step_table
from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.errors import UserError
from lidit_jax.models.flops import lidit_forward
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.vae import AutoencoderKL, from_model_latents
from lidit_jax.models.vae_tiling import SMALLEST_TILE, decode_within
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, num_batch_shards, place, replicated, shardings
from lidit_jax.tasks import text_work, to_pictures
from lidit_jax.text.encoders import PromptEncoder, encode, tokenize


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn, under `sample` in the config.

    Attributes:
      sampler: one of `diffusion.samplers.SAMPLERS` that goes with the schedule.
      steps: of the sampler.
      guidance_scale: classifier-free guidance; 1 switches it off and halves the work.
      batch_size: pictures drawn at once; on a mesh rounded up, so that every device has as many.
      decode_pixels: what the VAE decodes at once on a device: of more pictures, some after the others; a larger picture
        in tiles.
      decode_tile: side of a tile in pixels; smaller ones take less memory and, for their overlap, more time.
    """

    sampler: str
    steps: int = 25
    guidance_scale: float = 4.0
    batch_size: int = 16
    decode_pixels: int = 1 << 20
    decode_tile: int = 256

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("decode_pixels", 1), ("decode_tile", SMALLEST_TILE)):
            if getattr(self, name) < least:
                raise UserError(f"sample.{name}={getattr(self, name)} must be at least {least}")


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Everything but LI-DiT's own parameters, which are passed in: a training run draws with its live EMA weights.

    Attributes:
      frozen: {"vae": parameters, "encoders": {name: what the encoder's `freeze` gave}}.
      mesh, rules: over which pictures are spread; None: the first device draws. Every process must call, with the same
        arguments, and gets all pictures.
    """

    model: LIDiT
    schedule: Schedule
    encoders: Mapping[str, PromptEncoder]
    vae: AutoencoderKL
    frozen: Mapping[str, Any]
    mesh: Mesh | None = None
    rules: ShardingRules | None = None

    def __call__(
        self, params: Any, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, how: SampleConfig
    ) -> np.ndarray:
        """One picture a prompt: uint8 [N, height, width, 3].

        A picture is a function of its prompt and its seed (and of `how`), not of its neighbours in the batch.

        Raises:
          UserError: if the VAE and the patch size do not divide the height or width, or the sampler does not fit.
        """
        self.check_size(height, width)
        rows, scale = self.rows(how), np.float32(how.guidance_scale)
        pictures = []
        for start in range(0, len(prompts), rows):
            part = list(prompts[start : start + rows])
            count = len(part)
            part += [""] * (rows - count)  # one shape, one compilation
            part_seeds = np.asarray([*seeds[start : start + count]] + [0] * (rows - count), np.uint32)
            given = tokenize(self.encoders, part), tokenize(self.encoders, [""] * rows), part_seeds
            with self._in_force():
                drawn = self._draw(params, self.frozen, *self._put(given), scale, **_static(how, height, width))
            pictures.append(np.asarray(drawn)[:count])
        return np.concatenate(pictures)

    def abstract_params(self) -> Any:
        """Shapes and places of LI-DiT's parameters, to load into."""
        widths = [encoder.hidden_size for encoder in self.encoders.values()]
        boxed = jax.eval_shape(functools.partial(self.model.init_params, widths), jax.random.key(0))
        if self.mesh is None:
            alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: alone, nn.unbox(boxed))
        else:
            places = shardings(boxed, self.mesh, self.rules)
        abstract = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)  # noqa: E731
        return jax.tree.map(abstract, nn.unbox(boxed), places)

    def flops(self, height: int, width: int, how: SampleConfig) -> int:
        """Operations that drawing a batch needs; as of a step's, see `models/flops.py`. The VAE's are not counted."""
        rows = self.rows(how) * (1 if how.guidance_scale == 1.0 else 2)
        prompts = {name: encoder.tokenizer.max_length for name, encoder in self.encoders.items()}
        encoding, lengths = text_work(self.encoders, self.frozen["encoders"], rows, prompts)
        factor = self.vae.config.downsampling_factor
        evaluations = len(step_table(how.sampler, self.schedule, how.steps).timesteps)
        of_one = lidit_forward(self.model.config, rows, height // factor, width // factor, lengths)
        return encoding + evaluations * of_one

    def lower(self, params: Any, height: int, width: int, how: SampleConfig) -> jax.stages.Lowered:
        """The program that draws a batch, for shapes in place of arrays; see `compiling.py`."""
        rows = self.rows(how)
        given = tokenize(self.encoders, [""] * rows), tokenize(self.encoders, [""] * rows), np.zeros(rows, np.uint32)
        place = None if self.mesh is None else batch_sharding(self.mesh, self.rules)
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given)
        with self._in_force():
            return self._draw.lower(params, self.frozen, *given, np.float32(1), **_static(how, height, width))

    def rows(self, how: SampleConfig) -> int:
        """Pictures at once."""
        shards = 1 if self.mesh is None else num_batch_shards(self.mesh, self.rules)
        return math.ceil(how.batch_size / shards) * shards

    def _put(self, arrays: Any) -> Any:
        """Rows, of which every process has all, over the mesh."""
        if self.mesh is None:
            return arrays
        rows = batch_sharding(self.mesh, self.rules)
        return place(arrays, jax.tree.map(lambda _: rows, arrays))

    def _in_force(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError unless the VAE's cells and the patches divide both sides."""
        cell = self.vae.config.downsampling_factor * self.model.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side < cell or side % cell:
                below = max(cell, side // cell * cell)
                raise UserError(f"{name}={side} is not a multiple of {cell}: use {below} or {below + cell}")

    @functools.cached_property
    def _draw(self):
        # Whole on every device: only of what it has itself can a process make a NumPy array.
        place = None if self.mesh is None else replicated(self.mesh)
        return jax.jit(self._draw_by_rules, static_argnames=_STATIC, out_shardings=place)

    def _draw_by_rules(self, *arguments, **static):
        with nn.logical_axis_rules(() if self.rules is None else self.rules.pairs()):
            return self._draw_latents_and_decode(*arguments, **static)

    def _draw_latents_and_decode(
        self,
        params,
        frozen,
        tokens,
        empty,
        seeds,
        guidance_scale,
        *,
        height,
        width,
        steps,
        sampler,
        is_guided,
        decode_pixels,
        decode_tile,
    ):
        if is_guided:  # conditional rows first, as `guided` wants them
            tokens = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), tokens, empty)
        text = encode(self.encoders, frozen["encoders"], tokens)
        predict = lambda x, timesteps: self.model.apply({"params": params}, x, timesteps, text)  # noqa: E731
        if is_guided:
            predict = guided(predict, guidance_scale)

        keys = jax.vmap(jax.random.key)(seeds)
        factor = self.vae.config.downsampling_factor
        noise = initial_noise(keys, (height // factor, width // factor, self.vae.config.latent_channels))
        latents = sample(sampler, self.schedule, predict, noise, steps, keys)
        latents = from_model_latents(latents, self.vae.config)
        decode = lambda params, latents: decode_within(  # noqa: E731
            self.vae, params, latents, pixels_at_once=decode_pixels, tile=decode_tile
        )
        if self.mesh is not None:
            # Slices and tiles are each device's own: taken of the whole batch they would be decoded by all devices.
            rows = PartitionSpec(self.rules.batch)
            decode = jax.shard_map(decode, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
        return to_pictures(decode(frozen["vae"], latents))


_STATIC = ("height", "width", "steps", "sampler", "is_guided", "decode_pixels", "decode_tile")


def _static(how: SampleConfig, height: int, width: int) -> dict[str, Any]:
    """What a program is compiled for."""
    values = {"height": height, "width": width, "is_guided": how.guidance_scale != 1.0}
    return values | {name: getattr(how, name) for name in _STATIC if name not in values}
