"""The ablations' results beside the paper's: tables with intervals over seeds, which orderings appear, and plots."""

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import stats

from lidit_jax.ablation.rows import T5, TABLES, Row, TableRow
from lidit_jax.ablation.runs import Run
from lidit_jax.errors import UserError
from lidit_jax.evaluation.scenes import COUNTS, HELD_OUT, SCORES_FILE, named_at
from lidit_jax.json_file import write_json

logger = logging.getLogger(__name__)

FIGURE_3 = "figure3"
# Table 4 is about multi-modal tuning of the LLMs, which captions of scenes cannot give.
CHOICES = (*(table for table in TABLES if table != "4"), FIGURE_3)
# Name here -> (group of prompts, what is right of it), see `evaluation/scenes.py`.
COLUMNS = {
    "pairs": ("all scenes", "pair"),
    "objects": ("all scenes", "objects"),
    "scenes": ("all scenes", "scenes"),
    "held-out": (HELD_OUT, "objects"),
}
FOUR = COUNTS[4]
PLACES = range(4)
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Mean:
    """Over seeds, with Student's 95 % interval; of one seed alone, without."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return float(np.mean(self.values))

    @property
    def half_width(self) -> float:
        count = len(self.values)
        if count < 2:
            return math.nan
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(self.values, ddof=1) / math.sqrt(count))

    def __str__(self) -> str:
        return f"{self.value:.1f}" if math.isnan(self.half_width) else f"{self.value:.1f} ± {self.half_width:.1f}"

    def __sub__(self, other: "Mean") -> "Mean":
        """Of the differences seed by seed: both rows drew the same prompts from the same noise."""
        return Mean(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


def choose(names: Sequence[str]) -> dict[str, Mapping[str, TableRow]]:
    """The tables of these names; Figure 3 is the curve of some of Table 3's rows.

    Raises:
      UserError: there is no such table here.
    """
    found = {}
    for name in names:
        if name not in CHOICES:
            why = " (multi-modal tuning needs real LLMs: configs/ablation.py:table4_… )" if name == "4" else ""
            raise UserError(f"--table={name}: choose from {', '.join(CHOICES)}{why}")
        if name == FIGURE_3:
            found[name] = {key: TABLES["3"][key] for key in ("t5", "llama", "llama_token_refiner")}
        else:
            found[name] = TABLES[name]
    return found


def check_plotting() -> None:
    """Raises UserError where matplotlib is missing, before hours are spent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('plots need matplotlib: pip install "lidit-jax[eval]"') from None


def write(out: epath.Path, tables: Mapping[str, Mapping[str, TableRow]], seeds: int) -> None:
    """tables.md, tables.json and a plot for each table, of runs that are all there."""
    rows = dict.fromkeys(entry.row for table in tables.values() for entry in table.values())
    results = {row: Result.read(out, row, seeds) for row in rows}
    text = "\n".join(_markdown(name, table, results) for name, table in tables.items() if name != FIGURE_3)
    text += "\n" + _places_markdown(_curves(tables, results))
    values = {row.name: result.to_json() for row, result in results.items()}
    write_json(out / "tables.json", {"seeds": seeds, "unit": "per cent", "rows": values})
    (out / "tables.md").write_text(text)
    for name, table in tables.items():
        if name != FIGURE_3:
            _plot_table(out / f"table{name}.png", name, table, results)
    _plot_places(out / "figure3.png", _curves(tables, results))
    logger.info("\n%s\n%s", text, out / "tables.md")


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one row: each column, and pairs by their place in prompts of four; all in per cent."""

    columns: Mapping[str, Mean]
    places: Sequence[Mean]

    @classmethod
    def read(cls, out: epath.Path, row: Row, seeds: int) -> "Result":
        scores = [json.loads((Run(row, seed).workdir(out) / SCORES_FILE).read_text()) for seed in range(seeds)]

        def mean(group: str, what: str) -> Mean:
            cells = [of_seed[group][what] for of_seed in scores]
            return Mean(tuple(100 * cell["correct"] / cell["total"] for cell in cells))

        columns = {name: mean(*where) for name, where in COLUMNS.items()}
        return cls(columns, [mean(named_at(FOUR, place), "pair") for place in PLACES])

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: list(mean.values) for name, mean in self.columns.items()},
            "pairs by place in prompts of four": [list(mean.values) for mean in self.places],
        }


def _markdown(name: str, table: Mapping[str, TableRow], results: Mapping[Row, Result]) -> str:
    lines = [f"### Table {name}", "", f"| row | {' | '.join(COLUMNS)} | paper: T2I-CompBench | DPG-Bench |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for entry in table.values():
        cells = [str(results[entry.row].columns[column]) for column in COLUMNS]
        lines.append(f"| {entry.label} | {' | '.join(cells)} | {entry.paper[0]:.2f} | {entry.paper[1]:.2f} |")
    lines += [
        "",
        "| the paper's ordering | its difference | pairs here | scenes here | appears |",
        "|---|---|---|---|---|",
    ]
    for worse, better in orderings(table):
        of_worse, of_better = results[worse.row].columns, results[better.row].columns
        pairs, scenes = (of_better[column] - of_worse[column] for column in ("pairs", "scenes"))
        paper = better.paper.t2i_compbench - worse.paper.t2i_compbench
        cells = (f"{better.label} over {worse.label}", f"{paper:+.2f}", _signed(pairs), _signed(scenes), verdict(pairs))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def orderings(table: Mapping[str, TableRow]) -> list[tuple[TableRow, TableRow]]:
    """All pairs of rows as (worse, better) by the paper's T2I-CompBench, from the table's top to its end."""
    pairs = itertools.combinations(table.values(), 2)
    return [(a, b) if a.paper < b.paper else (b, a) for a, b in pairs]


def verdict(difference: Mean) -> str:
    """Whether a difference that the paper has as positive is so here: outside of the interval, or not to be told."""
    if math.isnan(difference.half_width) or abs(difference.value) <= difference.half_width:
        return "not to be told"
    return "yes" if difference.value > 0 else "**reversed**"


def _signed(mean: Mean) -> str:
    return ("+" if mean.value >= 0 else "") + str(mean)


def _curves(tables: Mapping[str, Mapping[str, TableRow]], results: Mapping[Row, Result]) -> dict[str, Sequence[Mean]]:
    """By label, of every row once; the names of Table 3 first, as they say which LLM it is."""
    labels: dict[Row, str] = {}
    for name in sorted(tables, key=lambda name: (name not in ("3", FIGURE_3), name)):
        for entry in tables[name].values():
            labels.setdefault(entry.row, entry.label)
    return {label: results[row].places for row, label in labels.items()}


def _places_markdown(curves: Mapping[str, Sequence[Mean]]) -> str:
    lines = [
        "### Figure 3",
        "",
        "Pairs right of prompts of four objects, by the place at which the prompt names them:",
        "",
    ]
    lines += ["| row | 1st | 2nd | 3rd | 4th | 4th less 1st |", "|---|---|---|---|---|---|"]
    for label, places in curves.items():
        cells = " | ".join(map(str, places))
        lines.append(f"| {label} | {cells} | {_signed(places[-1] - places[0])} |")
    return "\n".join([*lines, ""])


def _plot_table(file: epath.Path, name: str, table: Mapping[str, TableRow], results: Mapping[Row, Result]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 1.4 + 0.5 * len(table)), sharey=True, layout="constrained")
    labels = [entry.label for entry in table.values()]
    at = np.arange(len(table))[::-1]
    ours = [("pairs", "#2a6fb0"), ("scenes", "#9cc3e6")]
    theirs = [("T2I-CompBench", "#c05a1c"), ("DPG-Bench", "#f0b98d")]
    for i, (column, color) in enumerate(ours):
        means = [results[entry.row].columns[column] for entry in table.values()]
        errors = [0 if math.isnan(mean.half_width) else mean.half_width for mean in means]
        values = [mean.value for mean in means]
        axes[0].barh(at + 0.2 - 0.4 * i, values, 0.38, xerr=errors, color=color, label=f"{column} right", capsize=2)
    for i, (column, color) in enumerate(theirs):
        values = [entry.paper[i] for entry in table.values()]
        axes[1].barh(at + 0.2 - 0.4 * i, values, 0.38, color=color, label=column)
    axes[0].set_yticks(at, labels)
    axes[0].set_title("built-in scenes, here")
    axes[1].set_title("the paper")
    for axis in axes:
        axis.set_xlim(0, 100)
        axis.set_xlabel("per cent")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.55 if len(table) < 6 else -0.4), ncols=2, frameon=False)
    figure.suptitle(f"Table {name}")
    _save(figure, file)


def _plot_places(file: epath.Path, curves: Mapping[str, Sequence[Mean]]) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    colors = plt.get_cmap("tab10")
    shift = np.linspace(-0.06, 0.06, len(curves))  # or the bars of the intervals hide one another
    for i, (label, places) in enumerate(curves.items()):
        errors = [0 if math.isnan(mean.half_width) else mean.half_width for mean in places]
        values = [mean.value for mean in places]
        style = "--" if label.startswith(T5.upper()) else "-"
        axis.errorbar(
            np.array(PLACES) + 1 + shift[i],
            values,
            errors,
            label=label,
            color=colors(i % 10),
            ls=style,
            marker="o",
            capsize=3,
        )
    axis.set_xticks([place + 1 for place in PLACES], ["1st", "2nd", "3rd", "4th"])
    axis.set_xlabel("place of the pair in prompts of four objects")
    axis.set_ylabel("pairs right, per cent")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, file)


def _save(figure: Any, file: epath.Path) -> None:
    import matplotlib.pyplot as plt

    beside = file.with_name(f".{file.name}")
    with beside.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=150)
    beside.replace(file)
    plt.close(figure)
