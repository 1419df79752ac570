"""Names of files as they enter: from folders and from archives, each film once, none from outside.

Names of the index keep the spelling of the file system, by which files are opened; names that are
compared with others, those of splits and classes, are brought to one spelling by `same_name`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cnnjax.errors import InputError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".dcm")
SUFFIXES = ", ".join(IMAGE_SUFFIXES)

LEADS_OUT = "a link out of the root, copy what it leads to"
NOT_REGULAR = "no regular file"

_OF_DICOM = ("", ".dicom", ".dic", ".ima")


@dataclass
class Walked:
    """What lies below a folder or in an archive; names are relative to it, with forward slashes."""

    files: dict[str, str] = field(default_factory=dict)
    """The file that each name leads to; that of several names is the same by way of links."""
    folders: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each file or link that is not followed."""

    def once(self, names: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Returns those of the names that lead to files of their own, and (name, reason) of others.

        Of several names of a file, the one that is no link is kept, or else the first.
        """
        kept: dict[str, str] = {}
        again: list[tuple[str, str]] = []
        for name in sorted(names, key=lambda name: (self._is_link(name), name)):
            first = kept.setdefault(self.files[name], name)
            if first != name:
                again.append((name, "a link to a film that is listed"))
        return sorted(kept.values()), again

    def _is_link(self, name: str) -> bool:
        return not self.files[name].endswith("/" + name)


def same_name(part: str) -> str:
    """Returns a name in the spelling that names of splits and classes are compared in.

    Letter case does not matter, nor whether an accent is a character of its own (Unicode NFC).
    """
    return unicodedata.normalize("NFC", part).upper()


def hidden(part: str) -> bool:
    """Tells whether a file or folder of this name is passed over."""
    return (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX"


def may_be_dicom(name: str) -> bool:
    """Tells whether a file may be DICOM though its name does not end in .dcm.

    Many have no suffix, or the last number of a unique identifier for one.
    """
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in _OF_DICOM or suffix[1:].isdigit()


def in_archive(name: str) -> str | None:
    """Returns an archive's name for an entry as a relative path; None where it leads out of it.

    Some programs write backslashes, a leading `./` or a drive.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts or (parts and parts[0].endswith(":")):
        return None
    return "/".join(parts)


def walk(root: Path, *, confined: bool) -> Walked:
    """Lists what lies below a folder; hidden files are passed over.

    Links are followed, as data sets under version control are made of them, but not in a circle,
    and to no folder twice.

    Args:
        root: the folder.
        confined: whether links that lead out of it are refused.

    Raises:
        InputError: a folder cannot be read.
    """
    found = Walked()
    home = os.path.realpath(root)
    followed: set[str] = set()
    # (its name, what it leads to, all that it lies in) of folders that are to be listed
    waiting: list[tuple[str, str, tuple[str, ...]]] = [("", home, (home,))]
    while waiting:
        folder, real, above = waiting.pop()
        for entry in _listed(root / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            target = os.path.join(real, entry.name)  # noqa: PTH118
            if entry.is_symlink():
                linked = Path(os.path.realpath(target))
                if linked.exists():  # else reading it will tell
                    target = str(linked)
                    if confined and not linked.is_relative_to(home):
                        found.refused.append((name, LEADS_OUT))
                        continue
            if entry.is_dir():
                if target in above or (entry.is_symlink() and target in followed):
                    continue
                if entry.is_symlink():
                    followed.add(target)
                found.folders.append(name)
                waiting.append((name, target, (*above, target)))
            elif not entry.is_file() and Path(target).exists():
                found.refused.append((name, NOT_REGULAR))
            else:
                found.files[name] = target
    return found


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """Returns what lies in a folder, hidden entries apart, from the last name to the first."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not hidden(entry.name)]
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read ({error.strerror}); change its permissions"
        ) from None
    return sorted(visible, key=lambda entry: entry.name, reverse=True)
