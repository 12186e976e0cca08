"""Tests the positional-bias benchmark: its prompts, the means by quarter, and curves from generated images."""

import collections
import io
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import ROOT, png_texts
from etils import epath
from hypothesis import given
from PIL import Image
from vqa_models import random_image, save_blip, save_vilt

from lidit_jax.errors import UserError
from lidit_jax.evaluate.attributes import ATTRIBUTES, KINDS
from lidit_jax.evaluate.benchmarks import open_benchmark
from lidit_jax.evaluate.generate import Request
from lidit_jax.evaluate.positional_bias import NUM_PROMPTS, Pair, find_prompts, join_phrases, parse_phrase, parse_prompt
from lidit_jax.score import positional_bias
from lidit_jax.score.positional_bias import ScoredPair, chart, mean_by_quarter, score, summary
from lidit_jax.score.quarters import QUARTER_NAMES, interval_by_quarter, mean_over_prompts, quarter_weights
from lidit_jax.score.results import ScoreRequest

LISTS = ROOT.parent / "shared/data/benchmarks/t2i_compbench"
NOUNS = ("car", "cup", "apple", "plate", "key", "desk lamp", "orange", "vase", "door")
# Kind -> the samples that the paper prints in A.3 -> the prompts of T2I-CompBench, two pairs each, that they contain.
PAPER_SAMPLES = {
    "color": {
        "A green bench, a red car, a blue bowl, and a pink apple.": ["a green bench and a red car"],
        "A black banana, a yellow bird, a blue dog, and a brown horse.": ["a blue dog and a brown horse"],
    },
    "texture": {
        "A metallic car, a wooden desk, a rubber band, and a metallic knife.": [
            "a metallic car and a wooden desk",
            "a rubber band and a metallic knife",
        ],
        "A plastic cutlery, a fabric shirt, a fluffy pillow, and leather gloves.": [
            "a plastic cutlery and a fabric shirt",
            "a fluffy pillow and leather gloves",
        ],
    },
    "shape": {
        "A big elephant, a small flea, a diamond pendant, and a round watch.": [
            "a big elephant and a small flea",
            "a diamond pendant and a round watch",
        ],
        "A round bagel, a rectangular knife block, a tall lighthouse, and a short buoy.": [
            "a round bagel and a rectangular knife block",
            "a tall lighthouse and a short buoy",
        ],
    },
}
SAMPLES = [(kind, sample) for kind, samples in PAPER_SAMPLES.items() for sample in samples]


@pytest.fixture
def lists(tmp_path):
    """Writes a folder of lists like T2I-CompBench's."""
    folder = epath.Path(tmp_path / "lists")
    folder.mkdir()
    for kind, adjectives in {"color": "red blue", "shape": "oblong round", "texture": "plastic wooden"}.items():
        first, second = adjectives.split()
        article = "an" if first == "oblong" else "a"
        nouns = zip(NOUNS, [*NOUNS[1:], NOUNS[0]], strict=True)
        lines = [f"{article} {first} {noun} and a {second} {other}" for noun, other in nouns]
        (folder / f"{kind}_val.txt").write_text("\n".join([*lines, "A sentence with a red car.", ""]))
    return folder


# --- prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "sample"), SAMPLES)
def test_the_papers_samples_are_read_and_written_word_for_word(kind, sample):
    pairs = parse_prompt(sample)
    assert [pair.kind for pair in pairs] == [kind] * 4
    assert len({pair.noun for pair in pairs}) == 4
    assert join_phrases([pair.phrase for pair in pairs]) == sample


@pytest.mark.parametrize("kind", ["texture", "shape"])
def test_the_papers_samples_are_two_prompts_of_t2i_compbench_joined(kind):
    for sample, halves in PAPER_SAMPLES[kind].items():
        found = find_prompts(kind, halves)
        assert join_phrases([pair.phrase for pairs in found for pair in pairs]) == sample


@pytest.mark.parametrize(("kind", "sample"), SAMPLES)
def test_the_papers_samples_can_be_generated(kind, sample, tmp_path):
    file = epath.Path(tmp_path / "samples.txt")
    file.write_text(f"{sample}\n\n{sample}\n")
    benchmark = open_benchmark("positional_bias", file, 4)
    assert benchmark.prompts == [sample] * 2
    benchmark.write(epath.Path(tmp_path / "out"), 1, [random_image(0)], png_texts(1))
    entry = json.loads((tmp_path / "out/00001/metadata.jsonl").read_text())
    assert entry["prompt"] == sample
    assert [pair["kind"] for pair in entry["pairs"]] == [kind] * 4


def test_an_adjective_has_one_kind():
    assert sum(map(len, KINDS.values())) == len(ATTRIBUTES)


def test_phrases_are_joined_as_in_the_printed_samples():
    assert join_phrases(["a red car"]) == "A red car."
    assert join_phrases(["a red car", "rubber gloves"]) == "A red car and rubber gloves."
    assert join_phrases(["an oval b", "a round c", "a big d"]) == "An oval b, a round c, and a big d."


def test_articles_are_corrected_and_not_added():
    assert parse_phrase("an big bathtub") == Pair("a big bathtub", "shape")
    assert parse_phrase("a orange cat") == Pair("an orange cat", "color")
    assert parse_phrase("leather gloves") == Pair("leather gloves", "texture")
    for phrase in ("a car", "red", "the red car", "a small red box", "a red", "", "a shiny car"):
        assert parse_phrase(phrase) is None, phrase


def test_prompts_of_two_pairs_are_found_and_sentences_left_out():
    prompts = [
        "an oblong cucumber and a teardrop plum",
        "rubber sole shoes and fluffy clouds",
        "a round plate and an oblong cucumber.",
        "a triangular slice of cheese and a rectangular cheese board",
        "The oval mirror and the rectangular frame were mounted on the wall.",
        "a black gold and white vase sitting on a counter",
        "a small red box and a big box",
    ]
    found = [[pair.phrase for pair in pairs] for pairs in find_prompts("shape", [*prompts, prompts[0]])]
    assert found == [["an oblong cucumber", "a teardrop plum"], ["a round plate", "an oblong cucumber"]]
    assert find_prompts("texture", prompts) == [
        (Pair("rubber sole shoes", "texture"), Pair("fluffy clouds", "texture"))
    ]
    assert find_prompts("color", prompts) == []


def check_prompts(benchmark, lists):
    """Checks that prompts have the printed form, four pairs of one kind, four nouns, and halves from the lists."""
    assert len(benchmark.prompts) == NUM_PROMPTS
    lines = {}
    for kind in KINDS:
        text = (lists / f"{kind}_val.txt").read_text().replace("an big", "a big")
        lines[kind] = {line.strip(" .") for line in text.splitlines()}
    kinds = collections.Counter()
    for prompt in benchmark.prompts:
        pairs = parse_prompt(prompt)
        phrases = [pair.phrase for pair in pairs]
        assert join_phrases(phrases) == prompt
        [kind] = {pair.kind for pair in pairs}
        assert len({pair.noun for pair in pairs}) == 4
        assert {" and ".join(phrases[:2]), " and ".join(phrases[2:])} <= lines[kind]
        kinds[kind] += 1
    assert kinds == {"color": 334, "shape": 333, "texture": 333}


def test_prompts_are_a_thousand_of_four_pairs_of_one_kind_and_always_the_same(lists):
    benchmark = open_benchmark("positional_bias", lists, 4)
    check_prompts(benchmark, lists)
    assert open_benchmark("positional_bias", lists, 1).prompts == benchmark.prompts


@pytest.mark.skipif(not LISTS.exists(), reason="T2I-CompBench's lists are not here")
def test_the_official_lists_make_these_prompts():
    benchmark = open_benchmark("positional_bias", epath.Path(LISTS), 4)
    check_prompts(benchmark, epath.Path(LISTS))
    assert len(set(benchmark.prompts)) == NUM_PROMPTS
    assert benchmark.prompts[:3] == [
        "A green bench, a blue cake, a red book, and a yellow vase.",
        "A spherical globe, a conical pencil sharpener, a spherical tennis ball, and a conical tennis shoe.",
        "A fabric pants, a fluffy blanket, a plastic chair, and leather gloves.",
    ]


def test_mixed_prompts_have_one_to_eight_pairs_of_all_kinds(lists):
    benchmark = open_benchmark("positional_bias", lists, 4, mixed_pairs=True)
    pairs = [parse_prompt(prompt) for prompt in benchmark.prompts]
    assert collections.Counter(map(len, pairs)) == dict.fromkeys(range(1, 9), 125)
    kinds = collections.Counter(pair.kind for of_prompt in pairs for pair in of_prompt)
    assert sorted(kinds) == ["color", "shape", "texture"]
    assert all(abs(count - 1500) < 100 for count in kinds.values())
    for of_prompt in pairs:
        assert len({pair.noun for pair in of_prompt}) == len(of_prompt)
    assert open_benchmark("positional_bias", lists, 1, mixed_pairs=True).prompts == benchmark.prompts


def test_the_option_for_mixed_pairs_goes_with_this_benchmark_alone(lists, tmp_path):
    def asked(benchmark, file):
        request = Request(workdir=tmp_path, benchmark=benchmark, file=file, out=tmp_path / "out", mixed_pairs=True)
        return request.open()

    assert {len(parse_prompt(prompt)) for prompt in asked("positional_bias", lists).prompts} == set(range(1, 9))
    file = lists / "color_val.txt"
    for benchmark, path in (("prompts", file), ("shapes", None)):
        with pytest.raises(UserError, match="--mixed_pairs goes with --benchmark=positional_bias, not"):
            asked(benchmark, path)
    with pytest.raises(UserError, match="is a file: --mixed_pairs needs the folder"):
        asked("positional_bias", file)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a photo of a cat", "'a photo of a cat' is not one adjective of T2I-CompBench and a noun"),
        ("A red car, a shiny cup.", "'a shiny cup' is not one adjective"),
        (", ".join(["a red car"] * 9), "it has 9 pairs, more than 8"),
    ],
)
def test_a_file_of_other_prompts_is_rejected(tmp_path, line, words):
    file = epath.Path(tmp_path / "prompts.txt")
    file.write_text(f"A red car.\n{line}\n")
    with pytest.raises(UserError, match=f"prompts.txt, line 2: {words}.*; write prompts as"):
        open_benchmark("positional_bias", file, 4)


@pytest.mark.parametrize(
    "lines",
    ["The fluffy cat naps.\n", "".join(f"a plastic {noun} and a wooden {noun}\n" for noun in NOUNS)],
    ids=["sentences", "pairs of one noun"],
)
def test_lists_of_which_no_prompt_can_be_made_are_rejected(lists, lines):
    (lists / "texture_val.txt").write_text(lines)
    with pytest.raises(UserError, match=r"texture_val\.txt has only \d+ adjective-noun pairs that can be used"):
        open_benchmark("positional_bias", lists, 4)


def test_a_folder_without_the_lists_is_rejected(lists):
    (lists / "texture_val.txt").unlink()
    with pytest.raises(UserError, match=r"has no texture_val\.txt"):
        open_benchmark("positional_bias", lists, 4)


# --- quarters ---------------------------------------------------------------------------------------------------


def places(counts):
    """Returns positions, counts and prompts of all pairs; `counts` are the prompts' numbers of pairs."""
    positions = [i for count in counts for i in range(count)]
    return positions, np.repeat(counts, counts), np.repeat(np.arange(len(counts)), counts)


def test_four_or_eight_pairs_are_in_one_quarter_each():
    np.testing.assert_array_equal(quarter_weights(range(4), [4] * 4), np.eye(4))
    np.testing.assert_array_equal(quarter_weights(range(8), [8] * 8), np.repeat(np.eye(4), 2, axis=0))
    np.testing.assert_allclose(mean_by_quarter([1, 0.5, 0.25, 0], *places([4])), [1, 0.5, 0.25, 0])


def test_other_numbers_of_pairs_are_shared_between_quarters():
    np.testing.assert_allclose(quarter_weights([0], [1]), [[0.25] * 4])
    np.testing.assert_allclose(quarter_weights([0, 1], [2, 2]), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(quarter_weights([1], [3]), [[0, 0.5, 0.5, 0]])
    # Of three pairs, the first one has all of the first quarter and a third of the second quarter.
    np.testing.assert_allclose(mean_by_quarter([1, 0, 0], *places([3])), [1, 1 / 3, 0, 0])


def test_means_are_taken_within_a_prompts_segment_first():
    # One image of the first prompt, three of the second: a pooled mean would be 3/4 and not 1/2.
    positions, counts, prompts = np.tile(range(4), 4), [4] * 16, np.repeat([0, 1, 1, 1], 4)
    values = np.repeat([0.0, 1.0, 1.0, 1.0], 4)
    np.testing.assert_allclose(mean_by_quarter(values, positions, counts, prompts), [0.5] * 4)
    assert mean_over_prompts(values, prompts) == 0.5
    # A prompt with one right pair and one with eight wrong pairs: each prompt counts once.
    np.testing.assert_allclose(mean_by_quarter([1.0] + [0.0] * 8, *places([1, 8])), [0.5] * 4)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_each_pair_counts_once_and_each_prompt_as_much_in_every_quarter(counts):
    positions, all_counts, _ = places(counts)
    weights = quarter_weights(positions, all_counts)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1)
    for start, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        np.testing.assert_allclose(weights[start : start + count].sum(0), count / 4)


def test_what_depends_on_the_number_of_pairs_alone_is_no_bias():
    counts = list(range(1, 9))
    means = mean_by_quarter(1 / np.repeat(counts, counts), *places(counts))
    np.testing.assert_allclose(means, np.mean(1 / np.array(counts)))


def test_missing_values_and_impossible_places_are_rejected():
    for nothing in (([], [], [], []), ([1.0] * 3, [0, 1, 2], [4] * 3, [0] * 3)):
        with pytest.raises(ValueError, match="a segment of a prompt has no value"):
            mean_by_quarter(*nothing)
    for position in (-1, 2):
        with pytest.raises(ValueError, match="not within its count"):
            quarter_weights([position], [2])


def test_intervals_hold_the_mean_and_shrink_with_prompts():
    generator = np.random.default_rng(0)

    def interval(prompts):
        where, values = places([4] * prompts), generator.random(4 * prompts)
        found, means = interval_by_quarter(values, *where), mean_by_quarter(values, *where)
        assert (found[:, 0] <= means).all()
        assert (means <= found[:, 1]).all()
        return found[:, 1] - found[:, 0]

    few, many = interval(50), interval(1000)
    # The mean of n uniform values has a 95 % interval of width 2 * 1.96 / sqrt(12 n).
    np.testing.assert_allclose(many, 2 * 1.96 / np.sqrt(12_000), rtol=0.15)
    assert (few > 3 * many).all()


def test_images_of_one_prompt_are_not_independent():
    positions, counts = np.tile(np.arange(4), 40), np.full(160, 4)
    values = np.repeat(np.arange(10) % 2, 16).astype(float)  # ten prompts of four images
    together = interval_by_quarter(values, positions, counts, np.repeat(np.arange(10), 16))
    apart = interval_by_quarter(values, positions, counts, np.repeat(np.arange(40), 4))
    assert (np.diff(together) > 1.5 * np.diff(apart)).all()


# --- from images to a report ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("blip"))


def request(folder, tmp_path, **more):
    return ScoreRequest(benchmark="positional_bias", images=folder, out=epath.Path(tmp_path / "out"), **more)


@pytest.fixture
def drawn(lists, tmp_path):
    """Writes two images for each of the first three prompts."""
    folder, benchmark = epath.Path(tmp_path / "drawn"), open_benchmark("positional_bias", lists, 2)
    for index in range(3):
        benchmark.write(folder, index, [random_image(2 * index), random_image(2 * index + 1)], png_texts(2))
    assert (folder / benchmark.last_file(2)).exists()
    return folder


def test_pairs_are_scored_by_their_places(drawn, blip_folder, tmp_path, monkeypatch):
    asked = request(drawn, tmp_path, vqa=str(blip_folder))
    report = score(asked)
    entry = json.loads((drawn / "00002/metadata.jsonl").read_text())
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    model = positional_bias.load_blip(str(blip_folder))
    read = positional_bias.read_image(drawn / "00002/samples/0001.png")
    expected = model.yes_probabilities(read, [f"{pair['phrase']}?" for pair in entry["pairs"]])
    assert results["00002/samples/0001.png"] == expected
    by_prompt = np.array([np.mean([results[f"{i:05}/samples/{j:04}.png"] for j in range(2)], 0) for i in range(3)])
    np.testing.assert_allclose([report.columns[name] for name in QUARTER_NAMES], 100 * by_prompt.mean(0))
    assert report.columns["all pairs"] == pytest.approx(100 * by_prompt.mean())
    assert set(report.counts.values()) == {report.details["prompts"]} == {3}
    assert list(report.details["by_number_of_pairs"]) == ["4"]
    assert list(report.details["by_kind"]) == ["color", "shape", "texture"]
    assert np.shape(report.details["intervals"]) == (4, 2)
    json.dumps(report.details)
    assert Image.open(tmp_path / "out/positional_bias.png").size[0] > 600
    monkeypatch.setattr(positional_bias, "read_image", None)
    assert score(asked) == report


def test_a_model_that_forgets_is_seen():
    scores = [
        ScoredPair(1 - 0.1 * position, position, count, "color", prompt)
        for prompt, count in enumerate(range(1, 9))
        for position in range(count)
    ]
    columns = summary(scores).columns
    means = [columns[name] for name in QUARTER_NAMES]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[3] > 20


def test_the_curve_is_plotted_if_all_scores_are_one_or_zero():
    for value in (0.0, 100.0):
        image = Image.open(io.BytesIO(chart([value] * 4, [[value] * 2] * 4)))
        assert image.format == "PNG"


def test_what_does_not_fit_is_said(drawn, blip_folder, tmp_path):
    with pytest.raises(UserError, match="--vqa is required"):
        score(request(drawn, tmp_path))
    with pytest.raises(UserError, match="is not a BLIP"):
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
