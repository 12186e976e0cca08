"""Parses the HLO text of a compiled program: its computations, their instructions, and the sizes of their arrays."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_PLACED_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")  # with its layout
_NAME = re.compile(r"%?([\w.\-]+)")


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


class Module:
    """A compiled program.

    Attributes:
      computations: instructions by name, in the order in which they run, of each computation by its name.
      entry: name of the computation that runs first.
    """

    def __init__(self, text: str):
        """Parses HLO text, as from `Compiled.as_text()`."""
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head and not line.startswith(" "):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif " = " in line and (parsed := parse_instruction(line)):
                current[parsed.name] = parsed

    def computation(self, instruction: Instruction, key: str = "calls") -> dict[str, Instruction]:
        """Returns the computation that attribute `key` of an instruction names; empty if it names none."""
        return self.computations.get(instruction.called(key) or "", {})

    def custom_calls(self, fusion: Instruction) -> set[str]:
        """Returns the targets of the custom calls in a fusion."""
        return {target_of(each) for each in self.computation(fusion).values() if each.opcode == "custom-call"}

    def branches(self, conditional: Instruction) -> list[str]:
        """Returns the names of the computations of which a conditional runs one."""
        found = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
        if found:
            return _NAME.findall(found[1])
        names = (conditional.called(f"{value}_computation") for value in ("true", "false"))
        return [name for name in names if name]

    def trips(self, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
        """Returns the trip count of a loop that counts up to a constant; None for other loops."""
        if found := re.search(r"known_trip_count[^0-9]*(\d+)", loop.attributes):
            return int(found[1])
        condition = self.computation(loop, "condition")
        compares = [instruction for instruction in condition.values() if instruction.opcode == "compare"]
        if len(compares) != 1 or compares[0].called("direction") != "LT":
            return None
        counter, bound = (condition.get(name) for name in compares[0].operands)
        index, end = _index(counter), _constant(bound)
        if index is None or end is None:
            return None
        body = self.computation(loop, "body")
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


def parse_instruction(line: str) -> Instruction | None:
    """Parses a line of HLO text; returns None if it is no instruction."""
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


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the dtype and the dimensions of each array of a shape."""
    for kind, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        yield kind, tuple(int(size) for size in sizes.split(",") if size)


def dims(shape: str) -> tuple[int, ...]:
    """Returns the dimensions of the first array of a shape."""
    return next(arrays(shape))[1]


def hbm_bytes(shape: str) -> int:
    """Returns the size, in whole tiles, of the arrays that are in HBM."""
    return sum(size for size, in_hbm in places(shape) if in_hbm)


def stored_bytes(shape: str) -> int:
    """Returns the size of arrays in whole tiles, whatever memory they are in."""
    return sum(size for size, _ in places(shape))


def places(shape: str) -> Iterator[tuple[int, bool]]:
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


def bytes_by_dtype(shapes: Sequence[str]) -> collections.Counter:
    found: collections.Counter = collections.Counter()
    for shape in shapes:
        for kind, sizes in arrays(shape):
            found[kind] += _BYTES.get(kind, 0) * math.prod(sizes)
    return found


def result_shape(instruction: Instruction) -> str:
    """Returns the shape of a collective's result; a "-start", except an all-reduce's, also lists its operand."""
    found = list(arrays(instruction.shape))
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start" and len(found) > 1:
        kind, sizes = max(found, key=lambda array: _BYTES.get(array[0], 0) * math.prod(array[1]))
        return f"{kind}[{','.join(map(str, sizes))}]"
    return instruction.shape


def own_scope(instruction: Instruction) -> str:
    found = re.search(r'\bop_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def scope_of(instruction: Instruction, computation: dict[str, Instruction]) -> str:
    """Returns an instruction's scope or, if the compiler dropped it, that of the nearest operand that has one."""
    layer, seen = [instruction], set()
    while layer:
        for found in layer:
            if scope := own_scope(found):
                return scope
        names = dict.fromkeys(name for found in layer for name in found.operands if name not in seen)
        seen.update(names)
        layer = [computation[name] for name in names if name in computation]
    return ""


def target_of(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else "?"


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
