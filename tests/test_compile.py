"""The train step compiled from shapes alone, for CPU devices in place of TPU devices."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import pytest
from conftest import ROOT, load_config, tiny_config
from etils import epath

from lidit_jax.compile import compile_step
from lidit_jax.compile.compile_step import AssumedTokenizer, abstract_batch, abstract_frozen, topology_devices
from lidit_jax.compile.report import SearchTable, worst
from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.buckets import Bucket
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.models.remat import REMAT_POLICIES
from lidit_jax.parallel.chips import V5E
from lidit_jax.parallel.mesh import check_model, make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.stages.lidit import lidit_task
from lidit_jax.trainer import Trainer

MESH = {"data": 2, "fsdp": 4, "tensor": 1}
RULES = ShardingRules()
SHAPE = BatchShape(Bucket(32, 32), 12)
PASSES = ("jvp(LIDiT)", "transpose(jvp(LIDiT))")  # forward and backward


@pytest.fixture(scope="module")
def with_weights(trained_workdir):
    config = tiny_config()
    for name in config.encoders:
        config.encoders[name].weights = str(trained_workdir / "encoders" / name)
    config.vae.weights = str(trained_workdir / "vae")
    return config


def described(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding), tree, is_leaf=lambda x: hasattr(x, "sharding"))


@pytest.mark.parametrize("weights", [True, False])
def test_abstract_frozen_arrays_match_those_that_a_run_loads(with_weights, weights):
    """Shapes, dtypes and shardings of all frozen arrays, from the folders' configs or the sizes in the run's config."""
    mesh = make_mesh(MESH)
    loaded = Experiment(with_weights, epath.Path("unused")).pipeline(mesh, RULES)
    config = with_weights if weights else tiny_config()
    part = Experiment(config, epath.Path("unused"), only_shapes=True)
    prefix = len(loaded.encoders["llama"].tokenizer.prefix())
    encoders, frozen = abstract_frozen(part, mesh, RULES, prefix)
    assert isinstance(encoders["llama"].tokenizer, AssumedTokenizer) != weights
    assert described(frozen) == described(loaded.frozen)


@pytest.fixture(scope="module")
def step(with_weights):
    """The trainer, and the frozen arrays and the batch of its step, as shapes."""
    mesh = make_mesh(MESH)
    part = Experiment(with_weights, epath.Path("unused"), only_shapes=True)
    encoders, frozen = abstract_frozen(part, mesh, RULES, 16)
    vae = part.autoencoder(part.vae_config)
    task = lidit_task(part.model, part.schedule, encoders, vae, frozen)
    trainer = Trainer(task, part.train, mesh, RULES)
    return trainer, frozen, abstract_batch(part, encoders, mesh, RULES, SHAPE)


def test_the_parts_of_the_model_have_names_in_the_program(step):
    """The names that group a trace's operations; see docs/tpu.md."""
    trainer, frozen, batch = step
    with jax.set_mesh(trainer.mesh):
        text = trainer.lower(trainer.abstract_state(), frozen, batch).as_text(debug_info=True)
    names = ("jvp(text_encoders/llama)", "jvp(text_encoders/qwen)", "jvp(vae)", "optimizer")
    names += tuple(f"{passes}/{part}" for passes in PASSES for part in ("text_condition", "dit/while/body"))
    assert [name for name in names if f"/{name}/" not in text] == []


@pytest.fixture(scope="module")
def report(step):
    trainer, frozen, batch = step
    named = compile_step._named(frozen)
    return compile_step.compile_trainer(trainer, frozen, batch, named, "v5e:2x4", V5E, SHAPE), trainer


def test_the_report_gives_memory_and_cost_of_a_chip(report):
    report, trainer = report
    state = trainer.init(0)

    def bytes_on_first_device(tree):
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == jax.devices()[0]
        )

    for name, tree in (("weights", state.params), ("ema", state.ema), ("optimiser", state.opt_state)):
        assert report.parts[name] == bytes_on_first_device(tree)
    assert report.fits and report.peak >= report.parts["weights"]
    # At width 16, other operations cost as much as the matrix products, but only the products are counted.
    assert 0.8 < report.flops_ratio < 2
    assert report.cost.messages["all-gather"] > 0 and report.cost.unknown_loops == 0
    assert 0 < report.mfu_bound() < 1
    text = "\n".join(report.lines())
    for words in (
        "8 chips (data 2, fsdp 4, tensor 1), batch 8 of 32x32",
        "of 16 GB",
        "all-gather",
        "so the MFU is at most",
    ):
        assert words in text
    reductions = report.cost.gradient_reductions
    assert list(reductions) == ["f32"] and 0.9 < reductions["f32"] / report.cost.messages["all-reduce"] <= 1
    assert f"of which gradient reductions: {reductions['f32'] / 1e9:.2f} GB in float32" in text
    found = json.loads(json.dumps(report.to_json()))["cost"]
    assert found["flops"] == report.cost.flops and found["gradient_reductions"] == reductions


def test_the_schedule_adds_up_and_names_the_collectives(report):
    report, _ = report
    schedule, bounds = report.schedule, report.bounds()
    assert schedule.seconds >= max(bounds.values())
    assert schedule.seconds <= sum(bounds.values())
    messages = sum(schedule.exposed.values()) + sum(schedule.overlapped.values())
    assert messages == pytest.approx(bounds["network"])
    text = "\n".join(report.lines())
    assert f"one instruction after another, each at the chip's peak rates: {schedule.seconds:.3f} s" in text
    assert "  blocking all-gather: waits for" in text  # the CPU's collectives are blocking
    header, *rows = report.collectives(5)
    assert header.split() == ["waits", "overlaps", "collective"] and len(rows) == 5
    waits = [float(row.split()[0]) for row in rows]
    assert waits == sorted(waits, reverse=True)
    assert all(" blocking all-" in row for row in rows)
    assert json.loads(json.dumps(report.to_json()))["schedule"]["seconds"] == schedule.seconds


def test_the_shares_of_the_parts_sum_to_the_cost(report):
    report, _ = report
    shares = report.shares()
    assert {"encoder llama", "encoder qwen", "VAE", "refiners", "DiT", "optimiser"} <= shares.keys()
    for number, total in enumerate((report.cost.flops, report.cost.bytes)):
        assert sum(share[number] for share in shares.values()) == pytest.approx(total)
    trained = [shares[part][0] for part in ("DiT", "refiners")]
    assert min(trained) > shares["encoder llama"][0] > 0  # three passes of as wide a model instead of one
    assert shares["optimiser"][0] == 0 < shares["optimiser"][1]
    assert shares["the rest"][0] < 0.01 * report.cost.flops
    lines = report.traffic(5)
    sizes = [float(line.split()[0]) for line in lines[1:]]
    assert len(lines) == 6 and sizes == sorted(sizes, reverse=True)
    assert json.loads(json.dumps(report.to_json()))["shares"]["DiT"]["flops"] == shares["DiT"][0]


@pytest.fixture
def of_buckets(with_weights, report, monkeypatch):
    """The tiny config with 10b.py's resolution, grid and buckets, and a list of the batches to compile.

    `compile_trainer` is replaced: it compiles nothing, and reports one byte more for the extreme bucket than for the
    square.
    """
    monkeypatch.setattr(compile_step, "topology_devices", lambda *_: (jax.devices(), V5E))
    config, batches = with_weights.copy_and_resolve_references(), []
    config.mesh.update(MESH)
    config.model.patch_size = 2
    with config.unlocked():
        config.data.update(resolution=512, max_aspect=2.0, bucket_multiple=64)

    def record(trainer, frozen, batch, frozen_parts, topology, chip, shape):
        batches.append((batch["image"].shape, batch["llama/tokens"].shape))
        bucket, length = shape
        peak = 1000 + (bucket != Bucket(512, 512))
        return dataclasses.replace(report[0], bucket=bucket, prompt_length=length, peak=peak, seconds=2)

    monkeypatch.setattr(compile_step, "compile_trainer", record)
    return config, batches


def test_the_square_and_the_extreme_bucket_are_compiled_and_the_larger_one_decides(of_buckets):
    config, batches = of_buckets
    report = compile_step.compile_step(config, "v5e:2x4")
    assert batches == [((8, 512, 512, 3), (8, 12)), ((8, 384, 640, 3), (8, 12))]
    assert report.bucket == Bucket(384, 640) and report.peak == 1001 and report.seconds == 4
    assert report.bytes_by_bucket == {"512x512": 1000, "384x640": 1001}
    text = "\n".join(report.lines())
    assert "batch 8 of 384x640, prompts of 12 tokens, compiled in 4 s\n\npeak memory by bucket\n  512x512 " in text
    assert "the rest is for 384x640, which needs the most" in text
    assert json.loads(json.dumps(report.to_json()))["bytes_by_bucket"]["384x640"] == 1001


def test_one_bucket_can_be_compiled_alone(of_buckets):
    config, batches = of_buckets
    report = compile_step.compile_step(config, "v5e:2x4", bucket="576x448")
    assert batches == [((8, 576, 448, 3), (8, 12))] and "peak memory by bucket" not in "\n".join(report.lines())
    with pytest.raises(
        UserError, match="--bucket=500x500: the config has no such bucket: use one of 640x384, 576x448,"
    ):
        compile_step.compile_step(config, "v5e:2x4", bucket="500x500")
    config.data.max_aspect = 1.0
    assert "peak memory by bucket" not in "\n".join(compile_step.compile_step(config, "v5e:2x4").lines())
    assert batches[1:] == [((8, 512, 512, 3), (8, 12))]


def test_the_program_for_short_prompts_can_be_compiled(of_buckets):
    config, batches = of_buckets
    report = compile_step.compile_step(config, "v5e:2x4", bucket="512x512", prompt_length=5)
    assert batches == [((8, 512, 512, 3), (8, 5))] and "prompts of 5 tokens" in "\n".join(report.lines())
    with pytest.raises(UserError, match="--prompt_length=13 is above text.max_length=12"):
        compile_step.compile_step(config, "v5e:2x4", prompt_length=13)
    with pytest.raises(UserError, match="--prompt_length: sampling pads"):
        compile_step.compile_step(config, "v5e:2x4", program="sample", prompt_length=5)


def test_policies_are_compared_from_the_one_that_repeats_the_least(report, monkeypatch):
    config, compiled = tiny_config(), []

    def record(config, topology, **options):
        compiled.append((config.model.remat, topology, options))
        fits = config.model.remat == "full"
        return report[0] if fits else dataclasses.replace(report[0], peak=None, needed=9000, cost=None)

    monkeypatch.setattr(compile_step, "compile_step", record)
    table = SearchTable()
    found = compile_step.search(config, "v5e:2x4", ["dots", "full", "none"], prefix_tokens=7)
    rows = [table.add(*one) for one in found]
    options = {"bucket": "32x32", "prefix_tokens": 7}
    assert compiled == [(policy, "v5e:2x4", options) for policy in ("none", "dots", "full")]
    assert [row.split()[0] for row in rows] == ["none", "dots", "full"]
    assert ["yes" in row for row in rows] == [False, False, True] and "%" in rows[2]
    assert table.best() == "full" and config.model.remat == "none"
    assert [one for one, _ in compile_step.search(config, "v5e:2x4", ["all"])] == list(reversed(REMAT_POLICIES))
    with pytest.raises(UserError, match="--search=some: use all, or some of none,dots,projections,"):
        next(compile_step.search(config, "v5e:2x4", ["some", "dots"]))


def test_no_policy_is_the_best_if_none_fits(report):
    table = SearchTable()
    assert "no" in table.add("full", dataclasses.replace(report[0], peak=None, cost=None, needed=9000))
    assert table.best() is None


def test_a_bucket_that_does_not_fit_decides_whatever_the_others_need(report):
    square, _ = report
    lacking = dataclasses.replace(
        square, bucket=Bucket(24, 40), peak=None, temporaries=None, program=None, cost=None, needed=1
    )
    found = worst([square, lacking])
    assert not found.fits and found.bytes_by_bucket["24x40"] == sum(square.parts.values()) + 1
    assert found.bytes_by_bucket["32x32"] == square.peak


def test_a_program_that_does_not_fit_is_reported_with_advice(report):
    report, _ = report
    lacking = dataclasses.replace(report, peak=None, temporaries=None, program=None, cost=None, needed=60 * 1024**3)
    assert not lacking.fits and lacking.mfu_bound() is None
    text = "\n".join(lacking.lines())
    assert "DOES NOT FIT: temporaries of 64.4 GB where 16.0 GB are left: try --config.train.accumulate=8" in text
    heavy = dataclasses.replace(lacking, parts={"weights": 20_000_000_000})
    assert "weights and optimiser alone take 20.0 GB" in heavy.advice()


def test_the_memory_requested_is_read_from_the_compilers_message():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (54.37G) exceeds"
    )
    assert compile_step._requested_bytes(said) == int(54.37 * 1024**3)
    with pytest.raises(UserError, match="the TPU compiler failed: something else"):
        compile_step._requested_bytes("something\n else")


@pytest.mark.parametrize(
    ("sizes", "hidden", "heads", "message"),
    [
        (
            {"fsdp": 8},
            2820,
            44,
            "mesh fsdp=8 does not divide model.hidden_size=2820: use one of 1, 2, 4, and data=-1",
        ),
        ({"tensor": 8}, 2816, 44, "mesh tensor=8 does not divide model.num_heads=44: use one of 1, 2, 4, and"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_reported(sizes, hidden, heads, message):
    with pytest.raises(UserError, match=message):
        check_model(make_mesh(sizes), hidden, heads)
    check_model(make_mesh({"fsdp": 2, "tensor": 4}), 2816, 44)


def test_slices_are_split_along_data():
    devices = [types.SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match="mesh data=1 is not a multiple of the 2 slices: use --config.mesh.data=2"):
        make_mesh({"fsdp": -1}, devices)


@pytest.mark.parametrize("name", ["v5p", "v7:2x2", "v5p:2x", "tpu:4x4", "v5p:4x4;rm"])
def test_unknown_topologies_are_reported(name):
    with pytest.raises(UserError, match="give one of v4, v5e, v5p, v6e and a shape, such as v5p:8x8x4"):
        topology_devices(name)


@pytest.mark.parametrize("name", ["1b", "10b", "10b_1024"])
def test_paper_configs_describe_their_encoders_without_weights(name):
    config = load_config(name)
    config.data.path = "unused"
    part = Experiment(config, epath.Path("unused"), only_shapes=True)
    mesh = make_mesh({"fsdp": -1})
    encoders, frozen = abstract_frozen(part, mesh, RULES, 64)
    billions = sum(leaf.size for leaf in jax.tree.leaves(frozen["encoders"])) / 1e9
    assert 13 < billions < 14.5  # 8.03 and 7.72 billion, without the last two blocks and the heads
    with pytest.raises(UserError, match="encoders.llama3.weights is empty: give|vae.weights is empty: give"):
        Experiment(config, epath.Path("unused"))


@pytest.mark.parametrize("name", ["1b", "10b"])
def test_no_large_weight_is_replicated(name):
    config = load_config(name)
    config.data.path = "unused"
    config.mesh.data = 1  # 10b.py's value needs more than these eight devices
    part = Experiment(config, epath.Path("unused"), only_shapes=True)
    run = compile_step._on_devices(part, jax.devices(), V5E, 64)
    assert run.mesh.shape["fsdp"] == 8
    weights = compile_step._weights(run).items()
    replicated = {name: leaf.size * leaf.dtype.itemsize for name, leaf in weights if leaf.sharding.is_fully_replicated}
    assert replicated and max(replicated.values()) < 1e6, replicated
    stacked = sum(leaf.size * leaf.dtype.itemsize for leaf in compile_step._weights(run).values() if leaf.ndim > 2)
    sharded = sum(compile_step._bytes_a_chip(leaf) for leaf in compile_step._weights(run).values() if leaf.ndim > 2)
    assert sharded < stacked / 7


def test_the_sharding_of_weights_is_listed(with_weights, monkeypatch):
    monkeypatch.setattr(compile_step, "topology_devices", lambda *_: (jax.devices(), V5E))
    with_weights.mesh.update(MESH)
    lines = compile_step.where_weights_go(with_weights, "v5e:2x4")
    assert lines[0].split() == ["weight", "shape", "sharded", "over", "MB", "a", "chip"]
    [line] = [line for line in lines if line.startswith("lidit/dit/blocks/feed_forward/in/kernel")]
    assert line.split()[1:] == ["2", "x", "16", "x", "64", "-,", "fsdp,", "tensor", "0.002"]
    assert any(line.startswith("llama/embed_tokens") for line in lines)


def test_sampling_is_compiled_too(with_weights, monkeypatch):
    monkeypatch.setattr(compile_step, "topology_devices", lambda *_: (jax.devices(), V5E))
    config = with_weights.copy_and_resolve_references()
    config.mesh.update(MESH)
    config.sample.update(batch_size=5, steps=3)
    report = compile_step.compile_step(config, "v5e:2x4", program="sample")
    assert report.fits and report.batch_size == 8  # one image for each device along data and fsdp
    assert list(report.parts) == ["weights", "encoder llama", "encoder qwen", "VAE", "beside"]
    assert report.parts["beside"] > 2.9 * report.parts["weights"] and report.peak > report.parts["beside"]
    assert not dataclasses.replace(report, peak=17_000_000_000).fits
    # Three evaluations with guidance; at this size, the VAE's decoder costs more than the model.
    assert report.flops_ratio > 1 and report.cost.unknown_loops == 0
    assert "a batch of images takes at least" in "\n".join(report.lines())


@pytest.mark.slow
def test_buckets_of_the_same_area_need_about_the_same_memory(monkeypatch):
    """Compiles the tiny model on the grids of 10b.py, 32x32 and 24x40 tokens."""
    monkeypatch.setattr(compile_step, "topology_devices", lambda *_: (jax.devices(), V5E))
    config = tiny_config()
    config.mesh.update(MESH)
    config.model.patch_size = 2
    with config.unlocked():
        config.data.update(resolution=512, max_aspect=2.0, bucket_multiple=64)
    report = compile_step.compile_step(config, "v5e:2x4")
    square, extreme = report.bytes_by_bucket["512x512"], report.bytes_by_bucket["384x640"]
    assert report.bytes == max(square, extreme) and str(report.bucket) in report.bytes_by_bucket
    assert 0.8 < extreme / square < 1.2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -e .[tpu]")
def test_the_tpu_compiler_compiles_the_demo(tmp_path):
    command = [sys.executable, "-m", "lidit_jax.compile", "--config=configs/shapes.py", "--topology=v5e:2x2"]
    command += [f"--json={tmp_path}/report.json", "--config.encoders.llama.weights=", "--config.train.batch_size=32"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["devices"] == 4 and found["fits"] and found["cost"]["flops"] > 0
