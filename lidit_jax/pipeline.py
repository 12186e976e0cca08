"""Samples images from prompts: the one path for previews during training, for the `sample` command and evaluation."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
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
from lidit_jax.pictures import to_pictures
from lidit_jax.text.encoders import PromptEncoder, encode, encode_ahead, text_work, tokenize
from lidit_jax.text.shared_prompts import SharedPrompts


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How images are sampled: section `sample` of the config.

    Attributes:
      sampler: one of `diffusion.samplers.SAMPLERS` that fits the schedule.
      steps: sampling steps.
      guidance_scale: scale of classifier-free guidance; 1 switches it off and halves the work.
      batch_size: images sampled at once; on a mesh, rounded up to a multiple of the batch shards.
      decode_pixels: pixels that the VAE decodes at once on a device. Batches with more pixels are decoded in slices,
        and images with more pixels in tiles.
      decode_tile: side of a tile in pixels; smaller tiles take less memory and, because they overlap, more time.
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

    @property
    def is_guided(self) -> bool:
        """Whether each evaluation of the model also predicts for the empty prompt."""
        return self.guidance_scale != 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """The model with its frozen encoders and VAE.

    LI-DiT's parameters are passed to each call, so that a training run samples with its current EMA weights.

    Attributes:
      model: LI-DiT.
      schedule: noise schedule that the model is trained with.
      encoders: prompt encoders by name, in the order of the model's branches.
      vae: the autoencoder.
      frozen: {"vae": parameters, "encoders": {name: output of the encoder's `freeze`}}.
      mesh: devices over which the images of a batch are sharded; every process must make the same calls, and gets all
        images. None samples on the first device.
      rules: sharding rules; None without a mesh.
    """

    model: LIDiT
    schedule: Schedule
    encoders: Mapping[str, PromptEncoder]
    vae: AutoencoderKL
    frozen: Mapping[str, Any]
    mesh: Mesh | None = None
    rules: ShardingRules | None = None

    def __call__(
        self,
        params: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        how: SampleConfig,
        images_per_prompt: int = 1,
    ) -> np.ndarray:
        """Samples `images_per_prompt` images for each prompt.

        An image depends on its prompt, its seed and `how`, not on the rest of its batch.

        Args:
          params: LI-DiT's parameters.
          prompts: the prompts.
          seeds: [N], one for each image; N = len(prompts) * images_per_prompt.
          height: in pixels.
          width: in pixels.
          how: sampler, steps, guidance and batch size.
          images_per_prompt: images for each prompt.

        Returns:
          uint8 [N, height, width, 3]; the images of one prompt are adjacent.

        Raises:
          UserError: if the height or width is not a multiple of the latent cell times the patch size, or the sampler
            does not fit the schedule.
          ValueError: if the number of seeds is not N.
        """
        if len(seeds) != len(prompts) * images_per_prompt:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts with {images_per_prompt} pictures each")
        self.check_size(height, width)
        rows, scale = self.rows(how), np.float32(how.guidance_scale)
        shared = self._shared_prompts(how, images_per_prompt)
        pictures = []
        for start in range(0, len(seeds), rows):
            part = [*seeds[start : start + rows]]
            count = len(part)
            part += [0] * (rows - count)  # one shape, so one compilation
            to_encode, places = shared.batch(prompts, start)
            given = tokenize(self.encoders, to_encode), places, np.asarray(part, np.uint32)
            with self._in_force():
                drawn = self._draw(params, self.frozen, *self._put(given), scale, **_static(how, height, width))
            pictures.append(np.asarray(drawn)[:count])
        return np.concatenate(pictures)

    def abstract_params(self) -> Any:
        """Returns shapes, dtypes and shardings of LI-DiT's parameters, to load into."""
        widths = [encoder.hidden_size for encoder in self.encoders.values()]
        boxed = jax.eval_shape(functools.partial(self.model.init_params, widths), jax.random.key(0))
        if self.mesh is None:
            alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: alone, nn.unbox(boxed))
        else:
            places = shardings(boxed, self.mesh, self.rules)
        abstract = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)  # noqa: E731
        return jax.tree.map(abstract, nn.unbox(boxed), places)

    def flops(self, height: int, width: int, how: SampleConfig, images_per_prompt: int = 1) -> int:
        """Returns the model FLOPs of sampling one batch, counted as in `models/flops.py`, without the VAE's."""
        rows = self.rows(how) * (2 if how.is_guided else 1)
        tokens = {name: encoder.tokenizer.max_length for name, encoder in self.encoders.items()}
        encoded = self._shared_prompts(how, images_per_prompt).encoded
        encoding, lengths = text_work(self.encoders, self.frozen["encoders"], encoded, tokens)
        factor = self.vae.config.downsampling_factor
        evaluations = len(step_table(how.sampler, self.schedule, how.steps).timesteps)
        of_one = lidit_forward(self.model.config, rows, height // factor, width // factor, lengths)
        return encoding + evaluations * of_one

    def lower(
        self, params: Any, height: int, width: int, how: SampleConfig, images_per_prompt: int = 1
    ) -> jax.stages.Lowered:
        """Lowers the program that samples one batch, from shapes instead of arrays; see `compile/compile_step.py`."""
        to_encode, places = self._shared_prompts(how, images_per_prompt).batch([], 0)
        given = tokenize(self.encoders, to_encode), places, np.zeros(self.rows(how), np.uint32)
        place = None if self.mesh is None else batch_sharding(self.mesh, self.rules)
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given)
        with self._in_force():
            return self._draw.lower(params, self.frozen, *given, np.float32(1), **_static(how, height, width))

    def rows(self, how: SampleConfig) -> int:
        """Returns the images sampled at once: the batch size, rounded up to a multiple of the batch shards."""
        return math.ceil(how.batch_size / self._shards()) * self._shards()

    def _shards(self) -> int:
        return 1 if self.mesh is None else num_batch_shards(self.mesh, self.rules)

    def _shared_prompts(self, how: SampleConfig, images_per_prompt: int) -> SharedPrompts:
        return SharedPrompts(self.rows(how), images_per_prompt, how.is_guided, self._shards())

    def _put(self, arrays: Any) -> Any:
        """Shards the rows of host arrays, the same on every process, over the mesh."""
        if self.mesh is None:
            return arrays
        rows = batch_sharding(self.mesh, self.rules)
        return place(arrays, jax.tree.map(lambda _: rows, arrays))

    def _in_force(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError unless both sides are multiples of the latent cell times the patch size."""
        cell = self.vae.config.downsampling_factor * self.model.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side < cell or side % cell:
                below = max(cell, side // cell * cell)
                raise UserError(f"{name}={side} is not a multiple of {cell}: use {below} or {below + cell}")

    @functools.cached_property
    def _draw(self):
        # Replicate the output: only fully addressable arrays convert to NumPy.
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
        places,
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
        encoded = encode_ahead(self.encoders, frozen["encoders"], tokens)
        repeat = lambda rows: jax.tree.map(lambda x: x[rows["places"]], rows["encoded"])  # noqa: E731
        encoded = self._on_own_rows(repeat, {"encoded": encoded, "places": places})
        text = encode(self.encoders, frozen["encoders"], encoded)
        predict = lambda x, timesteps: self.model.apply({"params": params}, x, timesteps, text)  # noqa: E731
        if is_guided:
            predict = guided(predict, guidance_scale)

        keys = jax.vmap(jax.random.key)(seeds)
        factor = self.vae.config.downsampling_factor
        noise = initial_noise(keys, (height // factor, width // factor, self.vae.config.latent_channels))
        latents = sample(sampler, self.schedule, predict, noise, steps, keys)
        latents = from_model_latents(latents, self.vae.config)
        decode = lambda latents, params: decode_within(  # noqa: E731
            self.vae, params, latents, pixels_at_once=decode_pixels, tile=decode_tile
        )
        # Each device slices and tiles its own rows: slices of the global batch would be decoded by every device.
        return to_pictures(self._on_own_rows(decode, latents, frozen["vae"]))

    def _on_own_rows(self, function: Callable[..., Any], rows: Any, *whole: Any) -> Any:
        """Calls `function(rows, *whole)` on each device with its shard of the rows and all of `whole`; returns rows."""
        if self.mesh is None:
            return function(rows, *whole)
        own = PartitionSpec(self.rules.batch)
        specs = own, *[PartitionSpec() for _ in whole]
        return jax.shard_map(function, in_specs=specs, out_specs=own, check_vma=False)(rows, *whole)


_STATIC = ("height", "width", "steps", "sampler", "is_guided", "decode_pixels", "decode_tile")


def _static(how: SampleConfig, height: int, width: int) -> dict[str, Any]:
    """Returns the static arguments, for whose values the program is compiled."""
    values = {"height": height, "width": width}
    return values | {name: getattr(how, name) for name in _STATIC if name not in values}
