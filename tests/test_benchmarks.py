"""Tests the contest of benchmarks and runs each command: the contestants' outputs must agree."""

import os
import re
import subprocess
import sys
from functools import partial

import diffusers
import numpy as np
import pytest
import transformers
from conftest import ROOT

from lidit_jax.benchmarks.contest import Contestant, contest, largest_difference
from lidit_jax.errors import UserError


def doubler(seconds, value):
    import time

    def work():
        time.sleep(seconds)
        return 2 * np.asarray(value, np.float32)

    return work


def failing():
    raise ValueError("no\nroom")


def test_contestants_work_once_a_round_and_their_outputs_are_compared():
    fast, slow = Contestant("fast", partial(doubler, 0.01, [1, 2])), Contestant("slow", partial(doubler, 0.1, [1, 2.5]))
    results = contest([fast, slow], rounds=3)
    assert [result.name for result in results] == ["fast", "slow"]
    assert all(len(result.seconds) == 3 for result in results)
    assert results[0].median >= 0.01 and results[1].median >= 0.1  # the work itself is timed
    assert all(result.peak_bytes > 10 << 20 for result in results)
    assert largest_difference(results) == pytest.approx(0.25)
    assert largest_difference(results[:1]) == 0.0


def test_a_contestant_that_fails_ends_the_contest_in_one_line():
    with pytest.raises(UserError, match="^broken: ValueError: no room$"):
        contest([Contestant("broken", failing)], rounds=1)


def run(name, *arguments):
    command = [sys.executable, "-m", f"lidit_jax.benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)


@pytest.mark.slow
def test_the_encode_benchmark_compares_four_ways_that_agree(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=1, **sizes)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    done = run("encode", f"--weights={tmp_path}", "--rounds=1", "--batch=2", "--prefix=8", "--prompt=8")
    assert done.returncode == 0, done.stderr
    for way in ("plain", "shared prefix", "transformers", "transformers compiled"):
        assert re.search(rf"^{way} +[\d.]+ +[\d.e+]+ +[\d.]+ +\d+$", done.stdout, re.MULTILINE), done.stdout
    [difference] = re.findall(r"largest difference from plain: (\S+) of", done.stdout)
    assert float(difference) < 1e-5


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    diffusers.AutoencoderKL(block_out_channels=(32, 32, 64, 64), latent_channels=4, **blocks).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_vae_benchmark_compares_ways_that_agree(vae_folder):
    done = run("vae", f"--weights={vae_folder}", "--rounds=1", "--size=32")
    assert done.returncode == 0, done.stderr
    for way in ("lidit_jax", "diffusers", "diffusers compiled"):
        lines = re.findall(rf"^{way} +[\d.]+ +[\d.e+]+ +[\d.]+ +\d+$", done.stdout, re.MULTILINE)
        assert len(lines) == 2, done.stdout
    differences = [float(value) for value in re.findall(r"largest difference (\S+) of", done.stdout)]
    assert len(differences) == 4 and max(differences) < 1e-4


@pytest.mark.slow
def test_the_vae_benchmark_with_tiles_shows_that_ours_equals_decoding_at_once(vae_folder):
    done = run("vae", f"--weights={vae_folder}", "--rounds=1", "--size=64", "--tile=32")
    assert done.returncode == 0, done.stderr
    differences = dict(re.findall(r"^(.+): largest difference (\S+) of", done.stdout, re.MULTILINE))
    assert float(differences["lidit_jax in tiles"]) < 1e-4
    assert float(differences["diffusers in tiles"]) > 1e-3


@pytest.mark.slow
def test_the_startup_benchmark_times_each_program_cold_and_from_the_cache():
    small = ("--config=configs/shapes.py", "--config.model.depth=1", "--config.model.refiner_blocks=1")
    done = run("startup", *small, "--config.vae.model.block_out_channels=(8,8,8,8)")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w.*?) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in found] == ["initialisation", "initialisation by Flax", "training step"]
    for _, tracing, compiling, from_cache in found:
        assert float(tracing) > 0 and 0 < float(from_cache) < float(compiling)


@pytest.mark.slow
def test_the_memory_benchmark_shows_tiles_to_take_less():
    done = run("vae_memory", "--sizes=512", "--tiles=128")
    assert done.returncode == 0, done.stderr
    at_once, in_tiles = (int(number) for number in re.findall(r"^(?:at once|tiles of 128) +(\d+)$", done.stdout, re.M))
    assert in_tiles < at_once / 2
    done = run("vae_memory", "--sizes=100")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.slow
def test_the_data_benchmark_compares_the_loader_with_its_limit_and_webdataset():
    small = ("--rounds=1", "--num_images=16", "--samples=32")
    done = run("data", *small)
    assert done.returncode == 0, done.stderr
    for way in ("lidit_jax", "limit", "webdataset"):
        assert re.search(rf"^{way} +[\d.]+ +[\d.e+]+ +[\d.]+ +\d+$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^lidit_jax reaches \d+% of the limit$", done.stdout, re.MULTILINE)
    for arguments, status in ((["--memory=320"], 0), (["--shorter=100,x"], 2), (["--samples=33"], 2)):
        done = run("data", *small, *arguments)
        assert done.returncode == status, done.stderr
