"""Which samples are worth training on (paper: aesthetic score, resolution, prompts that are URLs or tags).

A filter looks at one `Candidate` and returns None to keep it, or a few words that say why not. Its settings are
keyword arguments: `functools.partial(aesthetic_score, minimum=5.0)` is a filter too. Filters of captions
look at the fields that training draws from (None: see `captions.fields_of`); one bad caption drops the sample, because
training could draw it.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.captions import fields_of


class Candidate(NamedTuple):
    """What a filter may look at; height and width in pixels."""

    captions: dict[str, str]
    metadata: dict[str, Any]
    height: int
    width: int


Filter = Callable[[Candidate], str | None]

_URL = re.compile(
    r"(?:https?://|www\.)\S+|\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|info|io|cn|de|ru|uk|jp)\b(?:/\S*)?", re.I
)
_FILE_NAME = re.compile(r"[^/\n]*\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|psd|pdf|eps|ai|raw|cr2|nef|mp4|mov)", re.I)
_CAMERA_NAME = re.compile(
    r"(?:img|dsc[nf]?|pxl|p|dji|gopr|screenshot|image|photo|picture|untitled)[\s_-]*[\d\s_-]*\d", re.I
)
_TAG_SEPARATORS = re.compile(r"[,;|,、;]")
_MAX_JUNK = 1000  # characters; the patterns' time grows with the square, and no address or file name is that long
_MIN_TAGS = 3
_MAX_WORDS_OF_A_TAG = 2
_MAX_CHINESE_CHARACTERS_OF_A_TAG = 4
# A list with one of these in it is a phrase: "a red, a green and a blue cube".
_PHRASE_WORDS = frozenset(
    ("a", "an", "the", "and", "or", "with", "of", "in", "on", "at", "by", "to", "is", "are", "was", "its", "his", "her")
)
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_CHINESE_PHRASE_WORDS = re.compile(r"[的在和与是有着了]")


def aesthetic_score(candidate: Candidate, *, minimum: float = 4.7, key: str = "aesthetic_score") -> str | None:
    """Drops what LAION's aesthetic predictor scores below `minimum` (paper: 4.7), or what has no score."""
    value = candidate.metadata.get(key)
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if math.isnan(score):
        return f"no {key}"
    return f"{key} under {minimum:g}" if score < minimum else None


def smallest_side(candidate: Candidate, *, minimum: int) -> str | None:
    """Drops pictures whose shorter side has fewer than `minimum` pixels."""
    return f"side under {minimum} px" if min(candidate.height, candidate.width) < minimum else None


def aspect(candidate: Candidate, *, maximum: float) -> str | None:
    """Drops pictures whose longer side is more than `maximum` times the shorter one."""
    longer, shorter = max(candidate.height, candidate.width), min(candidate.height, candidate.width)
    return f"aspect over {maximum:g}" if longer > maximum * shorter else None


def no_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops samples with nothing but blanks in all of the fields."""
    return None if any(_texts(candidate, fields)) else "no caption"


def url_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops captions that are web addresses, with at most one other word."""
    return "caption is a URL" if any(map(_is_url, _texts(candidate, fields))) else None


def file_name_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops captions that are file names ("beach.jpg") or what cameras call pictures ("DSC_0042")."""
    return "caption is a file name" if any(map(_is_file_name, _texts(candidate, fields))) else None


def tag_list_caption(candidate: Candidate, *, fields: Sequence[str] | None = None) -> str | None:
    """Drops captions that list three or more tags ("cat, cute, pet", "#cat #cute #pet") instead of describing."""
    return "caption is a tag list" if any(map(_is_tag_list, _texts(candidate, fields))) else None


def enlarging(candidate: Candidate, *, buckets: Sequence[Bucket]) -> str | None:
    """Drops pictures that their aspect-ratio group would have to enlarge."""
    size = np.array([[candidate.height, candidate.width]])
    bucket = buckets[assign(size, buckets)[0]]
    return "smaller than its group" if (size < bucket).any() else None


CAPTION_FILTERS: tuple[Filter, ...] = (no_caption, url_caption, file_name_caption, tag_list_caption)


def first_reason(candidate: Candidate, filters: Sequence[Filter]) -> str | None:
    """Asks the filters in turn; None if all keep it."""
    return next((reason for check in filters if (reason := check(candidate)) is not None), None)


def _texts(candidate: Candidate, fields: Sequence[str] | None) -> Iterator[str]:
    return (candidate.captions[name] for name in fields_of(candidate.captions, fields))


def _is_url(caption: str) -> bool:
    if len(caption) > _MAX_JUNK:
        return False
    rest, found = _URL.subn(" ", caption)
    return found > 0 and len(rest.split()) <= 1


def _is_file_name(caption: str) -> bool:
    caption = caption.strip()
    if len(caption) > _MAX_JUNK:
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
