"""Scenes of coloured shapes: what is in one, and which statements about it hold."""

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
# Column and row of the canvas (-1, 0 or 1 from the left and the top); None: any. Corners and the middle come first.
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
# (colour, shape) pairs that never occur in training scenes; each colour and shape occurs in other pairs.
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
    """Extent of a scene and its objects' radii, in units of the scene; a square canvas has a side of 1.

    Attributes:
      width, height: of the area that the scene fills.
      small, large: range of the radii of each size.
    """

    width: float = 1.0
    height: float = 1.0
    # At 32 px, small is 8.3 to 9 px wide and large 11.5 to 12.2 px.
    small: tuple[float, float] = (0.13, 0.14)
    large: tuple[float, float] = (0.18, 0.19)

    def radii(self, size: str) -> tuple[float, float]:
        """Least and greatest radius of a size, "small" or "large"."""
        return self.small if size == "small" else self.large

    @property
    def size_boundary(self) -> float:
        """Radius from which on an object is large."""
        return math.sqrt(self.small[1] * self.large[0])

    def in_pixels(self, height: int, width: int) -> tuple[float, float, float]:
        """Returns pixels per unit, and x and y in pixels of the canvas's corner in an image of height x width px.

        If the aspect ratios differ, the canvas is centred along the longer side, so that nothing is distorted.
        """
        scale = min(height / self.height, width / self.width)
        return scale, (width - scale * self.width) / 2, (height - scale * self.height) / 2


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape: x (to the right) and y (down) of its centre and its radius, in units of its canvas.

    The shape lies within the square of half-side `radius` around its centre. Objects of less `depth` are in front.
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
    """Shapes in the order in which captions name them, and what captions state about them.

    Attributes:
      objects: the shapes.
      relations: (i, relation, j) each, which reads "objects[i] is <relation> objects[j]". A sampled scene of layout
        "quadrants" states one for each two consecutive objects; of "free", for some of them. Always j = i + 1.
      places: (i, place) each, which reads "objects[i] is <place>".
      canvas: extent and radii.
      layout: name of the layout that the scene is of.
    """

    objects: tuple[SceneObject, ...]
    relations: tuple[tuple[int, str, int], ...]
    places: tuple[tuple[int, str], ...] = ()
    canvas: Canvas = Canvas()
    layout: LayoutName = "quadrants"


def holds(relation: str, dx: float, dy: float) -> bool:
    """True if an object at (dx, dy) from another is `relation` it: on that side, and more so than sideways."""
    along, across = along_and_across(relation, dx, dy)
    return along > across


def along_and_across(relation: str, dx: float, dy: float) -> tuple[float, float]:
    """Splits (dx, dy) into the distance in the direction of a relation and the absolute distance across it."""
    right, down = RELATIONS[relation]
    return right * dx + down * dy, abs(down * dx) + abs(right * dy)


def place_holds(place: str, x: float, y: float) -> bool:
    """True if a centre is at a place of the canvas.

    Args:
      place: one of `PLACES`.
      x, y: as fractions of the canvas's width and height.
    """
    return all(side is None or is_on_side(at, side) for side, at in zip(PLACES[place], (x, y), strict=True))


def is_on_side(at: float, side: int, margin: float = 0.0) -> bool:
    """True if a fraction of the canvas's width or height is near its start (-1), its middle (0) or its end (1).

    Args: margin: how far within that range it must be.
    """
    return side * (at - 0.5) > 0.1 + margin if side else abs(at - 0.5) < 0.2 - margin
