"""Trains: `python -m lidit_jax.main --config=configs/shapes.py --workdir=DIR [--config.path.to.key=value …]`.

Run the same command again and it goes on where it stopped.
"""

from absl import flags
from etils import epath

from lidit_jax import cli, stages

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, logs, pictures (local or gs://)")


def main() -> None:
    stages.run(cli.read_config(_CONFIG), epath.Path(cli.require(_WORKDIR.name)))


if __name__ == "__main__":
    cli.run(main)
