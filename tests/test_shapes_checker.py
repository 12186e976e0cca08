import dataclasses
import io

import numpy as np
import pytest
from conftest import scene_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from lidit_jax.data.shapes import scene as shapes
from lidit_jax.data.shapes.checker import check
from lidit_jax.data.shapes.reading import find_components
from lidit_jax.data.shapes.rendering import render
from lidit_jax.data.shapes.scene import Canvas, Scene
from lidit_jax.data.shapes.scores import Accuracy, ObjectCheck, SceneCheck, accuracies

seeds = st.integers(0, 2**32)
num_objects = st.integers(1, 4)


def with_object(scene: Scene, index: int, **changes) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return Scene(tuple(objects), scene.relations)


# --- correct images ---------------------------------------------------------------------------------------------------


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
    result = check(degrade(render(scene, *size)), scene)
    assert result.all_right
    assert all(item.size for item in result.objects)


@given(seeds)
@settings(max_examples=100)
def test_places_do_not_matter_but_relations_do(seed):
    scene = scene_of(seed, 2)
    mirrored = Scene(tuple(dataclasses.replace(o, x=1 - o.x, y=1 - o.y) for o in scene.objects), scene.relations)
    assert check(np.roll(render(scene, 64, 64), (1, -1), axis=(0, 1)), scene).all_right
    result = check(render(mirrored, 64, 64), scene)
    assert result == SceneCheck((ObjectCheck(True, True, True, relation=False),) * 2, extra=0)


def test_faint_specks_are_ignored_and_clear_ones_are_extra():
    scene = scene_of(1, 1)
    image = render(scene, 32, 32)
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
def test_blank_images_and_noise_have_nothing_right(image):
    for seed in range(40):
        result = check(image, scene_of(seed))
        assert not result.all_right
        assert not any(item.right or item.color or item.shape or item.size or item.relation for item in result.objects)


def test_smooth_noise_has_no_object_right():
    results = [check(smooth_noise(seed), scene_of(seed)) for seed in range(100)]
    assert accuracies(results)["objects"].correct == 0


# --- wrong images: exactly the wrong properties are reported ----------------------------------------------------------


@given(seeds, num_objects, st.data())
@settings(max_examples=150)
def test_one_wrong_color_or_shape_is_all_that_is_wrong(seed, count, data):
    scene = scene_of(seed, count)
    index = data.draw(st.integers(0, count - 1))
    part, values = data.draw(st.sampled_from([("color", tuple(shapes.COLORS)), ("shape", shapes.SHAPES)]))
    value = data.draw(st.sampled_from([value for value in values if value != getattr(scene.objects[index], part)]))
    result = check(render(with_object(scene, index, **{part: value}), 32, 32), scene)
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
    changed = with_object(scene, index, radius=sum(Canvas().radii(size)) / 2)
    result = check(render(changed, 64, 64), scene)
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
    result = check(render(swapped, 64, 64), scene)
    assert all(item.color and item.shape and item.size for item in result.objects)
    assert result.extra == 0
    assert result.objects[i].relation is False
    assert result.objects[i + 1].relation is False
    # Neither objects farther along the chain nor the objects they are related to have moved.
    assert all(result.objects[k].relation for k in range(count) if k < i - 1 or k > i + 2)
    assert not result.all_right


@given(seeds, st.integers(1, 4), st.data())
@settings(max_examples=100)
def test_a_missing_object_is_wrong_and_breaks_its_relations_alone(seed, count, data):
    scene = scene_of(seed, count)
    index = data.draw(st.integers(0, count - 1))
    image = render(Scene(scene.objects[:index] + scene.objects[index + 1 :], ()), 32, 32)
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
    result = check(render(scene, 32, 32), stated)
    assert all(item.right and item.size for item in result.objects)
    assert result.extra == 1
    assert not result.all_right


def test_an_object_of_two_colors_has_no_color():
    scene = Scene((shapes.SceneObject("square", "red", "large", 0.5, 0.5, 0.185),), ())
    image = render(scene, 32, 32)
    image[:, 16:][np.abs(image[:, 16:].astype(int) - shapes.COLORS["red"]).max(axis=-1) < 5] = shapes.COLORS["blue"]
    result = check(image, scene)
    assert not result.objects[0].color
    assert result.objects[0].shape


@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 32))
@settings(max_examples=200)
def test_blocks_of_any_color_are_judged(color, width):
    image = np.full((32, 32, 3), shapes.BACKGROUND, np.uint8)
    image[8:20, :width] = color
    components = find_components(image, Canvas())
    assert len(components) <= 1
    assert all(np.isfinite([component.x, component.y, component.radius]).all() for component in components)
    check(image, scene_of(0))


def test_an_object_of_a_color_unlike_all_has_its_shape_only():
    scene = Scene((shapes.SceneObject("square", "red", "large", 0.5, 0.5, 0.185),), ())
    image = render(scene, 32, 32)
    image[np.abs(image.astype(int) - shapes.COLORS["red"]).max(axis=-1) < 5] = (40, 200, 205)
    assert check(image, scene).objects == (ObjectCheck(False, True, True, None),)
    pale = np.full((32, 32, 3), shapes.BACKGROUND, np.uint8)
    pale[10:22, 10:22] = (184, 255, 255)
    assert find_components(pale, Canvas())[0].color is None


def test_touching_objects_are_not_right():
    objects = tuple(
        shapes.SceneObject("circle", color, "large", x, 0.5, 0.185) for color, x in [("red", 0.32), ("blue", 0.68)]
    )
    scene = Scene(objects, ((0, "left of", 1),))
    assert not any(item.right for item in check(render(scene, 32, 32), scene).objects)


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.float32), np.zeros((32, 32), np.uint8)])
def test_only_uint8_color_images_are_judged(image):
    with pytest.raises(ValueError, match="uint8"):
        find_components(image, Canvas())


# --- accuracies -------------------------------------------------------------------------------------------------------


def test_accuracies_count_objects_scenes_and_only_stated_relations():
    right = ObjectCheck(True, True, True, relation=True)
    alone = ObjectCheck(True, False, False, relation=None)
    lost = ObjectCheck(False, False, False, relation=False)
    sums = accuracies([SceneCheck((right, right), 0), SceneCheck((alone,), 0), SceneCheck((right, lost), 1)])
    counts = {name: (accuracy.correct, accuracy.total) for name, accuracy in sums.items()}
    assert counts == {
        "objects": (3, 5),
        "color": (4, 5),
        "pair": (3, 5),
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
