"""Shared code of the stages: running one network through the training loop, and copying its weights to the host."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.checkpoint import Checkpoints
from lidit_jax.experiment import checkpoint_folder
from lidit_jax.goodput import Goodput
from lidit_jax.metrics import Metrics
from lidit_jax.models.lidit import num_parameters
from lidit_jax.parallel.rules import ShardingRules, replicated
from lidit_jax.parallel.watchdog import watched
from lidit_jax.train import train
from lidit_jax.train_config import TrainConfig
from lidit_jax.trainer import Task, Trainer, TrainState

logger = logging.getLogger(__name__)


class Run(Protocol):
    """A run as far as the training of one of its networks needs it.

    Attributes:
      config: the config of the run.
      workdir: folder of the run.
    """

    config: ConfigDict
    workdir: epath.Path

    def training_folder(self, name: str) -> epath.Path:
        """Returns the folder of a network's logs."""
        ...


def train_network(
    run: Run,
    task: Task,
    config: TrainConfig,
    batches: Callable,
    mesh: Mesh,
    rules: ShardingRules,
    provenance: Mapping[str, Any],
    goodput: Goodput | None = None,
    initial_params: Callable[[Any], Any] | None = None,
    *,
    later_steps: float,
) -> TrainState:
    """Trains one network with `train.train`, in its folder of the workdir.

    Args:
      run: the run.
      task: what to train; its name is the folder's.
      config: training config of the network.
      batches: first step -> stream of batches from that step on.
      mesh: devices to train on.
      rules: sharding rules.
      provenance: what the network is trained on, JSON-serialisable; a resumed run must agree with it.
      goodput: the run's clock; None measures this training alone, and writes nothing.
      initial_params: (shapes, dtypes and shardings of the parameters) -> parameters to start from, for fine-tuning.
      later_steps: work of all stages after this one, in steps of this one.

    Returns:
      The state after the last step.
    """
    goodput = goodput or Goodput()
    trainer = Trainer(task, config, mesh, rules)
    params = trainer.abstract_state().params
    for name in task.networks or (task.name,):
        count = num_parameters(params[name] if task.networks else params)
        logger.info("%s: %.2fM parameters", name, count / 1e6)
    folder = checkpoint_folder(run.workdir, task.name)
    checkpoints = Checkpoints(folder, run.config.to_dict(), config.keep, config.strict_restore)
    metrics = Metrics(run.training_folder(task.name), config.tensorboard)
    try:
        return train(
            trainer,
            batches,
            checkpoints,
            metrics,
            seed=run.config.seed,
            provenance=provenance,
            initial_params=initial_params,
            later_steps=later_steps,
            goodput=goodput,
        )
    finally:
        with watched(config.stalled_after, task.name), goodput.timed("saving"):
            checkpoints.close()
            metrics.close()


def on_host(params: Any, mesh: Mesh, stalled_after: float) -> Any:
    """Gathers a sharded tree, and returns it as NumPy arrays on every host."""
    # One program gathers all leaves: leaf by leaf, hosts could gather in different orders and deadlock.
    gather = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
    with watched(stalled_after, "gathering the trained weights"):
        return jax.device_get(gather(params))
