"""A run on several hosts that stands still is ended, with a word of where each host stands."""

import faulthandler
import logging
import sys
import threading
import time

import jax

from lidit_jax.parallel.hosts import leave

logger = logging.getLogger(__name__)


def watched(seconds: float, name: str) -> "Watchdog":
    """`Watchdog` where hosts can wait for each other: in a run of several. A single one waits for nobody."""
    return Watchdog(seconds if jax.process_count() > 1 else 0, name)


class Watchdog:
    """A context that ends this process with status 1 when `beat` was not called for so many seconds; 0: never.

    A host that waits for ever, be it for its data, a disk or another host's message, makes all the others wait at
    their next message. Its process lives on, so nobody takes it for dead.
    """

    def __init__(self, seconds: float, name: str):
        self._seconds, self._name = seconds, name
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._seconds / 20):
            if time.monotonic() - self._last > self._seconds:
                logger.error(
                    "error: %s: nothing done in %.0f s (train.stalled_after), here or elsewhere; what is done here:",
                    *(self._name, self._seconds),
                )
                faulthandler.dump_traceback(sys.__stderr__)
                leave(1)
