"""Decodes images when a batch needs them, for data sets that are too large to be cached as pixels.

`Films` looks like an array of images, but decodes the rows that are read. `Workers` decodes the
batches of a training in other processes, with Grain (https://google-grain.readthedocs.io). The
order is that of the rows that it is given, so the batches are those that an array would give.

What needs all pixels is found once, by `cnnjax.data.cache`, and kept in the cache folder: which
files cannot be decoded, and a checksum of each image. Each image is compared with its checksum when
it is decoded again, so a file that has changed since is an error and never another image.

This module is imported by each worker process. It therefore imports neither JAX nor Flax.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.crop import crop
from cnnjax.data.decode import DecodeError, decode
from cnnjax.data.sources import Source
from cnnjax.errors import InputError, first_line
from cnnjax.machine.host import cpu_cores

FACTS = ("names", "digests", "means")
"""Arrays that are kept for each decoded image: its name, `S`; `digest_of` it, uint64; and its mean
gray level, float64."""

_MOST = 2**31 - 1  # number of batches that Grain is told the workers will ever make
_BUFFERED = 2  # batches that each worker prepares ahead
_POLL = 0.02  # seconds between two looks of an idle worker for rows to decode
_LOOK = 0.2  # seconds between two looks of a worker for the file that ends it
_HELD = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def digest_of(image: np.ndarray) -> int:
    """Returns a checksum of an image's pixels, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest())


class Films:
    """Images that are decoded when they are read; otherwise like a NumPy array that is read-only.

    A slice is a view, which decodes nothing. A number or an array of numbers decodes these rows.

    Args:
        facts: folder that holds the arrays `FACTS` of the images.
        source: source of the encoded images.
        side: side, in pixels, of the squares that they are decoded to.
        boxes: .npy file of float32 [n, 4], the box of each image that is cropped out; None if the
            images are not cropped.
        size: side of the crops, in pixels.
        means: .npy file of float64 [n], the mean gray level of each crop.
    """

    dtype, ndim = np.dtype(np.uint8), 3

    def __init__(
        self,
        facts: Path,
        source: Source,
        side: int,
        *,
        boxes: Path | None = None,
        size: int | None = None,
        means: Path | None = None,
    ) -> None:
        self.source, self.side, self.size = source, side, size or side
        self._facts, self._boxes = facts, boxes
        self._means = means or facts / "means.npy"
        self._rows = range(len(self._array(facts / "names.npy")))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of images, and their sides."""
        return len(self._rows), self.size, self.size

    @property
    def nbytes(self) -> int:
        """Number of bytes that the decoded images would take."""
        return len(self) * self.size**2

    @property
    def means(self) -> np.ndarray:
        """float64 [n], the mean gray level of each image."""
        return self._array(self._means)[self._at(slice(None))]

    def cropped(self, boxes: Path, size: int, means: Path) -> Films:
        """Returns the images cropped to boxes; see the constructor."""
        return Films(self._facts, self.source, self.side, boxes=boxes, size=size, means=means)

    def decoded(self, rows: np.ndarray) -> np.ndarray:
        """Decodes rows, int [m], one after another; see `__getitem__`."""
        return np.stack([self._decoded(row) for row in self._at(rows).tolist()])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: Any) -> Any:
        """Returns a view for a slice, and else the decoded images uint8 [..., size, size].

        Raises:
            InputError: a file cannot be read, or has changed since the data set was first read.
        """
        if isinstance(at, slice):
            view = Films.__new__(Films)
            view.__dict__.update(self.__dict__)
            view._rows = self._rows[at]
            return view
        rows = self._at(at)
        if rows.ndim == 0:
            return self._decoded(int(rows))
        with ThreadPoolExecutor(cpu_cores()) as pool:
            images = list(pool.map(self._decoded, rows.tolist()))
        return np.array(images, np.uint8).reshape(len(rows), self.size, self.size)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[np.arange(len(self))], dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_opened"}

    def _at(self, at: Any) -> np.ndarray:
        """Returns the rows of the facts that an index selects."""
        rows: np.ndarray = np.asarray(
            np.arange(self._rows.start, self._rows.stop, self._rows.step)[at]
        )
        return rows

    def _array(self, path: Path) -> np.ndarray:
        opened = self.__dict__.setdefault("_opened", {})
        if path not in opened:
            opened[path] = np.load(path, mmap_mode="r", allow_pickle=False)
        array: np.ndarray = opened[path]
        return array

    def _decoded(self, row: int) -> np.ndarray:
        name = os.fsdecode(bytes(self._array(self._facts / "names.npy")[row]))
        try:
            image = decode(self.source.read(name), self.side)
        except (OSError, DecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{name} can no longer be read ({reason}); restore the file and give the same"
                " command again"
            ) from None
        if digest_of(image) != int(self._array(self._facts / "digests.npy")[row]):
            raise InputError(
                f"{name} has changed since the data set was first read; restore the file and give"
                " the same command again"
            )
        if self._boxes is None:
            return image
        return crop(image, self._array(self._boxes)[row], self.size)


def expect_workers() -> None:
    """Raises InputError if Grain is not installed."""
    try:
        import grain  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the data set is larger than --data.cache-mib and --data.resident-mib, so its images"
            ' are decoded during training, which needs Grain: pip install "cnnjax[stream]", or'
            f" raise one of the two ({first_line(error)})"
        ) from None


class Workers:
    """Worker processes that decode the batches of one order of images after another.

    The processes start at the first batch and stay until `close`. They are children of this process
    and end with it, however it ends. Signals that ask a process to end are left to this process.

    Args:
        images: the images.
        count: number of processes.
    """

    def __init__(self, images: Films, count: int) -> None:
        self.count = count
        self._images = images
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers: Any = None
        self._made = 0  # number of batches whose rows the workers have been given

    # Rows and batches are exchanged through files in a temporary folder, and Grain passes on only
    # the numbers of the batches. A process that is killed while it writes an array to a pipe would
    # leave the reader waiting for the rest; shared memory is often small in a container, and a
    # process that finds it full ends by a signal.

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Yields uint8 [batch, size, size] for each row of int [steps, batch]; -1 is padding.

        Call `close` if not all of them are taken.

        Raises:
            InputError: a file cannot be read or has changed, or a worker process has ended.
        """
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="cnnjax-batches-")
        folder = Path(self._folder.name)
        path = folder / f"{self._made + len(rows):012}.rows.npy"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.maximum(rows, 0))
        partial.replace(path)
        self._made += len(rows)
        try:
            for left in reversed(range(len(rows))):
                number = self._first(folder) if self._numbers is None else next(self._numbers)
                made = folder / _file_of(int(number))
                batch = np.load(made)
                made.unlink()
                if not left:
                    path.unlink()  # each worker with a batch of this order has read it
                yield batch
        except InputError:
            raise
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise InputError(
                "a worker process that decodes images has ended, perhaps because the memory was"
                " full; give the same command again to resume, with a smaller --data.workers than"
                f" {self.count} ({first_line(error)})"
            ) from None

    def close(self) -> None:
        """Ends the processes; `batches` starts new ones."""
        if self._folder is None:
            return
        (Path(self._folder.name) / "closed").touch()
        numbers, self._numbers = self._numbers, None
        if numbers is not None:
            numbers.close()
        self._folder.cleanup()
        self._folder, self._made = None, 0

    def _first(self, folder: Path) -> int:
        """Starts the processes and returns the number of the first batch."""
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its flags; ours are no flags of absl
        numbers = grain.MapDataset.source(Batches(self._images, folder)).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        self._numbers = iter(
            numbers.mp_prefetch(
                grain.MultiprocessingOptions(self.count, per_worker_buffer_size=_BUFFERED),
                worker_init_fn=functools.partial(_begin, folder / "closed"),
            )
        )
        with _deaf_children(), _without_main():
            return int(next(self._numbers))


def _file_of(step: int) -> str:
    return f"{step:012}.images.npy"


class Batches:
    """A random-access source for Grain: item i is i, after the uint8 batch of step i is written.

    The rows of the steps are in files that appear in a folder, each named by the number of the step
    after its last. Reading a step whose rows are not there yet waits for them. The batch is written
    to the same folder.

    Args:
        images: the images.
        folder: the folder.
    """

    def __init__(self, images: Films, folder: Path) -> None:
        self._images, self._folder = images, folder
        self._end, self._rows = 0, np.zeros((0, 0), np.int32)

    def __len__(self) -> int:
        return _MOST

    def __repr__(self) -> str:
        return f"Batches({len(self._images)} images)"

    def __getitem__(self, step: int) -> int:
        while step >= self._end:
            ends = {int(p.name.partition(".")[0]): p for p in self._folder.glob("*.rows.npy")}
            end = min((end for end in ends if end > step), default=None)
            if end is None:
                time.sleep(_POLL)
            else:
                self._rows, self._end = np.load(ends[end]), end
        # An image that occurs several times, as padding does, is decoded once.
        rows, places = np.unique(self._rows[step - self._end], return_inverse=True)
        try:
            np.save(self._folder / _file_of(step), self._images.decoded(rows)[places])
        except OSError as error:
            raise InputError(
                f"{self._folder} cannot be written ({error.strerror}); free some space there, or"
                " name another folder for temporary files with the environment variable TMPDIR"
            ) from None
        return step


def _begin(closed: Path, index: int, count: int) -> None:
    """Prepares a worker process: it ends with its parent, or when the file `closed` appears."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        while not (connection.wait([parent.sentinel], _LOOK) or closed.exists()):
            pass
        os._exit(1)  # there is nothing to clean up; 0 would not be noticed by Grain

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Lets threads and processes that this thread starts in the block ignore `_HELD` signals.

    Ctrl-C in a terminal, and a batch system that stops a job, signal all processes at once. The
    training needs its workers until it has saved its state.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it changes the mask when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keeps processes that start in the block from importing this program's main module.

    They need nothing of it. Importing it costs memory and time, and would start a script anew that
    does not guard its work by `if __name__ == "__main__"`.
    """
    told = sys.modules["__main__"].__dict__
    before: dict[str, Any] = {name: told[name] for name in ("__spec__", "__file__") if name in told}
    told.update(dict.fromkeys(before))
    try:
        yield
    finally:
        told.update(before)
