"""What was written is on the disk before what it replaces goes; signals wait for it."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from cnnjax.cli import guarded
from cnnjax.machine.files import save_array, write_atomically
from cnnjax.run import signals
from cnnjax.run.checkpoint import Checkpoints, Kind
from cnnjax.run.workdir import append_line
from cnnjax.steps import TrainState

posix = pytest.mark.skipif(os.name != "posix", reason="the system has no such calls")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes of files and folders of which the process has waited for the disk."""
    found: set[int] = set()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        found.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", watched)
    return found


def state_of(number: int) -> TrainState:
    return TrainState(np.int32(number), {"kernel": np.full(5, number, np.float32)}, {}, (), None)


@posix
@pytest.mark.parametrize("kind", ["latest", "best", "within"])
def test_a_checkpoint_goes_when_the_disk_has_the_next(
    kind: Kind, tmp_path: Path, synced: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at every instant one is there that can be restored."""
    remove, gone = Checkpoints._remove, []

    def watched(self: Checkpoints, its: Kind, epoch: int) -> None:
        newest = tmp_path / kind / str(max(int(path.name) for path in (tmp_path / kind).iterdir()))
        assert newest.name != str(epoch)
        for path in (newest, *newest.rglob("*"), newest.parent):
            assert path.stat().st_ino in synced, path
        assert Checkpoints(tmp_path).epoch(kind) == int(newest.name)
        gone.append(epoch)
        remove(self, its, epoch)

    monkeypatch.setattr(Checkpoints, "_remove", watched)
    checkpoints = Checkpoints(tmp_path)
    for epoch in (1, 2, 3):
        checkpoints.save((kind,), epoch, state_of(epoch))
    checkpoints.close()
    assert gone == ([1] if kind == "latest" else [1, 2])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_is_one_sentence_and_what_was_saved_stays(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(("latest",), 1, state_of(1))
    checkpoints.wait()

    def failing(*_: object, **__: object) -> None:  # as Orbax says it
        raise ValueError(f"UNKNOWN: Error writing 'a/file': {os.strerror(number)}")

    def command() -> int:
        checkpoints.save(("latest",), 2, state_of(2))
        checkpoints.wait()
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "save", failing)
        assert guarded(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    checkpoints.close()
    assert Checkpoints(tmp_path).epoch("latest") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_of_the_disk_without_a_name_is_one_sentence(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise OSError(number, os.strerror(number))  # as `file.write` does

    assert guarded(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1


WRITERS: dict[str, Callable[[Path], None]] = {
    "a line": lambda path: append_line(path, {"epoch": 1}),
    "an array": lambda path: save_array(path, np.zeros(3)),
    "a text": lambda path: _write(path),
}


def _write(path: Path) -> None:
    with write_atomically(path) as file:
        file.write("text")


@posix
@pytest.mark.parametrize("writer", WRITERS)
def test_the_disk_has_what_was_written(tmp_path: Path, synced: set[int], writer: str) -> None:
    path = tmp_path / "file"
    WRITERS[writer](path)
    assert path.stat().st_ino in synced


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGHUP")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_first_signal_waits_and_a_second_ends_the_work(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with signals.held() as held:
            held.end()
            signal.raise_signal(number)
            assert held.asked == number
            with pytest.raises(signals.Ended) as first:
                held.end()
            with pytest.raises(signals.Ended) as second:
                signal.raise_signal(number)
        assert first.value.number == second.value.number == number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGHUP")
def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.held() as held:
            signal.raise_signal(signal.SIGHUP)
            assert held.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)
