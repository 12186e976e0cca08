"""Exports a run to PyTorch.

    python -m lidit_jax.export --workdir=runs/shapes --out=shapes-torch

`DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True)` then loads the folder with torch, diffusers and
transformers, without JAX.
"""

from absl import flags
from etils import epath

from lidit_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_OUT = flags.DEFINE_string("out", None, "local folder to write, new or empty")
_WEIGHTS = flags.DEFINE_string("weights", "ema", "weights of LI-DiT: ema or params (the raw ones)")
_DTYPE = flags.DEFINE_string("dtype", "float32", "dtype of LI-DiT's weights: float32 or bfloat16")
_TEXT_ENCODERS = flags.DEFINE_string(
    "text_encoders",
    None,
    "how to export LLMs that the run did not train: copy or reference (default: copy those in folders, "
    "refer by name to those on the Hugging Face hub)",
)
_MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "largest size of a file of LI-DiT's weights")
_MOVED = cli.define_moved_weights()
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a previous export")


def main() -> None:
    import jax

    from lidit_jax.export.write import Request, export

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
            **_MOVED(),
        )
    )


if __name__ == "__main__":
    cli.run(main)
