"""Folders as other tools leave them: layouts, encodings, splits, links and hidden entries."""

import collections
import json
import logging
import os
import pathlib
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from stored_data import data_of, numbered_image
from test_tar_source import encode, write_tar

from lidit_jax.data.dataset import Dataset
from lidit_jax.data.formats import caption_tables
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import open_benchmark
from lidit_jax.fidelity.image_folder import image_files
from lidit_jax.files import walk
from lidit_jax.score import compbench, dpg, positional_bias

COUNT = 4
ROWS = "\n".join(f"{i}.png,a scene {i}" for i in range(COUNT))


def write_images(folder: pathlib.Path, names=None) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names or [f"{i}.png" for i in range(COUNT)]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(numbered_image(i)))
    return folder


def opened(path, **more) -> Dataset:
    return open_dataset(data_of("folder", path, **more), 8)


def captions(path, **more) -> list[str]:
    return sorted(opened(path, **more).captions(100, 0))


SCENES = [f"a scene {i}" for i in range(COUNT)]


# --- captions files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " | "])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_csv_files_are_read_with_any_separator_in_any_encoding(tmp_path, separator, encoding):
    rows = separator.join(["image", "caption"]) + "\r\n"
    rows += "".join(separator.join([f"{i}.png", f'"a scene {i}"']) + "\r\n" for i in range(COUNT))
    (write_images(tmp_path) / "captions.csv").write_bytes(rows.encode(encoding))
    assert captions(tmp_path) == SCENES


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_only_line_feeds_end_a_line_of_jsonl(tmp_path, encoding):
    texts = ["a\u2028b", "a\x85b", "a b", "图"]
    rows = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    (write_images(tmp_path) / "metadata.jsonl").write_bytes("\r\n".join(rows).encode(encoding))
    assert captions(tmp_path) == sorted(texts)


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.string_view(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
    ],
    ids=str,
)
def test_parquet_texts_of_every_type_are_read(tmp_path, kind):
    names = pa.array([f"{i}.png" for i in range(COUNT)])
    texts = pa.array(SCENES)
    texts = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    masks = pa.array([b"\xff\xfe"] * COUNT)
    pq.write_table(pa.table({"file_name": names, "text": texts, "mask": masks}), write_images(tmp_path) / "m.parquet")
    assert captions(tmp_path) == SCENES


def test_lists_in_parquet_are_captions_and_embeddings_are_not_read(tmp_path):
    rows = [{"file_name": f"{i}.png", "caption": [f"a {i}", f"b {i}"], "embedding": [0.5] * 9} for i in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows), write_images(tmp_path) / "m.parquet")
    example = opened(tmp_path).source[1]
    assert example["captions"] == {"caption/0": "a 1", "caption/1": "b 1"}
    assert "embedding" not in example["metadata"]


def test_a_caption_that_holds_the_separator_is_counted_and_not_cut(tmp_path):
    (write_images(tmp_path) / "captions.csv").write_text("image,caption\n0.png,a dog, a cat\n1.png,a bird\n")
    dataset = opened(tmp_path)
    assert (dataset.captions(9, 0), dataset.broken) == (["a bird"], {"row with more values than columns": 1})


def test_a_forged_captions_file_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_tables, "_EXPANSION_SLACK", 1 << 20)
    names, texts = ["0.png"] * 1000, ["x" * 10_000] * 1000
    pq.write_table(pa.table({"image": names, "caption": texts}), write_images(tmp_path) / "metadata.parquet")
    with pytest.raises(UserError, match="metadata.parquet' would take more than 1 MiB in memory"):
        opened(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_of_any_length_are_counted_and_the_others_are_read(tmp_path, suffix):
    rows = [["0.png", "a scene 0"], ["1.png", "x" * (5 << 19)], ["2.png", "a scene 2"]]
    if suffix == "jsonl":
        lines = [json.dumps({"file_name": file, "caption": text}) for file, text in rows]
    else:
        not_closed = ["3.png", '"' + ("y" * 100_000 + "\n") * 11]
        lines = ["file_name,caption", *map(",".join, [*rows, not_closed]), "3.png,a scene 3"]
    (write_images(tmp_path) / f"metadata.{suffix}").write_text("\n".join(lines))
    dataset = opened(tmp_path)
    assert dataset.broken == {"text over 1 MiB": 1 if suffix == "jsonl" else 2}
    assert sorted(dataset.captions(9, 0)) == ["a scene 0", "a scene 2", "a scene 3"][: 2 if suffix == "jsonl" else 3]


@pytest.mark.parametrize("images", ["images", "Images", "flickr30k_images"])
def test_images_are_found_in_a_folder_beside_the_captions_file(tmp_path, images):
    write_images(tmp_path / images)
    (tmp_path / "captions.txt").write_text(f"image,caption\n{ROWS}\n")
    assert captions(tmp_path) == SCENES


def test_names_may_be_absolute_have_backslashes_or_lack_their_ending(tmp_path):
    write_images(tmp_path, ["a/0.png", "a/1.png", "2.png", "3.png"])
    names = ["a\\0.png", str(tmp_path / "a/1.png"), "2", "./3.png"]
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, SCENES, strict=True)]
    rows += [json.dumps({"file_name": name, "text": "x"}) for name in ("..\\0.png", "/etc/hosts", "a/../../x.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    dataset = opened(tmp_path)
    assert (sorted(dataset.captions(9, 0)), dataset.broken) == (SCENES, {"file outside the folder": 3})


def test_a_captions_file_that_does_not_name_images_says_which_columns_it_has(tmp_path):
    (write_images(tmp_path) / "labels.csv").write_text("picture;words\n0.png;x\n")
    with pytest.raises(UserError, match="labels.csv' has no column 'file_name' .*only picture;words"):
        opened(tmp_path)


# --- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_files_one_level_down_are_read_by_split(tmp_path, kind):
    for split in ("train", "validation"):
        rows = [{"file_name": f"{i}.png", "text": f"{split} {i}"} for i in range(COUNT)]
        file = write_images(tmp_path / split) / f"metadata.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif kind == "csv":
            file.write_text("file_name,text\n" + "\n".join(",".join(row.values()) for row in rows))
        else:
            file.write_text("\n".join(map(json.dumps, rows)))
    assert captions(tmp_path) == [f"train {i}" for i in range(COUNT)]
    assert captions(tmp_path, split="val") == [f"validation {i}" for i in range(COUNT)]
    with pytest.raises(UserError, match="has the splits train, validation, none of which is 'test'"):
        opened(tmp_path, split="test")


def test_parts_with_a_captions_file_each_are_read_together(tmp_path):
    for part in ("one", "two"):
        (write_images(tmp_path / part) / "captions.csv").write_text(
            "image,caption\n" + "\n".join(f"{i}.png,{part} {i}" for i in range(COUNT))
        )
    dataset = opened(tmp_path)
    assert sorted(dataset.captions(9, 0)) == [f"{part} {i}" for part in ("one", "two") for i in range(COUNT)]
    assert {example["captions"]["caption"] for example in dataset.source.load(range(8))} == set(dataset.captions(9, 0))


@pytest.mark.parametrize("others", [("val",), ("validation", "test"), ("val2017", "dev")])
def test_splits_are_never_classes(tmp_path, others):
    for split in ("train", *others):
        write_images(tmp_path / split, ["cat/0.png", "dog/1.png"])
    assert captions(tmp_path) == ["cat", "dog"]
    assert len(opened(tmp_path, split=others[0]).source) == 2
    (tmp_path / "images").mkdir()
    for split in ("train", *others):
        (tmp_path / split).rename(tmp_path / "images" / split)
    assert captions(tmp_path) == ["cat", "dog"]


@pytest.mark.parametrize("unread", [None, "llava.json", "annotations/captions.json", "captions.csv", "metadata.jsonl"])
def test_folders_are_not_classes_if_there_is_one_alone_or_captions_that_cannot_be_read(tmp_path, unread, caplog):
    write_images(
        tmp_path, [f"{folder}/{i}.png" for i in range(2) for folder in (("coco", "sam") if unread else ("coco",))]
    )
    if unread:
        (tmp_path / unread).parent.mkdir(exist_ok=True)
        (tmp_path / unread).write_text('[{"id": 1, "caption": "a cat"}]')
    with (
        caplog.at_level(logging.INFO, "lidit_jax"),
        pytest.raises(UserError, match=r"has a caption \(no caption: \d; there are texts folder"),
    ):
        opened(tmp_path)
    assert (f"if {unread} has them" if unread else "'coco', is not taken for a class") in caplog.text
    names = {"coco", "sam"} if unread else {"coco"}
    assert set(captions(tmp_path, class_template="{}")) == set(captions(tmp_path, captions={"class": 1.0})) == names
    assert set(captions(tmp_path, captions={"folder": 1.0})) == names


def test_folders_with_numbers_are_not_classes(tmp_path):
    write_images(tmp_path, ["00000/0.png", "00001/0.png"])
    with pytest.raises(UserError, match="there are texts class_number"):
        opened(tmp_path)


# --- texts beside the images --------------------------------------------------------------------------------------


def test_suffixes_may_be_in_upper_case(tmp_path):
    write_images(tmp_path, ["0.PNG", "1.png"])
    (tmp_path / "0.TXT").write_text("a dog")
    (tmp_path / "1.Json").write_text('{"caption": "a cat"}')
    assert captions(tmp_path) == ["a cat", "a dog"]


def test_texts_beside_images_are_their_captions_and_their_folders_are_not(tmp_path):
    write_images(tmp_path, ["10_dog/a.b.png", "10_dog/c.png", "00000/000.png", "00000/001.png"])
    (tmp_path / "10_dog/a.b.txt").write_text("a dog", encoding="utf-16")
    (tmp_path / "00000/000.json").write_text(json.dumps({"caption": "a cat", "url": "x", "aesthetic": 5.0}))
    (tmp_path / "00000/001.caption").write_text("a bird")
    pq.write_table(pa.table({"url": ["x"], "caption": ["y"], "status": ["z"]}), tmp_path / "00000.parquet")
    dataset = opened(tmp_path)
    assert sorted(dataset.captions(9, 0)) == ["a bird", "a cat", "a dog"]
    assert dataset.dropped == {"no caption": 1}
    assert len(opened(tmp_path, min_aesthetic=4.0).source) == 1


def test_an_edited_text_is_noticed(tmp_path):
    write_images(tmp_path, ["0.png", "1.png"])
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("a dog")
    assert len(opened(tmp_path).source) == 2
    (tmp_path / "1.txt").write_text("")
    dataset = opened(tmp_path)
    assert (len(dataset.source), dataset.dropped) == (1, {"no caption": 1})


# --- links and hidden entries -------------------------------------------------------------------------------------


def test_links_are_followed_once(tmp_path):
    write_images(tmp_path / "elsewhere/dogs")
    write_images(tmp_path / "data/cat")
    os.symlink(tmp_path / "elsewhere/dogs", tmp_path / "data/dog")
    os.symlink(tmp_path / "data", tmp_path / "data/cat/loop")
    assert collections.Counter(captions(tmp_path / "data")) == {"cat": COUNT, "dog": COUNT}


def test_links_that_lead_nowhere_are_counted(tmp_path):
    write_images(tmp_path, ["0.png", "1.png"])
    (tmp_path / "0.txt").write_text("a dog")
    os.symlink(tmp_path / "gone.txt", tmp_path / "1.txt")
    os.symlink(tmp_path / "gone.png", tmp_path / "2.png")
    dataset = opened(tmp_path)
    assert (dataset.captions(9, 0), dataset.broken) == (["a dog"], {"unreadable text": 1, "no image": 1})


def test_names_that_are_not_utf8_stay_distinct_and_can_be_encoded(tmp_path):
    for i, name in enumerate((b"\xe9", b"\xe8")):
        path = os.fsencode(tmp_path) + b"/" + name
        pathlib.Path(os.fsdecode(path + b".png")).write_bytes(encode(numbered_image(i)))
        pathlib.Path(os.fsdecode(path + b".txt")).write_text("a dog")
    assert [one["key"] for one in opened(tmp_path).source.describe([0, 1])] == ["\\xe8.png", "\\xe9.png"]


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path):
    write_images(tmp_path, ["cat/0.png", "dog/1.png"])
    visited = walk(str(tmp_path))
    next(visited)
    shutil.rmtree(tmp_path / "dog")
    with pytest.raises(FileNotFoundError, match="dog"):
        list(visited)


HIDDEN = (".ipynb_checkpoints", "__MACOSX", ".Trash", ".Trash-1000", "lost+found", "System Volume Information")


def test_hidden_entries_are_skipped_in_data_and_in_scored_folders(tmp_path):
    write_images(
        tmp_path, ["cat/0.png", "dog/1.png", *(f"{name}/2.png" for name in HIDDEN), "cat/.ipynb_checkpoints/3.png"]
    )
    for name in ("cat/._0.png", "._metadata.jsonl"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    dataset = opened(tmp_path)
    assert (sorted(dataset.captions(9, 0)), dataset.broken) == (["cat", "dog"], {})
    found = image_files(epath.Path(tmp_path), "images")
    assert [str(file.relative_to(tmp_path)) for file in found] == ["cat/0.png", "dog/1.png"]


def test_hidden_shards_are_skipped_unless_named(tmp_path):
    for name in ("0.tar", "._0.tar"):
        write_tar(tmp_path / name, {"0.png": encode(numbered_image(0)), "0.txt": b"x"})
    for path in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/{{0,1}}*.tar"):
        assert TarShards(path).paths == (str(tmp_path / "0.tar"),)
    assert TarShards(tmp_path / "._0.tar").paths == (str(tmp_path / "._0.tar"),)


def test_hidden_files_are_no_generated_images_and_no_prompts(tmp_path):
    write_images(tmp_path, ["7.png", "._7.png", "samples/a cat_000000.png", "samples/._a cat_000000.png"])
    for name in ("7.txt", "._7.txt"):
        (tmp_path / name).write_text("a cat")
    folder = epath.Path(tmp_path)
    assert list(dpg._find_images(folder)) == ["7"]
    assert [image.name for image in compbench.find_images(folder)] == ["a cat_000000.png"]
    assert positional_bias._samples(folder) == ["a cat_000000.png"]
    assert open_benchmark("dpg_bench", folder, 1).prompts == ["a cat"]
