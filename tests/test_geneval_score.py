"""Tests GenEval's rules on hand-made detections, its models (tiny and random), and the scoring command."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.score import detectors, geneval
from lidit_jax.score.detectors import Detection, instances, load_detector, mask_bounds
from lidit_jax.score.eval_extra import require_extra
from lidit_jax.score.geneval import (
    COLORS,
    ClipColors,
    cut_out,
    judge,
    objects_by_class,
    read_prompts,
    relations,
    score,
    summary,
)
from lidit_jax.score.results import ResultsFile, ScoreRequest

torch.set_num_threads(1)


def at(x, y, size=10.0, label="cow", score=0.9):
    """Returns a detection whose box is a square around (x, y)."""
    half = size / 2
    return Detection(label, score, (x - half, y - half, x + half, y + half))


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def judged(objects, include, exclude=(), colors=()):
    """Judges detections against clauses.

    Args:
      objects: class -> detections.
      include: GenEval's clauses of objects that must be there.
      exclude: GenEval's clauses of objects that must not.
      colors: answers to the questions for an object's colour, in order.
    """
    colors = iter(colors)
    metadata = {"tag": "x", "prompt": "x", "include": include, "exclude": list(exclude)}
    return judge(metadata, objects, lambda name, found: [next(colors) for _ in found])


# --- rules --------------------------------------------------------------------------------------------------------


def test_an_object_must_be_there_as_often_as_asked():
    two = {"cow": [at(0, 0), at(50, 0)]}
    assert judged(two, [clause("cow")]) == (True, "")  # the prompt asks for one; a second is no error
    assert judged(two, [clause("cow", 2)]) == (True, "")
    assert judged(two, [clause("cow", 3)]) == (False, "2 cow, not 3")
    assert judged(two, [clause("cow"), clause("bench")]) == (False, "0 bench, not 1")


def test_more_than_asked_is_wrong_only_where_it_is_excluded():
    include, exclude = [clause("cow", 2)], [clause("cow", 3)]
    assert judged({"cow": [at(0, 0)] * 2}, include, exclude) == (True, "")
    assert judged({"cow": [at(0, 0)] * 3}, include, exclude) == (False, "3 cow, not fewer than 3")
    assert judged({"cow": [at(0, 0)] * 3}, include) == (True, "")


def test_colours_are_those_of_the_surest_objects():
    cows = {"cow": [at(0, 0), at(50, 0)]}
    assert judged(cows, [clause("cow", color="red")], colors=["red", "blue"]) == (True, "")
    assert judged(cows, [clause("cow", color="red")], colors=["blue", "red"]) == (False, "cow is blue, not red")
    assert judged(cows, [clause("cow", 2, color="red")], colors=["red", "red"]) == (True, "")
    assert judged(cows, [clause("cow", 2, color="red")], colors=["red", "blue"])[0] is False


def test_no_colour_is_asked_of_what_is_not_there():
    def never(name, found):
        raise AssertionError

    assert judge({"include": [clause("cow", color="red")]}, {}, never) == (False, "0 cow, not 1")


@pytest.mark.parametrize("relation", geneval.RELATIONS)
def test_every_pair_of_surest_objects_must_be_in_the_place_asked(relation):
    offset = {"left of": (-30, 0), "right of": (30, 0), "above": (0, -30), "below": (0, 30)}[relation]
    include = [clause("bench"), clause("cow", position=[relation, 0])]
    bench = at(100, 100, label="bench")
    there, opposite = at(100 + offset[0], 100 + offset[1]), at(100 - offset[0], 100 - offset[1])
    assert judged({"bench": [bench], "cow": [there]}, include) == (True, "")
    assert judged({"bench": [bench], "cow": [there, opposite]}, include) == (True, "")  # the prompt asks for one
    right, reason = judged({"bench": [bench], "cow": [opposite, there]}, include)
    assert not right
    assert reason.endswith(f"not {relation}")
    several = [clause("bench"), clause("cow", 2, position=[relation, 0])]
    assert judged({"bench": [bench], "cow": [there, opposite]}, several)[0] is False


def test_a_place_needs_the_other_object_to_be_as_asked():
    objects = {"bench": [at(100, 100)], "cow": [at(50, 100)]}
    include = [clause("bench", color="red"), clause("cow", position=["left of", 0])]
    assert judged(objects, include, colors=["red"]) == (True, "")
    right, reason = judged(objects, include, colors=["blue"])
    assert (right, reason) == (False, "bench is blue, not red; nothing for cow to be left of")


def test_places_have_a_margin_of_a_tenth_of_both_sizes():
    # Two squares with sides of 10: centres at most 2 apart have no relation.
    assert relations(at(0, 0).box, at(2, 0).box) == frozenset()
    # 4 apart, 2 beyond the margin: exactly half of the distance, which is not more than half.
    assert relations(at(0, 0).box, at(4, 0).box) == frozenset()
    assert relations(at(0, 0).box, at(4.1, 0).box) == {"left of"}
    # Each axis has its own margin: two boxes 60 wide and 10 high have margins of 12 and 2.
    wide = (-30.0, -5.0, 30.0, 5.0)
    assert relations(wide, (-20.0, -5.0, 40.0, 5.0)) == frozenset()
    assert relations(wide, (-30.0, 5.0, 30.0, 15.0)) == {"above"}
    # A diagonal has two relations: (30, 40) apart, (28, 38) beyond the margin, distance 50: shares of 0.56 and 0.76.
    assert relations(at(30, 40).box, at(0, 0).box) == {"right of", "below"}
    # (10, 40) apart, (8, 38) beyond the margin, distance 41.2: shares of 0.19 and 0.92.
    assert relations(at(10, 40).box, at(0, 0).box) == {"below"}
    assert relations(at(0, 0).box, at(0, 0).box) == frozenset()


coordinate = st.integers(0, 512)
boxes = st.tuples(coordinate, coordinate, st.integers(1, 256), st.integers(1, 256)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(boxes, boxes)
def test_places_turn_round_with_the_objects(one, other):
    seen = relations(one, other)
    assert relations(other, one) == {OPPOSITE[relation] for relation in seen}
    assert not any(OPPOSITE[relation] in seen for relation in seen)
    mirrored = [(-b[2], b[1], -b[0], b[3]) for b in (one, other)]
    assert relations(*mirrored) == {OPPOSITE[r] if r in ("left of", "right of") else r for r in seen}


@given(st.lists(st.tuples(st.sampled_from(["cow", "bench"]), st.floats(0, 1))), st.sampled_from(["counting", "colors"]))
def test_objects_count_over_the_tasks_threshold_and_up_to_16_of_a_class(found, tag):
    objects = objects_by_class([at(0, 0, label=label, score=score) for label, score in found], tag)
    threshold = 0.9 if tag == "counting" else 0.3
    for label in ("cow", "bench"):
        scores = sorted((score for name, score in found if name == label and score > threshold), reverse=True)[:16]
        assert [detection.score for detection in objects.get(label, [])] == scores
        assert (label in objects) == bool(scores)


def test_overlapping_objects_all_count():
    assert len(objects_by_class([at(0, 0), at(0, 0)], "position")["cow"]) == 2


def test_three_classes_of_coco_have_other_names_in_prompts():
    assert judged({"mouse": [at(0, 0)]}, [clause("computer mouse")], [clause("computer mouse", 2)]) == (True, "")
    assert judged({"mouse": [at(0, 0)] * 2}, [clause("computer mouse")], [clause("computer mouse", 2)])[0] is False


def test_overall_is_the_mean_of_the_tasks_and_not_of_the_images():
    def of(tag, prompt):
        return {"tag": tag, "prompt": prompt, "include": [clause("cow")]}

    results = [(of("single_object", "a"), True)] * 4 + [(of("counting", "b"), True), (of("counting", "c"), False)]
    results += [(of("my own", "d"), False)]
    report = summary(results)
    assert report.columns == {"single": 1.0, "count": 0.5, "my own": 0.0, "overall": 0.5}
    assert report.counts == {"single": 4, "count": 2, "my own": 1, "overall": 7}
    assert report.details == {
        "images": 7, "prompts": 4, "right_images": 5 / 7, "prompts_with_a_right_image": 0.5,
    }  # fmt: skip


# --- detectors ----------------------------------------------------------------------------------------------------


def test_a_query_is_an_instance_of_every_class_and_a_mask_weighs_its_score():
    class_logits = torch.tensor([[0.7, 0.2, 0.1], [0.15, 0.1, 0.75]]).log()
    masks = torch.full((2, 4, 6), -1.0)
    masks[0, 1:3, 2:5] = np.log(3.0)  # a probability of 0.75
    masks[1, 0, 0] = np.log(9.0)
    found = instances(class_logits, masks, (4, 6), (4, 6), (4, 6))
    assert [(label, round(value, 4)) for label, value, _ in found] == [(0, 0.525), (1, 0.15), (0, 0.135), (1, 0.09)]
    assert mask_bounds(found[0][2]) == (2, 1, 5, 3)
    assert mask_bounds(found[2][2]) == (0, 0, 1, 1)
    assert [label for label, _, _ in instances(class_logits, masks, (4, 6), (4, 6), (4, 6), 0.15)] == [0]
    assert instances(class_logits, -masks.abs(), (4, 6), (4, 6), (4, 6)) == []  # empty masks


def test_instances_leave_out_the_padding_and_have_the_images_size():
    masks = torch.full((1, 8, 8), -1.0)
    masks[:, :, 4:] = 1.0  # the right half of the input, whose rightmost quarter is padding
    [(_, _, mask)] = instances(torch.tensor([[9.0, 0.0]]), masks, (32, 32), (32, 24), (16, 12))
    assert mask.shape == (16, 12)
    assert mask_bounds(mask) == (8, 0, 12, 16)


def test_instances_are_those_of_transformers_where_both_have_one_size():
    torch.manual_seed(0)
    class_logits, masks = torch.randn(1, 8, 6), torch.randn(1, 8, 96, 96)
    outputs = transformers.models.mask2former.modeling_mask2former.Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=masks
    )
    [theirs] = transformers.Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.2, return_binary_maps=True
    )
    size = (384, 384)
    ours = instances(class_logits[0], masks[0], size, size, size)
    by_score = {(label, round(value, 5)): mask for label, value, mask in ours}
    assert len(theirs["segments_info"]) >= 4
    for info, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True):
        matches = [m for (label, value), m in by_score.items()
                   if label == info["label_id"] and abs(value - info["score"]) < 1e-4]  # fmt: skip
        assert any((m == mask.numpy().astype(bool)).all() for m in matches)


def test_images_are_resized_as_the_detector_is_tested():
    assert detectors.detector_size(512, 512) == (800, 800)
    assert detectors.detector_size(1024, 512) == (1333, 667)
    assert detectors.detector_size(480, 640) == (800, 1067)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saves tiny random models: a Mask2Former that classifies everything as a bench, a YOLOS and a CLIP."""
    from lidit_jax.text.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("scorers")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    narrow = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, **narrow, encoder_feedforward_dim=8, dim_feedforward=8, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, num_queries=4, id2label={0: "bench", 1: "cow"},
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.bias.data = torch.tensor([9.0, 0.0, 0.0])
    model.save_pretrained(folder / "mask2former")
    transformers.Mask2FormerImageProcessorPil().save_pretrained(folder / "mask2former")

    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {0: "cow", 1: "tvmonitor", 2: "N/A"}
    config = transformers.YolosConfig(
        **narrow, image_size=[32, 32], patch_size=8, num_detection_tokens=4, id2label=names
    )
    model = transformers.YolosForObjectDetection(config)
    model.class_labels_classifier.layers[-1].bias.data = torch.tensor([0.0, 3.0, 0.0, 0.0])
    model.save_pretrained(folder / "yolos")
    size = {"shortest_edge": 32, "longest_edge": 64}
    transformers.YolosImageProcessorPil(size=size).save_pretrained(folder / "yolos")

    tokenizer = train_tokenizer(["a photo of a red-colored cow"], 280)
    text = {**narrow, "vocab_size": len(tokenizer)}
    vision = {**narrow, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder


@pytest.fixture
def small(monkeypatch):
    """Shrinks the detector's input, for speed."""
    monkeypatch.setattr(detectors, "SHORT_SIDE", 64)


def random_image(seed=0, size=(24, 32)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_mask2former_gives_masks_and_boxes_of_the_images_size(models, small):
    detector = load_detector(str(models / "mask2former"))
    assert detector.classes == {"bench", "cow"}
    found = detector(random_image(), 0.3)
    assert found
    assert {detection.label for detection in found} == {"bench"}
    for detection in found:
        assert detection.mask.shape == (24, 32)
        assert detection.box == mask_bounds(detection.mask)
        assert 0.3 < detection.score <= 1
    scores = [detection.score for detection in found]
    assert scores == sorted(scores, reverse=True)


def test_other_detectors_give_boxes_under_cocos_names(models):
    detector = load_detector(str(models / "yolos"))
    assert detector.classes == {"cow", "tv"}
    found = detector(random_image())
    assert [detection.label for detection in found] == ["tv"] * 4
    assert all(detection.mask is None and len(detection.box) == 4 for detection in found)
    assert detector(random_image(), found[0].score + 0.01) == []


def test_an_object_is_cut_out_on_grey():
    mask = np.zeros((24, 32), bool)
    mask[4:8, 10:20] = True
    mask[4, 10] = False
    image = random_image()
    cut = np.asarray(cut_out(image, Detection("cow", 1.0, mask_bounds(mask), mask)))
    assert cut.shape == (4, 10, 3)
    np.testing.assert_array_equal(cut[0, 0], [0x99] * 3)
    np.testing.assert_array_equal(cut[1:], image[5:8, 10:20])
    np.testing.assert_array_equal(cut_out(image, Detection("cow", 1.0, (10, 4, 20, 8))), image[4:8, 10:20])


def test_colours_are_those_that_clip_itself_finds_nearest(models):
    colors = ClipColors(str(models / "clip"))
    found = [at(12, 12), at(20, 12), at(8, 10, 12)]
    named = colors(random_image(), "cow", found)
    model = transformers.CLIPModel.from_pretrained(models / "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "clip")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(models / "clip")
    texts = [[f"a photo of a {c} cow", f"a photo of a {c}-colored cow", f"a photo of a {c} object"] for c in COLORS]
    crops = [Image.fromarray(random_image()).crop(one.box) for one in found]
    pixels = processor(images=crops, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        of_colors = []
        for three in texts:
            out = model(**tokenizer(three, padding=True, return_tensors="pt"), pixel_values=pixels)
            of_colors.append(torch.nn.functional.normalize(out.text_embeds.mean(0), dim=0))
        likeness = out.image_embeds @ torch.stack(of_colors).T
    assert named == [COLORS[i] for i in likeness.argmax(1)]


def test_a_half_precision_model_judges_in_float32(models, tmp_path):
    transformers.CLIPModel.from_pretrained(models / "clip").half().save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((models / "clip" / name).read_bytes())
    assert ClipColors(str(tmp_path))(random_image(), "cow", [at(12, 12)])[0] in COLORS


# --- the command --------------------------------------------------------------------------------------------------

METADATA = [
    {"tag": "colors", "include": [clause("bench", color="red")], "prompt": "a photo of a red bench"},
    {"tag": "two_object", "include": [clause("bench"), clause("cow")], "prompt": "a photo of a bench and a cow"},
]


@pytest.fixture
def drawn(tmp_path):
    """Writes two prompts with two images each."""
    folder = tmp_path / "drawn"
    for index, metadata in enumerate(METADATA):
        (folder / f"{index:05}" / "samples").mkdir(parents=True)
        (folder / f"{index:05}" / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        for number in range(2):
            image = Image.fromarray(random_image(10 * index + number))
            image.save(folder / f"{index:05}" / "samples" / f"{number:04}.png")
    (folder / "00000" / "grid.png").write_bytes(b"not looked at")
    return epath.Path(folder)


def request(models, drawn, **more):
    more = {"detector": str(models / "mask2former"), "clip": str(models / "clip"), "out": drawn.parent / "out"} | more
    return ScoreRequest(benchmark="geneval", images=drawn, **more)


def test_a_folder_is_scored_and_a_rerun_goes_on(models, drawn, small, monkeypatch):
    asked = request(models, drawn)
    read = []
    monkeypatch.setattr(geneval, "read_image", lambda file: read.append(file) or read_image(file))
    report = score(asked)
    assert len(read) == 4
    assert set(report.columns) == {"two", "colors", "overall"}
    assert report.columns["two"] == 0  # the model finds only benches
    results = json.loads((asked.out / "results.json").read_text())
    assert list(results["results"]) == [f"{i:05}/samples/{n:04}.png" for i in range(2) for n in range(2)]
    assert results["results"]["00001/samples/0000.png"]["reason"] == "0 cow, not 1"
    del results["results"]["00001/samples/0001.png"]  # as if the run had been killed before this image
    (asked.out / "results.json").write_text(json.dumps(results))
    assert score(asked) == report
    assert len(read) == 5
    assert score(asked) == report
    assert len(read) == 5


COMMAND = """
import sys
from lidit_jax import cli
from lidit_jax.score import detectors
from lidit_jax.score.__main__ import main

detectors.SHORT_SIDE = 64
try:
    cli.run(main)
except SystemExit as end:
    assert not end.code, end.code
sys.argv += ["--model_name=another", "--detector=" + sys.argv[-1].partition("=")[2]]
cli.run(main)
"""


def test_the_command_scores_and_reports_and_a_mistake_is_one_line(models, drawn):
    flags = [f"--images={drawn}", "--out=out", f"--detector={models / 'mask2former'}", "--model_name=mine"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--benchmark=geneval", *flags, f"--clip={models / 'clip'}"],
        cwd=drawn.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "| **mine** |" in done.stderr, done.stderr
    assert "| LI-DiT-10B |" in done.stderr
    assert done.returncode == 2, done.stderr  # COMMAND's second run has CLIP as its detector
    assert "can't be loaded as AutoModelForObjectDetection" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    out = drawn.parent / "out"
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md", "report.png", "results.json"]
    assert json.loads((out / "report.json").read_text())["model"] == "mine"
    assert "**mine**" in (out / "report.md").read_text()


def test_what_can_not_be_scored_is_said_before_a_model_is_loaded(models, drawn, tmp_path):
    nothing = tmp_path / "nothing"
    with pytest.raises(UserError, match="no such folder: generate images"):
        score(request(models, epath.Path(nothing)))
    nothing.mkdir()
    with pytest.raises(UserError, match="no folder 00000 in it"):
        score(request(models, epath.Path(nothing)))
    for flag in ("detector", "clip"):
        with pytest.raises(UserError, match=f"--{flag} is required for --benchmark=geneval"):
            score(request(models, drawn, **{flag: None}))
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps(m) + "\n" for m in [*METADATA, METADATA[0] | {"prompt": "a third"}]))
    with pytest.raises(UserError, match="has 2 of the 3 prompts"):
        score(request(models, drawn, file=epath.Path(file)))
    (drawn / "00001" / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="finish generating the benchmark's images"):
        score(request(models, drawn))
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_fitting_models_are_said(models, drawn, tmp_path):
    with pytest.raises(UserError, match="--detector=.*: no such folder"):
        score(request(models, drawn, detector=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--detector=.*: no config\.json in it"):
        score(request(models, drawn, detector=str(tmp_path / "empty")))
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        score(request(models, drawn, detector=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="--clip=.*CLIPModel"):
        score(request(models, drawn, clip=str(models / "yolos")))
    with pytest.raises(UserError, match="has no class 'bench'"):
        score(request(models, drawn, detector=str(models / "yolos")))
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_said_and_the_results_before_it_are_kept(models, drawn, small, tmp_path):
    damaged = drawn / "00001" / "samples" / "0000.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match=r"00001/samples/0000\.png is damaged"):
        score(request(models, drawn))
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == 2


def test_results_of_other_images_or_models_are_not_overwritten(models, drawn, small, tmp_path):
    score(request(models, drawn))
    before = (tmp_path / "out" / "results.json").read_bytes()
    Image.fromarray(random_image(size=(16, 16))).save(drawn / "00000" / "samples" / "0001.png")
    with pytest.raises(UserError, match="has results of another images "):
        score(request(models, drawn))
    with pytest.raises(UserError, match=r"is not empty and has no results\.json"):
        score(request(models, drawn, out=drawn))
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("\xff", "is damaged"),
        ("[]", "it has no tag or no prompt"),
        ({"include": []}, "no lists of clauses"),
        ({"include": [3]}, "a clause has no class"),
        ({"include": [clause("cow", 0)]}, "cow: its count is not"),
        ({"include": [clause("cow", True)]}, "cow: its count is not"),
        ({"include": [clause("cow")], "exclude": {}}, "no lists of clauses"),
        ({"include": [clause("cow", color="beige")]}, "'beige' is not one of red"),
        ({"include": [clause("cow", color=[])]}, "is not one of red"),
        ({"include": [clause("cow", position=["left of", 0])]}, "not a relation to an earlier object"),
        ({"include": [clause("cow"), clause("dog", position=["near", 0])]}, "not a relation to an earlier object"),
    ],
)
def test_metadata_that_is_not_genevals_is_said(drawn, metadata, message):
    if isinstance(metadata, dict):
        metadata = json.dumps({"tag": "x", "prompt": "x"} | metadata)
    (drawn / "00001" / "metadata.jsonl").write_bytes(metadata.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_prompts(drawn)


def test_images_must_be_there_for_every_prompt(drawn):
    for path in (drawn / "00001" / "samples").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no image in it"):
        read_prompts(drawn)


# --- results ------------------------------------------------------------------------------------------------------


def test_results_are_kept_when_scoring_fails_and_belong_to_their_provenance(tmp_path):
    out, calls = epath.Path(tmp_path / "out"), []

    def fails_at_c(name):
        calls.append(name)
        if name == "c":
            raise KeyboardInterrupt
        return {"score": name}

    with pytest.raises(KeyboardInterrupt), ResultsFile(out, {"model": "x"}) as results:
        results.complete(["a", "b", "c"], fails_at_c)
    with ResultsFile(out, {"model": "x"}) as results:
        found = results.complete(["b", "a", "d"], lambda name: calls.append(name) or name)
    assert list(found.items()) == [("b", {"score": "b"}), ("a", {"score": "a"}), ("d", "d")]
    assert calls == ["a", "b", "c", "d"]
    before = (out / "results.json").read_bytes()
    for facts in ({"model": "y"}, {"model": "x", "more": 1}, {}):
        with pytest.raises(UserError, match="has results of another mo"):
            ResultsFile(out, facts)
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"facts": 3, "results": {}}', '{"facts": {}}', "\xff"])
def test_a_damaged_results_file_is_said(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="is damaged: name another --out"):
        ResultsFile(epath.Path(tmp_path), {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: name a folder"):
        ResultsFile(epath.Path(tmp_path / "file"), {})


def test_scoring_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'scoring needs matplotlib: pip install "lidit-jax\[eval\]"'):
        require_extra("scoring", "matplotlib", "torch")
