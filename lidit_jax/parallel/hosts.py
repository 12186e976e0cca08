"""Several hosts as one run."""

import logging
import os
import sys
import time
from typing import NoReturn

import jax

from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

# Seconds after which a host that says nothing counts as dead, and the others end.
SILENCE = 100
# Seconds that the host which the others listen to stays for them to say what stopped them too.
LAST_WORDS = 5.0


def join_hosts(wanted: bool | None = None) -> None:
    """Makes this process one of a run's, before anything else is asked of JAX.

    On TPU pods, under SLURM and in Kubernetes JAX finds the others itself (ask for it with `wanted`); elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are. A host that dies or hangs ends the
    others with a message.

    Args:
      wanted: None: only where the environment names other hosts.

    Raises:
      UserError: they were not found, or did not come.
    """
    if not (_names_others() if wanted is None else wanted):
        return
    numbers = {key: os.environ.get(f"JAX_{key.upper()}") for key in ("num_processes", "process_id")}
    try:
        given = {key: int(value) for key, value in numbers.items() if value is not None}
        if "cpu" in (jax.config.jax_platforms or ""):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE, **given)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the run's other hosts were not found ({' '.join(str(error).split())[:200]}): set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or give --distributed=False for this host"
        ) from error
    logger.info("host %d of %d", jax.process_index(), jax.process_count())


def leave(status: int) -> NoReturn:
    """Ends this process at once, where leaving in good order would wait for hosts that wait for this one.

    The others notice that it is gone after `SILENCE` seconds at the most, and end with a message.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(LAST_WORDS)
    os._exit(status)


def _names_others() -> bool:
    """As TPU VMs of a pod, multi-slice jobs and users do."""
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
