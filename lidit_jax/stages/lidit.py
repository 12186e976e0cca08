"""LI-DiT: its task, and the stage that trains it between its frozen encoders and VAE."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lidit_jax.checkpoint_weights import load_weights
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.prompt_lengths import PromptLengths
from lidit_jax.diffusion.losses import diffusion_loss
from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.experiment import LIDIT, Experiment, checkpoint_folder
from lidit_jax.export.read import is_exported, load_params
from lidit_jax.goodput import Goodput
from lidit_jax.images import grid, to_float
from lidit_jax.models.flops import FORWARD_AND_BACKWARD, lidit_forward, vae_encoder_forward
from lidit_jax.models.initialize import draw_together
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.vae import AutoencoderKL, DiagonalGaussian, to_model_latents
from lidit_jax.parallel.rules import ShardingRules, replicate, replicated
from lidit_jax.parallel.watchdog import watched
from lidit_jax.pipeline import NotFiniteError, Pipeline
from lidit_jax.stages.train_network import train_network
from lidit_jax.stages.work_left import later_steps
from lidit_jax.text.encoders import (
    PrecomputedEncoder,
    PromptEncoder,
    PromptTokenCounter,
    encode,
    text_flops_and_lengths,
    tokenize,
)
from lidit_jax.trainer import Batch, Evaluate, Task, TrainState
from lidit_jax.weighted_mean import WeightedMean

logger = logging.getLogger(__name__)


def lidit_task(
    model: LIDiT,
    schedule: Schedule,
    encoders: Mapping[str, PromptEncoder],
    vae: AutoencoderKL,
    frozen: Mapping[str, Any],
    evaluate: Evaluate | None = None,
) -> Task:
    """Returns the task of the diffusion objective on latents, with the LLMs and the VAE's encoder frozen.

    A batch has {"image": uint8 [B, H, W, 3]}, or {"moments": [B, h, w, 2C]} that the VAE computed from it in advance,
    and the tokens and mask of every encoder.

    Args:
      model: LI-DiT.
      schedule: noise schedule.
      encoders: prompt encoders by name, in the order of the model's branches.
      vae: the autoencoder.
      frozen: {"vae": parameters, "encoders": {name: output of the encoder's `freeze`}}.
      evaluate: computes what is logged every `sample_every` steps; or None.
    """

    def loss(params, frozen, batch, key, phase):
        del phase
        posterior_key, diffusion_key = jax.random.split(key)
        if "moments" in batch:
            posterior = DiagonalGaussian.from_moments(batch["moments"])
        else:
            with jax.named_scope("vae"):
                pixels = to_float(batch["image"])
                posterior = vae.apply({"params": replicate(frozen["vae"])}, pixels, method=AutoencoderKL.encode)
        latents = to_model_latents(posterior.sample(posterior_key), vae.config)
        latents = jax.lax.stop_gradient(latents)
        text = encode(encoders, frozen["encoders"], batch)

        def predict(x, timesteps):
            return model.apply({"params": params}, x, timesteps, text)

        loss, metrics = diffusion_loss(schedule, predict, latents, diffusion_key)
        truncated = jnp.stack([batch[f"{name}/truncated"] for name in encoders])  # [encoders, B]
        return loss, metrics | {"truncated_prompts": WeightedMean.over(truncated)}

    widths = [encoder.hidden_size for encoder in encoders.values()]
    return Task(
        name="lidit",
        init=draw_together(functools.partial(model.init_params, widths)),
        loss=loss,
        frozen=frozen,
        evaluate=evaluate,
        flops=functools.partial(_lidit_flops, model, vae, encoders, frozen),
    )


def _lidit_flops(
    model: LIDiT, vae: AutoencoderKL, encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], batch: Batch
) -> int:
    """Returns the model FLOPs of a step: encoding images and prompts, unless precomputed, and LI-DiT's two passes."""
    content = "moments" if "moments" in batch else "image"
    count, height, width = batch[content].shape[:3]
    total = 0
    if content == "image":
        total += vae_encoder_forward(vae.config, count, height, width)
        height, width = (side // vae.config.downsampling_factor for side in (height, width))
    prompts = {name: batch[f"{name}/mask"].shape[1] for name in encoders}
    encoding, lengths = text_flops_and_lengths(encoders, frozen["encoders"], count, prompts)
    return total + encoding + FORWARD_AND_BACKWARD * lidit_forward(model.config, count, height, width, lengths)


def train_lidit(
    experiment: Experiment, dataset: Dataset, mesh: Mesh, rules: ShardingRules, goodput: Goodput
) -> tuple[Pipeline, TrainState]:
    """Trains LI-DiT, and returns the pipeline to sample with and the final state."""
    config, sampling = experiment.train, experiment.sample
    stored = dataset.stored_prompts()
    samples_images = config.sample_every > 0 or "evaluate" in experiment.config
    # With stored features, the encoders are needed for sampling only.
    with watched(config.stalled_after, "loading the encoders"):
        pipeline = experiment.pipeline(mesh, rules, with_encoders=samples_images or not stored)
    prompts = dataset.captions(sampling.batch_size, experiment.config.seed)
    bucket = dataset.largest_bucket()

    def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        try:
            images = pipeline(state.averaged, prompts, range(len(prompts)), bucket.height, bucket.width, sampling)
        except NotFiniteError as error:  # training may recover, and its steps since the last checkpoint are not saved
            logger.warning("step %d is not sampled: %s", step, error)
            return {}, {}
        return {}, {"sample": np.asarray(grid(list(images), prompts))}

    encoders, frozen = pipeline.encoders, pipeline.frozen
    if stored:
        encoders = {
            name: PrecomputedEncoder(encoder.hidden_size, encoder.lead) for name, encoder in stored.encoders.items()
        }
        prefixes = {name: jax.device_put(stored.prefix[name], replicated(mesh)) for name in encoders}
        frozen = {**frozen, "encoders": prefixes}
    task = lidit_task(
        pipeline.model,
        pipeline.schedule,
        encoders,
        pipeline.vae,
        frozen,
        evaluate,
    )

    lengths = _prompt_lengths(experiment, dataset, pipeline.encoders)

    def batches(first: int):
        return dataset.batches(
            config.batch_size,
            experiment.config.seed,
            tokenize=lambda captions: tokenize(pipeline.encoders, captions),
            first=first,
            caption_dropout=experiment.data.caption_dropout,
            with_features=stored is not None,
            prompts=lengths,
        )

    order = f" by {lengths.fingerprint}" if lengths else ""
    provenance = {"data": dataset.fingerprint + order, "frozen": experiment.frozen_digests()}
    initial_params = _initial_params(experiment, mesh, rules)
    state = train_network(
        *(experiment, task, config, batches, mesh, rules, provenance, goodput, initial_params),
        later_steps=later_steps(experiment, task.name),
    )
    return pipeline, state


def _prompt_lengths(
    experiment: Experiment, dataset: Dataset, encoders: Mapping[str, PromptEncoder]
) -> PromptLengths | None:
    """Returns the lengths that prompts are padded to, and logs them; None if there is one, `text.max_length`."""
    text = experiment.text
    if text.num_lengths == 1:
        return None
    with watched(experiment.train.stalled_after, "counting prompt tokens"):
        lengths = dataset.prompt_lengths(PromptTokenCounter(encoders), text.num_lengths, text.max_length)
    logger.info("%s", lengths.summary())
    return lengths


def _initial_params(experiment: Experiment, mesh: Mesh, rules: ShardingRules) -> Callable[[Any], Any] | None:
    """Returns a loader of LI-DiT's EMA weights from the workdir or exported folder `start_from`; None without one."""
    if not experiment.config.get("start_from"):
        return None
    source = epath.Path(experiment.config.start_from)

    def load(into: Any) -> Any:
        if is_exported(source):
            logger.info("starting from %s", source)
            return load_params(source, into, mesh, rules)
        params, step = load_weights(checkpoint_folder(source, LIDIT), "ema", into, experiment.train.strict_restore)
        logger.info("starting from %s, step %d", source, step)
        return params

    return load
