"""Properties of the refiners and of LI-DiT."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_config
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.config import build
from lidit_jax.errors import UserError
from lidit_jax.models.dit import LIDiTBlock, patchify, unpatchify
from lidit_jax.models.layers import LayerConfig
from lidit_jax.models.lidit import LIDiT, TextFeatures, num_parameters
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.positions import rope_tables
from lidit_jax.models.refiners import CollaborativeRefiner, LinguisticTokenRefiner, text_rotary_tables
from lidit_jax.models.remat import rematerialised
from lidit_jax.sample.attention_maps import attention_maps

WIDTH = 32
SMALL = {"depth": 2, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 1, "latent_channels": 4, "dtype": "float32"}
LAYERS = LayerConfig(num_heads=4)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def text_features(seed=0, batch=2, prefix=3, lengths=(5, 2), width=24):
    """Returns random features of one LLM, [batch, max(lengths), width]; prompt i has lengths[i] unmasked tokens."""
    longest = max(lengths)
    mask = jnp.arange(longest)[None] < jnp.asarray(lengths)[:, None]
    return TextFeatures(normal(seed, (prefix, width)), normal(seed + 1, (batch, longest, width)), mask)


def opened(params, seed=0):
    """Returns the parameters with every zero-initialised leaf (gates, output, biases) set to small random numbers."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype) if not np.any(x) else x for x in leaves]
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def initial_params(model):
    text = [text_features(0), text_features(10, width=16)]
    init = jax.jit(lambda key: nn.unbox(model.init(key, normal(2, (2, 4, 4, 4)), jnp.ones(2), text))["params"])
    return init(jax.random.key(0))


@functools.cache
def model_and_params(**changes):
    config = LIDiTConfig(**{**SMALL, **changes})
    # They depend neither on remat (tested below) nor on dtype, and `init` takes long to compile.
    params = initial_params(LIDiT(dataclasses.replace(config, remat="none", dtype="float32")))
    model = LIDiT(config)
    return model, params, jax.jit(lambda p, x, t, c: model.apply({"params": p}, x, t, c))


def refiner_and_params(module, *args):
    params = nn.unbox(module.init(jax.random.key(0), *args)).get("params", {})
    return params, jax.jit(lambda p, *a: module.apply({"params": p}, *a))


@pytest.mark.parametrize("causal", [False, True])
def test_token_refiner_returns_its_input_at_initialisation(causal):
    x, mask, conditioning = normal(0, (2, 6, WIDTH)), jnp.ones((2, 6), bool), normal(1, (2, WIDTH))
    params, apply = refiner_and_params(LinguisticTokenRefiner(2, LAYERS, is_causal=causal), x, mask, conditioning)
    np.testing.assert_array_equal(apply(params, x, mask, conditioning), x)


def test_ungated_token_refiner_changes_its_input_and_has_no_gate_parameters():
    x, mask, conditioning = normal(0, (2, 6, WIDTH)), jnp.ones((2, 6), bool), normal(1, (2, WIDTH))
    params, apply = refiner_and_params(LinguisticTokenRefiner(2, LAYERS, gated=False), x, mask, conditioning)
    assert np.abs(apply(params, x, mask, conditioning) - x).max() > 0.1
    assert all("gates" not in block for block in params.values())


def test_collaborative_refiner_returns_its_input_at_initialisation():
    branches = [normal(0, (2, 6, WIDTH)), normal(1, (2, 4, WIDTH)), normal(2, (2, 5, WIDTH))]
    masks = [jnp.ones(x.shape[:2], bool) for x in branches]
    conditionings = [normal(3 + i, (2, WIDTH)) for i in range(3)]
    params, apply = refiner_and_params(CollaborativeRefiner(1, LAYERS), branches, masks, conditionings)
    for refined, x in zip(apply(params, branches, masks, conditionings), branches, strict=True):
        np.testing.assert_array_equal(refined, x)


def test_collaborative_refiner_of_one_llm_is_the_identity_without_parameters():
    x = normal(0, (2, 6, WIDTH))
    arguments = ([x], [jnp.ones((2, 6), bool)], [normal(1, (2, WIDTH))])
    params, apply = refiner_and_params(CollaborativeRefiner(1, LAYERS), *arguments)
    assert not params
    np.testing.assert_array_equal(apply(params, *arguments)[0], x)


def test_each_collaborative_branch_attends_to_the_others():
    branches = [normal(0, (2, 6, WIDTH)), normal(1, (2, 4, WIDTH))]
    masks = [jnp.ones(x.shape[:2], bool) for x in branches]
    conditionings = [normal(3 + i, (2, WIDTH)) for i in range(2)]
    params, apply = refiner_and_params(CollaborativeRefiner(1, LAYERS), branches, masks, conditionings)
    params = opened(params)
    before = apply(params, branches, masks, conditionings)
    changed = apply(params, [branches[0], branches[1].at[:, -1].add(1.0)], masks, conditionings)
    assert np.abs(changed[0] - before[0]).max() > 1e-3
    # A branch does not attend to itself: its unchanged tokens keep their values.
    np.testing.assert_allclose(changed[1][:, :-1], before[1][:, :-1], atol=1e-6)


@pytest.mark.parametrize(("causal", "sees_later_tokens"), [(False, True), (True, False)])
def test_a_late_token_changes_an_early_refined_feature_only_without_the_causal_mask(causal, sees_later_tokens):
    x, mask, conditioning = normal(0, (1, 6, WIDTH)), jnp.ones((1, 6), bool), normal(1, (1, WIDTH))
    params, apply = refiner_and_params(LinguisticTokenRefiner(2, LAYERS, is_causal=causal), x, mask, conditioning)
    params = opened(params)
    difference = apply(params, x.at[:, -1].add(1.0), mask, conditioning) - apply(params, x, mask, conditioning)
    assert (np.abs(difference[:, 0]).max() > 1e-4) == sees_later_tokens


def reversed_tokens(x):
    return x[:, ::-1]


@pytest.mark.parametrize("rotary", [False, True])
def test_the_token_refiner_knows_the_order_of_tokens_only_by_rotary_positions(rotary):
    x, mask, conditioning = normal(0, (2, 6, WIDTH)), jnp.ones((2, 6), bool), normal(1, (2, WIDTH))
    tables = text_rotary_tables(jnp.arange(6), WIDTH // 4) if rotary else None
    params, apply = refiner_and_params(LinguisticTokenRefiner(2, LAYERS), x, mask, conditioning, tables)
    params = opened(params)
    refined = apply(params, x, mask, conditioning, tables)
    of_reversed = apply(params, reversed_tokens(x), mask, conditioning, tables)
    assert (np.abs(reversed_tokens(of_reversed) - refined).max() > 1e-3) == rotary


@pytest.mark.parametrize("rotary", [False, True])
def test_a_collaborative_branch_knows_the_order_of_the_others_tokens_only_by_rotary_positions(rotary):
    branches = [normal(0, (2, 6, WIDTH)), normal(1, (2, 4, WIDTH))]
    masks = [jnp.ones(x.shape[:2], bool) for x in branches]
    conditionings = [normal(3 + i, (2, WIDTH)) for i in range(2)]
    tables = [text_rotary_tables(jnp.arange(n), WIDTH // 4) for n in (6, 4)] if rotary else None
    params, apply = refiner_and_params(CollaborativeRefiner(1, LAYERS), branches, masks, conditionings, tables)
    params = opened(params)
    refined = apply(params, branches, masks, conditionings, tables)[0]
    of_reversed = apply(params, [branches[0], reversed_tokens(branches[1])], masks, conditionings, tables)[0]
    assert (np.abs(of_reversed - refined).max() > 1e-4) == rotary


def test_only_the_distance_between_refined_tokens_matters_not_where_counting_starts():
    x, mask, conditioning = normal(0, (2, 6, WIDTH)), jnp.ones((2, 6), bool), normal(1, (2, WIDTH))
    tables, shifted_tables = (text_rotary_tables(jnp.arange(6) - start, WIDTH // 4) for start in (0, 3))
    params, apply = refiner_and_params(LinguisticTokenRefiner(2, LAYERS), x, mask, conditioning, tables)
    params = opened(params)
    shifted = apply(params, x, mask, conditioning, shifted_tables)
    np.testing.assert_allclose(shifted, apply(params, x, mask, conditioning, tables), atol=1e-5)


def test_positions_count_from_the_prompts_first_token():
    np.testing.assert_array_equal(text_features(prefix=3, lengths=(5, 2)).positions(), [-3, -2, -1, 0, 1, 2, 3, 4])


def test_an_odd_head_size_is_rejected_where_positions_are_rotary():
    with pytest.raises(UserError, match="refiner_rotary=False"):
        LIDiTConfig(depth=1, hidden_size=12, num_heads=4)
    LIDiTConfig(depth=1, hidden_size=12, num_heads=4, refiner_rotary=False, position="conv")
    for wrong in ({"mlp_ratio": 1e-9}, {"refiner_mlp_ratio": 1e-9}, {"scan_unroll": 0}, {"hidden_size": 2}):
        with pytest.raises(UserError, match=f"model.{next(iter(wrong))}="):
            LIDiTConfig(**{"depth": 1, "hidden_size": 16, "num_heads": 1} | wrong)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_refiner_qk_norm_bounds_the_logits_of_large_features(qk_norm):
    """At the head size of the 10B model, large weights saturate the softmax unless queries and keys are normalised."""
    x, mask = normal(0, (1, 256, 64)), jnp.ones((1, 256), bool)
    refiner = LinguisticTokenRefiner(1, LayerConfig(num_heads=1, qk_norm=qk_norm))
    params, _ = refiner_and_params(refiner, x, mask, normal(1, (1, 64)))
    for name in ("query", "key"):
        params["block_0"]["attention"][name]["kernel"] *= 30
    maps = attention_maps(refiner, params, x, mask, normal(1, (1, 64)))
    largest = maps["block_0/attention"].max(-1).mean()
    assert (largest < 0.3) if qk_norm else (largest > 0.9)


def test_model_returns_zero_at_initialisation():
    _, params, apply = model_and_params()
    text = [text_features(0), text_features(10, width=16)]
    np.testing.assert_array_equal(apply(params, normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0]), text), 0.0)


@pytest.mark.parametrize("fusion", ["collaborative", "concatenate"])
def test_padding_never_changes_a_result(fusion):
    _, params, apply = model_and_params(fusion=fusion)
    params = opened(params)
    x, t = normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0])
    first, second = text_features(0), text_features(10, width=16)
    expected = apply(params, x, t, [first, second])

    garbage = jnp.where(first.mask[..., None], first.prompt, 1e3)
    longer = TextFeatures(
        first.prefix,
        jnp.concatenate([garbage, jnp.full((2, 3, 24), -7.0)], axis=1),
        jnp.concatenate([first.mask, jnp.zeros((2, 3), bool)], axis=1),
    )
    np.testing.assert_allclose(apply(params, x, t, [longer, second]), expected, atol=2e-6)
    # The prompt's own tokens do change the result.
    other = TextFeatures(first.prefix, first.prompt.at[:, 0].add(1.0), first.mask)
    assert np.abs(apply(params, x, t, [other, second]) - expected).max() > 1e-4


@pytest.mark.parametrize(("name", "heads", "side"), [("1b", 2, 16), ("10b", 2, 32)])
def test_a_shorter_prompt_length_changes_no_result_at_real_sizes(name, heads, side):
    """At the grid, head size and prompt lengths of the real configs, with one block and two heads."""
    found = build(LIDiTConfig, load_config(name).model, "model")
    sizes = {"depth": 1, "num_heads": heads, "hidden_size": heads * found.head_dim, "remat": "none", "dtype": "float32"}
    model = LIDiT(dataclasses.replace(found, refiner_blocks=1, patch_size=1, latent_channels=4, **sizes))
    text = [text_features(seed, prefix=64, lengths=(80, 20)) for seed in (0, 10)]

    def padded(features):
        extra = 256 - features.prompt.shape[1]
        prompt = jnp.pad(features.prompt, ((0, 0), (0, extra), (0, 0)), constant_values=7.0)
        return TextFeatures(features.prefix, prompt, jnp.pad(features.mask, ((0, 0), (0, extra))))

    x, t = normal(5, (2, side, side, 4)), jnp.array([1.0, 900.0])
    params = opened(nn.unbox(jax.jit(model.init)(jax.random.key(0), x, t, text))["params"])
    apply = jax.jit(lambda params, text: model.apply({"params": params}, x, t, text))
    expected, result = apply(params, text), apply(params, [padded(features) for features in text])
    np.testing.assert_allclose(result, expected, atol=2e-6 * np.abs(expected).max())


def test_refiners_attend_to_the_prefix_and_then_drop_it():
    model, params, _ = model_and_params()
    params = opened(params)
    x, t = normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0])
    first, second = text_features(0), text_features(10, width=16)

    def condition(first):
        _, state = model.apply({"params": params}, x, t, [first, second], mutable=["intermediates"])
        return state["intermediates"]["condition"][0]

    before = condition(first)
    assert before.shape == (2, 5 + 5, WIDTH)  # only the prompts of both LLMs, without prefixes
    changed = condition(first.replace(prefix=first.prefix + 1.0))
    assert np.abs(changed - before).max() > 1e-3


def test_a_prefix_with_a_batch_axis_affects_only_its_own_row():
    """The features that T5 has for the instruction depend on the prompt."""
    _, params, apply = model_and_params()
    params = opened(params)
    x, t = normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0])
    shared, second = text_features(0), text_features(10, width=16)
    expected = apply(params, x, t, [shared, second])
    own = shared.replace(prefix=jnp.stack([shared.prefix, shared.prefix]))
    assert own.prefix_length == shared.prefix_length == 3
    np.testing.assert_array_equal(own.positions(), shared.positions())
    np.testing.assert_allclose(apply(params, x, t, [own, second]), expected, atol=2e-6)
    changed = apply(params, x, t, [own.replace(prefix=own.prefix.at[1].add(1.0)), second])
    np.testing.assert_allclose(changed[0], expected[0], atol=2e-6)
    assert np.abs(changed[1] - expected[1]).max() > 1e-4


def test_an_empty_prompt_stays_finite_forwards_and_backwards():
    _, params, apply = model_and_params()
    params = opened(params)
    empty = [text_features(0, lengths=(1, 1), prefix=0), text_features(10, lengths=(1, 1), prefix=0, width=16)]
    x, t = normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0])
    loss, grads = jax.value_and_grad(lambda p: jnp.sum(jnp.square(apply(p, x, t, empty))))(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_batch_equals_its_rows_one_by_one():
    _, params, apply = model_and_params()
    params = opened(params)
    x, t = normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0])
    text = [text_features(0), text_features(10, width=16)]
    together = apply(params, x, t, text)
    for row in range(2):
        alone = [TextFeatures(f.prefix, f.prompt[row : row + 1], f.mask[row : row + 1]) for f in text]
        np.testing.assert_allclose(
            apply(params, x[row : row + 1], t[row : row + 1], alone)[0], together[row], atol=2e-6, rtol=2e-6
        )


def _gradients_per_step(params, apply, steps):
    """Returns the paths of the parameters with a non-zero gradient in each training step, and all paths."""
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)
    text = [text_features(0, batch=4, lengths=(5, 3, 4, 2)), text_features(10, batch=4, lengths=(2, 5, 3, 5), width=16)]
    x, t, target = normal(5, (4, 4, 4, 4)), jnp.array([10.0, 900.0, 400.0, 700.0]), normal(6, (4, 4, 4, 4))
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(apply(p, x, t, text) - target))))
    reached = []
    for _ in range(steps):
        grads = gradient(params)
        paths = jax.tree_util.tree_leaves_with_path(grads)
        reached.append({jax.tree_util.keystr(path) for path, g in paths if np.any(np.abs(g) > 0)})
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    return reached, {jax.tree_util.keystr(path) for path, _ in paths}


def test_every_parameter_gets_a_gradient_within_two_steps_of_open_gates():
    _, params, apply = model_and_params()
    reached, every = _gradients_per_step(opened(params), apply, steps=2)
    assert reached[0] | reached[1] == every


def test_from_initialisation_each_zero_layer_opens_the_next_until_every_parameter_learns():
    # Zero-initialised layers are in series: output, DiT gates, refiner gates, then the layers behind these gates. A
    # zero layer passes no gradient back until its first update, so the innermost parameters learn from step 4 on.
    _, params, apply = model_and_params()
    reached, every = _gradients_per_step(params, apply, steps=4)
    assert all("['output']" in path for path in reached[0])
    assert any("['blocks']['modulation']" in path for path in reached[1])
    assert any("['token_refiner_0']['block_0']['gates']" in path for path in reached[2])
    assert set.union(*reached) == every


@pytest.mark.parametrize("remat", ["full", "projections", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    text = [text_features(0), text_features(10, width=16)]
    x, t = normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0])
    grads = []
    for policy in ("none", remat):
        _, params, apply = model_and_params(remat=policy)
        grads.append(jax.grad(lambda p, apply=apply: jnp.sum(jnp.square(apply(p, x, t, text))))(opened(params)))
    # The tolerance is relative to the largest gradient: some leaves have gradients that are zero up to rounding (the
    # bias of keys, which softmax ignores).
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), *grads)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_block_is_rematerialised(remat):
    check_rematerialisation(LIDiTConfig(**SMALL, remat=remat), 4, text_features(0), text_features(10, width=16))


@pytest.mark.parametrize(("name", "side"), [("1b", 32), ("10b", 64)])
def test_every_block_of_the_papers_models_is_rematerialised(name, side):
    text = [text_features(i, prefix=64, lengths=(256, 20), width=4096) for i in (0, 10)]
    check_rematerialisation(build(LIDiTConfig, load_config(name).model, "model"), side, *text)


def check_rematerialisation(config, side, *text):
    """Traces the model on latents of side x side, and counts the blocks that are rematerialised."""
    model = LIDiT(config)
    inputs = jnp.zeros((2, side, side, config.latent_channels)), jnp.ones(2), text
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    program = str(jax.make_jaxpr(lambda p, *a: model.apply({"params": p}, *a))(params, *inputs))
    repeats = config.remat != "none"
    refiners = len(text) * (config.refiner_blocks + config.collaborative_blocks)
    assert program.count("prevent_cse=True") == (refiners if repeats else 0)
    assert program.count("prevent_cse=False") == repeats  # the body of the scan over the DiT's blocks


@pytest.mark.parametrize(
    ("remat", "repeated"),
    [("full", 1.0), ("ffn", 0.752), ("outputs", 0.627), ("projections", 0.317), ("dots", 0.068), ("none", 0.0)],
)
def test_policies_repeat_the_products_that_they_do_not_save(remat, repeated):
    """At the size of a block of the 10B model at 512 px; "dots" repeats the attention's products without a kernel."""
    tokens, prompt, width, heads = 1024, 512, 2816, 44
    layers = LayerConfig(heads, 4.0, True, "xla", jnp.bfloat16, remat)
    block = rematerialised(LIDiTBlock, remat, in_scan=True)(layers)
    rotary = rope_tables(32, 32, width // heads, 32)
    shapes = {"x": ((1, tokens, width), jnp.bfloat16), "text": ((1, prompt, width), jnp.bfloat16)}
    shapes |= {"mask": ((1, prompt), bool), "conditioning": ((1, width), jnp.float32)}
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes.values()]
    params = nn.unbox(jax.eval_shape(lambda key, *a: block.init(key, *a, rotary), jax.random.key(0), *inputs))

    def loss(params, *inputs):
        return jnp.sum(block.apply(params, *inputs, rotary)[0].astype(jnp.float32))

    forward = product_flops(jax.make_jaxpr(loss)(params, *inputs).jaxpr)
    both = product_flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 4)))(params, *inputs).jaxpr)
    assert both / forward - 3 == pytest.approx(repeated, abs=0.01)


def product_flops(program) -> int:
    """Returns the FLOPs of the matrix products of a jaxpr, those of inner programs included."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * size * math.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                total += product_flops(inner) if hasattr(inner, "eqns") else 0
    return total


def test_parameters_do_not_depend_on_rematerialisation():
    none, full = (initial_params(LIDiT(LIDiTConfig(**SMALL, remat=remat))) for remat in ("none", "full"))
    jax.tree.map(np.testing.assert_array_equal, none, full)


def test_bfloat16_is_close_to_float32():
    _, params, apply = model_and_params()
    _, _, apply_bfloat16 = model_and_params(dtype="bfloat16")
    text = [text_features(0), text_features(10, width=16)]
    x, t = normal(5, (2, 4, 4, 4)), jnp.array([1.0, 900.0])
    expected, got = apply(opened(params), x, t, text), apply_bfloat16(opened(params), x, t, text)
    assert got.dtype == jnp.float32
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@settings(max_examples=20)
@given(h=st.integers(1, 4), w=st.integers(1, 4), patch=st.integers(1, 3), channels=st.integers(1, 3))
def test_unpatchify_inverts_patchify(h, w, patch, channels):
    x = normal(0, (2, h * patch, w * patch, channels))
    np.testing.assert_array_equal(unpatchify(patchify(x, patch), patch), x)


def test_any_size_that_the_patch_divides_runs_with_the_same_parameters():
    _, params, apply = model_and_params()
    text = [text_features(0), text_features(10, width=16)]
    for height, width in ((2, 2), (4, 6), (7, 3)):
        assert apply(params, normal(0, (2, height, width, 4)), jnp.ones(2), text).shape == (2, height, width, 4)


def test_the_position_block_distinguishes_all_tokens_of_a_small_grid():
    _, params, apply = model_and_params()
    text = [text_features(0), text_features(10, width=16)]
    out = apply(opened(params), jnp.ones((2, 4, 4, 4)), jnp.ones(2), text)[0]
    tokens = out.reshape(16, 4)
    distances = np.abs(tokens[:, None] - tokens[None]).max(-1) + np.eye(16)
    assert distances.min() > 1e-4  # all 16 positions of a constant image are distinct


def test_latents_that_the_patch_does_not_divide_are_rejected():
    model = LIDiT(LIDiTConfig(**{**SMALL, "patch_size": 2}))
    text = [text_features(0)]
    with pytest.raises(UserError, match="5x4 are not divisible by patch_size=2"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 5, 4, 4)), jnp.ones(2), text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size=32 is not divisible by model.num_heads=5"),
        ({"fusion": "sum"}, "collaborative, concatenate"),
        ({"remat": "some"}, "full, ffn, outputs, attention, projections, dots, none"),
    ],
)
def test_impossible_configs_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        LIDiTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("depth", "width", "heads", "core", "total"), [(28, 1152, 16, 0.93e9, 1.05e9), (48, 2816, 44, 9.52e9, 10.2e9)]
)
def test_sizes_are_those_of_the_paper(depth, width, heads, core, total):
    model = LIDiT(LIDiTConfig(depth=depth, hidden_size=width, num_heads=heads))
    text = [text_features(0, width=4096), text_features(1, width=4096)]  # LLaMA3-8B and Qwen1.5-7B
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 4, 4, 16)), jnp.ones(2), text)
    params = nn.unbox(variables)["params"]
    assert num_parameters(params["dit"]["blocks"]) == pytest.approx(core, rel=0.002)
    assert num_parameters(params) == pytest.approx(total, rel=0.03)
