"""Rules of T2I-CompBench's 2D spatial score (UniDet_eval/2D_spatial_eval.py), as pure functions of detections."""

import dataclasses
import re
from collections.abc import Sequence

from lidit_jax.score.detectors import Detection

MIN_SCORE = 0.5  # detections must exceed it to count, and image scores below it become 0
IOU_THRESHOLD = 0.1
# Distance in pixels below which centres are near, in the image as resized for the official detector: to a short side
# of 479 pixels, or to a long side of 480 if that is smaller.
NEAR, SHORT_SIDE, LONG_SIDE = 150, 479, 480
RELATIONS = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
)
PEOPLE = frozenset(("girl", "boy", "man", "woman"))

_PROMPT = re.compile(rf"(?:(?:an?|the) )?(.+?) ({'|'.join(RELATIONS)}) (?:(?:an?|the) )?(.+?)\.?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class SpatialPrompt:
    """Two objects, as detectors name them, and the relation of the first to the second, one of `RELATIONS`."""

    first: str
    relation: str
    second: str


def parse_spatial(prompt: str) -> SpatialPrompt | None:
    """Parses "a X RELATION a Y"; returns None for any other prompt.

    Girls, boys, men and women become "person", as in the official script. That script takes the first and last noun
    that spaCy finds, which gives the same objects for all 300 prompts of the validation list.
    """
    match = _PROMPT.fullmatch(" ".join(prompt.split()))
    if not match:
        return None
    first, relation, second = (text.lower() for text in match.groups())
    return SpatialPrompt(_object(first), relation, _object(second))


def spatial_score(prompt: SpatialPrompt, detections: Sequence[Detection], height: int, width: int) -> float:
    """Scores an image: half the objects' mean confidence plus half their relation's score; below 0.5 it becomes 0.

    So an image in which only one object is found scores 0. For each class, the detection with the highest score counts.

    Args:
      prompt: parsed.
      detections: in the image.
      height: of the image, in the pixels of the boxes.
      width: likewise.
    """
    best = {
        d.label.lower(): d for d in sorted(detections, key=lambda d: d.score) if d.score > MIN_SCORE
    }  # ascending, so that the highest score of a label is the one that stays
    first, second = best.get(prompt.first), best.get(prompt.second)
    score = 0.25 * sum(detection.score for detection in (first, second) if detection)
    if first and second:
        scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
        score += relation_score(prompt.relation, first.box, second.box, scale) / 2
    return score if score >= MIN_SCORE else 0.0


def relation_score(relation: str, first: Sequence[float], second: Sequence[float], scale: float = 1.0) -> float:
    """Returns how well two boxes fulfil a relation, from 0 to 1.

    "Left", "right", "top" and "bottom" score 0 unless the centres are apart in that direction, and further than along
    the other axis; then 1, or 0.1 / IoU if the boxes' IoU is above 0.1. "Near", "next to" and "on side of" score 1 if
    the centres are less than 150 pixels apart along one axis, else 150 / the larger distance.

    Args:
      relation: one of `RELATIONS`.
      first: (left, top, right, bottom) in pixels.
      second: likewise.
      scale: factor from these pixels to those of the image as resized for the official detector.
    """
    across, down = ((second[i] + second[i + 2]) / 2 - (first[i] + first[i + 2]) / 2 for i in (0, 1))
    if relation in ("next to", "on side of", "near"):
        distances = sorted((abs(across) * scale, abs(down) * scale))
        return 1.0 if distances[0] < NEAR else NEAR / distances[1]
    # The distance in the relation's direction, and along the other axis.
    along, other = {
        "on the left of": (across, down),
        "on the right of": (-across, down),
        "on the top of": (down, across),
        "on the bottom of": (-down, across),
    }[relation]
    if along <= 0 or along <= abs(other):
        return 0.0
    overlap = iou(first, second)
    return 1.0 if overlap < IOU_THRESHOLD else IOU_THRESHOLD / overlap


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the intersection over union of two boxes."""
    sides = [max(0.0, min(first[i + 2], second[i + 2]) - max(first[i], second[i])) for i in (0, 1)]
    intersection = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - intersection
    return intersection / union if union else 0.0


def _object(name: str) -> str:
    return "person" if name in PEOPLE else name
