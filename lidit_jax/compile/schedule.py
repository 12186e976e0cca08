"""Estimates the course of a compiled program on one chip: which messages are hidden behind computation."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from lidit_jax.compile.cost import COLLECTIVES, Costs, Operation, operation_of
from lidit_jax.compile.hlo import Instruction, scope_of
from lidit_jax.parallel.chips import Chip

_PREFETCHES = ("copy-start", "slice-start")  # from one memory of the chip to another
_STARTED = (*COLLECTIVES, "async")  # what instructions named "…-start" start
# Instructions that hand on the result of a collective that is still under way.
_HANDS_ON = ("get-tuple-element", "tuple", "bitcast")


class Message(NamedTuple):
    """A collective operation of the program; equal ones are added up.

    Attributes:
      kind: its opcode, such as "all-gather"; of several that the compiler fused, joined by "+".
      is_asynchronous: whether the chip computes between its start and its end.
      operation: its origin and the shape of its result.
    """

    kind: str
    is_asynchronous: bool
    operation: Operation


@dataclasses.dataclass
class Schedule:
    """Estimated course of one run of a program.

    Instructions run in the compiler's order. Each takes the time of its FLOPs or of its HBM traffic, whichever is
    longer, at the chip's peak rates; prefetches and messages run beside them, one after another. A real step takes
    longer.

    Attributes:
      seconds: time of the run.
      exposed: seconds in which the chip waits for a message.
      overlapped: seconds in which a message passes while the chip computes.
    """

    seconds: float = 0.0
    exposed: dict[Message, float] = dataclasses.field(default_factory=dict)
    overlapped: dict[Message, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Schedule", times: int = 1) -> None:
        """Appends another schedule, `times` times."""
        self.seconds += times * other.seconds
        for mine, theirs in ((self.exposed, other.exposed), (self.overlapped, other.overlapped)):
            for message, seconds in theirs.items():
                mine[message] = mine.get(message, 0.0) + times * seconds

    def record(self, message: Message, sending: float, waited: float) -> None:
        """Adds one message that takes `sending` seconds, of which the chip waits for `waited`."""
        waited = min(waited, sending)
        self.exposed[message] = self.exposed.get(message, 0.0) + waited
        self.overlapped[message] = self.overlapped.get(message, 0.0) + sending - waited


class _Flight(NamedTuple):
    """A prefetch or a message that is under way: when it ends, and which message takes how long."""

    end: float
    message: Message | None
    sending: float


def schedule_of(costs: Costs, chip: Chip) -> Schedule:
    """Returns the estimated course of one run of a program.

    Args:
      costs: costs of the program's instructions.
      chip: the chip, with its peak rates.
    """
    return _Scheduler(costs, chip).of_computation(costs.module.entry)


class _Scheduler:
    def __init__(self, costs: Costs, chip: Chip):
        self._costs, self._chip = costs, chip
        self._known: dict[str, Schedule] = {}

    def of_computation(self, name: str) -> Schedule:
        if name not in self._known:
            instructions = self._costs.module.computations.get(name, {})
            self._known[name] = _Run(self, self._costs, self._chip, instructions).schedule
        return self._known[name]


class _Run:
    """Follows the instructions of a computation; `schedule` is the result."""

    def __init__(self, scheduler: _Scheduler, costs: Costs, chip: Chip, instructions: Mapping[str, Instruction]):
        self._scheduler, self._costs, self._chip = scheduler, costs, chip
        self._instructions = dict(instructions)
        self._flights: dict[str, _Flight] = {}
        # When the last HBM transfer and the last message end. Each resource serves one request after another.
        self._memory_end = self._network_end = 0.0
        self.schedule = Schedule()
        for instruction in self._instructions.values():
            self._follow(instruction)

    def _follow(self, instruction: Instruction) -> None:
        module = self._costs.module
        if instruction.opcode == "while":
            trips = module.trips(instruction, self._instructions)
            self.schedule.add(
                self._scheduler.of_computation(instruction.called("body") or ""), 1 if trips is None else trips
            )
        elif instruction.opcode == "conditional":
            branches = [self._scheduler.of_computation(name) for name in module.branches(instruction)]
            self.schedule.add(max(branches, key=lambda branch: branch.seconds))
        elif instruction.opcode == "call":
            self.schedule.add(self._scheduler.of_computation(instruction.called("to_apply") or ""))
        else:
            self._run(instruction)

    def _run(self, instruction: Instruction) -> None:
        cost, _ = self._costs.of_instruction(instruction, self._instructions, fused=False)
        now = self.schedule.seconds
        sending = cost.messages.total() / self._chip.network_bandwidth
        traffic = cost.bytes / self._chip.memory_bandwidth
        if traffic:
            self._memory_end = max(now, self._memory_end) + traffic
        if instruction.opcode in _PREFETCHES:
            self._flights[instruction.name] = _Flight(self._memory_end, None, 0.0)
            return
        done = max(now + cost.flops / self._chip.flops, self._memory_end if traffic else now)
        if sending:
            self._network_end = max(now, self._network_end) + sending
            operation = operation_of(instruction)._replace(scope=scope_of(instruction, self._instructions))
            message = Message("+".join(sorted(cost.messages)), self._is_start(instruction), operation)
            if message.is_asynchronous:
                self._flights[instruction.name] = _Flight(self._network_end, message, sending)
                # What starts a message alone costs no time; a fusion may compute as well.
                self.schedule.seconds = done if instruction.opcode == "fusion" else now
                return
            self.schedule.record(message, sending, self._network_end - now)
            done = max(done, self._network_end)
        flights = [self._flights[name] for name in instruction.operands if name in self._flights]
        for flight in flights:
            if self._is_end(instruction):
                if flight.message:
                    self.schedule.record(flight.message, flight.sending, max(0.0, flight.end - done))
                done = max(done, flight.end)
            elif self._hands_on(instruction):
                self._flights[instruction.name] = flight
        self.schedule.seconds = done

    def _is_start(self, instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":  # other fusions with messages are blocking
            return "AsyncCollectiveStart" in self._costs.module.custom_calls(instruction)
        return instruction.opcode.endswith("-start") and instruction.opcode.removesuffix("-start") in _STARTED

    def _is_end(self, instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":
            return "AsyncCollectiveDone" in self._costs.module.custom_calls(instruction)
        return instruction.opcode.endswith("-done")

    def _hands_on(self, instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":
            return self._costs.continues_collective(instruction)
        return instruction.opcode in _HANDS_ON or instruction.opcode.endswith("-update")
