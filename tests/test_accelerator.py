"""The benchmark of an accelerator: its pieces' command lines, its report, and what a second start runs."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from environment import XLA_FLAGS

from lidit_jax.benchmarks import accelerator
from lidit_jax.benchmarks.accelerator import PIECES, Piece, report

FIGURES = {
    "what": "training step, depth 1",
    "host": "NVIDIA H100, 16 x CPU, jax 0.11",
    "rounds": 3,
    "results": [
        {"name": "lidit_jax", "ms_per_step": 10.0, "tflops_per_second": 500.0, "mfu": 0.505, "times_as_slow": 1.0},
        {"name": "PyTorch", "ms_per_step": 12.5, "tflops_per_second": 400.0, "mfu": 0.404, "times_as_slow": 1.25},
    ],
}


@pytest.mark.parametrize("module", sorted({piece.module for piece in PIECES}))
def test_the_pieces_use_flags_that_their_benchmarks_have(module):
    command = [sys.executable, "-m", f"lidit_jax.benchmarks.{module}", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    assert "json" in known
    for piece in PIECES:
        if piece.module == module:
            given = {word.removeprefix("--").partition("=")[0] for word in (*piece.arguments, *piece.toy)}
            names = {name for name in given if not name.startswith("config.")}
            assert {name.removeprefix("no") if name.startswith("no") else name for name in names} <= known
            assert not piece.has_torch or "torch" in known


def test_the_report_has_a_table_for_each_piece_and_the_reasons_of_those_without():
    text = report({"train": FIGURES}, {"encode": "not run: no time was left"})
    assert text.startswith("Measured on: NVIDIA H100, 16 x CPU, jax 0.11\n")
    assert "**train**: training step, depth 1; median of 3 rounds\n\n| | ms | TFLOP/s | MFU | first is" in text
    assert "\n| PyTorch | 12.50 | 400 | 40.4% | 1.25 |\n" in text
    assert text.endswith("- encode: not run: no time was left\n")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmark on some pieces; returns its JSON."""

    def run(pieces, minutes=5.0):
        monkeypatch.setattr(accelerator, "PIECES", pieces)
        for name, value in (("_OUT", str(tmp_path)), ("_MINUTES", minutes), ("_TOY", True), ("_PYTORCH", False)):
            monkeypatch.setattr(accelerator, name, type("Flag", (), {"value": value, "name": name.strip("_").lower()}))
        monkeypatch.setattr(accelerator.cli, "require", lambda name: str(tmp_path))
        accelerator.main()
        return json.loads((tmp_path / "accelerator.json").read_text())

    return run


def test_a_finished_piece_is_not_run_again_and_a_failed_one_is(run, tmp_path, capsys):
    (tmp_path / "toy_pieces").mkdir()
    (tmp_path / "toy_pieces" / "done.json").write_text(json.dumps(FIGURES))
    broken = Piece("broken", "no_such_benchmark", (), (), has_torch=False)
    for _ in range(2):
        found = run((Piece("done", "no_such_benchmark", (), ()), broken))
        assert found["pieces"] == {"done": FIGURES}
        assert "No module named lidit_jax.benchmarks.no_such_benchmark" in found["failed"]["broken"]
        assert "broken (2 of 2)" in capsys.readouterr().err
    assert not (tmp_path / "pieces").exists()  # figures at toy size are kept apart


def test_pieces_for_which_no_time_is_left_are_named(run):
    with pytest.raises(accelerator.UserError, match="none of the benchmarks ran: not run: no time was left"):
        run((Piece("late", "attention", (), ()),), minutes=0.1)


@pytest.mark.slow
def test_a_piece_is_measured_and_one_that_takes_too_long_is_stopped(run, monkeypatch):
    attention = next(piece for piece in PIECES if piece.module == "attention")
    endless = Piece("endless", "attention", (), (*attention.toy, "--calls=1000000", "--rounds=1000000"))
    monkeypatch.setattr(accelerator, "LEAST_S", 1.0)
    run((attention,))
    found = run((attention, endless), minutes=0.3)
    [row] = found["pieces"][attention.name]["results"]
    assert row["name"] == "xla" and row["ms_per_step"] > 0
    assert found["failed"]["endless"].endswith("no time was left")


@pytest.mark.slow
def test_a_round_of_ours_is_traced_and_the_figures_are_written(tmp_path):
    piece = next(piece for piece in PIECES if piece.name == "trace")
    arguments = [word.replace("{out}", str(tmp_path)) for word in piece.toy]
    command = [sys.executable, "-m", "lidit_jax.benchmarks.train_step", *arguments, f"--json={tmp_path}/a.json"]
    one_device = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
    done = subprocess.run(command, cwd=ROOT, env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    [row] = json.loads((tmp_path / "a.json").read_text())["results"]
    assert row["samples_per_second"] == pytest.approx(1e3 * 2 / row["ms_per_step"])
