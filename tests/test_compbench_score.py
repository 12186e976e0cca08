"""Tests T2I-CompBench's scores: the official rules on hand-made cases, and reports from generated images."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from hypothesis import given
from vqa_models import random_image, save_blip, save_vilt

from lidit_jax.errors import UserError
from lidit_jax.evaluate import noun_phrases
from lidit_jax.evaluate.noun_phrases import split_noun_phrases
from lidit_jax.images import save_png
from lidit_jax.score import compbench
from lidit_jax.score.compbench import attribute_score, category_of, score
from lidit_jax.score.compbench_rules import SpatialPrompt, iou, parse_spatial, relation_score, spatial_score
from lidit_jax.score.detectors import Detection
from lidit_jax.score.results import ScoreRequest

LISTS = ROOT.parent / "shared/data/benchmarks/t2i_compbench"
needs_lists = pytest.mark.skipif(not LISTS.exists(), reason="T2I-CompBench's lists are not here")


@pytest.fixture(autouse=True)
def without_spacy(monkeypatch):
    """Splits noun phrases by our rules, whether or not spaCy is installed."""
    monkeypatch.setattr(noun_phrases, "_spacy_chunks", lambda: None)


def prompts_of(category):
    return [line.strip() for line in (LISTS / f"{category}_val.txt").read_text().splitlines()]


# --- noun phrases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
        ("a red apple and yellow bananas", ["a red apple", "yellow bananas"]),
        ("rubber sole shoes and fluffy clouds", ["rubber sole shoes", "fluffy clouds"]),
        ("a tall oak tree and a short blade of grass", ["a tall oak tree", "a short blade", "grass"]),
        ("a cubic Rubik's cube and a pentagonal game box", ["a cubic Rubik's cube", "a pentagonal game box"]),
        ("A black and white cat sits in a white sink.", ["A black and white cat", "a white sink"]),
        ("A white bath tub sits empty in a tan, clean bathroom.", ["A white bath tub", "a tan, clean bathroom"]),
        ("The white and red clock with a yellow roof reads 11:44.", ["The white and red clock", "a yellow roof"]),
        (
            "The wooden ladder and glass jar hold the metallic screws for the shelf on the fabric workbench.",
            ["The wooden ladder", "glass jar", "the metallic screws", "the shelf", "the fabric workbench"],
        ),
        (
            "The triangular sail and the square deck were the defining features of the sailboat.",
            ["The triangular sail", "the square deck", "the defining features", "the sailboat"],
        ),
        ("", []),
    ],
)
def test_noun_phrases_are_those_of_the_official_model(prompt, phrases):
    assert split_noun_phrases(prompt) == phrases


@needs_lists
@pytest.mark.parametrize("category", ["color", "shape", "texture"])
def test_every_plain_prompt_of_the_lists_is_split_at_its_and(category):
    prompts = [prompt for prompt in prompts_of(category) if prompt.startswith(("a ", "an ", "rubber ", "wooden "))]
    plain = [p for p in prompts if p.count(" and ") == 1 and not {"of", "with", "in", "sitting"} & set(p.split())]
    assert len(plain) > 200
    for prompt in plain:
        assert split_noun_phrases(prompt) == prompt.rstrip(".").split(" and ")


@needs_lists
@pytest.mark.parametrize("category", ["color", "shape", "texture"])
def test_every_prompt_of_the_lists_has_phrases_that_are_in_it_in_order(category):
    for prompt in prompts_of(category):
        phrases = split_noun_phrases(prompt)
        assert 2 <= len(phrases) <= 9
        start = 0
        for phrase in phrases:
            start = prompt.index(phrase, start) + len(phrase)


@given(st.text(max_size=200))
def test_any_text_is_split(prompt):
    for phrase in split_noun_phrases(prompt):
        assert phrase.strip() == phrase != ""


# --- attributes -------------------------------------------------------------------------------------------------


def test_a_images_score_is_the_product_of_its_phrases():
    asked = []

    def probabilities(questions):
        asked.extend(questions)
        return [0.9, 0.5]

    assert attribute_score("a green bench and a blue bowl", probabilities) == (
        0.45,
        {"a green bench": 0.9, "a blue bowl": 0.5},
    )
    assert asked == ["a green bench?", "a blue bowl?"]


def test_eight_phrases_are_asked_and_no_parts_of_an_object():
    def halves(questions):
        return [0.5] * len(questions)

    assert attribute_score("the left of a cup and the side of a red door and top", halves)[0] == 0.25
    many = " and ".join(f"a red thing{i}" for i in range(12))
    assert attribute_score(many, halves)[0] == pytest.approx(0.5**8, abs=5e-5)
    assert attribute_score("", halves) == (1.0, {})


def test_a_category_is_told_by_the_files_name_or_by_the_prompts():
    assert category_of("shape_val.txt", ["a red car"]) == "shape"
    assert category_of("spatial.txt", []) == category_of(None, ["a cat near a dog", "a red cat next to a dog"])
    assert category_of("mine.txt", ["a red car and a blue round cup", "a green plate"]) == "color"
    for name in ("3d_spatial_val.txt", "complex_val.txt", "numeracy_val.txt", "non_spatial_val.txt"):
        with pytest.raises(UserError, match="which has no scorer here"):
            category_of(name, ["a red car"])
    with pytest.raises(UserError, match="do not tell which category"):
        category_of(None, ["a red car", "a round car"])


@needs_lists
@pytest.mark.parametrize("category", compbench.CATEGORIES)
def test_the_lists_prompts_tell_their_category(category):
    assert category_of(None, prompts_of(category)) == category


# --- spatial ----------------------------------------------------------------------------------------------------

LEFT, RIGHT = (0, 100, 50, 150), (200, 110, 260, 160)
BELOW = (10, 300, 50, 340)


@pytest.mark.parametrize(
    ("relation", "first", "second", "expected"),
    [
        ("on the left of", LEFT, RIGHT, 1),
        ("on the right of", LEFT, RIGHT, 0),
        ("on the right of", RIGHT, LEFT, 1),
        ("on the top of", LEFT, RIGHT, 0),  # 10 pixels higher, but 205 to the left
        ("on the top of", LEFT, BELOW, 1),
        ("on the bottom of", BELOW, LEFT, 1),
        ("on the bottom of", LEFT, BELOW, 0),
        ("on the left of", LEFT, LEFT, 0),
        # The boxes share 60 of 140 columns: an IoU of 3/7.
        ("on the left of", (0, 0, 100, 10), (40, 0, 140, 10), 0.1 / (60 / 140)),
        ("near", LEFT, RIGHT, 1),  # 10 apart along one axis
        ("next to", (0, 0, 10, 10), (149, 400, 159, 410), 1),
        ("on side of", (0, 0, 10, 10), (300, 200, 310, 210), 0.5),
    ],
)
def test_relations_are_scored_as_officially(relation, first, second, expected):
    assert relation_score(relation, first, second) == pytest.approx(expected)


boxes = st.tuples(*[st.floats(0, 400)] * 2, *[st.floats(1, 200)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


def official_position(locality, box1, box2):
    """Reimplements determine_position of the official script, with its names."""
    dx = (box2[0] + box2[2]) / 2 - (box1[0] + box1[2]) / 2
    dy = (box2[1] + box2[3]) / 2 - (box1[1] + box1[3]) / 2
    if locality in ("next to", "on side of", "near"):
        return 1 if abs(dx) < 150 or abs(dy) < 150 else 150 / max(abs(dx), abs(dy))
    horizontal = locality in ("on the right of", "on the left of")
    if not (abs(dx) > abs(dy) if horizontal else abs(dy) > abs(dx)):
        return 0
    towards = {"on the right of": dx < 0, "on the left of": dx > 0, "on the bottom of": dy < 0, "on the top of": dy > 0}
    soft = 1 if iou(box1, box2) < 0.1 else 0.1 / iou(box1, box2)
    return soft if towards[locality] else 0


@given(boxes, boxes)
def test_relations_are_the_official_ones_for_any_boxes(first, second):
    for relation in ("near", "on the left of", "on the right of", "on the top of", "on the bottom of"):
        assert relation_score(relation, first, second) == pytest.approx(official_position(relation, first, second))


@given(boxes, boxes)
def test_the_iou_is_symmetric_and_a_share(first, second):
    assert iou(first, second) == pytest.approx(iou(second, first))
    assert 0 <= iou(first, second) <= 1 + 1e-9
    assert iou(first, first) == pytest.approx(1)


def test_a_image_has_half_of_its_objects_certainties_and_half_of_their_relation():
    prompt = SpatialPrompt("cat", "on the left of", "dog")
    cat, dog = Detection("cat", 0.8, LEFT), Detection("dog", 0.6, RIGHT)
    assert spatial_score(prompt, [cat, dog], 479, 479) == pytest.approx(0.25 * 1.4 + 0.5)
    assert spatial_score(prompt, [cat], 479, 479) == 0  # 0.2, below 0.5
    assert spatial_score(prompt, [], 479, 479) == 0
    assert spatial_score(SpatialPrompt("cat", "on the right of", "dog"), [cat, dog], 479, 479) == 0  # 0.35
    assert spatial_score(prompt, [cat, Detection("dog", 0.5, RIGHT)], 479, 479) == 0  # 0.5 is not above the threshold
    surer = Detection("Dog", 0.9, (-200, 110, -140, 160))
    assert spatial_score(prompt, [dog, surer, cat], 479, 479) == 0  # the surer dog is on the wrong side


def test_near_is_measured_in_a_image_as_the_official_detector_sees_it():
    prompt = SpatialPrompt("cat", "near", "dog")
    cat, dog = Detection("cat", 1, (0, 0, 10, 10)), Detection("dog", 1, (400, 400, 410, 410))
    assert spatial_score(prompt, [cat, dog], 479, 479) == pytest.approx(0.5 + 150 / 400 / 2)
    assert spatial_score(prompt, [cat, dog], 2 * 479, 2 * 479) == pytest.approx(0.5 + 150 / 200 / 2)
    assert spatial_score(prompt, [cat, dog], 479, 960) == pytest.approx(0.5 + 150 / 200 / 2)  # resized to 480 wide


@needs_lists
def test_all_prompts_of_the_spatial_list_are_parsed():
    parsed = [parse_spatial(prompt) for prompt in prompts_of("spatial")]
    assert all(parsed)
    assert all(" " not in prompt.first + prompt.second for prompt in parsed)
    assert parse_spatial("a girl on the top of an airplane") == SpatialPrompt("person", "on the top of", "airplane")
    assert parse_spatial("a red car and a blue cup") is None


# --- from images to a report ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("blip"))


def request(folder, out, **more):
    return ScoreRequest(benchmark="t2i_compbench", images=epath.Path(folder), out=epath.Path(out), **more)


def draw(folder, prompts):
    for number, prompt in enumerate(prompts):
        save_png(random_image(number), epath.Path(folder) / "samples" / f"{prompt}_{number:06}.png")
    return folder


def test_colours_are_scored_by_blip_and_a_rerun_asks_nothing(tmp_path, blip_folder, monkeypatch):
    folder = draw(tmp_path / "images", ["a red car and a blue cup"] * 2 + ["a green apple"])
    asked = request(folder, tmp_path / "out", vqa=str(blip_folder))
    report = score(asked)
    model = compbench.load_blip(str(blip_folder))
    decoded = [
        compbench.read_image(epath.Path(folder) / "samples" / image.name)
        for image in compbench.find_images(epath.Path(folder))
    ]
    pair = [round(math.prod(model.yes_probabilities(d, ["a red car?", "a blue cup?"])), 4) for d in decoded[:2]]
    [single] = model.yes_probabilities(decoded[2], ["a green apple?"])
    assert report.columns == {"color": pytest.approx(100 * np.mean([*pair, single]))}
    assert report.counts == {"color": 3}
    assert report.details["noun_phrases"] == "rules"
    monkeypatch.setattr(compbench, "read_image", None)
    assert score(asked) == report


class LeftAndRight:
    classes = frozenset(("cat", "cell phone"))

    def __call__(self, image, min_score=0.0):
        return [Detection("cat", 1.0, LEFT), Detection("cell phone", 0.8, RIGHT)]


def test_spatial_prompts_are_scored_by_any_detector(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compbench, "load_detector", lambda name: LeftAndRight())
    monkeypatch.setattr("lidit_jax.score.results.model_folder", lambda flag, name: epath.Path(name))
    monkeypatch.setattr("lidit_jax.score.results.folder_digest", lambda folder: "0")
    prompts = ["a cat on the left of a phone", "a cat on the right of a phone", "a cat near a frog"]
    folder = draw(tmp_path / "images", prompts)
    report = score(request(folder, tmp_path / "out", detector="any"))
    assert report.columns == {"spatial": pytest.approx(100 * (0.45 + 0.5) / 3)}
    assert report.details == {"objects_that_the_detector_lacks": ["frog"]}


def test_what_does_not_fit_is_said(tmp_path, blip_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no samples/PROMPT_000000"):
        score(request(empty, tmp_path / "out", vqa=str(blip_folder)))
    folder = draw(tmp_path / "images", ["a red car"])
    with pytest.raises(UserError, match="--vqa is required"):
        score(request(folder, tmp_path / "out"))
    with pytest.raises(UserError, match="--detector is required"):
        score(request(draw(tmp_path / "spatial", ["a cat near a dog"]), tmp_path / "out"))
    with pytest.raises(UserError, match="is not a BLIP"):
        score(request(folder, tmp_path / "out", vqa=str(save_vilt(tmp_path))))
    file = epath.Path(tmp_path / "color_val.txt")
    file.write_text("a red car\na blue car\n")
    with pytest.raises(UserError, match="1 of its prompts have no image, such as 'a blue car'"):
        score(request(folder, tmp_path / "out", vqa=str(blip_folder), file=file))
    file.write_text("a blue cup\n")
    draw(folder, ["a blue cup"])
    with pytest.raises(UserError, match="1 prompts of the images are not in it, such as 'a red car'"):
        score(request(folder, tmp_path / "out", vqa=str(blip_folder), file=file))
    with pytest.raises(UserError, match="no such file"):
        score(request(folder, tmp_path / "out", vqa=str(blip_folder), file=epath.Path(tmp_path / "none_val.txt")))
    assert not (tmp_path / "out").exists()
