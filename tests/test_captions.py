import collections
import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_data import data_of, numbered_image
from test_tar_source import encode, write_tar

from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.formats.shards import captions_of
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError

BOTH = {"original": "alt text", "synthetic": "a long description"}


def draw(chooser: CaptionChooser, captions: dict[str, str], number: int = 4000) -> dict[str, float]:
    rng = np.random.default_rng(0)
    counts = collections.Counter(chooser(captions, rng) for _ in range(number))
    return {text: count / number for text, count in counts.items()}


def test_fields_are_sampled_by_their_shares():
    shares = draw(CaptionChooser({"original": 1, "synthetic": 3}), BOTH)
    assert shares == {"alt text": pytest.approx(0.25, abs=0.03), "a long description": pytest.approx(0.75, abs=0.03)}


def test_the_share_of_missing_and_empty_fields_goes_to_the_others():
    chooser = CaptionChooser({"original": 0.5, "synthetic": 0.5})
    assert draw(chooser, {"synthetic": "only", "other": "no"}, 50) == {"only": 1}
    assert draw(chooser, {"original": "", "synthetic": "only"}, 50) == {"only": 1}


def test_without_fields_all_captions_are_equally_likely_in_any_order():
    assert set(draw(CaptionChooser(), BOTH, 100)) == set(BOTH.values())
    swapped = dict(reversed(BOTH.items()))
    rngs = np.random.default_rng(3), np.random.default_rng(3)
    assert [CaptionChooser()(BOTH, rngs[0]) for _ in range(20)] == [
        CaptionChooser()(swapped, rngs[1]) for _ in range(20)
    ]


def test_dropout_gives_the_empty_caption_and_does_not_change_the_others():
    assert draw(CaptionChooser(dropout=0.1), {"a": "x"})[""] == pytest.approx(0.1, abs=0.02)
    assert draw(CaptionChooser(dropout=1.0), {"a": "x"}, 50) == {"": 1}
    rngs = np.random.default_rng(1), np.random.default_rng(1)
    pairs = [(CaptionChooser()(BOTH, rngs[0]), CaptionChooser(dropout=0.5)(BOTH, rngs[1])) for _ in range(200)]
    assert all(dropped in ("", text) for text, dropped in pairs)


def test_a_template_wraps_its_field():
    chooser = CaptionChooser({"class": 1}, templates={"class": "a photo of {class}"})
    assert draw(chooser, {"class": "tench {0}"}, 5) == {"a photo of tench {0}": 1}


def test_an_example_without_the_fields_says_what_it_has():
    with pytest.raises(UserError, match=r"has captions \['original', 'synthetic'\] but none of the fields \['txt'\]"):
        CaptionChooser({"txt": 1})(BOTH, np.random.default_rng(0))
    with pytest.raises(UserError, match="names 'breed', which an example lacks"):
        CaptionChooser(templates={"class": "{breed} {class}"})({"class": "dog"}, np.random.default_rng(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"dropout": 1.5},
        {"dropout": float("nan")},
        {"fields": {}},
        {"fields": {"txt": 0}},
        {"fields": {"txt": float("nan")}},
        {"templates": {"class": "a photo of {}"}},
        {"templates": {"class": "a photo of {class"}},
        {"templates": {"class": "{class.__class__}"}},
        {"templates": {"class": "{class!r:>9}"}},
    ],
)
def test_invalid_settings_are_rejected(wrong):
    with pytest.raises(UserError):
        CaptionChooser(**wrong)


# --- joined captions, for language models -------------------------------------------------------------------------


def test_joined_captions_hold_all_captions_in_either_order():
    captions = {"en": "a red circle", "zh": "红圆圈", "alt": ""}
    joined = draw(CaptionChooser({"en": 0.6, "zh": 0.4, "alt": 1}, join=True), captions, 60)
    assert set(joined) == {"a red circle = 红圆圈", "红圆圈 = a red circle"}


def test_joined_captions_keep_their_templates_and_a_single_one_is_unchanged():
    chooser = CaptionChooser(templates={"class": "a photo of {class}"}, join=True)
    assert draw(chooser, {"class": "cat"}, 10) == {"a photo of cat": 1}
    assert set(draw(chooser, {"class": "cat", "txt": "b"}, 40)) == {"a photo of cat = b", "b = a photo of cat"}
    assert draw(CaptionChooser(dropout=1.0, join=True), {"a": "x"}, 10) == {"": 1}


# --- lists of captions --------------------------------------------------------------------------------------------


def test_the_texts_of_a_list_share_the_weight_of_their_field():
    captions = {"caption/0": "one", "caption/1": "two", "txt": "three", "url": "no"}
    shares = draw(CaptionChooser({"caption": 1, "txt": 1}), captions)
    assert shares == {"one": pytest.approx(0.25, abs=0.03), "two": pytest.approx(0.25, abs=0.03),
                      "three": pytest.approx(0.5, abs=0.03)}  # fmt: skip
    assert draw(CaptionChooser({"caption/1": 1}), captions, 20) == {"two": 1}


def test_a_list_of_classes_is_filled_into_its_template():
    chooser = CaptionChooser({"class": 1}, templates={"class": "a photo of {class}"})
    assert chooser.filled({"class/0": "cat", "class/1": "dog", "url": "x"}) == {
        "class/0": "a photo of cat",
        "class/1": "a photo of dog",
    }


# --- which texts are captions, in every source --------------------------------------------------------------------

TEXTS = {"NSFW": "UNLIKELY", "LICENSE": "?", "source": "https://a.b/c", "original": "0.jpg"}


@pytest.fixture(scope="module")
def half_captioned(tmp_path_factory):
    """Data sets of eight samples, of which every second one has texts but no caption."""
    folder = tmp_path_factory.mktemp("half_captioned")
    rows, files = [], {}
    (folder / "files").mkdir()
    (folder / "table").mkdir()
    (folder / "tar").mkdir()
    for i in range(8):
        image, texts = encode(numbered_image(i)), TEXTS | {"caption": [f"first {i}", f"second {i}"] if i % 2 else None}
        files |= {f"{i}.png": image, f"{i}.json": json.dumps(texts).encode(), f"{i}.txt": b""}
        for part in ("files", "table"):
            (folder / part / f"{i}.png").write_bytes(image)
        (folder / f"files/{i}.json").write_text(json.dumps(texts))
        rows.append({"file_name": f"{i}.png"} | texts)
    write_tar(folder / "tar/0.tar", files)
    pq.write_table(pa.Table.from_pylist(rows), folder / "table/metadata.parquet")
    return {
        "tar": data_of("tar", folder / "tar"),
        "streamed": data_of("tar", folder / "tar", sequential=True),
        "files": data_of("folder", folder / "files"),
        "table": data_of("folder", folder / "table"),
    }


@pytest.mark.parametrize("kind", ["tar", "streamed", "files", "table"])
def test_a_text_that_is_not_a_caption_never_becomes_one(half_captioned, kind):
    dataset = open_dataset(half_captioned[kind], 8)
    assert dataset.dropped == {"no caption": 4}
    assert "captions from caption (4), not from the other texts LICENSE, NSFW, original, source" in dataset.summary()
    assert "no caption: 4 (50.0%)" in dataset.summary()
    loader = dataset.batches(4, 0, None, with_captions=True)
    found = {text for _ in range(12) for text in next(loader)["caption"]}
    loader.close()
    assert found == {f"{which} {i}" for i in (1, 3, 5, 7) for which in ("first", "second")}
    # The language models' text joins all captions, and nothing else.
    loader = dataset.batches(4, 0, None, with_captions=True, with_images=False, join_captions=True)
    assert all(set(text.split()) <= {"first", "second", "=", *"1357"} for text in next(loader)["caption"])
    loader.close()


def test_a_text_that_shows_nothing_is_no_caption():
    texts = ["\u200b", "\ufeff\u2060 ", "\x00", "\ud800", "?", "a\u200bb", "👩\u200d🚀"]
    expected = {"caption/4": "?", "caption/5": "a\u200bb", "caption/6": "👩\u200d🚀"}
    assert captions_of({"caption": texts}) == expected


def test_which_caption_of_a_list_is_chosen_depends_on_the_batch_alone(half_captioned):
    def captions(first: int) -> list[str]:
        loader = open_dataset(half_captioned["tar"], 8).batches(4, 3, None, with_captions=True, first=first)
        texts = [next(loader)["caption"] for _ in range(3)]
        loader.close()
        return texts

    assert captions(0)[1:] == captions(1)[:2]


def test_texts_become_captions_if_the_config_names_them(half_captioned):
    config = dataclasses.replace(half_captioned["tar"], captions={"original": 1.0})
    dataset = open_dataset(config, 8)
    assert set(dataset.captions(8, 0)) == {"0.jpg"}
    with pytest.raises(UserError, match="data.captions names 'synthetic', which no sample has"):
        open_dataset(dataclasses.replace(config, captions={"original": 1.0, "synthetic": 1.0}), 8)


def test_a_caption_field_that_the_built_in_scenes_lack_is_rejected():
    captions = {"en": 1.0, "en/x": 1.0}
    config = DataConfig(source="shapes", resolution=32, num_examples=8, captions=captions)
    with pytest.raises(UserError, match=r"names 'en/x', which no sample has \(there are en, zh\)"):
        open_dataset(config, 8)


def test_data_without_any_caption_say_which_texts_there_are(tmp_path):
    write_tar(tmp_path / "0.tar", {"0.png": encode(numbered_image(0)), "0.json": json.dumps(TEXTS).encode()})
    for more in ({}, {"sequential": True}):
        with pytest.raises(UserError, match="none of the 1 samples .* has a caption .*there are texts LICENSE, NSFW"):
            open_dataset(data_of("tar", tmp_path, **more), 8)


# --- nested texts, in every source --------------------------------------------------------------------------------

NESTED = {
    "captions": [{"text": "one", "language": "en"}, {"text": "two", "language": "en"}],
    "single": [{"value": "three"}],
    "json": {"caption": "four", "width": 32},
    "a.b": "five",
    "lists": [["six"]],
}
# "lists", a list of lists, has none.
NAMES = {
    "captions/text/0": "one",
    "captions/text/1": "two",
    "captions/language/0": "en",
    "captions/language/1": "en",
    "single/value": "three",
    "json/caption": "four",
    "a/b": "five",
}


def write_nested(folder, kind):
    """Writes a data set of one sample with nested texts and returns its `data` section."""
    encoded = encode(numbered_image(0))
    if kind == "tar":
        write_tar(folder / "0.tar", {"0.png": encoded, "0.json": json.dumps(NESTED).encode()})
        return data_of("tar", folder)
    if kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{"image": {"bytes": encoded, "path": "0.png"}} | NESTED]), folder / "0.parquet"
        )
        return data_of("parquet", folder)
    (folder / "0.png").write_bytes(encoded)
    if kind == "texts":
        (folder / "0.json").write_text(json.dumps(NESTED))
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png"} | NESTED))
    else:
        pq.write_table(pa.Table.from_pylist([{"file_name": "0.png"} | NESTED]), folder / "metadata.parquet")
    return data_of("folder", folder)


@pytest.mark.parametrize("kind", ["tar", "parquet", "texts", "jsonl", "table"])
def test_nested_texts_have_the_same_names_in_every_source(tmp_path, kind):
    config = write_nested(tmp_path, kind)
    dataset = open_dataset(config, 8)
    [example] = dataset.source.load([0])
    assert example["captions"] == NAMES
    assert (
        "captions from captions/text (1), not from the other texts a/b, captions/language, json/c" in dataset.summary()
    )
    assert set(dataset.captions(1, 0)) < {"one", "two"}
    named = open_dataset(dataclasses.replace(config, captions={"captions/text/1": 1.0}), 8)
    assert named.captions(1, 0) == ["two"]
    assert "captions from captions/text/1 (of captions/text)" in named.summary()


def test_deeply_nested_texts_cannot_grow_a_short_json():
    values = {str(i): "x" for i in range(20_000)}
    for _ in range(3):
        values = {"k" * 10_000: values}
    assert captions_of(values) == {}
    assert captions_of({"a": {"b": {"c": {"d": {"e": "x"}}}}}) == {"a/b/c/d/e": "x"}
    assert captions_of({"a": {"b": {"c": {"d": {"e": {"f": "x"}}}}}}) == {}


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_the_number_of_a_class_without_a_name_is_no_caption(tmp_path, kind):
    text = b"3" if kind == "cls" else b'{"class": 3}'
    tar = write_tar(tmp_path / "0.tar", {"0.png": encode(numbered_image(0)), f"0.{kind}": text})
    with pytest.raises(UserError, match=r"has a caption \(no caption: 1; there are texts class_number"):
        open_dataset(data_of("tar", tar), 8)
    (tmp_path / "names.txt").write_text("a\nb\nc\ncat")
    assert open_dataset(data_of("tar", tar, class_names=str(tmp_path / "names.txt")), 8).captions(1, 0) == ["cat"]
