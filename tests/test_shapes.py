import collections
import dataclasses
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from lidit_jax.data import shapes
from lidit_jax.data.shapes import Scene, ShapesSource, caption, draw, sample_scene
from lidit_jax.data.shapes_checker import (
    Accuracy,
    ObjectCheck,
    SceneCheck,
    accuracies,
    check,
    find_components,
)
from lidit_jax.errors import UserError

seeds = st.integers(0, 2**32)
num_objects = st.integers(1, 4)
pair_kinds = st.sampled_from(["train", "held_out", "all"])


def scene_of(seed: int, num_objects: int | None = None, pairs: str = "all") -> Scene:
    return sample_scene(np.random.default_rng(seed), num_objects, pairs)


def appearances(scene: Scene) -> list[tuple[str, str]]:
    return [(item.color, item.shape) for item in scene.objects]


def with_object(scene: Scene, index: int, **changes) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return Scene(tuple(objects), scene.relations)


# --- scenes -----------------------------------------------------------------------------------------------------


@given(seeds, num_objects, pair_kinds)
def test_objects_are_inside_apart_and_different(seed, count, pairs):
    scene = scene_of(seed, count, pairs)
    assert len(scene.objects) == count
    assert len(set(appearances(scene))) == count
    for item in scene.objects:
        low, high = shapes.SIZES[item.size]
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
    for count, probability in shapes.NUM_OBJECTS_PROBABILITIES.items():
        assert counts[count] / len(scenes) == pytest.approx(probability, abs=0.05)
    relations = collections.Counter(relation for scene in scenes for _, relation, _ in scene.relations)
    for relation in shapes.RELATIONS:
        assert relations[relation] / relations.total() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(("count", "pairs"), [(0, "train"), (5, "train"), (2, "test")])
def test_impossible_scenes_are_refused_in_one_line(count, pairs):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        sample_scene(np.random.default_rng(0), count, pairs)


# --- drawings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_matches_its_own_fine_drawing(shape):
    radius, factor = 4.3, 16
    coarse = np.arange(-7, 7) + 0.5
    fine = (np.arange(-7 * factor, 7 * factor) + 0.5) / factor
    expected = (shapes.coverage(shape, fine * 100, fine * 100, radius * 100) > 0.5).astype(float)
    expected = expected.reshape(14, factor, 14, factor).mean(axis=(1, 3))
    drawn = shapes.coverage(shape, coarse, coarse, radius)
    assert drawn.min() == 0
    assert drawn.max() == 1
    # The distance-based edge deviates only at sharp corners.
    assert np.abs(drawn - expected).max() < 0.4
    assert np.abs(drawn - expected).mean() < 0.02


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_fill_their_square_and_stay_within(shape):
    grid = np.arange(-300, 300) + 0.5
    rows, columns = np.nonzero(shapes.coverage(shape, grid, grid, 200.0) > 0.5)
    for indices in (rows, columns):
        low, high = grid[indices.min()] / 200, grid[indices.max()] / 200
        assert -1 <= low < high <= 1
        assert high - low > 1.6


@given(seeds, st.sampled_from([(32, 32), (32, 56), (64, 48)]))
@settings(max_examples=100)
def test_pictures_keep_the_background_at_their_border_and_full_color_in_the_middle(seed, size):
    scene = scene_of(seed)
    image = draw(scene, *size)
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


ENGLISH_PLACES = dict(
    zip(("on the left", "on the right", "at the top", "at the bottom"), shapes.RELATIONS, strict=True)
)
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation_of(objects: list, places: list) -> list:
    """Two objects' opposite places as a fact about the two."""
    if not places:
        return []
    assert len(objects) == 2 and places[1] == OPPOSITES[places[0]]
    return [(objects[0], places[0], objects[1])]


def parse_english(text: str) -> tuple[list, list]:
    """The (size, color, shape) of each object, in order of first mention, and (object, relation, object)."""
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
    np.testing.assert_array_equal(draw(first.scene(index), 32, 32), first[index]["image"])


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


# --- the checker: what is right ---------------------------------------------------------------------------------


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.round(ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))).astype(np.uint8)


def noised(image: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(image.sum()).normal(0, sigma, image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file))


def tinted(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 0.95 + np.array([0, 8, 4]), 0, 255).astype(np.uint8)


DEGRADATIONS = {
    "none": lambda image: image,
    "blur": lambda image: blurred(image, 0.8),
    "noise": lambda image: noised(image, 8),
    "blur and noise": lambda image: noised(blurred(image, 0.5), 6),
    "JPEG": lambda image: compressed(image, 85),
    "tint": tinted,
}


@pytest.mark.parametrize("degrade", DEGRADATIONS.values(), ids=DEGRADATIONS.keys())
@given(seed=seeds, size=st.sampled_from([(32, 32), (48, 48), (64, 64), (32, 48)]))
@settings(max_examples=100)
def test_every_drawing_is_all_right(degrade, seed, size):
    scene = scene_of(seed)
    result = check(degrade(draw(scene, *size)), scene)
    assert result.all_right
    assert all(item.size for item in result.objects)


@given(seeds)
@settings(max_examples=100)
def test_places_do_not_matter_but_relations_do(seed):
    scene = scene_of(seed, 2)
    mirrored = Scene(tuple(dataclasses.replace(o, x=1 - o.x, y=1 - o.y) for o in scene.objects), scene.relations)
    assert check(np.roll(draw(scene, 64, 64), (1, -1), axis=(0, 1)), scene).all_right
    result = check(draw(mirrored, 64, 64), scene)
    assert result == SceneCheck((ObjectCheck(True, True, True, relation=False),) * 2, extra=0)


def test_faint_specks_are_ignored_and_clear_ones_are_extra():
    scene = scene_of(1, 1)
    image = draw(scene, 32, 32)
    row, column = (2 if scene.objects[0].y > 0.5 else 26), (2 if scene.objects[0].x > 0.5 else 26)
    image[row : row + 2, column : column + 2] = shapes.COLORS["black"]
    assert check(image, scene).all_right
    image[row : row + 4, column : column + 4] = shapes.COLORS["black"]
    result = check(image, scene)
    assert result.extra == 1
    assert result.objects[0].right
    assert not result.all_right


def smooth_noise(seed: int) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(32, 32, 3)), (3, 3, 0))
    return np.clip(128 + noise / noise.std() * 60, 0, 255).astype(np.uint8)


NOTHING = {
    "background": np.full((32, 32, 3), shapes.BACKGROUND, np.uint8),
    "white": np.full((32, 32, 3), 255, np.uint8),
    "grey": np.full((32, 32, 3), 128, np.uint8),
    "red": np.full((32, 32, 3), shapes.COLORS["red"], np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8),
    "faint noise": noised(np.full((32, 32, 3), 200, np.uint8), 30),
}


@pytest.mark.parametrize("image", NOTHING.values(), ids=NOTHING.keys())
def test_blank_pictures_and_noise_have_nothing_right(image):
    for seed in range(40):
        result = check(image, scene_of(seed))
        assert not result.all_right
        assert not any(item.right or item.color or item.shape or item.size or item.relation for item in result.objects)


def test_smooth_noise_has_no_object_right():
    results = [check(smooth_noise(seed), scene_of(seed)) for seed in range(100)]
    assert accuracies(results)["objects"].correct == 0


# --- the checker: exactly what is wrong -------------------------------------------------------------------------


@given(seeds, num_objects, st.data())
@settings(max_examples=150)
def test_one_wrong_color_or_shape_is_all_that_is_wrong(seed, count, data):
    scene = scene_of(seed, count)
    index = data.draw(st.integers(0, count - 1))
    part, values = data.draw(st.sampled_from([("color", tuple(shapes.COLORS)), ("shape", shapes.SHAPES)]))
    value = data.draw(st.sampled_from([value for value in values if value != getattr(scene.objects[index], part)]))
    result = check(draw(with_object(scene, index, **{part: value}), 32, 32), scene)
    expected = [ObjectCheck(True, True, True, True if scene.relations else None)] * count
    expected[index] = dataclasses.replace(expected[index], **{part: False})
    assert result == SceneCheck(tuple(expected), extra=0)
    assert [item.right for item in result.objects] == [k != index for k in range(count)]
    assert not result.all_right


@given(seeds, num_objects, st.data())
@settings(max_examples=100)
def test_one_wrong_size_is_all_that_is_wrong(seed, count, data):
    scene = scene_of(seed, count)
    index = data.draw(st.integers(0, count - 1))
    size = {"small": "large", "large": "small"}[scene.objects[index].size]
    changed = with_object(scene, index, radius=sum(shapes.SIZES[size]) / 2)
    result = check(draw(changed, 64, 64), scene)
    assert [item.size for item in result.objects] == [k != index for k in range(count)]
    assert result.all_right


@given(seeds, st.integers(2, 4), st.data())
@settings(max_examples=100)
def test_two_swapped_objects_have_only_their_relations_wrong(seed, count, data):
    scene = scene_of(seed, count)
    i = data.draw(st.integers(0, count - 2))
    first, second = scene.objects[i : i + 2]
    swapped = with_object(scene, i, x=second.x, y=second.y, radius=first.radius)
    swapped = with_object(swapped, i + 1, x=first.x, y=first.y)
    result = check(draw(swapped, 64, 64), scene)
    assert all(item.color and item.shape and item.size for item in result.objects)
    assert result.extra == 0
    assert result.objects[i].relation is False
    assert result.objects[i + 1].relation is False
    # Objects farther along the chain have not moved, nor have those they are related to.
    assert all(result.objects[k].relation for k in range(count) if k < i - 1 or k > i + 2)
    assert not result.all_right


@given(seeds, st.integers(1, 4), st.data())
@settings(max_examples=100)
def test_a_missing_object_is_wrong_and_breaks_its_relations_alone(seed, count, data):
    scene = scene_of(seed, count)
    index = data.draw(st.integers(0, count - 1))
    image = draw(Scene(scene.objects[:index] + scene.objects[index + 1 :], ()), 32, 32)
    result = check(image, scene)
    for k, item in enumerate(result.objects):
        if k == index:
            assert not (item.color or item.shape or item.size or item.relation)
        else:
            assert item == ObjectCheck(True, True, True, relation=abs(k - index) > 1)
    assert result.extra == 0
    assert not result.all_right


@given(seeds, st.integers(2, 4))
@settings(max_examples=100)
def test_an_added_object_is_extra_and_all_else_is_right(seed, count):
    scene = scene_of(seed, count)
    stated = Scene(scene.objects[:-1], scene.relations[:-1])
    result = check(draw(scene, 32, 32), stated)
    assert all(item.right and item.size for item in result.objects)
    assert result.extra == 1
    assert not result.all_right


def test_an_object_of_two_colors_has_no_color():
    scene = Scene((shapes.SceneObject("square", "red", "large", 0.5, 0.5, 0.185),), ())
    image = draw(scene, 32, 32)
    image[:, 16:][np.abs(image[:, 16:].astype(int) - shapes.COLORS["red"]).max(axis=-1) < 5] = shapes.COLORS["blue"]
    result = check(image, scene)
    assert not result.objects[0].color
    assert result.objects[0].shape


@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 32))
@settings(max_examples=200)
def test_blocks_of_any_color_are_judged(color, width):
    image = np.full((32, 32, 3), shapes.BACKGROUND, np.uint8)
    image[8:20, :width] = color
    components = find_components(image)
    assert len(components) <= 1
    assert all(np.isfinite([component.x, component.y, component.radius]).all() for component in components)
    check(image, scene_of(0))


def test_an_object_of_a_color_unlike_all_has_its_shape_only():
    scene = Scene((shapes.SceneObject("square", "red", "large", 0.5, 0.5, 0.185),), ())
    image = draw(scene, 32, 32)
    image[np.abs(image.astype(int) - shapes.COLORS["red"]).max(axis=-1) < 5] = (40, 200, 205)
    assert check(image, scene).objects == (ObjectCheck(False, True, True, None),)
    pale = np.full((32, 32, 3), shapes.BACKGROUND, np.uint8)
    pale[10:22, 10:22] = (184, 255, 255)
    assert find_components(pale)[0].color is None


def test_touching_objects_are_not_right():
    objects = tuple(
        shapes.SceneObject("circle", color, "large", x, 0.5, 0.185) for color, x in [("red", 0.32), ("blue", 0.68)]
    )
    scene = Scene(objects, ((0, "left of", 1),))
    assert not any(item.right for item in check(draw(scene, 32, 32), scene).objects)


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.float32), np.zeros((32, 32), np.uint8)])
def test_only_uint8_color_pictures_are_judged(image):
    with pytest.raises(ValueError, match="uint8"):
        find_components(image)


# --- the checker: sums ------------------------------------------------------------------------------------------


def test_accuracies_count_objects_scenes_and_only_stated_relations():
    right = ObjectCheck(True, True, True, relation=True)
    alone = ObjectCheck(True, False, False, relation=None)
    lost = ObjectCheck(False, False, False, relation=False)
    sums = accuracies([SceneCheck((right, right), 0), SceneCheck((alone,), 0), SceneCheck((right, lost), 1)])
    counts = {name: (accuracy.correct, accuracy.total) for name, accuracy in sums.items()}
    assert counts == {
        "objects": (3, 5),
        "color": (4, 5),
        "shape": (3, 5),
        "size": (3, 5),
        "relation": (3, 4),
        "scenes": (1, 3),
    }
    assert sums["objects"].value == 0.6


def test_intervals_are_wilson_s():
    # Newcombe (1998), table 1, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, total), interval in published.items():
        assert Accuracy(correct, total).interval == pytest.approx(interval, abs=5e-5)
    assert np.isnan(Accuracy(0, 0).value)
    assert Accuracy(0, 0).interval == (0, 1)
