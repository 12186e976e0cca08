import functools

import pytest

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.captions import USUAL_FIELDS
from lidit_jax.data.filters import (
    CAPTION_FILTERS,
    Candidate,
    aesthetic_score,
    aspect,
    enlarging,
    file_name_caption,
    first_reason,
    no_caption,
    smallest_side,
    tag_list_caption,
    url_caption,
)

GOOD_CAPTIONS = [
    "a red circle left of a blue square",
    "Paris",
    "FACE WITH TEARS OF JOY",
    "a cat, a dog and a bird on a sofa",
    "red, green and blue balloons in the sky",
    "She opened the file report.pdf on her desk",
    "the home page of example.com on a laptop, photographed from above",
    "Photo of 12 geese",
    "一只白色的猫,坐在红色的沙发上,看着窗外",
    "红色圆形在蓝色方形左边",
    "a sign that reads: stop, look, listen, wait",
    "Version 2.0 of the logo",
]


def candidate(caption: str = "x", metadata: dict | None = None, height: int = 64, width: int = 64) -> Candidate:
    return Candidate({"txt": caption}, metadata or {}, height, width)


@pytest.mark.parametrize("caption", GOOD_CAPTIONS)
def test_descriptions_are_kept(caption):
    assert [check(candidate(caption)) for check in CAPTION_FILTERS] == [None] * len(CAPTION_FILTERS)


@pytest.mark.parametrize(
    ("check", "reason", "captions"),
    [
        (no_caption, "no caption", ["", " \n"]),
        (
            url_caption,
            "caption is a URL",
            ["https://a.b/c?d=1", "www.shop.de/x", "photos.example.com", "Visit http://x.y"],
        ),
        (
            file_name_caption,
            "caption is a file name",
            ["beach.jpg", "my holiday 3.PNG", "DSC_0042", "IMG-20190101", "image 7"],
        ),
        (
            tag_list_caption,
            "caption is a tag list",
            ["cat, cute, pet", "#cat #cute #pet", "wall art | canvas | print", "猫,可爱,宠物", "beach; blue sky; sea."],
        ),
    ],
)
def test_bad_captions_are_dropped_with_the_reason(check, reason, captions):
    assert {caption: check(candidate(caption)) for caption in captions} == dict.fromkeys(captions, reason)


def test_caption_filters_look_only_at_the_fields_asked_for():
    mixed = Candidate({"alt": "IMG_1234.jpg", "synthetic": "a dog on a beach"}, {}, 64, 64)
    assert file_name_caption(mixed) == "caption is a file name"
    assert file_name_caption(mixed, fields=("synthetic",)) is None
    assert no_caption(mixed, fields=("missing",)) == "no caption"


def test_scores_under_the_papers_minimum_are_dropped():
    scores = {4.7: None, "5.1": None, 4.69: "aesthetic_score under 4.7", 10**400: "no aesthetic_score"}
    scores |= dict.fromkeys([None, "high", True, float("nan")], "no aesthetic_score")
    for score, reason in scores.items():
        assert aesthetic_score(candidate(metadata={"aesthetic_score": score})) == reason
    assert aesthetic_score(candidate(metadata={"a": [6]}), key="a") == "no a"
    assert aesthetic_score(candidate(metadata={"a": 6}), key="a", minimum=7) == "a under 7"
    assert aesthetic_score(candidate()) == "no aesthetic_score"


def test_size_limits_include_their_value_in_both_directions():
    assert smallest_side(candidate(height=64, width=300), minimum=64) is None
    assert smallest_side(candidate(height=300, width=63), minimum=64) == "side under 64 px"
    assert aspect(candidate(height=30, width=90), maximum=3) is None
    assert aspect(candidate(height=91, width=30), maximum=3) == "aspect over 3"


def test_images_that_their_bucket_would_enlarge_are_dropped():
    buckets = (Bucket(8, 4), Bucket(6, 6))
    for height, width, reason in ((8, 4, None), (12, 6, None), (6, 6, None), (16, 3, True), (7, 5, True), (5, 5, True)):
        found = enlarging(candidate(height=height, width=width), buckets=buckets)
        assert found == ("smaller than its bucket" if reason else None), (height, width)


def test_the_first_reason_counts():
    checks = [functools.partial(smallest_side, minimum=21), *CAPTION_FILTERS]
    assert first_reason(candidate("x.jpg", height=20, width=20), checks) == "side under 21 px"
    assert first_reason(candidate("x.jpg", height=30, width=30), checks) == "caption is a file name"
    assert first_reason(candidate("a dog", height=30, width=30), checks) is None
    assert first_reason(candidate(""), []) is None


def test_every_text_of_a_list_is_checked_and_without_fields_every_text():
    texts = Candidate({"caption/0": "a dog", "caption/1": "https://a.b/c", "page": "b.jpg"}, {}, 9, 9)
    assert url_caption(texts, fields=("caption",)) == "caption is a URL"
    assert file_name_caption(texts, fields=("caption",)) is None
    assert file_name_caption(texts) == "caption is a file name"
    assert no_caption(Candidate({"url": "https://a.b/c"}, {}, 9, 9), fields=USUAL_FIELDS) == "no caption"
