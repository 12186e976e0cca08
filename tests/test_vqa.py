"""Tests VQA models: BLIP against T2I-CompBench's official code, and other models."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from vqa_models import WORDS, random_image, save_blip, save_llava, save_vilt

from lidit_jax.errors import UserError
from lidit_jax.score.vqa import clean_question, is_yes, load_blip, load_vqa

QUESTIONS = ["a red car?", "is there an apple?", "a round wooden plate?", "a blue cup?"] * 3


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return save_blip(tmp_path_factory.mktemp("blip"))


def official_probability(folder, image, question):
    """Reimplements vqa_prob of the official models/blip_vqa.py: one question, softmax over the vocabulary."""
    model = transformers.BlipForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(question)["input_ids"]])
    ids[:, 0] = len(WORDS) + 1
    resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) / 255.0
    mean, std = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
    pixels = torch.tensor((resized - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels).last_hidden_state
        read = model.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state
        start = torch.tensor([[len(WORDS)]])
        p = model.text_decoder(start, encoder_hidden_states=read).logits[0, 0].softmax(-1)
    yes, no = p[WORDS.index("yes")], p[WORDS.index("no")]
    return float(yes / (yes + no))


def test_blip_gives_the_official_probability_of_yes_whatever_else_is_asked_beside(blip_folder):
    model, image = load_blip(str(blip_folder)), random_image(0)
    found = model.yes_probabilities(image, QUESTIONS)
    expected = [official_probability(blip_folder, image, question) for question in QUESTIONS[:4]]
    np.testing.assert_allclose(found, expected * 3, atol=1.5e-4)
    assert len(set(found)) == 4
    assert model.yes_probabilities(np.zeros_like(image), QUESTIONS) != found
    assert model.yes_probabilities(image, []) == []
    assert model.answers(image, QUESTIONS) == ["yes" if p > 0.5 else "no" for p in found]


def test_questions_are_cleaned_as_officially():
    assert clean_question('The "Red" car (old), a man\'s: #1?  ') == "the red car old, a man's 1?"
    assert clean_question("word " * 60 + "end?") == " ".join(["word"] * 50)


def test_long_questions_are_truncated_and_not_rejected(blip_folder):
    assert 0 <= load_blip(str(blip_folder)).yes_probabilities(random_image(0), ["a car " * 40])[0] <= 1


@pytest.mark.parametrize("save", [save_vilt, save_llava])
def test_other_models_answer_the_same_alone_and_beside_others(tmp_path, save):
    model, image = load_vqa(str(save(tmp_path))), random_image(0)
    answers = model.answers(image, QUESTIONS)
    assert len(answers) == len(QUESTIONS)
    assert [model.answers(image, [question])[0] for question in QUESTIONS[:4]] == answers[:4]
    if save is save_vilt:
        assert set(answers) <= {"yes", "no", "two"}
        model.answers(image, ["a car " * 60])


def test_yes_is_the_first_word_alone():
    assert all(is_yes(answer) for answer in ("yes", "Yes.", " YES, it is", '"Yes"', "**yes**"))
    assert not any(is_yes(answer) for answer in ("no", "", "yesterday", "I think yes", "not yes"))


def test_models_that_answer_no_questions_are_said(tmp_path, blip_folder, t5_folder):
    with pytest.raises(UserError, match="no such folder"):
        load_vqa(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="'t5', which does not answer questions about images"):
        load_vqa(str(t5_folder))
    with pytest.raises(UserError, match="has no chat template"):
        load_vqa(str(save_llava(tmp_path / "llava", chat_template=False)))
    with pytest.raises(UserError, match="is not a BLIP"):
        load_blip(str(save_vilt(tmp_path)))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_vqa(str(damaged))


def test_a_blip_of_other_words_is_said(tmp_path):
    folder = save_blip(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["bos_token_id"] = 10_000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="tokenizer is not BLIP's"):
        load_blip(str(folder))


def test_a_model_that_needs_torchvision_says_so(tmp_path, monkeypatch):
    def load(*_):
        raise UserError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr("lidit_jax.score.vqa.load_processor", load)
    with pytest.raises(UserError, match="pip install torchvision"):
        load_vqa(str(save_llava(tmp_path)))
