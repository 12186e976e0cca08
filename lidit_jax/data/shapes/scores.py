"""Verdicts on images of scenes, and their sums."""

import dataclasses
import math
from collections.abc import Iterable

_OPTIONAL_PARTS = ("depth", "place")
_PARTS = ("color", "shape", "size", "relation", *_OPTIONAL_PARTS)


@dataclasses.dataclass(frozen=True)
class ObjectCheck:
    """Verdict on one object of a scene.

    The object is judged by the component assigned to it: one that has its colour or its shape, or else the object
    is missing and all is False.

    Attributes:
      color, shape, size: the component has the object's; `size` is None where it is not asked.
      relation: all stated relations in space that name the object hold, which needs the other objects to be there too;
        None if no such relation names it.
      depth: the same of "in front of" and "behind".
      place: the stated place holds; None if none is stated.
    """

    color: bool
    shape: bool
    size: bool | None
    relation: bool | None
    depth: bool | None = None
    place: bool | None = None

    @property
    def pair(self) -> bool:
        """The component that is taken for it has its colour and its shape."""
        return self.color and self.shape

    @property
    def right(self) -> bool:
        """An object of this colour and shape is there and all that is stated of where it is holds (not the size)."""
        return self.pair and False not in (self.relation, self.depth, self.place)


@dataclasses.dataclass(frozen=True)
class SceneCheck:
    """Verdicts on the objects of a scene, in its order, and the number of components that are none of them."""

    objects: tuple[ObjectCheck, ...]
    extra: int

    @property
    def all_right(self) -> bool:
        return self.extra == 0 and all(item.right for item in self.objects)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """`correct` of `total`, as a share, with its 95 % Wilson interval; with none, NaN within 0 to 1."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (Wilson, 1927) at 95 %."""
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
    """Sums up verdicts: "objects" (those all right), "pair", "color", "shape", "size", "relation" and "scenes".

    All but "scenes" count objects; "size" and "relation" count only those for which they are asked, and so do "depth"
    and "place", which are there only if they are asked for any.
    """
    checks = list(checks)
    found = object_accuracies(item for result in checks for item in result.objects)
    return found | {"scenes": Accuracy(sum(result.all_right for result in checks), len(checks))}


def object_accuracies(objects: Iterable[ObjectCheck]) -> dict[str, Accuracy]:
    """Sums up as `accuracies`, but for objects alone: without "scenes"."""
    objects = list(objects)
    verdicts = {
        "objects": [item.right for item in objects],
        "pair": [item.pair for item in objects],
        **{name: [getattr(item, name) for item in objects] for name in _PARTS},
    }
    asked = {name: [verdict for verdict in found if verdict is not None] for name, found in verdicts.items()}
    return {
        name: Accuracy(sum(found), len(found)) for name, found in asked.items() if found or name not in _OPTIONAL_PARTS
    }
