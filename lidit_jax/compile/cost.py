"""Cost of a compiled program from its HLO text: FLOPs, memory traffic and communication, with loops' trip counts.

XLA's own cost analysis counts a loop's body once, which is meaningless for blocks under a scan.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from lidit_jax.compile.hlo import (
    Instruction,
    Module,
    arrays,
    bytes_by_dtype,
    hbm_bytes,
    own_scope,
    places,
    result_shape,
    scope_of,
    stored_bytes,
    target_of,
)
from lidit_jax.compile.operation_flops import attention_flops, convolution_flops, dot_flops
from lidit_jax.parallel.rules import GRADIENT_SCOPE

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_REDUCTIONS = ("all-reduce", "reduce-scatter")
# Custom calls of the TPU compiler that compute nothing.
_NO_KERNELS = frozenset(("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
                         "AssumeGatherIndicesInBound"))  # fmt: skip
# Instructions that only name existing data, without memory traffic.
_FREE = frozenset(("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"))


class Operation(NamedTuple):
    """Kind and origin of an instruction; the costs of equal ones are added up.

    Attributes:
      scope: modules and functions that it was traced in, such as "jit(step)/jvp(LIDiT)/dit/…"; "" if the compiler added
        it.
      opcode: HLO opcode.
      shape: shape of its result, without the layout.
    """

    scope: str
    opcode: str
    shape: str


@dataclasses.dataclass
class Cost:
    """Cost of one run of a program on one device.

    Attributes:
      flops: FLOPs of matrix products and convolutions, two for each multiply-add.
      bytes: bytes of HBM read and written by instructions that are not fused into others; for slices of larger arrays,
        those of the slice. Arrays that the compiler keeps in the chip's own memory are not in HBM.
      messages: bytes communicated by a chip, by collective: the result of an all-gather, the operand of a
        reduce-scatter, twice the size of an all-reduce.
      gradient_reductions: bytes of `messages` that reduce gradients of weights and biases, by dtype ("f32").
      kernels: custom calls whose FLOPs can't be read from the text, by target (those of the attention kernel can).
      unknown_loops: number of loops with an unknown trip count; their bodies are counted once.
      operation_flops: `flops` by operation.
      operation_bytes: `bytes` by operation.
    """

    flops: float = 0.0
    bytes: float = 0.0
    messages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    gradient_reductions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unknown_loops: int = 0
    operation_flops: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    operation_bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds another cost in place, multiplied by `times`."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for field in ("messages", "gradient_reductions", "kernels", "operation_flops", "operation_bytes"):
            mine = getattr(self, field)
            for name, count in getattr(other, field).items():
                mine[name] += times * count
        self.unknown_loops += other.unknown_loops

    def within(self, scope: str) -> "Cost":
        """Returns a copy whose operations without a scope, such as those inside of a fusion, are of the given one."""
        operations: dict[str, collections.Counter] = {}
        for field in ("operation_flops", "operation_bytes"):
            operations[field] = collections.Counter()
            for operation, count in getattr(self, field).items():
                operations[field][operation if operation.scope else operation._replace(scope=scope)] += count
        return dataclasses.replace(self, **operations)


def cost_of(text: str) -> Cost:
    """Returns the cost of a module.

    Args:
      text: HLO text, as from `Compiled.as_text()`.
    """
    return Costs(Module(text)).total()


class Costs:
    """Costs of the instructions and computations of a module.

    Attributes:
      module: the program.
    """

    def __init__(self, module: Module):
        self.module = module
        self._known: dict[tuple[str, bool], Cost] = {}

    def total(self) -> Cost:
        """Returns the cost of one run of the program."""
        return self.of_computation(self.module.entry, False)

    def of_computation(self, name: str, fused: bool) -> Cost:
        """Returns the cost of a computation; `fused` if it is part of a fusion, whose inside has no HBM traffic."""
        if (name, fused) not in self._known:
            total = Cost()
            for instruction in self.module.computations.get(name, {}).values():
                cost, times = self.of_instruction(instruction, self.module.computations[name], fused)
                total.add(cost.within(scope_of(instruction, self.module.computations[name])), times)
            self._known[name, fused] = total
        return self._known[name, fused]

    def of_instruction(
        self, instruction: Instruction, computation: dict[str, Instruction], fused: bool
    ) -> tuple[Cost, int]:
        """Returns the cost of an instruction and how often it counts."""
        if instruction.opcode == "while":
            trips = self.module.trips(instruction, computation)
            cost = dataclasses.replace(Cost(), unknown_loops=int(trips is None))
            cost.add(self.of_computation(instruction.called("body"), fused), 1 if trips is None else trips)
            return cost, 1
        if instruction.opcode == "conditional":
            costs = (self.of_computation(name, fused) for name in self.module.branches(instruction))
            return max(costs, key=lambda cost: (cost.flops, cost.bytes)), 1
        cost = Cost()
        if instruction.opcode in ("call", "async-start"):
            cost.add(self.of_computation(instruction.called("to_apply") or instruction.called("calls"), fused))
            return cost, 1
        if instruction.opcode == "fusion":
            name = instruction.called("calls") or ""
            cost.add(self.of_computation(name, True))
            if "all-reduce-scatter" in name:  # XLA fused an all-reduce and a slice into a reduce-scatter
                cost.messages = collections.Counter({"reduce-scatter": cost.messages["all-reduce"] // 2})
                halves = {kind: count // 2 for kind, count in cost.gradient_reductions.items()}
                cost.gradient_reductions = collections.Counter(halves)
            elif self.continues_collective(instruction):
                cost.messages, cost.gradient_reductions = collections.Counter(), collections.Counter()
        if instruction.opcode == "dot":
            cost.flops = dot_flops(instruction, computation)
        if instruction.opcode == "convolution":
            cost.flops = convolution_flops(instruction, computation)
        if instruction.opcode == "custom-call":
            target = target_of(instruction)
            if target in _NO_KERNELS:
                return cost, 1
            cost.flops = attention_flops(instruction, computation)
            if not cost.flops:
                cost.kernels[target] += 1
        if cost.flops and instruction.opcode != "fusion":
            cost.operation_flops[operation_of(instruction)] = cost.flops
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            shapes = [result_shape(instruction)]
            if kind == "reduce-scatter":
                shapes = [computation[name].shape for name in instruction.operands if name in computation]
            for dtype, size in bytes_by_dtype(shapes).items():
                size *= 2 if kind == "all-reduce" else 1
                cost.messages[kind] += size
                if kind in _REDUCTIONS and f"/{GRADIENT_SCOPE}/" in instruction.attributes:
                    cost.gradient_reductions[dtype] += size
        if not fused and instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            traffic = self._traffic(instruction, computation)
            cost.bytes += traffic
            cost.operation_bytes[operation_of(instruction)] += traffic
        return cost, 1

    def continues_collective(self, fusion: Instruction) -> bool:
        """Returns True if a fusion continues or ends an asynchronous collective, which each of its fusions repeats."""
        targets = self.module.custom_calls(fusion)
        return "AsyncCollectiveDone" in targets or (
            (fusion.called("calls") or "").startswith("async_collective_fusion")
            and "AsyncCollectiveStart" not in targets
        )

    def _traffic(self, instruction: Instruction, computation: dict[str, Instruction]) -> int:
        """Returns the bytes of HBM that an instruction reads and writes."""
        shapes = [computation[name].shape if name in computation else "" for name in instruction.operands]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return stored_bytes(instruction.shape) * bool(hbm_bytes(shapes[0])) + hbm_bytes(instruction.shape)
        if instruction.opcode in ("copy-start", "slice-start"):
            ends = list(places(instruction.shape))[:2]  # destination and source, in either order
            return min(size for size, _ in ends) * sum(in_hbm for _, in_hbm in ends)
        if instruction.opcode == "dynamic-update-slice":
            return hbm_bytes(shapes[1]) + stored_bytes(shapes[1]) * bool(hbm_bytes(instruction.shape))
        inside = self.module.computation(instruction) if instruction.opcode == "fusion" else {}
        written = sum(_written_sizes(instruction, inside))
        read = 0
        for number, shape in enumerate(shapes):
            size = hbm_bytes(shape)
            sliced = self._sliced_bytes(inside, number) if inside and size else None
            read += size if sliced is None else min(size, sliced)
        return read + written

    def _sliced_bytes(self, inside: dict[str, Instruction], number: int) -> int | None:
        """Returns the bytes that a fusion reads of a parameter that it only slices; None if it reads all of it."""
        [name] = [i.name for i in inside.values() if i.opcode == "parameter" and i.operands == (str(number),)] or [None]
        users = [i for i in inside.values() if name in i.operands and i.opcode != "parameter"]
        total = 0
        for user in users:
            is_updated = user.opcode == "dynamic-update-slice" and user.operands[0] == name  # in place: nothing is read
            if is_updated or (user.opcode == "tuple" and user.is_root):
                continue
            if user.opcode == "fusion":  # the TPU compiler nests them
                nested = self.module.computation(user)
                sliced = [self._sliced_bytes(nested, i) for i, operand in enumerate(user.operands) if operand == name]
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                sliced = [stored_bytes(user.shape)]
            else:
                return None
            if None in sliced:
                return None
            total += sum(sliced)
        return total if users else None


def _written_sizes(instruction: Instruction, inside: dict[str, Instruction]) -> Iterator[int]:
    """Yields the bytes of HBM that an instruction writes for each of its results; `inside` are those of a fusion.

    Parameters that are passed through are not written, and of a result that is updated in place only the update is.
    """
    results = [size if in_hbm else 0 for size, in_hbm in places(instruction.shape)]
    [root] = [each for each in inside.values() if each.is_root] or [None]
    names = root.operands if root and root.opcode == "tuple" else [root.name] if root else []
    if len(names) != len(results):
        yield sum(results)
        return
    for name, size in zip(names, results, strict=True):
        source = inside.get(name)
        while source and source.opcode == "bitcast":
            source = inside.get(source.operands[0])
        if source and source.opcode == "parameter" and root and root.opcode == "tuple":
            continue
        if source and source.opcode == "dynamic-update-slice" and source.operands[1] in inside:
            size = min(size, stored_bytes(inside[source.operands[1]].shape))
        yield size


def operation_of(instruction: Instruction) -> Operation:
    """Returns the kind and origin of an instruction; its scope is "" if the compiler added it."""
    shapes = [f"{kind}[{','.join(map(str, sizes))}]" for kind, sizes in arrays(instruction.shape)]
    shape = shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"
    return Operation(own_scope(instruction), instruction.opcode, shape)
