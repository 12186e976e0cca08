"""The exception for mistakes that users can correct."""


class UserError(ValueError):
    """A mistake that the user can correct: its message is one line that says what is wrong and what to do.

    Raised anywhere in the library. The command lines print the message and exit with code 2 (`cli.py`), so nobody has
    to read a stack trace to find a misspelt key.
    """
