"""The training objective of the diffusion model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.weighted_mean import WeightedMean

NUM_TIME_BANDS = 4


def diffusion_loss(
    schedule: Schedule,
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    x0: jax.Array,
    key: jax.Array,
) -> tuple[WeightedMean, dict[str, WeightedMean]]:
    """Computes the mean squared error of the model's prediction at random times, in float32.

    With `DDPM(prediction="epsilon")` it is the paper's ||eps - eps_theta(x_t, t)||^2, averaged over elements. The
    paper's Equation 7 (appendix A.1) divides it by 2 sigma_t^2; the weight of 1 is ours, as in the simple loss of Ho et
    al. (2020, equation 14). With `RectifiedFlow` it is SD3's conditional flow matching with logit-normal times.

    Args:
      schedule: samples the times, adds the noise and defines the target.
      predict: (x_t [B, …] float32, model timesteps [B] float32) -> prediction [B, …].
      x0: clean samples (latents) [B, …].
      key: random key, split into one for the times and one for the noise, in this order.

    Returns:
      The loss, a mean over the B samples, and the metrics `loss_quarter_k` for the quarters k = 1 … 4 of the schedule,
      from low to high noise: the mean loss of the samples whose time lies in that quarter, weighted by their number (0
      if there are none).

    Raises:
      ValueError: if the prediction does not have the shape of x0.
    """
    times_key, noise_key = jax.random.split(key)
    times = schedule.sample_times(times_key, x0.shape[0])
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    timesteps = schedule.model_timesteps(times)

    prediction = predict(schedule.add_noise(x0, noise, times), timesteps)
    if prediction.shape != x0.shape:
        raise ValueError(f"the prediction has shape {prediction.shape}, expected {x0.shape}, the shape of the samples")

    errors = jnp.square(prediction.astype(jnp.float32) - schedule.target(x0, noise, times))
    loss_per_sample = errors.mean(axis=tuple(range(1, errors.ndim)))  # [B]
    return WeightedMean.over(loss_per_sample), _loss_by_quarter(loss_per_sample, timesteps / schedule.num_timesteps)


def _loss_by_quarter(loss_per_sample: jax.Array, fractions: jax.Array) -> dict[str, WeightedMean]:
    """Averages the loss within each quarter of [0, 1); loss_per_sample and fractions [B]."""
    bands = jnp.clip((fractions * NUM_TIME_BANDS).astype(jnp.int32), 0, NUM_TIME_BANDS - 1)
    return {
        f"loss_quarter_{band + 1}": WeightedMean.over(loss_per_sample, bands == band) for band in range(NUM_TIME_BANDS)
    }
