"""Tokenizers and chat templates that cost far more than their size: rejected by a process of its own, within limits."""

import json
import os
import time

import pytest
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.text import tokenizer_trial
from lidit_jax.text.load_encoder import load_tokenizer
from lidit_jax.text.prompts import MAX_CHARACTERS, PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.weights.digest import folder_digest


def make_folder(folder, template=None, normalizer=None, chat_template_file=None):
    tokenizer = train_tokenizer(["a red circle above a blue square", "Describe the objects:"], 300)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if normalizer:
        values = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(values | {"normalizer": normalizer}))
    if chat_template_file:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat_template_file}))
    return epath.Path(folder)


LITTLE_MEMORY = {"MEMORY": 300 << 20, "CPU_SECONDS": 120}
GROWING = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}
LONG = "{{ 'x' * 20000000000 }}"
COSTLY = {
    "normalizer": (
        {"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 9}},
        "more than 300 MiB",
        LITTLE_MEMORY,
    ),
    "rare word": (
        {"normalizer": {"type": "Sequence", "normalizers": [{**GROWING, "pattern": {"String": "zebra"}}] * 3}},
        "a character by more than 1000",
        {},
    ),
    "rare character": (
        {"normalizer": {"type": "Sequence", "normalizers": [{**GROWING, "pattern": {"String": "\u0d9e"}}] * 9}},
        "a character by more than 1000",
        {},
    ),
    "loop": (
        {"template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
        "more than 2 seconds",
        {"CPU_SECONDS": 2},
    ),
    "long text": ({"template": LONG}, "more than 300 MiB", LITTLE_MEMORY),
    "chat_template.json": ({"chat_template_file": LONG}, "more than 300 MiB", LITTLE_MEMORY),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_costly_tokenizer_or_template_ends_in_one_line(tmp_path, monkeypatch, kind):
    # Only the limit under test is low, so that a slow machine does not reach the other one first.
    change, message, limits = COSTLY[kind]
    for name, value in limits.items():
        monkeypatch.setattr(tokenizer_trial, name, value)
    with pytest.raises(UserError, match=rf"^[^\n]*tokenizer and its chat template \w+ {message}[^\n]*$"):
        load_tokenizer(make_folder(tmp_path / "tokenizer", **change))


@pytest.mark.parametrize("kind", ["folder", "link"])
@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "chat_template.json"])
def test_a_tokenizer_file_that_is_no_file_is_named(tmp_path, kind, name):
    folder = make_folder(tmp_path / "tokenizer")
    (folder / name).mkdir() if kind == "folder" else os.symlink(tmp_path / "nowhere", folder / name)
    with pytest.raises(UserError, match=rf"{name} can't be read \((Is a directory|No such file or directory)\)"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=rf"{name} can't be read"):
        folder_digest(folder)


def test_a_tokenizer_is_tried_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_passed", set())
    template = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    folders = [make_folder(tmp_path / name, template) for name in "ab"]
    run, started = tokenizer_trial.subprocess.run, []
    monkeypatch.setattr(tokenizer_trial.subprocess, "run", lambda *a, **k: started.append(a) or run(*a, **k))
    tokenizers = [load_tokenizer(folder) for folder in (*folders, folders[0])]
    assert len(started) == 1
    assert len({PromptTokenizer(tokenizer, 8).digest for tokenizer in tokenizers}) == 1


def test_a_trial_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_passed", set())
    monkeypatch.setattr(tokenizer_trial, "__name__", "lidit_jax.no_such_module")
    with pytest.raises(UserError, match="exit code 1 .*No module named lidit_jax.no_such_module"):
        load_tokenizer(make_folder(tmp_path / "tokenizer"))


def test_a_prompt_costs_no_more_than_the_longest_one_tried():
    prompts = PromptTokenizer(train_tokenizer(["a red circle"], 300), 8)
    start = time.process_time()
    long = prompts(["a red circle " * 4_000_000])
    assert time.process_time() - start < 5
    assert long["truncated"][0]
    assert (long["tokens"] == prompts(["a red circle " * 5000])["tokens"]).all()
    assert len("a red circle " * 5000) < MAX_CHARACTERS
