"""Prompts to pictures: the one path for previews while training, for `sample` and for evaluation."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.diffusion.samplers import guided, initial_noise, sample
from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.errors import UserError
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.vae import AutoencoderKL, from_model_latents
from lidit_jax.models.vae_tiling import SMALLEST_TILE, decode_within
from lidit_jax.tasks import to_pictures
from lidit_jax.text.encoders import PromptEncoder, encode, tokenize


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn, under `sample` in the config.

    Attributes:
      sampler: one of `diffusion.samplers.SAMPLERS` that goes with the schedule.
      steps: of the sampler.
      guidance_scale: classifier-free guidance; 1 switches it off and halves the work.
      batch_size: pictures drawn at once.
      decode_pixels: what the VAE decodes at once: of more pictures, some after the others; a larger picture in tiles.
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
    """

    model: LIDiT
    schedule: Schedule
    encoders: Mapping[str, PromptEncoder]
    vae: AutoencoderKL
    frozen: Mapping[str, Any]

    def __call__(
        self, params: Any, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, how: SampleConfig
    ) -> np.ndarray:
        """One picture a prompt: uint8 [N, height, width, 3].

        A picture is a function of its prompt and its seed (and of `how`), not of its neighbours in the batch.

        Raises:
          UserError: if the VAE and the patch size do not divide the height or width, or the sampler does not fit.
        """
        self.check_size(height, width)
        pictures = []
        for start in range(0, len(prompts), how.batch_size):
            part = list(prompts[start : start + how.batch_size])
            count = len(part)
            part += [""] * (how.batch_size - count)  # one shape, one compilation
            part_seeds = [*seeds[start : start + how.batch_size]] + [0] * (how.batch_size - count)
            drawn = self._draw(
                params,
                self.frozen,
                tokenize(self.encoders, part),
                tokenize(self.encoders, [""] * how.batch_size),
                np.asarray(part_seeds, np.uint32),
                jnp.float32(how.guidance_scale),
                height=height,
                width=width,
                steps=how.steps,
                sampler=how.sampler,
                is_guided=how.guidance_scale != 1.0,
                decode_pixels=how.decode_pixels,
                decode_tile=how.decode_tile,
            )
            pictures.append(np.asarray(drawn)[:count])
        return np.concatenate(pictures)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError unless the VAE's cells and the patches divide both sides."""
        cell = self.vae.config.downsampling_factor * self.model.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side < cell or side % cell:
                below = max(cell, side // cell * cell)
                raise UserError(f"{name}={side} is not a multiple of {cell}: use {below} or {below + cell}")

    @functools.cached_property
    def _draw(self):
        static = ("height", "width", "steps", "sampler", "is_guided", "decode_pixels", "decode_tile")
        return jax.jit(self._draw_latents_and_decode, static_argnames=static)

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
        images = decode_within(self.vae, frozen["vae"], latents, pixels_at_once=decode_pixels, tile=decode_tile)
        return to_pictures(images)
