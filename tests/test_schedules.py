"""Compares noise schedules with diffusers and their algebra, and the loss with a NumPy derivation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.diffusion.losses import diffusion_loss
from lidit_jax.diffusion.schedules import DDPM, RectifiedFlow, make_schedule, resolution_shift
from lidit_jax.errors import UserError
from lidit_jax.weighted_mean import mean_of_steps

SCHEDULES = {
    "epsilon": DDPM(),
    "v": DDPM(prediction="v"),
    "v_zero_snr": DDPM(prediction="v", zero_terminal_snr=True),
    "flow": RectifiedFlow(),
    "flow_shifted": RectifiedFlow(shift=3.0),
}


def diffusers_ddpm(schedule: DDPM) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=schedule.num_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[schedule.prediction],
    )


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("num_timesteps", "beta_start", "beta_end"), [(1000, 0.00085, 0.012), (50, 0.001, 0.2)])
def test_ddpm_tables_equal_those_of_diffusers(beta_schedule, zero_terminal_snr, num_timesteps, beta_start, beta_end):
    schedule = DDPM(num_timesteps, beta_start, beta_end, beta_schedule, "v", zero_terminal_snr)
    theirs = diffusers_ddpm(schedule)
    assert schedule.alphas_cumprod.dtype == np.float64
    # In diffusers it is a float32 product of num_timesteps factors.
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0, atol=2e-6)
    if not zero_terminal_snr:
        np.testing.assert_allclose(schedule.betas, theirs.betas.numpy(), rtol=1e-6)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_zero_terminal_snr_rescales_the_betas_as_diffusers_does_in_float64(beta_schedule):
    plain = DDPM(beta_schedule=beta_schedule, prediction="v")
    rescaled = DDPM(beta_schedule=beta_schedule, prediction="v", zero_terminal_snr=True)
    theirs = rescale_zero_terminal_snr(torch.from_numpy(plain.betas.copy())).numpy()
    np.testing.assert_allclose(rescaled.betas, theirs, rtol=1e-9)
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)


@pytest.mark.parametrize("name", ["epsilon", "v", "v_zero_snr"])
def test_ddpm_noising_and_targets_equal_those_of_diffusers(name):
    schedule = SCHEDULES[name]
    theirs = diffusers_ddpm(schedule)
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 7, 3, 4, 5)).astype(np.float32)
    times = np.array([0, 1, 10, 500, 900, 998, 999], np.int32)
    torch_args = [torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(times).long()]
    np.testing.assert_allclose(
        schedule.add_noise(x0, noise, times), theirs.add_noise(*torch_args).numpy(), rtol=0, atol=1e-5
    )
    velocity = theirs.get_velocity(*torch_args).numpy()
    expected = noise if schedule.prediction == "epsilon" else velocity
    np.testing.assert_allclose(schedule.target(x0, noise, times), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_shift_noising_and_timesteps_equal_those_of_diffusers(shift):
    schedule = RectifiedFlow(shift=shift)
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    unshifted = np.arange(1000, 0, -1, dtype=np.float32) / 1000
    times = schedule.shift_times(unshifted)
    np.testing.assert_allclose(times, theirs.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(schedule.model_timesteps(times), theirs.timesteps.numpy(), rtol=1e-6)

    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 1000, 2)).astype(np.float32)
    noisy = theirs.scale_noise(torch.from_numpy(x0), theirs.timesteps, torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(schedule.add_noise(x0, noise, times), noisy, rtol=0, atol=1e-6)
    np.testing.assert_allclose(schedule.target(x0, noise, times), noise - x0, rtol=0, atol=1e-6)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    fraction=st.floats(0.001, 0.999),
    trailing_shape=st.sampled_from([(), (3,), (2, 3), (2, 2, 3)]),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**31 - 1),
)
def test_x0_and_noise_are_recovered_from_the_noisy_sample_and_the_target(name, fraction, trailing_shape, scale, seed):
    schedule = SCHEDULES[name]
    rng = np.random.default_rng(seed)
    x0 = (scale * rng.normal(size=(2, *trailing_shape))).astype(np.float32)
    noise = rng.normal(size=x0.shape).astype(np.float32)
    if isinstance(schedule, DDPM):
        times = np.array([round(fraction * 999), 999], np.int32)
    else:
        times = np.array([fraction, 0.999], np.float32)

    noisy = schedule.add_noise(x0, noise, times)
    output = schedule.target(x0, noise, times)
    recovered_x0 = schedule.to_x0(output, noisy, times)
    recovered_noise = schedule.to_noise(output, noisy, times)
    # A few float32 roundings; with epsilon prediction they are multiplied by 1 / alpha, at most 15.
    tolerance = 4 * np.finfo(np.float32).eps * (np.abs(x0).max() + np.abs(noise).max())
    x0_tolerance = 15 * tolerance if schedule.prediction == "epsilon" else tolerance
    np.testing.assert_allclose(recovered_x0, x0, rtol=0, atol=x0_tolerance)
    np.testing.assert_allclose(recovered_noise, noise, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        schedule.add_noise(recovered_x0, recovered_noise, times), noisy, rtol=0, atol=2 * tolerance
    )


def test_ddpm_times_are_uniform_over_all_timesteps():
    times = np.asarray(DDPM(num_timesteps=10).sample_times(jax.random.key(0), 100_000))
    assert times.dtype == np.int32
    counts = np.bincount(times, minlength=10)
    # The tolerance is five standard deviations of a binomial count.
    np.testing.assert_allclose(counts, 10_000, rtol=0, atol=5 * np.sqrt(100_000 * 0.1 * 0.9))
    assert len(counts) == 10


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_logit_normal_before_the_shift(shift):
    schedule = RectifiedFlow(shift=shift, logit_mean=-0.3, logit_std=1.4)
    times = np.asarray(schedule.sample_times(jax.random.key(0), 100_000), np.float64)
    unshifted = times / (shift - (shift - 1) * times)
    logits = np.log(unshifted / (1 - unshifted))
    assert logits.mean() == pytest.approx(-0.3, abs=5 * 1.4 / np.sqrt(1e5))
    assert logits.std() == pytest.approx(1.4, abs=5 * 1.4 / np.sqrt(2e5))


def test_flow_times_stay_inside_the_open_interval_when_the_distribution_is_wide():
    times = RectifiedFlow(logit_std=100.0).sample_times(jax.random.key(0), 10_000)
    assert times.dtype == jnp.float32
    assert times.min() > 0.0
    assert times.max() < 1.0


def test_model_timesteps_are_float32_between_0_and_1000():
    np.testing.assert_array_equal(DDPM().model_timesteps(jnp.array([0, 999])), np.array([0, 999], np.float32))
    timesteps = RectifiedFlow().model_timesteps(jnp.array([0.25, 0.5]))
    np.testing.assert_array_equal(timesteps, np.array([250, 500], np.float32))
    assert timesteps.dtype == jnp.float32


def test_resolution_shift_is_the_square_root_of_the_pixel_ratio():
    assert resolution_shift(1024 * 1024, 512 * 512) == 2.0
    assert resolution_shift(256, 256) == 1.0


def test_a_shift_moves_the_noise_ratio_by_its_factor():
    # SD3 section 5.3.2: the ratio of noise to signal, s / (1 - s), is multiplied by the shift.
    times = np.linspace(0.05, 0.95, 10)
    shifted = RectifiedFlow(shift=2.5).shift_times(times)
    np.testing.assert_allclose(shifted / (1 - shifted), 2.5 * times / (1 - times), rtol=1e-12)


def nonlinear_prediction(x, timesteps):
    scale = 1.0 + timesteps.reshape(-1, *[1] * (x.ndim - 1)) / 500.0
    return x**2 / scale


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddpm_loss_matches_a_numpy_derivation(prediction):
    x0 = np.random.default_rng(0).normal(size=(64, 4, 4, 2)).astype(np.float32)
    key = jax.random.key(3)
    loss, _ = jax.jit(lambda x0, key: diffusion_loss(DDPM(prediction=prediction), nonlinear_prediction, x0, key))(
        x0, key
    )

    times_key, noise_key = jax.random.split(key)
    times = np.asarray(jax.random.randint(times_key, (64,), 0, 1000))
    eps = np.asarray(jax.random.normal(noise_key, x0.shape), np.float64)
    squared = 0.0
    for i, t in enumerate(times):
        roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * s / 999 for s in range(t + 1)]
        signal_power = np.prod([1 - root**2 for root in roots])
        noisy = np.sqrt(signal_power) * x0[i] + np.sqrt(1 - signal_power) * eps[i]
        target = (
            eps[i] if prediction == "epsilon" else np.sqrt(signal_power) * eps[i] - np.sqrt(1 - signal_power) * x0[i]
        )
        squared += np.sum((target - noisy**2 / (1 + t / 500)) ** 2)
    assert loss.mean.dtype == jnp.float32
    assert float(loss.mean) == pytest.approx(squared / x0.size, rel=1e-5)
    assert loss.weight == 64


def test_rectified_flow_loss_matches_a_numpy_derivation():
    x0 = np.random.default_rng(0).normal(size=(64, 4, 4, 2)).astype(np.float32)
    key = jax.random.key(3)
    schedule = RectifiedFlow(shift=2.0, logit_mean=0.2, logit_std=0.8)
    loss, _ = diffusion_loss(schedule, nonlinear_prediction, x0, key)

    times_key, noise_key = jax.random.split(key)
    logits = 0.2 + 0.8 * np.asarray(jax.random.normal(times_key, (64,)), np.float64)
    s = 1 / (1 + np.exp(-logits))
    s = (2 * s / (1 + s)).reshape(64, 1, 1, 1)
    eps = np.asarray(jax.random.normal(noise_key, x0.shape), np.float64)
    noisy = (1 - s) * x0 + s * eps
    expected = np.mean((noisy**2 / (1 + 1000 * s / 500) - (eps - x0)) ** 2)
    assert float(loss.mean) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_loss_of_a_perfect_prediction_is_zero(name):
    schedule = SCHEDULES[name]
    constant = jnp.full((256, 8), 0.7)

    def perfect(x, timesteps):
        times = timesteps.astype(jnp.int32) if isinstance(schedule, DDPM) else timesteps / 1000
        alpha, sigma = (scale[:, None] for scale in schedule.signal_and_noise_scales(times))
        noise = (x - alpha * constant) / sigma
        return schedule.target(constant, noise, times)

    loss, _ = diffusion_loss(schedule, perfect, constant, jax.random.key(0))
    assert float(loss.mean) < 1e-8


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_loss_of_predicting_zero_is_the_power_of_the_target(name):
    schedule = SCHEDULES[name]
    loss, _ = diffusion_loss(schedule, lambda x, t: jnp.zeros_like(x), jnp.full((4096, 64), 0.7), jax.random.key(0))
    power = {"epsilon": 1.0, "flow": 1.0 + 0.7**2}
    if schedule.prediction == "v":
        power["v"] = np.mean(schedule.alphas_cumprod + 0.7**2 * (1 - schedule.alphas_cumprod))
    # The variance of a squared target element around its expectation is at most 2 + 4 * 0.49, that of the expectation
    # over times at most a quarter. The tolerance is five standard errors of the mean over 4096 times with 64 elements
    # each.
    assert float(loss.mean) == pytest.approx(power[schedule.prediction], abs=5 * np.sqrt((4 / 64 + 0.25) / 4096))


def test_the_loss_is_float32_for_bfloat16_predictions():
    loss, metrics = diffusion_loss(
        DDPM(), lambda x, t: x.astype(jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16), jax.random.key(0)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, metrics))} == {jnp.dtype(jnp.float32)}


def test_quarter_losses_are_finite_without_samples_and_average_to_the_loss():
    x0 = jnp.ones((2, 5))
    loss, metrics = diffusion_loss(DDPM(), nonlinear_prediction, x0, jax.random.key(1))
    quarters = [metrics[f"loss_quarter_{k}"] for k in (1, 2, 3, 4)]
    losses, counts = (np.array([getattr(q, name) for q in quarters]) for name in ("mean", "weight"))
    assert np.isfinite(losses).all()
    assert (counts == 0).sum() >= 2
    assert (losses[counts == 0] == 0).all()
    assert counts.sum() == loss.weight == 2
    assert (losses * counts).sum() / 2 == pytest.approx(float(loss.mean), rel=1e-6)


def test_quarter_losses_over_small_batches_are_those_of_all_their_samples():
    """Batches of 2 leave most quarters empty; the loss of every sample is 1."""

    def predict(x, timesteps):
        del timesteps
        return schedule.target(x0, noise, times) + 1.0

    schedule, x0, rows = DDPM(prediction="epsilon"), jnp.zeros((2, 3)), []
    for number in range(6):
        key = jax.random.key(number)
        times_key, noise_key = jax.random.split(key)
        times, noise = schedule.sample_times(times_key, 2), jax.random.normal(noise_key, x0.shape)
        rows.append(diffusion_loss(schedule, predict, x0, key)[1])
    assert any(row[f"loss_quarter_{k}"].weight == 0 for row in rows for k in (1, 2, 3, 4))
    logged = mean_of_steps(jax.device_get(rows))
    assert logged == pytest.approx({f"loss_quarter_{k}": 1.0 for k in (1, 2, 3, 4)})
    empty = [name for name, mean in rows[0].items() if mean.weight == 0]
    assert empty and mean_of_steps(jax.device_get(rows[:1])).keys() == rows[0].keys() - set(empty)


def test_quarter_losses_belong_to_the_times_of_their_quarter():
    # The squared error is the timestep itself, so each mean must lie in its quarter.
    schedule = DDPM()

    def off_by_root_of_t(x, timesteps):
        _, sigma = schedule.signal_and_noise_scales(timesteps.astype(jnp.int32))
        return x / sigma[:, None] + jnp.sqrt(timesteps)[:, None]

    _, metrics = diffusion_loss(schedule, off_by_root_of_t, jnp.zeros((512, 2)), jax.random.key(0))
    for k in (1, 2, 3, 4):
        assert 250 * (k - 1) - 1e-2 <= metrics[f"loss_quarter_{k}"].mean <= 250 * k - 1 + 1e-2


def test_a_prediction_of_another_shape_is_rejected():
    with pytest.raises(ValueError, match="shape"):
        diffusion_loss(DDPM(), lambda x, t: x[:, :1], jnp.ones((4, 3)), jax.random.key(0))


def test_make_schedule_builds_by_name_and_passes_the_values():
    assert make_schedule("ddpm", prediction="v", zero_terminal_snr=True) == SCHEDULES["v_zero_snr"]
    assert make_schedule("rectified_flow", shift=3.0) == SCHEDULES["flow_shifted"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("edm", {}, "ddpm, rectified_flow"),
        ("ddpm", {"shift": 3.0}, "diffusion.shift is unknown; known are num_timesteps, beta_start"),
        ("rectified_flow", {"prediction": "v"}, "diffusion.prediction is unknown; known are shift"),
        ("ddpm", {"beta_schedule": "cosine"}, "scaled_linear, linear"),
        ("ddpm", {"prediction": "sample"}, "epsilon, v"),
        ("ddpm", {"zero_terminal_snr": True}, "prediction='v'"),
        ("ddpm", {"num_timesteps": 1}, "diffusion.num_timesteps=1 must be from 2 to"),
        ("ddpm", {"num_timesteps": 10.0}, "must be of type int"),
        ("ddpm", {"beta_start": 0.1, "beta_end": 0.01}, "beta_start=0.1 is larger than beta_end=0.01"),
        ("ddpm", {"beta_start": "low"}, "must be of type float"),
        ("ddpm", {"beta_start": 0.5, "beta_end": 0.9}, "no signal"),
        ("rectified_flow", {"shift": 0.0}, "diffusion.shift=0.0 must be from 0.001 to 1000"),
        ("rectified_flow", {"shift": float("nan")}, "finite"),
        ("rectified_flow", {"logit_std": -1.0}, "logit_std"),
        ("rectified_flow", {"logit_mean": float("inf")}, "logit_mean"),
    ],
)
def test_invalid_schedules_raise_a_user_error_that_names_the_choices(name, values, message):
    with pytest.raises(UserError, match=message):
        make_schedule(name, **values)


def test_resolution_shift_rejects_an_empty_image():
    with pytest.raises(UserError, match="positive"):
        resolution_shift(0, 256)
