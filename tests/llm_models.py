"""Small random LLMs of every family, ours and transformers', for tests of the model and of its weights."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lidit_jax.models.llm import LLM, CausalLM, LLMConfig

VOCAB_SIZE = 64
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
LLAMA = {**SIZES, "num_attention_heads": 4, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
QWEN = {**SIZES, "num_attention_heads": 4, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6}
PHI = {**SIZES, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "pad_token_id": None}
GEMMA = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama_mha": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "llama_gqa": (LlamaForCausalLM, LlamaConfig(**LLAMA, num_key_value_heads=2)),
    "llama_mqa_tied": (LlamaForCausalLM, LlamaConfig(**LLAMA, num_key_value_heads=1, tie_word_embeddings=True)),
    "llama_wide_heads": (LlamaForCausalLM, LlamaConfig(**LLAMA, num_key_value_heads=2, head_dim=12)),
    "llama_biases": (LlamaForCausalLM, LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
    "llama_3.1": (LlamaForCausalLM, LlamaConfig(**LLAMA, head_dim=16, rope_scaling=LLAMA3_ROPE)),
    "llama_linear": (LlamaForCausalLM, LlamaConfig(**LLAMA, rope_scaling={"type": "linear", "factor": 2.5})),
    "llama_dynamic": (LlamaForCausalLM, LlamaConfig(**LLAMA, rope_scaling={"type": "dynamic", "factor": 2.0})),
    "mistral_sliding": (MistralForCausalLM, MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=4)),
    "mistral_full": (MistralForCausalLM, MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=None)),
    "qwen_mha": (Qwen2ForCausalLM, Qwen2Config(**QWEN, num_key_value_heads=4)),
    "qwen_gqa_tied": (Qwen2ForCausalLM, Qwen2Config(**QWEN, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2.5_yarn": (Qwen2ForCausalLM, Qwen2Config(**QWEN, num_key_value_heads=2, rope_scaling=YARN)),
    "qwen_sliding": (
        Qwen2ForCausalLM,
        Qwen2Config(**QWEN, num_key_value_heads=4, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**QWEN, num_key_value_heads=2, head_dim=12)),
    "gemma": (GemmaForCausalLM, GemmaConfig(**GEMMA)),
    "gemma_mqa": (GemmaForCausalLM, GemmaConfig(**GEMMA | {"num_key_value_heads": 1})),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**GEMMA, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, sliding_window=3),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **GEMMA | {"num_hidden_layers": 5},
            query_pre_attn_scalar=20,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config(**PHI, num_key_value_heads=2)),
    "phi3_wide_heads": (Phi3ForCausalLM, Phi3Config(**PHI, num_key_value_heads=1, head_dim=12)),
    "phi3_sliding": (Phi3ForCausalLM, Phi3Config(**PHI, num_key_value_heads=4, sliding_window=4)),
}
OURS = LLMConfig(**LLAMA, num_key_value_heads=2, dtype="float32")
CONFIGS = {
    "llama": OURS,
    "llama_tied": dataclasses.replace(OURS, num_key_value_heads=1, tie_word_embeddings=True),
    "llama_wide_heads": dataclasses.replace(OURS, head_dim=12),
    "qwen": dataclasses.replace(OURS, attention_bias=True),
    "qwen_tied": dataclasses.replace(OURS, num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True),
}
# The options of Gemma 2 and 3: a window shorter than the prefix, its own RoPE base, softcaps, sandwich norms.
SLIDING = dataclasses.replace(
    OURS,
    sliding_window=3,
    sliding_layers=(True, False, True, True, False),
    local_rope_theta=100.0,
    attention_softcap=2.0,
    qk_norm=True,
    sandwich_norm=True,
    hidden_act="gelu_pytorch_tanh",
    embedding_scale=3.0,
)


def reference(name):
    """Returns transformers' model with random weights; norms and biases too, whose ones and zeros hide mistakes."""
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
    """Returns the features after 1, 2, … blocks, each from a model with that number of blocks."""
    depths = range(1, encoder.num_hidden_layers + 1)
    configs = [encoder.first_blocks(depth) for depth in depths]
    return [features(c, first_blocks(params, c.num_hidden_layers), tokens) for c in configs]


def first_blocks(params, num_blocks):
    return {**params, "layers": jax.tree.map(lambda x: x[:num_blocks], params["layers"])}


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


CONFIG = CONFIGS["qwen"]
