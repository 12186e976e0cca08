"""The positional-bias benchmark: its prompts, the means by quarter, and from pictures to a curve."""

import collections
import io
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from hypothesis import given
from PIL import Image
from vqa_models import picture, save_blip, save_vilt

from lidit_jax.errors import UserError
from lidit_jax.evaluation import positional_bias
from lidit_jax.evaluation.adjective_pairs import NUM_PROMPTS, find_pairs, join_phrases
from lidit_jax.evaluation.benchmarks import open_benchmark
from lidit_jax.evaluation.positional_bias import Part, chart, mean_by_quarter, score, summary
from lidit_jax.evaluation.quarters import interval_by_quarter, quarter_weights
from lidit_jax.evaluation.scoring import ScoreRequest

LISTS = ROOT.parent / "shared/data/benchmarks/t2i_compbench"
NOUNS = ("car", "cup", "apple", "plate", "key", "desk lamp", "orange", "vase", "door")


@pytest.fixture
def lists(tmp_path):
    """A folder of lists like T2I-CompBench's."""
    folder = epath.Path(tmp_path / "lists")
    folder.mkdir()
    for kind, adjectives in {"color": "red blue", "shape": "oblong round", "texture": "plastic wooden"}.items():
        first, second = adjectives.split()
        article = "an" if first == "oblong" else "a"
        lines = [f"{article} {first} {noun} and a {second} {noun}" for noun in NOUNS]
        (folder / f"{kind}_val.txt").write_text("\n".join([*lines, "A sentence with a red car.", ""]))
    return folder


# --- prompts ----------------------------------------------------------------------------------------------------


def test_pairs_are_found_in_plain_prompts_alone():
    prompts = [
        "an oblong cucumber and a teardrop plum",
        "rubber sole shoes and fluffy clouds",
        "a round plate and an oblong cucumber.",
        "a triangular slice of cheese and a rectangular cheese board",
        "The oval mirror and the rectangular frame were mounted on the wall.",
        "a black gold and white vase sitting on a counter",
        "a small red box and a big box",
    ]
    assert find_pairs("shape", prompts) == [
        ("an oblong cucumber", "cucumber"),
        ("a teardrop plum", "plum"),
        ("a round plate", "plate"),
        ("a big box", "box"),
    ]
    assert find_pairs("texture", prompts) == [("rubber sole shoes", "sole shoes"), ("fluffy clouds", "clouds")]
    assert find_pairs("color", prompts) == []


def check_prompts(benchmark):
    assert len(benchmark.prompts) == NUM_PROMPTS
    pairs = benchmark._pairs
    assert collections.Counter(map(len, pairs)) == dict.fromkeys(range(1, 9), 125)
    kinds = collections.Counter(pair["kind"] for of_prompt in pairs for pair in of_prompt)
    assert sorted(kinds) == ["color", "shape", "texture"]
    assert all(abs(count - 1500) < 100 for count in kinds.values())
    for prompt, of_prompt in zip(benchmark.prompts, pairs, strict=True):
        phrases = [pair["phrase"] for pair in of_prompt]
        assert prompt == join_phrases(phrases)
        nouns = [phrase.removeprefix("an ").removeprefix("a ").partition(" ")[2] for phrase in phrases]
        assert len(set(nouns)) == len(nouns)


def test_prompts_are_a_thousand_of_one_to_eight_pairs_and_always_the_same(lists):
    benchmark = open_benchmark("positional_bias", lists, 4)
    check_prompts(benchmark)
    assert open_benchmark("positional_bias", lists, 1).prompts == benchmark.prompts


@pytest.mark.skipif(not LISTS.exists(), reason="T2I-CompBench's lists are not here")
def test_the_official_lists_make_these_prompts():
    benchmark = open_benchmark("positional_bias", epath.Path(LISTS), 4)
    check_prompts(benchmark)
    assert benchmark.prompts[:4] == [
        "a teardrop mango",
        "a red bag and a rectangular television",
        "a pyramidal monument, a leather shoes and a small lion",
        "a square pizza box, a diamond desk organizer, a green flower and a fluffy pillow",
    ]


def test_phrases_are_joined_as_a_sentence_would():
    assert join_phrases(["a red car"]) == "a red car"
    assert join_phrases(["a red car", "rubber gloves"]) == "a red car and rubber gloves"
    assert join_phrases(["a", "b", "c"]) == "a, b and c"


def test_folders_without_the_lists_are_said(lists, tmp_path):
    with pytest.raises(UserError, match="is a file: name the folder"):
        open_benchmark("positional_bias", lists / "color_val.txt", 4)
    (lists / "texture_val.txt").write_text("The fluffy cat naps.\n")
    with pytest.raises(UserError, match=r"texture_val\.txt has only 0 adjective-noun pairs"):
        open_benchmark("positional_bias", lists, 4)
    (lists / "texture_val.txt").unlink()
    with pytest.raises(UserError, match=r"has no texture_val\.txt"):
        open_benchmark("positional_bias", lists, 4)


# --- quarters ---------------------------------------------------------------------------------------------------


def test_of_four_or_eight_parts_each_is_in_one_quarter():
    np.testing.assert_array_equal(quarter_weights(range(4), [4] * 4), np.eye(4))
    np.testing.assert_array_equal(quarter_weights(range(8), [8] * 8), np.repeat(np.eye(4), 2, axis=0))
    np.testing.assert_allclose(mean_by_quarter([1, 0.5, 0.25, 0], range(4), [4] * 4), [1, 0.5, 0.25, 0])


def test_other_parts_are_shared_between_quarters():
    np.testing.assert_allclose(quarter_weights([0], [1]), [[0.25] * 4])
    np.testing.assert_allclose(quarter_weights([0, 1], [2, 2]), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(quarter_weights([1], [3]), [[0, 0.5, 0.5, 0]])
    # Three parts: the first quarter is three quarters of the first part's, the second a third of it and the next.
    np.testing.assert_allclose(mean_by_quarter([1, 0, 0], range(3), [3] * 3), [1, 1 / 3, 0, 0])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_each_part_counts_once_and_each_prompt_as_much_in_every_quarter(counts):
    positions = [i for count in counts for i in range(count)]
    weights = quarter_weights(positions, np.repeat(counts, counts))
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1)
    for start, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        np.testing.assert_allclose(weights[start : start + count].sum(0), count / 4)


def test_what_depends_on_the_number_of_parts_alone_is_no_bias():
    counts = np.repeat(range(1, 9), range(1, 9))
    positions = [i for count in range(1, 9) for i in range(count)]
    means = mean_by_quarter(1 / counts, positions, counts)
    np.testing.assert_allclose(means, means[0])


def test_places_that_are_none_and_no_parts():
    assert np.isnan(mean_by_quarter([], [], [])).all()
    for position in (-1, 2):
        with pytest.raises(ValueError, match="not within its count"):
            quarter_weights([position], [2])


def test_intervals_hold_the_mean_and_shrink_with_prompts():
    generator = np.random.default_rng(0)

    def interval(prompts):
        places = np.tile(np.arange(4), prompts), np.full(4 * prompts, 4)
        values = generator.random(4 * prompts)
        found = interval_by_quarter(values, *places, np.repeat(np.arange(prompts), 4))
        means = mean_by_quarter(values, *places)
        assert (found[:, 0] <= means).all()
        assert (means <= found[:, 1]).all()
        return found[:, 1] - found[:, 0]

    few, many = interval(50), interval(1000)
    # Of a uniform value: 2 * 1.96 / sqrt(12 n).
    np.testing.assert_allclose(many, 2 * 1.96 / np.sqrt(12_000), rtol=0.15)
    assert (few > 3 * many).all()


def test_pictures_of_one_prompt_are_not_independent():
    places = np.tile(np.arange(4), 40), np.full(160, 4)
    values = np.repeat(np.arange(10) % 2, 16).astype(float)  # ten prompts of four pictures
    together = interval_by_quarter(values, *places, np.repeat(np.arange(10), 16))
    apart = interval_by_quarter(values, *places, np.repeat(np.arange(40), 4))
    assert (np.diff(together) > 1.5 * np.diff(apart)).all()


# --- from pictures to a report ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("blip"))


def request(folder, tmp_path, **more):
    return ScoreRequest(benchmark="positional_bias", pictures=folder, out=epath.Path(tmp_path / "out"), **more)


@pytest.fixture
def drawn(lists, tmp_path):
    """The first eight prompts, two pictures each."""
    folder, benchmark = epath.Path(tmp_path / "drawn"), open_benchmark("positional_bias", lists, 2)
    for index in range(8):
        benchmark.write(folder, index, [picture(2 * index), picture(2 * index + 1)])
    assert (folder / benchmark.last_file(7)).exists()
    return folder


def test_pairs_are_scored_by_their_places(drawn, blip_folder, tmp_path, monkeypatch):
    asked = request(drawn, tmp_path, vqa=str(blip_folder))
    report = score(asked)
    entry = json.loads((drawn / "00003/metadata.jsonl").read_text())
    assert len(entry["pairs"]) == 4
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    model = positional_bias.load_blip(str(blip_folder))
    read = positional_bias.read_picture(drawn / "00003/samples/0001.png")
    expected = model.yes_probabilities(read, [f"{pair['phrase']}?" for pair in entry["pairs"]])
    assert results["00003/samples/0001.png"] == expected
    assert report.counts["all pairs"] == 2 * 36
    assert list(report.details["by_number_of_pairs"]) == [str(i) for i in range(1, 9)]
    assert report.details["prompts"] == 8
    assert np.shape(report.details["intervals"]) == (4, 2)
    json.dumps(report.details)
    assert Image.open(tmp_path / "out/positional_bias.png").size[0] > 600
    monkeypatch.setattr(positional_bias, "read_picture", None)
    assert score(asked) == report


def test_a_model_that_forgets_is_seen():
    parts = [
        Part(1 - 0.1 * position, position, count, "color", prompt)
        for prompt, count in enumerate(range(1, 9))
        for position in range(count)
    ]
    columns = summary(parts).columns
    means = [columns[name] for name in positional_bias.COLUMNS]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[3] > 20


def test_the_curve_is_drawn_where_all_is_one_or_none():
    for value in (0.0, 100.0):
        image = Image.open(io.BytesIO(chart([value] * 4, [[value] * 2] * 4)))
        assert image.format == "PNG"


def test_what_does_not_fit_is_said(drawn, blip_folder, tmp_path):
    with pytest.raises(UserError, match="--vqa is required"):
        score(request(drawn, tmp_path))
    with pytest.raises(UserError, match="is no BLIP"):
        score(request(drawn, tmp_path, vqa=str(save_vilt(tmp_path))))
    empty = epath.Path(tmp_path / "empty")
    empty.mkdir()
    with pytest.raises(UserError, match=r"has no 00000/metadata\.jsonl"):
        score(request(empty, tmp_path, vqa=str(blip_folder)))
    for content in ("{", "[]", '{"pairs": []}', '{"pairs": [3]}', '{"prompt": "a bench", "tag": "x"}', "[" * 100_000):
        (drawn / "00002/metadata.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"00002/metadata\.jsonl has no pairs of the positional-bias benchmark"):
            score(request(drawn, tmp_path, vqa=str(blip_folder)))
    assert not (tmp_path / "out").exists()
