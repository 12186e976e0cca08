"""Stops a run on SIGTERM, which announces a preemption, and on Ctrl-C: training saves its step first.

On cloud TPUs, SIGTERM comes some thirty seconds before the host is reclaimed. Where a loop can save, it polls a
`Notice`; everywhere else the signal raises `Preempted` in the main thread. A second Ctrl-C ends the process at once.
"""

import contextlib
import importlib.machinery
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from lidit_jax.parallel.early_signals import end_at_once

STOP_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
_UNHANDLED = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN)
RAISE_AGAIN_S = 0.05
REMINDER_S = 3.0  # seconds after a signal at which the process says what it still waits for


class Preempted(BaseException):
    """Raised when a run stops on SIGTERM or Ctrl-C; the message says what is saved.

    Like KeyboardInterrupt, it is not an `Exception`, so that libraries do not handle it as a failure.

    Attributes:
      signal: number of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.signal = number


class Notice:
    """Notice of a signal that stops this process; on several hosts, all of them act on it at the same step."""

    def __init__(self):
        self.number: int | None = None
        self.activity = ""
        self._polling = 0  # loops that poll; the signal raises nothing while there is one
        self._was_ignored = False  # whether the exception was lost, as in a destructor
        self._sync_points = itertools.count()  # calls of `should_stop` on several hosts

    def should_stop(self) -> bool:
        """Returns True if the run should save and stop at this step. Every host must call it at every step.

        On several hosts, one host's notice makes it return True on all of them at the same step.
        """
        import jax  # here: the command lines import this module before they parse their flags
        from jax.experimental import multihost_utils

        if jax.process_count() > 1:
            # JAX's coordination service receives the signal. The numbers passed to it must increase through all stages
            # of a run; step numbers start again with each stage.
            return multihost_utils.reached_preemption_sync_point(next(self._sync_points))
        return self.received

    @property
    def received(self) -> bool:
        """True if this process has received a signal; asks no other host."""
        return self.number is not None

    @property
    def signal_name(self) -> str:
        """Name of the signal; of other hosts' notices only SIGTERM is known."""
        return STOP_SIGNALS[self.number or signal.SIGTERM]

    def stopped(self, name: str, where: str) -> Preempted:
        """Returns the exception to raise when a loop stops.

        Args:
          name: name of the trained component.
          where: as in "after step 7, which is saved".
        """
        message = f"{name}: stopped by {self.signal_name} {where}; run it again to resume"
        return Preempted(message, self.number or signal.SIGTERM)

    @contextlib.contextmanager
    def polled(self) -> Iterator[None]:
        """Lets the body poll this notice, instead of being interrupted by it."""
        self._raise_if_received()
        self._polling += 1
        try:
            yield
        finally:
            self._polling -= 1
        self._raise_if_received()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Makes the signal raise `Preempted` in the body, within `polled`, as outside of it."""
        polling, self._polling = self._polling, 0
        try:
            self._raise_if_received()
            yield
        finally:
            self._polling = polling

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handles a signal in the main thread."""
        if self.received and not self._was_ignored:
            return
        self.number, self._was_ignored = self.number or number, False
        if not self._polling and _is_loading_extension(frame):
            self.raise_again()
            return
        self._raise_if_received()

    def raise_again(self) -> None:
        """Makes `Preempted` rise in the main thread, soon, after it rose, or would have, where it is lost."""
        self._was_ignored = True
        timer = threading.Timer(RAISE_AGAIN_S, self._send_again)
        timer.daemon = True
        timer.start()

    def _send_again(self) -> None:
        if self.received and self._was_ignored:
            os.kill(os.getpid(), signal.SIGTERM)  # also wakes the main thread from what it waits for

    def _raise_if_received(self) -> None:
        if self.received and not self._polling:
            where = f" while {self.activity}; run it again to resume" if self.activity else ""
            raise Preempted(f"stopped by {self.signal_name}{where}", self.number)


_notice = Notice()
_sessions: list[subprocess.Popen] = []  # of `dies_with_this`


@contextlib.contextmanager
def activity(what: str) -> Iterator[None]:
    """Names what this process does in the body, for the message if a signal stops it there.

    Args:
      what: as in "loading the encoders".
    """
    before, _notice.activity = _notice.activity, what
    try:
        yield
    finally:
        _notice.activity = before


@contextlib.contextmanager
def catch_sigterm() -> Iterator[Notice]:
    """Turns SIGTERM and Ctrl-C into a `Notice` that the body polls, instead of letting them end the process."""
    with _handlers(), _notice.polled():
        yield _notice


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises `Preempted` at SIGTERM or Ctrl-C, except where `catch_sigterm` polls. For a whole command."""
    # SIGTERM during the interpreter's shutdown must not change the exit status of a command that is done.
    with _handlers({signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: signal.SIG_DFL}):
        yield


def forward_ctrl_c() -> None:
    """Makes Ctrl-C count as SIGTERM, which JAX's coordination service handles on several hosts."""
    signal.signal(signal.SIGINT, lambda number, frame: signal.raise_signal(signal.SIGTERM))


def ignore_ctrl_c(*arguments: object) -> None:
    """Ignores Ctrl-C in a worker process: the terminal sends it to all processes, and the main one decides."""
    del arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def dies_with_this(session: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Makes `kill_children` kill a process with its children, while the context is open.

    Args:
      session: process that was started with `start_new_session`.
    """
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.remove(session)


def end_process(status: int) -> NoReturn:
    """Ends this process and its children at once, without Python's shutdown.

    Where a signal interrupts a library at any point, threads of its C++ code may crash in the shutdown.

    Args:
      status: exit status of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # nobody reads it any more
            stream.flush()
    kill_children()
    os._exit(status)


def kill_children() -> None:
    """Kills the worker processes, and the sessions of `dies_with_this`: `os._exit` would leave them running."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for session in tuple(_sessions):
        if session.poll() is None:
            os.killpg(session.pid, signal.SIGKILL)


@contextlib.contextmanager
def _handlers(after: Mapping[int, signal.Handlers] | None = None) -> Iterator[None]:
    """Installs the signal handlers, unless an outer context or, on several hosts, JAX has installed some.

    Args:
      after: handlers to leave behind; None restores those from before.
    """
    # Only the main thread may set signal handlers; elsewhere, as in some notebooks, the signals still end the process.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) not in (*_UNHANDLED, end_at_once)
        or _has_several_hosts()
    ):
        yield
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    before = {number: signal.signal(number, _notice.handle) for number in STOP_SIGNALS}
    # Python runs handlers between two bytecodes, so not while XLA compiles; the descriptor is written at once.
    before_fd = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(theirs,), name="signals", daemon=True)
    listener.start()
    before_hook, sys.unraisablehook = sys.unraisablehook, _raise_again_or(sys.unraisablehook)
    try:
        yield
    finally:
        sys.unraisablehook = before_hook
        for number, handler in (after or before).items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        ours.close()
        listener.join()
        theirs.close()
        _notice.number = None


def _raise_again_or(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Returns a `sys.unraisablehook` for `Preempted`, which a destructor, or a callback of a library, can't raise."""

    def handle(ignored: Any) -> None:
        if isinstance(ignored.exc_value, Preempted):
            _notice.raise_again()
        else:
            hook(ignored)

    return handle


def _listen(signals: socket.socket) -> None:
    """Prints what a stopping process still waits for, and ends it at the second signal if that is Ctrl-C.

    Args:
      signals: gets the number of each signal as a byte, and is closed at the end.
    """
    first, said = None, None
    while True:
        try:
            numbers = signals.recv(64)
        except TimeoutError:
            if said != _notice.activity:
                said = _notice.activity
                _print(f"{STOP_SIGNALS[first]}: waiting for {said or 'this'} to finish (Ctrl-C kills it)")
            continue
        if not numbers:
            return
        for number in numbers:
            if first is not None and number == signal.SIGINT:
                _print("killed by Ctrl-C; the last checkpoint is kept")
                end_process(128 + number)
            if first is None and number in STOP_SIGNALS:
                first = number
                signals.settimeout(REMINDER_S)


def _is_loading_extension(frame: FrameType | None) -> bool:
    """Returns True if a frame runs below the initialisation of an extension module.

    C++ code imports modules and calls Python there without expecting an exception: it would abort the process, or
    raise an ImportError instead.
    """
    while frame is not None:
        is_loader = frame.f_code.co_name in ("create_module", "exec_module")
        if is_loader and isinstance(frame.f_locals.get("self"), importlib.machinery.ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _has_several_hosts() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
