"""Tests reports, which compare our scores with the paper's Table 1 in a table, a chart and JSON."""

import json
import math

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lidit_jax.score.paper_results import COLUMNS, table_1
from lidit_jax.score.report import Report, write_report


def report_of(benchmark, **scores):
    return Report(benchmark, scores, dict.fromkeys(scores, 1234), {"note": "x"})


def test_table_1_has_the_papers_numbers():
    assert table_1("geneval")["LI-DiT-10B"] == {
        "single": 0.99, "two": 0.91, "count": 0.65, "colors": 0.91, "position": 0.47, "attr": 0.64, "overall": 0.76,
    }  # fmt: skip
    assert table_1("t2i_compbench")["LI-DiT-1B"] == {"color": 74.08, "shape": 59.34, "texture": 69.59, "spatial": 27.57}
    assert table_1("t2i_compbench")["DALL-E 3"] == {"color": 81.10, "shape": 67.50, "texture": 80.70}
    assert table_1("dpg_bench")["SDXL"] == {"average": 74.65}
    assert "DALL-E 2" not in table_1("geneval")
    assert table_1("positional_bias") == {}


# DALL-E 3 is left out: the paper prints 0.47 for two objects, which does not fit the overall of 0.67.
@pytest.mark.parametrize("model", sorted(table_1("geneval").keys() - {"DALL-E 3"}))
def test_the_papers_overall_of_geneval_is_the_mean_of_its_tasks(model):
    *tasks, overall = table_1("geneval")[model].values()
    assert abs(np.mean(tasks) - overall) < 0.0101  # the paper rounds each to two decimals


def test_a_report_is_written_in_the_papers_units(tmp_path):
    scores = dict(zip(COLUMNS["geneval"], (0.951, 0.5, 0.25, 0.8, 0.1, 0.2, 0.4669), strict=True))
    table = write_report(report_of("geneval", **scores), epath.Path(tmp_path), "mine")
    lines = table.splitlines()
    assert lines[0] == "| model | single | two | count | colors | position | attr | overall |"
    assert lines[2] == "| **mine** | **0.95** | **0.50** | **0.25** | **0.80** | **0.10** | **0.20** | **0.47** |"
    assert "| LI-DiT-1B | 0.98 | 0.69 | 0.48 | 0.86 | 0.22 | 0.37 | 0.60 |" in lines
    assert lines[-1].endswith("| *1,234* |")
    assert table in (tmp_path / "report.md").read_text()
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["model"] == "mine"
    assert written["columns"] == scores
    assert written["details"] == {"note": "x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.png"]


def test_the_chart_has_a_bar_of_ours_for_every_column(tmp_path):
    write_report(report_of("t2i_compbench", color=70.0, shape=50.0, texture=60.0, spatial=20.0), tmp_path, "mine")
    image = np.asarray(Image.open(tmp_path / "report.png").convert("RGB")).astype(int)
    ours = (np.abs(image - [0xC8, 0x44, 0x2F]).max(axis=2) < 8)[image.shape[0] // 2 :]
    starts = np.flatnonzero(np.diff(ours.sum(axis=0) > 10, prepend=False).astype(int) == 1)
    assert len(starts) >= 4  # the bars; the legend's square may be one more


@pytest.mark.parametrize("benchmark", ["dpg_bench", "positional_bias", "something else"])
def test_columns_without_a_score_or_without_company_are_reported(tmp_path, benchmark):
    table = write_report(report_of(benchmark, average=math.nan, other=3.0), epath.Path(tmp_path), "a|b\nc")
    assert "| **a\\|b c** |  | **3.00** |" in table.splitlines()
    assert json.loads((tmp_path / "report.json").read_text())["columns"] == {"average": None, "other": 3.0}
    Image.open(tmp_path / "report.png").load()


def test_nothing_but_nan_is_reported_too(tmp_path):
    table = write_report(report_of("positional_bias", first=math.nan), epath.Path(tmp_path), "mine")
    assert "| **mine** |  |" in table.splitlines()
    assert json.loads((tmp_path / "report.json").read_text())["columns"] == {"first": None}
