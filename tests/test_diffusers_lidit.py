"""LI-DiT's folder for PyTorch: a bit-exact round trip, from a checkpoint too, in little memory."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import DELETED, ROOT, change_config
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file

from lidit_jax import checkpoint, checkpoint_weights
from lidit_jax.checkpoint import Checkpoints
from lidit_jax.checkpoint_weights import load_weights, open_weights
from lidit_jax.errors import UserError
from lidit_jax.models.lidit import LIDiT, TextFeatures
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.parallel.rules import ShardingRules, shardings
from lidit_jax.pytorch.transformer_lidit import LIDiTTransformer2DModel
from lidit_jax.weights.diffusers_lidit import FIELDS, load_lidit, read_lidit_config, save_lidit, torch_name
from lidit_jax.weights.safetensors_file import SafetensorsWriter

CONFIG = LIDiTConfig(depth=3, hidden_size=16, num_heads=2, latent_channels=3, refiner_blocks=1, dtype="float32")
WIDTHS = (24, 10)
STEM = "diffusion_pytorch_model"
FILE, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"


def abstract_params(config, text_widths):
    """Returns the shapes of LI-DiT's parameters, in Flax's boxes of logical axes, for these widths of LLM features."""
    batch = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    text = [TextFeatures(batch((2, w)), batch((1, 3, w)), jax.ShapeDtypeStruct((1, 3), bool)) for w in text_widths]
    arguments = batch((1, 4, 4, config.latent_channels)), batch((1,)), text
    return jax.eval_shape(LIDiT(config).init, jax.random.key(0), *arguments)["params"]


def random_leaves(config=CONFIG, text_widths=WIDTHS):
    """Returns {path: random float32 array} for every parameter of the model."""
    random = np.random.default_rng(0)
    flat = flax.traverse_util.flatten_dict(flax.linen.unbox(abstract_params(config, text_widths)))
    return {path: random.standard_normal(leaf.shape, np.float32) for path, leaf in flat.items()}


@pytest.fixture(scope="module")
def leaves():
    return random_leaves()


@pytest.fixture
def folder(leaves, tmp_path):
    """Folder with all weights in one file, for tests that modify it."""
    save_lidit(tmp_path / "transformer", CONFIG, leaves)
    return tmp_path / "transformer"


@pytest.fixture
def sharded(leaves, tmp_path):
    """Folder with weights in several shards, for tests that modify it."""
    save_lidit(tmp_path / "sharded", CONFIG, leaves, max_shard_bytes=20_000)
    return tmp_path / "sharded"


def assert_same(params, leaves):
    flat = flax.traverse_util.flatten_dict(params)
    assert flat.keys() == leaves.keys()
    for path, expected in leaves.items():
        assert flat[path].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(flat[path]), expected, err_msg="/".join(path))


# --- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text_widths"),
    [
        ({}, (24, 10)),
        ({"depth": 12, "refiner_gated": False, "patch_size": 1}, (8,)),
        ({"collaborative_blocks": 2, "mlp_ratio": 2.5, "refiner_blocks": 2}, (8, 6, 4)),
        ({"fusion": "concatenate", "refiner_causal": True, "refiner_rotary": False, "refiner_blocks": 0}, (8, 6)),
        ({"position": "conv", "refiner_qk_norm": True}, (8, 6)),
        ({"position": "sincos+rope", "position_grid": 32}, (8,)),
    ],
)
def test_saving_and_loading_is_bit_exact(changes, text_widths, tmp_path):
    config = dataclasses.replace(CONFIG, **changes)
    leaves = random_leaves(config, text_widths)
    save_lidit(tmp_path, config, leaves, max_shard_bytes=30_000)
    fields, found_widths, params = load_lidit(tmp_path)
    assert LIDiTConfig(**fields, dtype="float32") == config
    assert tuple(found_widths) == text_widths
    assert_same(params, leaves)


def test_parameters_are_sharded_over_a_mesh(folder, leaves):
    mesh = Mesh(np.array(jax.devices()).reshape(1, 4, 2), ("data", "fsdp", "tensor"))
    _, _, params = load_lidit(folder, mesh=mesh, rules=ShardingRules())
    assert_same(params, leaves)
    expected = shardings(abstract_params(CONFIG, WIDTHS), mesh, ShardingRules())
    assert jax.tree.map(lambda x: x.sharding, params) == expected
    assert params["dit"]["blocks"]["self_attention"]["query"]["kernel"].sharding.spec[1:] == ("fsdp", "tensor")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_diffusers_loads_a_saved_folder(leaves, tmp_path, max_shard_bytes):
    save_lidit(tmp_path, CONFIG, leaves, max_shard_bytes=max_shard_bytes)
    model, info = LIDiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    blocks = leaves["dit", "blocks", "feed_forward", "in", "kernel"]
    weight = model.dit.blocks[2].feed_forward.linear_in.weight
    np.testing.assert_array_equal(weight.detach().numpy(), blocks[2].T)
    conv = leaves["dit", "position_embedding", "conv_in", "kernel"]
    weight = model.dit.position_embedding.conv_in.weight.detach().numpy()
    np.testing.assert_array_equal(weight, conv.transpose(3, 2, 0, 1))


def test_a_folder_that_diffusers_saved_is_loaded(folder, leaves, tmp_path):
    model = LIDiTTransformer2DModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / INDEX).exists()
    fields, text_widths, params = load_lidit(tmp_path / "again")
    assert (LIDiTConfig(**fields, dtype="float32"), tuple(text_widths)) == (CONFIG, WIDTHS)
    assert_same(params, leaves)


def test_bfloat16_is_rounded_to_the_nearest_and_read_as_float32(leaves, tmp_path):
    save_lidit(tmp_path, CONFIG, leaves, dtype="bfloat16")
    assert {array.dtype for array in load_file(tmp_path / FILE).values()} == {np.dtype(ml_dtypes.bfloat16)}
    rounded = {path: torch.from_numpy(x).to(torch.bfloat16).float().numpy() for path, x in leaves.items()}
    assert_same(load_lidit(tmp_path)[2], rounded)
    with pytest.raises(UserError, match="'float16': use float32 or bfloat16"):
        save_lidit(tmp_path, CONFIG, leaves, dtype="float16")


# --- files -------------------------------------------------------------------------------------------------------


def test_shards_respect_the_size_limit_and_hold_blocks_in_order(sharded, leaves):
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in leaves.values())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    count = len(files)
    assert files == [f"{STEM}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    found = {name: file for file in files for name in load_file(sharded / file)}
    assert index["weight_map"] == found
    for file in files:
        tensors = load_file(sharded / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000


def test_blocks_are_sorted_by_number(tmp_path):
    config = dataclasses.replace(CONFIG, depth=11)
    save_lidit(tmp_path, config, random_leaves(config), max_shard_bytes=20_000)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    shards = [weight_map[f"dit.blocks.{block}.modulation.linear.weight"] for block in range(11)]
    assert shards == sorted(shards)


def test_the_same_leaves_give_the_same_bytes(sharded, leaves, tmp_path):
    written = []
    backwards = dict(reversed(leaves.items()))
    save_lidit(tmp_path / "other", CONFIG, backwards, max_shard_bytes=20_000, progress=written.append)
    files = sorted(path.name for path in sharded.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "other").iterdir())
    for name in files:
        assert (sharded / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert sum(written) == sum(leaf.nbytes for leaf in leaves.values())


def test_tensor_names_are_those_of_the_pytorch_model(leaves):
    assert torch_name(("dit", "blocks", "self_attention", "query", "kernel"), 3) == (
        "dit.blocks.3.self_attention.to_q.weight"
    )
    with torch.device("meta"):
        model = LIDiTTransformer2DModel(**{name: getattr(CONFIG, name) for name in FIELDS}, text_widths=WIDTHS)
    depth = range(CONFIG.depth)
    names = [torch_name(path, b) for path in leaves for b in (depth if path[:2] == ("dit", "blocks") else (None,))]
    assert len(names) == len(set(names))
    assert set(names) == set(model.state_dict())


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=6)


@settings(max_examples=50)
@given(SHAPES, st.sampled_from([np.float32, np.float16, np.float64, ml_dtypes.bfloat16]), st.randoms())
def test_the_safetensors_library_reads_what_the_writer_writes(tmp_path_factory, shapes, dtype, random):
    file = tmp_path_factory.mktemp("writer") / "file.safetensors"
    rng = np.random.default_rng(0)
    tensors = {f"tensor.{i}": rng.standard_normal(shape).astype(dtype) for i, shape in enumerate(shapes)}
    names = list(tensors)
    random.shuffle(names)
    with SafetensorsWriter(file, {name: x.shape for name, x in tensors.items()}, np.dtype(dtype)) as writer:
        for name in names:
            writer.write(name, np.asfortranarray(tensors[name]) if tensors[name].ndim else tensors[name])
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_the_writer_rejects_tensors_that_contradict_its_header(tmp_path):
    def write(**tensors):
        with SafetensorsWriter(tmp_path / "file", {"a": (2,), "b": (1,)}, np.dtype(np.float32)) as writer:
            for name, values in tensors.items():
                writer.write(name, values)

    with pytest.raises(ValueError, match="tensor b was not written"):
        write(a=np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"tensor a is float32 \(3,\), not float32 \(2,\)"):
        write(a=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="tensor a is float64"):
        write(a=np.zeros(2))


# --- errors ------------------------------------------------------------------------------------------------------


def test_parameters_of_another_model_are_not_written(leaves, tmp_path):
    path = ("dit", "output", "bias")
    with pytest.raises(UserError, match="lack dit/output/bias"):
        save_lidit(tmp_path, CONFIG, {key: value for key, value in leaves.items() if key != path})
    with pytest.raises(UserError, match="have dit/extra, which"):
        save_lidit(tmp_path, CONFIG, leaves | {("dit", "extra"): leaves[path]})
    with pytest.raises(UserError, match=r"dit/output/bias has shape \(3,\), its config requires \(12,\)"):
        save_lidit(tmp_path, CONFIG, leaves | {path: np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="text_condition/project_0"):
        save_lidit(tmp_path, CONFIG, {key: value for key, value in leaves.items() if key[0] == "dit"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "'SD3Transformer2DModel', not 'LIDiTTransformer2DModel'"),
        ({"_class_name": DELETED}, "_class_name is None"),
        ({"format_version": 3}, "format_version=3 is newer than 2, the newest supported"),
        ({"format_version": "1"}, "format_version='1' is not an integer"),
        ({"format_version": DELETED}, "format_version=None"),
        ({"positions": "2d"}, "key 'positions' is unknown"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"depth": DELETED}, "depth is missing"),
        ({"depth": 10**9}, "depth=1000000000 is not an integer from 1 to 1000"),
        ({"refiner_blocks": -1}, "refiner_blocks=-1"),
        ({"hidden_size": 1.5}, "hidden_size=1.5 is not a positive integer"),
        ({"hidden_size": 17}, "not divisible by model.num_heads=2"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4' is not a positive number"),
        ({"refiner_gated": 1}, "refiner_gated=1 is not true or false"),
        ({"fusion": []}, r"fusion=\[\] is unknown"),
        ({"position": 2}, "position=2 is not a string"),
        ({"position": "table"}, "model.position='table' is unknown"),
        ({"position": DELETED}, "position is missing"),
        ({"position_grid": 0}, "position_grid=0 is not a positive integer"),
        ({"text_widths": 24}, "text_widths is not a list of 1 to 64 widths"),
        ({"text_widths": []}, "text_widths is not a list"),
        ({"text_widths": [24, "10"]}, "text_widths='10'"),
    ],
)
def test_an_invalid_config_is_rejected(folder, changes, message):
    change_config(folder, **changes)
    for read in (read_lidit_config, load_lidit):
        with pytest.raises(UserError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value)


def test_a_folder_of_format_1_has_the_conv_position(tmp_path):
    config = dataclasses.replace(CONFIG, position="conv")
    leaves = random_leaves(config)
    save_lidit(tmp_path, config, leaves)
    change_config(tmp_path, format_version=1, position=DELETED, position_grid=DELETED, refiner_qk_norm=DELETED)
    fields, _, params = load_lidit(tmp_path)
    assert fields["position"] == "conv"
    assert_same(params, leaves)
    assert LIDiTTransformer2DModel.from_pretrained(tmp_path).dit.position == ("conv",)


def test_diffusers_own_keys_are_ignored(folder):
    change_config(folder, _name_or_path="somewhere", _use_default_values=["depth"])
    assert read_lidit_config(folder)["depth"] == CONFIG.depth


def test_weights_of_another_config_are_rejected(folder):
    change_config(folder, hidden_size=32)
    with pytest.raises(UserError, match=r"has shape \(.*\), config.json requires"):
        load_lidit(folder)
    change_config(folder, hidden_size=16, depth=4)
    with pytest.raises(UserError, match=r"tensor dit\.blocks\.3\.\S+ is missing"):
        load_lidit(folder)
    change_config(folder, depth=2)
    with pytest.raises(UserError, match=r"tensor 'dit\.blocks\.2\.\S+' is not part of"):
        load_lidit(folder)


def test_a_missing_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        load_lidit(sharded)


def test_a_truncated_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file.name} is not a readable safetensors file"):
        load_lidit(sharded)


def test_pickles_are_not_read(folder):
    (folder / FILE).rename(folder / f"{STEM}.bin")
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        load_lidit(folder)


def test_values_that_are_not_finite_are_rejected(folder):
    tensors = load_file(folder / FILE)
    tensors["dit.output.bias"] = np.full_like(tensors["dit.output.bias"], np.nan)
    save_file(tensors, folder / FILE)
    with pytest.raises(UserError, match="tensor dit.output.bias has values that are not finite"):
        load_lidit(folder)


# --- reading a checkpoint array by array -------------------------------------------------------------------------


def save_checkpoint(folder, leaves, **trees):
    params = flax.traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    checkpoints = Checkpoints(folder, {})
    checkpoints.save(7, {"params": params, "step": jnp.int32(7), "ema": None} | trees, {}, {})
    checkpoints.close()


@pytest.mark.parametrize("cut_from", [0, 1 << 40])
@pytest.mark.parametrize("read_bytes", [1, 9000, 1 << 30])
def test_a_checkpoint_is_read_array_by_array(leaves, tmp_path, monkeypatch, cut_from, read_bytes):
    monkeypatch.setattr(checkpoint, "LARGE_STACK_BYTES", cut_from)
    monkeypatch.setattr(checkpoint_weights, "READ_BYTES", read_bytes)
    save_checkpoint(tmp_path / "checkpoints", leaves)
    with open_weights(tmp_path / "checkpoints", "params") as weights:
        assert weights.step == 7
        assert weights.num_parameters == sum(leaf.size for leaf in leaves.values())
        assert weights.keys() == leaves.keys()
        for path, expected in leaves.items():
            assert weights[path].shape == expected.shape
            np.testing.assert_array_equal(np.asarray(weights[path]), expected)
            np.testing.assert_array_equal(np.stack(list(weights[path])), expected)
        save_lidit(tmp_path / "transformer", CONFIG, weights)
    assert_same(load_lidit(tmp_path / "transformer")[2], leaves)
    params, step = load_weights(tmp_path / "checkpoints", "params")
    assert step == 7
    assert_same(params, leaves)


def test_a_stack_over_many_devices_is_read_entry_by_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGE_STACK_BYTES", 0)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    values = np.random.default_rng(0).standard_normal((6, 16, 5), np.float32)
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    save_checkpoint(tmp_path, {}, ema={"stack": jax.device_put(values, sharding)})
    with open_weights(tmp_path, "ema") as weights:
        [array] = weights.values()
        assert array._open().chunk_layout.read_chunk.shape == (1, 2, 5)
        np.testing.assert_array_equal(np.stack(list(array)), values)


def test_an_unreadable_checkpoint_is_rejected(leaves, tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"), open_weights(tmp_path, "params"):
        pass
    few = {path: leaf for path, leaf in leaves.items() if path[0] == "timestep_embedder"}
    save_checkpoint(tmp_path / "checkpoints", few)
    with (
        pytest.raises(UserError, match="no 'ema' weights; it has params"),
        open_weights(tmp_path / "checkpoints", "ema"),
    ):
        pass
    with open_weights(tmp_path / "checkpoints", "params") as weights:
        for file in (tmp_path / "checkpoints").glob("7/state/**/d/*"):
            file.unlink()
        array = next(iter(weights.values()))
        with pytest.raises(UserError, match=r"timestep_embedder\S+ can't be read .* may be damaged"):
            np.asarray(array)
        with pytest.raises(UserError, match="can't be read"):
            list(array)


HALF_A_BILLION = "dict(depth=14, hidden_size=1152, num_heads=16)"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Folder with a checkpoint of 0.6 billion random parameters, which are 2.3 GB."""
    folder = tmp_path_factory.mktemp("large")
    make = f"""
import jax, numpy as np, sys
from lidit_jax.checkpoint import Checkpoints
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.weights import diffusers_lidit
import flax
config = LIDiTConfig(**{HALF_A_BILLION})
boxed, rng = diffusers_lidit._boxed_parameters(config, (4096, 4096)), np.random.default_rng(0)
shapes = {{path: leaf.value.shape for path, leaf in boxed.items()}}
params = {{path: jax.numpy.asarray(rng.random(shape, np.float32)) for path, shape in shapes.items()}}
print(sum(x.size for x in params.values()))
checkpoints = Checkpoints(sys.argv[1] + "/checkpoints", {{}})
checkpoints.save(1, {{"params": flax.traverse_util.unflatten_dict(params)}}, {{}}, {{}})
checkpoints.close()
"""
    [size] = run(make, folder)
    assert size > 5e8
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_model_is_written_in_the_memory_of_a_shard(large, tmp_path, dtype):
    """Measures the export in a process of its own: memory that this process used before would distort the peak."""
    export = f"""
import sys
from pathlib import Path
from lidit_jax.checkpoint_weights import open_weights
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.weights.diffusers_lidit import save_lidit
config = LIDiTConfig(**{HALF_A_BILLION})
with open_weights({str(large)!r} + "/checkpoints", "params") as weights:
    save_lidit(sys.argv[1] + "/transformer", config, weights, dtype={dtype!r}, max_shard_bytes=4 * 10**8)
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(line.split()[1]) * 1024)
"""
    [peak] = run(export, tmp_path)
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    largest = max(file.stat().st_size for file in shards)
    assert len(shards) >= 3 and largest < 4.01e8
    print(f"{dtype}: peak {peak / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB")
    assert peak < 1.3 * largest + 1e9  # the checkpoint has 2.3 GB
    with open_weights(large / "checkpoints", "params") as weights:
        index = json.loads((tmp_path / "transformer" / INDEX).read_text())["weight_map"]
        *_, last = weights["dit", "blocks", "modulation", "Dense_0", "kernel"]
        name = "dit.blocks.13.modulation.linear.weight"
        written = load_file(tmp_path / "transformer" / index[name])[name]
        np.testing.assert_array_equal(written, last.T.astype(written.dtype))


def run(script, folder):
    """Runs the program in a process of its own and returns the numbers that it prints."""
    environment = dict(os.environ) | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]
