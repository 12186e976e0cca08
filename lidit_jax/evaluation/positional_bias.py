"""Are pairs of an adjective and a noun drawn worse the later they stand in a prompt? (paper, appendix A.3 and Figure 3)

BLIP-VQA is asked of each pair ("a red car?") as T2I-CompBench does; the mean of its "yes" is taken by quarters of the
prompt. A model whose text encoder does not favour a prompt's start has a level curve.
"""

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluation.adjective_pairs import METADATA_FILE, SAMPLES, read_pairs
from lidit_jax.evaluation.eval_extra import png_of
from lidit_jax.evaluation.quarters import QUARTERS, interval_by_quarter, mean_by_quarter
from lidit_jax.evaluation.report import Report
from lidit_jax.evaluation.scoring import ScoreRequest, open_results, read_picture, require_pictures_folder
from lidit_jax.evaluation.vqa import load_blip

logger = logging.getLogger(__name__)

CURVE_FILE = "positional_bias.png"
COLUMNS = ("first quarter", "second quarter", "third quarter", "last quarter")
_COLOR, _TEXT, _GRID = "#c8442f", "#555555", "#e9ebee"


@dataclasses.dataclass(frozen=True)
class Part:
    """A pair in a picture: its score from 0 to 1, its place, and its prompt's number."""

    score: float
    position: int
    count: int
    kind: str
    prompt: int


def score(request: ScoreRequest) -> Report:
    """In per cent, each quarter's mean, and that of all pairs; draws the curve into `request.out`.

    Raises:
      UserError: no such pictures or model, or `request.out` has results of something else.
    """
    pairs = _find_prompts(require_pictures_folder(request))
    prompt_of = {f"{name}/{SAMPLES}/{file}": name for name in pairs for file in _samples(request.pictures / name)}
    if not prompt_of:
        raise UserError(f"--pictures={request.pictures} has no {next(iter(pairs))}/{SAMPLES}/0000.png: draw it again")
    model = load_blip(request.require("vqa"))

    def ask(name: str) -> list[float]:
        questions = [f"{pair['phrase']}?" for pair in pairs[prompt_of[name]]]
        return model.yes_probabilities(read_picture(request.pictures / name), questions)

    with open_results(request, [request.pictures / name for name in prompt_of], ("vqa",)) as results:
        scored = results.complete(list(prompt_of), ask)
    parts = [
        Part(value, position, len(values), pairs[prompt_of[name]][position]["kind"], int(prompt_of[name]))
        for name, values in scored.items()
        for position, value in enumerate(values)
    ]
    report = summary(parts)
    curve = chart([report.columns[name] for name in COLUMNS], report.details["intervals"])
    try:
        (request.out / CURVE_FILE).write_bytes(curve)
    except OSError as error:
        raise UserError(f"--out={request.out} can't be written ({error.strerror or error}); name another") from error
    return report


def summary(parts: Sequence[Part]) -> Report:
    """Quarters' means, per cent, with their 95 % intervals; by number of pairs and by kind in the details.

    Args: parts: of all pictures, at least one.
    """
    places = [part.score for part in parts], [part.position for part in parts], [part.count for part in parts]
    means = 100 * mean_by_quarter(*places)
    intervals = 100 * interval_by_quarter(*places, [part.prompt for part in parts])
    everything = 100 * float(np.mean(places[0]))
    return Report(
        benchmark="positional_bias",
        columns=dict(zip(COLUMNS, map(float, means), strict=True)) | {"all pairs": everything},
        counts={name: len(parts) for name in (*COLUMNS, "all pairs")},
        details={
            "intervals": intervals.tolist(),
            "by_number_of_pairs": _means_by(parts, "count"),
            "by_kind": _means_by(parts, "kind"),
            "prompts": len({part.prompt for part in parts}),
        },
    )


def chart(means: Sequence[float], intervals: Sequence[Sequence[float]]) -> bytes:
    """A PNG of the curve. Args: means, intervals: of each quarter, per cent: [4], [4, 2]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)
    axes = figure.add_subplot()
    at, (low, high) = range(QUARTERS), np.asarray(intervals, np.float64).T
    axes.fill_between(at, low, high, color=_COLOR, alpha=0.14, linewidth=0, zorder=2)
    axes.plot(at, means, color=_COLOR, linewidth=2.2, marker="o", markersize=6, zorder=3)
    for x, mean, top in zip(at, means, high, strict=True):
        axes.annotate(f"{mean:.1f}", (x, top), (0, 5), textcoords="offset points", ha="center", color=_COLOR,
                      fontsize=10, fontweight="bold", zorder=4)  # fmt: skip
    axes.set_xticks(at, ["first", "second", "third", "last"], fontsize=10.5)
    axes.set_xlabel("quarter of the prompt", color=_TEXT, labelpad=6)
    axes.set_xlim(-0.25, QUARTERS - 0.75)
    # At least ten points high, so that a level curve looks level.
    middle, half = (min(low) + max(high)) / 2, max(5.0, 0.75 * (max(high) - min(low)))
    axes.set_ylim(max(0, middle - half), min(103, middle + half))
    axes.tick_params(axis="both", length=0, colors=_TEXT)
    axes.grid(axis="y", color=_GRID, zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b8bec6")
    axes.set_title("Positional bias", loc="left", fontsize=14, fontweight="bold", pad=26)
    axes.text(0, 1.03, "BLIP-VQA score of adjective-noun pairs (%), 95 % intervals", transform=axes.transAxes,
              color=_TEXT, fontsize=9.5)  # fmt: skip
    return png_of(figure)


def _means_by(parts: Sequence[Part], attribute: str) -> Mapping[str, float]:
    values = collections.defaultdict(list)
    for part in parts:
        values[getattr(part, attribute)].append(part.score)
    return {str(key): 100 * float(np.mean(values[key])) for key in sorted(values)}


def _find_prompts(folder: epath.Path) -> dict[str, list[dict[str, Any]]]:
    """Each prompt's folder, by number, and its pairs. Raises UserError if there is none of this benchmark."""
    names = sorted(path.name for path in folder.iterdir() if path.name.isascii() and path.name.isdigit())
    names = [name for name in names if (folder / name / METADATA_FILE).exists()]
    if not names:
        raise UserError(
            f"--pictures={folder} has no 00000/{METADATA_FILE}: is it the positional-bias benchmark, as "
            "python -m lidit_jax.evaluate --benchmark=positional_bias draws it?"
        )
    return {name: read_pairs(folder / name / METADATA_FILE) for name in names}


def _samples(folder: epath.Path) -> list[str]:
    samples = folder / SAMPLES
    return sorted(file.name for file in samples.glob("*.png")) if samples.is_dir() else []
