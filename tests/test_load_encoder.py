"""Tests loading prompt encoders from folders in Hugging Face's format: every model type, local and remote."""

import json
import logging
import re
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import change_config
from etils import epath
from etils.epath import backend
from flax import linen as nn
from jax import numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.models.t5 import T5Encoder
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.text.encoders import LLMTextEncoder, T5TextEncoder, encode, encode_batch, tokenize, truncated_prompts
from lidit_jax.text.load_encoder import load_encoder, open_encoder
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.weights import folders, loading
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.huggingface_llm import save_llm

TOKENIZER = train_tokenizer(["a red circle above a blue square", "Describe the objects:"], 300)
PROMPTS = ["a red circle", "", "红色", "a blue square above a red circle"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
CONFIG = LLMConfig(vocab_size=300, **SIZES, num_key_value_heads=2, max_position_embeddings=64, dtype="float32")


def prompts_of(tokenizer):
    return PromptTokenizer(tokenizer, 16, "Describe the objects:")


def load(folder, **options):
    return load_encoder(str(folder), prompts_of, dtype="float32", **options)


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    params = jax.jit(CausalLM(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    save_llm(folder, CONFIG, nn.meta.unbox(params), TOKENIZER)
    return folder


def test_a_tokenizer_is_found_next_to_the_weights_of_a_diffusers_pipeline(llm_folder, tmp_path):
    for number, name in ((1, "text_encoder"), (2, "text_encoder_2")):
        weights, tokenizer = tmp_path / name, tmp_path / name.replace("text_encoder", "tokenizer")
        shutil.copytree(llm_folder, weights)
        tokenizer.mkdir()
        for file in weights.glob("*token*"):
            shutil.move(file, tokenizer / file.name)
        if number == 2:
            train_tokenizer(["other"], 270).save_pretrained(tokenizer)
    expected = load(llm_folder)[0].tokenizer(PROMPTS)
    found = [load(tmp_path / name)[0].tokenizer(PROMPTS) for name in ("text_encoder", "text_encoder_2")]
    np.testing.assert_array_equal(found[0]["tokens"], expected["tokens"])
    assert (found[1]["tokens"] != expected["tokens"]).any()
    shutil.rmtree(tmp_path / "tokenizer_2")
    with pytest.raises(UserError, match=r"text_encoder_2: no tokenizer\.json in this folder"):
        load(tmp_path / "text_encoder_2")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A local folder that is also served as gs://bucket."""
    root = tmp_path / "bucket"
    root.mkdir()

    class Bucket:
        def __getattr__(self, function):
            def call(path, *arguments, **options):
                local = str(path).replace("gs://bucket", str(root))
                result = getattr(backend.os_backend, function)(local, *arguments, **options)
                if function == "glob":
                    result = [file.replace(str(root), "gs://bucket") for file in result]
                return result

            return call

    monkeypatch.setattr(backend, "tf_backend", Bucket())
    return root


def test_the_encoder_class_follows_from_the_folder(llm_folder, t5_folder):
    assert isinstance(load(llm_folder)[0], LLMTextEncoder)
    assert isinstance(load(t5_folder)[0], T5TextEncoder)


def test_a_t5_computes_the_instruction_with_each_prompt(t5_folder):
    encoder, frozen = load(t5_folder)
    batch = tokenize({"t5": encoder}, PROMPTS)
    [features] = jax.jit(lambda f, b: encode({"t5": encoder}, {"t5": f}, b))(frozen, batch)

    prefix = np.broadcast_to(encoder.tokenizer.prefix(), (len(PROMPTS), len(encoder.tokenizer.prefix())))
    tokens = np.concatenate([prefix, batch["t5/tokens"]], axis=1)
    mask = np.concatenate([np.ones(prefix.shape, bool), batch["t5/mask"]], axis=1)
    reference = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        expected = reference(
            input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
    got = np.concatenate([features.prefix, features.prompt], axis=1)
    np.testing.assert_allclose(got[mask], expected[mask], rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(features.mask, batch["t5/mask"])
    assert features.prefix_length == prefix.shape[1]
    assert np.abs(features.prefix[0] - features.prefix[3]).max() > 1e-3  # T5 is bidirectional


def test_features_are_the_same_in_the_step_and_ahead_of_it(llm_folder, t5_folder):
    encoders, frozen = {}, {}
    for name, folder in (("llm", llm_folder), ("t5", t5_folder)):
        encoders[name], frozen[name] = load(folder)
    batch = tokenize(encoders, PROMPTS)
    ahead = jax.jit(lambda f, b: encode_batch(encoders, f, b))(frozen, batch)
    assert not any(key.endswith("/tokens") for key in ahead)
    inside, after = (jax.jit(lambda f, b: encode(encoders, f, b))(frozen, b) for b in (batch, ahead))
    for one, other in zip(jax.tree.leaves(inside), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("kind", ["llm_folder", "t5_folder"])
def test_an_encoder_sharded_over_a_mesh_has_the_features_of_one_device(kind, request):
    folder = request.getfixturevalue(kind)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    encoder, alone = load(folder)
    _, cut = load(folder, mesh=mesh, rules=ShardingRules())
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(cut.params))
    batch = tokenize({"it": encoder}, PROMPTS)
    apply = jax.jit(lambda f, b: encode({"it": encoder}, {"it": f}, b))
    with jax.set_mesh(mesh):
        got = apply(cut, batch)
    for one, other in zip(jax.tree.leaves(apply(alone, batch)), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-6 * np.abs(one).max())


def test_truncated_prompts_are_counted(llm_folder):
    encoder, _ = load(llm_folder)
    assert truncated_prompts({"llm": encoder}, ["a red circle", "circle " * 40, "x" * 40]) == {"llm": 2}


@pytest.mark.parametrize("kind", ["llm_folder", "t5_folder"])
def test_an_encoder_loads_from_a_bucket_as_from_disk(kind, request, bucket):
    folder = request.getfixturevalue(kind)
    shutil.copytree(folder, bucket / "weights")
    expected_encoder, expected = load(folder)
    encoder, frozen = load("gs://bucket/weights")
    np.testing.assert_array_equal(encoder.tokenizer.prefix(), expected_encoder.tokenizer.prefix())
    jax.tree.map(np.testing.assert_array_equal, frozen, expected)
    assert folder_digest("gs://bucket/weights") == folder_digest(folder)


def test_a_bucket_that_cannot_be_reached_ends_in_one_line(monkeypatch):
    class Unreachable:
        def exists(self, path):
            raise RuntimeError("no route\nto host")

    monkeypatch.setattr(backend, "tf_backend", Unreachable())
    with pytest.raises(UserError, match=r"gs://bucket/x cannot be reached \(RuntimeError: no route to host\)"):
        load("gs://bucket/x")


def test_a_name_of_the_hub_is_downloaded_without_its_pickles(llm_folder, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(llm_folder)

    monkeypatch.setattr(folders, "snapshot_download", snapshot_download)
    encoder, _ = load("someone/tiny-llm")
    assert encoder.hidden_size == 16
    assert asked["name"] == "someone/tiny-llm"
    files = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.safetensors"]
    files += ["original/consolidated.00.pth", "onnx/model.safetensors", "tokenizer.json", "config.json", "model.pt"]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(wanted) == {"model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "config.json"}


def test_a_name_that_is_neither_here_nor_on_the_hub_ends_in_one_line(monkeypatch):
    def snapshot_download(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot\nreach it")

    monkeypatch.setattr(folders, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="someone/llm: no such folder, and it cannot be downloaded") as error:
        load("someone/llm")
    assert "\n" not in str(error.value)


def test_paths_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "snapshot_download", lambda *a, **o: pytest.fail("asked the hub"))
    for name in (str(tmp_path / "missing"), "../missing", "./a/b/c"):
        with pytest.raises(UserError, match=r"config\.json is missing"):
            load(name)


def copy_with(folder: Path, target: Path, **changes) -> Path:
    shutil.copytree(folder, target)
    if changes:
        change_config(target, **changes)
    return target


def test_prompts_longer_than_the_llms_context_are_rejected_before_its_weights_are_read(llm_folder, tmp_path):
    folder = copy_with(llm_folder, tmp_path / "short", max_position_embeddings=12)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"short: .*tokens, more than the LLM's context of 12: lower text\.max_length"):
        open_encoder(str(folder), prompts_of, dtype="float32")


def test_a_tokenizer_of_another_model_is_rejected_before_its_weights_are_read(llm_folder, tmp_path):
    folder = copy_with(llm_folder, tmp_path / "other", vocab_size=200)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"other: the tokenizer has token ids up to \d+, the model has 200 embeddings"):
        open_encoder(str(folder), prompts_of, dtype="float32")


def test_models_that_are_not_supported_are_rejected_with_a_list_of_those_that_are(llm_folder, tmp_path):
    folder = copy_with(llm_folder, tmp_path / "gpt2", model_type="gpt2")
    with pytest.raises(UserError, match=r"model_type 'gpt2' is not supported; use one of llama.*gemma2.*t5"):
        open_encoder(str(folder), prompts_of, dtype="float32")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda v: v["model"].update(continuing_subword_prefix="##")),  # panics in use
        ("tokenizer_config.json", lambda v: v.update(model_max_length="")),
    ],
)
def test_a_tokenizer_whose_damage_shows_only_in_use_is_rejected(llm_folder, tmp_path, name, change):
    folder = copy_with(llm_folder, tmp_path / "damaged")
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match="damaged/tokenizer.json: not a valid tokenizer"):
        open_encoder(str(folder), prompts_of, dtype="float32")


def test_a_tokenizer_without_an_end_token_is_rejected_by_its_folders_name(llm_folder, tmp_path):
    folder = copy_with(llm_folder, tmp_path / "endless")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"endless: the tokenizer has no end token"):
        open_encoder(str(folder), prompts_of, dtype="float32")


def test_slow_loading_logs_its_progress(llm_folder, monkeypatch, caplog):
    monkeypatch.setattr(loading, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(logging.getLogger("lidit_jax"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="lidit_jax"):
        load(llm_folder)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) > 10
    assert re.fullmatch(rf"loading {llm_folder}: 0\.0 of 0\.0 GB  eta 0m00s", lines[-1])


def test_a_chat_template_in_a_separate_file_is_read(llm_folder, tmp_path):
    folder = copy_with(llm_folder, tmp_path / "llava")
    template = "{% for m in messages %}USER: {{ m.content }}{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    encoder = open_encoder(str(folder), prompts_of, dtype="float32")
    assert encoder.tokenizer.tokenizer.decode(encoder.tokenizer.prefix()).replace(" ", "").startswith("USER:Describe")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"])
def test_the_digest_covers_all_that_features_depend_on(llm_folder, tmp_path, name):
    folder = copy_with(llm_folder, tmp_path / "same")
    (folder / "README.md").write_text("of no account")
    assert folder_digest(folder) == folder_digest(llm_folder)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert folder_digest(folder) != folder_digest(llm_folder)


def test_a_folder_may_be_a_path_object(llm_folder):
    assert load_encoder(epath.Path(llm_folder), prompts_of, dtype="float32")[0].hidden_size == 16


def test_a_t5_without_instruction_has_an_empty_prefix(t5_folder):
    encoder, frozen = load_encoder(t5_folder, lambda t: PromptTokenizer(t, 8, instruction=""), dtype="float32")
    batch = tokenize({"t5": encoder}, ["a red circle"])
    [features] = encode({"t5": encoder}, {"t5": frozen}, batch)
    assert features.prefix.shape == (1, 0, 16)
    expected = T5Encoder(encoder.config).apply({"params": frozen.params}, batch["t5/tokens"], batch["t5/mask"])
    np.testing.assert_array_equal(features.prompt, expected)
