"""The real train step compiled for a TPU slice, on a machine without one: does it fit, and what does it do?

The TPU's own compiler comes with libtpu (`pip install -e ".[tpu]"`); a topology's name stands for its chips. Nothing is
loaded: parameters, frozen encoders and batches are shapes with their places on the mesh.
"""

import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.compile.hlo import cost_of
from lidit_jax.compile.report import Report, worst
from lidit_jax.data.buckets import Bucket
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.models.llm import LLM
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.parallel.chips import TPUS, Chip
from lidit_jax.parallel.mesh import check_model, make_mesh
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, num_batch_shards, replicated, stored_shardings
from lidit_jax.pipeline import Pipeline
from lidit_jax.stages.lidit import lidit_task
from lidit_jax.text.encoders import FrozenLLM, LLMTextEncoder, PromptEncoder
from lidit_jax.text.load_encoder import open_encoder
from lidit_jax.train import Trainer, TrainState, check_batch_size
from lidit_jax.train_config import TrainConfig
from lidit_jax.weights.huggingface_llm import abstract_encoder

logger = logging.getLogger(__name__)

TOPOLOGY = re.compile(r"(v\d+[a-z]*):\d+(x\d+)*")


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run's parts with shapes in place of arrays."""

    experiment: Experiment
    chip: Chip
    mesh: Mesh
    rules: ShardingRules
    encoders: dict[str, PromptEncoder]
    frozen: dict[str, Any]
    vae: AutoencoderKL

    def trainer(self, config: TrainConfig) -> Trainer:
        experiment = self.experiment
        task = lidit_task(experiment.model, experiment.schedule, self.encoders, self.vae, self.frozen)
        return Trainer(task, config, self.mesh, self.rules)

    def state(self) -> TrainState:
        """What a run holds, whatever its batches are."""
        rows = num_batch_shards(self.mesh, self.rules)
        return self.trainer(dataclasses.replace(self.experiment.train, batch_size=rows, accumulate=1)).abstract_state()


def compile_step(
    config: ConfigDict,
    topology: str,
    num_slices: int = 1,
    prefix_tokens: int = 64,
    program: str = "train",
    bucket: str = "",
) -> Report:
    """Compiles the train step of a config (frozen encoders, VAE's encoder, LI-DiT, AdamW, EMA), or its sampling.

    The train step is compiled for the square bucket and for the one of the most extreme aspect: with about as many
    tokens, it may pad them otherwise or take another attention kernel. The report is of the one that needs more memory.

    Args:
      program: "train", or "sample": prompts to pictures, a batch as a run draws it for its log.
      topology: e.g. "v5p:8x8x4".
      num_slices: of that topology, joined by the data centre's network.
      prefix_tokens: of system prompt and instruction, where no tokenizer is at hand.
      bucket: the only one to compile, as "640x384" (height, width); "": the square and, of training, an extreme one.

    Raises:
      UserError: the config or the mesh cannot work, there is no such bucket, or the TPU's compiler is not installed.
    """
    run = _run(config, topology, num_slices, prefix_tokens)
    buckets = _buckets(run.experiment, bucket)
    if program == "sample":
        return _compile_sampling(run, topology, buckets[0])
    check_batch_size(run.experiment.train, run.mesh)
    trainer, reports = run.trainer(run.experiment.train), []
    for of in buckets:
        logger.info("compiling the step for bucket %s", of)
        batch = abstract_batch(run.experiment, run.encoders, run.mesh, run.rules, of)
        reports.append(_compile(trainer, run.frozen, batch, topology, run.chip, of))
    return worst(reports)


def _buckets(experiment: Experiment, only: str) -> list[Bucket]:
    """The square bucket and the widest, or the only one that is asked for; see `compile_step`."""
    buckets = experiment.data.buckets(experiment.cell())
    if only:
        found = [bucket for bucket in buckets if str(bucket) == only]
        if not found:
            raise UserError(
                f"--bucket={only}: the config has no such bucket, use one of {', '.join(map(str, buckets))}"
            )
        return found
    square = Bucket(experiment.data.resolution, experiment.data.resolution)
    return list(dict.fromkeys((square, buckets[-1])))


def where_weights_go(config: ConfigDict, topology: str, num_slices: int = 1) -> list[str]:
    """A line for every weight: shape, cut along which axes of the mesh, and bytes on a chip. Nothing is compiled."""
    rows = [("weight", "shape", "cut", "MB a chip")]
    for name, leaf in _weights(_run(config, topology, num_slices, 1)).items():
        spec = tuple(leaf.sharding.spec) + (None,) * (len(leaf.shape) - len(leaf.sharding.spec))
        cut = ", ".join(str(axes or "-") for axes in spec) if any(spec) else "whole"
        rows.append((name, " x ".join(map(str, leaf.shape)), cut, f"{_bytes_a_chip(leaf) / 1e6:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _weights(run: _Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Of LI-DiT, the encoders and the VAE, by name."""
    trees = {"lidit": run.state().params, "vae": run.frozen["vae"]}
    trees |= {name: of.params for name, of in run.frozen["encoders"].items()}
    return flax.traverse_util.flatten_dict(trees, sep="/")


def _run(config: ConfigDict, topology: str, num_slices: int, prefix_tokens: int) -> _Run:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.path = config.data.get("path") or "unused"
    experiment = Experiment(config, epath.Path("unused"), only_shapes=True)
    if not experiment.has_lidit:
        raise UserError("compile: the config is of a VAE alone; name one with a model")
    if experiment.text.encode != "in_step":
        raise UserError("compile: only a step with the encoders in it is compiled: give --config.text.encode=in_step")
    devices, chip = topology_devices(topology, num_slices)
    return _on_devices(experiment, devices, chip, prefix_tokens)


def _on_devices(experiment: Experiment, devices: Sequence[jax.Device], chip: Chip, prefix_tokens: int) -> _Run:
    mesh, rules = make_mesh(experiment.config.mesh, devices), ShardingRules()
    check_model(mesh, experiment.model.config.hidden_size, experiment.model.config.num_heads)
    encoders, frozen = abstract_frozen(experiment, mesh, rules, prefix_tokens)
    return _Run(experiment, chip, mesh, rules, encoders, frozen, experiment.autoencoder(experiment.vae_config))


def _compile(
    trainer: Trainer, frozen: Any, batch: Mapping[str, Any], topology: str, chip: Chip, bucket: Bucket
) -> Report:
    state, mesh = trainer.abstract_state(), trainer.mesh
    parts = {"weights": state.params, "ema": state.ema, "optimiser": state.opt_state, "frozen": frozen, "batch": batch}
    lower = lambda: trainer.lower(state, frozen, batch)  # noqa: E731
    rows = trainer.config.batch_size
    return _report(lower, mesh, parts, topology, chip, "train", rows, bucket, trainer.task.flops(batch))


def _compile_sampling(run: _Run, topology: str, bucket: Bucket) -> Report:
    experiment, how = run.experiment, run.experiment.sample
    pipeline = Pipeline(experiment.model, experiment.schedule, run.encoders, run.vae, run.frozen, run.mesh, run.rules)
    pipeline.check_size(*bucket)
    state = run.state()
    lower = lambda: pipeline.lower(state.averaged, *bucket, how)  # noqa: E731
    # A run draws with one copy of the weights; what else it trains with stays where it is.
    beside = state.opt_state if state.ema is None else (state.params, state.opt_state)
    parts = {"weights": state.averaged, "frozen": run.frozen, "beside": beside}
    rows, flops = pipeline.rows(how), pipeline.flops(*bucket, how)
    return _report(lower, run.mesh, parts, topology, run.chip, "sample", rows, bucket, flops)


def _report(
    lower: Callable[[], jax.stages.Lowered],
    mesh: Mesh,
    parts: Mapping[str, Any],
    topology: str,
    chip: Chip,
    program: str,
    batch_size: int,
    bucket: Bucket,
    model_flops: float,
) -> Report:
    started, compiled, needed = time.monotonic(), None, None
    with jax.set_mesh(mesh):
        lowered = lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _needed(str(error))
    memory = compiled and compiled.memory_analysis()
    return Report(
        topology=topology,
        what=program,
        chip=chip,
        devices=mesh.devices.size,
        mesh={axis: mesh.shape[axis] for axis in mesh.axis_names},
        batch_size=batch_size,
        bucket=bucket,
        parts={name: _bytes_a_chip(tree) for name, tree in parts.items()},
        temporaries=memory and memory.temp_size_in_bytes,
        peak=memory and memory.peak_memory_in_bytes + _bytes_a_chip(parts.get("beside")),
        program=memory and memory.generated_code_size_in_bytes,
        needed=needed,
        model_flops=model_flops,
        cost=compiled and cost_of(compiled.as_text()),
        seconds=time.monotonic() - started,
    )


def _needed(message: str) -> int:
    """Bytes that the compiler asked for in vain; raises what it said of anything else."""
    found = re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if not found:
        raise UserError(f"the TPU's compiler refuses: {' '.join(message.split())[:400]}")
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def topology_devices(name: str, num_slices: int = 1) -> tuple[list[jax.Device], Chip]:
    """The chips of a slice that is not there.

    Raises:
      UserError: there is no such topology, or no libtpu.
    """
    generation = name.partition(":")[0]
    if not TOPOLOGY.fullmatch(name) or generation not in TPUS:
        raise UserError(f"--topology={name}: name one of {', '.join(TPUS)} and its shape, as v5p:8x8x4 or v5e:16x16")
    from jax.experimental import topologies

    # Chips whose two cores work as one show themselves as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation in ("v4", "v5p") else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    # libtpu otherwise asks the cloud who it is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jaxlib raises its own kinds, and plain RuntimeErrors, for all that can be wrong
        raise UserError(
            f"--topology={name}: {' '.join(str(error).split())[:200]} (the TPU's compiler is needed: "
            'pip install -e ".[tpu]"; one process at a time can use it)'
        ) from error
    return list(description.devices), TPUS[generation]


@dataclasses.dataclass(frozen=True)
class AssumedTokenizer:
    """As long as a tokenizer would be, in place of one that is not there."""

    prefix_tokens: int
    max_length: int
    largest_token: int = 0

    def prefix(self) -> np.ndarray:
        return np.zeros(self.prefix_tokens, np.int32)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        rows = len(prompts)
        shape = rows, self.max_length
        return {"tokens": np.zeros(shape, np.int32), "mask": np.ones(shape, bool), "truncated": np.zeros(rows, bool)}


def abstract_frozen(
    experiment: Experiment, mesh: Mesh, rules: ShardingRules, prefix_tokens: int
) -> tuple[dict[str, PromptEncoder], dict[str, Any]]:
    """The encoders, and shapes of all that is frozen, as `Experiment.pipeline` would load it.

    Encoders whose `weights` are given are those of their folders' config.json, others those that `model` describes.
    """
    encoders, frozen = {}, {}
    for name, part in experiment.encoders.items():
        if part.weights:
            encoder = open_encoder(part.weights, experiment.prompt_tokenizer, dtype=part.dtype)
        else:
            tokenizer = AssumedTokenizer(prefix_tokens, experiment.text.max_length)
            encoder = LLMTextEncoder(experiment.encoders[name].language_model, tokenizer)
        if not isinstance(encoder, LLMTextEncoder):
            raise UserError(f"encoders.{name}: only decoder-only LLMs can be compiled without their weights")
        encoders[name] = encoder
        params = abstract_encoder(encoder.config, dtype=part.dtype, mesh=mesh, rules=rules)
        apply = lambda p, t, model=encoder.model: model.apply({"params": p}, t, method=LLM.prefix)  # noqa: E731
        features, cache = jax.eval_shape(apply, params, encoder.tokenizer.prefix())
        frozen[name] = FrozenLLM(params, *_everywhere((features, cache), mesh))
    vae = experiment.autoencoder(experiment.vae_config)
    side = 2 * vae.config.downsampling_factor
    params = jax.eval_shape(lambda: nn.unbox(vae.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]))
    places = stored_shardings(params, mesh, rules)
    params = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), params, places)
    return encoders, {"vae": params, "encoders": frozen}


def abstract_batch(
    experiment: Experiment, encoders: Mapping[str, PromptEncoder], mesh: Mesh, rules: ShardingRules, bucket: Bucket
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of images of one bucket with their tokens."""
    rows, length = experiment.train.batch_size, experiment.text.max_length
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((rows, *bucket, 3), jnp.uint8)}
    for name in encoders:
        shapes[f"{name}/tokens"] = (rows, length), jnp.int32
        shapes[f"{name}/mask"] = (rows, length), jnp.bool_
        shapes[f"{name}/truncated"] = (rows,), jnp.bool_
    place = batch_sharding(mesh, rules)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in shapes.items()}


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)


def _bytes_a_chip(tree: Any) -> int:
    shards = (leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree))
    sizes = (leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in zip(shards, sizes, strict=True))
