"""Orbax checkpoints: asynchronous, atomic, and readable without the code that wrote them.

A checkpoint has four items: `state` (step, parameters, EMA, optimiser), `facts` (JSON: its provenance, which is the
fingerprint of the data and the digests of the frozen networks), `config` (JSON), and `data`, the position of each
process in the data (JSON, one file for each process). Its manifest (`manifest.py`) is verified before the checkpoint is
used; instead of a damaged one, the one before is used.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lidit_jax.errors import UserError, cannot_write, describe_system_error
from lidit_jax.files import read_json
from lidit_jax.manifest import MANIFEST_FILE, DamagedError, verify, write_manifest

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Shard size in bytes above which an array that stacks the transformer blocks is written as one chunk for each block. In
# a single chunk, the 14 GB stack of a 10B model would take twice that memory to read one block.
LARGE_STACK_BYTES = 64 << 20
LONG_WAIT_S = 1.0  # seconds that a save may wait for the one before without a line about it
PROVENANCE_ITEM = "facts"  # stays as named in the first checkpoints, so that old and new ones are read alike
HAD_MANIFEST = "manifest"  # key of the provenance of a checkpoint that had a manifest when it was saved
# What Orbax, TensorStore and json raise for damaged files; devices and networks raise other errors.
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, RecursionError),
    *(TypeError, ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError),
)
# Statuses in TensorStore's ValueErrors that do not mean damage.
_PASSING = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|UNAUTHENTICATED|PERMISSION")
_STEP = re.compile(r"[1-9][0-9]*")  # name of a checkpoint's folder, as for Orbax, which removes old ones


class DataPositionHandler(ocp.CheckpointHandler):
    """Writes the data position of this process, and restores those of all: the number of processes may change."""

    def save(self, directory: epath.Path, args: "SaveDataPosition") -> None:
        (directory / f"process_{jax.process_index():05}.json").write_text(json.dumps(args.position))

    def restore(self, directory: epath.Path, args: "RestoreDataPositions | None" = None) -> list[dict[str, Any]]:
        del args
        return [read_json(file) for file in sorted(directory.glob("process_*.json"), key=str)]


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

    def __init__(self, folder: str | epath.Path, config: Mapping[str, Any], keep: int = 2, strict: bool = False):
        """Opens the folder, and creates it if it does not exist.

        Args:
          folder: folder of the checkpoints.
          config: config of the run, which each checkpoint records.
          keep: number of checkpoints kept.
          strict: True raises if the newest checkpoint is damaged, False restores the newest intact one.

        Raises:
          UserError: if the folder can't be written.
        """
        self.folder = epath.Path(folder).resolve()
        self.config = dict(config)
        self._keep, self._strict, self._saving = keep, strict, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(str(self.folder), error) from error
        self._manager = self._open()
        self._being_written: int | None = None  # step of a checkpoint that is not announced yet
        self._has_waited = False  # whether it was said that saving delays the training

    def _open(self) -> ocp.CheckpointManager:
        # Called on the first host, in the thread that saves, when all hosts have written their files and before the
        # checkpoint gets its final name.
        manifest = ocp.AsyncOptions(post_finalization_callback=self._write_manifest)
        # A lightweight manager only lists the folder: Orbax's own metadata of a checkpoint may be damaged.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=True, async_options=manifest, lightweight_initialize=True
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, provenance: Mapping[str, Any], position: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays are copied before this returns, so the state may be donated.

        Args:
          step: number of steps taken.
          state: tree of arrays.
          provenance: what the state was trained on, JSON-serialisable; a resumed run must agree with it.
          position: position of this process in the data, JSON-serialisable, with `step` as its "next_batch".

        Raises:
          UserError: if the disk is full or not writable.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=jax.tree.map(_save_args, state)),
            **{PROVENANCE_ITEM: ocp.args.JsonSave({**provenance, HAD_MANIFEST: True})},
            config=ocp.args.JsonSave(self.config),
            data=SaveDataPosition(position),
        )
        started = time.monotonic()
        self.wait()  # for the checkpoint before, as Orbax would: until then `_saving` is its step
        if (waited := time.monotonic() - started) > LONG_WAIT_S and not self._has_waited:
            self._has_waited = True
            logger.info(
                "waited %.0f s until the checkpoint before was written: a larger checkpoint_every saves this time",
                waited,
            )
        with self._writing():
            self._saving = step
            # Without force, Orbax polls for preemption notices itself, with other step numbers than `preemption.py`.
            self._manager.save(step, args=items, force=True)
        self._being_written = step

    def restore(
        self, abstract_state: Any, provenance: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Mapping[str, Any]]] | None:
        """Restores the newest intact checkpoint, and renames damaged newer ones, so that they can be saved again.

        Args:
          abstract_state: shapes, dtypes and shardings of the state.
          provenance: that of this run; each value must equal the checkpoint's.

        Returns:
          The state, sharded like `abstract_state`, and the data positions of all processes that saved it; None if there
          is no checkpoint.

        Raises:
          UserError: if the checkpoint has another provenance (other data, other frozen weights), or does not fit; if no
            checkpoint is intact; or, if `strict`, the newest is damaged.
        """
        steps = finished_steps(self.folder)
        if not steps:
            return None

        def load(folder: epath.Path) -> tuple[int, Any, Sequence[Mapping[str, Any]]]:
            step = int(folder.name)
            self._check_provenance(step, read_provenance(folder), provenance)
            positions = DataPositionHandler().restore(folder / "data")
            found = [position.get("next_batch") for position in positions]
            if not found or any(type(number) is not int or number != step for number in found):
                raise ValueError(f"its data positions are {found!r:.80} instead of {step}")
            largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_state))
            check_sizes(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree, largest)
            args = ocp.args.PyTreeRestore(
                abstract_state, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state)
            )
            return step, ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args), positions

        step, state, positions = load_newest(self.folder, self._strict, load)
        self._set_aside([damaged for damaged in steps if damaged > step])
        return state, positions

    def _check_provenance(self, step: int, recorded: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        for name, value in provenance.items():
            if recorded.get(name) != value:
                raise UserError(
                    f"{self.folder}: the checkpoint of step {step} was trained with {name} = "
                    f"{recorded.get(name)!r:.300}, now it is {value!r:.300}: change it back or use another --workdir"
                )

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints from STEP to damaged-STEP, on the first host."""
        if not steps:
            return
        if jax.process_index() == 0:
            with self._writing():
                for step in steps:
                    target = self.folder / f"damaged-{step}"
                    if os.path.islink(target) or target.is_file():  # the same step, damaged again
                        target.unlink()
                    elif target.exists():
                        target.rmtree()
                    (self.folder / str(step)).rename(target)
                    logger.warning("%s: renamed to %s", self.folder / str(step), target.name)
        multihost_utils.sync_global_devices("renamed damaged checkpoints")
        self._manager.close()
        self._manager = self._open()

    def _write_manifest(self) -> None:
        unfinished = self.folder / f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
        write_manifest(unfinished if unfinished.exists() else self.folder / str(self._saving))

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
            reason = describe_system_error(error)
            if reason is None:  # a device's error, or a bug
                raise
            step = latest_step(self.folder)
            kept = f"the last complete one, of step {step}, is kept" if step else "there is none yet"
            raise UserError(f"{self.folder}: a checkpoint can't be written, {kept}: {reason}") from error

    def close(self) -> None:
        with self._writing():
            self._manager.close()


def require_checkpoint(folder: str | epath.Path) -> None:
    """Raises UserError unless the folder has a finished checkpoint."""
    if not latest_step(folder):
        raise UserError(f"{folder}: no finished checkpoint there: train first, or give the --workdir of a run")


def latest_step(folder: str | epath.Path) -> int:
    """Returns the step of the newest finished checkpoint in the folder, or 0; opens and creates nothing."""
    return max(finished_steps(folder), default=0)


def finished_steps(folder: str | epath.Path) -> list[int]:
    """Returns the steps of the finished checkpoints in the folder, newest first; opens and creates nothing."""
    steps = [path for path in epath.Path(folder).glob("*") if _STEP.fullmatch(path.name)]
    if str(folder).startswith("gs://"):  # where folders can't be renamed, a file marks those that are finished
        steps = [path for path in steps if (path / "commit_success.txt").exists()]
    return sorted((int(path.name) for path in steps), reverse=True)


def load_newest(folder: str | epath.Path, strict: bool, load: Callable[[epath.Path], T]) -> T:
    """Returns what `load` returns for the newest intact checkpoint, after one line about each damaged newer one.

    Args:
      folder: folder of the `Checkpoints`.
      strict: True raises if the newest checkpoint is damaged.
      load: (folder of a checkpoint) -> result; called after the checkpoint is verified.

    Raises:
      UserError: if there is no checkpoint, none is intact, or an intact one does not fit; `load` may raise others.
    """
    folder = epath.Path(folder).resolve()
    require_checkpoint(folder)
    problems = []
    for step in finished_steps(folder):
        if problems:
            logger.warning("%s: %s: trying the one of step %d", folder, problems[-1], step)
        try:
            return _load_verified(folder / str(step), load)
        except DamagedError as error:
            problems.append(f"the checkpoint of step {step} is damaged ({error})")
        if strict:
            raise UserError(f"{folder}: {problems[0]}: copy it again, or set train.strict_restore=False to use another")
    raise UserError(f"{folder}: no checkpoint is intact: {'; '.join(problems)}: copy them again")


def _load_verified(folder: epath.Path, load: Callable[[epath.Path], T]) -> T:
    """Returns what `load` returns for a checkpoint, after verifying it.

    Raises:
      DamagedError: if it differs from what was saved.
      UserError: if it is intact, but can't be loaded.
    """
    has_manifest = verify_checkpoint(folder)
    try:
        result = load(folder)
    except UserError:  # a ValueError
        raise
    except Exception as error:
        # For a damaged array Orbax raises a plain Exception, whose cause is TensorStore's error.
        cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
        if not isinstance(cause, _UNREADABLE) or _PASSING.search(str(cause)):
            raise
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        if not has_manifest and jax.process_count() == 1:  # others could have read it
            raise DamagedError(f"it can't be read: {reason}") from error
        raise UserError(
            f"{folder.parent}: the checkpoint of step {folder.name} belongs to another model or another version of "
            f"this program ({reason}); use another --workdir"
        ) from error
    if not has_manifest:
        logger.warning("%s: has no %s (from an earlier version), so it was not verified", folder, MANIFEST_FILE)
    return result


def verify_checkpoint(folder: epath.Path) -> bool:
    """Verifies a checkpoint; each host reads a part of its files, and all of them come to the same result.

    Args:
      folder: folder of the checkpoint.

    Returns:
      True, or False if it is from an earlier version, without a manifest.

    Raises:
      DamagedError: if it differs from what was saved.
    """
    damage, has_manifest = "", False
    try:
        has_manifest = verify(folder, jax.process_index(), jax.process_count())
        had_manifest = read_provenance(folder).get(HAD_MANIFEST)
        if had_manifest and not has_manifest:
            raise DamagedError(f"{MANIFEST_FILE} is missing")
        _check_step(folder)
    except DamagedError as error:
        damage = str(error)
    if damage := _first_of_hosts(damage):
        raise DamagedError(damage)
    return has_manifest


def _check_step(folder: epath.Path) -> None:
    """Raises DamagedError if a checkpoint is of another step than its name says, as a copy named by its date is."""
    for file in (folder / "data").glob("process_*.json"):
        try:
            position = read_json(file)
        except ValueError as error:
            raise DamagedError(f"its data position can't be read: {error}") from error
        number = position.get("next_batch") if isinstance(position, dict) else None
        if type(number) is int and str(number) != folder.name:
            raise DamagedError(f"its files are those of step {number!r:.40}: it was copied or renamed")


def _first_of_hosts(message: str) -> str:
    """Returns the message of the first host whose message is not empty."""
    if jax.process_count() == 1:
        return message
    encoded = np.zeros(400, np.uint8)
    mine = np.frombuffer(message.encode("utf-8", "replace")[:400], np.uint8)
    encoded[: len(mine)] = mine
    messages = [
        bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in multihost_utils.process_allgather(encoded)
    ]
    return next(filter(None, messages), "")


def read_provenance(folder: epath.Path) -> Mapping[str, Any]:
    """Returns the provenance that a checkpoint records: what it was trained on.

    Raises:
      DamagedError: if they can't be read.
    """
    try:
        provenance = ocp.JsonCheckpointHandler().restore(folder / PROVENANCE_ITEM)
    except _UNREADABLE as error:
        raise DamagedError(f"its provenance can't be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(provenance, dict):
        raise DamagedError(f"its provenance is {provenance!r:.80}, not an object")
    return provenance


def check_sizes(tree: Any, largest: float = math.inf) -> None:
    """Checks the sizes that a checkpoint states before anything of them is allocated.

    Args:
      tree: Orbax's metadata of arrays.
      largest: largest number of values of an array.

    Raises:
      ValueError: an array is larger, or is smaller than its chunks, which are decoded whole.
    """
    for leaf in jax.tree.leaves(tree):
        shape = getattr(leaf, "shape", None) or ()
        chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None) or ()
        if math.prod(shape) > largest or any(side > max(1, of) for side, of in zip(chunk, shape, strict=True)):
            raise ValueError(f"array {leaf.name} has shape {shape} in chunks of {chunk}")


def _save_args(array: jax.Array) -> ocp.SaveArgs:
    """Returns options that write a large stack with one chunk for each block, readable without the others."""
    shard = array.sharding.shard_shape(array.shape)
    is_large_stack = array.ndim > 2 and math.prod(shard) * array.dtype.itemsize > LARGE_STACK_BYTES
    return ocp.SaveArgs(shard_axes=(0,)) if is_large_stack else ocp.SaveArgs()
