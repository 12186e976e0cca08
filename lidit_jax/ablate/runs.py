"""Runs the ablations' jobs, each in its own process: for each seed the shared networks, and one run per row.

OUT/config.json            config common to all runs
OUT/parts/SEED/            the frozen language models and the VAE that the rows of a seed share
OUT/runs/ROW/SEED/         an ordinary workdir per run (also for `sample --workdir`), with log.txt and scores.json
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import tqdm
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.ablate.language_models import FAMILIES, check_settings, train_encoder
from lidit_jax.ablate.rows import ROWS, Row
from lidit_jax.config import build, claim_workdir, read_workdir
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import SCORES_FILE, SceneEvaluation
from lidit_jax.experiment import LIDIT, Experiment
from lidit_jax.files import check_writable
from lidit_jax.models.vae_section import VAESectionConfig
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.preemption import Preempted, catch_sigterm, dies_with_this
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.stages.run import run_stages
from lidit_jax.workdir_lock import lock

logger = logging.getLogger(__name__)

PARTS_SECTIONS = ("seed", "mesh", "data", "vae")
PARTS = "parts"
LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"
VAE = "vae"
# Fields of the config section `evaluate`: kinds of prompts that the tables show.
JUDGED_KINDS = ("two_objects", "held_out_pairs", "three_objects", "four_objects")
POLL_INTERVAL_S = 1.0  # between two checks of the processes


class SharedNetwork(NamedTuple):
    """A frozen network that the runs of a seed share.

    Attributes:
      name: "vae", or the name of a language model.
      seed: seed of its initial weights and of the order of its data; for a language model also of its corpus.
    """

    name: str
    seed: int

    def workdir(self, out: epath.Path) -> epath.Path:
        return out / PARTS / str(self.seed)

    def log(self, out: epath.Path) -> epath.Path:
        return self.workdir(out) / f"{self.name}.{LOG_FILE}"

    def metrics(self, out: epath.Path) -> epath.Path:
        return self.workdir(out) / "training" / self.name / METRICS_FILE

    def steps(self, config: ConfigDict) -> int:
        return (config.vae if self.name == VAE else config.language_models).train.steps

    def is_done(self, out: epath.Path) -> bool:
        return self.folder(out).exists()

    def folder(self, out: epath.Path) -> epath.Path:
        """Returns the folder of the finished weights."""
        return self.workdir(out) / (VAE if self.name == VAE else f"encoders/{self.name}")

    def parts(self) -> "list[SharedNetwork]":
        """Returns the networks that it needs: none."""
        return []

    def do(self, config: ConfigDict, out: epath.Path) -> None:
        parts = parts_config(config, self.seed)
        if self.name == VAE:
            run_stages(parts, self.workdir(out))
        else:
            experiment = Experiment(parts, self.workdir(out))
            train_encoder(experiment, self.name, config.language_models, make_mesh(parts.mesh), ShardingRules())

    def __str__(self) -> str:
        return f"{PARTS}/{self.seed}/{self.name}"


class Run(NamedTuple):
    """One row with one seed."""

    row: Row
    seed: int

    def workdir(self, out: epath.Path) -> epath.Path:
        return out / "runs" / self.row.name / str(self.seed)

    def log(self, out: epath.Path) -> epath.Path:
        return self.workdir(out) / LOG_FILE

    def metrics(self, out: epath.Path) -> epath.Path:
        return self.workdir(out) / "training" / LIDIT / METRICS_FILE

    def steps(self, config: ConfigDict) -> int:
        return config.train.steps

    def is_done(self, out: epath.Path) -> bool:
        return (self.workdir(out) / SCORES_FILE).exists()

    def parts(self) -> list[SharedNetwork]:
        """Returns the networks that it needs."""
        return [SharedNetwork(name, self.seed) for name in (VAE, *self.row.encoders)]

    def do(self, config: ConfigDict, out: epath.Path) -> None:
        for part in self.parts():
            if not part.is_done(out):
                raise UserError(f"--out={out} has no {part} yet, which {self} needs: run --only={part} first")
        run_stages(run_config(config, self, out), self.workdir(out))

    def __str__(self) -> str:
        return f"{self.row.name}/{self.seed}"


Job = SharedNetwork | Run


def find_job(name: str) -> Job:
    """Returns the job named "ROW/SEED" or "parts/SEED/NAME".

    Raises:
      UserError: there is no such job.
    """
    rows = {row.name: row for row in ROWS.values()}
    networks = (VAE, *FAMILIES)
    if found := re.fullmatch(rf"{PARTS}/([0-9]{{1,9}})/(.+)", name):
        if found[2] in networks:
            return SharedNetwork(found[2], int(found[1]))
    elif (found := re.fullmatch(r"(.+)/([0-9]{1,9})", name)) and found[1] in rows:
        return Run(rows[found[1]], int(found[2]))
    raise UserError(
        f"--only={name}: name ROW/SEED, where rows are {', '.join(sorted(rows))}, or {PARTS}/SEED/NAME, where names "
        f"are {', '.join(networks)}"
    )


def parts_config(config: ConfigDict, seed: int) -> ConfigDict:
    """Returns the config of a seed's shared networks, whose sections are those of a VAE's config."""
    return ConfigDict({section: config[section] for section in PARTS_SECTIONS} | {"seed": seed})


def run_config(config: ConfigDict, run: Run, out: epath.Path) -> ConfigDict:
    """Returns a run's config, an ordinary one that names the folders of the shared networks."""
    changed = ConfigDict(config.to_dict())  # a copy that accepts new keys
    del changed["language_models"]
    changed.seed = run.seed
    changed.text.instruction = config.language_models.instruction if run.row.instruction else ""
    changed.vae = {
        "weights": str(SharedNetwork(VAE, run.seed).folder(out)),
        "dtype": config.vae.get("dtype", VAESectionConfig.dtype),
    }
    changed.encoders = {
        name: {"weights": str(SharedNetwork(name, run.seed).folder(out)), "dtype": "float32"}
        for name in run.row.encoders
    }
    changed.model.update(run.row.model())
    return changed


def check(config: ConfigDict, out: epath.Path, runs: Sequence[Run]) -> None:
    """Checks the config of all runs before anything is trained or written.

    Raises:
      UserError: the config is not one of ablations, or a run of it could not be trained.
    """
    if "language_models" not in config or "evaluate" not in config:
        raise UserError("the config has no language_models or no evaluate section: use configs/ablation_scenes.py")
    evaluation = build(SceneEvaluation, config.evaluate, "evaluate")
    for kind in JUDGED_KINDS:
        if (count := getattr(evaluation, kind)) < 1:
            raise UserError(f"evaluate.{kind}={count}: the tables need scenes of this kind: use at least 1")
    Experiment(parts_config(config, 0), out)
    for row in dict.fromkeys(run.row for run in runs):
        Experiment(run_config(config, Run(row, 0), out), out)
    for name in dict.fromkeys(name for run in runs for name in run.row.encoders):
        check_settings(name, config.language_models)


def run_job(out: epath.Path, job: Job) -> None:
    """Trains one shared network, or trains and evaluates one run; resumes an interrupted one.

    Raises:
      UserError: another process is training it, or a network that it needs is missing.
    """
    config = read_workdir(out)
    if "language_models" not in config:
        raise UserError(f"--out={out} is not a folder of ablations: run the command without --only first")
    with lock(job.log(out).with_suffix(".lock"), str(job)):
        job.do(config, out)


def run_all(
    config: ConfigDict, out: epath.Path, runs: Sequence[Run], num_processes: int, hours: float | None = None
) -> bool:
    """Trains the missing shared networks and does the missing runs, `num_processes` at a time.

    Args:
      config: common to all runs.
      out: folder of the ablations.
      runs: those wanted, in order; finished ones are skipped. Each follows the networks that it needs.
      num_processes: jobs at a time.
      hours: time after which the runs are stopped, saved; None sets no limit.

    Returns:
      True if all runs are finished, False if the time was up before.

    Raises:
      UserError: the folder was created with another config, or a run failed (the others are stopped after saving a
        checkpoint).
      Preempted: SIGTERM was received; all runs have saved a checkpoint.
    """
    check(config, out, runs)
    claim_workdir(out, config, may_grow=False)
    deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
    jobs = list(dict.fromkeys(job for run in runs for job in (*run.parts(), run)))
    missing = [job for job in jobs if not job.is_done(out)]
    logger.info("%d of %d left: %s", len(missing), len(jobs), ", ".join(map(str, missing)))
    return not missing or _run_in_processes(missing, config, out, num_processes, deadline)


def _run_in_processes(
    jobs: Sequence[Job], config: ConfigDict, out: epath.Path, num_processes: int, deadline: float
) -> bool:
    """Runs each job in its own process, with one progress bar over all steps, until `time.monotonic()` is `deadline`.

    A job begins when the networks that it needs are there; they are among the jobs before it, or done.

    Returns:
      True if all jobs are done; False if the time was up before, and those begun have saved a checkpoint.
    """
    waiting: list[Job] = list(jobs)
    working: dict[Job, subprocess.Popen] = {}
    bar = tqdm.tqdm(total=sum(job.steps(config) for job in jobs), unit="step", smoothing=0.02, mininterval=5)
    with bar, catch_sigterm() as notice, contextlib.ExitStack() as children:
        try:
            while not notice.received:
                for job in _take_ready(waiting, num_processes - len(working), out):
                    working[job] = children.enter_context(dies_with_this(_start(job, out)))
                if not working:
                    return True
                if time.monotonic() >= deadline:
                    return False
                time.sleep(POLL_INTERVAL_S)
                if notice.received:
                    break
                for job, process in list(working.items()):
                    if process.poll() is not None:
                        del working[job]
                        _check(job, process, out)
                done = sum(job.steps(config) for job in jobs if job not in working and job.is_done(out))
                bar.set_postfix_str(", ".join(map(str, working)), refresh=False)
                bar.update(done + sum(_steps_taken(job, out) for job in working) - bar.n)
            raise Preempted(
                f"stopped by {notice.signal_name}, all runs saved a checkpoint: run the same command again to resume"
            )
        finally:
            for process in working.values():
                process.terminate()  # it saves a checkpoint, as at a preemption
            for process in working.values():
                process.wait()


def _take_ready(waiting: list[Job], count: int, out: epath.Path) -> list[Job]:
    """Removes from `waiting` the first `count` jobs whose networks are there, and returns them."""
    ready = (job for job in waiting if all(part.is_done(out) for part in job.parts()))
    taken = list(itertools.islice(ready, max(count, 0)))
    waiting[:] = [job for job in waiting if job not in taken]
    return taken


def _start(job: Job, out: epath.Path) -> subprocess.Popen:
    """Starts a job's process, with its output in the job's log."""
    environment = {
        # Seeds of a row run the same programs, so one compilation serves all.
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        # Several processes share a GPU.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "lidit_jax.ablate", f"--out={out}", f"--only={job}"]
    job.log(out).parent.mkdir(parents=True, exist_ok=True)
    with job.log(out).open("wb") as log:
        # A new session keeps the terminal's Ctrl-C from it: `_run_in_processes` signals it and waits until it saved.
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment | dict(os.environ), start_new_session=True
        )


def _check(job: Job, process: subprocess.Popen, out: epath.Path) -> None:
    """Checks that a process that ended has done its job.

    Raises:
      UserError: it has not; the message quotes its log.
    """
    if process.returncode or not job.is_done(out):
        log = job.log(out)
        lines = log.read_bytes().decode(errors="replace").strip().splitlines()
        if not lines:
            check_writable(out, f"--out={out}")  # on a full disk, the process can't say why it ended
            lines = ["its log is empty"]
        errors = [line for line in lines if line.startswith("error: ")] or lines
        raise UserError(
            f"{job} ended with status {process.returncode} ({errors[-1][:200]}): see {log}, then run the same command "
            "again to resume"
        )


def _steps_taken(job: Job, out: epath.Path) -> int:
    """Returns the number of steps taken so far, from the job's metrics file."""
    file = job.metrics(out)
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line that is being written
    return 0
