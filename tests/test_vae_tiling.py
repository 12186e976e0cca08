"""Compares decoding in tiles and slices with decoding at once."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from lidit_jax.data.buckets import Bucket, resize_to_cover_and_crop
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.indexed.index import IndexOptions
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.errors import UserError
from lidit_jax.images import to_float
from lidit_jax.models import vae_layers
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_layers import GroupStatistics
from lidit_jax.models.vae_tiling import (
    SMALLEST_TILE,
    Moments,
    _Stage,
    decode_in_tiles,
    decode_within,
    place_tiles,
    stage_reach,
)
from lidit_jax.pipeline import SampleConfig

EMOJI = ROOT.parent / "shared/data/fxemoji"
CONFIG = VAEConfig(
    block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, use_post_quant_conv=True
)


def random_params(config, seed=0):
    """Returns parameters as after training: scales and biases of norms are not one and zero."""
    side = config.downsampling_factor
    shapes = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, shape = path[-2].key, leaf.shape
        if name == "kernel":
            return rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))
        return (rng.normal(size=shape) * 0.2 + (name == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes))


@pytest.fixture(scope="module")
def model_and_params():
    return AutoencoderKL(CONFIG), random_params(CONFIG)


def uneven_latents(batch, height, width, seed=0):
    """Returns latents with different statistics in their halves, so that statistics of a tile would be wrong."""
    latents = np.random.default_rng(seed).normal(size=(batch, height, width, CONFIG.latent_channels))
    latents[:, :, width // 2 :] = 5 * latents[:, :, width // 2 :] + 2
    return latents.astype(np.float32)


def whole(model, params, latents):
    return jax.jit(lambda p, z: model.apply({"params": p}, z, method=AutoencoderKL.decode))(params, latents)


def grey_levels(tiled, expected):
    """Returns the largest difference of displayed values, in grey levels (1/255)."""
    shown = [np.clip(np.asarray(image), -1, 1) * 127.5 for image in (tiled, expected)]
    return np.abs(shown[0] - shown[1]).max()


@pytest.mark.parametrize(("height", "width", "tile"), [(21, 37, 36), (6, 40, 32)])
def test_tiles_match_decoding_at_once_up_to_rounding(model_and_params, height, width, tile):
    model, params = model_and_params
    latents = uneven_latents(2, height, width)
    expected = whole(model, params, latents)
    tiled = jax.jit(lambda p, z: decode_in_tiles(model, p, z, tile))(params, latents)
    assert tiled.shape == expected.shape == (2, 4 * height, 4 * width, 3)
    np.testing.assert_allclose(tiled, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    # A crop of the latents decoded by itself, with its own statistics, differs much more.
    alone = whole(model, params, latents[:, :, : width // 2])
    assert np.abs(alone[:, :, :width] - expected[:, :, :width]).max() > 0.1


@pytest.mark.parametrize("layers", [1, 2])
def test_a_position_depends_only_on_positions_within_the_reach(layers):
    """With fixed statistics, a change beyond the reach has no effect, and a change at the reach has one."""
    config = dataclasses.replace(CONFIG, layers_per_block=layers)
    params = random_params(config)
    stage = _Stage(AutoencoderKL(config), params, 1, last=True)

    def still(name, x, groups):
        return GroupStatistics(jnp.zeros((1, groups)), jnp.ones((1, groups)))

    reach, side = stage_reach(config), 24
    x = np.random.default_rng(0).normal(size=(1, side, side, 16)).astype(np.float32)
    run = jax.jit(lambda x: stage(x, still))
    before, middle = run(x), side // 2

    def changed(distance):
        other = x.copy()
        other[:, middle - distance] += 10.0
        return np.abs(run(other) - before)[:, 2 * middle : 2 * middle + 2].max()

    assert changed(reach + 1) == 0
    assert changed(reach) > 0


@given(st.integers(1, 300), st.integers(2, 80), st.integers(1, 33))
def test_interiors_of_tiles_cover_the_side_and_tiles_extend_beyond_them(side, spare, reach):
    length = 2 * reach + spare  # as `smallest_tile` ensures
    tiles = place_tiles(side, length, reach)
    assert tiles.length == min(side, length)
    parts = tiles.interiors + tiles.starts[:, None]
    np.testing.assert_array_equal(parts[1:, 0], parts[:-1, 1])
    assert parts[0, 0] == 0
    assert parts[-1, 1] == side
    for start, (first, stop) in zip(tiles.starts, parts, strict=True):
        assert 0 <= start <= first < stop <= start + tiles.length <= side
        assert start == 0 or first - start >= reach
        assert start + tiles.length == side or start + tiles.length - stop >= reach


def test_merged_moments_match_those_of_all_values_with_a_large_mean():
    values = np.random.default_rng(0).normal(size=1000) + 3000
    moments = [
        Moments(jnp.float32(part.size), jnp.float32(part.mean()), jnp.float32(part.var() * part.size))
        for part in np.split(values, [100, 350])
    ]
    merged = moments[0].merge(moments[1]).merge(moments[2]).statistics()
    assert merged.mean == pytest.approx(values.mean(), rel=1e-6)
    assert merged.variance == pytest.approx(values.var(), rel=1e-3)


def test_attention_over_many_positions_is_computed_in_chunks_of_queries(model_and_params, monkeypatch):
    model, params = model_and_params
    latents = uneven_latents(2, 5, 7)
    expected = whole(model, params, latents)
    monkeypatch.setattr(vae_layers, "MAX_SCORES", 8 * 35)
    np.testing.assert_allclose(whole(model, params, latents), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pixels_at_once", [1 << 20, 3 * 20 * 28, 20 * 28, 20 * 28 - 1])
def test_slices_and_tiles_match_decoding_the_batch_at_once(model_and_params, pixels_at_once):
    model, params = model_and_params
    latents = uneven_latents(4, 5, 7)
    decode = jax.jit(lambda p, z: decode_within(model, p, z, pixels_at_once=pixels_at_once, tile=32))
    text = decode.lower(params, latents).as_text()
    assert ("while" in text) == (pixels_at_once < 4 * 20 * 28)  # slices and tiles run in a loop
    expected = whole(model, params, latents)
    np.testing.assert_allclose(decode(params, latents), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_tiled_decoding_needs_a_fraction_of_the_memory():
    """Uses the memory analysis of the compiler; nothing is run."""
    config = VAEConfig(
        block_out_channels=(32, 64, 64, 64), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False
    )
    model = AutoencoderKL(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    latents = jax.ShapeDtypeStruct((1, 96, 96, 4), jnp.float32)

    def temporaries(decode):
        return jax.jit(decode).lower(params, latents).compile().memory_analysis().temp_size_in_bytes

    at_once = temporaries(lambda p, z: model.apply({"params": p}, z, method=AutoencoderKL.decode))
    in_tiles = temporaries(lambda p, z: decode_in_tiles(model, p, z, 128))
    assert in_tiles < at_once / 4


@pytest.mark.skipif(not EMOJI.is_dir(), reason="needs ../shared/data/fxemoji")
def test_tiles_of_real_images_have_no_seam(model_and_params, tmp_path):
    model, params = model_and_params
    shards = TarShards(EMOJI / "00003.tar")
    source = IndexedSource(shards, options=IndexOptions(str(tmp_path)))
    images = [resize_to_cover_and_crop(source[i]["image"], Bucket(64, 64)) for i in range(12)]
    collage = np.concatenate([np.concatenate(images[row : row + 4], axis=1) for row in (0, 4, 8)])
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method=AutoencoderKL.encode).mode())
    latents = encode(params, to_float(jnp.asarray(collage[None])))
    expected = whole(model, params, latents)
    tiled = jax.jit(lambda p, z: decode_in_tiles(model, p, z, 64))(params, latents)
    error = np.mean((np.clip(tiled, -1, 1) - np.clip(expected, -1, 1)) ** 2)
    assert 10 * np.log10(4 / error) > 80
    assert grey_levels(tiled, expected) < 0.1


def test_a_tile_that_is_smaller_than_its_overlap_is_rejected(model_and_params):
    model, params = model_and_params
    with pytest.raises(UserError, match=r"a tile of 16 pixels is too small .* use 32 or more"):
        decode_in_tiles(model, params, uneven_latents(1, 9, 9), 16)
    for name, value in (("decode_tile", SMALLEST_TILE - 1), ("decode_pixels", 0)):
        with pytest.raises(UserError, match=f"sample.{name}={value} must be at least"):
            SampleConfig("euler", **{name: value})


def test_an_autoencoder_without_upsampling_is_decoded_without_tiles():
    config = VAEConfig(block_out_channels=(8,), norm_num_groups=4)
    params = random_params(config)
    latents = np.random.default_rng(0).normal(size=(1, 40, 9, 4)).astype(np.float32)
    expected = whole(AutoencoderKL(config), params, latents)
    np.testing.assert_allclose(decode_in_tiles(AutoencoderKL(config), params, latents, 32), expected, atol=1e-5)
