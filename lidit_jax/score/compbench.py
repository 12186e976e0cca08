"""Scores T2I-CompBench (Huang et al. 2023): colour, shape and texture by BLIP-VQA, 2D spatial by a detector.

The rules are those of the official BLIPvqa_eval and UniDet_eval/2D_spatial_eval.py. The official detector is UniDet;
here it is any detector of `detectors.py`, so spatial scores are only roughly comparable with official ones.
"""

import collections
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.attributes import KINDS
from lidit_jax.evaluate.benchmarks import T2ICompBench
from lidit_jax.evaluate.noun_phrases import noun_phrases, splitter_name
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.files import is_hidden
from lidit_jax.score.compbench_rules import SpatialPrompt, parse_spatial, spatial_score
from lidit_jax.score.detectors import load_detector
from lidit_jax.score.report import Report
from lidit_jax.score.results import ScoreRequest, open_results, require_images_folder
from lidit_jax.score.vqa import load_blip

logger = logging.getLogger(__name__)

CATEGORIES = ("color", "shape", "texture", "spatial")
# Prompt's noun -> COCO's name of the class, for detectors that know the latter only. The official script compares
# UniDet's class names with the nouns as they are.
OTHER_NAMES = {
    "bag": "handbag",
    "computer": "laptop",
    "phone": "cell phone",
    "sofa": "couch",
    "table": "dining table",
    "television": "tv",
}

_NAME = re.compile(r"([^_]+)_(\d+)\.png")


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """An image in samples/.

    Attributes:
      name: of the file.
      prompt: taken from the file's name.
    """

    name: str
    prompt: str


def score(request: ScoreRequest) -> Report:
    """Scores the images in `request.images`/samples for one category.

    The category (color, shape, texture or spatial) is taken from the name of `request.file`, such as color_val.txt;
    without a file it is inferred from the prompts. If the file is given, all of its prompts must have images.

    Returns:
      A report with the category's score in per cent.

    Raises:
      UserError: the images or the model's flag are missing, the category has no scorer here, or `request.out` has
        other results.
    """
    images = find_images(require_images_folder(request))
    if request.file:
        _check_complete(request.file, images)
    category = category_of(request.file.name if request.file else None, [image.prompt for image in images])
    return (_spatial if category == "spatial" else _attributes)(request, images, category)


def find_images(folder: epath.Path) -> list[GeneratedImage]:
    """Lists the images in a folder's samples/, ordered by number.

    Raises:
      UserError: no file there is named as T2I-CompBench's are, PROMPT_000000.png.
    """
    samples = folder / "samples"
    names = [file.name for file in samples.glob("*.png")] if samples.is_dir() else []
    matches = [match for name in names if not is_hidden(name) and (match := _NAME.fullmatch(name))]
    if not matches:
        raise UserError(
            f"--images={folder} has no samples/PROMPT_000000.png: name a folder that python -m lidit_jax.evaluate "
            "--benchmark=t2i_compbench wrote"
        )
    matches.sort(key=lambda match: (int(match[2]), match[1]))
    return [GeneratedImage(match[0], match[1]) for match in matches]


def category_of(file_name: str | None, prompts: Sequence[str]) -> str:
    """Returns the category of the prompts: color, shape, texture or spatial.

    Args:
      file_name: of the benchmark's list, such as "color_val.txt"; None if it was not given.
      prompts: decide by majority if the file's name does not tell.

    Raises:
      UserError: the file is of another category, or no category has the most prompts.
    """
    if file_name:
        named = re.match(r"(3d_spatial|non_spatial|[a-z]+?)(_(train|val)\w*)?\.txt", file_name)
        if named and named[1] in CATEGORIES:
            return named[1]
        if named and named[1] in ("3d_spatial", "non_spatial", "complex", "numeracy"):
            raise UserError(
                f"--file={file_name} is of the category {named[1]}, which has no scorer here: use a list of "
                f"{', '.join(CATEGORIES)}"
            )
    votes = collections.Counter(category for prompt in prompts for category in _possible_categories(prompt))
    best = votes.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        raise UserError(
            f"the prompts do not tell which category they are of ({', '.join(CATEGORIES)}): give the benchmark's list, "
            "such as --file=color_val.txt"
        )
    return best[0][0]


def attribute_score(
    prompt: str, yes_probabilities: Callable[[list[str]], Sequence[float]]
) -> tuple[float, dict[str, float]]:
    """Scores an image by the product of the probabilities that it shows each noun phrase of its prompt.

    As in the official scorer, at most 8 phrases count, and a prompt without any scores 1.

    Args:
      prompt: the image's.
      yes_probabilities: questions such as "a red car?" -> probability of "yes" for each.

    Returns:
      The image's score, and each noun phrase's.
    """
    phrases = noun_phrases(prompt)
    scores = [float(p) for p in yes_probabilities([f"{phrase}?" for phrase in phrases])] if phrases else []
    return round(math.prod(scores), 4), dict(zip(phrases, scores, strict=True))


def _attributes(request: ScoreRequest, images: list[GeneratedImage], category: str) -> Report:
    model = load_blip(request.require("vqa"))
    prompts = {image.name: image.prompt for image in images}

    def score_image(name: str) -> dict[str, Any]:
        image = read_image(request.images / "samples" / name)
        value, phrases = attribute_score(prompts[name], lambda questions: model.yes_probabilities(image, questions))
        return {"score": value, "phrases": phrases}

    splitter = splitter_name()
    if splitter == "rules":
        logger.info("finding noun phrases by rules: spaCy's en_core_web_sm, the official model, is not installed")
    files = [request.images / "samples" / name for name in prompts]
    with open_results(request, files, ("vqa",), category=category, noun_phrases=splitter) as results:
        scored = results.complete(list(prompts), score_image)
    return _report(category, [result["score"] for result in scored.values()], {"noun_phrases": splitter})


def _spatial(request: ScoreRequest, images: list[GeneratedImage], category: str) -> Report:
    detector = load_detector(request.require("detector"))
    prompts = {image.name: _parse_for_detector(image.prompt, detector.classes) for image in images}

    def score_image(name: str) -> dict[str, Any]:
        image = read_image(request.images / "samples" / name)
        found = detector(image, 0.0)
        return {"score": spatial_score(prompts[name], found, *image.shape[:2])}

    unknown = {name for prompt in prompts.values() for name in (prompt.first, prompt.second)} - detector.classes
    if unknown:
        logger.info(
            "--detector=%s has no class for %s: their prompts score 0", request.detector, ", ".join(sorted(unknown))
        )
    files = [request.images / "samples" / name for name in prompts]
    with open_results(request, files, ("detector",), category=category) as results:
        scored = results.complete(list(prompts), score_image)
    values = [result["score"] for result in scored.values()]
    return _report(category, values, {"objects_that_the_detector_lacks": sorted(unknown)})


def _parse_for_detector(prompt: str, classes: frozenset[str]) -> SpatialPrompt:
    """Parses a spatial prompt, with the objects named as the detector names them.

    Args:
      prompt: of the spatial list.
      classes: the detector's.

    Raises:
      UserError: the prompt has another form.
    """
    found = parse_spatial(prompt)
    if found is None:
        raise UserError(f'the prompt {prompt!r:.80} is not of the spatial list: it is not "a X on the left of a Y"')

    def name(noun: str) -> str:
        return OTHER_NAMES[noun] if noun not in classes and OTHER_NAMES.get(noun) in classes else noun

    return SpatialPrompt(name(found.first), found.relation, name(found.second))


def _possible_categories(prompt: str) -> set[str]:
    """Returns the categories that a prompt could belong to."""
    if parse_spatial(prompt):
        return {"spatial"}
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    return {kind for kind, attributes in KINDS.items() if words & attributes}


def _check_complete(file: epath.Path, images: list[GeneratedImage]) -> None:
    """Checks that the benchmark's list and the images have the same prompts.

    Raises:
      UserError: they do not, or there is no such list.
    """
    if not file.is_file():
        raise UserError(f"--file={file}: no such file; name the benchmark's list")
    wanted, found = set(T2ICompBench(file, 1).prompts), {image.prompt for image in images}
    for prompts, problem, remedy in (
        (wanted - found, "of its prompts have no image", "generate the rest"),
        (found - wanted, "prompts of the images are not in it", "name the list that they were generated from"),
    ):
        if prompts:
            raise UserError(f"--file={file}: {len(prompts)} {problem}, such as {min(prompts)!r:.80}: {remedy}")


def _report(category: str, values: Sequence[float], details: dict[str, Any]) -> Report:
    return Report(
        benchmark="t2i_compbench",
        columns={category: 100 * float(np.mean(values))},
        counts={category: len(values)},
        details=details,
    )
