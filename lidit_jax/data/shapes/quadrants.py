"""Layout "quadrants": one to four objects, each near the middle of the image, of a half or of a quadrant."""

import numpy as np

from lidit_jax.data.shapes.scene import RELATIONS, SIZES, Canvas, Scene, SceneObject, holds

CANVAS = Canvas()
NUM_OBJECTS_PROBABILITIES = {1: 0.2, 2: 0.6, 3: 0.1, 4: 0.1}

# Distances as fractions of the side. 0.09 is 2.9 px at 32 px: still a gap after a VAE's blur.
_GAP = 0.09
_BORDER = 0.035
# How far from the middle the centres of several objects are, and by how much each coordinate varies.
_FROM_MIDDLE = 0.25
_SPREAD = 0.03


def sample_quadrants(rng: np.random.Generator, appearances: list[tuple[str, str]]) -> Scene:
    """Samples sizes and positions of 1 to 4 objects.

    Objects are fully inside, apart by a visible gap, and each stated relation is clear: the centres of its two
    objects are several times farther apart along its axis than across it. One object is near the middle, two are in
    opposite halves, and of 3 or 4 each sits in its own quadrant, because four large ones fit in no other way.

    Args:
      rng: where the randomness comes from.
      appearances: (colour, shape) of each object.
    """
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=len(appearances))]
    radii = np.array([rng.uniform(*CANVAS.radii(size)) for size in sizes])
    centers = _place(rng, radii)
    objects = tuple(
        SceneObject(shape, color, size, float(x), float(y), float(radius))
        for (color, shape), size, (x, y), radius in zip(appearances, sizes, centers, radii, strict=True)
    )
    return Scene(objects, tuple(_relation(objects, i, i + 1) for i in range(len(objects) - 1)))


def _place(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    """Returns centres [n, 2]: in the middle, in opposite halves, or each in a quadrant next to the last's.

    About the middles of those, and not anywhere: then "left of" says where a shape goes, and what a prompt leaves
    open about an image is little beside what it says, so that a model learns it in minutes.
    """
    side = np.zeros((len(radii), 2))  # of the middle, along each axis: -1, 0 or 1
    if len(radii) == 2:
        side[:, rng.integers(2)] = rng.choice((-1, 1)) * np.array([-1, 1])
    elif len(radii) > 2:
        ring = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        start, direction = rng.integers(4), rng.choice((-1, 1))
        side = ring[(start + direction * np.arange(len(radii))) % 4]
    moved = side * _FROM_MIDDLE + rng.uniform(-_SPREAD, _SPREAD, side.shape)
    # At least half the gap on this side of the middle, and clear of the border.
    nearest, farthest = (_GAP / 2 + radii)[:, None], (0.5 - _BORDER - radii)[:, None]
    return 0.5 + np.where(side == 0, moved, side * np.clip(side * moved, nearest, farthest))


def _relation(objects: tuple[SceneObject, ...], i: int, j: int) -> tuple[int, str, int]:
    dx, dy = objects[i].x - objects[j].x, objects[i].y - objects[j].y
    return i, next(relation for relation in RELATIONS if holds(relation, dx, dy)), j
