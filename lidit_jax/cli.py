"""Shared code of the command lines: common flags, and user errors as one line and exit code 2.

A command imports what takes long (JAX, TensorFlow, transformers) in its `main`, after the flags are parsed: `--help`
and a misspelt flag answer at once.
"""

import gc
import logging
import math
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.config import expand_home, find_config, load_config, near
from lidit_jax.errors import UserError, describe_system_error, one_line
from lidit_jax.parallel.preemption import Preempted, end_process, interruptible

USER_MISTAKE = 2

# Names that other programs give to flags of these commands.
_OTHER_NAMES = {
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "n": "num_images",
    "num_samples": "num_images",
    "num_inference_steps": "steps",
    "output": "out",
    "output_dir": "out",
    "prompts": "prompts_file",
    "checkpoint": "workdir",
}
STARTED = time.monotonic()  # about when the command did
_FREE_TEXT = ("prompt", "negative_prompt")  # flags whose value is never a path
_HELP = ("help", "h", "helpshort", "helpfull")
_OVERRIDE = re.compile(r"--?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_overrides: dict[str, str] = {}  # values of --config.path.to.key, by key

# Flags defined here belong to the command line that asks for them, and appear in its --help.
flags.disclaim_key_flags()


def run(main: Callable[[], None], resumable: bool = False) -> None:
    """Parses the flags and calls `main`.

    A UserError, and a failure of the system such as a full disk, ends the process with exit code 2, SIGTERM and Ctrl-C
    with 143 and 130, a closed output (`… | head`) with 141, as in other programs. Any other exception is raised or, in
    a distributed run, written to a file before the process leaves the run with exit code 1.

    Args:
      main: the command.
      resumable: whether the same command resumes; SIGTERM and Ctrl-C then end it with exit code 0.
    """

    def guarded(argv: Sequence[str]) -> None:
        del argv  # `_parse` leaves nothing
        _set_up_logging()
        from lidit_jax.parallel.host_memory import keep_freed_memory

        keep_freed_memory()
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:
            _leave_closed_output()
            raise
        except UserError as error:
            (_end if describe_system_error(error) else _exit)(str(error))
        except Exception as error:
            if reason := describe_system_error(error):
                _end(reason)
            if not _is_distributed():
                raise
            from lidit_jax.parallel.hosts import leave_with_trace

            leave_with_trace(error, _workdir())

    # Python's tracker of shared memory, a process of its own, would warn of that of killed workers after the last line.
    warnings = filter(None, (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"))
    os.environ["PYTHONWARNINGS"] = ",".join(warnings)
    # transformers would advise to install PyTorch, which only exports and scores need: they say so themselves.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with interruptible():
            app.run(guarded, flags_parser=_parse)
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        status = 0 if resumable else 128 + stop.signal
        if not _is_distributed():
            end_process(status)
        sys.exit(status)
    finally:
        gc.freeze()  # or Python's last collection walks through all objects of JAX and TensorFlow, for seconds


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines --config=FILE.py[:ARGUMENT] or --config=NAME[:ARGUMENT]; --config.path.to.key=value sets a field.

    Args:
      default: default config, by its name.
    """
    return flags.DEFINE_string(
        "config",
        default,
        "config file, or the name of one in configs/, such as shapes, with its argument after a colon; "
        "--config.SECTION.FIELD=VALUE changes a field",
    )


def define_num_images(default: int, text: str) -> flags.FlagHolder:
    """Defines --num_images with the help `text`."""
    return flags.DEFINE_integer("num_images", default, text, lower_bound=1, upper_bound=1_000_000)


def define_sampling() -> Callable[[], dict[str, Any]]:
    """Defines the flags of commands that sample images.

    Returns:
      A function that returns the flags' values as keyword arguments of `sample.generate.SamplingOptions`.
    """
    sides = "pixels (default: the training resolution)"
    holders = {
        "height": flags.DEFINE_integer("height", None, sides),
        "width": flags.DEFINE_integer("width", None, sides),
        "steps": flags.DEFINE_integer("steps", None, "sampling steps (default: the config's)"),
        "guidance_scale": flags.DEFINE_float(
            "guidance", None, "classifier-free guidance scale; 1 is none (default: the config's)"
        ),
        "sampler": flags.DEFINE_string("sampler", None, "ddpm, ddim, dpmpp_2m; euler, heun (default: the config's)"),
        "decode_pixels": flags.DEFINE_integer(
            "decode_pixels", None, "pixels decoded at once; larger images are decoded in tiles (default: the config's)"
        ),
        "weights": flags.DEFINE_string("weights", "ema", "ema, or params for the weights without averaging"),
    }
    return lambda: {name: flag.value for name, flag in holders.items()}


def define_moved_weights() -> Callable[[], dict[str, Any]]:
    """Defines --encoder=NAME=FOLDER, which may be repeated, and --vae=FOLDER.

    Returns:
      A function that returns the folders as keyword arguments of `trained_model.load`.
    """
    encoders = flags.DEFINE_multi_string(
        "encoder", [], "NAME=FOLDER of an LLM whose weights are no longer where the run's config says; may be repeated"
    )
    vae = flags.DEFINE_string("vae", None, "folder of the VAE, if it is no longer where the run's config says")

    def parse() -> dict[str, Any]:
        found = {}
        for value in encoders.value:
            name, _, folder = value.partition("=")
            if not (name and folder):
                raise UserError(f"--encoder={value}: give NAME=FOLDER, with the encoder's name in the config")
            found[name] = os.path.expanduser(folder)
        return {"encoders": found, "vae": vae.value}

    return parse


def define_distributed() -> flags.FlagHolder:
    """Defines --distributed, the argument of `hosts.join_hosts`."""
    return flags.DEFINE_bool("distributed", None, "run on several hosts (default: if the environment names several)")


def read_config(holder: flags.FlagHolder) -> ConfigDict:
    """Returns the config that --config names, with the values of the command line.

    Raises:
      UserError: if --config is missing, its file does not exist or fails, or a value does not fit its field.
    """
    from lidit_jax.config_fields import apply_overrides

    if holder.value is None:
        raise UserError("--config is required, for example --config=configs/shapes.py")
    config = load_config(holder.value)
    apply_overrides(config, _overrides)
    expand_home(config)
    return config.lock()


def config_file() -> Path:
    """Returns the file that --config names, without its argument."""
    return find_config(flags.FLAGS["config"].value)[0]


def config_overrides() -> list[str]:
    """Returns the keys that the command line sets, as in --config.train.steps=3."""
    return list(_overrides)


def write_text(text: str) -> None:
    """Writes a text to the standard output, as far as anybody reads it: `| head` stops early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at its exit


def require(name: str) -> str:
    """Returns the value of a required string flag.

    Raises:
      UserError: if it is missing or empty.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is required")
    return value


def require_list(name: str) -> list[str]:
    """Returns the values of a required list flag.

    Raises:
      UserError: if it is missing or empty.
    """
    values = [value.strip() for value in flags.FLAGS[name].value or () if value.strip()]
    if not values:
        raise UserError(f"--{name} is required")
    return values


# --- parsing -------------------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the command line; prints the help or an error, and exits, if it asks for help or has a mistake."""
    program, *words = argv
    if any(word.lstrip("-") in _HELP for word in words if word.startswith("-")):
        write_text(_help(program))
        sys.exit(0)
    try:
        words = list(map(_expand_home, words))
        _check_repeated(words)
        if "config" in flags.FLAGS:
            words = _take_overrides(words)
        _, *rest = flags.FLAGS([program, *words])
        _check_numbers()
        if rest:
            quote = "; if the shell expanded a pattern, quote it" if re.search(r"[./]", rest[0]) else ""
            raise UserError(f"unexpected argument {rest[0]!r}: every option is a flag, --name=value{quote}")
        if "config" in flags.FLAGS and flags.FLAGS["config"].value:
            find_config(flags.FLAGS["config"].value)  # rejects a misspelt name before the heavy imports
    except flags.UnrecognizedFlagError as error:
        _exit(f"unknown flag --{error.flagname}{_flag_hint(program, error.flagname, words)}")
    except (flags.Error, UserError) as error:
        _exit(str(error))
    return [program]


def _take_overrides(words: Sequence[str]) -> list[str]:
    """Moves --config.path.to.key=value, or --config.path.to.key value, to `_overrides`; returns the other words."""
    _overrides.clear()
    others, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*others, word, *rest]
        match = _OVERRIDE.fullmatch(word)
        if not match:
            others.append(word)
            continue
        key, value = match.groups()
        if value is None:
            has_value = rest and (not rest[0].startswith("-") or re.match(r"-[\d.]", rest[0]))
            value = rest.pop(0) if has_value else "true"
        _overrides[key] = value
    return others


def _expand_home(word: str) -> str:
    """Expands `~` in the value of a flag, where shells leave it alone."""
    name, equals, value = word.partition("=")
    if equals and value.startswith("~") and name.lstrip("-") not in _FREE_TEXT:
        return f"{name}={os.path.expanduser(value)}"
    return word


def _check_repeated(words: Iterable[str]) -> None:
    """Raises UserError if a shell has expanded a pattern into several flags: only the last would count."""
    given: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and not _may_be_repeated(name.lstrip("-")):
            given.setdefault(name, []).append(value)
    for name, values in given.items():
        looks_alike = len({re.sub(r"\d+", "0", value) for value in values}) == 1 and re.search(r"[^\d.e+-]", values[0])
        if len(set(values)) > 1 and (name.endswith(".path") or looks_alike):
            raise UserError(
                f"{name} is given {len(values)} times, with {values[0]!r} and {values[-1]!r}: if the shell expanded a "
                f"pattern, quote it: '{name}={_pattern(values)}'"
            )


def _check_numbers() -> None:
    """Raises UserError if a flag is NaN, which no bound of a flag excludes, or infinite."""
    for name, value in flags.FLAGS.flag_values_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} is not a finite number: give one")


def _may_be_repeated(name: str) -> bool:
    return name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag)


def _pattern(values: Sequence[str]) -> str:
    """Returns the brace pattern that a shell may have expanded to these values."""
    first, last = values[0], values[-1]
    start = os.path.commonprefix([first, last])
    start = start.rstrip("0123456789")
    end = os.path.commonprefix([first[len(start) :][::-1], last[len(start) :][::-1]])[::-1].lstrip("0123456789")
    low, high = (value[len(start) : len(value) - len(end)] for value in (first, last))
    if low.isdecimal() and high.isdecimal():
        return f"{start}{{{low}..{high}}}{end}"
    return f"{start}{{{','.join(value[len(start) : len(value) - len(end)] for value in values)}}}{end}"


# --- help and hints ------------------------------------------------------------------------------------------------


def _help(program: str) -> str:
    """Returns the command's description, which has an example, and its flags."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    for flag in _flags_of(program):
        default = "" if flag.value is None or flag.boolean and not flag.value else f" (default: {flag.value})"
        lines.append(f"  --{flag.name}".ljust(20) + f" {flag.help}{default}")
    return "\n".join(lines)


def _flags_of(program: str) -> list[flags.Flag]:
    return sorted(flags.FLAGS.get_key_flags_for_module(program), key=lambda flag: flag.name)


def _flag_hint(program: str, name: str, words: Sequence[str]) -> str:
    """Returns the flag, or the field of the config, that an unknown flag probably stands for."""
    known = [flag.name for flag in _flags_of(program)]
    plain = name.replace("-", "_")
    found = _OTHER_NAMES.get(plain)
    found = found if found in known else near(plain.rpartition(".")[2], known)
    field = next(_config_fields(plain, words), None) if "config" in known and found != plain else None
    if field and (not found or field.endswith(f".{plain}")):
        return f"; did you mean --config.{field}?"
    return f"; did you mean --{found}?" if found else f"; the flags are {', '.join(f'--{flag}' for flag in known)}"


def _config_fields(name: str, words: Sequence[str]) -> Iterator[str]:
    """Yields the fields of this name in the config that a command line names."""
    from lidit_jax.config_fields import find_fields

    default = flags.FLAGS["config"].default
    named = next((word.partition("=")[2] for word in words if re.match("--?config=", word)), default)
    if named:
        yield from find_fields(name, load_config(named))


def _exit(message: str) -> NoReturn:
    print("error: " + one_line(message), file=sys.stderr, flush=True)
    if _is_distributed():
        _leave(USER_MISTAKE)
    sys.exit(USER_MISTAKE)


def _workdir() -> epath.Path | None:
    """Returns the folder of --workdir, if the command has this flag and the folder exists."""
    value = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
    return epath.Path(value) if value and epath.Path(value).exists() else None


def _end(message: str) -> NoReturn:
    """Prints an error as the last line: ends the process without what libraries do, and print, at an orderly exit."""
    print("error: " + one_line(message), file=sys.stderr, flush=True)
    _leave(USER_MISTAKE)


def _leave(status: int) -> NoReturn:
    from lidit_jax.parallel.hosts import leave

    leave(status)


def _is_distributed() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for records that repeat what this program reports itself.

    These are the stack traces of a full disk, which Orbax logs in every thread and then raises, and its warning at
    every save that waits for the one before; see `Checkpoints.save`.
    """
    if str(record.msg).startswith("Waiting for previous save"):
        return False
    return not (record.exc_info and record.exc_info[1] and describe_system_error(record.exc_info[1]))


def _leave_closed_output() -> None:
    """Ends the process without a word if what reads its output has ended, so that nothing can be said."""
    if not hasattr(select, "poll"):  # on Windows
        return
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        os._exit(128 + signal.SIGPIPE)


def _set_up_logging() -> None:
    """Shows warnings only from libraries, whose routine messages would bury the progress line."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().addFilter(_is_news)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lidit_jax")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False
