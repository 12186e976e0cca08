"""Compares the training losses of the autoencoder with PyTorch and NumPy, and tests the discriminator's start step."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional

from lidit_jax.errors import UserError
from lidit_jax.images import to_float
from lidit_jax.models.discriminator import PatchDiscriminator, smallest_side
from lidit_jax.models.lpips import LPIPS, VGG16_LAYERS
from lidit_jax.models.vae import AutoencoderKL, DiagonalGaussian
from lidit_jax.models.vae_config import VAEConfig
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
from lidit_jax.stages.vae import VAEObjective, vae_task
from lidit_jax.train_config import TrainConfig
from lidit_jax.trainer import Trainer
from lidit_jax.weights.lpips import load_lpips

CONFIG = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, mid_block_add_attention=False)
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


def random_images(height=32, width=32, batch=2, seed=0):
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


def test_the_hinge_loss_matches_numpy():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(3, 4, 4, 1)), 2 * rng.normal(size=(3, 4, 4, 1))
    expected = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    assert hinge_loss(jnp.asarray(real), jnp.asarray(fake)) == pytest.approx(expected, rel=1e-6)
    assert adversarial_loss(jnp.asarray(fake)) == pytest.approx(-fake.mean(), rel=1e-6)


@pytest.mark.parametrize("weaker", [1.0, 1e-9])
def test_the_adaptive_weight_matches_pytorchs_gradients(weaker):
    """The reference computes both gradients in the last kernel with autograd, as latent diffusion's code does."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 8, 8, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5, 3)).astype(np.float32)
    critic = weaker * rng.normal(size=(4, 4, 3, 1)).astype(np.float32)
    target = random_images(8, 8)

    weight = torch.from_numpy(kernel).permute(3, 2, 0, 1).clone().requires_grad_()
    decoded = functional.conv2d(to_torch(features), weight, padding=1)
    similarity = (decoded - to_torch(target)).abs().sum() / 2  # summed over values, mean over the batch
    adversarial = -functional.conv2d(decoded, torch.from_numpy(critic).permute(3, 2, 0, 1)).mean()
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (similarity, adversarial)]
    expected = torch.clamp(gradients[0] / (gradients[1] + 1e-4), 0.0, 1e4).item()

    def convolve(x, kernel, padding):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def decode(kernel):
        return convolve(features, kernel, "SAME")

    values = 8 * 8 * 3
    ours = [
        jax.grad(lambda kernel: reconstruction_loss(decode(kernel), target, "l1"))(kernel),
        jax.grad(lambda kernel: adversarial_loss(convolve(decode(kernel), critic, "VALID")))(kernel),
    ]
    assert adaptive_weight(*ours, values) * values == pytest.approx(expected, rel=1e-4)
    assert (expected == 1e4) == (weaker < 1)


def test_a_given_gradient_replaces_the_computed_one():
    x = jnp.asarray(random_images(3, 3))
    value, slope, more = value_and_gradient_at(lambda x: (jnp.sum(x**3), x[0, 0, 0, 0]), x)
    np.testing.assert_allclose(slope, 3 * x**2, rtol=1e-6)
    assert more == x[0, 0, 0, 0]
    through = jax.value_and_grad(lambda x: with_gradient(value, 2 * x, 0.5 * slope))(x)
    assert through[0] == value
    np.testing.assert_allclose(through[1], 3 * x**2, rtol=1e-6)


# --- LPIPS ------------------------------------------------------------------------------------------------------


def torch_lpips(tensors, first, second):
    """Computes LPIPS (Zhang et al. 2018, equation 1) in PyTorch from the five layers of VGG16 before each pooling."""
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


def test_lpips_and_its_gradient_match_pytorch(vgg_tensors, lpips_file):
    params = load_lpips(lpips_file)
    first, second = random_images(32, 40), random_images(32, 40, seed=1)
    inputs = to_torch(first).requires_grad_()
    expected = torch_lpips(vgg_tensors, inputs, to_torch(second))
    expected.sum().backward()

    def distance(first):
        return LPIPS().apply({"params": params}, first, second)

    value, slope = jax.jit(lambda first: (distance(first), jax.grad(lambda x: distance(x).sum())(first)))(first)
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4)
    expected_slope = inputs.grad.permute(0, 2, 3, 1).numpy()
    # Compare norms: rounding decides which of two nearly equal values in a pooling window gets the gradient.
    assert np.linalg.norm(slope - expected_slope) < 1e-3 * np.linalg.norm(expected_slope)


def test_lpips_of_images_with_zero_features_is_zero_and_its_gradient_finite(lpips_file):
    params = jax.tree.map(np.zeros_like, load_lpips(lpips_file))
    flat = jnp.zeros((1, 16, 16, 3))

    def distance(x):
        return LPIPS().apply({"params": params}, x, flat).sum()

    value, slope = jax.jit(jax.value_and_grad(distance))(flat + 0.1)
    assert value == 0
    assert np.isfinite(slope).all()


def test_an_lpips_file_that_does_not_fit_is_rejected(vgg_tensors, tmp_path):
    def saved(**changes):
        tensors = {name: value for name, value in (vgg_tensors | changes).items() if value is not None}
        save_file(tensors, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    lin = vgg_tensors["lin2.model.1.weight"]
    other_name = saved(**{"lin2.model.1.weight": None, "lins.2.model.1.weight": lin})
    np.testing.assert_array_equal(load_lpips(other_name)["lin2"], lin.ravel())
    with pytest.raises(UserError, match=r"lin2\.model\.1\.weight is missing: save the state_dict of lpips"):
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
def test_the_discriminator_matches_pytorchs_patchgan(layers, size):
    model = PatchDiscriminator(width=8, layers=layers)
    images = random_images(*size, batch=3)
    params = nn.unbox(model.init(jax.random.key(0), images)["params"])
    scores = model.apply({"params": params}, images)
    expected = torch_discriminator(params, to_torch(images), layers).permute(0, 2, 3, 1)
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected.numpy()).max())


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_has_one_patch(layers):
    def shapes(side):
        model, images = PatchDiscriminator(8, layers), jnp.zeros((1, side, side, 3))
        return jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape

    assert shapes(smallest_side(layers)) == (1, 1, 1, 1)
    assert 0 in shapes(smallest_side(layers) - 2**layers)


# --- the task ---------------------------------------------------------------------------------------------------


def make_trainer(mesh_sizes=ONE_DEVICE, discriminator=None, lpips=None, accumulate=1, weight_decay=0.5, **objective):
    values = {"reconstruction": "l1", "kl_weight": 1e-3, "adversarial_weight": 0.5, **objective}
    task = vae_task(AutoencoderKL(CONFIG), VAEObjective(**values), lpips=lpips, discriminator=discriminator)
    config = TrainConfig(
        steps=8, batch_size=8, learning_rate=1e-3, accumulate=accumulate, clip_norm=0.1, weight_decay=weight_decay
    )
    devices = jax.devices()[: int(np.prod(list(mesh_sizes.values())))]
    return Trainer(task, config, make_mesh(mesh_sizes, devices), ShardingRules())


def take_steps(trainer, count):
    """Returns the parameters after each step, and the metrics of each step."""
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
    """Parameters and metrics of four steps without a discriminator."""
    return take_steps(make_trainer(), 4)


@pytest.fixture(scope="module")
def late_trainer():
    return make_trainer(discriminator=CRITIC, adversarial_start=2)


@pytest.fixture(scope="module")
def late(late_trainer):
    """Parameters and metrics of four steps with a discriminator that starts at step 2."""
    return take_steps(late_trainer, 4)


def test_a_discriminator_that_starts_late_leaves_the_first_steps_untouched(alone, late, late_trainer):
    (without, _), (steps, rows) = alone, late
    first = jax.device_get(late_trainer.init(0).params["discriminator"])

    def distance(step):
        """Mean over an array: two programs round differently, and Adam's first steps amplify tiny gradients."""
        means = jax.tree.map(lambda a, b: np.abs(a - b).mean(), steps[step]["vae"], without[step]["vae"])
        return max(jax.tree.leaves(means))

    for step in (0, 1):
        assert distance(step) < 1e-6  # the learning rate is 1e-3
        jax.tree.map(np.testing.assert_array_equal, steps[step]["discriminator"], first)
        assert "hinge" not in rows[step]
    assert distance(3) > 1e-4
    learned = jax.tree.map(lambda a, b: np.abs(a - b).max(), steps[3]["discriminator"], first)
    del learned["conv_out"]["bias"]  # shifts real and fake scores equally
    assert min(jax.tree.leaves(learned)) > 0
    assert rows[3]["hinge"].mean > 0
    assert rows[3]["adaptive_weight"].mean > 0


@pytest.mark.parametrize("perceptual", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_gradient_of_a_step_is_that_of_the_complete_loss(lpips_file, perceptual):
    """One backward pass through the decoder, with the weighted gradient, equals differentiating the complete loss."""
    lpips = load_lpips(lpips_file) if perceptual else None
    trainer = make_trainer(discriminator=CRITIC, lpips=lpips, perceptual_weight=0.7)
    params, key = trainer.init(0).params, jax.random.key(3)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)}
    model, images = AutoencoderKL(CONFIG), to_float(jnp.asarray(batch["image"]))
    critic = params["discriminator"]

    def score(critic, images):
        return CRITIC.apply({"params": critic}, images)

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

        def last(tree):
            return tree["decoder"]["conv_out"]["kernel"]

        gradients = [last(jax.grad(lambda p: similarity(p)[0])(vae)), last(jax.grad(opinion)(vae))]
        weight = jax.lax.stop_gradient(adaptive_weight(*gradients, 16 * 16 * 3))
        return value + 1e-3 * kl_loss(posterior, images) + 0.5 * weight * opinion(vae), decoded

    (value, decoded), vae_gradient = jax.jit(jax.value_and_grad(expected, has_aux=True))(params["vae"])
    hinge, critic_gradient = jax.value_and_grad(lambda c: hinge_loss(score(c, images), score(c, decoded)))(critic)

    def loss(params):
        total, metrics = trainer.task.loss(params, {"lpips": lpips}, batch, key, 1)
        return total.mean, metrics

    (total, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert float(total) == pytest.approx(float(value + hinge), rel=1e-5)
    assert float(metrics["hinge"].mean) == pytest.approx(float(hinge), rel=1e-5)
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
            assert same[name].mean == pytest.approx(row[name].mean, rel=1e-3), name


@pytest.mark.slow
def test_micro_batches_without_a_discriminator_match_the_full_batch_except_for_their_noise(alone):
    _, [parts] = take_steps(make_trainer(accumulate=4), 1)
    whole = alone[1][0]
    assert parts["kl"].mean == pytest.approx(whole["kl"].mean, rel=1e-5)
    assert parts["reconstruction"].mean == pytest.approx(whole["reconstruction"].mean, rel=0.05)
