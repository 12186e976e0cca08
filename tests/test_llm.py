"""Compares the LLM with transformers' LLaMA, Mistral, Qwen, Gemma and Phi-3; tests its prefix cache and properties."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_models import (
    CONFIG,
    CONFIGS,
    MODELS,
    OURS,
    SLIDING,
    VOCAB_SIZE,
    assert_close,
    every_block,
    features,
    logits,
    prefix,
    random_params,
    random_tokens,
    reference,
)
from transformers import (
    AutoModelForCausalLM,
)

from lidit_jax.models.llm import CausalLM, encoder_params
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.weights.huggingface_llm import load_llm_encoder, save_llm


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
    tokens = random_tokens(3, 40)  # longer than every sliding window and every original context
    mask = np.arange(40) < np.array([[40], [4], [1]])
    expected = hidden_states(model, tokens, mask)
    encoder = config.as_encoder()
    assert encoder.num_hidden_layers == 3
    for block, actual in enumerate(every_block(encoder, params, tokens), start=1):
        assert_close(actual[mask], expected[block][mask])


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_a_complete_saved_model_and_computes_the_same_logits(name, tmp_path):
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
    save_llm(tmp_path, config, params)  # the folder may exist if it is empty
    loaded_config, loaded = load_llm_encoder(tmp_path)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, encoder_params(params))


def test_boxed_initial_parameters_can_be_saved(tmp_path):
    params = jax.jit(CausalLM(OURS).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    save_llm(tmp_path / "llm", OURS, params)
    loaded = load_llm_encoder(tmp_path / "llm")[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, encoder_params(nn.meta.unbox(params)))


def test_a_tokenizer_and_its_end_token_are_saved_with_the_weights(tmp_path):
    tokenizer = train_tokenizer(["a red circle"], 260)
    config = dataclasses.replace(OURS, vocab_size=260)
    save_llm(tmp_path / "llm", config, random_params(config), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "llm/tokenizer.json").is_file()


@pytest.mark.parametrize("prefix_length", [0, 1, 6])
@pytest.mark.parametrize("name", ["llama", "qwen", "sliding"])
def test_prompts_after_a_cached_prefix_have_the_features_of_prefix_and_prompt_together(name, prefix_length):
    config = (SLIDING if name == "sliding" else CONFIGS[name]).as_encoder()
    params = encoder_params(random_params(SLIDING if name == "sliding" else CONFIGS[name]))
    before, prompts = random_tokens(prefix_length, seed=1), random_tokens(3, 5, seed=2)
    together = np.concatenate([np.broadcast_to(before, (3, prefix_length)), prompts], axis=1)
    expected = np.asarray(features(config, params, together))

    prefix_features, cache = prefix(config, params, before)
    assert_close(features(config, params, prompts, cache), expected[:, prefix_length:])
    assert prefix_features.shape == (prefix_length, config.hidden_size)
    if prefix_length:
        assert_close(prefix_features, expected[0, :prefix_length])


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


@pytest.mark.parametrize("name", ["llama_gqa", "qwen_mha", "qwen3", "gemma", "gemma2", "gemma3", "phi3"])
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
