"""The reader of compiled programs against XLA's own count, and against loops that XLA counts once."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lidit_jax.parallel.hlo import cost_of


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def ours_and_xlas(function, *arguments):
    program = compiled(function, *arguments)
    return cost_of(program.as_text()).flops, program.cost_analysis()["flops"]


@pytest.mark.parametrize("equation", ["bik,bkj->bij", "ik,kj->ij", "bhqd,bhkd->bhqk", "ijk,jkl->il"])
def test_products_are_counted_as_xla_does(equation):
    sizes = {"b": 3, "h": 5, "i": 64, "j": 96, "k": 128, "l": 48, "q": 32, "d": 64}
    left, right = (jnp.ones([sizes[axis] for axis in part]) for part in equation.split("->")[0].split(","))
    ours, theirs = ours_and_xlas(lambda a, b: jnp.einsum(equation, a, b), left, right)
    assert ours == pytest.approx(theirs, rel=0.01) and ours > 1e5


@pytest.mark.parametrize(
    ("padding", "strides", "dilation", "image_dilation", "groups"),
    [
        ("SAME", (1, 1), (1, 1), (1, 1), 1),
        ("VALID", (2, 2), (1, 1), (1, 1), 1),
        (((0, 1), (0, 1)), (2, 2), (1, 1), (1, 1), 1),
        ("SAME", (1, 1), (2, 3), (1, 1), 1),
        (((1, 2), (1, 2)), (1, 1), (1, 1), (2, 2), 1),
        ("SAME", (1, 1), (1, 1), (1, 1), 4),
    ],
)
def test_convolutions_are_counted_as_xla_does(padding, strides, dilation, image_dilation, groups):
    x, kernel = jnp.ones((2, 24, 32, 16)), jnp.ones((3, 3, 16 // groups, 8))

    def run(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, image_dilation, dilation, ("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    ours, theirs = ours_and_xlas(run, x, kernel)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_loops_count_as_often_as_they_run():
    weights, x = jnp.ones((7, 64, 64)), jnp.ones((32, 64))

    def run(x, weights):
        def outer(x, w):
            x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)
            return x, None

        return jax.lax.scan(outer, x, weights)[0]

    cost = cost_of(compiled(run, x, weights).as_text())
    assert cost.unknown_loops == 0
    assert cost.flops == pytest.approx(7 * 5 * 2 * 32 * 64 * 64, rel=0.01)
    # Each turn reads one of the seven weights, not all of them.
    assert cost.bytes < 7 * 5 * 4 * (64 * 64 + 8 * 32 * 64) + 40 * weights.nbytes


def test_a_loop_whose_end_the_data_decide_is_said():
    def run(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ x + 1, x)

    cost = cost_of(compiled(run, jnp.ones((16, 16))).as_text())
    assert cost.unknown_loops == 1
    assert cost.flops == pytest.approx(2 * 16**3, rel=0.01)


def test_messages_are_counted_by_kind():
    mesh = Mesh(jax.devices(), ("x",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=cut)
    gathered = cost_of(compiled(lambda x: x * 2, x, out_shardings=whole).as_text())
    assert gathered.messages == {"all-gather": 64 * 32 * 4}
    summed = cost_of(compiled(lambda x: x.sum(0), x, out_shardings=whole).as_text())
    assert summed.messages == {"all-reduce": 32 * 4}
    assert gathered.flops == summed.flops == 0


def test_custom_calls_are_named():
    text = """
ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %k = f32[8,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="x"}
}
"""
    assert cost_of(text).kernels == {"tpu_custom_call": 1}
