"""Tests the evaluation of the autoencoder, and complete runs of configs/vae.py."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_config
from etils import epath
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.images import to_float
from lidit_jax.models.image_similarity import psnr, ssim
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.preview.contact_sheet import draw_contact_sheet
from lidit_jax.sample.generate import Request, sample_to_folder
from lidit_jax.stages.reconstruction import Autoencoding, LatentMoments, LatentStatistics
from lidit_jax.stages.run import run_stages
from lidit_jax.weights.diffusers_vae import load_vae, save_vae
from lidit_jax.weights.digest import folder_digest

CONFIG = VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, mid_block_add_attention=False)
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


def images(height=32, width=32, batch=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


# --- metrics ----------------------------------------------------------------------------------------------------


def test_psnr_is_per_image_with_a_peak_of_two_and_clips():
    images = jnp.ones((3, 4, 4, 3))
    reconstruction = jnp.stack([images[0] - 0.2, images[1] + 5.0, images[2] - 2.0])
    np.testing.assert_allclose(psnr(reconstruction, images), [20.0, 10 * np.log10(4 / 1e-10), 0.0], atol=1e-3)


def numpy_ssim(first, second):
    """Computes SSIM of one channel with values in [0, 1] (Wang et al. 2004, equation 13)."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def filtered(x):
        return np.sum(np.lib.stride_tricks.sliding_window_view(x, (11, 11)) * window, axis=(2, 3))

    mean = filtered(first), filtered(second)
    variance = filtered(first**2) - mean[0] ** 2, filtered(second**2) - mean[1] ** 2
    covariance = filtered(first * second) - mean[0] * mean[1]
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean[0] * mean[1] + c1) * (2 * covariance + c2)
    return np.mean(similarity / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (variance[0] + variance[1] + c2)))


def test_ssim_matches_its_definition():
    first = images(20, 24)
    second = np.clip(first + 0.3 * images(20, 24, seed=1), -1, 1)
    got = ssim(second, first)
    for row in range(2):
        channels = [numpy_ssim(*(image[row, ..., c] * 0.5 + 0.5 for image in (first, second))) for c in range(3)]
        assert got[row] == pytest.approx(np.mean(channels), abs=1e-4)
    np.testing.assert_allclose(ssim(first, first), 1.0, atol=1e-5)
    np.testing.assert_allclose(ssim(images(8, 4), images(8, 4)), [1, 1], atol=1e-5)  # smaller than the window


def test_latent_statistics_match_numpy_over_batches_of_different_sizes():
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


def test_reconstructions_of_any_number_and_size_have_the_same_scores_on_one_device_and_eight():
    model = AutoencoderKL(CONFIG)
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(16, 16)] * 5 + [(16, 20)] * 3]
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method=AutoencoderKL.encode))
    posteriors = [encode(params, to_float(jnp.asarray(image[None]))) for image in given]
    samples = [jax.vmap(p.sample)(jax.random.split(jax.random.key(i), 50)) for i, p in enumerate(posteriors)]
    drawn = np.concatenate([np.asarray(s).reshape(-1, 4) for s in samples])
    results = []
    for sizes in (ONE_DEVICE, {"data": 2, "fsdp": 4, "tensor": 1}):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        results.append(Autoencoding(model, mesh, ShardingRules()).reconstruct(params, given, 3))
    for scores, back, latents in results:
        decoded, _ = model.apply({"params": params}, to_float(jnp.asarray(given[6][None])))
        np.testing.assert_allclose(back[6], np.clip(np.round(decoded[0] * 127.5 + 127.5), 0, 255), atol=1)
        assert scores["psnr"][6] == pytest.approx(float(psnr(decoded, given[6] / 127.5 - 1)[0]), rel=1e-4)
        assert scores["ssim"][6] == pytest.approx(float(ssim(decoded, given[6][None] / 127.5 - 1)[0]), abs=1e-4)
        np.testing.assert_allclose(latents.mean, drawn.mean(0), atol=0.02)
        np.testing.assert_allclose(latents.deviation, drawn.std(0), atol=0.02)
    np.testing.assert_allclose(results[0][0]["psnr"], results[1][0]["psnr"], rtol=1e-4)
    np.testing.assert_allclose(results[0][2].mean, results[1][2].mean, atol=1e-5)


# --- complete runs of configs/vae.py ----------------------------------------------------------------------------


def tiny_vae_config(**changes):
    config = load_config("vae")
    config.data.update(source="shapes", path="", held_out_shards=0, resolution=32)
    config.vae.model.update(block_out_channels=(8, 8), norm_num_groups=4)
    config.vae.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, sample_every=2, warmup_steps=0)
    config.vae.evaluate.update(num_images=9, batch_size=4, sheet=4)
    config.vae.update(changes)
    return config


def test_a_vae_run_trains_evaluates_and_exports_a_vae_that_diffusers_loads(tmp_path, caplog):
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL

    workdir = epath.Path(tmp_path / "run")
    caplog.set_level("INFO", logger="lidit_jax")
    run_stages(tiny_vae_config(), workdir)
    assert "without the perceptual loss (vae.perceptual.weights is empty)" in caplog.text
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
    run_stages(tiny_vae_config(), workdir)  # the run is complete
    assert Path(workdir / "reconstruction.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is the run of a VAE alone, without a LI-DiT to sample from"):
        sample_to_folder(Request(workdir, epath.Path(tmp_path / "out"), prompt="x"))

    given = tiny_vae_config(weights=str(workdir / "vae"))
    run_stages(given, epath.Path(tmp_path / "judged"))
    judged = json.loads((tmp_path / "judged/reconstruction.json").read_text())
    assert judged["psnr"] == pytest.approx(scores["psnr"], rel=1e-3)
    assert not (tmp_path / "judged/vae").exists()

    # Other images, or another VAE in the same workdir, are evaluated again.
    given.vae.evaluate.num_images = 5
    run_stages(given, epath.Path(tmp_path / "judged"))
    assert json.loads((tmp_path / "judged/reconstruction.json").read_text())["images"] == 5
    longer = tiny_vae_config()
    longer.vae.train.steps = 4
    run_stages(longer, workdir)
    assert json.loads((workdir / "reconstruction.json").read_text())["psnr"] != scores["psnr"]
    run_stages(given, epath.Path(tmp_path / "judged"))
    assert json.loads((tmp_path / "judged/reconstruction.json").read_text())["vae"] == folder_digest(workdir / "vae")


@pytest.mark.slow
def test_a_run_with_every_loss_resumes_to_the_same_weights(tmp_path, lpips_file):
    def config(steps):
        made = tiny_vae_config()
        made.data.resolution = 24
        with made.unlocked():
            made.vae.perceptual = {"weights": str(lpips_file)}
            made.vae.adversarial = {"weight": 0.5, "start": 1, "width": 4}
        made.vae.train.update(steps=steps, sample_every=0, schedule="constant")
        return made

    run_stages(config(3), epath.Path(tmp_path / "whole"))
    run_stages(config(2), epath.Path(tmp_path / "parts"))
    (tmp_path / "parts/vae").rename(tmp_path / "unfinished")
    (tmp_path / "parts/reconstruction.json").unlink()
    run_stages(config(3), epath.Path(tmp_path / "parts"))
    whole, parts = (load_vae(tmp_path / name / "vae")[1] for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    [*_, last] = (tmp_path / "whole/training/vae/metrics.jsonl").read_text().splitlines()
    assert {"perceptual", "hinge", "adaptive_weight", "grad_norm/discriminator"} <= json.loads(last).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.vae.update(reconstruction="l3"), r"vae\.reconstruction='l3' is unknown: use one of l1, l2"),
        (
            lambda c: c.vae.update(adversarial={"weight": -1.0}),
            r"vae\.adversarial\.weight=-1.0 must be from 0 to 1000000",
        ),
        (lambda c: c.vae.update(kl_weight=float("nan")), r"vae\.kl_weight=nan must be a finite number"),
        (
            lambda c: c.vae.update(adversarial={"width": 10**8}),
            r"vae\.adversarial\.width=100000000 must be from 1 to 1024",
        ),
        (
            lambda c: c.vae.update(adversarial={"layers": "3"}),
            r"vae\.adversarial\.layers is '3': it must be of type int",
        ),
        (lambda c: c.data.update(resolution=None), r"data\.resolution is None: it must be of type int"),
        (lambda c: c.vae.model.update(out_channels=1), "gives 1 channels: images have 3"),
        (
            lambda c: c.vae.model.update(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16),
            "leave out latents_mean and latents_std",
        ),
        (
            lambda c: c.vae.update(adversarial={"wieght": 1.0}),
            r"vae\.adversarial\.wieght is unknown; did you mean 'weight'",
        ),
        (lambda c: c.vae.train.update(steps=0), r"^vae\.train\.steps=0 must be at least 1"),
        (lambda c: c.vae.evaluate.update(num_images=0), r"vae\.evaluate\.num_images=0 must be at least 1"),
        (lambda c: c.vae.update(perceptual={"weights": "/nowhere.safetensors"}), "nowhere.safetensors is missing"),
        (lambda c: c.data.update(resolution=1), "resolution=1 is not a multiple of 2: use 2"),
        (
            lambda c: c.data.update(held_out_shards=1),
            r"unless data\.source='tar' or 'parquet': give .*held_out_shards=0",
        ),
        (
            lambda c: c.vae.update(adversarial={"weight": 1.0, "layers": 4}),
            "sides of 48 pixels, some have 32: raise data",
        ),
        (lambda c: c.update(sample={"sampler": "euler"}), "config key text is missing"),
    ],
)
def test_an_invalid_vae_config_is_rejected_before_anything_is_written(tmp_path, change, message):
    config = tiny_vae_config()
    with config.unlocked(), config.ignore_type():
        change(config)
    with pytest.raises(UserError, match=message):
        run_stages(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_vae_without_weights_or_a_recipe_is_rejected(tmp_path):
    config = tiny_vae_config()
    with config.unlocked():
        del config.vae.model
    with pytest.raises(UserError, match=r"give --config\.vae\.weights=FOLDER"):
        run_stages(config, epath.Path(tmp_path / "run"))


@pytest.mark.skipif(not (ROOT.parent / "shared/data/fxemoji").is_dir(), reason="needs ../shared/data/fxemoji")
def test_the_last_shard_is_held_out_from_training_and_the_previewed_config_is_the_vaes(tmp_path):
    from lidit_jax.data.data_config import DataConfig
    from lidit_jax.data.open_dataset import open_dataset

    assert load_config("vae").data.source == "shapes"
    config = load_config("vae", str(ROOT.parent / "shared/data/fxemoji"))
    assert config.data.held_out_shards == 1
    config.data.index_dir = str(tmp_path)
    data = DataConfig(**config.data.to_dict())
    training, held_out = open_dataset(data, 8), open_dataset(data, 8, held_out=True)
    keys = [{one["key"] for one in d.source.describe(range(len(d.source)))} for d in (training, held_out)]
    assert [len(of) for of in keys] == [696, 232]
    assert not keys[0] & keys[1]
    assert training.fingerprint != held_out.fingerprint
    with pytest.raises(UserError, match="has 4 shards, too few to hold some out: lower --config.data.held"):
        open_dataset(dataclasses.replace(data, held_out_shards=4), 8)
    assert len(held_out.images(7)) == 7
    config.vae.weights = ""
    draw_contact_sheet(config, epath.Path(tmp_path / "sheet.png"), 8)
    assert Image.open(tmp_path / "sheet.png").size[0] > 8 * 64


def test_a_folder_that_is_no_autoencoder_is_rejected(tmp_path):
    config = tiny_vae_config(weights=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        run_stages(config, epath.Path(tmp_path / "run"))
    params = nn.unbox(AutoencoderKL(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"])
    save_vae(tmp_path / "vae", CONFIG, params)
    values = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(values | {"_class_name": "AutoencoderDC"}))
    with pytest.raises(UserError, match="only 'AutoencoderKL' is supported"):
        run_stages(tiny_vae_config(weights=str(tmp_path / "vae")), epath.Path(tmp_path / "run"))
    idle = tiny_vae_config(weights=str(tmp_path / "vae"))
    with idle.unlocked():
        del idle.vae.evaluate
    with pytest.raises(UserError, match="so there is nothing to do: add vae.evaluate"):
        run_stages(idle, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
