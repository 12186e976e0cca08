"""Writes a benchmark's scores, compared with the paper's: report.json, a Markdown table and a chart."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lidit_jax.files import finite, write_bytes, write_json
from lidit_jax.images import save_png
from lidit_jax.score.eval_extra import png_of
from lidit_jax.score.paper_results import table_1

JSON_FILE, TABLE_FILE, CHART_FILE = "report.json", "report.md", "report.png"
TITLES = {
    "geneval": "GenEval",
    "t2i_compbench": "T2I-CompBench",
    "dpg_bench": "DPG-Bench",
    "positional_bias": "Positional bias",
}
_OUR_COLOR = "#c8442f"
_COLORS = {  # models of the paper that the chart shows, in this order
    "SDXL": "#d5d9de",
    "PixArt-alpha": "#bcc3cb",
    "SD3-8B": "#a3acb7",
    "DALL-E 3": "#8b96a3",
    "LI-DiT-1B": "#7fb2d9",
    "LI-DiT-10B": "#2f6fa7",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """A benchmark's scores.

    Attributes:
      benchmark: its name.
      columns: name -> score. For benchmarks in the paper's Table 1, names and units are those of
        `paper_results.COLUMNS`; columns with other names are not compared. GenEval's scores are fractions, all others
        per cent. NaN if nothing was scored.
      counts: column -> number of values (usually images) that the score is the mean of.
      details: further results, JSON-serialisable.
    """

    benchmark: str
    columns: Mapping[str, float]
    counts: Mapping[str, int]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_report(report: Report, out: epath.Path, model_name: str) -> str:
    """Writes `report.json`, `report.md` and `report.png` into the folder; returns the Markdown table.

    Raises:
      OSError: the folder cannot be written.
    """
    values = dataclasses.asdict(report)
    write_json(out / JSON_FILE, finite({"model": model_name, **values}))
    table = markdown(report, model_name)
    write_bytes(out / TABLE_FILE, f"# {_title(report)}\n\n{table}\n![scores]({CHART_FILE})\n".encode())
    save_png(chart(report, model_name), out / CHART_FILE)
    return table


def markdown(report: Report, model_name: str) -> str:
    """Formats a Markdown table: one row per model, ours first and in bold, and a last row with our counts."""
    names = list(report.columns)
    rows = [["model", *names], ["---", *["---:"] * len(names)]]
    rows.append([_bold(_escaped(model_name)), *(_bold(_number(report.columns[name])) for name in names)])
    for model, scores in table_1(report.benchmark).items():
        rows.append([model, *(_number(scores.get(name, math.nan)) for name in names)])
    rows.append(["*ours: mean of*", *(f"*{report.counts[name]:,}*" if name in report.counts else "" for name in names)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def chart(report: Report, model_name: str) -> Any:
    """Plots ours and the paper's models as bars, grouped by column; returns a Pillow image."""
    from matplotlib.figure import Figure
    from PIL import Image

    paper, names = table_1(report.benchmark), list(report.columns)
    bars = [(model_name, report.columns, _OUR_COLOR)]
    for model, color in _COLORS.items():
        if any(name in paper.get(model, {}) for name in names):
            bars.append((model, paper[model], color))
    # Wide enough for the bars and for the legend under them.
    width = max(5.5, 1.5 + 0.26 * len(bars) * len(names), 1.3 * len(bars))
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    axes = figure.add_subplot()
    _draw_bars(axes, names, bars)
    axes.set_title(_title(report), loc="left", fontsize=14, fontweight="bold", pad=12)
    if len(bars) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=len(bars), frameon=False,
                      fontsize=9, handlelength=1, handleheight=1, columnspacing=1.4)  # fmt: skip
    return Image.open(io.BytesIO(png_of(figure))).convert("RGB")


def _draw_bars(axes: Any, names: Sequence[str], bars: Sequence[tuple[str, Mapping[str, float], str]]) -> None:
    """Draws one group of bars per column.

    Args:
      axes: matplotlib's.
      names: of the columns.
      bars: (model, column -> score, colour).
    """
    heights = np.array([[scores.get(name, math.nan) for name in names] for _, scores, _ in bars])  # [models, columns]
    known = ~np.isnan(heights)
    width, is_narrow = 0.84 / len(bars), heights.size > 8
    # Bars with a score stand side by side, centred in their group.
    at = np.arange(len(names)) + width * (known.cumsum(axis=0) - 0.5 - known.sum(axis=0) / 2)
    top = np.max(heights, where=known, initial=1e-9)
    for (model, _, color), xs, ys in zip(bars, at, heights, strict=True):
        axes.bar(xs, ys, 0.92 * width, color=color, label=model, zorder=2)
        is_ours = color == _OUR_COLOR
        style = {"color": color if is_ours else "#333333", "fontweight": "bold" if is_ours else "normal"}
        for x, y in zip(xs, ys, strict=True):
            if not math.isnan(y):
                axes.text(x, y + 0.012 * top, _number(y), ha="center", va="bottom", rotation=90 if is_narrow else 0,
                          fontsize=7 if is_narrow else 9, **style)  # fmt: skip
    axes.set_xticks(range(len(names)), names, fontsize=10.5)
    axes.tick_params(axis="both", length=0, colors="#555555")
    axes.set_ylim(0, 1.14 * top)
    axes.set_xlim(-0.55, len(names) - 0.45)
    axes.grid(axis="y", color="#e9ebee", zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bec6")


def _title(report: Report) -> str:
    unit = "fractions" if report.benchmark == "geneval" else "%"
    return f"{TITLES.get(report.benchmark, report.benchmark)} ({unit})"


def _number(score: float) -> str:
    """Formats a score with two decimals, as in the paper; NaN becomes ""."""
    return "" if math.isnan(score) else f"{score:.2f}"


def _bold(text: str) -> str:
    return f"**{text}**" if text else ""


def _escaped(name: str) -> str:
    return " ".join(name.replace("|", "\\|").split())
