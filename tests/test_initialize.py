"""Initialisation by draws of many parameters at once (`models/initialize.py`)."""

import functools

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config

from lidit_jax.config import build
from lidit_jax.models import initialize
from lidit_jax.models.initialize import Parameter, _block_key, _hash, draw_together, is_stacked
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.models.t5 import T5Config, T5Encoder
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, shardings

LLM = LLMConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)
TOKENS = jnp.zeros((1, 2), jnp.int32)


def init_llm(key):
    return CausalLM(LLM).init(key, TOKENS)["params"]


def init_t5(key):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5Encoder(config).init(key, TOKENS, jnp.ones((1, 2), bool))["params"]


def init_vae(key):
    config = VAEConfig(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4)
    return AutoencoderKL(config).init(key, jnp.zeros((1, 8, 8, 3)))["params"]


def init_lidit(key):
    config = LIDiTConfig(depth=3, hidden_size=16, num_heads=2, latent_channels=4)
    return LIDiT(config).init_params([8, 12], key)


INITS = {"llm": init_llm, "t5": init_t5, "vae": init_vae, "lidit": init_lidit}


def boxes_of(tree):
    """Returns {path: box} of a boxed tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Parameter))
    return {jax.tree_util.keystr(path): box for path, box in leaves}


@pytest.mark.parametrize(("name", "large"), [*((name, initialize.LARGE) for name in INITS), ("llm", 20)])
def test_every_block_of_every_parameter_is_the_draw_of_its_initialiser_from_its_own_key(name, large, monkeypatch):
    monkeypatch.setattr(initialize, "LARGE", large)
    key = jax.random.key(7)
    drawn = boxes_of(jax.jit(draw_together(INITS[name]))(key))
    keys = []
    for path, box in drawn.items():
        initializer, shape, _, dtype = box.kind
        blocks = box.value if is_stacked(box) else box.value[None]
        for number, block in enumerate(blocks):
            keys.append(_block_key(key, _hash(path), number))
            np.testing.assert_allclose(block, initializer(keys[-1], shape, dtype), rtol=1e-5, atol=1e-7, err_msg=path)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == len(keys)


@pytest.mark.parametrize("name", INITS)
def test_the_tree_is_that_of_flax(name):
    expected = jax.eval_shape(INITS[name], jax.random.key(0))
    found = jax.eval_shape(draw_together(INITS[name]), jax.random.key(0))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)


def random_draws(jaxpr):
    """Returns the number of operations that draw random bits, those of inner jaxprs included."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "random_bits"
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            count += random_draws(inner)
    return count


def test_a_kind_is_drawn_once_whatever_the_number_of_its_parameters():
    boxes = boxes_of(jax.eval_shape(init_lidit, jax.random.key(0)))
    random_kinds = {
        box.kind for box in boxes.values() if box.kind[0] not in (nn.initializers.zeros, nn.initializers.ones)
    }
    together = jax.make_jaxpr(draw_together(init_lidit))(jax.random.key(0)).jaxpr
    assert (
        random_draws(together)
        == len(random_kinds)
        < random_draws(jax.make_jaxpr(init_lidit)(jax.random.key(0)).jaxpr) / 3
    )


def test_parameters_at_real_widths_are_drawn_sharded_in_no_more_memory_than_flax_takes():
    model = LIDiT(build(LIDiTConfig, load_config("10b").model.to_dict() | {"depth": 2}, "model"))
    mesh, rules = make_mesh({"fsdp": 4, "tensor": 2}), ShardingRules()
    alone = functools.partial(model.init_params, [4096, 4096])
    boxed = jax.eval_shape(alone, jax.random.key(0))

    def memory(init):
        program = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings(boxed, mesh, rules))
        with jax.set_mesh(mesh):
            return program.lower(jax.random.key(0)).compile().memory_analysis()

    together = memory(draw_together(alone))
    total = sum(4 * x.size for x in jax.tree.leaves(nn.unbox(boxed)))
    assert together.output_size_in_bytes < 1.1 * total / 8
    assert together.temp_size_in_bytes < 1.1 * memory(alone).temp_size_in_bytes
