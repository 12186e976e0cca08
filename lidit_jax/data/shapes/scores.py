"""Verdicts of the checker on images of scenes, and the accuracies computed from them."""

import dataclasses
import math
from collections.abc import Iterable

_OPTIONAL_CHECKS = ("depth", "place")
_CHECKS = ("color", "shape", "size", "relation", *_OPTIONAL_CHECKS)


@dataclasses.dataclass(frozen=True)
class ObjectCheck:
    """Verdict on one object of a scene, based on the component of the image assigned to it.

    An assigned component has the object's colour or shape. Without one the object is missing and all checks fail.

    Attributes:
      color: whether the component has the object's colour.
      shape: whether the component has the object's shape.
      size: whether the component has the object's size; None if sizes are not checked.
      relation: whether all stated spatial relations of the object hold, for which the other objects must be present
        too; None if it has none.
      depth: whether all stated "in front of" and "behind" relations of the object hold; None if it has none.
      place: whether the object is at the stated place; None if none is stated.
    """

    color: bool
    shape: bool
    size: bool | None
    relation: bool | None
    depth: bool | None = None
    place: bool | None = None

    @property
    def pair(self) -> bool:
        """True if both colour and shape are correct."""
        return self.color and self.shape

    @property
    def right(self) -> bool:
        """True if colour, shape, and all stated relations and places are correct; the size does not count."""
        return self.pair and False not in (self.relation, self.depth, self.place)


@dataclasses.dataclass(frozen=True)
class SceneCheck:
    """Verdicts on all objects of a scene.

    Attributes:
      objects: verdicts in the order of the scene's objects.
      extra: number of components assigned to no object.
    """

    objects: tuple[ObjectCheck, ...]
    extra: int

    @property
    def all_right(self) -> bool:
        """True if every object is right and the image has no other component."""
        return self.extra == 0 and all(item.right for item in self.objects)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy `correct / total` with its 95 % Wilson interval; for a total of 0, NaN and the interval 0 to 1."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """Fraction of correct ones; NaN for a total of 0."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval (Wilson, 1927) at 95 %."""
        if not self.total:
            return 0.0, 1.0
        z = 1.959963984540054
        scale = 1 / (1 + z * z / self.total)
        center = scale * (self.value + z * z / (2 * self.total))
        half = scale * z * math.sqrt(self.value * (1 - self.value) / self.total + (z / (2 * self.total)) ** 2)
        return max(center - half, 0.0), min(center + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f}, {self.correct}/{self.total})"


def accuracies(checks: Iterable[SceneCheck]) -> dict[str, Accuracy]:
    """Aggregates the verdicts on scenes.

    Returns:
      Accuracies by name: "objects" (`ObjectCheck.right`), "pair", "color", "shape", "size", "relation", "depth",
      "place" and "scenes" (`SceneCheck.all_right`). All but "scenes" count objects; "size", "relation", "depth" and
      "place" count only objects for which they were checked. "depth" and "place" are left out if no object was.
    """
    checks = list(checks)
    found = object_accuracies(item for result in checks for item in result.objects)
    return found | {"scenes": Accuracy(sum(result.all_right for result in checks), len(checks))}


def object_accuracies(objects: Iterable[ObjectCheck]) -> dict[str, Accuracy]:
    """Aggregates the verdicts on objects; returns the accuracies of `accuracies` without "scenes"."""
    objects = list(objects)
    verdicts = {
        "objects": [item.right for item in objects],
        "pair": [item.pair for item in objects],
        **{name: [getattr(item, name) for item in objects] for name in _CHECKS},
    }
    checked = {name: [verdict for verdict in found if verdict is not None] for name, found in verdicts.items()}
    return {
        name: Accuracy(sum(found), len(found))
        for name, found in checked.items()
        if found or name not in _OPTIONAL_CHECKS
    }
