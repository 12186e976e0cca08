"""Where the wall time of a run goes, over all its starts: training, compiling, saving, …; kept in WORKDIR/goodput.json.

The parts sum to the time that the run's processes have lived. The time between two starts is kept apart.
"""

import contextlib
import copy
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lidit_jax.files import read_json, write_json
from lidit_jax.metrics import duration

logger = logging.getLogger(__name__)

GOODPUT_FILE = "goodput.json"
PARTS = (
    "training",  # steps, also of the LLMs and the VAE
    "waiting_for_data",  # while the devices had nothing to do
    "compiling",
    "restoring",
    "evaluating",  # and sampling
    "saving",
    "starting",  # imports, checks, loading of data and weights, initialisation: all that is nothing else
    "lost",  # training and waiting for data in steps that a later start had to repeat
)
NETWORK_PARTS = ("training", "waiting_for_data")  # are also recorded for each network
# Seconds between two writes, on a disk and in a bucket: what the record of a killed process lacks at most.
WRITE_EVERY_S = (2.0, 20.0)
MARKS = 100  # checkpoints whose time is remembered, for each network


class Goodput:
    """Clock that attributes every second of this process to one of `PARTS`.

    `timed` changes the current part, "starting" at first. Only the first host reads and writes the file; the others,
    and clocks without a workdir, measure for themselves.
    """

    def __init__(self, workdir: epath.Path | None = None, age: float = 0.0):
        """Starts the clock, and continues the record of the run's earlier starts.

        Args:
          workdir: folder of the run; None keeps nothing.
          age: seconds since the process began, which count as "starting".
        """
        self._file = workdir / GOODPUT_FILE if workdir is not None and jax.process_index() == 0 else None
        self._lock = threading.RLock()
        self._part, self._since = "starting", time.monotonic()
        self._record = _empty_record()
        self._network: dict[str, Any] | None = None  # the entry of the network that is being trained
        if self._file is not None and self._file.exists():
            self._record = self._read()
        began = time.time() - age
        if self._record["updated"] is not None:
            self._record["stopped_seconds"] += max(0.0, began - self._record["updated"])
        self._record["starts"] += 1
        self._add("starting", age)
        self._done = threading.Event()
        self._is_failing = False
        self._writer: threading.Thread | None = None

    def __enter__(self) -> "Goodput":
        if self._file is not None:
            self._write()
            self._writer = threading.Thread(target=self._keep_writing, name="goodput", daemon=True)
            self._writer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._writer is not None:
            self._writer.join()
            self._write()

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Attributes the time in the context to a part, except that in inner contexts.

        Args:
          part: one of `PARTS`.
        """
        before = self._switch(part)
        try:
            yield
        finally:
            self._switch(before)

    def attribute(self, part: str, seconds: float) -> None:
        """Moves the last seconds of the current part to another one.

        Args:
          part: one of `PARTS`.
          seconds: time that has passed in the current part, and turned out to belong to `part`.
        """
        with self._lock:
            self._add(self._part, -seconds)
            self._add(part, seconds)

    @contextlib.contextmanager
    def training(self, name: str, step: int) -> Iterator[None]:
        """Attributes the time in the context to the training of a network, except that in inner contexts.

        The time of steps that an earlier start took after the checkpoint it is resumed from becomes "lost".

        Args:
          name: name of the network.
          step: steps taken before.
        """
        with self._lock:
            self._network = self._record["networks"].setdefault(name, _empty_network())
            self._lose_steps_after(step)
        try:
            with self.timed("training"):
                yield
        finally:
            self._network = None

    def stepped(self, step: int) -> None:
        """Records the steps that the network has taken."""
        assert self._network is not None
        self._network["step"] = step

    def saved(self) -> None:
        """Records that the network's state after its last step is saved."""
        with self._lock:
            assert self._network is not None
            self._switch(self._part)
            self._network["marks"] = [*self._network["marks"], self._mark()][-MARKS:]

    def _lose_steps_after(self, step: int) -> None:
        network = self._network
        assert network is not None
        if step < network["step"]:
            # Exact at checkpoints; elsewhere, where an older one is restored, in proportion to the steps.
            marks = [[0] + [0.0] * len(NETWORK_PARTS), *network["marks"]]
            if marks[-1][0] < network["step"]:
                marks.append(self._mark())
            steps, *times = zip(*marks, strict=True)
            for part, seconds in zip(NETWORK_PARTS, times, strict=True):
                lost = network[part] - float(np.interp(step, steps, seconds))
                self._add(part, -lost)
                self._add("lost", lost)
            network["marks"] = [mark for mark in network["marks"] if mark[0] <= step]
        network["step"] = step

    def _mark(self) -> list[float]:
        assert self._network is not None
        return [self._network["step"], *(self._network[part] for part in NETWORK_PARTS)]

    def seconds(self) -> dict[str, float]:
        """Returns the seconds in each part so far, over all starts; they sum to the time that the processes lived."""
        with self._lock:
            self._switch(self._part)
            return dict(self._record["seconds"])

    def share(self) -> float:
        """Returns the goodput: the share of the time spent in training steps that were not lost."""
        return _share(self.seconds())

    def summary(self) -> str:
        """Returns one line for the log: the goodput and the time in each part."""
        seconds = self.seconds()
        parts = ", ".join(
            f"{part.replace('_', ' ')} {duration(value)}" for part, value in seconds.items() if value >= 0.5
        )
        starts = self._record["starts"]
        return (
            f"goodput {100 * _share(seconds):.0f}% of {duration(sum(seconds.values()))}"
            f"{f' in {starts} starts' if starts > 1 else ''}: {parts}"
        )

    def _switch(self, part: str) -> str:
        """Makes `part` the current one; returns the one before."""
        with self._lock:
            before, now = self._part, time.monotonic()
            self._add(before, now - self._since)
            self._part, self._since = part, now
            return before

    def _add(self, part: str, seconds: float) -> None:
        self._record["seconds"][part] += seconds
        if self._network is not None and part in NETWORK_PARTS:
            self._network[part] += seconds

    def _keep_writing(self) -> None:
        while not self._done.wait(WRITE_EVERY_S["://" in str(self._file)]):
            self._write()

    def _write(self) -> None:
        """Writes the record; if that fails, says so once: a training does not end for it."""
        with self._lock:
            seconds = self.seconds()
            self._record["updated"] = time.time()
            value = {"goodput": _share(seconds), "wall_seconds": sum(seconds.values()), **copy.deepcopy(self._record)}
        try:  # without the lock, which the steps take too: writing to a bucket may be slow
            write_json(self._file, value)
            self._is_failing = False
        except Exception as error:  # a full disk, or one of the many types of network and bucket clients
            if not self._is_failing:
                logger.warning("%s can't be written (%s); trying again", self._file, error)
            self._is_failing = True

    def _read(self) -> dict[str, Any]:
        try:
            return _checked(read_json(self._file))
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s): the time of earlier starts is not counted", self._file, error)
            return _empty_record()


def _share(seconds: Mapping[str, float]) -> float:
    return seconds["training"] / max(sum(seconds.values()), 1e-9)


def _empty_record() -> dict[str, Any]:
    return {
        "starts": 0,
        "stopped_seconds": 0.0,  # between two starts
        "updated": None,  # seconds since 1970
        "seconds": dict.fromkeys(PARTS, 0.0),
        "networks": {},
    }


def _empty_network() -> dict[str, Any]:
    """Returns the record of a network: its last step, times up to it, and those at its checkpoints."""
    return {"step": 0, **dict.fromkeys(NETWORK_PARTS, 0.0), "marks": []}


def _checked(found: Any) -> dict[str, Any]:
    """Returns the record in a file's JSON value.

    Raises:
      ValueError: it is not one.
    """

    def check(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{what} is missing or out of range")

    def is_time(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and -1 <= value < 1e12  # -1: rounding below 0

    def is_step(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 60

    check(isinstance(found, dict), "the record")
    record = {key: found.get(key) for key in _empty_record()}
    check(is_step(record["starts"]), "starts")
    check(is_time(record["updated"]) and is_time(record["stopped_seconds"]), "updated or stopped_seconds")
    seconds, networks = record["seconds"], record["networks"]
    check(isinstance(seconds, dict) and set(seconds) == set(PARTS), "seconds")
    check(all(map(is_time, seconds.values())), "a time")
    check(isinstance(networks, dict), "networks")
    for network in networks.values():
        check(isinstance(network, dict) and set(network) == set(_empty_network()), "a network's record")
        check(is_step(network["step"]) and all(is_time(network[part]) for part in NETWORK_PARTS), "a network's time")
        marks = network["marks"]
        check(isinstance(marks, list), "marks")
        for mark in marks:
            check(isinstance(mark, list) and len(mark) == 1 + len(NETWORK_PARTS), "a mark")
            check(is_step(mark[0]) and mark[0] <= network["step"] and all(map(is_time, mark[1:])), "a mark")
        steps = [mark[0] for mark in marks]
        check(steps == sorted(set(steps)), "the marks' order")
    return record
