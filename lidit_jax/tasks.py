"""The trainable parts as tasks of the one loop: small language models, the VAE, LI-DiT."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.diffusion.losses import diffusion_loss
from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.models.lidit import LIDiT, TextFeatures
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.models.vae import AutoencoderKL, to_model_latents
from lidit_jax.models.vae_loss import psnr, vae_loss
from lidit_jax.text.encoders import PromptEncoder, encode, encode_ahead
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.train import Task, TrainState


def to_pixels(images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def language_model_task(name: str, config: LLMConfig, tokenizer: PromptTokenizer) -> Task:
    """Next-token prediction on captions that follow the instruction, as the LLM will meet them when it encodes.

    A batch has {"<name>/tokens": int32 [B, L], "<name>/mask": bool [B, L]}. The loss is the mean over the caption's
    tokens, its end token included; the instruction is context, not a target.
    """
    model = CausalLM(config)
    prefix = tokenizer.prefix()

    def init(key):
        return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(params, frozen, batch, key):
        del frozen, key
        tokens, mask = batch[f"{name}/tokens"], batch[f"{name}/mask"]
        before = jnp.broadcast_to(jnp.asarray(prefix), (tokens.shape[0], len(prefix)))
        sequence = jnp.concatenate([before, tokens], axis=1)  # [B, P + L]
        logits = model.apply({"params": params}, sequence)[
            :, len(prefix) - 1 : -1
        ]  # [B, L, V]: each sees what is before
        log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]  # [B, L]
        mean = -jnp.sum(log_likelihood * mask) / jnp.sum(mask)
        return mean, {"perplexity": jnp.exp(mean)}

    return Task(name=name, init=init, loss=loss)


def vae_task(model: AutoencoderKL, *, kl_weight: float, reconstruction: str) -> Task:
    """Reconstruction + KL. A batch has {"image": uint8 [B, H, W, 3]}."""

    def init(key):
        side = 2 * model.config.downsampling_factor
        return model.init(key, jnp.zeros((1, side, side, model.config.in_channels)))["params"]

    def loss(params, frozen, batch, key):
        del frozen
        images = to_pixels(batch["image"])
        decoded, posterior = model.apply({"params": params}, images, key)
        value, metrics = vae_loss(decoded, images, posterior, kl_weight=kl_weight, kind=reconstruction)
        return value, metrics | {"psnr": jnp.mean(psnr(decoded, images))}

    return Task(name="vae", init=init, loss=loss)


def lidit_task(
    model: LIDiT,
    schedule: Schedule,
    encoders: Mapping[str, PromptEncoder],
    vae: AutoencoderKL,
    frozen: Mapping[str, Any],
    preview: Callable[[TrainState, int], dict[str, np.ndarray]] | None = None,
    *,
    encode_in_step: bool = True,
) -> Task:
    """The diffusion objective on latents, with the LLMs and the VAE's encoder frozen.

    A batch has {"image": uint8 [B, H, W, 3]} and every encoder's tokens and mask.

    Args:
      frozen: {"vae": parameters, "encoders": {name: what the encoder's `freeze` gave}}.
      encode_in_step: the LLMs run inside the train step; else as a program of their own before it, whose features are
        kept in memory from the one to the other. Both compute the same.
    """

    def init(key):
        side = 2 * model.config.patch_size
        latents = jnp.zeros((1, side, side, vae.config.latent_channels))
        text = [
            TextFeatures(
                prefix=jnp.zeros((1, encoder.hidden_size)),
                prompt=jnp.zeros((1, 1, encoder.hidden_size)),
                mask=jnp.ones((1, 1), bool),
            )
            for encoder in encoders.values()
        ]
        return model.init(key, latents, jnp.zeros((1,)), text)["params"]

    def loss(params, frozen, batch, key):
        posterior_key, diffusion_key = jax.random.split(key)
        images = to_pixels(batch["image"])
        posterior = vae.apply({"params": frozen["vae"]}, images, method=AutoencoderKL.encode)
        latents = to_model_latents(posterior.sample(posterior_key), vae.config.scaling_factor, vae.config.shift_factor)
        latents = jax.lax.stop_gradient(latents)
        text = encode(encoders, frozen["encoders"], batch)
        predict = lambda x, timesteps: model.apply({"params": params}, x, timesteps, text)  # noqa: E731
        loss, metrics = diffusion_loss(schedule, predict, latents, diffusion_key)
        truncated = [jnp.mean(batch[f"{name}/truncated"].astype(jnp.float32)) for name in encoders]
        return loss, metrics | {"truncated_prompts": sum(truncated) / len(truncated)}

    def prepare(frozen, batch):
        return encode_ahead(encoders, frozen["encoders"], batch)

    return Task(
        name="lidit",
        init=init,
        loss=loss,
        frozen=frozen,
        preview=preview,
        prepare=None if encode_in_step else prepare,
    )
