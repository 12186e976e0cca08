"""What the extra `eval` installs, and plots made with it."""

import importlib
import io
from typing import Any

from lidit_jax.errors import UserError

DOTS_PER_INCH = 160


def require_extra(what: str, *modules: str) -> None:
    """Raises UserError unless `what` can import these modules: better at once than after hours."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{what} needs {error.name}: pip install "lidit-jax[eval]"') from error


def png_of(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file's bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return file.getvalue()
