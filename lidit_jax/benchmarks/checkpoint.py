"""Measures what manifests cost: `python -m lidit_jax.benchmarks.checkpoint --gb=2`.

Saves a checkpoint of random arrays, and times writing its manifest, verifying it, and restoring it.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.files import check_writable

_GB = flags.DEFINE_float("gb", 2.0, "size of the checkpoint, in 10^9 bytes", lower_bound=0.001, upper_bound=1e6)
_FOLDER = flags.DEFINE_string("folder", None, "where to write it (default: the temporary folder); removed at the end")
_ARRAYS = 32


def main() -> None:
    if _FOLDER.value:
        check_writable(epath.Path(_FOLDER.value), f"--folder={_FOLDER.value}")
        os.makedirs(_FOLDER.value, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.value))
    try:
        _measure(epath.Path(folder))
    finally:
        shutil.rmtree(folder)


def _measure(folder: epath.Path) -> None:
    import jax
    import jax.numpy as jnp

    from lidit_jax.checkpoint import Checkpoints
    from lidit_jax.manifest import files_of, verify, write_manifest

    size = int(_GB.value * 1e9 / 4 / _ARRAYS)
    keys = jax.random.split(jax.random.key(0), _ARRAYS)
    params = {f"layer_{i}": jax.random.normal(key, (size,)) for i, key in enumerate(keys)}
    state = {"step": jnp.int32(1), "params": jax.block_until_ready(params)}
    checkpoints = Checkpoints(folder, {})
    seconds = {"save returns": _timed(lambda: checkpoints.save(1, state, {}, {"next_batch": 1}))}
    seconds["all is written"] = _timed(checkpoints.wait)
    step = folder / "1"
    gigabytes = sum(file.stat().length for file in files_of(step).values()) / 1e9
    seconds["manifest written (part of it)"] = _timed(lambda: write_manifest(step))
    seconds["verified"] = _timed(lambda: verify(step))
    seconds["verified and restored"] = _timed(lambda: jax.block_until_ready(checkpoints.restore(state, {})[0]))
    checkpoints.close()
    print(f"{gigabytes:.2f} GB in {len(files_of(step))} files; seconds:")
    for name, value in seconds.items():
        print(f"{value:8.2f}  {name}")


def _timed(function) -> float:
    start = time.monotonic()
    function()
    return time.monotonic() - start


if __name__ == "__main__":
    cli.run(main)
