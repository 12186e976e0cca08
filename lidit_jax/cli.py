"""Shared code of the command lines: common flags, and user errors as one line and exit code 2."""

import gc
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from lidit_jax.errors import UserError
from lidit_jax.parallel.host_memory import keep_freed_memory
from lidit_jax.parallel.hosts import leave, leave_with_trace
from lidit_jax.parallel.preemption import Preempted, interruptible

USER_MISTAKE = 2

# Flags defined here belong to the command line that asks for them, and appear in its --help.
flags.disclaim_key_flags()


def run(main: Callable[[], None], resumable: bool = False) -> None:
    """Parses the flags and calls `main`.

    A UserError ends the process with exit code 2, SIGTERM and Ctrl-C with 143 and 130. Any other exception is raised
    or, in a distributed run, written to a file before the process leaves the run with exit code 1.

    Args:
      main: the command.
      resumable: whether the same command resumes; SIGTERM and Ctrl-C then end it with exit code 0.
    """

    def guarded(argv: Sequence[str]) -> None:
        _set_up_logging()
        keep_freed_memory()
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}: every option is a flag, --name=value")
            main()
        except UserError as error:
            _exit(str(error))
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            leave_with_trace(error, _workdir())

    try:
        with interruptible():
            app.run(guarded, flags_parser=_parse)
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(0 if resumable else 128 + stop.signal)
    finally:
        gc.freeze()  # or Python's last collection walks through all objects of JAX and TensorFlow, for seconds


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines --config=FILE.py[:ARGUMENT], whose values --config.path.to.key=value overrides.

    Args:
      default: default config, as a path in the repository; it is found from any working directory.
    """
    if default and not Path(default).exists():
        default = str(Path(__file__).resolve().parents[1] / default)
    return config_flags.DEFINE_config_file(
        "config", default, "config file, such as configs/shapes.py, with its argument after a colon"
    )


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


def define_moved_encoders() -> Callable[[], dict[str, str]]:
    """Defines --encoder=NAME=FOLDER, which may be repeated.

    Returns:
      A function that returns the folders by name.
    """
    holder = flags.DEFINE_multi_string(
        "encoder", [], "NAME=FOLDER of an LLM whose weights are no longer where the run's config says; may be repeated"
    )

    def parse() -> dict[str, str]:
        found = {}
        for value in holder.value:
            name, _, folder = value.partition("=")
            if not (name and folder):
                raise UserError(f"--encoder={value}: give NAME=FOLDER, with the encoder's name in the config")
            found[name] = folder
        return found

    return parse


def define_distributed() -> flags.FlagHolder:
    """Defines --distributed, the argument of `hosts.join_hosts`."""
    return flags.DEFINE_bool("distributed", None, "run on several hosts (default: if the environment names several)")


def read_config(holder: flags.FlagHolder) -> ConfigDict:
    """Returns the parsed config.

    Raises:
      UserError: if --config is missing, or its file does not exist.
    """
    if holder.value is None:
        raise UserError("--config is required, for example --config=configs/shapes.py")
    try:
        holder.value.keys()  # ml_collections raises for a missing file only on first use
    except OSError:
        raise UserError(f"{flags.FLAGS['config'].config_filename}: no such config file") from None
    return holder.value


def config_file() -> Path:
    """Returns the file that --config names, without its argument."""
    return Path(re.sub(r"(?<=\.py):.*", "", config_flags.get_config_filename(flags.FLAGS["config"])))


def config_overrides() -> list[str]:
    """Returns the keys that the command line sets, as in --config.train.steps=3."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


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


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _exit(_exception_line(str(error)))
    except (KeyError, AttributeError) as error:
        if "config" not in flags.FLAGS:
            raise
        _exit(_unknown_key_message(str(error)))
    except OSError:  # the config file does not exist, and one of its values is overridden
        _exit("the file of --config does not exist: give one of configs/")


def _unknown_key_message(message: str) -> str:
    """Rewords ml_collections' message about a key that the config does not have."""
    suggestion = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message)
    if suggestion:
        return f"config key {suggestion[2]!r} is unknown; did you mean {suggestion[1]!r}?"
    return f"config key {message} is unknown"


def _exception_line(message: str) -> str:
    """Returns the last line of a message that includes a config file's stack trace: the exception raised there."""
    if "Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")


def _exit(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        leave(USER_MISTAKE)
    sys.exit(USER_MISTAKE)


def _workdir() -> epath.Path | None:
    """Returns the folder of --workdir, if the command has this flag and the folder exists."""
    value = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
    return epath.Path(value) if value and epath.Path(value).exists() else None


def _set_up_logging() -> None:
    """Shows warnings only from libraries, whose routine messages would bury the progress line."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.use_absl_handler()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lidit_jax")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False
