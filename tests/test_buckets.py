import dataclasses
import json

import numpy as np
import pytest
from conftest import load_config
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from stored_data import data_of, write_tars

from lidit_jax.config import build, claim_workdir
from lidit_jax.data.buckets import Bucket, assign, make_buckets, resize_to_cover_and_crop
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError

# --- make_buckets -----------------------------------------------------------------------------------------------


@given(units=st.integers(1, 64), multiple=st.sampled_from([1, 8, 16, 64]), stretch=st.floats(0, 1))
@settings(derandomize=True)
def test_sides_are_multiples_and_no_bucket_can_be_larger(units, multiple, stretch):
    max_aspect = 1 + stretch * (min(units**2, 16) - 1)
    buckets = make_buckets(units * multiple, multiple, max_aspect)
    assert len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= max_aspect * min(height, width)
        assert height * width <= (units * multiple) ** 2 < min(height, width) * (max(height, width) + multiple)


def test_buckets_ascend_in_aspect_and_come_with_their_transpose():
    buckets = make_buckets(512, 64, 4.0)
    aspects = [bucket.width / bucket.height for bucket in buckets]
    assert aspects == sorted(aspects)
    assert len(buckets) == 9
    assert {Bucket(*reversed(bucket)) for bucket in buckets} == set(buckets)
    assert Bucket(512, 512) in buckets
    assert min(bucket.height * bucket.width for bucket in buckets) > 0.9 * 512**2


def test_aspect_one_is_the_square_alone():
    assert make_buckets(96, 16, 1) == (Bucket(96, 96),)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((100, 16), "resolution=100 is not a multiple of 16: use 96 or 112"),
        ((8, 16), "resolution=8 is not a multiple of 16: use 16"),
        ((0, 16), "at least 1"),
        ((32, 0), "at least 1"),
        ((32, 16, 0.5), "max_aspect=0.5 is below 1"),
        ((32, 16, float("nan")), "max_aspect=nan"),
        ((32, 16, 5), "needs a side under 16: use max_aspect=4 or less"),
    ],
)
def test_errors_for_impossible_buckets_suggest_valid_values(arguments, says):
    with pytest.raises(UserError, match=says):
        make_buckets(*arguments)


# --- data.bucket_multiple ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "finest", "configured"), [("1b", 9, 3), ("ablation", 9, 3), ("10b", 19, 5), ("10b_1024", 37, 9)]
)
def test_paper_configs_have_few_buckets_that_keep_the_area_and_the_square(name, finest, configured):
    config = load_config(name, *(["table2_baseline"] if name == "ablation" else []))
    data = build(DataConfig, {**config.data, "path": "shards"}, "data")
    buckets = data.buckets(16)
    assert len(buckets) == configured
    assert len(dataclasses.replace(data, bucket_multiple=0).buckets(16)) == finest
    assert Bucket(data.resolution, data.resolution) in buckets
    assert all(side % 64 == 0 for bucket in buckets for side in bucket)
    assert min(height * width for height, width in buckets) > 0.93 * data.resolution**2
    assert max(width / height for height, width in buckets) > 1.6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"bucket_multiple": 48},
            "data.bucket_multiple=48 does not work with data.resolution=256, data.max_aspect=2 and cells of 16 px: "
            r"use one of 16 \(9 buckets\), 32 \(5 buckets\), 64 \(3 buckets\), 128 \(1 bucket\)$",
        ),
        ({"bucket_multiple": 8}, "data.bucket_multiple=8 does not work"),
        ({"bucket_multiple": 256}, "data.bucket_multiple=256 does not work"),  # allows only the square
        ({"bucket_multiple": 64, "resolution": 250}, "resolution=250 is not a multiple of 16: use 240 or 256"),
    ],
)
def test_an_impossible_bucket_multiple_names_those_that_work(changes, says):
    data = build(DataConfig, {"source": "shapes", "resolution": 256, "max_aspect": 2.0, **changes}, "data")
    with pytest.raises(UserError, match=says):
        data.buckets(16)


@pytest.mark.parametrize("sequential", [False, True])
def test_without_a_bucket_multiple_the_fingerprint_is_that_of_earlier_versions(tmp_path, sequential):
    shards = write_tars(tmp_path / "tar")

    def fingerprint(**more) -> str:
        return open_dataset(data_of("tar", shards, sequential=sequential, resolution=64, **more), 8).fingerprint

    default = fingerprint()
    assert default.endswith(" in 80x48 72x56 64x64 56x72 48x80")  # the value before the field existed
    assert fingerprint(bucket_multiple=0) == fingerprint(bucket_multiple=8) == default
    assert fingerprint(bucket_multiple=16) == default.replace(" 72x56", "").replace(" 56x72", "")


def test_a_workdir_without_a_bucket_multiple_resumes_with_0_alone(tmp_path):
    config = load_config("1b")
    with config.unlocked():
        del config.data.bucket_multiple
    claim_workdir(epath.Path(tmp_path), config)
    before = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(
        UserError, match="data.bucket_multiple was 0, now 64; give --config.data.bucket_multiple=0 or use another"
    ):
        claim_workdir(epath.Path(tmp_path), load_config("1b"))
    assert json.loads((tmp_path / "config.json").read_text()) == before
    claim_workdir(epath.Path(tmp_path), config)
    config = load_config("1b")
    config.data.bucket_multiple = 0
    claim_workdir(epath.Path(tmp_path), config)


# --- assign -----------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=50),
    order=st.randoms(use_true_random=False),
)
@settings(derandomize=True)
def test_the_bucket_is_the_nearest_in_log_aspect_in_any_order_of_buckets(sizes, order):
    buckets = list(make_buckets(256, 32, 4.0))
    order.shuffle(buckets)
    chosen = assign(np.array(sizes, np.int32), buckets)
    wanted = np.log([width / height for height, width in sizes])[:, None]
    distances = np.abs(wanted - np.log([bucket.width / bucket.height for bucket in buckets]))
    np.testing.assert_allclose(distances[np.arange(len(sizes)), chosen], distances.min(axis=1), atol=1e-9)


# --- resize_to_cover_and_crop -----------------------------------------------------------------------------------


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    bucket=st.builds(Bucket, st.integers(1, 70), st.integers(1, 70)),
)
@settings(derandomize=True)
def test_every_image_covers_its_bucket(height, width, bucket):
    color = np.array([10, 200, 77], np.uint8)
    image = np.broadcast_to(color, (height, width, 3)).copy()
    fitted = resize_to_cover_and_crop(image, bucket)
    assert fitted.shape == (*bucket, 3)
    assert (fitted == color).all()


@pytest.mark.parametrize("size", [(300, 300), (300, 433), (517, 300), (60, 41), (47, 130)])
@pytest.mark.parametrize("bucket", make_buckets(64, 16, 4.0))
def test_a_circle_stays_round_and_centred(size, bucket):
    height, width = size
    scale = max(bucket.height / height, bucket.width / width)
    radius = 0.4 * min(bucket) / scale
    # Drawn large and averaged: small circles drawn by Pillow are not symmetric.
    canvas = Image.new("L", (8 * width, 8 * height))
    center = np.array([width, height]) * 4
    ImageDraw.Draw(canvas).ellipse([*(center - 8 * radius), *(center + 8 * radius)], fill=255)
    image = np.array(canvas.reduce(8).convert("RGB"))
    mass = resize_to_cover_and_crop(image, bucket)[..., 0].astype(float)
    rows, columns = mass.sum(axis=1), mass.sum(axis=0)
    for profile, side in ((rows, bucket.height), (columns, bucket.width)):
        places = np.arange(side) + 0.5
        mean = np.average(places, weights=profile)
        spread = np.sqrt(np.average((places - mean) ** 2, weights=profile))
        assert mean == pytest.approx(side / 2, abs=0.3)
        # The standard deviation of a disc along an axis is half its radius.
        assert spread == pytest.approx(0.2 * min(bucket), rel=0.05)


def test_an_image_of_the_buckets_size_is_untouched_and_a_longer_one_only_cropped():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    assert resize_to_cover_and_crop(image, Bucket(32, 48)) is image
    np.testing.assert_array_equal(resize_to_cover_and_crop(image, Bucket(32, 32)), image[:, 8:40])


def test_shrinking_averages_instead_of_skipping_pixels():
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    np.testing.assert_allclose(resize_to_cover_and_crop(stripes, Bucket(64, 64)), 127.5, atol=8)
