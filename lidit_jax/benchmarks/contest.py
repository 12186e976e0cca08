"""Contestants that do the same work, each in a process of its own, timed in turn: a noisy machine is noisy for all."""

import dataclasses
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.metrics import duration
from lidit_jax.parallel.host_memory import keep_freed_memory

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


# An accelerator's memory is for all contestants. Their processes inherit it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
      prepare: called in the contestant's process (so it can be pickled); gives the work, which returns its result when
        that is finished and on the host.
    """

    name: str
    prepare: Callable[[], Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one contestant.

    Attributes:
      seconds: of each round.
      peak_bytes: most memory held while working, weights and runtime included: the device's where it counts its own,
        else the process's.
      output: of the work, so that contestants can be seen to agree.
    """

    name: str
    seconds: list[float]
    peak_bytes: int
    output: np.ndarray

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def contest(contestants: Sequence[Contestant], rounds: int) -> list[Result]:
    """Prepares all, warms all up, then lets one after the other work once a round.

    Raises:
      UserError: a contestant's preparation or work raised one.
    """
    context = multiprocessing.get_context("spawn")
    processes, connections, outputs = [], [], []
    try:
        for contestant in contestants:
            _say(f"preparing {contestant.name}")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(contestant.prepare, theirs), daemon=True)
            process.start()
            processes.append(process)
            connections.append(ours)
            theirs.close()
            outputs.append(_receive(ours, contestant.name))
        seconds: list[list[float]] = [[] for _ in contestants]
        started = time.monotonic()
        for i in range(rounds):
            for j, connection in enumerate(connections):
                connection.send("work")
                seconds[j].append(_receive(connection, contestants[j].name))
            left = (time.monotonic() - started) / (i + 1) * (rounds - i - 1)
            _say(f"round {i + 1}/{rounds}  eta {duration(left)}")
        peaks = []
        for contestant, connection in zip(contestants, connections, strict=True):
            connection.send("stop")
            peaks.append(_receive(connection, contestant.name))
        names = [contestant.name for contestant in contestants]
        return [Result(*of_one) for of_one in zip(names, seconds, peaks, outputs, strict=True)]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def largest_difference(results: Sequence[Result]) -> float:
    """Of any output from the first one's, relative to that one's largest value."""
    first = results[0].output.astype(np.float32)
    differences = [np.abs(result.output.astype(np.float32) - first).max() for result in results]
    return float(max(differences) / np.abs(first).max())


def table(results: Sequence[Result], amount: int, unit: str) -> str:
    """A line a contestant: time of a round, speed (and that over the first one's), memory.

    Args:
      amount: of the unit, done in a round.
    """
    width = max(22, *(len(result.name) + 2 for result in results))
    lines = [f"{'':{width}}{'ms a round':>12}{f'{unit}/s':>12}{f'x {results[0].name}':>20}{'peak MiB':>10}"]
    for result in results:
        lines.append(
            f"{result.name:{width}}{1e3 * result.median:12.1f}{amount / result.median:12.4g}"
            f"{results[0].median / result.median:20.2f}{result.peak_bytes / 2**20:10.0f}"
        )
    return "\n".join(lines)


def machine(*others: str) -> str:
    """One line: what ran this, and the versions of JAX and of the other libraries that it is compared with.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        versions = [f"{name} {version(name)}" for name in ("jax", *others)]
    except PackageNotFoundError as error:
        raise UserError(f"the benchmark compares with {error.name}: pip install -e '.[test]'") from None
    cpu = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in file.read_text().splitlines() if "model name" in line]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    device = jax.devices()[0]
    return ", ".join([*([] if device.platform == "cpu" else [device.device_kind]), cpu, *versions])


def forbid_tf32() -> None:
    """Makes PyTorch multiply float32 as float32 on GPUs, as our models do; its convolutions default to TF32."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _serve(prepare: Callable[[], Callable[[], np.ndarray]], connection: Connection) -> None:
    keep_freed_memory()  # as the command lines do
    try:
        work = prepare()
        work()  # compiles
        if CLEAR_REFS.exists():
            CLEAR_REFS.write_text("5")  # resets the high-water mark: compilation is over
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()  # JAX has no such thing: ours includes compilation
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
    try:
        value = connection.recv()
    except EOFError:
        raise UserError(f"{name}: its process ended early; see above") from None
    if isinstance(value, Exception):
        raise UserError(f"{name}: {type(value).__name__}: {' '.join(str(value).split())[:300]}") from value
    return value


def _peak_memory() -> int:
    """Most bytes held: of the accelerator, if there is one; else of the process since its mark was reset."""
    if STATUS.exists():
        [line] = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        of_process = int(line.split()[1]) << 10
    else:
        of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", of_process)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
