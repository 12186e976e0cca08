"""The trainable parts as tasks of the one loop: small language models, the VAE, LI-DiT."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lidit_jax.diffusion.losses import diffusion_loss
from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.models.discriminator import PatchDiscriminator, smallest_side
from lidit_jax.models.flops import FORWARD_AND_BACKWARD, TextLengths, lidit_forward, vae_encoder_forward
from lidit_jax.models.image_similarity import psnr
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.models.lpips import LPIPS
from lidit_jax.models.vae import AutoencoderKL, DiagonalGaussian, to_model_latents
from lidit_jax.models.vae_loss import (
    adaptive_weight,
    adversarial_loss,
    hinge_loss,
    kl_loss,
    reconstruction_loss,
    value_and_gradient_at,
    values_per_image,
    with_gradient,
)
from lidit_jax.parallel.rules import whole
from lidit_jax.text.encoders import PromptEncoder, encode, encode_ahead
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.train import Batch, Evaluate, Task
from lidit_jax.weighted_mean import Perplexity, WeightedMean


def to_pixels(images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_pictures(images: jax.Array) -> jax.Array:
    """float32, clipped to [-1, 1] -> uint8."""
    return jnp.clip(jnp.round(images * 127.5 + 127.5), 0, 255).astype(jnp.uint8)


def language_model_task(name: str, config: LLMConfig, tokenizer: PromptTokenizer) -> Task:
    """Next-token prediction on captions that follow the instruction, as the LLM will meet them when it encodes.

    A batch has {"<name>/tokens": int32 [B, L], "<name>/mask": bool [B, L]}. The loss is the mean over the caption's
    tokens, its end token included; the instruction is context, not a target.
    """
    model = CausalLM(config)
    prefix = tokenizer.prefix()

    def init(key):
        return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def loss(params, frozen, batch, key, phase):
        del frozen, key, phase
        tokens, mask = batch[f"{name}/tokens"], batch[f"{name}/mask"]
        before = jnp.broadcast_to(jnp.asarray(prefix), (tokens.shape[0], len(prefix)))
        sequence = jnp.concatenate([before, tokens], axis=1)  # [B, P + L]
        logits = model.apply({"params": params}, sequence)[
            :, len(prefix) - 1 : -1
        ]  # [B, L, V]: each sees what is before
        return token_loss(logits, tokens, mask)

    return Task(name=name, init=init, loss=loss)


def token_loss(
    logits: jax.Array, tokens: jax.Array, counted: jax.Array
) -> tuple[WeightedMean, dict[str, WeightedMean]]:
    """Averages the negative log-likelihood of the counted tokens, in nats.

    Args:
      logits: float32 [B, L, V].
      tokens: int32 [B, L].
      counted: bool [B, L].

    Returns:
      The mean, weighted by the number of counted tokens, and {"perplexity": its exponential}.
    """
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]  # [B, L]
    loss = WeightedMean.over(-log_likelihood, counted)
    return loss, {"perplexity": Perplexity(loss.mean, loss.weight)}


@dataclasses.dataclass(frozen=True)
class VAEObjective:
    """What the autoencoder's training weighs, per value of a picture; see `models/vae_loss.py`.

    Attributes:
      reconstruction: error per pixel, "l1" or "l2".
      kl_weight: of the latents' divergence from the standard normal.
      perceptual_weight: of LPIPS, where its weights are given.
      adversarial_weight: of the discriminator's opinion, times the adaptive weight, where there is a discriminator.
      adversarial_start: step at which the discriminator begins to learn and to be heard.
    """

    reconstruction: str = "l1"
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.5
    adversarial_start: int = 0


def vae_task(
    model: AutoencoderKL,
    objective: VAEObjective,
    *,
    lpips: Any = None,
    discriminator: PatchDiscriminator | None = None,
    evaluate: Evaluate | None = None,
) -> Task:
    """Latent diffusion's autoencoder: similarity to the picture, KL and, on demand, a discriminator's opinion.

    A batch has {"image": uint8 [B, H, W, 3]}. The parameters are {"vae": …} and, with a discriminator,
    {"discriminator": …}: both networks take their step on the same reconstructions.

    Args:
      lpips: parameters of `LPIPS`, or None for no perceptual term.
    """

    def init(key):
        keys = jax.random.split(key)
        side = 2 * model.config.downsampling_factor
        params = {"vae": model.init(keys[0], jnp.zeros((1, side, side, model.config.in_channels)))["params"]}
        if discriminator:
            side = smallest_side(discriminator.layers)
            pictures = jnp.zeros((1, side, side, model.config.out_channels))
            params["discriminator"] = discriminator.init(keys[1], pictures)["params"]
        return params

    def loss(params, frozen, batch, key, phase):
        images = to_pixels(batch["image"])
        autoencode = functools.partial(model.apply, {"params": params["vae"]})
        posterior = autoencode(images, method=AutoencoderKL.encode)
        features = autoencode(posterior.sample(key), method=AutoencoderKL.decode_features)
        decoded = autoencode(features, method=AutoencoderKL.decode_last)
        kl = kl_loss(posterior, images)
        metrics = {"kl": kl, "psnr": jnp.mean(psnr(decoded, images))}

        def dissimilarity(decoded):
            parts = {"reconstruction": reconstruction_loss(decoded, images, objective.reconstruction)}
            total = parts["reconstruction"]
            if lpips is not None:
                perceive = functools.partial(LPIPS(model.dtype).apply, {"params": frozen["lpips"]})
                parts["perceptual"] = jnp.mean(perceive(decoded, images))
                total += objective.perceptual_weight * parts["perceptual"]
            return total, parts

        value, gradient, parts = value_and_gradient_at(dissimilarity, decoded)
        metrics |= parts
        if not phase:
            return _over_images(images, with_gradient(value, decoded, gradient) + objective.kl_weight * kl, metrics)

        in_kernel = functools.partial(_gradient_in_last_kernel, model, params["vae"], features)
        score = lambda pictures: discriminator.apply({"params": params["discriminator"]}, pictures)  # noqa: E731
        opinion = lambda decoded: (adversarial_loss(score(decoded)), {})  # noqa: E731
        adversarial, slope, _ = value_and_gradient_at(opinion, decoded)
        adaptive = adaptive_weight(in_kernel(gradient), in_kernel(slope), values_per_image(images))
        weight = objective.adversarial_weight * jax.lax.stop_gradient(adaptive)
        value, gradient = value + weight * adversarial, gradient + weight * slope
        hinge = hinge_loss(score(images), score(jax.lax.stop_gradient(decoded)))
        metrics |= {"hinge": hinge, "adaptive_weight": adaptive}
        total = with_gradient(value, decoded, gradient) + objective.kl_weight * kl + hinge
        return _over_images(images, total, metrics)

    return Task(
        name="vae",
        init=init,
        loss=loss,
        frozen=None if lpips is None else {"lpips": lpips},
        evaluate=evaluate,
        phases=(objective.adversarial_start,) if discriminator else (),
        networks={"vae": 0, "discriminator": 1} if discriminator else {},
    )


def _over_images(
    images: jax.Array, loss: jax.Array, metrics: Mapping[str, jax.Array]
) -> tuple[WeightedMean, dict[str, WeightedMean]]:
    """Weighs scalars that are means over a batch's images [B, H, W, C] by their number."""
    weigh = lambda mean: WeightedMean(mean, jnp.float32(images.shape[0]))  # noqa: E731
    return weigh(loss), {name: weigh(mean) for name, mean in metrics.items()}


def _gradient_in_last_kernel(model: AutoencoderKL, params: Any, features: jax.Array, gradient: jax.Array) -> jax.Array:
    """In the last convolution's kernel, of a loss whose gradient in the reconstruction is given.

    Args:
      features: what that convolution takes; they are not differentiated.
    """
    last = params["decoder"]["conv_out"]

    def decode_last(kernel):
        changed = {"params": {"decoder": {"conv_out": {**last, "kernel": kernel}}}}
        return model.apply(changed, jax.lax.stop_gradient(features), method=AutoencoderKL.decode_last)

    return jax.vjp(decode_last, last["kernel"])[1](gradient)[0]


def lidit_task(
    model: LIDiT,
    schedule: Schedule,
    encoders: Mapping[str, PromptEncoder],
    vae: AutoencoderKL,
    frozen: Mapping[str, Any],
    evaluate: Evaluate | None = None,
    *,
    encode_in_step: bool = True,
) -> Task:
    """The diffusion objective on latents, with the LLMs and the VAE's encoder frozen.

    A batch has {"image": uint8 [B, H, W, 3]}, or {"moments": [B, h, w, 2C]} that the VAE made of it ahead of time, and
    every encoder's tokens and mask.

    Args:
      frozen: {"vae": parameters, "encoders": {name: what the encoder's `freeze` gave}}.
      encode_in_step: the LLMs run inside the train step; else as a program of their own before it, whose features are
        kept in memory from the one to the other. Both compute the same.
    """

    def loss(params, frozen, batch, key, phase):
        del phase
        posterior_key, diffusion_key = jax.random.split(key)
        if "moments" in batch:
            posterior = DiagonalGaussian.from_moments(batch["moments"])
        else:
            pixels = to_pixels(batch["image"])
            posterior = vae.apply({"params": whole(frozen["vae"])}, pixels, method=AutoencoderKL.encode)
        latents = to_model_latents(posterior.sample(posterior_key), vae.config)
        latents = jax.lax.stop_gradient(latents)
        text = encode(encoders, frozen["encoders"], batch)
        predict = lambda x, timesteps: model.apply({"params": params}, x, timesteps, text)  # noqa: E731
        loss, metrics = diffusion_loss(schedule, predict, latents, diffusion_key)
        truncated = jnp.stack([batch[f"{name}/truncated"] for name in encoders])  # [encoders, B]
        return loss, metrics | {"truncated_prompts": WeightedMean.over(truncated)}

    def prepare(frozen, batch):
        return encode_ahead(encoders, frozen["encoders"], batch)

    return Task(
        name="lidit",
        init=functools.partial(model.init_params, [encoder.hidden_size for encoder in encoders.values()]),
        loss=loss,
        frozen=frozen,
        evaluate=evaluate,
        prepare=None if encode_in_step else prepare,
        flops=functools.partial(_lidit_flops, model, vae, encoders, frozen),
    )


def _lidit_flops(
    model: LIDiT, vae: AutoencoderKL, encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], batch: Batch
) -> int:
    """Operations that a step needs: encoding what is not encoded yet, and LI-DiT forward and backward."""
    content = "moments" if "moments" in batch else "image"
    count, height, width = batch[content].shape[:3]
    total = 0
    if content == "image":
        total += vae_encoder_forward(vae.config, count, height, width)
        height, width = (side // vae.config.downsampling_factor for side in (height, width))
    prompts = {name: batch[f"{name}/mask"].shape[1] for name in encoders}
    encoding, lengths = text_work(encoders, frozen["encoders"], count, prompts)
    return total + encoding + FORWARD_AND_BACKWARD * lidit_forward(model.config, count, height, width, lengths)


def text_work(
    encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], count: int, prompts: Mapping[str, int]
) -> tuple[int, list[TextLengths]]:
    """Operations of encoding so many prompts, and the lengths of their features.

    Args:
      frozen: the encoders' arrays, by name.
      prompts: tokens of a prompt, by encoder.
    """
    total, lengths = 0, []
    for name, encoder in encoders.items():
        prefix = encoder.prefix_length(frozen[name])
        lengths.append(TextLengths(prefix, prompts[name], encoder.hidden_size, not encoder.lead))
        total += encoder.flops(count, prompts[name], prefix)
    return total, lengths
