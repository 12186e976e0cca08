"""Scores GenEval (Ghosh et al. 2023): does an image show the prompt's objects, with their number, colour and position?

The rules are those of the official evaluation/evaluate_images.py and summary_scores.py, as functions of detections.
The official models are mmdetection's Mask2Former (Swin-S, COCO) and OpenAI's CLIP ViT-L/14; here they are models of
transformers: facebook/mask2former-swin-small-coco-instance, which is the same architecture from another training run,
and openai/clip-vit-large-patch14.
"""

import collections
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import open_benchmark
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.files import read_json
from lidit_jax.score.detectors import Detection, check_classes, load_detector
from lidit_jax.score.load_model import device, load_model, load_processor
from lidit_jax.score.report import Report
from lidit_jax.score.results import ScoreRequest, open_results, require_images_folder

logger = logging.getLogger(__name__)

COLUMN_OF_TAG = {
    "single_object": "single",
    "two_object": "two",
    "counting": "count",
    "colors": "colors",
    "position": "position",
    "color_attr": "attr",
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
RELATIONS = ("left of", "right of", "above", "below")
# Prompt's name of a class -> COCO's, where they differ.
COCO_CLASSES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}

MIN_SCORE = 0.3  # confidence above which an object counts
MIN_SCORE_COUNTING = 0.9  # the same for counting prompts, whose result false detections would spoil
MAX_OBJECTS = 16  # per class and image
POSITION_MARGIN = 0.1  # share of both objects' added sizes by which their centres must at least be apart
BACKGROUND = 0x99  # grey level around a masked object

ColorsOf = Callable[[str, Sequence[Detection]], list[str]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt's folder.

    Attributes:
      folder: its name.
      metadata: GenEval's, see `judge`.
      images: file names of the images in its samples/.
    """

    folder: str
    metadata: Mapping[str, Any]
    images: Sequence[str]


def score(request: ScoreRequest) -> Report:
    """Scores the images in `request.images` with the models `request.detector` and `request.clip`.

    If `request.file` is given, all of its prompts must have images.

    Raises:
      UserError: the folder or a model is missing, the detector lacks a class of the prompts, an image or its metadata
        is damaged, or `request.out` has other results.
    """
    prompts = read_prompts(require_images_folder(request))
    if request.file:
        _check_complete(request, prompts)
    detector = load_detector(request.require("detector"))
    clauses = [clause for prompt in prompts for clause in _clauses(prompt.metadata)]
    check_classes(detector, [coco_class(clause["class"]) for clause in clauses], request.detector)
    colors = ClipColors(request.require("clip"))
    metadata = {f"{p.folder}/samples/{name}": p.metadata for p in prompts for name in p.images}

    def score_image(name: str) -> dict[str, Any]:
        image, asked = read_image(request.images / name), metadata[name]
        objects = objects_by_class(detector(image, min_score(asked["tag"])), asked["tag"])
        correct, reason = judge(asked, objects, lambda cls, found: colors(image, cls, found))
        boxes = {cls: [[*map(float, d.box), d.score] for d in found] for cls, found in objects.items()}
        return {"correct": correct, "reason": reason, "objects": boxes}

    with open_results(request, [request.images / name for name in metadata], ("detector", "clip")) as results:
        scored = results.complete(list(metadata), score_image)
    return summary([(metadata[name], result["correct"]) for name, result in scored.items()])


# --- the rules --------------------------------------------------------------------------------------------------


def min_score(tag: str) -> float:
    """Returns the confidence above which an object counts in prompts of this tag."""
    return MIN_SCORE_COUNTING if tag == "counting" else MIN_SCORE


def objects_by_class(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Returns COCO class -> objects that count, by descending score; overlapping ones all count (no suppression)."""
    objects = collections.defaultdict(list)
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > min_score(tag) and len(objects[detection.label]) < MAX_OBJECTS:
            objects[detection.label].append(detection)
    return {label: found for label, found in objects.items() if found}


def judge(
    metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Detection]], colors_of: ColorsOf
) -> tuple[bool, str]:
    """Judges whether an image shows what its prompt asks for.

    For a class with a count of N, the N objects with the highest scores are examined: their colours, and the position
    of each relative to each object of an earlier clause. Further objects are an error only if the metadata excludes
    them.

    Args:
      metadata: GenEval's: "include" and "exclude", lists of {"class", "count", "color", "position"}.
      objects: COCO class -> objects that count, by descending score.
      colors_of: (class as the prompt names it, objects) -> colour of each; called only for clauses with a colour.

    Returns:
      True if the image is correct, and else the reasons ("" if it is).
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []  # each clause's objects; None for a clause that is not fulfilled
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        found = list(objects.get(coco_class(name), ()))[:count]
        reason = _why_not(clause, found, matched, colors_of)
        matched.append(None if reason else found)
        reasons += [reason] if reason else []
    for clause in metadata.get("exclude", ()):
        number = len(objects.get(coco_class(clause["class"]), ()))
        if number >= clause["count"]:
            reasons.append(f"{number} {clause['class']}, not fewer than {clause['count']}")
    return not reasons, "; ".join(reasons)


def _why_not(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colors_of: ColorsOf,
) -> str:
    """Returns why a clause is not fulfilled; "" if it is.

    Args:
      clause: of the metadata's "include".
      found: the clause's objects, at most as many as its count.
      matched: objects of the earlier clauses, None for those that are not fulfilled.
      colors_of: see `judge`.
    """
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"{len(found)} {name}, not {count}"
    if "color" in clause:
        colors = colors_of(name, found)
        if colors.count(clause["color"]) < count:
            return f"{name} is {', '.join(colors)}, not {clause['color']}"
    if "position" in clause:
        relation, index = clause["position"]
        others = matched[index]
        if others is None:
            return f"nothing for {name} to be {relation}"
        for one in found:
            for other in others:
                seen = relations(one.box, other.box)
                if relation not in seen:
                    return f"{name} is {' and '.join(sorted(seen)) or 'at no side'}, not {relation}"
    return ""


def relations(box: Sequence[float], other: Sequence[float]) -> frozenset[str]:
    """Returns where `box` is relative to `other`: none, one or (for a diagonal) two of RELATIONS.

    Along each axis, the distance of the centres is reduced by a tenth of both boxes' added sizes. A relation holds if
    the reduced distance in its direction exceeds half of the full Euclidean distance of the centres.

    Args:
      box: (left, top, right, bottom).
      other: likewise.
    """
    box, other = (np.asarray(b, np.float64).reshape(2, 2) for b in (box, other))
    offset = box.mean(axis=0) - other.mean(axis=0)
    margin = POSITION_MARGIN * (np.abs(box[1] - box[0]) + np.abs(other[1] - other[0]))
    beyond = np.maximum(np.abs(offset) - margin, 0.0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return frozenset()
    across, down = beyond / np.linalg.norm(offset)
    holds = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return frozenset(relation for relation in holds if holds[relation])


def coco_class(name: str) -> str:
    """Returns COCO's name for a class as the prompts name it."""
    return COCO_CLASSES.get(name, name)


def summary(results: Sequence[tuple[Mapping[str, Any], bool]]) -> Report:
    """Returns the fraction of correct images per task (tag), and overall: the mean over tasks, not over images.

    Args:
      results: (metadata, True if correct) of each image.
    """
    by_tag, by_prompt = collections.defaultdict(list), collections.defaultdict(list)
    for metadata, correct in results:
        by_tag[metadata["tag"]].append(correct)
        by_prompt[json.dumps(metadata, sort_keys=True)].append(correct)
    tags = [tag for tag in COLUMN_OF_TAG if tag in by_tag] + sorted(set(by_tag) - set(COLUMN_OF_TAG))
    columns = {COLUMN_OF_TAG.get(tag, tag): float(np.mean(by_tag[tag])) for tag in tags}
    missing = [column for tag, column in COLUMN_OF_TAG.items() if tag not in by_tag]
    if missing:
        logger.warning("no images for %s: overall is the mean of the other tasks", ", ".join(missing))
    counts = {COLUMN_OF_TAG.get(tag, tag): len(by_tag[tag]) for tag in tags}
    details = {
        "images": len(results),
        "prompts": len(by_prompt),
        "right_images": float(np.mean([correct for _, correct in results])),
        "prompts_with_a_right_image": float(np.mean([any(correct) for correct in by_prompt.values()])),
    }
    return Report(
        "geneval",
        columns | {"overall": float(np.mean(list(columns.values())))},
        counts | {"overall": len(results)},
        details,
    )


# --- colours ----------------------------------------------------------------------------------------------------


class ClipColors:
    """Classifies objects' colours with CLIP, zero-shot, among ten colours and given the objects' class."""

    def __init__(self, name: str):
        self._model = load_model("CLIPModel", "clip", name, dtype="float32")
        self._processor = load_processor("AutoImageProcessor", "clip", name, backend="pil")
        self._tokenizer = load_processor("AutoTokenizer", "clip", name)
        self._classifiers: dict[str, Any] = {}

    def __call__(self, image: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        """Returns each object's colour, one of COLORS.

        Args:
          image: uint8 [H, W, 3].
          name: the objects' class, as the prompt names it.
          objects: in the image.
        """
        import torch

        crops = [cut_out(image, one) for one in objects]
        with torch.inference_mode():
            pixels = self._processor(images=crops, return_tensors="pt").to(device())["pixel_values"]
            features = _normalized(self._model.get_image_features(pixel_values=pixels).pooler_output)
            similarities = features @ self._classifier(name).T  # [objects, colours]
        return [COLORS[index] for index in similarities.argmax(dim=1).tolist()]

    def _classifier(self, name: str) -> Any:
        """Returns CLIP's text features, [colours, features], each the mean over the templates."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device())
            features = self._model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            features = _normalized(features).reshape(len(COLORS), len(COLOR_TEMPLATES), -1)
            self._classifiers[name] = _normalized(features.mean(dim=1))
        return self._classifiers[name]


def cut_out(image: np.ndarray, one: Detection) -> Image.Image:
    """Crops an image to an object's box; if it has a mask, pixels outside of the mask become grey."""
    if one.mask is not None:
        image = np.where(one.mask[..., None], image, np.uint8(BACKGROUND))
    return Image.fromarray(image).crop(one.box)


def _normalized(features: Any) -> Any:
    return features / features.norm(dim=-1, keepdim=True)


# --- the folder -------------------------------------------------------------------------------------------------


def read_prompts(folder: epath.Path) -> list[Prompt]:
    """Reads the prompts' folders 00000, 00001, … of `folder`, each with metadata.jsonl and samples/0000.png, ….

    Raises:
      UserError: there is none, or one is incomplete or damaged.
    """
    names = sorted(
        (path.name for path in folder.iterdir() if path.name.isdecimal()), key=lambda name: (int(name), name)
    )
    prompts = [_read_prompt(folder / name) for name in names if (folder / name).is_dir()]
    if not prompts:
        raise UserError(
            f"{folder}: no folder 00000 in it: generate the images with python -m lidit_jax.evaluate "
            "--benchmark=geneval"
        )
    return prompts


def _read_prompt(folder: epath.Path) -> Prompt:
    file, samples = folder / "metadata.jsonl", folder / "samples"
    if not file.exists():
        raise UserError(f"{file}: no such file: finish generating the benchmark's images first")
    try:
        metadata = read_json(file)
        _check_metadata(metadata)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}): generate it again") from None
    images = sorted(path.name for path in samples.iterdir()) if samples.is_dir() else []
    images = [name for name in images if re.fullmatch(r"\d+\.png", name)]
    if not images:
        raise UserError(f"{samples}: no image in it: generate the images again")
    return Prompt(folder.name, metadata, images)


def _check_metadata(metadata: Any) -> None:
    """Checks that a JSON value is GenEval's metadata.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(key), str) for key in ("tag", "prompt")):
        raise ValueError("it has no tag or no prompt")
    if not metadata.get("include") or not all(
        isinstance(metadata.get(key, []), list) for key in ("include", "exclude")
    ):
        raise ValueError("it has no lists of clauses under include and exclude")
    for clause in _clauses(metadata):
        if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
            raise ValueError("a clause has no class")
        if type(clause.get("count")) is not int or clause["count"] < 1:
            raise ValueError(f"{clause['class']}: its count is not a positive integer")
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"color {clause['color']!r:.40} is not one of {', '.join(COLORS)}")
    for number, clause in enumerate(metadata["include"]):
        if "position" in clause and not _is_position(clause["position"], number):
            raise ValueError(f"position {clause['position']!r:.40} is not a relation to an earlier object")


def _is_position(position: Any, number: int) -> bool:
    """Returns True if a JSON value is a position that clause `number` can have: [relation, earlier clause]."""
    return (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in RELATIONS
        and type(position[1]) is int
        and 0 <= position[1] < number
    )


def _clauses(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*metadata["include"], *metadata.get("exclude", ())]


def _check_complete(request: ScoreRequest, prompts: Sequence[Prompt]) -> None:
    """Checks that the images are those of all prompts of `request.file`.

    Raises:
      UserError: they are not.
    """
    wanted = collections.Counter(open_benchmark("geneval", request.file, 1).prompts)
    found = collections.Counter(prompt.metadata["prompt"] for prompt in prompts)
    if wanted != found:
        raise UserError(
            f"--images={request.images} has {(wanted & found).total()} of the {wanted.total()} prompts of "
            f"{request.file}, and {(found - wanted).total()} others: generate the rest, or leave --file out"
        )
