"""scheduler_config.json: diffusers' scheduler takes our sampler's steps, and reading the file gives the schedule."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from lidit_jax.diffusion.samplers import initial_noise, sample, step_noise
from lidit_jax.diffusion.schedules import DDPM, RectifiedFlow
from lidit_jax.errors import UserError
from lidit_jax.weights.diffusers_scheduler import CLASSES, read_scheduler, scheduler_config

SHAPE = (2, 3, 4)
V_ZERO_SNR = DDPM(prediction="v", zero_terminal_snr=True)
SCHEDULES = [DDPM(), DDPM(prediction="v"), V_ZERO_SNR, DDPM(500, 0.001, 0.02, "linear")]
CASES = [
    *[(schedule, sampler) for schedule in SCHEDULES for sampler in ("ddpm", "ddim", "dpmpp_2m")],
    *[(RectifiedFlow(*values), sampler) for values in ((), (3.0,)) for sampler in ("euler", "heun")],
    (RectifiedFlow(10.0, num_timesteps=500), "euler"),
]
OF_CASE = [f"{sampler}-{index}" for index, (_, sampler) in enumerate(CASES)]


def model(backend, x, timesteps):
    t = timesteps.reshape(-1, 1, 1)
    return backend.tanh(0.7 * x + 0.3 * backend.sin(t / 100)) + 0.1 * backend.cos(2 * x + t / 300)


def load(values, folder):
    """Returns the diffusers scheduler that `from_pretrained` loads from these values."""
    (folder / "scheduler_config.json").write_text(json.dumps(values))
    return getattr(diffusers, values["_class_name"]).from_pretrained(folder)


@pytest.mark.parametrize(("schedule", "sampler"), CASES, ids=OF_CASE)
@pytest.mark.parametrize("steps", [1, 20, 25])
def test_diffusers_takes_the_same_steps(schedule, sampler, steps, tmp_path, monkeypatch):
    keys = jax.random.split(jax.random.key(0), SHAPE[0])
    noise = initial_noise(keys, SHAPE[1:])
    ours = sample(sampler, schedule, lambda x, t: model(jnp, x, t), noise, steps, keys)

    # DDPM is the only stochastic sampler: give diffusers the noise that ours uses.
    noises = iter([torch.tensor(np.asarray(step_noise(keys, step, SHAPE[1:]))) for step in range(steps)])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **options: next(noises))
    scheduler = load(scheduler_config(schedule, sampler), tmp_path)
    scheduler.set_timesteps(steps)
    x = torch.tensor(np.asarray(noise))
    for t in scheduler.timesteps:
        x = scheduler.step(model(torch, x, t.float().expand(SHAPE[0])), t, x).prev_sample
    # diffusers' Heun scheduler computes (x - (x - s v)) / s in float32, which loses precision at small s.
    tolerance = 1e-4 if sampler == "heun" else 1e-5
    np.testing.assert_allclose(ours, x.numpy(), rtol=0, atol=tolerance * float(x.abs().max()))


@pytest.mark.parametrize(("schedule", "sampler"), CASES, ids=OF_CASE)
def test_the_file_is_read_back_as_the_same_schedule_also_after_diffusers_saved_it(schedule, sampler, tmp_path):
    values = scheduler_config(schedule, sampler)
    assert read_scheduler(values, "file") == (schedule, sampler)
    load(values, tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/scheduler_config.json").read_text())
    assert set(again) >= set(values)
    assert read_scheduler(again, "file") == (schedule, sampler)


@pytest.mark.parametrize("name", CLASSES.values())
def test_diffusers_knows_every_setting(name):
    sampler = {of: sampler for sampler, of in CLASSES.items()}[name]
    schedule = RectifiedFlow() if sampler in ("euler", "heun") else DDPM()
    known = getattr(diffusers, name)().config
    assert {key for key in scheduler_config(schedule, sampler) if not key.startswith("_")} <= set(known)


def test_absent_keys_have_diffusers_defaults():
    values = {"_class_name": "DPMSolverMultistepScheduler"}
    assert read_scheduler(values, "file") == (DDPM(1000, 0.0001, 0.02, "linear"), "dpmpp_2m")
    with pytest.raises(UserError, match="clip_sample=True is not supported: use False"):
        read_scheduler({"_class_name": "DDIMScheduler"}, "file")


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        ("ddim", {"_class_name": "PNDMScheduler"}, "_class_name 'PNDMScheduler' is not supported; use one of DDPMSch"),
        ("ddim", {"_class_name": ["DDIMScheduler"]}, "_class_name .* is not supported"),
        ("ddim", {"_class_name": None}, "_class_name None is not supported"),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'"),
        ("ddim", {"beta_schedule": ["linear"]}, "beta_schedule"),
        ("ddim", {"prediction_type": "sample"}, "prediction_type='sample' is not supported; use one of epsilon, v_pre"),
        ("ddim", {"prediction_type": {}}, "prediction_type={} is not supported"),
        ("ddim", {"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr=1 is not true or false"),
        ("ddim", {"rescale_betas_zero_snr": True}, "ill-posed"),
        (
            "ddim",
            {"timestep_spacing": "trailing"},
            "timestep_spacing='trailing' is not supported here: use 'leading'",
        ),
        ("ddim", {"timestep_spacing": 3}, "timestep_spacing=3"),
        ("ddim", {"steps_offset": 1}, "steps_offset=1"),
        ("ddim", {"trained_betas": [0.1]}, "trained_betas"),
        ("ddim", {"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000 is not an integer"),
        ("ddim", {"num_train_timesteps": True}, "num_train_timesteps"),
        ("ddim", {"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ("ddim", {"beta_start": "0.1"}, "beta_start='0.1' is not a number"),
        ("ddim", {"beta_start": float("nan")}, "file: beta_start"),
        ("ddim", {"beta_end": 10**400}, "beta_end=1000"),
        ("ddim", {"beta_end": -1}, "beta_end=-1 must be above 0"),
        ("ddpm", {"variance_type": "learned"}, "variance_type='learned'"),
        ("dpmpp_2m", {"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported: use False"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order=3"),
        ("euler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("euler", {"shift": 0}, "shift=0 must be from 0.001 to 1000"),
        ("euler", {"shift": None}, "shift=None is not a number"),
        ("euler", {"shift": True}, "shift=True is not a number"),
    ],
)
def test_settings_without_a_sampler_are_reported_in_one_line(sampler, changes, message):
    schedule = RectifiedFlow() if sampler == "euler" else DDPM()
    with pytest.raises(UserError, match=message) as caught:
        read_scheduler(scheduler_config(schedule, sampler) | changes, "file")
    assert str(caught.value).startswith("file: ")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
