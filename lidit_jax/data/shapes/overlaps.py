"""Components of an image whose objects may overlap, separated by colour, with their depth order."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from lidit_jax.data.shapes.reading import (
    BACKGROUND_PIXEL,
    PALETTE,
    SHAPE_SCORE,
    Component,
    Fit,
    as_component,
    as_pixels,
    drop_faint,
    foreground,
    has_object_size,
    overlap_score,
    read_color,
    read_component,
    read_shape,
    speck_area,
    unmix,
    window_around,
)
from lidit_jax.data.shapes.rendering import coverage
from lidit_jax.data.shapes.scene import SHAPES, SIZES, Canvas

# Least number of adjacent pixel pairs for two regions to be in contact.
_MIN_CONTACT = 3
# Largest distance in pixels at which an unassigned pixel counts as the edge of a region.
_MAX_EDGE_DISTANCE = 2.5
# Least overlap, as a fraction of the smaller object's area, that counts as hiding; scenes have at least 0.25.
_MIN_HIDDEN = 0.08
# Radii tried for a partly hidden object, relative to the mean radius of each size, and the steps in pixels by which the
# best fits are refined.
_TRIED_RADII = (0.93, 1.07)
_STEPS = (0.7, 0.35, 0.18)
# Shapes whose score at whole-pixel positions is this much below the best one's are not refined.
_REFINING_MARGIN = 0.12
# FFT sizes are rounded up to a multiple of this.
_SIZE_MULTIPLE = 16


def find_overlapping_components(image: np.ndarray, canvas: Canvas) -> list[Component]:
    """Finds all components except the background and specks; each connected region of one colour is a component.

    An isolated region is matched with whole shapes. Of two regions in contact, the one in front is a whole shape and
    the other the visible rest of one; the order that fits both regions best is chosen.

    Args:
      image: uint8 [H, W, 3].
      canvas: canvas of the expected scene, which gives the sizes of objects.

    Returns:
      The components, with `in_front_of` set.

    Raises:
      ValueError: the image is not uint8 [H, W, 3].
    """
    pixels = as_pixels(image)
    labels = _segment(pixels, speck_area(image, canvas))
    count = int(labels.max())
    contacts = _contacts(labels)
    components = {
        label: read_component(pixels, labels, label, canvas)
        for label in range(1, count + 1)
        if not any(label in pair for pair in contacts)
    }
    touching = sorted({label for pair in contacts for label in pair})
    if touching:
        components |= _read_touching(pixels, labels, touching, contacts, canvas)
    return [components[label] for label in range(1, count + 1)]


# --- regions ----------------------------------------------------------------------------------------------------


def _segment(pixels: np.ndarray, least_area: float) -> np.ndarray:
    """Labels connected regions of one colour.

    Where two colours meet, mixed pixels may look like a third colour. Such seams are thin, so a region must contain a
    pixel with all four neighbours. Pixels of seams and edges are assigned to the nearest region.

    Args:
      pixels: float32 [H, W, 3].
      least_area: smallest area of a region in pixels.

    Returns:
      int [H, W], the number of the region from 1; 0 outside all regions.
    """
    is_foreground = foreground(pixels)
    colors = np.where(is_foreground, unmix(pixels)[1].argmin(axis=-1), -1)
    labels, count = np.zeros(colors.shape, int), 0
    for color in range(len(PALETTE)):
        found, number = ndimage.label(colors == color, structure=np.ones((3, 3)))
        if not number:
            continue
        areas = np.bincount(found.ravel(), minlength=number + 1)
        cores = np.bincount((found * ndimage.binary_erosion(colors == color)).ravel(), minlength=number + 1)
        for label in range(1, number + 1):
            if areas[label] >= least_area and cores[label]:
                count += 1
                labels[found == label] = count
    if count:
        distances, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
        edge = is_foreground & (labels == 0) & (distances <= _MAX_EDGE_DISTANCE)
        labels[edge] = labels[tuple(nearest)][edge]
    return labels


def _contacts(labels: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs of labels whose regions are in contact, the smaller label first."""
    pairs: list[np.ndarray] = []
    for first, second in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        meet = (first != second) & (first > 0) & (second > 0)
        pairs.append(np.sort(np.stack([first[meet], second[meet]], axis=-1), axis=-1))
    found, numbers = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    return [tuple(pair) for pair, number in zip(found.tolist(), numbers, strict=True) if number >= _MIN_CONTACT]


# --- regions in contact -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Region:
    """One of several regions in contact. All coordinates are in pixels of a common window.

    Attributes:
      color: index of the colour that explains the region best.
      has_color: whether that colour explains it well.
      alpha: [h, w], coverage of each pixel by the region.
      whole_fit: the best fit of a whole shape.
    """

    color: int
    has_color: bool
    alpha: np.ndarray
    whole_fit: Fit


def _read_touching(
    pixels: np.ndarray, labels: np.ndarray, touching: list[int], contacts: list[tuple[int, int]], canvas: Canvas
) -> dict[int, Component]:
    scale, _, _ = canvas.in_pixels(*labels.shape)
    window = window_around(np.isin(labels, touching).astype(int), 1, 2 + int(canvas.large[1] * scale))
    pixels, labels = pixels[window], labels[window]
    regions = {label: _read_region(pixels, labels, label) for label in touching}
    hidden_by: dict[int, list[int]] = {label: [] for label in touching}
    fits = {label: region.whole_fit for label, region in regions.items()}
    for first, second in contacts:
        if order := _choose_front(regions, first, second, canvas, scale):
            front, back, fit = order
            fits[back] = fit
            hidden_by[back].append(front)
    for label, fronts in hidden_by.items():
        if len(fronts) > 1:
            visible = _visible([regions[front].whole_fit for front in fronts], labels.shape)
            fits[label] = _fit_visible(regions[label].alpha, visible, canvas, scale)
    hides: dict[int, set[int]] = {label: set() for label in touching}
    for back, fronts in hidden_by.items():
        for front in fronts:
            if _overlap_fraction(fits[front], fits[back], labels.shape) >= _MIN_HIDDEN:
                hides[front].add(back - 1)  # labels count from 1, indices from 0
    return {
        label: dataclasses.replace(
            as_component(fits[label], region.color if region.has_color else None, window, canvas, scale),
            in_front_of=frozenset(hides[label]),
        )
        for label, region in regions.items()
    }


def _read_region(pixels: np.ndarray, labels: np.ndarray, label: int) -> _Region:
    own = labels == label
    strengths, distances = unmix(pixels[own])
    color, has_color = read_color(strengths, distances)
    others = (labels > 0) & ~own
    alpha = unmix(pixels)[0][..., color]
    if others.any():
        # Near another region, pixels are mixtures of three colours.
        nearest = ndimage.distance_transform_edt(~others, return_distances=False, return_indices=True)
        other_colors = _region_colors(pixels, labels)[labels[tuple(nearest)]]
        near = ndimage.binary_dilation(others, iterations=3)
        alpha = np.where(near, _fraction_of_first(pixels, PALETTE[color], PALETTE[other_colors]), alpha)
    alpha[~ndimage.binary_dilation(own, iterations=3)] = 0
    drop_faint(alpha, own)
    return _Region(color, has_color, alpha, read_shape(alpha))


def _region_colors(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the colour index of each region, int [labels], indexed by label."""
    colors = np.zeros(labels.max() + 1, int)
    for label in np.unique(labels[labels > 0]).tolist():
        colors[label] = read_color(*unmix(pixels[labels == label]))[0]
    return colors


def _fraction_of_first(pixels: np.ndarray, color: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Fits each pixel as a mixture of the background and two colours and returns the fraction of the first colour.

    Args:
      pixels: [h, w, 3].
      color: [3], the first colour.
      others: [h, w, 3], the second colour of each pixel.

    Returns:
      [h, w], the fraction of the first colour, 0 to 1.
    """
    a, b, p = color - BACKGROUND_PIXEL, others - BACKGROUND_PIXEL, pixels - BACKGROUND_PIXEL
    aa, ab, bb = a @ a, b @ a, (b * b).sum(axis=-1)
    pa, pb = p @ a, (p * b).sum(axis=-1)
    determinant = np.maximum(aa * bb - ab * ab, 1e-3 * aa * bb)
    first, second = (pa * bb - pb * ab) / determinant, (pb * aa - pa * ab) / determinant
    # Clamp negative fractions to 0 and refit the pixel with the other colour alone.
    first = np.where(second < 0, pa / aa, first)
    second = np.where(first < 0, pb / bb, np.maximum(second, 0))
    first = np.maximum(first, 0)
    return np.clip(first / np.maximum(first + second, 1), 0, 1)


def _choose_front(
    regions: dict[int, _Region], first: int, second: int, canvas: Canvas, scale: float
) -> tuple[int, int, Fit] | None:
    """Returns (front label, back label, fit of the back region); None if neither region is a whole shape."""
    orders = []
    for front, back in ((first, second), (second, first)):
        whole_fit = regions[front].whole_fit
        if whole_fit.score >= SHAPE_SCORE and has_object_size(whole_fit.radius / scale, canvas):
            alpha = regions[back].alpha
            orders.append((front, back, _fit_visible(alpha, _visible([whole_fit], alpha.shape), canvas, scale)))
    return max(orders, key=lambda order: regions[order[0]].whole_fit.score + order[2].score, default=None)


def _mask(fit: Fit, shape: tuple[int, int]) -> np.ndarray:
    return coverage(fit.shape, np.arange(shape[1]) + 0.5 - fit.x, np.arange(shape[0]) + 0.5 - fit.y, fit.radius)


def _visible(fronts: list[Fit], shape: tuple[int, int]) -> np.ndarray:
    """Returns the fraction of each pixel that the given shapes do not cover."""
    return np.prod([1 - _mask(front, shape) for front in fronts], axis=0)


def _overlap_fraction(front: Fit, back: Fit, shape: tuple[int, int]) -> float:
    """Returns the intersection of two shapes as a fraction of the smaller one's area."""
    first, second = _mask(front, shape), _mask(back, shape)
    return float((first * second).sum() / min(first.sum(), second.sum()))


def _fit_visible(alpha: np.ndarray, visible: np.ndarray, canvas: Canvas, scale: float) -> Fit:
    """Fits a partly hidden shape to its visible area.

    Args:
      alpha: [h, w], coverage by the region.
      visible: [h, w], fraction of each pixel that is not hidden.
      canvas: canvas of the scene, which gives the radii to try.
      scale: pixels per unit of the canvas.

    Returns:
      The best fit.
    """
    radii = [scale * factor * sum(canvas.radii(size)) / 2 for size in SIZES for factor in _TRIED_RADII]
    # Rounded up to few distinct sizes, so that cached spectra are reused, with room for shapes that leave the window.
    padded = tuple(_SIZE_MULTIPLE * math.ceil((length + max(radii)) / _SIZE_MULTIPLE) for length in alpha.shape)
    spectra, area = np.fft.rfft2(np.stack([alpha, visible]), padded), float(alpha.sum())
    coarse = [_best_at_whole_pixels(spectra, area, shape, radii, alpha.shape, padded) for shape in SHAPES]
    best = max(fit.score for fit in coarse)
    refined = [_refine(alpha, visible, fit) for fit in coarse if fit.score > best - _REFINING_MARGIN]
    return max(refined, key=lambda fit: fit.score)


def _best_at_whole_pixels(
    spectra: np.ndarray,
    alpha_area: float,
    shape: str,
    radii: Sequence[float],
    window: tuple[int, int],
    padded: tuple[int, int],
) -> Fit:
    """Returns the best fit of a shape whose centre is the centre of a pixel of the window.

    Args:
      spectra: complex [2, …], spectra of the padded coverage and visibility.
      alpha_area: sum of the coverage.
      shape: one of `SHAPES`.
      radii: radii in pixels to try.
      window: height and width of the window.
      padded: height and width of the padded arrays.
    """
    fits = []
    for radius in radii:
        # Cross-correlation with the shape centred on pixel (0, 0): for each position, the shape's overlap with the
        # coverage, and its visible area.
        products = spectra * _conjugate_spectrum(shape, radius, padded)
        common, area = np.fft.irfft2(products, padded)[:, : window[0], : window[1]]
        scores = common / (alpha_area + area - common)
        y, x = np.unravel_index(scores.argmax(), scores.shape)
        fits.append(Fit(float(scores[y, x]), shape, float(x) + 0.5, float(y) + 0.5, radius))
    return max(fits, key=lambda fit: fit.score)


@functools.lru_cache(maxsize=1024)
def _conjugate_spectrum(shape: str, radius: float, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.fft.fftfreq(length, 1 / length) for length in size)
    return np.conj(np.fft.rfft2(coverage(shape, columns, rows, radius))).astype(np.complex64)


def _refine(alpha: np.ndarray, visible: np.ndarray, fit: Fit) -> Fit:
    """Improves a fit by coordinate descent over position and radius, with decreasing steps."""

    def fit_at(x: float, y: float, radius: float) -> Fit:
        moved = Fit(0.0, fit.shape, x, y, radius)
        mask = _mask(moved, alpha.shape) * visible
        return dataclasses.replace(moved, score=float(np.minimum(alpha, mask).sum() / np.maximum(alpha, mask).sum()))

    best = fit_at(fit.x, fit.y, fit.radius)
    for step in _STEPS:
        for (dx, dy, dr), sign in itertools.product(((1, 0, 0), (0, 1, 0), (0, 0, 1)), (step, -step)):
            while (moved := fit_at(best.x + sign * dx, best.y + sign * dy, best.radius + sign * dr)).score > best.score:
                best = moved
    mask = _mask(best, alpha.shape) * visible
    return dataclasses.replace(best, score=overlap_score(alpha, mask))
