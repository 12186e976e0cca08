"""Keeps compiled programs beside the checkpoints, so that a resumed run starts without compiling them again."""

import hashlib
import os
import platform
from pathlib import Path

import jax
from etils import epath
from jax.experimental.compilation_cache.compilation_cache import reset_cache

COMPILED = "compiled"  # folder in the workdir
MAX_BYTES = 8 << 30  # on a disk; the programs used least recently are removed


def cache_compilations(folder: epath.Path) -> None:
    """Turns on JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR is set (also if empty).

    On several hosts the first one writes; the others read if the folder is shared. If it can't be read or
    written, JAX logs a warning.

    Args:
      folder: folder of the compiled programs.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if jax.default_backend() == "cpu":
        if jax.process_count() > 1:  # the processes compile different programs
            return
        # Programs use all instructions of the CPU. Another CPU may lack some, and JAX's cache key omits them.
        folder /= _cpu_kind()
    is_remote = "://" in str(folder)
    reset_cache()  # JAX decides at its first compilation whether there is a cache
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", -1 if is_remote else MAX_BYTES)
    if is_remote:  # XLA's own caches are files on a disk
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _cpu_kind() -> str:
    """Returns a folder name that hosts share only if their CPUs have the same instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    digest = hashlib.sha256("\n".join([platform.machine(), platform.processor(), *features]).encode())
    return f"cpu-{digest.hexdigest()[:8]}"
