import collections

import numpy as np
import pytest

from lidit_jax.data.captions import CaptionChooser
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
