"""Times contestants that do the same work, each in its own process, in turn, so that a noisy host slows all alike."""

import dataclasses
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import write_json
from lidit_jax.parallel.host_memory import keep_freed_memory

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


# All contestants share the accelerator's memory, so none may preallocate it. Child processes inherit the variable.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
      name: shown in the table.
      prepare: called in the contestant's process, so it must be picklable; returns the function that is timed, which
        returns its output once that is computed and on the host.
    """

    name: str
    prepare: Callable[[], Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Result:
    """Measurements of one contestant.

    Attributes:
      name: the contestant's.
      seconds: duration of each round.
      peak_bytes: peak memory while working, weights and runtime included: of the accelerator if it reports its peak,
        else of the process.
      output: what the work returned, to check that the contestants agree.
    """

    name: str
    seconds: list[float]
    peak_bytes: int
    output: np.ndarray

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def contest(contestants: Sequence[Contestant], rounds: int) -> list[Result]:
    """Prepares and warms up all contestants, then times each of them once a round, one after the other.

    Args:
      contestants: prepared in this order.
      rounds: how often each is timed.

    Returns:
      One result per contestant, in the same order.

    Raises:
      UserError: a contestant raised an exception or its process ended early.
    """
    from lidit_jax.metrics import duration

    context = multiprocessing.get_context("spawn")
    processes, connections, outputs = [], [], []
    try:
        for contestant in contestants:
            _log(f"preparing {contestant.name}")
            parent, child = context.Pipe()
            process = context.Process(target=_serve, args=(contestant.prepare, child), daemon=True)
            process.start()
            processes.append(process)
            connections.append(parent)
            child.close()
            outputs.append(_receive(parent, contestant.name))
        seconds: list[list[float]] = [[] for _ in contestants]
        started = time.monotonic()
        for i in range(rounds):
            for j, connection in enumerate(connections):
                connection.send("work")
                seconds[j].append(_receive(connection, contestants[j].name))
            left = (time.monotonic() - started) / (i + 1) * (rounds - i - 1)
            _log(f"round {i + 1}/{rounds}  eta {duration(left)}")
        peaks = []
        for contestant, connection in zip(contestants, connections, strict=True):
            connection.send("stop")
            peaks.append(_receive(connection, contestant.name))
        names = [contestant.name for contestant in contestants]
        return [Result(*fields) for fields in zip(names, seconds, peaks, outputs, strict=True)]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def largest_difference(results: Sequence[Result]) -> float:
    """Returns the largest difference of any output from the first one, relative to the first one's largest value."""
    first = results[0].output.astype(np.float32)
    differences = [np.abs(result.output.astype(np.float32) - first).max() for result in results]
    return float(max(differences) / np.abs(first).max())


def measurements(results: Sequence[Result], *, steps: int, **amounts: float) -> list[dict[str, Any]]:
    """Returns the figures of each contestant, JSON-serialisable.

    Args:
      results: measurements; the first one is the reference.
      steps: steps, calls or whatever else is repeated in a round.
      **amounts: what is done in a round, in units of that name, such as samples=32.

    Returns:
      Per contestant: "name", "ms_per_step", "UNIT_per_second" of each amount, "times_as_slow" as the reference, and
      "peak_mib" of memory.
    """
    return [
        {
            "name": result.name,
            "ms_per_step": 1e3 * result.median / steps,
            **{f"{unit}_per_second": amount / result.median for unit, amount in amounts.items()},
            "times_as_slow": result.median / results[0].median,
            "peak_mib": result.peak_bytes / 2**20,
        }
        for result in results
    ]


def write_figures(file: str | None, what: str, rounds: int, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Writes the figures of a benchmark to a JSON file, unless `file` is None.

    Args:
      file: the file.
      what: what was measured.
      rounds: rounds that the figures are medians of.
      rows: the return value of `measurements`.
      **more: further figures, JSON-serialisable.
    """
    if file:
        names = " ".join(row["name"] for row in rows).lower()
        host = describe_host(*(["torch"] if "torch" in names or "transformers" in names else []))
        write_json(epath.Path(file), {"what": what, "host": host, "rounds": rounds, "results": list(rows), **more})


def format_table(results: Sequence[Result], amount: int, unit: str) -> str:
    """Formats one line per contestant: time per round, throughput, speed relative to the first one, peak memory.

    Args:
      results: measurements; the first one is the reference.
      amount: units of work done in a round.
      unit: plural name of a unit of work, such as "images".
    """
    width = max(22, *(len(result.name) + 2 for result in results))
    lines = [f"{'':{width}}{'ms per round':>12}{f'{unit}/s':>12}{f'x {results[0].name}':>20}{'peak MiB':>10}"]
    for result in results:
        lines.append(
            f"{result.name:{width}}{1e3 * result.median:12.1f}{amount / result.median:12.4g}"
            f"{results[0].median / result.median:20.2f}{result.peak_bytes / 2**20:10.0f}"
        )
    return "\n".join(lines)


def describe_host(*others: str) -> str:
    """Returns one line: the accelerator, the CPU, and the versions of JAX and of the `others`, names of packages.

    Raises:
      UserError: one of the packages is not installed.
    """
    import jax

    try:
        versions = [f"{name} {version(name)}" for name in ("jax", *others)]
    except PackageNotFoundError as error:
        raise UserError(f"this benchmark needs {error.name}: pip install -e '.[test]'") from None
    cpu = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in file.read_text().splitlines() if "model name" in line]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    device = jax.devices()[0]
    return ", ".join([*([] if device.platform == "cpu" else [device.device_kind]), cpu, *versions])


def disable_tf32() -> None:
    """Disables TF32 in PyTorch, as in our models: its convolutions use it by default on GPUs."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _serve(prepare: Callable[[], Callable[[], np.ndarray]], connection: Connection) -> None:
    """Runs a contestant's process: sends the output, then the seconds of each round, then the peak memory."""
    keep_freed_memory()  # as the command lines do
    try:
        work = prepare()
        work()  # compiles
        if CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")  # resets VmHWM, so that the peak leaves compilation out
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()  # JAX cannot reset its peak: on GPUs ours includes compilation
        connection.send(work())
        while connection.recv() == "work":
            started = time.perf_counter()
            work()
            connection.send(time.perf_counter() - started)
        connection.send(_peak_memory())
    except Exception as error:
        connection.send(error)
        raise


def _receive(connection: Connection, name: str):
    """Returns what the contestant's process sent.

    Raises:
      UserError: the process sent an exception or ended.
    """
    try:
        value = connection.recv()
    except EOFError:
        raise UserError(f"{name}: its process ended before it was done: see its output above") from None
    if isinstance(value, Exception):
        raise UserError(f"{name}: {type(value).__name__}: {' '.join(str(value).split())[:300]}") from value
    return value


def _peak_memory() -> int:
    """Returns peak bytes: of the accelerator if it reports them, else of the process since VmHWM was reset."""
    import jax

    if STATUS.exists():
        [line] = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        process_peak = int(line.split()[1]) << 10
    else:
        import resource  # which Windows lacks

        process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", process_peak)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
