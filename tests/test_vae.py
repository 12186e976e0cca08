"""Compares the autoencoder with diffusers', and tests its weights format, its loss and its error messages."""

import json
import shutil

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from safetensors.numpy import load_file, save_file

from lidit_jax.errors import UserError
from lidit_jax.models.vae import AutoencoderKL, DiagonalGaussian, from_model_latents, to_model_latents
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_layers import GroupNorm, upsample_and_convolve
from lidit_jax.models.vae_loss import kl_loss, reconstruction_loss
from lidit_jax.weights.diffusers_vae import OLD_ATTENTION_NAMES, load_vae, save_vae

# Architectures of published autoencoders at reduced widths, with the options in which they differ.
SD1 = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.18215,
    "sample_size": 64,
}
SDXL = {
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
SD3 = {
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
FLUX = {**SD3, "block_out_channels": (8, 16, 24, 24), "scaling_factor": 0.3611, "shift_factor": 0.1159}
NO_ATTENTION = {**FLUX, "mid_block_add_attention": False, "block_out_channels": (8, 16)}
FULL_WIDTH = {**SD3, "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}
ARCHITECTURES = {"sd1": SD1, "sdxl": SDXL, "sd3": SD3, "flux": FLUX, "no_attention": NO_ATTENTION}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def reference(architecture):
    """Returns diffusers' model with random weights; norms and biases too, whose ones and zeros hide mistakes."""
    num_blocks = len(architecture["block_out_channels"])
    torch.manual_seed(0)
    model = DiffusersAutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * num_blocks,
        up_block_types=["UpDecoderBlock2D"] * num_blocks,
        **architecture,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """diffusers' model and the folder that it saved."""
    model = reference(ARCHITECTURES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def sd1_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1_folder") / "vae"
    reference(SD1).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sd1_folder, tmp_path):
    """A copy of an SD 1.x-type folder that a test may damage."""
    return shutil.copytree(sd1_folder, tmp_path / "vae")


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


def assert_same_bits(actual, expected):
    assert flat(actual).keys() == flat(expected).keys()
    for name, value in flat(expected).items():
        assert flat(actual)[name].dtype == np.float32
        np.testing.assert_array_equal(flat(actual)[name], value, err_msg=name)


def run(config, params, array, method, dtype=jnp.float32):
    """Runs a method of `AutoencoderKL` under jit, which is many times faster than op by op."""
    vae = AutoencoderKL(config, dtype=dtype)
    return jax.jit(lambda params, array: vae.apply({"params": params}, array, method=method))(params, array)


def close(actual, expected):
    """Asserts that values agree to 1e-4 of the largest one."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def random_images(height, width, batch=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def check_parity(model, folder):
    config, params = load_vae(folder)
    rows, columns = 3, 5  # odd, and not square
    factor = config.downsampling_factor
    images = random_images(rows * factor, columns * factor)
    latents = np.random.default_rng(1).normal(size=(2, rows, columns, config.latent_channels)).astype(np.float32)
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = model.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample
    posterior = run(config, params, images, "encode")
    assert posterior.mean.shape == latents.shape
    close(posterior.mean, expected.mean.permute(0, 2, 3, 1))
    close(posterior.logvar, expected.logvar.permute(0, 2, 3, 1))
    close(posterior.kl(), expected.kl())
    close(run(config, params, latents, "decode"), decoded.permute(0, 2, 3, 1))


def test_moments_and_images_match_diffusers(saved):
    check_parity(*saved)


@pytest.mark.slow
def test_an_autoencoder_of_full_width_matches_diffusers_and_comes_back_bit_for_bit(tmp_path):
    model = reference(FULL_WIDTH)
    model.save_pretrained(tmp_path / "theirs")
    check_parity(model, tmp_path / "theirs")
    config, params = load_vae(tmp_path / "theirs")
    save_vae(tmp_path / "ours", config, params)
    again = DiffusersAutoencoderKL.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 5, 3, 4)])
def test_fused_upsampling_and_convolution_match_the_unfused_ones_and_their_gradient(shape, dtype):
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=(3, 3, shape[-1], 5)) / 6)

    def apart(x, kernel):
        enlarged = jax.image.resize(x.astype(jnp.float32), (shape[0], 2 * shape[1], 2 * shape[2], shape[3]), "nearest")
        return jax.lax.conv_general_dilated(
            enlarged, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )

    tolerance = {"rtol": 0, "atol": 2e-5 if dtype == jnp.float32 else 0.06}
    made = upsample_and_convolve(x, kernel)
    assert made.dtype == dtype
    np.testing.assert_allclose(np.asarray(made, np.float32), apart(x, kernel), **tolerance)
    weights = rng.normal(size=made.shape)
    gradients = [
        jax.grad(lambda x, kernel, way=way: jnp.sum(way(x, kernel) * weights), argnums=(0, 1))(x, kernel)
        for way in (upsample_and_convolve, apart)
    ]
    for got, expected in zip(*gradients, strict=True):
        assert got.dtype == expected.dtype
        got, expected = (np.asarray(value, np.float32) for value in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance["atol"] * np.abs(expected).max())


def test_config_holds_what_diffusers_wrote(saved):
    model, folder = saved
    config, _ = load_vae(folder)
    for name in ("scaling_factor", "shift_factor", "latent_channels", "use_quant_conv", "norm_num_groups"):
        assert getattr(config, name) == model.config[name]
    assert config.block_out_channels == tuple(model.config.block_out_channels)


def test_round_trip_is_bit_exact_and_diffusers_loads_it(saved, tmp_path):
    model, folder = saved
    config, params = load_vae(folder)
    save_vae(tmp_path / "new" / "vae", config, params)
    config_again, params_again = load_vae(tmp_path / "new" / "vae")
    assert config_again == config
    assert_same_bits(params_again, params)
    theirs = DiffusersAutoencoderKL.from_pretrained(tmp_path / "new" / "vae")
    for name, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["vae"]


def test_parameters_are_boxed_with_their_logical_axes_and_save_as_they_are(tmp_path):
    config = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, latents_mean=(0.5,) * 4, latents_std=(2,) * 4)
    shapes = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes["params"])
    boxed = flat(params)
    assert boxed["encoder/conv_in/kernel"].names == (None, None, "conv_in", "conv_out")
    assert boxed["decoder/mid_block/attentions_0/to_q/kernel"].names == ("conv_in", "conv_out")
    assert {value.names for value in boxed.values() if value.value.ndim == 1} == {("norm",)}
    save_vae(tmp_path / "vae", config, params)
    config_again, params_again = load_vae(tmp_path / "vae")
    assert config_again == config
    assert_same_bits(params_again, nn.meta.unbox(params))


def test_shards_load_as_one_file_does(sd1_folder, tmp_path):
    DiffusersAutoencoderKL.from_pretrained(sd1_folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / WEIGHTS).exists()
    assert_same_bits(load_vae(tmp_path)[1], load_vae(sd1_folder)[1])


def test_old_attention_names_load(folder):
    _, expected = load_vae(folder)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if ".attentions." in name]:
        for new, old in OLD_ATTENTION_NAMES.items():
            if f".{new}." in name:
                tensors[name.replace(new, old)] = tensors.pop(name)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, folder / WEIGHTS)
    assert_same_bits(load_vae(folder)[1], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_float32(sd1_folder, tmp_path, dtype):
    model = DiffusersAutoencoderKL.from_pretrained(sd1_folder).to(dtype)
    model.save_pretrained(tmp_path)
    _, params = load_vae(tmp_path)
    kernel = model.encoder.conv_in.weight.float().detach().permute(2, 3, 1, 0).numpy()
    np.testing.assert_array_equal(params["encoder"]["conv_in"]["kernel"], kernel)


def test_bfloat16_is_close_to_float32(sd1_folder):
    config, params = load_vae(sd1_folder)
    images = random_images(16, 16)
    exact, rounded = (run(config, params, images, "encode", dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.mean.dtype == rounded.logvar.dtype == jnp.float32
    assert 0 < jnp.abs(rounded.mean - exact.mean).max() < 0.02 * jnp.abs(exact.mean).max()
    assert 0 < jnp.abs(rounded.logvar - exact.logvar).max() < 0.02 * jnp.abs(exact.logvar).max()
    latents = exact.mode()
    exact, rounded = (run(config, params, latents, "decode", dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert 0 < jnp.abs(rounded - exact).max() < 0.03 * jnp.abs(exact).max()


def test_group_norm_keeps_the_variance_of_a_group_with_a_large_mean():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)) + 3000.0
    x = x.astype(np.float32).astype(np.float64)
    groups = x.reshape(2, 16, 3, 2)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    normalised, _ = GroupNorm(num_groups=3).init_with_output(jax.random.key(0), x.astype(np.float32))
    np.testing.assert_allclose(normalised, expected, atol=2e-3)


def test_mean_of_samples_approaches_the_mode_and_their_spread_the_logvar():
    mean = np.random.default_rng(0).normal(size=(1, 3, 5, 4)).astype(np.float32)
    moments = np.concatenate([mean, np.full_like(mean, 2 * np.log(0.5))], axis=-1)
    posterior = DiagonalGaussian.from_moments(jnp.asarray(np.repeat(moments, 2000, axis=0)))
    samples = np.asarray(posterior.sample(jax.random.key(0)))
    np.testing.assert_array_equal(posterior.mode()[:1], mean)
    np.testing.assert_allclose(samples.mean(0), mean[0], atol=0.06)
    np.testing.assert_allclose(samples.std(0), 0.5, atol=0.05)


def test_log_variance_is_clipped_and_kl_is_zero_for_the_standard_normal_alone():
    moments = jnp.asarray([[[[0.0, 1.0, 99.0, -99.0]]]])
    np.testing.assert_array_equal(DiagonalGaussian.from_moments(moments).logvar[0, 0, 0], [20.0, -30.0])
    standard = DiagonalGaussian.from_moments(jnp.zeros((3, 2, 2, 8)))
    np.testing.assert_array_equal(standard.kl(), np.zeros(3))
    assert (DiagonalGaussian(standard.mean + 0.1, standard.logvar).kl() > 0).all()


def test_gradient_of_the_loss_is_finite_and_reaches_every_parameter(tmp_path):
    # Groups of two channels: GroupNorm of single channels would cancel the biases before it, with a gradient of 0.
    reference({**SD1, "block_out_channels": (8, 16), "norm_num_groups": 4}).save_pretrained(tmp_path)
    config, params = load_vae(tmp_path)
    images = random_images(4, 6)

    def loss(params):
        reconstruction, posterior = AutoencoderKL(config).apply({"params": params}, images, jax.random.key(0))
        return reconstruction_loss(reconstruction, images) + 1e-3 * kl_loss(posterior, images)

    gradients = flat(jax.jit(jax.grad(loss))(params))
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all(), name
        # The bias of keys adds the same value to all scores of a query, which softmax ignores.
        assert name.endswith("to_k/bias") or jnp.abs(gradient).max() > 1e-8, name


@pytest.mark.parametrize(
    ("stated", "shift", "scale"),
    [
        ({"scaling_factor": 0.18215}, 0, 0.18215),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 0.3611),
        (
            {"scaling_factor": 0.5, "latents_mean": (0.0, 1.0, 2.0, 3.0), "latents_std": (2.0, 1.0, 0.5, 4.0)},
            np.arange(4.0),
            0.5 / np.array([2.0, 1.0, 0.5, 4.0]),
        ),
    ],
)
def test_model_latents_are_shifted_then_scaled_and_come_back(stated, shift, scale):
    config = VAEConfig(**stated)
    latents = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    scaled = to_model_latents(jnp.asarray(latents), config)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, (latents - shift) * scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(from_model_latents(scaled, config), latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "advice"), [(30, 36, "use 28x36 or 32x36"), (32, 33, "use 32x32 or 32x36"), (3, 8, "use 4x8")]
)
def test_a_side_that_the_factor_does_not_divide_is_rejected_with_sizes_that_work(height, width, advice):
    config = VAEConfig(block_out_channels=(8, 8, 8), norm_num_groups=4)
    with pytest.raises(UserError) as error:
        jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), jnp.zeros((1, height, width, 3)))
    assert str(error.value).endswith(advice)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_wrong_number_of_channels_is_rejected(sd1_folder, method):
    config, params = load_vae(sd1_folder)
    with pytest.raises(UserError, match=r"have 5 channels, the autoencoder expects \d"):
        run(config, params, jnp.zeros((1, 8, 8, 5)), method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "only 'AutoencoderKL'"),
        ({"_class_name": None}, "only 'AutoencoderKL'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [8] * 99}, "block_out_channels"),
        ({"block_out_channels": [10, 16, 16]}, "multiples of norm_num_groups"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"latent_channels": "4"}, "latent_channels"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"use_quant_conv": 1}, "use_quant_conv"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": -1e-30}, "scaling_factor is -1e-30; it must be at least 1e-06 in magnitude"),
        ({"scaling_factor": 1e-320}, "scaling_factor"),
        ({"shift_factor": [1]}, "shift_factor"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"latents_std": [1.0, 1.0, 1.0, 0.0]}, "latents_std"),
        ({"latents_std": [1.0, 1.0, 1.0, 1e-30]}, "latents_std"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean is \(0.0, .* and latents_std is None; give both or neither"),
        ({"latents_std": [1.0] * 4}, r"latents_mean is None and latents_std is \(1.0, .*; give both or neither"),
        ({"sample_size": -1}, "sample_size"),
    ],
)
def test_an_unsupported_config_is_rejected_by_name(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_vae(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff\xfe", b"null"])
def test_a_damaged_config_file_is_a_user_error(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError):
        load_vae(folder)


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_damaged_weights_are_rejected_by_tensor_name(folder):
    name = "decoder.up_blocks.1.resnets.0.conv1.bias"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(UserError, match=f"{name} has shape"):
        load_vae(folder)
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros(32, np.int32)}))
    with pytest.raises(UserError, match=f"{name} has type I32"):
        load_vae(folder)
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_vae(folder)


@pytest.mark.parametrize("value", [np.float32(np.nan), np.float32(-np.inf), np.float64(1e300)])
def test_weights_that_are_not_finite_in_float32_are_rejected(folder, value):
    name = "decoder.up_blocks.1.resnets.0.conv1.bias"
    rewrite(folder, lambda tensors: tensors.update({name: np.full_like(tensors[name], value, value.dtype)}))
    with pytest.raises(UserError, match=f"tensor {name} has values that are not finite"):
        load_vae(folder)


def test_a_tensor_that_is_not_in_the_config_is_rejected(folder):
    rewrite(folder, lambda tensors: tensors.update({"training_step": np.zeros(1, np.float32)}))
    load_vae(folder)
    rewrite(folder, lambda tensors: tensors.update({"encoder.extra.bias": np.zeros(1, np.float32)}))
    with pytest.raises(UserError, match=r"encoder\.extra\.bias' is not part of"):
        load_vae(folder)


def test_missing_truncated_and_pickled_files_are_rejected(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_vae(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"has neither {WEIGHTS} nor"):
        load_vae(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(whole)
    with pytest.raises(UserError, match="is a pickle"):
        load_vae(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_vae(folder)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_vae(folder / "nowhere")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"encoder.conv_in.weight": "../vae/stolen.safetensors"}}, "not the name"),
        ({"weight_map": {"encoder.conv_in.weight": 3}}, "not the name"),
        ({"weight_map": {"encoder.conv_in.weight": "absent.safetensors"}}, "tensor .* is missing"),
        ({"weight_map": []}, "no weight_map"),
        ([], "not a JSON object"),
    ],
)
def test_a_damaged_shard_index_is_rejected(folder, index, message):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        load_vae(folder)


def test_an_index_that_names_an_absent_or_wrong_shard_is_rejected(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    with pytest.raises(UserError, match="a.safetensors is missing"):
        load_vae(folder)
    save_file({"other": np.zeros(1, np.float32)}, folder / "a.safetensors")
    with pytest.raises(UserError, match=r"tensor .* is missing, although the index lists it"):
        load_vae(folder)


def test_saving_does_not_touch_a_folder_with_files(sd1_folder, tmp_path):
    config, params = load_vae(sd1_folder)
    (tmp_path / "vae").mkdir()
    save_vae(tmp_path / "vae", config, params)
    before = (tmp_path / "vae" / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="not an empty folder"):
        save_vae(tmp_path / "vae", config, params)
    assert (tmp_path / "vae" / WEIGHTS).read_bytes() == before


def test_saving_rejects_parameters_that_do_not_fit_the_config_and_writes_nothing(sd1_folder, tmp_path):
    config, params = load_vae(sd1_folder)
    wrong = jax.tree.map(np.asarray, params)
    wrong["encoder"]["conv_in"]["bias"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="encoder/conv_in/bias has shape"):
        save_vae(tmp_path / "vae", config, wrong)
    del wrong["encoder"]["conv_in"]["bias"]
    with pytest.raises(UserError, match="lack encoder/conv_in/bias"):
        save_vae(tmp_path / "vae", config, wrong)
    with pytest.raises(UserError, match="config does not have"):
        save_vae(tmp_path / "vae", config, {**params, "extra": {"bias": np.zeros(3, np.float32)}})
    assert list(tmp_path.iterdir()) == []
