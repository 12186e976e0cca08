"""The training loop of every trained component: compiling ahead, logging, evaluation, checkpoints and resuming."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lidit_jax.checkpoint import Checkpoints
from lidit_jax.compile_ahead import compile_ahead
from lidit_jax.data.batch_stream import BatchStream
from lidit_jax.errors import UserError
from lidit_jax.goodput import Goodput
from lidit_jax.metrics import Metrics, Progress, device_memory
from lidit_jax.parallel.chips import chip_of
from lidit_jax.parallel.preemption import Notice, Preempted, activity, catch_sigterm
from lidit_jax.parallel.rules import replicated
from lidit_jax.parallel.watchdog import Watchdog, watched
from lidit_jax.profiling import StepProfiler
from lidit_jax.train_config import TrainConfig
from lidit_jax.trainer import Batch, Evaluate, Trainer, TrainState
from lidit_jax.weighted_mean import mean_of_steps

logger = logging.getLogger(__name__)


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

    compile_ahead(
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
