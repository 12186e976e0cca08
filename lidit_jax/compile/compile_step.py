"""Compiles the real train step for a TPU slice on a host without TPUs, to see whether it fits and what it costs.

The TPU compiler comes with libtpu (`pip install -e ".[tpu]"`) and compiles for the chips of a named topology. Nothing
is loaded: parameters, frozen encoders and batches are shapes with shardings.
"""

import dataclasses
import functools
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.compile.cost import Costs
from lidit_jax.compile.hlo import Module
from lidit_jax.compile.report import Report, worst
from lidit_jax.compile.schedule import schedule_of
from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.buckets import Bucket
from lidit_jax.errors import UserError
from lidit_jax.experiment import NO_LIDIT, Experiment, abstract_experiment
from lidit_jax.models.llm import LLM
from lidit_jax.models.remat import REMAT_POLICIES
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.parallel.chips import TPUS, Chip
from lidit_jax.parallel.mesh import check_model, make_mesh
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, frozen_shardings, num_batch_shards, replicated
from lidit_jax.pipeline import Pipeline
from lidit_jax.stages.lidit import lidit_task
from lidit_jax.text.encoders import FrozenLLM, LLMTextEncoder, PromptEncoder
from lidit_jax.text.load_encoder import open_encoder
from lidit_jax.train_config import TrainConfig
from lidit_jax.trainer import Trainer, TrainState, check_batch_size
from lidit_jax.weights.huggingface_llm import abstract_encoder

logger = logging.getLogger(__name__)

TOPOLOGY = re.compile(r"(v\d+[a-z]*):\d+(x\d+)*")


@dataclasses.dataclass(frozen=True)
class _Run:
    """The networks of a run, with shapes in place of arrays."""

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
        """Returns the abstract train state, which does not depend on the batch size."""
        rows = num_batch_shards(self.mesh, self.rules)
        return self.trainer(dataclasses.replace(self.experiment.train, batch_size=rows, accumulate=1)).abstract_state()


def compile_step(
    config: ConfigDict,
    topology: str,
    num_slices: int = 1,
    prefix_tokens: int = 64,
    program: str = "train",
    bucket: str = "",
    prompt_length: int = 0,
) -> Report:
    """Compiles the train step of a config (frozen encoders, VAE's encoder, LI-DiT, AdamW, EMA), or its sampling.

    The train step is compiled for the square bucket and for the bucket of the most extreme aspect ratio, which has
    about as many tokens but may pad them differently or use another attention kernel.

    Args:
      config: the config of a run.
      topology: TPU generation and slice shape, e.g. "v5p:8x8x4".
      num_slices: number of such slices, connected by the data centre's network.
      prefix_tokens: tokens of system prompt and instruction, assumed for encoders without weights.
      program: "train", or "sample" for the sampling of one batch of images, as a run samples for its log.
      bucket: the only bucket to compile, as "640x384" (height, width); "" compiles the square one and, for training,
        the most extreme one.
      prompt_length: tokens that prompts are padded to in the train step; 0: text.max_length.

    Returns:
      The report on the bucket that needs the most memory.

    Raises:
      UserError: if the config does not fit the mesh, there is no such bucket, the prompt length is above
        text.max_length or given for sampling, or the TPU compiler is not installed.
    """
    run = _abstract_run(config, topology, num_slices, prefix_tokens)
    buckets = _buckets(run.experiment, bucket)
    max_length = run.experiment.text.max_length
    if prompt_length > max_length:
        raise UserError(f"--prompt_length={prompt_length} is above text.max_length={max_length}: give at most that")
    if program == "sample":
        if prompt_length:
            raise UserError("--prompt_length: sampling pads prompts to text.max_length: give it for --program=train")
        return _compile_sampling(run, topology, buckets[0])
    check_batch_size(run.experiment.train, run.mesh, run.rules)
    trainer, reports = run.trainer(run.experiment.train), []
    for each in buckets:
        logger.info("compiling the step for bucket %s", each)
        shape = BatchShape(each, prompt_length or max_length)
        batch = abstract_batch(run.experiment, run.encoders, run.mesh, run.rules, shape)
        named = _named(run.frozen)
        reports.append(compile_trainer(trainer, run.frozen, batch, named, topology, run.chip, shape))
    return worst(reports)


def search(
    config: ConfigDict, topology: str, policies: Sequence[str], bucket: str = "", **options: Any
) -> Iterator[tuple[str, Report]]:
    """Compiles the train step with several rematerialisation policies, those that repeat the least first.

    Args:
      config: as for `compile_step`.
      topology: as for `compile_step`.
      policies: names of policies, or "all".
      bucket: as for `compile_step`, but "" is the square one alone.
      **options: further arguments of `compile_step`.

    Yields:
      Each policy and its report.

    Raises:
      UserError: as `compile_step` raises, or a policy is unknown.
    """
    if "model" not in config:
        raise UserError(NO_LIDIT)
    known = list(reversed(REMAT_POLICIES))
    if unknown := set(policies) - {*known, "all"}:
        raise UserError(f"--search={','.join(sorted(unknown))}: use all, or some of {','.join(known)}")
    side = config.data.resolution
    for policy in known if "all" in policies else [policy for policy in known if policy in policies]:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.model.remat = policy
        yield policy, compile_step(config, topology, bucket=bucket or f"{side}x{side}", **options)


def _buckets(experiment: Experiment, only: str) -> list[Bucket]:
    """Returns the square bucket and the last, which is the most extreme, or only the requested one."""
    buckets = experiment.data.buckets(experiment.size_multiple())
    if only:
        found = [bucket for bucket in buckets if str(bucket) == only]
        if not found:
            raise UserError(
                f"--bucket={only}: the config has no such bucket: use one of {', '.join(map(str, buckets))}"
            )
        return found
    square = Bucket(experiment.data.resolution, experiment.data.resolution)
    return list(dict.fromkeys((square, buckets[-1])))


def where_weights_go(config: ConfigDict, topology: str, num_slices: int = 1) -> list[str]:
    """Lists the weights, one a line: shape, mesh axes that shard it, and size on a chip. Compiles nothing."""
    rows = [("weight", "shape", "sharded over", "MB a chip")]
    for name, leaf in _weights(_abstract_run(config, topology, num_slices, 1)).items():
        spec = tuple(leaf.sharding.spec) + (None,) * (len(leaf.shape) - len(leaf.sharding.spec))
        sharded = ", ".join(str(axes or "-") for axes in spec) if any(spec) else "replicated"
        rows.append((name, " x ".join(map(str, leaf.shape)), sharded, f"{_bytes_a_chip(leaf) / 1e6:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _weights(run: _Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the abstract weights of LI-DiT, the encoders and the VAE, by path."""
    trees = {"lidit": run.state().params, "vae": run.frozen["vae"]}
    trees |= {name: encoder.params for name, encoder in run.frozen["encoders"].items()}
    return flax.traverse_util.flatten_dict(trees, sep="/")


def _abstract_run(config: ConfigDict, topology: str, num_slices: int, prefix_tokens: int) -> _Run:
    experiment = abstract_experiment(config)
    devices, chip = topology_devices(topology, num_slices)
    return _on_devices(experiment, devices, chip, prefix_tokens)


def _on_devices(experiment: Experiment, devices: Sequence[jax.Device], chip: Chip, prefix_tokens: int) -> _Run:
    mesh, rules = make_mesh(experiment.config.mesh, devices), ShardingRules()
    check_model(mesh, experiment.model.config.hidden_size, experiment.model.config.num_heads)
    encoders, frozen = abstract_frozen(experiment, mesh, rules, prefix_tokens)
    return _Run(experiment, chip, mesh, rules, encoders, frozen, experiment.autoencoder(experiment.vae_config))


def compile_trainer(
    trainer: Trainer,
    frozen: Any,
    batch: Mapping[str, Any],
    frozen_parts: Mapping[str, Any],
    topology: str,
    chip: Chip,
    shape: BatchShape,
) -> Report:
    """Compiles a train step.

    Args:
      trainer: trainer on the mesh of the topology's devices.
      frozen: shapes of what the loss reads and no step changes.
      batch: shapes of a batch.
      frozen_parts: shapes of the frozen networks, by the names that the report gives them.
      topology: TPU generation and slice shape.
      chip: kind of chip.
      shape: shape of the batch.
    """
    state, mesh = trainer.abstract_state(), trainer.mesh
    parts = {"weights": state.params, "ema": state.ema, "optimiser": state.opt_state, **frozen_parts, "batch": batch}
    lower = functools.partial(trainer.lower, state, frozen, batch)
    rows = trainer.config.batch_size
    return _report(lower, mesh, parts, topology, chip, "train", rows, shape, trainer.task.flops(batch))


def _compile_sampling(run: _Run, topology: str, bucket: Bucket) -> Report:
    experiment, sampling = run.experiment, run.experiment.sample
    pipeline = Pipeline(experiment.model, experiment.schedule, run.encoders, run.vae, run.frozen, run.mesh, run.rules)
    pipeline.check_size(*bucket)
    state = run.state()
    lower = functools.partial(pipeline.lower, state.averaged, *bucket, sampling)
    # Sampling reads one copy of the weights; the rest of the train state stays in memory.
    beside = state.opt_state if state.ema is None else (state.params, state.opt_state)
    parts = {"weights": state.averaged, **_named(run.frozen), "beside": beside}
    rows, flops = pipeline.rows(sampling), pipeline.flops(*bucket, sampling)
    return _report(
        lower,
        run.mesh,
        parts,
        topology,
        run.chip,
        "sample",
        rows,
        BatchShape(bucket, experiment.text.max_length),
        flops,
    )


def _named(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the frozen networks by the name that the report gives them."""
    return {f"encoder {name}": encoder for name, encoder in frozen["encoders"].items()} | {"VAE": frozen["vae"]}


def _report(
    lower: Callable[[], jax.stages.Lowered],
    mesh: Mesh,
    parts: Mapping[str, Any],
    topology: str,
    chip: Chip,
    program: str,
    batch_size: int,
    shape: BatchShape,
    model_flops: float,
) -> Report:
    started, compiled, needed = time.monotonic(), None, None
    with jax.set_mesh(mesh):
        lowered = lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _requested_bytes(str(error))
    memory = compiled and compiled.memory_analysis()
    costs = compiled and Costs(Module(compiled.as_text()))
    return Report(
        topology=topology,
        what=program,
        chip=chip,
        devices=mesh.devices.size,
        mesh={axis: mesh.shape[axis] for axis in mesh.axis_names},
        batch_size=batch_size,
        bucket=shape.bucket,
        prompt_length=shape.prompt_length,
        parts={name: _bytes_a_chip(tree) for name, tree in parts.items()},
        temporaries=memory and memory.temp_size_in_bytes,
        peak=memory and memory.peak_memory_in_bytes + _bytes_a_chip(parts.get("beside")),
        program=memory and memory.generated_code_size_in_bytes,
        needed=needed,
        model_flops=model_flops,
        cost=costs and costs.total(),
        schedule=costs and schedule_of(costs, chip),
        seconds=time.monotonic() - started,
    )


def _requested_bytes(message: str) -> int:
    """Returns the bytes requested by XLA when compilation ran out of memory; raises UserError for other messages."""
    found = re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if not found:
        raise UserError(f"the TPU compiler failed: {' '.join(message.split())[:400]}")
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def topology_devices(name: str, num_slices: int = 1) -> tuple[list[jax.Device], Chip]:
    """Returns compile-only devices of a TPU topology, and the kind of chip.

    Args:
      name: TPU generation and slice shape, e.g. "v5p:8x8x4".
      num_slices: number of such slices.

    Raises:
      UserError: if there is no such topology, or libtpu is not installed.
    """
    generation = name.partition(":")[0]
    if not TOPOLOGY.fullmatch(name) or generation not in TPUS:
        raise UserError(f"--topology={name}: give one of {', '.join(TPUS)} and a shape, such as v5p:8x8x4 or v5e:16x16")
    from jax.experimental import topologies

    # Megacore: the two cores of a chip appear as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation in ("v4", "v5p") else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    # Otherwise libtpu queries the metadata server of Google Cloud.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jaxlib raises types of its own and plain RuntimeErrors
        raise UserError(
            f"--topology={name}: {' '.join(str(error).split())[:200]} (this needs the TPU compiler: "
            'pip install -e ".[tpu]"; one process at a time can use it)'
        ) from error
    return list(description.devices), TPUS[generation]


@dataclasses.dataclass(frozen=True)
class AssumedTokenizer:
    """Stands in for a tokenizer that is not available: gives sequences of the right length.

    Attributes:
      prefix_tokens: tokens of system prompt and instruction.
      max_length: tokens of a padded prompt.
      largest_token: largest token id.
    """

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
    """Returns the encoders, and the shapes of the frozen arrays that `Experiment.pipeline` would load.

    Encoders with `weights` are read from the config.json of that folder, others from their `model` section.
    """
    encoders, frozen = {}, {}
    for name, config in experiment.encoders.items():
        if config.weights:
            encoder = open_encoder(config.weights, experiment.prompt_tokenizer, dtype=config.dtype)
        else:
            tokenizer = AssumedTokenizer(prefix_tokens, experiment.text.max_length)
            encoder = LLMTextEncoder(config.language_model, tokenizer)
        if not isinstance(encoder, LLMTextEncoder):
            raise UserError(f"encoders.{name}: only decoder-only LLMs can be compiled from their config.json alone")
        encoders[name] = encoder
        params = abstract_encoder(encoder.config, dtype=config.dtype, mesh=mesh, rules=rules)
        encode_prefix = functools.partial(encoder.model.apply, method=LLM.prefix)
        features, cache = jax.eval_shape(encode_prefix, {"params": params}, encoder.tokenizer.prefix())
        frozen[name] = FrozenLLM(params, *_replicated((features, cache), mesh))
    vae = experiment.autoencoder(experiment.vae_config)
    side = 2 * vae.config.downsampling_factor
    params = jax.eval_shape(lambda: nn.unbox(vae.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]))
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        frozen_shardings(params, mesh, rules),
    )
    return encoders, {"vae": params, "encoders": frozen}


def abstract_batch(
    experiment: Experiment, encoders: Mapping[str, PromptEncoder], mesh: Mesh, rules: ShardingRules, shape: BatchShape
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of images and their tokens, whose prompt length must be given."""
    rows, length = experiment.train.batch_size, shape.prompt_length
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((rows, *shape.bucket, 3), jnp.uint8)}
    for name in encoders:
        shapes[f"{name}/tokens"] = (rows, length), jnp.int32
        shapes[f"{name}/mask"] = (rows, length), jnp.bool_
        shapes[f"{name}/truncated"] = (rows,), jnp.bool_
    sharding = batch_sharding(mesh, rules)
    return {name: jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding) for name, (sizes, dtype) in shapes.items()}


def _replicated(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)


def _bytes_a_chip(tree: Any) -> int:
    shards = (leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree))
    sizes = (leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in zip(shards, sizes, strict=True))
