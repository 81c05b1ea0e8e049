"""Machine code kept on disk goes with the sources that it was made of."""

import re
from pathlib import Path

import pytest

from r1q.quantize.grids import arithmetic


def test_an_edit_of_any_kernel_renews_all_machine_code_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of other files are inlined into a kernel, and numba alone would go on taking the old code from its folder."""
    room = Path(arithmetic.__file__).parents[1]
    files = [path for path in room.rglob("*.py") if re.search("^@(kernel|inlined)$", path.read_text(), re.MULTILINE)]
    assert {path.parent.name for path in files} >= {"quantize", "grids", "gptq"}
    read_bytes, stamp = Path.read_bytes, arithmetic._sources.__wrapped__
    before = stamp()
    for edited in files:
        monkeypatch.setattr(Path, "read_bytes", lambda path, e=edited: read_bytes(path) + b"#" * path.samefile(e))
        assert stamp() != before, edited
    monkeypatch.undo()
    assert stamp() == before
