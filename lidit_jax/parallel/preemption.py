"""A notice that the machine will be taken away: SIGTERM, on cloud TPUs some thirty seconds before the end."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """Training stopped in good order, everything is saved. Its message says where."""


_asked = itertools.count()  # how often, in this process


class Notice:
    """Whether the notice has come; on several hosts, whether all of them know and agree on this step."""

    def __init__(self):
        self._came = threading.Event()

    def reached(self) -> bool:
        """To be asked at every step by every host. On several, one host's notice stops all of them at the same step."""
        if jax.process_count() > 1:
            # JAX's coordination service listens. Its numbers must rise through all parts of a run, as steps do not.
            return multihost_utils.reached_preemption_sync_point(next(_asked))
        return self._came.is_set()

    @property
    def came(self) -> bool:
        """Whether it came to this host alone, which asks for no agreement."""
        return self._came.is_set()

    def _listen(self, number: int, frame: object) -> None:
        del number, frame
        self._came.set()


@contextlib.contextmanager
def listening() -> Iterator[Notice]:
    """Holds SIGTERM back and keeps the notice, instead of ending the process."""
    notice = Notice()
    # Python lets the main thread alone set handlers; elsewhere, as in a notebook's, a signal ends the process as ever.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield notice
        return
    before = signal.signal(signal.SIGTERM, notice._listen)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, before)
