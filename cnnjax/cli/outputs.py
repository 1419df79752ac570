"""Predictions written as they come: each form is a text that grows, and is whole at the end.

What was written when a process is killed stays: whole rows, as they are flushed together. Only a
JSON array then lacks its last bracket.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from cnnjax.errors import InputError
from cnnjax.machine.files import SURROGATES, write_rows

Row = dict[str, Any]

COLUMNS = ("path", "probability", "class", "confidence", "lungs", "warning", "error")
"""Of a prediction; of the CSV file."""


def row_of(
    probability: float | Sequence[float], classes: Sequence[str], threshold: float | None
) -> Row:
    """Returns what a prediction says of an image.

    Args:
        probability: of the positive class of two, or of each class.
        classes: names of the labels.
        threshold: from which probability on an image of two classes is positive; None for more, of
            which the most probable is called.

    Returns:
        `probability`, or `probabilities` by class; `class`; and `confidence`, the probability of
        that.
    """
    if not isinstance(probability, float):
        called = max(range(len(classes)), key=probability.__getitem__)
        return {
            "probabilities": dict(zip(classes, probability, strict=True)),
            "class": classes[called],
            "confidence": probability[called],
        }
    assert threshold is not None
    positive = probability >= threshold
    return {
        "probability": probability,
        "class": classes[int(positive)],
        "confidence": probability if positive else 1 - probability,
    }


def _column(name: str) -> str:
    """Returns the name of the column of a class's probability."""
    return f"probability_{name}"


class Form(Protocol):
    """How rows are written: what comes before them, for some of them, and after them."""

    def head(self) -> str: ...  # noqa: D102
    def body(self, rows: Sequence[Row]) -> str: ...  # noqa: D102
    def tail(self) -> str: ...  # noqa: D102


class Lines:
    """JSON Lines: an object a line."""

    def head(self) -> str:
        """Returns nothing."""
        return ""

    def body(self, rows: Sequence[Row]) -> str:
        """Returns a line for each row."""
        return "".join(json.dumps(row) + "\n" for row in rows)

    def tail(self) -> str:
        """Returns nothing."""
        return ""


class Array:
    """A JSON array, an element a line."""

    def __init__(self) -> None:
        self._comma = ""

    def head(self) -> str:
        """Returns the bracket that opens it."""
        return "["

    def body(self, rows: Sequence[Row]) -> str:
        """Returns a line for each row, after a comma but for the first."""
        parts = []
        for row in rows:
            parts.append(f"{self._comma}\n{json.dumps(row)}")
            self._comma = ","
        return "".join(parts)

    def tail(self) -> str:
        """Returns the bracket that closes it."""
        return "\n]\n"


class Csv:
    """CSV with a line of names.

    Args:
        columns: the names.
        several: the classes, where each has a probability: then the column `probability` gives way
            to a column for each.
    """

    def __init__(self, columns: Sequence[str] = COLUMNS, several: Sequence[str] = ()) -> None:
        self._columns: list[str] = []
        for column in columns:
            wide = several and column == "probability"
            self._columns += map(_column, several) if wide else [column]

    def head(self) -> str:
        """Returns the names of the columns."""
        return self._text([self._columns])

    def body(self, rows: Sequence[Row]) -> str:
        """Returns a line for each row."""
        flat = [
            row | {_column(name): p for name, p in row.get("probabilities", {}).items()}
            for row in rows
        ]
        return self._text([[row.get(column, "") for column in self._columns] for row in flat])

    def tail(self) -> str:
        """Returns nothing."""
        return ""

    def _text(self, rows: Sequence[Sequence[Any]]) -> str:
        file = io.StringIO(newline="")
        write_rows(file, rows)
        return file.getvalue()


class Table:
    """Aligned lines, for a person.

    Args:
        classes: names of the labels.
        threshold: the probability from which on an image of two classes is called positive; None
            where each class has a probability.
        longest: letters of the longest path.
    """

    def __init__(self, classes: Sequence[str], threshold: float | None, longest: int) -> None:
        self._threshold = threshold
        self._shown = tuple(classes) if threshold is None else (classes[1],)
        labels = (*classes, "nothing found", "not read", "class")
        columns = (max(6, len(name) + 3) for name in self._shown)
        self._widths = (max(longest, 5), *columns, max(map(len, labels)), 10)

    def head(self) -> str:
        """Returns the names of the columns."""
        return self._line("image", [f"P({name})" for name in self._shown], "class", "confidence")

    def body(self, rows: Sequence[Row]) -> str:
        """Returns a line for each row."""
        return "".join(map(self._of, rows))

    def tail(self) -> str:
        """Returns what the columns mean."""
        if self._threshold is None:
            return "The class is the most probable one; confidence is its calibrated probability.\n"
        return (
            f"{self._shown[0]} from probability {self._threshold:.3f} on; confidence is the"
            " calibrated\nprobability of the class it is called, below 50 % where the threshold"
            " decides\nagainst the likelier class.\n"
        )

    def _of(self, row: Row) -> str:
        if "class" not in row:
            said = "not read" if "error" in row else "nothing found"
            return self._line(row["path"], [""] * len(self._shown), said)
        sure = f"{100 * row['confidence']:.1f} %"
        found = row.get("probabilities") or {self._shown[0]: row["probability"]}
        shown = [f"{found[name]:.4f}" for name in self._shown]
        return self._line(row["path"], shown, row["class"], sure)

    def _line(self, name: str, numbers: Sequence[str], label: str, sure: str = "") -> str:
        a, *columns, c, d = self._widths
        middle = "  ".join(f"{n:>{b}}" for n, b in zip(numbers, columns, strict=True))
        return f"{name:<{a}}  {middle}  {label:<{c}}  {sure:>{d}}\n"


def json_form(path: Path) -> Form:
    """Returns the form of a JSON file: an array for a name in .json, else JSON Lines."""
    return Array() if path.suffix.lower() == ".json" else Lines()


class Output:
    """A file, or standard output, to which rows are written as they come."""

    def __init__(self, file: IO[str], form: Form) -> None:
        self._file, self._form = file, form
        self._put(form.head())

    def write(self, rows: Sequence[Row]) -> None:
        """Writes rows, so that they stay whatever becomes of the process.

        Raises:
            OSError: they cannot be written.
        """
        self._put(self._form.body(rows))

    def close(self) -> None:
        """Writes what comes after the rows; raises OSError."""
        self._put(self._form.tail())

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


@contextlib.contextmanager
def opened(path: Path | None, form: Form, flag: str) -> Iterator[Output | None]:
    """Opens a file for rows, or none; into a pipe or a device it writes after what is there.

    Rows that were written stay if the block fails, and the end of the form is then written too.

    Raises:
        InputError: it cannot be opened or written; in the block, `Output.write` raises it.
    """
    if path is None:
        yield None
        return
    special = path.parent == Path("/dev") or (path.exists() and not path.is_file())
    if special:
        sys.stdout.flush()  # what was printed before stands before it
    mode = "a" if special else "w"
    try:
        file = path.open(mode, encoding="utf-8", newline="", errors=SURROGATES)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written ({error.strerror or error})") from None
    try:
        output = _Named(file, form, f"{flag} {path}")
        try:
            yield output
        except BaseException:
            with contextlib.suppress(InputError):  # the first error is the one to tell
                output.close()
            raise
        output.close()
    finally:
        with contextlib.suppress(OSError):  # all was flushed, or it was told that it cannot be
            file.close()


class _Named(Output):
    """An output whose errors name the flag that asked for it."""

    def __init__(self, file: IO[str], form: Form, flag: str) -> None:
        self._flag = flag
        super().__init__(file, form)

    def _put(self, text: str) -> None:
        try:
            super()._put(text)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{self._flag} cannot be written ({reason})") from None
