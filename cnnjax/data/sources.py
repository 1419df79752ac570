"""Sources of the images' bytes: a folder, a zip, or the arrays of an .npz."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cnnjax.data import dicom
from cnnjax.data.bounds import read_entry, read_file
from cnnjax.data.examples import Texts
from cnnjax.data.names import Walked, in_archive
from cnnjax.errors import InputError, first_line

# Limits on an array in an .npz: the largest size in bytes; the size up to which any compression
# ratio is accepted; and the largest ratio above that size (radiographs compress to about half).
_LARGEST_ARRAY, _LARGEST_FLAT, _LARGEST_RATIO = 4 * 2**30, 128 * 2**20, 50


class Source(Protocol):
    """Provides the encoded bytes, or the pixels, of the images of an index."""

    def read(self, name: str) -> bytes | np.ndarray:
        """Returns the file's bytes or, for an array file, uint8 [height, width(, 3)].

        Raises:
            OSError: the image cannot be read; the message gives the reason.
        """

    def signature(self, name: str) -> tuple[int, ...]:
        """Returns numbers, the size in bytes first, that change if the content changes."""


class Tree:
    """The files of a folder, and the records of the ArrayRecord files among them.

    Record 12 of the file `train/NORMAL/part-0.array_record` is the image of the name
    `train/NORMAL/part-0.array_record/0000012`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._shards: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """See `Source`."""
        record = record_of(name)
        if record is None:
            return read_file(self.root / name)
        shard, number = record
        try:
            encoded: bytes = self._shard(shard).read([number])[0]
        except (RuntimeError, IndexError, InputError) as error:
            raise OSError(f"broken in the ArrayRecord file: {first_line(error)}") from None
        return encoded

    def records(self, shard: str) -> int:
        """Returns the number of records of an ArrayRecord file.

        Raises:
            InputError: the file cannot be read, or the package array-record is not installed.
        """
        number: int = self._shard(shard).num_records()
        return number

    def _shard(self, name: str) -> Any:
        """Returns the reader of an ArrayRecord file, which any number of threads may use."""
        with self._lock:
            if name not in self._shards:
                try:
                    from array_record.python.array_record_module import ArrayRecordReader
                except ImportError as error:
                    raise InputError(
                        f"{self.root / name} is an ArrayRecord file; reading it needs"
                        f' pip install "cnnjax[stream]" ({first_line(error)})'
                    ) from None
                reader = ArrayRecordReader(str(self.root / name), options="readahead_buffer_size:0")
                if not reader.ok():
                    raise InputError(
                        f"{self.root / name} cannot be read as an ArrayRecord file; restore it"
                    )
                self._shards[name] = reader
            return self._shards[name]

    def head(self, name: str) -> bytes:
        """Returns the first `dicom.HEAD` bytes of a file; raises OSError."""
        with (self.root / name).open("rb") as file:
            return file.read(dicom.HEAD)

    def signature(self, name: str) -> tuple[int, ...]:
        """See `Source`."""
        shard, _ = record_of(name) or (name, 0)
        try:
            status = os.stat(os.path.join(self.root, shard))  # noqa: PTH116, PTH118 (ten times faster)
        except OSError:  # broken link; reading reports it
            return -1, 0
        # A copy may preserve the modification time of the content, but not that of the inode.
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    def __reduce__(self) -> tuple[Any, ...]:
        return Tree, (self.root,)


SHARDS = (".array_record", ".arrayrecord")
"""Suffixes of ArrayRecord files."""


def name_of(shard: str, number: int) -> str:
    """Returns the name of a record of an ArrayRecord file."""
    return f"{shard}/{number:07}"


def record_of(name: str) -> tuple[str, int] | None:
    """Returns the ArrayRecord file and the number of a record; None if it is no record's name."""
    shard, _, number = name.rpartition("/")
    if shard.lower().endswith(SHARDS) and number.isascii() and number.isdecimal():
        return shard, int(number)
    return None


class Zip:
    """The entries of a zip.

    Raises:
        InputError: the zip cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # All threads share one open file: ZipFile locks reads, and inflates outside the lock.
            self.archive = zipfile.ZipFile(path)
        # ValueError: names that are not in their declared encoding.
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{path} cannot be read as a zip ({error}); download again") from None
        self.path = path
        self.infos: dict[str, zipfile.ZipInfo] = {}
        self.walked = Walked()
        for info in self.archive.infolist():
            name = in_archive(info.filename)
            if name is None:
                self.walked.refused.append((info.filename, "a name that leads out of the zip"))
            elif info.filename.endswith(("/", "\\")):
                self.walked.folders.append(name)
            else:
                self.infos[name] = info
        self.walked.files = Texts(self.infos)

    def __reduce__(self) -> tuple[type[Zip], tuple[Path]]:
        return Zip, (self.path,)  # another process opens the file again

    def read(self, name: str) -> bytes:
        """See `Source`."""
        with _named_broken():
            return read_entry(self.archive, self.infos[name])

    def head(self, name: str) -> bytes:
        """Returns the first `dicom.HEAD` bytes of an entry; raises OSError."""
        with _named_broken(), self.archive.open(self.infos[name]) as entry:
            return entry.read(dicom.HEAD)

    def signature(self, name: str) -> tuple[int, ...]:
        """See `Source`."""
        return self.infos[name].file_size, self.infos[name].CRC


@contextlib.contextmanager
def _named_broken() -> Iterator[None]:
    """Converts the errors of a broken zip to OSError; each compression method has its own types."""
    try:
        yield
    except MemoryError:
        raise
    except OSError:
        raise  # from the disk, or from our limits
    except Exception as error:
        raise OSError(f"broken in the zip: {error}") from None


class Arrays:
    """The arrays of a MedMNIST file, each loaded once and kept.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as members:
                self.members = {i.filename: (i.file_size, i.CRC) for i in members.infolist()}
            self.file = np.load(path, allow_pickle=False)
        # NotImplementedError: the zip requires a newer version of the format.
        except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as an .npz ({error})") from None
        self.loaded: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (self.path,)

    def array(self, key: str) -> np.ndarray:
        """Returns an array by its name; raises InputError if it is broken or too large."""
        if key not in self.loaded:
            try:
                self._expect_bounded(f"{key}.npy")
                self.loaded[key] = self.file[key]
            except Exception as error:  # depends on the damage
                raise InputError(f"{self.path}: {key} cannot be read ({error})") from None
        return self.loaded[key]

    def _expect_bounded(self, member: str) -> None:
        """Raises ValueError if an array is larger than its file, or too large for memory."""
        info = self.file.zip.getinfo(member)
        size = info.file_size
        if size > _LARGEST_ARRAY or size > max(_LARGEST_FLAT, _LARGEST_RATIO * info.compress_size):
            raise ValueError(f"it would take {size / 2**20:,.0f} MiB")
        with self.file.zip.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = reader(stream)
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"its header declares {list(shape)}, which is more than the data")

    def read(self, name: str) -> np.ndarray:
        """See `Source`."""
        split, number = name.split("/")
        pixels: np.ndarray = self.array(f"{split}_images")[int(number)]
        return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels

    def signature(self, name: str) -> tuple[int, ...]:
        """See `Source`."""
        return self.members[f"{name.partition('/')[0]}_images.npy"]
