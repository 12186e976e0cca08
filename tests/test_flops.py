"""Compares the analytic FLOP counts with XLA's cost analysis."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lidit_jax.models import flops
from lidit_jax.models.flops import TextLengths
from lidit_jax.models.lidit import LIDiT, TextFeatures
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.llm import LLM, LLMConfig, PrefixCache
from lidit_jax.models.t5 import T5Config, T5Encoder
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig

# Wide enough that operations other than matrix products are a small share, as in real models.
LIDIT = {"depth": 3, "hidden_size": 768, "num_heads": 8, "scan_unroll": 3, "remat": "none", "dtype": "float32"}


def counted(function, *arguments) -> float:
    """Returns XLA's FLOP count of the unoptimised program; nothing is run."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def abstract(init, *arguments):
    return nn.unbox(jax.eval_shape(lambda: init(jax.random.key(0), *arguments))["params"])


def text_of(lengths: list[TextLengths], batch: int) -> list[TextFeatures]:
    return [
        TextFeatures(
            prefix=jnp.zeros((of.prefix, of.width) if of.shares_prefix else (batch, of.prefix, of.width)),
            prompt=jnp.zeros((batch, of.prompt, of.width)),
            mask=jnp.ones((batch, of.prompt), bool),
        )
        for of in lengths
    ]


@pytest.mark.parametrize(
    ("changes", "lengths", "size"),
    [
        ({}, [TextLengths(32, 64, 512), TextLengths(24, 64, 640)], (16, 32)),
        ({"refiner_gated": False, "refiner_blocks": 3}, [TextLengths(48, 64, 1024)], (32, 16)),
        ({"fusion": "concatenate", "refiner_blocks": 0}, [TextLengths(16, 32, 512), TextLengths(0, 64, 512)], (16, 16)),
        ({"patch_size": 1, "collaborative_blocks": 2}, [TextLengths(32, 32, 512, False)] * 3, (16, 12)),
        ({"position": "conv"}, [TextLengths(16, 64, 512)], (16, 32)),
        ({"position": "sincos+rope"}, [TextLengths(16, 64, 512)], (16, 32)),
    ],
)
def test_lidit_flops_match_xla(changes, lengths, size):
    config, batch = LIDiTConfig(**{**LIDIT, **changes}), 2
    model, latents, text = LIDiT(config), jnp.zeros((batch, *size, 16)), text_of(lengths, batch)
    params = abstract(model.init, latents, jnp.zeros(batch), text)

    def run(p, x, t, text):
        return model.apply({"params": p}, x, t, text)

    expected = flops.lidit_forward(config, batch, *size, lengths)
    assert counted(run, params, latents, jnp.zeros(batch), text) == pytest.approx(expected, rel=0.02)


def test_training_flops_are_three_times_the_forward_flops():
    config, batch, lengths = LIDiTConfig(**LIDIT), 2, [TextLengths(32, 64, 512), TextLengths(24, 64, 640)]
    model, latents, text = LIDiT(config), jnp.zeros((batch, 16, 32, 16)), text_of(lengths, batch)
    params = abstract(model.init, latents, jnp.zeros(batch), text)

    def loss(params, latents, text):
        return jnp.sum(jnp.square(model.apply({"params": params}, latents, jnp.zeros(batch), text)))

    expected = flops.FORWARD_AND_BACKWARD * flops.lidit_forward(config, batch, 16, 32, lengths)
    # The gradients in the frozen features and in the latents are not computed.
    assert counted(jax.grad(loss), params, latents, text) == pytest.approx(expected, rel=0.02)


def test_llm_flops_match_xla():
    config = LLMConfig(
        vocab_size=300, hidden_size=768, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=12,
        num_key_value_heads=4, dtype="float32",
    )  # fmt: skip
    cache = PrefixCache(*[jnp.zeros((1, 24, 4, 64))] * 2)
    params = abstract(LLM(config).init, jnp.zeros((1, 2), jnp.int32))

    def run(p, tokens, cache):
        return LLM(config).apply({"params": p}, tokens, cache)

    expected = flops.llm_forward(config, prompts=2, length=64, prefix=24)
    assert counted(run, params, jnp.zeros((2, 64), jnp.int32), cache) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("gated", [False, True])
def test_t5_flops_match_xla(gated):
    config = T5Config(
        vocab_size=300, d_model=768, d_kv=64, d_ff=1536, num_layers=1, num_heads=12, gated=gated, dtype="float32"
    )
    tokens, mask = jnp.zeros((2, 96), jnp.int32), jnp.ones((2, 96), bool)
    params = abstract(T5Encoder(config).init, tokens, mask)

    def run(p, tokens, mask):
        return T5Encoder(config).apply({"params": p}, tokens, mask)

    assert counted(run, params, tokens, mask) == pytest.approx(flops.t5_forward(config, 2, 96), rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"mid_block_add_attention": False, "use_quant_conv": False}])
def test_vae_encoder_flops_match_xla(changes):
    config = VAEConfig(block_out_channels=(128, 128, 256, 256), layers_per_block=2, latent_channels=16, **changes)
    # A large image: XLA does not count products with the padding at the borders.
    model, images = AutoencoderKL(config), jnp.zeros((1, 256, 384, 3))
    params = abstract(model.init, images)

    def run(p, x):
        return model.apply({"params": p}, x, method=AutoencoderKL.encode).mean

    expected = flops.vae_encoder_forward(config, 1, 256, 384)
    assert counted(run, params, images) == pytest.approx(expected, rel=0.02)


def test_the_flops_of_the_paper_sizes_follow_from_their_parameters():
    """A token of the 1B model costs two FLOPs per weight of its blocks, plus attention."""
    config = LIDiTConfig(depth=28, hidden_size=1152, num_heads=16)
    lengths = [TextLengths(64, 256, 4096)] * 2
    per_image = flops.lidit_forward(config, 1, 32, 32, lengths)
    text_free = flops.lidit_forward(config, 1, 32, 32, [TextLengths(0, 1, 4096)])
    assert np.isclose(text_free, 2 * 256 * 14 * 28 * 1152**2, rtol=0.2)  # 4 + 2 + 8 width^2 weights per token
    assert per_image > 1.5 * text_free
