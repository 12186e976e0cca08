"""The exception for mistakes that users can correct, and the system's errors in one line."""

import errno
import os
import re
import traceback
from collections.abc import Iterator

# Numbers of errors that retrying can't fix, what they are called where a library wraps them, and what to do. A broken
# connection is not one of them.
_DISK_ERRORS = (
    (
        (errno.ENOSPC, errno.EDQUOT),
        re.compile(
            "no space left on device|quota exceeded|ENOSPC|EDQUOT|not enough free space|"  # the last one is NumPy's
            r"RESOURCE_EXHAUSTED(?!.*no space left).*writ(?:e|ing)",
            re.I | re.S,
        ),
        "free disk space, then run the same command again",
    ),
    (
        (errno.EROFS, errno.EACCES, errno.EPERM),
        re.compile(r"read-only file ?system|permission denied|PERMISSION_DENIED|EROFS|EACCES", re.I),
        "name a place that can be read and written",
    ),
)
# XLA's errors on devices without enough memory: when a program is compiled (TPU), is loaded, or allocates its arrays.
_DEVICE_MEMORY = (
    re.compile(r"Used \S+ of \S+ hbm"),
    re.compile(r"Out of memory (?:while trying to )?allocat\w+ [0-9.]+ ?\w+"),
    re.compile(r"Attempting to (?:allocate|reserve) [0-9.]+\w+"),
    re.compile(r"out of memory[^.\n]*", re.I),
)
_PATH = re.compile(r"(?<![\w/])(?:[a-z][a-z0-9+.-]*:/)?/[^\s;:,'\"\])]+")


class UserError(ValueError):
    """A mistake that the user can correct: its message is one line that says what is wrong and what to do.

    Raised anywhere in the library. The command lines print the message and exit with code 2 (`cli.py`), so nobody has
    to read a stack trace to find a misspelt key. So does a notebook.
    """

    def _render_traceback_(self) -> list[str]:  # IPython calls it in place of printing a stack trace
        return [f"error: {one_line(str(self))}"]


def one_line(text: str) -> str:
    """Returns a text as one line, with control characters escaped.

    Names in files and in folders of others may hold escape sequences, which a terminal would obey.
    """
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cannot_write(named: str, error: BaseException) -> UserError:
    """Returns the one-line error for a place that can't be written, which says what to do about the reason.

    Args:
      named: how the user named the place, e.g. "--out=x".
      error: what was raised while writing.
    """
    reason = describe_system_error(error)
    if reason is None:
        reason = f"{getattr(error, 'strerror', None) or ' '.join(str(error).split())[:200]}: name another place"
        if file := getattr(error, "filename", None):
            reason = f"{file}: {reason}"
    return UserError(f"{named} can't be written: {reason}")


def describe_system_error(error: BaseException) -> str | None:
    """Returns one line about a full disk, missing permissions, memory or accelerator; None for any other error.

    Libraries wrap and rephrase the errors of the system, so the causes and the texts count too.
    """
    for cause in _causes(error):
        if "Unable to initialize backend" in str(cause) or _is_raised_in(cause, "xla_bridge.py"):
            # Without the platform's plugin JAX fails an assertion that has no text.
            reason = " ".join(str(cause).split())[:300] or "its platform is not installed"
            platforms = os.environ.get("JAX_PLATFORMS")
            if not platforms:
                return f"JAX has no device to run on ({reason}): set JAX_PLATFORMS=cpu to run without an accelerator"
            return (
                f"JAX_PLATFORMS={platforms!r} gives JAX no device to run on ({reason}): leave it out, or install "
                'JAX for it, as in pip install -e ".[cuda]"'
            )
        if reason := _lack_of_device_memory(cause):
            return (
                f"a device is out of memory ({reason}): use smaller batches or images, or more devices; in training, "
                "--config.train.accumulate=2 (times what it is) or --config.model.remat=full"
            )
        if isinstance(cause, MemoryError):
            reason = " ".join(str(cause).split())[:200] or "an allocation failed"
            return f"out of memory ({reason}): use smaller sizes or batches, or a host with more memory"
        for numbers, pattern, advice in _DISK_ERRORS:
            found = pattern.search(str(cause))
            if found or getattr(cause, "errno", None) in numbers:
                reason = getattr(cause, "strerror", None) or " ".join(found.group().split())[:200]
                place = getattr(cause, "filename", None) or _path_in(str(cause))
                return f"{f'{place}: ' if place else ''}{reason}: {advice}"
    return None


def _lack_of_device_memory(error: BaseException) -> str | None:
    """Returns what XLA lacked memory for on a device; None for any other error."""
    # By name: JAX takes long to import, and may not be in use.
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    found = (pattern.search(str(error)) for pattern in _DEVICE_MEMORY)
    return next((match.group() for match in found if match), None)


def _path_in(text: str) -> str | None:
    """Returns the first absolute path, or URL, in the text of a library's error."""
    found = _PATH.search(text)
    return found.group() if found else None


def _is_raised_in(error: BaseException, module: str) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.basename(frames[-1].filename) == module


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that it was raised from, at most 20."""
    for _ in range(20):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
