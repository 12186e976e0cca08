"""Scenes in layout "free": one to six objects anywhere, with overlaps and places, and their captions."""

import collections
import hashlib
import itertools
import math
import re

import numpy as np
import pytest
from conftest import load_config
from test_shapes import CHINESE_OBJECT, CHINESE_WORDS, ENGLISH_OBJECT, appearances

from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.shapes import free
from lidit_jax.data.shapes.captions import caption, states_sizes
from lidit_jax.data.shapes.layout import SceneLayout, sample_scene
from lidit_jax.data.shapes.rendering import coverage, render
from lidit_jax.data.shapes.scene import (
    BACKGROUND,
    COLORS,
    DEPTH_RELATIONS,
    HELD_OUT_PAIRS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    along_and_across,
)
from lidit_jax.data.shapes.source import ShapesSource
from lidit_jax.errors import UserError
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer

# (height, width, object scale).
CANVASES = [(64, 64, 1.0), (96, 96, 0.8), (128, 128, 0.7), (48, 80, 1.0)]


def free_source(height=64, width=64, scale=1.0, overlaps=0.25, **kwargs) -> ShapesSource:
    return ShapesSource(
        height=height, width=width, layout=SceneLayout("free", scale=scale, overlaps=overlaps), **kwargs
    )


@pytest.fixture(scope="module")
def scenes() -> dict[tuple, list[Scene]]:
    sources = {canvas: free_source(*canvas, num_examples=300) for canvas in CANVASES}
    return {canvas: [source.scene(i) for i in range(300)] for canvas, source in sources.items()}


def overlapping(scene: Scene) -> tuple[int, int] | None:
    """Returns the indices (front, back) of the overlapping pair; None if there is none."""
    pairs = [
        (i, j) if relation == "in front of" else (j, i)
        for i, relation, j in scene.relations
        if relation not in RELATIONS
    ]
    assert len(pairs) <= 1
    return pairs[0] if pairs else None


# --- scenes stay identical across versions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fingerprint", "digest"),
    [
        (
            {},
            "ShapesSource(version=3, num_examples=1000000, height=32, width=32, seed=0, pairs=train, num_objects=None)",
            "1a12ed7e9a55f631",
        ),
        (
            {"num_examples": 200, "height": 48, "width": 80, "seed": 1000003, "pairs": "held_out", "num_objects": 3},
            "ShapesSource(version=3, num_examples=200, height=48, width=80, seed=1000003, pairs=held_out, "
            "num_objects=3)",
            "0ef8ae270ec57e31",
        ),
    ],
)
def test_scenes_in_quadrants_are_those_of_earlier_versions_bit_for_bit(arguments, fingerprint, digest):
    source = ShapesSource(**arguments)
    assert source.fingerprint == fingerprint
    found = hashlib.sha256(fingerprint.encode())
    for i in range(100):
        example = source[i]
        found.update(repr((example["key"], example["captions"], source.scene(i).relations)).encode())
        found.update(example["image"].tobytes())
    assert found.hexdigest()[:16] == digest


# --- scenes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", CANVASES)
def test_objects_are_inside_apart_different_and_large_enough(scenes, canvas):
    height, width, _ = canvas
    for scene in scenes[canvas]:
        assert len(set(appearances(scene))) == len(scene.objects) <= 6
        assert not set(appearances(scene)) & set(HELD_OUT_PAIRS)
        scale, left, top = scene.canvas.in_pixels(height, width)
        assert (left, top) == pytest.approx((0, 0), abs=1e-9)
        pair = set(overlapping(scene) or ())
        for i, item in enumerate(scene.objects):
            low, high = scene.canvas.radii(item.size)
            assert low <= item.radius <= high
            assert item.radius * scale >= 4.5
            assert scale * (item.x - item.radius) >= 1.5 and scale * (item.x + item.radius) <= width - 1.5
            assert scale * (item.y - item.radius) >= 1.5 and scale * (item.y + item.radius) <= height - 1.5
            for j, other in enumerate(scene.objects[:i]):
                apart = max(abs(item.x - other.x), abs(item.y - other.y)) - item.radius - other.radius
                assert apart * scale > 2.5 or {i, j} == pair


def test_sizes_are_told_apart_and_shrink_with_the_scale():
    for scale in (0.6, 1.0):
        canvas = free.canvas_of(64, 64, scale)
        assert canvas.large[0] > 1.3 * canvas.small[1]
        assert canvas.small[1] < canvas.size_boundary < canvas.large[0]
    assert free.canvas_of(64, 64, 0.5).large[1] == free.canvas_of(64, 64, 1.0).large[1] / 2
    # Sizes in pixels do not depend on the aspect ratio.
    wide, square = free.canvas_of(32, 128, 1.0), free.canvas_of(64, 64, 1.0)
    assert wide.in_pixels(32, 128)[0] == square.in_pixels(64, 64)[0] == 64


@pytest.mark.parametrize("canvas", CANVASES)
def test_stated_relations_and_places_are_clear_and_name_every_object(scenes, canvas):
    for scene in scenes[canvas]:
        extent = scene.canvas.width, scene.canvas.height
        for i, relation, j in scene.relations:
            assert j == i + 1
            first, second = scene.objects[i], scene.objects[j]
            if relation in RELATIONS:
                along, across = along_and_across(relation, first.x - second.x, first.y - second.y)
                assert along >= max(0.12, 2 * across)
            else:
                assert (first.depth < second.depth) == (relation == "in front of")
        for i, place in scene.places:
            for at, size, side in zip((scene.objects[i].x, scene.objects[i].y), extent, PLACES[place], strict=True):
                assert (
                    side is None or {-1: at / size < 1 / 3, 0: abs(at / size - 0.5) < 0.14, 1: at / size > 2 / 3}[side]
                )
        named = {i for i, _ in scene.places} | {k for i, _, j in scene.relations for k in (i, j)}
        assert len(scene.objects) == 1 or named == set(range(len(scene.objects)))
        assert not {i for i, _ in scene.places} & {k for i, _, j in scene.relations for k in (i, j)}


def test_one_object_hides_a_quarter_to_nearly_half_of_the_smaller_one():
    shares = []
    for canvas in CANVASES:
        source = free_source(*canvas[:3], overlaps=1.0, num_examples=100)
        for i in range(100):
            scene = source.scene(i)
            pair = overlapping(scene)
            assert (pair is None) == (len(scene.objects) == 1)
            if pair is None:
                continue
            front, back = (scene.objects[k] for k in pair)
            assert front.color != back.color and front.depth < back.depth
            around = np.arange(-0.4, 0.4, 1 / 160)
            masks = [
                coverage(o.shape, (around + front.x - o.x) * 160, (around + front.y - o.y) * 160, o.radius * 160) > 0.5
                for o in (front, back)
            ]
            shares.append((masks[0] & masks[1]).sum() / min(mask.sum() for mask in masks))
    assert min(shares) > 0.23 and max(shares) < 0.47  # measured on pixels
    assert np.std(shares) > 0.02


@pytest.mark.parametrize(("front", "back"), list(itertools.product(SHAPES, SHAPES)))
def test_every_two_shapes_can_overlap_in_every_size(front, back):
    for front_size, back_size in itertools.product(SIZES, SIZES):
        assert len(free.overlap_offsets(front, front_size, back, back_size)) >= 2


def test_what_is_in_front_is_rendered_over_what_is_behind():
    source = free_source(overlaps=1.0, num_objects=2)
    for i in range(40):
        scene = source.scene(i)
        front, back = (scene.objects[k] for k in overlapping(scene))
        image = render(scene, 64, 64)
        grid = np.arange(64) + 0.5
        solid = coverage(front.shape, grid - front.x * 64, grid - front.y * 64, front.radius * 64) == 1
        assert (image[solid] == COLORS[front.color]).all()
        assert (image == COLORS[back.color]).all(axis=-1).sum() > 10


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_scenes_fill_the_canvas(size):
    source = free_source(*size, num_examples=200)
    seen = np.any([(source[i]["image"] != BACKGROUND).any(axis=-1) for i in range(200)], axis=0)
    assert seen[3:-3, 3:-3].mean() > 0.97
    assert not seen[0].any() and not seen[:, 0].any()


def test_counts_and_overlaps_occur_as_often_as_asked():
    layout = SceneLayout("free", shares=(1, 0, 1, 0, 0, 2), overlaps=0.5)
    source = ShapesSource(height=64, width=64, layout=layout)
    found = [source.scene(i) for i in range(1200)]
    counts = collections.Counter(len(scene.objects) for scene in found)
    assert {count: number / 1200 for count, number in counts.items()} == pytest.approx(
        {1: 0.25, 3: 0.25, 6: 0.5}, abs=0.05
    )
    several = [scene for scene in found if len(scene.objects) > 1]
    assert np.mean([overlapping(scene) is not None for scene in several]) == pytest.approx(0.5, abs=0.05)
    relations = collections.Counter(relation for scene in found for _, relation, _ in scene.relations)
    assert set(relations) == {*RELATIONS, *DEPTH_RELATIONS}
    assert {place for scene in found for _, place in scene.places} == set(PLACES)
    stated = collections.Counter(bool(scene.places) for scene in several), sum(relations.values())
    assert min(stated[0].values()) > 120 and stated[1] > 800
    assert all(
        0.25 < np.mean([o.size == "large" for s in found if len(s.objects) == n for o in s.objects]) < 0.6
        for n in (1, 3, 6)
    )


def test_held_out_scenes_show_a_held_out_pair():
    source = free_source(pairs="held_out", num_examples=100)
    assert all(set(appearances(source.scene(i))) & set(HELD_OUT_PAIRS) for i in range(100))


def test_six_objects_find_room_in_few_attempts_where_the_canvas_is_full(monkeypatch):
    """Uses the largest accepted scale, on a square canvas and at an aspect ratio of 1:3."""
    monkeypatch.setattr(free, "_ATTEMPTS", 40)
    for height, width in ((64, 64), (40, 120)):
        scale = max(s / 100 for s in range(60, 130) if free.max_objects(free.canvas_of(height, width, s / 100)) == 6)
        layout = SceneLayout("free", scale=scale, overlaps=0.5)
        for seed in range(150):
            scene = sample_scene(np.random.default_rng(seed), 6, "all", layout, height, width)
            assert len(scene.objects) == 6


# --- captions ---------------------------------------------------------------------------------------------------

ENGLISH_RELATIONS = "|".join((*RELATIONS, *DEPTH_RELATIONS))
ENGLISH_PLACES = "|".join(PLACES)
CHINESE_RELATIONS = {
    "左": "left of",
    "右": "right of",
    "上": "above",
    "下": "below",
    "前": "in front of",
    "后": "behind",
}
CHINESE_PLACES = dict(
    zip(("左上角", "右上角", "左下角", "右下角", "中间", "左边", "右边", "上边", "下边"), PLACES, strict=True)
)


def parse_english(text: str) -> tuple[list, list, list]:
    """Parses a caption into (size, color, shape) in order, (object, relation, object) and (object, place)."""
    objects, facts, places = [], [], []
    for chain in text.removeprefix("there is ").split("; "):
        for link in chain.split(", "):
            found = [(match["size"], match["color"], match["shape"]) for match in re.finditer(ENGLISH_OBJECT, link)]
            words = re.sub(ENGLISH_OBJECT, "*", link).replace("* is ", "* ")
            if words.startswith("itself "):
                words, found = words.replace("itself", "*"), [objects[-1], *found]
                objects += found[1:]
            else:
                objects += found
            if match := re.fullmatch(rf"\* ({ENGLISH_RELATIONS}) \*", words):
                facts.append((found[0], match[1], found[1]))
            elif match := re.fullmatch(rf"\* ({ENGLISH_PLACES})|({ENGLISH_PLACES}) \*", words):
                places.append((found[0], match[1] or match[2]))
            else:
                assert words == "*", text
    return objects, facts, places


def parse_chinese(text: str) -> tuple[list, list, list]:
    objects, facts, places = [], [], []
    for chain in text.removeprefix("一个").split(";"):
        for link in chain.split(","):
            found = [
                tuple(CHINESE_WORDS[match[part]] for part in ("size", "color", "shape"))
                for match in re.finditer(CHINESE_OBJECT, link)
            ]
            words = re.sub(CHINESE_OBJECT, "*", link)
            if words.startswith("它"):
                words, found = words.replace("它", "*"), [objects[-1], *found]
                objects += found[1:]
            else:
                objects += found
            if match := re.fullmatch(r"\*在\*(?:([左右上下])[边方]|([前后])面)", words):
                facts.append((found[0], CHINESE_RELATIONS[match[1] or match[2]], found[1]))
            elif match := re.fullmatch(r"\*在(.+)|([^*有]+)有?\*", words):
                places.append((found[0], CHINESE_PLACES[match[1] or match[2]]))
            else:
                assert words in ("*", "有*"), text
    return objects, facts, places


@pytest.mark.parametrize(("language", "parse"), [("en", parse_english), ("zh", parse_chinese)])
def test_captions_say_exactly_what_the_scene_states_each_object_once(scenes, language, parse):
    sized = 0
    for seed, scene in enumerate(scenes[CANVASES[0]] + scenes[CANVASES[3]]):
        text = caption(scene, language, np.random.default_rng(seed))
        objects, facts, places = parse(text)
        with_sizes = objects[0][0] is not None
        assert with_sizes == states_sizes(text)
        sized += with_sizes
        expected = [(item.size if with_sizes else None, item.color, item.shape) for item in scene.objects]
        assert objects == expected, text
        assert facts == [(expected[i], relation, expected[j]) for i, relation, j in scene.relations], text
        assert places == [(expected[i], place) for i, place in scene.places], text
    assert 0.2 < sized / 600 < 0.3


def test_small_tokenizers_keep_every_word_apart_and_captions_fit_the_config():
    config = load_config("scenes")
    examples = free_source(num_examples=1500).describe(range(1500))
    texts = [example["captions"][language] for example in examples for language in ("en", "zh")]
    tokenizer = train_tokenizer([config.text.instruction, *texts[:1500]], config.encoders.llama.model.vocab_size)
    words = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    assert {"front", "behind", "middle", "top"} <= words
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in words)
    characters = {character for text in texts for character in text if ord(character) > 0x2FFF}
    assert {"前", "后", "面", "角"} <= characters
    assert all(len(tokenizer(character)["input_ids"]) == 1 for character in characters)
    prompts = PromptTokenizer(tokenizer, config.text.max_length, config.text.instruction)(texts)
    assert not prompts["truncated"].any()
    # The longest possible caption: six objects, each with its size and a corner.
    longest = "; ".join(["the small purple triangle is at the bottom right"] * 6), ";".join(["左上角有蓝色小星星"] * 6)
    assert not PromptTokenizer(tokenizer, config.text.max_length, config.text.instruction)(longest)["truncated"].any()


# --- options ----------------------------------------------------------------------------------------------------


def test_fingerprints_tell_layouts_apart():
    layouts = [SceneLayout(), SceneLayout("free"), SceneLayout("free", scale=0.9), SceneLayout("free", overlaps=0.1)]
    layouts += [SceneLayout("free", shares=(1, 1)), SceneLayout(shares=(1, 1, 0, 0))]
    assert len({ShapesSource(height=64, width=64, layout=layout).fingerprint for layout in layouts}) == len(layouts)


def data(**changes) -> DataConfig:
    return DataConfig(**{"source": "shapes", "resolution": 64, "layout": "free"} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "grid"}, "data.layout='grid' is unknown"),
        ({"layout": "quadrants", "overlaps": 0.1}, "go with data.layout='free'"),
        ({"layout": "quadrants", "object_scale": 0.5}, "go with data.layout='free'"),
        ({"layout": "quadrants", "object_shares": (1, 1, 1, 1, 1, 1)}, "1, 2, 3 and 4 objects"),
        ({"object_shares": (1,) * 7}, "6 at most"),
        ({"object_shares": ()}, "6 at most"),
        ({"object_shares": (0, 0)}, "6 at most"),
        ({"object_shares": ("a",)}, "6 at most"),
        ({"overlaps": 1.5}, "data.overlaps=1.5"),
        ({"overlaps": math.nan}, "data.overlaps=nan"),
        ({"object_scale": 0.0}, "data.object_scale=0.0"),
        ({"object_scale": 0.5}, r"a radius of 2.8 px: give at least 0\.8"),
        ({"resolution": 32}, "a radius of 2.8 px"),
        ({"object_scale": 1.5}, "leaves room for 2 objects, not for 6"),
    ],
)
def test_impossible_layouts_are_rejected_in_one_line(changes, words):
    with pytest.raises(UserError, match=words) as raised:
        data(**changes)
    assert "\n" not in str(raised.value)


def test_large_objects_are_accepted_where_there_are_few():
    assert data(object_scale=1.5, object_shares=(1, 1)).scene_layout.probabilities == (0.5, 0.5)
    with pytest.raises(UserError, match="holds 1 to 6 objects"):
        free_source(num_objects=7)


@pytest.mark.parametrize("resolution", ["64", "128"])
def test_the_config_s_data_are_accepted_and_its_images_are_of_its_size(resolution):
    config = load_config("scenes", resolution)
    section = data(**{name: config.data[name] for name in ("resolution", "object_shares", "object_scale", "overlaps")})
    assert section.resolution == config.vae.model.sample_size == int(resolution)
    with pytest.raises(UserError, match="64 or 128"):
        load_config("scenes", "100")
