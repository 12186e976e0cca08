"""Converts LI-DiT's `transformer/` folder (config.json and safetensors) to and from `LIDiTConfig` and Flax parameters.

In PyTorch, `lidit_jax/pytorch/transformer_lidit.py` reads this folder; this module does not need PyTorch.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import flax
import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lidit_jax.errors import UserError
from lidit_jax.files import write_json
from lidit_jax.models.initialize import is_stacked
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.lidit_config import FUSIONS, LIDiTConfig
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.weights.diffusers_vae import DIFFUSERS_VERSION, WEIGHTS_STEM
from lidit_jax.weights.loading import Placement, is_transposed, place_parameters, shape_in_file, torch_axes
from lidit_jax.weights.published_config import (
    MAX_BLOCKS,
    check_format_version,
    positive_integer,
    positive_number,
    refuse_quantised,
)
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, SafetensorsFolder, read_config
from lidit_jax.weights.safetensors_shards import DTYPES, MAX_SHARD_BYTES, write_shards

CLASS_NAME = "LIDiTTransformer2DModel"
# Version of config.json and of the tensor names; the PyTorch class has the same. Version 1 had neither `position` nor
# `refiner_qk_norm`.
FORMAT_VERSION = 2
MAX_LLMS = 64
OWN_TENSORS = ("timestep_embedder.", "text_condition.", "dit.")

# Fields of `LIDiTConfig` that config.json holds. The others (dtype, attention kernel, remat) do not change the function
# that is computed.
SIZES = ("hidden_size", "num_heads", "patch_size", "latent_channels")
COUNTS = ("depth", "refiner_blocks", "collaborative_blocks")  # numbers of blocks
RATIOS = ("mlp_ratio", "refiner_mlp_ratio")
SWITCHES = ("refiner_gated", "refiner_causal", "refiner_rotary", "refiner_qk_norm")
FIELDS = (*SIZES, "position_grid", *COUNTS, *RATIOS, *SWITCHES, "fusion", "position")

# Regular expression of our name of a module -> its name in PyTorch.
MODULES = {
    r"block_(\d+)_branch_(\d+)": r"blocks.\1.\2",
    r"block_(\d+)": r"blocks.\1",
    r"project_(\d+)": r"projections.\1",
    r"pool_(\d+)": r"pooled_texts.\1",
    r"token_refiner_(\d+)": r"token_refiners.\1",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "query_norm": "norm_q",
    "key_norm": "norm_k",
    "dense|Dense_0": "linear",
    "in": "linear_in",
    "out": "linear_out",
}
ATTENTIONS = ("attention", "self_attention", "cross_attention")

ParameterPath = tuple[str, ...]  # ("dit", "blocks", "modulation", "Dense_0", "kernel")


class Leaf(Protocol):
    """An array, or anything that `np.asarray` reads at once and iteration reads along its first axis."""

    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


def torch_name(path: ParameterPath, block: int | None = None) -> str:
    """Returns the name that a parameter of `LIDiT` has in PyTorch.

    `("dit", "blocks", "self_attention", "query", "kernel")` in block 3 -> `"dit.blocks.3.self_attention.to_q.weight"`.

    Args:
      path: path of the parameter in Flax's tree.
      block: index of the block; None for a parameter outside the stacked blocks.
    """
    *modules, leaf = path
    names = []
    for parent, module in zip((None, *modules), modules, strict=False):
        is_attention_output = parent in ATTENTIONS and module == "out"
        names.append("to_out" if is_attention_output else _module_name(module))
        if module == "blocks":
            names.append(str(block))
    return ".".join([*names, "bias" if leaf == "bias" else "weight"])


def read_lidit_config(folder: str | Path | epath.Path) -> dict[str, Any]:
    """Returns the fields of `LIDiTConfig` that the folder's config.json holds.

    Raises:
      UserError: config.json is missing, of another model or of a newer format, or has an unknown key or an invalid
        value.
    """
    return _read_config(folder)[0]


def load_lidit(
    folder: str | Path | epath.Path, *, mesh: Mesh | None = None, rules: ShardingRules | None = None
) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
    """Loads a LI-DiT that `save_lidit` or diffusers' `save_pretrained` wrote.

    Host memory holds one tensor at a time, which is sharded and sent to the devices before the next one is read.

    Args:
      folder: folder with config.json and diffusion_pytorch_model.safetensors, or that file's shards and their index, on
        a disk or in a bucket (gs://…).
      mesh: device mesh; default: all parameters go to the first device.
      rules: sharding rules for the mesh; default: `ShardingRules()`.

    Returns:
      The fields of `LIDiTConfig` that define the model, the feature width of each LLM, and the parameters for
      `LIDiT(config).apply({"params": params}, …)`: a nested dict of float32 arrays.

    Raises:
      UserError: for the reasons of `read_lidit_config`; a file or tensor is missing, damaged, of the wrong shape, not
        floating point or not finite; or the folder has its weights only as pickles (.bin, .pt), which are never read.
    """
    fields, text_widths = _read_config(folder)
    boxed = _boxed_parameters(_canonical(fields), tuple(text_widths))
    names = {path: torch_names(path, leaf) for path, leaf in boxed.items()}
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        params = place_parameters(weights, boxed, names, Placement(mesh, rules), dtype="float32", belonging=OWN_TENSORS)
    return fields, text_widths, params


def save_lidit(
    folder: str | Path,
    config: LIDiTConfig,
    leaves: Mapping[ParameterPath, Leaf],
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], Any] = lambda num_bytes: None,
) -> None:
    """Writes config.json and the weights, which diffusers' `from_pretrained` and `load_lidit` read.

    Leaves are read one at a time, and stacks one block at a time: memory holds one tensor, never a full file. The same
    leaves give the same bytes.

    Args:
      folder: folder to create. After an error it is incomplete, and the caller must remove it.
      config: config of the model.
      leaves: path -> leaf of the Flax tree.
      dtype: "float32", or "bfloat16" (rounded to nearest).
      max_shard_bytes: largest size of a file; a larger tensor gets a file of its own.
      progress: called with the number of bytes after each tensor.

    Raises:
      UserError: the parameters do not fit the config, or the dtype is not one of `DTYPES`.
      OSError: the disk is full or not writable.
    """
    if dtype not in DTYPES:
        raise UserError(f"weights cannot be saved as {dtype!r:.80}: use {' or '.join(DTYPES)}")
    fields, text_widths = {name: getattr(config, name) for name in FIELDS}, _text_widths(leaves)
    boxed = _matching_boxes(config, leaves)
    shapes = {name: shape_in_file(path, leaf) for path, leaf in boxed.items() for name in torch_names(path, leaf)}
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, _config_dict(fields, text_widths))
    with write_shards(folder, WEIGHTS_STEM, shapes, DTYPES[dtype], max_shard_bytes) as write:
        for name, view in torch_tensors(config, leaves):
            progress(write(name, view))


def torch_tensors(config: LIDiTConfig, leaves: Mapping[ParameterPath, Leaf]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the state dict of the PyTorch model, tensor by tensor: (name, view of the leaf's values).

    Raises:
      UserError: the parameters do not fit the config.
    """
    for path, leaf in _matching_boxes(config, leaves).items():
        values = leaves[path] if is_stacked(leaf) else [np.asarray(leaves[path])]
        for name, value in zip(torch_names(path, leaf), values, strict=True):
            yield name, value.transpose(torch_axes(value.ndim)) if is_transposed(path) else value


def torch_names(path: ParameterPath, boxed: nn.LogicallyPartitioned) -> list[str]:
    """Returns the names in PyTorch of a parameter's tensors: one per block for a stack, else a single one."""
    return (
        [torch_name(path, block) for block in range(boxed.value.shape[0])] if is_stacked(boxed) else [torch_name(path)]
    )


def _module_name(module: str) -> str:
    for pattern, name in MODULES.items():
        if match := re.fullmatch(pattern, module):
            return match.expand(name)
    return module


# --- config.json -------------------------------------------------------------------------------------------------


def _read_config(folder: str | Path | epath.Path) -> tuple[dict[str, Any], list[int]]:
    """Returns the fields of `LIDiTConfig` and the feature widths of the LLMs."""
    file, values = epath.Path(folder) / CONFIG_FILE, read_config(folder)
    if values.get("_class_name") != CLASS_NAME:
        raise UserError(f"{file}: _class_name is {values.get('_class_name')!r:.80}, not {CLASS_NAME!r}")
    check_format_version(values.get("format_version"), FORMAT_VERSION, f"{file}: format_version")
    refuse_quantised(values, file)
    if values["format_version"] == 1:
        values = {"position": "conv", "position_grid": LIDiTConfig.position_grid, "refiner_qk_norm": False, **values}
    known = {*FIELDS, "text_widths", "format_version"}
    # diffusers' own keys begin with an underscore.
    if unknown := sorted(key for key in values.keys() - known if not key.startswith("_")):
        raise UserError(f"{file}: key {unknown[0]!r:.80} is unknown, and may change what the model computes")
    if missing := sorted(known - values.keys()):
        raise UserError(f"{file}: {missing[0]} is missing")
    fields = {name: positive_integer(values, name, file) for name in (*SIZES, "position_grid")}
    fields |= {name: _count(values, name, file) for name in COUNTS}
    fields |= {name: positive_number(values, name, file) for name in RATIOS}
    fields |= {name: _switch(values, name, file) for name in SWITCHES}
    fields["fusion"], fields["position"] = values["fusion"], values["position"]
    if not isinstance(values["position"], str):
        raise UserError(f"{file}: position={values['position']!r:.80} is not a string")
    if values["fusion"] not in FUSIONS:
        raise UserError(f"{file}: fusion={values['fusion']!r:.80} is unknown: use one of {', '.join(FUSIONS)}")
    try:
        LIDiTConfig(**fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    widths = values["text_widths"]
    if not isinstance(widths, list) or not 1 <= len(widths) <= MAX_LLMS:
        raise UserError(f"{file}: text_widths is not a list of 1 to {MAX_LLMS} widths")
    return fields, [positive_integer({"text_widths": width}, "text_widths", file) for width in widths]


def _count(values: Mapping[str, Any], key: str, file: epath.Path) -> int:
    least = 1 if key == "depth" else 0
    if type(values[key]) is not int or not least <= values[key] <= MAX_BLOCKS:
        raise UserError(f"{file}: {key}={values[key]!r:.80} is not an integer from {least} to {MAX_BLOCKS}")
    return values[key]


def _switch(values: Mapping[str, Any], key: str, file: epath.Path) -> bool:
    if not isinstance(values[key], bool):
        raise UserError(f"{file}: {key}={values[key]!r:.80} is not true or false")
    return values[key]


def _config_dict(fields: Mapping[str, Any], text_widths: Sequence[int]) -> dict[str, Any]:
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": DIFFUSERS_VERSION,
        **fields,
        "text_widths": list(text_widths),
        "format_version": FORMAT_VERSION,
    }


# --- the parameters ----------------------------------------------------------------------------------------------


def _canonical(fields: Mapping[str, Any]) -> LIDiTConfig:
    """Returns the config with those values of the remaining fields, which change no parameter, that trace fastest."""
    return LIDiTConfig(**fields, remat="none", attention="xla", dtype="float32")


@functools.cache
def _boxed_parameters(
    config: LIDiTConfig, text_widths: tuple[int, ...]
) -> dict[ParameterPath, nn.LogicallyPartitioned]:
    """Returns {path: box with shape and logical axes} of every parameter of `LIDiT(config)`, allocating nothing."""
    init = functools.partial(LIDiT(config).init_params, text_widths)
    return flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)))


def _text_widths(leaves: Mapping[ParameterPath, Leaf]) -> tuple[int, ...]:
    kernels = (("text_condition", f"project_{i}", "dense", "kernel") for i in itertools.count())
    return tuple(leaves[path].shape[0] for path in itertools.takewhile(leaves.__contains__, kernels))


def _matching_boxes(
    config: LIDiTConfig, leaves: Mapping[ParameterPath, Leaf]
) -> dict[ParameterPath, nn.LogicallyPartitioned]:
    """Returns `_boxed_parameters` of the model that the leaves belong to.

    Raises:
      UserError: the leaves do not fit the config.
    """
    fields, text_widths = {name: getattr(config, name) for name in FIELDS}, _text_widths(leaves)
    if not text_widths:
        raise UserError("LI-DiT's parameters lack text_condition/project_0: the model has no LLM")
    boxed = _boxed_parameters(_canonical(fields), text_widths)
    if missing := boxed.keys() - leaves.keys():
        raise UserError(f"LI-DiT's parameters lack {'/'.join(min(missing))}, which its config requires")
    if unexpected := leaves.keys() - boxed.keys():
        raise UserError(f"LI-DiT's parameters have {'/'.join(min(unexpected))}, which its config does not have")
    for path, leaf in boxed.items():
        found, shape = tuple(leaves[path].shape), leaf.value.shape
        if found != shape:
            raise UserError(f"LI-DiT's {'/'.join(path)} has shape {found}, its config requires {shape}")
    return boxed
