"""Compares the T5 encoder with transformers' T5 and mT5, and tests loading its weights and its error messages."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import DELETED, change_config
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from transformers import (
    MT5Config,
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers import T5Config as TransformersT5Config
from transformers.models.t5.modeling_t5 import T5Attention

from lidit_jax.errors import UserError
from lidit_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.weights.huggingface_t5 import load_t5_encoder

VOCAB_SIZE = 64
# 3 heads of size 8 differ from the width, as in mT5-small; sequences of 150 exceed the largest distance.
SIZES = {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 3}
SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
V1_1 = {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS = {
    "v1.0": (T5ForConditionalGeneration, TransformersT5Config, SIZES),
    "v1.0_encoder": (T5EncoderModel, TransformersT5Config, SIZES),
    "v1.0_gelu": (T5EncoderModel, TransformersT5Config, {**SIZES, "feed_forward_proj": "gelu"}),
    "v1.1": (T5ForConditionalGeneration, TransformersT5Config, V1_1),
    "v1.1_encoder": (T5EncoderModel, TransformersT5Config, {**V1_1, "layer_norm_epsilon": 1e-2}),
    "v1.1_silu": (T5EncoderModel, TransformersT5Config, {**V1_1, "feed_forward_proj": "gated-silu"}),
    "v1.1_published_buckets": (
        T5EncoderModel,
        TransformersT5Config,
        {**V1_1, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    ),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {**SIZES, "tie_word_embeddings": False}),
    "mt5_encoder": (MT5EncoderModel, MT5Config, SIZES),
}
Q_OF_BLOCK_1 = "encoder.block.1.layer.0.SelfAttention.q.weight"
TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def reference(name):
    """Returns transformers' model with random weights; norm weights too, whose initial ones would hide mistakes."""
    model_class, config_class, values = MODELS[name]
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**values), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 1.0 if "relative_attention_bias" in key else 0.2
            parameter.copy_((1.0 if "norm" in key else 0.0) + scale * torch.randn_like(parameter))
    return model


def encoder_output(model, tokens, mask):
    with torch.no_grad():
        output = model.get_encoder()(
            input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long)
        )
    return output.last_hidden_state.float().numpy()


@partial(jax.jit, static_argnums=0)
def encode(config, params, tokens, mask):
    return T5Encoder(config).apply({"params": params}, tokens, mask)


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape).astype(np.int32)


def right_padding(lengths, length):
    return np.arange(length) < np.array(lengths)[:, None]


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("length", [9, 150])
@pytest.mark.parametrize("name", MODELS)
def test_valid_tokens_match_transformers_with_right_padding(name, length, tmp_path):
    model = reference(name)
    model.save_pretrained(tmp_path)
    config, params = load_t5_encoder(tmp_path)
    tokens, mask = random_tokens(3, length), right_padding([length, (length + 1) // 2, 1], length)
    actual = encode(config, params, tokens, mask)
    assert actual.dtype == jnp.float32
    assert_close(actual[mask], encoder_output(model, tokens, mask)[mask])


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 128), (33, 128), (64, 256), (128, 1024), (32, 9)]
)
def test_every_distance_has_the_bucket_that_transformers_gives_it(num_buckets, max_distance):
    distances = np.arange(-3000, 3001)
    config = T5Config(
        **{**SIZES, "relative_attention_num_buckets": num_buckets, "relative_attention_max_distance": max_distance}
    )
    expected = T5Attention._relative_position_bucket(torch.tensor(distances), True, num_buckets, max_distance)
    np.testing.assert_array_equal(relative_buckets(distances, config), expected.numpy())


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "mt5"])
def test_bfloat16_is_as_close_to_float32_as_transformers_own(name, tmp_path):
    model = reference(name)
    model.save_pretrained(tmp_path)
    tokens, mask = random_tokens(4, 24), np.ones((4, 24), bool)
    exact = encoder_output(model, tokens, mask)
    theirs = encoder_output(model.to(torch.bfloat16), tokens, mask)
    config, params = load_t5_encoder(tmp_path, dtype="bfloat16")
    ours = encode(config, params, tokens, mask)
    assert ours.dtype == jnp.bfloat16
    error = np.square(np.asarray(ours, np.float32) - exact).mean()
    assert error <= np.square(theirs - exact).mean()


def test_weights_loaded_as_bfloat16_give_the_output_of_float32_weights_computed_in_bfloat16(folder):
    config, params = load_t5_encoder(folder, dtype="bfloat16")
    params32 = load_t5_encoder(folder)[1]
    assert params["layers"]["wo"]["kernel"].dtype == jnp.bfloat16
    assert params["final_layer_norm"]["weight"].dtype == jnp.float32
    tokens, mask = random_tokens(2, 6), right_padding([6, 3], 6)
    np.testing.assert_array_equal(encode(config, params, tokens, mask), encode(config, params32, tokens, mask))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Config and parameters of a T5 v1.1 encoder."""
    folder = tmp_path_factory.mktemp("t5")
    reference("v1.1_encoder").save_pretrained(folder)
    return load_t5_encoder(folder)


ROW = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=8, max_size=8)


@settings(max_examples=50)
@given(tokens=ROW, padding=ROW, length=st.integers(1, 8))
def test_no_valid_token_depends_on_the_content_of_the_padding(encoder, tokens, padding, length):
    rows = np.array([tokens, [*tokens[:length], *padding[length:]]], np.int32)
    actual = np.asarray(encode(*encoder, rows, right_padding([length, length], 8)))
    np.testing.assert_array_equal(actual[0, :length], actual[1, :length])


@settings(max_examples=25)
@given(tokens=ROW, length=st.sampled_from([1, 5, 8]))  # each length compiles
def test_padding_gives_the_output_of_a_shorter_sequence(encoder, tokens, length):
    row = np.array([tokens], np.int32)
    padded = encode(*encoder, row, right_padding([length], 8))
    alone = encode(*encoder, row[:, :length], np.ones((1, length), bool))
    assert_close(padded[:, :length], alone)


@settings(max_examples=25)
@given(rows=st.lists(ROW, min_size=4, max_size=4), lengths=st.lists(st.integers(1, 8), min_size=4, max_size=4))
def test_a_batch_has_the_output_of_its_rows_one_by_one(encoder, rows, lengths):
    rows, mask = np.array(rows, np.int32), right_padding(lengths, 8)
    batch = encode(*encoder, rows, mask)
    for i, length in enumerate(lengths):
        assert_close(batch[i, :length], encode(*encoder, rows[i : i + 1], mask[i : i + 1])[0, :length])


def test_keys_before_and_after_a_query_have_different_biases(encoder):
    config, params = encoder
    tokens, mask = random_tokens(1, 12), np.ones((1, 12), bool)
    table = np.asarray(params["relative_attention_bias"])
    swapped = {**params, "relative_attention_bias": np.roll(table, len(table) // 2, axis=0)}
    assert np.abs(encode(config, params, tokens, mask) - encode(config, swapped, tokens, mask)).max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_load_exactly(dtype, tmp_path):
    model = reference("v1.1").to(dtype)
    model.save_pretrained(tmp_path)
    params = load_t5_encoder(tmp_path)[1]
    for block in range(3):
        expected = model.encoder.block[block].layer[1].DenseReluDense.wo.weight.detach().float().numpy().T
        np.testing.assert_array_equal(params["layers"]["wo"]["kernel"][block], expected)


def test_an_encoder_checkpoint_loads_like_the_complete_model(tmp_path):
    model = reference("v1.0")
    model.save_pretrained(tmp_path / "whole")
    alone = T5EncoderModel.from_pretrained(tmp_path / "whole")
    alone.save_pretrained(tmp_path / "alone")
    whole, alone = load_t5_encoder(tmp_path / "whole"), load_t5_encoder(tmp_path / "alone")
    assert whole[0] == alone[0]
    jax.tree.map(np.testing.assert_array_equal, whole[1], alone[1])


def test_shards_of_the_decoder_are_never_opened(tmp_path):
    model = reference("mt5")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    weight_map = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in weight_map.items() if name.startswith(("encoder.", "shared."))}
    unneeded = set(weight_map.values()) - needed
    assert len(unneeded) > 5
    for shard in unneeded:
        (tmp_path / "sharded" / shard).unlink()
    sharded, whole = load_t5_encoder(tmp_path / "sharded")[1], load_t5_encoder(tmp_path / "whole")[1]
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)

    shard = weight_map[Q_OF_BLOCK_1]
    (tmp_path / "sharded" / shard).unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        load_t5_encoder(tmp_path / "sharded")


@pytest.mark.parametrize("mesh_sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_arrays_are_sharded_by_the_logical_axis_rules_on_a_mesh(folder, mesh_sizes):
    mesh = make_mesh(mesh_sizes)
    config, params = load_t5_encoder(folder, mesh=mesh, rules=ShardingRules())
    jax.tree.map(np.testing.assert_array_equal, params, load_t5_encoder(folder)[1])

    expected = {
        ("embed_tokens",): P("tensor", "fsdp"),
        ("relative_attention_bias",): P(None, None),
        ("final_layer_norm", "weight"): P(None),
        ("layers", "attention_norm", "weight"): P(None, None),
        ("layers", "q", "kernel"): P(None, "fsdp", "tensor"),
        ("layers", "o", "kernel"): P(None, "tensor", "fsdp"),
        ("layers", "wi_1", "kernel"): P(None, "fsdp", "tensor"),
        ("layers", "wo", "kernel"): P(None, "tensor", "fsdp"),
    }
    for path, spec in expected.items():
        array = params
        for key in path:
            array = array[key]
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), path

    tokens, mask = random_tokens(8, 9), np.ones((8, 9), bool)
    assert_close(encode(config, params, tokens, mask), encode(config, load_t5_encoder(folder)[1], tokens, mask))


@pytest.fixture
def folder(tmp_path):
    reference("v1.1").save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def change_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: value for name, value in tensors.items() if value is not DELETED}
    save_file(tensors, folder / "model.safetensors")


def test_the_embedding_may_have_either_of_its_names(folder):
    expected = load_t5_encoder(folder)[1]
    embedding = load_file(folder / "model.safetensors")["shared.weight"]
    change_tensors(folder, **{"encoder.embed_tokens.weight": embedding})
    jax.tree.map(np.testing.assert_array_equal, load_t5_encoder(folder)[1], expected)
    change_tensors(folder, **{"shared.weight": DELETED})
    jax.tree.map(np.testing.assert_array_equal, load_t5_encoder(folder)[1], expected)
    change_tensors(folder, **{"encoder.embed_tokens.weight": DELETED})
    with pytest.raises(UserError, match=r"tensor shared\.weight is missing"):
        load_t5_encoder(folder)


def test_an_encoder_embedding_that_differs_from_the_shared_one_is_used_as_transformers_does(folder):
    embedding = load_file(folder / "model.safetensors")["shared.weight"] + np.float32(0.5)
    change_tensors(folder, **{"encoder.embed_tokens.weight": embedding})
    model = T5EncoderModel.from_pretrained(folder, attn_implementation="eager")
    tokens, mask = random_tokens(2, 5), np.ones((2, 5), bool)
    assert_close(encode(*load_t5_encoder(folder), tokens, mask), encoder_output(model, tokens, mask))


def test_absent_keys_have_transformers_defaults(tmp_path):
    keys = ("feed_forward_proj", "relative_attention_max_distance", "layer_norm_epsilon")
    keys += ("dense_act_fn", "is_gated_act")  # older files lack these two
    for name, activation in (("v1.0", "relu"), ("mt5", "gelu_new")):
        reference(name).save_pretrained(tmp_path / name)
        change_config(tmp_path / name, **dict.fromkeys(keys, DELETED))
        config = load_t5_encoder(tmp_path / name)[0]
        assert (config.activation, config.gated) == (activation, name == "mt5")
        assert (config.relative_attention_max_distance, config.layer_norm_epsilon) == (128, 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "model_type 'umt5' is not supported; use one of t5, mt5"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"model_type": ["t5"]}, "model_type"),
        ({"model_type": DELETED}, "model_type None is not supported"),
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj='gated-relu' is not supported; use one of relu, gelu"),
        ({"feed_forward_proj": "gated-gelu-x"}, "feed_forward_proj"),
        ({"feed_forward_proj": 3}, "feed_forward_proj"),
        ({"feed_forward_proj": "relu"}, "dense_act_fn='gelu_new' contradicts feed_forward_proj='relu'"),
        ({"is_gated_act": False}, "is_gated_act=False contradicts feed_forward_proj='gated-gelu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"d_model": DELETED}, "d_model is missing"),
        ({"d_kv": None}, "d_kv is missing"),
        ({"d_model": 32.0}, "d_model"),
        ({"d_ff": "48"}, "d_ff"),
        ({"num_heads": 0}, "num_heads=0 is not a positive integer"),
        ({"num_heads": True}, "num_heads"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"vocab_size": 2**31}, "vocab_size=2147483648"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers=2147483647 is not an integer"),
        ({"num_layers": 2**31 - 1}, "num_layers=2147483647 is not an integer from 1 to 1000"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0 is not a positive number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets=3"),
        ({"relative_attention_max_distance": 2}, "relative_attention_max_distance=2 must be greater than 2"),
        ({"relative_attention_num_buckets": 16}, r"relative_attention_bias\.weight has shape \(8, 3\)"),
        ({"vocab_size": VOCAB_SIZE + 1}, r"shared\.weight has shape \(64, 32\), config\.json requires \(65, 32\)"),
        ({"num_layers": 4}, r"tensor encoder\.block\.3\..* is missing"),
        ({"num_layers": 2}, r"encoder\.block\.2\..* is not part of the model that config\.json describes"),
    ],
)
def test_a_config_of_another_model_is_rejected_in_one_line_that_names_file_and_key(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_t5_encoder(folder)
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_OF_BLOCK_1: DELETED}, r"tensor encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight is missing"),
        ({TABLE: DELETED}, r"relative_attention_bias\.weight is missing"),
        ({"encoder.final_layer_norm.weight": DELETED}, r"encoder\.final_layer_norm\.weight is missing"),
        ({Q_OF_BLOCK_1: np.zeros((32, 24), np.float32)}, r"q\.weight has shape \(32, 24\), .* requires \(24, 32\)"),
        ({Q_OF_BLOCK_1: np.zeros((24, 32), np.int8)}, r"q\.weight has type I8"),
        ({Q_OF_BLOCK_1: np.full((24, 32), np.nan, np.float32)}, r"q\.weight has values that are not finite"),
        ({TABLE: np.full((8, 3), np.inf, np.float32)}, r"relative_attention_bias\.weight has values that are not"),
        ({Q_OF_BLOCK_1.replace("weight", "bias"): np.zeros(24, np.float32)}, r"q\.bias' is not part of"),
        (
            {TABLE.replace("block.0", "block.1"): np.zeros((8, 3), np.float32)},
            r"relative_attention_bias.* is not part of",
        ),
    ],
)
def test_tensors_of_another_model_are_rejected_in_one_line_that_names_the_tensor(folder, changes, message):
    change_tensors(folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_t5_encoder(folder)
    assert "\n" not in str(error.value)


def test_decoder_tensors_are_ignored(folder):
    name = "decoder.block.0.layer.0.SelfAttention.q.weight"
    expected = load_t5_encoder(folder)[1]
    change_tensors(folder, **{name: np.full((2, 2), np.nan, np.float32)})
    jax.tree.map(np.testing.assert_array_equal, load_t5_encoder(folder)[1], expected)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load_t5_encoder(folder)


def test_an_unknown_activation_is_rejected():
    with pytest.raises(UserError, match="activation='tanh' is not supported: use one of relu"):
        T5Config(**SIZES, activation="tanh")
