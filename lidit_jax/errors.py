"""The one kind of error that a user can cause."""


class UserError(ValueError):
    """A mistake that the user can mend: its message is one line that says what is wrong and what to do.

    Raised anywhere in the library; the command lines print the message and exit with code 2 (`cli.py`), so nobody
    has to read a stack trace to find a misspelt key.
    """
