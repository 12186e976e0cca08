"""Compiles the train step, for every batch shape before the first step or for each on its first batch, and says so."""

import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from lidit_jax.data.assembler import BatchShape, reshaped
from lidit_jax.metrics import duration
from lidit_jax.parallel.preemption import activity


class Program:
    """A jitted function of a batch, with executables compiled ahead of time.

    Calls of a jitted function do not use the executables of `lower(…).compile()`, so they are kept here, by the shapes
    of the batch. Unlike JAX's persistent compilation cache, this needs no folder and traces nothing twice; if that
    cache is on, the executables come from it.
    """

    def __init__(self, jitted: Any, batch_argnum: int, static_argnums: tuple[int, ...] = ()):
        """Wraps a jitted function.

        Args:
          jitted: result of `jax.jit`.
          batch_argnum: position of the batch among the arguments.
          static_argnums: as passed to `jax.jit`.
        """
        self._jitted, self._batch, self._static = jitted, batch_argnum, static_argnums
        self._executables: dict[Hashable, jax.stages.Compiled] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Runs the executable compiled for the batch's shapes, or the jitted function if there is none."""
        executable = self._executables.get(self._key(arguments))
        if executable is None:
            return self._jitted(*arguments)
        return executable(*(argument for i, argument in enumerate(arguments) if i not in self._static))

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Lowers the function.

        Args:
          *arguments: arrays, or `jax.ShapeDtypeStruct` with shardings in their place.
        """
        return self._jitted.lower(*arguments)

    def compile(self, *arguments: Any) -> None:
        """Compiles the function without running it.

        Args:
          *arguments: arrays, or `jax.ShapeDtypeStruct` with shardings in their place.
        """
        key = self._key(arguments)
        if key not in self._executables:
            self._executables[key] = self.lower(*arguments).compile()

    def is_compiled(self, batch: Mapping[str, Any], *static: Hashable) -> bool:
        """Returns True if there is an executable for the batch's shapes and the static arguments."""
        return (batch_key(batch), *static) in self._executables

    def _key(self, arguments: Sequence[Any]) -> Hashable:
        return batch_key(arguments[self._batch]), *(arguments[i] for i in self._static)


def batch_key(batch: Mapping[str, Any]) -> Hashable:
    """Returns a hashable key of the names, shapes and dtypes of a batch's arrays."""
    return tuple(sorted((name, array.shape, str(array.dtype)) for name, array in batch.items()))


class Trains(Protocol):
    """The methods of `trainer.Trainer` that `compile_ahead` calls."""

    def phase(self, number: int) -> int: ...

    def is_compiled(self, batch: Mapping[str, Any], phase: int) -> bool: ...

    def compile(self, batch: Mapping[str, jax.ShapeDtypeStruct], phase: int) -> None: ...


class _Planned(NamedTuple):
    """A program to compile: the number of its shape, counted from 1, and what it is compiled for."""

    number: int
    shape: BatchShape
    phase: int
    batch: dict[str, jax.ShapeDtypeStruct]


def compile_ahead(
    trainer: Trains,
    name: str,
    batch: Mapping[str, jax.Array],
    shape: BatchShape,
    shapes: Sequence[BatchShape],
    steps: range,
    compiled: Callable[[], None],
) -> None:
    """Compiles the step for each batch shape, in order, and for each phase that the steps pass through, unless it is.

    Nothing runs and no arrays are allocated. On several hosts, all compile the same programs in the same order.

    Args:
      trainer: compiles the step.
      name: name of the trained component, for the progress lines.
      batch: any batch, as passed to the step; arrays that do not depend on its shape are as in it.
      shape: shape of that batch.
      shapes: all shapes of the data's batches; if there is one step only, just the batch's own is compiled.
      steps: the steps to compile for.
      compiled: called after each program.
    """
    planned = [
        program
        for program in _plan(trainer, batch, shape, shapes, steps)
        if not trainer.is_compiled(program.batch, program.phase)
        and (len(steps) > 1 or batch_key(program.batch) == batch_key(batch))
    ]
    phases = sorted({program.phase for program in planned})
    if len(planned) > 1:
        _print(
            f"{name}: compiling {len(planned)} programs before step {steps.start + 1} "
            "(train.compile_ahead=False compiles each on first use)"
        )
    started = time.monotonic()
    for done, program in enumerate(planned):
        elapsed = time.monotonic() - started
        what = _describe(program, len(shapes)) + (
            f", phase {phases.index(program.phase) + 1} of {len(phases)}" if len(phases) > 1 else ""
        )
        _print(f"{name}: {what}" + (f", eta {duration(elapsed / done * (len(planned) - done))}" if done else ""))
        with activity(what):
            trainer.compile(program.batch, program.phase)
        compiled()
    if planned:
        _print(f"{name}: compiled in {duration(time.monotonic() - started)}")


def _describe(program: _Planned, num_shapes: int) -> str:
    """Returns what compiles, as in "compiling bucket 64x48 (2 of 4)"; batches of text alone have one shape."""
    if "image" in program.batch or "moments" in program.batch:
        return f"compiling bucket {program.shape} ({program.number} of {num_shapes})"
    return "compiling the step"


def _plan(
    trainer: Trains, batch: Mapping[str, jax.Array], shape: BatchShape, shapes: Sequence[BatchShape], steps: range
) -> list[_Planned]:
    """Returns the programs by phase, then batch shape; batches whose arrays have the same shapes share one."""
    planned = {}
    for phase in range(trainer.phase(steps.start), trainer.phase(steps.stop - 1) + 1):
        for number, other in enumerate(shapes, 1):
            sizes = reshaped({key: array.shape for key, array in batch.items()}, shape, other)
            abstract = {
                key: jax.ShapeDtypeStruct(sizes[key], array.dtype, sharding=array.sharding)
                for key, array in batch.items()
            }
            planned.setdefault((phase, batch_key(abstract)), _Planned(number, other, phase, abstract))
    return list(planned.values())


def _print(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
