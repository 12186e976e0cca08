"""Runs of the `llava` section at toy size: training, resuming, the folder that is written, and mistakes."""

import json
import logging
import shutil
import subprocess
import sys
import tarfile
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, load_config
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from test_hosts import start, two_hosts
from test_llava import save_llm_of
from test_vision import save_clip, save_siglip

from lidit_jax.checkpoint_weights import load_weights
from lidit_jax.config_fields import apply_overrides
from lidit_jax.data.conversation_source import ConversationSource, pad_and_resize
from lidit_jax.describe.answers import DescribeRequest, generate_answers
from lidit_jax.errors import UserError
from lidit_jax.llava_run import LlavaRun
from lidit_jax.models.llava import Llava, image_features
from lidit_jax.stages.llava import run_llava
from lidit_jax.text.conversations import CHAT_TEMPLATE, ConversationTokenizer, Turn, parse_record, to_text
from lidit_jax.text.load_encoder import load_encoder, load_tokenizer
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.weights.huggingface_llm import load_causal_lm, load_llm_encoder

COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def record(name, *values):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": name, "image": f"{name}.png", "conversations": turns}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with an LLM, a vision tower, images of one colour and conversations about them."""
    folder = tmp_path_factory.mktemp("parts")
    save_llm_of(folder / "llm", "qwen2")
    save_clip(folder / "vision")
    save_siglip(folder / "siglip")
    (folder / "images").mkdir()
    records = []
    for i, (name, color) in enumerate(list(COLORS.items()) * 4):
        key = f"{name}{i}"
        Image.new("RGB", (30 + i, 40 - 2 * i), color).save(folder / "images" / f"{key}.png")
        records.append(record(key, "<image>\na circle above?", name, "a star left of?", f"a {name} star"))
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


def tiny_config(parts, **overrides):
    config = load_config("llava")
    section = config.llava
    section.llm = {"weights": str(parts / "llm")}
    section.vision = {"weights": str(parts / "vision")}
    for stage in (section.align, section.tune):
        stage.data.update(path=str(parts / "chat.json"), data_dir=str(parts / "images"), resolution=28, num_workers=0)
        stage.max_length = 96
        stage.train.update(steps=4, batch_size=8, warmup_steps=1, learning_rate=1e-2, checkpoint_every=2)
        stage.train.update(log_every=1, tensorboard=False)
    section.update(dtype="float32", save_dtype="float32", remat=False)
    config.mesh = {"data": 8}
    apply_overrides(config, {f"llava.{key}": str(value) for key, value in overrides.items()})
    return config


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """Workdir of a run, whose second stage is long enough to learn the colours."""
    workdir = epath.Path(tmp_path_factory.mktemp("run") / "llava run")
    run_llava(tiny_config(parts, **{"tune.train.steps": 120, "tune.train.checkpoint_every": 120}), workdir)
    return workdir


def losses(workdir, stage):
    lines = (workdir / "training" / stage / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines)]


def test_the_projector_alone_is_aligned_and_both_are_tuned(parts, finished):
    aligned, _ = load_weights(finished / "training/align/checkpoints", "params")
    assert set(aligned) == {"linear_1", "linear_2"}
    tuned, step = load_weights(finished / "training/tune/checkpoints", "params")
    assert (set(tuned), step) == ({"linear_1", "linear_2", "language_model"}, 120)
    assert losses(finished, "tune")[-1] < 0.5 * losses(finished, "tune")[0]
    before = load_causal_lm(parts / "llm")[1]["model"]["layers"]["q_proj"]["kernel"]
    assert np.abs(before - tuned["language_model"]["model"]["layers"]["q_proj"]["kernel"]).max() > 1e-3


def test_transformers_answers_with_the_colour_that_it_sees(parts, finished):
    """Generation by transformers from the folder, with its own processor and the LLM's chat template."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(finished / "llava").eval()
    processor = transformers.AutoProcessor.from_pretrained(finished / "llava")
    as_list = [{"type": "image"}, {"type": "text", "text": "a circle above?"}]
    contents = ("<image>\na circle above?", as_list, as_list)
    for (name, color), content in zip(COLORS.items(), contents, strict=True):
        message = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=Image.new("RGB", (33, 36), color), return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() == name


def test_describe_answers_with_the_colour_too(finished, tmp_path):
    Image.new("RGB", (33, 36), COLORS["green"]).save(tmp_path / "green.png")
    request = DescribeRequest(
        weights=(str(finished / "llava"),), prompts=("a circle above?",), image=epath.Path(tmp_path / "green.png"),
        instruction="", system_prompt="", max_tokens=8,
    )  # fmt: skip
    assert {answer.text for answer in generate_answers(request)} == {"green"}


def test_transformers_has_our_logits(parts, finished):
    run = LlavaRun(tiny_config(parts), finished)
    params, _ = load_weights(finished / "training/tune/checkpoints", "params")
    dataset = run.open_data("tune", run.section.tune)
    batch = next(iter(dataset.batches(8, 0, run.conversations(run.section.tune))))
    mean, deviation = (np.asarray(value, np.float32) for value in run.normalisation)
    pixels = (batch["image"].astype(np.float32) / 255 - mean) / deviation
    tower = run.load_tower(None, None)
    features = image_features(run.llava, tower, pixels)
    ours = jax.jit(Llava(run.llava).apply)({"params": params}, batch["tokens"], features)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(finished / "llava").eval()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(batch["tokens"]).long(),
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        ).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_result_is_a_prompt_encoder(finished):
    config, params = load_llm_encoder(finished / "llava")
    tuned, _ = load_weights(finished / "training/tune/checkpoints", "params")
    np.testing.assert_array_equal(params["embed_tokens"], tuned["language_model"]["model"]["embed_tokens"])
    assert config.vocab_size == tuned["language_model"]["model"]["embed_tokens"].shape[0]
    make_prompts = partial(PromptTokenizer, max_length=16, instruction="a circle above?")
    encoder, frozen = load_encoder(finished / "llava", make_prompts, dtype="float32")
    assert encoder.tokenizer.uses_chat_template
    prefix, rows = encoder.tokenizer.prefix(), encoder.tokenizer(["red", "green star"])
    model = transformers.LlavaForConditionalGeneration.from_pretrained(finished / "llava").eval()
    with torch.no_grad():
        ids = np.concatenate([np.tile(prefix, (2, 1)), rows["tokens"]], axis=1)
        states = model(input_ids=torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states
    ours = np.asarray(encoder.encode_prompts(frozen, rows["tokens"], rows["mask"]))
    theirs = states[-3].numpy()[:, len(prefix) :]
    np.testing.assert_allclose(ours[rows["mask"]], theirs[rows["mask"]], atol=1e-4, rtol=1e-4)


def test_the_processors_images_are_those_of_training(parts, finished):
    processor = transformers.AutoProcessor.from_pretrained(finished / "llava")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 61, 3)).astype(np.uint8))
    theirs = processor.image_processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    run = LlavaRun(tiny_config(parts), finished)
    mean, deviation = (np.asarray(value, np.float32) for value in run.normalisation)
    color = tuple(int(255 * value) for value in run.normalisation[0])
    ours = (pad_and_resize(np.asarray(image), 28, color).astype(np.float32) / 255 - mean) / deviation
    assert np.abs(ours - theirs).max() < 0.05  # other implementations of the bicubic filter round differently


def test_a_stopped_run_resumes_to_the_same_weights(parts, tmp_path):
    whole, stopped = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "stopped")
    constant = {"tune.train.schedule": "constant"}  # a cosine depends on the number of steps
    run_llava(tiny_config(parts, **constant), whole)
    run_llava(tiny_config(parts, **constant, **{"tune.train.steps": 2}), stopped)
    (stopped / "llava").rmtree()  # as after a stop between the last checkpoint and the folder
    shutil.copytree(parts / "images", tmp_path / "moved")
    moved = {"tune.data.data_dir": tmp_path / "moved", "align.data.data_dir": tmp_path / "moved"}
    run_llava(tiny_config(parts, **constant, **moved), stopped)
    first, second = ((each / "llava/model.safetensors").read_bytes() for each in (whole, stopped))
    assert first == second
    changed = (whole / "llava/model.safetensors").stat().mtime
    run_llava(tiny_config(parts, **constant), whole)  # nothing is left to do
    assert (whole / "llava/model.safetensors").stat().mtime == changed
    with pytest.raises(UserError, match="llava.tune.train.steps was 4, now 5; .*use another --workdir"):
        run_llava(tiny_config(parts, **constant, **{"tune.train.steps": 5}), whole)


def test_captions_of_tar_shards_are_answers(parts, tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i, (name, color) in enumerate(list(COLORS.items()) * 3):
            Image.new("RGB", (32, 32), color).save(tmp_path / f"{i}.png")
            (tmp_path / f"{i}.txt").write_text(f"a {name} circle")
            for ending in ("png", "txt"):
                tar.add(tmp_path / f"{i}.{ending}", f"{i}.{ending}")
    config = tiny_config(parts, question="a star?")
    config.llava.align.data = ConfigDict({"source": "tar", "path": str(tmp_path), "resolution": 28})
    del config.llava.tune
    workdir = epath.Path(tmp_path / "run")
    run_llava(config, workdir)
    assert (workdir / "llava/model.safetensors").exists()
    run = LlavaRun(config, workdir)
    batch = next(iter(run.open_data("align", run.section.align).batches(8, 0, run.conversations(run.section.align))))
    text = run.tokenizer.decode(batch["tokens"][0][batch["counted"][0]])
    assert text.startswith("a ") and text.endswith(f"circle{run.tokenizer.eos_token}")
    # Without the second stage the LLM is written as it was.
    before = load_causal_lm(parts / "llm")[1]["model"]["embed_tokens"]
    np.testing.assert_array_equal(load_llm_encoder(workdir / "llava")[1]["embed_tokens"][: len(before)], before)


@pytest.mark.slow
def test_a_mesh_trains_as_one_device_does(parts, tmp_path):
    def train(mesh, name):
        config = tiny_config(parts)
        config.mesh = mesh
        run_llava(config, epath.Path(tmp_path / name))
        return losses(epath.Path(tmp_path / name), "tune")

    alone = train({"data": 8}, "data")
    np.testing.assert_allclose(train({"data": 2, "fsdp": 2, "tensor": 2}, "all"), alone, rtol=2e-3)


@pytest.mark.slow
def test_two_hosts_write_the_folder_of_one(parts, tmp_path):
    tiny = tiny_config(parts)
    tiny.mesh = {"fsdp": -1}
    config = f"""
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({tiny.to_json()!r}))
"""
    with two_hosts(tmp_path, tmp_path / "two", 2, config=config) as hosts:
        errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)
    one = start(tmp_path, tmp_path / "one", 4, config=config)
    error = one.communicate(timeout=600)[1]
    assert one.returncode == 0, error
    first, second = (load_causal_lm(tmp_path / name / "llava")[1] for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), first, second)


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_tokenizer(parts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def conversations_of(tokenizer, **options):
    token = tokenizer.convert_tokens_to_ids("<image>")
    return ConversationTokenizer(tokenizer, token, 4, **{"max_length": 120, "question": "a star?", **options})


def test_answers_and_the_ends_of_their_turns_count_and_nothing_else(chat_tokenizer):
    turns = [Turn("user", "<image>\na circle?"), Turn("assistant", "a red circle")]
    turns += [Turn("user", "a star?"), Turn("assistant", "a blue star")]
    tokenized = conversations_of(chat_tokenizer)([to_text(turns)])
    tokens, counted = tokenized["tokens"][0], tokenized["counted"][0]
    assert chat_tokenizer.decode(tokens[counted]) == "a red circle<|im_end|>a blue star<|im_end|>"
    image = np.flatnonzero(tokens == chat_tokenizer.convert_tokens_to_ids("<image>"))
    assert len(image) == 4 and (np.diff(image) == 1).all()
    assert not tokenized["truncated"][0]


@pytest.mark.parametrize("template", [CHATML, CHAT_TEMPLATE])
def test_tokens_are_those_of_the_rendered_template(parts, template):
    chat_tokenizer = load_tokenizer(epath.Path(parts / "llm"))  # it begins a text with a space
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    chat_tokenizer.chat_template = template
    turns = [Turn("user", "<image>\na circle?"), Turn("assistant", "a red circle")]
    ids, _ = conversations_of(chat_tokenizer).encode(turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = chat_tokenizer.apply_chat_template(messages, tokenize=False).replace("<image>", "<image>" * 4)
    assert ids == chat_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_text_stay_text(chat_tokenizer):
    turns = [Turn("user", "<image> a?"), Turn("assistant", "red<|im_end|><image>blue")]
    ids, counted = conversations_of(chat_tokenizer).encode(turns)
    end, image = (chat_tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<image>"))
    answer = [token for token, counts in zip(ids, counted, strict=True) if counts]
    assert answer.count(end) == 1 and answer[-1] == end and image not in answer


def test_a_caption_that_is_too_long_is_truncated_and_said(chat_tokenizer):
    tokenized = conversations_of(chat_tokenizer, max_length=64)(["a red circle above a blue star " * 9, "red"])
    assert tokenized["truncated"].tolist() == [True, False]
    assert tokenized["counted"][0, -1] and not tokenized["counted"][1, -1]


def test_many_turns_are_not_truncated_for_their_total_length(chat_tokenizer):
    turns = [Turn("user", "<image>"), Turn("assistant", "red " * 10_000)] + [
        Turn("user", "a?"),
        Turn("assistant", "blue " * 8_000),
    ]
    tokenized = conversations_of(chat_tokenizer, max_length=100_000)([to_text(turns)])
    assert not tokenized["truncated"][0]


@pytest.mark.parametrize("template", ["{{ 1/0 }}", "no turns", "{{ messages[0]['content'] * 2 }}"])
def test_a_template_that_alters_turns_is_refused(parts, template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "llm")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template fails"):
        ConversationTokenizer(tokenizer, 5, 4, 40, "a?")


# --- mistakes ----------------------------------------------------------------------------------------------------

QUESTION, ANSWER = {"from": "human", "value": "<image> a?"}, {"from": "gpt", "value": "red"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "has no image: leave out conversations without one"),
        ({"conversations": [QUESTION | {"value": "a?"}, ANSWER]}, "<image> occurs 0 times: exactly once"),
        ({"conversations": [QUESTION | {"value": "<image><image>"}, ANSWER]}, "<image> occurs 2 times"),
        ({"conversations": [QUESTION, ANSWER | {"value": "<image>"}]}, "<image> occurs 2 times"),
        ({"conversations": [QUESTION]}, "list of 2 to 256 turns"),
        ({"conversations": [QUESTION, ANSWER, QUESTION]}, "the last question has no answer"),
        ({"conversations": [ANSWER, QUESTION]}, r'turn 0: must be \{"from": "human", "value": text\}'),
        ({"conversations": [QUESTION, ANSWER | {"value": "  "}]}, "turn 1: the answer is empty"),
        ({"conversations": [QUESTION, ANSWER | {"value": 3}]}, "turn 1: must be"),
        ({"conversations": "a"}, "list of 2 to 256 turns"),
    ],
)
def test_a_record_of_another_form_is_named(change, message):
    good = {"id": "x", "image": "a.png", "conversations": [QUESTION, ANSWER]}
    assert parse_record(good, "record x") == ("a.png", (Turn("user", "<image> a?"), Turn("assistant", "red")))
    with pytest.raises(UserError, match=message):
        parse_record(good | change, "record x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a JSON list"),
        ("{}", "is not a list of conversations"),
        ("[]", "is not a list of conversations"),
        ("[3]", "record 0 is not an object"),
        ("[" * 100_000, "cannot be read as a JSON list"),
        ('{"id": 1}\n{"id": 2}', "Extra data.*one list"),
        (json.dumps([record("gone", "<image> a?", "b")]), "record 'gone': image 'gone.png' is missing"),
        (json.dumps([record("a", "<image> a?", "b") | {"image": "../x.png"}]), r"image '../x.png' is outside"),
        (json.dumps([record("a", "<image> a?", "b") | {"image": "/etc/passwd"}]), "is outside"),
    ],
)
def test_a_file_that_is_no_such_list_is_named(tmp_path, text, message):
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ConversationSource(str(tmp_path / "chat.json"), "", 28, (0, 0, 0))


def test_paths_may_be_relative(parts, monkeypatch):
    monkeypatch.chdir(parts)
    for folder in ("images", "./images/", f"{parts}/images"):
        source = ConversationSource("chat.json", folder, 28, (0, 0, 0))
        assert source.load([0])[0]["image"].shape == (28, 28, 3)
    (parts / "images" / "beside.json").write_text((parts / "chat.json").read_text())
    monkeypatch.chdir(parts / "images")
    assert len(ConversationSource("beside.json", "", 28, (0, 0, 0))) == 12
    with pytest.raises(UserError, match="is missing in .*nowhere"):
        ConversationSource("beside.json", "nowhere", 28, (0, 0, 0))


def test_an_image_that_is_long_and_thin_is_broken(tmp_path):
    Image.new("RGB", (30_000, 1)).save(tmp_path / "a.png")
    (tmp_path / "chat.json").write_text(json.dumps([record("a", "<image> a?", "b")]))
    [example] = ConversationSource(str(tmp_path / "chat.json"), "", 28, (0, 0, 0)).load([0])
    assert "as a square it has too many pixels" in str(example)


def test_an_image_that_cannot_be_decoded_is_broken_and_counted(parts, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "chat.json").write_text(json.dumps([record("a", "<image> a?", "b")]))
    [example] = ConversationSource(str(tmp_path / "chat.json"), "", 28, (0, 0, 0)).load([0])
    assert "neither" in str(example) or "not" in str(example)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"align.data.resolution": 56}, "llava.align.data.resolution=56, but the vision tower takes images of 28 px"),
        ({"tune.max_length": 12}, r"llava.tune: the conversation about .* tokens with its image, more than"),
        ({"tune.max_length": 4}, "max_length=4 leaves no room beside the 4 tokens of an image"),
        ({"feature_layer": -9}, "llava: layer -9 of a vision tower with 4 blocks"),
        ({"select": "first"}, "llava.select='first' is unknown"),
        ({"llm.weights": "/nowhere"}, "/nowhere: no tokenizer.json in this folder"),
        ({"vision.weights": ""}, "llava.vision.weights is empty"),
        ({"tune.data.min_side": 20}, "conversations are neither filtered nor mixed"),
        ({"align.train.batch_size": 7}, "llava.align.train: a micro-batch of 7 is not divisible by 8"),
        ({"align.data.max_aspect": 2.0}, "max_aspect=2 must be 1"),
        (
            {"align.data.source": "folder", "align.data.path": "/nowhere"},
            "llava.align: data path '/nowhere'",
        ),
        ({"save_dtype": "int8"}, "save_dtype='int8'"),
        ({"align.data.path": ""}, "llava.align.data.path is empty: give --config.llava.align.data.path="),
    ],
)
def test_a_mistake_is_said_before_anything_is_written(parts, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run_llava(tiny_config(parts, **overrides), epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_command_ends_in_one_line(parts):
    command = [sys.executable, "-m", "lidit_jax.main", "--config=configs/llava.py", "--workdir=unused"]
    command += [f"--config.llava.{stage}.data.path={parts}/chat.json" for stage in ("align", "tune")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr == "error: llava.llm.weights is empty: give --config.llava.llm.weights=FOLDER\n"


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_result_that_is_none_is_not_taken_for_one(parts, tmp_path, taken):
    output = tmp_path / "run" / "llava"
    output.parent.mkdir()
    if taken == "file":
        output.touch()
    else:
        output.mkdir()
        (output / "config.json").touch()
    with pytest.raises(UserError, match="llava exists and is not a result of this run: move it"):
        run_llava(tiny_config(parts), epath.Path(tmp_path / "run"))
    assert [path.name for path in output.parent.iterdir()] == ["llava"]


def test_rows_without_room_for_an_answer_are_refused(parts, tmp_path):
    config = tiny_config(parts, **{"align.data.source": "shapes", "align.max_length": 12})
    del config.llava.tune
    with pytest.raises(UserError, match="llava.align.max_length=12 has no room for an answer after the image"):
        run_llava(config, epath.Path(tmp_path / "run"))


def test_a_moved_folder_of_the_same_content_is_accepted_on_resume(parts, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    config = tiny_config(parts, **{"align.train.steps": 1})
    del config.llava.tune
    run_llava(config, workdir)
    shutil.copytree(parts / "llm", tmp_path / "moved")
    config.llava.llm.weights = str(tmp_path / "moved")
    run_llava(config, workdir)
    shutil.copytree(parts / "siglip", tmp_path / "another")
    config.llava.vision.weights = str(tmp_path / "another")
    config.llava.select = "full"
    with pytest.raises(UserError, match="was created with another config"):
        run_llava(config, workdir)


def test_short_texts_are_not_counted_and_long_ones_are(chat_tokenizer):
    conversations = conversations_of(chat_tokenizer, max_length=60)
    for repeats in range(1, 30):
        turns = [Turn("user", "<image>\na?"), Turn("assistant", "red " * repeats)]
        fits = len(conversations.encode(turns)[0]) <= 60
        assert fits or not conversations.surely_fits(turns)
    assert conversations.surely_fits([Turn("user", "<image>"), Turn("assistant", "red")])


def test_a_siglip_tower_needs_all_of_its_tokens(parts, tmp_path):
    with pytest.raises(UserError, match="use select='full'"):
        LlavaRun(tiny_config(parts, **{"vision.weights": parts / "siglip"}), epath.Path(tmp_path))
    run = LlavaRun(tiny_config(parts, **{"vision.weights": parts / "siglip", "select": "full"}), epath.Path(tmp_path))
    assert run.llava.tokens_per_image == 4
    assert run.normalisation == ((0.5,) * 3, (0.5,) * 3)


def test_other_commands_name_what_such_a_workdir_is(parts, finished, caplog):
    from lidit_jax.experiment import Experiment

    with pytest.raises(UserError, match="it tunes an LLM and trains no LI-DiT"):
        Experiment(tiny_config(parts), finished)
    config = load_config("1b")
    config.data.update(source="llava", path="chat.json")
    with pytest.raises(UserError, match="data.source='llava' has conversations, not captions"):
        Experiment(config, finished)


def test_the_start_shows_a_conversation_and_the_end_the_next_commands(parts, tmp_path, caplog):
    config = tiny_config(parts)
    del config.llava.tune
    config.llava.align.train.steps = 1
    with caplog.at_level(logging.INFO):
        run_llava(config, epath.Path(tmp_path / "run"))
    text = caplog.text
    assert "align: a conversation, without its <image>" in text and "its answers, which are learnt" in text
    assert f"--config.encoders.NAME.weights={tmp_path / 'run' / 'llava'}" in text
    assert "lidit_jax.describe" in text
