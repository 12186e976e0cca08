"""Cost of a compiled program from its HLO text: FLOPs, memory traffic and communication, with loops' trip counts.

XLA's own cost analysis counts a loop's body once, which is meaningless for blocks under a scan.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lidit_jax.parallel.rules import GRADIENT_SCOPE

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_REDUCTIONS = ("all-reduce", "reduce-scatter")
# Custom calls of the TPU compiler that compute nothing.
_NO_KERNELS = frozenset(("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
                         "AssumeGatherIndicesInBound"))  # fmt: skip
# Instructions that only name existing data, without memory traffic.
_FREE = frozenset(("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"))
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_PLACED_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")  # with its layout
_NAME = re.compile(r"%?([\w.\-]+)")


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


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of the HLO text: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    def called(self, key: str) -> str | None:
        """Returns the name that attribute `key` refers to, such as a computation."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


def cost_of(text: str) -> Cost:
    """Returns the cost of a module.

    Args:
      text: HLO text, as from `Compiled.as_text()`.
    """
    return _Module(text).cost()


class _Module:
    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head and not line.startswith(" "):
                current = self._computations.setdefault(head[2], {})
                self._entry = head[2] if head[1] else self._entry
            elif " = " in line and (parsed := _parse(line)):
                current[parsed.name] = parsed
        self._known: dict[tuple[str, bool], Cost] = {}

    def cost(self) -> Cost:
        return self._cost(self._entry, False)

    def _cost(self, name: str, fused: bool) -> Cost:
        if (name, fused) not in self._known:
            total = Cost()
            for instruction in self._computations.get(name, {}).values():
                cost, times = self._cost_of(instruction, self._computations[name], fused)
                total.add(cost.within(_scope(instruction, self._computations[name])), times)
            self._known[name, fused] = total
        return self._known[name, fused]

    def _cost_of(self, instruction: Instruction, computation: dict[str, Instruction], fused: bool) -> tuple[Cost, int]:
        """Returns the cost of an instruction and how often it counts."""
        if instruction.opcode == "while":
            trips = self._trips(instruction, computation)
            cost = dataclasses.replace(Cost(), unknown_loops=int(trips is None))
            cost.add(self._cost(instruction.called("body"), fused), 1 if trips is None else trips)
            return cost, 1
        if instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = (
                _NAME.findall(branches[1])
                if branches
                else [instruction.called(f"{b}_computation") for b in ("true", "false")]
            )
            return max((self._cost(name, fused) for name in names), key=lambda cost: (cost.flops, cost.bytes)), 1
        cost = Cost()
        if instruction.opcode in ("call", "async-start"):
            cost.add(self._cost(instruction.called("to_apply") or instruction.called("calls"), fused))
            return cost, 1
        if instruction.opcode == "fusion":
            name = instruction.called("calls") or ""
            cost.add(self._cost(name, True))
            if "all-reduce-scatter" in name:  # XLA fused an all-reduce and a slice into a reduce-scatter
                cost.messages = collections.Counter({"reduce-scatter": cost.messages["all-reduce"] // 2})
                halves = {kind: count // 2 for kind, count in cost.gradient_reductions.items()}
                cost.gradient_reductions = collections.Counter(halves)
            elif self._continues_collective(name):
                cost.messages, cost.gradient_reductions = collections.Counter(), collections.Counter()
        if instruction.opcode == "dot":
            cost.flops = _dot_flops(instruction, computation)
        if instruction.opcode == "convolution":
            cost.flops = _convolution_flops(instruction, computation)
        if instruction.opcode == "custom-call":
            target = _target(instruction)
            if target in _NO_KERNELS:
                return cost, 1
            cost.flops = _attention_flops(instruction, computation)
            if not cost.flops:
                cost.kernels[target] += 1
        if cost.flops and instruction.opcode != "fusion":
            cost.operation_flops[_operation(instruction)] = cost.flops
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            shapes = [_result_shape(instruction)]
            if kind == "reduce-scatter":
                shapes = [computation[name].shape for name in instruction.operands if name in computation]
            for dtype, size in _bytes_by_dtype(shapes).items():
                size *= 2 if kind == "all-reduce" else 1
                cost.messages[kind] += size
                if kind in _REDUCTIONS and f"/{GRADIENT_SCOPE}/" in instruction.attributes:
                    cost.gradient_reductions[dtype] += size
        if not fused and instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            traffic = self._traffic(instruction, computation)
            cost.bytes += traffic
            cost.operation_bytes[_operation(instruction)] += traffic
        return cost, 1

    def _continues_collective(self, name: str) -> bool:
        """Returns True if a fusion continues or ends an asynchronous collective, which each of its fusions repeats."""
        targets = {
            _target(instruction)
            for instruction in self._computations.get(name, {}).values()
            if instruction.opcode == "custom-call"
        }
        return "AsyncCollectiveDone" in targets or (
            name.startswith("async_collective_fusion") and "AsyncCollectiveStart" not in targets
        )

    def _trips(self, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
        """Returns the trip count of a loop that counts up to a constant; None for other loops."""
        if found := re.search(r"known_trip_count[^0-9]*(\d+)", loop.attributes):
            return int(found[1])
        condition = self._computations.get(loop.called("condition") or "", {})
        compares = [instruction for instruction in condition.values() if instruction.opcode == "compare"]
        if len(compares) != 1 or compares[0].called("direction") != "LT":
            return None
        counter, bound = (condition.get(name) for name in compares[0].operands)
        index, end = _index(counter), _constant(bound)
        if index is None or end is None:
            return None
        body = self._computations.get(loop.called("body") or "", {})
        steps = [
            _constant(body.get(other))
            for instruction in body.values()
            if instruction.opcode == "add" and instruction.shape.startswith("s32[]") and len(instruction.operands) == 2
            for name, other in (instruction.operands, reversed(instruction.operands))
            if _index(body.get(name)) == index and _constant(body.get(other)) is not None
        ]
        start = computation.get(loop.operands[0])
        first = _constant(computation.get(start.operands[index])) if start and start.opcode == "tuple" else None
        step = steps[0] if len(steps) == 1 else 1  # 1 unless the body shows another step
        return max(0, math.ceil((end - (first or 0)) / step)) if step and step > 0 else None

    def _traffic(self, instruction: Instruction, computation: dict[str, Instruction]) -> int:
        """Returns the bytes of HBM that an instruction reads and writes."""
        shapes = [computation[name].shape if name in computation else "" for name in instruction.operands]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return _bytes(instruction.shape) * bool(_hbm_bytes(shapes[0])) + _hbm_bytes(instruction.shape)
        if instruction.opcode in ("copy-start", "slice-start"):
            places = list(_places(instruction.shape))[:2]  # destination and source, in either order
            return min(size for size, _ in places) * sum(in_hbm for _, in_hbm in places)
        if instruction.opcode == "dynamic-update-slice":
            return _hbm_bytes(shapes[1]) + _bytes(shapes[1]) * bool(_hbm_bytes(instruction.shape))
        written = _hbm_bytes(instruction.shape)
        inside = self._computations.get(instruction.called("calls") or "", {}) if instruction.opcode == "fusion" else {}
        read = 0
        for number, shape in enumerate(shapes):
            size = _hbm_bytes(shape)
            sliced = self._sliced_bytes(inside, number) if inside and size else None
            read += size if sliced is None else min(size, sliced)
        if inside and written:  # parameters passed through are neither read nor written
            written -= sum(_hbm_bytes(inside[name].shape) for name in _returned_parameters(inside))
        updates = [i for i in inside.values() if i.opcode == "dynamic-update-slice" and _bytes(i.shape) == written]
        if updates:  # in place: only the update is written
            written = _bytes(inside[updates[0].operands[1]].shape) if updates[0].operands[1] in inside else written
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
                nested = self._computations.get(user.called("calls") or "", {})
                sliced = [self._sliced_bytes(nested, i) for i, operand in enumerate(user.operands) if operand == name]
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                sliced = [_bytes(user.shape)]
            else:
                return None
            if None in sliced:
                return None
            total += sum(sliced)
        return total if users else None


def _parse(line: str) -> Instruction | None:
    line = re.sub(r"/\*.*?\*/", "", line).strip()  # comments number the operands
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, parenthesis, rest = rest.partition("(")
    if not parenthesis or not re.fullmatch(r"[\w\-]+", opcode):
        return None
    end = _closing("(" + rest) - 1
    inside = rest[: max(end - 1, 0)]
    if opcode == "constant":
        operands: Sequence[str] = (inside,)
    else:
        operands = [match[1] for match in re.finditer(r"(?:^|[,\s])%([\w.\-]+)", inside)] or _NAME.findall(inside)
    return Instruction(name.lstrip("%"), shape, opcode, tuple(operands), rest[end:], line.startswith("ROOT "))


def _closing(text: str) -> int:
    """Returns the position after the parenthesis that closes the first one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return position + 1
    return len(text)


def _arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for kind, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        yield kind, tuple(int(size) for size in sizes.split(",") if size)


def _dims(shape: str) -> tuple[int, ...]:
    return next(_arrays(shape))[1]


def _bytes(shape: str) -> int:
    return sum(_bytes_by_dtype([shape]).values())


def _hbm_bytes(shape: str) -> int:
    return sum(size for size, in_hbm in _places(shape) if in_hbm)


def _places(shape: str) -> Iterator[tuple[int, bool]]:
    """Yields, for every array, its size in bytes and True if it is in HBM.

    T(8,128) in a layout says that the array consists of whole tiles of its two minor axes; S(n) names another memory,
    such as the chip's vector memory (VMEM).
    """
    for kind, sizes, layout in _PLACED_ARRAY.findall(shape):
        dims = [int(side) for side in sizes.split(",") if side]
        found = re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout)
        if found:
            minor_axes, tile = ([int(number) for number in group.split(",")] for group in found.groups())
            for axis, side in zip(minor_axes, reversed(tile), strict=False):
                dims[axis] = -(-dims[axis] // side) * side
        yield _BYTES.get(kind, 0) * math.prod(dims), not re.search(r"S\([1-9]", layout)


def _bytes_by_dtype(shapes: Sequence[str]) -> collections.Counter:
    found: collections.Counter = collections.Counter()
    for shape in shapes:
        for kind, sizes in _arrays(shape):
            found[kind] += _BYTES.get(kind, 0) * math.prod(sizes)
    return found


def _result_shape(instruction: Instruction) -> str:
    """Returns the shape of a collective's result; a "-start", except an all-reduce's, also lists its operand."""
    arrays = list(_arrays(instruction.shape))
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start" and len(arrays) > 1:
        kind, sizes = max(arrays, key=lambda array: _BYTES.get(array[0], 0) * math.prod(array[1]))
        return f"{kind}[{','.join(map(str, sizes))}]"
    return instruction.shape


def _operation(instruction: Instruction) -> Operation:
    shapes = [f"{kind}[{','.join(map(str, sizes))}]" for kind, sizes in _arrays(instruction.shape)]
    shape = shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"
    return Operation(_own_scope(instruction), instruction.opcode, shape)


def _own_scope(instruction: Instruction) -> str:
    found = re.search(r'\bop_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def _scope(instruction: Instruction, computation: dict[str, Instruction]) -> str:
    """Returns an instruction's scope or, if the compiler dropped it, that of the nearest operand that has one."""
    layer, seen = [instruction], set()
    while layer:
        for found in layer:
            if scope := _own_scope(found):
                return scope
        names = dict.fromkeys(name for found in layer for name in found.operands if name not in seen)
        seen.update(names)
        layer = [computation[name] for name in names if name in computation]
    return ""


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else "?"


def _returned_parameters(inside: dict[str, Instruction]) -> list[str]:
    """Returns the names of the parameters that a fusion returns unchanged."""
    roots = [instruction for instruction in inside.values() if instruction.is_root and instruction.opcode == "tuple"]
    return [
        name
        for instruction in roots
        for name in instruction.operands
        if name in inside and inside[name].opcode == "parameter"
    ]


def _index(instruction: Instruction | None) -> int | None:
    """Returns the index of a get-tuple-element; None for other instructions."""
    found = (
        re.search(r"\bindex=(\d+)", instruction.attributes)
        if instruction and instruction.opcode == "get-tuple-element"
        else None
    )
    return int(found[1]) if found else None


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or not instruction.shape.startswith("s32[]"):
        return None
    return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None


def _dot_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    left = _dims(computation[instruction.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(_dims(instruction.shape)) * math.prod(left[axis] for axis in axes)


def _attention_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """Returns the FLOPs of the TPU attention kernel (`models/splash_attention.py`), 0 for any other custom call.

    The kernel is recognised by its name. All of the query-key matrix counts, also under a causal mask, as for XLA's
    attention.
    """
    kernel = re.match(r"splash_mha_(fwd|dkv|dq)_", instruction.name)
    if not kernel:
        return 0.0
    tokens = [
        dims
        for name in instruction.operands
        if name in computation
        for dims in [_dims(computation[name].shape)]
        if len(dims) == 4
    ]
    query, key = tokens[:2]  # [B, H, Lq, D], [B, K, Lk, D]
    # Forward: logits and output. Backward: logits again, and the gradients of weights, values and keys. The gradient of
    # the queries has a kernel of its own ("dq"), or is an output of the fused one for every block of keys, as
    # [B, blocks, H, Lq, D].
    is_fused = any(len(sizes) == len(query) + 1 for _, sizes in _arrays(instruction.shape))
    products = {"fwd": 2, "dkv": 5 if is_fused else 4, "dq": 3}[kernel[1]]
    return 2.0 * products * math.prod(query) * key[2]


def _convolution_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """Returns the FLOPs of a convolution, without products with padding or dilation holes, like XLA."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    shapes = *(computation[name].shape for name in instruction.operands[:2]), instruction.shape
    image, kernel, out = (
        dict(zip(label, _dims(shape), strict=True)) for label, shape in zip(labels.groups(), shapes, strict=True)
    )
    spatial = [label for label in labels[2] if label.isdigit()]
    window = _window(instruction.attributes, len(spatial))
    positions = 1
    for axis, label in enumerate(spatial):
        positions *= _valid_positions(
            image[label], kernel[label], out[label], *(window[name][axis] for name in _WINDOW)
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = image["b"] // (int(groups[1]) if groups else 1)
    return 2.0 * batch * positions * kernel["i"] * kernel["o"]


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _window(attributes: str, rank: int) -> dict[str, list]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in text[1].split()) if text else {}
    window: dict[str, list] = {}
    for name in _WINDOW:
        default = ["0_0" if name == "pad" else "1"] * rank
        values = given[name].split("x") if name in given else default
        window[name] = [int(value.split("_")[0]) for value in values]
    return window


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    image: int, kernel: int, out: int, stride: int, pad: int, image_dilation: int, dilation: int
) -> int:
    """Returns, for one axis, the number of (output, kernel) position pairs that meet a value of the image."""
    outputs = np.arange(out, dtype=np.int64) * stride - pad
    count = 0
    for tap in range(kernel):
        positions = outputs + tap * dilation
        inside = (positions >= 0) & (positions < (image - 1) * image_dilation + 1)
        count += int((inside & (positions % image_dilation == 0)).sum())
    return count
