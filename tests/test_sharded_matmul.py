"""Tests products with weights: full precision for float32 on accelerators, and gradient reduction in float32."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lidit_jax.compile import compile_step
from lidit_jax.compile.cost import cost_of
from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.buckets import Bucket
from lidit_jax.experiment import Experiment
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.discriminator import PatchDiscriminator
from lidit_jax.models.layers import Attention, Conv, Dense, LayerConfig
from lidit_jax.models.llm import CausalLM, LLMConfig
from lidit_jax.models.lpips import LPIPS
from lidit_jax.models.sharded_matmul import add_bias, convolve, matmul, reduce_gradients_in
from lidit_jax.models.t5 import T5Config, T5Encoder
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_layers import group_statistics
from lidit_jax.models.vae_tiling import decode_in_tiles
from lidit_jax.parallel.chips import V5E
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.pipeline import Pipeline
from lidit_jax.sample.attention_maps import attention_maps

FLOATS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


# --- precision ---------------------------------------------------------------------------------------------------


def products_in(program):
    """Lists the matrix products and convolutions of StableHLO: (line, has a float32 operand, has full precision).

    The logits of bfloat16 attention and their gradients are float32; jax.nn requests bfloat16 products for these.
    """
    found = []
    for line in program.splitlines():
        if re.search(r"stablehlo\.(dot_general|convolution)\b", line):
            operands = re.search(r": \(tensor<([^>]*)>, tensor<([^>]*)>\)", line).groups()
            is_float32 = any(operand.rpartition("x")[2] == "f32" for operand in operands)
            is_float32 &= "algorithm = <lhs_precision_type = bf16" not in line
            found.append((line.strip(), is_float32, line.count("HIGHEST") == 2))
    return found


def check_precision(program, *, has_bfloat16=False):
    found = products_in(program)
    assert any(is_float32 for _, is_float32, _ in found)
    assert any(not is_float32 for _, is_float32, _ in found) == has_bfloat16
    assert [line for line, is_float32, is_exact in found if is_float32 and not is_exact] == []


def lowered(function, *arguments):
    return jax.jit(function).lower(*arguments).as_text()


def with_gradients(module, *inputs, method=None):
    """Returns the StableHLO of a module and of the gradients in all parameters and float inputs."""
    params = nn.unbox(jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *inputs))
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in inputs]

    def loss(params, floats):
        floats = iter(floats)
        given = [next(floats) if known else x for known, x in zip(is_float, inputs, strict=True)]
        outputs = jax.tree.leaves(module.apply(params, *given, method=method))
        return sum(jnp.sum(jnp.sin(output.astype(jnp.float32))) for output in outputs)

    floats = [x for x, known in zip(inputs, is_float, strict=True) if known]
    return lowered(jax.value_and_grad(loss, argnums=(0, 1)), params, floats)


def test_a_product_without_full_precision_is_detected():
    x, image, kernel = jnp.ones((8, 8)), jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    plain = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    convolution = functools.partial(plain, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for function, arguments in ((jnp.matmul, (x, x)), (convolution, (image, kernel))):
        with pytest.raises(AssertionError):
            check_precision(lowered(function, *arguments))


@functools.cache
def run_of(name, dtype="bfloat16"):
    """Builds a paper config with its grids, text lengths and head sizes, but narrow and shallow, on eight devices."""
    config = load_config(name)
    config.data.path = "unused"
    config.mesh.update(data=2, fsdp=4, tensor=1)
    head_size = config.model.hidden_size // config.model.num_heads
    config.model.update(depth=2, num_heads=2, hidden_size=2 * head_size, dtype=dtype)
    for encoder in config.encoders.values():
        encoder.dtype = dtype
        encoder.model.update(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
        encoder.model.update(num_attention_heads=2, num_key_value_heads=1)
    config.vae.dtype = dtype
    config.vae.model.update(block_out_channels=(32, 32, 32, 32))
    config.train.batch_size = 8 * config.train.get("accumulate", 1)
    config.sample.update(batch_size=8, steps=2)
    experiment = Experiment(config, epath.Path("unused"), only_shapes=True)
    return compile_step._on_devices(experiment, jax.devices(), V5E, 64)


def train_step(run):
    """Returns the StableHLO of a complete train step: LLMs, VAE, LI-DiT forward and backward, AdamW."""
    side = run.experiment.data.resolution
    shape = BatchShape(Bucket(side, side), run.experiment.text.max_length)
    batch = compile_step.abstract_batch(run.experiment, run.encoders, run.mesh, run.rules, shape)
    trainer = run.trainer(run.experiment.train)
    with jax.set_mesh(run.mesh):
        return trainer.lower(trainer.abstract_state(), run.frozen, batch).as_text()


@pytest.fixture(scope="module")
def steps():
    return functools.cache(lambda name, dtype: train_step(run_of(name, dtype)))


@pytest.mark.parametrize(("name", "dtype"), [("1b", "bfloat16"), ("10b", "bfloat16"), ("1b", "float32")])
def test_every_float32_product_of_the_train_step_has_full_precision(steps, name, dtype):
    check_precision(steps(name, dtype), has_bfloat16=dtype == "bfloat16")


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float32_product_of_sampling_has_full_precision(dtype):
    run = run_of("1b", dtype)
    experiment = run.experiment
    pipeline = Pipeline(experiment.model, experiment.schedule, run.encoders, run.vae, run.frozen, run.mesh, run.rules)
    with jax.set_mesh(run.mesh):
        program = pipeline.lower(run.state().averaged, 256, 256, experiment.sample).as_text()
    check_precision(program, has_bfloat16=dtype == "bfloat16")


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float32_product_of_the_autoencoder_and_its_discriminator_has_full_precision(dtype):
    vae = AutoencoderKL(VAEConfig(block_out_channels=(32, 64), latent_channels=4), FLOATS[dtype])
    images = jnp.zeros((1, 32, 32, 3))
    has_bfloat16 = dtype == "bfloat16"
    check_precision(with_gradients(vae, images), has_bfloat16=has_bfloat16)
    check_precision(with_gradients(PatchDiscriminator(8, 2, FLOATS[dtype]), images), has_bfloat16=has_bfloat16)
    params = nn.unbox(jax.eval_shape(vae.init, jax.random.key(0), images)["params"])
    tiles = lowered(lambda p, z: decode_in_tiles(vae, p, z, 32), params, jnp.zeros((1, 24, 24, 4)))
    check_precision(tiles, has_bfloat16=has_bfloat16)
    statistics = lowered(lambda x, w: group_statistics(x, 2, w), jnp.zeros((1, 4, 4, 8)), jnp.ones((4, 4)))
    check_precision(statistics)


def test_the_perceptual_loss_has_the_precision_of_the_autoencoder():
    images = jnp.zeros((1, 16, 16, 3))
    check_precision(with_gradients(LPIPS(), images, images))
    with pytest.raises(AssertionError):
        check_precision(with_gradients(LPIPS(jnp.bfloat16), images, images))


LLM = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
LLM |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}, {"attention_softcap": 30.0}])
def test_every_float32_product_of_a_language_model_has_full_precision(more, dtype):
    if "attention_softcap" in more and dtype == "bfloat16":
        pytest.skip("Gemma 2 is frozen: its bfloat16 attention has no gradient that is kept")
    model = CausalLM(LLMConfig(**LLM, **more, dtype=dtype))
    check_precision(with_gradients(model, jnp.zeros((1, 8), jnp.int32)), has_bfloat16=dtype == "bfloat16")


def test_every_float32_product_of_t5_has_full_precision():
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5Encoder(T5Config(**sizes, gated=True, dtype="float32"))
    check_precision(with_gradients(model, jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool)))


def test_float32_attention_and_its_maps_multiply_float32():
    x = jnp.zeros((1, 8, 16))
    check_precision(with_gradients(Attention(LayerConfig(2, qk_norm=True)), x))
    params = jax.eval_shape(Attention(LayerConfig(2)).init, jax.random.key(0), x)["params"]
    check_precision(attention_maps.lower(Attention(LayerConfig(2)), nn.unbox(params), x).as_text())
    query = jnp.zeros((1, 8, 2, 8))
    masked = functools.partial(dot_product_attention, mask=jnp.ones((1, 1, 8, 8), bool), softcap=5.0)
    check_precision(lowered(masked, query, query, query))


# --- gradients ---------------------------------------------------------------------------------------------------


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def check_gradients(ours, plain, x, weight):
    """Asserts that values and gradients of both functions agree, in float32."""
    cotangent = normal(9, jax.eval_shape(plain, x, weight).shape)
    results = []
    for function in (ours, plain):
        value, pull = jax.vjp(function, x, weight)
        results.append([value, *pull(cotangent)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@settings(max_examples=12)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID", ((0, 1), (0, 1)), ((1, 1), (1, 1))]),
)
def test_the_gradients_of_a_convolution_match_jax(size, kernel, stride, padding):
    x, weight = normal(0, (2, *size, 3)), normal(1, (kernel, kernel, 3, 5))

    def plain(x, weight):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight, (stride, stride), padding, dimension_numbers=layout)

    ours = functools.partial(convolve, axes=("conv_in", "conv_out"), strides=(stride, stride), padding=padding)
    check_gradients(ours, plain, x, weight)


@pytest.mark.parametrize("rows", [(), (6,), (2, 3), (2, 3, 4)])
def test_the_gradients_of_a_product_match_jax(rows):
    ours = functools.partial(matmul, axes=("embed", "mlp"))
    check_gradients(ours, jnp.matmul, normal(0, (*rows, 8)), normal(1, (8, 5)))
    check_gradients(lambda y, bias: add_bias(y, bias, "bias", "mlp"), jnp.add, normal(0, (*rows, 5)), normal(1, (5,)))


def gradient_error(layer, x):
    """Returns the largest error of a bfloat16 layer's weight gradients against float64, relative to the largest one."""
    params = layer.init(jax.random.key(0), x)
    params = nn.unbox(
        jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    )  # so that casts are exact
    y, pull = jax.vjp(lambda p: layer.apply(p, x), params)
    cotangent = normal(1, y.shape, jnp.bfloat16)
    [gradients] = pull(cotangent)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        wide = layer.clone(dtype=jnp.float64)
        [exact] = jax.vjp(lambda p: wide.apply(p, jnp.asarray(x, jnp.float64)), exact)[1](
            jnp.asarray(cotangent, jnp.float64)
        )
        worst = jax.tree.map(lambda g, e: float(np.abs(np.asarray(g) - e).max() / np.abs(e).max()), gradients, exact)
    return worst["params"]


@pytest.mark.parametrize("layer", [Dense(8, ("embed", "mlp")), Conv(8, ("embed", "conv_out"))])
def test_gradients_of_bfloat16_layers_leave_the_product_unrounded(layer):
    layer, x = layer.clone(dtype=jnp.bfloat16), normal(0, (4, 16, 16, 8), jnp.bfloat16)
    errors = gradient_error(layer, x)
    assert max(errors.values()) < 1e-6
    with reduce_gradients_in("bfloat16"):
        rounded = gradient_error(layer, x)
    assert 1e-4 < rounded["kernel"] < 2**-8 and rounded["bias"] == errors["bias"]


@pytest.mark.parametrize("name", ["1b", "10b"])
def test_no_gradient_is_summed_over_samples_or_tokens_in_bfloat16(steps, name):
    sums = re.findall(r"stablehlo\.reduce\(.*applies stablehlo\.add .*", steps(name, "bfloat16"))
    scatters = re.findall(r'"stablehlo\.scatter".*', steps(name, "bfloat16"))
    assert sums
    assert [line for line in (*sums, *scatters) if "bf16>" in line] == []


def test_the_gradient_of_t5s_relative_positions_is_summed_in_float32():
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = jnp.arange(64).reshape(2, 32)
    gradients = []
    for dtype in ("bfloat16", "float32"):
        model = T5Encoder(T5Config(**sizes, dtype=dtype))
        program = with_gradients(model, tokens, jnp.ones((2, 32), bool))
        gradients.append([line for line in program.splitlines() if "stablehlo.scatter" in line])
    assert gradients[0] and not any("bf16" in line for line in gradients[0])


# --- collectives -------------------------------------------------------------------------------------------------


def collectives(function, *arguments, folder):
    """Lists (kind, type, shape, name) of collectives after SPMD partitioning, before the CPU compiler widens them."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    jax.jit(function).lower(*arguments).compile(compiler_options=options)
    [file] = folder.glob("*after_spmd-partitioning*")
    line = re.compile(r"= (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|reduce-scatter)\(.*op_name=\"([^\"]*)\"")
    return [(kind, dtype, shape, name) for dtype, shape, kind, name in line.findall(file.read_text())]


LAYERS = {
    "dense": (Dense(32, ("embed", "mlp"), dtype=jnp.bfloat16), (16, 8, 64)),
    "convolution": (Conv(32, ("embed", "conv_out"), dtype=jnp.bfloat16), (16, 8, 8, 64)),
}


def gradient_program(layer, shape, mesh):
    """Returns the gradient function of a layer's parameters and its sharded abstract arguments."""
    params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(shape)))
    stored = {"kernel": PartitionSpec(*[None] * (len(shape) - 3), "fsdp", "tensor"), "bias": PartitionSpec("fsdp")}
    if isinstance(layer, Conv):
        stored["kernel"] = PartitionSpec(None, None, "fsdp")

    def place(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = {"params": {name: place(x, stored[name]) for name, x in params["params"].items()}}
    x = place(jax.ShapeDtypeStruct(shape, jnp.bfloat16), PartitionSpec(("data", "fsdp")))

    def loss(params, x):
        return jnp.sum(jnp.square(layer.apply(params, x).astype(jnp.float32)))

    def gradient(params, x):
        with nn.logical_axis_rules(ShardingRules().pairs()):
            return jax.grad(loss)(params, x)

    return gradient, (params, x)


@pytest.mark.parametrize("reduction", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_are_gathered_in_bfloat16_and_their_gradients_reduced_as_asked(layer, reduction, tmp_path):
    mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    gradient, arguments = gradient_program(*LAYERS[layer], mesh)
    with jax.set_mesh(mesh), reduce_gradients_in(reduction):
        sent = collectives(gradient, *arguments, folder=tmp_path)
    large = [one for one in sent if one[2].count(",")]  # kernels, not biases
    gathered = [dtype for kind, dtype, _, _ in large if kind == "all-gather"]
    reduced = [(dtype, shape, name) for kind, dtype, shape, name in large if kind == "all-reduce"]
    assert gathered and set(gathered) == {"bf16"}
    assert {dtype for dtype, _, _ in reduced} == {{"float32": "f32", "bfloat16": "bf16"}[reduction]}
    assert all("/gradient_reduction/" in name for _, _, name in reduced)
    # First a reduction over fsdp, then one over data of the quarter that each of the four devices keeps.
    sizes = sorted(np.prod([int(size) for size in shape.split(",")]) for _, shape, _ in reduced)
    assert len(sizes) == 2 and sizes[1] == 4 * sizes[0]
    biases = {dtype for kind, dtype, shape, _ in sent if kind == "all-reduce" and "," not in shape and shape}
    assert biases == {"f32"}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_bytes_of_gradient_reductions_are_read_from_the_program(layer):
    mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    gradient, arguments = gradient_program(*LAYERS[layer], mesh)
    with jax.set_mesh(mesh):
        cost = cost_of(jax.jit(gradient).lower(*arguments).compile().as_text())
    weights = sum(x.size for x in jax.tree.leaves(arguments[0]))
    assert list(cost.gradient_reductions) == ["f32"]
    # The kernel is all-reduced over fsdp and a quarter of it over data, 4 bytes per element, each counted twice (reduce
    # and gather); a bias is all-reduced once over both.
    kernel = arguments[0]["params"]["kernel"].size
    assert cost.gradient_reductions["f32"] == pytest.approx(2 * 4 * (1.25 * kernel + weights - kernel), rel=0.01)
    assert cost.messages["all-reduce"] == pytest.approx(cost.gradient_reductions["f32"], rel=0.05)


@pytest.mark.parametrize(("policy", "products"), [("nothing_saveable", 4), ("dots_with_no_batch_dims_saveable", 3)])
def test_products_are_recomputed_only_where_the_policy_says(policy, products):
    """Counts a block's forward product and two gradient products in a scan of five blocks, and one more with remat."""
    x, kernels = normal(0, (32, 64)), normal(1, (5, 64, 64))

    @functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=False)
    def block(x, kernel):
        return jnp.tanh(matmul(x, kernel, ("embed", "mlp"))), None

    gradient = jax.jit(jax.grad(lambda x, kernels: jnp.sum(jax.lax.scan(block, x, kernels)[0]), argnums=(0, 1)))
    flops = cost_of(gradient.lower(x, kernels).compile().as_text()).flops
    assert flops == pytest.approx(5 * products * 2 * 32 * 64 * 64, rel=0.01)
