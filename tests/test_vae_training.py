"""What the autoencoder is trained by: losses against PyTorch and NumPy, the discriminator's start, its metrics."""

import dataclasses
import json
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT, load_config
from etils import epath
from PIL import Image
from safetensors.numpy import save_file
from torch.nn import functional

from lidit_jax import experiment, tasks
from lidit_jax.contact_sheet import draw_contact_sheet
from lidit_jax.errors import UserError
from lidit_jax.evaluation.reconstruction import Autoencoding, LatentMoments, LatentStatistics
from lidit_jax.models.discriminator import PatchDiscriminator, smallest_side
from lidit_jax.models.image_similarity import psnr, ssim
from lidit_jax.models.lpips import LPIPS, VGG16_LAYERS
from lidit_jax.models.vae import AutoencoderKL, DiagonalGaussian, VAEConfig
from lidit_jax.models.vae_loss import (
    adaptive_weight,
    adversarial_loss,
    hinge_loss,
    kl_loss,
    reconstruction_loss,
    value_and_gradient_at,
    with_gradient,
)
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.sampling import Request, draw_to_folder
from lidit_jax.train import TrainConfig, Trainer
from lidit_jax.weights.diffusers_vae import load_vae, save_vae
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.lpips import load_lpips

CONFIG = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, mid_block_add_attention=False)
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


def pictures(height=32, width=32, batch=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def to_torch(images):
    return torch.from_numpy(np.asarray(images).copy()).permute(0, 3, 1, 2)


# --- losses -----------------------------------------------------------------------------------------------------


def test_reconstruction_and_kl_are_per_value():
    images = jnp.zeros((2, 4, 6, 3))
    posterior = DiagonalGaussian(jnp.full((2, 1, 2, 4), 3.0), jnp.zeros((2, 1, 2, 4)))
    assert reconstruction_loss(images + 0.5, images, "l2") == pytest.approx(0.25)
    assert reconstruction_loss(images - 0.5, images, "l1") == pytest.approx(0.5)
    assert kl_loss(posterior, images) == pytest.approx(8 * 0.5 * 9 / 72)
    with pytest.raises(UserError, match="'l1, l2'|l1, l2"):
        reconstruction_loss(images, images, "huber")


def test_the_hinge_is_that_of_numpy():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(3, 4, 4, 1)), 2 * rng.normal(size=(3, 4, 4, 1))
    expected = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    assert hinge_loss(jnp.asarray(real), jnp.asarray(fake)) == pytest.approx(expected, rel=1e-6)
    assert adversarial_loss(jnp.asarray(fake)) == pytest.approx(-fake.mean(), rel=1e-6)


@pytest.mark.parametrize("weaker", [1.0, 1e-9])
def test_the_adaptive_weight_is_that_of_pytorchs_gradients(weaker):
    """Both losses' gradients in the last convolution's kernel, by autograd, as latent diffusion's code has them."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 8, 8, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5, 3)).astype(np.float32)
    critic = weaker * rng.normal(size=(4, 4, 3, 1)).astype(np.float32)
    target = pictures(8, 8)

    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1).clone().requires_grad_()
    decoded = functional.conv2d(to_torch(features), weight, padding=1)
    similarity = (decoded - to_torch(target)).abs().sum() / 2  # summed over values, mean over the batch
    adversarial = -functional.conv2d(decoded, torch.from_numpy(critic).permute(3, 2, 0, 1)).mean()
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (similarity, adversarial)]
    expected = torch.clamp(gradients[0] / (gradients[1] + 1e-4), 0.0, 1e4).item()

    def convolve(x, kernel, padding):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    decode = lambda kernel: convolve(features, kernel, "SAME")  # noqa: E731
    values = 8 * 8 * 3
    ours = [
        jax.grad(lambda kernel: reconstruction_loss(decode(kernel), target, "l1"))(kernel),
        jax.grad(lambda kernel: adversarial_loss(convolve(decode(kernel), critic, "VALID")))(kernel),
    ]
    assert adaptive_weight(*ours, values) * values == pytest.approx(expected, rel=1e-4)
    assert (expected == 1e4) == (weaker < 1)


def test_a_given_gradient_takes_the_place_of_the_own_one():
    x = jnp.asarray(pictures(3, 3))
    value, slope, more = value_and_gradient_at(lambda x: (jnp.sum(x**3), x[0, 0, 0, 0]), x)
    np.testing.assert_allclose(slope, 3 * x**2, rtol=1e-6)
    assert more == x[0, 0, 0, 0]
    through = jax.value_and_grad(lambda x: with_gradient(value, 2 * x, 0.5 * slope))(x)
    assert through[0] == value
    np.testing.assert_allclose(through[1], 3 * x**2, rtol=1e-6)


# --- LPIPS ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg_tensors():
    """What `lpips.LPIPS(net="vgg").state_dict()` holds, with random weights."""
    rng, tensors, channels = np.random.default_rng(0), {}, 3
    for index, layer in enumerate(VGG16_LAYERS):
        for number, width in layer:
            name = f"net.slice{index + 1}.{number}"
            scale = np.sqrt(2 / (9 * channels))
            tensors[f"{name}.weight"] = (scale * rng.normal(size=(width, channels, 3, 3))).astype(np.float32)
            tensors[f"{name}.bias"] = (0.05 * rng.normal(size=width)).astype(np.float32)
            channels = width
        tensors[f"lin{index}.model.1.weight"] = rng.uniform(size=(1, channels, 1, 1)).astype(np.float32)
    tensors["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    return tensors


@pytest.fixture(scope="module")
def lpips_file(vgg_tensors, tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file(vgg_tensors, file)
    return file


def torch_lpips(tensors, first, second):
    """The definition (Zhang et al. 2018, equation 1) in PyTorch, on VGG16's five layers before their pooling."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x = (torch.cat([first, second]) - shift) / scale
    distance = 0
    for index, layer in enumerate(VGG16_LAYERS):
        if index:
            x = functional.max_pool2d(x, 2)
        for number, _ in layer:
            weight, bias = (
                torch.from_numpy(tensors[f"net.slice{index + 1}.{number}.{kind}"]) for kind in ("weight", "bias")
            )
            x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
        one, other = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
        linear = torch.from_numpy(tensors[f"lin{index}.model.1.weight"])
        distance = distance + functional.conv2d((one - other) ** 2, linear).mean((1, 2, 3))
    return distance


def test_lpips_and_its_gradient_are_those_of_pytorch(vgg_tensors, lpips_file):
    params = load_lpips(lpips_file)
    first, second = pictures(32, 40), pictures(32, 40, seed=1)
    inputs = to_torch(first).requires_grad_()
    expected = torch_lpips(vgg_tensors, inputs, to_torch(second))
    expected.sum().backward()
    distance = lambda first: LPIPS().apply({"params": params}, first, second)  # noqa: E731
    value, slope = jax.jit(lambda first: (distance(first), jax.grad(lambda x: distance(x).sum())(first)))(first)
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4)
    expected_slope = inputs.grad.permute(0, 2, 3, 1).numpy()
    # As a whole: where two values in a pooling window are as good as equal, rounding decides which one is the largest.
    assert np.linalg.norm(slope - expected_slope) < 1e-3 * np.linalg.norm(expected_slope)


def test_lpips_of_pictures_without_any_feature_is_zero_and_its_gradient_finite(lpips_file):
    params = jax.tree.map(np.zeros_like, load_lpips(lpips_file))
    flat = jnp.zeros((1, 16, 16, 3))
    distance = lambda x: LPIPS().apply({"params": params}, x, flat).sum()  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(distance))(flat + 0.1)
    assert value == 0
    assert np.isfinite(slope).all()


def test_an_lpips_file_that_does_not_fit_is_refused(vgg_tensors, tmp_path):
    def saved(**changes):
        tensors = {name: value for name, value in (vgg_tensors | changes).items() if value is not None}
        save_file(tensors, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    lin = vgg_tensors["lin2.model.1.weight"]
    other_name = saved(**{"lin2.model.1.weight": None, "lins.2.model.1.weight": lin})
    np.testing.assert_array_equal(load_lpips(other_name)["lin2"], lin.ravel())
    with pytest.raises(UserError, match=r"lin2\.model\.1\.weight is missing; it must hold the state of the lpips"):
        load_lpips(saved(**{"lin2.model.1.weight": None}))
    with pytest.raises(UserError, match=r"net\.slice1\.0\.bias has shape"):
        load_lpips(saved(**{"net.slice1.0.bias": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match="not finite"):
        load_lpips(saved(**{"lin2.model.1.weight": lin * np.nan}))
    (tmp_path / "vgg.pth").write_bytes(b"\x80\x02}q\x00." * 10)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_lpips(tmp_path / "vgg.pth")
    with pytest.raises(UserError, match="is missing"):
        load_lpips(tmp_path / "nowhere.safetensors")


# --- the discriminator ------------------------------------------------------------------------------------------


def torch_discriminator(params, images, layers):
    def conv(name, x, stride):
        p = params[name]
        bias = torch.from_numpy(np.array(p["bias"])) if "bias" in p else None
        kernel = torch.from_numpy(np.asarray(p["kernel"])).permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, bias, stride=stride, padding=1)

    x = functional.leaky_relu(conv("conv_0", images, 2), 0.2)
    for layer in range(1, layers + 1):
        x = conv(f"conv_{layer}", x, 2 if layer < layers else 1)
        scale, bias = (torch.from_numpy(np.asarray(params[f"norm_{layer}"][kind])) for kind in ("scale", "bias"))
        x = functional.leaky_relu(functional.batch_norm(x, None, None, scale, bias, training=True), 0.2)
    return conv("conv_out", x, 1)


@pytest.mark.parametrize(("layers", "size"), [(3, (40, 32)), (1, (8, 12))])
def test_the_discriminator_is_pytorchs_patchgan(layers, size):
    model = PatchDiscriminator(width=8, layers=layers)
    images = pictures(*size, batch=3)
    params = nn.unbox(model.init(jax.random.key(0), images)["params"])
    scores = model.apply({"params": params}, images)
    expected = torch_discriminator(params, to_torch(images), layers).permute(0, 2, 3, 1)
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected.numpy()).max())


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_picture_has_one_patch(layers):
    def shapes(side):
        model, images = PatchDiscriminator(8, layers), jnp.zeros((1, side, side, 3))
        return jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape

    assert shapes(smallest_side(layers)) == (1, 1, 1, 1)
    assert 0 in shapes(smallest_side(layers) - 2**layers)


# --- the task ---------------------------------------------------------------------------------------------------


def make_trainer(mesh_sizes=ONE_DEVICE, discriminator=None, lpips=None, accumulate=1, weight_decay=0.5, **objective):
    values = {"reconstruction": "l1", "kl_weight": 1e-3, "adversarial_weight": 0.5, **objective}
    task = tasks.vae_task(AutoencoderKL(CONFIG), tasks.VAEObjective(**values), lpips=lpips, discriminator=discriminator)
    config = TrainConfig(
        steps=8, batch_size=8, learning_rate=1e-3, accumulate=accumulate, clip_norm=0.1, weight_decay=weight_decay
    )
    devices = jax.devices()[: int(np.prod(list(mesh_sizes.values())))]
    return Trainer(task, config, make_mesh(mesh_sizes, devices), ShardingRules())


def take_steps(trainer, count):
    """(the parameters after each step, the metrics of each)."""
    state, states, rows = trainer.init(0), [], []
    rng = np.random.default_rng(0)
    with jax.set_mesh(trainer.mesh):
        for number in range(count):
            batch = trainer.put({"image": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)})
            state, metrics = trainer.step(state, trainer.task.frozen, batch, jax.random.key(1), number)
            states.append(jax.device_get(state.params))
            rows.append(jax.device_get(metrics))
    return states, rows


CRITIC = PatchDiscriminator(width=4, layers=1)


@pytest.fixture(scope="module")
def alone():
    """(parameters, metrics) of four steps without a discriminator."""
    return take_steps(make_trainer(), 4)


@pytest.fixture(scope="module")
def late_trainer():
    return make_trainer(discriminator=CRITIC, adversarial_start=2)


@pytest.fixture(scope="module")
def late(late_trainer):
    """The same of four steps with one that starts at step 2."""
    return take_steps(late_trainer, 4)


def test_a_discriminator_that_starts_late_leaves_the_first_steps_untouched(alone, late, late_trainer):
    (without, _), (steps, rows) = alone, late
    first = jax.device_get(late_trainer.init(0).params["discriminator"])
    for step in (0, 1):
        jax.tree.map(np.testing.assert_array_equal, steps[step]["vae"], without[step]["vae"])
        jax.tree.map(np.testing.assert_array_equal, steps[step]["discriminator"], first)
        assert "hinge" not in rows[step]
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), steps[3]["vae"], without[3]["vae"])
    assert max(jax.tree.leaves(changed)) > 1e-5
    learned = jax.tree.map(lambda a, b: np.abs(a - b).max(), steps[3]["discriminator"], first)
    del learned["conv_out"]["bias"]  # moves real and fake scores alike
    assert min(jax.tree.leaves(learned)) > 0
    assert rows[3]["hinge"] > 0
    assert rows[3]["adaptive_weight"] > 0


@pytest.mark.parametrize("perceptual", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_steps_gradient_is_that_of_the_whole_loss(lpips_file, perceptual):
    """Passing the decoder once, with weighed gradients, is differentiating each loss through everything."""
    lpips = load_lpips(lpips_file) if perceptual else None
    trainer = make_trainer(discriminator=CRITIC, lpips=lpips, perceptual_weight=0.7)
    params, key = trainer.init(0).params, jax.random.key(3)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)}
    model, images = AutoencoderKL(CONFIG), tasks.to_pixels(jnp.asarray(batch["image"]))
    critic = params["discriminator"]
    score = lambda critic, images: CRITIC.apply({"params": critic}, images)  # noqa: E731

    def similarity(params):
        decoded, posterior = model.apply({"params": params}, images, key)
        value = reconstruction_loss(decoded, images, "l1")
        if perceptual:
            value += 0.7 * jnp.mean(LPIPS().apply({"params": lpips}, decoded, images))
        return value, (decoded, posterior)

    def opinion(params):
        return adversarial_loss(score(critic, model.apply({"params": params}, images, key)[0]))

    def expected(vae):
        value, (decoded, posterior) = similarity(vae)
        last = lambda tree: tree["decoder"]["conv_out"]["kernel"]  # noqa: E731
        gradients = [last(jax.grad(lambda p: similarity(p)[0])(vae)), last(jax.grad(opinion)(vae))]
        weight = jax.lax.stop_gradient(adaptive_weight(*gradients, 16 * 16 * 3))
        return value + 1e-3 * kl_loss(posterior, images) + 0.5 * weight * opinion(vae), decoded

    (value, decoded), vae_gradient = jax.jit(jax.value_and_grad(expected, has_aux=True))(params["vae"])
    hinge, critic_gradient = jax.value_and_grad(lambda c: hinge_loss(score(c, images), score(c, decoded)))(critic)

    loss = lambda params: trainer.task.loss(params, {"lpips": lpips}, batch, key, 1)  # noqa: E731
    (total, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert float(total) == pytest.approx(float(value + hinge), rel=1e-5)
    assert float(metrics["hinge"]) == pytest.approx(float(hinge), rel=1e-5)
    assert ("perceptual" in metrics) == perceptual
    for got, wanted in ((gradient["vae"], vae_gradient), (gradient["discriminator"], critic_gradient)):
        got, wanted = (flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/") for tree in (got, wanted))
        largest = max(np.abs(leaf).max() for leaf in wanted.values())
        assert got.keys() == wanted.keys()
        for name, leaf in got.items():
            np.testing.assert_allclose(leaf, wanted[name], atol=2e-4 * largest, err_msg=name)


def test_each_network_is_clipped_by_its_own_norm(late_trainer):
    state, batch = late_trainer.init(0), {"image": np.full((8, 16, 16, 3), 200, np.uint8)}
    with jax.set_mesh(late_trainer.mesh):
        after, metrics = late_trainer.step(state, None, late_trainer.put(batch), jax.random.key(1), 2)
    for name in ("vae", "discriminator"):
        norm = float(metrics[f"grad_norm/{name}"])
        assert norm > 0.1
        moment = after.opt_state[0].mu[name]  # (1 - b1) of the clipped gradient
        assert float(jnp.sqrt(sum(jnp.sum(m**2) for m in jax.tree.leaves(moment)))) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.slow
def test_eight_devices_train_as_one_does(late):
    sizes = {"data": 2, "fsdp": 4, "tensor": 1}
    _, eight = take_steps(make_trainer(sizes, discriminator=CRITIC, adversarial_start=2), 4)
    for row, same in zip(late[1], eight, strict=True):
        assert same.keys() == row.keys()
        for name in row.keys() & {"loss", "reconstruction", "kl", "hinge", "adaptive_weight", "psnr"}:
            assert float(same[name]) == pytest.approx(float(row[name]), rel=1e-3), name


@pytest.mark.slow
def test_micro_batches_without_a_discriminator_are_the_whole_batch_but_for_their_noise(alone):
    _, [parts] = take_steps(make_trainer(accumulate=4), 1)
    whole = alone[1][0]
    assert float(parts["kl"]) == pytest.approx(float(whole["kl"]), rel=1e-5)
    assert float(parts["reconstruction"]) == pytest.approx(float(whole["reconstruction"]), rel=0.05)


# --- metrics ----------------------------------------------------------------------------------------------------


def test_psnr_is_per_picture_over_a_range_of_two_and_clips():
    images = jnp.ones((3, 4, 4, 3))
    reconstruction = jnp.stack([images[0] - 0.2, images[1] + 5.0, images[2] - 2.0])
    np.testing.assert_allclose(psnr(reconstruction, images), [20.0, 10 * np.log10(4 / 1e-10), 0.0], atol=1e-3)


def numpy_ssim(first, second):
    """Wang et al. 2004, equation 13: of one channel with values in [0, 1]."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    filtered = lambda x: np.sum(np.lib.stride_tricks.sliding_window_view(x, (11, 11)) * window, axis=(2, 3))  # noqa: E731
    mean = filtered(first), filtered(second)
    variance = filtered(first**2) - mean[0] ** 2, filtered(second**2) - mean[1] ** 2
    covariance = filtered(first * second) - mean[0] * mean[1]
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean[0] * mean[1] + c1) * (2 * covariance + c2)
    return np.mean(similarity / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (variance[0] + variance[1] + c2)))


def test_ssim_is_that_of_its_definition():
    first = pictures(20, 24)
    second = np.clip(first + 0.3 * pictures(20, 24, seed=1), -1, 1)
    got = ssim(second, first)
    for row in range(2):
        channels = [numpy_ssim(*(image[row, ..., c] * 0.5 + 0.5 for image in (first, second))) for c in range(3)]
        assert got[row] == pytest.approx(np.mean(channels), abs=1e-4)
    np.testing.assert_allclose(ssim(first, first), 1.0, atol=1e-5)
    np.testing.assert_allclose(ssim(pictures(8, 4), pictures(8, 4)), [1, 1], atol=1e-5)  # smaller than the window


def test_latent_statistics_are_numpys_over_batches_of_other_sizes():
    rng = np.random.default_rng(0)
    values = [rng.normal(2.0, 3.0, (4, size, size, 5)) for size in (3, 7)]
    sums = [
        LatentMoments(v.mean((1, 2)), (v**2).mean((1, 2)), np.full(4, v.shape[1] * v.shape[2], np.float32))
        for v in values
    ]
    together = np.concatenate([v.reshape(-1, 5) for v in values])
    statistics = LatentStatistics.of(sums)
    np.testing.assert_allclose(statistics.mean, together.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.deviation, together.std(0), rtol=1e-6)
    scaled = (together - statistics.shift_factor) * statistics.scaling_factor
    assert scaled.mean() == pytest.approx(0, abs=1e-6)
    assert scaled.std() == pytest.approx(1, abs=1e-6)
    with pytest.raises(UserError, match="it learned nothing"):
        _ = LatentStatistics(np.zeros(3), np.zeros(3)).scaling_factor


def test_reconstructions_of_any_number_and_size_are_judged_alike_on_one_device_and_eight():
    model = AutoencoderKL(CONFIG)
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(16, 16)] * 5 + [(16, 20)] * 3]
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method=AutoencoderKL.encode))
    posteriors = [encode(params, tasks.to_pixels(jnp.asarray(picture[None]))) for picture in given]
    samples = [jax.vmap(p.sample)(jax.random.split(jax.random.key(i), 50)) for i, p in enumerate(posteriors)]
    drawn = np.concatenate([np.asarray(s).reshape(-1, 4) for s in samples])
    results = []
    for sizes in (ONE_DEVICE, {"data": 2, "fsdp": 4, "tensor": 1}):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        results.append(Autoencoding(model, mesh, ShardingRules()).reconstruct(params, given, 3))
    for scores, back, latents in results:
        decoded, _ = model.apply({"params": params}, tasks.to_pixels(jnp.asarray(given[6][None])))
        np.testing.assert_allclose(back[6], np.clip(np.round(decoded[0] * 127.5 + 127.5), 0, 255), atol=1)
        assert scores["psnr"][6] == pytest.approx(float(psnr(decoded, given[6] / 127.5 - 1)[0]), rel=1e-4)
        assert scores["ssim"][6] == pytest.approx(float(ssim(decoded, given[6][None] / 127.5 - 1)[0]), abs=1e-4)
        np.testing.assert_allclose(latents.mean, drawn.mean(0), atol=0.02)
        np.testing.assert_allclose(latents.deviation, drawn.std(0), atol=0.02)
    np.testing.assert_allclose(results[0][0]["psnr"], results[1][0]["psnr"], rtol=1e-4)
    np.testing.assert_allclose(results[0][2].mean, results[1][2].mean, atol=1e-5)


# --- whole runs of configs/vae.py -------------------------------------------------------------------------------


def tiny_vae_config(**changes):
    config = load_config("vae")
    config.data.update(source="shapes", path="", held_out_shards=0, resolution=32)
    config.vae.model.update(block_out_channels=(8, 8), norm_num_groups=4)
    config.vae.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, sample_every=2, warmup_steps=0)
    config.vae.evaluate.update(num_images=9, batch_size=4, sheet=4)
    config.vae.update(changes)
    return config


def test_a_vae_alone_is_trained_judged_and_used_by_diffusers(tmp_path, caplog):
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL

    workdir = epath.Path(tmp_path / "run")
    caplog.set_level("INFO", logger="lidit_jax")
    experiment.run(tiny_vae_config(), workdir)
    assert "without the perceptual loss (vae.perceptual.weights names no file)" in caplog.text
    scores = json.loads((workdir / "reconstruction.json").read_text())
    assert scores["images"] == 9
    assert 5 < scores["psnr"] < 40
    assert len(scores["latent_mean"]) == len(scores["latent_deviation"]) == 16
    assert Image.open(workdir / "reconstruction.png").size[1] > 130
    lines = [json.loads(line) for line in (workdir / "training/vae/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reconstruction/psnr" in line] == [2, 3]
    assert lines[-1]["reconstruction/psnr"] == pytest.approx(scores["psnr"], rel=1e-3)
    assert {"psnr", "kl", "reconstruction"} <= lines[0].keys()
    names = {"ssim", "latent_mean_15", "latent_deviation_00"}
    assert {f"reconstruction/{name}" for name in names} <= lines[-1].keys()
    assert scores["held_out"]
    assert (workdir / "training/vae/samples/reconstruction_0000003.png").exists()

    config, _ = load_vae(workdir / "vae")
    assert (config.scaling_factor, config.shift_factor) == (scores["scaling_factor"], scores["shift_factor"])
    assert DiffusersAutoencoderKL.from_pretrained(workdir / "vae").config.scaling_factor == config.scaling_factor

    before = Path(workdir / "reconstruction.json").stat().st_mtime_ns
    experiment.run(tiny_vae_config(), workdir)  # nothing is left to do
    assert Path(workdir / "reconstruction.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is the run of a VAE alone: there is no model in it that draws"):
        draw_to_folder(Request(workdir, epath.Path(tmp_path / "out"), prompt="x"))

    given = tiny_vae_config(weights=str(workdir / "vae"))
    experiment.run(given, epath.Path(tmp_path / "judged"))
    judged = json.loads((tmp_path / "judged/reconstruction.json").read_text())
    assert judged["psnr"] == pytest.approx(scores["psnr"], rel=1e-3)
    assert not (tmp_path / "judged/vae").exists()

    # Other pictures, or another VAE in its place, are judged anew.
    given.vae.evaluate.num_images = 5
    experiment.run(given, epath.Path(tmp_path / "judged"))
    assert json.loads((tmp_path / "judged/reconstruction.json").read_text())["images"] == 5
    longer = tiny_vae_config()
    longer.vae.train.steps = 4
    experiment.run(longer, workdir)
    assert json.loads((workdir / "reconstruction.json").read_text())["psnr"] != scores["psnr"]
    experiment.run(given, epath.Path(tmp_path / "judged"))
    assert json.loads((tmp_path / "judged/reconstruction.json").read_text())["vae"] == folder_digest(workdir / "vae")


@pytest.mark.slow
def test_a_run_with_every_loss_resumes_to_the_same_weights(tmp_path, lpips_file):
    def config(steps):
        made = tiny_vae_config()
        made.data.resolution = 24
        made.vae.perceptual.weights = str(lpips_file)
        made.vae.adversarial.update(weight=0.5, start=1, width=4)
        made.vae.train.update(steps=steps, sample_every=0, schedule="constant")
        return made

    experiment.run(config(3), epath.Path(tmp_path / "whole"))
    experiment.run(config(2), epath.Path(tmp_path / "parts"))
    (tmp_path / "parts/vae").rename(tmp_path / "unfinished")
    (tmp_path / "parts/reconstruction.json").unlink()
    experiment.run(config(3), epath.Path(tmp_path / "parts"))
    whole, parts = (load_vae(tmp_path / name / "vae")[1] for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    [*_, last] = (tmp_path / "whole/training/vae/metrics.jsonl").read_text().splitlines()
    assert {"perceptual", "hinge", "adaptive_weight", "grad_norm/discriminator"} <= json.loads(last).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.vae.update(reconstruction="l3"), r"vae\.reconstruction='l3': use one of l1, l2"),
        (lambda c: c.vae.adversarial.update(weight=-1.0), r"vae\.adversarial\.weight=-1.0 must be a finite number"),
        (lambda c: c.vae.update(kl_weight=float("nan")), r"vae\.kl_weight=nan must be a finite number"),
        (lambda c: c.vae.adversarial.update(width=10**8), r"vae\.adversarial\.width=100000000 must be from 1 to 1024"),
        (lambda c: c.vae.adversarial.update(layers="3"), r"vae\.adversarial\.layers is '3': it must be of type int"),
        (lambda c: c.data.update(resolution=None), r"data\.resolution is None: it must be of type int"),
        (lambda c: c.vae.model.update(out_channels=1), "gives 1 channels: pictures have 3"),
        (lambda c: c.vae.model.update(latents_mean=(0.0,) * 16), "leave out latents_mean and latents_std"),
        (lambda c: c.vae.adversarial.update(wieght=1.0), r"vae\.adversarial\.wieght is unknown; did you mean 'weight'"),
        (lambda c: c.vae.train.update(steps=0), r"^vae\.train\.steps=0 must be at least 1"),
        (lambda c: c.vae.evaluate.update(num_images=0), r"vae\.evaluate\.num_images=0 must be at least 1"),
        (lambda c: c.vae.perceptual.update(weights="/nowhere.safetensors"), "nowhere.safetensors is missing"),
        (lambda c: c.data.update(resolution=1), "resolution=1 is not a multiple of 2: use 2"),
        (lambda c: c.data.update(held_out_shards=1), r"data\.source='tar' alone.*held_out_shards=0"),
        (lambda c: c.vae.adversarial.update(weight=1.0, layers=4), "sides of 48 pixels, some have 32: raise data"),
        (lambda c: c.update(sample={"sampler": "euler"}), "config key text is missing"),
    ],
)
def test_a_vae_config_that_can_not_work_is_refused_before_anything_is_written(tmp_path, change, message):
    config = tiny_vae_config()
    with config.unlocked(), config.ignore_type():
        change(config)
    with pytest.raises(UserError, match=message):
        experiment.run(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_vae_without_weights_or_a_recipe_is_refused(tmp_path):
    config = tiny_vae_config()
    with config.unlocked():
        del config.vae.model
    with pytest.raises(UserError, match=r"give --config\.vae\.weights=FOLDER"):
        experiment.run(config, epath.Path(tmp_path / "run"))


@pytest.mark.skipif(not (ROOT.parent / "shared/data/fxemoji").is_dir(), reason="needs ../shared/data/fxemoji")
def test_the_last_shard_is_kept_from_training_and_previewed_config_is_the_vaes(tmp_path):
    from lidit_jax.data.dataset import DataConfig, Dataset

    config = load_config("vae")
    assert config.data.held_out_shards == 1
    data = DataConfig(**config.data.to_dict())
    training, held_out = Dataset(data, 8), Dataset(data, 8, held_out=True)
    keys = [{d.source.describe(i)["key"] for i in range(len(d.source))} for d in (training, held_out)]
    assert [len(of) for of in keys] == [696, 232]
    assert not keys[0] & keys[1]
    assert training.fingerprint != held_out.fingerprint
    with pytest.raises(UserError, match="has 4 shards, too few to hold some out: lower --config.data.held"):
        Dataset(dataclasses.replace(data, held_out_shards=4), 8)
    assert len(held_out.pictures(7)) == 7
    config.vae.weights = ""
    draw_contact_sheet(config, epath.Path(tmp_path / "sheet.png"), 8)
    assert Image.open(tmp_path / "sheet.png").size[0] > 8 * 64


def test_a_folder_that_is_no_autoencoder_is_refused(tmp_path):
    config = tiny_vae_config(weights=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        experiment.run(config, epath.Path(tmp_path / "run"))
    params = nn.unbox(AutoencoderKL(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"])
    save_vae(tmp_path / "vae", CONFIG, params)
    values = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(values | {"_class_name": "AutoencoderDC"}))
    with pytest.raises(UserError, match="only 'AutoencoderKL' is supported"):
        experiment.run(tiny_vae_config(weights=str(tmp_path / "vae")), epath.Path(tmp_path / "run"))
    idle = tiny_vae_config(weights=str(tmp_path / "vae"))
    with idle.unlocked():
        del idle.vae.evaluate
    with pytest.raises(UserError, match="there is nothing to do"):
        experiment.run(idle, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
