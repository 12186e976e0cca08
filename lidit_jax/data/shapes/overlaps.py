"""Components of an image where objects may overlap: told apart by colour, with what is in front of what."""

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

# Two regions touch where so many pixels of one are next to the other.
_CONTACT = 3
# Pixels that belong to no region are a region's edge up to this distance in pixels.
_EDGE = 2.5
# Least part of the smaller object's area that one hides of another; scenes have 0.25.
_HIDDEN = 0.08
# Radii that are tried for a partly hidden object, relative to those of the canvas's sizes, and steps in pixels by which
# the best are refined.
_TRIED_RADII = (0.93, 1.07)
_STEPS = (0.7, 0.35, 0.18)
# Shapes that fit worse by this than the best one at whole pixels are not refined.
_WORTH_REFINING = 0.12
_PADDING = 16


def find_overlapping_components(image: np.ndarray, canvas: Canvas) -> list[Component]:
    """Reads everything in the image that is neither background nor a speck; each region of one colour is a component.

    A component that touches none is read as it is. Of two that touch, the one in front is a shape by itself, and the
    other one the rest of a shape: the order under which both fit best is taken.

    Args:
      image: uint8 [H, W, 3].
      canvas: of the scene that the image should show, whose sizes of objects are expected.

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
    """Numbers the regions of one colour from 1; int [H, W], 0 elsewhere.

    Where two colours meet, the mixed pixels may look like a third. Such seams are thin: a region is one that has a
    pixel with all four neighbours in it. What is left goes to the nearest region.
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
        edge = is_foreground & (labels == 0) & (distances <= _EDGE)
        labels[edge] = labels[tuple(nearest)][edge]
    return labels


def _contacts(labels: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs of regions that touch, the smaller number first."""
    pairs: list[np.ndarray] = []
    for first, second in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        meet = (first != second) & (first > 0) & (second > 0)
        pairs.append(np.sort(np.stack([first[meet], second[meet]], axis=-1), axis=-1))
    found, numbers = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    return [tuple(pair) for pair, number in zip(found.tolist(), numbers, strict=True) if number >= _CONTACT]


# --- regions that touch -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Region:
    """One of several regions that touch: its colour, its share of each pixel [h, w], and itself as a shape of its own.

    All are in pixels of the same window.
    """

    color: int
    has_color: bool
    alpha: np.ndarray
    alone: Fit


def _read_touching(
    pixels: np.ndarray, labels: np.ndarray, touching: list[int], contacts: list[tuple[int, int]], canvas: Canvas
) -> dict[int, Component]:
    scale, _, _ = canvas.in_pixels(*labels.shape)
    window = window_around(np.isin(labels, touching).astype(int), 1, 2 + int(canvas.large[1] * scale))
    pixels, labels = pixels[window], labels[window]
    regions = {label: _read_region(pixels, labels, label) for label in touching}
    hidden_by: dict[int, list[int]] = {label: [] for label in touching}
    fits = {label: region.alone for label, region in regions.items()}
    for first, second in contacts:
        if order := _choose_front(regions, first, second, canvas, scale):
            front, back, fit = order
            fits[back] = fit
            hidden_by[back].append(front)
    for label, fronts in hidden_by.items():
        if len(fronts) > 1:
            visible = _visible([regions[front].alone for front in fronts], labels.shape)
            fits[label] = _fit_visible(regions[label].alpha, visible, canvas, scale)
    hides: dict[int, set[int]] = {label: set() for label in touching}
    for back, fronts in hidden_by.items():
        for front in fronts:
            if _hidden_share(fits[front], fits[back], labels.shape) >= _HIDDEN:
                hides[front].add(back - 1)  # as an index
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
        alpha = np.where(near, _share_of_two(pixels, PALETTE[color], PALETTE[other_colors]), alpha)
    alpha[~ndimage.binary_dilation(own, iterations=3)] = 0
    drop_faint(alpha, own)
    return _Region(color, has_color, alpha, read_shape(alpha))


def _region_colors(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the colour of each region by its number."""
    colors = np.zeros(labels.max() + 1, int)
    for label in np.unique(labels[labels > 0]).tolist():
        colors[label] = read_color(*unmix(pixels[labels == label]))[0]
    return colors


def _share_of_two(pixels: np.ndarray, color: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Explains each pixel as a mixture of the background, one colour and another, and returns the first one's share.

    Args:
      pixels: [h, w, 3].
      color: [3].
      others: [h, w, 3].
    """
    a, b, p = color - BACKGROUND_PIXEL, others - BACKGROUND_PIXEL, pixels - BACKGROUND_PIXEL
    aa, ab, bb = a @ a, b @ a, (b * b).sum(axis=-1)
    pa, pb = p @ a, (p * b).sum(axis=-1)
    determinant = np.maximum(aa * bb - ab * ab, 1e-3 * aa * bb)
    first, second = (pa * bb - pb * ab) / determinant, (pb * aa - pa * ab) / determinant
    # A negative share is none; then the other colour explains what there is.
    first = np.where(second < 0, pa / aa, first)
    second = np.where(first < 0, pb / bb, np.maximum(second, 0))
    first = np.maximum(first, 0)
    return np.clip(first / np.maximum(first + second, 1), 0, 1)


def _choose_front(
    regions: dict[int, _Region], first: int, second: int, canvas: Canvas, scale: float
) -> tuple[int, int, Fit] | None:
    """Returns which of two regions is in front, which behind, and the latter's fit; None if neither is a shape."""
    orders = []
    for front, back in ((first, second), (second, first)):
        alone = regions[front].alone
        if alone.score >= SHAPE_SCORE and has_object_size(alone.radius / scale, canvas):
            alpha = regions[back].alpha
            orders.append((front, back, _fit_visible(alpha, _visible([alone], alpha.shape), canvas, scale)))
    return max(orders, key=lambda order: regions[order[0]].alone.score + order[2].score, default=None)


def _mask(fit: Fit, shape: tuple[int, int]) -> np.ndarray:
    return coverage(fit.shape, np.arange(shape[1]) + 0.5 - fit.x, np.arange(shape[0]) + 0.5 - fit.y, fit.radius)


def _visible(fronts: list[Fit], shape: tuple[int, int]) -> np.ndarray:
    """Returns the share of each pixel that these shapes leave to be seen."""
    return np.prod([1 - _mask(front, shape) for front in fronts], axis=0)


def _hidden_share(front: Fit, back: Fit, shape: tuple[int, int]) -> float:
    """Returns the area that two shapes share, as a share of the smaller one's."""
    first, second = _mask(front, shape), _mask(back, shape)
    return float((first * second).sum() / min(first.sum(), second.sum()))


def _fit_visible(alpha: np.ndarray, visible: np.ndarray, canvas: Canvas, scale: float) -> Fit:
    """Fits a shape, of which only some is visible, to what is seen of it.

    Args:
      alpha: [h, w], what is seen.
      visible: [h, w], what could be seen.
    """
    radii = [scale * factor * sum(canvas.radii(size)) / 2 for size in SIZES for factor in _TRIED_RADII]
    # Few different sizes, so that spectra are found in the cache, with room for a shape that reaches out of the window.
    padded = tuple(_PADDING * math.ceil((length + max(radii)) / _PADDING) for length in alpha.shape)
    seen, area = np.fft.rfft2(np.stack([alpha, visible]), padded), float(alpha.sum())
    coarse = [_best_at_whole_pixels(seen, area, shape, radii, alpha.shape, padded) for shape in SHAPES]
    best = max(fit.score for fit in coarse)
    refined = [_refine(alpha, visible, fit) for fit in coarse if fit.score > best - _WORTH_REFINING]
    return max(refined, key=lambda fit: fit.score)


def _best_at_whole_pixels(
    seen: np.ndarray,
    alpha_area: float,
    shape: str,
    radii: Sequence[float],
    window: tuple[int, int],
    padded: tuple[int, int],
) -> Fit:
    """Returns the best fit of a shape with its centre at the middle of a pixel of the window.

    Args:
      seen: [2, …], spectra of what is seen and of what could be seen, padded.
      alpha_area: of what is seen.
    """
    fits = []
    for radius in radii:
        # Cross-correlation with the shape around the pixel (0, 0): what is seen, and could be, of it at each pixel.
        products = seen * _conjugate_spectrum(shape, radius, padded)
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
    """Moves and scales a shape by smaller and smaller steps as long as it fits better."""

    def scored(x: float, y: float, radius: float) -> Fit:
        moved = Fit(0.0, fit.shape, x, y, radius)
        mask = _mask(moved, alpha.shape) * visible
        return dataclasses.replace(moved, score=float(np.minimum(alpha, mask).sum() / np.maximum(alpha, mask).sum()))

    best = scored(fit.x, fit.y, fit.radius)
    for step in _STEPS:
        for (dx, dy, dr), sign in itertools.product(((1, 0, 0), (0, 1, 0), (0, 0, 1)), (step, -step)):
            while (moved := scored(best.x + sign * dx, best.y + sign * dy, best.radius + sign * dr)).score > best.score:
                best = moved
    mask = _mask(best, alpha.shape) * visible
    return dataclasses.replace(best, score=overlap_score(alpha, mask))
