"""Connected components of an image of a scene, with their colours, shapes and sizes.

Tolerates the blur and the slight noise that a VAE leaves.
"""

import dataclasses
import functools
import math

import numpy as np
from scipy import ndimage

from lidit_jax.data.shapes.rendering import coverage
from lidit_jax.data.shapes.scene import BACKGROUND, COLORS, SHAPES, Canvas

# Least distance of a foreground pixel from the background (Euclidean, RGB in 0..255), less than half the distance of
# the palest colour.
_FOREGROUND_DISTANCE = 60.0
# A component has a colour if at least _MIXTURE_SHARE of its pixels lie within _MIXTURE_DISTANCE of a mixture of that
# colour and the background, and its strongest pixels contain at least _MIXTURE_STRENGTH of the colour. No colour is
# closer than 66 to a mixture of another one and the background.
_MIXTURE_DISTANCE = 45.0
_MIXTURE_SHARE = 0.7
_MIXTURE_STRENGTH = 0.6
# Smaller fractions of a colour are background noise.
_MIN_COVERAGE = 0.08
# Components of a smaller area are specks. In units of the smallest radius squared: a quarter of the smallest shape.
_SPECK_AREA = 0.355
# Least soft intersection over union with the mask of a shape for a component to count as that shape.
SHAPE_SCORE = 0.75
# Blurs (standard deviation in pixels) with which masks are compared: none, and about that of a VAE's decoder.
MASK_BLURS = (0.0, 0.8)
# Factors on the smallest and largest radius outside of which a component is no object. An all-red image is not a red
# square.
_SIZE_MARGIN = (0.75, 1.25)

_COLOR_NAMES = tuple(COLORS)
PALETTE = np.array(list(COLORS.values()), np.float32)  # [colors, 3]
BACKGROUND_PIXEL = np.array(BACKGROUND, np.float32)


@dataclasses.dataclass(frozen=True)
class Component:
    """Appearance of one component of an image.

    Attributes:
      color: the colour, as in `SceneObject`; None if it matches no colour of the data set.
      shape: the shape, as in `SceneObject`; None if it matches none.
      size: the size, as in `SceneObject`; None if it is far too small or too large.
      x: centre of the best-fitting shape in pixels from the left.
      y: centre of the best-fitting shape in pixels from the top.
      radius: radius of the best-fitting shape in pixels.
      in_front_of: indices, in the same list of components, of those that this one partly hides.
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
    """Best-fitting shape, its soft intersection over union with a mask, and its centre and radius in pixels."""

    score: float
    shape: str
    x: float
    y: float
    radius: float


def find_components(image: np.ndarray, canvas: Canvas) -> list[Component]:
    """Finds all components except the background and specks; objects that touch form one component.

    Args:
      image: uint8 [H, W, 3].
      canvas: canvas of the expected scene, which gives the sizes of objects.

    Returns:
      The components.

    Raises:
      ValueError: the image is not uint8 [H, W, 3].
    """
    pixels = as_pixels(image)
    labels, count = ndimage.label(foreground(pixels), structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    found = [label for label in range(1, count + 1) if areas[label] >= speck_area(image, canvas)]
    return [read_component(pixels, labels, label, canvas) for label in found]


def as_pixels(image: np.ndarray) -> np.ndarray:
    """Converts an image to float32.

    Raises:
      ValueError: the image is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3]")
    return image.astype(np.float32)


def foreground(pixels: np.ndarray) -> np.ndarray:
    """Returns a mask, bool [H, W], of the pixels [H, W, 3] that differ from the background."""
    return np.linalg.norm(pixels - BACKGROUND_PIXEL, axis=-1) > _FOREGROUND_DISTANCE


def speck_area(image: np.ndarray, canvas: Canvas) -> float:
    """Returns the area in pixels below which a component counts as a speck."""
    return _SPECK_AREA * (canvas.small[0] * canvas.in_pixels(*image.shape[:2])[0]) ** 2


def read_component(pixels: np.ndarray, labels: np.ndarray, label: int, canvas: Canvas) -> Component:
    """Classifies an isolated component.

    Args:
      pixels: float32 [H, W, 3].
      labels: int [H, W], the label of each pixel's component; 0 for the background.
      label: label of the component.
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
    """Returns the rows and columns of a component's bounding box, enlarged by `margin` pixels within the image."""
    rows, columns = ndimage.find_objects(labels, label)[label - 1]
    return (
        slice(max(rows.start - margin, 0), rows.stop + margin),
        slice(max(columns.start - margin, 0), columns.stop + margin),
    )


def drop_faint(alpha: np.ndarray, own: np.ndarray) -> None:
    """Sets coverage that is background noise to 0, in place; its sum around a small shape would be significant.

    Args:
      alpha: [h, w], coverage.
      own: bool [h, w], pixels of the component. Their coverage is kept at the noise threshold at least, because a
        component may contain hardly any palette colour (pale cyan, for example) and still needs a position.
    """
    alpha[alpha < _MIN_COVERAGE] = 0
    alpha[own] = np.maximum(alpha[own], _MIN_COVERAGE)


def as_component(fit: Fit, color: int | None, window: tuple[slice, slice], canvas: Canvas, scale: float) -> Component:
    """Converts a fit to a component in image coordinates.

    Args:
      fit: the best fit, in pixels of the window.
      color: index of the colour; None if it matches none.
      window: rows and columns of the window in the image.
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
    """Returns True if a radius, in units of the canvas, is in or near the range of its objects' radii."""
    return _SIZE_MARGIN[0] * canvas.small[0] <= radius <= _SIZE_MARGIN[1] * canvas.large[1]


def unmix(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits each pixel as a mixture of the background and one palette colour, for every colour.

    Args:
      pixels: float32 [H, W, 3].

    Returns:
      The fraction of the colour, 0 to 1, and the distance of the pixel from the mixture, float32 [H, W, colors] each.
    """
    directions = PALETTE - BACKGROUND_PIXEL
    strengths = np.clip((pixels - BACKGROUND_PIXEL) @ (directions / (directions**2).sum(axis=1, keepdims=True)).T, 0, 1)
    mixtures = BACKGROUND_PIXEL + strengths[..., None] * directions  # [H, W, colors, 3]
    return strengths, np.linalg.norm(pixels[..., None, :] - mixtures, axis=-1)


def read_color(strengths: np.ndarray, distances: np.ndarray) -> tuple[int, bool]:
    """Chooses the colour of a set of pixels.

    Args:
      strengths: [N, colors], see `unmix`.
      distances: [N, colors], see `unmix`.

    Returns:
      The index of the best-fitting colour, and whether it fits well.
    """
    # Edge pixels are pale: every colour fits them about equally well, so they hardly affect the sum.
    color = int(distances.sum(axis=0).argmin())
    share = (distances[:, color] <= _MIXTURE_DISTANCE).mean()
    strength = np.quantile(strengths[:, color], 0.9)
    return color, bool(share >= _MIXTURE_SHARE and strength >= _MIXTURE_STRENGTH)


def read_shape(alpha: np.ndarray) -> Fit:
    """Returns the shape that fits the coverage `alpha` [H, W] best.

    Each shape is rendered with the area and centroid of `alpha`, neither of which blur changes.
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
    """Returns the soft intersection over union of two masks [H, W], the best over blurs of the second."""
    return max(
        float(np.minimum(alpha, blurred).sum() / np.maximum(alpha, blurred).sum())
        for blurred in (ndimage.gaussian_filter(mask, blur) if blur else mask for blur in MASK_BLURS)
    )


@functools.cache
def _unit_moments(shape: str) -> tuple[float, float]:
    """Returns the area of a shape of radius 1 and the distance of its centroid below its centre."""
    resolution = 256
    grid = np.arange(-resolution, resolution) + 0.5
    mask = coverage(shape, grid, grid, resolution)
    return float(mask.sum()) / resolution**2, float(mask.sum(axis=1) @ grid / mask.sum()) / resolution
