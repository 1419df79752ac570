"""What the commands share: errors as sentences, and checks of flags."""

from __future__ import annotations

import contextlib
import errno
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cnnjax.errors import ElsewhereError, InputError, TrainingError, first_line

if TYPE_CHECKING:
    from cnnjax.evaluation.predict import Predictor


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; bad input becomes one sentence and status 2."""
    status = _status(command)
    if status and "jax" in sys.modules:
        from cnnjax.machine import processes

        return processes.failed(status)
    return status


def _status(command: Callable[[], int]) -> int:
    with contextlib.suppress(ValueError):  # it is closed
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            # A file's name may be any bytes; so it is shown, as `ls` does.
            sys.stdout.reconfigure(errors="surrogateescape")
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # while it can still be told that there is no room
        return status
    except ElsewhereError:
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return _stopped(getattr(error, "number", signal.SIGINT))
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; it wants no traceback.
        sys.stdout = None
        return 141
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print("error: the disk is full; make room and give the command again", file=sys.stderr)
            try:
                if sys.stdout is not None:
                    sys.stdout.flush()
            except OSError:
                sys.stdout = None  # else Python tries once more at its end
            return 2
        if error.errno in (errno.EIO, errno.EROFS) and error.filename is None:
            print(
                f"error: a disk fails ({error.strerror}); what was saved on it stays, mend it and"
                " give the command again",
                file=sys.stderr,
            )
            return 2
        if error.filename is None:  # no file of the user's
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "oneDNN: KeyboardInterrupt" in str(error):  # which `cnnjax.ops.ffi` is about to pass on
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(1)
            return _stopped()
        if "RESOURCE_EXHAUSTED" not in str(error):  # as XLA says
            raise
        print(
            "error: the device's memory is full; free some, take another with --device.platform,"
            " or begin another run with a smaller --train.batch or --data.size"
            f" ({first_line(error)})",
            file=sys.stderr,
        )
        return 2


def _stopped(number: int = signal.SIGINT) -> int:
    print("\nstopped; a training goes on when its command is given again", file=sys.stderr)
    return 128 + number


@contextlib.contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Says of errors in writing to a file or folder which flag asked for it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            ours, theirs = path.absolute(), Path(str(error.filename)).absolute()
            if ours != theirs and ours not in theirs.parents and theirs not in ours.parents:
                raise  # of a file that was read meanwhile
        raise InputError(f"{flag} {path} cannot be written ({error.strerror or error})") from None


def expect_no_folder(path: Path | None, flag: str) -> None:
    """Raises InputError where a folder is given for a file."""
    if path is not None and path.is_dir():
        raise InputError(f"{flag} {path} is a folder; name a file in it")


def expect_place(path: Path | None, flag: str) -> None:
    """Says at once, and not after the work, that there is no place for a file."""
    expect_no_folder(path, flag)
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{flag} {path} cannot be written (there is no folder {path.parent})")


def tell_uncalibrated(predictor: Predictor) -> None:
    """Says so where a run has no operating point yet."""
    if predictor.operating == type(predictor.operating)():
        positive = "" if predictor.has_softmax else ", and positive is from 0.5 on"
        print(
            "note: the run has not ended, so it has no operating point yet: probabilities are as"
            f" the network gives them{positive}",
            file=sys.stderr,
        )


def tell_drawn(run: Path | None) -> None:
    """Says so where a run was trained on drawn images."""
    from cnnjax.run.workdir import Workdir

    if run is not None and Workdir(run).begun and Workdir(run).read_drawn():
        print("note: the run was trained on drawn images (phantoms)", file=sys.stderr)


def expect_positive_class(
    predictor: Predictor, threshold: float | None, prevalence: float | None
) -> None:
    """Raises InputError where --threshold or --prevalence is given for more than two classes."""
    for value, flag in ((threshold, "--threshold"), (prevalence, "--prevalence")):
        if value is not None and predictor.has_softmax:
            raise InputError(
                f"{flag} is of a positive class, and {predictor.about} tells"
                f" {', '.join(predictor.classes)} apart, the most probable of which is called;"
                " drop the flag"
            )


def check_probabilities(threshold: float | None, prevalence: float | None) -> None:
    """Raises InputError where --threshold or --prevalence is no probability."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold must be between 0 and 1, got {threshold}")
    if prevalence is not None and not 0 < prevalence < 1:
        raise InputError(f"--prevalence must be between 0 and 1, got {prevalence}")
