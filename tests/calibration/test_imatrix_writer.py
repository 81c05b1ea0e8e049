"""The imatrix writer: byte for byte llama-imatrix's own file, read back by us, by gguf, and used by llama-quantize."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1q.calibration.imatrix import write_imatrix
from r1q.core.errors import InputError
from r1q.core.gguf_file import GgufFile
from r1q.core.imatrix_file import read_imatrix

MakeModel = Callable[..., Path]
GOLDEN = Path(__file__).resolve().parents[1] / "core" / "golden" / "tiny.imatrix.gguf"


def test_the_bytes_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    """Its own file, taken apart by the gguf package and written again by us."""
    theirs = gguf.GGUFReader(GOLDEN)
    tensors = {str(tensor.name): np.array(tensor.data) for tensor in theirs.tensors}
    names = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
    write_imatrix(
        tmp_path / "ours.gguf",
        {name: tensors[f"{name}.in_sum2"] for name in reversed(names)},
        {name: int(tensors[f"{name}.counts"][0]) for name in names},
        datasets=["text.txt"],
        chunks=3,
        chunk_size=64,
    )
    assert (tmp_path / "ours.gguf").read_bytes() == GOLDEN.read_bytes()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.dictionaries(
        st.from_regex(r"blk\.[0-9]{1,2}\.[a-z_]{1,12}\.weight", fullmatch=True),
        st.tuples(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40), st.integers(1, 1 << 24)),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_is_read_back_as_means(tmp_path: Path, rows: dict[str, tuple[list[float], int]]) -> None:
    sums = {name: np.array(values, np.float64) for name, (values, _) in rows.items()}
    counts = {name: count for name, (_, count) in rows.items()}
    write_imatrix(tmp_path / "i.gguf", sums, counts, datasets=["a", "b"], chunks=9, chunk_size=512)
    found = read_imatrix(tmp_path / "i.gguf")
    assert found.chunks == 9
    assert set(found.columns) == set(rows)
    for name, values in found.columns.items():
        np.testing.assert_array_equal(values, sums[name].astype(np.float32) / np.float32(counts[name]))
    file = GgufFile.open(tmp_path / "i.gguf")
    datasets: Any = file.metadata["imatrix.datasets"]
    assert list(datasets) == ["a", "b"]
    assert file.metadata["imatrix.chunk_size"] == 512


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 1e39])
def test_sums_that_are_no_sums_are_refused_and_nothing_is_left(tmp_path: Path, bad: float) -> None:
    sums = {"blk.0.attn_q.weight": np.ones(4), "blk.1.attn_q.weight": np.array([1.0, bad])}
    counts = dict.fromkeys(sums, 8)
    with pytest.raises(InputError, match=r"blk\.1\.attn_q\.weight"):
        write_imatrix(tmp_path / "i.gguf", sums, counts, datasets=[], chunks=1, chunk_size=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "count", "reason"),
    [((), 1, "without counts"), (("a",), 0, "summed over 0"), (("a" * 60,), 1, "more than 63 bytes")],
)
def test_our_own_mistakes_are_named(tmp_path: Path, names: tuple[str, ...], count: int, reason: str) -> None:
    sums = dict.fromkeys(names or ("a",), np.ones(2))
    with pytest.raises(ValueError, match=reason):
        write_imatrix(tmp_path / "i", sums, dict.fromkeys(names, count), datasets=[], chunks=1, chunk_size=8)


@pytest.mark.skipif("R1Q_LLAMA_TOOLS" not in os.environ, reason="R1Q_LLAMA_TOOLS names no folder with llama-quantize")
def test_llama_quantize_takes_it_and_uses_it(make_model: MakeModel, tmp_path: Path) -> None:
    """Its Q4_K_M is then ours with the same file, and no tensor is what it would be without."""
    from r1q.core.artifact import OutputFolder
    from r1q.core.recipe import Recipe
    from r1q.models.embedded import open_model
    from r1q.plan.plan import make_plan
    from r1q.plan.walk import Exported, quantize_model

    def made(scheme: str, imatrix: Path | None = None) -> Path:
        plan = make_plan(opened.source, Recipe.named(scheme), ("gguf",), imatrix)
        *_, exported = quantize_model(opened, plan, OutputFolder(tmp_path / scheme))
        assert isinstance(exported, Exported)
        return exported.path

    opened = open_model(str(make_model("llama", hidden_size=256, intermediate_size=512)))
    rng = np.random.default_rng(3)
    inside = [spec for spec in opened.source.tensors if spec.is_matrix and spec.layer is not None]
    sums = {spec.gguf_name: rng.gamma(0.3, size=spec.columns) * 640 for spec in inside}
    imatrix = tmp_path / "i.gguf"
    write_imatrix(imatrix, sums, dict.fromkeys(sums, 640), datasets=["text.txt"], chunks=10, chunk_size=64)
    tools = Path(os.environ["R1Q_LLAMA_TOOLS"])
    command = [
        str(tools / "llama-quantize"),
        "--imatrix",
        str(imatrix),
        str(made("bf16")),
        str(tmp_path / "theirs.gguf"),
    ]
    done = subprocess.run(
        [*command, "Q4_K_M"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tools)},
        capture_output=True,
        check=False,
    )
    log = (done.stdout + done.stderr).decode(errors="replace")  # it cuts tokens of bytes in the middle of a character
    assert done.returncode == 0, log
    assert f"{len(sums)} importance matrix entries" in log
    theirs = GgufFile.open(tmp_path / "theirs.gguf")
    for scheme, same in ((made("q4_k_m", imatrix), True), (made("q4_k_s"), False)):
        ours = GgufFile.open(scheme)
        equal = [np.array_equal(ours.read_bytes(name), theirs.read_bytes(name)) for name in sums]
        assert all(equal) if same else not any(equal)
