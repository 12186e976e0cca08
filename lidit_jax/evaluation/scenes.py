"""Does the model follow its prompts? On the built-in scenes the answer is exact: draw, then check every object."""

import collections
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from lidit_jax.data.dataset import Dataset
from lidit_jax.data.shapes import HELD_OUT_PAIRS, HELD_OUT_SEED, Scene, ShapesSource
from lidit_jax.data.shapes_checker import Accuracy, SceneCheck, accuracies, check, object_accuracies
from lidit_jax.errors import UserError
from lidit_jax.json_file import write_json
from lidit_jax.pictures import grid, save_png
from lidit_jax.pipeline import Pipeline, SampleConfig

logger = logging.getLogger(__name__)

GRID_PICTURES = 24
SCORES_FILE = "scores.json"
COUNTS = {1: "one object", 2: "two objects", 3: "three objects", 4: "four objects"}
HELD_OUT = "a held-out pair"
LANGUAGES = {"en": "English", "zh": "Chinese"}
COLUMNS = ("objects", "pair", "color", "shape", "relation", "size", "scenes")


@dataclasses.dataclass(frozen=True)
class SceneEvaluation:
    """How many prompts of each kind are drawn, under `evaluate` in the config."""

    two_objects: int = 256
    held_out_pairs: int = 128
    three_objects: int = 128
    four_objects: int = 128

    def prompts(self) -> list["ScenePrompt"]:
        """All of them, kind by kind."""
        return [
            *scene_prompts(self.two_objects, 2, COUNTS[2]),
            *scene_prompts(self.held_out_pairs, 2, HELD_OUT),
            *scene_prompts(self.three_objects, 3, COUNTS[3]),
            *scene_prompts(self.four_objects, 4, COUNTS[4]),
        ]


@dataclasses.dataclass(frozen=True)
class ScenePrompt:
    """A prompt whose scene is known. `kind` is one of `COUNTS`' names, or `HELD_OUT`."""

    prompt: str
    language: str
    scene: Scene
    kind: str


def scene_prompts(count: int, num_objects: int, kind: str) -> list[ScenePrompt]:
    """Prompts of scenes that no training run has seen, English and Chinese in turn.

    Args: kind: with `HELD_OUT`, one object of each is a pair of colour and shape that training never shows.
    """
    if not count:
        return []
    pairs = "held_out" if kind == HELD_OUT else "train"
    source = ShapesSource(count, seed=HELD_OUT_SEED, pairs=pairs, num_objects=num_objects)
    languages = tuple(LANGUAGES)
    return [
        ScenePrompt(source[i]["captions"][languages[i % 2]], languages[i % 2], source.scene(i), kind)
        for i in range(count)
    ]


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
      UserError: if the data set is not the built-in one, whose scenes are known.
    """
    if not all(part.source == "shapes" for part in dataset.config.parts().values()):
        raise UserError("evaluate: only scenes of data.source='shapes' can be checked; remove `evaluate`")
    side, prompts, rows = dataset.config.resolution, evaluation.prompts(), pipeline.rows(how)
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
    checks = [check(picture, p.scene) for picture, p in zip(pictures, prompts, strict=True)]
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
    order = ["all scenes", *COUNTS.values(), HELD_OUT]
    rank = lambda group: (order.index(group.partition(",")[0]) if group.partition(",")[0] in order else 99, group)  # noqa: E731
    return {group: found[group] for group in sorted(found, key=rank)}


def named_at(kind: str, place: int) -> str:
    """Names the group of the objects of such scenes that prompts name at this place, from 0."""
    return f"{kind}, named {('1st', '2nd', '3rd', '4th')[place]}"


def report_scenes(
    scores: Mapping[str, Mapping[str, Accuracy]],
    prompts: Sequence[ScenePrompt],
    pictures: Sequence[np.ndarray],
    folder: epath.Path,
) -> None:
    """Prints the scores and writes them to `scores.json`; some pictures of each kind to `grid.png`."""
    lines = [f"{'right, in %':28}" + "".join(f"{column:>10}" for column in COLUMNS)]
    for group, accuracy in scores.items():
        cells = [f"{100 * accuracy[column].value:.1f}" if column in accuracy else "" for column in COLUMNS]
        lines.append(f"{group:28}" + "".join(f"{cell:>10}" for cell in cells))
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
