"""Components of an image of a scene: what stands apart from the background, with its colour, shape and size.

Blur and slight noise, as a VAE leaves them, do not matter.
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import ndimage

from lidit_jax.data.shapes.rendering import coverage
from lidit_jax.data.shapes.scene import BACKGROUND, COLORS, SHAPES, Canvas

# A pixel belongs to an object when it differs from the background by more than this (Euclidean, of 0..255 RGB):
# less than half of what the palest colour differs by.
_FOREGROUND_DISTANCE = 60.0
# A component has a colour when this share of its pixels is within this distance of a mixture of that colour and the
# background, and its strongest pixels are at least so much of it. No colour is closer than 66 to a mixture of another.
_MIXTURE_DISTANCE = 45.0
_MIXTURE_SHARE = 0.7
_MIXTURE_STRENGTH = 0.6
_FAINT = 0.08
# Components of less area are specks, as a share of the smallest radius squared: a quarter of the smallest shape's area.
_SPECK_AREA = 0.355
# Soft intersection over union with a shape's mask, from which on a component is that shape.
SHAPE_SCORE = 0.75
# Masks are compared as drawn and with this blur (standard deviation in pixels), as a VAE's decoder blurs.
MASK_BLURS = (0.0, 0.8)
# Far smaller than small or larger than large, it is no object: an image all red is not a red square.
_SIZE_MARGIN = (0.75, 1.25)

_COLOR_NAMES = tuple(COLORS)
PALETTE = np.array(list(COLORS.values()), np.float32)  # [colors, 3]
BACKGROUND_PIXEL = np.array(BACKGROUND, np.float32)


@dataclasses.dataclass(frozen=True)
class Component:
    """Appearance of one component of an image; None stands for "like nothing that the data set has".

    Attributes:
      color, shape, size: as of a `SceneObject`.
      x, y, radius: centre, from the left and the top, and radius of the best fitting shape, in pixels.
      in_front_of: indices of the components that it hides a part of, in the list where it is found.
    """

    color: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    radius: float
    in_front_of: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Fit:
    """Best fitting shape, its soft intersection over union with a mask, and its centre and radius in pixels."""

    score: float
    shape: str
    x: float
    y: float
    radius: float


def find_components(image: np.ndarray, canvas: Canvas) -> list[Component]:
    """Reads everything in the image that is neither background nor a speck; what touches is one component.

    Args:
      image: uint8 [H, W, 3].
      canvas: of the scene that the image should show, whose sizes of objects are expected.

    Raises:
      ValueError: the image is not uint8 [H, W, 3].
    """
    pixels = as_pixels(image)
    labels, count = ndimage.label(foreground(pixels), structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    found = [label for label in range(1, count + 1) if areas[label] >= speck_area(image, canvas)]
    return [read_component(pixels, labels, label, canvas) for label in found]


def as_pixels(image: np.ndarray) -> np.ndarray:
    """Returns the image as float32. Raises ValueError if it is not uint8 [H, W, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3]")
    return image.astype(np.float32)


def foreground(pixels: np.ndarray) -> np.ndarray:
    """Returns where pixels [H, W, 3] differ from the background: bool [H, W]."""
    return np.linalg.norm(pixels - BACKGROUND_PIXEL, axis=-1) > _FOREGROUND_DISTANCE


def speck_area(image: np.ndarray, canvas: Canvas) -> float:
    """Returns the area in pixels below which a component is a speck."""
    return _SPECK_AREA * (canvas.small[0] * canvas.in_pixels(*image.shape[:2])[0]) ** 2


def read_component(pixels: np.ndarray, labels: np.ndarray, label: int, canvas: Canvas) -> Component:
    """Reads a component that stands alone.

    Args:
      pixels: float32 [H, W, 3].
      labels: int [H, W], which component each pixel belongs to; 0: none.
      label: the one to read.
      canvas: see `find_components`.
    """
    scale, _, _ = canvas.in_pixels(*labels.shape)
    window = window_around(labels, label, 2 + min(labels.shape) // 64)
    pixels, labels = pixels[window], labels[window]
    strengths, distances = unmix(pixels)
    color, has_color = read_color(strengths[labels == label], distances[labels == label])
    best = np.full(labels.shape, color) if has_color else distances.argmin(axis=-1)
    alpha = np.take_along_axis(strengths, best[..., None], axis=-1)[..., 0]  # [h, w]
    alpha[ndimage.binary_dilation((labels != label) & (labels != 0))] = 0
    drop_faint(alpha, labels == label)
    return as_component(read_shape(alpha), color if has_color else None, window, canvas, scale)


def window_around(labels: np.ndarray, label: int, margin: int) -> tuple[slice, slice]:
    """Returns the rows and columns of a component and so many pixels around it, as far as the image goes."""
    rows, columns = ndimage.find_objects(labels, label)[label - 1]
    return (
        slice(max(rows.start - margin, 0), rows.stop + margin),
        slice(max(columns.start - margin, 0), columns.stop + margin),
    )


def drop_faint(alpha: np.ndarray, own: np.ndarray) -> None:
    """Sets shares of a colour that are the background's noise to 0, in place: they add up around a small shape.

    Args:
      alpha: [h, w].
      own: bool [h, w], the component's own pixels. They may be that little of any colour (a pale cyan, say), and still
        have a place.
    """
    alpha[alpha < _FAINT] = 0
    alpha[own] = np.maximum(alpha[own], _FAINT)


def as_component(fit: Fit, color: int | None, window: tuple[slice, slice], canvas: Canvas, scale: float) -> Component:
    """Says what is recognised of a fit.

    Args:
      fit: in pixels of the window.
      color: index of the colour; None: like no colour.
      window: rows and columns of the image.
      canvas: see `find_components`.
      scale: pixels per unit of the canvas.
    """
    is_object = has_object_size(fit.radius / scale, canvas)
    return Component(
        color=_COLOR_NAMES[color] if is_object and color is not None else None,
        shape=fit.shape if is_object and fit.score >= SHAPE_SCORE else None,
        size=("small" if fit.radius / scale < canvas.size_boundary else "large") if is_object else None,
        x=fit.x + window[1].start,
        y=fit.y + window[0].start,
        radius=fit.radius,
    )


def has_object_size(radius: float, canvas: Canvas) -> bool:
    """True if a radius, in units of the canvas, is near those of its objects."""
    return _SIZE_MARGIN[0] * canvas.small[0] <= radius <= _SIZE_MARGIN[1] * canvas.large[1]


def unmix(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explains each pixel as a mixture of the background and one palette colour, for each colour.

    Args:
      pixels: float32 [H, W, 3].

    Returns:
      The share of the colour, 0 to 1, and the distance of the pixel from the mixture: float32 [H, W, colors] each.
    """
    directions = PALETTE - BACKGROUND_PIXEL
    strengths = np.clip((pixels - BACKGROUND_PIXEL) @ (directions / (directions**2).sum(axis=1, keepdims=True)).T, 0, 1)
    mixtures = BACKGROUND_PIXEL + strengths[..., None] * directions  # [H, W, colors, 3]
    return strengths, np.linalg.norm(pixels[..., None, :] - mixtures, axis=-1)


def read_color(strengths: np.ndarray, distances: np.ndarray) -> tuple[int, bool]:
    """Returns the index of the colour that explains pixels (see `unmix`; [N, colors]) best, and if it does so well."""
    # Pixels at the edge are pale, so that every colour explains them, and weigh little.
    color = int(distances.sum(axis=0).argmin())
    share = (distances[:, color] <= _MIXTURE_DISTANCE).mean()
    strength = np.quantile(strengths[:, color], 0.9)
    return color, bool(share >= _MIXTURE_SHARE and strength >= _MIXTURE_STRENGTH)


def read_shape(alpha: np.ndarray) -> Fit:
    """Fits a shape to `alpha` [H, W].

    Each shape is rendered with the area and the centre of gravity of `alpha`, which blur does not change.
    """
    columns, rows = np.arange(alpha.shape[1]) + 0.5, np.arange(alpha.shape[0]) + 0.5
    area = alpha.sum()
    center_x, center_y = (alpha.sum(axis=0) @ columns) / area, (alpha.sum(axis=1) @ rows) / area
    fits = []
    for shape in SHAPES:
        unit_area, unit_offset = _unit_moments(shape)
        radius = math.sqrt(area / unit_area)
        y = center_y - unit_offset * radius
        mask = coverage(shape, columns - center_x, rows - y, radius)
        fits.append((overlap_score(alpha, mask), shape, float(center_x), float(y), radius))
    return Fit(*max(fits))


def overlap_score(alpha: np.ndarray, mask: np.ndarray) -> float:
    """Returns the soft intersection over union of two masks [H, W], the second as it is or blurred."""
    return max(
        float(np.minimum(alpha, blurred).sum() / np.maximum(alpha, blurred).sum())
        for blurred in (ndimage.gaussian_filter(mask, blur) if blur else mask for blur in MASK_BLURS)
    )


@functools.cache
def _unit_moments(shape: str) -> tuple[float, float]:
    """Returns the area of a shape of radius 1 and how far below its centre its centre of gravity lies."""
    resolution = 256
    grid = np.arange(-resolution, resolution) + 0.5
    mask = coverage(shape, grid, grid, resolution)
    return float(mask.sum()) / resolution**2, float(mask.sum(axis=1) @ grid / mask.sum()) / resolution
