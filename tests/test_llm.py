"""The LLM against transformers' LLaMA and Qwen2, its prefix cache, its weights format and its errors."""

import dataclasses
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lidit_jax.errors import UserError
from lidit_jax.models.llm import LLM, CausalLM, LLMConfig, encoder_params
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.weights.huggingface_llm import load_llm_encoder, save_llm

VOCAB_SIZE = 64
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
LLAMA = {**SIZES, "num_attention_heads": 4, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
QWEN = {**SIZES, "num_attention_heads": 4, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6}
MODELS = {
    "llama_mha": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "llama_gqa": (LlamaForCausalLM, LlamaConfig(**LLAMA, num_key_value_heads=2)),
    "llama_mqa_tied": (LlamaForCausalLM, LlamaConfig(**LLAMA, num_key_value_heads=1, tie_word_embeddings=True)),
    "llama_wide_heads": (LlamaForCausalLM, LlamaConfig(**LLAMA, num_key_value_heads=2, head_dim=12)),
    "qwen_mha": (Qwen2ForCausalLM, Qwen2Config(**QWEN, num_key_value_heads=4)),
    "qwen_gqa_tied": (Qwen2ForCausalLM, Qwen2Config(**QWEN, num_key_value_heads=2, tie_word_embeddings=True)),
}
OURS = LLMConfig(**LLAMA, num_key_value_heads=2, dtype="float32")
CONFIGS = {
    "llama": OURS,
    "llama_tied": dataclasses.replace(OURS, num_key_value_heads=1, tie_word_embeddings=True),
    "llama_wide_heads": dataclasses.replace(OURS, head_dim=12),
    "qwen": dataclasses.replace(OURS, attention_bias=True),
    "qwen_tied": dataclasses.replace(OURS, num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True),
}


def reference(name):
    """transformers' model with random weights, norms and biases included: their ones and zeros would hide mistakes."""
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_((1.0 if "norm" in key else 0.0) + 0.2 * torch.randn_like(parameter))
    return model


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape).astype(np.int32)


def random_params(config, seed=0):
    init = CausalLM(config).init
    shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1] == jax.tree_util.DictKey("weight") else 0.0
        return (mean + 0.2 * generator.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=0)
def features(config, params, tokens, cache=None):
    return LLM(config).apply({"params": params}, tokens, cache)


@partial(jax.jit, static_argnums=0)
def prefix(config, params, tokens):
    return LLM(config).apply({"params": params}, tokens, method=LLM.prefix)


@partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
    return CausalLM(config).apply({"params": params}, tokens)


@partial(jax.jit, static_argnums=0)
def every_block(encoder, params, tokens):
    """The features after the first block, after the first two, and so on, each from a model of that many blocks."""
    depths = range(1, encoder.num_hidden_layers + 1)
    configs = [dataclasses.replace(encoder, num_hidden_layers=depth) for depth in depths]
    return [features(c, first_blocks(params, c.num_hidden_layers), tokens) for c in configs]


def first_blocks(params, num_blocks):
    return {**params, "layers": jax.tree.map(lambda x: x[:num_blocks], params["layers"])}


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def hidden_states(model, tokens, mask):
    with torch.no_grad():
        output = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            output_hidden_states=True,
        )
    return [x.float().numpy() for x in output.hidden_states]


@pytest.mark.parametrize("name", MODELS)
def test_every_block_matches_transformers_with_right_padding(name, tmp_path):
    model = reference(name)
    model.save_pretrained(tmp_path)
    config, params = load_llm_encoder(tmp_path)
    tokens = random_tokens(3, 9)
    mask = np.arange(9) < np.array([[9], [4], [1]])
    expected = hidden_states(model, tokens, mask)
    encoder = config.as_encoder()
    assert encoder.num_hidden_layers == 3
    for block, actual in enumerate(every_block(encoder, params, tokens), start=1):
        assert_close(actual[mask], expected[block][mask])


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_a_saved_model_whole_and_computes_the_same_logits(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    save_llm(tmp_path / "llm", config, params)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llm", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert_close(logits(config, params, tokens), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_loads_bit_for_bit(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    save_llm(tmp_path, config, params)  # an empty folder is as good as none
    loaded_config, loaded = load_llm_encoder(tmp_path)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, encoder_params(params))


def test_initial_parameters_in_their_boxes_can_be_saved(tmp_path):
    params = jax.jit(CausalLM(OURS).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    save_llm(tmp_path / "llm", OURS, params)
    loaded = load_llm_encoder(tmp_path / "llm")[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, encoder_params(nn.meta.unbox(params)))


def test_a_saved_tokenizer_and_its_end_token_stand_beside_the_weights(tmp_path):
    tokenizer = train_tokenizer(["a red circle"], 260)
    config = dataclasses.replace(OURS, vocab_size=260)
    save_llm(tmp_path / "llm", config, random_params(config), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "llm/tokenizer.json").is_file()


@pytest.mark.parametrize("prefix_length", [0, 1, 6])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_prompts_after_a_cached_prefix_have_the_features_of_prefix_and_prompt_together(name, prefix_length):
    config = CONFIGS[name].as_encoder()
    params = encoder_params(random_params(CONFIGS[name]))
    before, prompts = random_tokens(prefix_length, seed=1), random_tokens(3, 5, seed=2)
    together = np.concatenate([np.broadcast_to(before, (3, prefix_length)), prompts], axis=1)
    expected = np.asarray(features(config, params, together))

    prefix_features, cache = prefix(config, params, before)
    assert_close(features(config, params, prompts, cache), expected[:, prefix_length:])
    assert prefix_features.shape == (prefix_length, config.hidden_size)
    if prefix_length:
        assert_close(prefix_features, expected[0, :prefix_length])


CONFIG = CONFIGS["qwen"]
ROW = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=8, max_size=8)


@pytest.fixture(scope="module")
def qwen_params():
    return jax.device_put(random_params(CONFIG)["model"])


@settings(max_examples=50)
@given(tokens=ROW, padding=ROW, length=st.integers(1, 8))
def test_no_feature_depends_on_what_comes_after_it(qwen_params, tokens, padding, length):
    padded = [*tokens[:length], *padding[length:]]
    actual = np.asarray(features(CONFIG, qwen_params, np.array([tokens, padded])))
    np.testing.assert_array_equal(actual[0, :length], actual[1, :length])


@settings(max_examples=25)
@given(rows=st.lists(ROW, min_size=4, max_size=4))
def test_a_batch_has_the_features_of_its_rows_one_by_one(qwen_params, rows):
    batch = features(CONFIG, qwen_params, np.array(rows))
    for index, row in enumerate(rows):
        assert_close(batch[index], features(CONFIG, qwen_params, np.array([row]))[0])


@pytest.mark.parametrize("name", ["llama_gqa", "qwen_mha"])
def test_bfloat16_is_as_close_to_float32_as_transformers_own(name, tmp_path):
    model = reference(name)
    model.save_pretrained(tmp_path)
    tokens, mask = random_tokens(4, 24), np.ones((4, 24))
    exact = hidden_states(model, tokens, mask)[3]
    theirs = hidden_states(model.to(torch.bfloat16), tokens, mask)[3]
    config, params = load_llm_encoder(tmp_path, dtype="bfloat16")
    ours = features(config.as_encoder(), params, tokens)
    assert ours.dtype == jnp.bfloat16
    error = np.square(np.asarray(ours, np.float32) - exact).mean()
    assert error <= np.square(theirs - exact).mean()


def test_weights_loaded_as_bfloat16_give_the_features_of_float32_weights_computed_in_bfloat16(tmp_path):
    save_llm(tmp_path / "llm", CONFIG, random_params(CONFIG))
    config, params = load_llm_encoder(tmp_path / "llm", dtype="bfloat16")
    params32 = load_llm_encoder(tmp_path / "llm")[1]
    assert params["layers"]["q_proj"]["kernel"].dtype == jnp.bfloat16
    tokens = random_tokens(2, 6)
    actual = features(config.as_encoder(), params, tokens)
    np.testing.assert_array_equal(actual, features(config.as_encoder(), params32, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_load_exactly(dtype, tmp_path):
    model = reference("llama_gqa").to(dtype)
    model.save_pretrained(tmp_path)
    params = load_llm_encoder(tmp_path)[1]
    for block in range(3):
        expected = model.model.layers[block].mlp.down_proj.weight.detach().float().numpy().T
        np.testing.assert_array_equal(params["layers"]["down_proj"]["kernel"][block], expected)


def test_a_model_saved_without_its_head_loads_too(tmp_path):
    model = reference("qwen_mha")
    model.save_pretrained(tmp_path / "with")
    model.model.save_pretrained(tmp_path / "without")
    expected, actual = load_llm_encoder(tmp_path / "with")[1], load_llm_encoder(tmp_path / "without")[1]
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def sharded(tmp_path):
    """A folder with one shard a tensor or two, and its weight map."""
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
def test_an_index_that_leads_out_of_its_folder_or_to_another_kind_of_file_is_refused(sharded, shard):
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


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is DELETED:
            del values[key]
        else:
            values[key] = value
    (folder / "config.json").write_text(json.dumps(values))


DELETED = object()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; use one of llama, qwen2"),
        ({"model_type": DELETED}, "model_type None is not supported"),
        ({"model_type": ["qwen2"]}, "model_type"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=True is not supported for llama"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True is not supported for llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters of type 'default' is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": DELETED}, "hidden_size is missing"),
        ({"hidden_size": 33, "head_dim": None}, "hidden_size=33 is not divisible by num_attention_heads=4"),
        ({"hidden_size": 32.0}, "hidden_size=32.0 is not a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"intermediate_size": "48"}, "intermediate_size='48'"),
        ({"num_hidden_layers": 2}, "needs at least 3 blocks"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": 10**400}, "rope_theta=1"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta='1e4'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
        ({"vocab_size": VOCAB_SIZE + 1}, r"embed_tokens.weight has shape \(64, 32\), config.json asks for \(65, 32\)"),
        ({"intermediate_size": 2**31 - 1}, "gate_proj.weight has shape"),
        ({"num_hidden_layers": 2**31 - 1}, r"tensor model\.layers\.5\..* is missing"),
        ({"model_type": "llama"}, r"k_proj\.bias' has no place in the model that config.json describes"),
    ],
)
def test_a_config_of_another_model_is_refused_in_one_line_that_names_the_key(folder, changes, message):
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
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \(32, 48\), config\.json asks for \(48, 32\)"):
        load_llm_encoder(folder)


def test_integer_weights_are_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: np.zeros((48, 32), np.int8)}))
    with pytest.raises(UserError, match=r"up_proj\.weight has type I8"):
        load_llm_encoder(folder)


def test_a_tensor_that_the_model_would_not_use_is_refused_unless_it_follows_from_the_config(folder):
    extra = np.ones(8, np.float32)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": extra}))
    load_llm_encoder(folder)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": extra}))
    with pytest.raises(UserError, match=r"q_norm\.weight' has no place"):
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


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_llm_encoder(folder)


def test_a_folder_that_is_not_empty_is_neither_overwritten_nor_left_with_debris(folder):
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


def test_a_model_without_a_third_to_last_block_is_no_encoder():
    with pytest.raises(UserError, match="needs at least 3 blocks"):
        dataclasses.replace(OURS, num_hidden_layers=2).as_encoder()
    assert dataclasses.replace(OURS, num_hidden_layers=3).as_encoder().num_hidden_layers == 1
