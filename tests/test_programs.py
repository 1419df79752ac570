"""Compiled programs are kept for the next start, and damaged ones are replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnjax.machine.programs import Programs

_COMPILE = """
import jax
from cnnjax.machine.devices import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.monitoring.register_event_listener(lambda name, **_: print(name.rpartition("/")[2]))
print(jax.jit(lambda x: 2 * x + 1)(20))
"""


def compiled(home: Path) -> tuple[int, int, str]:
    """Returns how many programs a process of its own found and how many it kept, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=os.environ | {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.split()
    assert lines[-1] == "41", done.stderr
    return lines.count("cache_hits"), lines.count("cache_misses"), done.stderr


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def test_damaged_programs_are_compiled_anew_kept_and_told(tmp_path: Path) -> None:
    _, made, told = compiled(tmp_path)
    assert not told
    kept = sorted(tmp_path.rglob("*-cache"))
    assert len(kept) == made >= 1
    for path, damage in zip(kept, (flipped, cut, emptied), strict=False):
        path.write_bytes(damage(path.read_bytes()))
    damaged = min(3, made)
    found, again, told = compiled(tmp_path)
    assert (found, again) == (made - damaged, damaged)
    assert told.count("are damaged and are compiled again") == len(told.splitlines()) == 1
    assert sorted(tmp_path.rglob("*-cache")) == kept
    assert all(path.stat().st_size > 100 for path in kept)


@pytest.mark.parametrize("damage", [flipped, cut, emptied])
def test_a_damaged_program_is_none(
    tmp_path: Path, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    programs = Programs(tmp_path)
    for key in ("a", "b"):
        programs.put(key, b"a program, compressed")
        assert programs.get(key) == b"a program, compressed"
        path = tmp_path / f"{key}-cache"
        path.write_bytes(damage(path.read_bytes()))
        assert programs.get(key) is None
    assert capsys.readouterr().err.count("are damaged and are compiled again") == 1
    assert list(tmp_path.iterdir()) == []
    programs.put("a", b"another")
    assert programs.get("a") == b"another"


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    programs = Programs(tmp_path / "gone")
    programs.put("a", b"a program")
    assert programs.get("a") is None
