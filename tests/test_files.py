"""Written JSON is valid for every parser (no NaN, no infinities); how text files are read."""

import json
import math

import numpy as np
import pytest
from etils import epath

from lidit_jax.check.workdir import Finding
from lidit_jax.errors import one_line
from lidit_jax.evaluate.benchmarks import open_benchmark
from lidit_jax.files import finite, read_json, read_text, split_lines
from lidit_jax.metrics import Metrics
from lidit_jax.score.report import Report, write_report
from lidit_jax.text.prompts_file import read_prompts


def strict_json(text):
    """Parses JSON like other languages do: NaN and Infinity are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON: {text}"))


def test_what_is_not_finite_becomes_null_at_any_depth():
    value = {"a": [1, (math.nan, 2.5)], "b": {"c": -math.inf, "d": "NaN", "e": None, "f": True}, "g": np.float64("inf")}
    expected = {"a": [1, [None, 2.5]], "b": {"c": None, "d": "NaN", "e": None, "f": True}, "g": None}
    assert finite(value) == expected
    assert strict_json(json.dumps(finite(value))) == expected


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_logged_value_that_is_not_finite_is_null_in_its_line(tmp_path, tensorboard):
    metrics = Metrics(tmp_path, tensorboard)
    metrics.scalars(1, {"loss": 0.5, "a": math.nan, "b": math.inf, "c": np.float64("-inf"), "skipped": 2})
    metrics.close()
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict_json(line) == {"step": 1, "loss": 0.5, "a": None, "b": None, "c": None, "skipped": 2}
    assert bool(list(tmp_path.glob("events.out.tfevents*"))) == tensorboard


def test_a_reports_details_are_strict_json_as_its_columns_are(tmp_path):
    report = Report("dpg_bench", {"average": math.nan}, {"average": 0}, {"by pairs": {"2": [math.nan, 1.0]}})
    write_report(report, epath.Path(tmp_path), "mine")
    written = strict_json((tmp_path / "report.json").read_text())
    assert written["columns"] == {"average": None}
    assert written["details"] == {"by pairs": {"2": [None, 1.0]}}


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\r"])
def test_only_line_feeds_end_a_line(tmp_path, inside):
    assert split_lines(f"a{inside}b\r\nc\n\nd") == [f"a{inside}b", "c", "", "d"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"a{inside}b\r\nc\n".encode())
    assert read_prompts(None, str(file)) == [f"a{inside}b", "c"]
    assert open_benchmark("prompts", epath.Path(file), 1).prompts == [f"a{inside}b", "c"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_files_may_be_in_utf_8_or_utf_16(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes("a 图\r\nb".encode(encoding))
    assert read_text(epath.Path(tmp_path / "x.txt"), "x.txt", "a text") == "a 图\r\nb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": 1', "delimiter"),
        (b"\xff", "utf-8"),
        (b"9" * 5000, "digits"),
        (b" " * 70 + b"1", "MiB, more than"),
        (None, "a folder"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_a_value_error(tmp_path, monkeypatch, content, message):
    file = epath.Path(tmp_path / "x.json")
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    monkeypatch.setattr("lidit_jax.files.MAX_BYTES", 70 if len(content or b"") == 71 else 1 << 20)
    with pytest.raises(ValueError, match=message):
        read_json(file)


def test_a_json_file_has_its_value(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1, "ü"]}')
    assert read_json(epath.Path(tmp_path / "x.json")) == {"a": [1, "ü"]}


def test_text_of_others_cannot_command_the_terminal():
    name = "../../x\x00\x1b]0;owned\x07\n\u202e一\udcff"
    line = "../../x\\x00\\x1b]0;owned\\x07 \\u202e一\\udcff"
    assert one_line(name) == line
    assert str(Finding("training/lidit/checkpoints/7", name, is_damaged=True)).endswith(f"damaged: {line}")
