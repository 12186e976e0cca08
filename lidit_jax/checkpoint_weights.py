"""Reads the weights of a run's newest intact checkpoint, without its optimiser state, whole or array by array."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lidit_jax.checkpoint import check_sizes, load_newest
from lidit_jax.errors import UserError

READ_BYTES = 256 << 20  # read at a time from a stacked array, if its chunks are no larger


def load_weights(folder: str | epath.Path, weights: str, into: Any = None, strict: bool = False) -> tuple[Any, int]:
    """Loads one weight tree of the newest intact checkpoint, without the optimiser state.

    Args:
      folder: folder of the `Checkpoints`.
      weights: "params" or "ema".
      into: tree of `jax.ShapeDtypeStruct` with shardings to load into; None loads the stored tree onto the first
        device.
      strict: True raises if the newest checkpoint is damaged.

    Returns:
      The tree as nested dicts of arrays, and the step.

    Raises:
      UserError: if there is no intact checkpoint, it has no such weights, or their names or shapes differ from `into`.
    """

    def load(step_folder: epath.Path) -> tuple[Any, int]:
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = _metadata(step_folder, weights)
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=first_device), tree)
        if into is not None:
            check_same_model(abstract, into)
            abstract = into
        args = ocp.args.PyTreeRestore(
            {weights: abstract},
            restore_args=ocp.checkpoint_utils.construct_restore_args({weights: abstract}),
            partial_restore=True,
        )
        state = ocp.PyTreeCheckpointHandler().restore(step_folder / "state", args=args)
        return state[weights], int(step_folder.name)

    return load_newest(folder, strict, load)


@contextlib.contextmanager
def open_weights(folder: str | epath.Path, weights: str, strict: bool = False) -> Iterator["StoredWeights"]:
    """Opens one weight tree of the newest intact checkpoint, to be read array by array.

    Args:
      folder: folder of the `Checkpoints`.
      weights: "params" or "ema".
      strict: True raises if the newest checkpoint is damaged.

    Yields:
      The arrays by path; nothing is read before an array is asked for.

    Raises:
      UserError: if there is no intact checkpoint, or it has no such weights.
    """
    context = ocp.type_handlers.get_ts_context()

    def load(step_folder: epath.Path) -> StoredWeights:
        flat = flax.traverse_util.flatten_dict(_metadata(step_folder, weights))
        return StoredWeights({path: StoredArray(leaf, context) for path, leaf in flat.items()}, int(step_folder.name))

    yield load_newest(folder, strict, load)


@dataclasses.dataclass(frozen=True)
class StoredWeights(Mapping):
    """Arrays of a checkpoint by path.

    Attributes:
      arrays: path in the tree -> array.
      step: training step of the checkpoint.
    """

    arrays: Mapping[tuple[str, ...], "StoredArray"]
    step: int

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(array.shape) for array in self.arrays.values())

    def __getitem__(self, path: tuple[str, ...]) -> "StoredArray":
        return self.arrays[path]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


class StoredArray:
    """An array of a checkpoint, read on demand into host memory.

    `np.asarray` reads all of it; iteration yields one entry of the first axis after the other.
    """

    def __init__(self, metadata: Any, context: tensorstore.Context):
        """Reads nothing yet.

        Args:
          metadata: Orbax's metadata of the array.
          context: TensorStore context shared by all arrays of a checkpoint.
        """
        self.shape, self.dtype = tuple(metadata.shape), np.dtype(metadata.dtype)
        self._metadata, self._context = metadata, context

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array.

        Raises:
          UserError: if it can't be read.
        """
        array = self._read(self._open())
        return array if dtype is None else array.astype(dtype, copy=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the entries of the first axis, reading up to `READ_BYTES` at a time.

        Raises:
          UserError: if the array can't be read.
        """
        store = self._open()
        entry_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        entries_per_read = max(1, READ_BYTES // max(1, entry_bytes))
        # Reading a part of a chunk decompresses all of it: read along chunk borders, and an oversized chunk at once.
        chunk = store.chunk_layout.read_chunk.shape
        if chunk[0] <= entries_per_read:
            entries_per_read -= entries_per_read % chunk[0]
        elif math.prod(chunk) * self.dtype.itemsize > READ_BYTES:
            entries_per_read = chunk[0]
        for begin in range(0, self.shape[0], entries_per_read):
            yield from self._read(store[begin : min(begin + entries_per_read, self.shape[0])])

    def _open(self) -> tensorstore.TensorStore:
        directory = epath.Path(self._metadata.directory)
        info = ocp.type_handlers.ParamInfo(name=self._metadata.name, parent_dir=directory, ts_context=self._context)
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
        with self._reading():
            return tensorstore.open(spec, context=self._context, read=True, open=True).result()

    def _read(self, store: tensorstore.TensorStore) -> np.ndarray:
        with self._reading():
            return store.read().result()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self._metadata.directory}: {self._metadata.name} can't be read "
                f"({' '.join(str(error).split())[:200]}); the checkpoint may be damaged"
            ) from error


def check_same_model(given: Any, wanted: Any) -> None:
    """Raises UserError unless the weights of two trees have the same names and shapes."""
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "the weights to start from have other names or shapes than this model's: compare the two configs' `model`"
        )


def _metadata(folder: epath.Path, weights: str) -> Mapping[str, Any]:
    """Returns the metadata of the arrays of one weight tree of a checkpoint, as nested dicts."""
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    if not isinstance(tree, Mapping):
        raise ValueError("its state is not a tree of names")
    if tree.get(weights) is None:
        available = ", ".join(name for name in ("params", "ema") if tree.get(name) is not None)
        raise UserError(f"{folder.parent}: the checkpoint has no {weights!r} weights; it has {available}")
    check_sizes(tree[weights])
    return tree[weights]
