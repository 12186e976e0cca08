"""Costs read from HLO text, compared with XLA's own count, and with loops that XLA counts once."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lidit_jax.compile import hlo
from lidit_jax.compile.cost import Costs, cost_of
from lidit_jax.compile.hlo import Module
from lidit_jax.compile.schedule import schedule_of
from lidit_jax.parallel.chips import Chip


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def ours_and_xlas(function, *arguments):
    program = compiled(function, *arguments)
    return cost_of(program.as_text()).flops, program.cost_analysis()["flops"]


@pytest.mark.parametrize("equation", ["bik,bkj->bij", "ik,kj->ij", "bhqd,bhkd->bhqk", "ijk,jkl->il"])
def test_matrix_products_are_counted_like_xla_does(equation):
    sizes = {"b": 3, "h": 5, "i": 64, "j": 96, "k": 128, "l": 48, "q": 32, "d": 64}
    left, right = (jnp.ones([sizes[axis] for axis in part]) for part in equation.split("->")[0].split(","))
    ours, theirs = ours_and_xlas(lambda a, b: jnp.einsum(equation, a, b), left, right)
    assert ours == pytest.approx(theirs, rel=0.01) and ours > 1e5


def test_operations_are_counted_by_scope_with_the_trips_of_their_loops():
    weights, x = jnp.ones((7, 64, 64)), jnp.ones((32, 64))

    def run(x, weights):
        with jax.named_scope("first"):
            x = x @ weights[0]
        with jax.named_scope("second"):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    cost = cost_of(compiled(run, x, weights).as_text())
    flops = dict.fromkeys(("first", "second"), 0.0)
    for operation, count in cost.operation_flops.items():
        flops[next(scope for scope in flops if scope in operation.scope)] += count
    one = 2 * 32 * 64 * 64
    assert flops == {"first": one, "second": 7 * one}
    assert sum(cost.operation_bytes.values()) == cost.bytes > 0


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
def test_convolutions_are_counted_like_xla_does(padding, strides, dilation, image_dilation, groups):
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
    # Each iteration reads one of the seven weights, not all of them.
    assert cost.bytes < 7 * 5 * 4 * (64 * 64 + 8 * 32 * 64) + 40 * weights.nbytes


def test_a_loop_with_a_data_dependent_end_is_reported():
    def run(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ x + 1, x)

    cost = cost_of(compiled(run, jnp.ones((16, 16))).as_text())
    assert cost.unknown_loops == 1
    assert cost.flops == pytest.approx(2 * 16**3, rel=0.01)


@pytest.mark.parametrize(("first", "last", "step"), [(0, 20, 1), (5, 10, 1), (0, 20, 2), (3, 20, 4)])
def test_loops_may_have_any_start_and_step(first, last, step):
    def run(x):
        def iteration(carry):
            return carry[0] + step, carry[1] @ carry[1]

        return jax.lax.while_loop(lambda carry: carry[0] < last, iteration, (first, x))[1]

    cost = cost_of(compiled(run, jnp.ones((16, 16))).as_text())
    assert cost.flops == pytest.approx(len(range(first, last, step)) * 2 * 16**3, rel=0.01)


def test_operands_after_comments_are_read():
    line = "  ROOT %f = (f32[8]{0}, /*index=1*/f32[4]{0}) fusion(%a, %b, /*index=2*/%c, %d), kind=kLoop, calls=%x.1"
    parsed = hlo.parse_instruction(line)
    assert parsed.operands == ("a", "b", "c", "d")
    assert (parsed.shape, parsed.is_root, parsed.called("calls")) == ("(f32[8]{0}, f32[4]{0})", True, "x.1")


def test_a_collective_spread_over_several_fusions_is_counted_once():
    """Text of the TPU compiler for an all-gather that overlaps with other work."""
    names = ("async-collective-start.1", "async_collective_fusion.2", "async-collective-done.3")
    marks = ("AsyncCollectiveStart", None, "AsyncCollectiveDone")
    text = ""
    for name, mark in zip(names, marks, strict=True):
        call = f'  %k = f32[8]{{0}} custom-call(%p), custom_call_target="{mark}"\n' if mark else ""
        text += f"%{name} (p: f32[8]) -> f32[64] {{\n  %p = f32[8]{{0}} parameter(0)\n{call}"
        text += "  ROOT %g = f32[64]{0} all-gather(%p), dimensions={0}\n}\n\n"
    text += "ENTRY %main (p: f32[8]) -> f32[64] {\n  %p = f32[8]{0} parameter(0)\n"
    text += "".join(f"  %f{i} = f32[64]{{0}} fusion(%p), kind=kCustom, calls=%{name}\n" for i, name in enumerate(names))
    cost = cost_of(text + "  ROOT %r = f32[64]{0} copy(%f2)\n}\n")
    assert cost.messages == {"all-gather": 64 * 4}
    assert not cost.kernels


def test_communication_is_counted_by_collective():
    mesh = Mesh(jax.devices(), ("x",))
    sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharded)
    gathered = cost_of(compiled(lambda x: x * 2, x, out_shardings=replicated).as_text())
    assert gathered.messages == {"all-gather": 64 * 32 * 4}
    summed = cost_of(compiled(lambda x: x.sum(0), x, out_shardings=replicated).as_text())
    assert summed.messages == {"all-reduce": 2 * 32 * 4}  # an all-reduce counts twice its size
    assert gathered.flops == summed.flops == 0


def test_gradient_reductions_are_read_with_their_dtypes():
    """Text of the TPU compiler: several arrays at once, asynchronous, or fused with a slice."""
    named = 'metadata={op_name="jit(step)/blocks/query/gradient_reduction/dot_general"}'
    text = f"""
%all-reduce-scatter.3 (p: f32[64,32]) -> f32[8,32] {{
  %p = f32[64,32]{{1,0}} parameter(0)
  %r = f32[64,32]{{1,0}} all-reduce(%p), to_apply=%add, {named}
  ROOT %s = f32[8,32]{{1,0}} slice(%r), slice={{[0:8], [0:32]}}
}}

ENTRY %main (p: f32[64,32], q: bf16[16]) -> f32[8,32] {{
  %p = f32[64,32]{{1,0}} parameter(0)
  %q = bf16[16]{{0}} parameter(1)
  %both = (f32[64,32]{{1,0}}, bf16[16]{{0}}) all-reduce-start(%p, %q), to_apply=%add, {named}
  %scattered = bf16[2]{{0}} reduce-scatter(%q), to_apply=%add, {named}
  %activations = bf16[16]{{0}} all-reduce(%q), to_apply=%add, metadata={{op_name="jit(step)/blocks/query/dot_general"}}
  ROOT %f = f32[8,32]{{1,0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
}}
"""
    cost = cost_of(text)
    assert cost.gradient_reductions == {"f32": (2 + 1) * 64 * 32 * 4, "bf16": (2 + 1) * 16 * 2}
    both = 2 * (64 * 32 * 4 + 16 * 2)
    assert cost.messages == {"all-reduce": both + 2 * 16 * 2, "reduce-scatter": 16 * 2 + 64 * 32 * 4}


def test_custom_calls_are_named():
    text = """
ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %k = f32[8,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="x"}
}
"""
    assert cost_of(text).kernels == {"tpu_custom_call": 1}


def bytes_by_opcode(text: str) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    for operation, count in cost_of(text).operation_bytes.items():
        counts[operation.opcode] += count
    return +counts


def test_only_arrays_in_hbm_count_as_traffic():
    """Text of the TPU compiler, which prefetches arrays into the chip's vector memory, S(1)."""
    hbm, vmem = "f32[64,128]{1,0:T(8,128)}", "f32[64,128]{1,0:T(8,128)S(1)}"
    update, row, size = "f32[1,128]{1,0:T(1,128)S(1)}", 128 * 4, 64 * 128 * 4
    text = f"""
%fused (x: f32[64,128], u: f32[1,128]) -> f32[64,128] {{
  %x = {hbm} parameter(0)
  %u = {update} parameter(1)
  %i = s32[] constant(0)
  ROOT %w = {hbm} dynamic-update-slice(%x, %u, %i, %i)
}}

ENTRY %main (p: f32[64,128], i: s32[]) -> f32[64,128] {{
  %p = {hbm} parameter(0)
  %i = s32[] parameter(1)
  %start = ({vmem}, {hbm}, u32[]{{:S(2)}}) copy-start(%p)
  %prefetched = {vmem} copy-done(%start)
  %near = {vmem} exponential(%prefetched)
  %row = {update} dynamic-slice(%near, %i, %i), dynamic_slice_sizes={{1,128}}
  %fetched = {update} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={{1,128}}
  %stored = {hbm} fusion(%p, %row), kind=kLoop, calls=%fused
  ROOT %far = {hbm} add(%near, %stored)
}}
"""
    # Each is read or written once in HBM, a row where only that is touched.
    assert bytes_by_opcode(text) == {"copy-start": size, "dynamic-slice": row, "fusion": row, "add": 2 * size}


def test_arrays_take_whole_tiles_of_hbm():
    """Heads of 64 features fill half of a tile's lanes; with the tokens last they fill all of them."""
    text = """
ENTRY %main (p: bf16[2,1024,44,64]) -> bf16[2,44,64,1024] {
  %p = bf16[2,1024,44,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %e = bf16[2,1024,44,64]{1,3,2,0:T(8,128)(2,1)} exponential(%p)
  ROOT %n = f32[44,100]{1,0:T(8,128)} custom-call(%e), custom_call_target="x"
}
"""
    dense = 2 * 1024 * 44 * 64 * 2
    padded = 2 * 1024 * 48 * 128 * 2
    assert bytes_by_opcode(text) == {"exponential": padded + dense, "custom-call": dense + 48 * 128 * 4}


def test_of_a_stack_that_is_updated_in_place_only_the_update_is_written():
    """Text of the TPU compiler: a fusion writes activations, and saves them for the backward pass; heads fill half."""
    stack, slot = "bf16[48,2,1024,64]{3,2,1,0:T(8,128)(2,1)}", "bf16[1,2,1024,64]{3,2,1,0:T(8,128)(2,1)}"
    text = f"""
%fused (s: bf16[48,2,1024,64], x: bf16[1,2,1024,64], i: s32[]) -> (bf16[48,2,1024,64], bf16[1,2,1024,64]) {{
  %s = {stack} parameter(0)
  %x = {slot} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %e = {slot} exponential(%x)
  %u = {stack} dynamic-update-slice(%s, %e, %i, %z, %z, %z)
  ROOT %t = ({stack}, {slot}) tuple(%u, %e)
}}

ENTRY %main (s: bf16[48,2,1024,64], x: bf16[1,2,1024,64], i: s32[]) -> (bf16[48,2,1024,64], bf16[1,2,1024,64]) {{
  %s = {stack} parameter(0)
  %x = {slot} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = ({stack}, {slot}) fusion(%s, %x, %i), kind=kLoop, calls=%fused
}}
"""
    padded = 2 * 1024 * 128 * 2
    assert bytes_by_opcode(text) == {"fusion": 3 * padded + 4}  # x, its exponential twice, and i


def test_of_a_stack_only_the_slice_is_read_also_by_nested_fusions():
    """Text of the TPU compiler: the product of one layer's activations, which are sliced in a fusion inside of it."""
    text = """
%slice (s: f32[48,16,128], i: s32[]) -> f32[16,128] {
  %s = f32[48,16,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,16,128]{2,1,0} dynamic-slice(%s, %i, %z, %z), dynamic_slice_sizes={1,16,128}
  ROOT %b = f32[16,128]{1,0} bitcast(%d)
}

%product (s: f32[48,16,128], i: s32[], k: f32[128,128]) -> f32[16,128] {
  %s = f32[48,16,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %k = f32[128,128]{1,0} parameter(2)
  %x = f32[16,128]{1,0} fusion(%s, %i), kind=kLoop, calls=%slice
  ROOT %y = f32[16,128]{1,0} dot(%x, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (s: f32[48,16,128], i: s32[], k: f32[128,128]) -> f32[16,128] {
  %s = f32[48,16,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %k = f32[128,128]{1,0} parameter(2)
  ROOT %f = f32[16,128]{1,0} fusion(%s, %i, %k), kind=kOutput, calls=%product
}
"""
    assert bytes_by_opcode(text) == {"fusion": (16 * 128 + 128 * 128 + 16 * 128) * 4 + 4}


CHIP = Chip("of round numbers", flops=1e12, memory=1e9, memory_bandwidth=1e9, network_bandwidth=1e9)
MS = (1 << 20) / 1e9  # seconds in which the memory or the network passes a mebibyte


def schedule(text):
    return schedule_of(Costs(Module(text)), CHIP)


def waits_of(text) -> dict[tuple[str, bool], tuple[float, float]]:
    """Returns the seconds that a chip waits for, and overlaps with, the messages of each kind."""
    found = schedule(text)
    return {
        (message.kind, message.is_asynchronous): (exposed, pytest.approx(found.overlapped[message], abs=1e-9))
        for message, exposed in found.exposed.items()
    }


def program(*lines) -> str:
    """Text of the TPU compiler; the results of collectives are in VMEM, S(1), so that they have no HBM traffic."""
    body = "\n  ".join(lines)
    return f"""
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[262144], y: f32[131072]) -> f32[262144] {{
  %x = f32[262144]{{0:S(1)}} parameter(0)
  %y = f32[131072]{{0}} parameter(1)
  {body}
}}
"""


GATHERED = "f32[262144]{0:S(1)}"  # a mebibyte
HALF_MS = "f32[131072]{0:S(1)}"  # a copy of y from HBM takes half the time of the message


def test_a_blocking_collective_is_waited_for():
    text = program(f"%c = {HALF_MS} copy(%y)", f"ROOT %g = {GATHERED} all-gather(%x), dimensions={{0}}")
    assert waits_of(text) == {("all-gather", False): (pytest.approx(MS), 0)}
    assert schedule(text).seconds == pytest.approx(1.5 * MS)


@pytest.mark.parametrize("copies", [0, 1, 2, 3])
def test_an_asynchronous_collective_is_waited_for_after_what_lies_between_its_start_and_its_end(copies):
    text = program(
        f"%s = (f32[262144]{{0:S(1)}}, {GATHERED}) all-gather-start(%x), dimensions={{0}}",
        *(f"%c{i} = {HALF_MS} copy(%y)" for i in range(copies)),
        f"ROOT %g = {GATHERED} all-gather-done(%s)",
    )
    between = copies * MS / 2
    waits = max(0.0, MS - between)
    assert waits_of(text) == {("all-gather", True): (pytest.approx(waits, abs=1e-9), MS - waits)}
    assert schedule(text).seconds == pytest.approx(max(MS, between))


def test_messages_pass_one_after_another():
    text = program(
        f"%s = (f32[262144]{{0:S(1)}}, {GATHERED}) all-gather-start(%x), dimensions={{0}}",
        f"%t = {GATHERED} collective-permute-start(%x), source_target_pairs={{{{0,1}}}}",
        f"%g = {GATHERED} all-gather-done(%s)",
        f"ROOT %h = {GATHERED} collective-permute-done(%t)",
    )
    assert schedule(text).seconds == pytest.approx(2 * MS)


def test_a_collective_that_the_compiler_spread_over_fusions_ends_with_the_last_one():
    start, middle, end = "async-collective-start.1", "async_collective_fusion.2", "async-collective-done.3"
    text = ""
    for name, mark in ((start, "AsyncCollectiveStart"), (middle, None), (end, "AsyncCollectiveDone")):
        call = f'  %k = f32[8]{{0:S(1)}} custom-call(%p), custom_call_target="{mark}"\n' if mark else ""
        text += f"%{name} (p: f32[262144]) -> f32[262144] {{\n  %p = {GATHERED} parameter(0)\n{call}"
        text += f"  ROOT %g = {GATHERED} all-gather(%p), dimensions={{0}}\n}}\n\n"
    text += program(
        f"%f0 = {GATHERED} fusion(%x), kind=kCustom, calls=%{start}",
        f"%f1 = {GATHERED} fusion(%f0), kind=kCustom, calls=%{middle}",
        f"%c = {HALF_MS} copy(%y)",
        f"ROOT %f2 = {GATHERED} fusion(%f1), kind=kCustom, calls=%{end}",
    )
    assert waits_of(text) == {("all-gather", True): (pytest.approx(MS / 2), MS / 2)}


def test_a_prefetch_runs_beside_computation():
    work = "f32[1024,1024]{1,0:S(1)}"
    product = f"{work} dot(%m, %m), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
    compute = 2 * 1024**3 / CHIP.flops  # twice the time of the prefetch
    text = program(
        f"%m = {work} parameter(2)",
        "%s = (f32[131072]{0:S(1)}, f32[131072]{0}, u32[]{:S(2)}) copy-start(%y)",
        f"%d = {product}",
        f"ROOT %c = {HALF_MS} copy-done(%s)",
    )
    assert schedule(text).seconds == pytest.approx(compute)
    assert not schedule(text).exposed


def test_the_body_of_a_loop_is_run_as_often_as_it_says():
    loop = f"""
%body (p: (s32[], f32[131072])) -> (s32[], f32[131072]) {{
  %p = (s32[], f32[131072]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[131072]{{0}} get-tuple-element(%p), index=1
  %c = {HALF_MS} copy(%v)
  %g = {GATHERED} all-gather(%c), dimensions={{0}}
  ROOT %t = (s32[], f32[131072]{{0}}) tuple(%i, %v)
}}
"""
    text = loop + program(
        "%zero = s32[] constant(0)",
        "%start = (s32[], f32[131072]{0}) tuple(%zero, %y)",
        "ROOT %w = (s32[], f32[131072]{0}) while(%start), condition=%none, body=%body, "
        'backend_config={"known_trip_count":{"n":"4"}}',
    )
    assert waits_of(text) == {("all-gather", False): (pytest.approx(4 * MS), 0)}
    assert schedule(text).seconds == pytest.approx(4 * 1.5 * MS)
