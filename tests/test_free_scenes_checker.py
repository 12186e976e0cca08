"""The checker on scenes in layout "free": robust to overlap, blur and noise, and strict about wrong objects."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from test_free_scenes import CANVASES, free_source, overlapping
from test_shapes_checker import NOTHING, blurred, noised, with_object

from lidit_jax.data.shapes.checker import check
from lidit_jax.data.shapes.free import canvas_of
from lidit_jax.data.shapes.overlaps import find_overlapping_components
from lidit_jax.data.shapes.rendering import render
from lidit_jax.data.shapes.scene import Scene, SceneObject
from lidit_jax.data.shapes.scores import ObjectCheck, accuracies

COUNT = 24  # scenes per canvas

DEGRADATIONS = {"clean": lambda image: image, "blur and noise": lambda image: noised(blurred(image, 0.8), 6)}
degraded = pytest.mark.parametrize("degrade", DEGRADATIONS.values(), ids=DEGRADATIONS.keys())


def sampled(overlaps: float) -> list[tuple[Scene, tuple[int, int]]]:
    """Samples scenes that no other test uses, on all canvases; returns (scene, (height, width)) each."""
    return [
        (scene, (height, width))
        for height, width, scale in CANVASES
        for source in [free_source(height, width, scale, overlaps, seed=11, pairs="all")]
        for scene in map(source.scene, range(COUNT))
    ]


@pytest.fixture(scope="module")
def apart():
    return sampled(0.0)


@pytest.fixture(scope="module")
def overlapped():
    return [(scene, size) for scene, size in sampled(1.0) if len(scene.objects) > 1]


def judged(scenes, degrade: Callable, change: Callable[[Scene], tuple[Scene, list[int]] | None]) -> list[ObjectCheck]:
    """Checks images of changed scenes against the originals; returns the verdicts on objects affected by `change`."""
    found = []
    for scene, size in scenes:
        changed = change(scene)
        if changed is None:
            continue
        wrong, affected = changed
        result = check(degrade(render(wrong, *size)), scene)
        found += [result.objects[k] for k in affected]
    assert len(found) >= 100
    return found


# --- correct images -------------------------------------------------------------------------------------------------


@degraded
def test_objects_that_stand_apart_are_right(apart, degrade):
    sums = accuracies(check(degrade(render(scene, *size)), scene) for scene, size in apart)
    assert sums["objects"].value >= 0.99
    assert sums["scenes"].value >= 0.98
    assert min(sums["size"].value, sums["relation"].value, sums["place"].value) >= 0.99
    assert sums["place"].total > 100


@degraded
def test_objects_of_scenes_with_an_overlap_are_right(overlapped, degrade):
    results = [check(degrade(render(scene, *size)), scene) for scene, size in overlapped]
    sums = accuracies(results)
    assert min(sums[name].value for name in ("objects", "size", "relation", "depth")) >= 0.97
    hidden = [
        result.objects[overlapping(scene)[1]].right for result, (scene, _) in zip(results, overlapped, strict=True)
    ]
    assert np.mean(hidden) >= 0.97
    assert sums["depth"].total == 2 * len(hidden)


# --- wrong images ---------------------------------------------------------------------------------------------------


def swapped(part: str) -> Callable[[Scene], tuple[Scene, list[int]] | None]:
    """Returns a change that swaps the colours or shapes of two objects if the scene lacks the resulting pairs."""

    def change(scene: Scene):
        present = {(item.color, item.shape) for item in scene.objects}
        for i, j in itertools.combinations(range(len(scene.objects)), 2):
            first, second = scene.objects[i], scene.objects[j]
            mixed = {(first.color, second.shape), (second.color, first.shape)}
            if len(mixed) == 2 and not mixed & present:
                wrong = with_object(scene, i, **{part: getattr(second, part)})
                wrong = with_object(wrong, j, **{part: getattr(first, part)})
                return dataclasses.replace(scene, objects=wrong.objects), [i, j]
        return None

    return change


@degraded
@pytest.mark.parametrize("part", ["color", "shape"])
def test_swapped_colors_or_shapes_are_wrong(apart, overlapped, degrade, part):
    for scenes in (apart, overlapped):
        verdicts = judged(scenes, degrade, swapped(part))
        assert np.mean([not item.pair for item in verdicts]) >= 0.99


@degraded
def test_a_missing_object_is_wrong(apart, overlapped, degrade):
    def without_last(scene):
        kept = scene.objects[:-1]
        return dataclasses.replace(scene, objects=kept), [len(kept)]

    verdicts = judged(apart + overlapped, degrade, without_last)
    assert np.mean([not item.right for item in verdicts]) >= 0.99


@degraded
def test_mirrored_positions_break_relations_and_places(apart, degrade):
    """Objects in the middle are excluded: mirroring leaves them in place."""

    def mirrored(scene):
        width, height = scene.canvas.width, scene.canvas.height
        objects = tuple(dataclasses.replace(o, x=width - o.x, y=height - o.y) for o in scene.objects)
        related = {k for i, _, j in scene.relations for k in (i, j)}
        moved = {i for i, place in scene.places if place != "in the middle"}
        return dataclasses.replace(scene, objects=objects), sorted(related | moved)

    verdicts = judged(apart, degrade, mirrored)
    assert np.mean([not item.right for item in verdicts]) >= 0.99
    assert np.mean([item.pair for item in verdicts]) >= 0.99
    assert all(False in (item.relation, item.place) for item in verdicts)


@degraded
def test_front_and_behind_swapped_are_wrong(overlapped, degrade):
    def turned(scene):
        front, back = overlapping(scene)
        wrong = with_object(scene, front, depth=scene.objects[back].depth)
        wrong = with_object(wrong, back, depth=scene.objects[front].depth)
        return dataclasses.replace(scene, objects=wrong.objects), [front, back]

    verdicts = judged(overlapped, degrade, turned)
    assert np.mean([item.depth is False for item in verdicts]) >= 0.99
    assert not any(item.right for item in verdicts if item.depth is False)


def test_objects_pulled_apart_are_not_in_front_of_one_another(overlapped):
    checked = 0
    for scene, size in overlapped:
        if len(scene.objects) > 2:
            continue
        front, back = overlapping(scene)
        width, height = scene.canvas.width, scene.canvas.height
        wrong = with_object(scene, front, x=0.2 * width, y=0.3 * height)
        wrong = dataclasses.replace(scene, objects=with_object(wrong, back, x=0.8 * width, y=0.7 * height).objects)
        result = check(render(wrong, *size), scene)
        assert [item.depth for item in result.objects] == [False, False]
        assert all(item.pair for item in result.objects)
        checked += 1
    assert checked > 20


def test_objects_that_only_touch_are_in_front_of_nothing():
    canvas = canvas_of(64, 64, 1.0)
    objects = tuple(
        SceneObject("circle", color, "large", x, 0.5, 0.135) for color, x in (("red", 0.37), ("blue", 0.63))
    )
    scene = Scene(objects, ((0, "in front of", 1),), (), canvas, "free")
    components = find_overlapping_components(render(scene, 64, 64), canvas)
    assert [(c.color, c.shape, c.in_front_of) for c in components] == [
        ("red", "circle", frozenset()),
        ("blue", "circle", frozenset()),
    ]


def test_an_object_of_two_colors_is_no_object():
    canvas = canvas_of(64, 64, 1.0)
    scene = Scene((SceneObject("square", "red", "large", 0.5, 0.5, 0.14),), (), (), canvas, "free")
    image = render(scene, 64, 64)
    half = image[:, 32:]
    half[(half == (216, 36, 44)).all(axis=-1)] = (32, 96, 216)
    result = check(image, scene)
    assert not result.all_right
    assert not result.objects[0].shape


@pytest.mark.parametrize("image", NOTHING.values(), ids=NOTHING.keys())
def test_blank_images_and_noise_have_nothing_right(image):
    image = np.tile(image, (2, 2, 1))
    for scene in map(free_source(overlaps=0.5).scene, range(30)):
        result = check(image, scene)
        assert not any(item.right or item.pair for item in result.objects)


def test_sizes_are_left_open_where_they_are_not_asked(apart):
    scene, size = apart[0]
    assert {item.size for item in check(render(scene, *size), scene, sizes_asked=False).objects} == {None}
    sums = accuracies([check(render(scene, *size), scene, sizes_asked=False)])
    assert (sums["size"].correct, sums["size"].total) == (0, 0)
