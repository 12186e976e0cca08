"""Evaluation on the built-in scenes: scores by kind, language and position in the prompt, and for held-out pairs."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from stored_data import write_folder
from test_evaluate import request

from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.shapes.checker import check
from lidit_jax.data.shapes.layout import QUADRANTS, SceneLayout
from lidit_jax.data.shapes.rendering import render
from lidit_jax.data.shapes.scene import DEPTH_RELATIONS, HELD_OUT_PAIRS
from lidit_jax.errors import UserError
from lidit_jax.evaluate.generate import generate_benchmark
from lidit_jax.evaluate.scene_benchmark import ShapesBenchmark
from lidit_jax.evaluate.scenes import (
    COUNTS,
    HELD_OUT,
    OVERLAP,
    SceneEvaluation,
    check_evaluation,
    named_at,
    report_scenes,
    score_scenes,
)
from lidit_jax.score.quarters import mean_by_quarter
from lidit_jax.stages.run import run_stages


def drawn(prompts, change=lambda scene: scene):
    return [render(change(prompt.scene), 48, 48) for prompt in prompts]


@pytest.fixture(scope="module")
def prompts():
    return SceneEvaluation(6, 4, 6, 8).prompts(QUADRANTS, 48, 48)


def test_scenes_as_they_should_be_are_right_in_every_group(prompts):
    scores = score_scenes(prompts, drawn(prompts))
    for group, accuracy in scores.items():
        for what, found in accuracy.items():
            assert found.correct == found.total, (group, what)
    assert list(scores)[:2] == ["all scenes", "two objects"]
    assert scores["all scenes"]["scenes"].total == 6 + 6 + 8
    assert scores["four objects"]["pair"].total == 32
    assert scores["four objects, Chinese"]["scenes"].total == 4
    assert scores[HELD_OUT]["objects"].total == 8


def test_an_object_is_counted_at_the_place_where_the_prompt_names_it(prompts):
    """Renders the last object of four in another colour."""

    def recolored(scene):
        if len(scene.objects) < 4:
            return scene
        last = scene.objects[-1]
        others = {(item.color, item.shape) for item in scene.objects}
        color = next(c for c in ("red", "green", "blue", "black", "purple") if (c, last.shape) not in others)
        return dataclasses.replace(scene, objects=(*scene.objects[:-1], dataclasses.replace(last, color=color)))

    scores = score_scenes(prompts, drawn(prompts, recolored))
    right = [scores[named_at("four objects", place)]["pair"].value for place in range(4)]
    assert right == [1, 1, 1, 0]
    assert scores["four objects"]["scenes"].correct == 0
    assert scores["three objects"]["scenes"].value == 1
    assert scores["all scenes"]["scenes"].correct == 12


def test_places_of_four_objects_are_averaged_as_in_the_positional_bias_benchmark(prompts):
    """Uses several images per prompt, some with missing objects."""
    four = [prompt for prompt in prompts if prompt.kind == "four objects"]
    generator, images, right = np.random.default_rng(0), [], []
    for prompt in four:
        for _ in range(3):
            keep = generator.random(4) < 0.6
            kept = tuple(item for item, is_kept in zip(prompt.scene.objects, keep, strict=True) if is_kept)
            images.append(render(dataclasses.replace(prompt.scene, objects=kept, relations=()), 48, 48))
            right.append([object_.pair for object_ in check(images[-1], prompt.scene).objects])
    scores = score_scenes([prompt for prompt in four for _ in range(3)], images)
    places = [scores[named_at("four objects", place)]["pair"].value for place in range(4)]
    where = np.tile(range(4), len(images)), [4] * (4 * len(images)), np.repeat(np.arange(len(four)), 3 * 4)
    np.testing.assert_allclose(places, mean_by_quarter(np.ravel(right), *where))
    assert 0.3 < np.mean(places) < 0.9


def test_the_held_out_pair_is_counted_apart_from_what_stands_beside_it(prompts):
    def without_held_out(scene):
        kept = tuple(item for item in scene.objects if (item.color, item.shape) not in HELD_OUT_PAIRS)
        return dataclasses.replace(scene, objects=kept)

    scores = score_scenes(prompts, drawn(prompts, without_held_out))
    itself = scores["the held-out pair itself"]
    assert itself["pair"].correct == 0
    beside = scores[HELD_OUT]["pair"].total - itself["pair"].total
    assert scores[HELD_OUT]["pair"].correct == beside
    assert "scenes" not in itself


def test_shapes_are_drawn_judged_and_judged_again(trained_workdir, tmp_path):
    out = tmp_path / "out"
    asked = request(trained_workdir, "shapes", None, out, num_images=2, num_scenes=3)
    generate_benchmark(asked)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["all scenes"]["scenes"]["total"] == 3 * 3 * 2
    assert scores["three objects"]["objects"]["total"] == 3 * 3 * 2
    assert len(list(out.glob("*_*.png"))) == 4 * 3 * 2
    (out / "00004_1.png").unlink()
    (out / "scores.json").unlink()
    generate_benchmark(asked)
    assert json.loads((out / "scores.json").read_text()) == scores
    (out / "00004_0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="00004_0.png is damaged"):
        generate_benchmark(asked)
    (out / "00004_0.png").unlink()
    with pytest.raises(UserError, match="00004_0.png can't be read"):
        generate_benchmark(asked)


def test_scenes_come_without_a_file_and_other_benchmarks_with_one(trained_workdir, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n")
    with pytest.raises(UserError, match="leave --file out"):
        generate_benchmark(request(trained_workdir, "shapes", epath.Path(file), tmp_path / "out"))
    with pytest.raises(UserError, match="--file is required"):
        generate_benchmark(request(trained_workdir, "prompts", None, tmp_path / "out"))
    with pytest.raises(UserError, match="num_scenes=0"):
        ShapesBenchmark(0, 1, QUADRANTS, 32, 32)
    assert not (tmp_path / "out").exists()


def test_prompts_are_in_both_languages_and_of_no_training_scene(prompts):
    languages = [prompt.language for prompt in prompts if prompt.kind == "four objects"]
    assert languages == ["en", "zh"] * 4
    for prompt in prompts:
        is_held_out = [(item.color, item.shape) in HELD_OUT_PAIRS for item in prompt.scene.objects]
        assert any(is_held_out) == (prompt.kind == HELD_OUT)
    assert np.unique([prompt.prompt for prompt in prompts]).size > 20


# --- layout "free" --------------------------------------------------------------------------------------------------

FREE = SceneLayout("free", overlaps=0.25)


@pytest.fixture(scope="module")
def free_prompts():
    return SceneEvaluation.of_each(8, FREE).prompts(FREE, 48, 80)


def test_free_scenes_are_asked_by_count_with_overlaps_apart(free_prompts):
    kinds = collections.Counter(prompt.kind for prompt in free_prompts)
    assert kinds == dict.fromkeys([*COUNTS.values(), HELD_OUT, OVERLAP], 8)
    for prompt in free_prompts:
        depths = [relation for _, relation, _ in prompt.scene.relations if relation in DEPTH_RELATIONS]
        assert len(depths) == (prompt.kind == OVERLAP)
        assert prompt.scene.canvas.width / prompt.scene.canvas.height == pytest.approx(80 / 48)
        if prompt.kind in COUNTS.values():
            assert COUNTS[len(prompt.scene.objects)] == prompt.kind
        assert prompt.sizes_asked == any(word in prompt.prompt for word in ("small", "large", "小", "大"))
    assert 0 < sum(prompt.sizes_asked for prompt in free_prompts) < len(free_prompts) / 2


def test_free_scenes_are_judged_by_place_depth_and_named_position(free_prompts, tmp_path):
    images = [render(prompt.scene, 48, 80) for prompt in free_prompts]
    scores = score_scenes(free_prompts, images)
    for group, accuracy in scores.items():
        for what, found in accuracy.items():
            assert found.correct >= 0.97 * found.total, (group, what)
    assert scores["all scenes"]["scenes"].total == 7 * 8
    assert scores["all scenes"]["place"].total > 40
    assert scores[OVERLAP]["depth"].total == 2 * 8
    assert "depth" not in scores["six objects"]
    assert scores[named_at("six objects", 5)]["objects"].total == 8
    assert list(scores)[:2] == ["all scenes", "one object"]
    report_scenes(scores, free_prompts, images, epath.Path(tmp_path))
    table = json.loads((tmp_path / "scores.json").read_text())
    assert table["one object"]["place"]["total"] == scores["one object"]["place"].total
    # On an empty image everything is wrong.
    blank = [np.full_like(image, 255) for image in images]
    assert score_scenes(free_prompts, blank)["all scenes"]["place"].correct == 0


def test_an_evaluation_without_prompts_is_rejected():
    with pytest.raises(UserError, match="evaluate asks for no prompts: set a field above 0"):
        check_evaluation(SceneEvaluation(0, 0, 0, 0), DataConfig(source="shapes", resolution=32))


def test_only_counts_of_the_training_are_asked_of_each():
    asked = SceneEvaluation.of_each(5, SceneLayout("free", shares=(0, 1, 0, 1)))
    assert {name for name, count in dataclasses.asdict(asked).items() if count} == {
        "two_objects",
        "four_objects",
        "held_out_pairs",
    }


@pytest.mark.parametrize(
    ("evaluate", "data", "words"),
    [
        ({"five_objects": 4}, {}, "five objects are asked for, but data.layout='quadrants' has at most 4"),
        ({"overlapping_objects": 4}, {}, "evaluate.overlapping_objects"),
        ({"two_objects": -1}, {}, "evaluate.two_objects=-1"),
        (
            {"six_objects": 1},
            {"layout": "free", "resolution": 64, "object_scale": 1.1},
            "room for 5 objects, not for 6",
        ),
        ({}, {"source": "folder"}, "only scenes of data.source='shapes'"),
    ],
)
def test_an_evaluation_that_cannot_be_is_rejected_before_anything_is_trained(tmp_path, evaluate, data, words):
    config = tiny_config()
    config.evaluate.update(evaluate)
    config.data.update({"object_shares": (1, 1)} | data)
    if config.data.source == "folder":
        config.data.path = str(write_folder(tmp_path / "images", "jsonl"))
        config.data.captions = {"text": 1.0}
    if config.data.get("layout") != "free":
        del config.data.object_shares
    with pytest.raises(UserError, match=words):
        run_stages(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
