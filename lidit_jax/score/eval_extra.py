"""Checks for the packages of the extra `eval`, and saves figures with them."""

import importlib
import io
from typing import Any

from lidit_jax.errors import UserError

DOTS_PER_INCH = 160


def require_extra(what: str, *modules: str) -> None:
    """Imports modules that are needed later, to fail at once instead of after hours.

    Args:
      what: name of the command that needs them, for the error message.
      *modules: names of modules.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{what} needs {error.name}: pip install "lidit-jax[eval]"') from error


def png_of(figure: Any) -> bytes:
    """Returns a matplotlib figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return file.getvalue()
