"""The training loop of every trained component: small language models, VAE, LI-DiT.

A `Task` says how a component is initialised and what its loss is. The rest is here: the jitted step on the mesh, AdamW,
gradient accumulation, EMA, skipping of non-finite steps, checkpoints and resuming.
"""

import bisect
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lidit_jax.checkpoint import Checkpoints
from lidit_jax.data.batch_stream import BatchStream
from lidit_jax.errors import UserError
from lidit_jax.goodput import Goodput
from lidit_jax.metrics import Metrics, Progress, device_memory
from lidit_jax.models.sharded_matmul import reduce_gradients_in
from lidit_jax.parallel.chips import chip_of
from lidit_jax.parallel.preemption import Notice, Preempted, activity, catch_sigterm
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, num_batch_shards, replicated, shardings
from lidit_jax.parallel.watchdog import Watchdog, watched
from lidit_jax.profiling import StepProfiler
from lidit_jax.train_config import TrainConfig
from lidit_jax.warm_up import Program, warm_up
from lidit_jax.weighted_mean import WeightedMean, mean_of_steps

logger = logging.getLogger(__name__)

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


def _updates_made(opt_state: Any) -> jax.Array:
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
        init = jax.jit(lambda key: nn.unbox(self._init_boxed(key)), out_shardings=self.state_shardings)
        with jax.set_mesh(self.mesh):
            return init(jax.random.key(seed))

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

        updates_made = _updates_made(state.opt_state)
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


def train(
    trainer: Trainer,
    batches: Callable[[int], BatchStream],
    checkpoints: Checkpoints,
    metrics: Metrics,
    *,
    seed: int,
    provenance: Mapping[str, Any],
    initial_params: Callable[[Any], Any] | None = None,
    later_steps: float = 0.0,
    goodput: Goodput | None = None,
) -> TrainState:
    """Trains to `config.steps`, resuming from the newest checkpoint if there is one.

    Args:
      trainer: the task and its jitted functions.
      batches: first step -> stream of this process's rows of the batches from that step on. Checkpoints keep its
        position.
      checkpoints: where the state is restored from and saved to.
      metrics: where metrics and samples are written.
      seed: seed of the initialisation and of the random numbers in the steps.
      provenance: what the state is trained on, JSON-serialisable; a resumed run must agree with it (fingerprint of the
        data, digests of the frozen networks).
      initial_params: (shapes, dtypes and shardings of the parameters) -> parameters to start from instead of random
        ones, for fine-tuning; called if there is no checkpoint.
      later_steps: rough work of the run after this network, in steps of this one, for the time left in the log.
      goodput: the run's clock; None measures this network's training alone, and writes nothing.

    Returns:
      The state after the last step.

    Raises:
      Preempted: if SIGTERM was received; the last step is saved.
      UserError: after too many non-finite steps in a row, if no step was finite, if the weights ended up non-finite, or
        if the checkpoint has another provenance.
    """
    config, task = trainer.config, trainer.task
    goodput = goodput or Goodput()
    with watched(config.stalled_after, task.name):
        state, positions = _first_state(trainer, checkpoints, seed, provenance, initial_params, goodput)
    step = first_step = int(state.step)
    if step >= config.steps:
        return state
    if step:
        logger.info("%s: resuming from step %d", task.name, step)

    # Created by a program on all devices: a process cannot put an array on another's devices.
    key = jax.jit(lambda: jax.random.key(seed + 1), out_shardings=replicated(trainer.mesh))()
    progress = Progress(task.name, step, config.steps, config.batch_size, _peak_flops(trainer.mesh), later_steps)
    pending: list[Mapping[str, Any]] = []
    with (
        goodput.training(task.name, step),
        contextlib.closing(batches(step)) as stream,
        contextlib.closing(StepProfiler(config.profiled_steps, metrics.folder, config.profile_all_hosts)) as profiler,
        jax.set_mesh(trainer.mesh),
        catch_sigterm() as notice,
        activity("the current step"),
        watched(config.stalled_after, task.name) as watchdog,
    ):
        if positions:
            stream.restore(positions)
        while step < config.steps:
            watchdog.beat()
            waited = time.monotonic()
            batch = trainer.put(next(stream))
            if not pending or pending[-1]["skipped"].is_ready():  # otherwise the devices still computed: none waited
                waited = time.monotonic() - waited
                progress.waited(waited)
                goodput.attribute("waiting_for_data", waited)
            if not trainer.is_compiled(batch, trainer.phase(step)):
                with progress.paused(), goodput.timed("compiling"):
                    _compile(trainer, stream, batch, step, watchdog, notice, is_first=step == first_step)
            if task.flops:
                progress.worked(task.flops(batch))
            profiler.before(step, state.step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, step_metrics = trainer.step(state, task.frozen, batch, key, step)
            if profiler.ends_after(step):
                jax.block_until_ready(state.step)
                with progress.paused(), goodput.timed("saving"):
                    profiler.close()
            step += 1
            goodput.stepped(step)
            pending.append(step_metrics)  # stay on the devices until they are logged: no step waits for the host
            preempted = notice.should_stop()
            last = step == config.steps
            if step % config.log_every == 0 or last:
                _log(metrics, progress, step, pending, stream.report(), config, goodput)
                checkpoints.announce()
                pending = []
                watchdog.beat()
            if last:
                _check_outcome(trainer, state)
            if config.sample_every and task.evaluate and not preempted and (step % config.sample_every == 0 or last):
                with progress.paused(), goodput.timed("evaluating"):
                    preempted = _evaluate(task.evaluate, state, step, metrics, notice)
                watchdog.beat()
            if step % config.checkpoint_every == 0 or last or preempted:
                goodput.saved()
                with progress.paused(), goodput.timed("saving"), activity(f"saving step {step}"):
                    checkpoints.save(step, state, provenance, stream.get_state())
                    if preempted or last:
                        checkpoints.wait()
                watchdog.beat()
            if preempted:
                raise notice.stopped(task.name, f"after step {step}, which is saved")
        if notice.received:  # while the last step was being evaluated or saved
            raise notice.stopped(task.name, "after its last step, which is saved")
    return state


def _first_state(
    trainer: Trainer,
    checkpoints: Checkpoints,
    seed: int,
    provenance: Mapping[str, Any],
    initial_params: Callable | None,
    goodput: Goodput,
) -> tuple[TrainState, Sequence[Mapping[str, Any]]]:
    """Returns the newest checkpoint's state, or an initial one, and the data positions that belong to it."""
    with goodput.timed("restoring"):
        found = checkpoints.restore(trainer.abstract_state(), provenance)
    if found is not None:
        restored, positions = found
        if int(restored.step) != (expected := positions[0]["next_batch"]):
            raise UserError(
                f"{checkpoints.folder}: the checkpoint of step {expected} says that {int(restored.step)} steps were "
                "taken: it is damaged; copy it again"
            )
        return found
    state = trainer.init(seed)
    if initial_params is not None:
        params = initial_params(trainer.abstract_state().params)
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        state = dataclasses.replace(state, params=params, ema=ema)
    return state, ()


def _evaluate(evaluate: Evaluate, state: TrainState, step: int, metrics: Metrics, notice: Notice) -> bool:
    """Evaluates the task and writes the results; returns True if SIGTERM interrupted it."""
    try:
        with notice.interrupting(), activity(f"evaluating step {step}"):
            values, images = evaluate(state, step)
            if values:
                metrics.scalars(step, values)
            metrics.images(step, images)
    except Preempted:
        return True
    return False


def _compile(
    trainer: Trainer,
    stream: BatchStream,
    batch: Batch,
    step: int,
    watchdog: Watchdog,
    notice: Notice,
    is_first: bool,
) -> None:
    """Compiles the step `step` for a batch and, with `train.compile_ahead`, for every shape and phase from then on.

    Args:
      trainer: the task and its jitted functions.
      stream: stream of the batches.
      batch: the batch of that step, the last one taken from the stream.
      step: number of the step, from 0.
      watchdog: told of each compiled program.
      notice: polled between programs; raises Preempted if SIGTERM was received before the first step.
      is_first: True before the first step since the start.
    """
    config, name = trainer.config, trainer.task.name

    def compiled() -> None:
        watchdog.beat()
        # Without a step since the start there is nothing to save; later on, the step is taken first.
        if is_first and notice.should_stop():
            raise notice.stopped(name, f"before step {step + 1}")

    warm_up(
        trainer,
        name,
        batch,
        stream.shape,
        stream.shapes,
        range(step, config.steps if config.compile_ahead else step + 1),
        compiled,
    )


def _check_outcome(trainer: Trainer, state: TrainState) -> None:
    """Raises UserError if training changed nothing, because all steps were skipped, or ended in non-finite weights."""
    name, step = trainer.task.name, int(state.step)
    advice = "check the data, or lower the learning rate in a new workdir"
    if int(state.skipped) == step:
        raise UserError(
            f"{name}: the loss or gradient of all {step} steps was not finite, so the weights are unchanged: {advice}"
        )
    if not jax.jit(_are_finite, out_shardings=replicated(trainer.mesh))(state.params):
        raise UserError(f"{name}: weights are not finite after step {step}: {advice}")


def _are_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _peak_flops(mesh: Mesh) -> float | None:
    """Returns the peak bf16 FLOP/s of the mesh; None for unknown chips."""
    chip = chip_of(mesh.devices.flat[0])
    return chip.flops * mesh.devices.size if chip else None


def _log(
    metrics: Metrics,
    progress: Progress,
    step: int,
    pending: list,
    report: Mapping[str, float],
    config: TrainConfig,
    goodput: Goodput,
) -> None:
    """Logs the means over the steps of an interval that were not skipped, and the learning rate of the last update.

    Args:
      metrics: where scalars are written.
      progress: prints the progress line.
      step: steps taken so far.
      pending: metrics of each step of the interval, on the devices.
      report: scalars of the data pipeline.
      config: training config.
      goodput: the run's clock.

    Raises:
      UserError: if too many steps in a row were skipped.
    """
    rows = jax.device_get(pending)
    taken = [row for row in rows if not row["skipped_in_row"]]
    values = mean_of_steps(taken)
    values.pop("skipped_in_row", None)
    if taken:
        values["learning_rate"] = float(taken[-1]["learning_rate"])
    values |= {"skipped": int(rows[-1]["skipped"]), "skipped_in_interval": len(rows) - len(taken)}
    in_row = max(int(row["skipped_in_row"]) for row in rows)
    values |= progress.speed(step) | device_memory() | {"goodput": goodput.share()}
    metrics.scalars(step, values | dict(report))
    progress.print(step, values)
    if in_row >= config.max_skipped_in_row:
        raise UserError(
            f"{in_row} steps in a row (up to step {step}) had a loss or gradient that is not finite, and left the "
            "weights unchanged: check the data, or lower the learning rate in a new workdir"
        )
