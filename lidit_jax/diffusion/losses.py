"""The training objective of the diffusion model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lidit_jax.diffusion.schedules import Schedule

NUM_TIME_BANDS = 4


def diffusion_loss(
    schedule: Schedule,
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x0: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the model's prediction at random times, in float32.

    With `DDPM(prediction="epsilon")` it is the paper's ||eps - eps_theta(x_t, t)||^2 (appendix A.1), averaged over
    elements; with `RectifiedFlow` SD3's conditional flow matching with logit-normal times.

    Args:
        schedule: draws the times, adds the noise and states the target.
        predict: (x_t [B, …] float32, model timesteps [B] float32) -> prediction [B, …].
        x0: clean samples (latents) [B, …].
        key: split in two: the first key draws the times, the second the noise.

    Returns:
        The loss, a float32 scalar, and scalar metrics: `loss`, and for each quarter k = 1 … 4 of the schedule, from
        little noise to much, `loss_quarter_k` (the mean over the samples whose time lies in it; 0 if none does) and
        `count_quarter_k` (how many do), so that means over several steps can be weighted.

    Raises:
        ValueError: if the prediction does not have the shape of x0.
    """
    times_key, noise_key = jax.random.split(key)
    times = schedule.sample_times(times_key, x0.shape[0])
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    timesteps = schedule.model_timesteps(times)

    prediction = predict(schedule.add_noise(x0, noise, times), timesteps)
    if prediction.shape != x0.shape:
        raise ValueError(f"the prediction has shape {prediction.shape}, the samples {x0.shape}")

    errors = jnp.square(prediction.astype(jnp.float32) - schedule.target(x0, noise, times))
    loss_per_sample = errors.mean(axis=tuple(range(1, errors.ndim)))  # [B]
    loss = loss_per_sample.mean()
    return loss, {"loss": loss, **_loss_by_quarter(loss_per_sample, timesteps / schedule.num_timesteps)}


def _loss_by_quarter(loss_per_sample: jax.Array, fractions: jax.Array) -> dict[str, jax.Array]:
    """Mean loss and sample count of each quarter of [0, 1); loss_per_sample and fractions [B]."""
    bands = jnp.clip((fractions * NUM_TIME_BANDS).astype(jnp.int32), 0, NUM_TIME_BANDS - 1)
    metrics = {}
    for band in range(NUM_TIME_BANDS):
        inside = bands == band
        count = inside.sum()
        total = jnp.where(inside, loss_per_sample, 0.0).sum()
        metrics[f"loss_quarter_{band + 1}"] = total / jnp.maximum(count, 1)
        metrics[f"count_quarter_{band + 1}"] = count
    return metrics
