"""Trains: `python -m lidit_jax.main --config=configs/shapes.py --workdir=DIR [--config.path.to.key=value …]`.

Run the same command again and it goes on where it stopped; also after SIGTERM, at which training saves and ends. On a
pod, run it on every host.
"""

from absl import flags
from etils import epath

from lidit_jax import cli, stages
from lidit_jax.parallel.hosts import join_hosts

_CONFIG = cli.define_config()
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "one run on several hosts; unset: where the environment names some"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, logs, pictures (local or gs://)")


def main() -> None:
    join_hosts(_DISTRIBUTED.value)
    stages.run(cli.read_config(_CONFIG), epath.Path(cli.require(_WORKDIR.name)))


if __name__ == "__main__":
    cli.run(main)
