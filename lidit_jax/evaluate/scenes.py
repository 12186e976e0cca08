"""Does the model follow its prompts? On the built-in scenes the answer is exact: draw, then check every object."""

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from lidit_jax.pictures import grid, save_png
from lidit_jax.pipeline import Pipeline, SampleConfig

logger = logging.getLogger(__name__)

GRID_PICTURES = 24
SCORES_FILE = "scores.json"
COUNTS = {1: "one object", 2: "two objects", 3: "three objects", 4: "four objects", 5: "five objects", 6: "six objects"}
HELD_OUT = "a held-out pair"
OVERLAP = "overlapping objects"
LANGUAGES = {"en": "English", "zh": "Chinese"}
COLUMNS = ("objects", "pair", "color", "shape", "relation", "depth", "place", "size", "scenes")


@dataclasses.dataclass(frozen=True)
class SceneEvaluation:
    """Number of prompts of each kind, under `evaluate` in the config.

    Attributes:
      one_object to six_objects: of scenes of so many objects, none overlapping; five and six in layout "free" alone.
      held_out_pairs: of scenes of two objects of which one is a pair of colour and shape that training never shows.
      overlapping_objects: of scenes of layout "free" where two objects overlap, of as many objects as in training.
    """

    two_objects: int = 256
    held_out_pairs: int = 128
    three_objects: int = 128
    four_objects: int = 128
    one_object: int = 0
    five_objects: int = 0
    six_objects: int = 0
    overlapping_objects: int = 0

    def __post_init__(self):
        for field, count in dataclasses.asdict(self).items():
            if count < 0:
                raise UserError(f"evaluate.{field}={count} must not be negative")

    @classmethod
    def of_each(cls, count: int, layout: SceneLayout) -> "SceneEvaluation":
        """Returns as many prompts of each kind that the layout's training has, and of held-out pairs."""
        if layout.name == "quadrants":
            return cls(count, count, count, count)
        counts = [count if share else 0 for share in layout.probabilities] + [0] * len(COUNTS)
        one, two, three, four, five, six = counts[: len(COUNTS)]
        return cls(two, count, three, four, one, five, six, count if layout.overlaps else 0)

    def prompts(self, layout: SceneLayout, height: int, width: int) -> list["ScenePrompt"]:
        """Returns all prompts, kind by kind.

        Args:
          layout: of the scenes, as in training.
          height, width: of the images in pixels.

        Raises:
          UserError: the layout or the size of the images has no such scenes.
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
    """A prompt whose scene is known.

    Attributes:
      kind: one of `COUNTS`' names, `HELD_OUT` or `OVERLAP`.
      sizes_asked: sizes count. In layout "free", only where the prompt states them.
    """

    prompt: str
    language: str
    scene: Scene
    kind: str
    sizes_asked: bool = True


def scene_prompts(
    count: int, num_objects: int | None, kind: str, layout: SceneLayout, height: int, width: int
) -> list[ScenePrompt]:
    """Returns prompts of scenes that no training run has seen, English and Chinese in turn.

    Args:
      num_objects: of each scene; None: as in training, but at least two.
      kind: with `HELD_OUT`, one object of each is a pair of colour and shape that training never shows; with `OVERLAP`,
        two objects overlap, and with any other kind none do.
      layout, height, width: see `SceneEvaluation.prompts`.

    Raises:
      UserError: the layout or the size of the images has no such scenes.
    """
    if not count:
        return []
    if kind == OVERLAP:
        shares = (0.0, *layout.probabilities[1:])
        if layout.name != "free" or not sum(shares):
            raise UserError("evaluate.overlapping_objects: only scenes of two or more of data.layout='free' overlap")
        layout = dataclasses.replace(layout, overlaps=1.0, shares=shares)
    elif layout.overlaps:
        layout = dataclasses.replace(layout, overlaps=0.0)
    pairs = "held_out" if kind == HELD_OUT else "train"
    if num_objects and num_objects > layout.max_objects:
        raise UserError(
            f"evaluate: scenes of {kind} are asked for, and data.layout={layout.name!r} has at most "
            f"{layout.max_objects}: leave them out"
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
    """Raises UserError unless the scenes of a data section can be evaluated like this."""
    if not all(source.source == "shapes" for source in config.source_configs().values()):
        raise UserError("evaluate: only scenes of data.source='shapes' can be checked; remove `evaluate`")
    few = {name: min(count, 1) for name, count in dataclasses.asdict(evaluation).items()}
    SceneEvaluation(**few).prompts(config.scene_layout, config.resolution, config.resolution)


def evaluate_scenes(
    pipeline: Pipeline,
    params: Any,
    how: SampleConfig,
    evaluation: SceneEvaluation,
    dataset: Dataset,
    workdir: epath.Path,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Accuracy]]:
    """Draws, checks, prints; writes `scores.json` and `grid.png` (held-out prompts under their pictures).

    Args: beat: called after each batch of pictures, for who watches that something is done.

    Raises:
      UserError: if the data set is not the built-in one, whose scenes are known, or has no such scenes.
    """
    check_evaluation(evaluation, dataset.config)
    side, rows = dataset.config.resolution, pipeline.rows(how)
    prompts = evaluation.prompts(dataset.config.scene_layout, side, side)
    seen: collections.Counter[str] = collections.Counter()
    seeds = []  # counted anew for each kind, so that the pictures of one do not depend on how many others there are
    for p in prompts:
        seeds.append(seen[p.kind])
        seen[p.kind] += 1
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), rows):
        part = slice(start, start + rows)
        pictures += list(pipeline(params, [p.prompt for p in prompts[part]], seeds[part], side, side, how))
        beat()
    scores = score_scenes(prompts, pictures)
    if jax.process_index() == 0:
        report_scenes(scores, prompts, pictures, workdir)
    return scores


def score_scenes(prompts: Sequence[ScenePrompt], pictures: Sequence[np.ndarray]) -> dict[str, dict[str, Accuracy]]:
    """Checks pictures against their scenes: {group of prompts or objects: what is right of it}.

    Groups are "all scenes" (but for held-out pairs), those of a kind ("four objects"), of a kind in a language
    ("four objects, Chinese"), the objects named at a place in the prompt ("four objects, named 1st"), and of scenes
    with a held-out pair that pair alone ("the held-out pair itself"). What is right is as in `accuracies`.

    All prompts must have the same number of images. Each place of four objects is then the mean of `mean_by_quarter`,
    which is taken within a prompt's segment first.

    Args: pictures: uint8 [H, W, 3] each, one a prompt.
    """
    checks = [check(picture, p.scene, p.sizes_asked) for picture, p in zip(pictures, prompts, strict=True)]
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
        for place, item in enumerate(result.objects):
            objects[named_at(p.kind, place)].append(item)
    found = {group: accuracies(results) for group, results in scenes.items()}
    found |= {group: object_accuracies(items) for group, items in objects.items()}
    order = ["all scenes", *COUNTS.values(), OVERLAP, HELD_OUT]
    rank = lambda group: (order.index(group.partition(",")[0]) if group.partition(",")[0] in order else 99, group)  # noqa: E731
    return {group: found[group] for group in sorted(found, key=rank)}


def named_at(kind: str, place: int) -> str:
    """Names the group of the objects of such scenes that prompts name at this place, from 0."""
    return f"{kind}, named {('1st', '2nd', '3rd', '4th', '5th', '6th')[place]}"


def report_scenes(
    scores: Mapping[str, Mapping[str, Accuracy]],
    prompts: Sequence[ScenePrompt],
    pictures: Sequence[np.ndarray],
    folder: epath.Path,
) -> None:
    """Prints the scores and writes them to `scores.json`; some pictures of each kind to `grid.png`."""
    columns = [column for column in COLUMNS if any(column in accuracy for accuracy in scores.values())]
    width = 2 + max(26, *map(len, scores))
    lines = [f"{'right, in %':{width}}" + "".join(f"{column:>10}" for column in columns)]
    for group, accuracy in scores.items():
        found = [accuracy.get(column) for column in columns]
        cells = [f"{100 * cell.value:.1f}" if cell and cell.total else "" for cell in found]
        lines.append(f"{group:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    logger.info("\n%s", "\n".join(lines))

    by_kind: dict[str, list[int]] = collections.defaultdict(list)
    for index, p in enumerate(prompts):
        by_kind[p.kind].append(index)
    shown = [i for indices in by_kind.values() for i in indices[: GRID_PICTURES // len(by_kind)]]
    if shown:
        save_png(grid([pictures[i] for i in shown], [prompts[i].prompt for i in shown]), folder / "grid.png")
        logger.info("pictures for prompts that training never saw: %s", folder / "grid.png")
    table = {
        group: {name: {"correct": a.correct, "total": a.total, "interval": a.interval} for name, a in accuracy.items()}
        for group, accuracy in scores.items()
    }
    write_json(folder / SCORES_FILE, table)
