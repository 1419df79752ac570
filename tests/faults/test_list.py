"""The list of fault classes names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults.classes import CLASSES, class_of

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("name", [name for tests in CLASSES.values() for name in tests])
def test_every_test_that_is_named_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    text = (TESTS / file).read_text()
    assert re.search(rf"^def {function or 'test_.*'}\(", text, re.MULTILINE)


def test_a_test_is_found_by_its_name_whatever_its_parameters() -> None:
    assert class_of("tests/test_bounds.py::test_any") == "files that cost more than they weigh"
    assert class_of("tests/test_decode.py::test_reasons[a-b]") == "damaged images"
    assert class_of("tests/test_decode.py::test_one_bit") is None
