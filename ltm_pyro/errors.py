"""The error that a command reports as one line."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong and what to do, in one line.

    The commands print it on standard error and exit with status 2, without a traceback.
    """
