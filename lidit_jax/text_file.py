"""Text files that users name: of a size that such a file can have, and UTF-8."""

from etils import epath

from lidit_jax.errors import UserError

MAX_BYTES = 64 << 20


def read_text(file: epath.Path, named: str, what: str) -> str:
    """The whole of it, without a byte-order mark.

    Args:
      named: how the user named it, as "--file=x.txt".
      what: what it should be, as "a list of prompts".

    Raises:
      UserError: it is larger than `MAX_BYTES`, or not UTF-8.
    """
    if file.stat().length > MAX_BYTES:
        raise UserError(f"{named}: larger than {MAX_BYTES >> 20} MiB; is it {what}?")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: not UTF-8 (byte {error.start}); if it is {what}, save it as UTF-8") from None
