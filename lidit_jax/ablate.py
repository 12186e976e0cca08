"""The paper's ablation tables in miniature, on built-in scenes:

    python -m lidit_jax.ablate --table=2 --seeds=3 --out=DIR

trains the rows of that table under one budget each, judges every object of what they draw, and writes tables.md,
tables.json and plots, with the paper's figures beside. --table=2,3 does several (rows that they share once),
--table=figure3 the curve over the place in the prompt. Run it again and it goes on where it was stopped; rows that are
there are not trained again, and what is complete stays in the tables. --jobs=N trains N at a time, on a CPU or on one
GPU; a TPU takes one. It is for one machine.
"""

import jax
from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.ablation import report, runs
from lidit_jax.errors import UserError
from lidit_jax.evaluation.eval_extra import require_extra
from lidit_jax.weights.safetensors_folder import local_folder

_CONFIG = cli.define_config("configs/ablation_scenes.py")
_TABLE = flags.DEFINE_list("table", None, f"of the paper: {', '.join(report.CHOICES)}; several by commas")
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs a row")
_OUT = flags.DEFINE_string("out", None, "folder for the runs and the tables")
_JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time")
_ONLY = flags.DEFINE_string("only", None, "ROW/SEED or parts/NAME: this alone, of what --out was begun with")


def main() -> None:
    out = epath.Path(local_folder(cli.require(_OUT.name)).resolve())
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file: name a folder")
    if _ONLY.value:
        runs.do_one(out, runs.find_job(_ONLY.value))
        return
    tables = report.choose(cli.require_list(_TABLE.name))
    for flag in (_SEEDS, _JOBS):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value} must be at least 1")
    require_extra("ablate", "matplotlib")
    # This process only looks after others, which need the accelerator: a TPU's compiler has one user at a time.
    jax.config.update("jax_platforms", "cpu")
    rows = dict.fromkeys(entry.row for table in tables.values() for entry in table.values())
    # Seed by seed: stopped early, it has whole tables of fewer seeds.
    todo = [runs.Run(row, seed) for seed in range(_SEEDS.value) for row in rows]
    runs.do_all(cli.read_config(_CONFIG), out, todo, _JOBS.value)
    report.write(out, report.choose([*tables, *report.complete(out, _SEEDS.value)]), _SEEDS.value)


if __name__ == "__main__":
    cli.run(main)
