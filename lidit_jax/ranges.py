"""Ranges of the numbers in dataclasses, stated once: in the annotation of the field.

    @dataclasses.dataclass(frozen=True)
    class TrainConfig:
        steps: Annotated[int, at_least(1)]
        ema_decay: Annotated[float, between(0, 1)] = 0.0

        def __post_init__(self):
            check_ranges(self, "train.")

They are checked in `__post_init__`, so they also hold for values that do not come from a config file, such as
those of published models and of flags. NaN and infinity are in no range.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from lidit_jax.errors import UserError

# Upper bounds of ranges that state none: what int32 and float32 arrays can hold.
LARGEST = {int: 2**31 - 1, float: 3.4e38}
# Smallest magnitude of a number other than 0: float32 arithmetic on accelerators rounds smaller ones to 0.
SMALLEST = 1.2e-38


@dataclasses.dataclass(frozen=True)
class Range:
    """One bound of a number, or both.

    Attributes:
      words: the range in words, to follow "must be".
      contains: number -> True if it is in the range; False for NaN.
      has_upper_bound: False if a number in the range may be arbitrarily large.
    """

    words: str
    contains: Callable[[float], bool]
    has_upper_bound: bool = True


def at_least(low: float) -> Range:
    return Range(f"at least {low}", lambda number: number >= low, has_upper_bound=False)


def above(low: float) -> Range:
    return Range(f"above {low}", lambda number: number > low, has_upper_bound=False)


def at_most(high: float) -> Range:
    return Range(f"at most {high}", lambda number: number <= high)


def below(high: float) -> Range:
    return Range(f"below {high}", lambda number: number < high)


def between(low: float, high: float) -> Range:
    return Range(f"from {low} to {high}", lambda number: low <= number <= high)


Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
# Axes of arrays (widths, heads, tokens, rows) and numbers of blocks. Larger values are mistakes, with which tracing or
# allocating a model would not end.
Size = Annotated[int, at_least(1), at_most(2**20)]
Blocks = Annotated[int, at_least(1), at_most(1000)]
BlocksOrZero = Annotated[int, at_least(0), at_most(1000)]
Finite = Annotated[float, between(-LARGEST[float], LARGEST[float])]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]
Epsilon = Annotated[float, above(0), at_most(1)]
# Weight of a term of the loss, or of one choice among several.
Weight = Annotated[float, between(0, 1e6)]
Share = Annotated[float, between(0, 1)]


def check_ranges(config: Any, prefix: str) -> None:
    """Checks all numbers of a dataclass whose annotations have ranges, also those in tuples and mappings.

    Args:
      config: instance of the dataclass.
      prefix: what precedes a field's name in messages, such as "train.".

    Raises:
      UserError: a number is out of its range, or is no number.
    """
    for name, hint in _annotations(type(config)).items():
        check_value(f"{prefix}{name}", getattr(config, name), hint)


def check_value(key: str, value: Any, hint: Any) -> None:
    """Raises UserError if a value is not in the range of an annotation, such as `Count` or `tuple[Size, ...]`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check_number(key, value, *options)
    elif origin in (typing.Union, types.UnionType):
        for option in options if value is not None else ():
            check_value(key, value, option)
    elif options and isinstance(value, Mapping):
        for name, entry in value.items():
            check_value(f"{key}.{name}", entry, options[-1])
    elif options and isinstance(value, Sequence) and not isinstance(value, str):
        for index, entry in enumerate(value):
            check_value(f"{key}[{index}]", entry, options[0])


def _check_number(key: str, value: Any, kind: type, *ranges: Range) -> None:
    is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise UserError(f"{key}={value!r:.80} must be {'an integer' if kind is int else 'a number'}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} must be a finite number")
    if 0 < abs(value) < SMALLEST:
        raise UserError(f"{key}={value} must be 0 or at least {SMALLEST} in magnitude")
    if not any(bound.has_upper_bound for bound in ranges):
        ranges = *ranges, at_most(LARGEST[kind])
    if violated := [bound.words for bound in ranges if not bound.contains(value)]:
        raise UserError(f"{key}={value!r:.80} must be {' and '.join(violated)}")


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)
