"""Compiles the train step of a multi-modal LLM for a TPU slice, as `compile_step.py` does for LI-DiT."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lidit_jax.compile.compile_step import compile_trainer, topology_devices
from lidit_jax.compile.report import Report
from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.buckets import Bucket
from lidit_jax.errors import UserError
from lidit_jax.llava_run import connect, fill_in_paths, llava_section
from lidit_jax.models.llava import LlavaConfig
from lidit_jax.models.llava_section import LlavaSectionConfig, LlavaStageConfig
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, batch_sharding
from lidit_jax.stages.llava import llava_task
from lidit_jax.trainer import Trainer
from lidit_jax.weights.folders import find_folder
from lidit_jax.weights.huggingface_config import llm_config
from lidit_jax.weights.huggingface_llm import abstract_causal_lm
from lidit_jax.weights.huggingface_vision import abstract_vision_tower, read_vision_config
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, read_config

_ROWS_ADDED = 64  # to the vocabulary, for the image token of an LLM whose tokenizer is not read
_ANY_NORMALISATION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # changes no shape


def compile_llava(config: ConfigDict, topology: str, num_slices: int = 1, stage: str = "tune") -> Report:
    """Compiles the train step of a stage of the `llava` section.

    Args:
      config: the config of a run.
      topology: TPU generation and slice shape, e.g. "v5p:8x8x4".
      num_slices: number of such slices.
      stage: "align" or "tune".

    Raises:
      UserError: the config is invalid or lacks the stage, or the TPU compiler is not installed.
    """
    config = config.copy_and_resolve_references()
    fill_in_paths(config)
    section = llava_section(config)
    stages = section.stages()
    if stage not in stages:
        raise UserError(f"--program={stage}: the config has no stage llava.{stage}")
    networks = abstract_networks(section)
    devices, chip = topology_devices(topology, num_slices)
    mesh, rules = make_mesh(config.mesh, devices), ShardingRules()
    frozen = {"tower": abstract_vision_tower(networks.tower, dtype=section.dtype, mesh=mesh, rules=rules)}
    if stage == "align":
        frozen["language_model"] = abstract_causal_lm(networks.llm, dtype=section.dtype, mesh=mesh, rules=rules)
    task = llava_task(stage, networks, _ANY_NORMALISATION, frozen)
    trainer = Trainer(task, stages[stage].train, mesh, rules)
    side = networks.vision.image_size
    shape = BatchShape(Bucket(side, side), stages[stage].max_length)
    return compile_trainer(
        trainer, frozen, abstract_batch(stages[stage], networks, trainer), frozen, topology, chip, shape
    )


def abstract_networks(section: LlavaSectionConfig) -> LlavaConfig:
    """Returns the networks of a section: from the folders' configs or, without folders, from its `model` sections.

    Raises:
      UserError: a network has neither, or they do not fit together.
    """
    if section.llm.weights:
        folder = find_folder(section.llm.weights)
        llm = llm_config(read_config(folder), folder / CONFIG_FILE, dtype=section.dtype)
    elif section.llm.model:
        llm = section.llm.model
    else:
        raise UserError("llava.llm has neither weights nor model: give --config.llava.llm.weights=FOLDER")
    if section.vision.weights:
        vision = read_vision_config(find_folder(section.vision.weights), dtype=section.dtype)
    elif section.vision.model:
        vision = section.vision.model
    else:
        raise UserError("llava.vision has neither weights nor model: give --config.llava.vision.weights=FOLDER")
    vocabulary = llm.vocab_size + _ROWS_ADDED
    return connect(section, llm, vision, vocabulary - 1, vocabulary)


def abstract_batch(stage: LlavaStageConfig, networks: LlavaConfig, trainer: Trainer) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of conversations about images."""
    rows, side, length = stage.train.batch_size, networks.vision.image_size, stage.max_length
    shapes = {
        "image": ((rows, side, side, 3), jnp.uint8),
        "tokens": ((rows, length), jnp.int32),
        "counted": ((rows, length), jnp.bool_),
        "truncated": ((rows,), jnp.bool_),
    }
    sharding = batch_sharding(trainer.mesh, trainer.rules)
    return {name: jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding) for name, (sizes, dtype) in shapes.items()}
