"""The paper's ablation tables in miniature, and rows of ours, on built-in scenes.

    python -m lidit_jax.ablate --table=2 --out=DIR

trains each row of the table with the same budget and five seeds, checks every object in the images it generates, and
writes tables.md, tables.json and plots that compare the scores with the paper's. The frozen language models and the VAE
are trained once a seed. --table=2,3 makes several tables and trains the rows they share once; --table=figure3 is the
curve over the position in the prompt, --table=ours has rows that the paper does not have. Run it again to resume:
finished rows are not trained again, and complete tables stay. --hours=N stops after N hours and writes the tables of
the seeds that are complete. --jobs=N trains N rows at a time, on a CPU or on one GPU; a TPU takes one process at a
time. It runs on one host.

As in the paper, rows without the instruction use a base LM and rows with it a tuned one; Table 4 has all four
combinations. The base LM is trained on captions alone; the tuned one, which stands for the paper's multi-modal LLM,
also on descriptions that the instruction asks for, as text and without images.
"""

import sys

from absl import flags
from etils import epath

from lidit_jax import cli

_CONFIG = cli.define_config("ablation_scenes")
_TABLE = flags.DEFINE_list("table", None, "tables, separated by commas: 2, 3, 4, 5, 6, ours, figure3")
_SEEDS = flags.DEFINE_integer("seeds", 5, "runs per row, each with LMs and a VAE of its own seed", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "folder for the runs and the tables")
_JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time", lower_bound=1)
_HOURS = flags.DEFINE_float(
    "hours", None, "stop after this many hours, with all runs saved; the same command resumes", lower_bound=0.001
)
_ONLY = flags.DEFINE_string("only", None, "ROW/SEED or parts/SEED/NAME: train only this, with the config in --out")


def main() -> None:
    import jax

    from lidit_jax.ablate import report, runs
    from lidit_jax.files import check_writable
    from lidit_jax.score.eval_extra import require_extra
    from lidit_jax.weights.safetensors_folder import local_folder

    out = epath.Path(local_folder(cli.require(_OUT.name)).resolve())
    check_writable(out, f"--out={out}")
    if _ONLY.value:
        runs.run_job(out, runs.find_job(_ONLY.value))
        return
    tables = report.choose(cli.require_list(_TABLE.name))
    require_extra("ablate", "matplotlib")
    # This process only supervises; its children need the accelerator, and a TPU can be used by one process at a time.
    jax.config.update("jax_platforms", "cpu")
    rows = dict.fromkeys(entry.row for table in tables.values() for entry in table.values())
    # Seed by seed, so that an interrupted command leaves complete tables with fewer seeds.
    wanted = [runs.Run(row, seed) for seed in range(_SEEDS.value) for row in rows]
    finished = runs.run_all(cli.read_config(_CONFIG), out, wanted, _JOBS.value, _HOURS.value)
    if seeds := report.complete_seeds(out, tables, _SEEDS.value):
        report.write(out, report.choose([*tables, *report.complete(out, seeds)]), seeds)
    if not finished:
        done = f"the tables have {seeds} of {_SEEDS.value} seeds" if seeds else "no table is complete yet"
        print(f"stopped after {_HOURS.value:g} hours, {done}: run the same command again to resume", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, resumable=True)
