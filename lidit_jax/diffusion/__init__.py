"""Noise schedules, the training loss and samplers, as pure functions on arrays that take the model as an argument."""

from lidit_jax.diffusion.losses import diffusion_loss
from lidit_jax.diffusion.samplers import SAMPLERS, guided, initial_noise, sample, samplers_for
from lidit_jax.diffusion.schedules import DDPM, SCHEDULES, RectifiedFlow, Schedule, make_schedule, resolution_shift

__all__ = [
    "DDPM",
    "SAMPLERS",
    "SCHEDULES",
    "RectifiedFlow",
    "Schedule",
    "diffusion_loss",
    "guided",
    "initial_noise",
    "make_schedule",
    "resolution_shift",
    "sample",
    "samplers_for",
]
