"""Options of the scene layouts, their validation, and sampling of scenes."""

import dataclasses
from collections.abc import Sequence
from typing import get_args

import numpy as np

from lidit_jax.data.shapes.free import MAX_OBJECTS, MIN_RADIUS, canvas_of, max_objects, sample_free
from lidit_jax.data.shapes.quadrants import NUM_OBJECTS_PROBABILITIES, sample_quadrants
from lidit_jax.data.shapes.scene import COLORS, HELD_OUT_PAIRS, SHAPES, LayoutName, Pairs, Scene
from lidit_jax.errors import UserError

# Probability of each number of objects in layout "free".
FREE_PROBABILITIES = {1: 0.1, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.15, 6: 0.15}

_FREE_VERSION = 1
_ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
_TRAIN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """Options of the scenes that a source samples. Error messages use the names of the config's `data` section.

    Attributes:
      name: "quadrants" (one to four objects, each near the centre of the image, a half or a quadrant) or "free" (one
        to six objects anywhere).
      shares: relative frequencies of scenes with 1, 2, … objects: 4 values for "quadrants", up to 6 for "free". None
        uses the layout's defaults.
      scale: factor on the sizes of objects, which are fractions of the square root of the canvas area. "free" only.
      overlaps: fraction of the scenes of two or more objects in which two overlap. "free" only.
    """

    name: LayoutName = "quadrants"
    shares: tuple[float, ...] | None = None
    scale: float = 1.0
    overlaps: float = 0.0

    def __post_init__(self):
        if self.name not in get_args(LayoutName):
            raise UserError(f'data.layout={self.name!r} is unknown: use "quadrants" or "free"')
        if self.shares is not None:
            object.__setattr__(self, "shares", tuple(self.shares))
            self._check_shares(self.shares)
        if self.name == "quadrants" and (self.scale != 1 or self.overlaps):
            raise UserError(
                f"data.object_scale={self.scale} and data.overlaps={self.overlaps} go with data.layout='free' only: "
                "leave them out"
            )

    def _check_shares(self, shares: Sequence[float]) -> None:
        is_free = self.name == "free"
        fits = 1 <= len(shares) <= MAX_OBJECTS if is_free else len(shares) == len(NUM_OBJECTS_PROBABILITIES)
        are_numbers = fits and all(isinstance(share, int | float) for share in shares)
        if not are_numbers or not all(0 <= share < 1e6 for share in shares) or not sum(shares) > 0:
            counts = f"1, 2, … objects ({MAX_OBJECTS} at most)" if is_free else "1, 2, 3 and 4 objects"
            raise UserError(
                f"data.object_shares={tuple(shares)!r:.80} is invalid: give the relative frequencies of scenes with "
                f"{counts}"
            )

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Probabilities of scenes with 1, 2, … objects; they sum to 1."""
        if self.shares is not None:
            return tuple(np.divide(self.shares, np.sum(self.shares)).tolist())
        return tuple((FREE_PROBABILITIES if self.name == "free" else NUM_OBJECTS_PROBABILITIES).values())

    @property
    def max_objects(self) -> int:
        """Largest number of objects in a scene of this layout."""
        return MAX_OBJECTS if self.name == "free" else len(NUM_OBJECTS_PROBABILITIES)

    @property
    def fingerprint(self) -> str:
        """Options that differ from the default layout, as text to append to a source's fingerprint."""
        shares = f", shares={self.shares}" if self.shares else ""
        if self.name == "quadrants":
            return shares
        return f"{shares}, layout=free({_FREE_VERSION}), scale={self.scale}, overlaps={self.overlaps}"

    def check_canvas(self, height: int, width: int, num_objects: int | None = None) -> None:
        """Checks that images of the given size can show scenes of this layout.

        Args:
          height: height of the images in pixels.
          width: width of the images in pixels.
          num_objects: number of objects in every scene; None uses the layout's probabilities.

        Raises:
          UserError: the images are too small.
        """
        if self.name == "quadrants":
            if min(height, width) < 24:
                raise UserError(
                    f"images of {height}x{width} px are too small to tell shapes apart: use at least 24x24 px"
                )
            return
        canvas = canvas_of(height, width, self.scale)
        pixels, _, _ = canvas.in_pixels(height, width)
        if canvas.small[0] * pixels < MIN_RADIUS:
            least = self.scale * MIN_RADIUS / (canvas.small[0] * pixels)
            raise UserError(
                f"data.object_scale={self.scale} at {height}x{width} px gives objects with a radius of "
                f"{canvas.small[0] * pixels:.1f} px: give at least {least:.2f} for {MIN_RADIUS} px, or larger images"
            )
        most = num_objects or max(k + 1 for k, share in enumerate(self.probabilities) if share)
        if most > max_objects(canvas):
            raise UserError(
                f"data.object_scale={self.scale} at {height}x{width} px leaves room for {max_objects(canvas)} objects, "
                f"not for {most}: use a smaller scale or fewer objects"
            )


QUADRANTS = SceneLayout()


def check_arguments(layout: SceneLayout, num_objects: int | None, pairs: str) -> None:
    """Raises UserError if `num_objects` or `pairs` is not valid for `sample_scene`."""
    if num_objects is not None and not 1 <= num_objects <= layout.max_objects:
        raise UserError(
            f"num_objects={num_objects} is out of range: a scene in layout {layout.name!r} holds 1 to "
            f"{layout.max_objects} objects (None varies the number)"
        )
    if pairs not in get_args(Pairs):
        raise UserError(f'pairs={pairs!r} is unknown: use "train", "held_out" or "all"')


def sample_scene(
    rng: np.random.Generator,
    num_objects: int | None = None,
    pairs: Pairs = "train",
    layout: SceneLayout = QUADRANTS,
    height: int = 1,
    width: int = 1,
) -> Scene:
    """Samples a scene in which no two objects have the same colour and shape.

    Args:
      rng: random generator.
      num_objects: number of objects; None samples it from the layout's probabilities.
      pairs: "train" uses no held-out (colour, shape) pair, "held_out" uses at least one, "all" uses any.
      layout: options of the scene; see `sample_quadrants` and `sample_free` for what is sampled.
      height: height of the image in any unit; layout "free" takes the aspect ratio of its canvas from it.
      width: width of the image in the same unit.

    Returns:
      The scene.

    Raises:
      UserError: `num_objects` is out of the layout's range, or `pairs` is unknown.
    """
    check_arguments(layout, num_objects, pairs)
    if num_objects is None:
        num_objects = 1 + int(np.searchsorted(np.cumsum(layout.probabilities)[:-1], rng.random(), side="right"))
    if layout.name == "quadrants":
        return sample_quadrants(rng, _sample_appearances(rng, num_objects, pairs))
    with_overlap = num_objects > 1 and bool(rng.random() < layout.overlaps)
    appearances = _sample_appearances(rng, num_objects, pairs)
    # Overlapping objects need different colours. Two objects share one in about one scene in eight.
    while with_overlap and len({color for color, _ in appearances}) == 1:
        appearances = _sample_appearances(rng, num_objects, pairs)
    return sample_free(rng, appearances, canvas_of(height, width, layout.scale), with_overlap)


def _sample_appearances(rng: np.random.Generator, num_objects: int, pairs: Pairs) -> list[tuple[str, str]]:
    if pairs != "held_out":
        pool = _TRAIN_PAIRS if pairs == "train" else _ALL_PAIRS
        return [pool[i] for i in rng.choice(len(pool), size=num_objects, replace=False)]
    held_out = HELD_OUT_PAIRS[rng.integers(len(HELD_OUT_PAIRS))]
    others = [pair for pair in _ALL_PAIRS if pair != held_out]
    appearances = [others[i] for i in rng.choice(len(others), size=num_objects - 1, replace=False)]
    appearances.insert(int(rng.integers(num_objects)), held_out)
    return appearances
