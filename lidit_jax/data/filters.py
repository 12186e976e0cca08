"""Filters that choose the samples to train on (paper, 5.1: aesthetic score, resolution, prompts that are URLs or tags).

A filter takes a `Candidate` and returns None to keep it, or the reason for dropping it in a few words. Its settings are
keyword arguments: `functools.partial(aesthetic_score, minimum=5.0)` is a filter too. Caption filters check the fields
that training samples from (None: all); a single bad caption drops the sample, because training could sample it.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.captions import fields_of


class Candidate(NamedTuple):
    """The facts about a sample that filters see; height and width in pixels."""

    captions: dict[str, str]
    metadata: dict[str, Any]
    height: int
    width: int


Filter = Callable[[Candidate], str | None]

NO_CAPTION = "no caption"  # reason for dropping a sample

_URL = re.compile(
    r"(?:https?://|www\.)\S+|\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|info|io|cn|de|ru|uk|jp)\b(?:/\S*)?", re.I
)
_FILE_NAME = re.compile(r"[^/\n]*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|psd|pdf|eps|ai|raw|cr2|nef|mp4|mov)", re.I)
_CAMERA_NAME = re.compile(
    r"(?:img|dsc[nf]?|pxl|p|dji|gopr|screenshot|image|photo|picture|untitled)[\s_-]*[\d\s_-]*\d", re.I
)
_TAG_SEPARATORS = re.compile(r"[,;|,、;]")
_MAX_MATCHED_LENGTH = 1000  # characters; matching takes quadratic time, and no URL or file name is longer
_MIN_TAGS = 3
_MAX_WORDS_OF_A_TAG = 2
_MAX_CHINESE_CHARACTERS_OF_A_TAG = 4
# An item with one of these words makes the list a phrase: "a red, a green and a blue cube".
_PHRASE_WORDS = frozenset(
    ("a", "an", "the", "and", "or", "with", "of", "in", "on", "at", "by", "to", "is", "are", "was", "its", "his", "her")
)
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_CHINESE_PHRASE_WORDS = re.compile(r"[的在和与是有着了]")


def aesthetic_score(candidate: Candidate, *, minimum: float = 4.7, key: str = "aesthetic_score") -> str | None:
    """Drops images without an aesthetic score (LAION's predictor) or with one below `minimum` (paper, 5.1: 4.7)."""
    value = candidate.metadata.get(key)
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if math.isnan(score):
        return f"no {key}"
    return f"{key} under {minimum:g}" if score < minimum else None


def smallest_side(candidate: Candidate, *, minimum: int) -> str | None:
    """Drops images whose shorter side is below `minimum` pixels."""
    return f"side under {minimum} px" if min(candidate.height, candidate.width) < minimum else None


def aspect(candidate: Candidate, *, maximum: float) -> str | None:
    """Drops images whose longer side is more than `maximum` times the shorter one."""
    longer, shorter = max(candidate.height, candidate.width), min(candidate.height, candidate.width)
    return f"aspect over {maximum:g}" if longer > maximum * shorter else None


def no_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops samples whose caption fields are all missing or blank."""
    return None if any(_texts(candidate, fields)) else NO_CAPTION


def url_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops captions that consist of URLs and at most one other word."""
    return "caption is a URL" if any(map(_is_url, _texts(candidate, fields))) else None


def file_name_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops captions that are file names ("beach.jpg") or names that cameras give to images ("DSC_0042")."""
    return "caption is a file name" if any(map(_is_file_name, _texts(candidate, fields))) else None


def tag_list_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops captions that are a list of three or more tags ("cat, cute, pet", "#cat #cute #pet")."""
    return "caption is a tag list" if any(map(_is_tag_list, _texts(candidate, fields))) else None


def enlarging(candidate: Candidate, *, buckets: Sequence[Bucket]) -> str | None:
    """Drops images that would have to be enlarged to fill their bucket."""
    size = np.array([[candidate.height, candidate.width]])
    bucket = buckets[assign(size, buckets)[0]]
    return "smaller than its bucket" if (size < bucket).any() else None


CAPTION_FILTERS: tuple[Filter, ...] = (no_caption, url_caption, file_name_caption, tag_list_caption)


def first_reason(candidate: Candidate, filters: Sequence[Filter]) -> str | None:
    """Returns the reason of the first filter that drops the candidate; None if all keep it."""
    return next((reason for check in filters if (reason := check(candidate)) is not None), None)


def _texts(candidate: Candidate, fields: Sequence[str] | None) -> Iterator[str]:
    return (candidate.captions[name] for name in fields_of(candidate.captions, fields))


def _is_url(caption: str) -> bool:
    if len(caption) > _MAX_MATCHED_LENGTH:
        return False
    rest, found = _URL.subn(" ", caption)
    return found > 0 and len(rest.split()) <= 1


def _is_file_name(caption: str) -> bool:
    caption = caption.strip()
    if len(caption) > _MAX_MATCHED_LENGTH:
        return False
    return bool(_FILE_NAME.fullmatch(caption) or _CAMERA_NAME.fullmatch(caption))


def _is_tag_list(caption: str) -> bool:
    words = caption.split()
    if len(words) >= _MIN_TAGS and all(word.startswith("#") for word in words):
        return True
    tags = [tag.strip() for tag in _TAG_SEPARATORS.split(caption.strip().rstrip(".。")) if tag.strip()]
    return len(tags) >= _MIN_TAGS and all(map(_is_tag, tags))


def _is_tag(text: str) -> bool:
    if _CHINESE.search(text):
        return len(text) <= _MAX_CHINESE_CHARACTERS_OF_A_TAG and not _CHINESE_PHRASE_WORDS.search(text)
    words = text.lower().split()
    return len(words) <= _MAX_WORDS_OF_A_TAG and not _PHRASE_WORDS.intersection(words)
