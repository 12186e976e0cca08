import logging
import os
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from lidit_jax import images
from lidit_jax.data.shapes.source import ShapesSource
from lidit_jax.errors import UserError
from lidit_jax.images import grid, save_png, text_table, wrap

ANY_CHARACTER = st.characters(codec=None, exclude_categories=())


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


# --- grid -------------------------------------------------------------------------------------------------------


def test_images_are_enlarged_exactly_and_stand_in_reading_order():
    images = [random_image(8, 6, seed) for seed in range(5)]
    sheet = np.asarray(grid(images, columns=3, scale=4, gap=10))
    assert sheet.shape == (10 + 2 * (32 + 10), 10 + 3 * (24 + 10), 3)
    for index, image in enumerate(images):
        top, left = 10 + (index // 3) * 42, 10 + (index % 3) * 34
        np.testing.assert_array_equal(sheet[top : top + 32, left : left + 24], enlarged(image, 4))


def test_images_of_different_sizes_share_the_scale_and_stand_in_the_middle_at_the_bottom():
    small, large = random_image(4, 8), random_image(12, 10)
    sheet = np.asarray(grid([small, large], columns=2, scale=2, gap=6))
    assert sheet.shape == (6 + 24 + 6, 6 + 20 + 6 + 20 + 6, 3)
    np.testing.assert_array_equal(sheet[6:30, 32:52], enlarged(large, 2))
    np.testing.assert_array_equal(sheet[22:30, 8:24], enlarged(small, 2))


@pytest.mark.parametrize(("side", "scale"), [(32, 5), (64, 2), (100, 1), (512, 1)])
def test_small_images_are_enlarged_and_large_ones_keep_their_size(side, scale):
    assert grid([random_image(side, side)], gap=0).size == (side * scale, side * scale)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (16, 4)])
def test_a_sheet_is_about_square(count, columns):
    assert grid([random_image(8, 8)] * count, scale=1, gap=0).width == columns * 8


def test_captions_are_drawn_below_their_image_and_within_their_cell():
    image = np.full((32, 32, 3), 255, np.uint8)
    captions = ["a red circle left of a blue square", "word " * 100, ""]
    plain, captioned = (np.asarray(grid([image] * 3, texts, columns=3)) for texts in (["", "", ""], captions))
    assert captioned.shape[1] == plain.shape[1]
    assert captioned.shape[0] > plain.shape[0]
    np.testing.assert_array_equal(captioned[: plain.shape[0] - 12], plain[: plain.shape[0] - 12])
    text = (captioned[plain.shape[0] - 12 :] < 128).any(axis=(0, 2))
    cells = [text[12 + k * 172 : 12 + k * 172 + 160] for k in range(3)]
    assert [bool(cell.any()) for cell in cells] == [True, True, False]
    assert sum(cell.sum() for cell in cells) == text.sum()


@given(st.text(ANY_CHARACTER, max_size=60), st.sampled_from([1, 8, 40]))
@settings(max_examples=150)
def test_any_unicode_is_drawn_or_replaced(text, side):
    assert grid([random_image(side, side)], [text], font_size=9).width > 0


@pytest.mark.parametrize("text", ["a" * 10**6, "红" * 10**6, "a b " * 10**6, "\u0301" * 10**6, "\n\0\u202e" * 10**6])
def test_endless_captions_end_in_an_ellipsis_quickly(text):
    assert grid([random_image(32, 32)], [text], max_lines=2).height < 260


def test_a_sheet_of_the_built_in_data_set_has_both_languages():
    source = ShapesSource(num_examples=6)
    examples = [source[i] for i in range(6)]
    for language in ("en", "zh"):
        sheet = grid(
            [example["image"] for example in examples], [example["captions"][language] for example in examples]
        )
        assert sheet.width == 12 + 3 * (160 + 12)


def test_wrong_arguments_are_refused():
    image = random_image(8, 8)
    for arguments in ({"images": []}, {"images": [image], "columns": 0}, {"images": [image], "scale": 0}):
        with pytest.raises(UserError):
            grid(**arguments)
    for wrong in (image.astype(np.float32), image[..., 0], image[:0]):
        with pytest.raises(ValueError, match="uint8"):
            grid([wrong])
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        grid([image], ["a", "b"])


# --- wrapping ---------------------------------------------------------------------------------------------------


def test_lines_break_at_spaces_and_between_chinese_characters():
    assert wrap("a red circle  left of\na blue square", len, 12, 5) == ["a red circle", "left of a", "blue square"]
    assert wrap("红色圆形在蓝色方形左边", len, 4, 5) == ["红色圆形", "在蓝色方", "形左边"]
    assert wrap("大红色,小蓝", len, 4, 5) == ["大红色,", "小蓝"]
    assert wrap("extraordinary red", len, 6, 5) == ["extrao", "rdinar", "y red"]
    assert wrap("", len, 6, 5) == []


def test_what_does_not_fit_becomes_an_ellipsis():
    assert wrap("one two three four", len, 7, 2) == ["one two", "three…"]
    assert wrap("one two three", len, 7, 1) == ["one tw…"]
    assert wrap("one two", len, 7, 1) == ["one two"]
    assert wrap("红色圆形", len, 3, 1) == ["红色…"]


@given(st.text(ANY_CHARACTER, max_size=80), st.integers(1, 12), st.integers(1, 4))
def test_wrapped_text_keeps_its_bounds_and_loses_characters_only_to_the_ellipsis(text, width, max_lines):
    lines = wrap(text, len, width, max_lines)
    assert len(lines) <= max_lines
    assert all(0 < len(line) <= width for line in lines)
    original, wrapped = "".join(text.split()), "".join("".join(lines).split())
    assert wrapped == original or (wrapped.endswith("…") and original.startswith(wrapped[:-1]))


# --- fonts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_fonts(monkeypatch):
    """Returns a function that sets the font files of the system, in addition to Pillow's built-in font."""

    def set_fonts(*files):
        monkeypatch.setattr(images, "_system_font_files", lambda: tuple((str(file), 0) for file in files))
        images._fonts.cache_clear()
        images._warn_about_missing_font.cache_clear()

    yield set_fonts
    images._fonts.cache_clear()


def drawn(text: str) -> str:
    return images._drawable(text, images._fonts(13))


@pytest.mark.parametrize(
    "caption",
    [
        "红色圆形在蓝色方形左边,“大”的",
        "赤い円は青い四角の左にあります。カタカナ",
        "파란 사각형 왼쪽에 빨간 원",
        "紅色圓形在藍色方形左邊",
    ],
    ids=["simplified Chinese", "Japanese", "Korean", "traditional Chinese"],
)
def test_east_asian_captions_are_drawn_without_system_fonts(only_fonts, caption):
    only_fonts()
    assert drawn(caption) == caption
    image = np.full((32, 32, 3), 255, np.uint8)
    sheets = [np.asarray(grid([image], [text], scale=16)) for text in (caption, caption[::-1])]
    ink = [(sheet[12 + 512 + 2 :] < 160).all(axis=-1).sum() for sheet in sheets]
    assert ink[0] > 20 * len(caption.replace(" ", "")), "strokes of every character"
    assert abs(ink[0] - ink[1]) < 0.1 * ink[0], "the same characters in another order have as much ink"
    assert (sheets[0] != sheets[1]).any(), "not one box for every character"


@pytest.mark.parametrize(
    ("codec", "leads"),
    [("gb2312", range(0xB0, 0xF8)), ("euc_jp", range(0xB0, 0xF5)), ("euc_kr", range(0xB0, 0xC9))],
    ids=["GB 2312", "JIS X 0208", "KS X 1001"],
)
def test_the_packages_font_has_every_ideograph_and_syllable_of_the_national_standards(codec, leads):
    cells = (bytes([lead, trail]).decode(codec, "ignore") for lead in leads for trail in range(0xA1, 0xFF))
    standard = {ord(character) for character in cells if character}
    assert len(standard) > 2300
    assert not standard - TTFont(images._OWN_FONT).getBestCmap().keys()


def test_the_packages_font_comes_with_its_licence_and_stays_small():
    folder = images._OWN_FONT.parent
    assert "SIL OPEN FONT LICENSE Version 1.1" in (folder / "OFL.txt").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 3_000_000


def test_without_a_font_a_note_takes_the_caption_s_place_and_says_so_once(only_fonts, caplog):
    only_fonts()
    with caplog.at_level(logging.WARNING):
        assert drawn("دائرة حمراء") == "(no font for this caption)"
        assert drawn("लाल वृत्त") == "(no font for this caption)"
    assert len(caplog.records) == 1
    assert "install" in caplog.text


def test_single_missing_characters_lose_their_accent_or_become_a_question_mark(only_fonts):
    only_fonts()
    assert drawn("café Ångström Čapek") == "café Ångström Capek"
    assert drawn("a cat 🐈 sits") == "a cat ? sits"
    assert drawn("plain\tASCII \x00\u202etext") == "plain ASCII text"


def test_a_font_that_has_the_characters_draws_them(only_fonts, tmp_path):
    def box(left, right):
        pen = TTGlyphPen(None)
        pen.moveTo((left, 0))
        for point in ((left, 700), (right, 700), (right, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [".notdef", "red"]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord("☃"): "red"})
    builder.setupGlyf({".notdef": box(400, 500), "red": box(100, 900)})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupOS2()
    builder.setupNameTable({"familyName": "Red", "styleName": "Regular"})
    builder.setupPost()
    builder.save(tmp_path / "red.ttf")

    only_fonts(tmp_path / "red.ttf")
    assert drawn("a ☃☃ heart") == "a ☃☃ heart"
    own, _, red = images._fonts(13)
    assert images._runs("a ☃☃ b", (own, red)) == [(own, "a "), (red, "☃☃"), (own, " b")]
    sheet = np.asarray(grid([np.full((32, 32, 3), 255, np.uint8)], ["☃☃"]))
    dark = (sheet[12 + 160 + 2 :] < 100).all(axis=-1)
    # Two boxes, each 0.8 x 0.7 of the font size of 13 px.
    assert 2 * 60 < dark.sum() < 2 * 130


def test_files_that_are_not_fonts_are_passed_over(only_fonts, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    only_fonts(tmp_path / "broken.ttf", tmp_path / "absent.ttf")
    assert len(images._fonts(13)) == 2
    assert isinstance(images._fonts(13)[0], ImageFont.FreeTypeFont)


def test_without_fontconfig_fonts_are_still_looked_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert images._match_font("sans-serif") is None


# --- saving -----------------------------------------------------------------------------------------------------


def test_rows_of_a_text_table_are_as_high_as_their_tallest_cell_and_a_single_cell_spans_all_columns():
    text, widths = "six words that need some lines", (60, 60, 60)
    one_line, wrapped = (text_table([["a", "b", cell]], widths) for cell in ("c", text))
    assert one_line.width == wrapped.width == 3 * 60 + 4 * 12
    assert wrapped.height >= one_line.height + 2 * 17
    heading = text_table([[text], ["a", "b", "c"]], widths)
    assert heading.height < wrapped.height  # the same text fits into fewer lines
    ink = np.asarray(wrapped).min(axis=(0, 2)) < 100  # columns of pixels with text
    assert ink[12:72].any() and ink[84:144].any() and ink[156:216].any() and not ink[:12].any() and not ink[216:].any()


@pytest.mark.parametrize("make_path", [str, epath.Path, os.fspath], ids=["str", "epath", "fspath"])
def test_saved_images_read_back_and_leave_nothing_beside_them(tmp_path, make_path):
    image = random_image(9, 7)
    target = tmp_path / "new" / "folder" / "sheet.png"
    save_png(image, make_path(target))
    save_png(Image.fromarray(image), make_path(target))
    np.testing.assert_array_equal(np.asarray(Image.open(target)), image)
    assert os.listdir(target.parent) == ["sheet.png"]


def test_a_failed_write_keeps_the_old_image_and_no_leftovers(tmp_path, monkeypatch):
    target = tmp_path / "sheet.png"
    save_png(random_image(9, 7), target)
    before = target.read_bytes()

    def fail(source, destination):
        assert os.path.getsize(source) > 0
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(random_image(9, 7, seed=1), target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_images_are_written_to_a_bucket_under_their_own_name(tmp_path, monkeypatch):
    def local(path):
        return Path(os.fspath(path).replace("gs://bucket", str(tmp_path)))

    bucket_path = type(epath.Path("gs://bucket"))
    monkeypatch.setattr(bucket_path, "mkdir", lambda path, **options: local(path).mkdir(**options))
    monkeypatch.setattr(bucket_path, "open", lambda path, mode: local(path).open(mode))
    image = random_image(9, 7)
    save_png(image, "gs://bucket/run/sheet.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "run" / "sheet.png")), image)
