"""Does the model follow its prompts? On the built-in scenes the answer is exact: draw, then check every object."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from lidit_jax.data.dataset import Dataset
from lidit_jax.data.shapes import HELD_OUT_SEED, Scene, ShapesSource
from lidit_jax.data.shapes_checker import Accuracy, SceneCheck, accuracies, check
from lidit_jax.errors import UserError
from lidit_jax.json_file import write_json
from lidit_jax.pictures import grid, save_png
from lidit_jax.pipeline import Pipeline, SampleConfig

logger = logging.getLogger(__name__)

GRID_PICTURES = 24


@dataclasses.dataclass(frozen=True)
class SceneEvaluation:
    """How many prompts of each kind are drawn, under `evaluate` in the config."""

    two_objects: int = 256
    held_out_pairs: int = 128
    three_objects: int = 128
    four_objects: int = 128


@dataclasses.dataclass(frozen=True)
class ScenePrompt:
    """A prompt whose scene is known."""

    prompt: str
    language: str
    scene: Scene


def scene_prompts(count: int, num_objects: int, pairs: str, side: int) -> list[ScenePrompt]:
    """Prompts of scenes that no training run has seen, English and Chinese in turn."""
    if not count:
        return []
    source = ShapesSource(count, side, side, HELD_OUT_SEED, pairs, num_objects)
    languages = ("en", "zh")
    return [
        ScenePrompt(source[i]["captions"][languages[i % 2]], languages[i % 2], source.scene(i)) for i in range(count)
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

    Args: beat: called after each kind of prompts, for who watches that something is done.

    Raises:
      UserError: if the data set is not the built-in one, whose scenes are known.
    """
    if dataset.config.source != "shapes":
        raise UserError("evaluate: only scenes of data.source='shapes' can be checked; remove `evaluate`")
    side = dataset.config.resolution
    kinds = {
        "two objects": scene_prompts(evaluation.two_objects, 2, "train", side),
        "a held-out pair": scene_prompts(evaluation.held_out_pairs, 2, "held_out", side),
        "three objects": scene_prompts(evaluation.three_objects, 3, "train", side),
        "four objects": scene_prompts(evaluation.four_objects, 4, "train", side),
    }
    scores, pictures = {}, {}
    for kind, prompts in kinds.items():
        pictures[kind], checks = _draw_and_check(pipeline, params, how, prompts, side)
        beat()
        scores[kind] = accuracies(checks)
        if kind == "two objects":
            for language, name in (("en", "English"), ("zh", "Chinese")):
                of_language = [c for c, p in zip(checks, prompts, strict=True) if p.language == language]
                scores[f"two objects, {name}"] = accuracies(of_language)
    if jax.process_index() == 0:
        _report(scores, kinds, pictures, workdir)
    return scores


def _draw_and_check(
    pipeline: Pipeline, params: Any, how: SampleConfig, prompts: list[ScenePrompt], side: int
) -> tuple[list[np.ndarray], list[SceneCheck]]:
    if not prompts:
        return [], []
    drawn = pipeline(params, [p.prompt for p in prompts], range(len(prompts)), side, side, how)
    return list(drawn), [check(picture, p.scene) for picture, p in zip(drawn, prompts, strict=True)]


def _report(scores, kinds, pictures, workdir: epath.Path) -> None:
    columns = ("objects", "color", "shape", "relation", "size", "scenes")
    lines = [f"{'right, in %':24}" + "".join(f"{column:>10}" for column in columns)]
    for kind, accuracy in scores.items():
        lines.append(f"{kind:24}" + "".join(f"{100 * accuracy[column].value:10.1f}" for column in columns))
    logger.info("\n%s", "\n".join(lines))

    shown = [
        (picture, p.prompt)
        for kind in ("two objects", "a held-out pair", "three objects", "four objects")
        for picture, p in list(zip(pictures[kind], kinds[kind], strict=True))[: GRID_PICTURES // 4]
    ]
    if shown:
        save_png(grid([picture for picture, _ in shown], [prompt for _, prompt in shown]), workdir / "grid.png")
        logger.info("pictures for prompts that training never saw: %s", workdir / "grid.png")
    table = {
        kind: {name: {"correct": a.correct, "total": a.total, "interval": a.interval} for name, a in accuracy.items()}
        for kind, accuracy in scores.items()
    }
    write_json(workdir / "scores.json", table)
