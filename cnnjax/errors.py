"""Exceptions that the commands print as one sentence, without a traceback."""


class InputError(Exception):
    """Invalid input. The message is one sentence that names the file or flag and says what to do.

    The commands print it without a traceback and exit with status 2.
    """


class ElsewhereError(InputError):
    """An InputError of process 0, raised in the other processes, which do not print it again."""


class TrainingError(Exception):
    """A value in training is not finite. The message is one sentence that says where.

    The commands print it without a traceback and exit with status 1.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
