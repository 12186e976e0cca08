"""`describe`: what language models generate for a prompt, alone and after the instruction."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, change_config
from etils import epath
from PIL import Image
from tiny_llava import CAPTIONS, CHAT_TEMPLATE, SIZES, save, save_llava

from lidit_jax.describe.answers import DescribeRequest, generate_answers
from lidit_jax.describe.report import draw_answers, format_answers, write_answers
from lidit_jax.errors import UserError
from lidit_jax.images import save_png
from lidit_jax.text.load_encoder import load_tokenizer
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer

INSTRUCTION = "Describe the objects:"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return save(model, tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    return save(model, tmp_path_factory.mktemp("qwen") / "chat", CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    sizes = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    return save(model, tmp_path_factory.mktemp("t5") / "whole")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava") / "vision")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = epath.Path(tmp_path_factory.mktemp("image")) / "red.png"
    save_png(np.full((12, 16, 3), (200, 30, 30), np.uint8), file)
    return file


def request(*weights, prompts=("a red circle",), **changes):
    return DescribeRequest(
        **{"weights": weights, "prompts": prompts, "instruction": INSTRUCTION, "max_tokens": 6} | changes
    )


def test_a_base_model_continues_the_text_that_the_encoder_reads(llama):
    alone, instructed = generate_answers(request(llama))
    model, tokenizer = transformers.LlamaForCausalLM.from_pretrained(llama), load_tokenizer(epath.Path(llama))
    for answer, instruction in ((alone, ""), (instructed, INSTRUCTION)):
        prompts = PromptTokenizer(tokenizer, 32, instruction)
        row = prompts(["a red circle"])
        tokens = np.concatenate([prompts.prefix(), row["tokens"][0][row["mask"][0]][:-1]])
        assert answer.instruction == instruction and answer.given == tokenizer.decode(tokens)
        found = []
        for _ in range(6):
            logits = model(torch.tensor([[*tokens, *found]])).logits[0, -1]
            found.append(int(logits.argmax()))
            if found[-1] == tokenizer.eos_token_id:
                break
        assert answer.text == tokenizer.decode(found, skip_special_tokens=True).strip()
        assert answer.tokens == len(found) and answer.complete == (found[-1] == tokenizer.eos_token_id)


def test_a_chat_model_answers_in_its_own_turn(chat):
    alone, instructed = generate_answers(request(chat, system_prompt="Be exact."))
    end = load_tokenizer(epath.Path(chat)).eos_token
    assert instructed.given.replace(" ", "") == (
        f"<|system|>Be exact.{end}<|user|>{INSTRUCTION} a red circle{end}<|assistant|>".replace(" ", "")
    )
    assert INSTRUCTION not in alone.given and alone.given.endswith("<|assistant|>")
    [plain] = generate_answers(request(chat, instruction="", chat_template=False))
    assert plain.given.strip() == "a red circle"


def test_a_t5_reads_its_end_token_and_its_decoder_answers(t5):
    answer = generate_answers(request(t5))[1]
    tokenizer, model = load_tokenizer(epath.Path(t5)), transformers.T5ForConditionalGeneration.from_pretrained(t5)
    assert answer.given.endswith(tokenizer.eos_token)
    tokens = tokenizer(answer.given, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0, 1:]
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_a_vision_language_model_sees_the_image(llava, image, tmp_path):
    answers = generate_answers(request(llava, image=image))
    assert "<image>" in answers[1].given and INSTRUCTION.split()[0] in answers[1].given
    other = epath.Path(tmp_path) / "other.png"
    save_png(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), other)
    different = generate_answers(request(llava, image=other, max_tokens=24))
    assert [a.text for a in different] != [a.text for a in generate_answers(request(llava, image=image, max_tokens=24))]
    assert generate_answers(request(llava))[0].text  # without an image it is a language model


def test_models_stand_side_by_side_in_all_three_files(llama, chat, tmp_path):
    prompts = ["a red circle", "红色圆形\x1b[31m"]
    asked = request(llama, chat, prompts=prompts)
    answers = generate_answers(asked)
    assert [(a.weights, a.prompt) for a in answers[::2]] == [(w, p) for w in (llama, chat) for p in prompts]
    write_answers(answers, asked, epath.Path(tmp_path / "out"))
    written = json.loads((tmp_path / "out/describe.json").read_text())
    assert written["instruction"] == INSTRUCTION and len(written["answers"]) == 8
    assert written["answers"][0]["text"] == answers[0].text
    text = (tmp_path / "out/describe.txt").read_text()
    assert text.count("prompt: ") == 2 and "\x1b" not in text and "cut off after 6 tokens" in text
    assert text.strip() == format_answers(answers)
    with Image.open(tmp_path / "out/describe.png") as sheet:
        assert sheet.size == draw_answers(answers).size and sheet.width > 700


def test_options_of_a_folder_do_not_make_answers_random(llama, tmp_path):
    folder = tmp_path / "random"
    shutil.copytree(llama, folder)
    values = {"do_sample": True, "temperature": 9.0, "max_length": 3, "custom_generate": "x/y", "num_beams": 2}
    (folder / "generation_config.json").write_text(json.dumps(values))
    assert [a.text for a in generate_answers(request(str(folder)))] == [
        a.text for a in generate_answers(request(llama))
    ]


def test_bad_models_and_prompts_are_named_in_one_line(llama, t5_folder, image, tmp_path):
    headless = tmp_path / "headless"
    transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).save_pretrained(headless)
    train_tokenizer(CAPTIONS, 299).save_pretrained(headless)
    cases = [
        (request(str(headless)), "lacks weights .*lm_head"),
        (request(str(t5_folder)), "lacks weights .*decoder"),
        (request(llama, image=image), "takes no images"),
        (request(llama, image=epath.Path(tmp_path / "none.png")), "none.png"),
        (request(llama, max_tokens=200), "reads at most 128 tokens"),
        (request(llama, prompts=["a"] * 2 + ["word " * 5000]), "more than 4095 tokens"),
        (request(str(tmp_path / "nothing")), "no such folder"),
    ]
    for asked, message in cases:
        with pytest.raises(UserError, match=message):
            generate_answers(asked)
    own_code = tmp_path / "own_code"
    shutil.copytree(llama, own_code)
    change_config(own_code, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    (own_code / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="own_code"):
        generate_answers(request(str(own_code)))


def test_the_command_prints_and_writes_answers(llama, tmp_path):
    command = [sys.executable, "-m", "lidit_jax.describe", f"--weights={llama}", "--prompt=a red circle"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}", "--max_tokens=4"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "prompt: a red circle" in done.stdout and "with instruction:" in done.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "describe.json",
        "describe.png",
        "describe.txt",
    ]
