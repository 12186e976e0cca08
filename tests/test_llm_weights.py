"""Loading LLM folders: published configs, sharded placement, which files are read, and which are rejected."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import DELETED, change_config
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from llm_models import CONFIG, LLAMA, OURS, VOCAB_SIZE, assert_close, features, random_params, random_tokens, reference
from safetensors.numpy import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaModel,
)

from lidit_jax.errors import UserError
from lidit_jax.models.rotary import RopeScaling
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.weights.huggingface_config import llm_config
from lidit_jax.weights.huggingface_llm import load_llm_encoder, save_llm
from lidit_jax.weights.safetensors_file import SafetensorsFile

LLAVA_PREFIXES = {
    "transformers 4.40": ("language_model.model.", "language_model.lm_head."),
    "transformers 4.52": ("model.language_model.", "lm_head."),
    "a base model": ("language_model.", None),
    "LLaVA's own": ("model.", "lm_head."),
}


@pytest.mark.parametrize("layout", LLAVA_PREFIXES)
@pytest.mark.parametrize("name", ["llama_gqa", "qwen_mha", "gemma3", "mistral_sliding"])
def test_the_language_model_inside_a_llava_is_read_from_every_layout(layout, name, tmp_path):
    reference(name).save_pretrained(tmp_path / "alone")
    expected_config, expected = load_llm_encoder(tmp_path / "alone")
    model_prefix, head_prefix = LLAVA_PREFIXES[layout]
    tensors = {"vision_tower.layers.0.self_attn.q_proj.weight": np.ones((2, 2), np.float32)}
    for key, value in load_file(tmp_path / "alone/model.safetensors").items():
        if key.startswith("lm_head."):
            if head_prefix:
                tensors[key.replace("lm_head.", head_prefix)] = value
        else:
            tensors[key.replace("model.", model_prefix, 1)] = value
    (tmp_path / "llava").mkdir()
    save_file(tensors, tmp_path / "llava/model.safetensors")
    values = json.loads((tmp_path / "alone/config.json").read_text())
    if layout == "LLaVA's own":
        own_types = {"llama": "llava_llama", "qwen2": "llava_qwen", "mistral": "llava_mistral"}
        values["model_type"] = own_types.get(values["model_type"], values["model_type"])
    else:
        values = {"model_type": "llava_next", "text_config": values, "vision_config": {"hidden_size": 2}}
    (tmp_path / "llava/config.json").write_text(json.dumps(values))
    config, params = load_llm_encoder(tmp_path / "llava")
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_text_config_without_sizes_has_those_of_llama_7b():
    # From the config.json of llava-hf/llava-1.5-7b-hf.
    inner = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
    config = llm_config({"model_type": "llava", "text_config": inner}, "config.json", dtype="bfloat16")
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (4096, 32, 11008)
    assert (config.vocab_size, config.rms_norm_eps, config.num_key_value_heads) == (32064, 1e-05, 32)


PUBLISHED = {  # keys that determine the model, from the published config.json
    "Meta-Llama-3.1-8B": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "vocab_size": 128256,
        },
        {"rope_theta": 500_000.0, "rope_scaling": RopeScaling("llama3", 8.0, 8192, 1.0, 4.0), "sliding_layers": ()},
    ),
    "Qwen1.5-7B": (
        {
            "model_type": "qwen2",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"attention_bias": True, "attention_output_bias": False, "rope_theta": 1e6, "sliding_layers": ()},
    ),
    "gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        {
            "head_dim": 256,
            "num_key_value_heads": 4,
            "rope_theta": 1e6,
            "local_rope_theta": 1e4,
            "rope_scaling": RopeScaling("linear", 8.0),
            "sliding_window": 1024,
            "sliding_layers": tuple(block % 6 != 5 for block in range(34)),
            "attention_scale": 256**-0.5,
            "attention_softcap": 0.0,
            "embedding_scale": 2560**0.5,
        },
    ),
    "Phi-3-mini-4k-instruct": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        {"head_dim": 96, "attention_bias": False, "sliding_window": 2047, "sliding_layers": (True,) * 32},
    ),
    "gemma-2b": (
        {
            "model_type": "gemma",
            "hidden_act": "gelu",
            "head_dim": 256,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
        {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1, "head_dim": 256, "sandwich_norm": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    values, expected = PUBLISHED[name]
    config = llm_config(values, "config.json", dtype="bfloat16")
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2", "phi3"])
def test_parameters_are_sharded_over_the_mesh_and_equal_those_of_one_device(name, tmp_path):
    reference(name).save_pretrained(tmp_path)
    expected = load_llm_encoder(tmp_path)[1]
    mesh = Mesh(np.array(jax.devices()).reshape(1, 4, 2), ("data", "fsdp", "tensor"))
    config, params = load_llm_encoder(tmp_path, mesh=mesh, rules=ShardingRules())
    assert params["layers"]["q_proj"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert params["layers"]["down_proj"]["kernel"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert params["embed_tokens"].sharding.spec == PartitionSpec("tensor", "fsdp")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    tokens = random_tokens(2, 6)
    encoder = config.as_encoder()
    assert_close(features(encoder, params, tokens), features(encoder, expected, tokens))


@pytest.fixture
def sharded(tmp_path):
    """Folder with one or two tensors per shard, and its weight map."""
    reference("llama_gqa").save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    return tmp_path / "sharded", index["weight_map"]


def is_needed(name):
    return name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1.", "model.layers.2."))


def test_shards_after_the_third_to_last_block_are_never_opened(sharded, tmp_path):
    folder, weight_map = sharded
    reference("llama_gqa").save_pretrained(tmp_path / "whole")
    needed = {shard for name, shard in weight_map.items() if is_needed(name)}
    unneeded = set(weight_map.values()) - needed
    assert len(unneeded) > 5
    for shard in unneeded:
        (folder / shard).unlink()
    jax.tree.map(np.testing.assert_array_equal, load_llm_encoder(folder)[1], load_llm_encoder(tmp_path / "whole")[1])


def test_a_missing_shard_is_named(sharded):
    folder, weight_map = sharded
    shard = weight_map["model.layers.2.mlp.up_proj.weight"]
    (folder / shard).unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        load_llm_encoder(folder)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/tmp/x.safetensors", "model.bin", 3, None])
def test_an_index_that_leads_out_of_its_folder_or_to_another_kind_of_file_is_rejected(sharded, shard):
    folder, weight_map = sharded
    index = {"weight_map": {**weight_map, "model.embed_tokens.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not the name of a safetensors file"):
        load_llm_encoder(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "\x00", "[" * 100_000])
def test_a_damaged_index_is_named(sharded, text):
    (sharded[0] / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        load_llm_encoder(sharded[0])


@pytest.fixture
def folder(tmp_path):
    save_llm(tmp_path / "llm", CONFIG, random_params(CONFIG))
    return tmp_path / "llm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; use one of llama, mistral, qwen2, "),
        ({"model_type": DELETED}, "model_type None is not supported"),
        ({"model_type": ["qwen2"]}, "model_type"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647 is not an integer from 1 to 1000"),
        ({"head_dim": 2**31 - 2}, "head_dim=2147483646 must be from 0 to 65536"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_theta": 1.0}, "rope_theta=1.0 must be above 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}}, "rope_parameters"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported: use one of relu, silu, gelu"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 4 + ["chunked_attention"]}, "'chunked_attention' is not supported"),
        ({"layer_types": 3}, "layer_types"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window=0"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "config.json"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "factor=-1.0 is not a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' is not a positive number"),
        ({"rope_parameters": {"rope_type": "mine"}}, "rope_type 'mine' is not supported: use one of default, linear"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": DELETED}, "hidden_size is missing"),
        ({"hidden_size": 33, "head_dim": None}, "hidden_size=33 is not divisible by num_attention_heads=4"),
        ({"hidden_size": 32.0}, "transformers rejects it .*'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ({"head_dim": 7}, "even rotary dimension"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"intermediate_size": "48"}, "'intermediate_size' expected int"),
        ({"num_hidden_layers": 2}, "needs at least 3 blocks"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": 10**400}, "rope_theta=1"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta='1e4'"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' expected bool"),
        ({"vocab_size": VOCAB_SIZE + 1}, r"embed_tokens.weight has shape \(64, 32\), config.json requires \(65, 32\)"),
        ({"intermediate_size": 2**31 - 1}, "intermediate_size=2147483647 must be at most 1048576"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647 is not an integer from 1 to 1000"),
        ({"num_hidden_layers": 1000}, "layer_types|num_hidden_layers|is missing"),
        ({"model_type": "llama"}, r"k_proj\.bias' is not part of the model that config.json describes"),
    ],
)
def test_an_unsupported_config_is_rejected_in_one_line_that_names_the_key(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_llm_encoder(folder)
    assert "\n" not in str(error.value)


def test_a_config_as_transformers_4_and_older_wrote_it_is_read(folder):
    config = load_llm_encoder(folder)[0]
    assert config.rope_theta == CONFIG.rope_theta
    change_config(folder, rope_theta=10_000, rope_scaling=None, head_dim=DELETED, tie_word_embeddings=DELETED)
    assert load_llm_encoder(folder)[0] == dataclasses.replace(CONFIG, rope_theta=10_000.0)


def test_absent_keys_have_transformers_defaults(tmp_path):
    config = dataclasses.replace(OURS, num_key_value_heads=4, rope_theta=10_000.0, rms_norm_eps=1e-6)
    save_llm(tmp_path / "llm", config, random_params(config))
    optional = ("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
    change_config(tmp_path / "llm", **dict.fromkeys(optional, DELETED))
    assert load_llm_encoder(tmp_path / "llm")[0] == config


@pytest.mark.parametrize("text", [None, "", "[]", "{", "\x00", "3"])
def test_a_missing_or_damaged_config_is_named(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_llm_encoder(folder)


def test_a_config_of_gigabytes_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(UserError, match=r"config\.json is not a readable JSON file \(it has 5120 MiB, more than 64\)"):
        load_llm_encoder(folder)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        load_llm_encoder(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": np.zeros((32, 48))}))
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \(32, 48\), config\.json requires \(48, 32\)"):
        load_llm_encoder(folder)


@pytest.fixture
def phi3(tmp_path):
    reference("phi3").save_pretrained(tmp_path / "phi3")
    return tmp_path / "phi3"


def test_a_fused_tensor_of_another_shape_is_named(phi3):
    name = "model.layers.1.self_attn.qkv_proj.weight"
    change_tensors(phi3, lambda tensors: tensors.update({name: np.zeros((48, 32), np.float32)}))
    with pytest.raises(UserError, match=r"qkv_proj\.weight has shape \(48, 32\), config\.json requires \(64, 32\)"):
        load_llm_encoder(phi3)


def test_a_fused_tensor_that_is_missing_is_named(phi3):
    change_tensors(phi3, lambda tensors: tensors.pop("model.layers.0.mlp.gate_up_proj.weight"))
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.mlp\.gate_up_proj\.weight is missing"):
        load_llm_encoder(phi3)


@pytest.mark.parametrize("row", [0, 40, 63])  # of query, key and value
def test_a_fused_tensor_that_is_not_finite_is_named(phi3, row):
    name = "model.layers.2.self_attn.qkv_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][row, 2] = np.nan

    change_tensors(phi3, change)
    with pytest.raises(UserError, match=f"tensor {name} has values that are not finite"):
        load_llm_encoder(phi3)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"partial_rotary_factor": 0.75},
            "partial_rotary_factor=0.75 is not supported: use a model that rotates",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 8.0},
            "rope_type 'longrope' is not supported: use one of default, linear",
        ),
    ],
)
def test_phi3_with_other_rotary_positions_is_rejected(phi3, rope, message):
    change_config(phi3, rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"} | rope)
    with pytest.raises(UserError, match=message):
        load_llm_encoder(phi3)


def test_integer_weights_are_rejected(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros((48, 32), np.int8)}))
    with pytest.raises(UserError, match=r"up_proj\.weight has type I8"):
        load_llm_encoder(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_weights_that_are_not_finite_are_rejected(folder, name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][1, 2] = value

    change_tensors(folder, change)
    with pytest.raises(UserError, match=f"tensor {name} has values that are not finite"):
        load_llm_encoder(folder)


def test_an_unused_tensor_is_rejected_unless_the_config_determines_it(folder):
    extra = np.ones(8, np.float32)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": extra}))
    load_llm_encoder(folder)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": extra}))
    with pytest.raises(UserError, match=r"q_norm\.weight' is not part of"):
        load_llm_encoder(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is not a readable safetensors file"):
        load_llm_encoder(folder)


@settings(max_examples=100)
@given(position=st.integers(0, 600), value=st.binary(min_size=1, max_size=4))
def test_a_damaged_header_loads_or_ends_in_a_user_error(tmp_path_factory, position, value):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        save_llm(folder, CONFIG, random_params(CONFIG))
        (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
    data = bytearray((folder / "whole").read_bytes())
    data[position : position + len(value)] = value
    (folder / "model.safetensors").write_bytes(data)
    try:
        load_llm_encoder(folder)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_not_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=f"{name} is a pickle"):
        load_llm_encoder(folder)


def test_a_folder_without_weights_is_rejected(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        load_llm_encoder(folder)


def test_a_folder_that_is_not_empty_is_left_unchanged(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="not an empty folder"):
        save_llm(folder, CONFIG, random_params(CONFIG, seed=1))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["llm"]


def test_a_tokenizer_that_fails_to_save_leaves_nothing_behind(tmp_path):
    class Broken:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        save_llm(tmp_path / "llm", CONFIG, random_params(CONFIG), Broken())
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_config_are_not_saved(tmp_path):
    params = random_params(CONFIG)
    for config, message in [
        (dataclasses.replace(CONFIG, attention_bias=False), r"have model/layers/k_proj/bias"),
        (dataclasses.replace(CONFIG, tie_word_embeddings=True), r"have lm_head/kernel"),
        (dataclasses.replace(CONFIG, num_hidden_layers=4), r"has shape \(5, "),
    ]:
        with pytest.raises(UserError, match=message):
            save_llm(tmp_path / "llm", config, params)
    with pytest.raises(UserError, match="lack norm/weight"):
        save_llm(tmp_path / "llm", CONFIG, {key: value for key, value in params.items() if key != "norm"})
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_third_to_last_block_is_rejected():
    with pytest.raises(UserError, match="needs at least 3 blocks"):
        dataclasses.replace(OURS, num_hidden_layers=2).as_encoder()
    assert dataclasses.replace(OURS, num_hidden_layers=3).as_encoder().num_hidden_layers == 1


LOADING = """
import json, re, sys
from pathlib import Path
import jax
from lidit_jax.weights.huggingface_llm import load_llm_encoder

def kib(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

jax.numpy.zeros(1).block_until_ready()
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = kib("VmRSS")
config, params = load_llm_encoder(sys.argv[1], dtype="float32")
jax.block_until_ready(params)
peak = kib("VmHWM") - before
print(json.dumps([peak << 10, sum(leaf.nbytes for leaf in jax.tree.leaves(params))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured with Linux's /proc")
def test_loading_two_gigabytes_takes_at_most_a_quarter_more_memory(tmp_path):
    """Measures a process of its own. On a CPU the loaded arrays lie in host memory too, so the peak includes both."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=16
    )
    with torch.device("meta"):
        tensors = LlamaModel(config).state_dict()
    config.save_pretrained(tmp_path)
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a sparse file: zeros that take no space on the disk
    done = subprocess.run([sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded > 1.9e9
    assert peak <= 1.25 * loaded, f"{peak / loaded:.2f} x the {loaded / 1e9:.2f} GB loaded"


def test_a_classifiers_labels_are_ignored(folder):
    change_config(folder, num_labels=2**31 - 1)  # transformers would build a name for each label
    assert load_llm_encoder(folder)[0] == CONFIG


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_sliding_window_keys_mean_what_they_mean_to_the_model(model_type):
    values = {
        **LLAMA,
        "num_key_value_heads": 4,
        "model_type": model_type,
        "sliding_window": 3,
        "layer_types": ["full_attention"] * 5,
    }
    config = llm_config(values, "config.json", dtype="float32")
    assert any(config.sliding_layers) == (model_type == "mistral")


def test_a_header_with_absurd_shapes_is_rejected_at_once(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [9] * 500_000, "data_offsets": [0, 0]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        SafetensorsFile(epath.Path(file))
