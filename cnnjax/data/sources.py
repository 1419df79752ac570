"""Sources of the images' bytes: a folder, a zip, or the arrays of an .npz."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from cnnjax.data import dicom
from cnnjax.data.bounds import read_entry, read_file
from cnnjax.data.names import Walked, in_archive
from cnnjax.errors import InputError

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
    """The files of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes:
        """See `Source`."""
        return read_file(self.root / name)

    def head(self, name: str) -> bytes:
        """Returns the first `dicom.HEAD` bytes of a file; raises OSError."""
        with (self.root / name).open("rb") as file:
            return file.read(dicom.HEAD)

    def signature(self, name: str) -> tuple[int, ...]:
        """See `Source`."""
        try:
            status = os.stat(os.path.join(self.root, name))  # noqa: PTH116, PTH118 (ten times faster)
        except OSError:  # broken link; reading reports it
            return -1, 0
        # A copy may preserve the modification time of the content, but not that of the inode.
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class Zip:
    """The entries of a zip.

    Raises:
        InputError: the zip cannot be read.
    """

    def __init__(self, path: Path) -> None:
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
        self.walked.files = list(self.infos)

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
