"""The training step of every trained component: small language models, VAE, LI-DiT.

A `Task` says how a component is initialised and what its loss is. The rest of the step is here: gradients over a mesh,
accumulation, clipping, AdamW, EMA, and skipping of non-finite steps. `train.py` has the loop around it.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lidit_jax.compile_ahead import Program
from lidit_jax.errors import UserError
from lidit_jax.models.sharded_matmul import reduce_gradients_in
from lidit_jax.optimizer import count_updates, learning_rate, make_optimizer
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, num_batch_shards, replicated, shardings
from lidit_jax.train_config import TrainConfig
from lidit_jax.weighted_mean import WeightedMean

Batch = Mapping[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and therefore everything that a checkpoint needs.

    Attributes:
      step: int32 scalar, steps taken, skipped ones included.
      params: float32 tree.
      ema: tree like `params`, or None if no average is kept.
      opt_state: state of the optax optimiser.
      skipped: int32 scalar, steps skipped because their loss or gradient was not finite.
      skipped_in_row: int32 scalar, consecutive steps skipped up to the last one.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    skipped: jax.Array
    skipped_in_row: jax.Array

    @property
    def averaged(self) -> Any:
        """The parameters to sample with: their average if one is kept."""
        return self.params if self.ema is None else self.ema


# (state, step) -> named numbers and named images (uint8 [H, W, 3]) to log.
Evaluate = Callable[[TrainState, int], tuple[dict[str, float], dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A network to train: its initialisation, its loss and what is logged beside it.

    Attributes:
      name: name in the log and of the component's folder.
      init: key -> parameters, boxed with their logical axes (the output of Flax's `Module.init`).
      loss: (params, frozen, batch, key, phase) -> the loss and named metrics, as means with their weights. Traced, so
        pure.
      frozen: arrays that the loss reads and no step changes (LLMs, VAE).
      evaluate: computes what is logged every `sample_every` steps and at the end; or None.
      phases: ascending steps at which the loss changes; the loss gets the number of those reached, a Python int. Each
        phase is compiled as a program of its own: a branch inside one program would be evaluated in every step, and on
        a CPU, XLA runs branches many times slower.
      networks: if the parameters are those of several networks, the key of each and the first phase in which it is
        updated. Their gradients are clipped separately, so that a large gradient of one does not slow down another.
        Empty for a single network.
      flops: batch -> model FLOPs of a step on it, without rematerialisation, for the MFU in the log; or None. See
        `models/flops.py`.
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, Batch, jax.Array, int], tuple[WeightedMean, dict[str, WeightedMean]]]
    frozen: Any = None
    evaluate: Evaluate | None = None
    phases: tuple[int, ...] = ()
    networks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops: Callable[[Batch], float] | None = None


def check_batch_size(config: TrainConfig, mesh: Mesh, rules: ShardingRules) -> None:
    """Raises UserError unless the batch shards divide a micro-batch; the hosts then divide a batch too."""
    shards = num_batch_shards(mesh, rules)
    if (config.batch_size // config.accumulate) % shards:
        raise UserError(
            f"a micro-batch of {config.batch_size // config.accumulate} is not divisible by {shards} batch shards: "
            f"choose a batch_size that is a multiple of {shards * config.accumulate}"
        )


class Trainer:
    """The jitted functions of a task on a mesh."""

    def __init__(self, task: Task, config: TrainConfig, mesh: Mesh, rules: ShardingRules):
        check_batch_size(config, mesh, rules)
        self.task, self.config, self.mesh, self.rules = task, config, mesh, rules
        self.optimizer = make_optimizer(config)
        self.learning_rate = learning_rate(config)
        self._boxed = jax.eval_shape(self._init_boxed, jax.random.key(0))
        self.state_shardings = shardings(self._boxed, mesh, rules)
        self.batch_sharding = batch_sharding(mesh, rules)
        self._init = jax.jit(lambda key: nn.unbox(self._init_boxed(key)), out_shardings=self.state_shardings)
        step = jax.jit(
            self._take_step,
            in_shardings=(self.state_shardings, None, self.batch_sharding, replicated(mesh)),
            out_shardings=(self.state_shardings, replicated(mesh)),
            donate_argnums=0,
            static_argnums=4,
        )
        self._step = Program(step, batch_argnum=2, static_argnums=(4,))

    def init(self, seed: int) -> TrainState:
        """Returns a randomly initialised state, created sharded: no device ever holds all of it."""
        with jax.set_mesh(self.mesh):
            return self._init(jax.random.key(seed))

    def abstract_state(self) -> TrainState:
        """Returns shapes, dtypes and shardings of the state, to restore into."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            nn.unbox(self._boxed),
            self.state_shardings,
        )

    def abstract_key(self) -> jax.ShapeDtypeStruct:
        """Returns shape, dtype and sharding of the random key that steps take."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(self.mesh))

    def step(
        self, state: TrainState, frozen: Any, batch: Batch, key: jax.Array, number: int
    ) -> tuple[TrainState, dict[str, WeightedMean | jax.Array]]:
        """Takes step `number`, counted from 0; the given state is donated.

        Returns:
          The new state and the metrics: those of the task and "loss", as weighted means, and the scalars "grad_norm",
          "learning_rate" (of this step's update), "skipped" and "skipped_in_row" (above 0 if this step was skipped).
        """
        return self._step(state, frozen, batch, key, self.phase(number))

    def phase(self, number: int) -> int:
        """Returns how many of the task's phases have begun at step `number`."""
        return bisect.bisect_right(self.task.phases, number)

    def is_compiled(self, batch: Mapping[str, Any], phase: int) -> bool:
        """Returns True if `compile` was called for batches of these shapes."""
        return self._step.is_compiled(batch, phase)

    def compile(self, batch: Mapping[str, jax.ShapeDtypeStruct], phase: int) -> None:
        """Compiles the step for batches of these shapes; later steps on such batches use the program.

        Must be called under the mesh, like `step`. It takes no step and allocates no arrays on the devices.

        Args:
          batch: shapes of a batch.
          phase: phase of the loss.
        """
        self._step.compile(self.abstract_state(), self.task.frozen, batch, self.abstract_key(), phase)

    def lower(self, state: TrainState, frozen: Any, batch: Batch) -> jax.stages.Lowered:
        """Lowers the step of the first phase, from shapes instead of arrays; see `compile/compile_step.py`."""
        return self._step.lower(state, frozen, batch, self.abstract_key(), 0)

    def lower_init(self) -> jax.stages.Lowered:
        """Lowers the initialisation; see `benchmarks/startup.py`."""
        with jax.set_mesh(self.mesh):
            return self._init.lower(self.abstract_key())

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Returns global arrays, sharded over the mesh, from this process's rows of a batch."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, array) for name, array in batch.items()
        }

    def _init_boxed(self, key: jax.Array) -> TrainState:
        params = self.task.init(key)
        # A copy, because params and ema must not share buffers: they are donated.
        ema = jax.tree.map(jnp.copy, params) if self.config.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, ema, self.optimizer.init(params), zero, zero)

    def _take_step(self, state: TrainState, frozen: Any, batch: Batch, key: jax.Array, phase: int):
        config = self.config
        key = jax.random.fold_in(key, state.step)  # derived from the step: a resumed run draws the same numbers
        with nn.logical_axis_rules(self.rules.pairs()), reduce_gradients_in(config.gradient_reduction):
            loss, metrics, grads = self._gradients(state.params, frozen, batch, key, phase)

        updates_made = count_updates(state.opt_state)
        grad_norm = optax.tree.norm(grads)
        if self.task.networks:
            metrics |= {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in self.task.networks}
            grads = {name: self._clip(grads[name], metrics[f"grad_norm/{name}"]) for name in self.task.networks}
        else:
            grads = self._clip(grads, grad_norm)

        def update(state, grads):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            for name, start in self.task.networks.items():
                if phase < start:  # its gradient is 0, but its weights would still decay
                    updates[name] = jax.tree.map(jnp.zeros_like, updates[name])
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                decay = jnp.minimum(config.ema_decay, (1.0 + updates_made) / (10.0 + updates_made))
                ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
            return dataclasses.replace(state, params=params, ema=ema, opt_state=opt_state)

        # A branch: selecting element by element would read both trees and copy the donated one.
        finite = jnp.isfinite(loss.mean) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            state = jax.lax.cond(finite, update, lambda state, grads: state, state, grads)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        metrics |= {"loss": loss, "grad_norm": grad_norm, "learning_rate": self.learning_rate(updates_made)}
        metrics |= {"skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
        return state, metrics

    def _clip(self, grads, norm):
        if not self.config.clip_norm:
            return grads
        scale = jnp.minimum(1.0, self.config.clip_norm / jnp.maximum(norm, 1e-12))
        return jax.tree.map(lambda g: g * scale, grads)

    def _gradients(self, params, frozen, batch, key, phase):
        """Returns the loss, the metrics, and the gradients of the loss's mean, accumulated over the micro-batches."""

        def loss_of_phase(params, frozen, batch, key):
            loss, metrics = self.task.loss(params, frozen, batch, key, phase)
            return loss.mean, (loss, metrics)

        grad = jax.grad(loss_of_phase, has_aux=True)
        count = self.config.accumulate
        if count == 1:
            grads, (loss, metrics) = grad(params, frozen, batch, key)
            return loss, metrics, grads
        # A micro-batch takes every count-th row, so that it is sharded over all devices.
        micro_batches = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)

        def merge(so_far, i_and_micro_batch):
            i, micro_batch = i_and_micro_batch
            grads, (loss, metrics) = so_far
            new_grads, (new_loss, new_metrics) = grad(params, frozen, micro_batch, jax.random.fold_in(key, i))
            loss = loss.merge(new_loss)
            metrics = {name: metrics[name].merge(new) for name, new in new_metrics.items()}
            share = new_loss.share_of(loss)
            return (jax.tree.map(lambda g, new: g + share * (new - g), grads, new_grads), (loss, metrics)), None

        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(grad, params, frozen, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        (grads, (loss, metrics)), _ = jax.lax.scan(merge, zeros, (jnp.arange(count), micro_batches))
        return loss, metrics, grads
