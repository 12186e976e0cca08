"""Layout "free": one to six objects anywhere on a canvas of any aspect ratio, two of which may overlap."""

import functools
import itertools
import math

import numpy as np
from scipy import ndimage

from lidit_jax.data.shapes.rendering import coverage
from lidit_jax.data.shapes.scene import (
    DEPTH_RELATIONS,
    PLACES,
    SIZES,
    Canvas,
    Scene,
    SceneObject,
    is_on_side,
)

MAX_OBJECTS = 6
# In pixels; a smaller shape is lost in an 8x VAE.
MIN_RADIUS = 4.5

# All in units of the canvas, whose area is 1, and multiplied by the scale. At 64x64 px and scale 1: radii of 5.6 to
# 6.3 px (small) and 8.3 to 9 px (large), gaps of at least 3 px.
_SMALL = (0.088, 0.098)
_LARGE = (0.13, 0.14)
_GAP = 0.047
_BORDER = 0.03
# Largest share of the canvas that small objects and the gaps around them may take up: 0.56 is where squares placed at
# random jam; from 0.4 on they seldom find room.
_DENSITY = 0.4

# A stated relation is clear: so much farther apart along its axis than across it, and at least so far.
_CLEAR_RATIO = 2.0
_CLEAR_DISTANCE = 0.12
_PLACE_MARGIN = 0.07
# Objects related to one another in one sentence.
_MAX_CHAIN = 4
_STATE_NOTHING = 0.3  # of scenes of one object

_ATTEMPTS = 200
_POSITIONS = 24  # tried for each object
_STATEMENTS = 8  # tried for each arrangement

# Overlap as a share of the smaller object's area: 0.25 to 0.45 for any radii within the ranges of the sizes.
_OVERLAP = (0.29, 0.385)
# Radii in pixels at which overlaps are measured.
_MEASURED_RADIUS = {"small": 22, "large": 32}
_MEASURED_STEP = 4


def canvas_of(height: int, width: int, scale: float) -> Canvas:
    """Returns the canvas of area 1 with the aspect ratio of height x width, and radii multiplied by `scale`.

    So images of the same area, whatever their aspect ratio, show objects of the same size in pixels.
    """
    unit = math.sqrt(height * width)
    small, large = ((scale * low, scale * high) for low, high in (_SMALL, _LARGE))
    return Canvas(width / unit, height / unit, small, large)


def max_objects(canvas: Canvas) -> int:
    """Returns how many objects fit on the canvas with room to spare, 0 to `MAX_OBJECTS`."""
    scale = canvas.small[1] / _SMALL[1]
    inner = [extent + scale * (_GAP - 2 * _BORDER) for extent in (canvas.width, canvas.height)]
    if min(inner) < 2 * canvas.large[1] + scale * _GAP:
        return 0
    return min(MAX_OBJECTS, int(_DENSITY * math.prod(inner) / (2 * canvas.small[1] + scale * _GAP) ** 2))


def sample_free(
    rng: np.random.Generator, appearances: list[tuple[str, str]], canvas: Canvas, with_overlap: bool
) -> Scene:
    """Samples sizes, positions and what captions state of 1 to `max_objects(canvas)` objects.

    Objects are fully inside and apart by a visible gap, but for at most one pair: two of different colours of which
    one hides a part of the other, as large as 25 to 45 % of the smaller one's area. Every object is named once, in a
    chain of clear relations or with a clear place. Where many large ones have no room, there are more small ones.

    Args:
      rng: where the randomness comes from.
      appearances: (colour, shape) of each object.
      canvas: from `canvas_of`.
      with_overlap: two objects overlap; there must be two colours.

    Raises:
      ValueError: no arrangement was found; never for at most `max_objects(canvas)` objects.
    """
    colors = [color for color, _ in appearances]
    pair = _sample_pair(rng, colors) if with_overlap else None
    for attempt in range(_ATTEMPTS):
        # If it does not work out, all small ones do.
        choice = rng.integers(len(SIZES), size=len(colors)) if attempt < _ATTEMPTS // 2 else [0] * len(colors)
        sizes = [SIZES[i] for i in choice]
        radii = [float(rng.uniform(*canvas.radii(size))) for size in sizes]
        offset = None
        if pair:
            (front, back), shapes = pair, [shape for _, shape in appearances]
            offsets = overlap_offsets(shapes[front], sizes[front], shapes[back], sizes[back])
            if not len(offsets):
                continue
            x, y = offsets[rng.integers(len(offsets))].tolist()
            offset = (radii[front] + radii[back]) * x, (radii[front] + radii[back]) * y
        centers = _place(rng, radii, canvas, pair, offset)
        chains = centers and _state(rng, centers, canvas, pair)
        if chains:
            depths = [int(pair is not None and k == pair[1]) for k in range(len(colors))]
            objects = [
                SceneObject(shape, color, size, *center, radius, depth)
                for (color, shape), size, center, radius, depth in zip(
                    appearances, sizes, centers, radii, depths, strict=True
                )
            ]
            return _scene(objects, chains, canvas)
    raise ValueError(f"no room for {len(colors)} objects on {canvas}")


def _sample_pair(rng: np.random.Generator, colors: list[str]) -> tuple[int, int]:
    """Returns the indices of the object in front and of the one behind, which have different colours."""
    pairs = [(i, j) for i, first in enumerate(colors) for j, second in enumerate(colors) if first != second]
    return pairs[rng.integers(len(pairs))]


# --- positions --------------------------------------------------------------------------------------------------


def _place(
    rng: np.random.Generator,
    radii: list[float],
    canvas: Canvas,
    pair: tuple[int, int] | None,
    offset: tuple[float, float] | None,
) -> list[tuple[float, float]] | None:
    """Returns centres, or None where one found no room.

    Args:
      radii: of each object.
      pair: the object in front and the one behind of an overlapping pair.
      offset: x and y from the former to the latter.
    """
    scale = canvas.small[1] / _SMALL[1]
    border, gap = scale * _BORDER, scale * _GAP
    placed: dict[int, tuple[float, float]] = {}
    for group in _largest_first(radii, pair):
        members = [(0.0, 0.0, radii[group[0]])] + [(*offset, radii[k]) for k in group[1:]]
        ranges = []
        for axis, extent in enumerate((canvas.width, canvas.height)):
            low = max(border + member[2] - member[axis] for member in members)
            ranges.append((low, min(extent - border - member[2] - member[axis] for member in members) - low))
        if min(room for _, room in ranges) < 0:
            return None
        obstacles = [(x, y, radii[k] + gap) for k, (x, y) in placed.items()]
        for along_x, along_y in rng.random((_POSITIONS, 2)).tolist():
            left, top = ranges[0][0] + along_x * ranges[0][1], ranges[1][0] + along_y * ranges[1][1]
            centers = [(left + x, top + y) for x, y, _ in members]
            if all(_is_clear(x, y, radius, obstacles) for (x, y), (_, _, radius) in zip(centers, members, strict=True)):
                placed.update(zip(group, centers, strict=True))
                break
        else:
            return None
    return [placed[k] for k in range(len(radii))]


def _is_clear(x: float, y: float, radius: float, obstacles: list[tuple[float, float, float]]) -> bool:
    """True if an object is farther from each obstacle, along one axis, than their radii and the gap add up to."""
    for other_x, other_y, reach in obstacles:  # a loop, because this is most of a scene's cost
        if abs(x - other_x) <= radius + reach and abs(y - other_y) <= radius + reach:
            return False
    return True


def _largest_first(radii: list[float], pair: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Returns what is placed as one, the overlapping pair first: the largest find room as long as there is some."""
    single = sorted(set(range(len(radii))) - set(pair or ()), key=lambda k: -radii[k])
    return ([pair] if pair else []) + [(k,) for k in single]


@functools.cache
def overlap_offsets(front: str, front_size: str, back: str, back_size: str) -> np.ndarray:
    """Measures at which offsets from a front to a back object they overlap as they should.

    The overlap is 25 to 45 % of the smaller one's area, and what is seen of the back object is in one piece.

    Args:
      front, back: one of `SHAPES` each.
      front_size, back_size: one of `SIZES` each.

    Returns:
      float64 [N, 2], x and y, divided by the sum of the two radii.
    """
    radii = [_MEASURED_RADIUS[front_size], _MEASURED_RADIUS[back_size]]
    reach = sum(radii) + 1
    grid = np.arange(-reach, reach + 1.0)
    hiding, hidden = (coverage(shape, grid, grid, radius) > 0.5 for shape, radius in zip((front, back), radii))  # noqa: B905
    # Cross-correlation: the number of pixels in both, where the back one is moved by [y, x] (modulo the size).
    size = (2 * len(grid), 2 * len(grid))
    spectrum = np.fft.rfft2(hiding, size) * np.conj(np.fft.rfft2(hidden, size))
    common = np.rint(np.fft.irfft2(spectrum, size)).astype(int)
    low, high = (share * min(hiding.sum(), hidden.sum()) for share in _OVERLAP)
    steps = range(-reach + reach % _MEASURED_STEP, reach, _MEASURED_STEP)
    offsets = [
        (x, y)
        for y in steps
        for x in steps
        if low <= common[y, x] <= high and _in_one_piece(hidden & ~np.roll(hiding, (-y, -x), axis=(0, 1)))
    ]
    return np.array(offsets, float).reshape(-1, 2) / sum(radii)


def _in_one_piece(mask: np.ndarray) -> bool:
    return ndimage.label(mask[::2, ::2])[1] == 1


# --- what captions state ----------------------------------------------------------------------------------------

# Objects in the order in which they are named; consecutive ones are related, and a single one has a place or None.
_Chain = tuple[list[int], list[str], str | None]


def _state(
    rng: np.random.Generator, centers: list[tuple[float, float]], canvas: Canvas, pair: tuple[int, int] | None
) -> list[_Chain] | None:
    """Chooses at random which clear relations and places tell where the objects are.

    Returns:
      Chains that name every object once, or None if none were found.
    """
    if len(centers) == 1:
        place = _clear_place(centers[0], canvas)
        return [([0], [], None if rng.random() < _STATE_NOTHING else place)]
    places = [_clear_place(center, canvas) for center in centers]
    for _ in range(_STATEMENTS):
        chains = _try_chains(rng, centers, places, pair)
        if chains:
            return chains
    return None


def _try_chains(
    rng: np.random.Generator,
    centers: list[tuple[float, float]],
    places: list[str | None],
    pair: tuple[int, int] | None,
) -> list[_Chain] | None:
    left = rng.permutation(len(centers)).tolist()
    stops = (rng.random(len(centers)) < 0.5).tolist()
    chains: list[_Chain] = []
    while left:
        chain, relations = [left.pop(0)], []
        while left and len(chain) < _MAX_CHAIN:
            last = chain[-1]
            following, relation = _depth_link(last, left, pair)
            if relation is None:
                if stops[last] and (relations or places[last]):
                    break
                following, relation = _clear_link(last, left, centers)
            if relation is None:
                break
            left.remove(following)
            chain.append(following)
            relations.append(relation)
        place = places[chain[0]] if len(chain) == 1 else None
        if len(chain) == 1 and place is None or pair and len(set(pair) & set(chain)) == 1:
            return None
        chains.append((chain, relations, place))
    return chains


def _depth_link(last: int, left: list[int], pair: tuple[int, int] | None) -> tuple[int, str | None]:
    """Returns what overlaps with object `last`, if it has yet to be named, and the relation of `last` to it."""
    if pair and last in pair:
        is_back = pair.index(last)
        if pair[1 - is_back] in left:
            return pair[1 - is_back], DEPTH_RELATIONS[is_back]
    return last, None


def _clear_link(last: int, left: list[int], centers: list[tuple[float, float]]) -> tuple[int, str | None]:
    """Returns the first object of `left` to which object `last` has a clear relation, and that relation."""
    x, y = centers[last]
    for k in left:
        dx, dy = x - centers[k][0], y - centers[k][1]
        if abs(dx) >= max(_CLEAR_DISTANCE, _CLEAR_RATIO * abs(dy)):
            return k, "left of" if dx < 0 else "right of"
        if abs(dy) >= max(_CLEAR_DISTANCE, _CLEAR_RATIO * abs(dx)):
            return k, "above" if dy < 0 else "below"
    return last, None


def _clear_place(center: tuple[float, float], canvas: Canvas) -> str | None:
    return _PLACE_OF_SIDES.get((_clear_side(center[0] / canvas.width), _clear_side(center[1] / canvas.height)))


def _clear_side(at: float) -> int | None:
    return next((side for side in (-1, 0, 1) if is_on_side(at, side, _PLACE_MARGIN)), None)


def _place_of_sides() -> dict[tuple[int | None, int | None], str]:
    """Returns the first place of `PLACES` for each column and row; None is between two of them."""
    places = {}
    for sides in itertools.product((-1, 0, 1, None), repeat=2):
        for place, wanted in PLACES.items():
            if all(side in (None, at) for side, at in zip(wanted, sides, strict=True)):
                places[sides] = place
                break
    return places


_PLACE_OF_SIDES = _place_of_sides()


def _scene(objects: list[SceneObject], chains: list[_Chain], canvas: Canvas) -> Scene:
    """Returns the scene with its objects in the order of the chains."""
    ordered: list[SceneObject] = []
    relations, places = [], []
    for chain, links, place in chains:
        first = len(ordered)
        relations += [(first + k, relation, first + k + 1) for k, relation in enumerate(links)]
        if place:
            places.append((first, place))
        ordered += [objects[k] for k in chain]
    return Scene(tuple(ordered), tuple(relations), tuple(places), canvas, "free")
