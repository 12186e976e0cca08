"""Written JSON is valid for every parser: no NaN, no infinities."""

import json
import math

import numpy as np
import pytest
from etils import epath

from lidit_jax.files import finite
from lidit_jax.metrics import Metrics
from lidit_jax.score.report import Report, write_report


def strict_json(text):
    """Parses JSON like other languages do: NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON: {text}"))


def test_what_is_not_finite_becomes_null_at_any_depth():
    value = {"a": [1, (math.nan, 2.5)], "b": {"c": -math.inf, "d": "NaN", "e": None, "f": True}, "g": np.float64("inf")}
    expected = {"a": [1, [None, 2.5]], "b": {"c": None, "d": "NaN", "e": None, "f": True}, "g": None}
    assert finite(value) == expected
    assert strict_json(json.dumps(finite(value))) == expected


def test_a_logged_value_that_is_not_finite_is_null_in_its_line(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.scalars(1, {"loss": 0.5, "a": math.nan, "b": math.inf, "c": np.float64("-inf"), "skipped": 2})
    metrics.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict_json(line) == {"step": 1, "loss": 0.5, "a": None, "b": None, "c": None, "skipped": 2}


def test_a_reports_details_are_strict_json_as_its_columns_are(tmp_path):
    report = Report("dpg_bench", {"average": math.nan}, {"average": 0}, {"by pairs": {"2": [math.nan, 1.0]}})
    write_report(report, epath.Path(tmp_path), "mine")
    written = strict_json((tmp_path / "report.json").read_text())
    assert written["columns"] == {"average": None}
    assert written["details"] == {"by pairs": {"2": [None, 1.0]}}
