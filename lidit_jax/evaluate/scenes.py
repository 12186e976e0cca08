"""Evaluates prompt following on the built-in scenes: generates images and checks every object exactly."""

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from etils import epath

from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.shapes.captions import states_sizes
from lidit_jax.data.shapes.checker import check
from lidit_jax.data.shapes.layout import SceneLayout
from lidit_jax.data.shapes.scene import HELD_OUT_PAIRS, Scene
from lidit_jax.data.shapes.scores import Accuracy, SceneCheck, accuracies, object_accuracies
from lidit_jax.data.shapes.source import HELD_OUT_SEED, ShapesSource
from lidit_jax.errors import UserError
from lidit_jax.files import write_json
from lidit_jax.images import grid, save_png
from lidit_jax.pipeline import Pipeline, SampleConfig
from lidit_jax.ranges import between, check_ranges

logger = logging.getLogger(__name__)

GRID_IMAGES = 24
SCORES_FILE = "scores.json"
COUNTS = {1: "one object", 2: "two objects", 3: "three objects", 4: "four objects", 5: "five objects", 6: "six objects"}
HELD_OUT = "a held-out pair"
OVERLAP = "overlapping objects"
LANGUAGES = {"en": "English", "zh": "Chinese"}
_Prompts = Annotated[int, between(0, 1_000_000)]
COLUMNS = ("objects", "pair", "color", "shape", "relation", "depth", "place", "size", "scenes")


@dataclasses.dataclass(frozen=True)
class SceneEvaluation:
    """Number of prompts of each kind; the config section `evaluate`.

    Attributes:
      two_objects: scenes of two objects, without overlap; the same for the other numbers of objects.
      held_out_pairs: scenes of two objects, one of them with a (colour, shape) pair that never occurs in training.
      three_objects: see `two_objects`.
      four_objects: see `two_objects`.
      one_object: see `two_objects`.
      five_objects: see `two_objects`; layout "free" only.
      six_objects: see `two_objects`; layout "free" only.
      overlapping_objects: scenes in which two objects overlap, with as many objects as in training; layout "free" only.
    """

    two_objects: _Prompts = 256
    held_out_pairs: _Prompts = 128
    three_objects: _Prompts = 128
    four_objects: _Prompts = 128
    one_object: _Prompts = 0
    five_objects: _Prompts = 0
    six_objects: _Prompts = 0
    overlapping_objects: _Prompts = 0

    def __post_init__(self):
        check_ranges(self, "evaluate.")

    @classmethod
    def of_each(cls, count: int, layout: SceneLayout) -> "SceneEvaluation":
        """Returns `count` prompts of held-out pairs and of each kind that occurs in training with this layout."""
        if layout.name == "quadrants":
            return cls(count, count, count, count)
        counts = [count if share else 0 for share in layout.probabilities] + [0] * len(COUNTS)
        one, two, three, four, five, six = counts[: len(COUNTS)]
        return cls(two, count, three, four, one, five, six, count if layout.overlaps else 0)

    def prompts(self, layout: SceneLayout, height: int, width: int) -> list["ScenePrompt"]:
        """Builds all prompts, kind by kind.

        Args:
          layout: layout of the scenes, as in training.
          height: height of the images in pixels.
          width: width of the images in pixels.

        Raises:
          UserError: such scenes do not exist in this layout or at this size of images.
        """
        kinds = {
            COUNTS[1]: (self.one_object, 1),
            COUNTS[2]: (self.two_objects, 2),
            HELD_OUT: (self.held_out_pairs, 2),
            COUNTS[3]: (self.three_objects, 3),
            COUNTS[4]: (self.four_objects, 4),
            COUNTS[5]: (self.five_objects, 5),
            COUNTS[6]: (self.six_objects, 6),
            OVERLAP: (self.overlapping_objects, None),
        }
        return [
            prompt
            for kind, (count, num_objects) in kinds.items()
            for prompt in scene_prompts(count, num_objects, kind, layout, height, width)
        ]


@dataclasses.dataclass(frozen=True)
class ScenePrompt:
    """Prompt with its known scene.

    Attributes:
      prompt: the caption of the scene.
      language: "en" or "zh".
      scene: the scene that images should show.
      kind: one of the values of `COUNTS`, `HELD_OUT` or `OVERLAP`.
      sizes_asked: whether sizes are checked. In layout "free", they are only if the prompt states them.
    """

    prompt: str
    language: str
    scene: Scene
    kind: str
    sizes_asked: bool = True


def scene_prompts(
    count: int, num_objects: int | None, kind: str, layout: SceneLayout, height: int, width: int
) -> list[ScenePrompt]:
    """Builds prompts of scenes that no training run has seen, alternating between English and Chinese.

    Args:
      count: number of prompts.
      num_objects: number of objects in each scene; None samples it as in training, but at least two.
      kind: with `HELD_OUT`, one object of each scene has a (colour, shape) pair that never occurs in training. With
        `OVERLAP`, two objects overlap; with any other kind, none do.
      layout: see `SceneEvaluation.prompts`.
      height: see `SceneEvaluation.prompts`.
      width: see `SceneEvaluation.prompts`.

    Raises:
      UserError: such scenes do not exist in this layout or at this size of images.
    """
    if not count:
        return []
    if kind == OVERLAP:
        shares = (0.0, *layout.probabilities[1:])
        if layout.name != "free" or not sum(shares):
            raise UserError(
                "evaluate.overlapping_objects needs data.layout='free' with scenes of two or more objects: set it to 0"
            )
        layout = dataclasses.replace(layout, overlaps=1.0, shares=shares)
    elif layout.overlaps:
        layout = dataclasses.replace(layout, overlaps=0.0)
    pairs = "held_out" if kind == HELD_OUT else "train"
    if num_objects and num_objects > layout.max_objects:
        raise UserError(
            f"evaluate: scenes of {kind} are asked for, but data.layout={layout.name!r} has at most "
            f"{layout.max_objects} objects: remove that field of `evaluate`"
        )
    source = ShapesSource(count, height, width, HELD_OUT_SEED, pairs, num_objects, layout)
    languages = tuple(LANGUAGES)
    prompts = []
    for i, example in enumerate(source.describe(range(count))):
        text = example["captions"][languages[i % 2]]
        sizes_asked = layout.name == "quadrants" or states_sizes(text)
        prompts.append(ScenePrompt(text, languages[i % 2], source.scene(i), kind, sizes_asked))
    return prompts


def check_evaluation(evaluation: SceneEvaluation, config: DataConfig) -> None:
    """Raises UserError if the config sections `evaluate` and `data` do not go together."""
    if not all(source.source == "shapes" for source in config.source_configs().values()):
        raise UserError("evaluate: only scenes of data.source='shapes' can be checked; remove the section `evaluate`")
    if not any(dataclasses.astuple(evaluation)):
        raise UserError("evaluate asks for no prompts: set a field above 0, or give --config.evaluate=None")
    one_each = {name: min(count, 1) for name, count in dataclasses.asdict(evaluation).items()}
    SceneEvaluation(**one_each).prompts(config.scene_layout, config.resolution, config.resolution)


def evaluate_scenes(
    pipeline: Pipeline,
    params: Any,
    sampling: SampleConfig,
    evaluation: SceneEvaluation,
    dataset: Dataset,
    workdir: epath.Path,
    beat: Callable[[], None] = lambda: None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Accuracy]]:
    """Generates images of evaluation scenes, checks them, and writes `scores.json` and `grid.png` to the workdir.

    Args:
      pipeline: the sampling pipeline.
      params: parameters of the model.
      sampling: sampling options.
      evaluation: number of prompts of each kind.
      dataset: the training data set, which gives the layout and the size of the images.
      workdir: folder for the results, written by the first host.
      beat: heartbeat, called after each batch of images.
      provenance: see `report_scenes`.

    Returns:
      See `score_scenes`.

    Raises:
      UserError: the data set is not the built-in one, or has no such scenes.
    """
    check_evaluation(evaluation, dataset.config)
    side, rows = dataset.config.resolution, pipeline.rows(sampling)
    prompts = evaluation.prompts(dataset.config.scene_layout, side, side)
    seen: collections.Counter[str] = collections.Counter()
    seeds = []  # counted separately for each kind, so that its images do not depend on the number of other prompts
    for p in prompts:
        seeds.append(seen[p.kind])
        seen[p.kind] += 1
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), rows):
        batch = slice(start, start + rows)
        images += list(pipeline(params, [p.prompt for p in prompts[batch]], seeds[batch], side, side, sampling))
        beat()
    scores = score_scenes(prompts, images)
    if jax.process_index() == 0:
        report_scenes(scores, prompts, images, workdir, provenance)
    return scores


def score_scenes(prompts: Sequence[ScenePrompt], images: Sequence[np.ndarray]) -> dict[str, dict[str, Accuracy]]:
    """Checks images against their scenes and computes accuracies by group.

    Groups are "all scenes" (without those of held-out pairs), the scenes of a kind ("four objects"), of a kind in a
    language ("four objects, Chinese"), the objects at a position in the prompt ("four objects, named 1st"), and the
    held-out pairs alone ("the held-out pair itself").

    Every prompt must occur with the same number of images. For four objects, the accuracy at a position then equals
    that of `mean_by_quarter`, which averages within each prompt segment first.

    Args:
      prompts: the prompt of each image.
      images: uint8 [H, W, 3] each.

    Returns:
      {group: accuracies}; see `accuracies` for the names of the accuracies.
    """
    checks = [check(image, p.scene, p.sizes_asked) for image, p in zip(images, prompts, strict=True)]
    scenes: dict[str, list[SceneCheck]] = collections.defaultdict(list)
    objects: dict[str, list] = collections.defaultdict(list)
    for p, result in zip(prompts, checks, strict=True):
        scenes[p.kind].append(result)
        if p.kind == HELD_OUT:
            is_held_out = [(item.color, item.shape) in HELD_OUT_PAIRS for item in p.scene.objects]
            objects["the held-out pair itself"] += [
                item for item, held_out in zip(result.objects, is_held_out, strict=True) if held_out
            ]
            continue
        scenes["all scenes"].append(result)
        scenes[f"{p.kind}, {LANGUAGES[p.language]}"].append(result)
        for position, item in enumerate(result.objects):
            objects[named_at(p.kind, position)].append(item)
    found = {group: accuracies(results) for group, results in scenes.items()}
    found |= {group: object_accuracies(items) for group, items in objects.items()}
    order = ["all scenes", *COUNTS.values(), OVERLAP, HELD_OUT]

    def rank(group: str) -> tuple[int, str]:
        kind = group.partition(",")[0]
        return order.index(kind) if kind in order else len(order), group

    return {group: found[group] for group in sorted(found, key=rank)}


def named_at(kind: str, position: int) -> str:
    """Returns the name of the group of objects at a position, from 0, in the prompts of a kind."""
    return f"{kind}, named {('1st', '2nd', '3rd', '4th', '5th', '6th')[position]}"


def report_scenes(
    scores: Mapping[str, Mapping[str, Accuracy]],
    prompts: Sequence[ScenePrompt],
    images: Sequence[np.ndarray],
    folder: epath.Path,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Logs the scores and writes them to `scores.json`; writes some images of each kind to `grid.png`.

    Args:
      scores: see `score_scenes`.
      prompts: the prompt of each image.
      images: uint8 [H, W, 3] each.
      folder: folder for the files.
      provenance: JSON-serialisable: what else `scores.json` states, beside the groups.
    """
    columns = [column for column in COLUMNS if any(column in accuracy for accuracy in scores.values())]
    width = 2 + max(26, *map(len, scores))
    lines = [f"{'accuracy, in %':{width}}" + "".join(f"{column:>10}" for column in columns)]
    for group, accuracy in scores.items():
        found = [accuracy.get(column) for column in columns]
        cells = [f"{100 * cell.value:.1f}" if cell and cell.total else "" for cell in found]
        lines.append(f"{group:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    logger.info("\n%s", "\n".join(lines))

    by_kind: dict[str, list[int]] = collections.defaultdict(list)
    for index, p in enumerate(prompts):
        by_kind[p.kind].append(index)
    shown = [i for indices in by_kind.values() for i in indices[: GRID_IMAGES // len(by_kind)]]
    if shown:
        save_png(grid([images[i] for i in shown], [prompts[i].prompt for i in shown]), folder / "grid.png")
        logger.info("images of unseen prompts: %s", folder / "grid.png")
    table = {
        group: {name: {"correct": a.correct, "total": a.total, "interval": a.interval} for name, a in accuracy.items()}
        for group, accuracy in scores.items()
    }
    write_json(folder / SCORES_FILE, {**table, **(provenance or {})})
