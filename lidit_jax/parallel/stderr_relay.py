"""Copies the standard error of a process, and shortens JAX's abort when another host is gone to one line.

JAX's coordination service ends the process from C++ then, with a stack trace that Python can't catch. `relay_stderr`
runs this module as a process of its own, which imports no JAX.
"""

import os
import select
import signal
import subprocess
import sys

from etils import epath

ABORT = b"Terminating process because the JAX distributed service detected fatal errors"
SILENCE_S = 2.0  # after an abort, its message is complete after this time
HOST_GONE = (
    "error: another host of the run stopped or cannot be reached{}: its log says why; run the same command on all "
    "hosts again to resume"
)


def relay_stderr(trace: epath.Path) -> None:
    """Sends the standard error of this process through another one.

    Args:
      trace: file for the trace of an abort.
    """
    reader, writer = os.pipe()
    # A session of its own, so that no signal to this process or its terminal reaches it.
    subprocess.Popen([sys.executable, "-m", __spec__.name, str(trace)], stdin=reader, start_new_session=True)
    os.close(reader)
    sys.stderr.flush()
    os.dup2(writer, 2)
    os.close(writer)


def main(trace: epath.Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while data := os.read(0, 1 << 16):
        before, found, _ = data.partition(ABORT)
        begin = before.rfind(b"\n") + 1 if found else len(data)
        _write(data[:begin])
        if begin < len(data):
            _shorten(data[begin:] + _read_rest(), trace)


def _read_rest() -> bytes:
    rest = b""
    while select.select([0], [], [], SILENCE_S)[0] and (data := os.read(0, 1 << 16)):
        rest += data
    return rest


def _shorten(message: bytes, trace: epath.Path) -> None:
    """Writes an abort's message to the file, and one line in its place."""
    try:
        trace.write_bytes(message)
    except OSError as error:
        _write(message + b"\n")
        _write(f"{HOST_GONE.format('')} (trace above: {trace} can't be written: {error.strerror})\n".encode())
        return
    _write(f"{HOST_GONE.format('')} (trace: {trace})\n".encode())


def _write(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


if __name__ == "__main__":
    main(epath.Path(sys.argv[1]))
