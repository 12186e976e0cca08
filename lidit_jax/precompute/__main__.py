"""Computes latents ahead of training.

    python -m lidit_jax.precompute --config=configs/emoji.py --config.data.path=FOLDER_OF_TAR_SHARDS \
        --config.vae.weights=VAE_FOLDER --out=DIR

--features also stores the features of the captions by every text encoder. Train on the folder with the same config and
--config.data.source=precomputed --config.data.path=DIR. The same command resumes an interrupted run.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.parallel.preemption import activity

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", None, "output folder")
_BATCH = flags.DEFINE_integer("batch", 32, "images per batch of a process", lower_bound=1)
_DISTRIBUTED = cli.define_distributed()
_FEATURES = flags.DEFINE_bool("features", False, "also store the features of the captions by every text encoder")
_DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "dtype of the stored moments")


def main() -> None:
    from lidit_jax.parallel.hosts import join_hosts
    from lidit_jax.precompute.latents import precompute

    join_hosts(_DISTRIBUTED.value)
    out = epath.Path(cli.require(_OUT.name))
    with activity("precomputing"):
        precompute(cli.read_config(_CONFIG), out, _BATCH.value, _DTYPE.value, _FEATURES.value)


if __name__ == "__main__":
    cli.run(main)
