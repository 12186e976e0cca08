"""Scores DPG-Bench (Hu et al. 2024, ELLA): a VQA model answers each prompt's questions on each of its images.

The rules are those of the official dpg_bench/compute_dpg_bench.py. The official model is mPLUG-large, which is not in
transformers; here it is any model of `vqa.py`, so scores are only roughly comparable with published ones.

One deliberate difference: by mistake, the official script drops the first question of its file and with it that
question's prompt, one of 1,065 (github.com/TencentQQGYLab/ELLA/issues/61). Here it counts; `details` has the score
without that prompt.
"""

import collections
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import PROVENANCE_FILE, cut
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.files import is_hidden, read_json
from lidit_jax.score.dpg_questions import Questions, read_questions
from lidit_jax.score.report import Report
from lidit_jax.score.results import ScoreRequest, open_results, require_images_folder
from lidit_jax.score.vqa import is_yes, load_vqa

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def score(request: ScoreRequest) -> Report:
    """Scores the images in `request.images` by the questions in `request.questions`.

    As in the official script, a category's score uses the last image of each prompt only, and counts an answer whatever
    the answers to the question's parents. `details` has the category scores over all images.

    Returns:
      A report in per cent: "average", the benchmark's score, and the scores of the level-1 categories.

    Raises:
      UserError: images, questions or model are missing, or `request.out` has other results.
    """
    files = _find_images(require_images_folder(request))
    prompts, first = read_questions(request.require("questions"))
    prompts, files = _prompts_to_score(request, prompts, files)
    per_file = _images_per_file(request.images)
    model = load_vqa(request.require("vqa"))

    def ask(name: str) -> list[list[str]]:
        questions = [question.text for question in prompts[name].values()]
        cells = cut(read_image(files[name]), per_file, files[name])
        return [model.answers(cell, questions) for cell in cells]

    provenance = {"questions": _questions_digest(prompts), "images_per_file": per_file}
    with open_results(request, list(files.values()), ("vqa",), **provenance) as results:
        answers = results.complete(list(files), ask, unit="prompt")
    right = {
        name: [dict(zip(prompts[name], map(is_yes, cell_answers), strict=True)) for cell_answers in prompt_answers]
        for name, prompt_answers in answers.items()
    }
    return _report(prompts, right, first)


# --- the rules --------------------------------------------------------------------------------------------------


def image_score(questions: Questions, right: Mapping[int, bool]) -> float:
    """Returns the share of questions that count: those answered "yes" all of whose parents count.

    As in the official script, questions are visited in the file's order, so a parent that stands later in the file is
    judged by its answer alone.

    Args:
      questions: the prompt's.
      right: question's number -> whether the answer was "yes".
    """
    counts = dict(right)
    for number, question in questions.items():
        if any(not counts[parent] for parent in question.parents):
            counts[number] = False
    return sum(counts.values()) / len(counts)


def category_scores(
    prompts: Mapping[str, Questions], right: Mapping[str, Sequence[Mapping[int, bool]]], broad: bool
) -> dict[str, tuple[float, int]]:
    """Returns each category's score, which ignores the answers to parents.

    Args:
      prompts: prompt's id -> questions.
      right: prompt's id -> for each image, question's number -> whether the answer was "yes".
      broad: True for level-1 categories, False for level 2.

    Returns:
      Category -> (share of its questions answered "yes", number of answers).
    """
    found = collections.defaultdict(list)
    for name, prompt_answers in right.items():
        for answers in prompt_answers:
            for number, question in prompts[name].items():
                found[question.broad_category if broad else question.category].append(answers[number])
    return {category: (float(np.mean(found[category])), len(found[category])) for category in sorted(found)}


# --- images -----------------------------------------------------------------------------------------------------


def _find_images(folder: epath.Path) -> dict[str, epath.Path]:
    """Returns prompt's id -> image file.

    Raises:
      UserError: there is no image, or an id has two.
    """
    found = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not is_hidden(file.name))
    files = sorted(found, key=str)
    if not files:
        raise UserError(
            f"--images={folder} has no ID.png: name a folder that python -m lidit_jax.evaluate --benchmark=dpg_bench "
            "wrote"
        )
    found: dict[str, epath.Path] = {}
    for file in files:
        name = file.name.split(".")[0]
        if name in found:
            raise UserError(f"--images={folder} has {found[name].name} and {file.name} for one prompt: remove one")
        found[name] = file
    return found


def _prompts_to_score(
    request: ScoreRequest, prompts: Mapping[str, Questions], files: Mapping[str, epath.Path]
) -> tuple[dict[str, Questions], dict[str, epath.Path]]:
    """Returns the prompts that have both valid questions and an image, and their files.

    The others are left out, as in the official script, with a warning.

    Raises:
      UserError: no prompt has both.
    """
    broken = {
        name
        for name, questions in prompts.items()
        if not {parent for question in questions.values() for parent in question.parents} <= set(questions)
    }
    kept = sorted(set(prompts) & set(files) - broken)
    if not kept:
        raise UserError(
            f"--questions={request.questions} has no questions about the images in {request.images}: name the "
            "benchmark's dpg_bench.csv"
        )
    for names, problem in (
        (set(prompts) - set(files), "prompts have no image"),
        (set(files) - set(prompts), "images have no questions"),
        (broken & set(files), "prompts have questions with missing parents"),
    ):
        if names:
            logger.warning("%d %s, such as %s: they are not scored", len(names), problem, min(names))
    return {name: prompts[name] for name in kept}, {name: files[name] for name in kept}


def _images_per_file(folder: epath.Path) -> int:
    """Returns the number of images in a file: 1 if `lidit_jax.evaluate` recorded that, else 4 as in dist_eval.sh."""
    try:
        noted = read_json(folder / PROVENANCE_FILE)["num_images"]
    except (OSError, ValueError, KeyError, TypeError):
        return 4
    return 1 if noted == 1 else 4


def _questions_digest(prompts: Mapping[str, Questions]) -> str:
    asked = {name: [dataclasses.astuple(q) for q in questions.values()] for name, questions in prompts.items()}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _report(prompts: Mapping[str, Questions], right: Mapping[str, Sequence[Mapping[int, bool]]], first: str) -> Report:
    scores = {
        name: float(np.mean([image_score(prompts[name], answers) for answers in prompt_answers]))
        for name, prompt_answers in right.items()
    }
    last = {name: prompt_answers[-1:] for name, prompt_answers in right.items()}
    broad = category_scores(prompts, last, broad=True)
    others = [value for name, value in scores.items() if name != first]
    return Report(
        benchmark="dpg_bench",
        columns={"average": _percent(np.mean(list(scores.values())))}
        | {name: _percent(v) for name, (v, _) in broad.items()},
        counts={"average": len(scores)} | {name: count for name, (_, count) in broad.items()},
        details={
            "average_without_the_first_prompt": _percent(np.mean(others)) if others else None,
            "level_2": _percents(category_scores(prompts, last, broad=False)),
            "level_1_of_all_images": _percents(category_scores(prompts, right, broad=True)),
            "level_2_of_all_images": _percents(category_scores(prompts, right, broad=False)),
            "prompts": {name: _percent(value) for name, value in scores.items()},
        },
    )


def _percents(scores: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: _percent(value) for name, (value, _) in scores.items()}


def _percent(share: float) -> float:
    return 100 * float(share)
