"""The built-in data set: scenes of coloured shapes, drawn from a seed and captioned in English and Chinese.

A scene is a few shapes with colours, sizes and spatial relations, so a generated picture can be judged exactly
(`shapes_checker.py`), and some (colour, shape) pairs never occur in training, so binding can be told from memory.
Nothing is stored: example i of a source is a pure function of (seed, i).
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lidit_jax.data.buckets import Bucket, resize_to_cover_and_crop
from lidit_jax.data.sources import Source
from lidit_jax.errors import UserError

BACKGROUND = (244, 242, 236)
COLORS = {
    "red": (216, 36, 44),
    "yellow": (248, 214, 40),
    "green": (36, 148, 70),
    "blue": (32, 96, 216),
    "purple": (138, 46, 166),
    "black": (34, 34, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Radius as a fraction of the picture's side: at 32 px, small is 8.3 to 9 px wide and large 11.5 to 12.2 px.
SIZES = {"small": (0.13, 0.14), "large": (0.18, 0.19)}
# Unit direction (right, down) from objects[j] to objects[i] in "objects[i] is <relation> objects[j]".
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# (colour, shape) pairs that never occur in training scenes; each colour and shape occurs in other pairs.
HELD_OUT_PAIRS = (
    ("red", "star"),
    ("green", "circle"),
    ("blue", "triangle"),
    ("purple", "square"),
    ("black", "cross"),
)
# No training scene has this seed, whatever the run's own seed: pictures and prompts are new even where pairs are not.
HELD_OUT_SEED = 1_000_003
NUM_OBJECTS_PROBABILITIES = {1: 0.2, 2: 0.6, 3: 0.1, 4: 0.1}

# Distances as fractions of the side. 0.09 is 2.9 px at 32 px: still a gap after a VAE's blur.
_GAP = 0.09
_BORDER = 0.035
# How far from the middle the centres of several objects are, and by how much each coordinate varies.
_FROM_MIDDLE = 0.25
_SPREAD = 0.03
_FORMAT_VERSION = 3

Pairs = Literal["train", "held_out", "all"]
Language = Literal["en", "zh"]

_ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
_TRAIN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape: x (to the right) and y (down) of its centre and its radius, as fractions of the picture's side.

    The shape lies within the square of half-side `radius` around its centre.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes in the order in which captions name them.

    Each of `relations` is (i, relation, j) and reads "objects[i] is <relation> objects[j]"; a sampled scene states
    one for each two consecutive objects, with j = i + 1.
    """

    objects: tuple[SceneObject, ...]
    relations: tuple[tuple[int, str, int], ...]


def holds(relation: str, dx: float, dy: float) -> bool:
    """Whether an object at (dx, dy) from another is `relation` it: on that side, and more so than sideways."""
    right, down = RELATIONS[relation]
    along = right * dx + down * dy
    across = abs(down * dx) + abs(right * dy)
    return along > across


# --- sampling ---------------------------------------------------------------------------------------------------


def sample_scene(
    rng: np.random.Generator,
    num_objects: int | None = None,
    pairs: Pairs = "train",
    shares: Sequence[float] | None = None,
) -> Scene:
    """Draws a scene of 1 to 4 objects, no two of the same colour and shape.

    Objects are fully inside, apart by a visible gap, and each stated relation is clear: the centres of its two
    objects are several times farther apart along its axis than across it. One object is near the middle, two are in
    opposite halves, and of 3 or 4 each sits in its own quadrant, because four large ones fit in no other way.

    Args:
      rng: where the randomness comes from.
      num_objects: 1 to 4; None draws it.
      pairs: "train" uses no held-out pair, "held_out" uses at least one, "all" does not care.
      shares: where the number is drawn, how often it is 1, 2, 3 and 4, in any unit; None: `NUM_OBJECTS_PROBABILITIES`.

    Raises:
      UserError: num_objects is not 1 to 4, `pairs` is unknown, or the shares are not four of at least 0, one above it.
    """
    _check_arguments(num_objects, pairs, shares)
    if num_objects is None:
        shares = tuple(NUM_OBJECTS_PROBABILITIES.values()) if shares is None else np.divide(shares, np.sum(shares))
        num_objects = 1 + int(np.searchsorted(np.cumsum(shares)[:-1], rng.random(), side="right"))
    appearances = _sample_appearances(rng, num_objects, pairs)
    sizes = [list(SIZES)[i] for i in rng.integers(len(SIZES), size=num_objects)]
    radii = np.array([rng.uniform(*SIZES[size]) for size in sizes])
    centers = _place(rng, radii)
    objects = tuple(
        SceneObject(shape, color, size, float(x), float(y), float(radius))
        for (color, shape), size, (x, y), radius in zip(appearances, sizes, centers, radii, strict=True)
    )
    return Scene(objects, tuple(_relation(objects, i, i + 1) for i in range(num_objects - 1)))


def _check_arguments(num_objects: int | None, pairs: str, shares: Sequence[float] | None) -> None:
    if num_objects is not None and num_objects not in NUM_OBJECTS_PROBABILITIES:
        raise UserError(f"num_objects is {num_objects}: a scene of shapes holds 1 to 4 objects (or None: it varies)")
    if pairs not in ("train", "held_out", "all"):
        raise UserError(f'pairs is {pairs!r}: use "train", "held_out" or "all"')
    if shares is not None:
        check_shares(shares)


def check_shares(shares: Sequence[float]) -> None:
    """Raises UserError unless they can say how often scenes have 1, 2, 3 and 4 objects."""
    are_numbers = len(shares) == len(NUM_OBJECTS_PROBABILITIES) and all(isinstance(s, int | float) for s in shares)
    if not are_numbers or not all(0 <= share < 1e6 for share in shares) or not sum(shares) > 0:
        raise UserError(f"object_shares={tuple(shares)!r:.80}: give how often scenes have 1, 2, 3 and 4 objects")


def _sample_appearances(rng: np.random.Generator, num_objects: int, pairs: Pairs) -> list[tuple[str, str]]:
    if pairs != "held_out":
        pool = _TRAIN_PAIRS if pairs == "train" else _ALL_PAIRS
        return [pool[i] for i in rng.choice(len(pool), size=num_objects, replace=False)]
    held_out = HELD_OUT_PAIRS[rng.integers(len(HELD_OUT_PAIRS))]
    others = [pair for pair in _ALL_PAIRS if pair != held_out]
    appearances = [others[i] for i in rng.choice(len(others), size=num_objects - 1, replace=False)]
    appearances.insert(int(rng.integers(num_objects)), held_out)
    return appearances


def _place(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    """Centres [n, 2] of 1 to 4 objects: in the middle, in opposite halves, or each in a quadrant next to the last's.

    About the middles of those, and not anywhere: then "left of" says where a shape goes, and what a prompt leaves
    open about a picture is little beside what it says, so that a model learns it in minutes.
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


# --- drawing ----------------------------------------------------------------------------------------------------


def _star() -> list[tuple[float, float]]:
    # Five points; moved down so that it is centred between its top and its feet.
    angles, reach = np.arange(6) * np.pi / 5, np.where(np.arange(6) % 2, 0.5, 1.05)
    return list(zip(reach * np.sin(angles), 0.1 - reach * np.cos(angles), strict=True))


# The right half (x >= 0) of each outline, from top to bottom, y down, within [-1, 1]; all are left-right symmetric.
_HALF_OUTLINES = {
    "square": [(0, -0.88), (0.88, -0.88), (0.88, 0.88), (0, 0.88)],
    "triangle": [(0, -0.92), (1, 0.82), (0, 0.82)],
    "star": _star(),
    "cross": [(0, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34), (0.34, 1), (0, 1)],
}


def _edges(outline: list[tuple[float, float]]) -> tuple[np.ndarray, ...]:
    """Start x, y, step x, y, 1 / length² and step x / step y of each edge, as [edges, 1, 1]."""
    points = np.array(outline, np.float32)
    start, step = points[:-1], np.diff(points, axis=0)
    slope = np.divide(step[:, 0], step[:, 1], out=np.zeros(len(step), np.float32), where=step[:, 1] != 0)
    columns = (*start.T, *step.T, 1 / (step**2).sum(axis=1), slope)
    return tuple(column.astype(np.float32)[:, None, None] for column in columns)


_EDGES = {shape: _edges(outline) for shape, outline in _HALF_OUTLINES.items()}


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, from 0 to 1: its signed distance, clipped to one pixel's width.

    Args:
      shape: one of `SHAPES`.
      dx: [W] pixel centres relative to the shape's centre, in pixels to the right.
      dy: [H] the same, downwards.
      radius: in pixels.

    Returns:
      float32 [H, W].
    """
    x = np.abs(dx, dtype=np.float32)[None, :] / np.float32(radius)
    y = np.asarray(dy, np.float32)[:, None] / np.float32(radius)
    distance = np.sqrt(x * x + y * y) - 1 if shape == "circle" else _polygon_distance(_EDGES[shape], x, y)
    return np.clip(0.5 - distance * np.float32(radius), 0, 1)


def _polygon_distance(edges: tuple[np.ndarray, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of x [1, W] >= 0, y [H, 1] to a shape given by its right half's edges."""
    start_x, start_y, step_x, step_y, inverse_length, slope = edges
    px, py = x - start_x, y - start_y  # [E, 1, W], [E, H, 1]
    t = np.clip((px * step_x + py * step_y) * inverse_length, 0, 1)  # [E, H, W]
    squared = (px - t * step_x) ** 2 + (py - t * step_y) ** 2
    # Even-odd rule, with a ray to the right: it never meets the mirrored half.
    crosses_row = (py >= 0) != (py >= step_y)
    inside = np.logical_xor.reduce(crosses_row & (px < py * slope), axis=0)
    distance = np.sqrt(squared.min(axis=0))
    return np.where(inside, -distance, distance)


def draw(scene: Scene, height: int, width: int) -> np.ndarray:
    """Draws the scene anti-aliased on the plain background.

    Returns:
      uint8 [height, width, 3]. If the two differ, the scene's square is centred in the longer one, so that
      neither shapes nor relations are distorted.
    """
    side = min(height, width)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = BACKGROUND
    for item in scene.objects:
        _draw_object(image, item, (width - side) / 2 + item.x * side, (height - side) / 2 + item.y * side, side)
    return image


def _draw_object(image: np.ndarray, item: SceneObject, x: float, y: float, side: int) -> None:
    height, width, _ = image.shape
    radius = item.radius * side
    left, right = max(int(x - radius), 0), min(int(x + radius) + 2, width)
    top, bottom = max(int(y - radius), 0), min(int(y + radius) + 2, height)
    # Pixel k covers [k, k + 1].
    dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
    dy = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)
    alpha = coverage(item.shape, dx, dy, radius)[..., None]
    patch = image[top:bottom, left:right]
    blended = patch + alpha * (np.array(COLORS[item.color], np.float32) - patch)
    patch[:] = blended + np.float32(0.5)


# --- captions ---------------------------------------------------------------------------------------------------

_CHINESE_COLORS = {"red": "红", "yellow": "黄", "green": "绿", "blue": "蓝", "purple": "紫", "black": "黑"}
_CHINESE_SHAPES = {"circle": "圆圈", "square": "方块", "triangle": "三角", "star": "星星", "cross": "十字"}
_CHINESE_SIZES = {"small": "小", "large": "大"}
_CHINESE_RELATIONS = {"left of": "左", "right of": "右", "above": "上", "below": "下"}


@dataclasses.dataclass(frozen=True)
class _Template:
    """How a caption is put together: `single` alone, or `first` and then `further` for each more relation.

    Where there is a `placed`, it takes the place of `first` if two objects are all there are. In them, {a} and {b}
    are the two objects' names, {the_a} and {the_b} those with "the", {bare_a} and {bare_b} without article,
    {relation} the relation, {place_a} and {place_b} the halves of the picture that it puts the two into.
    """

    single: str
    first: str
    further: str
    placed: str = ""
    with_sizes: bool = False


_PLACES = {
    "en": {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"},
    "zh": _CHINESE_RELATIONS,
}
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_TEMPLATES: dict[str, tuple[_Template, ...]] = {
    "en": (
        _Template("{a}", "{a} {relation} {b}", ", itself {relation} {b}"),
        _Template("{bare_a}", "{bare_a} {relation} {bare_b}", ", itself {relation} {bare_b}", with_sizes=True),
        _Template("one {bare_a}", "{the_a} is {relation} {the_b}", ", itself {relation} {the_b}"),
        _Template(
            "there is {a}", "there is {a} {relation} {b}", ", itself {relation} {b}", "{a} {place_a}, {b} {place_b}"
        ),
        _Template("{a}", "{a} {relation} {b}", ", itself {relation} {b}", "{place_a} {a}, {place_b} {b}"),
    ),
    "zh": (
        _Template("{a}", "{a}在{b}{relation}边", ",它在{b}{relation}边"),
        _Template("一个{a}", "{a}在{b}{relation}方", ",它在{b}{relation}方"),
        _Template("{a}", "{a}在{b}{relation}边", ",它在{b}{relation}边", with_sizes=True),
        _Template("有{a}", "有{a}在{b}{relation}边", ",它在{b}{relation}边", "{a}在{place_a},{b}在{place_b}"),
        _Template("{a}", "{a}在{b}{relation}边", ",它在{b}{relation}边", "{place_a}边{a},{place_b}边{b}"),
    ),
}


def caption(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    """Describes the scene in a template drawn from `rng`: every object's colour and shape and every stated relation.

    Some templates state the sizes of one or two objects; some where each of two objects is in place of how they
    relate (opposite halves, as `sample_scene` puts them: the same facts). "itself" and "它" (it) refer to the object
    named last, so a caption of three or four objects stays short and unambiguous.

    Args:
      scene: what to describe. Consecutive objects must be related, as `sample_scene` does it.
      language: "en" or "zh" (simplified Chinese).
      rng: where the choice of template comes from.

    Raises:
      UserError: the language is neither of the two.
    """
    if language not in _TEMPLATES:
        raise UserError(f'the language is {language!r}: captions of shapes exist in "en" and "zh"')
    template = _TEMPLATES[language][rng.integers(len(_TEMPLATES[language]))]
    name = _english_name if language == "en" else _chinese_name
    with_sizes = template.with_sizes and len(scene.objects) <= 2
    names = [name(item, with_sizes) for item in scene.objects]
    if not scene.relations:
        return template.single.format(a=_indefinite(names[0], language), bare_a=names[0])
    first = template.placed if template.placed and len(scene.objects) == 2 else template.first
    text, places = "", _PLACES[language]
    for i, relation, j in scene.relations:
        text += (template.further if text else first).format(
            a=_indefinite(names[i], language),
            b=_indefinite(names[j], language),
            bare_a=names[i],
            bare_b=names[j],
            the_a=f"the {names[i]}",
            the_b=f"the {names[j]}",
            relation=relation if language == "en" else _CHINESE_RELATIONS[relation],
            place_a=places[relation],
            place_b=places[_OPPOSITES[relation]],
        )
    return text


def _english_name(item: SceneObject, with_size: bool) -> str:
    return " ".join([item.size] * with_size + [item.color, item.shape])


def _chinese_name(item: SceneObject, with_size: bool) -> str:
    # The size stands before the shape: "大红" would be scarlet.
    between = "色" + _CHINESE_SIZES[item.size] if with_size else ""
    return _CHINESE_COLORS[item.color] + between + _CHINESE_SHAPES[item.shape]


def _indefinite(name: str, language: Language) -> str:
    if language == "zh":
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# --- the source -------------------------------------------------------------------------------------------------


class ShapesSource(Source):
    """Random access to scenes with pictures and captions; nothing is stored, example i is computed from (seed, i)."""

    def __init__(
        self,
        num_examples: int = 1_000_000,
        height: int = 32,
        width: int = 32,
        seed: int = 0,
        pairs: Pairs = "train",
        num_objects: int | None = None,
        shares: Sequence[float] | None = None,
    ):
        """See `sample_scene` for `pairs`, `num_objects` and `shares`; height and width are the pictures', in pixels.

        Raises:
          UserError: a value is out of range.
        """
        _check_arguments(num_objects, pairs, shares)
        if num_examples < 1:
            raise UserError(f"num_examples is {num_examples}: a source of shapes needs at least 1")
        if min(height, width) < 24:
            raise UserError(f"pictures of {height}x{width} px: shapes are told apart from 24x24 px on")
        if seed < 0:
            raise UserError(f"seed is {seed}: use 0 or more")
        self.num_examples = num_examples
        self.height = height
        self.width = width
        self.seed = seed
        self.pairs = pairs
        self.num_objects = num_objects
        self.shares = None if shares is None else tuple(shares)

    @property
    def fingerprint(self) -> str:
        """Identifies the content: equal fingerprints mean equal examples."""
        shares = f", shares={self.shares}" if self.shares else ""
        return (
            f"ShapesSource(version={_FORMAT_VERSION}, num_examples={self.num_examples}, height={self.height}, "
            f"width={self.width}, seed={self.seed}, pairs={self.pairs}, num_objects={self.num_objects}{shares})"
        )

    def __repr__(self) -> str:
        return self.fingerprint

    def __len__(self) -> int:
        return self.num_examples

    def sizes(self) -> np.ndarray:
        """int32 [N, 2]: the height and width of every example (a read-only view, of no size in memory)."""
        return np.broadcast_to(np.array([self.height, self.width], np.int32), (self.num_examples, 2))

    def scene(self, index: int) -> Scene:
        """The scene of example `index`.

        Raises:
          IndexError: the index is not within 0 to len - 1.
        """
        return sample_scene(self._rng(index), self.num_objects, self.pairs, self.shares)

    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[dict]:
        """{"key": str, "image": uint8 [H, W, 3], "captions": {"en": str, "zh": str}, "metadata": {}} each.

        Raises:
          IndexError: an index is not within 0 to len - 1.
        """
        examples = []
        for index in indices:
            scene, example = self._scene_and_text(index)
            image = draw(scene, self.height, self.width)
            examples.append({**example, "image": resize_to_cover_and_crop(image, bucket) if bucket else image})
        return examples

    def describe(self, indices: Sequence[int]) -> list[dict]:
        """As `load`, without drawing the pictures."""
        return [self._scene_and_text(index)[1] for index in indices]

    def _scene_and_text(self, index: int) -> tuple[Scene, dict]:
        rng = self._rng(index)
        scene = sample_scene(rng, self.num_objects, self.pairs, self.shares)
        return scene, {
            "key": f"shapes-{self.pairs}-{self.seed}-{index}",
            "captions": {language: caption(scene, language, rng) for language in _TEMPLATES},
            "metadata": {},
        }

    def _rng(self, index: int) -> np.random.Generator:
        index = operator.index(index)
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of a source of {self.num_examples}")
        return np.random.default_rng((self.seed, index))
