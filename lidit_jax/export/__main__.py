"""Command line that exports a run to PyTorch: `python -m lidit_jax.export --workdir=DIR --out=DIR`.

`DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True)` then loads the folder with torch, diffusers and
transformers, without JAX.
"""

import signal
import sys
from typing import Any

import jax
from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.export.write import DTYPES, TEXT_ENCODERS, WEIGHTS, Request, export

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_OUT = flags.DEFINE_string("out", None, "folder to write: a new or an empty one, on a disk")
_WEIGHTS = flags.DEFINE_string("weights", "ema", f"{' or '.join(WEIGHTS)} (the raw ones)")
_DTYPE = flags.DEFINE_string("dtype", "float32", f"{' or '.join(DTYPES)}: of LI-DiT's weights")
_TEXT_ENCODERS = flags.DEFINE_string(
    "text_encoders",
    None,
    f"{' or '.join(TEXT_ENCODERS)}: what becomes of LLMs that the run did not train (default: those of folders are "
    "copied, of those on the Hugging Face hub the name is written)",
)
_MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "size of a file of LI-DiT's weights")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a folder that was exported before")


def main() -> None:
    # An export only reads and writes files. Leave accelerators alone: training may be using them, and those of a pod
    # need all of its hosts.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, _terminated)
    export(
        Request(
            workdir=epath.Path(cli.require(_WORKDIR.name)),
            out=epath.Path(cli.require(_OUT.name)),
            weights=_WEIGHTS.value,
            dtype=_DTYPE.value,
            text_encoders=_TEXT_ENCODERS.value,
            max_shard_gb=_MAX_SHARD_GB.value,
            overwrite=_OVERWRITE.value,
        )
    )


def _terminated(number: int, frame: Any) -> None:
    """Exits through every `finally` block, which remove partially written files."""
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    cli.run(main)
