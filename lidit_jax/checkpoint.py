"""Orbax checkpoints: asynchronous, atomic, and readable without the code that wrote them.

A checkpoint has three items: `state` (step, parameters, EMA, optimiser), `facts` (JSON: the data's fingerprint, the
digests of frozen parts) and `config` (JSON). The position in the data needs no item: batch k is a pure function of k.
"""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lidit_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one trained part, in `folder`."""

    def __init__(self, folder: str | epath.Path, config: Mapping[str, Any], keep: int = 2):
        self.folder = epath.Path(folder).resolve()
        self.config = dict(config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: can't be written ({error.strerror}); choose another --workdir") from error
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Starts writing; the arrays are copied before this returns, so that the state may be donated."""
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            facts=ocp.args.JsonSave(dict(facts)),
            config=ocp.args.JsonSave(self.config),
        )
        self._manager.save(step, args=items)

    def restore(self, abstract_state: Any, facts: Mapping[str, Any]) -> Any | None:
        """The newest state, sharded as `abstract_state` says, or None where there is no checkpoint.

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
        )
        try:
            restored = self._manager.restore(step, args=args)
        except ValueError as error:
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} is of another model, or of another version of this "
                f"program ({' '.join(str(error).split())[:200]}); use another --workdir"
            ) from error
        for name, value in facts.items():
            if restored.facts.get(name) != value:
                raise UserError(
                    f"{self.folder}: the checkpoint of step {step} was trained with {name} = "
                    f"{restored.facts.get(name)!r}, now it is {value!r}; restore that or use another --workdir"
                )
        return restored.state

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def steps_taken(folder: str | epath.Path) -> int:
    """Of the newest finished checkpoint in the folder; 0 where there is none. Opens and creates nothing."""
    return max((int(step.name) for step in epath.Path(folder).glob("*") if step.name.isdecimal()), default=0)


def load_weights(folder: str | epath.Path, weights: str, sharding: Any = None) -> tuple[Any, int]:
    """One tree of the newest checkpoint, without its optimiser.

    Args:
      folder: what `Checkpoints` was given.
      weights: "params" or "ema".
      sharding: a `jax.sharding.Sharding` for every array (default: the first device).

    Returns:
      (the tree as nested dicts of arrays, step).

    Raises:
      UserError: if there is no checkpoint, or none of these weights in it.
    """
    folder = epath.Path(folder).resolve()
    if not folder.exists():
        raise UserError(f"{folder}: no checkpoint there; train first, or name the --workdir of a run")
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in ("facts", "config")}  # or Orbax warns of unknown items
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{folder}: no finished checkpoint there; train first, or name the --workdir of a run")
        tree = manager.item_metadata(step)["state"].tree
        if tree.get(weights) is None:
            kept = ", ".join(name for name in ("params", "ema") if tree.get(name) is not None)
            raise UserError(f"{folder}: the checkpoint has no {weights!r} weights; it has {kept}")
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), tree[weights])
        args = ocp.args.PyTreeRestore(
            {weights: abstract},
            restore_args=ocp.checkpoint_utils.construct_restore_args({weights: abstract}),
            partial_restore=True,
        )
        restored = manager.restore(step, args=ocp.args.Composite(state=args))
    return restored.state[weights], step
