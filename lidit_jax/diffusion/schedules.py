"""Noise schedules: the forward process, and the prediction targets of the model.

Every schedule mixes a sample x_0 with standard normal noise eps, at one time per sample:

    x_t = alpha(t) x_0 + sigma(t) eps

`DDPM` is the paper's process (variance preserving, discrete times 0 … T-1), with betas that are ours. `RectifiedFlow`
is the straight path of Stable Diffusion 3 (times s in (0, 1)). Samples have any shape [B, …]; arithmetic is in float32.
"""

import abc
import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.config import build
from lidit_jax.errors import UserError
from lidit_jax.ranges import above, at_most, below, between, check_ranges

BETA_SCHEDULES = ("scaled_linear", "linear")
DDPM_PREDICTIONS = ("epsilon", "v")
MAX_TIMESTEPS = 1_000_000  # a schedule computes a table of this length at once

_Timesteps = Annotated[int, between(2, MAX_TIMESTEPS)]
_Beta = Annotated[float, above(0), below(1)]


def x0_from_output(prediction: str, output: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the clean sample that a model output implies.

    Args:
      prediction: type of the model output: "epsilon", "v" or "flow".
      output: model output, any shape.
      x: noisy input of the model, same shape.
      alpha: scale of the signal in `x`, broadcastable to `x`.
      sigma: scale of the noise in `x`, broadcastable to `x`.
    """
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v":
        return alpha * x - sigma * output
    return x - sigma * output


def noise_from_output(
    prediction: str, output: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """Returns the noise that a model output implies; arguments as for `x0_from_output`."""
    if prediction == "epsilon":
        return output
    if prediction == "v":
        return alpha * output + sigma * x
    return x + alpha * output


def _per_sample(scale: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes [B] to [B, 1, …, 1], to broadcast against x [B, …]."""
    return scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))


def _as_float32(*arrays: jax.Array) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.float32) for array in arrays]


class Schedule(abc.ABC):
    """Interface of the noise schedules.

    Attributes:
      num_timesteps: the model's timesteps lie in [0, num_timesteps].
      prediction: target of the model: "epsilon" (the noise), "v" (alpha eps - sigma x_0, Salimans & Ho 2022, appendix
        D) or "flow" (eps - x_0).
    """

    num_timesteps: int

    @property
    @abc.abstractmethod
    def prediction(self) -> str: ...

    @abc.abstractmethod
    def sample_times(self, key: jax.Array, batch_size: int) -> jax.Array:
        """Samples training times [batch_size]: int32 in [0, T) for `DDPM`, float32 in (0, 1) for `RectifiedFlow`."""

    @abc.abstractmethod
    def model_timesteps(self, times: jax.Array) -> jax.Array:
        """Converts times to the unit of the model's timestep embedding, float32, same shape, as in diffusers."""

    @abc.abstractmethod
    def signal_and_noise_scales(self, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns alpha and sigma at `times`, float32, each of the shape of `times`."""

    def add_noise(self, x0: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """Returns x_t = alpha x_0 + sigma eps, float32; x0 and noise [B, …], times [B]."""
        x0, noise = _as_float32(x0, noise)
        alpha, sigma = self._scales_like(x0, times)
        return alpha * x0 + sigma * noise

    def target(self, x0: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
        """Returns the target of the model's output at x_t, float32; x0 and noise [B, …], times [B]."""
        x0, noise = _as_float32(x0, noise)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v":
            alpha, sigma = self._scales_like(x0, times)
            return alpha * noise - sigma * x0
        return noise - x0

    def to_x0(self, model_output: jax.Array, x: jax.Array, times: jax.Array) -> jax.Array:
        """Returns the clean sample that `model_output` implies, float32; model_output and x [B, …], times [B]."""
        model_output, x = _as_float32(model_output, x)
        return x0_from_output(self.prediction, model_output, x, *self._scales_like(x, times))

    def to_noise(self, model_output: jax.Array, x: jax.Array, times: jax.Array) -> jax.Array:
        """Returns the noise that `model_output` implies, float32; model_output and x [B, …], times [B]."""
        model_output, x = _as_float32(model_output, x)
        return noise_from_output(self.prediction, model_output, x, *self._scales_like(x, times))

    def _scales_like(self, x: jax.Array, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        alpha, sigma = self.signal_and_noise_scales(times)
        return _per_sample(alpha, x), _per_sample(sigma, x)


@dataclasses.dataclass(frozen=True)
class DDPM(Schedule):
    """The discrete, variance-preserving schedule of DDPM (Ho et al. 2020), equal to diffusers' `DDPMScheduler`.

    The default betas are those of latent diffusion (Stable Diffusion); the paper does not state its schedule.

    Attributes:
      num_timesteps: T.
      beta_start: first beta.
      beta_end: last beta.
      beta_schedule: "scaled_linear" (sqrt(beta) is linear in t) or "linear".
      prediction: "epsilon" (paper, appendix A.1) or "v".
      zero_terminal_snr: rescale the betas so that x_{T-1} is pure noise (Lin et al. 2024, algorithm 1; diffusers'
        `rescale_betas_zero_snr`). Requires prediction "v", because x_0 cannot be recovered from the noise of pure
        noise.

    Raises:
      UserError: if a value is not supported or two do not fit together.
    """

    num_timesteps: _Timesteps = 1000
    beta_start: _Beta = 0.00085
    beta_end: _Beta = 0.012
    beta_schedule: str = "scaled_linear"
    prediction: str = "epsilon"
    zero_terminal_snr: bool = False

    def __post_init__(self):
        check_ranges(self, "")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise UserError(f"unknown beta_schedule {self.beta_schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}")
        if self.prediction not in DDPM_PREDICTIONS:
            raise UserError(f"unknown prediction {self.prediction!r}; choose one of {', '.join(DDPM_PREDICTIONS)}")
        if self.beta_start > self.beta_end:
            raise UserError(f"beta_start={self.beta_start} is larger than beta_end={self.beta_end}: exchange them")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UserError(
                "zero_terminal_snr is ill-posed with prediction='epsilon' (x_0 cannot be recovered from pure noise); "
                "set prediction='v'"
            )
        # Recovering x_0 = (x - sigma eps) / alpha in float32 needs an alpha that float32 can represent.
        if np.sqrt(np.prod(1.0 - self._unscaled_betas())) < np.finfo(np.float32).tiny:
            raise UserError(f"beta_end={self.beta_end} leaves no signal at the last timestep: use a smaller value")

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """beta(t), float64 [T]."""
        if self.zero_terminal_snr:
            alphas_cumprod = self.alphas_cumprod
            return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return self._unscaled_betas()

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha(t)^2, the cumulative product of 1 - beta, float64 [T]."""
        alphas_cumprod = np.cumprod(1.0 - self._unscaled_betas())
        if not self.zero_terminal_snr:
            return alphas_cumprod
        signal = np.sqrt(alphas_cumprod)
        first, last = signal[0], signal[-1]
        return ((signal - last) * first / (first - last)) ** 2

    def _unscaled_betas(self) -> np.ndarray:
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=np.float64)
        return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps, dtype=np.float64) ** 2

    def sample_times(self, key: jax.Array, batch_size: int) -> jax.Array:
        """Samples times uniformly from 0 … T-1, int32 [batch_size]."""
        return jax.random.randint(key, (batch_size,), 0, self.num_timesteps, dtype=jnp.int32)

    def model_timesteps(self, times: jax.Array) -> jax.Array:
        """Returns `times` as float32, in [0, T-1]."""
        return jnp.asarray(times, jnp.float32)

    def signal_and_noise_scales(self, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at int `times`, float32, shapes as `times`."""
        # In float64: at small t, 1 - alphas_cumprod loses four digits in float32.
        alpha = jnp.asarray(np.sqrt(self.alphas_cumprod), jnp.float32)
        sigma = jnp.asarray(np.sqrt(1.0 - self.alphas_cumprod), jnp.float32)
        return alpha[times], sigma[times]


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """The straight path x_s = (1 - s) x_0 + s eps with velocity target eps - x_0 (Esser et al. 2024, "SD3").

    Training times are logit-normal, then shifted towards the noise: s' = shift s / (1 + (shift - 1) s), the same shift
    as in sampling (diffusers' `FlowMatchEulerDiscreteScheduler`).

    Attributes:
      shift: resolution shift, from 0.001 to 1000; 1 is no shift. `resolution_shift` computes SD3's value for a
        resolution.
      logit_mean: mean of logit(s) before the shift (SD3 section 3.1: 0).
      logit_std: standard deviation of logit(s) before the shift, > 0 (SD3 section 3.1: 1).
      num_timesteps: the model's timestep is s * num_timesteps. Sampling starts its last step at s = 1 / num_timesteps,
        before shifts.

    Raises:
      UserError: if a value is out of range.
    """

    shift: Annotated[float, between(0.001, 1000)] = 1.0
    logit_mean: Annotated[float, between(-100, 100)] = 0.0
    logit_std: Annotated[float, above(0), at_most(100)] = 1.0
    num_timesteps: _Timesteps = 1000

    prediction: ClassVar[str] = "flow"

    def __post_init__(self):
        check_ranges(self, "")

    def shift_times(self, times: Any) -> Any:
        """Returns shift s / (1 + (shift - 1) s) for times s, an array or a number in [0, 1]."""
        return self.shift * times / (1.0 + (self.shift - 1.0) * times)

    def sample_times(self, key: jax.Array, batch_size: int) -> jax.Array:
        """Samples logit-normal times and shifts them, float32 in (0, 1), [batch_size]."""
        logits = self.logit_mean + self.logit_std * jax.random.normal(key, (batch_size,), jnp.float32)
        # Extreme logits round to 0 or 1 in float32; the interval is open.
        eps = float(np.finfo(np.float32).eps)
        return jnp.clip(self.shift_times(jax.nn.sigmoid(logits)), eps, 1.0 - eps)

    def model_timesteps(self, times: jax.Array) -> jax.Array:
        """Returns s * num_timesteps, float32, of the shape of `times`."""
        return jnp.asarray(times, jnp.float32) * self.num_timesteps

    def signal_and_noise_scales(self, times: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns 1 - s and s, float32, each of the shape of `times`."""
        times = jnp.asarray(times, jnp.float32)
        return 1.0 - times, times


def resolution_shift(num_pixels: int, base_num_pixels: int) -> float:
    """Returns the `shift` of `RectifiedFlow` for a resolution, so that the uncertainty at a time s does not change.

    SD3 (Esser et al. 2024) equation 23: sqrt(m / n). With more pixels the noise averages out better, so the same loss
    of information needs more noise. `shift` 1 belongs to the base resolution. Both arguments count pixels of the image,
    or both count positions of the latents. SD3 itself uses 3.0 for 1024 x 1024, chosen by human preference.

    Args:
      num_pixels: m, height x width of the images to train on or generate.
      base_num_pixels: n, height x width of the resolution for which shift 1 is right (SD3: 256 x 256).

    Raises:
      UserError: if either is not positive.
    """
    if num_pixels <= 0 or base_num_pixels <= 0:
        raise UserError(f"pixel counts must be positive, got {num_pixels} and {base_num_pixels}")
    return math.sqrt(num_pixels / base_num_pixels)


SCHEDULES: dict[str, type[DDPM | RectifiedFlow]] = {"ddpm": DDPM, "rectified_flow": RectifiedFlow}


def make_schedule(name: Any = None, **values: Any) -> Schedule:
    """Builds a schedule from the values of the config section `diffusion`.

    Args:
      name: a key of `SCHEDULES`.
      **values: fields of the schedule's class.

    Raises:
      UserError: if the name or a field is unknown (the message lists the choices), or a value is invalid.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise UserError(f"diffusion.name={name!r:.80} is unknown: use one of {', '.join(SCHEDULES)}")
    return build(SCHEDULES[name], values, "diffusion")
