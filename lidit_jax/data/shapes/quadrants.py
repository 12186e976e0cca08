"""Layout "quadrants": one to four objects, each near the centre of the image, of a half or of a quadrant."""

import numpy as np

from lidit_jax.data.shapes.scene import RELATIONS, SIZES, Canvas, Scene, SceneObject, holds

CANVAS = Canvas()
NUM_OBJECTS_PROBABILITIES = {1: 0.2, 2: 0.6, 3: 0.1, 4: 0.1}

# Distances as fractions of the side. 0.09 is 2.9 px at 32 px, which stays visible after a VAE's blur.
_GAP = 0.09
_BORDER = 0.035
# Distance of the centres of several objects from the middle of the image, and the range by which coordinates vary.
_FROM_MIDDLE = 0.25
_SPREAD = 0.03


def sample_quadrants(rng: np.random.Generator, appearances: list[tuple[str, str]]) -> Scene:
    """Samples a scene in layout "quadrants": sizes and positions of 1 to 4 objects.

    Objects lie fully inside the image, separated by a visible gap, and each stated relation is clear: the centres of
    its two objects are several times farther apart along its axis than across it. One object lies near the middle, two
    lie in opposite halves, and three or four lie in a quadrant each, the only arrangement in which four large ones fit.

    Args:
      rng: random generator.
      appearances: (colour, shape) of each object.

    Returns:
      The scene, which states the relation of each object to the next.
    """
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=len(appearances))]
    radii = np.array([rng.uniform(*CANVAS.radii(size)) for size in sizes])
    centers = _sample_centers(rng, radii)
    objects = tuple(
        SceneObject(shape, color, size, float(x), float(y), float(radius))
        for (color, shape), size, (x, y), radius in zip(appearances, sizes, centers, radii, strict=True)
    )
    return Scene(objects, tuple(_relation(objects, i, i + 1) for i in range(len(objects) - 1)))


def _sample_centers(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    """Samples centres [n, 2]: in the middle, in opposite halves, or in a quadrant each, adjacent to the previous one.

    Centres stay near the middle of their half or quadrant, so that a relation nearly determines where a shape goes. A
    prompt then fixes most of the image, and a model learns the task within minutes.
    """
    side = np.zeros((len(radii), 2))  # side of the middle along each axis: -1, 0 or 1
    if len(radii) == 2:
        side[:, rng.integers(2)] = rng.choice((-1, 1)) * np.array([-1, 1])
    elif len(radii) > 2:
        ring = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        start, direction = rng.integers(4), rng.choice((-1, 1))
        side = ring[(start + direction * np.arange(len(radii))) % 4]
    shifted = side * _FROM_MIDDLE + rng.uniform(-_SPREAD, _SPREAD, side.shape)
    # Keep half the gap to the middle of the image, and the margin to the border.
    nearest, farthest = (_GAP / 2 + radii)[:, None], (0.5 - _BORDER - radii)[:, None]
    return 0.5 + np.where(side == 0, shifted, side * np.clip(side * shifted, nearest, farthest))


def _relation(objects: tuple[SceneObject, ...], i: int, j: int) -> tuple[int, str, int]:
    dx, dy = objects[i].x - objects[j].x, objects[i].y - objects[j].y
    return i, next(relation for relation in RELATIONS if holds(relation, dx, dy)), j
