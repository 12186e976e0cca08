"""Converts a noise schedule and its sampler to and from a diffusers `scheduler/scheduler_config.json`.

The sampler determines the scheduler class (the table in `diffusion/samplers.py`), the noise schedule its settings. From
the same noise and with the same number of steps, diffusers' scheduler takes the same steps as our sampler: both end at
zero noise and clip nothing. One case differs: "ddim" with "trailing" timesteps (zero terminal SNR) and a number of
steps that does not divide the schedule's number of timesteps, where diffusers leaves some noise.
"""

from collections.abc import Mapping
from typing import Any

from lidit_jax.diffusion.samplers import default_spacing
from lidit_jax.diffusion.schedules import BETA_SCHEDULES, DDPM, MAX_TIMESTEPS, RectifiedFlow, Schedule
from lidit_jax.errors import UserError
from lidit_jax.weights.diffusers_vae import DIFFUSERS_VERSION

CONFIG_FILE = "scheduler_config.json"
# Our sampler -> diffusers' scheduler class.
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
# Settings of diffusers' schedulers for which our samplers support a single value.
_FIXED_DDPM = {"trained_betas": None, "thresholding": False, "steps_offset": 0}
_SIGMA_SWITCHES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
FIXED: dict[str, dict[str, Any]] = {
    "ddpm": _FIXED_DDPM | {"clip_sample": False, "variance_type": "fixed_small"},
    "ddim": _FIXED_DDPM | {"clip_sample": False, "set_alpha_to_one": True},
    "dpmpp_2m": _FIXED_DDPM
    | {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}
    | {"lower_order_final": True, "euler_at_final": False, "variance_type": None}
    | dict.fromkeys((*_SIGMA_SWITCHES, "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"), False),
    "euler": {"invert_sigmas": False, "shift_terminal": None}
    | dict.fromkeys((*_SIGMA_SWITCHES, "use_dynamic_shifting", "stochastic_sampling"), False),
    "heun": {},
}
# Defaults of diffusers for absent keys: those that differ from `FIXED`, and those of keys that are not in it.
DEFAULTS = {
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "shift": 1.0,
}
DEFAULT_SPACINGS = {"ddpm": "leading", "ddim": "leading", "dpmpp_2m": "linspace"}


def scheduler_class(sampler: str) -> str:
    """Returns the name of diffusers' scheduler class for one of `diffusion.samplers.SAMPLERS`."""
    return CLASSES[sampler]


def scheduler_config(schedule: Schedule, sampler: str) -> dict[str, Any]:
    """Returns the contents of scheduler_config.json for a schedule and a sampler that supports it."""
    values = {"_class_name": CLASSES[sampler], "_diffusers_version": DIFFUSERS_VERSION}
    values |= {"num_train_timesteps": schedule.num_timesteps, **FIXED[sampler]}
    if isinstance(schedule, RectifiedFlow):
        return values | {"shift": schedule.shift}
    return values | {
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "prediction_type": PREDICTIONS[schedule.prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": default_spacing(sampler, schedule),
    }


def read_scheduler(values: Mapping[str, Any], file: Any) -> tuple[Schedule, str]:
    """Returns the schedule and the sampler that a scheduler_config.json describes.

    Absent keys have diffusers' defaults. Fields that only training uses (`RectifiedFlow.logit_mean`, `logit_std`) are
    not in such a file and keep our defaults.

    Args:
      values: contents of the file.
      file: path of the file, for error messages.

    Returns:
      The schedule, and the name of the sampler in `diffusion.samplers.SAMPLERS`.

    Raises:
      UserError: no sampler corresponds to the class or supports one of its settings, or a value is out of range.
    """
    sampler = _sampler(values, file)
    for key, wanted in FIXED[sampler].items():
        found = values.get(key, DEFAULTS.get(key, wanted))
        if type(found) is not type(wanted) or found != wanted:
            raise UserError(f"{file}: {key}={found!r:.80} is not supported: use {wanted!r}")
    values = {**DEFAULTS, **values}
    steps = values["num_train_timesteps"]
    if type(steps) is not int or not 2 <= steps <= MAX_TIMESTEPS:
        raise UserError(f"{file}: num_train_timesteps={steps!r:.80} is not an integer from 2 to {MAX_TIMESTEPS}")
    try:
        schedule = _flow(values) if sampler in ("euler", "heun") else _ddpm(values, file)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error
    expected = default_spacing(sampler, schedule)
    spacing = values.get("timestep_spacing", DEFAULT_SPACINGS.get(sampler))
    if expected is not None and spacing != expected:
        raise UserError(f"{file}: timestep_spacing={spacing!r:.80} is not supported here: use {expected!r}")
    return schedule, sampler


def _sampler(values: Mapping[str, Any], file: Any) -> str:
    class_name = values.get("_class_name")
    for sampler, name in CLASSES.items():
        if class_name == name:
            return sampler
    raise UserError(
        f"{file}: _class_name {class_name!r:.80} is not supported; use one of {', '.join(CLASSES.values())}"
    )


def _flow(values: Mapping[str, Any]) -> RectifiedFlow:
    return RectifiedFlow(shift=_number(values, "shift"), num_timesteps=values["num_train_timesteps"])


def _ddpm(values: Mapping[str, Any], file: Any) -> DDPM:
    kinds = {diffusers: ours for ours, diffusers in PREDICTIONS.items()}
    prediction, rescaled = values["prediction_type"], values["rescale_betas_zero_snr"]
    if not isinstance(prediction, str) or prediction not in kinds:
        raise UserError(f"{file}: prediction_type={prediction!r:.80} is not supported; use one of {', '.join(kinds)}")
    if values["beta_schedule"] not in BETA_SCHEDULES:
        raise UserError(
            f"{file}: beta_schedule={values['beta_schedule']!r:.80} is not supported; use one of "
            f"{', '.join(BETA_SCHEDULES)}"
        )
    if not isinstance(rescaled, bool):
        raise UserError(f"{file}: rescale_betas_zero_snr={rescaled!r:.80} is not true or false")
    return DDPM(
        num_timesteps=values["num_train_timesteps"],
        beta_start=_number(values, "beta_start"),
        beta_end=_number(values, "beta_end"),
        beta_schedule=values["beta_schedule"],
        prediction=kinds[prediction],
        zero_terminal_snr=rescaled,
    )


def _number(values: Mapping[str, Any], key: str) -> float:
    """Returns the value of the key.

    Raises:
      UserError: it is not a number, or larger than 1e300.
    """
    value = values[key]
    if type(value) not in (int, float) or abs(value) > 1e300:
        raise UserError(f"{key}={value!r:.80} is not a number")
    return value
