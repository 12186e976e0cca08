"""Scenes of coloured shapes: their objects, and tests of whether a relation or a place holds."""

import dataclasses
import math
from typing import Literal

BACKGROUND = (244, 242, 236)
COLORS = {
    "red": (216, 36, 44),
    "yellow": (248, 214, 40),
    "green": (36, 148, 70),
    "blue": (32, 96, 216),
    "purple": (138, 46, 166),
    "black": (34, 34, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
# Unit direction (right, down) from objects[j] to objects[i] in "objects[i] is <relation> objects[j]".
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
DEPTH_RELATIONS = ("in front of", "behind")
OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
}
# Column and row on the canvas, -1, 0 or 1 from the left and the top; None matches any. Corners and the middle come
# first.
PLACES: dict[str, tuple[int | None, int | None]] = {
    "at the top left": (-1, -1),
    "at the top right": (1, -1),
    "at the bottom left": (-1, 1),
    "at the bottom right": (1, 1),
    "in the middle": (0, 0),
    "on the left": (-1, None),
    "on the right": (1, None),
    "at the top": (None, -1),
    "at the bottom": (None, 1),
}
# (colour, shape) pairs that never occur in training scenes. Each colour and each shape occurs in other pairs.
HELD_OUT_PAIRS = (
    ("red", "star"),
    ("green", "circle"),
    ("blue", "triangle"),
    ("purple", "square"),
    ("black", "cross"),
)

Pairs = Literal["train", "held_out", "all"]
LayoutName = Literal["quadrants", "free"]


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Extent of a scene and radii of its objects, in scene units. A square canvas has sides of length 1.

    Attributes:
      width: width of the scene.
      height: height of the scene.
      small: smallest and largest radius of small objects.
      large: smallest and largest radius of large objects.
    """

    width: float = 1.0
    height: float = 1.0
    # At 32 px, small objects are 8.3 to 9 px wide and large ones 11.5 to 12.2 px.
    small: tuple[float, float] = (0.13, 0.14)
    large: tuple[float, float] = (0.18, 0.19)

    def radii(self, size: str) -> tuple[float, float]:
        """Returns the smallest and largest radius of a size, "small" or "large"."""
        return self.small if size == "small" else self.large

    @property
    def size_boundary(self) -> float:
        """Radius from which an object counts as large."""
        return math.sqrt(self.small[1] * self.large[0])

    def in_pixels(self, height: int, width: int) -> tuple[float, float, float]:
        """Returns the scale and position of the canvas in an image of height x width pixels.

        If the aspect ratios differ, the canvas is centred along the longer side, so that nothing is distorted.

        Returns:
          Pixels per unit, and x and y of the canvas's top left corner in pixels.
        """
        scale = min(height / self.height, width / self.width)
        return scale, (width - scale * self.width) / 2, (height - scale * self.height) / 2


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One coloured shape.

    The shape lies within a square of half-side `radius` around its centre.

    Attributes:
      shape: one of `SHAPES`.
      color: one of `COLORS`.
      size: one of `SIZES`.
      x: centre, to the right, in units of the canvas.
      y: centre, downwards, in units of the canvas.
      radius: radius in units of the canvas.
      depth: objects of smaller depth are in front.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    depth: int = 0


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in the order in which captions name them, and the relations and places that captions state.

    Attributes:
      objects: the shapes.
      relations: (i, relation, j) tuples, each meaning "objects[i] is <relation> objects[j]". Sampled scenes have
        j = i + 1: layout "quadrants" states a relation for every two consecutive objects, "free" for some.
      places: (i, place) tuples, each meaning "objects[i] is <place>".
      canvas: extent of the scene and radii of its objects.
      layout: name of the scene's layout.
    """

    objects: tuple[SceneObject, ...]
    relations: tuple[tuple[int, str, int], ...]
    places: tuple[tuple[int, str], ...] = ()
    canvas: Canvas = Canvas()
    layout: LayoutName = "quadrants"


def holds(relation: str, dx: float, dy: float) -> bool:
    """Returns True if a relation holds for an object at offset (dx, dy) from another.

    The offset in the direction of the relation must exceed the offset across it.
    """
    along, across = along_and_across(relation, dx, dy)
    return along > across


def along_and_across(relation: str, dx: float, dy: float) -> tuple[float, float]:
    """Splits an offset into its signed length in the direction of a relation and its absolute length across it."""
    right, down = RELATIONS[relation]
    return right * dx + down * dy, abs(down * dx) + abs(right * dy)


def place_holds(place: str, x: float, y: float) -> bool:
    """Returns True if a centre is at a place of the canvas.

    Args:
      place: one of `PLACES`.
      x: fraction of the canvas's width.
      y: fraction of the canvas's height.
    """
    return all(side is None or is_on_side(at, side) for side, at in zip(PLACES[place], (x, y), strict=True))


def is_on_side(at: float, side: int, margin: float = 0.0) -> bool:
    """Returns True if a coordinate lies near the start (-1), the middle (0) or the end (1) of the canvas.

    Args:
      at: fraction of the canvas's width or height.
      side: -1, 0 or 1.
      margin: least distance from the boundary of the accepted range.
    """
    return side * (at - 0.5) > 0.1 + margin if side else abs(at - 0.5) < 0.2 - margin
