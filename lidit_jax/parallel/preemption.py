"""Handles preemption: SIGTERM announces it, on cloud TPUs some thirty seconds before the host is taken away."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """Raised when training stopped after a preemption notice and its state is saved; the message says where."""


_sync_points = itertools.count()  # calls of `Notice.should_stop` by this process on several hosts


class Notice:
    """Preemption notice of this run; on several hosts, all of them act on it at the same step."""

    def __init__(self):
        self._received = threading.Event()

    def should_stop(self) -> bool:
        """Returns True if the run should save and stop at this step. Every host must call it at every step.

        On several hosts, one host's notice makes it return True on all of them at the same step.
        """
        if jax.process_count() > 1:
            # JAX's coordination service receives the signal. The numbers passed to it must rise through all stages of
            # a run; step numbers start again with each stage.
            return multihost_utils.reached_preemption_sync_point(next(_sync_points))
        return self._received.is_set()

    @property
    def received(self) -> bool:
        """True if this process has received the signal; asks no other host."""
        return self._received.is_set()

    def _listen(self, number: int, frame: object) -> None:
        del number, frame
        self._received.set()


@contextlib.contextmanager
def catch_sigterm() -> Iterator[Notice]:
    """Turns SIGTERM into a `Notice` while the context is open, instead of letting it end the process."""
    notice = Notice()
    # Only the main thread may set signal handlers; elsewhere, as in some notebooks, SIGTERM still ends the process. On
    # several hosts JAX's coordination service handles the signal.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield notice
        return
    before = signal.signal(signal.SIGTERM, notice._listen)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)
