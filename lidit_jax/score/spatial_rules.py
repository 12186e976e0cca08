"""T2I-CompBench's 2D spatial score: is one object where the prompt says, of another? (UniDet_eval/2D_spatial_eval.py)

Pure functions of detections.
"""

import dataclasses
import re
from collections.abc import Sequence

from lidit_jax.score.detectors import Detection

MIN_SCORE = 0.5  # of a detection that counts, and of a picture's score: less is 0
IOU_THRESHOLD = 0.1
# Pixels between centres that are near, in a picture resized for the official detector: its short side has 479 pixels,
# or its long side 480 where that is less.
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
    """Two objects, as detectors name them, and where the first is of the second (of `RELATIONS`)."""

    first: str
    relation: str
    second: str


def parse_spatial(prompt: str) -> SpatialPrompt | None:
    """Of "a X RELATION a Y"; None of any other prompt. People of all kinds are "person", as officially.

    The official script takes spaCy's first and last noun; on all 300 prompts of the validation list that is the same.
    """
    match = _PROMPT.fullmatch(" ".join(prompt.split()))
    if not match:
        return None
    first, relation, second = (part.lower() for part in match.groups())
    return SpatialPrompt(_object(first), relation, _object(second))


def spatial_score(prompt: SpatialPrompt, detections: Sequence[Detection], height: int, width: int) -> float:
    """A picture's score: half the mean certainty of both objects plus half their relation's, 0 below a half.

    So a picture in which one object alone is found has 0. Of several objects of a class it is the surest that counts.

    Args: height, width: of the picture, whose pixels the boxes are in.
    """
    surest = {
        d.label.lower(): d for d in sorted(detections, key=lambda d: d.score) if d.score > MIN_SCORE
    }  # later ones, which are surer, take the places of others
    first, second = surest.get(prompt.first), surest.get(prompt.second)
    score = 0.25 * sum(found.score for found in (first, second) if found)
    if first and second:
        scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
        score += relation_score(prompt.relation, first.box, second.box, scale) / 2
    return score if score >= MIN_SCORE else 0.0


def relation_score(relation: str, first: Sequence[float], second: Sequence[float], scale: float = 1.0) -> float:
    """How well `first` is where the relation says, of `second`: from 0 to 1.

    "Left", "right", "top" and "bottom": 1 where the centres lie further apart along that axis than along the other, in
    that direction; where the boxes overlap by more than an IoU of 0.1, 0.1 / IoU. "Near", "next to", "on side of": 1
    where the centres are less than 150 pixels apart along one axis, else 150 / the larger distance.

    Args:
      first, second: (left, top, right, bottom) in pixels.
      scale: of the picture as the official detector sees it to these pixels.
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
    """Of two boxes, the intersection over the union."""
    sides = [max(0.0, min(first[i + 2], second[i + 2]) - max(first[i], second[i])) for i in (0, 1)]
    intersection = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - intersection
    return intersection / union if union else 0.0


def _object(name: str) -> str:
    return "person" if name in PEOPLE else name
