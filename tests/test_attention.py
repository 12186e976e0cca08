"""Compares the TPU attention kernel, interpreted, with XLA's attention, and tests the selection between them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_lidit import opened, text_features

from lidit_jax.compile.cost import cost_of
from lidit_jax.errors import UserError
from lidit_jax.models import attention
from lidit_jax.models.attention import dot_product_attention, select_implementation
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.splash_attention import LANES, LONGEST_BLOCK, _block_length
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules

# ((batch, queries, keys, heads, key heads, head size), is_masked, is_causal): the head sizes of the paper's models,
# with lengths that are and are not multiples of a block.
CASES = {
    "image of 256 px": ((2, 256, 256, 2, 2, 72), False, False),
    "image of 512 px": ((1, 1024, 1024, 1, 1, 64), False, False),
    "ragged image": ((1, 1500, 1500, 1, 1, 64), False, False),
    "image to text": ((2, 256, 77, 2, 2, 64), True, False),
    "ragged image to long text": ((1, 300, 1100, 2, 2, 72), True, False),
    "causal refiner": ((2, 150, 150, 2, 2, 64), True, True),
    "grouped queries": ((2, 130, 200, 4, 2, 64), True, False),
}


def inputs(shape, is_masked=True, dtype=jnp.float32, seed=0):
    batch, queries, keys, heads, key_heads, size = shape
    rng = np.random.default_rng(seed)
    tokens = [(queries, heads), (keys, key_heads), (keys, key_heads)]
    arrays = [jnp.asarray(rng.normal(size=(batch, *length_and_heads, size)), dtype) for length_and_heads in tokens]
    mask = jnp.asarray(rng.random((batch, keys)) < 0.6).at[:, 0].set(True) if is_masked else None
    return arrays, mask


def value_and_gradients(implementation, arrays, mask, is_causal=False):
    """Returns the outputs and the gradients of query, key and value, float32."""

    def loss(arrays):
        y = dot_product_attention(*arrays, key_mask=mask, is_causal=is_causal, implementation=implementation)
        y = y.astype(jnp.float32)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return [np.asarray(x, np.float32) for x in (y, *gradients)]


@pytest.mark.parametrize("case", CASES)
def test_the_tpu_kernel_matches_xla_attention(case):
    shape, is_masked, is_causal = CASES[case]
    arrays, mask = inputs(shape, is_masked)
    expected, got = (value_and_gradients(which, arrays, mask, is_causal) for which in ("xla", "splash"))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_tpu_kernel_matches_xla_attention_to_bfloat16_rounding():
    arrays, mask = inputs((2, 256, 77, 2, 2, 72), dtype=jnp.bfloat16)
    exact = value_and_gradients("xla", [x.astype(jnp.float32) for x in arrays], mask)
    for implementation in ("xla", "splash"):
        for one, other in zip(value_and_gradients(implementation, arrays, mask), exact, strict=True):
            assert np.abs(one - other).max() < 0.02 * np.abs(other).max()  # 2.5 units in the last place of bfloat16


@pytest.mark.parametrize(("sizes", "batch"), [((2, 2, 2), 8), ((1, 1, 8), 8), ((1, 8, 1), 3)])  # no axis divides 3
def test_every_device_attends_for_its_own_samples_and_heads(sizes, batch):
    arrays, mask = inputs((batch, 130, 40, 8, 8, 8))
    expected = value_and_gradients("xla", arrays, mask)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    with jax.set_mesh(mesh), nn.logical_axis_rules(ShardingRules().pairs()):
        got = value_and_gradients("splash", arrays, mask)
        run = jax.jit(lambda arrays: dot_product_attention(*arrays, key_mask=mask, implementation="splash"))
        cut = run(arrays).sharding.shard_shape(arrays[0].shape)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    whole = batch % (sizes[0] * sizes[1]) != 0
    assert cut == (batch if whole else batch // sizes[0] // sizes[1], 130, 8 // sizes[2], 8)


def test_lidit_gradients_with_the_tpu_kernel_match_xla():
    sizes = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 1, "latent_channels": 4, "dtype": "float32"}
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    text, x, times = [text_features(0)], normal(2, 4, 4, 4), jnp.asarray([3.0, 700.0])
    # "dots" saves the results of the kernel for the backward pass, by their checkpoint name.
    models = {which: LIDiT(LIDiTConfig(**sizes, remat="dots", attention=which)) for which in ("xla", "splash")}
    params = opened(nn.unbox(jax.jit(models["xla"].init)(jax.random.key(0), x, times, text))["params"])

    def gradients(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x, times, text) ** 2)))(params)

    expected, got = (gradients(model) for model in models.values())
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * largest)


@given(st.integers(1, 5000))
def test_blocks_cover_a_length_with_little_padding(length):
    block = _block_length(length)
    padded = -(-length // block) * block
    assert block % LANES == 0 and block <= LONGEST_BLOCK
    assert padded - length < LANES * -(-length // LONGEST_BLOCK)


def test_each_platform_gets_its_kernel():
    def chosen(platform, queries, keys, size=64, dtype=jnp.bfloat16, is_plain=True, is_masked=False):
        query, key = (jax.ShapeDtypeStruct((2, length, 4, size), dtype) for length in (queries, keys))
        return select_implementation(platform, query, key, is_plain=is_plain, is_masked=is_masked)

    assert chosen("tpu", 1024, 1024) == chosen("tpu", 256, 256, 72) == "splash"
    assert chosen("tpu", 1024, 300, is_masked=True) == "splash"
    assert chosen("tpu", 240, 240) == "splash"  # the bucket of 192x320 pixels at 256 px
    assert chosen("tpu", 16, 16) == chosen("tpu", 128, 256) == chosen("tpu", 1024, 1024, is_plain=False) == "xla"
    assert chosen("tpu", 1024, 1024, dtype=jnp.float32) == "xla"  # the kernel would multiply in bfloat16
    assert chosen("nvidia", 256, 256, 72) == "cudnn"
    assert chosen("nvidia", 256, 256, dtype=jnp.float32) == chosen("nvidia", 256, 256, 160) == "xla"
    assert chosen("nvidia", 1024, 300, is_masked=True) == chosen("nvidia", 64, 64, is_plain=False) == "xla"
    assert chosen("cpu", 1024, 1024) == chosen("gpu", 1024, 1024) == "xla"


def test_a_row_without_keys_gets_the_mean_of_the_values():
    arrays, mask = inputs((2, 130, 40, 2, 2, 64))
    mask = mask.at[1].set(False)
    expected, got = (value_and_gradients(which, arrays, mask) for which in ("xla", "splash"))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_unsupported_kernel_inputs_are_rejected(monkeypatch):
    arrays, _ = inputs((1, 8, 8, 1, 1, 8))
    with pytest.raises(UserError, match="supports no bias"):
        dot_product_attention(*arrays, mask=jnp.ones((1, 1, 8, 8), bool), implementation="splash")
    monkeypatch.setattr(attention, "_platform", lambda: "tpu")
    with pytest.raises(UserError, match="attention='splash' would multiply float32 in bfloat16: use 'auto' or 'xla'"):
        dot_product_attention(*arrays, implementation="splash")
    with pytest.raises(UserError, match="attention='flash' is unknown: use one of auto, xla"):
        LIDiTConfig(depth=1, hidden_size=8, num_heads=1, patch_size=1, latent_channels=1, attention="flash")


@pytest.mark.parametrize(
    ("name", "shapes", "products"),
    [
        ("fwd", "f32[2,256,128], bf16[2,4,256,64]", 2),
        ("dkv", "bf16[2,1,4,256,64], bf16[2,2,128,64], bf16[2,2,128,64]", 5),
        ("dkv", "bf16[2,2,128,64], bf16[2,2,128,64]", 4),
        ("dq", "bf16[2,4,256,64]", 3),
    ],
)
@pytest.mark.parametrize("is_swapped", [False, True])
def test_the_flops_of_the_kernel_are_counted(name, shapes, products, is_swapped):
    """The HLO text is in the form of the TPU compiler; no other platform compiles the kernel."""
    query, key = ("bf16[2,4,64,256]", "bf16[2,2,64,128]") if is_swapped else ("bf16[2,4,256,64]", "bf16[2,2,128,64]")
    text = f"""ENTRY %main (q: {query}, k: {key}) -> bf16[2,4,256,64] {{
  %next = s8[1,1,1] constant(0)
  %q = {query} parameter(0)
  %k = {key} parameter(1)
  %splash_mha_{name}_no_residuals.3 = ({shapes}) custom-call(%next, %q, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %y = bf16[2,4,256,64] get-tuple-element(%splash_mha_{name}_no_residuals.3), index=0
}}
"""
    cost = cost_of(text)
    assert cost.flops == products * 2 * (2 * 4 * 256 * 64) * 128
    assert not cost.kernels
