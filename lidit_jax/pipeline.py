"""Samples images from prompts: the one path for previews during training, for the `sample` command and evaluation."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lidit_jax.diffusion.samplers import MAX_STEPS, guided, initial_noise, sample, step_table
from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.errors import UserError
from lidit_jax.images import to_uint8
from lidit_jax.models.flops import lidit_forward
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.vae import AutoencoderKL, from_model_latents
from lidit_jax.models.vae_tiling import SMALLEST_TILE, decode_within
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, num_batch_shards, put_sharded, replicated, shardings
from lidit_jax.ranges import Count, Size, at_least, between, check_ranges
from lidit_jax.text.batch_prompts import SharedPrompts
from lidit_jax.text.encoders import PromptEncoder, encode, encode_batch, text_flops_and_lengths, tokenize

MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 1000  # scales in use are below 20; far above 1000, float32 overflows


class NotFiniteError(UserError):
    """Images that have values that are not finite, and would be black."""


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
    steps: Annotated[int, between(1, MAX_STEPS)] = 25
    guidance_scale: Annotated[float, between(0, MAX_GUIDANCE)] = 4.0
    batch_size: Size = 16
    decode_pixels: Count = 1 << 20
    decode_tile: Annotated[int, at_least(SMALLEST_TILE)] = 256

    def __post_init__(self):
        check_ranges(self, "sample.")

    @property
    def is_guided(self) -> bool:
        """True if each evaluation of the model also predicts for the negative prompt."""
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
      rules: sharding rules of the mesh.
    """

    model: LIDiT
    schedule: Schedule
    encoders: Mapping[str, PromptEncoder]
    vae: AutoencoderKL
    frozen: Mapping[str, Any]
    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()

    def __call__(
        self,
        params: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        sampling: SampleConfig,
        images_per_prompt: int = 1,
        negative_prompt: str = "",
    ) -> np.ndarray:
        """Samples `images_per_prompt` images for each prompt.

        An image depends on its prompt, its seed and `sampling`, not on the rest of its batch.

        Args:
          params: LI-DiT's parameters.
          prompts: the prompts.
          seeds: [N], one for each image, from 0 to `MAX_SEED`; N = len(prompts) * images_per_prompt.
          height: in pixels.
          width: in pixels.
          sampling: sampler, steps, guidance and batch size.
          images_per_prompt: images for each prompt.
          negative_prompt: what classifier-free guidance steers away from; "" as in training.

        Returns:
          uint8 [N, height, width, 3]; the images of one prompt are adjacent.

        Raises:
          UserError: if the height or width is not a multiple of the latent cell times the patch size, or the sampler
            does not fit the schedule.
          NotFiniteError: if an image has values that are not finite.
          ValueError: if the number of seeds is not N.
        """
        if len(seeds) != len(prompts) * images_per_prompt:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts with {images_per_prompt} images each")
        self.check_size(height, width)
        rows, scale = self.rows(sampling), np.float32(sampling.guidance_scale)
        shared = self._shared_prompts(sampling, images_per_prompt)
        images = []
        for start in range(0, len(seeds), rows):
            batch_seeds = [*seeds[start : start + rows]]
            count = len(batch_seeds)
            batch_seeds += [0] * (rows - count)  # one shape, so one compilation
            to_encode, encoded_rows = shared.batch(prompts, start, negative_prompt)
            inputs = tokenize(self.encoders, to_encode), encoded_rows, _seed_words(batch_seeds)
            with self._mesh_context():
                batch, is_finite = self._sample_program(
                    params, self.frozen, *self._shard_rows(inputs), scale, **_static(sampling, height, width)
                )
            images.append(np.asarray(batch)[:count])
            failed = np.flatnonzero(~np.asarray(is_finite)[:count])
            if failed.size:  # these images would be black
                raise NotFiniteError(
                    f"the image of seed {batch_seeds[failed[0]]} has values that are not finite: the weights are "
                    f"unusable, or guidance_scale={sampling.guidance_scale:g} is too high"
                )
        return np.concatenate(images)

    def abstract_params(self) -> Any:
        """Returns shapes, dtypes and shardings of LI-DiT's parameters, to load into."""
        widths = [encoder.hidden_size for encoder in self.encoders.values()]
        boxed = jax.eval_shape(functools.partial(self.model.init_params, widths), jax.random.key(0))
        if self.mesh is None:
            first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            param_shardings = jax.tree.map(lambda _: first_device, nn.unbox(boxed))
        else:
            param_shardings = shardings(boxed, self.mesh, self.rules)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            nn.unbox(boxed),
            param_shardings,
        )

    def flops(self, height: int, width: int, sampling: SampleConfig, images_per_prompt: int = 1) -> int:
        """Returns the model FLOPs of sampling one batch, counted as in `models/flops.py`, without the VAE's."""
        rows = self.rows(sampling) * (2 if sampling.is_guided else 1)
        tokens = {name: encoder.tokenizer.max_length for name, encoder in self.encoders.items()}
        encoded = self._shared_prompts(sampling, images_per_prompt).encoded
        encoding, lengths = text_flops_and_lengths(self.encoders, self.frozen["encoders"], encoded, tokens)
        factor = self.vae.config.downsampling_factor
        evaluations = len(step_table(sampling.sampler, self.schedule, sampling.steps).timesteps)
        per_evaluation = lidit_forward(self.model.config, rows, height // factor, width // factor, lengths)
        return encoding + evaluations * per_evaluation

    def lower(
        self, params: Any, height: int, width: int, sampling: SampleConfig, images_per_prompt: int = 1
    ) -> jax.stages.Lowered:
        """Lowers the program that samples one batch, from shapes instead of arrays; see `compile/compile_step.py`."""
        to_encode, encoded_rows = self._shared_prompts(sampling, images_per_prompt).batch([], 0)
        inputs = tokenize(self.encoders, to_encode), encoded_rows, _seed_words([0] * self.rows(sampling))
        sharding = None if self.mesh is None else batch_sharding(self.mesh, self.rules)
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)
        with self._mesh_context():
            return self._sample_program.lower(
                params, self.frozen, *inputs, np.float32(1), **_static(sampling, height, width)
            )

    def rows(self, sampling: SampleConfig) -> int:
        """Returns the images sampled at once: the batch size, rounded up to a multiple of the batch shards."""
        return math.ceil(sampling.batch_size / self._shards()) * self._shards()

    def _shards(self) -> int:
        return 1 if self.mesh is None else num_batch_shards(self.mesh, self.rules)

    def _shared_prompts(self, sampling: SampleConfig, images_per_prompt: int) -> SharedPrompts:
        return SharedPrompts(self.rows(sampling), images_per_prompt, sampling.is_guided, self._shards())

    def _shard_rows(self, arrays: Any) -> Any:
        """Shards the rows of host arrays, the same on every process, over the mesh."""
        if self.mesh is None:
            return arrays
        sharding = batch_sharding(self.mesh, self.rules)
        return put_sharded(arrays, jax.tree.map(lambda _: sharding, arrays))

    def _mesh_context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError unless both sides are multiples of the latent cell times the patch size."""
        check_size(height, width, self.vae.config.downsampling_factor * self.model.config.patch_size)

    @functools.cached_property
    def _sample_program(self):
        # Replicate the output: only fully addressable arrays convert to NumPy.
        sharding = None if self.mesh is None else replicated(self.mesh)
        return jax.jit(self._sample_under_rules, static_argnames=_STATIC, out_shardings=sharding)

    def _sample_under_rules(self, *arguments, **static):
        with nn.logical_axis_rules(() if self.mesh is None else self.rules.pairs()):
            return self._sample_images(*arguments, **static)

    def _sample_images(
        self,
        params,
        frozen,
        tokens,
        encoded_rows,
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
        encoded = encode_batch(self.encoders, frozen["encoders"], tokens)
        encoded = self._on_each_device(_repeat_rows, (encoded, encoded_rows))
        text = encode(self.encoders, frozen["encoders"], encoded)

        def predict(x, timesteps):
            return self.model.apply({"params": params}, x, timesteps, text)

        def decode(latents, vae_params):
            return decode_within(self.vae, vae_params, latents, pixels_at_once=decode_pixels, tile=decode_tile)

        if is_guided:
            predict = guided(predict, guidance_scale)

        keys = jax.vmap(_key)(seeds)
        factor = self.vae.config.downsampling_factor
        noise = initial_noise(keys, (height // factor, width // factor, self.vae.config.latent_channels))
        latents = cast(jax.Array, sample(sampler, self.schedule, predict, noise, steps, keys))  # no trajectory
        latents = from_model_latents(latents, self.vae.config)
        # Each device slices and tiles its own rows: slices of the global batch would be decoded by every device.
        images = self._on_each_device(decode, latents, frozen["vae"])
        return to_uint8(images), jnp.isfinite(images).all(axis=(1, 2, 3))

    def _on_each_device(self, function: Callable[..., Any], rows: Any, *shared: Any) -> Any:
        """Calls `function(rows, *shared)` on each device with its shard of the rows, and replicated `shared` arrays."""
        if self.mesh is None:
            return function(rows, *shared)
        sharded = PartitionSpec(self.rules.batch)
        specs = sharded, *[PartitionSpec() for _ in shared]
        return jax.shard_map(function, in_specs=specs, out_specs=sharded, check_vma=False)(rows, *shared)


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises UserError unless both sides of an image, in pixels, are multiples of `multiple`."""
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            below = max(multiple, side // multiple * multiple)
            raise UserError(f"{name}={side} is not a multiple of {multiple}: use {below} or {below + multiple}")


def _seed_words(seeds: Sequence[int]) -> np.ndarray:
    """Returns the high and low 32 bits of each seed, uint32 [N, 2]: without x64, JAX has no larger integers."""
    return np.asarray([divmod(int(seed), 1 << 32) for seed in seeds], np.uint32)


def _key(words: jax.Array) -> jax.Array:
    """Returns the key of a seed, which is `jax.random.key(seed)` below 2^32; words uint32 [2], high and low."""
    high, low = words
    key = jax.random.key(low)
    return jax.lax.select(high == 0, key, jax.random.fold_in(key, high))


def _repeat_rows(rows: tuple[Any, jax.Array]) -> Any:
    """Returns a device's encoded prompts, one row for each of its images."""
    encoded, encoded_rows = rows
    return jax.tree.map(lambda x: x[encoded_rows], encoded)


_STATIC = ("height", "width", "steps", "sampler", "is_guided", "decode_pixels", "decode_tile")


def _static(sampling: SampleConfig, height: int, width: int) -> dict[str, Any]:
    """Returns the static arguments, for whose values the program is compiled."""
    values = {"height": height, "width": width}
    return values | {name: getattr(sampling, name) for name in _STATIC if name not in values}
