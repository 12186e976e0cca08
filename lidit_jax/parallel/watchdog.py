"""Ends a stalled run on several hosts; each host that notices prints where its threads are."""

import faulthandler
import logging
import sys
import threading
import time

import jax

from lidit_jax.parallel.hosts import leave

logger = logging.getLogger(__name__)


def watched(seconds: float, name: str) -> "Watchdog":
    """Returns a `Watchdog` that is active only on several hosts: a single host never waits for another.

    Args:
      seconds: longest time between two beats; 0 turns the watchdog off.
      name: name of the stage, for the message.
    """
    return Watchdog(seconds if jax.process_count() > 1 else 0, name)


class Watchdog:
    """Context that ends this process with status 1 if `beat` is not called for `seconds`; 0 turns it off.

    A host that hangs, be it on its data, on a disk or in a collective, makes all others hang in their next collective.
    Its process still sends heartbeats, so JAX does not take it for dead.
    """

    def __init__(self, seconds: float, name: str):
        self._seconds, self._name = seconds, name
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Records progress: restarts the countdown."""
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
                    "error: %s: no progress in %.0f s (train.stalled_after), here or on another host; threads here:",
                    *(self._name, self._seconds),
                )
                faulthandler.dump_traceback(sys.__stderr__)
                leave(1)
