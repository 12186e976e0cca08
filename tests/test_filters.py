import functools

import numpy as np
import pytest

from lidit_jax.data.filters import (
    CAPTION_FILTERS,
    Candidate,
    aesthetic_score,
    apply_filters,
    aspect,
    file_name_caption,
    no_caption,
    smallest_side,
    tag_list_caption,
    url_caption,
)
from lidit_jax.data.sources import SubsetSource
from lidit_jax.errors import UserError

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


class Listed:
    fingerprint = "listed"

    def __init__(self, captions: list[str]):
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def sizes(self) -> np.ndarray:
        return np.array([[20 + i, 40] for i in range(len(self))], np.int32)

    def __getitem__(self, index: int) -> dict:
        image = np.full((20 + index, 40, 3), index, np.uint8)
        return {"key": str(index), "image": image, "captions": {"txt": self.captions[index]}, "metadata": {}}


def test_filters_keep_indices_in_order_and_count_the_first_reason():
    source = Listed(["a dog", "x.jpg", "", "a bird", "y.jpg"])
    kept, report = apply_filters(source, [functools.partial(smallest_side, minimum=21), *CAPTION_FILTERS])
    assert (kept.dtype, kept.tolist()) == (np.int64, [3])
    assert report == {"side under 21 px": 1, "caption is a file name": 2, "no caption": 1}


def test_dropping_everything_says_why():
    with pytest.raises(UserError, match=r"drop all 2 samples \(caption is a file name: 2\)"):
        apply_filters(Listed(["x.jpg", "y.jpg"]), CAPTION_FILTERS)


def test_no_filters_keep_all():
    assert apply_filters(Listed(["", "x.jpg"]), [])[0].tolist() == [0, 1]


def test_a_subset_is_a_source_of_its_own():
    source = Listed(["zero", "one", "two", "three"])
    subset = SubsetSource(source, np.array([3, 1]))
    assert len(subset) == 2
    assert [subset[i]["captions"]["txt"] for i in range(2)] == ["three", "one"]
    assert subset.describe(1)["key"] == "1"
    assert subset.sizes().tolist() == [[23, 40], [21, 40]]
    assert len({source.fingerprint, subset.fingerprint, SubsetSource(source, np.array([1, 3])).fingerprint}) == 3
    with pytest.raises(UserError, match="no examples"):
        SubsetSource(source, np.array([], int))
