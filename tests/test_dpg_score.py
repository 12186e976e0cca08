"""Tests DPG-Bench's score: the official rules on hand-made cases, the file of questions, and reports from grids."""

import csv
import io
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from vqa_models import random_image, save_vilt

from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import cut
from lidit_jax.images import save_png
from lidit_jax.score import dpg
from lidit_jax.score.dpg import category_scores, image_score, score
from lidit_jax.score.dpg_questions import Question, read_questions
from lidit_jax.score.results import ScoreRequest

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
COLUMNS = HEADER.split(",")
ROWS = [
    ("0", 1, "0", "entity - whole (cabbage)", "Is there a cabbage?"),
    ("0", 2, "1", "attribute - color (cabbage, red)", "Is the cabbage red?"),
    ("0", 3, "1, 2", "relation - spatial (cabbage, table, on)", "Is the red cabbage, whole, on a table?"),
    ("dogs", 1, "0", "entity - whole (dogs)", "Are there dogs?"),
    ("dogs", 2, "0", "global -  (photo)", "Is it a photo?"),
]


def table(rows, columns=COLUMNS):
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(
        (name, "a prompt", "", n, parents, "x", "y", tuple_, text) for name, n, parents, tuple_, text in rows
    )
    return file.getvalue()


@pytest.fixture
def questions_file(tmp_path):
    file = epath.Path(tmp_path / "dpg_bench.csv")
    file.write_text(table(ROWS))
    return file


def questions(*parents):
    return {i: Question("?", tuple(of), "entity - whole") for i, of in enumerate(parents, 1)}


# --- the rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "right", "expected"),
    [
        ([(), (1,), (1, 2)], [True, True, True], 1),
        ([(), (1,), (1, 2)], [False, True, True], 0),  # all depend on the first
        ([(), (1,), (1, 2)], [True, False, True], 1 / 3),
        ([(), (1,), ()], [False, True, True], 1 / 3),
        # The second question's parent, the third, stands after it and is not yet known not to count.
        ([(), (3,), (1,)], [False, True, True], 1 / 3),
        ([(2,), ()], [True, True], 1),
        ([(1,)], [True], 1),  # its own parent
    ],
)
def test_a_question_counts_only_if_its_parents_do(parents, right, expected):
    assert image_score(questions(*parents), dict(enumerate(right, 1))) == pytest.approx(expected)


@given(st.data())
def test_an_answer_of_yes_never_lowers_the_score_and_no_alone_is_zero(data):
    number = data.draw(st.integers(1, 8))
    parents = [data.draw(st.sets(st.integers(1, number), max_size=3)) for _ in range(number)]
    right = data.draw(st.lists(st.booleans(), min_size=number, max_size=number))
    asked, answers = questions(*parents), dict(enumerate(right, 1))
    found = image_score(asked, answers)
    assert 0 <= found <= sum(right) / number
    better = answers | {data.draw(st.integers(1, number)): True}
    assert image_score(asked, better) >= found
    assert image_score(asked, dict.fromkeys(answers, False)) == 0
    assert image_score(asked, dict.fromkeys(answers, True)) == 1


def test_categories_count_answers_whatever_their_parents():
    prompts = {"a": {1: Question("?", (), "entity - whole"), 2: Question("?", (1,), "entity - part")}}
    right = {"a": [{1: False, 2: True}, {1: False, 2: False}]}
    assert category_scores(prompts, right, broad=True) == {"entity": (0.25, 4)}
    assert category_scores(prompts, right, broad=False) == {"entity - part": (0.5, 2), "entity - whole": (0.0, 2)}


def test_a_grid_is_cut_row_by_row():
    cells = [np.full((3, 5, 3), i, np.uint8) for i in range(4)]
    grid = np.concatenate([np.concatenate(cells[:2], axis=1), np.concatenate(cells[2:], axis=1)], axis=0)
    for cell, found in zip(cells, cut(grid, 4, epath.Path("a.png")), strict=True):
        np.testing.assert_array_equal(found, cell)
    [whole] = cut(grid, 1, epath.Path("a.png"))
    np.testing.assert_array_equal(whole, grid)
    with pytest.raises(UserError, match="a.png is 10x5 px, which does not split into a 2x2 grid"):
        cut(grid[:5], 4, epath.Path("a.png"))


# --- the questions' file ----------------------------------------------------------------------------------------


def test_questions_are_read_with_their_parents_and_categories(questions_file):
    prompts, first = read_questions(questions_file)
    assert first == "0"
    assert list(prompts) == ["0", "dogs"]
    assert prompts["0"][3] == Question("Is the red cabbage, whole, on a table?", (1, 2), "relation - spatial")
    assert prompts["dogs"][2].broad_category == "global"
    assert prompts["dogs"][2].parents == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column 'dependency'"),
        (b"\x89PNG\r\n\xff", "not UTF-8"),
        (b"a,b\n1,2\n", "no column 'dependency'"),
        (table([]).encode(), "it has no questions"),
        (table([("0", "one", "0", "entity (x)", "Is it?")]).encode(), "line 2: 'one' is not a question's number"),
        (table([("0", -1, "0", "entity (x)", "Is it?")]).encode(), "line 2: '-1' is not a question's number"),
        (table([("0", 1, "1;2", "entity (x)", "Is it?")]).encode(), "line 2: '1;2' is not a question's number"),
        (table([("0", 1, "9" * 5000, "entity (x)", "Is it?")]).encode(), "is not a question's number"),
        (table([("0", 1, "0", "entity (x)", "")]).encode(), "line 2: a column is empty"),
        (table(ROWS).encode() + b"0,a\n", "line 7: a column is empty"),
        (table(ROWS).encode() + b'0,"a prompt, 1\n', "unexpected end of data"),
        (table([("0", 1, "0", "entity (x)", "x" * 100_000)]).encode(), "field larger than field limit"),
    ],
)
def test_a_damaged_file_is_said_in_one_line(tmp_path, content, message):
    file = epath.Path(tmp_path / "questions.csv")
    file.write_bytes(content)
    limit = csv.field_size_limit()
    with pytest.raises(UserError, match=message) as error:
        read_questions(file)
    assert len(str(error.value)) < 400 + len(str(file))
    assert csv.field_size_limit() == limit


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_said(tmp_path_factory, content):
    file = epath.Path(tmp_path_factory.getbasetemp() / "any.csv")
    file.write_bytes(HEADER.encode() + b"\n" + content)
    try:
        prompts, _ = read_questions(file)
    except UserError:
        return
    assert all(prompts.values())


# --- from images to a report ------------------------------------------------------------------------------------


class YesToOdd:
    """Answers yes if an image's first value is odd, except to questions about colour."""

    def answers(self, image, texts):
        return ["Yes." if image[0, 0, 0] % 2 and "red?" not in text else "no" for text in texts]


@pytest.fixture
def images(tmp_path):
    folder = epath.Path(tmp_path / "images")
    cells = [np.full((4, 4, 3), value, np.uint8) for value in (1, 0, 1, 1)]
    grid = np.concatenate([np.concatenate(cells[:2], axis=1), np.concatenate(cells[2:], axis=1)], axis=0)
    save_png(grid, folder / "0.png")
    save_png(np.zeros((8, 8, 3), np.uint8), folder / "dogs.png")
    return folder


@pytest.fixture
def yes_to_odd(monkeypatch):
    monkeypatch.setattr(dpg, "load_vqa", lambda name: YesToOdd())
    monkeypatch.setattr("lidit_jax.score.results.model_folder", lambda flag, name: epath.Path(name))
    monkeypatch.setattr("lidit_jax.score.results.folder_digest", lambda folder: "0")


def request(images, tmp_path, **more):
    return ScoreRequest(benchmark="dpg_bench", images=images, out=epath.Path(tmp_path / "out"), **more)


def test_grids_are_scored(images, questions_file, tmp_path, yes_to_odd):
    asked = request(images, tmp_path, vqa="any", questions=questions_file)
    report = score(asked)
    # One of the cabbage's three questions counts, in three of four images; none of the dogs' questions counts.
    assert report.columns["average"] == pytest.approx(100 * (3 / 4 / 3 + 0) / 2)
    assert report.counts["average"] == 2
    # In the last images, the cabbage's entity is right, the dogs' is wrong; relation is right though a parent is wrong.
    assert {name: report.columns[name] for name in ("entity", "attribute", "relation", "global")} == {
        "entity": 50,
        "attribute": 0,
        "relation": 100,
        "global": 0,
    }
    assert report.counts["entity"] == 2
    assert report.details["level_1_of_all_images"]["relation"] == 75
    assert report.details["level_2"]["relation - spatial"] == 100
    assert report.details["average_without_the_first_prompt"] == 0
    assert score(asked) == report
    json.dumps(report.details)


def test_single_images_are_told_by_what_drew_them(images, questions_file, tmp_path, yes_to_odd):
    (images / "drawn_with.json").write_text('{"num_images": 1}')
    report = score(request(images, tmp_path, vqa="any", questions=questions_file))
    assert report.columns["average"] == pytest.approx(100 / 3 / 2)


def test_what_has_no_questions_or_no_image_is_left_out_and_said(images, tmp_path, yes_to_odd, caplog):
    file = epath.Path(tmp_path / "more.csv")
    lost = ("lost", 1, "4", "entity (x)", "Is it?")
    file.write_text(table([*ROWS[:3], ("undrawn", 1, "0", "entity (x)", "Is it?"), lost]))
    save_png(random_image(0), images / "lost.png")
    report = score(request(images, tmp_path, vqa="any", questions=file))
    assert list(report.details["prompts"]) == ["0"]
    assert report.details["average_without_the_first_prompt"] is None
    said = caplog.text
    assert "1 prompts have no image, such as undrawn" in said
    assert "1 images have no questions, such as dogs" in said
    assert "1 prompts have questions with missing parents, such as lost" in said


def test_any_model_of_transformers_answers(images, questions_file, tmp_path):
    folder = save_vilt(tmp_path / "vilt")
    report = score(request(images, tmp_path, vqa=str(folder), questions=questions_file))
    assert 0 <= report.columns["average"] <= 100


def test_what_does_not_fit_is_said(images, questions_file, tmp_path, yes_to_odd):
    with pytest.raises(UserError, match="--questions is required"):
        score(request(images, tmp_path, vqa="any"))
    with pytest.raises(UserError, match="--vqa is required"):
        score(request(images, tmp_path, questions=questions_file))
    with pytest.raises(UserError, match="no such file"):
        score(request(images, tmp_path, vqa="any", questions=epath.Path(tmp_path / "none.csv")))
    empty = epath.Path(tmp_path / "empty")
    empty.mkdir()
    with pytest.raises(UserError, match="has no ID.png"):
        score(request(empty, tmp_path, vqa="any", questions=questions_file))
    save_png(random_image(0), empty / "other.png")
    with pytest.raises(UserError, match="has no questions about the images"):
        score(request(empty, tmp_path, vqa="any", questions=questions_file))
    (images / "0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 0\.jpg and 0\.png for one prompt: remove one"):
        score(request(images, tmp_path, vqa="any", questions=questions_file))
    (images / "0.jpg").unlink()
    save_png(np.zeros((7, 8, 3), np.uint8), images / "0.png")
    with pytest.raises(UserError, match="does not split into a 2x2 grid"):
        score(request(images, tmp_path, vqa="any", questions=questions_file))
