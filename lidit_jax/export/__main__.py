"""Command line that exports a run to PyTorch: `python -m lidit_jax.export --workdir=DIR --out=DIR`.

`DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True)` then loads the folder with torch, diffusers and
transformers, without JAX.
"""

import jax
from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.export.write import DTYPES, TEXT_ENCODERS, WEIGHTS, Request, export

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_OUT = flags.DEFINE_string("out", None, "local folder to write, new or empty")
_WEIGHTS = flags.DEFINE_string("weights", "ema", f"weights of LI-DiT: {' or '.join(WEIGHTS)} (the raw ones)")
_DTYPE = flags.DEFINE_string("dtype", "float32", f"dtype of LI-DiT's weights: {' or '.join(DTYPES)}")
_TEXT_ENCODERS = flags.DEFINE_string(
    "text_encoders",
    None,
    f"how to export LLMs that the run did not train: {' or '.join(TEXT_ENCODERS)} (default: copy those in folders, "
    "refer by name to those on the Hugging Face hub)",
)
_MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "largest size of a file of LI-DiT's weights")
_ENCODERS = cli.define_moved_encoders()
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a previous export")


def main() -> None:
    # An export only reads and writes files. Leave accelerators alone: training may be using them, and those of a pod
    # need all of its hosts.
    jax.config.update("jax_platforms", "cpu")
    export(
        Request(
            workdir=epath.Path(cli.require(_WORKDIR.name)),
            out=epath.Path(cli.require(_OUT.name)),
            weights=_WEIGHTS.value,
            dtype=_DTYPE.value,
            text_encoders=_TEXT_ENCODERS.value,
            max_shard_gb=_MAX_SHARD_GB.value,
            overwrite=_OVERWRITE.value,
            encoders=_ENCODERS(),
        )
    )


if __name__ == "__main__":
    cli.run(main)
