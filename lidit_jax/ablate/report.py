"""Compares the ablations' results with the paper's: tables with intervals over seeds, orderings, and plots.

Rows of ours stand in the same tables, marked "ours" where the others have the paper's scores.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import stats

from lidit_jax.ablate.rows import BASE_LLAMA, BASE_QWEN, LLAMA, OURS, QWEN, T5, TABLES, Row, TableRow
from lidit_jax.ablate.runs import Run
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import COUNTS, SCORES_FILE, named_at
from lidit_jax.files import read_json, write_bytes, write_json
from lidit_jax.score.eval_extra import png_of
from lidit_jax.score.quarters import QUARTER_NAMES, QUARTERS

logger = logging.getLogger(__name__)

FIGURE_3 = "figure3"
CHOICES = (*TABLES, FIGURE_3)
# "tuned" stands for the paper's multi-modal LLMs; these are tuned on instructions, but on text without images.
ENCODERS = {LLAMA: "tuned LLaMA", BASE_LLAMA: "base LLaMA", QWEN: "tuned Qwen", BASE_QWEN: "base Qwen", T5: "T5"}
# Column -> (group of prompts, measure), see `evaluate/scenes.py`.
COLUMNS = {
    "pairs": ("all scenes", "pair"),
    "objects": ("all scenes", "objects"),
    "scenes": ("all scenes", "scenes"),
    "held-out": ("the held-out pair itself", "pair"),
}
FOUR = COUNTS[4]
PLACES = range(QUARTERS)
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean over seeds with Student's 95 % interval; for a single seed the half width is NaN."""

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

    @property
    def p_value(self) -> float:
        """p-value of Student's two-sided t-test that the mean is zero; NaN for a single seed."""
        if len(self.values) < 2:
            return math.nan
        if np.std(self.values) == 0:  # the limit, which the formula divides by zero for
            return 1.0 if self.value == 0 else 0.0
        return float(stats.ttest_1samp(self.values, 0.0).pvalue)

    def __str__(self) -> str:
        return f"{self.value:.1f}" if math.isnan(self.half_width) else f"{self.value:.1f} ± {self.half_width:.1f}"

    def __sub__(self, other: "Mean") -> "Mean":
        """Mean of the differences seed by seed: both rows had the same prompts and the same noise."""
        return Mean(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


def choose(names: Sequence[str]) -> dict[str, Mapping[str, TableRow]]:
    """Returns the tables with these names; Figure 3 has some of Table 3's rows.

    Raises:
      UserError: a name is not one of `CHOICES`.
    """
    found = {}
    for name in names:
        if name not in CHOICES:
            raise UserError(f"--table={name}: choose from {', '.join(CHOICES)}")
        if name == FIGURE_3:
            found[name] = {key: TABLES["3"][key] for key in ("t5", "llama", "llama_token_refiner")}
        else:
            found[name] = TABLES[name]
    return found


def complete_seeds(out: epath.Path, tables: Mapping[str, Mapping[str, TableRow]], seeds: int) -> int:
    """Returns for how many seeds, of at most `seeds`, all runs of the tables are done."""
    rows = dict.fromkeys(entry.row for table in tables.values() for entry in table.values())
    found = itertools.takewhile(lambda seed: all(Run(row, seed).is_done(out) for row in rows), range(seeds))
    return sum(1 for _ in found)


def complete(out: epath.Path, seeds: int) -> list[str]:
    """Returns the names of the tables all of whose runs are done, in this call of the command or an earlier one."""
    return [name for name, table in choose(CHOICES).items() if complete_seeds(out, {name: table}, seeds) == seeds]


def write(out: epath.Path, tables: Mapping[str, Mapping[str, TableRow]], seeds: int) -> None:
    """Writes tables.md, tables.json and a plot for each table; all their runs must be done.

    Raises:
      UserError: a run's scores are damaged.
    """
    rows = dict.fromkeys(entry.row for table in tables.values() for entry in table.values())
    results = {row: Result.read(out, row, seeds) for row in rows}
    text = "\n".join(_markdown(name, table, results) for name, table in tables.items() if name != FIGURE_3)
    text += (
        "\n± is Student's 95 % interval over seeds, each with language models, a VAE and a training of its own; all "
        "runs generate the same prompts. An ordering appears if the paired t-test over seeds gives p < 0.05 after "
        "Holm's correction for all orderings of its table; with the opposite sign it is reversed. A tuned LM, which "
        "stands for the paper's multi-modal LLM, was tuned on instructions in text; it saw no image.\n\n"
    )
    labels = {row: describe(row) for row in rows}
    text += _places_markdown(labels, results)
    values = {row.name: result.to_json() for row, result in results.items()}
    write_json(out / "tables.json", {"seeds": seeds, "unit": "per cent", "rows": values})
    write_bytes(out / "tables.md", text.encode())
    for name, table in tables.items():
        if name != FIGURE_3:
            _plot_table(out / f"{OURS if name == OURS else f'table{name}'}.png", name, table, results)
    _plot_places(out / "figure3.png", labels, results)
    logger.info("\n%s\n%s", text, out / "tables.md")


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of one row, all in per cent.

    Attributes:
      columns: see `COLUMNS`.
      places: correct pairs in each quarter of the prompts with four objects, see `QUARTER_NAMES`.
    """

    columns: Mapping[str, Mean]
    places: Sequence[Mean]

    @classmethod
    def read(cls, out: epath.Path, row: Row, seeds: int) -> "Result":
        """Reads the scores of a row's runs.

        Raises:
          UserError: a run's scores are missing or damaged.
        """
        files = [Run(row, seed).workdir(out) / SCORES_FILE for seed in range(seeds)]
        scores = {file: _read_scores(file) for file in files}

        def mean(group: str, measure: str) -> Mean:
            return Mean(tuple(_percent(file, file_scores, group, measure) for file, file_scores in scores.items()))

        columns = {name: mean(*group_and_measure) for name, group_and_measure in COLUMNS.items()}
        return cls(columns, [mean(named_at(FOUR, place), "pair") for place in PLACES])

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: list(mean.values) for name, mean in self.columns.items()},
            "pairs by place in prompts of four": [list(mean.values) for mean in self.places],
        }


def _read_scores(file: epath.Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}): remove it to evaluate its run again") from None


def _percent(file: epath.Path, scores: Any, group: str, measure: str) -> float:
    try:
        cell = scores[group][measure]
        return 100 * float(cell["correct"]) / float(cell["total"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise UserError(f"{file} has no {measure!r} of {group!r}: remove it to evaluate its run again") from None


def _markdown(name: str, table: Mapping[str, TableRow], results: Mapping[Row, Result]) -> str:
    lines = [
        f"### {_title(name)}",
        "",
        f"| row | encoder here | {' | '.join(COLUMNS)} | pairs, seed by seed | paper: T2I-CompBench | DPG-Bench |",
    ]
    lines.append("|---" * (len(COLUMNS) + 5) + "|")
    for entry in table.values():
        cells = [str(results[entry.row].columns[column]) for column in COLUMNS]
        cells.append(", ".join(f"{value:.1f}" for value in results[entry.row].columns["pairs"].values))
        cells = [entry.label, _encoders(entry.row), *cells, *_paper_cells(entry)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| the paper's ordering | its difference | pairs here | seeds | scenes here | p (Holm) | appears |"]
    lines.append("|---" * 7 + "|")
    compared = [(worse, better, *_differences(better, worse, results)) for worse, better in orderings(table)]
    p_values = holm([pairs.p_value for _, _, pairs, *_ in compared])
    for (worse, better, pairs, *cells), p_value in zip(compared, p_values, strict=True):
        paper = better.paper.t2i_compbench - worse.paper.t2i_compbench
        cells = [f"{better.label} over {worse.label}", f"{paper:+.2f}", *cells, _p_text(p_value)]
        lines.append(f"| {' | '.join(cells)} | {verdict(pairs, p_value)} |")
    if ours := [entry for entry in table.values() if entry.paper is None]:
        lines += ["", "| ours, compared with | pairs here | seeds | scenes here |", "|---|---|---|---|"]
        for entry in ours:
            other = table[entry.compared_with]
            _, *cells = _differences(entry, other, results)
            lines.append(f"| {' | '.join((f'{entry.label}, {other.label}', *cells))} |")
    return "\n".join([*lines, ""])


def _title(name: str) -> str:
    return "Ours" if name == OURS else f"Table {name}"


def _paper_cells(entry: TableRow) -> Sequence[str]:
    return ("ours", "ours") if entry.paper is None else [f"{score:.2f}" for score in entry.paper]


def _differences(a: TableRow, b: TableRow, results: Mapping[Row, Result]) -> tuple[Mean, str, str, str]:
    """Returns how much more pairs `a` has right than `b`; and as texts that, in how many seeds, and for scenes."""
    pairs, scenes = (results[a.row].columns[column] - results[b.row].columns[column] for column in ("pairs", "scenes"))
    seeds = f"{sum(value > 0 for value in pairs.values)} of {len(pairs.values)}"
    return pairs, _signed(pairs), seeds, _signed(scenes)


def orderings(table: Mapping[str, TableRow]) -> list[tuple[TableRow, TableRow]]:
    """Returns all pairs of the paper's rows as (worse, better) by its T2I-CompBench, in the table's order."""
    pairs = itertools.combinations((entry for entry in table.values() if entry.paper is not None), 2)
    return [(a, b) if a.paper < b.paper else (b, a) for a, b in pairs]


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Corrects p-values for their number by the step-down method of Holm (1979); all are NaN for a single seed.

    The chance that any true null hypothesis has a corrected value below a level is at most that level, however the
    tests depend on one another.
    """
    values = np.asarray(p_values, np.float64)
    order, corrected = np.argsort(values), np.empty_like(values)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return corrected


def verdict(difference: Mean, p_value: float) -> str:
    """Returns "yes" or "**reversed**" for a difference that is positive in the paper and significant here.

    Args:
      difference: over seeds.
      p_value: of the difference, corrected for the other orderings; NaN for a single seed.
    """
    if math.isnan(p_value) or p_value >= 1 - CONFIDENCE:
        return "inconclusive"
    return "yes" if difference.value > 0 else "**reversed**"


def _p_text(p_value: float) -> str:
    if math.isnan(p_value):
        return "–"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _signed(mean: Mean) -> str:
    return ("+" if mean.value >= 0 else "") + str(mean)


def _encoders(row: Row) -> str:
    return " and ".join(ENCODERS[name] for name in row.encoders)


def describe(row: Row) -> str:
    """Names a row outside of its table: "base LLaMA + causal refiner"."""
    words = [_encoders(row)] + ["instruction"] * row.instruction
    if row.refiner_blocks:
        kind = "causal refiner" if row.refiner_causal else "refiner"
        size = "" if row.refiner_blocks == 2 else f" of {row.refiner_blocks} block{'s' * (row.refiner_blocks > 1)}"
        words.append(f"{kind}{size}{'' if row.refiner_gated else ' without gate'}")
    if len(row.encoders) > 1:
        words.append("collaborative refiner" if row.fusion == "collaborative" else "concatenation")
    words += [f"{name}={value}" for name, value in row.changes]
    return " + ".join(words)


def _places_markdown(labels: Mapping[Row, str], results: Mapping[Row, Result]) -> str:
    lines = [
        "### Figure 3",
        "",
        "Pairs right in prompts of four objects, by their quarter of the prompt:",
        "",
    ]
    lines += [f"| row | {' | '.join(QUARTER_NAMES)} | last − first |", "|---|---|---|---|---|---|"]
    for row, label in labels.items():
        places = results[row].places
        lines.append(f"| {label} | {' | '.join(map(str, places))} | {_signed(places[-1] - places[0])} |")
    return "\n".join([*lines, ""])


def _plot_table(file: epath.Path, name: str, table: Mapping[str, TableRow], results: Mapping[Row, Result]) -> None:
    """Plots means as bars and seeds as points, which show as much as an interval would with three seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8 + 0.55 * len(table)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    at = np.arange(len(table))[::-1]
    ours = [("pairs", "#2a6fb0"), ("scenes", "#9cc3e6")]
    theirs = [("T2I-CompBench", "#c05a1c"), ("DPG-Bench", "#f0b98d")]
    for i, (column, color) in enumerate(ours):
        means = [results[entry.row].columns[column] for entry in table.values()]
        bars = at + 0.2 - 0.4 * i
        axes[0].barh(bars, [mean.value for mean in means], 0.38, color=color, label=f"{column} right")
        for bar, mean in zip(bars, means, strict=True):
            axes[0].plot(mean.values, [bar] * len(mean.values), "o", ms=3.5, mfc="white", mec="black", mew=0.8)
    for i, (column, color) in enumerate(theirs):
        scores = [entry.paper[i] if entry.paper else 0.0 for entry in table.values()]
        axes[1].barh(at + 0.2 - 0.4 * i, scores, 0.38, color=color, label=column)
    for place, entry in zip(at, table.values(), strict=True):
        if entry.paper is None:
            axes[1].text(1, place, "ours: no score of the paper", va="center")
    axes[0].set_yticks(at, [entry.label for entry in table.values()])
    axes[0].set_title("built-in scenes, here (points: seeds)")
    axes[1].set_title("the paper")
    for axis in axes:
        axis.set_xlim(0, 102)
        axis.set_xlabel("per cent")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(name))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, file)


def _plot_places(file: epath.Path, labels: Mapping[Row, str], results: Mapping[Row, Result]) -> None:
    """Plots means as thick lines and seeds as thin lines; rows with a token refiner have their own panel."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = {
        "features as they are": [row for row in labels if not row.refiner_blocks],
        "with a token refiner": [row for row in labels if row.refiner_blocks],
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    figure = Figure(figsize=(1 + 5 * len(panels), 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    colors, at = colormaps["tab10"], [place + 1 for place in PLACES]
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for i, row in enumerate(rows):
            places = results[row].places
            style = "--" if T5 in row.encoders else "-"
            for seed_values in zip(*(mean.values for mean in places), strict=True):
                axis.plot(at, seed_values, style, color=colors(i), lw=0.8, alpha=0.45)
            axis.plot(
                at, [mean.value for mean in places], style, color=colors(i), lw=2.2, marker="o", label=labels[row]
            )
        axis.set_title(title)
        axis.set_xticks(at, QUARTER_NAMES)
        axis.set_xlabel("place of the pair in prompts of four objects")
        axis.set_ylim(0, 102)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    axes[0][0].set_ylabel("pairs right, per cent")
    figure.suptitle("Figure 3 (thin lines: seeds)")
    _save(figure, file)


def _save(figure: Any, file: epath.Path) -> None:
    write_bytes(file, png_of(figure))
