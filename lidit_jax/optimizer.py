"""AdamW of every trained component: learning-rate schedule, and which weights decay."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from lidit_jax.train_config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Returns the learning rate's schedule: linear warm-up, then constant or cosine."""
    after = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, config.steps - config.warmup_steps), 0.01)
    if not config.warmup_steps:
        return after
    # Starts at learning_rate / warmup_steps, not at 0: the first step should change the weights too.
    start = config.learning_rate / config.warmup_steps
    warmup = optax.linear_schedule(start, config.learning_rate, config.warmup_steps - 1 or 1)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Returns AdamW with decoupled weight decay on matrices only: norms, biases and vectors do not decay."""
    return optax.adamw(
        learning_rate(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_matrices
    )


def count_updates(opt_state: Any) -> jax.Array:
    """Returns the number of updates made, an int32 scalar: the schedule's count, which skipped steps don't change."""
    [schedule] = [state for state in opt_state if isinstance(state, optax.ScaleByScheduleState)]
    return schedule.count


def _matrices(params: Any) -> Any:
    """Returns a tree of bools, True for the matrices in `params`."""

    # The paths of boxed leaves (at initialisation) end in one more entry, the box's attribute.
    def is_matrix(path: Sequence[Any], leaf: Any) -> bool:
        del leaf
        return any(getattr(entry, "key", None) in ("kernel", "embed_tokens") for entry in path[-2:])

    return jax.tree_util.tree_map_with_path(is_matrix, params)
