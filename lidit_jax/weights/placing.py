"""From tensors on a disk to arrays on the mesh, one tensor at a time."""

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
from lidit_jax.parallel.rules import ShardingRules, shardings
from lidit_jax.weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)

SAY_EVERY = 10.0  # seconds of loading between two lines about it

Path = tuple[str, ...]  # of a parameter in its tree: ("layers", "q_proj", "kernel")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where parameters go: cut over a mesh by the table of logical axes or, without a mesh, on the first device."""

    mesh: Mesh | None = None
    rules: ShardingRules | None = None

    def sharding(self, boxed: nn.LogicallyPartitioned) -> jax.sharding.Sharding:
        """Of a parameter (its shape, in the box of its logical axes)."""
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
) -> dict[str, Any]:
    """Reads a model's parameters, each straight into its place; says how far it is when that takes long.

    Matrices and biases come in `dtype`, in which each use would cast them anyway; the norms' scales come in float32.
    PyTorch's kernels become ours (`torch_axes`), and tensors of single blocks become our stacks.

    Args:
      boxed: shapes and logical axes by path; those whose first axis is "layers" are stacks over the blocks.
      names: of the tensors of each: one, or of a stack one for each block.
      belonging, derived: of `SafetensorsFolder.refuse_unexpected`.
      norm_offset: added to the norms' scales.

    Returns:
      A nested dict of arrays.

    Raises:
      UserError: as `SafetensorsFolder.read` and `refuse_unexpected`, and for a number that is not finite.
    """
    for path, leaf in boxed.items():  # before memory of their size is asked for
        for name in names[path]:
            weights.check(name, shape_in_file(path, leaf))
    weights.refuse_unexpected(itertools.chain.from_iterable(names.values()), belonging, derived)
    total = sum(weights.num_bytes(name) for of_parameter in names.values() for name in of_parameter)
    progress = _Progress(str(weights.folder), total)
    flat = {}
    for path, leaf in boxed.items():
        flat[path] = _place_parameter(
            weights,
            names[path],
            leaf,
            placement.sharding(leaf),
            dtype=_dtype_of(path, dtype),
            in_file=shape_in_file(path, leaf),
            transposed=is_transposed(path),
            offset=norm_offset if _is_norm(path) else 0.0,
            progress=progress,
        )
    return flax.traverse_util.unflatten_dict(flat)


def abstract_parameters(
    boxed: Mapping[Path, nn.LogicallyPartitioned], placement: Placement, *, dtype: str
) -> dict[str, Any]:
    """What `place_parameters` would give, without reading anything."""
    flat = {
        path: jax.ShapeDtypeStruct(leaf.value.shape, _dtype_of(path, dtype), sharding=placement.sharding(leaf))
        for path, leaf in boxed.items()
    }
    return flax.traverse_util.unflatten_dict(flat)


def _dtype_of(path: Path, dtype: str) -> np.dtype:
    return np.dtype(np.float32) if _is_norm(path) else jnp.dtype(dtype)


def _is_norm(path: Path) -> bool:
    return path[-1] == "weight"


def _place_parameter(
    weights: SafetensorsFolder,
    names: Sequence[str],
    boxed: nn.LogicallyPartitioned,
    sharding: jax.sharding.Sharding,
    *,
    dtype: np.dtype,
    in_file: tuple[int, ...],
    transposed: bool,
    offset: float,
    progress: "_Progress",
) -> jax.Array:
    """One parameter's tensors in one array that is sharded from the start.

    A tensor is read, cast, cut and sent; only then is the next one read, so the host never holds two of them.
    """
    shape, stacked = boxed.value.shape, is_stacked(boxed)
    sharding_in_file = _sharding_in_file(sharding, stacked, transposed, len(shape))
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)() if stacked else None
    for i, name in enumerate(names):
        value = weights.read(name, in_file).astype(dtype, copy=False)
        value = jax.make_array_from_callback(value.shape, sharding_in_file, lambda index, value=value: value[index])
        if stacked:
            stack, is_finite = _set_entry(sharding, transposed, offset)(stack, value, np.int32(i))
        else:
            value, is_finite = _convert(sharding, transposed, offset)(value)
        if not is_finite:  # waits for the device, and so for the memory of this tensor to be free again
            raise UserError(f"{weights.folder}: tensor {name} has numbers that are not finite; copy the file again")
        progress.read(weights.num_bytes(name))
    return stack if stacked else value


class _Progress:
    """A line every few seconds while the weights of one folder are read."""

    def __init__(self, name: str, total: int):
        self._name, self._total, self._read = name, total, 0
        self._started = self._said = time.monotonic()

    def read(self, num_bytes: int) -> None:
        self._read += num_bytes
        now = time.monotonic()
        if now - self._said >= SAY_EVERY:
            self._said = now
            left = (now - self._started) * (self._total - self._read) / self._read
            of_total = f"{self._read / 1e9:.1f} of {self._total / 1e9:.1f} GB"
            logger.info("loading %s: %s  eta %s", self._name, of_total, duration(left))


@functools.cache
def _set_entry(sharding: jax.sharding.Sharding, transposed: bool, offset: float):
    """(stack, value, i) -> the stack with value at i, and whether it is finite. In place: the stack is donated."""

    def set_entry(stack, value, i):
        value = _as_ours(value, transposed, offset)
        return jax.lax.dynamic_update_index_in_dim(stack, value, i, 0), jnp.isfinite(value).all()

    return jax.jit(set_entry, donate_argnums=0, out_shardings=(sharding, None))


@functools.cache
def _convert(sharding: jax.sharding.Sharding, transposed: bool, offset: float):
    """value -> our value, and whether it is finite. A tensor that stays as it is is passed through, not copied."""

    def convert(value):
        value = _as_ours(value, transposed, offset)
        return value, jnp.isfinite(value).all()

    return jax.jit(convert, donate_argnums=0, out_shardings=(sharding, None))


def _as_ours(value: jax.Array, transposed: bool, offset: float) -> jax.Array:
    value = value.transpose(np.argsort(torch_axes(value.ndim))) if transposed else value
    return value + jnp.asarray(offset, value.dtype) if offset else value


def torch_axes(ndim: int) -> tuple[int, ...]:
    """The axes of our array in PyTorch's order: HWIO -> OIHW, IO -> OI; a vector's stays."""
    return {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def is_stacked(boxed: nn.LogicallyPartitioned) -> bool:
    """Whether the first axis is that of blocks, which PyTorch has a tensor each for."""
    return boxed.names[:1] == ("layers",)


def is_transposed(path: Path) -> bool:
    """Whether PyTorch has the axes in another order (`torch_axes`)."""
    return path[-1] == "kernel"


def shape_in_file(path: Path, boxed: nn.LogicallyPartitioned) -> tuple[int, ...]:
    """Of one of the tensors of our parameter."""
    shape = boxed.value.shape[1:] if is_stacked(boxed) else boxed.value.shape
    return tuple(shape[axis] for axis in torch_axes(len(shape))) if is_transposed(path) else shape


def _sharding_in_file(
    sharding: jax.sharding.Sharding, stacked: bool, transposed: bool, ndim: int
) -> jax.sharding.Sharding:
    """Of one tensor as the file has it. Args: ndim: axes of our parameter."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))[1 if stacked else 0 :]
    if transposed:
        axes = tuple(axes[axis] for axis in torch_axes(len(axes)))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))
