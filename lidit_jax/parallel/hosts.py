"""Joins several hosts into one run, and ends a process that its peers wait for."""

import logging
import os
import re
import sys
import time
import traceback
from typing import NoReturn

import jax
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.parallel.preemption import end_process, forward_ctrl_c
from lidit_jax.parallel.stderr_relay import HOST_GONE, relay_stderr

logger = logging.getLogger(__name__)

# Seconds without a heartbeat after which a host counts as dead and the other hosts end.
HEARTBEAT_TIMEOUT_S = 100
# Seconds that host 0, which runs the coordination service, stays up so that the others can log why they end.
SHUTDOWN_DELAY_S = 5.0
# Errors of collectives (Gloo's, between CPU hosts) and of the coordination service, of which another host is the cause.
_HOST_GONE = re.compile(r"gloo|another task|coordination.?service|heartbeat|unavailable|socket closed", re.I)


def join_hosts(wanted: bool | None = None, workdir: epath.Path | None = None) -> None:
    """Joins this process to a run on several hosts. Must be called before JAX initialises its backend.

    On TPU pods, under SLURM and in Kubernetes JAX finds the other hosts by itself (pass `wanted=True`); elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them. When a host dies or hangs, the others end
    with a message.

    Args:
      wanted: whether to join other hosts; None joins them only if the environment names them.
      workdir: folder of the run, for the stack trace if another host is lost; None prints it.

    Raises:
      UserError: the other hosts were not found or did not connect.
    """
    if not (_environment_names_hosts() if wanted is None else wanted):
        return
    settings = {key: os.environ.get(f"JAX_{key.upper()}") for key in ("num_processes", "process_id")}
    try:
        options = {key: int(value) for key, value in settings.items() if value is not None}
        if "cpu" in (jax.config.jax_platforms or ""):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S, **options)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the run's other hosts were not found ({' '.join(str(error).split())[:200]}): set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass --distributed=False to run on this "
            "host alone"
        ) from error
    forward_ctrl_c()
    if workdir is not None:
        relay_stderr(_trace_file(workdir))
    logger.info("host %d of %d", jax.process_index(), jax.process_count())


def leave_with_trace(error: Exception, folder: epath.Path | None) -> NoReturn:
    """Ends this process after an error with one line; the stack trace goes into a file.

    Args:
      error: the error.
      folder: existing folder for the file; None prints the trace before the line.
    """
    trace, reason = "".join(traceback.format_exception(error)), " ".join(str(error).split())[:200]
    line = f"error: {type(error).__name__}: {reason}"
    if _HOST_GONE.search(reason):
        line = HOST_GONE.format(f" ({reason})")
    try:
        file = _trace_file(folder) if folder else None
        if file:
            file.write_text(trace)
            line += f" (trace: {file})"
    except OSError:
        file = None
    print(line if file else f"{trace}{line}", file=sys.stderr, flush=True)
    leave(1)


def _trace_file(folder: epath.Path) -> epath.Path:
    return folder / f"trace_host{jax.process_index()}.txt"


def leave(status: int) -> NoReturn:
    """Ends this process at once: an orderly exit would wait for hosts that themselves wait for this one.

    The others notice after `HEARTBEAT_TIMEOUT_S` seconds at most that it is gone, and end with a message.

    Args:
      status: exit status of the process.
    """
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(SHUTDOWN_DELAY_S)
    end_process(status)


def _environment_names_hosts() -> bool:
    """Returns True if the environment names other hosts, as TPU pods, multislice jobs and users set it."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
