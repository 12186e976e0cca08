"""Samplers: generate samples from noise, with any model and a matching schedule.

Every sampler here is a table of coefficients with one row per model evaluation. In each row the model is evaluated at
(x, t); its output implies a clean sample x0 and a noise eps; the next x is a linear combination of x, x0, eps, one
memory array and fresh noise, with the coefficients of the row. The table depends only on the schedule and the number of
steps, so it is computed beforehand in float64, and one `jax.lax.scan` runs all rows. `guided` makes the model whose
output has classifier-free guidance. The coefficients are those of
diffusers' schedulers without clipping or thresholding (samples are latents), all of which end at zero noise:

| name     | schedule      | equivalent in diffusers                          | default timestep spacing       |
|----------|---------------|--------------------------------------------------|--------------------------------|
| ddpm     | DDPM          | DDPMScheduler, "fixed_small" variance            | "leading"                      |
| ddim     | DDPM          | DDIMScheduler, set_alpha_to_one                  | "leading"                      |
| dpmpp_2m | DDPM          | DPMSolverMultistepScheduler: dpmsolver++,        | "linspace"                     |
|          |               | order 2, midpoint, lower_order_final, zero final |                                |
| euler    | RectifiedFlow | FlowMatchEulerDiscreteScheduler                  | uniform in [s_min, 1], shifted |
| heun     | RectifiedFlow | FlowMatchHeunDiscreteScheduler                   | as euler                       |

Timestep spacings of DDPM schedules, for n steps of a schedule with T timesteps:
- "leading": k (T // n) + steps_offset for k = n-1 … 0. With few steps it starts well below T-1, with one step at
  `steps_offset`.
- "trailing": T - k T/n - 1, rounded, for k = 0 … n-1; an option of all three DDPM samplers. It starts at T-1, which
  zero terminal SNR requires and few-step sampling needs (Lin et al. 2024).
- "linspace": n+1 evenly spaced timesteps from 0 to T-1, rounded, without the 0.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lidit_jax.diffusion.schedules import DDPM, RectifiedFlow, Schedule, noise_from_output, x0_from_output
from lidit_jax.errors import UserError

Predict = Callable[[jax.Array, jax.Array], jax.Array]

MAX_STEPS = 1_000_000  # larger values are mistakes: sampling would not end
# alphas_cumprod at the last timestep of a schedule with zero terminal SNR in DPM-Solver++, as in diffusers (the
# smallest positive float16): the exact value, 0, has a log-SNR of minus infinity.
_DPM_SOLVER_TERMINAL_ALPHA_CUMPROD = 2.0**-24


class StepTable(NamedTuple):
    """The float32 coefficients of a sampler, one row for each of its N model evaluations.

    Attributes:
      timesteps: [N], timesteps for the model.
      alpha: [N], scale of the signal in x.
      sigma: [N], scale of the noise in x.
      next_weights: [N, 4], weights of (x, x0, eps, memory) in the next x.
      memory_weights: [N, 3], weights of (x, x0, eps) in the next memory.
      noise_scale: [N], standard deviation of the fresh noise in the next x.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    next_weights: np.ndarray
    memory_weights: np.ndarray
    noise_scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sampler:
    """An entry of `SAMPLERS`.

    Attributes:
      schedule: schedule class that the sampler supports.
      build_table: (schedule of that class, points, eta) -> StepTable; points are timesteps (DDPM) or sigmas
        (RectifiedFlow), [S].
      spacings: supported timestep spacings, the default first; empty for RectifiedFlow.
      takes_eta: True if the sampler has the parameter `eta`.
      evaluations_per_step: table rows per step (the last step may have fewer).
    """

    schedule: type[Schedule]
    build_table: Callable[[Any, np.ndarray, float], StepTable]
    spacings: tuple[str, ...] = ()
    takes_eta: bool = False
    evaluations_per_step: int = 1


def ddpm_timesteps(spacing: str, num_timesteps: int, num_steps: int, steps_offset: int = 0) -> np.ndarray:
    """Returns the decreasing timesteps of the sampling steps, int64 [num_steps]; see the module docstring.

    Args:
      spacing: "leading", "trailing" or "linspace" (as in diffusers' DPMSolverMultistepScheduler).
      num_timesteps: T of the schedule.
      num_steps: number of timesteps to return.
      steps_offset: offset of "leading" timesteps (Stable Diffusion uses 1).

    Raises:
      UserError: if the timesteps do not fit in [0, T-1] without repetition.
    """
    timesteps: np.ndarray
    if spacing == "leading":
        timesteps = np.arange(num_steps)[::-1] * (num_timesteps // num_steps) + steps_offset
    elif spacing == "trailing":
        # Slice to num_steps: by float rounding arange may have one value more.
        timesteps = np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps))[:num_steps] - 1
    else:
        timesteps = np.round(np.linspace(0, num_timesteps - 1, num_steps + 1))[:0:-1]
    timesteps = timesteps.astype(np.int64)
    if timesteps[0] >= num_timesteps or timesteps[-1] < 0 or np.any(np.diff(timesteps) >= 0):
        raise UserError(
            f"{num_steps} steps with {spacing!r} spacing and steps_offset {steps_offset} do not fit in a schedule of "
            f"{num_timesteps} timesteps; use fewer steps or a smaller offset"
        )
    return timesteps


def flow_sigmas(schedule: RectifiedFlow, num_steps: int) -> np.ndarray:
    """Returns the decreasing times s at which the sampling steps start, float64 [num_steps], from 1 down.

    The final time, 0, is not included. As in diffusers, the lower end of the evenly spaced times is shifted before they
    are all shifted, so it is shifted twice.
    """
    evenly_spaced = np.linspace(1.0, schedule.shift_times(1.0 / schedule.num_timesteps), num_steps)
    return schedule.shift_times(evenly_spaced)


def _make_table(timesteps, alpha, sigma, next_weights, memory_weights=None, noise_scale=None) -> StepTable:
    """Builds a float32 table from weights given as one array or number per term."""
    num_rows = len(timesteps)

    def columns(terms):
        return np.stack([np.broadcast_to(np.asarray(term, np.float64), (num_rows,)) for term in terms], axis=1)

    table = StepTable(
        timesteps=timesteps,
        alpha=alpha,
        sigma=sigma,
        next_weights=columns(next_weights),
        memory_weights=columns(memory_weights or (0.0, 0.0, 0.0)),
        noise_scale=np.zeros(num_rows) if noise_scale is None else noise_scale,
    )
    return StepTable(*(np.asarray(field, np.float32) for field in table))


def _ddpm_table(schedule: DDPM, timesteps: np.ndarray, eta: float) -> StepTable:
    """Ancestral sampling from the posterior q(x_prev | x_t, x_0) (Ho et al. 2020, equations 6 and 7)."""
    alpha_bar = schedule.alphas_cumprod[timesteps]
    previous_alpha_bar = np.append(alpha_bar[1:], 1.0)
    step_alpha = alpha_bar / previous_alpha_bar
    x_weight = np.sqrt(step_alpha) * (1.0 - previous_alpha_bar) / (1.0 - alpha_bar)
    x0_weight = np.sqrt(previous_alpha_bar) * (1.0 - step_alpha) / (1.0 - alpha_bar)
    variance = (1.0 - previous_alpha_bar) / (1.0 - alpha_bar) * (1.0 - step_alpha)
    return _make_table(
        timesteps,
        np.sqrt(alpha_bar),
        np.sqrt(1.0 - alpha_bar),
        next_weights=(x_weight, x0_weight, 0.0, 0.0),
        noise_scale=np.sqrt(variance),
    )


def _ddim_table(schedule: DDPM, timesteps: np.ndarray, eta: float) -> StepTable:
    """DDIM (Song et al. 2021, equations 12 and 16); eta 0 is deterministic, eta 1 has the variance of DDPM.

    Each step ends at the timestep where the next one starts. In diffusers it ends at t - T // n, which differs only
    with "trailing" spacing and a number of steps that does not divide T; there, diffusers' samples keep some noise.
    """
    alpha_bar = schedule.alphas_cumprod[timesteps]
    previous_alpha_bar = np.append(alpha_bar[1:], 1.0)
    variance = eta**2 * (1.0 - previous_alpha_bar) / (1.0 - alpha_bar) * (1.0 - alpha_bar / previous_alpha_bar)
    # With eta 1, rounding can make the difference slightly negative.
    direction = np.sqrt(np.maximum(1.0 - previous_alpha_bar - variance, 0.0))
    return _make_table(
        timesteps,
        np.sqrt(alpha_bar),
        np.sqrt(1.0 - alpha_bar),
        next_weights=(0.0, np.sqrt(previous_alpha_bar), direction, 0.0),
        noise_scale=np.sqrt(variance),
    )


def _dpmpp_2m_table(schedule: DDPM, timesteps: np.ndarray, eta: float) -> StepTable:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); the first and the last step are of first order.

    Equals diffusers with lower_order_final and final_sigmas_type="zero". The memory is the x0 of the previous step.
    """
    alphas_cumprod = schedule.alphas_cumprod.copy()
    if schedule.zero_terminal_snr:
        alphas_cumprod[-1] = _DPM_SOLVER_TERMINAL_ALPHA_CUMPROD
    alpha_bar = alphas_cumprod[timesteps]
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
    next_alpha, next_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)

    log_snr = np.append(np.log(alpha) - np.log(sigma), np.inf)  # [S + 1]
    steps = np.diff(log_snr)
    x0_weight = -next_alpha * np.expm1(-steps)
    extrapolation = np.zeros_like(x0_weight)
    extrapolation[1:-1] = 0.5 * x0_weight[1:-1] * steps[1:-1] / steps[:-2]
    return _make_table(
        timesteps,
        alpha,
        sigma,
        next_weights=(next_sigma / sigma, x0_weight + extrapolation, 0.0, -extrapolation),
        memory_weights=(0.0, 1.0, 0.0),
    )


def _euler_table(schedule: RectifiedFlow, sigmas: np.ndarray, eta: float) -> StepTable:
    """Euler's method: x + (s_next - s) v, which equals (1 - s_next) x0 + s_next eps on the straight path."""
    next_sigmas = np.append(sigmas[1:], 0.0)
    return _make_table(
        sigmas * schedule.num_timesteps,
        1.0 - sigmas,
        sigmas,
        next_weights=(0.0, 1.0 - next_sigmas, next_sigmas, 0.0),
    )


def _heun_table(schedule: RectifiedFlow, sigmas: np.ndarray, eta: float) -> StepTable:
    """Heun's method: an Euler step, repeated with the mean of the velocities at its start and its end.

    The memory is x + (s_next - s) v / 2 with the first velocity; the second evaluation adds the other half. The last
    step, to s = 0, is an Euler step, so the table has 2 S - 1 rows.
    """
    next_sigmas = np.append(sigmas[1:], 0.0)
    half_steps = (next_sigmas - sigmas) / 2.0

    points = np.repeat(sigmas, 2)[1:]  # [2 S - 1]: s_0 s_1 s_1 s_2 s_2 …
    half = np.repeat(half_steps, 2)[:-1]
    target = np.repeat(next_sigmas, 2)[:-1]
    second = np.arange(len(points)) % 2
    first = 1 - second
    # The weights express the velocity as v = eps - x0.
    return _make_table(
        points * schedule.num_timesteps,
        1.0 - points,
        points,
        next_weights=(0.0, first * (1.0 - target) - second * half, first * target + second * half, second),
        memory_weights=(first, -first * half, first * half),
    )


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(DDPM, _ddpm_table, spacings=("leading", "trailing")),
    "ddim": Sampler(DDPM, _ddim_table, spacings=("leading", "trailing"), takes_eta=True),
    "dpmpp_2m": Sampler(DDPM, _dpmpp_2m_table, spacings=("linspace", "trailing")),
    "euler": Sampler(RectifiedFlow, _euler_table),
    "heun": Sampler(RectifiedFlow, _heun_table, evaluations_per_step=2),
}


def samplers_for(schedule: Schedule) -> tuple[str, ...]:
    """Returns the names of the samplers that support a schedule."""
    return tuple(name for name, sampler in SAMPLERS.items() if isinstance(schedule, sampler.schedule))


def step_table(
    sampler_name: str,
    schedule: Schedule,
    num_steps: int,
    *,
    spacing: str | None = None,
    steps_offset: int = 0,
    eta: float = 0.0,
) -> StepTable:
    """Returns the coefficients of a sampler for a schedule and number of steps; arguments and errors as in `sample`."""
    sampler = _checked_sampler(sampler_name, schedule, eta)
    num_steps = _checked_num_steps(num_steps, schedule)
    resolved_spacing = _checked_spacing(sampler_name, schedule, spacing, steps_offset)
    if isinstance(schedule, RectifiedFlow):
        points = flow_sigmas(schedule, num_steps)
    else:
        points = ddpm_timesteps(resolved_spacing, schedule.num_timesteps, num_steps, steps_offset)
    return sampler.build_table(schedule, points, eta)


def default_spacing(sampler_name: str, schedule: Schedule) -> str | None:
    """Returns the default timestep spacing of a sampler for a schedule; None for RectifiedFlow."""
    if not isinstance(schedule, DDPM):
        return None
    spacings = SAMPLERS[sampler_name].spacings
    must_start_at_noise = schedule.zero_terminal_snr and spacings[0] == "leading"
    return "trailing" if must_start_at_noise else spacings[0]


def _checked_sampler(sampler_name: str, schedule: Schedule, eta: float) -> Sampler:
    supported = ", ".join(samplers_for(schedule))
    schedule_name = type(schedule).__name__
    if sampler_name not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler_name!r}; with {schedule_name} choose one of {supported}")
    sampler = SAMPLERS[sampler_name]
    if not isinstance(schedule, sampler.schedule):
        raise UserError(f"sampler {sampler_name!r} does not support {schedule_name}; choose one of {supported}")
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta must lie in [0, 1], got {eta}")
    if eta and not sampler.takes_eta:
        with_eta = ", ".join(name for name, entry in SAMPLERS.items() if entry.takes_eta)
        raise UserError(f"sampler {sampler_name!r} has no eta, got {eta}; leave it 0 or use {with_eta}")
    return sampler


def _checked_spacing(sampler_name: str, schedule: Schedule, spacing: str | None, steps_offset: int) -> str:
    """Validates the timestep spacing and resolves its default; "" for RectifiedFlow, which has no choice of it."""
    spacings = SAMPLERS[sampler_name].spacings
    if spacing is not None and spacing not in spacings:
        choices = f"choose one of {', '.join(spacings)}" if spacings else "leave it unset"
        raise UserError(f"sampler {sampler_name!r} has no timestep spacing {spacing!r}; {choices}")
    if spacing is None:
        spacing = default_spacing(sampler_name, schedule)
    if spacing == "leading" and isinstance(schedule, DDPM) and schedule.zero_terminal_snr:
        raise UserError("a schedule with zero_terminal_snr must be sampled from its last timestep: use 'trailing'")
    if steps_offset and spacing != "leading":
        raise UserError(f"steps_offset={steps_offset} requires 'leading' timestep spacing, not {spacing!r}; leave it 0")
    return spacing or ""


def _checked_num_steps(num_steps: int, schedule: Schedule) -> int:
    try:
        num_steps = operator.index(num_steps)
    except TypeError:
        raise UserError(f"the number of sampling steps must be a whole number, got {num_steps!r}") from None
    if num_steps < 1:
        raise UserError(f"the number of sampling steps must be at least 1, got {num_steps}")
    if num_steps > MAX_STEPS:
        raise UserError(f"{num_steps!r:.40} sampling steps are more than the maximum of {MAX_STEPS}")
    if isinstance(schedule, DDPM) and num_steps > schedule.num_timesteps:
        raise UserError(f"{num_steps} sampling steps are more than the schedule's {schedule.num_timesteps} timesteps")
    return num_steps


def step_noise(keys: jax.Array, step: jax.Array | int, sample_shape: tuple[int, ...]) -> jax.Array:
    """Returns standard normal noise, float32 [B, *sample_shape]; sample b uses the key fold_in(keys[b], step).

    With JAX's default (threefry) keys the noise of a sample does not depend on the rest of the batch.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), sample_shape, jnp.float32))(keys)


def initial_noise(keys: jax.Array, sample_shape: tuple[int, ...]) -> jax.Array:
    """Returns the x_init of `sample`, float32 [B, *sample_shape], from keys [B]; independent of every `step_noise`."""
    return jax.vmap(lambda key: jax.random.normal(key, sample_shape, jnp.float32))(keys)


def sample(
    sampler_name: str,
    schedule: Schedule,
    predict: Predict,
    x_init: jax.Array,
    num_steps: int,
    keys: jax.Array | None = None,
    *,
    spacing: str | None = None,
    steps_offset: int = 0,
    eta: float = 0.0,
    return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Generates samples: integrates from `x_init` to zero noise in one `jax.lax.scan`.

    The function is not jitted itself. Call it inside a jitted function, where names, schedule, `num_steps` and the
    other Python values must be static; the parameters that `predict` closes over, `x_init` and `keys` may be traced, so
    that new values do not recompile.

    Args:
      sampler_name: a key of `SAMPLERS` that supports the schedule (`samplers_for`).
      schedule: the schedule that the model was trained with.
      predict: (x [B, …] float32, model timesteps [B] float32) -> raw model output [B, …]. Traced once.
      x_init: standard normal noise [B, …], for instance from `initial_noise`.
      num_steps: number of steps; "heun" evaluates the model 2 num_steps - 1 times, the others num_steps times.
      keys: random keys [B], one per sample, for the samplers that add noise ("ddpm"; "ddim" with eta > 0). The noise of
        step i (0, 1, …) is `step_noise(keys, i, …)`, so a sample does not depend on the rest of its batch.
      spacing: timestep spacing of DDPM schedules; None is the sampler's default (see the module docstring), or
        "trailing" instead of "leading" for a schedule with zero terminal SNR.
      steps_offset: offset of the timesteps of "leading" spacing.
      eta: noise of "ddim", from 0 (deterministic) to 1.
      return_trajectory: if True, also return the x0 predictions.

    Returns:
      x0 [B, …] float32; with `return_trajectory` also the x0 prediction at the start of each step, [num_steps, B, …].

    Raises:
      UserError: if the sampler is unknown or does not support the schedule (the message lists those that do); if the
        sampler or the schedule does not support the spacing, eta, steps_offset or num_steps; if a sampler that adds
        noise gets no keys, or keys that are not one per sample.
    """
    table = step_table(sampler_name, schedule, num_steps, spacing=spacing, steps_offset=steps_offset, eta=eta)
    batch_size, sample_shape = x_init.shape[0], x_init.shape[1:]
    noise_keys = _checked_keys(sampler_name, keys, batch_size) if np.any(table.noise_scale) else None

    def step(carry, row_and_index):
        row, index = row_and_index
        x, memory = carry
        output = predict(x, jnp.full((batch_size,), row.timesteps)).astype(jnp.float32)
        x0 = x0_from_output(schedule.prediction, output, x, row.alpha, row.sigma)
        noise = noise_from_output(schedule.prediction, output, x, row.alpha, row.sigma)
        next_x = _combine(row.next_weights, (x, x0, noise, memory))
        if noise_keys is not None:
            next_x += row.noise_scale * step_noise(noise_keys, index, sample_shape)
        next_memory = _combine(row.memory_weights, (x, x0, noise))
        return (next_x, next_memory), (x0 if return_trajectory else None)

    x = jnp.asarray(x_init, jnp.float32)
    rows = jax.tree.map(jnp.asarray, table), jnp.arange(len(table.timesteps))
    (x, _), trajectory = jax.lax.scan(step, (x, jnp.zeros_like(x)), rows)
    if return_trajectory:
        return x, trajectory[:: SAMPLERS[sampler_name].evaluations_per_step]
    return x


def _combine(weights: jax.Array, terms: tuple[jax.Array, ...]) -> jax.Array:
    products = [weights[index] * term for index, term in enumerate(terms)]
    return sum(products[1:], start=products[0])


def _checked_keys(sampler_name: str, keys: jax.Array | None, batch_size: int) -> jax.Array:
    if keys is None:
        raise UserError(f"sampler {sampler_name!r} adds noise: pass keys, one per sample")
    # Raw uint32 keys (jax.random.PRNGKey) have a trailing axis.
    keys_shape = keys.shape if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys.shape[:-1]
    if keys_shape != (batch_size,):
        raise UserError(f"keys must be one per sample, shape ({batch_size},), got {keys_shape}")
    return keys


def guided(predict_both: Predict, guidance_scale: jax.Array | float) -> Predict:
    """Applies classifier-free guidance, uncond + w (cond - uncond) (Ho & Salimans 2022), in one batched model call.

    At w = 1 the result is the conditional prediction: if w is known beforehand, pass the conditional predict function
    to `sample` and save half of the FLOPs. Here w may be traced, so there is no special case for it.

    Args:
      predict_both: (x [2B, …], model timesteps [2B]) -> output [2B, …], conditioned on the prompts in the first half
        and on the negative prompt, empty by default, in the second; x is the same in both halves.
      guidance_scale: w, a scalar.

    Returns:
      A predict function for `sample`, (x [B, …], model timesteps [B]) -> output [B, …] float32.
    """

    def predict(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        both = predict_both(jnp.concatenate([x, x]), jnp.concatenate([timesteps, timesteps]))  # [2B, …]
        conditional, unconditional = jnp.split(both.astype(jnp.float32), 2)  # [B, …] each
        return unconditional + guidance_scale * (conditional - unconditional)

    return predict
