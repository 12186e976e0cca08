"""Measures an accelerator in a few minutes: `python -m lidit_jax.benchmarks.accelerator --out=DIR`.

Runs the benchmarks of training, sampling, attention and prompt encoding at the sizes of configs/1b.py and 10b.py, each
in a process of its own and beside PyTorch, the most telling first, as long as --minutes allow. After each one, DIR has
all figures so far as accelerator.json and accelerator.md; DIR/trace has a trace of the training step for XProf. The
same command runs those that are missing. --toy runs all of them at toy size, on any machine.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.errors import UserError
from lidit_jax.files import check_writable, write_bytes, write_json
from lidit_jax.parallel.preemption import activity, dies_with_this

_OUT = flags.DEFINE_string("out", None, "output folder")
_MINUTES = flags.DEFINE_float(
    "minutes", 8.0, "time for all benchmarks together, compilation included", lower_bound=0.1, upper_bound=10_000
)
_TOY = flags.DEFINE_bool("toy", False, "run everything at toy size, to see that it works")
_PYTORCH = flags.DEFINE_bool("pytorch", True, "compare with PyTorch")

LEAST_S = 20.0  # no benchmark is begun with less time left
LAST_LINES = 3  # of the output of a benchmark that failed, kept as its reason


@dataclasses.dataclass(frozen=True)
class Piece:
    """One benchmark to run.

    Attributes:
      name: of its JSON file.
      module: in `lidit_jax.benchmarks`.
      arguments: of its command line; {out} stands for the output folder.
      toy: the arguments that --toy replaces them with.
      has_torch: whether it takes --notorch.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    toy: tuple[str, ...]
    has_torch: bool = True


# Without torch.compile, which takes a minute on a CPU.
TOY_MODEL = (
    *("--config=shapes", "--batch=2", "--rounds=1", "--config.model.depth=1", "--config.model.hidden_size=16"),
    *("--config.model.refiner_blocks=1", "--nocompiled"),
)
TOY_ATTENTION = ("--batch=2", "--tokens=16", "--heads=2", "--head_size=8", "--rounds=1", "--calls=1")
# The batches are as large as leave room for PyTorch's activations without rematerialisation on 80 GB.
PIECES = (
    Piece(
        "train_1b_512",
        "train_step",
        ("--config=1b", "--resolution=512", "--batch=16", "--rounds=3", "--config.model.remat=dots"),
        (*TOY_MODEL, "--steps_a_round=1"),
    ),
    Piece(
        "train_1b_256",
        "train_step",
        ("--config=1b", "--resolution=256", "--batch=64", "--rounds=3", "--config.model.remat=dots"),
        (*TOY_MODEL, "--steps_a_round=1"),
    ),
    Piece(
        "attention_self_1b_512",
        "attention",
        ("--batch=16", "--tokens=1024", "--heads=16", "--head_size=72"),
        TOY_ATTENTION,
    ),
    Piece(
        "attention_cross_1b_512",
        "attention",
        ("--batch=16", "--tokens=1024", "--keys=512", "--heads=16", "--head_size=72", "--padded"),
        (*TOY_ATTENTION, "--keys=12", "--padded"),
    ),
    Piece(
        "sample_1b_512",
        "sample",
        ("--config=1b", "--resolution=512", "--batch=8", "--steps=25", "--rounds=2"),
        (*TOY_MODEL, "--steps=2"),
    ),
    Piece(
        "train_10b_slice_512",  # 4 of 10b's 48 blocks: what fits beside PyTorch with AdamW and EMA in float32
        "train_step",
        (
            *("--config=10b", "--resolution=512", "--batch=8", "--rounds=3", "--config.model.remat=dots"),
            *("--config.model.depth=4", "--config.mesh.data=1"),
        ),
        (*TOY_MODEL, "--steps_a_round=1"),
    ),
    Piece(
        "encode",
        "encode",
        ("--dtype=bfloat16", "--batch=64", "--prefix=64", "--prompt=128", "--rounds=5"),
        ("--batch=1", "--prefix=2", "--prompt=2", "--rounds=1"),
        has_torch=False,
    ),
    Piece(
        "trace",
        "train_step",
        (
            *("--config=1b", "--resolution=512", "--batch=16", "--rounds=1", "--steps_a_round=3", "--notorch"),
            *("--config.model.remat=dots", "--trace={out}/trace"),
        ),
        (*TOY_MODEL, "--steps_a_round=1", "--notorch", "--trace={out}/trace"),
        has_torch=False,
    ),
)


def main() -> None:
    from lidit_jax.metrics import duration

    out = epath.Path(cli.require(_OUT.name))
    check_writable(out, f"--out={out}")
    _file(out, PIECES[0]).parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * _MINUTES.value
    failed: dict[str, str] = {}
    for number, piece in enumerate(PIECES, 1):
        if _file(out, piece).exists():
            continue
        left = deadline - time.monotonic()
        if left < LEAST_S:
            failed[piece.name] = "not run: no time was left"
            continue
        _log(f"{piece.name} ({number} of {len(PIECES)}), {duration(left)} left")
        with activity(f"benchmark {piece.name}"):
            if reason := _run(piece, out, left):
                failed[piece.name] = reason
                _log(f"{piece.name}: {reason}")
        _write(out, failed)
    _write(out, failed)
    print((out / "accelerator.md").read_text())
    if len(failed) == len(PIECES):
        raise UserError(f"none of the benchmarks ran: {next(iter(failed.values()))}")


def _run(piece: Piece, out: epath.Path, seconds: float) -> str | None:
    """Runs a benchmark, whose JSON file it writes; returns the reason if it fails or takes longer than `seconds`."""
    from lidit_jax.metrics import duration

    command = [sys.executable, "-m", f"lidit_jax.benchmarks.{piece.module}", f"--json={_file(out, piece)}"]
    command += [word.replace("{out}", str(out)) for word in (piece.toy if _TOY.value else piece.arguments)]
    if piece.has_torch and not _PYTORCH.value:
        command.append("--notorch")
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    with dies_with_this(process):
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"stopped after {duration(time.monotonic() - started)}: no time was left"
        except BaseException:
            _kill(process)
            raise
    if process.returncode:
        lines = [line for line in output.splitlines() if line.strip()]
        return f"failed: {' / '.join(lines[-LAST_LINES:])}"[:500]
    return None


def _kill(process: subprocess.Popen) -> None:
    """Kills a process with the processes that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _file(out: epath.Path, piece: Piece) -> epath.Path:
    # Figures at toy size must not pass for those that are missing.
    return out / ("toy_pieces" if _TOY.value else "pieces") / f"{piece.name}.json"


def _write(out: epath.Path, failed: Mapping[str, str]) -> None:
    """Writes all figures so far to accelerator.json and accelerator.md."""
    found = {piece.name: json.loads(_file(out, piece).read_text()) for piece in PIECES if _file(out, piece).exists()}
    write_json(out / "accelerator.json", {"pieces": found, "failed": dict(failed)})
    write_bytes(out / "accelerator.md", report(found, failed).encode())


def report(found: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> str:
    """Returns the figures as Markdown.

    Args:
      found: what each benchmark wrote, by its name.
      failed: name -> reason of those without figures.
    """
    lines = []
    for host in dict.fromkeys(measured["host"] for measured in found.values()):
        lines += [f"Measured on: {host}", ""]
    for name, measured in found.items():
        lines += [f"**{name}**: {measured['what']}; median of {measured['rounds']} rounds", ""]
        lines += _table(measured["results"]) + [""]
    lines += [f"- {name}: {reason}" for name, reason in failed.items()]
    return "\n".join(lines).strip() + "\n"


# Key of a figure -> its column and format.
_COLUMNS = {
    "ms_per_step": ("ms", ".2f"),
    "samples_per_second": ("samples/s", ".4g"),
    "tokens_per_second": ("tokens/s", ".4g"),
    "tflops_per_second": ("TFLOP/s", ".4g"),
    "mfu": ("MFU", ".1%"),
    "times_as_slow": ("first is × as fast", ".2f"),
    "peak_mib": ("peak MiB", ".0f"),
}


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = {key: column for key, column in _COLUMNS.items() if rows[0].get(key) is not None}
    lines = ["| | " + " | ".join(head for head, _ in columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [format(row[key], form) for key, (_, form) in columns.items()]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
