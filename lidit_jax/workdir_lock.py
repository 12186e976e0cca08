"""Locks a workdir for one process: a second run in it would overwrite the first one's checkpoints."""

import contextlib
import datetime
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from lidit_jax.errors import UserError, cannot_write
from lidit_jax.files import read_json

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
BEAT_S = 20.0  # seconds after which the holder changes the file again
DEAD_AFTER_S = 90.0  # seconds without a change after which the holder counts as dead; no clocks are compared
POLL_S = 1.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def lock(file: epath.Path, what: str) -> Iterator[None]:
    """Holds a lock file while the context is open, and removes it at the end.

    On a local disk the kernel releases the lock whenever and however its process ends. For buckets, on Windows, and
    for network disks whose hosts do not see each other's locks, the holder changes the file every `BEAT_S` seconds: a
    file that does not change belongs to a dead process. There, two processes that start in the same second may both
    get the lock.

    Args:
      file: the lock file; its folder is created.
      what: what is locked, for messages.

    Raises:
      UserError: another process holds the lock, or the file can't be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            has_kernel_lock = "://" not in str(file) and _lock_in_kernel(file, what, stack)
            _wait_for_holder(file, what, has_kernel_lock)
            holder = _Holder(file)
        except OSError as error:
            raise cannot_write(what, error) from error
        stack.enter_context(holder)
        yield


class _Holder:
    """Context that keeps the lock file changing, and removes it at the end."""

    def __init__(self, file: epath.Path):
        """Writes the file.

        Raises:
          UserError: another process wrote it at the same time.
        """
        self._file, self._beats = file, 0
        self._facts = {
            **_this_process(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
        }
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lock", daemon=True)
        try:
            self._write()
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report
                file.unlink(missing_ok=True)
            raise
        if not self._is_ours():
            raise _in_use(str(file.parent), _read(file))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        if self._is_ours():
            self._file.unlink(missing_ok=True)

    def _keep_beating(self) -> None:
        while not self._done.wait(BEAT_S):
            try:
                if not self._is_ours():
                    logger.error("%s was taken over by another process: end one of the two", self._file)
                    return
                self._write()
            except Exception as error:  # a full disk, or one of the many types of network and bucket clients
                logger.warning("%s can't be written (%s); trying again", self._file, error)

    def _write(self) -> None:
        self._beats += 1
        # In place: the kernel's lock belongs to this very file, which a rename would replace.
        self._file.write_text(json.dumps({**self._facts, "beat": self._beats}))

    def _is_ours(self) -> bool:
        return _read(self._file).get("token") == self._facts["token"]


def _lock_in_kernel(file: epath.Path, what: str, stack: contextlib.ExitStack) -> bool:
    """Takes the kernel's lock of the file until the stack closes; returns False if there is none.

    Raises:
      UserError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    while True:
        held = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, held)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(what, _read(file)) from None
        except OSError:
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(file)):
                return True
        # Its holder removed the file after it was opened here: lock the new one.


def _wait_for_holder(file: epath.Path, what: str, has_kernel_lock: bool) -> None:
    """Returns once no living process holds the lock.

    Raises:
      UserError: a living process holds it.
    """
    if not file.exists():
        return
    is_new = has_kernel_lock and not file.stat().length  # created by taking the kernel's lock
    holder = _read(file)
    if not holder and not is_new:
        time.sleep(POLL_S)  # its holder may be writing it
        holder = _read(file)
        if not holder:
            logger.warning("%s: taking over the lock, whose file %s is damaged", what, file.name)
    if not holder:
        return
    ours = _this_process()
    is_this_host = all(holder.get(fact) == ours[fact] for fact in ("host", "boot"))
    if is_this_host and (has_kernel_lock or not _exists(holder.get("pid"))):
        logger.warning("%s: taking over the lock of %s, which is no longer running", what, _name(holder))
        return
    logger.warning(
        "%s is locked by %s: waiting up to %.0f s for a sign that it is still running",
        *(what, _name(holder), DEAD_AFTER_S),
    )
    end = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < end:
        time.sleep(POLL_S)
        if not file.exists():
            return
        now = _read(file)
        if now and now != holder:  # empty while the holder is writing it
            raise _in_use(what, now)
    logger.warning("%s: taking over the lock of %s, which gave no sign of life", what, _name(holder))


def _in_use(what: str, holder: Mapping[str, Any]) -> UserError:
    return UserError(f"{what} is in use by {_name(holder)}: wait until it ends, end it there, or choose another folder")


def _name(holder: Mapping[str, Any]) -> str:
    """Returns text such as "process 123 on host tpu-0 since 2026-01-31T12:00:00+00:00"."""
    if not holder:
        return "another process"
    return "process {:.20} on host {:.80} since {:.40}".format(
        *(str(holder.get(fact)) for fact in ("pid", "host", "since"))
    )


def _this_process() -> dict[str, Any]:
    """Returns the facts that identify this process; "boot" tells hosts with the same name apart."""
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return {"pid": os.getpid(), "host": platform.node(), "boot": boot}


def _exists(pid: Any) -> bool:
    """Returns True if a process of this host has the id, also one of another user."""
    if not isinstance(pid, int) or not 0 < pid < 1 << 31:
        return False
    if sys.platform == "win32":  # where signal 0 is Ctrl-C: wait for a sign of life instead
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read(file: epath.Path) -> dict[str, Any]:
    """Returns the facts in a lock file; empty if there is none, or it is not complete."""
    try:
        facts = read_json(file)
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
