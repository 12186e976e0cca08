"""Writes a model's tensors as one safetensors file, or as several with an index, one tensor at a time."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from lidit_jax.files import write_json
from lidit_jax.weights.safetensors_file import SafetensorsWriter

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_SHARD_BYTES = 5 * 10**9


@contextlib.contextmanager
def write_shards(
    folder: epath.Path,
    stem: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Iterator[Callable[[str, np.ndarray], int]]:
    """Yields a function (name, array) -> bytes written, which must be called once for each tensor, in any order.

    Memory holds one tensor, never a full file. The same tensors give the same bytes.

    Args:
      folder: existing folder. After an error its files are incomplete, and the caller must remove them.
      stem: name of the files without their ending.
      shapes: shape of each tensor.
      dtype: dtype of the tensors in the files; arrays are cast to it, rounding to nearest.
      max_shard_bytes: largest size of a file; a larger tensor gets a file of its own.

    Raises:
      OSError: the disk is full or not writable.
    """
    shards = _plan_shards(stem, shapes, dtype.itemsize, max_shard_bytes)
    if len(shards) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", _index(shapes, shards, dtype.itemsize))
    with contextlib.ExitStack() as stack:
        writers = {}
        for file, names in shards.items():
            file_shapes = {name: shapes[name] for name in names}
            writer = stack.enter_context(SafetensorsWriter(folder / file, file_shapes, dtype))
            writers |= dict.fromkeys(names, writer)

        def write(name: str, array: np.ndarray) -> int:
            tensor = np.array(array, dtype, order="C")
            writers[name].write(name, tensor)
            return tensor.nbytes

        yield write


def _plan_shards(
    stem: str, shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_bytes: int
) -> dict[str, list[str]]:
    """Returns {file name: names of its tensors}, with the tensors of a block next to each other."""
    shards, free = [[]], max_shard_bytes
    for name in sorted(shapes, key=_natural_order):
        size = math.prod(shapes[name]) * itemsize
        if size > free and shards[-1]:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(name)
        free -= size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    total = len(shards)
    return {f"{stem}-{i:05}-of-{total:05}.safetensors": names for i, names in enumerate(shards, start=1)}


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _index(shapes: Mapping[str, tuple[int, ...]], shards: Mapping[str, list[str]], itemsize: int) -> dict[str, Any]:
    """Returns the contents of the index by which transformers and diffusers find a tensor's shard."""
    return {
        "metadata": {"total_size": sum(map(math.prod, shapes.values())) * itemsize},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
