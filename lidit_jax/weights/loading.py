"""Loads safetensors into sharded arrays on the device mesh, one tensor at a time."""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lidit_jax.errors import UserError
from lidit_jax.metrics import duration
from lidit_jax.models.initialize import is_stacked
from lidit_jax.parallel.rules import ShardingRules, shardings
from lidit_jax.weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0  # seconds between two progress lines

Path = tuple[str, ...]  # path of a parameter in its tree: ("layers", "q_proj", "kernel")


@dataclasses.dataclass(frozen=True)
class FusedRows:
    """Rows of a parameter in a tensor that fuses several, in PyTorch's axes: those of the keys in Phi-3's `qkv_proj`.

    Attributes:
      rows: indices of the rows.
      total: number of rows of the tensor.
    """

    rows: range
    total: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where parameters go: sharded over a mesh by the sharding rules or, without a mesh, on the first device.

    Attributes:
      mesh: device mesh, or None.
      rules: sharding rules; None: `ShardingRules()`.
    """

    mesh: Mesh | None = None
    rules: ShardingRules | None = None

    def sharding(self, boxed: nn.LogicallyPartitioned) -> jax.sharding.Sharding:
        """Returns the sharding of a parameter, given as its shape in the box of its logical axes."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return shardings(boxed, self.mesh, self.rules or ShardingRules())


def place_parameters(
    weights: SafetensorsFolder,
    boxed: Mapping[Path, nn.LogicallyPartitioned],
    names: Mapping[Path, Sequence[str]],
    placement: Placement,
    *,
    dtype: str,
    belonging: tuple[str, ...],
    derived: str = "",
    norm_offset: float = 0.0,
    fused: Mapping[Path, FusedRows] | None = None,
) -> dict[str, Any]:
    """Loads a model's parameters, each directly into its shards; logs progress if that takes long.

    Matrices and biases are stored in `dtype`, to which each use would cast them anyway; norm scales in float32. Kernels
    are transposed from PyTorch's axes to ours (`torch_axes`), and the tensors of single blocks are stacked.

    Args:
      weights: folder to read from.
      boxed: path -> box with shape and logical axes; a first axis "layers" is a stack over the blocks.
      names: path -> names of its tensors in the folder: a single one, or one per block for a stack.
      placement: where the parameters go.
      dtype: dtype of matrices and biases.
      belonging: passed to `SafetensorsFolder.check_no_unused`.
      derived: passed to `SafetensorsFolder.check_no_unused`.
      norm_offset: added to the norm scales.
      fused: path -> its rows, for parameters that share their tensors with others; only these rows are read.

    Returns:
      A nested dict of arrays.

    Raises:
      UserError: for the reasons of `SafetensorsFolder.read` and `check_no_unused`, or a value is not finite.
    """
    fused = fused or {}
    file_shapes = {path: shape_in_file(path, leaf) for path, leaf in boxed.items()}
    for path, part in fused.items():
        file_shapes[path] = (part.total, *file_shapes[path][1:])
    for path in boxed:  # check all shapes before allocating memory for any
        for name in names[path]:
            weights.check(name, file_shapes[path])
    tensors = set(itertools.chain.from_iterable(names.values()))
    weights.check_no_unused(tensors, belonging, derived)
    progress = _Progress(str(weights.folder), sum(map(weights.num_bytes, tensors)))
    flat = {}
    for path, leaf in boxed.items():
        flat[path] = _load_parameter(
            weights,
            names[path],
            leaf,
            placement.sharding(leaf),
            dtype=_dtype_of(path, dtype),
            file_shape=file_shapes[path],
            rows=fused[path].rows if path in fused else None,
            transposed=is_transposed(path),
            offset=norm_offset if _is_norm(path) else 0.0,
            progress=progress,
        )
    return flax.traverse_util.unflatten_dict(flat)


def abstract_parameters(
    boxed: Mapping[Path, nn.LogicallyPartitioned], placement: Placement, *, dtype: str
) -> dict[str, Any]:
    """Returns the result of `place_parameters` as `jax.ShapeDtypeStruct`s with shardings, without reading files."""
    flat = {
        path: jax.ShapeDtypeStruct(leaf.value.shape, _dtype_of(path, dtype), sharding=placement.sharding(leaf))
        for path, leaf in boxed.items()
    }
    return flax.traverse_util.unflatten_dict(flat)


def _dtype_of(path: Path, dtype: str) -> np.dtype:
    return np.dtype(np.float32) if _is_norm(path) else jnp.dtype(dtype)


def _is_norm(path: Path) -> bool:
    return path[-1] == "weight"


def _load_parameter(
    weights: SafetensorsFolder,
    names: Sequence[str],
    boxed: nn.LogicallyPartitioned,
    sharding: jax.sharding.Sharding,
    *,
    dtype: np.dtype,
    file_shape: tuple[int, ...],
    rows: range | None,
    transposed: bool,
    offset: float,
    progress: "_Progress",
) -> jax.Array:
    """Loads the tensors of one parameter into one array, which is allocated sharded.

    Each tensor is read, cast and sent to the devices in shards before the next one is read, so that the host never
    holds two of them.
    """
    shape, stacked = boxed.value.shape, is_stacked(boxed)
    sharding_in_file = _sharding_in_file(sharding, stacked, transposed, len(shape))
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)() if stacked else None
    for i, name in enumerate(names):
        value = weights.read(name, file_shape, rows)
        num_bytes = value.nbytes
        value = value.astype(dtype, copy=False)
        value = jax.make_array_from_callback(value.shape, sharding_in_file, lambda index, value=value: value[index])
        if stacked:
            stack, is_finite = _set_entry(sharding, transposed, offset)(stack, value, np.int32(i))
        else:
            value, is_finite = _convert(sharding, transposed, offset)(value)
        if not is_finite:  # waits for the device, so that this tensor's memory is free before the next one
            raise UserError(f"{weights.folder}: tensor {name} has values that are not finite; copy the file again")
        progress.add(num_bytes)
    return stack if stacked else value


class _Progress:
    """Logs a progress line every `LOG_EVERY_S` seconds while the weights of a folder are read."""

    def __init__(self, name: str, total: int):
        self._name, self._total, self._read = name, total, 0
        self._started = self._logged = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._read += num_bytes
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            left = (now - self._started) * (self._total - self._read) / self._read
            amount = f"{self._read / 1e9:.1f} of {self._total / 1e9:.1f} GB"
            logger.info("loading %s: %s  eta %s", self._name, amount, duration(left))


@functools.cache
def _set_entry(sharding: jax.sharding.Sharding, transposed: bool, offset: float):
    """Returns a jitted (stack, value, i) -> (stack with the value at index i, whether the value is finite).

    The stack is donated, so that it is updated in place.
    """

    def set_entry(stack, value, i):
        value = _from_torch(value, transposed, offset)
        return jax.lax.dynamic_update_index_in_dim(stack, value, i, 0), jnp.isfinite(value).all()

    return jax.jit(set_entry, donate_argnums=0, out_shardings=(sharding, None))


@functools.cache
def _convert(sharding: jax.sharding.Sharding, transposed: bool, offset: float):
    """Returns a jitted value -> (converted value, whether it is finite).

    The input is donated: a tensor that needs no conversion is not copied.
    """

    def convert(value):
        value = _from_torch(value, transposed, offset)
        return value, jnp.isfinite(value).all()

    return jax.jit(convert, donate_argnums=0, out_shardings=(sharding, None))


def _from_torch(value: jax.Array, transposed: bool, offset: float) -> jax.Array:
    value = value.transpose(np.argsort(torch_axes(value.ndim))) if transposed else value
    return value + jnp.asarray(offset, value.dtype) if offset else value


def torch_axes(ndim: int) -> tuple[int, ...]:
    """Returns the permutation from our axes to PyTorch's: HWIO -> OIHW, IO -> OI, vectors unchanged."""
    return {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def is_transposed(path: Path) -> bool:
    """Returns True if PyTorch has the parameter's axes in another order (see `torch_axes`)."""
    return path[-1] == "kernel"


def shape_in_file(path: Path, boxed: nn.LogicallyPartitioned) -> tuple[int, ...]:
    """Returns the shape in PyTorch of a parameter's tensor, for a stack that of one block."""
    shape = boxed.value.shape[1:] if is_stacked(boxed) else boxed.value.shape
    return tuple(shape[axis] for axis in torch_axes(len(shape))) if is_transposed(path) else shape


def _sharding_in_file(
    sharding: jax.sharding.Sharding, stacked: bool, transposed: bool, ndim: int
) -> jax.sharding.Sharding:
    """Returns the sharding of one tensor in the axes of the file.

    Args:
      sharding: sharding of our parameter.
      stacked: whether our parameter has a leading axis of blocks.
      transposed: whether the file has the axes in PyTorch's order.
      ndim: number of axes of our parameter.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))[1 if stacked else 0 :]
    if transposed:
        axes = tuple(axes[axis] for axis in torch_axes(len(axes)))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
