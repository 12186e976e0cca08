"""`recaption`: new shards with captions by a vision-language model and aesthetic scores."""

import collections
import concurrent.futures
import dataclasses
import json
import logging
import shutil
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, change_config
from etils import epath
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import save_file
from stored_data import COUNT, caption, numbered_image
from test_tar_source import encode, write_tar
from tiny_llava import CHAT_TEMPLATE, SIZES, VISION, image_processor, save, save_llava
from tokenizers.processors import TemplateProcessing

from lidit_jax.config import build
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.formats.shards import Sample, Unusable
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.open_dataset import open_dataset, open_shards
from lidit_jax.errors import UserError
from lidit_jax.recaption import plan as plans
from lidit_jax.recaption import write
from lidit_jax.recaption.aesthetic import AestheticScorer, compose_layers
from lidit_jax.recaption.captioner import Captioner, complete_sentences
from lidit_jax.recaption.model_errors import OutOfMemory
from lidit_jax.recaption.request import RecaptionRequest, parse_part
from lidit_jax.recaption.sample_files import sample_files
from lidit_jax.recaption.write import recaption
from lidit_jax.text.generation import image_inputs
from lidit_jax.workdir_lock import lock

QUESTION = "Describe the objects: colour"
LAYERS = {"layers.0.weight": (8, 16), "layers.2.weight": (5, 8), "layers.10.weight": (1, 5)}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava") / "vision")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    save(transformers.CLIPModel(config), folder)
    image_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in LAYERS.items()}
    tensors |= {
        name.replace("weight", "bias"): torch.randn(shape[:1], generator=generator) for name, shape in LAYERS.items()
    }
    file = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(tensors, file)
    return str(file)


def config_of(data):
    """Returns a config with the given DataConfig as its `data` section, or with a dict."""
    values = data if isinstance(data, dict) else dataclasses.asdict(data)
    return ConfigDict({"data": {name: value for name, value in values.items() if value is not None}})


def request_of(llava=None, **changes):
    return RecaptionRequest(**{"weights": llava, "question": QUESTION, "max_tokens": 6, "batch_size": 4} | changes)


def samples_of(shards):
    """Returns {key: (texts, metadata, encoded image)} of all samples."""
    found = {}
    for shard in range(len(shards.paths)):
        for item in shards.scan(shard):
            assert not isinstance(item, str), item
            _, sample = item
            key = sample.metadata.get("key", sample.key)
            found[key] = (sample.captions, sample.metadata, sample.image.read())
    return found


def statistics_of(out):
    counts = collections.Counter()
    for file in out.glob("*_stats.json"):
        counts.update(json.loads(file.read_text()))
    return dict(counts)


@pytest.fixture(scope="module")
def generated_alone(llava):
    """Captions that transformers generates for each numbered image alone."""
    processor = transformers.AutoProcessor.from_pretrained(llava)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(llava)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    captions = []
    for i in range(COUNT):
        inputs = processor(images=Image.fromarray(numbered_image(i)), text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        captions.append(complete_sentences(" ".join(answer.split())))
    return captions


@pytest.mark.parametrize("kind", ["tar", "embedded", "array_record", "jsonl"])
def test_every_sample_keeps_its_image_and_texts_and_gets_the_models_caption(
    kind, stored, llava, generated_alone, tmp_path
):
    out = epath.Path(tmp_path / "new")
    recaption(config_of(stored[kind]), request_of(llava), out, (0, 1))
    before, after = samples_of(open_shards(stored[kind])), samples_of(TarShards(out))
    assert list(after) == list(before) and len(after) == COUNT
    model_captions = set()
    for key, (texts, metadata, image) in before.items():
        new_texts, new_metadata, new_image = after[key]
        assert new_image == image
        assert new_metadata["score"] == metadata["score"]
        generated = new_texts.pop("synthetic", "")
        model_captions.add(generated)
        assert new_texts == texts
        assert generated == generated_alone[int(metadata["score"])]
    assert len(model_captions) > 1
    assert statistics_of(out)["written"] == COUNT
    assert Image.open(out / write.SHEET).width > 500


def test_training_samples_both_captions(stored, llava, tmp_path):
    out = epath.Path(tmp_path / "new")
    recaption(config_of(stored["tar"]), request_of(llava), out, (0, 1))
    data = build(
        DataConfig,
        {"source": "tar", "path": str(out), "resolution": 32, "captions": {"txt": 1.0, "synthetic": 1.0}},
        "data",
    )
    dataset = open_dataset(data, 8)
    batches = dataset.batches(14, 0, tokenize=None, with_captions=True)
    captions = {text for _ in range(6) for text in next(batches)["caption"]}
    batches.close()
    originals = {caption(i) for i in range(COUNT)}
    assert originals & captions and captions - originals


def test_parts_and_a_resumed_run_write_the_shards_of_one_run(stored, llava, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(plans, "SAMPLES_A_SHARD", 5)
    config, once, parts = config_of(stored["tar"]), epath.Path(tmp_path / "once"), epath.Path(tmp_path / "parts")
    recaption(config, request_of(llava), once, (0, 1))
    recaption(config, request_of(llava), parts, (1, 2))
    assert [file.name for file in sorted(parts.glob("*.tar"))] == ["000001.tar"]
    assert "1 of 3 shards are complete" in caplog.text
    original = write._add_files

    def stop_in_the_last_shard(tar, key, files):
        if key == f"{12:09}":
            raise KeyboardInterrupt
        original(tar, key, files)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_add_files", stop_in_the_last_shard)
        with pytest.raises(KeyboardInterrupt):
            recaption(config, request_of(llava), parts, (0, 2))
    assert [file.name for file in sorted(parts.glob("*.tar"))] == ["000000.tar", "000001.tar"]
    finished = (parts / "000000.tar").stat().mtime
    recaption(config, request_of(llava), parts, (0, 2))
    assert (parts / "000000.tar").stat().mtime == finished
    names = sorted(file.name for file in once.iterdir())
    assert sorted(file.name for file in parts.iterdir()) == names
    for name in names:
        assert (parts / name).read_bytes() == (once / name).read_bytes(), name
    with monkeypatch.context() as patch:
        patch.setattr(write, "Captioner", None)  # a complete folder loads no model
        recaption(config, request_of(llava), parts, (0, 1))


def test_scores_are_linear_layers_on_clips_normalised_features(clip, head):
    images = [numbered_image(i) for i in range(4)]
    scores = AestheticScorer(clip, head)(images)
    model, processor = transformers.CLIPModel.from_pretrained(clip), image_processor()
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in _tensors(head).items()}
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        x = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
        for layer in ("layers.0", "layers.2", "layers.10"):
            x = torch.nn.functional.linear(x, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])
    np.testing.assert_allclose(scores, x[:, 0].numpy(), rtol=1e-5, atol=1e-5)
    assert np.std(scores) > 1e-3


def _tensors(file):
    from safetensors.numpy import load_file

    return load_file(file)


def test_images_that_score_too_low_are_left_out_and_not_captioned(stored, llava, clip, head, tmp_path):
    images = {
        int(i): score for i, score in enumerate(AestheticScorer(clip, head)([*map(numbered_image, range(COUNT))]))
    }
    minimum = float(np.median(list(images.values())))
    data = dataclasses.replace(stored["tar"], min_aesthetic=minimum, aesthetic_key="beauty")
    out = epath.Path(tmp_path / "new")
    recaption(config_of(data), request_of(llava, clip=clip, aesthetic_head=head), out, (0, 1))
    kept = {metadata["score"]: metadata["beauty"] for _, metadata, _ in samples_of(TarShards(out)).values()}
    expected = {i: score for i, score in images.items() if score >= minimum}
    assert kept == pytest.approx(expected, abs=1e-4) and 0 < len(kept) < COUNT
    assert statistics_of(out)[f"beauty under {minimum:g}"] == COUNT - len(kept)


def test_scores_alone_are_written_without_a_captioner(stored, clip, head, tmp_path):
    out = epath.Path(tmp_path / "new")
    recaption(config_of(stored["jsonl"]), request_of(clip=clip, aesthetic_head=head), out, (0, 1))
    after = samples_of(TarShards(out))
    assert len(after) == COUNT and all(type(metadata["aesthetic"]) is float for _, metadata, _ in after.values())
    assert not any("synthetic" in texts for texts, _, _ in after.values())


@hypothesis.given(
    widths=st.lists(st.integers(1, 5), min_size=0, max_size=4), seed=st.integers(0, 99), bias=st.booleans()
)
def test_layers_compose_to_their_product(widths, seed, bias):
    rng = np.random.default_rng(seed)
    widths = [3, *widths, 1]
    tensors, x = {}, rng.normal(size=(2, 3))
    expected = x
    for i in range(len(widths) - 1):
        matrix, offset = rng.normal(size=(widths[i + 1], widths[i])), rng.normal(size=widths[i + 1]) * bias
        tensors[f"layers.{7 * i}.weight"] = matrix
        if bias:
            tensors[f"layers.{7 * i}.bias"] = offset
        expected = expected @ matrix.T + offset
    weight, constant = compose_layers(tensors, "--aesthetic_head=FILE")
    np.testing.assert_allclose(x @ weight + constant, expected[:, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "gives 0 numbers"),
        ({"weight": (2, 4)}, "gives 2 numbers"),
        ({"bias": (1,)}, "has no weight"),
        ({"weight": (1, 4), "bias": (2,)}, "a bias of 2 numbers"),
        ({"conv.weight": (1, 4, 3, 3)}, "only linear layers"),
        (
            {"layers.0.weight": (3, 4), "layers.1.weight": (1, 5)},
            "layer layers.1 takes 5 features, the one before",
        ),
        ({"running_mean": (4,)}, "only linear layers"),
        ({"linear.weight": (4, 4), "out.weight": (1, 4)}, "their numbers must tell their order"),
        ({"a.1.weight": (1, 4), "b.1.weight": (1, 4)}, "their numbers must tell their order"),
    ],
)
def test_a_head_of_other_layers_is_rejected_in_one_line(tensors, message):
    with pytest.raises(UserError, match=message):
        compose_layers({name: np.ones(shape) for name, shape in tensors.items()}, "--aesthetic_head=FILE")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_head_that_is_not_finite_is_rejected(value):
    with pytest.raises(UserError, match="values that are not finite"):
        compose_layers({"weight": np.full((1, 4), value)}, "--aesthetic_head=FILE")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat. It sits on", "A cat."),
        ("A cat of 3.5 kg", "A cat of 3.5 kg"),
        ('He says "no." Then', 'He says "no."'),
        ("一只猫。它坐在", "一只猫。"),
        ("no end", "no end"),
        ("There are: 1. a cat 2. a do", "There are: 1. a cat 2. a do"),
        ("A cat. He met Dr. Smi", "A cat."),
        ("A “stop.” The si", "A “stop.”"),
        ("All of it.", "All of it."),
        ("", ""),
    ],
)
def test_a_caption_that_was_cut_off_ends_with_its_last_complete_sentence(text, expected):
    assert complete_sentences(text) == expected


def test_a_broken_image_is_counted_and_left_out(llava, tmp_path):
    good, out = encode(numbered_image(1)), epath.Path(tmp_path / "new")
    files = {"a.png": good, "a.txt": b"a cat", "b.png": good[:-30] + b"0" * 30, "b.txt": b"a dog", "c.png": good}
    write_tar(tmp_path / "old.tar", files)
    config = config_of({"source": "tar", "path": str(tmp_path / "old.tar"), "resolution": 32})
    recaption(config, request_of(llava), out, (0, 1))
    after = samples_of(TarShards(out))
    assert list(after) == ["a", "c"]
    assert "txt" not in after["c"][0]  # it had no caption, and now has the model's alone
    statistics = statistics_of(out)
    assert statistics["written"] == 2 and sum(statistics.values()) - statistics.get("caption cut off", 0) == 3


def test_a_text_of_the_same_name_is_not_overwritten(llava, tmp_path):
    has_it = {"a.png": encode(numbered_image(1)), "a.json": b'{"synthetic": ["a cat", "a dog"]}'}
    out = epath.Path(tmp_path / "new")
    write_tar(tmp_path / "old.tar", has_it)
    config = config_of({"source": "tar", "path": str(tmp_path / "old.tar"), "resolution": 32})
    with pytest.raises(UserError, match="has a text 'synthetic' already: give another --field"):
        recaption(config, request_of(llava), out, (0, 1))
    assert not out.exists()
    write_tar(tmp_path / "later.tar", {"0.png": encode(numbered_image(0)), "0.txt": b"first"} | has_it)
    config = config_of({"source": "tar", "path": str(tmp_path / "later.tar"), "resolution": 32})
    recaption(config, request_of(llava), out, (0, 1))
    after = samples_of(TarShards(out))
    assert after["a"][0] == {"synthetic/0": "a cat", "synthetic/1": "a dog"} and after["0"][0]["synthetic"]
    assert statistics_of(out)["synthetic was there already"] == 1


@pytest.mark.parametrize(
    "texts",
    [
        {"json": {"caption": ["w" * 15000 + str(i) for i in range(40)], "a": {"b": "c"}, "url": "u", "n": [1, "x"]}},
        {"json": {"txt": "a\0bcd", "score": 1}},
        {"json": {"txt": "\ufeffhello"}},
        {"json": {"txt": "from json"}, "txt": " "},
        {"json": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "txt": "t"},
        {"cls": "cat", "txt": "a cat"},
        {"json": {"aesthetic": "5.1"}, "txt": "its score is replaced"},
        {"json": {"dotted.name": {"x.y": "z"}, "deep": {"a": {"b": {"c": {"d": {"e": "f"}}}}}}},
    ],
)
def test_files_of_a_sample_read_back_as_it_and_what_is_new(texts, tmp_path):
    files = {f"a.{name}": (json.dumps(text) if name == "json" else text).encode() for name, text in texts.items()}
    write_tar(tmp_path / "old.tar", {"a.png": encode(numbered_image(1))} | files)
    [(captions, metadata, image)] = samples_of(TarShards(tmp_path / "old.tar")).values()
    sample = Sample("a", captions, metadata, None)
    written = sample_files(sample, image, {"synthetic": "a new caption", "aesthetic": 5.25})
    write_tar(tmp_path / "new.tar", {f"000.{name}": content for name, content in written.items()})
    [(again, new_metadata, new_image)] = samples_of(TarShards(tmp_path / "new.tar")).values()
    captions.pop("aesthetic", None)
    assert again == captions | {"synthetic": "a new caption"} and new_image == image
    assert new_metadata["aesthetic"] == 5.25 and new_metadata["key"] == "a"


def test_texts_that_a_tar_cannot_hold_are_not_written():
    image = encode(numbered_image(1))
    with pytest.raises(Unusable, match="texts that a tar can't hold"):  # it would be read as the number of a class
        sample_files(Sample("a", {"class": "7"}, {}, None), image, {})
    with pytest.raises(Unusable, match="texts that a tar can't hold"):
        sample_files(Sample("a", {"x": "w" * 700_000, "y": "w" * 700_000}, {}, None), image, {})


def test_an_image_that_the_model_fails_on_is_left_out_alone(stored, llava, tmp_path, monkeypatch):
    class Picky(write.Captioner):
        def __call__(self, images):
            if any((image == numbered_image(6)).all() for image in images if image.shape == (40, 40, 3)):
                raise UserError("the model's processor fails")
            return super().__call__(images)

    monkeypatch.setattr(write, "Captioner", Picky)
    out = epath.Path(tmp_path / "new")
    recaption(config_of(stored["tar"]), request_of(llava), out, (0, 1))
    assert statistics_of(out)["the model fails on the image"] == 1 and statistics_of(out)["written"] == COUNT - 1
    assert 6 not in {metadata["score"] for _, metadata, _ in samples_of(TarShards(out)).values()}


def test_what_a_model_ends_itself_is_kept_and_what_is_cut_off_ends_with_a_sentence(llava, monkeypatch):
    captioner = Captioner(llava, QUESTION, 8)
    tokenizer = captioner._processor.tokenizer
    captioner._network.generation_config.eos_token_id = tokenizer.eos_token_id
    ended, cut_off = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A dog. It", "A cat. It"))
    length = max(len(ended), len(cut_off)) + 1
    rows = [ended + (length - len(ended)) * [tokenizer.eos_token_id], cut_off + (length - len(cut_off)) * cut_off[-1:]]
    answers = torch.tensor(rows)
    monkeypatch.setattr(captioner._network, "generate", lambda input_ids, **_: torch.cat([input_ids, answers], dim=1))
    first, second = captioner([numbered_image(0), numbered_image(1)])
    assert first == ("A dog. It", True)
    assert second == ("A cat.", False)


def test_a_batch_that_does_not_fit_into_memory_stops_the_run(stored, llava, clip, head, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "generate", fail)
    with pytest.raises(OutOfMemory, match="give a smaller --batch"):
        recaption(config_of(stored["tar"]), request_of(llava), epath.Path(tmp_path / "new"), (0, 1))
    scorer = AestheticScorer(clip, head)
    monkeypatch.setattr(scorer, "_network", fail)
    with pytest.raises(OutOfMemory, match="--clip=.* give a smaller --batch"):
        scorer([numbered_image(0)])


def test_a_template_that_writes_the_begin_token_gets_no_second_one(llava):
    processor = transformers.AutoProcessor.from_pretrained(llava)
    processor.tokenizer.add_special_tokens({"bos_token": "<bos>"})
    begin = ("<bos>", processor.tokenizer.bos_token_id)
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[begin])
    processor.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    content = [{"type": "image", "image": Image.fromarray(numbered_image(0))}, {"type": "text", "text": QUESTION}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    found = image_inputs(processor, [numbered_image(0)], QUESTION)["input_ids"][0].tolist()
    assert found == np.ravel(expected["input_ids"]).tolist()
    assert found.count(processor.tokenizer.bos_token_id) == 1


def test_an_extreme_aspect_is_left_out(llava, tmp_path):
    strip = encode(np.zeros((1, 40, 3), np.uint8))
    write_tar(tmp_path / "old.tar", {"a.png": strip, "b.png": encode(numbered_image(1))})
    config = config_of({"source": "tar", "path": str(tmp_path / "old.tar"), "resolution": 32})
    recaption(config, request_of(llava), epath.Path(tmp_path / "new"), (0, 1))
    assert statistics_of(epath.Path(tmp_path / "new"))["aspect over 32"] == 1


@pytest.mark.parametrize("shape", [(1, 30, 3), (3, 50, 3), (3, 3, 3), (50, 3, 3), (40, 40, 3)])
def test_scores_of_any_shape_are_those_of_pillows_images(shape, clip, head):
    image = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    scorer = AestheticScorer(clip, head)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
    pixels = image_processor()(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model(pixel_values=pixels).image_embeds[0].double().numpy()
    expected = features / np.linalg.norm(features) @ scorer._weight + scorer._bias
    assert scorer([image]) == pytest.approx([expected], abs=1e-5)


def test_two_requests_that_start_at_once_do_not_mix(stored, llava, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "SAMPLES_A_SHARD", 7)
    out, config = epath.Path(tmp_path / "new"), config_of(stored["tar"])

    class Slow(write.Captioner):
        def __init__(self, *arguments):
            monkeypatch.setattr(write, "Captioner", write.Captioner.__base__)
            recaption(config, request_of(llava, field="other"), out, (1, 2))
            super().__init__(*arguments)

    monkeypatch.setattr(write, "Captioner", Slow)
    with pytest.raises(UserError, match="was begun with field='other', now 'synthetic'"):
        recaption(config, request_of(llava), out, (0, 2))
    assert [file.name for file in out.glob("*.tar")] == ["000001.tar"]


def test_processes_that_start_at_once_claim_the_folder_together(tmp_path):
    for number in range(20):
        out = epath.Path(tmp_path / str(number))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(plans.claim, out, {"field": "a"}) for _ in range(8)]:
                done.result()
        assert [file.name for file in out.iterdir()] == [plans.PLAN]


def test_a_shard_that_another_process_writes_is_left_to_it(stored, llava, tmp_path):
    out = epath.Path(tmp_path / "new")
    with lock(out / ".000000.tar.lock", "the shard"):
        plan_folder = tmp_path / "plan"
        recaption(config_of(stored["tar"]), request_of(llava), epath.Path(plan_folder), (0, 1))
        shutil.copy(plan_folder / plans.PLAN, out / plans.PLAN)
        with pytest.raises(UserError, match="000000.tar is in use by"):
            recaption(config_of(stored["tar"]), request_of(llava), out, (0, 1))
    assert not (out / "000000.tar").exists()


@pytest.mark.parametrize("content", ["", '{"wri', "[1]", None])
def test_damaged_files_of_the_folder_are_named_in_one_line(content, stored, llava, tmp_path):
    out, config = epath.Path(tmp_path / "new"), config_of(stored["tar"])
    recaption(config, request_of(llava), out, (0, 1))
    for name in (plans.PLAN, "000000_stats.json"):
        file, before = out / name, (out / name).read_text()
        file.unlink()
        if content is None:
            file.mkdir()
        else:
            file.write_text(content)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            recaption(config, request_of(llava), out, (0, 1))
        shutil.rmtree(file) if content is None else file.unlink()
        file.write_text(before)


def test_a_changed_processor_is_another_request(stored, llava, tmp_path):
    model, out = tmp_path / "model", epath.Path(tmp_path / "new")
    shutil.copytree(llava, model)
    recaption(config_of(stored["tar"]), request_of(str(model)), out, (0, 1))
    [file] = [file for file in (model / "processor_config.json", model / "preprocessor_config.json") if file.exists()]
    file.write_text(file.read_text().replace("0.4", "0.5"))
    with pytest.raises(UserError, match="was begun with weights="):
        recaption(config_of(stored["tar"]), request_of(str(model)), out, (0, 1))


def test_the_new_folder_is_not_part_of_a_folder_of_images(stored, llava):
    path = stored["jsonl"].path
    with pytest.raises(UserError, match="is inside data.path"):
        recaption(config_of(stored["jsonl"]), request_of(llava), epath.Path(path) / "new", (0, 1))


def test_a_field_is_not_the_key_of_the_scores(stored, clip, head, tmp_path):
    request = request_of("MODEL", clip=clip, aesthetic_head=head, field="aesthetic")
    with pytest.raises(UserError, match="is data.aesthetic_key"):
        recaption(config_of(stored["tar"]), request, epath.Path(tmp_path / "new"), (0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": None}, "give --weights=MODEL for captions"),
        ({"clip": "CLIP"}, "need both --clip=MODEL and --aesthetic_head"),
        ({"field": "a/b"}, "letters, digits and underscores"),
        ({"question": " "}, "--question is empty"),
        ({"weights": ""}, "--weights is empty"),
        ({"clip": "CLIP", "aesthetic_head": ""}, "--aesthetic_head is empty"),
        ({"field": "url"}, "has another meaning"),
        ({"field": "class"}, "has another meaning"),
    ],
)
def test_a_request_that_makes_no_sense_is_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        request_of(**{"weights": "MODEL"} | changes)


@pytest.mark.parametrize("part", ["1/1", "8", "-1/2", "0/0", "1/2/3", "0x1/2"])
def test_a_wrong_part_is_rejected(part):
    assert parse_part("3/4") == (3, 4)
    with pytest.raises(UserError, match="must be NUMBER/COUNT"):
        parse_part(part)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "shapes", "resolution": 32}, "has no stored images"),
        ({"source": "precomputed", "path": "p", "resolution": 32}, "has no stored images"),
        ({"source": "tar", "resolution": 32, "mixture": {"a": {"path": "p"}}}, "write each by itself"),
        (None, "config key data is missing"),
    ],
)
def test_data_without_stored_images_are_rejected(data, message, tmp_path):
    config = ConfigDict({"data": data} if data else {})
    with pytest.raises(UserError, match=message):
        recaption(config, request_of("MODEL"), epath.Path(tmp_path / "new"), (0, 1))


def test_a_model_that_does_not_fit_is_rejected_before_the_folder_is_claimed(stored, llava, clip, tmp_path):
    out, config = epath.Path(tmp_path / "new"), config_of(stored["tar"])
    language = save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), tmp_path / "llm", CHAT_TEMPLATE)
    small = tmp_path / "small"
    shutil.copytree(llava, small)
    text = json.loads((small / "config.json").read_text())["text_config"]
    change_config(small, text_config=text | {"max_position_embeddings": 16})
    save_file({"weight": torch.ones(1, 5)}, tmp_path / "head.safetensors")
    (tmp_path / "head.bin").write_bytes(b"no safetensors")
    requests = {
        "takes no images": request_of(language),
        "reads at most 16 tokens": request_of(str(small)),
        "no such folder": request_of(str(tmp_path / "missing")),
        "takes 5 features": request_of(clip=clip, aesthetic_head=str(tmp_path / "head.safetensors")),
        "is not a readable safetensors file": request_of(clip=clip, aesthetic_head=str(tmp_path / "head.bin")),
    }
    for message, request in requests.items():
        with pytest.raises(UserError, match=message):
            recaption(config, request, out, (0, 1))
        assert not out.exists()


def test_a_folder_of_another_request_is_left_alone(stored, llava, tmp_path):
    out = epath.Path(tmp_path / "new")
    recaption(config_of(stored["tar"]), request_of(llava), out, (0, 1))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for changes in ({"question": "What is it?"}, {"field": "other"}, {"max_tokens": 7}):
        with pytest.raises(UserError, match=f"was begun with {next(iter(changes))}="):
            recaption(config_of(stored["tar"]), request_of(llava, **changes), out, (0, 1))
    with pytest.raises(UserError, match="was begun with data="):
        recaption(config_of(stored["jsonl"]), request_of(llava), out, (0, 1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        recaption(config_of(stored["tar"]), request_of(llava), epath.Path(tmp_path / "other"), (0, 1))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_command_writes_shards_and_says_how_to_train_on_them(stored, llava, tmp_path):
    command = [sys.executable, "-m", "lidit_jax.recaption", "--config=configs/emoji.py", "--max_tokens=4"]
    command += [f"--config.data.path={stored['tar'].path}", f"--weights={llava}", f"--out={tmp_path / 'new'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "14 images" in done.stderr and "--config.data.captions.synthetic=1" in done.stderr
