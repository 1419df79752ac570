"""Code shared by the commands: error messages and checks of flags."""

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
    """Runs a command and returns its exit status; prints expected errors as one sentence.

    The status is 2 for bad input, 1 for failed training and 128 plus the number of the signal
    after a stop.
    """
    status = _status(command)
    if status and "jax" in sys.modules:
        from cnnjax.machine import processes

        return processes.failed(status)
    return status


def _status(command: Callable[[], int]) -> int:
    with contextlib.suppress(ValueError):  # standard output is closed
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            # A file name may contain any bytes. Print them unchanged, as `ls` does.
            sys.stdout.reconfigure(errors="surrogateescape")
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, a full disk can still be reported
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
        # The reader of the output has exited (for example `head`): print no traceback.
        sys.stdout = None
        return 141
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print("error: the disk is full; free some space and run again", file=sys.stderr)
            try:
                if sys.stdout is not None:
                    sys.stdout.flush()
            except OSError:
                sys.stdout = None  # otherwise Python flushes it again at exit
            return 2
        if error.errno in (errno.EIO, errno.EROFS) and error.filename is None:
            print(
                f"error: a disk cannot be used ({error.strerror}); files saved on it are kept;"
                " repair it and run the command again",
                file=sys.stderr,
            )
            return 2
        if error.filename is None:  # the error is not about a file
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "oneDNN: KeyboardInterrupt" in str(error):  # cnnjax.ops.ffi raises it soon
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(1)
            return _stopped()
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word for it
            raise
        print(
            "error: the device is out of memory; free some memory, choose another device with"
            " --device.platform, or start a new run with a smaller --train.batch or --data.size"
            f" ({first_line(error)})",
            file=sys.stderr,
        )
        return 2


def _stopped(number: int = signal.SIGINT) -> int:
    print("\nstopped; to resume a training, run the same command again", file=sys.stderr)
    return 128 + number


@contextlib.contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Raises errors in writing to `path` as an InputError that names the flag."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            ours, theirs = path.absolute(), Path(str(error.filename)).absolute()
            if ours != theirs and ours not in theirs.parents and theirs not in ours.parents:
                raise  # the error is about another file, for example one that was read
        raise InputError(f"{flag} {path} cannot be written ({error.strerror or error})") from None


def expect_no_folder(path: Path | None, flag: str) -> None:
    """Raises InputError if `path`, which should be a file, is a folder."""
    if path is not None and path.is_dir():
        raise InputError(f"{flag} {path} is a folder; give a file")


def expect_place(path: Path | None, flag: str) -> None:
    """Raises InputError if the file cannot be created because its folder does not exist.

    Commands call this first, so that a long computation is not lost.
    """
    expect_no_folder(path, flag)
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{flag} {path} cannot be written (there is no folder {path.parent})")


def tell_uncalibrated(predictor: Predictor) -> None:
    """Prints a note on standard error if the run has no operating point yet."""
    if predictor.operating == type(predictor.operating)():
        positive = "" if predictor.has_softmax else ", and the threshold is 0.5"
        print(
            "note: the run has not finished, so it has no operating point yet: probabilities are"
            f" not calibrated{positive}",
            file=sys.stderr,
        )


def tell_drawn(run: Path | None) -> None:
    """Prints a note on standard error if the run was trained on phantoms."""
    from cnnjax.run.workdir import Workdir

    if run is not None and Workdir(run).begun and Workdir(run).read_drawn():
        print("note: the run was trained on synthetic images (phantoms)", file=sys.stderr)


def expect_positive_class(
    predictor: Predictor, threshold: float | None, prevalence: float | None
) -> None:
    """Raises InputError if --threshold or --prevalence is given for more than two classes."""
    for value, flag in ((threshold, "--threshold"), (prevalence, "--prevalence")):
        if value is not None and predictor.has_softmax:
            raise InputError(
                f"{flag} needs a positive class, but {predictor.about} predicts the most probable"
                f" of {', '.join(predictor.classes)}; drop the flag"
            )


def check_probabilities(threshold: float | None, prevalence: float | None) -> None:
    """Raises InputError if --threshold or --prevalence is not a probability."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold must be between 0 and 1, got {threshold}")
    if prevalence is not None and not 0 < prevalence < 1:
        raise InputError(f"--prevalence must be between 0 and 1, got {prevalence}")
