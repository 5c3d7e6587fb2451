"""The errors that a command reports as one line."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is wrong and what to do, in one line.

    The commands print it on standard error and exit with status 2, without a traceback.
    """


class RunError(Exception):
    """A command cannot continue although its input is valid; the message says why, in one line.

    The commands print it on standard error and exit with status 1, without a traceback.
    """


class WriteError(RunError):
    """A file of a run could not be written; the message says which and why.

    It is not an OSError, so that training can tell a full disk from a closed output.
    """
