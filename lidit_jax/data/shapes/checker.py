"""Exact checker of the built-in data set: tells which objects, colours, shapes, sizes and relations are correct.

It finds the connected components of the image and assigns them to the objects of the scene. Absolute positions do not
matter, only relations between objects and the places that captions state.
"""

import math

import numpy as np
from scipy import optimize

from lidit_jax.data.shapes.overlaps import find_overlapping_components
from lidit_jax.data.shapes.reading import Component, find_components
from lidit_jax.data.shapes.scene import DEPTH_RELATIONS, Scene, SceneObject, holds, place_holds
from lidit_jax.data.shapes.scores import ObjectCheck, SceneCheck


def check(image: np.ndarray, scene: Scene, sizes_asked: bool = True) -> SceneCheck:
    """Checks an image against its scene.

    Args:
      image: uint8 [H, W, 3].
      scene: the expected scene. Its positions only break ties between equally good assignments. In layout
        "quadrants", objects that touch form one component, which matches no object; in "free", objects may overlap.
      sizes_asked: whether sizes are checked.

    Returns:
      The verdict on each object and the number of components assigned to no object.

    Raises:
      ValueError: the image is not uint8 [H, W, 3].
    """
    find = find_overlapping_components if scene.layout == "free" else find_components
    components = find(image, scene.canvas)
    height, width, _ = image.shape
    assigned = _assign(components, scene, height, width)
    in_space, in_depth, places = [], [], {}
    for i, relation, j in scene.relations:
        held = _relation_holds(relation, i, j, components, assigned)
        (in_depth if relation in DEPTH_RELATIONS else in_space).append((i, j, held))
    for i, place in scene.places:
        places[i] = i in assigned and _is_at_place(components[assigned[i]], place, scene, height, width)
    objects = []
    for index, item in enumerate(scene.objects):
        component = components[assigned[index]] if index in assigned else None
        objects.append(
            ObjectCheck(
                color=component is not None and component.color == item.color,
                shape=component is not None and component.shape == item.shape,
                size=(component is not None and component.size == item.size) if sizes_asked else None,
                relation=_all_hold(in_space, index),
                depth=_all_hold(in_depth, index),
                place=places.get(index),
            )
        )
    return SceneCheck(tuple(objects), extra=len(components) - len(assigned))


def _all_hold(relations: list[tuple[int, int, bool]], index: int) -> bool | None:
    """Returns whether all relations of an object hold; None if it has none."""
    held = [is_held for i, j, is_held in relations if index in (i, j)]
    return all(held) if held else None


def _assign(components: list[Component], scene: Scene, height: int, width: int) -> dict[int, int]:
    """Assigns components to objects with the fewest wrong colours and shapes.

    Returns:
      {object index: component index}. Objects missing from the image are left out.
    """
    if not components:
        return {}
    scale, left, top = scene.canvas.in_pixels(height, width)
    costs = np.zeros((len(scene.objects), len(components)))
    for i, item in enumerate(scene.objects):
        for k, component in enumerate(components):
            distance = math.hypot((component.x - left) / scale - item.x, (component.y - top) / scale - item.y)
            # Colour weighs slightly more than shape, shape more than size; position only breaks ties.
            costs[i, k] = _mismatch(component, item) + 0.01 * distance
    pairs = zip(*optimize.linear_sum_assignment(costs), strict=True)
    return {int(i): int(k) for i, k in pairs if _is_candidate(components[k], scene.objects[i])}


def _mismatch(component: Component, item: SceneObject) -> float:
    return 1.1 * (component.color != item.color) + (component.shape != item.shape) + 0.1 * (component.size != item.size)


def _is_candidate(component: Component, item: SceneObject) -> bool:
    return component.color == item.color or component.shape == item.shape


def _relation_holds(relation: str, i: int, j: int, components: list[Component], assigned: dict[int, int]) -> bool:
    if i not in assigned or j not in assigned:
        return False
    first, second = components[assigned[i]], components[assigned[j]]
    if relation == "in front of":
        return assigned[j] in first.in_front_of
    if relation == "behind":
        return assigned[i] in second.in_front_of
    return holds(relation, first.x - second.x, first.y - second.y)


def _is_at_place(component: Component, place: str, scene: Scene, height: int, width: int) -> bool:
    scale, left, top = scene.canvas.in_pixels(height, width)
    x, y = (component.x - left) / (scale * scene.canvas.width), (component.y - top) / (scale * scene.canvas.height)
    return place_holds(place, x, y)
