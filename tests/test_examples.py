"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from r1q.core.errors import MissingError

ROOT = Path(__file__).resolve().parents[1]
SHOWING = sorted(
    path.relative_to(ROOT).with_suffix("")
    for path in ROOT.glob("[a-z]*/**/*.py")
    if path.relative_to(ROOT).parts[0] not in ("tests", "r1q") and "\n    >>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", SHOWING, ids=str)
def test_examples(module: Path) -> None:
    try:
        imported = importlib.import_module("r1q." + ".".join(module.parts))
    except MissingError as missing:
        pytest.skip(str(missing))
    found = doctest.testmod(imported)
    assert found.attempted > 0
    assert found.failed == 0
