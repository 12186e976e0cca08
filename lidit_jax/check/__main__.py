"""Verifies a workdir's checkpoints and frozen networks.

    python -m lidit_jax.check --workdir=runs/shapes

Prints one line for each. Exits with code 0 if all are intact and 2 if one is damaged; changes nothing.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a training run (local or gs://)")


def main() -> None:
    import jax

    from lidit_jax.check.workdir import check_workdir

    workdir = epath.Path(cli.require(_WORKDIR.name))
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerators to a run in progress
    damaged = 0
    for finding in check_workdir(workdir):
        cli.write_text(str(finding))
        damaged += finding.is_damaged
    if damaged:
        raise UserError(f"{workdir}: {damaged} damaged (see above): copy them again, or train them again")


if __name__ == "__main__":
    cli.run(main)
