"""Tests the report before training: captions, dropped samples, and how the encoders see prompts."""

import json
import logging

import pytest
from conftest import tiny_config
from etils import epath
from ml_collections import ConfigDict
from stored_data import data_of, numbered_image
from test_tar_source import encode, write_tar
from test_text import CAPTIONS, TOKENIZER

from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data_report import log_data, log_prompts
from lidit_jax.experiment import Experiment
from lidit_jax.preview.contact_sheet import draw_contact_sheet

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"


LLM = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}


@pytest.fixture
def config(tmp_path):
    """Config of a run on four samples, one of them without a caption, with an encoder that has no weights."""
    files = {}
    for i, text in enumerate(["a red circle above a blue square " * 12, "a star", CAPTIONS[2] * 9, " "]):
        files |= {f"{i}.png": encode(numbered_image(0)), f"{i}.txt": text.encode()}
    write_tar(tmp_path / "0.tar", files)
    TOKENIZER.save_pretrained(tmp_path / "llm")
    (tmp_path / "llm/config.json").write_text(json.dumps(LLM))
    config = tiny_config()
    with config.unlocked(), config.ignore_type():
        config.data.update(source="tar", path=str(tmp_path))
        config.data.captions = None
        config.encoders = ConfigDict({"llm": {"weights": str(tmp_path / "llm"), "dtype": "float32"}})
        config.text.update(max_length=8, instruction="Describe the objects:")
    return config


def report(config, caplog) -> str:
    caplog.set_level(logging.INFO, logger="lidit_jax")
    experiment = Experiment(config, epath.Path("unused"))
    dataset = open_dataset(experiment.data, 8)
    log_prompts(experiment, log_data(experiment, dataset), experiment.encoders)
    return caplog.text


def test_captions_shares_left_out_truncated_prompts_and_the_prefix_are_logged(config, caplog):
    text = report(config, caplog)
    assert "left out by filters no caption: 1 (25.0%)" in text
    assert text.count("caption: '") == 3 and "caption: 'a star'" in text and "…'" in text
    assert "llm: 66.7% of prompts (3 sampled) are longer than text.max_length=8 tokens and truncated" in text
    assert "llm: before every prompt, as plain text (no chat template): ' Describe the objects:'" in text


def test_the_chat_template_that_is_used_is_logged(config, caplog, tmp_path):
    (tmp_path / "llm/chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    text = report(config, caplog)
    assert r"before every prompt, in the tokenizer's chat template: ' <|user|>\nDescribe the objects:'" in text
    caplog.clear()
    config.text.chat_template = False
    assert "as plain text (text.chat_template=False): ' Describe the objects:'" in report(config, caplog)


def test_only_the_first_host_reports(config, caplog, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert "caption: " not in report(config, caplog)


def test_preview_reports_the_same(config, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="lidit_jax")
    draw_contact_sheet(config, epath.Path(tmp_path / "sheet.png"), 4)
    for said in ("no caption: 1 (25.0%)", "caption: 'a star'", "llm: 66.7% of prompts", "' Describe the objects:'"):
        assert said in caplog.text


def test_a_vae_alone_reports_no_captions(config):
    assert "captions" not in open_dataset(data_of("tar", config.data.path), 8, with_captions=False).summary()
