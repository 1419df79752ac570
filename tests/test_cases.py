"""The inputs of ../shared/cases, where that folder is, against the pixels that go with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cnnjax.data.decode import DecodeError, decode

CASES = Path(__file__).parent.parent.parent / "shared" / "cases"
CODECS = importlib.util.find_spec("imagecodecs") is not None

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no folder ../shared/cases")

EXPECTED = sorted(CASES.glob("*/expected_*.npy")) if CASES.is_dir() else []
DAMAGED = sorted(CASES.glob("jpeg_corrupt_accepted/*[0-9d].jpg")) if CASES.is_dir() else []


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.stem.removeprefix("expected_"))
def test_pixels_are_what_the_file_means(path: Path) -> None:
    if "lossless" in path.name and not CODECS:
        pytest.skip("imagecodecs, which decodes JPEG Lossless, is not installed")
    expected = np.load(path)
    encoded = path.with_name(path.stem.removeprefix("expected_")).read_bytes()
    found = decode(encoded, len(expected)).astype(float)
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("path", DAMAGED, ids=lambda path: path.stem)
def test_damaged_jpegs_are_refused(path: Path) -> None:
    with pytest.raises(DecodeError, match=r"broken image: |scans of the JPEG are missing"):
        decode(path.read_bytes(), 224)
