"""Compares samplers with diffusers at every step, and with Gaussian data, whose exact denoiser is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddpm, scheduling_flow_match_heun_discrete

from lidit_jax.diffusion.samplers import (
    SAMPLERS,
    ddpm_timesteps,
    guided,
    initial_noise,
    sample,
    samplers_for,
    step_noise,
    step_table,
)
from lidit_jax.diffusion.schedules import DDPM, RectifiedFlow
from lidit_jax.errors import UserError

EPSILON = DDPM()
V = DDPM(prediction="v")
V_ZERO_SNR = DDPM(prediction="v", zero_terminal_snr=True)
BATCH_SHAPE = (2, 3, 4)


def keys_for(batch_size, seed=0):
    return jax.random.split(jax.random.key(seed), batch_size)


def model(backend, x, timesteps):
    """Computes a fixed nonlinear function of x [B, 3, 4] and t [B], in JAX or in PyTorch."""
    t = timesteps.reshape(-1, 1, 1)
    return backend.tanh(0.7 * x + 0.3 * backend.sin(t / 100)) + 0.1 * backend.cos(2 * x + t / 300)


def our_run(sampler_name, schedule, num_steps, x_init, keys, **options):
    """Runs our sampler; returns the model's inputs x and timesteps of each evaluation, x0 predictions, and the sample.

    It runs step by step, without compilation; `test_the_compiled_sampler_equals_the_one_run_step_by_step` covers that.
    """
    inputs, timesteps = [], []

    def predict(x, t):
        inputs.append(np.asarray(x))
        timesteps.append(np.asarray(t))
        return model(jnp, x, t)

    with jax.disable_jit():
        result, trajectory = sample(
            sampler_name, schedule, predict, x_init, num_steps, keys, return_trajectory=True, **options
        )
    return np.stack(inputs), np.stack(timesteps), np.asarray(trajectory), np.asarray(result)


def their_run(scheduler, num_steps, x_init, step_options):
    """Does the same with a diffusers scheduler; `step_options(step)` are extra arguments of its step function."""
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(np.array(x_init))
    inputs, timesteps, predictions = [], [], []
    for step, t in enumerate(scheduler.timesteps):
        inputs.append(x.numpy())
        timesteps.append(np.full(x.shape[0], float(t), np.float32))
        output = model(torch, x, torch.full((x.shape[0],), float(t)))
        result = scheduler.step(output, t, x, **step_options(step))
        predictions.append(result.pred_original_sample.numpy() if "pred_original_sample" in result else None)
        x = result.prev_sample
    return np.stack(inputs), np.stack(timesteps), predictions, x.numpy()


def assert_runs_agree(ours, theirs):
    """Asserts agreement to 1e-5 of the largest value, at every model evaluation and at the end."""
    our_inputs, our_timesteps, trajectory, our_result = ours
    their_inputs, their_timesteps, predictions, their_result = theirs
    np.testing.assert_allclose(our_timesteps, their_timesteps, rtol=1e-6)
    for ours_x, theirs_x in zip([*our_inputs, our_result], [*their_inputs, their_result], strict=True):
        np.testing.assert_allclose(ours_x, theirs_x, rtol=0, atol=1e-5 * np.abs(theirs_x).max())
    for ours_x0, theirs_x0 in zip(trajectory, predictions, strict=False):
        if theirs_x0 is not None:
            np.testing.assert_allclose(ours_x0, theirs_x0, rtol=0, atol=1e-5 * np.abs(theirs_x0).max())


def diffusers_scheduler(scheduler_class, schedule, **options):
    return scheduler_class(
        num_train_timesteps=schedule.num_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[schedule.prediction],
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
        **options,
    )


DDPM_CASES = [
    (EPSILON, "leading", 0),
    (EPSILON, "leading", 1),
    (EPSILON, "trailing", 0),
    (V, "leading", 0),
    (V, "trailing", 0),
    (V_ZERO_SNR, "trailing", 0),
    (DDPM(500, 0.001, 0.02, "linear"), "leading", 0),
]


@pytest.mark.parametrize(("schedule", "spacing", "steps_offset"), DDPM_CASES)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 25])
def test_ddpm_follows_diffusers(schedule, spacing, steps_offset, num_steps, monkeypatch):
    keys = keys_for(BATCH_SHAPE[0])
    x_init = initial_noise(keys, BATCH_SHAPE[1:])
    noises = iter([step_noise(keys, step, BATCH_SHAPE[1:]) for step in range(num_steps)])
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda shape, **options: torch.from_numpy(np.array(next(noises)))
    )
    scheduler = diffusers_scheduler(
        DDPMScheduler, schedule, clip_sample=False, timestep_spacing=spacing, steps_offset=steps_offset
    )
    ours = our_run("ddpm", schedule, num_steps, x_init, keys, spacing=spacing, steps_offset=steps_offset)
    assert_runs_agree(ours, their_run(scheduler, num_steps, x_init, lambda step: {}))


@pytest.mark.parametrize(
    ("schedule", "spacing", "steps_offset", "eta"),
    # With eta 1 and zero terminal SNR diffusers returns NaN: rounding makes 1 - a - var, of which it takes the square
    # root, negative.
    [(*case, eta) for case in DDPM_CASES for eta in (0.0, 0.6, 1.0) if not (case[0].zero_terminal_snr and eta == 1.0)],
)
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_ddim_follows_diffusers(schedule, spacing, steps_offset, eta, num_steps):
    keys = keys_for(BATCH_SHAPE[0])
    x_init = initial_noise(keys, BATCH_SHAPE[1:])
    scheduler = diffusers_scheduler(
        DDIMScheduler, schedule, clip_sample=False, timestep_spacing=spacing, steps_offset=steps_offset
    )

    def step_options(step):
        return {"eta": eta, "variance_noise": torch.from_numpy(np.array(step_noise(keys, step, BATCH_SHAPE[1:])))}

    ours = our_run("ddim", schedule, num_steps, x_init, keys, spacing=spacing, steps_offset=steps_offset, eta=eta)
    assert_runs_agree(ours, their_run(scheduler, num_steps, x_init, step_options))


@pytest.mark.parametrize("schedule", [EPSILON, V, V_ZERO_SNR, DDPM(500, 0.001, 0.02, "linear")])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 25])
def test_dpmpp_2m_follows_diffusers(schedule, spacing, num_steps):
    x_init = initial_noise(keys_for(BATCH_SHAPE[0]), BATCH_SHAPE[1:])
    scheduler = diffusers_scheduler(DPMSolverMultistepScheduler, schedule, timestep_spacing=spacing)
    ours = our_run("dpmpp_2m", schedule, num_steps, x_init, None, spacing=spacing)
    assert_runs_agree(ours, their_run(scheduler, num_steps, x_init, lambda step: {}))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_euler_follows_diffusers(shift, num_steps):
    x_init = initial_noise(keys_for(BATCH_SHAPE[0]), BATCH_SHAPE[1:])
    ours = our_run("euler", RectifiedFlow(shift=shift), num_steps, x_init, None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert_runs_agree(ours, their_run(scheduler, num_steps, x_init, lambda step: {}))


class TorchInDoublePrecision:
    """Replaces PyTorch in a module that casts to `torch.float32`, so that it computes in float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_heun_follows_diffusers(shift, num_steps, monkeypatch):
    # diffusers computes (x - (x - s v)) / s at the next s, down to 0.001: in float32 this loses three digits of v.
    monkeypatch.setattr(scheduling_flow_match_heun_discrete, "torch", TorchInDoublePrecision())
    x_init = initial_noise(keys_for(BATCH_SHAPE[0]), BATCH_SHAPE[1:])
    ours = our_run("heun", RectifiedFlow(shift=shift), num_steps, x_init, None)
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    assert_runs_agree(ours, their_run(scheduler, num_steps, np.float64(x_init), lambda step: {}))


@pytest.mark.parametrize("sampler_name", sorted(SAMPLERS))
def test_the_compiled_sampler_equals_the_one_run_step_by_step(sampler_name):
    schedule = EPSILON if SAMPLERS[sampler_name].schedule is DDPM else RectifiedFlow()
    options = {"eta": 0.6} if SAMPLERS[sampler_name].takes_eta else {}
    keys = keys_for(BATCH_SHAPE[0])
    x_init = initial_noise(keys, BATCH_SHAPE[1:])
    *_, trajectory, result = our_run(sampler_name, schedule, 25, x_init, keys, **options)
    compiled = jax.jit(
        lambda x, keys: sample(
            sampler_name, schedule, lambda x, t: model(jnp, x, t), x, 25, keys, return_trajectory=True, **options
        )
    )
    compiled_result, compiled_trajectory = compiled(x_init, keys)
    np.testing.assert_allclose(compiled_trajectory, trajectory, rtol=0, atol=5e-6 * np.abs(trajectory).max())
    np.testing.assert_allclose(compiled_result, result, rtol=0, atol=5e-6 * np.abs(result).max())


@pytest.mark.parametrize(
    ("scheduler_class", "spacing"),
    [
        (DDPMScheduler, "leading"),
        (DDPMScheduler, "trailing"),
        (DPMSolverMultistepScheduler, "linspace"),
        (DPMSolverMultistepScheduler, "trailing"),
    ],
)
def test_timesteps_equal_those_of_diffusers_for_any_number_of_steps(scheduler_class, spacing):
    scheduler = scheduler_class(num_train_timesteps=1000, timestep_spacing=spacing)
    for num_steps in range(1, 1000):
        scheduler.set_timesteps(num_steps)
        # For some numbers of steps float rounding gives diffusers' "trailing" one more step, at timestep -1.
        theirs = scheduler.timesteps.numpy()[:num_steps]
        np.testing.assert_array_equal(ddpm_timesteps(spacing, 1000, num_steps), theirs)


def gaussian_model(schedule, mean, std):
    """Returns the exact model for data N(mean, std^2 I): the posterior mean of x_0, as the schedule's prediction."""

    def predict(x, timesteps):
        times = timesteps.astype(jnp.int32) if isinstance(schedule, DDPM) else timesteps / schedule.num_timesteps
        alpha, sigma = (scale[:, None] for scale in schedule.signal_and_noise_scales(times))
        deviation = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x0, noise = mean + alpha * std**2 * deviation, sigma * deviation
        return schedule.target(x0, noise, times)

    return predict


def gaussian_moments(sampler_name, schedule, num_steps, mean, std, **options):
    """Returns mean and standard deviation of 65,536 sampled values, from the exact marginal of the first timestep.

    The initial noise is standardised: a deterministic sampler maps a Gaussian linearly, so the moments then have no
    sampling error.
    """
    keys = keys_for(64, seed=1)
    noise = np.asarray(initial_noise(keys, (1024,)), np.float64)
    noise = (noise - noise.mean()) / noise.std()
    table = step_table(sampler_name, schedule, num_steps, **options)
    alpha, sigma = table.alpha[0], table.sigma[0]
    x_init = alpha * mean + np.sqrt(alpha**2 * std**2 + sigma**2) * noise
    predict = gaussian_model(schedule, mean, std)
    samples = jax.jit(lambda x, keys: sample(sampler_name, schedule, predict, x, num_steps, keys, **options))(
        x_init, keys
    )
    samples = np.asarray(samples, np.float64)
    return np.array([samples.mean(), samples.std()]), bool(np.any(table.noise_scale))


@pytest.mark.parametrize(
    ("sampler_name", "schedule", "num_steps", "order", "options"),
    [
        ("ddpm", EPSILON, 500, 1, {}),
        ("ddpm", V_ZERO_SNR, 500, 1, {}),
        ("ddim", EPSILON, 500, 1, {}),
        ("ddim", V_ZERO_SNR, 500, 1, {}),
        ("ddim", V, 200, 1, {"eta": 0.5}),
        # Order 1 in total, because its last step, from the smallest noise to none, has order 1.
        ("dpmpp_2m", EPSILON, 100, 1, {}),
        ("dpmpp_2m", V_ZERO_SNR, 100, 1, {}),
        ("euler", RectifiedFlow(), 200, 1, {}),
        ("euler", RectifiedFlow(shift=3.0), 200, 1, {}),
        ("heun", RectifiedFlow(), 50, 2, {}),
        ("heun", RectifiedFlow(shift=3.0), 50, 2, {}),
    ],
)
def test_gaussian_data_comes_out_with_its_mean_and_standard_deviation(
    sampler_name, schedule, num_steps, order, options
):
    mean, std, count = 0.8, 0.5, 65_536
    moments, draws_noise = gaussian_moments(sampler_name, schedule, num_steps, mean, std, **options)
    coarse, _ = gaussian_moments(sampler_name, schedule, num_steps // 2, mean, std, **options)
    # Sampling error: five standard errors of mean and standard deviation over `count` independent values, or float32
    # rounding for deterministic samplers.
    sampling = 5 * std / np.sqrt([count, 2 * count]) if draws_noise else 1e-5
    # Discretisation error: for order p it falls 2^p-fold from the coarse run to the fine one, or by less because the
    # smallest noise of a discrete schedule stays the same, hence the factor of 1.5. Both step counts divide 1000, so
    # timesteps are not rounded.
    discretisation = 1.5 * np.abs(moments - coarse) / (2**order - 1)
    assert (discretisation < 0.03).all()
    np.testing.assert_array_less(np.abs(moments - [mean, std]), sampling + discretisation)


@pytest.mark.parametrize("sampler_name", sorted(SAMPLERS))
def test_a_sample_does_not_depend_on_its_batch(sampler_name):
    schedule = EPSILON if SAMPLERS[sampler_name].schedule is DDPM else RectifiedFlow()
    options = {"eta": 1.0} if SAMPLERS[sampler_name].takes_eta else {}
    keys = keys_for(5)

    @jax.jit
    def draw(keys):
        x_init = initial_noise(keys, BATCH_SHAPE[1:])
        return sample(sampler_name, schedule, lambda x, t: model(jnp, x, t), x_init, 6, keys, **options)

    together = draw(keys)
    np.testing.assert_allclose(draw(keys[3:4])[0], together[3], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(draw(keys[::-1])[1], together[3], rtol=1e-6, atol=1e-6)


def test_noise_differs_between_samples_and_between_steps():
    keys = keys_for(2)
    draws = [initial_noise(keys, (50,)), step_noise(keys, 0, (50,)), step_noise(keys, 1, (50,))]
    correlations = np.corrcoef(np.concatenate(draws))
    # The correlation of two independent rows of 50 values has a standard deviation of 1 / sqrt(50).
    assert np.abs(correlations - np.eye(6)).max() < 5 / np.sqrt(50)


def test_raw_and_typed_keys_give_the_same_samples():
    typed = keys_for(2)
    draws = [
        sample("ddpm", EPSILON, lambda x, t: model(jnp, x, t), jnp.ones(BATCH_SHAPE), 4, keys)
        for keys in (typed, jax.random.key_data(typed))
    ]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("sampler_name", sorted(SAMPLERS))
def test_the_model_is_traced_once_whatever_the_keys_noise_and_guidance(sampler_name):
    schedule = EPSILON if SAMPLERS[sampler_name].schedule is DDPM else RectifiedFlow()
    traced = []

    @jax.jit
    def draw(x_init, keys, guidance_scale):
        def predict_both(x, timesteps):
            traced.append(x.shape)
            return model(jnp, x, timesteps)

        return sample(sampler_name, schedule, guided(predict_both, guidance_scale), x_init, 5, keys)

    for seed in range(3):
        keys = keys_for(2, seed)
        draw(initial_noise(keys, BATCH_SHAPE[1:]), keys, 1.5 + seed)
    assert traced == [(4, 3, 4)]


@pytest.mark.parametrize("sampler_name", sorted(SAMPLERS))
def test_the_trajectory_has_a_prediction_for_each_step_and_ends_in_the_sample(sampler_name):
    schedule = EPSILON if SAMPLERS[sampler_name].schedule is DDPM else RectifiedFlow()
    x_init, keys = jnp.ones(BATCH_SHAPE), keys_for(2)
    result, trajectory = sample(
        sampler_name, schedule, lambda x, t: model(jnp, x, t), x_init, 5, keys, return_trajectory=True
    )
    assert trajectory.shape == (5, *BATCH_SHAPE)
    # All samplers end at zero noise, so the last prediction is the sample.
    np.testing.assert_allclose(trajectory[-1], result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [3, 7, 30, 61])
def test_ddim_with_trailing_timesteps_ends_without_noise_for_any_number_of_steps(num_steps):
    table = step_table("ddim", V_ZERO_SNR, num_steps, eta=0.5)
    assert len(table.timesteps) == num_steps
    assert table.timesteps[0] == 999
    np.testing.assert_array_equal(table.next_weights[-1], [0, 1, 0, 0])
    assert table.noise_scale[-1] == 0


@pytest.mark.parametrize("num_steps", [1, 4, 1000])
@pytest.mark.parametrize("schedule", [EPSILON, V_ZERO_SNR])
@pytest.mark.parametrize("sampler_name", ["ddpm", "ddim", "dpmpp_2m"])
def test_tables_are_finite_up_to_the_full_number_of_steps(sampler_name, schedule, num_steps):
    eta = 1.0 if sampler_name == "ddim" else 0.0
    for field in step_table(sampler_name, schedule, num_steps, spacing="trailing", eta=eta):
        assert np.isfinite(field).all()
        assert field.dtype == np.float32


def test_heun_evaluates_the_model_twice_a_step_except_at_the_last():
    assert len(step_table("heun", RectifiedFlow(), 10).timesteps) == 19
    assert len(step_table("euler", RectifiedFlow(), 10).timesteps) == 10


def two_part_model(x, timesteps):
    conditional, unconditional = jnp.split(x, 2)
    return jnp.concatenate([jnp.sin(conditional), jnp.cos(unconditional)]) + timesteps[:, None, None] / 1000


def test_guidance_of_scale_1_is_the_conditional_and_of_scale_0_the_unconditional_prediction():
    x, timesteps = jax.random.normal(jax.random.key(0), BATCH_SHAPE), jnp.array([100.0, 700.0])
    offset = timesteps[:, None, None] / 1000
    np.testing.assert_allclose(guided(two_part_model, 1.0)(x, timesteps), jnp.sin(x) + offset, atol=1e-6)
    np.testing.assert_allclose(guided(two_part_model, 0.0)(x, timesteps), jnp.cos(x) + offset, atol=1e-6)


def test_guidance_is_linear_in_its_scale_which_may_be_traced():
    x, timesteps = jax.random.normal(jax.random.key(0), BATCH_SHAPE), jnp.array([100.0, 700.0])
    at = jax.jit(lambda scale: guided(two_part_model, scale)(x, timesteps))
    np.testing.assert_allclose(at(7.5) - at(0.0), 7.5 * (at(1.0) - at(0.0)), rtol=1e-5, atol=1e-5)


def test_guided_samples_at_scale_1_are_those_of_the_conditional_model():
    def conditional(x, timesteps):
        return jnp.sin(x) + timesteps[:, None, None] / 1000

    x_init = jax.random.normal(jax.random.key(0), BATCH_SHAPE)
    with_guidance = sample("euler", RectifiedFlow(), guided(two_part_model, 1.0), x_init, 8)
    np.testing.assert_allclose(with_guidance, sample("euler", RectifiedFlow(), conditional, x_init, 8), atol=1e-5)


def test_samplers_for_a_schedule_are_those_that_run_with_it():
    assert samplers_for(EPSILON) == ("ddpm", "ddim", "dpmpp_2m")
    assert samplers_for(RectifiedFlow()) == ("euler", "heun")


@pytest.mark.parametrize(
    ("sampler_name", "schedule", "num_steps", "options", "message"),
    [
        ("plms", EPSILON, 5, {}, "unknown sampler 'plms'; with DDPM choose one of ddpm, ddim, dpmpp_2m"),
        ("plms", RectifiedFlow(), 5, {}, "choose one of euler, heun"),
        ("euler", EPSILON, 5, {}, "choose one of ddpm, ddim, dpmpp_2m"),
        ("ddim", RectifiedFlow(), 5, {}, "choose one of euler, heun"),
        ("ddim", EPSILON, 0, {}, "at least 1"),
        ("euler", RectifiedFlow(), -3, {}, "at least 1"),
        ("ddim", EPSILON, 2.5, {}, "whole number"),
        ("ddim", EPSILON, 1001, {}, "more than the schedule's 1000"),
        ("dpmpp_2m", EPSILON, 1000, {}, "use fewer steps"),
        ("ddim", EPSILON, 1000, {"steps_offset": 1}, "smaller offset"),
        ("ddim", EPSILON, 10, {"steps_offset": -1}, "do not fit"),
        ("ddim", EPSILON, 10, {"steps_offset": 1, "spacing": "trailing"}, "leave it 0"),
        ("euler", RectifiedFlow(), 10, {"steps_offset": 1}, "leave it 0"),
        ("ddim", EPSILON, 5, {"spacing": "karras"}, "choose one of leading, trailing"),
        ("dpmpp_2m", EPSILON, 5, {"spacing": "leading"}, "choose one of linspace, trailing"),
        ("euler", RectifiedFlow(), 5, {"spacing": "leading"}, "leave it unset"),
        ("ddim", V_ZERO_SNR, 5, {"spacing": "leading"}, "use 'trailing'"),
        ("ddim", EPSILON, 5, {"eta": 1.5}, r"eta must lie in \[0, 1\]"),
        ("ddpm", EPSILON, 5, {"eta": 0.5}, "leave it 0 or use ddim"),
        ("ddpm", EPSILON, 5, {}, "pass keys"),
        ("ddim", EPSILON, 5, {"eta": 0.5}, "pass keys"),
        ("ddpm", EPSILON, 5, {"keys": jax.random.key(0)}, "one per sample"),
        ("ddpm", EPSILON, 5, {"keys": keys_for(3)}, "one per sample"),
    ],
)
def test_invalid_sampling_arguments_raise_a_user_error_that_names_the_choices(
    sampler_name, schedule, num_steps, options, message
):
    with pytest.raises(UserError, match=message):
        sample(sampler_name, schedule, lambda x, t: x, jnp.zeros(BATCH_SHAPE), num_steps, **options)
