"""Output formats of predictions, written row by row.

Rows are flushed as they are written. If the process is killed, the file keeps all complete rows;
only a JSON array then lacks its closing bracket.
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
"""Columns of the CSV file of predictions."""


def row_of(
    probability: float | Sequence[float], classes: Sequence[str], threshold: float | None
) -> Row:
    """Returns the prediction for one image as a row.

    Args:
        probability: probability of the positive class if there are two classes, otherwise the
            probability of each class.
        classes: names of the labels.
        threshold: for two classes, the probability from which on an image is positive. None for
            more classes: the most probable class is predicted.

    Returns:
        `probability`, or `probabilities` by class; `class`, the predicted class; and `confidence`,
        its probability.
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
    """Returns the name of the column for the probability of a class."""
    return f"probability_{name}"


class Form(Protocol):
    """An output format: text before the rows, text for some rows, and text after the rows."""

    def head(self) -> str: ...  # noqa: D102
    def body(self, rows: Sequence[Row]) -> str: ...  # noqa: D102
    def tail(self) -> str: ...  # noqa: D102


class Lines:
    """JSON Lines: one object per line."""

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
    """A JSON array with one element per line."""

    def __init__(self) -> None:
        self._comma = ""

    def head(self) -> str:
        """Returns the opening bracket."""
        return "["

    def body(self, rows: Sequence[Row]) -> str:
        """Returns a line for each row; a comma precedes each row but the first."""
        parts = []
        for row in rows:
            parts.append(f"{self._comma}\n{json.dumps(row)}")
            self._comma = ","
        return "".join(parts)

    def tail(self) -> str:
        """Returns the closing bracket."""
        return "\n]\n"


class Csv:
    """CSV with a header line.

    Args:
        columns: names of the columns.
        several: names of the classes if each has a probability; one column for each then replaces
            the column `probability`.
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
    """Aligned columns for a terminal.

    Args:
        classes: names of the labels.
        threshold: for two classes, the probability from which on an image is positive; None if
            each class has a probability.
        longest: length of the longest path, in characters.
    """

    def __init__(self, classes: Sequence[str], threshold: float | None, longest: int) -> None:
        self._threshold = threshold
        self._shown = tuple(classes) if threshold is None else (classes[1],)
        labels = (*classes, "no prediction", "not read", "class")
        columns = (max(6, len(name) + 3) for name in self._shown)
        self._widths = (max(longest, 5), *columns, max(map(len, labels)), 10)

    def head(self) -> str:
        """Returns the names of the columns."""
        return self._line("image", [f"P({name})" for name in self._shown], "class", "confidence")

    def body(self, rows: Sequence[Row]) -> str:
        """Returns a line for each row."""
        return "".join(map(self._of, rows))

    def tail(self) -> str:
        """Returns a legend of the columns."""
        if self._threshold is None:
            return "The class is the most probable one; confidence is its calibrated probability.\n"
        return (
            f"{self._shown[0]} from probability {self._threshold:.3f} on; confidence is the"
            " calibrated\nprobability of the predicted class. It is below 50 % if the threshold"
            " selects\nthe less probable class.\n"
        )

    def _of(self, row: Row) -> str:
        if "class" not in row:
            said = "not read" if "error" in row else "no prediction"
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
    """Returns the format of a JSON file: an array if its name ends in .json, else JSON Lines."""
    return Array() if path.suffix.lower() == ".json" else Lines()


class Output:
    """A file or standard output to which rows are written one chunk after another."""

    def __init__(self, file: IO[str], form: Form) -> None:
        self._file, self._form = file, form
        self._put(form.head())

    def write(self, rows: Sequence[Row]) -> None:
        """Writes and flushes rows.

        Raises:
            OSError: the rows cannot be written.
        """
        self._put(self._form.body(rows))

    def close(self) -> None:
        """Writes the text after the rows; raises OSError."""
        self._put(self._form.tail())

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


@contextlib.contextmanager
def opened(path: Path | None, form: Form, flag: str) -> Iterator[Output | None]:
    """Opens a file for rows; yields None if `path` is None.

    Pipes and devices are opened for appending. If the block fails, the rows written so far are
    kept and the text after the rows is written.

    Raises:
        InputError: the file cannot be opened or written. `Output.write` raises it too.
    """
    if path is None:
        yield None
        return
    special = path.parent == Path("/dev") or (path.exists() and not path.is_file())
    if special:
        sys.stdout.flush()  # keeps the order if both are the same terminal
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
            with contextlib.suppress(InputError):  # report the first error
                output.close()
            raise
        output.close()
    finally:
        with contextlib.suppress(OSError):  # all rows are flushed, or the error was raised
            file.close()


class _Named(Output):
    """An output whose errors name its flag."""

    def __init__(self, file: IO[str], form: Form, flag: str) -> None:
        self._flag = flag
        super().__init__(file, form)

    def _put(self, text: str) -> None:
        try:
            super()._put(text)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{self._flag} cannot be written ({reason})") from None
