"""Ends a command with one line at SIGTERM and Ctrl-C while it imports what it needs to parse its flags.

These imports take half a second, in which Ctrl-C would print a stack trace. `preemption.py`, which takes longer to
import, takes over when the command runs. This module imports only what Python itself has loaded at its start.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # `typing` takes longer to import than all else here
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


def end_on_signals() -> None:
    """Installs `end_at_once`, except for signals that are ignored, as under nohup, or handled."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_once)


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Handles a signal: nothing has begun that could be saved or cleaned up."""
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    os.write(sys.__stderr__.fileno(), f"stopped by {name} before it began\n".encode())
    os._exit(128 + number)
