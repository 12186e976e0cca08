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
# Smallest radius in pixels: a VAE with 8x down-sampling loses smaller shapes.
MIN_RADIUS = 4.5

# Lengths in units of the canvas, whose area is 1, before multiplication by the layout's scale. At 64x64 px and scale 1,
# radii are 5.6 to 6.3 px (small) and 8.3 to 9 px (large), and gaps are at least 3 px.
_SMALL = (0.088, 0.098)
_LARGE = (0.13, 0.14)
_GAP = 0.047
_BORDER = 0.03
# Largest fraction of the canvas that small objects and the gaps around them may cover. Squares placed at random jam at
# 0.56; above 0.4 random placement rarely succeeds.
_DENSITY = 0.4

# A relation is stated only if it is clear: the least ratio of the distance along its axis to the distance across it,
# and the least distance along its axis.
_CLEAR_RATIO = 2.0
_CLEAR_DISTANCE = 0.12
_PLACE_MARGIN = 0.07
# Most objects in one chain of relations.
_MAX_CHAIN = 4
_NO_PLACE_PROBABILITY = 0.3  # fraction of one-object scenes that state no place

_ATTEMPTS = 200
_POSITIONS = 24  # positions tried for each object
_STATEMENTS = 8  # sets of statements tried for each arrangement

# Range of the overlap at the measured radii, as a fraction of the smaller object's area. For any radii within the
# ranges of the sizes, the overlap then stays within 0.25 to 0.45.
_OVERLAP = (0.29, 0.385)
# Radii in pixels at which overlaps are measured.
_MEASURED_RADIUS = {"small": 22, "large": 32}
_MEASURED_STEP = 4


def canvas_of(height: int, width: int, scale: float) -> Canvas:
    """Returns a canvas of area 1 with the aspect ratio of height x width and radii multiplied by `scale`.

    Images of equal area therefore show objects of equal size in pixels, whatever their aspect ratio.
    """
    unit = math.sqrt(height * width)
    small, large = ((scale * low, scale * high) for low, high in (_SMALL, _LARGE))
    return Canvas(width / unit, height / unit, small, large)


def max_objects(canvas: Canvas) -> int:
    """Returns the number of objects that fit on the canvas with room to spare, 0 to `MAX_OBJECTS`."""
    scale = canvas.small[1] / _SMALL[1]
    inner = [extent + scale * (_GAP - 2 * _BORDER) for extent in (canvas.width, canvas.height)]
    if min(inner) < 2 * canvas.large[1] + scale * _GAP:
        return 0
    return min(MAX_OBJECTS, int(_DENSITY * math.prod(inner) / (2 * canvas.small[1] + scale * _GAP) ** 2))


def sample_free(
    rng: np.random.Generator, appearances: list[tuple[str, str]], canvas: Canvas, with_overlap: bool
) -> Scene:
    """Samples a scene in layout "free": sizes, positions, and the relations and places that captions state.

    Objects lie fully inside the canvas, separated by a visible gap. The only exception is one optional pair of objects
    of different colours that overlap by 25 to 45 % of the smaller one's area. Every object is named once, either in a
    chain of clear relations or with a clear place. If large objects do not fit, more objects are small.

    Args:
      rng: random generator.
      appearances: (colour, shape) of each of the 1 to `max_objects(canvas)` objects.
      canvas: the canvas, from `canvas_of`.
      with_overlap: whether two objects overlap; requires at least two different colours.

    Returns:
      The scene, with its objects in the order in which captions name them.

    Raises:
      ValueError: no arrangement was found. Does not occur for up to `max_objects(canvas)` objects.
    """
    colors = [color for color, _ in appearances]
    pair = _sample_pair(rng, colors) if with_overlap else None
    for attempt in range(_ATTEMPTS):
        # After half of the attempts, fall back to small objects only, which always fit.
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
        centers = _sample_centers(rng, radii, canvas, pair, offset)
        chains = centers and _choose_statements(rng, centers, canvas, pair)
        if chains:
            depths = [int(pair is not None and k == pair[1]) for k in range(len(colors))]
            objects = [
                SceneObject(shape, color, size, *center, radius, depth)
                for (color, shape), size, center, radius, depth in zip(
                    appearances, sizes, centers, radii, depths, strict=True
                )
            ]
            return _scene(objects, chains, canvas)
    raise ValueError(f"no arrangement of {len(colors)} objects found on {canvas} in {_ATTEMPTS} attempts")


def _sample_pair(rng: np.random.Generator, colors: list[str]) -> tuple[int, int]:
    """Samples the indices (front, back) of an overlapping pair of objects of different colours."""
    pairs = [(i, j) for i, first in enumerate(colors) for j, second in enumerate(colors) if first != second]
    return pairs[rng.integers(len(pairs))]


# --- positions --------------------------------------------------------------------------------------------------


def _sample_centers(
    rng: np.random.Generator,
    radii: list[float],
    canvas: Canvas,
    pair: tuple[int, int] | None,
    offset: tuple[float, float] | None,
) -> list[tuple[float, float]] | None:
    """Places all objects at random without further overlaps.

    Args:
      rng: random generator.
      radii: radius of each object.
      canvas: the canvas.
      pair: indices (front, back) of the overlapping pair, if any.
      offset: (x, y) from the front object's centre to the back object's, if there is a pair.

    Returns:
      The centre of each object; None if an object found no room.
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
    """Returns True if an object is separated from every obstacle along at least one axis.

    Args:
      x: centre of the object.
      y: centre of the object.
      radius: radius of the object.
      obstacles: (x, y, radius + gap) of each object placed before.
    """
    for other_x, other_y, reach in obstacles:  # a plain loop is fastest, and this check dominates a scene's cost
        if abs(x - other_x) <= radius + reach and abs(y - other_y) <= radius + reach:
            return False
    return True


def _largest_first(radii: list[float], pair: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Returns the order of placement as tuples of objects placed together: the overlapping pair, then by size.

    Large objects go first, while there is still room for them.
    """
    single = sorted(set(range(len(radii))) - set(pair or ()), key=lambda k: -radii[k])
    return ([pair] if pair else []) + [(k,) for k in single]


@functools.cache
def overlap_offsets(front: str, front_size: str, back: str, back_size: str) -> np.ndarray:
    """Computes the offsets from a front to a back object at which their overlap is in the accepted range.

    The overlap is 25 to 45 % of the smaller object's area, and the visible area of the back object is connected.

    Args:
      front: shape of the front object, one of `SHAPES`.
      front_size: size of the front object, one of `SIZES`.
      back: shape of the back object.
      back_size: size of the back object.

    Returns:
      float64 [N, 2], (x, y) offsets divided by the sum of the two radii.
    """
    radii = [_MEASURED_RADIUS[front_size], _MEASURED_RADIUS[back_size]]
    reach = sum(radii) + 1
    grid = np.arange(-reach, reach + 1.0)
    hiding, hidden = (
        coverage(shape, grid, grid, radius) > 0.5 for shape, radius in zip((front, back), radii, strict=True)
    )
    # Cross-correlation: entry [y, x] counts the common pixels after moving the back mask by (y, x), modulo the size.
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

# (object indices in caption order, relations between consecutive objects, place of a single object or None).
_Chain = tuple[list[int], list[str], str | None]


def _choose_statements(
    rng: np.random.Generator, centers: list[tuple[float, float]], canvas: Canvas, pair: tuple[int, int] | None
) -> list[_Chain] | None:
    """Chooses at random which clear relations and places the caption states.

    Returns:
      Chains that name every object once; None if none were found.
    """
    if len(centers) == 1:
        place = _clear_place(centers[0], canvas)
        return [([0], [], None if rng.random() < _NO_PLACE_PROBABILITY else place)]
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
    """Returns the object that overlaps with object `last` and the relation of `last` to it.

    The relation is None if `last` overlaps with no object, or with one that has been named already.
    """
    if pair and last in pair:
        is_back = pair.index(last)
        if pair[1 - is_back] in left:
            return pair[1 - is_back], DEPTH_RELATIONS[is_back]
    return last, None


def _clear_link(last: int, left: list[int], centers: list[tuple[float, float]]) -> tuple[int, str | None]:
    """Returns the first object of `left` to which object `last` has a clear relation, and that relation or None."""
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
    """Returns the first matching place of `PLACES` for each (column, row); None stands for between two of them."""
    places = {}
    for sides in itertools.product((-1, 0, 1, None), repeat=2):
        for place, wanted in PLACES.items():
            if all(side in (None, at) for side, at in zip(wanted, sides, strict=True)):
                places[sides] = place
                break
    return places


_PLACE_OF_SIDES = _place_of_sides()


def _scene(objects: list[SceneObject], chains: list[_Chain], canvas: Canvas) -> Scene:
    """Builds the scene, with its objects in the order of the chains."""
    ordered: list[SceneObject] = []
    relations, places = [], []
    for chain, links, place in chains:
        first = len(ordered)
        relations += [(first + k, relation, first + k + 1) for k, relation in enumerate(links)]
        if place:
            places.append((first, place))
        ordered += [objects[k] for k in chain]
    return Scene(tuple(ordered), tuple(relations), tuple(places), canvas, "free")
