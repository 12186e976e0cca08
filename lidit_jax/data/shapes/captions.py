"""Captions of scenes in English and Chinese; each names every object once, with its relation or place."""

import dataclasses
from typing import Literal

import numpy as np

from lidit_jax.data.shapes.scene import OPPOSITES, Scene, SceneObject
from lidit_jax.errors import UserError

LANGUAGES = ("en", "zh")
Language = Literal["en", "zh"]

# Share of captions in layout "free" that state the objects' sizes.
_SIZES_PROBABILITY = 0.25

_CHINESE_COLORS = {"red": "红", "yellow": "黄", "green": "绿", "blue": "蓝", "purple": "紫", "black": "黑"}
_CHINESE_SHAPES = {"circle": "圆圈", "square": "方块", "triangle": "三角", "star": "星星", "cross": "十字"}
_CHINESE_SIZES = {"small": "小", "large": "大"}
_CHINESE_RELATIONS = {"left of": "左", "right of": "右", "above": "上", "below": "下"}
_CHINESE_DEPTHS = {"in front of": "前面", "behind": "后面"}
_CHINESE_PLACES = {
    "at the top left": "左上角",
    "at the top right": "右上角",
    "at the bottom left": "左下角",
    "at the bottom right": "右下角",
    "in the middle": "中间",
    "on the left": "左边",
    "on the right": "右边",
    "at the top": "上边",
    "at the bottom": "下边",
}


def caption(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    """Describes a scene with a randomly chosen template.

    A caption gives the colour and shape of every object and all relations and places that the scene states. Some
    captions also give the sizes; in layout "quadrants", only those of one or two objects do. "itself" and "它" (it)
    refer to the object named last, which keeps captions of many objects short and unambiguous. In layout "quadrants",
    some captions of two objects give the half of the image in which each object lies instead of their relation. The
    facts are the same, because the two are in opposite halves.

    Args:
      scene: the scene to describe. In layout "quadrants", consecutive objects must be related.
      language: "en" or "zh" (simplified Chinese).
      rng: random generator that chooses the template.

    Returns:
      The caption.

    Raises:
      UserError: the language is neither "en" nor "zh".
    """
    if language not in LANGUAGES:
        raise UserError(f'language={language!r} is unknown: use "en" or "zh"')
    return (_free_caption if scene.layout == "free" else _quadrants_caption)(scene, language, rng)


def states_sizes(text: str) -> bool:
    """Returns True if a caption states the sizes of its objects."""
    return any(word in text for word in (*_CHINESE_SIZES, *_CHINESE_SIZES.values()))


# --- layout "quadrants" -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Template:
    """Format strings of a caption in layout "quadrants".

    Placeholders: {a} and {b} are the names of the two objects with an indefinite article, {the_a} and {the_b} with
    "the", {bare_a} and {bare_b} without an article; {relation} is the relation of a to b; {place_a} and {place_b} are
    the halves of the image that follow from that relation.

    Attributes:
      single: the caption of a scene of one object.
      first: the first relation of a scene of several objects.
      further: each further relation, appended to `first`.
      placed: replaces `first` in scenes of exactly two objects; empty for templates without such a form.
      with_sizes: whether names include sizes in scenes of one or two objects.
    """

    single: str
    first: str
    further: str
    placed: str = ""
    with_sizes: bool = False


_HALVES = {
    "en": {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"},
    "zh": _CHINESE_RELATIONS,
}

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


def _quadrants_caption(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    template = _TEMPLATES[language][rng.integers(len(_TEMPLATES[language]))]
    names = _names(scene, language, template.with_sizes and len(scene.objects) <= 2)
    if not scene.relations:
        return template.single.format(**_forms(names[0], language, "a"))
    first = template.placed if template.placed and len(scene.objects) == 2 else template.first
    text, halves = "", _HALVES[language]
    for i, relation, j in scene.relations:
        text += (template.further if text else first).format(
            **_forms(names[i], language, "a"),
            **_forms(names[j], language, "b"),
            relation=relation if language == "en" else _CHINESE_RELATIONS[relation],
            place_a=halves[relation],
            place_b=halves[OPPOSITES[relation]],
        )
    return text


# --- layout "free" ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _FreeTemplate:
    """Format strings of a clause in layout "free": one clause per unrelated object or per chain of related objects.

    Placeholders are those of `_Template`; {place} is one of `PLACES`.

    Attributes:
      single: an unrelated object without a place.
      placed: an unrelated object with a place.
      related: the first relation of a chain.
      further: each further relation of a chain, appended to `related`.
      side: suffix of Chinese spatial relations: "边" or "方".
    """

    single: str
    placed: str
    related: str
    further: str
    side: str = ""


_FREE_TEMPLATES: dict[str, tuple[_FreeTemplate, ...]] = {
    "en": (
        _FreeTemplate("{a}", "{a} {place}", "{a} {relation} {b}", ", itself {relation} {b}"),
        _FreeTemplate("{bare_a}", "{bare_a} {place}", "{bare_a} {relation} {bare_b}", ", itself {relation} {bare_b}"),
        _FreeTemplate(
            "one {bare_a}", "{the_a} is {place}", "{the_a} is {relation} {the_b}", ", itself {relation} {the_b}"
        ),
        _FreeTemplate("there is {a}", "{place} {a}", "{a} {relation} {b}", ", itself {relation} {b}"),
    ),
    "zh": (
        _FreeTemplate("{a}", "{a}在{place}", "{a}在{b}{relation}", ",它在{b}{relation}", "边"),
        _FreeTemplate("一个{a}", "{place}{a}", "{a}在{b}{relation}", ",它在{b}{relation}", "边"),
        _FreeTemplate("有{a}", "{place}有{a}", "{a}在{b}{relation}", ",它在{b}{relation}", "方"),
    ),
}


def _free_caption(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    template = _FREE_TEMPLATES[language][rng.integers(len(_FREE_TEMPLATES[language]))]
    names = _names(scene, language, bool(rng.random() < _SIZES_PROBABILITY))
    relations, places = {i: relation for i, relation, _ in scene.relations}, dict(scene.places)
    text = ""
    for k, name in enumerate(names):
        if k in relations:
            text += (template.further if k - 1 in relations else _separator(text) + template.related).format(
                **_forms(name, language, "a"),
                **_forms(names[k + 1], language, "b"),
                relation=_relation(relations[k], language, template.side),
            )
        elif k - 1 not in relations:
            place = places.get(k, "")
            text += (_separator(text) + (template.placed if place else template.single)).format(
                **_forms(name, language, "a"),
                place=place if language == "en" else _CHINESE_PLACES.get(place, ""),
            )
    return text


def _separator(text: str) -> str:
    return "; " if text and text.isascii() else ";" if text else ""


def _relation(relation: str, language: Language, side: str) -> str:
    if language == "en":
        return relation
    return _CHINESE_DEPTHS.get(relation) or _CHINESE_RELATIONS[relation] + side


# --- names ------------------------------------------------------------------------------------------------------


def _names(scene: Scene, language: Language, with_sizes: bool) -> list[str]:
    name = _english_name if language == "en" else _chinese_name
    return [name(item, with_sizes) for item in scene.objects]


def _english_name(item: SceneObject, with_size: bool) -> str:
    return " ".join([item.size] * with_size + [item.color, item.shape])


def _chinese_name(item: SceneObject, with_size: bool) -> str:
    # The size goes before the shape, because "大红" (large + red) means scarlet.
    between = "色" + _CHINESE_SIZES[item.size] if with_size else ""
    return _CHINESE_COLORS[item.color] + between + _CHINESE_SHAPES[item.shape]


def _forms(name: str, language: Language, letter: str) -> dict[str, str]:
    """Returns the values of an object's name placeholders: {"a": …, "bare_a": …, "the_a": …} for letter "a"."""
    indefinite = f"{'an' if name[0] in 'aeiou' else 'a'} {name}" if language == "en" else name
    return {letter: indefinite, f"bare_{letter}": name, f"the_{letter}": f"the {name}"}
