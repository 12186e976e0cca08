"""Scores adjective-noun pairs by their place in the prompt (paper, appendix A.3 and Figure 3).

As in T2I-CompBench, BLIP-VQA is asked about each pair ("a red car?") in each image. The probabilities of "yes" are
averaged within each prompt's segment first, over its images, then over prompts. A model whose text encoder does not
favour the start of the prompt has a flat curve.
"""

import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from lidit_jax.errors import UserError, cannot_write
from lidit_jax.evaluate.positional_bias import METADATA_FILE, SAMPLES, Pair, read_pairs
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.files import is_hidden, write_bytes
from lidit_jax.score.eval_extra import png_of
from lidit_jax.score.quarters import QUARTER_NAMES, QUARTERS, interval_by_quarter, mean_by_quarter, mean_over_prompts
from lidit_jax.score.report import Report
from lidit_jax.score.results import ScoreRequest, open_results, require_images_folder
from lidit_jax.score.vqa import load_blip

logger = logging.getLogger(__name__)

CURVE_FILE = "positional_bias.png"
ALL_PAIRS = "all pairs"
_COLOR, _TEXT, _GRID = "#c8442f", "#555555", "#e9ebee"


@dataclasses.dataclass(frozen=True)
class ScoredPair:
    """A pair in an image.

    Attributes:
      score: from 0 to 1.
      position: index in its prompt, from 0.
      count: number of pairs in its prompt.
      kind: color, shape or texture.
      prompt: number of its prompt.
    """

    score: float
    position: int
    count: int
    kind: str
    prompt: int


def score(request: ScoreRequest) -> Report:
    """Returns each quarter's mean and the mean of all pairs, per cent; plots the curve into `request.out`.

    Raises:
      UserError: there are no such images or model, or `request.out` has results of something else.
    """
    pairs = _find_prompts(require_images_folder(request))
    prompt_of = {f"{name}/{SAMPLES}/{file}": name for name in pairs for file in _samples(request.images / name)}
    if not prompt_of:
        raise UserError(
            f"--images={request.images} has no {next(iter(pairs))}/{SAMPLES}/0000.png: generate the images again"
        )
    model = load_blip(request.require("vqa"))

    def ask(name: str) -> list[float]:
        questions = [f"{pair.phrase}?" for pair in pairs[prompt_of[name]]]
        return model.yes_probabilities(read_image(request.images / name), questions)

    with open_results(request, [request.images / name for name in prompt_of], ("vqa",)) as results:
        scored = results.complete(list(prompt_of), ask)
    scores = [
        ScoredPair(value, position, len(values), pairs[prompt_of[name]][position].kind, int(prompt_of[name]))
        for name, values in scored.items()
        for position, value in enumerate(values)
    ]
    report = summary(scores)
    curve = chart([report.columns[name] for name in QUARTER_NAMES], report.details["intervals"])
    try:
        write_bytes(request.out / CURVE_FILE, curve)
    except OSError as error:
        raise cannot_write(f"--out={request.out}", error) from error
    return report


def summary(scores: Sequence[ScoredPair]) -> Report:
    """Returns the quarters' means, per cent, with 95 % intervals; by number of pairs and by kind in the details.

    Every mean is taken within a prompt first, then over prompts; `counts` are numbers of prompts.

    Args:
      scores: of all images, at least one.
    """
    values, prompts = [pair.score for pair in scores], [pair.prompt for pair in scores]
    places = [pair.position for pair in scores], [pair.count for pair in scores]
    means = 100 * mean_by_quarter(values, *places, prompts)
    intervals = 100 * interval_by_quarter(values, *places, prompts)
    columns = dict(zip(QUARTER_NAMES, map(float, means), strict=True))
    return Report(
        benchmark="positional_bias",
        columns=columns | {ALL_PAIRS: 100 * mean_over_prompts(values, prompts)},
        counts=dict.fromkeys((*QUARTER_NAMES, ALL_PAIRS), len(set(prompts))),
        details={
            "intervals": intervals.tolist(),
            "by_number_of_pairs": _means_by(scores, "count"),
            "by_kind": _means_by(scores, "kind"),
            "prompts": len(set(prompts)),
        },
    )


def chart(means: Sequence[float], intervals: Sequence[Sequence[float]]) -> bytes:
    """Plots the curve; returns the bytes of a PNG file.

    Args:
      means: of each quarter, per cent, [4].
      intervals: bounds for each quarter, per cent, [4, 2].
    """
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
    axes.set_xticks(at, QUARTER_NAMES, fontsize=10.5)
    axes.set_xlabel("place of the pair in the prompt", color=_TEXT, labelpad=6)
    axes.set_xlim(-0.25, QUARTERS - 0.75)
    # At least ten points high, so that a flat curve looks flat.
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


def _means_by(scores: Sequence[ScoredPair], attribute: str) -> Mapping[str, float]:
    groups = collections.defaultdict(list)
    for pair in scores:
        groups[getattr(pair, attribute)].append(pair)
    return {
        str(key): 100 * mean_over_prompts([pair.score for pair in group], [pair.prompt for pair in group])
        for key, group in sorted(groups.items())
    }


def _find_prompts(folder: epath.Path) -> dict[str, list[Pair]]:
    """Returns prompt's folder name -> pairs.

    Raises:
      UserError: no folder is of this benchmark.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name.isascii() and path.name.isdigit())
    names = [name for name in names if (folder / name / METADATA_FILE).exists()]
    if not names:
        raise UserError(
            f"--images={folder} has no 00000/{METADATA_FILE}: name a folder that python -m lidit_jax.evaluate "
            "--benchmark=positional_bias wrote"
        )
    return {name: read_pairs(folder / name / METADATA_FILE) for name in names}


def _samples(folder: epath.Path) -> list[str]:
    samples = folder / SAMPLES
    names = [file.name for file in samples.glob("*.png")] if samples.is_dir() else []
    return sorted(name for name in names if not is_hidden(name))
