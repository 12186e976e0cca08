"""Definitions of the flags that several benchmarks have; each benchmark gives its default and help.

The upper bounds are far beyond what fits a host: they end a mistyped size in one line instead of a failed allocation.
"""

from absl import flags

MAX_SIDE = 65_536  # of an image or tile, in pixels
_MAX_SAMPLES = 1_000_000_000
_MAX_TOKENS = 65_536
_MAX_BATCH = 65_536
_MAX_REPEATS = 1_000_000

# A flag belongs to the benchmark that asks for it, and appears in its --help.
flags.disclaim_key_flags()


def define_batch(default: int | None, text: str) -> flags.FlagHolder:
    """Defines --batch with the help `text`."""
    return flags.DEFINE_integer("batch", default, text, lower_bound=1, upper_bound=_MAX_BATCH)


def define_json() -> flags.FlagHolder:
    """Defines --json."""
    return flags.DEFINE_string("json", None, "JSON file to write the figures to")


def define_weights(text: str) -> flags.FlagHolder:
    """Defines --weights with the help `text`."""
    return flags.DEFINE_string("weights", None, text)


def define_rounds(default: int) -> flags.FlagHolder:
    """Defines --rounds."""
    return define_repeats("rounds", default, "how often each contestant is timed")


def define_repeats(name: str, default: int, text: str) -> flags.FlagHolder:
    """Defines a flag for how often something is timed."""
    return flags.DEFINE_integer(name, default, text, lower_bound=1, upper_bound=_MAX_REPEATS)


def define_dtype(default: str | None, text: str = "compute dtype") -> flags.FlagHolder:
    """Defines --dtype with the help `text`."""
    return flags.DEFINE_enum("dtype", default, ["float32", "bfloat16"], text)


def define_tokens(name: str, default: int, text: str, lowest: int = 1) -> flags.FlagHolder:
    """Defines a flag for a number of tokens."""
    return flags.DEFINE_integer(name, default, text, lower_bound=lowest, upper_bound=_MAX_TOKENS)


def define_side(name: str, default: int | None, text: str, lowest: int = 1) -> flags.FlagHolder:
    """Defines a flag for the side of an image or tile, in pixels."""
    return flags.DEFINE_integer(name, default, text, lower_bound=lowest, upper_bound=MAX_SIDE)


def define_samples(name: str, default: int, text: str, lowest: int = 1) -> flags.FlagHolder:
    """Defines a flag for a number of samples to load."""
    return flags.DEFINE_integer(name, default, text, lower_bound=lowest, upper_bound=_MAX_SAMPLES)
