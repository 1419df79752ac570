"""Lists the files of folders and archives: each file once, and none outside the root.

Names in the index keep the spelling of the file system, since files are opened by them. Names that
are compared, those of splits and classes, are normalized by `same_name`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cnnjax.data.examples import Texts
from cnnjax.errors import InputError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".dcm")
SUFFIXES = ", ".join(IMAGE_SUFFIXES)

LEADS_OUT = "a link that leads out of the root; copy its target into the root"
NOT_REGULAR = "not a regular file"

_OF_DICOM = ("", ".dicom", ".dic", ".ima")


@dataclass
class Walked:
    """The content of a folder or an archive; names are relative to it, with forward slashes."""

    home: str = ""
    """The real path of the folder; empty for an archive."""
    files: Texts = field(default_factory=Texts)
    """The names of the files, each once."""
    linked: dict[str, str] = field(default_factory=dict)
    """The real path of each file that is a link, or that lies below one; links may give several
    names the same real path. The real path of the others is `home/name`."""
    folders: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each file or link that is not followed."""

    def once(self, names: Texts) -> tuple[Texts, list[tuple[str, str]]]:
        """Returns the names of distinct files, sorted, and (name, reason) of the others.

        Of several names of a file, the one that is not a link is kept, or else the first.
        """
        if not self.linked:
            return names.take(names.order()), []
        kept: dict[str, str] = {}
        again: list[tuple[str, str]] = []
        for name in sorted(names, key=lambda name: (self._is_link(name), name)):
            first = kept.setdefault(self.linked.get(name) or f"{self.home}/{name}", name)
            if first != name:
                again.append((name, "a link to an image that is listed"))
        return Texts(sorted(kept.values())), again

    def _is_link(self, name: str) -> bool:
        return not self.linked.get(name, f"/{name}").endswith(f"/{name}")


def same_name(part: str) -> str:
    """Returns the normalized form of a split's or class's name.

    Letter case is ignored, and Unicode is normalized (NFC).
    """
    return unicodedata.normalize("NFC", part).upper()


def hidden(part: str) -> bool:
    """Returns whether a file or folder of this name is ignored."""
    return (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX"


def may_be_dicom(name: str) -> bool:
    """Returns whether a file without the suffix .dcm may be DICOM.

    Many DICOM files have no suffix, or have the last number of a unique identifier as the suffix.
    """
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in _OF_DICOM or suffix[1:].isdigit()


def in_archive(name: str) -> str | None:
    """Returns an entry's name as a relative path; None if it leads out of the archive.

    Some programs write backslashes, a leading `./`, or a drive letter.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts or (parts and parts[0].endswith(":")):
        return None
    return "/".join(parts)


def walk(root: Path, *, confined: bool) -> Walked:
    """Lists the content of a folder, without hidden files.

    Links are followed, since version control of data sets uses them. Cycles are not followed; of
    several links to a folder only the first is followed.

    Args:
        root: the folder.
        confined: whether links that lead out of the root are refused.

    Raises:
        InputError: a folder cannot be read.
    """
    home = os.path.realpath(root)
    found = Walked("" if home == "/" else home)
    found.files = Texts(_files(root, home, confined, found))
    return found


def _files(root: Path, home: str, confined: bool, found: Walked) -> Iterator[str]:
    """Yields the names of the files, and adds the rest to `found`."""
    followed: set[str] = set()
    # (name, target, targets of it and the folders above) of folders to list
    waiting: list[tuple[str, str, tuple[str, ...]]] = [("", home, (home,))]
    while waiting:
        folder, real, above = waiting.pop()
        prefix = f"{folder}/" if folder else ""
        names, others = _listed(root / folder, prefix)
        if folder and real != f"{found.home}/{folder}":
            beside = real.rstrip("/")
            found.linked |= {name: f"{beside}/{name.removeprefix(prefix)}" for name in names}
        yield from names
        for entry in others:
            name = prefix + entry.name
            target = os.path.join(real, entry.name)  # noqa: PTH118
            if entry.is_symlink():
                linked = Path(os.path.realpath(target))
                if linked.exists():  # otherwise reading it raises an error
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
                if target != f"{found.home}/{name}":
                    found.linked[name] = target
                yield name


def _listed(folder: Path, prefix: str) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Returns the content of a folder, without hidden entries.

    Returns:
        The names of regular files, each after the prefix, sorted; and all other entries, sorted by
        name in reverse.
    """
    plain, others = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if hidden(entry.name):
                    continue
                # Only the name is kept: an entry takes four times its memory.
                if entry.is_file(follow_symlinks=False):
                    plain.append(prefix + entry.name)
                else:
                    others.append(entry)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read ({error.strerror}); change its permissions"
        ) from None
    return sorted(plain), sorted(others, key=lambda entry: entry.name, reverse=True)
