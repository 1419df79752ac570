"""The exceptions that the commands turn into one sentence."""


class InputError(Exception):
    """Bad input: one sentence that names the file or the flag and says what to do.

    The commands print it without a traceback and exit with status 2.
    """


class ElsewhereError(InputError):
    """The InputError of process 0, on the other ones of its run; they don't print it again."""


class TrainingError(Exception):
    """Training came to something that is not finite; one sentence that says where.

    The commands print it without a traceback and exit with status 1.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
