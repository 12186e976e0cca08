"""Orbax checkpoints: asynchronous, atomic, and readable without the code that wrote them.

A checkpoint has four items: `state` (step, parameters, EMA, optimiser), `facts` (JSON: the fingerprint of the data, the
digests of the frozen networks), `config` (JSON), and `data`, the position of each process in the data (JSON, one file
for each process).
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

# Errors that retrying cannot fix: disk full, quota, permissions. A broken connection is not one of them.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_DISK_ERROR_TEXT = re.compile(r"no space|quota|permission|read-only|disk|ENOSPC", re.I)
# Shard size in bytes above which an array that stacks the transformer blocks is written as one chunk for each block. In
# a single chunk, the 14 GB stack of a 10B model would take twice that memory to read one block.
LARGE_STACK_BYTES = 64 << 20
READ_BYTES = 256 << 20  # read at a time from a stacked array, if its chunks are no larger


class DataPositionHandler(ocp.CheckpointHandler):
    """Writes the data position of this process, and restores those of all: the number of processes may change."""

    def save(self, directory: epath.Path, args: "SaveDataPosition") -> None:
        (directory / f"process_{jax.process_index():05}.json").write_text(json.dumps(args.position))

    def restore(self, directory: epath.Path, args: "RestoreDataPositions | None" = None) -> list[dict[str, Any]]:
        del args
        return [json.loads(file.read_text()) for file in sorted(directory.glob("process_*.json"), key=str)]


@ocp.args.register_with_handler(DataPositionHandler, for_save=True)
@dataclasses.dataclass
class SaveDataPosition(ocp.args.CheckpointArgs):
    """Arguments of a save.

    Attributes:
      position: the data position of this process, JSON-serialisable.
    """

    position: Mapping[str, Any]


@ocp.args.register_with_handler(DataPositionHandler, for_restore=True)
@dataclasses.dataclass
class RestoreDataPositions(ocp.args.CheckpointArgs):
    """Restores the data positions of all processes that saved."""


class Checkpoints:
    """The checkpoints of one trained component, in `folder`."""

    def __init__(self, folder: str | epath.Path, config: Mapping[str, Any], keep: int = 2):
        self.folder = epath.Path(folder).resolve()
        self.config = dict(config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: can't be written ({error.strerror}); choose another --workdir") from error
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._being_written: int | None = None  # step of a checkpoint that is not announced yet

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, facts: Mapping[str, Any], position: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays are copied before this returns, so the state may be donated.

        Args:
          step: number of steps taken.
          state: tree of arrays.
          facts: JSON-serialisable facts that a resumed run must agree with.
          position: position of this process in the data, JSON-serialisable.

        Raises:
          UserError: if the disk is full or not writable.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=jax.tree.map(_save_args, state)),
            facts=ocp.args.JsonSave(dict(facts)),
            config=ocp.args.JsonSave(self.config),
            data=SaveDataPosition(position),
        )
        self.wait()  # for the checkpoint before, as Orbax would
        with self._writing():
            # Without force, Orbax polls for preemption notices itself, with other step numbers than `preemption.py`.
            self._manager.save(step, args=items, force=True)
        self._being_written = step

    def restore(self, abstract_state: Any, facts: Mapping[str, Any]) -> tuple[Any, Sequence[Mapping[str, Any]]] | None:
        """Restores the newest checkpoint.

        Args:
          abstract_state: shapes, dtypes and shardings of the state.
          facts: the facts of this run; each must equal the checkpoint's.

        Returns:
          The state, sharded like `abstract_state`, and the data positions of all processes that saved it; None if there
          is no checkpoint.

        Raises:
          UserError: if the checkpoint was made with other facts (other data, other frozen weights), or does not fit.
        """
        step = self.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                abstract_state, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state)
            ),
            facts=ocp.args.JsonRestore(),
            data=RestoreDataPositions(),
        )
        try:
            restored = self._manager.restore(step, args=args)
            if not restored.data:
                raise ValueError("it has no data position")
        except (ValueError, KeyError, RecursionError) as error:
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} belongs to another model or another version of this "
                f"program ({' '.join(str(error).split())[:200]}); use another --workdir"
            ) from error
        for name, value in facts.items():
            if restored.facts.get(name) != value:
                raise UserError(
                    f"{self.folder}: the checkpoint of step {step} was trained with {name} = "
                    f"{restored.facts.get(name)!r}, now it is {value!r}: change it back or use another --workdir"
                )
        return restored.state, restored.data

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: if the disk is full or not writable.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self.announce()

    def announce(self) -> None:
        """Logs the path of the newest checkpoint once it is on disk."""
        if self._being_written is None or self._manager.is_saving_in_progress():
            return
        if jax.process_index() == 0:
            logger.info("saved %s", self.folder / str(self._being_written))
        self._being_written = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the disk's errors while writing into a one-line UserError; earlier checkpoints are kept."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # Each library reports a full disk in its own way; errors of devices, and bugs, are raised unchanged.
            if getattr(error, "errno", None) not in _DISK_ERRORS and not _DISK_ERROR_TEXT.search(str(error)):
                raise
            raise UserError(
                f"{self.folder}: a checkpoint can't be written ({' '.join(str(error).split())[:200]}); the last "
                f"complete one, of step {self.latest_step()}, is kept: free disk space, then run the same command again"
            ) from error

    def close(self) -> None:
        with self._writing():
            self._manager.close()


def require_checkpoint(folder: str | epath.Path) -> None:
    """Raises UserError unless the folder has a finished checkpoint."""
    if not latest_step(folder):
        raise _no_checkpoint(folder)


def _no_checkpoint(folder: str | epath.Path) -> UserError:
    return UserError(f"{folder}: no finished checkpoint there: train first, or give the --workdir of a run")


def check_same_model(given: Any, wanted: Any) -> None:
    """Raises UserError unless the weights of two trees have the same names and shapes."""
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "the weights to start from have other names or shapes than this model's: compare the two configs' `model`"
        )


def latest_step(folder: str | epath.Path) -> int:
    """Returns the step of the newest finished checkpoint in the folder, or 0; opens and creates nothing."""
    return max((int(step.name) for step in epath.Path(folder).glob("*") if step.name.isdecimal()), default=0)


def load_weights(folder: str | epath.Path, weights: str, into: Any = None) -> tuple[Any, int]:
    """Loads one weight tree of the newest checkpoint, without the optimiser state.

    Args:
      folder: folder of the `Checkpoints`.
      weights: "params" or "ema".
      into: tree of `jax.ShapeDtypeStruct` with shardings to load into; None loads the stored tree onto the first
        device.

    Returns:
      The tree as nested dicts of arrays, and the step.

    Raises:
      UserError: if there is no checkpoint, it has no such weights, or their names or shapes differ from `into`.
    """
    with _open_newest(folder, weights) as (manager, step, tree):
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=first_device), tree)
        if into is not None:
            check_same_model(abstract, into)
            abstract = into
        args = ocp.args.PyTreeRestore(
            {weights: abstract},
            restore_args=ocp.checkpoint_utils.construct_restore_args({weights: abstract}),
            partial_restore=True,
        )
        restored = manager.restore(step, args=ocp.args.Composite(state=args))
    return restored.state[weights], step


def load_facts(folder: str | epath.Path) -> dict[str, Any]:
    """Returns the facts of the newest checkpoint: digests of the data and of the frozen networks.

    Raises:
      UserError: if there is no checkpoint.
    """
    with _open_newest(folder, "params") as (manager, step, _):
        return manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore())).facts


@contextlib.contextmanager
def open_weights(folder: str | epath.Path, weights: str) -> Iterator["StoredWeights"]:
    """Opens one weight tree of the newest checkpoint, to be read array by array.

    Args:
      folder: folder of the `Checkpoints`.
      weights: "params" or "ema".

    Yields:
      The arrays by path; nothing is read before an array is asked for.

    Raises:
      UserError: if there is no checkpoint, or it has no such weights.
    """
    with _open_newest(folder, weights) as (_, step, tree):
        flat, context = flax.traverse_util.flatten_dict(tree), ocp.type_handlers.get_ts_context()
        yield StoredWeights({path: StoredArray(leaf, context) for path, leaf in flat.items()}, step)


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


@contextlib.contextmanager
def _open_newest(
    folder: str | epath.Path, weights: str
) -> Iterator[tuple[ocp.CheckpointManager, int, Mapping[str, Any]]]:
    """Opens the newest checkpoint: yields Orbax's manager, the step, and the arrays' metadata as nested dicts."""
    folder = epath.Path(folder).resolve()
    require_checkpoint(folder)
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in ("facts", "config")}
    handlers["data"] = DataPositionHandler()  # without it, Orbax warns about unknown items
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:  # in an object store, the folder may exist before its checkpoint is finished
            raise _no_checkpoint(folder)
        tree = manager.item_metadata(step)["state"].tree
        if tree.get(weights) is None:
            available = ", ".join(name for name in ("params", "ema") if tree.get(name) is not None)
            raise UserError(f"{folder}: the checkpoint has no {weights!r} weights; it has {available}")
        yield manager, step, tree[weights]


def _save_args(array: jax.Array) -> ocp.SaveArgs:
    """Returns options that write a large stack with one chunk for each block, readable without the others."""
    shard = array.sharding.shard_shape(array.shape)
    is_large_stack = array.ndim > 2 and math.prod(shard) * array.dtype.itemsize > LARGE_STACK_BYTES
    return ocp.SaveArgs(shard_axes=(0,)) if is_large_stack else ocp.SaveArgs()
