"""The report of the compile command, as numbers and as text."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lidit_jax.compile.cost import Cost
from lidit_jax.compile.schedule import Schedule
from lidit_jax.data.buckets import Bucket
from lidit_jax.parallel.chips import Chip

# Part of the program -> pattern of the scopes of its operations; the first that matches. Each encoder is a part.
_PARTS = {
    "encoder {}": r"\btext_encoders/(\w+)",
    "VAE": r"\bvae\b|\bAutoencoderKL\b",
    "refiners": r"\btext_condition\b",
    "DiT": r"\bLIDiT\b",
    "vision tower": r"\bvision_tower\b",
    "output head": r"\boutput_head\b",
    "projector": r"\bLlava\b.*\blinear_[12]\b",
    "LLM": r"\bLlava\b.*\blanguage_model\b",
    "optimiser": r"\boptimizer\b",
}
_OTHERS = "the rest"  # the loss, the gradients' clipping, copies that the compiler added
_DTYPES = {"f32": "float32", "bf16": "bfloat16"}  # names of XLA types


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory and cost of one compiled program on one chip.

    Attributes:
      topology: TPU generation and slice shape, e.g. "v5p:8x8x4".
      what: "train" (one step) or "sample" (one batch of images).
      chip: memory and peak rates of the chip.
      devices: chips in all.
      mesh: axis -> size.
      batch_size: samples on all chips together.
      bucket: size of the images.
      prompt_length: tokens that the prompts are padded to.
      parts: bytes on a chip of the arrays that stay in memory during the step: "weights", "ema", "optimiser", "encoder
        NAME" of each encoder, "VAE" and "batch"; for sampling also "beside", the train state that sampling does not
        read.
      temporaries: bytes; None if the compiler ran out of memory.
      peak: peak memory in bytes; None if the compiler ran out of memory.
      program: bytes of the code; None if the compiler ran out of memory.
      needed: bytes of temporaries requested by XLA when compilation ran out of memory; None if it did not.
      model_flops: model FLOPs of all chips together, without rematerialisation.
      cost: cost of the compiled program on one chip; None if the compiler ran out of memory.
      schedule: estimated course of the program on one chip; None if the compiler ran out of memory.
      seconds: time of lowering and compiling.
      bytes_by_bucket: bucket -> `bytes` of its report, for every compiled bucket.
    """

    topology: str
    what: str
    chip: Chip
    devices: int
    mesh: Mapping[str, int]
    batch_size: int
    bucket: Bucket
    prompt_length: int
    parts: Mapping[str, int]
    temporaries: int | None
    peak: int | None
    program: int | None
    needed: int | None
    model_flops: float
    cost: Cost | None
    schedule: Schedule | None
    seconds: float
    bytes_by_bucket: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Peak memory or, if the compiler ran out of memory, what the program would have needed."""
        return sum(self.parts.values()) + self.needed if self.peak is None else self.peak

    @property
    def fits(self) -> bool:
        """True if the program fits into a chip's memory."""
        # The compiler knows the exact memory of a chip and fails above it, but does not know of the arrays "beside".
        return self.peak is not None and (not self.parts.get("beside") or self.peak <= self.chip.memory)

    @property
    def flops_ratio(self) -> float | None:
        """Compiled FLOPs over model FLOPs; of custom calls, only the attention kernel counts."""
        return self.cost and self.cost.flops * self.devices / self.model_flops

    def bounds(self) -> dict[str, float]:
        """Returns lower bounds on the seconds of a step, by the resource of the chip that sets them.

        The memory traffic is an estimate.
        """
        if self.cost is None:
            return {}
        chip, cost = self.chip, self.cost
        return {
            "compute": cost.flops / chip.flops,
            "memory": cost.bytes / chip.memory_bandwidth,
            "network": cost.messages.total() / chip.network_bandwidth,
        }

    def shares(self) -> dict[str, tuple[float, float]]:
        """Returns the FLOPs and the bytes of HBM traffic of each part of the program on a chip.

        They sum to those of `cost`. A fusion's traffic belongs to the part of its main operation.
        """
        found: dict[str, tuple[float, float]] = {}
        if self.cost is None:
            return found
        for number, counts in enumerate((self.cost.operation_flops, self.cost.operation_bytes)):
            for operation, count in counts.items():
                sums = list(found.get(part := _part(operation.scope), (0.0, 0.0)))
                sums[number] += count
                found[part] = (sums[0], sums[1])
        return dict(sorted(found.items(), key=lambda entry: entry[1], reverse=True))

    def traffic(self, count: int) -> list[str]:
        """Returns lines of text on the operations with the most HBM traffic, the heaviest first.

        Args:
          count: number of operations.
        """
        if self.cost is None:
            return []
        rows = [f"{'GB':>9}  {'share':>5}  operation"]
        for (scope, opcode, shape), size in self.cost.operation_bytes.most_common(count):
            rows.append(f"{size / 1e9:9.2f}  {100 * size / self.cost.bytes:4.1f}%  {opcode} {shape} {scope}")
        return rows

    def collectives(self, count: int) -> list[str]:
        """Returns lines of text on the collective operations that the chip waits for, the longest waits first.

        Args:
          count: number of operations.
        """
        if self.schedule is None:
            return []
        rows = [f"{'waits':>9}  {'overlaps':>9}  collective"]
        exposed, overlapped = self.schedule.exposed, self.schedule.overlapped
        for message in sorted(exposed, key=lambda each: (exposed[each], overlapped[each]), reverse=True)[:count]:
            mode = "asynchronous" if message.is_asynchronous else "blocking"
            seconds = f"{exposed[message]:7.4f} s  {overlapped[message]:7.4f} s"
            rows.append(f"{seconds}  {mode} {message.kind} {message.operation.shape} {message.operation.scope}")
        return rows

    def mfu_bound(self) -> float | None:
        """Returns an upper bound on the MFU: the model FLOPs at the speed of the slowest resource, over the peak."""
        if not self.bounds():
            return None
        return self.model_flops / self.devices / self.chip.flops / max(self.bounds().values())

    def to_json(self) -> dict[str, Any]:
        """Returns all numbers as JSON-serialisable values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["chip"] = dataclasses.asdict(self.chip)
        values["cost"] = self.cost and {
            field.name: getattr(self.cost, field.name)
            for field in dataclasses.fields(Cost)
            if not field.name.startswith("operation_")
        }
        values["schedule"] = self.schedule and {
            "seconds": self.schedule.seconds,
            "exposed": sum(self.schedule.exposed.values()),
            "overlapped": sum(self.schedule.overlapped.values()),
        }
        values["shares"] = {part: {"flops": flops, "bytes": size} for part, (flops, size) in self.shares().items()}
        values |= {"fits": self.fits, "flops_ratio": self.flops_ratio, "bounds": self.bounds()}
        return values | {"mfu_bound": self.mfu_bound()}

    def lines(self) -> list[str]:
        """Returns the report as lines of text."""

        def gb(count: float) -> str:
            return f"{count / 1e9:8.2f} GB"

        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        rows = [
            f"{self.topology}: {self.devices} chips ({mesh}), batch {self.batch_size} of {self.bucket}, prompts of "
            f"{self.prompt_length} tokens, compiled in {self.seconds:.0f} s"
        ]
        if len(self.bytes_by_bucket) > 1:
            rows += ["", "peak memory by bucket"]
            rows += [f"  {bucket:14}{gb(count)}" for bucket, count in self.bytes_by_bucket.items()]
            rows.append(f"  the rest is for {self.bucket}, which needs the most")
        memory = {**self.parts, "temporaries": self.needed if self.peak is None else self.temporaries}
        if self.peak is not None:
            memory |= {"program": self.program, "peak": self.peak}
        width = max(map(len, memory)) + 3
        rows += ["", "a chip's memory"] + [f"  {name:{width}}{gb(count)}" for name, count in memory.items()]
        if self.peak is not None:
            rows[-1] += f" of {self.chip.memory / 1e9:.0f} GB"
        if not self.fits:
            rows.append(f"DOES NOT FIT: {self.advice()}")
        if self.cost is None:
            return rows
        per_chip = self.model_flops / self.devices
        rows += ["", "FLOPs of a chip"]
        rows += [f"  the model's   {per_chip / 1e12:9.2f} T", f"  compiled      {self.cost.flops / 1e12:9.2f} T"]
        rows[-1] += f", {self.flops_ratio:.2f} times the model's"
        rows += ["", f"by part{'FLOPs':>26}{'HBM traffic':>24}"]
        for part, (flops, size) in self.shares().items():
            share = 100 * flops / max(self.cost.flops, 1)
            rows.append(
                f"  {part:16}{flops / 1e12:9.2f} T {share:5.1f} %{gb(size):>16} {100 * size / self.cost.bytes:5.1f} %"
            )
        if self.cost.messages:
            rows += ["", "communication of a chip"] + [
                f"  {kind:18}{gb(count)}" for kind, count in sorted(self.cost.messages.items())
            ]
        if self.cost.gradient_reductions:
            reduced = sorted(self.cost.gradient_reductions.items())
            reduced = ", ".join(f"{count / 1e9:.2f} GB in {_DTYPES.get(name, name)}" for name, count in reduced)
            rows.append(f"  of which gradient reductions: {reduced}")
        rows += ["", f"{'a step' if self.what == 'train' else 'a batch of images'} takes at least"]
        rows += [f"  {seconds:7.3f} s for {name}" for name, seconds in self.bounds().items()]
        rows.append(f"  so the MFU is at most {100 * self.mfu_bound():.0f} %")
        rows += self._schedule_lines()
        if self.cost.kernels or self.cost.unknown_loops:
            kernels = ", ".join(f"{name}: {count}" for name, count in self.cost.kernels.items())
            rows.append(
                f"not counted: custom calls ({kernels or 'none'}), iterations of {self.cost.unknown_loops} loops "
                "after the first"
            )
        return rows

    def _schedule_lines(self) -> list[str]:
        """Returns lines on the step in the compiler's order of instructions, and on the messages in it."""
        if self.schedule is None or not self.schedule.seconds:
            return []
        per_chip = self.model_flops / self.devices / self.chip.flops
        rows = [
            f"one instruction after another, each at the chip's peak rates: {self.schedule.seconds:.3f} s, an MFU of "
            f"{100 * per_chip / self.schedule.seconds:.0f} %"
        ]
        sums: dict[tuple[str, bool], list[float]] = {}
        for message, exposed in self.schedule.exposed.items():
            both = sums.setdefault((message.kind, message.is_asynchronous), [0.0, 0.0])
            both[0] += exposed
            both[1] += self.schedule.overlapped[message]
        for (kind, is_asynchronous), (exposed, overlapped) in sorted(sums.items()):
            mode = "asynchronous" if is_asynchronous else "blocking"
            rows.append(f"  {mode} {kind}: waits for {exposed:.3f} s, overlaps with {overlapped:.3f} s of computation")
        return rows

    def advice(self) -> str:
        """Returns a suggestion of what would fit, as far as that is known without compiling again."""
        kept = sum(self.parts.values())
        room = self.chip.memory - kept
        temporaries = self.temporaries if self.needed is None else self.needed
        if room <= 0:
            return f"weights and optimiser alone take {kept / 1e9:.1f} GB: use more chips, or a larger fsdp axis"
        factor = 2 ** math.ceil(math.log2(max(2.0, temporaries / (0.9 * room))))
        lacking = f"temporaries of {temporaries / 1e9:.1f} GB where {room / 1e9:.1f} GB are left: try "
        if self.what == "sample":
            fewer = f"--config.sample.batch_size={self.batch_size // factor}, " if self.batch_size >= factor else ""
            return f"{lacking}{fewer}a smaller --config.sample.decode_pixels, or a larger fsdp axis"
        return (
            f"{lacking}--config.train.accumulate={factor} (times what it is), --config.model.remat=full, or {factor} "
            "times as many chips"
        )


class SearchTable:
    """Table of the reports on several rematerialisation policies, printed row by row as they are compiled."""

    HEADER = (
        f"{'policy':12}{'peak':>10}  {'fits':4}{'FLOPs':>8}{'compute':>10}{'memory':>10}{'network':>10}  MFU at most"
    )

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}

    def add(self, policy: str, report: Report) -> str:
        """Adds a report, and returns its row: peak, compiled FLOPs over the model's, and lower bounds of the time."""
        self.reports[policy] = report
        row = f"{policy:12}{report.bytes / 1e9:7.1f} GB  {'yes' if report.fits else 'no':4}"
        mfu = report.mfu_bound()
        if mfu is None:
            return row
        seconds = "".join(f"{bound:8.3f} s" for bound in report.bounds().values())
        return f"{row}{report.flops_ratio:8.2f}{seconds}{100 * mfu:9.0f} %"

    def best(self) -> str | None:
        """Returns the policy with the highest bound on the MFU among those that fit; None if none does."""
        fitting = {policy: report.mfu_bound() or 0.0 for policy, report in self.reports.items() if report.fits}
        return max(fitting, key=fitting.__getitem__) if fitting else None


def _part(scope: str) -> str:
    for part, pattern in _PARTS.items():
        if found := re.search(pattern, scope):
            return part.format(*found.groups())
    return _OTHERS


def worst(reports: Sequence[Report]) -> Report:
    """Returns the report of the bucket that needs the most memory, with every bucket's memory and the total time."""
    largest = max(reports, key=lambda report: (not report.fits, report.bytes))
    return dataclasses.replace(
        largest,
        seconds=sum(report.seconds for report in reports),
        bytes_by_bucket={str(report.bucket): report.bytes for report in reports},
    )
