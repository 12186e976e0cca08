"""Contact sheets with captions in any script, PNG files, and conversion of pixels between uint8 and [-1, 1]."""

import functools
import io
import logging
import math
import os
import re
import secrets
import subprocess
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lidit_jax.errors import UserError
from lidit_jax.files import created_folder, name_file

_SHEET_COLOR = (255, 255, 255)
_FRAME_COLOR = (222, 222, 222)
_HEADING_COLOR = (243, 244, 246)
_TEXT_COLOR = (48, 48, 48)
_TARGET_SIZE = 160  # pixels: smaller images are enlarged up to this size, and captions get at least this width
_CAPTION_GAP = 6
_NO_FONT = "(no font for this caption)"

# Common Chinese, Japanese and Korean characters, Greek, Cyrillic and Latin-1; see CONTRIBUTING.md.
_OWN_FONT = Path(__file__).parent / "fonts" / "NotoSansCJK-subset.otf"
# For the rest, on systems without fontconfig or with a default font that has no Chinese characters.
_FONT_FILES = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/STHeiti Light.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "C:/Windows/Fonts/msyh.ttc",
    "C:/Windows/Fonts/simhei.ttf",
)


def to_float(images: jax.Array) -> jax.Array:
    """Converts images to the range of the models: uint8 [B, H, W, 3] -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Converts model outputs to images: float32, clipped to [-1, 1] -> uint8."""
    return jnp.clip(jnp.round(images * 127.5 + 127.5), 0, 255).astype(jnp.uint8)


def grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
    gap: int = 12,
    font_size: int = 13,
    max_lines: int = 4,
) -> Image.Image:
    """Draws a contact sheet with each image above its caption.

    Images may differ in size. All are enlarged by the same integer factor with nearest-neighbour interpolation. Cells
    are as large as the largest image, and the first cell starts at (gap, gap).

    Args:
      images: uint8 [H, W, 3] each.
      captions: caption of each image, any Unicode; wrapped to the cell's width.
      columns: images per row; None makes the sheet about square.
      scale: enlargement factor; None uses the largest that keeps all images within 160 px, and at least 1.
      gap: pixels between cells and around the sheet.
      font_size: font size in pixels.
      max_lines: longer captions end in an ellipsis.

    Returns:
      The sheet, an RGB image.

    Raises:
      UserError: there are no images, or `columns` or `scale` is less than 1.
      ValueError: an image is not uint8 [H, W, 3], or the numbers of captions and images differ.
    """
    _check_grid_arguments(images, captions, columns, scale)
    largest_height, largest_width = np.max([image.shape[:2] for image in images], axis=0).tolist()
    scale = scale or max(1, _TARGET_SIZE // max(largest_height, largest_width))
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))

    image_height = largest_height * scale
    cell_width = max(largest_width * scale, _TARGET_SIZE if captions else 0)
    fonts = _fonts(font_size)
    line_height = round(1.35 * font_size)
    lines = [_caption_lines(caption, fonts, cell_width, max_lines) for caption in captions or [""] * len(images)]

    rows = range(0, len(images), columns)
    caption_heights = [_caption_height(lines[start : start + columns], line_height) for start in rows]
    height = gap + sum(image_height + caption_height + gap for caption_height in caption_heights)
    sheet = Image.new("RGB", (gap + columns * (cell_width + gap), height), _SHEET_COLOR)

    top = gap
    for start, caption_height in zip(rows, caption_heights, strict=True):
        for column, index in enumerate(range(start, min(start + columns, len(images)))):
            left = gap + column * (cell_width + gap)
            _paste(sheet, images[index], scale, left + cell_width / 2, top + image_height)
            baseline = top + image_height + _CAPTION_GAP + font_size
            for line in lines[index]:
                _draw_line(sheet, line, fonts, left + (cell_width - _line_width(line, fonts)) / 2, baseline)
                baseline += line_height
        top += image_height + caption_height + gap
    return sheet


def text_table(
    rows: Sequence[Sequence[str]], widths: Sequence[int], gap: int = 12, font_size: int = 13, max_lines: int = 24
) -> Image.Image:
    """Draws a table of texts.

    Args:
      rows: cells of each row, any Unicode, wrapped to their columns. A row with a single cell is a heading over all
        columns.
      widths: pixels of each column.
      gap: pixels between cells and around the table.
      font_size: font size in pixels.
      max_lines: longer texts end in an ellipsis.

    Returns:
      The table, an RGB image.
    """
    fonts, line_height = _fonts(font_size), round(1.35 * font_size)
    total = sum(widths) + gap * (len(widths) - 1)
    wrapped = [
        [_caption_lines(cell, fonts, width, max_lines) for cell, width in zip(row, cell_widths, strict=True)]
        for row in rows
        for cell_widths in [[total] if len(row) == 1 else widths]
    ]
    heights = [gap + line_height * max(1, *map(len, cells)) for cells in wrapped]
    sheet = Image.new("RGB", (total + 2 * gap, sum(heights) + gap), _SHEET_COLOR)
    draw, top = ImageDraw.Draw(sheet), gap // 2
    for cells, height in zip(wrapped, heights, strict=True):
        is_heading = len(cells) == 1
        draw.rectangle((0, top, sheet.width, top + height), fill=_HEADING_COLOR if is_heading else _SHEET_COLOR)
        draw.line((0, top, sheet.width, top), _FRAME_COLOR)
        left = gap
        for lines, width in zip(cells, [total] if is_heading else widths, strict=True):
            for number, line in enumerate(lines):
                _draw_line(sheet, line, fonts, left, top + gap // 2 + number * line_height + font_size)
            left += width + gap
        top += height
    return sheet


def save_png(image: Image.Image | np.ndarray, path: epath.PathLike, text: Mapping[str, str] | None = None) -> None:
    """Writes a PNG file atomically and creates its folder if necessary.

    Args:
      image: a Pillow image or uint8 [H, W, 3].
      path: local path, or an object in cloud storage (gs://…), which appears only when it is complete.
      text: text chunks of the file, by keyword of up to 79 Latin-1 characters; None for none.

    Raises:
      OSError: the path cannot be written; an existing file is kept, and no folder is left that was created for it.
    """
    file, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_itxt(keyword, value.encode("utf-8", "replace").decode())
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG", pnginfo=chunks)
    path = epath.Path(path)
    with created_folder(path.parent):
        if "://" in str(path):
            path.write_bytes(file.getvalue())
            return
        temporary = Path(path.parent, f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_bytes(file.getvalue())
            os.replace(temporary, path)
        except OSError as error:
            name_file(error, path, temporary)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def wrap(text: str, measure: Callable[[str], float], width: float, max_lines: int) -> list[str]:
    """Wraps a text into at most `max_lines` lines no wider than `width`; text that does not fit becomes an ellipsis.

    Lines break at spaces and between wide (e.g. Chinese) characters. A word wider than a line breaks anywhere. Every
    line has at least one character, however small the width.

    Args:
      text: the text; runs of white space count as single spaces.
      measure: function from a string to its width, in the unit of `width`.
      width: largest width of a line.
      max_lines: largest number of lines.

    Returns:
      The lines.
    """
    words = _words(" ".join(text.split()))
    lines: list[str] = []
    line = ""
    while words:
        word = words.pop(0)
        if measure((line + word).rstrip()) <= width:
            line += word
        elif line:
            lines.append(line.rstrip())
            line, words = "", [word.lstrip(), *words]
        else:
            length = _fitting_length(word, measure, width)
            lines.append(word[:length])
            words = [word[length:], *words] if word[length:] else words
        if len(lines) > max_lines or (len(lines) == max_lines and words):
            break
    if line:
        lines.append(line.rstrip())
    if len(lines) <= max_lines and not words:
        return lines
    last = lines[max_lines - 1]
    while last and measure(last + "…") > width:
        last = last[:-1].rstrip()
    return [*lines[: max_lines - 1], last + "…"]


def _words(text: str) -> list[str]:
    """Splits a text where a line may break; each piece includes the spaces and closing punctuation that follow it."""
    wide = "\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003fffd"
    closing = ",。、;:!?)」』》”’"
    return re.findall(f"[{wide}][{closing}]*\\s*|[^\\s{wide}]+\\s*", text)


def _fitting_length(word: str, measure: Callable[[str], float], width: float) -> int:
    length = 1
    while length < len(word) and measure(word[: length + 1]) <= width:
        length += 1
    return length


# --- layout of a sheet ------------------------------------------------------------------------------------------


def _check_grid_arguments(
    images: Sequence[np.ndarray], captions: Sequence[str] | None, columns: int | None, scale: int | None
) -> None:
    if not len(images):
        raise UserError("a contact sheet needs at least one image: there are none")
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} is out of range: use 1 or more")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image is {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3]")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: expected one per image")


def _paste(sheet: Image.Image, image: np.ndarray, scale: int, center: float, bottom: int) -> None:
    """Pastes an enlarged image into the sheet, with a thin frame that makes the edges of pale images visible."""
    height, width, _ = image.shape
    enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    left, top = round(center - enlarged.width / 2), bottom - enlarged.height
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + enlarged.width, bottom), outline=_FRAME_COLOR)
    sheet.paste(enlarged, (left, top))


def _caption_height(lines: list[list[str]], line_height: int) -> int:
    count = max(len(caption_lines) for caption_lines in lines)
    return _CAPTION_GAP + count * line_height if count else 0


def _caption_lines(caption: str, fonts: tuple[ImageFont.FreeTypeFont, ...], width: int, max_lines: int) -> list[str]:
    # No character is narrower than a pixel, so more characters than this never fit. Bounds the cost of long captions.
    caption = caption[: max_lines * width + 1]
    return wrap(_drawable(caption, fonts), lambda text: _line_width(text, fonts), width, max_lines)


def _draw_line(
    sheet: Image.Image, line: str, fonts: tuple[ImageFont.FreeTypeFont, ...], left: float, baseline: int
) -> None:
    draw = ImageDraw.Draw(sheet)
    for font, run in _runs(line, fonts):
        draw.text((left, baseline), run, _TEXT_COLOR, font, anchor="ls")
        left += font.getlength(run)


# --- fonts ------------------------------------------------------------------------------------------------------


@functools.cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    """Loads Pillow's built-in font, which has little beyond ASCII, then the package's and the system's."""
    fonts = [ImageFont.load_default(size), ImageFont.truetype(_OWN_FONT, size)]
    for path, index in _system_font_files():
        try:
            fonts.append(ImageFont.truetype(path, size, index))
        except OSError:  # missing, or in a format that FreeType cannot scale: fall back to the other fonts
            logging.info("Skipping the font %s, which cannot be read.", path)
    return tuple(fonts)


@functools.cache
def _system_font_files() -> tuple[tuple[str, int], ...]:
    """Returns (path, index within the file) of the fonts to try, best first."""
    found = [_match_font(pattern) for pattern in ("sans-serif", "sans-serif:lang=zh-cn")]
    found += [(path, 0) for path in _FONT_FILES if os.path.exists(path)]
    return tuple(dict.fromkeys(font for font in found if font is not None))


def _match_font(pattern: str) -> tuple[str, int] | None:
    """Returns fontconfig's best match, which may not cover the requested language; None without fontconfig."""
    command = ["fc-match", "--format=%{file}\n%{index}", pattern]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    path, _, index = output.partition("\n")
    return (path, int(index)) if path and index.isdecimal() else None


@functools.lru_cache(maxsize=100_000)
def _glyph(font: ImageFont.FreeTypeFont, character: str) -> tuple:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=100_000)
def _font_for(character: str, fonts: tuple[ImageFont.FreeTypeFont, ...]) -> ImageFont.FreeTypeFont | None:
    """Returns the first font that has the character; None if no font has it."""
    if character.isspace():
        return fonts[0]
    # Pillow cannot list the characters of a font, but it draws missing ones like this code point, which no font has.
    missing = "\U0010ffff"
    return next((font for font in fonts if _glyph(font, character) != _glyph(font, missing)), None)


def _drawable(text: str, fonts: tuple[ImageFont.FreeTypeFont, ...]) -> str:
    """Replaces characters that no font has: by their base character without accents, else by "?".

    If more than half of the visible characters are missing, returns a note instead of the text.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    characters = [character for character in text if unicodedata.category(character) not in ("Cc", "Cf")]
    drawn = [
        character if _font_for(character, fonts) else _base_character(character, fonts) for character in characters
    ]
    visible = sum(not character.isspace() for character in characters)
    if 2 * drawn.count(None) > visible:
        _warn_about_missing_font()
        return _NO_FONT
    return "".join("?" if character is None else character for character in drawn)


def _base_character(character: str, fonts: tuple[ImageFont.FreeTypeFont, ...]) -> str | None:
    base = unicodedata.normalize("NFKD", character)[0]
    return base if _font_for(base, fonts) and not base.isspace() else None


@functools.cache
def _warn_about_missing_font() -> None:
    logging.warning("Some captions are in a script that no font here has: install one for it, e.g. fonts-noto-core.")


def _runs(text: str, fonts: tuple[ImageFont.FreeTypeFont, ...]) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """Splits a text into runs of one font each; characters that no font has use the first font."""
    runs: list[tuple[ImageFont.FreeTypeFont, str]] = []
    for character in text:
        font = _font_for(character, fonts) or fonts[0]
        if runs and runs[-1][0] is font:
            runs[-1] = font, runs[-1][1] + character
        else:
            runs.append((font, character))
    return runs


def _line_width(text: str, fonts: tuple[ImageFont.FreeTypeFont, ...]) -> float:
    return sum(font.getlength(run) for font, run in _runs(text, fonts))
