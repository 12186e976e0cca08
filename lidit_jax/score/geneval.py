"""GenEval's scores (Ghosh et al. 2023): is what the prompt names in the picture, as often, in its colour and its place?

The rules are those of the official evaluation/evaluate_images.py and summary_scores.py, as functions of detections.
Its models are mmdetection's Mask2Former (Swin-S, COCO) and OpenAI's CLIP ViT-L/14; here they are transformers' ones,
facebook/mask2former-swin-small-coco-instance, which is the same network of another training, and
openai/clip-vit-large-patch14.
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
from lidit_jax.evaluate.read_picture import read_picture
from lidit_jax.score.detectors import Detection, check_classes, load_detector
from lidit_jax.score.load_model import device, load_model, load_processor
from lidit_jax.score.report import Report
from lidit_jax.score.results import ScoreRequest, open_results, require_pictures_folder

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
# Three of COCO's classes have clearer names in the prompts.
COCO_CLASSES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}

MIN_SCORE = 0.3  # of an object that counts …
MIN_SCORE_COUNTING = 0.9  # … and where its number is asked, so that doubtful ones don't spoil it
MAX_OBJECTS = 16  # of a class in a picture
POSITION_MARGIN = 0.1  # of both objects' sizes, by which their centres must be apart
BACKGROUND = 0x99  # grey, of what is no part of an object

ColorsOf = Callable[[str, Sequence[Detection]], list[str]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A folder of pictures: its name, its metadata, and the pictures' names in it."""

    folder: str
    metadata: Mapping[str, Any]
    pictures: Sequence[str]


def score(request: ScoreRequest) -> Report:
    """Of the pictures in `request.pictures`, by `request.detector` and `request.clip`. `request.file` is optional: with
    it, all its prompts must be there.

    Raises:
      UserError: no such folder or model, a detector without the prompts' classes, damaged pictures or metadata, or
        `request.out` has results of something else.
    """
    prompts = read_prompts(require_pictures_folder(request))
    if request.file:
        _check_complete(request, prompts)
    detector = load_detector(request.require("detector"))
    clauses = [clause for prompt in prompts for clause in _clauses(prompt.metadata)]
    check_classes(detector, [coco_class(clause["class"]) for clause in clauses], request.detector)
    colors = ClipColors(request.require("clip"))
    metadata = {f"{p.folder}/samples/{name}": p.metadata for p in prompts for name in p.pictures}

    def score_picture(name: str) -> dict[str, Any]:
        picture, asked = read_picture(request.pictures / name), metadata[name]
        objects = objects_by_class(detector(picture, min_score(asked["tag"])), asked["tag"])
        correct, reason = judge(asked, objects, lambda cls, found: colors(picture, cls, found))
        boxes = {cls: [[*map(float, d.box), d.score] for d in found] for cls, found in objects.items()}
        return {"correct": correct, "reason": reason, "objects": boxes}

    with open_results(request, [request.pictures / name for name in metadata], ("detector", "clip")) as results:
        scored = results.complete(list(metadata), score_picture)
    return summary([(metadata[name], result["correct"]) for name, result in scored.items()])


# --- the rules --------------------------------------------------------------------------------------------------


def min_score(tag: str) -> float:
    """Above which an object counts."""
    return MIN_SCORE_COUNTING if tag == "counting" else MIN_SCORE


def objects_by_class(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """COCO class -> its objects that count, the surest first. Overlapping ones all do: nothing is suppressed."""
    objects = collections.defaultdict(list)
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > min_score(tag) and len(objects[detection.label]) < MAX_OBJECTS:
            objects[detection.label].append(detection)
    return {label: found for label, found in objects.items() if found}


def judge(
    metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Detection]], colors_of: ColorsOf
) -> tuple[bool, str]:
    """(whether the picture shows what its prompt asks, what it lacks).

    Of a class that is asked N times, the N surest objects are looked at: their colours, and whether each is where it
    should be of each of those of an earlier class. More of them are wrong only where the metadata excludes it.

    Args:
      metadata: GenEval's: "include" and "exclude", lists of {"class", "count", "color", "position"}.
      objects: COCO class -> objects that count, the surest first.
      colors_of: (class as the prompt names it, objects) -> each one's colour; called only where it is asked.
    """
    lacks: list[str] = []
    matched: list[Sequence[Detection] | None] = []  # of each clause the objects, None where they are not as asked
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        found = list(objects.get(coco_class(name), ()))[:count]
        lack = _lack(clause, found, matched, colors_of)
        matched.append(None if lack else found)
        lacks += [lack] if lack else []
    for clause in metadata.get("exclude", ()):
        number = len(objects.get(coco_class(clause["class"]), ()))
        if number >= clause["count"]:
            lacks.append(f"{number} {clause['class']}, not fewer than {clause['count']}")
    return not lacks, "; ".join(lacks)


def _lack(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colors_of: ColorsOf,
) -> str:
    """What the objects of a clause lack; "" for nothing."""
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
    """How the first of two objects lies to the second: none, one or two of RELATIONS, two for a diagonal.

    A box is (left, top, right, bottom). The distance of their centres counts on each axis as far as it is more than a
    tenth of the boxes' sizes there together; what is left of it must be over half of the whole distance.
    """
    box, other = (np.asarray(b, np.float64).reshape(2, 2) for b in (box, other))
    offset = box.mean(axis=0) - other.mean(axis=0)
    margin = POSITION_MARGIN * (np.abs(box[1] - box[0]) + np.abs(other[1] - other[0]))
    beyond = np.maximum(np.abs(offset) - margin, 0.0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return frozenset()
    across, down = beyond / np.linalg.norm(offset)
    seen = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return frozenset(relation for relation, is_so in seen.items() if is_so)


def coco_class(name: str) -> str:
    """COCO's name for a class of the prompts."""
    return COCO_CLASSES.get(name, name)


def summary(results: Sequence[tuple[Mapping[str, Any], bool]]) -> Report:
    """Of each task (tag) the fraction of pictures that are right; overall, the mean of the tasks and not of the
    pictures.

    Args: results: (metadata, whether it is right) of each picture.
    """
    of_tag, of_prompt = collections.defaultdict(list), collections.defaultdict(list)
    for metadata, correct in results:
        of_tag[metadata["tag"]].append(correct)
        of_prompt[json.dumps(metadata, sort_keys=True)].append(correct)
    tags = [tag for tag in COLUMN_OF_TAG if tag in of_tag] + sorted(set(of_tag) - set(COLUMN_OF_TAG))
    columns = {COLUMN_OF_TAG.get(tag, tag): float(np.mean(of_tag[tag])) for tag in tags}
    missing = [column for tag, column in COLUMN_OF_TAG.items() if tag not in of_tag]
    if missing:
        logger.warning("no pictures for %s: overall is the mean of the other tasks", ", ".join(missing))
    counts = {COLUMN_OF_TAG.get(tag, tag): len(of_tag[tag]) for tag in tags}
    details = {
        "pictures": len(results),
        "prompts": len(of_prompt),
        "right_pictures": float(np.mean([correct for _, correct in results])),
        "prompts_with_a_right_picture": float(np.mean([any(correct) for correct in of_prompt.values()])),
    }
    return Report(
        "geneval",
        columns | {"overall": float(np.mean(list(columns.values())))},
        counts | {"overall": len(results)},
        details,
    )


# --- colours ----------------------------------------------------------------------------------------------------


class ClipColors:
    """Names objects' colours by CLIP, zero-shot: which of ten, given what the object is."""

    def __init__(self, name: str):
        self._model = load_model("CLIPModel", "clip", name, dtype="float32")
        self._processor = load_processor("AutoImageProcessor", "clip", name, backend="pil")
        self._tokenizer = load_processor("AutoTokenizer", "clip", name)
        self._classifiers: dict[str, Any] = {}

    def __call__(self, picture: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        """Each object's colour, of COLORS.

        Args:
          picture: uint8 [H, W, 3].
          name: the objects' class, in the prompt's words.
        """
        import torch

        crops = [cut_out(picture, one) for one in objects]
        with torch.inference_mode():
            pixels = self._processor(images=crops, return_tensors="pt").to(device())["pixel_values"]
            features = _normalized(self._model.get_image_features(pixel_values=pixels).pooler_output)
            likeness = features @ self._classifier(name).T  # [objects, colours]
        return [COLORS[index] for index in likeness.argmax(dim=1).tolist()]

    def _classifier(self, name: str) -> Any:
        """[colours, features]: of each the mean over the templates."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in COLOR_TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device())
            features = self._model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            features = _normalized(features).reshape(len(COLORS), len(COLOR_TEMPLATES), -1)
            self._classifiers[name] = _normalized(features.mean(dim=1))
        return self._classifiers[name]


def cut_out(picture: np.ndarray, one: Detection) -> Image.Image:
    """The object's box, what is around the object in it grey if there is a mask."""
    if one.mask is not None:
        picture = np.where(one.mask[..., None], picture, np.uint8(BACKGROUND))
    return Image.fromarray(picture).crop(one.box)


def _normalized(features: Any) -> Any:
    return features / features.norm(dim=-1, keepdim=True)


# --- the folder -------------------------------------------------------------------------------------------------


def read_prompts(folder: epath.Path) -> list[Prompt]:
    """The folders 00000, 00001 … in it, each with metadata.jsonl and samples/0000.png …

    Raises:
      UserError: there is none, or one lacks something or is damaged.
    """
    names = sorted(
        (path.name for path in folder.iterdir() if path.name.isdecimal()), key=lambda name: (int(name), name)
    )
    prompts = [_read_prompt(folder / name) for name in names if (folder / name).is_dir()]
    if not prompts:
        raise UserError(f"{folder}: no folder 00000 in it; draw it with python -m lidit_jax.evaluate")
    return prompts


def _read_prompt(folder: epath.Path) -> Prompt:
    file, samples = folder / "metadata.jsonl", folder / "samples"
    if not file.exists():
        raise UserError(f"{file}: no such file; draw the benchmark to its end first")
    try:
        metadata = json.loads(file.read_bytes())
        _check(metadata)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}): draw it again") from None
    pictures = sorted(path.name for path in samples.iterdir()) if samples.is_dir() else []
    pictures = [name for name in pictures if re.fullmatch(r"\d+\.png", name)]
    if not pictures:
        raise UserError(f"{samples}: no picture in it; draw it again")
    return Prompt(folder.name, metadata, pictures)


def _check(metadata: Any) -> None:
    """Raises ValueError if it is none of GenEval's."""
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(key), str) for key in ("tag", "prompt")):
        raise ValueError("no tag and prompt")
    if not metadata.get("include") or not all(
        isinstance(metadata.get(key, []), list) for key in ("include", "exclude")
    ):
        raise ValueError("no list of what it includes")
    for clause in _clauses(metadata):
        if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
            raise ValueError("no class")
        if type(clause.get("count")) is not int or clause["count"] < 1:
            raise ValueError(f"{clause['class']}: no count")
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"color {clause['color']!r:.40} is none of {', '.join(COLORS)}")
    for number, clause in enumerate(metadata["include"]):
        if "position" in clause and not _is_position(clause["position"], number):
            raise ValueError(f"position {clause['position']!r:.40} is no relation to an earlier object")


def _is_position(position: Any, number: int) -> bool:
    """Whether it is one for clause `number`."""
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
    """Raises UserError unless the pictures are of all prompts of the benchmark's file."""
    asked = collections.Counter(open_benchmark("geneval", request.file, 1).prompts)
    drawn = collections.Counter(prompt.metadata["prompt"] for prompt in prompts)
    if asked != drawn:
        raise UserError(
            f"--pictures={request.pictures} has {(asked & drawn).total()} of the {asked.total()} prompts of "
            f"{request.file}, and {(drawn - asked).total()} others: draw it to its end, or leave --file out"
        )
