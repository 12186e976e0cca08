import collections
import re

import numpy as np
import pytest
from conftest import scene_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.data.shapes import scene as shapes
from lidit_jax.data.shapes.captions import caption
from lidit_jax.data.shapes.layout import sample_scene
from lidit_jax.data.shapes.quadrants import NUM_OBJECTS_PROBABILITIES
from lidit_jax.data.shapes.rendering import coverage, render
from lidit_jax.data.shapes.scene import Canvas, Scene
from lidit_jax.data.shapes.source import ShapesSource
from lidit_jax.errors import UserError

seeds = st.integers(0, 2**32)
num_objects = st.integers(1, 4)
pair_kinds = st.sampled_from(["train", "held_out", "all"])


def appearances(scene: Scene) -> list[tuple[str, str]]:
    return [(item.color, item.shape) for item in scene.objects]


# --- scenes -----------------------------------------------------------------------------------------------------


@given(seeds, num_objects, pair_kinds)
def test_objects_are_inside_apart_and_different(seed, count, pairs):
    scene = scene_of(seed, count, pairs)
    assert len(scene.objects) == count
    assert len(set(appearances(scene))) == count
    for item in scene.objects:
        low, high = Canvas().radii(item.size)
        assert low <= item.radius <= high
        assert item.radius < min(item.x, item.y) <= max(item.x, item.y) < 1 - item.radius
    for k, first in enumerate(scene.objects):
        for second in scene.objects[:k]:
            distance = max(abs(first.x - second.x), abs(first.y - second.y))
            assert distance - first.radius - second.radius > 2.5 / 32


@given(seeds, num_objects)
def test_relations_name_consecutive_objects_and_are_clear(seed, count):
    scene = scene_of(seed, count)
    assert [(i, j) for i, _, j in scene.relations] == [(i, i + 1) for i in range(count - 1)]
    for i, relation, j in scene.relations:
        dx, dy = scene.objects[i].x - scene.objects[j].x, scene.objects[i].y - scene.objects[j].y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        across = abs(dy) if relation in ("left of", "right of") else abs(dx)
        assert along > across + 0.1


@given(seeds, num_objects)
def test_train_scenes_never_and_held_out_scenes_always_show_a_held_out_pair(seed, count):
    held_out = set(shapes.HELD_OUT_PAIRS)
    assert not held_out & set(appearances(scene_of(seed, count, "train")))
    assert held_out & set(appearances(scene_of(seed, count, "held_out")))


def test_every_color_and_shape_occurs_in_training():
    seen = {pair for seed in range(600) for pair in appearances(scene_of(seed, 2, "train"))}
    everything = {(color, shape) for color in shapes.COLORS for shape in shapes.SHAPES}
    assert everything - seen == set(shapes.HELD_OUT_PAIRS)
    assert {color for color, _ in seen} == set(shapes.COLORS)
    assert {shape for _, shape in seen} == set(shapes.SHAPES)


def test_numbers_of_objects_and_relations_occur_as_often_as_documented():
    scenes = [scene_of(seed) for seed in range(2000)]
    counts = collections.Counter(len(scene.objects) for scene in scenes)
    for count, probability in NUM_OBJECTS_PROBABILITIES.items():
        assert counts[count] / len(scenes) == pytest.approx(probability, abs=0.05)
    relations = collections.Counter(relation for scene in scenes for _, relation, _ in scene.relations)
    for relation in shapes.RELATIONS:
        assert relations[relation] / relations.total() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(("count", "pairs"), [(0, "train"), (5, "train"), (2, "test")])
def test_impossible_scenes_are_refused_in_one_line(count, pairs):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        sample_scene(np.random.default_rng(0), count, pairs)


# --- rendering --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_matches_its_own_fine_drawing(shape):
    radius, factor = 4.3, 16
    coarse = np.arange(-7, 7) + 0.5
    fine = (np.arange(-7 * factor, 7 * factor) + 0.5) / factor
    expected = (coverage(shape, fine * 100, fine * 100, radius * 100) > 0.5).astype(float)
    expected = expected.reshape(14, factor, 14, factor).mean(axis=(1, 3))
    drawn = coverage(shape, coarse, coarse, radius)
    assert drawn.min() == 0
    assert drawn.max() == 1
    # The distance-based edge deviates only at sharp corners.
    assert np.abs(drawn - expected).max() < 0.4
    assert np.abs(drawn - expected).mean() < 0.02


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_fill_their_square_and_stay_within(shape):
    grid = np.arange(-300, 300) + 0.5
    rows, columns = np.nonzero(coverage(shape, grid, grid, 200.0) > 0.5)
    for indices in (rows, columns):
        low, high = grid[indices.min()] / 200, grid[indices.max()] / 200
        assert -1 <= low < high <= 1
        assert high - low > 1.6


@given(seeds, st.sampled_from([(32, 32), (32, 56), (64, 48)]))
@settings(max_examples=100)
def test_images_keep_the_background_at_their_border_and_full_color_in_the_middle(seed, size):
    scene = scene_of(seed)
    image = render(scene, *size)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    for border in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (border == shapes.BACKGROUND).all()
    side = min(size)
    for item in scene.objects:
        row = int((size[0] - side) / 2 + item.y * side)
        column = int((size[1] - side) / 2 + item.x * side)
        assert np.abs(image[row, column] - np.array(shapes.COLORS[item.color], float)).max() <= 1


# --- captions ---------------------------------------------------------------------------------------------------

ENGLISH_OBJECT = r"(?:(?:a|an|the|one) )?(?:(?P<size>small|large) )?(?P<color>{}) (?P<shape>{})".format(
    "red|yellow|green|blue|purple|black", "circle|square|triangle|star|cross"
)
CHINESE_WORDS = dict(zip("红黄绿蓝紫黑", ["red", "yellow", "green", "blue", "purple", "black"], strict=True))
CHINESE_WORDS |= {"圆圈": "circle", "方块": "square", "三角": "triangle", "星星": "star", "十字": "cross"}
CHINESE_WORDS |= {"小": "small", "大": "large", None: None}
CHINESE_WORDS |= {"左": "left of", "右": "right of", "上": "above", "下": "below"}
CHINESE_OBJECT = r"(?P<color>[红黄绿蓝紫黑])(?:色(?P<size>[大小]))?(?P<shape>圆圈|方块|三角|星星|十字)"
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
ENGLISH_PLACES = dict(zip(PLACES, shapes.RELATIONS, strict=True))
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation_of(objects: list, places: list) -> list:
    """Converts the opposite places of two objects to a relation between them."""
    if not places:
        return []
    assert len(objects) == 2 and places[1] == OPPOSITES[places[0]]
    return [(objects[0], places[0], objects[1])]


def parse_english(text: str) -> tuple[list, list]:
    """Parses a caption into (size, color, shape) in order of first mention and (object, relation, object)."""
    text = re.sub(r"^there is ", "", text)
    objects, facts, places = [], [], []
    for clause in text.split(", "):
        found = [(match["size"], match["color"], match["shape"]) for match in re.finditer(ENGLISH_OBJECT, clause)]
        words = re.sub(ENGLISH_OBJECT, "*", clause).replace("is ", "")
        if words.startswith("itself "):
            words, found = "*" + words[6:], [objects[-1], *found]
        objects += [item for item in found if item not in objects]
        if place := re.fullmatch(r"\* (.+ the \w+)|(.+ the \w+) \*", words):
            places.append(ENGLISH_PLACES[place[1] or place[2]])
        elif words != "*":
            facts.append((found[0], words[2:-2], found[1]))
    return objects, facts + relation_of(objects, places)


def parse_chinese(text: str) -> tuple[list, list]:
    text = text.removeprefix("有").removeprefix("一个")
    objects, facts, places = [], [], []
    for clause in text.split(","):
        found = [
            tuple(CHINESE_WORDS[match[part]] for part in ("size", "color", "shape"))
            for match in re.finditer(CHINESE_OBJECT, clause)
        ]
        words = re.sub(CHINESE_OBJECT, "*", clause)
        if words.startswith("它"):
            words, found = "*" + words[1:], [objects[-1], *found]
        objects += [item for item in found if item not in objects]
        if place := re.fullmatch(r"\*在([左右上下])|([左右上下])边\*", words):
            places.append(CHINESE_WORDS[place[1] or place[2]])
        elif words != "*":
            relation = re.fullmatch(r"\*在\*([左右上下])[边方]", words)
            facts.append((found[0], CHINESE_WORDS[relation[1]], found[1]))
    return objects, facts + relation_of(objects, places)


@pytest.mark.parametrize(("language", "parse"), [("en", parse_english), ("zh", parse_chinese)])
@given(seed=seeds, count=num_objects)
def test_captions_state_all_objects_and_relations_in_order(language, parse, seed, count):
    scene = scene_of(seed, count)
    text = caption(scene, language, np.random.default_rng(seed))
    objects, facts = parse(text)
    with_sizes = objects[0][0] is not None
    expected = [(item.size if with_sizes else None, item.color, item.shape) for item in scene.objects]
    assert objects == expected, text
    assert facts == [(expected[i], relation, expected[j]) for i, relation, j in scene.relations], text


def test_captions_vary_and_stay_short():
    for count in (1, 2, 4):
        words, characters, forms = [], [], set()
        for seed in range(400):
            scene = scene_of(seed, count)
            english, chinese = (caption(scene, language, np.random.default_rng(seed)) for language in ("en", "zh"))
            words.append(len(english.split()))
            characters.append(len(chinese))
            forms |= {re.sub(ENGLISH_OBJECT, "*", english), re.sub(CHINESE_OBJECT, "*", chinese)}
        assert max(words) <= {1: 5, 2: 12, 4: 24}[count]
        assert max(characters) <= {1: 6, 2: 13, 4: 26}[count]
        assert len(forms) >= {1: 4, 2: 20, 4: 20}[count]


def test_an_unknown_language_is_refused():
    with pytest.raises(UserError, match="fr"):
        caption(scene_of(0), "fr", np.random.default_rng(0))


# --- the source -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**20), st.integers(0, 999_999))
@settings(max_examples=20)
def test_an_example_is_a_function_of_seed_and_index(seed, index):
    first, second = ShapesSource(seed=seed), ShapesSource(seed=seed)
    second[(index + 1) % len(second)]
    one, other = first[index], second[np.int64(index)]
    np.testing.assert_array_equal(one.pop("image"), other.pop("image"))
    assert one == other
    np.testing.assert_array_equal(render(first.scene(index), 32, 32), first[index]["image"])


def test_examples_differ_and_have_the_promised_fields():
    source = ShapesSource(num_examples=50, height=48, width=40, seed=3, pairs="held_out", num_objects=3)
    examples = [source[i] for i in range(len(source))]
    assert len({example["key"] for example in examples}) == 50
    assert len({example["image"].tobytes() for example in examples}) == 50
    assert set(examples[0]) == {"key", "image", "captions", "metadata"}
    assert set(examples[0]["captions"]) == {"en", "zh"}
    assert examples[0]["image"].shape == (48, 40, 3)
    assert source.sizes().dtype == np.int32
    np.testing.assert_array_equal(source.sizes(), [[48, 40]] * 50)
    for index in (-1, 50):
        with pytest.raises(IndexError):
            source[index]


def test_sources_with_different_content_have_different_fingerprints():
    variants = [{}, {"seed": 1}, {"pairs": "all"}, {"num_objects": 2}, {"height": 64}, {"num_examples": 10}]
    assert len({ShapesSource(**variant).fingerprint for variant in variants}) == len(variants)
    assert ShapesSource(seed=1).fingerprint == ShapesSource(seed=1).fingerprint


@pytest.mark.parametrize("arguments", [{"num_examples": 0}, {"height": 8}, {"seed": -1}, {"pairs": "x"}])
def test_impossible_sources_are_refused(arguments):
    with pytest.raises(UserError):
        ShapesSource(**arguments)
