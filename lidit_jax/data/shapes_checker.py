"""The exact judge of the built-in data set: which objects, colours, shapes, sizes and relations a picture has right.

It segments the picture from the plain background, reads each connected component's colour, shape and size, and
assigns components to the scene's objects. Blur and slight noise, as a VAE leaves them, do not matter; where the
objects are does not matter either, only how they relate.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np
from scipy import ndimage, optimize

from lidit_jax.data import shapes
from lidit_jax.data.shapes import Scene, SceneObject

# A pixel belongs to an object when it differs from the background by more than this (Euclidean, of 0..255 RGB):
# less than half of what the palest colour differs by.
_FOREGROUND_DISTANCE = 60.0
# A component has a colour when this share of its pixels is within this distance of a mixture of that colour and the
# background, and its strongest pixels are at least so much of it. No colour is closer than 66 to a mixture of another.
_MIXTURE_DISTANCE = 45.0
_MIXTURE_SHARE = 0.7
_MIXTURE_STRENGTH = 0.6
_FAINT = 0.08
# Components of less area are specks, as a share of side²: a quarter of the smallest shape's area.
_SPECK_AREA = 0.006
# Soft intersection over union with a shape's mask, from which on a component is that shape.
_SHAPE_SCORE = 0.75
# Masks are compared as drawn and with this blur (standard deviation in pixels), as a VAE's decoder blurs.
_MASK_BLURS = (0.0, 0.8)
_SIZE_BOUNDARY = math.sqrt(shapes.SIZES["small"][1] * shapes.SIZES["large"][0])
_SIZE_RANGE = (0.75 * shapes.SIZES["small"][0], 1.25 * shapes.SIZES["large"][1])

_COLOR_NAMES = tuple(shapes.COLORS)
_PALETTE = np.array(list(shapes.COLORS.values()), np.float32)  # [colors, 3]
_BACKGROUND = np.array(shapes.BACKGROUND, np.float32)


@dataclasses.dataclass(frozen=True)
class Component:
    """What stands at one place of a picture; None is "like nothing that the data set has".

    x, y (the centre, from the left and the top) and radius are in pixels, those of the best fitting shape.
    """

    color: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class ObjectCheck:
    """What a picture has right of one object of its scene.

    The object is judged by the component assigned to it: one that has its colour or its shape, or else the object
    is missing and all is False. `relation` says whether all stated relations that name it hold, which needs the
    other objects to be there too; it is None if no relation names it.
    """

    color: bool
    shape: bool
    size: bool
    relation: bool | None

    @property
    def pair(self) -> bool:
        """The component that is taken for it has its colour and its shape."""
        return self.color and self.shape

    @property
    def right(self) -> bool:
        """An object of this colour and shape is there and its relations hold (the size is not asked)."""
        return self.pair and self.relation is not False


@dataclasses.dataclass(frozen=True)
class SceneCheck:
    """One check per object of the scene, in its order, and the number of components that are none of them."""

    objects: tuple[ObjectCheck, ...]
    extra: int

    @property
    def all_right(self) -> bool:
        return self.extra == 0 and all(item.right for item in self.objects)


def check(image: np.ndarray, scene: Scene) -> SceneCheck:
    """Judges a picture against its scene.

    Args:
      image: uint8 [H, W, 3].
      scene: what the picture should show. Its positions only settle which of two equally fitting components is
        which object.

    Raises:
      ValueError: the image is not uint8 [H, W, 3].
    """
    components = find_components(image)
    height, width, _ = image.shape
    assigned = _assign(components, scene, height, width)
    relations = [
        (i, j, _relation_holds(relation, assigned.get(i), assigned.get(j))) for i, relation, j in scene.relations
    ]
    objects = []
    for index, item in enumerate(scene.objects):
        component = assigned.get(index)
        held = [is_held for i, j, is_held in relations if index in (i, j)]
        objects.append(
            ObjectCheck(
                color=component is not None and component.color == item.color,
                shape=component is not None and component.shape == item.shape,
                size=component is not None and component.size == item.size,
                relation=all(held) if held else None,
            )
        )
    return SceneCheck(tuple(objects), extra=len(components) - len(assigned))


# --- what is in the picture -------------------------------------------------------------------------------------


def find_components(image: np.ndarray) -> list[Component]:
    """Everything in the picture that is neither background nor a speck.

    Args:
      image: uint8 [H, W, 3].

    Raises:
      ValueError: the image is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3]")
    pixels = image.astype(np.float32)
    side = min(image.shape[:2])
    foreground = np.linalg.norm(pixels - _BACKGROUND, axis=-1) > _FOREGROUND_DISTANCE
    labels, count = ndimage.label(foreground, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    found = [label for label in range(1, count + 1) if areas[label] >= _SPECK_AREA * side * side]
    return [_read_component(pixels, labels, label, side) for label in found]


def _read_component(pixels: np.ndarray, labels: np.ndarray, label: int, side: int) -> Component:
    margin = 2 + side // 64
    rows, columns = ndimage.find_objects(labels, label)[label - 1]
    top, left = max(rows.start - margin, 0), max(columns.start - margin, 0)
    window = slice(top, rows.stop + margin), slice(left, columns.stop + margin)
    pixels, labels = pixels[window], labels[window]

    strengths, distances = _unmix(pixels)
    color, has_color = _read_color(strengths[labels == label], distances[labels == label])
    best = np.full(labels.shape, color) if has_color else distances.argmin(axis=-1)
    alpha = np.take_along_axis(strengths, best[..., None], axis=-1)[..., 0]  # [h, w]
    alpha[ndimage.binary_dilation((labels != label) & (labels != 0))] = 0
    # Below this it is the background's noise, which would add up over the many pixels around a small shape. The
    # component's own pixels may be that little of any colour (a pale cyan, say), and still have a place.
    alpha[alpha < _FAINT] = 0
    alpha[labels == label] = np.maximum(alpha[labels == label], _FAINT)
    shape, score, x, y, radius = _read_shape(alpha)
    # Far too large or small, it is no object: a picture all red is not a red square.
    is_object = _SIZE_RANGE[0] <= radius / side <= _SIZE_RANGE[1]
    return Component(
        color=_COLOR_NAMES[color] if is_object and has_color else None,
        shape=shape if is_object and score >= _SHAPE_SCORE else None,
        size=("small" if radius / side < _SIZE_BOUNDARY else "large") if is_object else None,
        x=x + left,
        y=y + top,
        radius=radius,
    )


def _unmix(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explains each pixel as a mixture of the background and one palette colour, for each colour.

    Args:
      pixels: float32 [H, W, 3].

    Returns:
      The share of the colour, 0 to 1, and the distance of the pixel from the mixture: float32 [H, W, colors] each.
    """
    directions = _PALETTE - _BACKGROUND
    strengths = np.clip((pixels - _BACKGROUND) @ (directions / (directions**2).sum(axis=1, keepdims=True)).T, 0, 1)
    mixtures = _BACKGROUND + strengths[..., None] * directions  # [H, W, colors, 3]
    return strengths, np.linalg.norm(pixels[..., None, :] - mixtures, axis=-1)


def _read_color(strengths: np.ndarray, distances: np.ndarray) -> tuple[int, bool]:
    """The colour that explains a component's pixels (see `_unmix`; [N, colors]) best, and whether well enough."""
    # Pixels at the edge are pale, so that every colour explains them, and weigh little.
    color = int(distances.sum(axis=0).argmin())
    share = (distances[:, color] <= _MIXTURE_DISTANCE).mean()
    strength = np.quantile(strengths[:, color], 0.9)
    return color, bool(share >= _MIXTURE_SHARE and strength >= _MIXTURE_STRENGTH)


def _read_shape(alpha: np.ndarray) -> tuple[str, float, float, float, float]:
    """The best fitting shape, its soft intersection over union with `alpha` [H, W], its centre and radius in pixels.

    Each shape is drawn with the area and the centre of gravity of `alpha`, which blur does not change.
    """
    columns, rows = np.arange(alpha.shape[1]) + 0.5, np.arange(alpha.shape[0]) + 0.5
    area = alpha.sum()
    center_x, center_y = (alpha.sum(axis=0) @ columns) / area, (alpha.sum(axis=1) @ rows) / area
    fits = []
    for shape in shapes.SHAPES:
        unit_area, unit_offset = _unit_moments(shape)
        radius = math.sqrt(area / unit_area)
        y = center_y - unit_offset * radius
        mask = shapes.coverage(shape, columns - center_x, rows - y, radius)
        for blur in _MASK_BLURS:
            blurred = ndimage.gaussian_filter(mask, blur) if blur else mask
            score = np.minimum(alpha, blurred).sum() / np.maximum(alpha, blurred).sum()
            fits.append((float(score), shape, float(center_x), float(y), radius))
    score, shape, x, y, radius = max(fits)
    return shape, score, x, y, radius


@functools.cache
def _unit_moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1 and how far below its centre its centre of gravity lies."""
    resolution = 256
    grid = np.arange(-resolution, resolution) + 0.5
    mask = shapes.coverage(shape, grid, grid, resolution)
    return float(mask.sum()) / resolution**2, float(mask.sum(axis=1) @ grid / mask.sum()) / resolution


# --- which is which ---------------------------------------------------------------------------------------------


def _assign(components: list[Component], scene: Scene, height: int, width: int) -> dict[int, Component]:
    """For each object that is there, its component: the assignment with the fewest colours and shapes wrong."""
    if not components:
        return {}
    side = min(height, width)
    costs = np.zeros((len(scene.objects), len(components)))
    for i, item in enumerate(scene.objects):
        for k, component in enumerate(components):
            x = (component.x - (width - side) / 2) / side
            y = (component.y - (height - side) / 2) / side
            # Colour weighs a little more than shape, then size, and position only settles ties.
            costs[i, k] = _mismatch(component, item) + 0.01 * math.hypot(x - item.x, y - item.y)
    pairs = zip(*optimize.linear_sum_assignment(costs), strict=True)
    return {int(i): components[k] for i, k in pairs if _is_candidate(components[k], scene.objects[i])}


def _mismatch(component: Component, item: SceneObject) -> float:
    return 1.1 * (component.color != item.color) + (component.shape != item.shape) + 0.1 * (component.size != item.size)


def _is_candidate(component: Component, item: SceneObject) -> bool:
    return component.color == item.color or component.shape == item.shape


def _relation_holds(relation: str, first: Component | None, second: Component | None) -> bool:
    if first is None or second is None:
        return False
    return shapes.holds(relation, first.x - second.x, first.y - second.y)


# --- many pictures ----------------------------------------------------------------------------------------------


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
    """Sums up checks: "objects" (those all right), "pair", "color", "shape", "size", "relation" and "scenes".

    All but "scenes" count objects; "relation" counts only those that a relation names.
    """
    checks = list(checks)
    found = object_accuracies(item for result in checks for item in result.objects)
    return found | {"scenes": Accuracy(sum(result.all_right for result in checks), len(checks))}


def object_accuracies(objects: Iterable[ObjectCheck]) -> dict[str, Accuracy]:
    """As `accuracies`, of objects alone: without "scenes"."""
    objects = list(objects)
    related = [item.relation for item in objects if item.relation is not None]
    return {
        "objects": Accuracy(sum(item.right for item in objects), len(objects)),
        "pair": Accuracy(sum(item.pair for item in objects), len(objects)),
        "color": Accuracy(sum(item.color for item in objects), len(objects)),
        "shape": Accuracy(sum(item.shape for item in objects), len(objects)),
        "size": Accuracy(sum(item.size for item in objects), len(objects)),
        "relation": Accuracy(sum(related), len(related)),
    }
